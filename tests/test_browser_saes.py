"""Scorecard, latents and edits in a real browser: by mouse and by keyboard, on a phone, without scripts."""
import re

import pytest
import torch
from browser import PHONE, overflow

from sage_nb.measures.faithfulness import SparseRuns
from sage_nb.measures.score import Answers, Evidence
from sage_nb.measures.units import ValueHits
from sage_nb.views.edits import edits_explorer
from sage_nb.views.latents import PATTERNS, latents_explorer
from sage_nb.views.scorecard import Cast, scorecard_explorer

HOSTILE = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>",
           "\u202eright to left\u202c", "👩‍👩‍👧 \u2028",
           "x" * 10_000, "a\"b'c&<!--", "__proto__", "javascript:alert(3)"]
KINDS = ("scorecard", "latents", "edits")
each_kind = pytest.mark.parametrize("kind", KINDS)


# Explorers of numbers that are made up

def some_answers(faithful, covered, n=40):
    "An SAE that does so much of the task with few latents, and has a latent for so many values."
    noise = 0.2 * torch.rand(n, 3, generator=torch.Generator().manual_seed(7))
    clean, ablated = torch.full((n,), 3.0), torch.zeros(n)
    sparse = SparseRuns(clean, ablated, 3 * faithful + noise, 3 - 3 * faithful + noise)
    holds = torch.nn.functional.one_hot(torch.arange(n) % 4).double()
    on = holds * (torch.arange(4) < 4 * covered)
    return Answers(sparse, values=ValueHits(on, on, holds, on))


def a_scorecard(names=("good", "bad")):
    "Two SAEs in two sections, the twin of one, a floor, a baseline and a skyline."
    good, bad = names
    known = {"mean ablation": (0.0, 0.0), f"{good}, random twin": (0.2, 0.0), "PCA-4": (0.1, 0.25), good: (0.9, 0.75),
             bad: (0.5, 1.0), "supervised": (1.0, 1.0)}
    planted, evidence = some_answers(1.0, 1.0), {}
    for name, levels in known.items():
        own = some_answers(*levels)
        evidence[name] = [Evidence(section, own, planted) for section in ("IO:z@END", "S:v@S2")]
    cast = Cast({good: 4.0, bad: 32.0}, {good: f"{good}, random twin"}, "mean ablation", "supervised")
    return scorecard_explorer(evidence, cast, {good: "good", bad: "doubtful"})


def a_latent_panel(sae="topk", section="IO:z@END", values=("Mary", "John", "Anna"), token=" Mary", n=4):
    "Latents of which the first has the first value, the second two values, and the third value has none."
    def row(*numbers): return [*numbers, *[0.0] * (len(values) - len(numbers))][: len(values)]
    f1s = [row(0.9), row(0.0, 0.5, 0.0), row(0.1, 0.4, 0.0), row(0.05)]
    latents = []
    for i, f1 in enumerate(f1s[:n]):
        latents.append({"name": f"L1.resid_pre #{i}", "on": 0.1, "f1": f1, "precision": f1, "recall": f1,
                        "effect": row(-0.5, None), "acts": [[0, 1, 2.5], [1, 0, 1.0]], "promotes": [token, " the"],
                        "link": "https://www.neuronpedia.org/gpt2-small/0-res-jb/7" if i == 0 else None})
    forms = ["own latent", "merged", *["no latent"] * (len(values) - 2)]
    about = [{"name": value, "prompts": 3, "latent": "L1.resid_pre #0" if i == 0 else None, "form": form,
              "reason": f"{form} in words"} for i, (value, form) in enumerate(zip(values, forms))]
    return {"sae": sae, "section": section, "attribute": "IO", "values": about, "latents": latents,
            "others": [{"attribute": "S", "values": ["Tom"], "f1": [[0.999]] * n}],
            "prompts": [{"tokens": ["When", token, " went"], "value": values[0]},
                        {"tokens": ["So", " it", " is"], "value": values[1]}],
            "left_out": {"values": 0, "latents": 5}}


