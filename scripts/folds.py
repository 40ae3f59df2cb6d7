"""Which cells of a room are folded on the doc site: those that check, and are not introduced by prose.

Tests stand beside the code, and some of them teach: a sum worked out by hand, an error and its words. Those follow a
sentence that says what they show. The others follow an example and hold it to what it printed; a reader of the page
wants to know that they are there, and to pass them by.
"""
import sys
from pathlib import Path

from nbdev.process import Processor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import house  # noqa: E402  the rules of the house know what an assertion is

OPTIONS = '#| code-fold: true\n#| code-summary: "Checks"\n'
KEPT = {"export", "exports", "exporti", "hide", "default_exp", "code-fold", "eval", "echo", "slow"}


def checks_only(cell) -> bool:
    "Does a code cell assert and show nothing?"
    if cell["cell_type"] != "code" or cell.get("outputs"): return False
    return not KEPT & set(house.directives(cell["source"])) and house.has_assertion(cell["source"])


def folded(cells) -> list:
    "The cells that check and follow no prose; hidden cells between do not count."
    found, prose = [], False
    for cell in cells:
        if cell["cell_type"] == "markdown": prose = True
        elif cell["cell_type"] == "code" and not house.is_hidden(cell):
            if checks_only(cell) and not prose: found.append(cell)
            prose = False
    return found


class fold_checks(Processor):
    "Folds them, for Quarto."

    def begin(self):
        for cell in folded(self.nb.cells): cell.source = OPTIONS + cell.source
