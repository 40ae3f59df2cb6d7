"""Explorers in a real browser: alone, in a frame, in JupyterLab; by mouse, by keyboard, and without scripts."""
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from browser import DESKTOP, PHONE, in_page, overflow

from sage_nb.core.activations import Node
from sage_nb.core.intervals import Estimate
from sage_nb.discovery.attribution import NodeScores
from sage_nb.discovery.sections import CrossSection, CrossSections
from sage_nb.measures.certificate import Certificate, Criteria
from sage_nb.tasks.task import load_task
from sage_nb.views.explorers import Explorer, document, quantised, table_of
from sage_nb.views.section_map import section_map
from sage_nb.views.task_browser import task_browser

SHARES = pd.DataFrame({"node": ["L0H1.v@S2", "L2H1.z@END", "L3H0.z@END"], "effect": [-0.124, -0.806, 0.052]})
COLUMNS = [{"key": "node", "name": "node"}, {"key": "effect", "name": "effect", "number": True}]
HOSTILE = [
    "<script>window.hacked=1</script>", "</script><img src=x onerror=window.hacked=1>", '"onfocus="window.hacked=1',
    "\u202egnirts a", "\u2066\u202e", "👩‍👩‍👧‍👦🏳️‍🌈", "a" * 10_000, "é" + "\u0301" * 200, "<!--", "]]>", "&lt;b&gt;",
    "\u2028\u2029",
    "\0\x07\x1b", "\ud800", "${window.hacked=1}", "javascript:window.hacked=1", "  ", "\n\t", "`'\"\\",
]
HEADS = range(4)


def hostile_words(n): return [HOSTILE[i % len(HOSTILE)] for i in range(n)]


# What is looked at: a table, a map of a circuit that was made up, prompts of a task; each also with hostile words

def a_table(title="Effects of nodes", frame=SHARES):
    data = {"caption": "effects", "columns": COLUMNS, "rows": quantised(frame)}
    return Explorer("table", title, data, table_of(frame, "effects"))


def about(value, n=32): return Estimate(value, value - 0.1, value + 0.1, n)


def some_scores(attribute, positions):
    nodes = [Node(site, layer, head, position) for site in ("v", "z") for position in positions
             for layer in HEADS for head in HEADS]
    shares = torch.randn(len(nodes), generator=torch.Generator().manual_seed(len(attribute))) * 0.05
    return NodeScores(attribute, "AtP", nodes, shares.repeat(8, 1), torch.ones(8))


def some_sections(attributes=("IO", "S", "Pos"), positions=("IO", "S2", "END")):
    "The first attribute has a cross-section in z at the last position, the second one in v at the second, others none."
    places = [("z", positions[-1]), ("v", positions[1])]
    found = []
    for attribute, (site, position) in zip(attributes, places):
        nodes = Node(site, 2, 1, position), Node(site, 1, 0, position)
        curve = {1: about(-0.6), 2: about(-0.9), 16: about(-1.0)}
        found.append(CrossSection(attribute, site, position, nodes, (-0.6, -0.3), curve, about(0.0), about(-0.85)))
    scores = {attribute: some_scores(attribute, positions) for attribute in attributes}
    columns = ["attribute", "site", "position", "effect", "lo", "hi", "reason"]
    taken = {(s.attribute, s.site, s.position) for s in found}
    rest = [(a, site, position, 0.01, 0.0, 0.02, "effect below 10% of the clean metric") for a in attributes
            for site in ("v", "z") for position in positions if (a, site, position) not in taken]
    return CrossSections(tuple(found), pd.DataFrame(rest, columns=columns), scores, {})


def some_certificate(sections):
    measures = {s.name: {"R²": about(0.9), "edit effect": about(1.0)} for s in sections}
    reasons = {s.name: [] if i == 0 else ["R² is not above 0"] for i, s in enumerate(sections)}
    return Certificate(measures, reasons, Criteria())


@pytest.fixture(scope="module")
def prompts(model): return load_task("ioi", model, n=64)


