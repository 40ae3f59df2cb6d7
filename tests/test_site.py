"""The rendered doc site in a real browser: every page, wide and narrow; links, search, explorers, light and dark.

The site is what `make docs` left in _docs/; where there is none, for want of Quarto, these tests are skipped.
"""
import ast
import re
from pathlib import Path

import pytest
from site_pages import DESK, PHONE, Site

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "_docs"
TOO_BIG = 10  # MB
NORMAL_TEXT = 4.5  # contrast that the Web Content Accessibility Guidelines ask for

pytestmark = pytest.mark.skipif(not (FOLDER / "index.html").is_file(),
                                reason="no rendered site in _docs/: `make docs` renders it where Quarto is")


def found(faults, remedy):
    assert not faults, "\n  ".join([remedy, *map(str, list(faults)[:40])])


@pytest.fixture(scope="module")
def site():
    site = Site(FOLDER)
    yield site
    site.close()


@pytest.fixture(scope="module")
def tab(chromium):
    context = chromium.new_context()
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def pages(site, tab):
    "All pages, each opened once."
    return [site.visit(tab, name) for name in site.names]


def everywhere(pages, what):
    return [f"{page.name} at {width}: {item}" for page in pages
            for width, seen in ((DESK, page.desk), (PHONE, page.phone)) for item in what(seen)]


# Every page

def test_every_notebook_is_a_page(pages):
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if not re.search(r"/[._]", p.as_posix())]
    expected = {p.relative_to(ROOT / "nbs").with_name(re.sub(r"^\d+\w*?_", "", p.name)).with_suffix(".html").as_posix()
                for p in notebooks}
    assert {"api.html", "changelog.html"} | expected == {page.name for page in pages}


def test_no_page_is_wider_than_its_window(pages):
    found(everywhere(pages, lambda seen: [f"{seen['overflow']} px"] if seen["overflow"] > 0 else []),
          "the page moves sideways: let what is wide scroll in itself")


def test_nothing_is_cut(pages):
    found(everywhere(pages, lambda seen: seen["cut"]),
          "cut off or sticking out: let it scroll in itself, or make it narrower")


def test_no_link_is_dead(site, pages):
    found(site.dead_links(pages), "links inside the site that lead nowhere")


def test_links_stay_inside_the_site(site, pages):
    home = "https://sage-nb.github.io/sage_nb/"
    found([f"{p.name}: {link}" for p in pages for link in p.words["links"] if link.startswith(home)],
          "a link inside the site has the address of the published one: it would leave a copy of the site")


def test_every_picture_has_words(pages):
    found([f"{p.name}: {image}" for p in pages for image in p.words["images"] + p.words["unsaid"]],
          "a picture without a description: say what is to be seen in `#| fig-alt`")


def test_no_page_complains_or_asks_another_server(pages):
    found([f"{p.name}: {problem}" for p in pages for problem in p.problems], "the console is not empty")


def test_no_flags_tracebacks_or_raw_markdown(pages):
    found([f"{p.name}: {fault}" for p in pages for fault in p.words["faults"]], "text that no reader should see")


def test_the_site_is_small(site):
    assert site.megabytes() <= TOO_BIG


# What a reader does

def public_names():
    "(room's page, name) of everything that a module exports, as its __all__ says."
    for path in sorted((ROOT / "sage_nb").glob("*/*.py")):
        source = path.read_text(encoding="utf-8")
        notebook = re.search(r"File to edit: \S*nbs/(\S+)/\d+_(\w+)\.ipynb", source)
        if not notebook: continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for name in ast.literal_eval(node.value): yield f"{notebook[1]}/{notebook[2]}.html", name


def test_every_public_name_is_in_the_index_and_on_its_page(site, pages):
    index = next(page for page in pages if page.name == "api.html")
    ids = {page.name: set(page.words["ids"]) for page in pages}
    links = {link.removeprefix(site.address) for link in index.words["links"]}
    names = list(public_names())
    assert len(names) > 500
    lost = [f"{page}: {name}" for page, name in names
            if not {f"{page}#{anchor}" for anchor in {name, name.lower()} & ids[page]} & links]
    found(lost, "a public name that the index of names does not lead to")


