"""Wrong calls of models, tasks and discovery: each is refused at the door, with the thing, the value and the remedy."""
import json
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sage_nb.core.activations import Node
from sage_nb.core.attention import key_head, n_heads
from sage_nb.core.models import EMBEDDED, load_model, model_card, model_hash
from sage_nb.discovery.accuracy import agreement, discovery_accuracy
from sage_nb.discovery.attribution import all_nodes, attribution_patching, exact_patching
from sage_nb.discovery.sections import find_cross_sections, shortest_prefix
from sage_nb.tasks.builtin import RECIPES
from sage_nb.tasks.planted import planted_circuit
from sage_nb.tasks.task import build_task, cramers_v, load_task, task_from_frame, task_from_json, task_from_rows
from sage_nb.tasks.templates import fill, random_labels, recipe_from_templates
from test_own_tasks import number_frame, number_rows


def with_tokenizer(model, **changes):
    "The tokenizer of a model, changed, in what is enough of a model to make a task for."
    tokenizer = deepcopy(model.tokenizer)
    for name, value in changes.items(): setattr(tokenizer, name, value)
    return SimpleNamespace(tokenizer=tokenizer, cfg=model.cfg, hook_dict={})


class Slow:
    "A tokenizer that does not know where its tokens stand."
    is_fast, bos_token_id, eos_token_id, pad_token_id, unk_token_id = False, 1, 2, 0, 3


