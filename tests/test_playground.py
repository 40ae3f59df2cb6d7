"""The playground without a browser: its controls are moved in Python, and what is shown must be what the rooms say."""
from dataclasses import replace

import pytest
import torch

from sage_nb.core.activations import run
from sage_nb.core.models import model_hash
from sage_nb.measures.control import run_edits
from sage_nb.measures.edits import find_edits, list_moves, read_latents
from sage_nb.report.report import Evaluated, SageReport
from sage_nb.tasks.task import load_task
from sage_nb.tasks.typed import PromptReader
from sage_nb.truth.runs import set_up, top_tokens
from sage_nb.views.playground import CLEAN, COUNTERFACTUAL, SUPERVISED, Playground, answer_html, playground

TYPED = "When Mary and Tom went to the station, Tom gave a hat to"
TOPK, STANDARD = "tiny-gpt2-res-topk", "tiny-gpt2-res-standard"


@pytest.fixture(scope="module")
def player(model, task, truth, sections, sae_sets):
    return playground(model, task, truth, [sae_sets[TOPK], sae_sets[STANDARD]], sections).player


@pytest.fixture
def play(player):
    made = Playground(player)
    assert not made.message.value and made.answer
    return made


def first(play, name): return play.answer.predictions[name][0][0].strip()


# Numbers

@pytest.mark.parametrize("k", [0, 1, 8])
def test_numbers_are_those_of_the_rooms(model, task, truth, sections, play, sae_sets, k):
    row, section = 7, sections[0]
    play.prompts.value = task.test.texts[row]
    play.section.value, play.k.value = section.name, k
    bench = set_up(model, task, section, truth).at(torch.tensor([row]))
    assert play.value.options[0] == bench.counterfactual.values[0], "the task's own counterfactual is the first choice"
    play.value.value = play.value.options[0]
    edits = find_edits(bench, read_latents(bench, sae_sets[TOPK]), 32)
    assert play.answer.moves.equals(list_moves(edits, read_latents(bench, sae_sets[TOPK]), k))
    acts = {CLEAN: None, TOPK: {node: e.edit(bench.acts[node], k) for node, e in edits.items()},
            SUPERVISED: bench.supervised.acts, COUNTERFACTUAL: bench.goal}
    for name, values in acts.items():
        there, = top_tokens(model, run(model, bench.task.prompts, edits=values), 5)
        here = play.answer.predictions[name]
        assert [p for _, p in here] == pytest.approx([p for _, p in there], abs=1e-5), name
        assert here[0][0] == there[0][0], name
    if k:
        token = run_edits(bench, edits, [k]).token.item()
        assert play.answer.predictions[TOPK][0][0] == model.tokenizer.decode([token])


def test_what_is_shown_is_the_answer(play):
    play.text.value = TYPED
    assert play.shown.value == answer_html(play.answer) == answer_html(play.player.answer(play.question()))
    for top in play.answer.predictions.values():
        for token, p in top: assert f'<bdi>{token}</bdi></td><td class="number">{p:.3f}</td>' in play.shown.value


# Controls

def test_each_control_changes_what_it_should(play, task):
    seen = [play.shown.value]

    def moved(control, goal):
        setattr(getattr(play, control), "value", goal)
        assert not play.message.value
        seen.append(play.shown.value)
        assert seen[-1] != seen[-2], f"{control} changed nothing"
        return play.answer
    moved("prompts", task.test.texts[9])
    assert play.text.value == play.answer.question.text == task.test.texts[9]
    moved("text", TYPED)
    assert play.prompts.label == "(typed below)" and first(play, CLEAN) == "Mary"
    clean = play.answer.predictions[CLEAN]
    moved("value", "Anna")
    assert first(play, COUNTERFACTUAL) == first(play, SUPERVISED) == "Anna"
    few = moved("k", 1)
    assert len(moved("k", 16).moves) > len(few.moves) == len(few.moves.node.unique())
    with_topk = play.answer
    with_standard = moved("sae", STANDARD)
    assert set(with_standard.predictions) == {CLEAN, STANDARD, SUPERVISED, COUNTERFACTUAL}
    for name in (SUPERVISED, COUNTERFACTUAL): assert with_standard.predictions[name] == with_topk.predictions[name]
    moved("section", "S:v@S2")
    assert play.answer.stage.section.attribute == "S" and "Tom" not in play.value.options
    assert [p for _, p in play.answer.predictions[CLEAN]] == pytest.approx([p for _, p in clean], abs=1e-5)