@pytest.fixture(scope="module")
def hostile_prompts(prompts):
    "Every token, value and name is one of the hostile words."
    def bad(rows): return [[HOSTILE[(i + j) % len(HOSTILE)] for j in range(len(row))] for i, row in enumerate(rows)]
    counterfactuals = {
        HOSTILE[k]: replace(cf, strings=bad(cf.strings)[::-1], values=hostile_words(64))
        for k, cf in enumerate(prompts.counterfactuals.values())}
    attributes = pd.DataFrame({name: hostile_words(64) for name in counterfactuals}, dtype=object)
    positions = dict(zip(HOSTILE[4:], prompts.prompts.positions.values())) | {"END": prompts.prompts.positions["END"]}
    return replace(prompts, name=HOSTILE[1], strings=bad(prompts.strings), attributes=attributes, neutral=None,
                   texts=["".join(row) for row in bad(prompts.strings)], counterfactuals=counterfactuals,
                   prompts=replace(prompts.prompts, positions=positions))


@pytest.fixture(scope="module")
def a_map(prompts):
    sections = some_sections()
    return section_map(sections, prompts, some_certificate(sections))


@pytest.fixture(scope="module")
def a_browser(prompts, model): return task_browser(prompts, model.tokenizer)


@pytest.fixture(scope="module")
def explorers(a_map, a_browser): return {"table": a_table(), "section map": a_map, "task browser": a_browser}


@pytest.fixture(scope="module")
def hostile_explorers(hostile_prompts):
    frame = pd.DataFrame({"node": HOSTILE, "effect": 0.5}, dtype=object)
    columns = [{"key": "node", "name": HOSTILE[0], "help": HOSTILE[2]}, {"key": "effect", "name": HOSTILE[6]}]
    data = {"caption": HOSTILE[1], "columns": columns, "rows": quantised(frame)}
    sections = some_sections(list(hostile_prompts.counterfactuals), HOSTILE[:3])
    return {"table": Explorer("table", HOSTILE[0], data, table_of(frame, HOSTILE[1])),
            "section map": section_map(sections, hostile_prompts, some_certificate(sections)),
            "task browser": task_browser(hostile_prompts)}


KINDS = ("table", "section map", "task browser")
each_kind = pytest.mark.parametrize("kind", KINDS)


def column(page): return page.locator(".sage-view tbody th").all_inner_texts()


def backdrop(page) -> list[int]:
    "The colour that the explorer stands on."
    colour = page.locator(".sage-explorer").first.evaluate("e => getComputedStyle(e).backgroundColor")
    return [int(part) for part in re.findall(r"\d+", colour)[:3]]


def is_dark(page) -> bool: return max(backdrop(page)) < 80


# Controls

def test_a_table_sorts_alone_and_in_a_frame(browse):
    page = browse(a_table().page())
    page.get_by_role("button", name="effect", exact=True).click()
    assert column(page) == ["L3H0.z@END", "L0H1.v@S2", "L2H1.z@END"]
    frame = browse(a_table()._repr_html_()).frame_locator("iframe")
    frame.get_by_role("button", name="effect", exact=True).click()
    assert column(frame) == ["L3H0.z@END", "L0H1.v@S2", "L2H1.z@END"]


def test_section_map_by_mouse(browse, a_map):
    page = browse(a_map.page())
    panel = page.locator(".at-panel")
    assert "IO in head outputs (z) at END" in panel.inner_text() and "✓ passes" in panel.inner_text()
    page.get_by_role("button", name="S", exact=True).click()
    assert "S in values (v) at S2" in panel.inner_text() and "✗ fails" in panel.inner_text()
    assert panel.locator("svg[role=img]").get_attribute("aria-label").startswith("effect by number of nodes")
    assert panel.locator("svg circle").count() == 3
    page.get_by_role("button", name=re.compile("^S in z at IO")).click()
    assert "No cross-section here: effect below 10% of the clean metric" in panel.inner_text()
    page.get_by_role("button", name=re.compile("^L3H2")).click()
    assert page.locator(".node").inner_text().startswith("L3H2")
    page.get_by_role("button", name="Pos", exact=True).click()
    assert "Not found. Largest verified effect 0.01" in page.locator(".found").inner_text()


