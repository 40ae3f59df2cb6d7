"""A report's page in a real browser: on a desk and on a phone, dark, printed, without scripts, with hostile names."""
import made_up
import pytest
from browser import PHONE, overflow

from sage_nb.report.report import SageReport

HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\u202e" + 3000 * "x"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "The page of a report that was saved and loaded."
    folder = tmp_path_factory.mktemp("report")
    made_up.report(["an SAE", "another"]).save(folder)
    return SageReport.load(folder).page()


@pytest.fixture(scope="module")
def hostile():
    sections = [f"IO{HOSTILE}{i}:z@END" for i in range(3)]
    return made_up.report([HOSTILE], sections, HOSTILE).page()


@pytest.mark.parametrize("width", [1280, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_clean_and_as_wide_as_the_window(browse, page, width, dark):  # noqa: F811
    seen = browse(page, width, dark)
    assert seen.locator("h1").inner_text() == "SAGE: ioi on tiny"
    assert seen.locator("p.verdict").first.is_visible() and overflow(seen) == 0
    assert seen.locator(".places .left").inner_text().startswith("S:v@S2 left out: R²")
    seen.get_by_role("button", name="effect").click()
    assert seen.locator(".sage-view tbody th").all_inner_texts() == ["S:v@S2", "IO:v@IO", "IO:z@END"]
    sizes = seen.locator(".sage-picture text").evaluate_all("all => all.map((e) => e.getBoundingClientRect().height)")
    assert min(size for size in sizes if size) > 9  # pixels: pictures are as large as they were drawn


def test_a_wide_picture_scrolls_in_itself(browse, page):  # noqa: F811
    drawing = browse(page, PHONE).locator("#cross-sections .drawing").first
    assert drawing.evaluate("e => e.scrollWidth > e.clientWidth && e.clientWidth <= 400")
    drawing.focus()
    assert drawing.evaluate("e => document.activeElement === e")  # and by keyboard


def contrast(a, b):
    def light(rgb):
        r, g, b = (x / 12.92 if x <= 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in rgb))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    high, low = sorted([light(a), light(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


COLOURS = "e => [getComputedStyle(e).fill, getComputedStyle(document.body).backgroundColor]"


@pytest.mark.parametrize("dark", [False, True])
def test_ink_can_be_read_on_the_paper(browse, page, dark):  # noqa: F811
    ink, paper = browse(page, dark=dark).locator(".sage-picture text").first.evaluate(COLOURS)
    ink, paper = ([float(x) for x in text.split("(")[1].rstrip(")").split(",")[:3]] for text in (ink, paper))
    assert contrast(ink, paper) > 7 and (sum(paper) < 200) == dark


def test_it_can_be_printed(browse, page):  # noqa: F811
    seen = browse(page, dark=True)
    seen.emulate_media(media="print")
    _, paper = seen.locator(".sage-picture text").first.evaluate(COLOURS)
    assert paper == "rgb(255, 255, 255)" and not seen.locator("nav .contents").is_visible()
    seen.set_viewport_size({"width": 720, "height": 1000})
    assert overflow(seen) == 0
    assert seen.pdf()[:5] == b"%PDF-"


def test_without_scripts_the_tables_are_there(browse, page):  # noqa: F811
    seen = browse(page, scripts=False)
    assert seen.locator(".sage-explorer table").is_visible() and seen.locator(".verdict").first.is_visible()


@pytest.mark.parametrize("width", [1280, PHONE])
def test_hostile_names_run_nothing_and_break_nothing(browse, hostile, width):  # noqa: F811
    seen = browse(hostile, width)
    seen.wait_for_timeout(200)
    assert seen.title().startswith("SAGE: <script>") and overflow(seen) == 0
    assert seen.locator("main script:not([type='application/json']), main img").count() == 0


def test_in_a_notebook_no_style_leaks(browse):  # noqa: F811
    seen = browse(made_up.report(explorers=False)._repr_html_())
    assert seen.locator("h1").evaluate("e => getComputedStyle(e).fontSize") == "32px"  # that of the page around
    frame = seen.frame_locator("iframe")
    assert frame.locator("h1").inner_text() == "SAGE: ioi on tiny"
    assert seen.locator("iframe").evaluate("e => e.clientHeight") > 2000  # as high as what is in it


def test_axe_finds_no_fault(browse, page, audit):  # noqa: F811
    assert audit(browse(page)) == []