def an_edit_panel(sae="topk", section="IO:z@END", old=" Mary", new=" John"):
    "Two prompts; by name two exchanges are needed, with the answer in view one is enough."
    def said(token): return [[token, 0.9], [" the", 0.1]]
    after = {"by name": [old, new, new, new], "greedy": [new] * 4}
    moves = {"by name": [[0, 0, "L1H0.z@END", 0], [1, 1, "L1H0.z@END", 1]], "greedy": [[0, 1, "L1H0.z@END", 1]]}
    prompt = {"tokens": ["When", old, " went"], "roles": {"1": "IO", "2": "END"}, "old": old, "new": new,
              "counterfactual": ["When", new, " went"]}
    other = prompt | {"tokens": ["So", old, " came"], "counterfactual": []}
    edges = {"before": old, "supervised": new, "true": new, "prompt": new}
    ways = {}
    for name, tokens in after.items(): ways[name] = {"moves": [moves[name]] * 2, "after": [list(map(said, tokens))] * 2}
    return {"sae": sae, "section": section, "attribute": "IO", "ks": [0, 1, 2, 4, 8], "prompts": [prompt, other],
            "edges": {name: [said(token)] * 2 for name, token in edges.items()}, "ways": ways,
            "latents": ["L1.resid_pre #3", "L1.resid_pre #5"]}


@pytest.fixture(scope="module")
def explorers():
    panels = [a_latent_panel(), a_latent_panel("standard"), a_latent_panel("topk", "S:v@S2")]
    edits = [an_edit_panel(), an_edit_panel("topk", "S:v@S2")]
    return {"scorecard": a_scorecard(), "latents": latents_explorer(panels), "edits": edits_explorer(edits)}


@pytest.fixture(scope="module")
def hostile():
    panel = a_latent_panel(HOSTILE[0], HOSTILE[1], HOSTILE, HOSTILE[4]) | {"attribute": HOSTILE[2]}
    panel["others"][0] |= {"attribute": HOSTILE[6], "values": [HOSTILE[0]]}
    panel["latents"][0] |= {"name": HOSTILE[1]}
    edits = an_edit_panel(HOSTILE[1], HOSTILE[6], HOSTILE[4], HOSTILE[0]) | {"attribute": HOSTILE[3]}
    roles = {"0": HOSTILE[4], "3": HOSTILE[0]}
    edits["prompts"][0] |= {"tokens": HOSTILE, "counterfactual": HOSTILE[::-1], "roles": roles}
    return {"scorecard": a_scorecard((HOSTILE[0], HOSTILE[4])), "latents": latents_explorer([panel], HOSTILE[1]),
            "edits": edits_explorer([edits], HOSTILE[4])}


def view(page): return page.locator(".sage-view")


def said_aloud(page): return page.locator("[aria-live]").inner_text()


# By mouse

def methods(page): return [name.split("\n")[0] for name in page.locator(".sage-view tbody .method").all_inner_texts()]


def test_scorecard_sorts_and_filters(browse, explorers):
    page = browse(explorers["scorecard"].page())
    assert methods(page)[0] == "mean ablation" and len(methods(page)) == 6
    page.get_by_role("button", name="score", exact=True).click()
    assert methods(page)[:2] == ["supervised", "good"] and methods(page)[-1] in ("mean ablation", "good, random twin")
    page.get_by_role("button", name="coverage").click()
    assert methods(page)[:3] == ["bad", "supervised", "good"] and "sorted by coverage" in said_aloud(page)
    page.get_by_role("button", name="SAEs only").click()
    assert methods(page) == ["bad", "good"]
    page.get_by_label("Filter by name").fill("GOO")
    assert methods(page) == ["good"] and said_aloud(page) == "1 method"
    page.get_by_label("Filter by name").fill("nothing")
    assert methods(page) == []


def test_scorecard_compares_any_two_in_words(browse, explorers):
    explorer = explorers["scorecard"]
    words = {(pair["a"], pair["b"]): pair["words"] for pair in explorer.data["pairs"]}
    page = browse(explorer.page())
    assert page.locator(".words").inner_text() == words["good", "bad"]
    page.get_by_label("Second").select_option("PCA-4")
    assert page.locator(".words").inner_text() == words["good", "PCA-4"] == said_aloud(page)
    page.get_by_label("First").select_option("PCA-4")
    assert "two different" in page.locator(".words").inner_text()
    page.get_by_label("Second").select_option("good")
    assert page.locator(".words").inner_text() == words["good", "PCA-4"], "the same pair the other way round"
    assert page.locator("svg[role=img]").count() == 1