def test_moving_back_shows_the_same(play):
    play.k.value = 3
    shown = play.shown.value
    for k in (7, 0, 3): play.k.value = k
    assert play.shown.value == shown


def test_one_move_asks_once(play, monkeypatch):
    asked, answer = [], play.player.answer
    monkeypatch.setattr(play.player, "answer", lambda question: asked.append(question) or answer(question))
    play.k.value = 11
    play.prompts.value = play.player.task.test.texts[4]
    play.section.value = "S:z@END"  # and with it the list of values
    play.text.value = TYPED
    assert len(asked) == 4


def test_values_leave_out_the_prompts_own(play):
    play.text.value = TYPED
    play.section.value = "IO:z@END"
    assert "Mary" not in play.value.options and "Tom" in play.value.options
    play.value.value = "Anna"
    play.text.value = TYPED.replace("station", "park")
    assert play.value.value == "Anna", "a value that is still there stays"
    play.text.value = TYPED.replace("Mary", "Anna")
    assert play.value.value != "Anna" and "Anna" not in play.value.options and not play.message.value


# What cannot be shown

BAD = [
    ("When Mary and Tom went to the moon, Tom gave a hat to", "does not know &#x27;moon&#x27;"),
    ("Mary and Tom", "has 3 tokens, and those of task"), ("", "there is no prompt"), ("   ", "there is no prompt"),
    (TYPED.replace("Tom gave", "Anna gave"), "the word at token 4 again"),
    (TYPED.replace("and", "near"), "where this has &#x27;near&#x27;"),
    ("<script>alert(1)</script>", "&lt;script&gt;"), ("<bos> " + TYPED, "special token"),
    ("x" * 10_000, "does not know"),
    ("\u202e😀 " + TYPED, "does not know"), ("When " * 300, "tokens, and those of task"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
def test_a_prompt_that_cannot_be_read_is_said_and_nothing_is_lost(play, text, said):
    play.text.value = TYPED
    shown, answer = play.shown.value, play.answer
    play.text.value = text
    assert said in play.message.value and "the last answer" in play.message.value
    assert "<script" not in play.message.value and "Traceback" not in play.message.value
    assert (play.text.value, play.shown.value, play.answer) == (text, shown, answer)
    play.k.value = 9  # still cannot be read
    assert said in play.message.value and play.shown.value == shown
    play.text.value = TYPED
    assert not play.message.value and play.answer.question.k == 9


def test_what_an_answer_lacks_is_said(play):
    play.text.value, play.section.value = TYPED, "IO:z@END"
    play.value.value = "Tom"  # then both names would be Tom
    assert set(play.answer.predictions) == {CLEAN, SUPERVISED} and not play.message.value
    assert "no prompt is known that differs" in play.shown.value
    play.value.value = "Anna"
    assert set(play.answer.predictions) == {CLEAN, TOPK, SUPERVISED, COUNTERFACTUAL}


def test_an_sae_that_stands_elsewhere_is_said(model, task, truth, sections, sae_sets):
    first_layer = replace(sae_sets[TOPK], saes=dict([next(iter(sae_sets[TOPK].saes.items()))]), name="first layer")
    play = playground(model, task, truth, first_layer, sections)
    assert set(play.answer.predictions) == {CLEAN, SUPERVISED, COUNTERFACTUAL}
    assert "No first layer" in play.shown.value and not play.message.value


def test_faults_of_any_kind_stay_in_the_widget(play, monkeypatch):
    def broken(question): raise RuntimeError("hooks did not fire: <b>")
    monkeypatch.setattr(play.player, "answer", broken)
    shown = play.shown.value
    play.k.value = 13
    assert "RuntimeError: hooks did not fire: &lt;b&gt;" in play.message.value and play.shown.value == shown


# Searching

def test_a_search_ends_with_other_sections_or_with_the_old_ones(play):
    old = play.player
    play.min_effect.value = 0.5
    thread = play.search()
    assert play.k.disabled and not play.stop.disabled and play.search() is None, "one search at a time"
    play.stop.click()
    thread.join(60)
    assert play.player is old and "stopped" in play.search_message.value and not play.k.disabled
    play.search().join(300)
    assert "cross-sections found" in play.search_message.value, play.search_message.value
    kept = {section.name for section in old.sections if abs(section.effect.value) >= 0.5}
    assert set(play.section.options) == kept == set(play.player.by_name)
    assert play.player.sections.settings["min_effect"] == 0.5
    assert play.player.sections.settings["max_prompts"] == old.sections.settings["max_prompts"]
    play.k.value = 2
    assert not play.message.value and play.answer.question.section in kept
    assert play.stop.disabled and play.bar.value == 0


def test_a_search_that_finds_nothing_keeps_what_was_there(model, task, truth, sections, sae_sets):
    cannot = replace(task, answers=task.distractors, distractors=task.answers)
    play = playground(model, cannot, truth, sae_sets[TOPK], sections)
    old, shown = play.player, play.shown.value
    play.search().join(300)
    assert "less than min_accuracy" in play.search_message.value
    assert (play.player, play.shown.value, play.find.disabled) == (old, shown, False)


# Typed prompts of other tasks

@pytest.mark.parametrize("name", ["order", "agreement", "capitals", "successor", "greater_than"])
def test_typed_prompts_are_read_as_the_task_knows_them(model, name):
    task = load_task(name, model, n=120)
    reader = PromptReader(task, model)
    reader.row = {}  # so that its own prompts are typed ones
    for row in range(0, len(task), 10):
        one = reader.read(task.texts[row])
        assert dict(one.attributes.iloc[0]) == dict(task.attributes.iloc[row])
        assert {role: int(at) for role, at in one.prompts.positions.items()} == \
            {role: int(at[row]) for role, at in task.prompts.positions.items()}
        for attribute, cf in task[row : row + 1].counterfactuals.items():
            try: found = reader.change(one, attribute, cf.values[0])
            except ValueError as error: assert "no prompt is known" in str(error)
            else: assert found.strings == cf.strings


# Reports

def test_a_report_that_was_read_back_takes_the_objects(model, task, truth, sections, sae_sets):
    settings = {"model": {"name": "tiny-gpt2", "hash": model_hash(model)}, "task": {"name": "ioi", "hash": task.digest}}
    report = SageReport(*[None] * 4, settings, [], {})
    with pytest.raises(ValueError, match=r"holds no model and no task and no truth and no saes.*report.explore\(model"):
        report.explore()
    play = report.explore(model, task, truth, [TOPK], sections)
    assert play.answer.predictions and list(play.section.options) == [section.name for section in sections]
    unsectioned = report.explore(model, task, truth, TOPK)
    places = {(section.site, section.position) for section in sections}
    assert len(unsectioned.section.options) == len(task.attributes.columns) * len(places)
    with pytest.raises(ValueError, match="the report is of task ioi .* this task is another one"):
        report.explore(model, task[:100], truth, TOPK, sections)
    kept = replace(report, objects=Evaluated(model, task, truth, [sae_sets[TOPK]], sections))
    assert kept.explore().player.task is task
