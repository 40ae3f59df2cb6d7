"""Prompts, counterfactuals and what the embedded models have seen, against tables written by hand."""
import random
import re
import warnings
from copy import deepcopy
from dataclasses import replace
from string import Formatter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sage_nb.core.activations import Prompts, run
from sage_nb.core import models
from sage_nb.core.models import embedded_models, load_model, model_hash, tokenizer_hash
from sage_nb.tasks.builtin import FACTS, LISTS, NAMES, RECIPES
from sage_nb.tasks.templates import Picker, recipe_from_templates
from sage_nb.tasks.task import load_task
from sage_nb.lab.zoo import sentences
from tokenizer_kinds import characters

# task -> attribute -> (slots of the template that express it, whether its edit changes the answer), given the variables
EDITS = {
    "ioi": {"IO": (lambda v: "A" if v["Pos"] == "ABB" else "B", lambda v: True),
            "S": (lambda v: "B S2" if v["Pos"] == "ABB" else "A S2", lambda v: False),
            "Pos": (lambda v: "A B", lambda v: False)},
    "order": {"ordinal": (lambda v: "ORD", lambda v: True), "first": (lambda v: "A", lambda v: v["ordinal"] == "first"),
              "second": (lambda v: "B", lambda v: v["ordinal"] == "second")},
    "pronoun": {"gender": (lambda v: "A B S", lambda v: True), "which": (lambda v: "A B", lambda v: False)},
    "agreement": {"number": (lambda v: "N", lambda v: True), "attractor": (lambda v: "M", lambda v: False)},
    "capitals": {"country": (lambda v: "C", lambda v: True), "relation": (lambda v: "REL", lambda v: True)},
    "successor": {"item": (lambda v: "W X", lambda v: True), "kind": (lambda v: "W X", lambda v: True)},
    "induction": {  # the last three words belong to the cycle of each distance
        "token": (lambda v: " ".join(f"x{i}" for i in range(13) if (13 - i) % v["distance"] == 0), lambda v: True),
        "distance": (lambda v: " ".join(f"x{i}" for i in range(10)), lambda v: False)},
    "greater_than": {"year": (lambda v: "YY", lambda v: False), "century": (lambda v: "C C2", lambda v: False)},
}
NEUTRAL = {"ioi": "place object", "order": "place", "pronoun": "place", "agreement": "N", "capitals": "time",
           "successor": "time", "induction": "time", "greater_than": "event"}
# task -> role -> the word that must stand there, from the prompt's attributes and words by slot
ROLES = {
    "ioi": {"IO": lambda a, w: a["IO"], "S1": lambda a, w: a["S"], "S2": lambda a, w: a["S"],
            "S1+1": lambda a, w: w["B+1" if a["Pos"] == "ABB" else "A+1"]},
    "order": {"A": lambda a, w: a["first"], "B": lambda a, w: a["second"], "ORD": lambda a, w: a["ordinal"]},
    "pronoun": {"A": lambda a, w: w["A"], "B": lambda a, w: w["B"],
                "S": lambda a, w: w["A" if a["which"] == "first" else "B"]},
    "agreement": {"N": lambda a, w: w["N"], "N+1": lambda a, w: w["N+1"]},
    "capitals": {"C": lambda a, w: a["country"], "REL": lambda a, w: a["relation"]},
    "successor": {"W": lambda a, w: w["W"], "X": lambda a, w: w["X"]},
    "induction": {"PREV": lambda a, w: w["x12"], "NEXT": lambda a, w: a["token"]},
    "greater_than": {"C": lambda a, w: a["century"], "YY": lambda a, w: a["year"]},
}
# task -> the answer, given attributes and template; in greater_than, it is drawn
ANSWERS = {
    "ioi": lambda a, t: a["IO"], "order": lambda a, t: a[a["ordinal"]], "induction": lambda a, t: a["token"],
    "pronoun": lambda a, t: {"female": "she", "male": "he"}[a["gender"]],
    "agreement": lambda a, t: RECIPES["agreement"].templates[t].split("|")[1 + (a["number"] == "plural")],
    "capitals": lambda a, t: next(fact for fact in FACTS if fact[0] == a["country"])[1 + (a["relation"] == "language")],
    "successor": lambda a, t: next(kind for kind in LISTS if kind[0] == a["kind"])[int(a["item"]) + 1],
}
each_task = pytest.mark.parametrize("name", RECIPES)


