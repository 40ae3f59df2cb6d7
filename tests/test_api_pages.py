"""What scripts/api.py reads from a module, and where it says that a backticked name leads to."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
api = pytest.importorskip("api")

SOURCE = '''
@dataclass(frozen=True)
class Fit:
    "A fit."
    rows: dict[str, "Part"]  # what it is of
    seed: int = 0
    made: list = field(default_factory=list)

    def score(self, k: int = 1) -> float: "How good it is."

class Part(NamedTuple): x: int  # a number

def fit(
    rows: Float[Tensor, "prompt d"],  # one a prompt
    *,
    how: Literal["a", "b"] = "a",  # the way
) -> Fit:  # the best
    "Fit `Part` to rows."

@patch
def draw(self: Fit, by=lambda x: x): "Draw it."

def _hidden(): pass
LIMIT = 3  # at most
'''


def library():
    there = api.Reader(SOURCE, "a.fits", "p/a/fits.py", "1_a/fits.html").symbols()
    other = api.Reader("def fit(): 'Of the command line.'\ndef only(): pass", "b.cli", "p/b/cli.py", "2_b/cli.html")
    return api.Library(there + other.symbols(), {"fit": "a.fits"}, "p")


def test_public_names_and_what_they_are():
    kinds = {symbol.name: symbol.kind for symbol in library().on("1_a/fits.html")}
    assert kinds == {"Fit": "class", "Part": "class", "fit": "function", "Fit.draw": "method", "LIMIT": "constant"}


def test_parameters_have_types_defaults_and_meanings():
    rows, how = library().find("fit", "1_a/fits.html").params
    assert (rows.type, rows.default, rows.meaning) == ('Float[Tensor, "prompt d"]', "", "one a prompt")
    assert (how.type, how.default, how.meaning, how.only_by_name) == ('"a" | "b"', '"a"', "the way", True)
    assert library().find("Fit").params[2].default == "[]"


def test_a_class_and_a_function_on_one_page_have_anchors_of_their_own():
    found = library()
    assert (found.find("Fit").anchor, found.find("fit", "1_a/fits.html").anchor) == ("Fit", "fit")


@pytest.mark.parametrize("name,page,address", [
    ("fit", "2_b/x.html", "../1_a/fits.html#fit"), ("fit", "2_b/cli.html", "#fit"),
    ("fit", "index.html", "1_a/fits.html#fit"),
    ("Fit.score", "index.html", "1_a/fits.html#fit.score"), ("Fit.rows", "index.html", "1_a/fits.html#Fit"),
    ("p.b.cli", "index.html", "2_b/cli.html"), ("nothing", "index.html", None), ("fit.rows", "index.html", None)])
def test_a_name_leads_to_what_the_page_or_the_package_means(name, page, address):
    assert library().address(name, page) == address


@pytest.mark.parametrize("text,linked", [
    ("see `only`", "see [`only`](2_b/cli.html#only)"), ("`only(x=1)`", "[`only(x=1)`](2_b/cli.html#only)"),
    ("[`only`](x.html)", "[`only`](x.html)"), ("## `only`", "## `only`"), ("```\n`only`\n```", "```\n`only`\n```")])
def test_links_are_made_in_prose_alone(text, linked):
    assert library().linked(text, "index.html") == linked


def test_html_of_a_class_lists_fields_and_methods():
    html = api.body(library().find("Fit"), library())
    assert "score</b>(k=1) → float" in html and "what it is of" in html and 'href="#fit.draw"' in html
    assert "lambda" not in html.partition("api-methods")[0]
