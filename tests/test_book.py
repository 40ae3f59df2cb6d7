"""The book around the rooms: glossary, how-to pages, and the links between them."""
import json
import re
import sys
from pathlib import Path

import pytest
from execnb.nbio import dict2nb, mk_cell
from house import directives
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
GLOSSARY = NBS / "glossary.ipynb"
PAGES = [NBS / "index.ipynb", GLOSSARY, *(
    path for folder in ("tutorials", "how-to", "explanations") for path in sorted((NBS / folder).glob("*.ipynb")))]
MAX_LINE = 100  # characters of code that a page shows without scrolling


def prose(path):
    "The markdown of a notebook, without code blocks."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchor(heading):
    "The anchor that Quarto gives a heading: small letters, dashes for spaces, and no other punctuation than _ - ."
    kept = re.sub(r"[^\w\-. ]", "", heading.lower().strip())
    return re.sub(r"^[^a-z]+", "", kept.replace(" ", "-"))


def entries():
    "The glossary's terms and what is said of each."
    parts = re.split(r"^### (.+)$", prose(GLOSSARY), flags=re.M)[1:]
    return {term: re.split(r"^## ", text, flags=re.M)[0] for term, text in zip(parts[::2], parts[1::2])}


def links_to_glossary():
    "Each notebook with the anchors of the glossary that it links to."
    for path in sorted(NBS.rglob("*.ipynb")):
        if set(path.parts) & {"_proc", "_docs", ".ipynb_checkpoints"}: continue
        for found in re.findall(r"\]\((?:\.\./)*glossary\.ipynb#([^)\s]+)\)", prose(path)): yield path.stem, found


@pytest.mark.parametrize("heading, expected", [
    ("Whole group", "whole-group"), ("S1+1", "s11"),
    ("Off-target change", "off-target-change"), ("2. A task", "a-task")])
def test_anchors_are_made_as_quarto_makes_them(heading, expected):
    assert anchor(heading) == expected


def test_links_to_the_glossary_meet_a_term():
    anchors = {anchor(term) for term in entries()}
    links = list(links_to_glossary())
    assert links, "no page links to a term of the glossary"
    dead = [f"{page}: {name}" for page, name in links if name not in anchors]
    assert not dead, f"no such term in the glossary: {dead}"


def test_terms_have_one_anchor_each():
    anchors = [anchor(heading) for heading in re.findall(r"^##+ (.+)$", prose(GLOSSARY), flags=re.M)]
    assert len(set(anchors)) == len(anchors) > 30


@pytest.mark.parametrize("term", entries())
def test_a_term_is_explained_shortly(term):
    words = len(entries()[term].split())
    assert 20 <= words <= 120, f"{term!r} is explained in {words} words; a glossary says it in 20 to 120"


# Code that is seen fits the page

def wide_lines(cells):
    "The lines of code that a reader sees and must scroll to read; what stands behind `#|` is not shown."
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or {"hide", "code-fold"} & set(directives(source)): continue
        yield from (line for line in source.splitlines() if len(line) > MAX_LINE and not line.startswith("#|"))


@pytest.mark.parametrize("kind, source, wide", [
    ("code", "x" * 101, True), ("code", "x = 1\n" + "#" * 101, True), ("code", "#| slow\n" + "x" * 101, True),
    ("code", "x" * 100, False), ("code", "#| fig-alt: " + "x" * 101, False), ("markdown", "x" * 101, False),
    ("code", "#| hide\n" + "x" * 101, False), ("code", "#| code-fold: true\n" + "x" * 101, False)])
def test_wide_lines_are_those_that_are_seen(kind, source, wide):
    assert bool(list(wide_lines([dict(cell_type=kind, source=source)]))) is wide


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(NBS).as_posix())
def test_code_that_is_seen_fits_the_page(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    wide = [f"{path.name} has a line of {len(line)} characters: {line.strip()}" for line in wide_lines(cells)]
    assert not wide, "\n".join(wide)


# Cells that only check are folded on the site

@pytest.fixture
def folds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return pytest.importorskip("folds")


def processed(folds, *cells):
    "The sources of the cells of a notebook after `fold_checks`; markdown starts with a blank here."
    kinds = ["markdown" if text.startswith(" ") else "code" for text in cells]
    made = [dict(mk_cell(text, kind)) for text, kind in zip(cells, kinds)]
    nb = dict2nb(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5))
    NBProcessor(nb=nb, procs=[folds.fold_checks]).process()
    return [cell.source for cell in nb.cells]


def test_a_check_behind_code_is_folded(folds):
    *_, last = processed(folds, " It doubles:", "print(double(2))", "assert double(2) == 4")
    assert last == '#| code-fold: true\n#| code-summary: "Checks"\nassert double(2) == 4'


@pytest.mark.parametrize("cells", [
    (" By hand:", "assert double(2) == 4"),  # prose leads to it: it teaches
    (" By hand:", "#| hide\nx = 2", "assert double(x) == 4"),  # what is hidden does not stand between
    ("print(2)", "#| export\ndef f():\n    assert True"), ("print(2)", "print(3)"),
    ("x = 1", "#| eval: false\nassert x")])
def test_other_cells_are_left(folds, cells):
    assert "code-fold" not in "\n".join(processed(folds, *cells))


def test_a_check_with_an_output_is_left(folds):
    shown = dict(cell_type="code", source="assert True\nx", outputs=[{}])
    assert not folds.folded([dict(cell_type="code", source="x = 1", outputs=[]), shown])


def test_most_checks_of_the_rooms_are_folded_and_some_are_not(folds):
    all_, fold = 0, 0
    for path in NBS.glob("[0-9]*/*.ipynb"):
        cells = [dict(c, source="".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        all_ += sum(map(folds.checks_only, cells))
        fold += len(folds.folded(cells))
    assert 0.6 * all_ < fold < 0.95 * all_