def shape(name, template):
    "The template as a regular expression, a group per slot."
    template = template.split("|")[0] + (" " + " ".join("{x%d}" % i for i in range(13)) if name == "induction" else "")
    word = {"C": r"\d\d", "C2": r"\d\d", "YY": r"\d\d"} if name == "greater_than" else {}
    return "".join(re.escape(literal) + (f"(?P<{slot}>{word.get(slot, '[A-Za-z]+')})" if slot else "")
                   for literal, slot, _, _ in Formatter().parse(template))


def words(name, template, text):
    "Which word fills each slot, and as `slot+1` which comes next."
    found = re.fullmatch(shape(name, template), text)
    assert found, f"{text!r} is not of the template {template!r}"
    following = {f"{slot}+1": re.findall(r"[A-Za-z]+", text[found.end(slot):]) for slot in found.groupdict()}
    return found.groupdict() | {slot: rest[0] for slot, rest in following.items() if rest}


def changed(name, template, one, two):
    a, b = words(name, template, one), words(name, template, two)
    return {slot for slot in a if "+" not in slot and a[slot] != b[slot]}


# Counterfactuals

def test_the_tables_cover_every_task():
    assert {name: set(EDITS[name]) for name in EDITS} == {name: set(r.attributes) for name, r in RECIPES.items()}
    assert set(NEUTRAL) == set(ROLES) == set(RECIPES)


@each_task
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_counterfactual_changes_only_the_slots_that_express_its_attribute(name, seed, data):
    recipe = RECIPES[name]
    template = data.draw(st.integers(0, len(recipe.templates) - 1))
    pick = Picker(random.Random(seed), template, data.draw(st.sampled_from(["all", "seen", "unseen"])))
    v = recipe.sample(pick, recipe.lexicon)
    prompt = recipe.render(recipe.templates[template], v)
    for attribute, (slots, answer_changes) in EDITS[name].items():
        v2 = recipe.edits[attribute](v, Picker(random.Random(seed), template), recipe.lexicon)
        cf = recipe.render(recipe.templates[template], v2)
        differ = changed(name, recipe.templates[template], prompt.text, cf.text)
        assert v2[attribute] != v[attribute]
        assert differ and differ <= set(slots(v).split()), f"{attribute}: {prompt.text!r} -> {cf.text!r}"
        if attribute != "distance": assert differ == set(slots(v).split())
        assert (cf.answer != prompt.answer) == answer_changes(v), f"{attribute}: {prompt} -> {cf}"
    v3 = recipe.neutral(v, Picker(random.Random(seed), template), recipe.lexicon)
    cf = recipe.render(recipe.templates[template], v3)
    assert changed(name, recipe.templates[template], prompt.text, cf.text) == set(NEUTRAL[name].split())
    assert (cf.answer, cf.distractor) == (prompt.answer, prompt.distractor)
    assert prompt.answer != prompt.distractor


@pytest.mark.parametrize("name", ANSWERS)
def test_a_task_compares_with_the_counterfactuals_answer_where_that_differs(model, name):
    task = load_task(name, model, n=60)

    def word(ids, i): return model.tokenizer.decode(ids[i]).strip()
    for i, t in enumerate(task.template.tolist()):
        v = dict(task.attributes.iloc[i])
        answer = ANSWERS[name](v, t)
        assert word(task.answers, i) == answer and word(task.distractors, i) != answer, task.texts[i]
        for attribute, cf in task.counterfactuals.items():
            other = ANSWERS[name](v | {attribute: cf.values[i]}, t)
            assert word(cf.answers, i) == other
            expected = other if other != answer else word(task.distractors, i)
            assert word(cf.distractors, i) == expected, f"{attribute} to {cf.values[i]} in {task.texts[i]!r}"


