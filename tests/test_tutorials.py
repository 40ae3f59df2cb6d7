"""The tutorials are chapters of one book: each says what it takes and gives, asks, answers, and leads to the next."""
import json
import re
import xml.etree.ElementTree as ET
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from house import directives, has_assertion

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
FIRST = "tutorials/quickstart.ipynb"
MAX_LINE = 100  # characters of code that a page shows without scrolling
MAX_SECONDS = 15

cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf-8")
SOURCE = "{user}/{repo}".format(**cfg["DEFAULT"])


def in_order() -> list[str]:
    "The tutorials as the sidebar has them."
    sections = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    tutorials, = (part["contents"] for part in sections if part["section"] == "Tutorials")
    return tutorials if FIRST in tutorials else [FIRST, *tutorials]


ORDER = in_order()
CHAPTERS = [name for name in ORDER if name != FIRST]
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


def cells(name, kind=None):
    saved = json.loads((NBS / name).read_text(encoding="utf-8"))["cells"]
    return [dict(c, source="".join(c["source"])) for c in saved if kind in (None, c["cell_type"])]


def prose(name): return "\n".join(c["source"] for c in cells(name, "markdown"))


def option(cell, name):
    "The value of a Quarto option at the top of a code cell; None where it is not given."
    found = re.search(rf"^#\|\s*{name}:\s*(.+)$", cell["source"], re.M)
    return found and found[1].strip().strip('"')


def box(name) -> dict[str, str]:
    "The table below the title, by its first column."
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", cells(name)[1]["source"], re.M)
    return dict(rows)


def is_solution(cell): return cell["cell_type"] == "code" and option(cell, "code-summary") == "Solution"


def test_the_book_has_the_chapters_of_the_method():
    names = [Path(name).stem for name in ORDER]
    assert names == ["quickstart", "what_is_a_feature", "finding_cross_sections", "truth_and_certificate",
                     "one_sae_everywhere", "three_tests", "reading_a_scorecard"]


@each_chapter
def test_a_chapter_opens_with_what_it_takes_and_gives(name):
    opening = box(name)
    assert list(opening) == ["Time", "You will know", "You need", "Run it yourself"]
    minutes, seconds = map(int, re.search(r"(\d+) minutes to read; runs in about (\d+) s", opening["Time"]).groups())
    words = len(re.findall(r"\w+", prose(name)))
    assert words / 150 <= minutes <= words / 40, f"{words} words are not read in {minutes} minutes"
    assert seconds <= MAX_SECONDS and "measured" in opening["Time"]
    assert f"colab.research.google.com/github/{SOURCE}/blob/{cfg['DEFAULT']['branch']}/nbs/{name})" in \
        opening["Run it yourself"]


@each_chapter
def test_it_installs_itself_on_colab_and_nowhere_else(name):
    install = cells(name, "code")[0]
    assert f"git+https://github.com/{SOURCE}" in install["source"]
    assert option(install, "eval") == "false" and not install["outputs"]


@each_chapter
def test_every_picture_can_be_read_without_seeing_it(name):
    drawn = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", prose(name))
    pictures = [(alt, path) for alt, path in drawn if "open_in_colab" not in path]
    assert pictures, "a chapter has a picture that was drawn for it"
    for alt, path in pictures: assert len(alt) > 40 and (NBS / name).parent.joinpath(path).exists(), path
    for cell in cells(name, "code"):
        if not any("image/png" in out.get("data", {}) for out in cell["outputs"]): continue
        assert len(option(cell, "fig-alt") or "") > 40, f"a figure without fig-alt:\n{cell['source']}"


@each_chapter
def test_code_fits_the_page(name):
    lines = [line for cell in cells(name, "code") for line in cell["source"].splitlines()]
    wide = [line for line in lines if len(line) > MAX_LINE and not line.startswith("#| ")]
    assert not wide, wide


@each_chapter
def test_exercises_have_solutions_that_run_and_are_folded(name):
    after = prose(name).partition("## Exercises")[2]
    asked, solutions = re.findall(r"^\*\*(\d)\.\*\*", after, re.M), [c for c in cells(name) if is_solution(c)]
    assert asked == [str(i + 1) for i in range(len(asked))] and len(asked) in (2, 3)
    assert len(solutions) == len(asked)
    for cell in solutions:
        assert option(cell, "code-fold") == "true" and has_assertion(cell["source"])
        assert "eval" not in directives(cell["source"]) and not cell["outputs"], "an output gives the answer away"


@each_chapter
def test_claims_are_checked_by_visible_cells(name):
    checks = [c for c in cells(name, "code") if has_assertion(c["source"]) and not is_solution(c)]
    assert len(checks) >= 3
    assert not [c for c in checks if "hide" in directives(c["source"])]


@pytest.mark.parametrize("name,following", list(zip(ORDER, ORDER[1:])))
def test_a_chapter_leads_to_the_next(name, following):
    ends = [line for line in prose(name).splitlines() if line.startswith("**Next:**")]
    assert len(ends) == 1 and f"]({Path(following).name})" in ends[0]


@pytest.mark.parametrize("path", sorted((NBS / "images").glob("*.svg")), ids=lambda path: path.name)
def test_drawings_stand_alone(path):
    root = ET.parse(path).getroot()
    assert root.find("{http://www.w3.org/2000/svg}title") is not None and root.get("viewBox")
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org", "")
    assert not re.search(r"<script|<image|href=|https?://", text), "a drawing fetches and runs nothing"