@pytest.mark.parametrize("name,page", [
    ("load_saes", "5_saes/sets.html#load_saes"),
    ("evaluate", "8_report/evaluation.html#evaluate"),
    ("Task", "2_tasks/task.html#task"),
    ("find_cross_sections", "3_discovery/sections.html#find_cross_sections")])
def test_search_finds_a_definition_first(site, tab, name, page):
    "Its page may stand above it: the search lists what it finds on a page under the page."
    tab.set_viewport_size({"width": DESK, "height": 900})
    tab.goto(site.address + "index.html")
    tab.click("#quarto-search button")
    tab.fill(".aa-Input", name)
    tab.wait_for_function("""name => [...document.querySelectorAll('.aa-Item a')].slice(0, 2).some(
        a => a.innerText.includes(name))""", arg=name)
    links = tab.locator(".aa-Item a").evaluate_all("all => all.map(a => a.href)")
    first = [re.sub(r"\?[^#]*", "", link) for link in links]
    above = first.index(site.address + page)
    assert first[:above] in ([], [site.address + page.partition("#")[0]])


def test_a_class_is_shown_as_a_class(site, tab):
    tab.goto(site.address + "2_tasks/task.html")
    entry = tab.locator("section#task .api").first
    assert entry.locator(".api-signature").first.inner_text().startswith("class Task(")
    fields = entry.locator("table.api-params").first
    assert fields.locator("thead").inner_text().split() == ["Field", "Type", "Default", "Meaning"]
    assert "one row per prompt, one column per attribute" in fields.inner_text()
    assert "counterfactual(attribute) → Counterfactual" in entry.locator(".api-methods").inner_text()


def test_names_in_prose_lead_to_what_the_package_exports(site, pages):
    quickstart = next(page for page in pages if page.name == "tutorials/quickstart.html")
    inside = {link.removeprefix(site.address) for link in quickstart.words["links"]}
    assert "5_saes/sets.html#load_saes" in inside
    assert not {link for link in inside if link.startswith("9_lab/cli.html#")}


def test_pages_follow_each_other(site, tab):
    tab.goto(site.address + "tutorials/quickstart.html")
    assert tab.locator(".nav-page-next a").count() == tab.locator(".nav-page-previous a").count() == 1
    assert tab.locator("a.toc-action", has_text="View source").first.get_attribute("href").endswith(
        "/nbs/tutorials/quickstart.ipynb")


def test_an_explorer_on_a_page_answers_its_controls(site, tab):
    tab.goto(site.address + "7_views/section_map.html")
    frame = tab.locator("iframe.sage-frame").first
    frame.scroll_into_view_if_needed()
    inside = frame.content_frame
    before = inside.locator("body").inner_html()
    inside.locator("button[aria-pressed=false] >> visible=true").first.click()
    assert inside.locator("body").inner_html() != before


# Light and dark

CONTRAST = """() => {
    const parse = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
    const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = (colour) => colour.slice(0, 3).map((v) => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (box) => {
        for (; box; box = box.parentElement) {
            const colour = parse(getComputedStyle(box).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const faults = [];
    const kinds = "main :is(p, li, td, th, pre, code, h2, h3, dt, dd, a), nav a, nav span";
    const says = (box) => [...box.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    for (const box of document.querySelectorAll(kinds)) {
        if (!box.checkVisibility() || !says(box)) continue;
        const [a, b] = [light(parse(getComputedStyle(box).color)), light(ground(box))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) faults.push(
            `${ratio.toFixed(1)} ${box.tagName}.${box.className} ${box.innerText.slice(0, 40)}`);
    }
    return faults;
}"""
LOOKED_AT = ("index.html", "tutorials/quickstart.html", "2_tasks/task.html", "5_saes/sets.html", "api.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_text_is_readable_in_light_and_dark(site, chromium, name, dark):
    context = chromium.new_context(viewport={"width": DESK, "height": 900}, reduced_motion="reduce")
    try:  # colours that change gradually are not looked at half-way
        page = context.new_page()
        page.goto(site.address + name, wait_until="networkidle")
        if dark: page.click(".quarto-color-scheme-toggle >> visible=true")
        assert page.evaluate("document.body.classList.contains('quarto-dark')") is dark
        found(page.evaluate(CONTRAST), f"contrast below {NORMAL_TEXT}")
    finally: context.close()