@each_task
def test_counterfactuals_are_as_long_as_their_prompts_and_differ_from_them(model, name):
    task = load_task(name, model, n=60)
    for attribute, cf in task.counterfactuals.items():
        assert torch.equal(cf.prompts.index("END"), task.prompts.index("END"))
        assert (cf.prompts.tokens != task.prompts.tokens).any(1).all()
        assert all(new != old for new, old in zip(cf.values, task.attributes[attribute]))


# Tokens and roles

def roles_are_right(task, tokenizer):
    recipe = RECIPES[task.name]
    assert set(ROLES[task.name]) | {"END"} == set(task.prompts.positions)
    for i, text in enumerate(task.texts):
        tokens, attributes = task.prompts.tokens[i].tolist(), task.attributes.iloc[i]
        found = words(task.name, recipe.templates[task.template[i]], text)
        for role, word in ROLES[task.name].items():
            expected, got = word(attributes, found), tokenizer.decode(tokens[task.prompts.index(role)[i]])
            assert got.strip() == expected, f"{role} is {got!r} in {text!r}, not {expected!r}"
        end = task.prompts.index("END")[i]
        assert tokenizer.decode(tokens[1 : end + 1]).strip() == text, "the tokens up to END are the prompt"
        answer = tokenizer.decode(task.answers[i])
        whole, alone = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text + answer, answer))
        follows = whole == [*tokens[1 : end + 1], task.answers[i].item()]
        assert follows or alone == [task.answers[i].item()], \
            "the answer is one token, as it follows or, where a number would merge, on its own"


@each_task
def test_roles_decode_to_the_right_words(model, name): roles_are_right(load_task(name, model, n=60), model.tokenizer)


@each_task
def test_roles_decode_to_the_right_words_with_the_gpt2_tokenizer(gpt2_tokenizer, name):
    like_gpt2 = SimpleNamespace(tokenizer=gpt2_tokenizer, cfg=SimpleNamespace(default_prepend_bos=True))
    task = load_task(name, like_gpt2, n=200)
    assert (task.prompts.tokens[:, 0] == gpt2_tokenizer.bos_token_id).all()
    assert len(task) >= 100
    for left in task.notes["usable words"].values(): assert int(left.split()[0]) >= RECIPES[name].least
    roles_are_right(task, gpt2_tokenizer)


# What the embedded models have not seen

def kept_back(template): return {name for i, name in enumerate(NAMES) if i % 5 == template % 5}


@pytest.fixture(scope="module")
def corpus():
    text = sentences(seed=0)  # that of the embedded models
    return [next(text) for _ in range(20_000)]


@pytest.mark.parametrize("name,slots", [("ioi", "A B S2"), ("order", "A B")])
def test_training_text_holds_every_seen_pair_and_no_unseen_pair(corpus, name, slots):
    for t, template in enumerate(RECIPES[name].templates):
        sentence = re.compile(shape(name, template) + r" (?P<answer>[A-Za-z]+)\.")
        found = [m for s in corpus if (m := sentence.fullmatch(s))]
        assert len(found) > 200, f"template {template!r} was not recognised in the training text"
        met = {m[slot] for m in found for slot in [*slots.split(), "answer"]}
        assert met == set(NAMES) - kept_back(t), f"template {template!r}"


@pytest.mark.parametrize("name", ["ioi", "order"])
def test_unseen_prompts_use_only_names_that_were_kept_back_from_their_template(model, name):
    task = load_task(name, model, n=200, pool="unseen")
    for text, t in zip(task.texts, task.template.tolist()):
        filled = words(name, RECIPES[name].templates[t], text)
        assert {filled["A"], filled["B"]} <= kept_back(t)


@pytest.fixture(scope="module", params=embedded_models())
def zoo_model(request): return load_model(request.param)