def test_scorecard_shows_a_section_and_l0(browse, explorers):
    page = browse(explorers["scorecard"].page())
    page.get_by_label("Cross-section").select_option("S:v@S2")
    assert page.locator(".sage-view caption").inner_text().startswith("S:v@S2")
    points = page.locator("svg g[role=img]")
    assert points.count() == 2 and "good: score" in points.first.get_attribute("aria-label")
    page.get_by_role("combobox", name="Part", exact=True).select_option("coverage")
    labels = [point.get_attribute("aria-label") for point in points.all()]
    assert labels[0] == "good: coverage 0.75 [0.75, 0.75] with L0 4.0" and "with L0 32.0" in labels[1]


def test_latents_show_what_is_chosen(browse, explorers):
    page = browse(explorers["latents"].page())
    assert page.locator(".form").all_inner_texts() == ["own latent", "merged", "no latent"]
    page.get_by_role("button", name="L1.resid_pre #2, John: F1 0.40").click()
    assert page.locator(".panel h2").inner_text() == "L1.resid_pre #2"
    assert "IO = John" in view(page).inner_text() and PATTERNS["merged"] in view(page).inner_text()
    assert "Answers best to John: F1 0.40" in said_aloud(page)
    assert page.locator(".panel .token.marked").count() == 2
    assert page.locator(".panel a").count() == 0
    page.get_by_role("button", name="L1 #0", exact=True).click()
    link = page.locator(".panel a")
    assert link.get_attribute("href") == "https://www.neuronpedia.org/gpt2-small/0-res-jb/7"
    assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"


def test_latents_of_another_measure_attribute_section_and_sae(browse, explorers):
    page = browse(explorers["latents"].page())
    cell = page.locator("table.matrix tbody tr").first.locator("button.cell").first
    assert cell.inner_text() == ".90"
    page.get_by_role("button", name="effect without it").click()
    assert cell.inner_text() == "−.50"
    page.get_by_label("Values of").select_option("S")
    assert cell.get_attribute("aria-label") == "L1.resid_pre #0, Tom: F1 1.0"
    page.get_by_label("SAE").select_option("standard")
    page.get_by_label("Cross-section").select_option("S:v@S2")
    assert "was not looked at in this cross-section" in view(page).inner_text()
    page.get_by_label("SAE").select_option("topk")
    assert page.locator("table.matrix tbody tr").count() == 4


def likeliest(page, title): return page.get_by_role("group", name=title).locator("li").first.inner_text().split("\n")[0]


def test_edits_by_the_slider(browse, explorers):
    page = browse(explorers["edits"].page())
    slider = page.get_by_role("slider")
    assert "Mary" in likeliest(page, "Before") and "John" in likeliest(page, "After 2")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert "Mary" in likeliest(page, "After 1 exchange") and "still says “Mary”" in said_aloud(page)
    assert page.locator(".move.out").all_inner_texts() == ["L1.resid_pre #3"] and page.locator(".move.in").count() == 0
    page.keyboard.press("Home")
    assert "Nothing is exchanged" in said_aloud(page)
    page.keyboard.press("End")
    assert page.locator("output").inner_text() == "8" and "John" in likeliest(page, "After 8")
    assert page.locator(".move.in").all_inner_texts() == ["L1.resid_pre #5"]
    for title in ("Supervised edit", "True activations", "The counterfactual prompt"):
        assert "John" in likeliest(page, title)


def test_edits_of_another_prompt_way_and_section(browse, explorers):
    page = browse(explorers["edits"].page())
    page.get_by_role("slider").fill("1")
    page.get_by_role("button", name="greedy").click()
    assert "John" in likeliest(page, "After 1") and "with the answer in view" in view(page).inner_text()
    page.get_by_role("combobox", name="Prompt", exact=True).select_option("1")
    assert page.locator(".tokens").first.inner_text().startswith("So")
    page.get_by_label("Cross-section").select_option("S:v@S2")
    assert "at S:v@S2" in view(page).inner_text() and page.locator(".tokens").first.inner_text().startswith("When")


