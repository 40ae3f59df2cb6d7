"""Own tasks: what is refused and with which words, and a task from a public table."""
import json
import os
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from conftest import ROOT
from sage_nb.tasks.templates import recipe_from_templates
from sage_nb.tasks.task import load_task, task_from_frame, task_from_json, task_from_rows

NUMBERS = "one two three four five six seven".split()


def number_row(start, i):
    "The number after the numbers i - 1 and i, counted from 0."
    prompt = f"{start} after {NUMBERS[i - 1]} and {NUMBERS[i]} comes"
    return {"prompt": prompt, "answer": f" {NUMBERS[i + 1]}", "value": NUMBERS[i]}


def number_rows():
    "A sound task: the number after two numbers."
    rows = []
    for start in ("Today", "Now", "Here"):
        for i in range(1, 6):
            row = number_row(start, i)
            rows.append({
                "prompt": row["prompt"], "answer": row["answer"], "distractor": f" {NUMBERS[i - 1]}",
                "attributes": {"item": NUMBERS[i]}, "positions": {"X": NUMBERS[i]}, "held_out": start == "Here",
                "counterfactuals": {"item": number_row(start, i % 5 + 1)},
            })
    return rows


def number_frame():
    records = []
    for row in number_rows():
        cf = row["counterfactuals"]["item"]
        records.append({key: row[key] for key in ("prompt", "answer", "distractor", "held_out")} | {
            "item": row["attributes"]["item"], "word": row["positions"]["X"],
            "cf": cf["prompt"], "cf_answer": cf["answer"], "cf_value": cf["value"],
        })
    return pd.DataFrame(records)


def put(path, value):
    "A change of the rows: the entry at `path` of row 0 (or of all rows, if the path starts with '*')."
    def change(rows):
        every, keys = path[0] == "*", [k for k in path if k != "*"]
        for row in rows if every else rows[:1]:
            for key in keys[:-1]: row = row[key]
            row[keys[-1]] = value
        return rows
    return change


def only(value): return lambda rows: [r for r in rows if r["attributes"]["item"] == value]


def never_trained_on(value): return lambda rows: [r for r in rows if r["held_out"] or r["attributes"]["item"] != value]


WRONG = {  # what is wrong: (change of the rows, words of the error)
    "no prompts": (lambda rows: [], "0 prompts; at least 2"),
    "one prompt": (lambda rows: rows[:1], "1 prompts; at least 2"),
    "no attributes": (lambda rows: [r | {"attributes": {}} for r in rows], "no attributes"),
    "attribute with one value": (only("two"), "attribute 'item' has one value, 'two'"),
    "value unseen in training":
        (never_trained_on("two"), "value 'two' of attribute 'item' occurs in held-out prompts only"),
    "everything held out": (put(("*", "held_out"), True), "one side of the split"),
    "nothing held out": (put(("*", "held_out"), False), "one side of the split"),
    "answer of two tokens": (put(("answer",), " three four"), "row 0: answer ' three four'"),
    "unknown answer": (put(("answer",), " zebra"), "is not one known token"),
    "distractor of two tokens": (put(("distractor",), " six seven"), "row 0: distractor ' six seven'"),
    "answer is distractor": (put(("distractor",), " three"), "are both ' three'"),
    "no answer": (put(("answer",), None), "row 0: answer is None"),
    "empty prompt": (put(("prompt",), ""), "row 0: prompt is ''"),
    "nan in an attribute": (put(("attributes", "item"), float("nan")), "row 0: an attribute is missing"),
    "duplicate prompts": (lambda rows: rows + rows[:1], "occurs 2 times; drop the duplicates"),
    "unequal lengths": (put(("counterfactuals", "item", "prompt"), "Today after two and three there comes"),
                        "they must be of equal length"),
    "counterfactual is the prompt":
        (put(("counterfactuals", "item", "prompt"), "Today after one and two comes"), "is the same text"),
    "counterfactual of the same value":
        (put(("counterfactuals", "item", "value"), "two"), "has the same value, 'two'"),
    "no counterfactual": (put(("counterfactuals",), {}), "has no counterfactual for attribute 'item'"),
    "other attributes": (lambda rows: rows[:-1] + put(("attributes",), {"kind": "x"})(rows[-1:]),
                         "row 14: prompt 'Here after five and six comes' "
                         "has attributes ['kind'], the first has ['item']"),
    "word not in the prompt": (put(("positions", "X"), "seven"), "the word 'seven' occurs 0 times"),
    "word twice in the prompt": (put(("positions", "X"), "o"), "give characters [start, end] or a token index"),
    "characters outside the prompt": (put(("positions", "X"), [0, 99]), "position 'X' is outside prompt"),
    "token outside the prompt": (put(("positions", "X"), 17), "token 17 of 6"),
    "position missing in one prompt": (lambda rows: rows[:1] + [r | {"positions": {}} for r in rows[1:]],
                                       "row 1: position 'X' is missing in prompt"),
}
OF_ALL = {"no prompts", "one prompt", "no attributes", "attribute with one value", "value unseen in training",
          "everything held out", "nothing held out"}  # no row alone is wrong