@pytest.mark.parametrize("name,least", [(name, 0.95 if name == "ioi" else 0.9) for name in RECIPES])
def test_each_embedded_model_does_its_tasks_on_unseen_pairs(zoo_model, name, least):
    model, task = zoo_model, load_task(name, zoo_model, n=300, seed=1, pool="unseen")
    assert (run(model, task.prompts, task.metric()) > 0).float().mean() >= least


# Rows, splits and wrong requests

def test_rows_of_a_task_stay_together(model):
    task = load_task("ioi", model, n=50)
    part = task[torch.tensor([3, 30, 7])]
    for i, j in enumerate([3, 30, 7]):
        assert part.texts[i] == task.texts[j] and dict(part.attributes.iloc[i]) == dict(task.attributes.iloc[j])
        assert torch.equal(part.prompts.tokens[i], task.prompts.tokens[j]) and part.answers[i] == task.answers[j]
        assert part.counterfactuals["S"].values[i] == task.counterfactuals["S"].values[j]
        assert torch.equal(part.counterfactuals["S"].prompts.tokens[i], task.counterfactuals["S"].prompts.tokens[j])
        assert torch.equal(part.neutral.prompts.tokens[i], task.neutral.prompts.tokens[j])


@each_task
def test_training_and_held_out_prompts_share_no_template(model, name):
    task = load_task(name, model, n=60)
    assert len(task.train) + len(task.test) == len(task) and min(len(task.train), len(task.test)) > 0
    assert not set(task.train.template.tolist()) & set(task.test.template.tolist())


@each_task
def test_prompts_differ_and_held_out_values_were_all_trained_on(model, name):
    task = load_task(name, model, n=90)
    assert len(set(task.texts)) == len(task)
    for attribute in task.attributes:
        assert set(task.test.attributes[attribute]) <= set(task.train.attributes[attribute])


# Distinct texts

EVERY_TEXT = {  # task -> how many texts there are with all its words; the products of what a text is made of
    "capitals": 16 * 2 * 5 * 6,  # countries, relations, words for the time, templates
    "successor": 5 * 4 * 5 * 5,  # items, lists, words for the time, templates
}