@pytest.fixture(scope="session")
def fixtures(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    task = load_task("ioi", model, n=96)
    without_bos = load_model("tiny-gpt2")
    without_bos.cfg.default_prepend_bos = False
    planted = planted_circuit()
    found = find_cross_sections(planted.model, planted.task(48), "which", "q", verbose=False)
    return SimpleNamespace(model=model, task=task, folder=folder, without_bos=without_bos, found=found, planted=planted)


def written(f, name, text):
    path = f.folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def model_folder(f, name, **files):
    "The folder of an embedded model, some files replaced; None takes a file away."
    folder = f.folder / name
    folder.mkdir(exist_ok=True)
    for file in (EMBEDDED / "tiny-gpt2").iterdir(): (folder / file.name).write_bytes(file.read_bytes())
    for key, content in files.items():
        path = folder / key.replace("_", ".")
        if content is None: path.unlink()
        else: path.write_bytes(content)
    return folder


def rows(f, change, **options):
    "The sound rows, one of them changed; `change` gets a row, and returns another or changes it."
    given = number_rows()
    given[0] = change(given[0]) or given[0]
    return task_from_rows(given, f.model, **options)


def row(**entries): return lambda r: r | entries


def changed_row(**entries):
    def change(r): r["counterfactuals"]["item"].update(entries)
    return change


def frame(f, change=lambda x: x, attributes=("item",), counterfactuals=None, positions=None):
    cf = {"item": "cf"} if counterfactuals is None else counterfactuals
    return task_from_frame(change(number_frame()), f.model, attributes, cf, positions)


def twice(given, **entries): return [*given, given[0] | entries]


def recipe(templates=("a {x} is", "the {x} is"), slots=None, answer=lambda v: f" {v['x']}", **options):
    return recipe_from_templates("own", templates, {"x": ["dog", "cat"]} if slots is None else slots, answer, **options)


def find(f, **options): return find_cross_sections(f.model, f.task, **({"verbose": False} | options))


def exact(f, nodes, **options): return exact_patching(f.model, f.task, "IO", nodes, **options)


MODELS = [
    ("a misspelt embedded model", lambda f: load_model("tiny-gtp2"), ValueError,
     "did you mean 'tiny-gpt2'? (embedded are"),
    ("an embedded model in capitals", lambda f: load_model("Tiny-GPT2"), ValueError, "did you mean 'tiny-gpt2'"),
    ("a model that is nowhere", lambda f: load_model("no-such-model"), ValueError,
     "model 'no-such-model' could not be loaded from the Hugging Face hub (embedded are tiny-gemma"),
    ("an empty name", lambda f: load_model(""), ValueError, "model '' is no name (embedded are"),
    ("a number for a model", lambda f: load_model(3), TypeError, "a int is neither a name, a folder nor"),
    ("another library's model", lambda f: load_model(torch.nn.Linear(2, 2)), TypeError, "a Linear is neither a name"),
    ("a folder without a model", lambda f: load_model(f.folder), ValueError, "holds no model: config.json is missing"),
    ("a truncated model file", lambda f: load_model(model_folder(f, "cut", model_safetensors=b"\x00" * 99)), ValueError,
     "cut' could not be read from its folder"),
    ("a broken config", lambda f: load_model(model_folder(f, "broken", config_json=b"{")), ValueError,
     "damaged or half-downloaded, get it again"),
    ("weights that are missing", lambda f: load_model(model_folder(f, "empty", model_safetensors=None)), ValueError,
     "there is no model.safetensors in it: copy it there"),
    ("a dtype by name", lambda f: load_model("tiny-gpt2", dtype="float32"), TypeError,
     "dtype 'float32' is not a torch.dtype"),
    ("a card of no model", lambda f: model_card("large-gpt2"), ValueError,
     "model 'large-gpt2' is not embedded (has tiny-gemma"),
    ("a hash of a name", lambda f: model_hash("tiny-gpt2"), TypeError, "load it first: load_model('tiny-gpt2')"),
    ("heads of a site without heads", lambda f: n_heads(f.model, "resid_pre"), ValueError,
     "site 'resid_pre' has no heads"),
    ("a query head that is not there", lambda f: key_head(f.model, 9), ValueError,
     "head 9 is not one of the 4 query heads"),
    ("a negative query head", lambda f: key_head(f.model, -1), ValueError, "head -1 is not one of the 4 query heads"),
]
LOADING = [
    ("an unknown task", lambda f: load_task("ioy", f.model), ValueError, "task 'ioy' is not built in (has ioi, order"),
    ("model and task exchanged", lambda f: load_task(f.model, "ioi"), TypeError,
     "and then the model: load_task('ioi', model)"),
    ("a model's name for a task", lambda f: load_task("ioi", "tiny-gpt2"), TypeError, "load_model('tiny-gpt2')"),
    ("a number for a task", lambda f: load_task(7, f.model), TypeError,
     "a task cannot be made from a int; give a name"),
    ("no model", lambda f: load_task("ioi", None), TypeError, "a model was expected, and a NoneType was given"),
    ("a model without tokenizer",
     lambda f: load_task("ioi", SimpleNamespace(tokenizer=None, cfg=f.model.cfg)), ValueError,
     "'tiny-gpt2' has no tokenizer; set model.tokenizer"),
    ("a tokenizer without <bos>", lambda f: load_task("ioi", with_tokenizer(f.model, bos_token=None)), ValueError,
     "its tokenizer has none; set model.cfg.default_prepend_bos = False"),
    ("a slow tokenizer", lambda f: load_task("ioi", SimpleNamespace(tokenizer=Slow(), cfg=f.model.cfg)), ValueError,
     "is a slow one, which does not know where its tokens stand; set model.tokenizer to the fast one"),
    ("no prompts", lambda f: load_task("ioi", f.model, n=0), ValueError, "n=0 is not a whole number of at least 2"),
    ("fewer than no prompts", lambda f: load_task("ioi", f.model, n=-5), ValueError, "n=-5 is not a whole number"),
    ("one prompt", lambda f: load_task("ioi", f.model, n=1), ValueError, "n=1 is not a whole number of at least 2"),
    ("half a prompt", lambda f: load_task("ioi", f.model, n=10.5), ValueError, "n=10.5 is not a whole number"),
    ("prompts as text", lambda f: load_task("ioi", f.model, n="96"), ValueError, "n='96' is not a whole number"),
    ("a seed that is none", lambda f: load_task("ioi", f.model, n=24, seed=None), ValueError,
     "seed=None is not a whole"),
    ("a seed of text", lambda f: load_task("ioi", f.model, n=24, seed="a"), ValueError,
     "seed='a' is not a whole number"),
    ("held out in percent", lambda f: load_task("ioi", f.model, n=24, held_out=33), ValueError,
     "held_out=33 is not a share between 0 and 1"),
    ("held out below 0", lambda f: load_task("ioi", f.model, n=24, held_out=-1), ValueError,
     "held_out=-1 is not a share"),
    ("nothing held out", lambda f: load_task("ioi", f.model, n=24, held_out=0), ValueError,
     "held_out=0 is not a share"),
    ("held out as text", lambda f: load_task("ioi", f.model, n=24, held_out="third"), ValueError,
     "held_out='third' is not"),
    ("an unknown pool", lambda f: load_task("ioi", f.model, pool="new"), ValueError,
     "pool 'new' is not one of all, seen"),
    ("a number for a pool", lambda f: load_task("ioi", f.model, pool=3), ValueError,
     "pool 3 is not one of all, seen, unseen"),
    ("a file that is not there", lambda f: load_task("nowhere.json", f.model), FileNotFoundError,
     "no task file 'nowhere.json'"),
    ("a folder for a file", lambda f: load_task(f.folder, f.model), FileNotFoundError, "there is no task file"),
    ("broken JSON", lambda f: task_from_json(written(f, "a.json", '{"rows": ['), f.model), ValueError,
     "a.json is not JSON"),
    ("a file that is no text", lambda f: task_from_json(written(f, "b.json", b"\xff\xfe\x00"), f.model), ValueError,
     "b.json is not JSON"),
    ("JSON without rows", lambda f: task_from_json(written(f, "c.json", '{"name": "x"}'), f.model), ValueError,
     "c.json has no 'rows': give {"),
    ("JSON with rows of text",
     lambda f: task_from_json(written(f, "d.json", json.dumps({"rows": ["x"]})), f.model), ValueError,
     "row 0: it is 'x', a str; give a dict"),
]
ROWS_OF_TASKS = [
    ("a word that the tokenizer does not know",
     lambda f: rows(f, row(prompt="Zebras after one and two comes")), ValueError,
     "row 0: the tokenizer does not know 'Zebras' in prompt 'Zebras after one and two comes'; choose words"),
    ("an unknown word in a counterfactual", lambda f: rows(f, changed_row(prompt="Zebras after two and three comes")),
     ValueError, "the tokenizer does not know 'Zebras'"),
    ("a space at the end", lambda f: rows(f, row(prompt="Today after one and two comes ")), ValueError,
     "prompt 'Today after one and two comes ' ends in a space; take it off"),
    ("a line end that the tokenizer drops",
     lambda f: rows(f, row(prompt="Today after one and two comes\n")), ValueError,
     r"the tokenizer drops '\n' at the end of prompt"),
    ("a space at the end of a counterfactual",
     lambda f: rows(f, changed_row(prompt="Today after two and three comes ")), ValueError,
     "ends in a space; take it off"),
    ("an answer that ends in a space", lambda f: rows(f, row(answer=" three ")), ValueError,
     "answer ' three ' ends in a space"),
    ("a counterfactual value of no prompt", lambda f: rows(f, changed_row(value="Three")), ValueError,
     "the counterfactual value 'Three' of attribute 'item' is the value of no prompt (has five, four"),
    ("the same text with another distractor",
     lambda f: task_from_rows(twice(number_rows(), distractor=" seven"), f.model), ValueError,
     "occurs 2 times; drop the duplicates: the same text is one prompt, whatever its distractor"),
    ("a held-out text that is fitted on",
     lambda f: task_from_rows(twice(number_rows(), held_out=True), f.model), ValueError,
     "occurs 2 times, for fitting and for judging; drop"),
    ("texts that are the same tokens",
     lambda f: task_from_rows(twice(number_rows(), prompt="Today  after one and two comes"), f.model), ValueError,
     "rows [0, 15]: prompts 'Today after one and two comes' and 'Today  after one and two comes' are the same tokens"),
    ("answer and distractor of one token", lambda f: rows(f, row(distractor="three")), ValueError,
     "answer ' three' and distractor 'three' of prompt 'Today after one and two comes' are the same token"),
    ("a misspelt key", lambda f: rows(f, row(heldout=True)), ValueError,
     "row 0: it has the key 'heldout', which is not known"),
    ("a misspelt key of a counterfactual", lambda f: rows(f, changed_row(valu="two")), ValueError,
     "has the key 'valu'"),
    ("a counterfactual of no attribute",
     lambda f: rows(f, lambda r: r["counterfactuals"].update(itme=r["counterfactuals"]["item"])), ValueError,
     "has a counterfactual for 'itme', which is no attribute (has item)"),
    ("a counterfactual that is a text", lambda f: rows(f, row(counterfactuals={"item": "Today after"})), ValueError,
     "counterfactual of 'item': it is 'Today after', a str; give a dict"),
    ("attributes in a list", lambda f: rows(f, row(attributes=["item"])), ValueError,
     "attributes is ['item'], a list; give a"),
    ("a position by a fraction", lambda f: rows(f, row(positions={"X": 1.5})), ValueError,
     "position 'X' is 1.5; give a word"),
    ("a position that is none", lambda f: rows(f, row(positions={"X": None})), ValueError,
     "position 'X' is None; give a word"),
    ("END given", lambda f: rows(f, row(positions={"X": -2, "END": 0})), ValueError,
     "position 'END' is always the last token"),
    ("a template by name", lambda f: rows(f, row(template="first")), ValueError,
     "template is 'first'; give its number"),
    ("held out by a word", lambda f: rows(f, row(held_out="False")), ValueError,
     "held_out is 'False'; give true or false"),
    ("a neutral counterfactual that is the prompt",
     lambda f: rows(f, row(neutral={"prompt": "Today after one and two comes"})), ValueError,
     "the neutral counterfactual of prompt 'Today after one and two comes' is the same text"),
    ("a neutral counterfactual with another answer",
     lambda f: rows(f, row(neutral={"prompt": "Now after one and two comes", "answer": " six"})), ValueError,
     "has another answer, ' six'; change only what does not matter"),
    ("a neutral counterfactual in one row", lambda f: rows(f, row(neutral={"prompt": "Now after one and two comes"})),
     ValueError, "some prompts have a neutral counterfactual and some have none; give one to all, or to none"),
    ("held out in percent, of rows", lambda f: rows(f, row(), held_out=33), ValueError, "held_out=33 is not a share"),
    ("a seed of text, of rows", lambda f: rows(f, row(), seed="x"), ValueError, "seed='x' is not a whole number"),
    ("rows that are a frame", lambda f: task_from_rows(number_frame(), f.model), TypeError,
     "give it to task_from_frame"),
    ("one row for rows", lambda f: task_from_rows(number_rows()[0], f.model), TypeError,
     "rows are a dict; give a list of dicts"),
    ("rows for a frame", lambda f: task_from_frame(number_rows(), f.model, ["item"], {"item": "cf"}), TypeError,
     "the frame is a list; give a DataFrame, or give dicts to task_from_rows"),
    ("an attribute that is no column",
     lambda f: frame(f, attributes="itme", counterfactuals=lambda row, a: {}), ValueError,
     "the data frame has no column 'itme' (has prompt"),
    ("counterfactuals that are a column", lambda f: frame(f, counterfactuals="cf"), TypeError,
     "counterfactuals='cf' is neither a dict, attribute -> column, nor a function"),
    ("counterfactuals of no attribute", lambda f: frame(f, counterfactuals={"itme": "cf"}), ValueError,
     "counterfactuals has 'itme', which is no attribute (has item)"),
    ("a function that returns nothing", lambda f: frame(f, counterfactuals=lambda row, a: None), ValueError,
     "counterfactual of 'item': it is None, a NoneType; give a dict"),
    ("positions in a list", lambda f: frame(f, positions=["word"]), TypeError,
     "positions=['word'] is no dict; give role"),
    ("no items", lambda f: build_task(f.model, "x", [], ["W"]), ValueError,
     "task 'x': 0 prompts; at least 2 are needed"),
]
RECIPES_OF_TASKS = [
    ("templates that are a text", lambda f: recipe("a {x} is"), ValueError,
     "templates are one text, 'a {x} is'; give a list"),
    ("a template that is malformed", lambda f: recipe(["a {x", "the {x} is"]), ValueError,
     "template 'a {x' is malformed"),
    ("a slot without a name", lambda f: recipe(["a {} is", "the {x} is"]), ValueError,
     "slot '' of a template has no words"),
    ("words that are a text", lambda f: recipe(slots={"x": "dog"}), ValueError,
     "the words of slot 'x' are one text, 'dog'"),
    ("a word twice", lambda f: recipe(slots={"x": ["dog", "dog"]}), ValueError,
     "slot 'x' has the word 'dog' twice; drop one"),
    ("one word", lambda f: recipe(slots={"x": ["dog"]}), ValueError, "slot 'x' has 1 words; at least 2 are needed"),
    ("a row without its word", lambda f: recipe(slots={"x": ["dog", {"y": "cat"}]}), ValueError,
     "has the entry {'y': 'cat'}"),
    ("an attribute that is no slot", lambda f: recipe(attributes="y"), ValueError,
     "attribute 'y' is not a slot (has x)"),
    ("no attribute", lambda f: recipe(attributes=[]), ValueError, "no slot is an attribute (has x); name at least one"),
    ("an answer that is no function", lambda f: recipe(answer=" dog"), TypeError, "answer=' dog' is no function"),
    ("an answer that is no text", lambda f: load_task(recipe(answer=lambda v: None), f.model, n=24), ValueError,
     "recipe 'own': the answer to {'x': "),
    ("a slot without a word", lambda f: fill("a {x} is", {}), ValueError,
     "slot 'x' of template 'a {x} is' has no word"),
    ("labels of a name", lambda f: random_labels("ioi"), TypeError, "recipe 'ioi' is a str; give a Recipe"),
    ("a circuit whose heads look away", lambda f: planted_circuit(sharpness=0), ValueError,
     "sharpness=0 is not above 0"),
]
TASKS = [
    ("one prompt of a task", lambda f: f.task[5], TypeError, "take rows by a slice such as task[5:6]"),
    ("a prompt by name", lambda f: f.task["IO"], TypeError, "task['IO'] is not a task; take rows by a slice"),
    ("a row that is not there", lambda f: f.task[[3, 96]], IndexError, "or numbers below 96"),
    ("a mask that is too short", lambda f: f.task[torch.tensor([True, False])], IndexError,
     "a mask of 96, or numbers below 96"),
    ("rows that are fractions", lambda f: f.task[np.array([0.5])], IndexError,
     "give a slice, a mask of 96, or numbers"),
    ("an attribute that is not there", lambda f: f.task.counterfactual("Foo"), ValueError,
     "'Foo' is not in task 'ioi' (has IO"),
    ("a list for an attribute", lambda f: f.task.metric(["IO"]), ValueError,
     "attribute ['IO'] is not in task 'ioi' (has IO"),
    ("groups of an unknown attribute", lambda f: f.task.check(f.model, by="Foo"), ValueError,
     "group 'Foo' is not known here"),
    ("batches of nothing", lambda f: f.task.check(f.model, batch_size=0), ValueError,
     "batch_size=0 is not a whole number"),
    ("one prompt to check", lambda f: f.task[:1].check(f.model), ValueError,
     "has 1 prompt here; an interval needs at least 2"),
    ("no prompts to check", lambda f: f.task[99:].check(f.model), ValueError,
     "task 'ioi' has no prompts here; take other rows"),
    ("a name to check", lambda f: f.task.check("tiny-gpt2"), TypeError, "load it first: load_model('tiny-gpt2')"),
    ("a model that reads without <bos>", lambda f: f.task.check(f.without_bos), ValueError,
     "task 'ioi' was made for another tokenizer, or another use of <bos>"),
    ("a model with too little room", lambda f: f.task.require(f.planted.model), ValueError,
     "reads 6; give shorter prompts"),
    ("columns of unequal length", lambda f: cramers_v([1, 2, 3], [1, 2]), ValueError,
     "columns of 3 and 2 rows; give two of"),
]
DISCOVERY = [
    ("no nodes", lambda f: exact(f, []), ValueError, "no node was asked for; name one, such as L9H6.q@END"),
    ("a head that is not there", lambda f: exact(f, "L0H9.z@END"), ValueError,
     "head 9 of node L0H9.z@END is not in this model"),
    ("a negative head", lambda f: exact(f, [Node("z", 0, -1, "END")]), ValueError, "head -1 of node"),
    ("a layer that is not there", lambda f: exact(f, "L9H0.z@END"), ValueError,
     "layer 9 of node L9H0.z@END is not in this"),
    ("a position that is not there", lambda f: exact(f, ["L0H0.z@S3"]), ValueError,
     "position 'S3' is not named here (has IO"),
    ("a site that is not there", lambda f: exact(f, ["L0H0.zz@END"]), ValueError,
     "site 'zz' of node L0H0.zz@END is not known"),
    ("no node", lambda f: exact(f, ["z@END"]), ValueError, "node 'z@END' is not of the form L9H6.q@END"),
    ("numbers for nodes", lambda f: exact(f, 3), TypeError, "node 3 is neither a Node nor a text"),
    ("patching in batches of nothing", lambda f: exact(f, "L0H0.z@END", batch_size=-1), ValueError,
     "batch_size=-1 is not a"),
    ("patching a name", lambda f: exact_patching("tiny-gpt2", f.task, "IO"), TypeError, "load_model('tiny-gpt2')"),
    ("patching for a name", lambda f: exact_patching(f.model, "ioi", "IO"), TypeError, "load_task('ioi', model)"),
    ("patching for an unknown attribute", lambda f: exact_patching(f.model, f.task, "Foo"), ValueError,
     "'Foo' is not in task"),
    ("paths without points", lambda f: attribution_patching(f.model, f.task, "IO", steps=0), ValueError,
     "steps=0 is not a"),
    ("paths of half a point", lambda f: attribution_patching(f.model, f.task, "IO", steps=2.5), ValueError,
     "steps=2.5 is not"),
    ("slopes at a node of all heads", lambda f: attribution_patching(f.model, f.task, "IO", "L0.z@END"), ValueError,
     "node L0.z@END is not one vector"),
    ("slopes for another tokenizer", lambda f: attribution_patching(f.without_bos, f.task, "IO"), ValueError,
     "was made for another tokenizer, or another use of <bos>"),
    ("the largest none", lambda f: f.found.scores["which"].table(-1), ValueError,
     "n=-1 is not a whole number of at least 1"),
    ("nodes of no site", lambda f: all_nodes(f.model, "END", []), ValueError, "no site was asked for (has resid_pre"),
    ("nodes of no position", lambda f: all_nodes(f.model, []), ValueError,
     "no position was asked for; name at least one"),
    ("no sites", lambda f: find(f, sites=[]), ValueError, "no site was asked for (has resid_pre"),
    ("an unknown site", lambda f: find(f, sites="zz"), ValueError, "site 'zz' is not known here (has resid_pre"),
    ("no attributes", lambda f: find(f, attributes=[]), ValueError, "no attribute was asked for (has IO, S, Pos)"),
    ("an unknown attribute", lambda f: find(f, attributes="Foo"), ValueError,
     "attribute 'Foo' is not known here (has IO, S"),
    ("a number for attributes", lambda f: find(f, attributes=3), ValueError,
     "attribute 3 is not known here (has IO, S, Pos)"),
    ("one prompt to search on", lambda f: find(f, max_prompts=1), ValueError,
     "max_prompts=1 is not a whole number of at least 2"),
    ("fewer than no prompts to search on", lambda f: find(f, max_prompts=-8), ValueError,
     "max_prompts=-8 is not a whole"),
    ("a negative effect", lambda f: find(f, min_effect=-0.1), ValueError, "min_effect=-0.1 is not a share from 0 to 1"),
    ("an effect in percent", lambda f: find(f, min_effect=10), ValueError, "min_effect=10 is not a share from 0 to 1"),
    ("no coverage", lambda f: find(f, coverage=0), ValueError, "coverage=0 is not in (0, 1]"),
    ("a coverage in percent", lambda f: find(f, coverage=90), ValueError, "coverage=90 is not a share from 0 to 1"),
    ("an accuracy in percent", lambda f: find(f, min_accuracy=75), ValueError,
     "min_accuracy=75 is not a share from 0 to 1"),
    ("a search without points", lambda f: find(f, steps=0), ValueError, "steps=0 is not a whole number of at least 1"),
    ("a search in batches of nothing", lambda f: find(f, batch_size=0), ValueError,
     "batch_size=0 is not a whole number"),
    ("a search in a name", lambda f: find_cross_sections("tiny-gpt2", f.task), TypeError, "load_model('tiny-gpt2')"),
    ("a search for a name", lambda f: find_cross_sections(f.model, "ioi"), TypeError, "load_task('ioi', model)"),
    ("model and task exchanged in a search", lambda f: find_cross_sections(f.task, f.model), TypeError,
     "a model was expected, and a Task was given"),
    ("a search on held-out prompts", lambda f: find_cross_sections(f.model, f.task.test), ValueError,
     "task 'ioi' has 0 training prompts here, a search needs at least 2; give the whole task"),
    ("a search with another use of <bos>", lambda f: find_cross_sections(f.without_bos, f.task), ValueError,
     "was made for another tokenizer, or another use of <bos>"),
    ("cross-sections of an unknown attribute", lambda f: f.found.of("Foo"), ValueError,
     "attribute 'Foo' is not known here"),
    ("a cross-section by name", lambda f: f.found["which"], TypeError,
     "'which' is no number; for an attribute's, ask for of("),
    ("a cross-section that is not there", lambda f: f.found[[7]], IndexError,
     "give a slice, a mask of 1, or numbers below 1"),
    ("a prefix of nothing", lambda f: shortest_prefix([], len), ValueError,
     "there is no node to take a prefix of; give at"),
    ("agreement of numbers", lambda f: agreement([1.0], [1.0]), TypeError, "scores are a list; give NodeScores"),
    ("a threshold in percent", lambda f: discovery_accuracy(f.model, f.task, threshold=5), ValueError,
     "threshold=5 is not a"),
    ("an unknown method", lambda f: discovery_accuracy(f.model, f.task, methods="ATP"), ValueError,
     "method 'ATP' is not known"),
    ("accuracy at no site", lambda f: discovery_accuracy(f.model, f.task, sites=[]), ValueError,
     "no site was asked for"),
    ("accuracy for no attribute", lambda f: discovery_accuracy(f.model, f.task, attributes=[]), ValueError,
     "no attribute was"),
    ("accuracy for a name", lambda f: discovery_accuracy(f.model, RECIPES["ioi"]), TypeError,
     "a task was expected, and a Recipe was given; give what load_task returns"),
]
ROWS = MODELS + LOADING + ROWS_OF_TASKS + RECIPES_OF_TASKS + TASKS + DISCOVERY  # (what, call, error, part of its text)


@pytest.mark.parametrize("what,call,error,text", ROWS, ids=[row[0] for row in ROWS])
def test_wrong_calls_are_refused(what, call, error, text, fixtures):
    with pytest.raises(error) as caught: call(fixtures)
    assert text in str(caught.value)


def test_what_may_stand_alone_is_taken_as_a_list(fixtures):
    "A name or a text of a node, where a list is meant, is not refused: it is what was meant."
    f = fixtures
    alone, listed = exact(f, "L3H2.z@END"), exact(f, [Node("z", 3, 2, "END")])
    assert alone.nodes == listed.nodes and torch.equal(alone.effects, listed.effects)
    twice_named = exact(f, ["L3H2.z@END", Node("z", 3, 2, "END")])
    assert len(twice_named.nodes) == twice_named.effects.shape[1] == 1
    assert frame(f, attributes="item").texts == frame(f).texts
    mary = f.task[f.task.attributes.IO == "Mary"]
    assert 0 < len(mary) < 96 and set(mary.attributes.IO) == {"Mary"}


def test_an_answer_that_continues_the_last_word_is_warned_of(fixtures):
    with pytest.warns(UserWarning, match="row 0: answer 'three' continues the last word of prompt 'Today after one"):
        rows(fixtures, row(answer="three", distractor="one"))
