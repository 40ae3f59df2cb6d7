"""Numbers that must stay the same: from one release to the next, and whatever it is that does not matter.

`tests/golden/` holds the evidence of one small evaluation, as a report saves it, and the numbers that were computed
from it. Who changes what the same evidence scores raises SCORE_VERSION, says so in the changelog, and makes them again:

    python tests/test_same_numbers.py
"""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from sage_nb.core.activations import Node
from sage_nb.core.intervals import Estimate, means
from sage_nb.core.models import load_model
from sage_nb.discovery.sections import CrossSection, CrossSections
from sage_nb.measures.named import MEASURES, measure_of
from sage_nb.measures.score import (
    PARTS, SCORE_VERSION, compare, margin, reached, sage_score, score_parts, section_scores)
from sage_nb.measures.units import is_on
from sage_nb.report.attacks import leaking, permuted, rescaled, with_dead_copies
from sage_nb.report.evaluation import evaluate
from sage_nb.report.report import evidence_of_tensors
from sage_nb.report.trials import FLOOR, IDENTITY, SKYLINE, Settings, planted, try_section
from sage_nb.saes.reconstruction import decompose
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries
from sage_nb.truth.runs import set_up

GOLDEN = Path(__file__).parent / "golden" / f"score_v{SCORE_VERSION}"
TRAINED, PLAIN = ("tiny-gpt2-res-topk", "tiny-gpt2-res-standard"), (IDENTITY, "PCA-4")
NODES = {  # of the number in `agreement`; what edits do is seen by success at z, by effect at k
    ("z", "END"): ("L2H1.z@END", "L2H3.z@END", "L2H2.z@END"), ("k", "N"): ("L2H3.k@N", "L2H2.k@N", "L1H2.k@N")}


def cross_sections():
    "Two cross-sections of the number, written down: discovery plays no part."
    none, sections = Estimate(0.0, 0.0, 0.0, 1), []
    for (site, position), nodes in NODES.items():
        nodes = tuple(map(Node.parse, nodes))
        sections.append(CrossSection("number", site, position, nodes, (0.0,) * len(nodes), {len(nodes): none}, none))
    return CrossSections(tuple(sections), pd.DataFrame(), {"number": None}, {})


def laboratory():
    "A small task on the embedded model, with its ground truth."
    model, sections = load_model("tiny-gpt2"), cross_sections()
    task = load_task("agreement", model, n=96)
    return SimpleNamespace(model=model, task=task, sections=sections, truth=fit_dictionaries(model, task, sections))


# Golden numbers

def numbers_of(evidence):
    "All that is computed from the evidence of several methods."
    plain, numbers = {name: evidence[name] for name in PLAIN}, {}
    for name, some in evidence.items():
        parts = score_parts(some)
        scores = section_scores(parts).tolist()
        numbers[name] = {"parts": parts.tolist(), "sections": scores, "score": [*sage_score(some)]}
        if name in PLAIN: continue
        beside = margin(some, plain, name)
        numbers[name] |= {"margin": [*beside.difference], "above": beside.b}
    both = compare(*(evidence[name] for name in TRAINED), TRAINED)
    sections = evidence[TRAINED[0]]
    planted_one = [reached(means(e.planted), e.measure).tolist() for e in sections]
    return {"methods": numbers, "difference": [[*both.difference], *map(list, both.parts.values())],
            "planted": planted_one, "measures": [measure_of(e.planted.named) for e in sections]}


def make_golden():
    "Evaluate, and write the evidence and its numbers."
    lab, folder = laboratory(), GOLDEN.parent
    report = evaluate(lab.model, lab.task, lab.sections, lab.truth, list(map(load_saes, TRAINED)), twins=False,
                      diagnostics=False, progress=False)
    evidence = {name: report.evidence[name] for name in (*TRAINED, *PLAIN)}
    replace(report, evidence=evidence).save(folder, page=False)
    (folder / "evidence.safetensors").rename(GOLDEN.with_suffix(".safetensors"))
    for name in ("report.json", "table.csv"): (folder / name).unlink()
    about = {name: [[e.section, e.weight, e.measure] for e in some] for name, some in evidence.items()}
    content = {"score_version": SCORE_VERSION, "evidence": about, "numbers": numbers_of(evidence)}
    GOLDEN.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