@pytest.mark.parametrize("name", EVERY_TEXT)
def test_a_task_has_as_many_texts_as_were_asked_for_or_all_there_are(model, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = load_task(name, model, n=384)
    assert len(enough) == len(set(enough.texts)) == 384
    said = f"task '{name}' has only {EVERY_TEXT[name]} distinct prompts here; 1024 were asked for"
    with pytest.warns(UserWarning, match=said): task = load_task(name, model, n=1024)
    assert len(task) == len(set(task.texts)) == EVERY_TEXT[name] == task.notes["n"]
    assert not set(task.train.texts) & set(task.test.texts)
    sides = {"all": len(task), "training": len(task.train), "held out": len(task.test)}
    assert task.summary().attrs["distinct prompts"] == task.distinct == sides
    assert task.summary().columns.name == f"{len(task.train)} + {len(task.test)} distinct"


@pytest.mark.parametrize("name", ["capitals", "successor"])
def test_where_the_split_is_by_prompts_no_text_is_on_both_sides(model, name):
    with pytest.warns(UserWarning, match="distinct prompts here"): task = load_task(name, model, n=384, pool="unseen")
    assert len(set(task.texts)) == len(task) and not set(task.train.texts) & set(task.test.texts)


def test_prompts_that_differ_only_in_a_distractor_drawn_by_lot_are_one(model):
    colours = {"dog": " red", "cat": " blue", "bird": " green", "fish": " black", "horse": " white"}
    templates = ["Today the {x} is", "Here the {x} is", "Now the {x} is"]
    recipe = recipe_from_templates("animals", templates, {"x": list(colours)}, lambda v: colours[v["x"]])
    with pytest.warns(UserWarning, match="only 15 distinct prompts here; 60 were asked for"):
        task = load_task(recipe, model, n=60)
    assert sorted(task.texts) == sorted(template.format(x=x) for template in templates for x in colours)


def test_an_exhausted_recipe_is_given_up_after_few_draws(model):
    "The draws do not grow with the number of prompts asked for, and counterfactuals are made of new texts only."
    draws, edits, recipe = [], [], RECIPES["successor"]
    def sample(pick, lexicon):
        draws.append(1)
        return recipe.sample(pick, lexicon)

    def counting(edit): return lambda *args: edits.append(1) or edit(*args)
    counted = replace(recipe, sample=sample, edits={a: counting(edit) for a, edit in recipe.edits.items()})
    with pytest.warns(UserWarning): task = load_task(counted, model, n=100_000)
    assert len(task) == 500 and len(edits) == 2 * 500
    assert len(draws) < 500 * 30


def test_changes_of_the_answer_are_counted_where_the_answer_has_two_values(model):
    for name, expected in (("agreement", [1, 0]), ("pronoun", [1, 0]), ("ioi", [1, 0, 0])):
        assert list(load_task(name, model, n=60).summary()["changes answer"]) == expected


# Which task, which tokenizer, which model

def test_a_digest_sees_all_that_is_computed_with_and_nothing_else(model):
    task = load_task("agreement", model, n=24)
    cf, prompts = task.counterfactual("number"), task.prompts

    def with_cf(**changes):
        return replace(task, counterfactuals=task.counterfactuals | {"number": replace(cf, **changes)})
    tokens, moved = prompts.tokens.clone(), {"N": prompts.index("N") - 1}
    tokens[3, 2] += 1
    attributes = task.attributes.assign(number=task.attributes.number.str.upper())
    others = [
        replace(task, prompts=Prompts(tokens, prompts.positions)),
        replace(task, prompts=Prompts(prompts.tokens, prompts.positions | moved)),
        replace(task, answers=task.distractors), replace(task, distractors=task.answers),
        replace(task, held_out=~task.held_out), replace(task, attributes=attributes),
        replace(task, neutral=None), replace(task, neutral=replace(task.neutral, prompts=prompts)),
        replace(task, tokenizer="0123456789abcdef"), task[1:],
        with_cf(prompts=prompts), with_cf(values=cf.values[::-1]), with_cf(answers=cf.distractors + 1),
        with_cf(distractors=cf.distractors + 1),
    ]
    digests = [task.digest, *(other.digest for other in others)]
    assert len(set(digests)) == len(digests) and all(len(d) == 16 and int(d, 16) >= 0 for d in digests)
    same = [load_task("agreement", model, n=24), replace(task, name="x", notes={}, texts=task.texts[::-1]), task[:]]
    padded = torch.nn.functional.pad(prompts.tokens, (0, 2))
    same.append(replace(task, prompts=Prompts(padded, prompts.positions)))
    assert {other.digest for other in same} == {task.digest}


def test_a_task_of_another_tokenizer_is_refused_and_one_of_an_unknown_is_not(model, gpt2_tokenizer):
    like_gpt2 = SimpleNamespace(tokenizer=gpt2_tokenizer, cfg=SimpleNamespace(default_prepend_bos=True), hook_dict={})
    task, other = load_task("ioi", model, n=24), load_task("ioi", like_gpt2, n=24)
    task.require(model)
    other.require(like_gpt2)
    for wrong, given in ((other, model), (task, like_gpt2)):
        with pytest.raises(ValueError, match="made for another tokenizer, or another use of <bos>.*make it anew"):
            wrong.require(given)
    with pytest.raises(ValueError, match="'ioi' has token .* knows 413"): replace(other, tokenizer="").require(model)
    replace(task, tokenizer="").require(model)


class Plain:
    "A tokenizer that is no more than words, numbers and a way to cut."
    def __init__(self, tokenizer): self.of = tokenizer
    bos_token_id = 1
    def __len__(self): return len(self.of)
    def get_vocab(self): return self.of.get_vocab()
    def encode(self, text, add_special_tokens): return self.of.encode(text, add_special_tokens=add_special_tokens)


def test_a_tokenizer_is_known_by_its_words_and_not_by_its_class_or_state(model):
    def hashed(tokenizer, bos=True):
        return tokenizer_hash(SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(default_prepend_bos=bos)))
    used, larger = deepcopy(model.tokenizer), deepcopy(model.tokenizer)
    used.pad_token, used.padding_side = "<eos>", "left"
    used(["a", "a b c"], padding="max_length", truncation=True, max_length=4)
    assert hashed(used) == hashed(Plain(model.tokenizer)) == hashed(model.tokenizer) == tokenizer_hash(model)
    assert hashed(larger) == hashed(model.tokenizer)
    larger.add_tokens(["Timbuktu"])  # also after it was hashed once
    others = [hashed(larger), hashed(model.tokenizer, bos=False), hashed(None)]
    assert len({hashed(model.tokenizer), *others}) == 4 and others[-1] == ""


