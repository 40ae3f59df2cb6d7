"""Each rule of the house finds what breaks it in a toy, and nothing in a toy that does not."""
import house
import pytest


def cell(source, outputs=(), kind="code"): return {"cell_type": kind, "source": source, "outputs": list(outputs)}


EXPORTED = "#| export\n"


@pytest.mark.parametrize("rule,bad,good", [
    (house.long_lines, "x = 1\n" + "#" * 121, "#" * 120),
    (house.tuple_statements, "def f(a, b):\n    a.append(1), b.append(2)", "a, b = 1, 2\nreturned = a, b"),
    (house.comprehension_statements, "[print(x) for x in y]", "z = [x for x in y]"),
    (house.semicolons, "a = 1; b = 2", "a = ';'  # a; b"),
    (house.long_bodies, "def f():\n" + "    x = 1\n" * 41, "def f():\n    'Doc.'\n" + "    x = 1\n" * 40),
    (house.unused_imports, "import os.path", "import os.path\nos.path.exists('a')"),
    (house.unused_imports, "from a import b as c\nb = 1", "from a import b as c\nprint(c)"),
    (house.unused_imports, "from a import b\nb = 1", "from a import b  # noqa: F401  it registers things"),
    (house.unused_imports, "from a import b\ndef f(x: Float[Tensor, 'b']): 0", "from a import b\ndef f() -> 'b': 0"),
    (house.unused_imports, "from a import b\nx: list['c'] = []", "from a import b\nx: list['b | None'] = []"),
    (house.unused_imports, "from a import b\ndef f(x: Literal['a b']): 0", "from a import b\ndef f(*x: list['b']): 0"),
    (house.unused_imports, "from a import b\n__all__ = ['c']", "from a import b\n__all__ = ['b']"),
])
def test_a_rule_finds_what_breaks_it_in_source(rule, bad, good):
    assert len(rule(bad)) == 1
    assert not rule(good)


@pytest.mark.parametrize("rule,bad,good", [
    (house.long_cells, [cell(EXPORTED + "x = 1\n" * 60)], [cell(EXPORTED + "x = 1\n" * 59), cell("x = 1\n" * 61)]),
    (house.hidden_assertions, [cell("#| hide\nassert f()")], [cell("#| hide\nx = 1"), cell("assert f()")]),
])
def test_a_rule_finds_what_breaks_it_in_cells(rule, bad, good):
    assert len(rule(bad)) == 1
    assert not rule(good)


F, G = cell(EXPORTED + "def f(): pass"), cell(EXPORTED + "class G: pass\ndef _private(): pass")
OUTPUT, ASSERTION = cell("f()", outputs=[{}]), cell("test_eq(f(), None)")


@pytest.mark.parametrize("cells,unseen", [
    ([F, OUTPUT, G, ASSERTION], []),
    ([F, cell(EXPORTED + "_C = 1"), cell("f()"), ASSERTION], []),
    ([F, G, OUTPUT], ["f"]),
    ([F, OUTPUT, G], ["G"]),
    ([F, cell("f()")], ["f"]),
    ([F, cell("#| hide\nassert f() is None")], ["f"]),
    ([F, cell("assert f() is None", kind="markdown")], ["f"]),
])
def test_every_definition_is_shown_or_asserted_before_the_next(cells, unseen):
    assert house.unseen_definitions(cells) == unseen


@pytest.mark.parametrize("source,asserts", [
    ("assert x", True), ("test_fail(f, contains='x')", True), ("torch.testing.assert_close(a, b)", True),
    ("%time f()\nassert x", True),
    ("# assert x", False), ("print('assert x')", False), ("test_eq = 1", False),
])
def test_an_assertion_is_told_from_its_name(source, asserts):
    assert house.has_assertion(source) is asserts


def test_public_names_are_functions_classes_and_constants_of_the_top_level():
    source = "import a\nA, B = 1, 2\nC: int = 3\n_D = 4\nE = [f for f in A]\nA.x = B\ndef g(): h = 1\nclass I: j = 2"
    patched = "@patch\ndef k(self: I): pass\n@patch(as_prop=True)\ndef l(self: I): pass\n@cache\ndef m(): pass"
    assert house.public_names(source) == {"A", "B", "C", "E", "g", "I"}
    assert house.public_names(f"{source}\n{patched}") == {"A", "B", "C", "E", "g", "I", "m"}


@pytest.mark.parametrize("source,rooms", [
    ("from sage_nb.core.models import load_model", ["core.models"]),
    ("from sage_nb.core import models", ["core.models"]),
    ("import sage_nb.core.models as m", ["core.models"]),
    ("from ..core.models import load_model", ["core.models"]),
    ("def f():\n    from .plots import plot_curves", ["report.plots"]),
    ("from . import plots", ["report.plots"]),
    ("import torch\nfrom sage_nbx.core import a", []),
])
def test_imported_rooms_are_found_by_whole_and_relative_names(source, rooms):
    assert list(house.imported_rooms(source, folder="report")) == rooms