def test_section_map_shows_prompts_with_the_place_marked(browse, a_map, prompts):
    page = browse(a_map.page())
    first = page.locator("ol.pairs > li").first
    marked = first.locator(".token.marked").all_inner_texts()
    assert ["".join(text.split()) for text in marked] == ["toEND"] * 2
    differs = first.locator(".token.differs").all_inner_texts()
    assert [text.strip() for text in differs] == [prompts.attributes.IO[0], prompts.counterfactual("IO").values[0]]


def test_task_browser_filters_and_pages(browse, a_browser, prompts):
    page = browse(a_browser.page())
    count, items = page.locator(".count"), page.locator("ol.prompts > li")
    assert count.inner_text() == "1–8 of 64 prompts" and items.count() == 8
    page.get_by_role("button", name="next →").click()
    assert count.inner_text() == "9–16 of 64 prompts"
    name = prompts.attributes.IO[0]
    page.get_by_label("Value of IO").select_option(name)
    assert count.inner_text().endswith(f"of {(prompts.attributes.IO == name).sum()} prompts")
    page.get_by_label("Value of IO").select_option("(any)")
    page.get_by_role("combobox", name="Prompts").select_option("test")
    assert count.inner_text().endswith(f"of {len(prompts.test)} prompts")
    page.get_by_label("Text").fill("no such prompt")
    assert count.inner_text() == "no prompt is like that" and items.count() == 0
    page.get_by_label("Text").fill("")
    page.get_by_role("button", name="S", exact=True).click()
    row = items.first.locator(".side").nth(1)
    assert row.locator(".differs").count() == 2  # both mentions of the subject


# Keyboard

def test_section_map_by_keyboard_alone(browse, a_map):
    page = browse(a_map.page())
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "S"
    page.keyboard.press("Enter")
    assert "S in values (v) at S2" in page.locator(".at-panel").inner_text()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    while "map" not in (page.evaluate("document.activeElement.className") or "").split(): page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.at") == "v@S2"  # the one that is chosen
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"): page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.at") == "z@END"
    page.keyboard.press("Space")
    assert "S in head outputs (z) at END" in page.locator(".at-panel").inner_text()
    assert page.locator("[aria-live=polite].hidden").inner_text().startswith("S in z at END: no cross-section")
    while "cell" not in (page.evaluate("document.activeElement.className") or "").split(): page.keyboard.press("Tab")
    page.keyboard.press("Control+Home")
    assert page.locator("[role=tooltip]").inner_text().startswith("L0H0")
    page.keyboard.press("Enter")
    assert page.locator(".node").inner_text().startswith("L0H0")
    page.keyboard.press("Escape")
    assert not page.locator("[role=tooltip]").is_visible()


def test_task_browser_by_keyboard_alone(browse, a_browser):
    page = browse(a_browser.page())
    while page.evaluate("document.activeElement.textContent") != "next →": page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(".count").inner_text() == "9–16 of 64 prompts"
    assert page.evaluate("document.activeElement.textContent") == "next →"


# What is chosen, in the address

def test_a_view_can_be_linked(browse, a_map):
    page = browse(a_map.page())
    page.get_by_role("button", name="S", exact=True).click()
    page.get_by_role("button", name=re.compile("^L3H2")).click()
    fragment = page.evaluate("location.hash")
    assert fragment == "#attribute=S&node=L3H2"
    again = browse(a_map.page(), fragment=fragment)
    assert "S in values (v) at S2" in again.locator(".at-panel").inner_text()
    assert again.locator(".node").inner_text().startswith("L3H2")
    again.evaluate("location.hash = '#attribute=Pos'")
    again.locator(".found").get_by_text("Not found").wait_for()