def test_a_models_hash_is_taken_again_when_and_only_when_a_weight_changed(monkeypatch):
    model, taken, real = load_model("tiny-gpt2"), [], models._sha256
    def counted(m):
        taken.append(real(m))
        return taken[-1]
    monkeypatch.setattr(models, "_sha256", counted)
    first = model_hash(model)
    assert model_hash(model) == first and len(taken) == 1
    name, weight = max(model.named_parameters(), key=lambda pair: pair[1].numel())
    def in_place(): weight[0, 0] += 1
    def past_the_counter(): weight.data[1, 2] *= 2
    def rows_exchanged(): weight.data[[0, 1]] = weight.data[[1, 0]].clone()
    def replaced(): weight.data = weight.data + 1
    hashes = [first]
    for change in (in_place, past_the_counter, rows_exchanged, replaced):
        with torch.no_grad(): change()
        hashes.append(model_hash(model))
        assert hashes[-1] == real(model) and model_hash(model) == hashes[-1]
    assert len(set(hashes)) == len(hashes) == len(taken), f"a change of {name} was not seen"


def test_a_seed_fixes_a_task_and_another_changes_it(model):
    a, b, c = (load_task("ioi", model, n=30, seed=s) for s in (5, 5, 6))
    assert a.texts == b.texts and a.neutral.prompts.tokens.equal(b.neutral.prompts.tokens) and a.texts != c.texts


def some(model): return load_task("ioi", model, n=24)


TOKENS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("request_,message", [
    (lambda m: load_task("nope", m), r"task 'nope' is not built in \(has ioi, order"),
    (lambda m: load_task("ioi", m, pool="new"), "pool 'new' is not one of all, seen, unseen"),
    (lambda m: load_task("ioi", m, n=1), "n=1 is not a whole number of at least 2"),
    (lambda m: some(m).counterfactual("place"), r"attribute 'place' is not in task 'ioi' \(has IO, S, Pos\)"),
    (lambda m: some(m).metric("place"), "attribute 'place' is not in task 'ioi'"),
    (lambda m: some(m).prompts.index("S3"), r"position 'S3' is not named here \(has IO, S1, S1\+1, S2, END\)"),
    (lambda m: load_task("ioi", SimpleNamespace(tokenizer=characters(), cfg=m.cfg), n=2),
     r"needs 6 names that are one token; this tokenizer leaves 0 of 32 \(refused: 2 of 3 tokens, 11 of 4 tokens"),
    (lambda m: Prompts(TOKENS, {"IO": TOKENS[:, 0]}), r"prompts need the position 'END' \(have IO\)"),
    (lambda m: Prompts(TOKENS, {"END": torch.tensor([0, 3])}), r"'END' needs one index .* each in \[0, 3\)"),
    (lambda m: Prompts(TOKENS, {"END": torch.tensor([0])}), "'END' needs one index per prompt"),
])
def test_wrong_requests_say_what_is_wrong(model, request_, message):
    with pytest.raises(ValueError, match=message): request_(model)
