"""Reports, cross-sections and certificates with numbers made up: as many of everything as a test asks for."""
import pandas as pd
import torch

from sage_nb.core.activations import Node
from sage_nb.core.intervals import Estimate
from sage_nb.discovery.attribution import NodeScores
from sage_nb.discovery.sections import CrossSection, CrossSections
from sage_nb.measures.faithfulness import SPARSE_KS, SparseRuns
from sage_nb.measures.score import Answers, Evidence
from sage_nb.report.report import COLUMNS, SageReport
from sage_nb.saes.baselines import FLOOR, IDENTITY, twin_name
from sage_nb.views.explorers import Explorer, quantised, table_of

SKYLINE, MEASURED = "supervised", {"R²": 0.9, "ablation cost": 2.0, "fraction recovered": 0.95, "necessity": 0.95,
                                   "edit effect": 0.9, "off-target change of S": 0.02}


def near(value, n=64): return Estimate(value, value - 0.05, value + 0.05, n)


def cross_sections(names=("IO:z@END", "IO:v@IO", "S:v@S2"), layers=3, heads=4):
    "Cross-sections of these names, of two nodes each, and scores of all heads."
    found, scores = [], {}
    for name in names:
        attribute, _, place = name.rpartition(":")
        site, _, position = place.partition("@")
        nodes = [Node(site, layer, head, position) for layer in range(layers) for head in range(heads)]
        curve = {1: near(-0.5), 2: near(-0.8), len(nodes): near(-0.9)}
        found.append(CrossSection(attribute, site, position, tuple(nodes[:2]), (-0.5, -0.3), curve, near(0.0),
            near(-0.7)))
        effects = torch.linspace(-1, 0.2, len(nodes)).expand(3, -1) * torch.ones(3, 1)
        known = scores.get(attribute)
        if known is None: scores[attribute] = NodeScores(attribute, "made up", nodes, effects, torch.ones(3))
        else:
            both = torch.cat([known.effects, effects], 1)
            scores[attribute] = NodeScores(attribute, "made up", [*known.nodes, *nodes], both, torch.ones(3))
    dropped = pd.DataFrame([dict(attribute="Pos", site="q", position="END", effect=0.02, lo=0.0, hi=0.04,
        reason="small")])
    scores["Pos"] = NodeScores("Pos", "made up", [], torch.zeros(3, 0), torch.ones(3))
    return CrossSections(tuple(found), dropped, scores, {"coverage": 0.9})


def evidence(name, share, n=40):
    "That an SAE's few latents keep a share of the metric, where the ground truth keeps all of it."
    clean = torch.linspace(3, 5, n)

    def some(x):
        wobble = x + 0.02 * torch.sin(torch.arange(n))
        kept, left_out = ((y * clean)[:, None].expand(-1, len(SPARSE_KS)) for y in (wobble, 1 - wobble))
        return Answers(SparseRuns(clean, 0 * clean, kept, left_out))
    return Evidence(name, some(share), some(1.0), 0.8)


def _rows(sae, section, test, metric, values):
    place = dict(zip(("attribute", "site", "position"), ("IO", "z", "END")))
    return [{"sae": sae, **place, "section": section, "test": test, "metric": metric, "k": k, "value": x,
        "lo": x - 0.05,
             "hi": x + 0.05, "n": 64} for k, x in values]


def table(names, sections):
    rows = []
    for section in sections:
        for metric, x in MEASURED.items():
            known = metric in ("fraction recovered", "necessity")
            rows += _rows(SKYLINE, section, 1 if known else 0, metric, [(None, x)])
        for name in names:
            rows += _rows(name, section, 1, "sparse faithfulness", [(k, 0.7) for k in SPARSE_KS])
            rows += _rows(name, section, 1, "fraction recovered", [(None, 0.8)])
            rows += _rows(name, section, 2, "edit success", [(1, 0.3), (8, 0.8)])
    return pd.DataFrame(rows, columns=COLUMNS).astype({"k": "Int64"})


def report(sets=("an SAE",), sections=("IO:z@END", "IO:v@IO", "S:v@S2"), task="ioi", explorers=True):
    "A report of these sets, whose last section does not count."
    counted = list(sections[:-1])
    plain = [FLOOR, *map(twin_name, sets), IDENTITY]
    shares = {**dict.fromkeys(plain, 0.1), **{name: 0.7 - 0.1 * i for i, name in enumerate(sets)}, SKYLINE: 1.0,
        FLOOR: 0.0}
    scores = pd.DataFrame({"sae": list(shares), "score": list(shares.values())})
    scores = scores.assign(lo=scores.score - 0.02, hi=scores.score + 0.02, faithfulness=scores.score)
    found = cross_sections(sections)
    about = found.table().assign(
        section=list(sections), counts=[name in counted for name in sections], weight=0.8, lexical=False,
        reason=["" if name in counted else "R² 0.10 [0.00, 0.20] is not above 0" for name in sections])
    about["best baseline"], about["baseline score"], about["same path as"] = IDENTITY, 0.1, ""
    values = [{"set": name, "section": section, "value": value, "reason": reason}
              for name in sets for section in counted
              for value, reason in (("Anna", "own latent"), ("Tom", "split into 2"), ("Jane", "merged with Anna"))]
    settings = {
        "task": {"name": task, "hash": "x", "held out": 64}, "model": {"name": "tiny", "hash": "m", "dtype": "float32"},
        "score_version": 2, "baselines": plain[1:], "sections": "s", "tests": [1], "ks": [1, 8], "projection": {},
        "dictionaries": {"hash": "d", "label": "mse"}, "certificate": {"tolerance": 0.5, "max_off_target": 0.1},
        "saes": {name: {"l0": 4.0 * (i + 1)} for i, name in enumerate(sets)}}
    fit = pd.DataFrame([{"set": name, "place": "L0.resid_pre", "variance explained": 0.95, "L0": 4.0, "verdict": "good",
                         "cause": ""} for name in sets])
    seen = {"effects": an_explorer(sections)} if explorers else {}
    return SageReport(
        table(sets, sections), scores, about, pd.DataFrame(columns=["set", "section", "latent", "predicate", "f1"]),
            settings,
        ["a note"], {name: [evidence(section, shares[name]) for section in counted] for name in shares},
        fit, pd.DataFrame(values), found, seen)


def an_explorer(names):
    frame = pd.DataFrame({"node": list(names), "effect": [0.1 * i for i in range(len(names))]})
    columns = [{"key": "node", "name": "node"}, {"key": "effect", "name": "effect", "number": True}]
    data = {"caption": "effects", "columns": columns, "rows": quantised(frame)}
    return Explorer("table", "Effects", data, table_of(frame, "effects"))
