"""The leaderboard in a real browser: by mouse and by keyboard, on a phone, without scripts, with hostile names."""
import re

import pytest
from browser import PHONE, overflow
from made_up_cells import write_one

from sage_nb.lab.leaderboard import ALL_TASKS, leaderboard_explorer

HOSTILE = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "\u202eright to left\u202c",
           "👩‍👩‍👧 \u2028", "x" * 10_000, "a\"b'c&<!--", "__proto__", "javascript:alert(3)"]
QUALITIES = {"tiny-topk": 0.8, "tiny-standard": 0.55, "tiny-gated": 0.54, "tiny-untrained": 0.2}
L0S = dict(zip(QUALITIES, (16.0, 8.0, 32.0, 4.0)))


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    "Four SAEs, two of them alike, on two tasks; one lacks a task; and an SAE of another model."
    folder = tmp_path_factory.mktemp("results")
    for name, quality in QUALITIES.items():
        write_one(folder, name, quality, "ioi", l0=L0S[name])
        if name != "tiny-gated": write_one(folder, name, quality - 0.1, "order", l0=L0S[name])
    write_one(folder, "other-sae", 0.5, "ioi", model="other")
    return leaderboard_explorer(folder, title="All of them")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for i, name in enumerate(HOSTILE):
        for task in (HOSTILE[0], HOSTILE[4]): write_one(folder, name, i / 10, task, model=HOSTILE[1])
    return leaderboard_explorer(folder, title=HOSTILE[4])


def view(page): return page.locator(".sage-view")
def said_aloud(page): return page.locator("[aria-live]").inner_text()
def words(page): return page.locator(".words").inner_text()
def names(page): return page.locator(".sage-view tbody").first.locator("tr th").all_inner_texts()
def heat(page): return page.locator("table.board:not(.versus)")
def box(page, name): return page.get_by_role("combobox", name=name, exact=True)
def choose_task(page, task): box(page, "Task").select_option(task)


# By mouse

def test_the_table_sorts_and_filters(browse, explorer):
    page = browse(explorer.page(), fragment="#model=tiny")
    assert names(page) == ["topk", "standard", "untrained", "gated"], "one has no mean over all tasks"
    choose_task(page, "ioi")
    assert names(page)[0] == "topk" and names(page)[3] == "untrained"
    page.get_by_role("button", name="L0", exact=True).click()
    assert names(page) == ["gated", "topk", "standard", "untrained"]
    assert said_aloud(page) == "sorted by L0, highest first"
    page.get_by_role("button", name="L0", exact=True).click()
    assert names(page) == ["untrained", "standard", "topk", "gated"]
    page.get_by_label("Filter by name").fill("TINY ed")
    assert names(page) == ["untrained", "gated"] and said_aloud(page) == "2 SAEs"
    assert heat(page).locator("tbody tr").count() == 2 and page.locator("svg g[role=img]").count() == 2
    page.get_by_label("Filter by name").fill("nothing")
    assert names(page) == [] and page.locator(".broken").count() == 0


def test_the_heatmap_chooses_an_sae_and_a_task(browse, explorer):
    page = browse(explorer.page(), fragment="#model=tiny")
    cell = heat(page).get_by_role("button", name=re.compile("^tiny-gated on ioi: score 0."))
    cell.click()
    assert box(page, "Task").input_value() == "ioi" and box(page, "First").input_value() == "tiny-gated"
    assert heat(page).locator("[aria-pressed=true]").get_attribute("aria-label").startswith("tiny-gated on ioi")
    assert page.evaluate("document.activeElement.dataset.cell"), "the focus stays where it was"
    lacking = heat(page).get_by_role("button", name="tiny-gated on order: score –")
    assert lacking.inner_text() == "–"
    page.get_by_role("group", name="Number").get_by_role("button", name="control").click()
    assert heat(page).get_by_role("button", name=re.compile("^tiny-gated on ioi: control 0.")).count() == 1


def test_the_front_is_what_it_says(browse, explorer):
    page = browse(explorer.page(), fragment="#model=tiny")
    choose_task(page, "ioi")
    labels = [point.get_attribute("aria-label") for point in page.locator("svg g[role=img]").all()]
    best = {label.split(":")[0] for label in labels if label.endswith("on the front")}
    assert len(labels) == 4 and best == {"tiny-untrained", "tiny-standard", "tiny-topk"}
    page.locator("svg g[role=img]").first.click()
    assert box(page, "Second").input_value() == "tiny-topk"