@pytest.fixture(scope="module")
def golden(): return json.loads(GOLDEN.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def evidence(golden):
    tensors, found = load_file(GOLDEN.with_suffix(".safetensors")), {}
    for name, some in golden["evidence"].items():
        found[name] = []
        for i, about in enumerate(some):
            start = f"{name}|{i}|"
            mine = {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}
            found[name].append(evidence_of_tensors(mine, *about))
    return found


def flat(numbers, name=""):
    "Every number of nested lists and dicts by the path to it."
    if isinstance(numbers, dict): parts = numbers.items()
    elif isinstance(numbers, list): parts = enumerate(numbers)
    else: return {name: numbers}
    found = {}
    for key, part in parts: found |= flat(part, f"{name}.{key}")
    return found


def test_the_same_evidence_gives_the_same_numbers(golden, evidence):
    "Whoever means to change them: see the top of this file."
    assert golden["score_version"] == SCORE_VERSION
    expected, found = flat(golden["numbers"]), flat(numbers_of(evidence))
    assert list(found) == list(expected)
    for name, number in expected.items():
        assert found[name] == (number if isinstance(number, str) else pytest.approx(number, abs=1e-9)), name


def test_the_golden_numbers_are_of_both_measures_and_none_is_trivial(golden):
    assert golden["numbers"]["measures"] == list(MEASURES)
    trained = [golden["numbers"]["methods"][name] for name in TRAINED]
    for of_one, of_other in zip(*(numbers["parts"] for numbers in trained)):
        for both in zip(of_one, of_other): assert any(0.05 < part < 0.99 for part in both), "so that a change shows"
    assert all(numbers["margin"][0] > 0.1 for numbers in trained)
    size = sum(path.stat().st_size for path in GOLDEN.parent.iterdir())
    assert size < 200_000, f"{size} bytes"


# What must not matter

def changed(saes, name, change):
    "A set of changed SAEs."
    return SAESet(name, {sae.node: change(sae) for sae in saes})


def renumbered(sae): return permuted(sae, torch.Generator().manual_seed(0))


def with_longer_directions(sae): return rescaled(sae, torch.Generator().manual_seed(0))


CHANGES = {"leaking": leaking, "rescaled": with_longer_directions, "renumbered": renumbered,
           "with dead copies": with_dead_copies}


@pytest.fixture(scope="module")
def lab(): return laboratory()


@pytest.fixture(scope="module")
def sets(): return {name: load_saes(name) for name in TRAINED}


def tried(lab, section, sets, batch_size=64):
    "The parts of some sets in one section."
    bench = set_up(lab.model, lab.task, section, lab.truth, batch_size)
    trial = try_section(bench, lab.task, sets(bench), Settings(batch_size=batch_size))
    return {name: score_parts([trial.evidence(name)])[0] for name in trial.methods}, trial


@pytest.fixture(scope="module")
def parts(lab, sets):
    "By section, the parts of the trained sets, and of one of them and of the planted dictionary, changed."
    def all_of(bench):
        one = sets[TRAINED[0]]
        return [*sets.values(), *(changed(one, how, change) for how, change in CHANGES.items()),
                changed(planted(bench), "planted, leaking", leaking)]
    return {section.name: tried(lab, section, all_of)[0] for section in lab.sections}


def test_a_fresh_evaluation_gives_the_golden_parts(parts, golden):
    "But for what another machine, or another release of torch, rounds otherwise."
    for name in (*TRAINED, IDENTITY):
        for i, section in enumerate(parts.values()):
            assert section[name].tolist() == pytest.approx(golden["numbers"]["methods"][name]["parts"][i], abs=2e-3)


@pytest.mark.parametrize("how", CHANGES)
def test_what_says_the_same_scores_the_same(parts, how):
    most = 5e-3 if how == "leaking" else 1e-5
    for section in parts.values(): assert (section[how] - section[TRAINED[0]]).abs().max() <= most


def test_a_leak_is_there_before_it_is_left_out(lab, sets):
    "Every latent says something, and none of those that only leak is on."
    node = lab.sections[0].nodes[0]
    clean, leaky = (decompose(lab.model, lab.task.prompts[:8], [node], saes, by_latent=True)[node]
                    for saes in (sets[TRAINED[0]], changed(sets[TRAINED[0]], "leaking", leaking)))
    said = [(part.latents != 0).any(-1).sum().item() for part in (clean, leaky)]
    assert said[1] > 10 * said[0]
    on = [is_on(part, 0.0).sum().item() for part in (clean, leaky)]
    assert on[0] == on[1] <= said[0]


def test_the_planted_dictionary_scores_1_and_nothing_scores_0(parts):
    for section in parts.values():
        assert (section[SKYLINE] == 1).all() and (section[FLOOR] == 0).all()
        assert (section["planted, leaking"] >= 0.995).all()
        for name in TRAINED: assert (section[name] > 0).all() and (section[name] < 1).any()


def test_the_size_of_batches_and_the_order_of_sets_do_not_matter(lab, sets, parts):
    section = lab.sections[1]
    backwards, trial = tried(lab, section, lambda bench: [*sets.values()][::-1], batch_size=17)
    for name in (*TRAINED, SKYLINE, IDENTITY, FLOOR):
        assert backwards[name].tolist() == pytest.approx(parts[section.name][name].tolist(), abs=1e-4)
    assert trial.measure == "effect" and [*trial.trials] == [SKYLINE, IDENTITY, *TRAINED[::-1]]


if __name__ == "__main__": make_golden()


@pytest.mark.parametrize("dtype,off", [(torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str)
def test_a_model_of_16_bits_scores_about_what_one_of_32_does(lab, parts, dtype, off):
    "What is read of it has 32 bits, what it computes is rounded: bfloat16 has 8 bits for a logit of 20."
    model = load_model("tiny-gpt2", dtype=dtype)
    task = load_task("agreement", model, n=96)
    truth = fit_dictionaries(model, task, lab.sections)
    report = evaluate(model, task, lab.sections, truth, load_saes(TRAINED[0]), twins=False, diagnostics=False,
                      progress=False)
    dictionary = truth[lab.sections[0].nodes[0]]
    assert dictionary.mean.dtype in (torch.float32, torch.float64)
    for name, section in parts.items():
        found = report.parts().loc[(TRAINED[0], name), list(PARTS)].tolist()
        assert found == pytest.approx(section[TRAINED[0]].tolist(), abs=off)
