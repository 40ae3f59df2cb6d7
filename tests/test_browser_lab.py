"""The playground in JupyterLab with a live kernel: it appears, answers to the keyboard, and nothing is lost."""
import re

SET_UP = """
import torch
from sage_nb.core.models import load_model
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import fit_dictionaries
from sage_nb.views.playground import playground
torch.set_num_threads(1)
model = load_model("tiny-gpt2")
task = load_task("ioi", model, n=192)
sections = find_cross_sections(model, task, ["IO"], sites=["z"], max_prompts=32, verbose=False)
truth = fit_dictionaries(model, task, sections)
"""
SHOW = 'playground(model, task, truth, "tiny-gpt2-res-topk", sections)'
TYPED = "When Mary and Tom went to the station, Tom gave a hat to"
LISTEN = """() => {
    window.faults = [];
    const error = console.error;
    console.error = (...args) => { window.faults.push(args.map(String).join(" ")); error(...args); };
    window.addEventListener("error", (event) => window.faults.push(event.message));
    window.addEventListener("unhandledrejection", (event) => window.faults.push(String(event.reason)));
}"""


def enter(page, text):
    field = page.get_by_label("or type one")
    field.fill(text)
    field.press("Enter")


def test_the_playground_answers_to_the_keyboard(notebook):
    page = notebook([SET_UP, SHOW])
    page.evaluate(LISTEN)
    cards = page.locator(".sage-play .card")
    cards.first.wait_for()
    assert cards.count() == 4
    titles = page.locator(".sage-play .card caption")
    assert titles.nth(1).inner_text() == "tiny-gpt2-res-topk, 4 moves a node"
    shown = cards.nth(1).inner_text(), page.locator(".sage-play .moves tbody tr").count()

    slider = page.get_by_role("slider").first  # k, by its handle
    slider.focus()
    for _ in range(3): slider.press("ArrowLeft")
    page.locator(".sage-play caption", has_text="1 move a node").wait_for()
    assert page.locator(".sage-play .moves tbody tr").count() < shown[1]
    assert cards.nth(1).inner_text() != shown[0]

    enter(page, TYPED)
    page.locator(".sage-play mark", has_text=re.compile("^MaryIO$")).first.wait_for()
    assert page.locator(".sage-play .card").first.locator("tr").first.inner_text().startswith("Mary")
    page.get_by_label("to", exact=True).select_option("Anna")
    page.locator(".sage-play .differs", has_text="Anna").wait_for()

    enter(page, TYPED.replace("station", "moon"))
    page.get_by_role("alert").filter(has_text="does not know 'moon'").wait_for()
    assert cards.count() == 4 and page.get_by_label("or type one").input_value() == TYPED.replace("station", "moon")
    enter(page, TYPED)
    page.get_by_role("alert").wait_for(state="detached")

    page.get_by_role("button", name="Find again").press("Enter")
    page.get_by_role("alert").filter(has_text=re.compile("searching for IO, .* s")).wait_for()
    assert page.get_by_label("edit", exact=True).is_disabled()
    page.get_by_role("button", name="Stop").press("Enter")
    page.get_by_role("alert").filter(has_text="stopped: the cross-sections are those of before").wait_for()
    assert page.get_by_label("edit", exact=True).is_enabled() and cards.count() == 4
    assert page.evaluate("window.faults") == []
    assert page.get_by_text("Error displaying widget").count() == 0