WRONG = ("#attribute=nobody&at=x&node=L99H99", "#attribute=%3Cscript%3E", "#node=L0", "#chapter", "#page=NaN",
         "#page=-3&change=nobody&value=1&set=x", "#__proto__=1&constructor=2")


@pytest.mark.parametrize("kind", ("section map", "task browser"))
def test_a_wrong_address_shows_the_start(browse, explorers, kind):
    start = browse(explorers[kind].page()).locator(".sage-view").inner_text()
    page = browse(explorers[kind].page(), fragment=WRONG[0])
    for fragment in WRONG:
        page.evaluate("(fragment) => { location.hash = fragment; }", fragment)
        assert page.locator(".sage-view").inner_text() == start, fragment


def test_a_frame_leaves_the_address_alone(browse, a_map):
    page = browse(a_map._repr_html_())
    page.frame_locator("iframe").get_by_role("button", name="S", exact=True).click()
    assert page.evaluate("location.hash") == ""


def test_several_in_one_page_keep_apart(browse, a_map, a_browser):
    page = browse(document("Two", a_map.fragment() + a_browser.fragment()))
    page.get_by_role("button", name="next →").click()
    page.get_by_role("button", name="S", exact=True).first.click()
    assert page.evaluate("location.hash") == "#task_browser.page=2&section_map.attribute=S"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


# Readers of all kinds

@each_kind
def test_without_scripts_the_tables_stand_there(browse, explorers, kind):
    page = browse(explorers[kind].page(), scripts=False)
    assert page.locator("table").first.is_visible() and page.locator("caption").first.is_visible()
    assert page.locator(".sage-view").count() == 0
    narrow = browse(explorers[kind].page(), width=PHONE, scripts=False)
    assert narrow.locator(".sage-explorer").bounding_box()["width"] <= PHONE


@each_kind
@pytest.mark.parametrize("hostile", (False, True))
def test_a_phone_shows_all_of_it(browse, explorers, hostile_explorers, kind, hostile):
    explorer = (hostile_explorers if hostile else explorers)[kind]
    page = browse(explorer.page(), width=PHONE)
    assert overflow(page) == 0
    page.locator("details.static > summary").click()
    assert overflow(page) == 0


@each_kind
def test_hostile_words_run_nothing(browse, hostile_explorers, kind):
    page = browse(hostile_explorers[kind].page())
    for button in page.get_by_role("button").all()[:12]:
        if button.is_enabled(): button.click()
    page.keyboard.press("Tab")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('.sage-view img, .sage-view script, [onfocus]').length") == 0
    assert "<script>window.hacked=1</script>" in page.locator(".sage-explorer").inner_text()
    framed = browse(in_page(hostile_explorers[kind]._repr_html_()))
    framed.frame_locator("iframe").locator(".sage-view").wait_for()
    assert framed.evaluate("window.hacked ?? frames[0].hacked") is None
    assert framed.locator("main > *").count() == 2  # the heading and the frame: nothing fell out of it


def test_no_other_script_runs(browse):
    evil = "<script>window.hacked = 1</script><p onclick='window.hacked = 1'>x</p>"
    page = browse(document("Title", a_table().fragment() + evil))
    page.get_by_text("x", exact=True).click()
    assert page.evaluate("window.hacked") is None
    refused = [problem for problem in page.problems if "Content Security Policy" in problem]
    assert len(refused) == len(page.problems) == 2
    page.problems.clear()
    assert column(page)  # and the explorer is alive


def test_light_and_dark(browse):
    assert not is_dark(browse(a_table().page())) and is_dark(browse(a_table().page(), dark=True))


@pytest.mark.parametrize("background, dark", [("#ffffff", False), ("#101010", True)])
def test_a_frame_is_as_dark_as_the_page_around(browse, background, dark):
    page = browse(in_page(a_table()._repr_html_(), background), dark=not dark)
    page.frame_locator("iframe").locator(".sage-view").wait_for()
    assert is_dark(page.frames[1]) is dark
    page.evaluate("(colour) => { document.body.style.background = colour; }", "#ffffff" if dark else "#101010")
    page.wait_for_timeout(100)
    assert is_dark(page.frames[1]) is not dark


