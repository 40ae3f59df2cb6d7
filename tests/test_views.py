"""What objects show of themselves stays short and is escaped, however much is in them."""
import json
from html.parser import HTMLParser

import made_up
import pandas as pd
import pytest
import torch

from sage_nb.core.activations import Node
from sage_nb.discovery.tables import LINES
from sage_nb.discovery.attribution import NodeScores
from sage_nb.measures.certificate import Certificate, Criteria
from sage_nb.measures.score import Comparison
from sage_nb.report.report import SageReport
from sage_nb.report.validation import Validation
from sage_nb.saes.codes import SparseSAE
from sage_nb.saes.sets import SAESet
from sage_nb.truth.dictionaries import Dictionaries
from sage_nb.truth.features import Dictionary, Features
from sage_nb.views.style import painted

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e'\"&" + 10_000 * "x"
N = 400


def names(n, plain): return [f"{'A' if plain else HOSTILE}{i}" for i in range(n)]


def a_dictionary(plain):
    "Of 400 attributes; the first has 2,000 values."
    features = []
    for i, name in enumerate(names(N, plain)):
        values = tuple((value,) for value in names(2000 if i == 0 else 2, plain))
        features.append(Features((name,), values, torch.randn(len(values), 4), torch.ones(len(values)).long(), 1.0))
    return Dictionary(torch.zeros(4), tuple(features))


def dictionaries(plain):
    nodes = [Node("z", layer, None, position) for layer, position in enumerate(names(N, plain))]
    fit = pd.DataFrame({"node": list(map(str, nodes)), "r2": 0.9, "lo": 0.8, "hi": 1.0, "products": "", "new": 0.0})
    return Dictionaries("mse", dict.fromkeys(nodes, a_dictionary(plain)), fit)


def node_scores(plain):
    nodes = [Node("z", layer, 0, position) for layer, position in enumerate(names(N, plain))]
    attribute = "IO" if plain else HOSTILE
    return NodeScores(attribute, "made up", nodes, torch.randn(20, N), torch.ones(20), "" if plain else HOSTILE)


def a_certificate(plain):
    measures = {name: {"R²": made_up.near(0.9)} for name in names(N, plain)}
    return Certificate(measures, {name: [name] for name in measures}, Criteria())


def an_sae(name, node="L0.resid_pre"):
    return SparseSAE(node, torch.zeros(8, 4), torch.zeros(4), torch.relu, name, architecture=name)


def a_set(plain):
    name = "an SAE" if plain else HOSTILE.replace("\u202e", "")  # a set's name is a line of text
    return SAESet(name, {Node("resid_pre", layer): an_sae(name, f"L{layer}.resid_pre") for layer in range(N)})


def a_validation(plain):
    index = pd.MultiIndex.from_product([names(60, plain), range(40)], names=["ladder", "rung"])
    ranks = pd.DataFrame({"score": 1.0}, pd.Index(names(60, plain)))
    return Validation(None, ranks, pd.DataFrame({"score": 0.5}, index))


def sections_of(plain): return [f"{name}:z@END" for name in names(N if plain else 40, plain)]


def comparison(plain):
    a, b = names(2, plain)
    return Comparison(a, b, made_up.near(0.2), {"control": made_up.near(0.1)})


THINGS = {
    "CrossSections": lambda plain: made_up.cross_sections(sections_of(plain), 1, 2),
    "CrossSection": lambda plain: made_up.cross_sections(sections_of(plain)[:1], 40, 40)[0],
    "NodeScores": node_scores, "Dictionaries": dictionaries, "Dictionary": a_dictionary, "Certificate": a_certificate,
    "Features": lambda plain: a_dictionary(plain).features[0], "SAESet": a_set,
    "SparseSAE": lambda plain: an_sae("an SAE" if plain else HOSTILE), "Comparison": comparison,
        "Validation": a_validation,
    "SageReport": lambda plain: made_up.report(names(40, plain), sections_of(plain)[:40], explorers=False)}


@pytest.mark.parametrize("plain", [True, False], ids=["many", "hostile"])
@pytest.mark.parametrize("name", THINGS)
def test_a_text_fits_a_screen(name, plain):
    lines = repr(THINGS[name](plain)).splitlines()
    assert 0 < len(lines) <= LINES == 30
    if plain: assert max(map(len, lines)) <= 500


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.seen, self.attributes = set(), set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


TABLE = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "p", "bdi"}


@pytest.mark.parametrize("plain", [True, False], ids=["many", "hostile"])
@pytest.mark.parametrize("name", [name for name in THINGS if name not in ("Features", "SageReport")])
def test_a_notebook_shows_a_table_and_nothing_else(name, plain):
    html = THINGS[name](plain)._repr_html_()
    tags = Tags(html)
    assert tags.seen <= TABLE and tags.attributes <= {"class", "role", "tabindex", "aria-label", "style", "scope",
        "title"}
    assert len(html) < 400_000
    assert html.count("<tr>") <= 2 * 41


def test_a_report_that_was_loaded_shows_all_that_a_fresh_one_does(tmp_path):
    fresh = made_up.report(["an SAE", "another"])
    fresh.save(tmp_path)
    loaded = SageReport.load(tmp_path)
    page = loaded.page()
    assert page == fresh.page() == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 9 and page.count('data-kind="table"') == 1
    assert loaded.to_json() == fresh.to_json()
    torch.testing.assert_close(loaded.discovery.scores["IO"].share, fresh.discovery.scores["IO"].share)


def test_a_report_of_before_is_read_without_what_it_does_not_have(tmp_path):
    made_up.report().save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    for name in ("discovery", "explorers_sha256"): del data[name]
    (tmp_path / "report.json").write_text(json.dumps(data))
    (tmp_path / "explorers.json").unlink()
    old = SageReport.load(tmp_path)
    assert (old.discovery, old.explorers) == (None, {}) and "<h2>Scores</h2>" in old.page()


def test_one_look_per_sae_in_all_pictures():
    some = made_up.report(["an SAE", "another"])
    look = some.looks()
    assert look["an SAE"].colour != look["another"].colour
    html = some.page()
    for name in ("an SAE", "another"): assert html.count(painted(look[name].colour)) > 10