# By keyboard alone, by a link, on a phone, without scripts

def tab_to(page, wanted, most=40):
    "Press Tab until an element of this name and kind has the focus."
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("e => document.activeElement.matches(e)", wanted): return
    raise AssertionError(f"{wanted} is not reached by Tab")


def test_the_matrix_by_keyboard_alone(browse, explorers):
    page = browse(explorers["latents"].page())
    tab_to(page, "table.matrix button")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"): page.keyboard.press(key)
    assert page.locator(".panel h2").inner_text() == "L1.resid_pre #1" and "IO = John" in view(page).inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.matches('table.matrix button')"), "one stop for the whole matrix"


def test_the_scorecard_by_keyboard_alone(browse, explorers):
    page = browse(explorers["scorecard"].page())
    for _ in range(2): tab_to(page, "button.sort")
    page.keyboard.press("Enter")
    assert methods(page)[0] == "supervised"
    assert page.evaluate("document.activeElement.matches('button.sort')"), "sorting again must not need another walk"
    tab_to(page, "svg g[role=img]")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("good: score 0.")


@pytest.mark.parametrize("kind, fragment, text", [
    ("scorecard", "#section=S%3Av%40S2&a=PCA-4&b=bad&part=coverage", "S:v@S2: 6 methods"),
    ("latents", "#section=S%3Av%40S2&latent=L1.resid_pre+%231&value=John", "IO = John"),
    ("edits", "#section=S%3Av%40S2&prompt=1&way=greedy&k=3", "After 4 exchanges")])
def test_a_view_can_be_linked(browse, explorers, kind, fragment, text):
    assert text in view(browse(explorers[kind].page(), fragment=fragment)).inner_text()


@each_kind
@pytest.mark.parametrize("fragment", [
    "#section=x&sae=y&a=z&part=q&k=99&prompt=-1&way=w&latent=l&value=v&of=o&measure=m&sort=s",
    "#k=NaN&prompt=1e9&section=%3Cscript%3E"])
def test_a_wrong_address_shows_the_start(browse, explorers, kind, fragment):
    page = browse(explorers[kind].page(), fragment=fragment)
    assert page.locator(".broken").count() == 0 and page.locator(".sage-view select").count() > 0


@each_kind
@pytest.mark.parametrize("dark", (False, True))
def test_a_phone_shows_all_of_it(browse, explorers, hostile, kind, dark):
    for explorer in (explorers[kind], hostile[kind]):
        page = browse(explorer.page(), PHONE, dark)
        assert overflow(page) == 0 and view(page).is_visible()


@each_kind
def test_without_scripts_the_tables_stand_there(browse, explorers, kind):
    page = browse(explorers[kind].page(), scripts=False)
    shown = {"scorecard": "good scores higher than PCA-4", "latents": "own latent in words", "edits": "8 moves by name"}
    assert shown[kind] in re.sub(r"\s+", " ", page.locator(".sage-static").inner_text())


@each_kind
def test_hostile_words_run_nothing(browse, hostile, kind):
    page = browse(hostile[kind].page())
    assert page.locator(".broken").count() == 0
    assert page.evaluate("document.querySelectorAll('.sage-view img, .sage-view script').length") == 0
    for select in page.locator(".sage-view select").all():
        for value in select.locator("option").evaluate_all("all => all.map(o => o.value)"): select.select_option(value)
    for button in page.locator(".sage-view button:visible").all()[:12]: button.click()
    tallest = page.evaluate("document.documentElement.scrollHeight")
    assert tallest < 6000 and page.evaluate("Object.prototype.polluted") is None


@each_kind
@pytest.mark.parametrize("dark", (False, True))
def test_axe_finds_no_fault(browse, audit, explorers, kind, dark):
    page = browse(explorers[kind].page(), dark=dark)
    assert audit(page) == []
