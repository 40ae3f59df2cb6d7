"""Explorers in a real browser: alone, in a frame, in JupyterLab; by mouse, by keyboard, and without scripts."""
import pandas as pd
from browser import PHONE, audit, browse, chromium, lab, notebook, overflow  # noqa: F401  fixtures

from sage_nb.views.explorers import Explorer, document, quantised, table_of

SHARES = pd.DataFrame({"node": ["L0H1.v@S2", "L2H1.z@END", "L3H0.z@END"], "effect": [-0.124, -0.806, 0.052]})
COLUMNS = [{"key": "node", "name": "node"}, {"key": "effect", "name": "effect", "number": True}]


def a_table(title="Effects of nodes", frame=SHARES):
    data = {"caption": "effects", "columns": COLUMNS, "rows": quantised(frame)}
    return Explorer("table", title, data, table_of(frame, "effects"))


def column(page): return page.locator(".sage-view tbody th").all_inner_texts()


def test_a_table_sorts_alone_and_in_a_frame(browse):
    page = browse(a_table().page())
    page.get_by_role("button", name="effect").click()
    assert column(page) == ["L3H0.z@END", "L0H1.v@S2", "L2H1.z@END"]
    frame = browse(a_table()._repr_html_()).frame_locator("iframe")
    frame.get_by_role("button", name="effect").click()
    assert column(frame) == ["L3H0.z@END", "L0H1.v@S2", "L2H1.z@END"]


LAB_CELL = """
from sage_nb.views.explorers import Explorer
Explorer("table", "Effects", {"caption": "effects", "columns": [{"key": "n", "name": "n", "number": True}],
                              "rows": [{"n": 1}, {"n": 3}, {"n": 2}]}, "")
"""


def test_jupyterlab(notebook):
    page = notebook([LAB_CELL])
    frame = page.frame_locator("iframe.sage-frame")
    frame.get_by_role("button", name="n", exact=True).click()
    assert column(frame) == ["3", "2", "1"]