def test_a_frame_is_as_high_as_what_is_in_it(browse, a_map):
    page = browse(a_map._repr_html_())
    frame = page.frames[1]
    page.frame_locator("iframe").locator("details.static > summary").click()
    page.wait_for_timeout(100)
    assert frame.evaluate("document.documentElement.scrollHeight - innerHeight") <= 2
    assert page.locator("iframe").bounding_box()["height"] > a_map.height


@each_kind
@pytest.mark.parametrize("width, dark", [(DESKTOP, False), (PHONE, True)])
def test_axe_finds_no_fault(browse, audit, explorers, kind, width, dark):
    page = browse(explorers[kind].page(), width=width, dark=dark)
    page.locator("details.static > summary").click()
    assert not audit(page)


PROBE = """() => {
    document.body.insertAdjacentHTML("beforeend", `<div class="sage-explorer" data-kind="probe">
        <div class="sage-static"></div><script type="application/json">{}</` + `script></div>`);
    sage.register("probe", (root, data, tools) => { window.tools = tools; });
}"""
SWATCHES = """() => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (colour) => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const styles = [];
    for (let i = -100; i <= 100; i++) styles.push(tools.diverging(i / 100), tools.sequential(Math.abs(i) / 100));
    for (let i = 0; i < 8; i++) styles.push(tools.tint(i));
    return Math.min(...styles.map((style) => {
        const e = tools.el("span", {style}, "x");
        document.querySelector(".sage-explorer").append(e);
        const {backgroundColor, color} = getComputedStyle(e);
        const [a, b] = [light(backgroundColor), light(color)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    }));
}"""


@pytest.mark.parametrize("dark", (False, True))
def test_what_is_written_on_a_colour_can_be_read(browse, dark):
    page = browse(a_table().page(), dark=dark)
    page.evaluate(PROBE)
    assert page.evaluate(SWATCHES) >= 4.5


def test_numbers_as_text(browse):
    page = browse(a_table().page())
    page.evaluate(PROBE)
    said = page.evaluate("[1, -3, 0.5, -0.0001, 1234567, null].map((x) => tools.number(x))")
    assert said == ["1", "−3", "0.50", "−1.0e−4", "1.2e+6", "–"]
    assert page.evaluate("[-0.001, 1, 0.126].map((x) => tools.number(x, 2))") == ["0.00", "1.00", "0.13"]
    assert page.evaluate("tools.estimate({value: 0.5, lo: -0.25, hi: null})") == "0.50"
    assert page.evaluate("[...tools.cut('👩' + 'a'.repeat(99), 5)].length") == 5


def test_an_explorer_that_breaks_leaves_its_tables(browse):
    broken = Explorer("section_map", "Broken", {"attributes": []}, table_of(SHARES, "effects"))
    page = browse(broken.page())
    assert page.locator(".broken").inner_text().startswith("This explorer could not start")
    assert page.locator("table").is_visible()
    assert page.problems
    page.problems.clear()


def test_on_paper(browse, a_map):
    page = browse(a_map.page(), dark=True)
    page.emulate_media(media="print")
    assert not is_dark(page) and not page.locator(".controls").is_visible()


# JupyterLab

LAB_CELL = """
from sage_nb.views.explorers import Explorer
Explorer("table", "Effects", {"caption": "effects", "columns": [{"key": "n", "name": "n", "number": True}],
                              "rows": [{"n": 1}, {"n": 3}, {"n": 2}]}, "")
"""


def test_jupyterlab(notebook):
    page = notebook([LAB_CELL], dark=True)
    frame = page.frame_locator("iframe.sage-frame")
    frame.get_by_role("button", name="n", exact=True).click()
    assert column(frame) == ["3", "2", "1"]
    inside = next(f for f in page.frames if f.parent_frame)
    assert is_dark(inside)
    page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    frame.locator(".sage-explorer[data-theme=light]").wait_for()
    assert not is_dark(inside)
