"""What makes the rendered site lighter must not change what a reader gets."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from lighter import LEAST, MOST, lighter  # noqa: E402

SCRIPT = "say(1);" * LEAST
STYLE = "p { color: red }" * LEAST
FOLDED = ('<li class="sidebar-item sidebar-item-section">\n<div>Core</div>\n<ul id="quarto-sidebar-section-{n}" '
          'class="collapse list-unstyled sidebar-section depth{d} {show}">\n{items}\n</ul>\n</li>')


def sidebar(root: str, show: str) -> str:
    inner = FOLDED.format(n=2, d=2, show="", items=f'<li><a href="{root}a/one.html">One</a></li>')
    return f'<nav id="quarto-sidebar"><ul>{FOLDED.format(n=1, d=1, show=show, items=inner)}</ul></nav>'


def page(root: str, show: str = "") -> str:
    frame = f"<script>{SCRIPT}</script><style>{STYLE}</style>"
    return (f"<html><head><style>{STYLE}</style></head><body>{sidebar(root, show)}<main class='bi-book'>"
            f'<script>{SCRIPT}</script><iframe srcdoc="{frame}"></iframe></main></body></html>')


@pytest.fixture
def site(tmp_path):
    styles = tmp_path / "site_libs" / "bootstrap"
    styles.mkdir(parents=True)
    (styles / "x.css").write_text(
        "@media print{.bslib-a{x:1}.bslib-a,main{x:2}}.bi-book::before{x:3}.bi-cat::before{x:4}main{x:5}")
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(page("./"))
    (tmp_path / "a" / "one.html").write_text(page("../", "show"))
    (tmp_path / "search.json").write_text(json.dumps([{"text": "a \n  b" + "x" * MOST}]))
    lighter(tmp_path)
    return tmp_path


def test_what_pages_share_is_one_file_each(site):
    home, deep = (site / "index.html").read_text(), (site / "a" / "one.html").read_text()
    for text, root in ((home, ""), (deep, "../")):
        outside = text.partition("<iframe")[0]
        assert SCRIPT not in outside and STYLE not in outside
        assert f'src="{root}site_libs/shared-' in outside and f'href="{root}site_libs/shared-' in outside
    assert {SCRIPT, STYLE} <= {path.read_text() for path in (site / "site_libs").glob("shared-*")}


def test_frames_stay_as_they_are(site):
    frame = f'<iframe srcdoc="<script>{SCRIPT}</script><style>{STYLE}</style>"></iframe>'
    assert all(frame in (site / name).read_text() for name in ("index.html", "a/one.html"))


def test_folded_lists_come_back_with_links_from_where_the_page_is(site, chromium):
    for name, root in (("index.html", "./"), ("a/one.html", "../")):
        assert "One</a>" not in (site / name).read_text()
        tab = chromium.new_page()
        tab.goto((site / name).as_uri())
        links = tab.locator("nav a").evaluate_all("all => all.map(a => [a.innerText, a.getAttribute('href')])")
        assert links == [["One", f"{root}a/one.html"]]
        assert tab.locator("nav ul ul ul").count() == 1 and tab.locator(".folded").count() == 0
        tab.close()


def test_only_rules_that_nothing_names_go(site):
    left = (site / "site_libs" / "bootstrap" / "x.css").read_text()
    assert left == "@media print{.bslib-a,main{x:2}}.bi-book::before{x:3}main{x:5}"


def test_the_search_looks_through_the_beginning(site):
    assert json.loads((site / "search.json").read_text())[0]["text"] == ("a b" + "x" * MOST)[:MOST]