def test_any_two_are_compared_in_words(browse, explorer):
    page = browse(explorer.page(), fragment="#model=tiny")
    choose_task(page, "ioi")
    box(page, "First").select_option("tiny-untrained")
    box(page, "Second").select_option("tiny-topk")
    assert words(page).startswith("tiny-topk scores higher than tiny-untrained, by 0.")
    assert "real after correction" in words(page)
    assert words(page) == said_aloud(page)
    box(page, "First").select_option("tiny-gated")
    box(page, "Second").select_option("tiny-standard")
    assert words(page).startswith("tiny-gated and tiny-standard cannot be told apart: the difference is")
    box(page, "Second").select_option("tiny-gated")
    assert words(page) == "Choose two different SAEs."
    page.get_by_role("button", name=re.compile("^tiny-untrained minus tiny-topk: −0")).click()
    assert box(page, "First").input_value() == "tiny-untrained" and "tiny-topk scores higher" in words(page)
    choose_task(page, "order")
    box(page, "First").select_option("tiny-gated")
    assert "were not compared here" in words(page)


def test_the_matrix_shows_numbers_where_they_are_real_and_counts_them(browse, explorer):
    page = browse(explorer.page(), fragment="#model=tiny")
    choose_task(page, "ioi")
    real = {(p[0], p[1]) for p in explorer.data["boards"][1]["pairs"][1] if p[5] < 0.05}
    texts = page.locator("table.versus button").all_inner_texts()
    assert len(texts) == 12 and sum(text != "·" for text in texts) == 2 * len(real) and "·" in texts
    count = page.locator(".count").inner_text()
    assert count.startswith(f"{len(real)} of 6 differences on ioi are real. Corrected for all 12 comparisons of tiny")
    assert "On 40 held-out prompts, a difference of 0." in count


def test_another_model_has_a_board_of_its_own(browse, explorer):
    page = browse(explorer.page(), fragment="#model=tiny")
    box(page, "Model").select_option("other")
    assert names(page) == ["other-sae"] and said_aloud(page) == "1 SAE of other"
    assert "There are no two SAEs" in view(page).inner_text() and ALL_TASKS not in view(page).inner_text()


# By keyboard alone, by a link, on a phone, without scripts

def tab_to(page, wanted, most=60):
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("e => document.activeElement.matches(e)", wanted): return
    raise AssertionError(f"{wanted} is not reached by Tab")


def test_by_keyboard_alone(browse, explorer):
    page = browse(explorer.page(), fragment="#model=tiny&task=ioi")
    tab_to(page, "table.board:not(.versus) button")
    for key in ("ArrowDown", "ArrowRight", "Enter"): page.keyboard.press(key)
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    tab_to(page, "svg g[role=img]")
    tab_to(page, "table.versus button")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert said_aloud(page) == words(page)
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('table.versus button')"), "one stop for the whole matrix"


def test_a_view_can_be_linked(browse, explorer):
    fragment = "#model=tiny&task=order&a=tiny-topk&b=tiny-untrained&number=control&sort=l0&query=t"
    page = browse(explorer.page(), fragment=fragment)
    assert box(page, "Task").input_value() == "order" and "tiny-topk scores higher than tiny-untrained" in words(page)
    chosen = page.get_by_role("group", name="Number").locator("[aria-pressed=true]")
    assert chosen.inner_text() == "control" and page.locator("th[aria-sort]").inner_text() == "L0"


@pytest.mark.parametrize("fragment", [
    "#model=x&task=y&a=z&b=q&number=n&sort=s&down=9", "#task=%3Cscript%3E&query=%F0%9F"])
def test_a_wrong_address_shows_the_start(browse, explorer, fragment):
    page = browse(explorer.page(), fragment=fragment)
    assert page.locator(".broken").count() == 0 and page.locator(".sage-view select").count() > 0


@pytest.mark.parametrize("dark", (False, True))
def test_a_phone_shows_all_of_it(browse, explorer, hostile, dark):
    for shown in (explorer, hostile):
        page = browse(shown.page(), PHONE, dark)
        assert overflow(page) == 0 and view(page).is_visible()


def test_without_scripts_the_tables_stand_there(browse, explorer):
    text = browse(explorer.page(), scripts=False).locator(".sage-static").inner_text()
    assert "tiny-topk" in text and "Real differences" in text


def test_hostile_names_run_nothing(browse, hostile):
    page = browse(hostile.page())
    assert page.locator(".broken").count() == 0
    assert page.evaluate("document.querySelectorAll('.sage-view img, .sage-view script').length") == 0
    for select in page.locator(".sage-view select").all():
        for value in select.locator("option").evaluate_all("all => all.map(o => o.value)"): select.select_option(value)
    for button in page.locator(".sage-view button:visible").all()[:12]: button.click()
    assert page.evaluate("document.documentElement.scrollHeight") < 6000


@pytest.mark.parametrize("dark", (False, True))
def test_axe_finds_no_fault(browse, audit, explorer, dark):
    assert audit(browse(explorer.page(), dark=dark)) == []