def test_the_sound_task_passes(model):
    task = task_from_rows(number_rows(), model)
    assert len(task) == 15 and task.check(model, by=()).accuracy["all"] == 1


@pytest.mark.parametrize("name", WRONG)
def test_wrong_definitions_are_refused(model, name):
    change, words = WRONG[name]
    with pytest.raises(ValueError) as error: task_from_rows(change(deepcopy(number_rows())), model)
    assert words in str(error.value)
    assert str(error.value).startswith("task 'own'")
    assert ("row" in str(error.value)) == (name not in OF_ALL), "an error names the row that is wrong"


@pytest.mark.parametrize("change, words", [
    (lambda f: f[:0], "the data frame is empty"),
    (lambda f: f.drop(columns="answer"), "no column 'answer'"),
    (lambda f: f.drop(columns="cf_value"), "no column 'cf_value'"),
    (lambda f: f.assign(distractor=[None, *f.distractor[1:]]), "column 'distractor' has no value in row 0"),
])
def test_wrong_frames_are_refused(model, change, words):
    frame = change(number_frame())
    with pytest.raises(ValueError, match=words): task_from_frame(frame, model, ["item"], {"item": "cf"}, {"X": "word"})


def test_columns_and_functions_make_the_same_task(model):
    frame, rows = number_frame(), number_rows()
    by_prompt = {r["prompt"]: r["counterfactuals"] for r in rows}
    made = task_from_frame(frame, model, ["item"], {"item": "cf"}, {"X": "word"})

    def counterfactual(row, attribute): return by_prompt[row["prompt"]][attribute]
    called = task_from_frame(frame, model, ["item"], counterfactual, {"X": "word"})
    assert made.texts == called.texts
    assert torch.equal(made.counterfactuals["item"].prompts.tokens, called.counterfactuals["item"].prompts.tokens)


@pytest.mark.parametrize("text, words", [("{", "is not JSON"), ("[]", "has no 'rows'"), ('{"rows": []}', "at least 2")])
def test_wrong_files_are_refused(model, tmp_path, text, words):
    path = tmp_path / "task.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words): task_from_json(path, model)


def test_positions_by_word_characters_and_token_agree(model):
    def word(row): return row["positions"]["X"]
    def characters(row): return [row["prompt"].index(" and ") + 5, row["prompt"].index(" comes")]
    for spec in (word, characters, lambda row: -2, lambda row: 4):
        rows = [row | {"positions": {"X": spec(row)}} for row in number_rows()]
        assert task_from_rows(rows, model).prompts.index("X").tolist() == [5] * 15  # <bos> is token 0


def test_html_escapes_tokens_and_names(model):
    rows = number_rows()
    for row in rows:
        row["attributes"]["item"] = f"<b>{row['attributes']['item']}"
        row["counterfactuals"]["item"]["value"] = f"<b>{row['counterfactuals']['item']['value']}"
    html = task_from_rows(rows, model, name="<script>")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "<td><b>" not in html


def ravel_table():
    folders = [Path(os.environ["SAGE_NB_DATA"])] if "SAGE_NB_DATA" in os.environ else []
    folders += ROOT.parent.glob("*/data")
    files = [folder / "ravel" / "ravel_city_entity_attributes.json" for folder in folders]
    file = next((file for file in files if file.exists()), None)
    if file is None: pytest.skip("no RAVEL city table: put one in a folder ravel/ of $SAGE_NB_DATA")
    return json.loads(file.read_text())


def test_a_task_from_the_ravel_city_table(gpt2_tokenizer):
    model = SimpleNamespace(tokenizer=gpt2_tokenizer, cfg=SimpleNamespace(default_prepend_bos=True))
    def one(word): return len(gpt2_tokenizer.encode(f" {word}")) == 1
    cities = [{"city": city, **row} for city, row in ravel_table().items()
              if one(city) and one(row["Country"]) and one(row["Language"])]
    assert len(cities) >= 50
    recipe = recipe_from_templates(
        "ravel",
        ["People say that the {relation} of {city} is", "In the book, the {relation} of {city} was",
         "We know: the {relation} of {city} is"],
        {"city": cities, "relation": [{"relation": name, "column": name.title()} for name in ("country", "language")]},
        answer=lambda v: " " + v["city"][v["relation"]["column"]],
    )
    task = load_task(recipe, model, n=150)
    assert len(task) == 150 and task.attributes.city.nunique() >= 30
    words = [gpt2_tokenizer.decode(task.prompts.tokens[i, index]) for i, index in enumerate(task.prompts.index("city"))]
    assert words == [f" {city}" for city in task.attributes.city]
