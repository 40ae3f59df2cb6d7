"""The eight tasks, and own ones, for tokenizers of each kind: the words that are left, roles, and what is refused."""
import json
import re
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sage_nb.core.activations import run
from sage_nb.core.models import load_model
from sage_nb.discovery.attribution import exact_patching
from sage_nb.tasks.builtin import RECIPES
from sage_nb.tasks.items import usable_words
from sage_nb.tasks.task import load_task, task_from_rows
from sage_nb.tasks.templates import recipe_from_templates
from sage_nb.tasks.tokens import TokenReader, WordRules, parts
from test_own_tasks import number_rows
from tokenizer_kinds import BOS, KINDS, RARE, model_of, save_model

WORDLIKE = [kind for kind in KINDS if kind not in ("superwords", "characters")]
WITH_YEARS = {"gpt2", "unigram"}  # two digits are a token, as they follow two others
DIGITS = {"qwen", "llama2", "metaspace", "without_prefix", "gemma"}  # every digit is a token
LOWER = {"wordpiece"}
N = 24


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    "A model of each kind, made when it is asked for."
    made = {}

    def of(kind):
        if kind not in made: made[kind] = model_of(kind, tmp_path_factory.mktemp(kind))
        return made[kind]
    return of


@pytest.fixture(scope="module")
def tasks(kinds):
    "Each built-in task of each kind, made once; a text where it is refused."
    made = {}

    def of(kind, name, **rules):
        key = kind, name, str(rules)
        if key not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try: made[key] = load_task(name, kinds(kind), n=N, **rules)
                except ValueError as error: made[key] = str(error)
        return made[key]
    return of


# Words left

LEFT = {  # list -> words of it that are one token, for every kind that has words; the others have a word of RARE
    "names": (24, 32), "female": (12, 16), "male": (12, 16), "places": (8, 12), "objects": (11, 12), "nouns": (11, 12),
    "facts": (14, 16), "kinds": (3, 4), "things": (23, 24), "years": (15, 15), "centuries": (8, 8), "events": (7, 8),
}


def test_the_table_says_how_many_words_are_not_rare():
    for recipe in RECIPES.values():
        for kind, entries in recipe.lexicon.items():
            common = [e for e in entries if not RARE & ({e} if isinstance(e, str) else set(e))]
            assert LEFT[kind] == (len(common), len(entries)), kind


@pytest.mark.parametrize("kind", WORDLIKE)
def test_each_task_keeps_the_words_that_are_one_token_in_context(tasks, kind):
    for name in RECIPES:
        task = tasks(kind, name)
        if name == "greater_than" and kind not in WITH_YEARS:
            assert "task 'greater_than' needs 5 centuries that are one token; this tokenizer leaves 0 of 8" in task
            continue
        assert len(task) == N and len(task.train) and len(task.test)
        left = {words: "%d of %d" % LEFT[words] for words in RECIPES[name].lexicon}
        if name == "greater_than":  # some years are merged with some centuries
            assert int(task.notes["usable words"]["years"].split()[0]) >= 10
            left["years"] = task.notes["usable words"]["years"]
        assert task.notes["usable words"] == left
        assert all(lengths == [1] for lengths in task.notes["tokens of words"].values())


def test_words_are_the_same_with_and_without_a_space_put_before_every_text(kinds):
    "What refused every task: asked about ` Mary` alone, a tokenizer that prepends says two tokens."
    for kind in ("llama2", "metaspace", "unigram"):
        tokenizer = kinds(kind).tokenizer
        assert len(tokenizer.encode(" Mary and", add_special_tokens=False)) in (2, 3)
        assert len(parts(TokenReader(tokenizer), "Mary")[0]) == 1
    assert len(kinds("llama2").tokenizer.encode(" Mary", add_special_tokens=False)) == 2


REFUSED = {  # (kind, task) -> why; where nothing is allowed
    ("characters", "ioi"): "leaves 0 of 32 (refused: 2 of 3 tokens, 11 of 4 tokens, 15 of 5 tokens, 3 of 6 tokens",
    ("characters", "greater_than"): "leaves 0 of 8 (11+14 has a part of 2 tokens); allow more with word_tokens",
    ("llama3", "greater_than"): "(the word '11' is not cut from its neighbours in 'the 1114': its tokens are '111'; ",
}


@pytest.mark.parametrize("kind,name", REFUSED)
def test_a_tokenizer_that_leaves_too_few_words_is_told_how_many_of_which_lengths(tasks, kind, name):
    assert REFUSED[kind, name] in tasks(kind, name)


def test_merged_words_are_refused_with_what_they_are_merged_with(tasks):
    said = tasks("superwords", "ioi", word_tokens=None, answers="first")
    assert re.search(r"refused 1000 drawn texts, such as: position 'IO': the word '\w+' is not cut from its neighbours "
                     r"in 'When .*: its tokens are '\w+ and '; name all of that", said)


# Roles

def stands_at(tokenizer, ids, index, word, lower):
    "Whether the tokens up to `index` end with the word."
    text = tokenizer.decode(ids[: index + 1])
    return text.endswith(word.lower() if lower else word)


ROLE_WORDS = {"ioi": {"IO": "IO", "S2": "S"}, "order": {"A": "first", "B": "second", "ORD": "ordinal"},
              "capitals": {"C": "country", "REL": "relation"}, "induction": {"NEXT": "token"},
              "greater_than": {"C": "century", "YY": "year"}}


def check_roles(task, model, kind, first=False):
    tokenizer, bos = model.tokenizer, int(kind in BOS)
    for i, text in enumerate(task.texts):
        ids = task.prompts.tokens[i].tolist()
        for role, attribute in ROLE_WORDS[task.name].items():
            word, index = task.attributes[attribute][i], int(task.prompts.index(role)[i])
            if not first: assert stands_at(tokenizer, ids[bos:], index - bos, word, kind in LOWER), (role, text)
            else:
                before = tokenizer.decode(ids[bos:index]).rstrip()
                assert text.lower().startswith((before + " " + word).lower().strip()), (role, text)
        end = int(task.prompts.index("END")[i])
        whole = tokenizer.encode(text, add_special_tokens=False)
        assert ids[bos : end + 1] == whole and (not bos or ids[0] == tokenizer.bos_token_id)
        assert tokenizer.bos_token_id not in ids[bos : end + 1]


@pytest.mark.parametrize("kind", WORDLIKE)
def test_roles_stand_at_their_words(kinds, tasks, kind):
    for name in ROLE_WORDS:
        if isinstance(tasks(kind, name), str): continue
        check_roles(tasks(kind, name), kinds(kind), kind)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma", "unigram", "wordpiece"])
@pytest.mark.parametrize("position", ["last", "first"])
def test_roles_stand_at_the_last_or_first_token_of_longer_words(kinds, tasks, kind, position):
    task = tasks(kind, "order", word_tokens=None, word_position=position, answers="first")
    assert len(task.notes["tokens of words"]["A"]) > 1
    check_roles(task, kinds(kind), kind, first=position == "first")
    said = task.summary()
    assert f"roles at the {position} of up to" in said.columns.name and "by their first token" in said.columns.name
    assert said.attrs["words"]["word_position"] == task.notes["word_position"] == position


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "wordpiece"])
def test_behind_a_word_is_behind_its_last_token_wherever_its_role_stands(tasks, kind):
    first, last = (tasks(kind, "ioi", word_tokens=None, word_position=p, answers="first") for p in ("first", "last"))
    assert first.texts == last.texts and first.digest != last.digest
    behind = last.prompts.index("S1+1")
    assert torch.equal(first.prompts.index("S1+1"), behind) and torch.equal(behind, last.prompts.index("S1") + 1)
    length = behind - first.prompts.index("S1")
    assert set(length.tolist()) <= set(last.notes["tokens of words"]["S1"]) and length.max() > 1
    assert (first.prompts.index("S1") < last.prompts.index("S1")).any()


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "unigram", "wordpiece"])
def test_counterfactuals_keep_the_length_and_the_role_of_each_prompt(kinds, tasks, kind):
    for name in ("ioi", "pronoun", "capitals"):
        task = tasks(kind, name, word_tokens=None, answers="first")
        for cf in [*task.counterfactuals.values(), task.neutral]:
            assert torch.equal(cf.prompts.index("END"), task.prompts.index("END"))
            assert (cf.prompts.tokens != task.prompts.tokens).any(1).all()
        assert (task.answers != task.distractors).all()
    reader = TokenReader(kinds(kind).tokenizer)

    def length(word): return len(parts(reader, word)[0])
    ioi = tasks(kind, "ioi", word_tokens=None, answers="first")
    pairs = list(zip(ioi.attributes.IO, ioi.counterfactual("IO").values))
    assert all(length(old) == length(new) for old, new in pairs) and len({length(old) for old, _ in pairs}) > 1


def test_every_value_of_the_right_length_is_drawn_about_equally_often(kinds):
    "An edit is drawn again until it fits; that must not favour a value."
    people = ["Mary", "John", "Anna", "Tom", "Karen", "Henry", "Susan"]
    templates = [f"{{time}} {verb} {{x}} and" for verb in ("we saw", "they saw", "people saw")]
    words = {"x": people, "time": ["Today", "Now", "Here", "Then", "Once"]}
    names = recipe_from_templates("names", templates, words, lambda v: f" {v['x']}", attributes=["x"])
    with pytest.warns(UserWarning, match="only .* distinct"):
        task = load_task(names, kinds("gpt2"), n=200, word_tokens=None, answers="first")
    reader = TokenReader(kinds("gpt2").tokenizer)
    lengths = {word: len(parts(reader, word)[0]) for word in people}
    counts = {}
    for old, new in zip(task.attributes.x, task.counterfactual("x").values):
        assert lengths[old] == lengths[new]
        if lengths[old] == 1: counts[new] = counts.get(new, 0) + 1
    assert set(counts) == {"Mary", "John", "Anna", "Tom"} and max(counts.values()) < 2.5 * min(counts.values())


# Answers

@pytest.mark.parametrize("kind", sorted(DIGITS))
def test_years_of_single_digits_are_a_task_when_answers_are_compared_by_their_first(kinds, tasks, kind):
    task = tasks(kind, "greater_than", word_tokens=2, answers="first")
    assert task.notes["tokens of words"] == {"C": [2], "YY": [2]}
    check_roles(task, kinds(kind), kind)
    digits = [kinds(kind).tokenizer.decode([i]).strip() for i in (*task.answers, *task.distractors)]
    assert all(re.fullmatch(r"\d", digit) for digit in digits), digits
    said = tasks(kind, "greater_than", word_tokens=2)
    assert "is not one known token for this tokenizer" in said and "or take answers='first'" in said


@pytest.mark.parametrize("kind", WORDLIKE)
def test_answers_are_the_tokens_that_follow_the_prompt(kinds, tasks, kind):
    tokenizer = kinds(kind).tokenizer
    for name, attribute in (("ioi", "IO"), ("induction", "token")):
        task = tasks(kind, name)
        for text, answer, word in zip(task.texts, task.answers.tolist(), task.attributes[attribute]):
            assert tokenizer.encode(f"{text} {word}", add_special_tokens=False)[-1] == answer


def test_first_tokens_that_agree_are_refused(kinds):
    rows, model = number_rows(), kinds("gpt2")
    rows[0]["answer"], rows[0]["distractor"] = " threefold", " threesome"
    with pytest.raises(ValueError, match="row 0: answer ' threefold' of prompt .* or take answers='first'"):
        task_from_rows(rows, model)
    with pytest.raises(ValueError, match="' threefold' and distractor ' threesome' .* begin with the same token"):
        task_from_rows(rows, model, answers="first")
    rows[0]["distractor"], rows[0]["counterfactuals"]["item"]["answer"] = " six", " threesome"
    with pytest.raises(ValueError, match="answer ' threesome' begins with the same token as the answer ' threefold'"):
        task_from_rows(rows, model, answers="first")


# <bos>, padding, chats

@pytest.mark.parametrize("kind", WORDLIKE)
def test_bos_stands_once_before_a_prompt_or_not_at_all(kinds, kind):
    model = kinds(kind)
    task = task_from_rows(number_rows(), model)
    counts = (task.prompts.tokens[:, :2] == model.tokenizer.bos_token_id).sum(1)
    assert (counts == int(kind in BOS)).all()
    assert run(model, task.prompts, task.metric()).isfinite().all()


@pytest.mark.parametrize("special", [{}, {"unk_token": "<unk>"}])
def test_a_bos_that_is_made_up_is_refused(tmp_path, special):
    "Where a tokenizer has none, TransformerLens makes one up: a token more than the model has, or the unknown one."
    words = {word: i for i, word in enumerate("<unk> Today after one two comes".split())}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    model = load_model(save_model(tmp_path, PreTrainedTokenizerFast(tokenizer_object=plain, **special)))
    model.cfg.default_prepend_bos = True
    said = "prepends <bos> (cfg.default_prepend_bos), and '<|endoftext|>' is none of the tokens that it knows; set"
    with pytest.raises(ValueError, match=re.escape(said)): load_task("ioi", model, n=N)
    model.cfg.default_prepend_bos = False
    with pytest.raises(ValueError, match="needs 6 names that are one token; this tokenizer leaves 0 of 32"):
        load_task("ioi", model, n=N)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-hooked", "gemma"])
def test_the_padding_side_of_a_tokenizer_does_not_matter(random_models, name):
    model = random_models[name]
    side = model.tokenizer.padding_side
    try:
        seen = {}
        for model.tokenizer.padding_side in ("left", "right"):
            task = load_task("ioi", model, n=N)
            assert len(set(task.prompts.index("END").tolist())) > 1, "some prompts are padded"
            seen[model.tokenizer.padding_side] = task.digest, run(model, task.prompts, task.metric())
    finally: model.tokenizer.padding_side = side
    assert seen["left"][0] == seen["right"][0]
    torch.testing.assert_close(seen["left"][1], seen["right"][1], rtol=0, atol=0)


def test_padding_is_a_token_that_the_model_knows(kinds):
    model = kinds("gpt2")
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<a pad that no model has>"})
    like = SimpleNamespace(tokenizer=tokenizer, cfg=model.cfg)
    assert load_task("ioi", like, n=N).prompts.tokens.max() < model.cfg.d_vocab


def test_no_template_of_a_chat_is_applied(kinds):
    model = kinds("llama3")
    assert model.tokenizer.chat_template
    without = SimpleNamespace(tokenizer=deepcopy(model.tokenizer), cfg=model.cfg)
    without.tokenizer.chat_template = None
    assert load_task("ioi", model, n=N).digest == load_task("ioi", without, n=N).digest


@pytest.mark.parametrize("kind,token", [
    ("gpt2", "<|endoftext|>"), ("llama3", "<|eot_id|>"), ("gemma", "<bos>"), ("wordpiece", "[SEP]"),
    ("unigram", "<unk>")])
def test_words_that_are_special_tokens_are_refused(kinds, kind, token):
    rows = number_rows()
    rows[2]["prompt"] = rows[2]["prompt"].replace("Today", token)
    said = f"row 2: prompt '{token} after three and four comes' has '{token}', a special token of this tokenizer; write"
    with pytest.raises(ValueError) as error: task_from_rows(rows, kinds(kind))
    assert said in str(error.value)
    words = {"x": ["dog", "cat", token]}
    named = recipe_from_templates("own", ["the {x} is", "a {x} is"], words, lambda v: f" {v['x']}")
    assert usable_words(named, TokenReader(kinds(kind).tokenizer))[0]["x"] == ("dog", "cat")


# Attacks

STRANGE = ["naïve", "日本", "O'Brien", "McDonald", "Ann", "Anna", "NATO", "e-mail", "İstanbul", "x"]


def parts_known(reader, text): return reader.unknown not in reader.cut(text).ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "superwords"])
def test_strange_words_are_read_whole_or_not_at_all(kinds, kind):
    "Each template has the word in another place; where it is a role, its tokens are the word's and no other's."
    model = kinds(kind)
    templates = ["{x} is the", "the {x}, then", "the {x}'s book", "we say {x}.", "in {x} we"]
    recipe = recipe_from_templates("own", templates, {"x": STRANGE}, lambda v: " red", distractor=lambda v: " blue")
    reader = TokenReader(model.tokenizer)
    words, _ = usable_words(recipe, reader, WordRules(word_tokens=None))
    known = words["x"]
    if kind not in ("unigram", "wordpiece", "characters"): assert known == tuple(STRANGE)  # bytes spell everything
    assert {"Ann", "Anna", "x"} <= set(known)
    for word in known:
        for template in templates:
            text, start = template.format(x=word), template.index("{x}")
            if "'" in template and not parts_known(reader, "'"): continue
            tokens = reader.read(text)
            found = tokens.word(start, start + len(word))
            covered = text[tokens.spans[found[0]][0] : tokens.spans[found[-1]][1]]
            assert covered.strip() == word and "".join(tokens.strings()) == text
            before, after = (set(range(len(tokens))[part]) for part in (slice(found[0]), slice(found[-1] + 1, None)))
            assert not any(start < tokens.spans[i][1] and tokens.spans[i][0] < start + len(word) and
                           tokens.spans[i][0] < tokens.spans[i][1] for i in before | after)


@pytest.mark.parametrize("kind,n", [("llama2", 2), ("metaspace", 2), ("gemma", 2), ("unigram", 1)])
def test_a_space_put_before_the_text_is_no_part_of_its_first_word(kinds, kind, n):
    "Some tokenizers say that the `▁` they put before a text is its first letter."
    tokens = TokenReader(kinds(kind).tokenizer).read("17 dogs")
    first, last = tokens.word(0, 2)[0], tokens.word(0, 2)[-1]
    assert last - first + 1 == n and tokens.strings()[first].strip() in ("1", "17")
    assert kinds(kind).tokenizer.decode([tokens.ids[first]]).strip() in ("1", "17")


def test_words_that_a_tokenizer_cannot_tell_apart_are_one(kinds):
    recipe = recipe_from_templates("own", ["in {x} we", "the {x} is"], {"x": ["May", "may", "dog", "Dog", "cat"]},
                                   lambda v: f" {v['x']}")
    readers = (TokenReader(kinds(kind).tokenizer) for kind in ("wordpiece", "gpt2"))
    lower, bytes_ = (usable_words(recipe, reader, WordRules(None)) for reader in readers)
    assert lower[0]["x"] == ("May", "dog", "cat") and lower[1]["x"].startswith("3 of 5")
    assert bytes_[0]["x"] == ("May", "may", "dog", "Dog", "cat")
    rows = number_rows()
    rows[0]["counterfactuals"]["item"] |= {"prompt": "TODAY after one and two comes"}
    with pytest.raises(ValueError, match="row 0: counterfactual .* are the same tokens for this tokenizer; give"):
        task_from_rows(rows, kinds("wordpiece"))


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "gemma", "unigram"])
def test_a_word_at_the_start_of_a_sentence_may_be_cut_otherwise(kinds, kind):
    "`Mary` without a space is several tokens for some; such prompts are not drawn, or only if that is allowed."
    names = ["Mary", "John", "Anna", "Tom", "Emma", "Lisa", "Jane", "Kate"]
    recipe = recipe_from_templates("own", ["{x} and {y} met", "Today {x} and {y} met", "There {x} saw {y} and"],
                                   {"x": names, "y": names[::-1]}, lambda v: f" {v['x']}")
    model = kinds(kind)
    alone = [len(model.tokenizer.encode(f"{name} and", add_special_tokens=False)) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = load_task(recipe, model, n=60)
        longer = load_task(recipe, model, n=60, word_tokens=None, answers="first")
    at_start = set(task.template.tolist()) & {0}
    assert bool(at_start) == any(n == 2 for n in alone), "drawn where some are one token"
    assert 0 in longer.template.tolist()
    for made in (task, longer):
        for i, text in enumerate(made.texts):
            read = made.prompts.tokens[i][int(kind in BOS) : int(made.prompts.index("x")[i]) + 1]
            assert model.tokenizer.decode(read).endswith(made.attributes.x[i]), text


@pytest.mark.parametrize("kind", WORDLIKE)
def test_rows_of_a_table_are_a_task_for_every_kind(kinds, tmp_path, kind):
    model = kinds(kind)
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps({"name": "numbers", "rows": number_rows()}))
    task = load_task(path, model)
    words = [model.tokenizer.decode([ids[i]]).strip() for ids, i in zip(task.prompts.tokens, task.prompts.index("X"))]
    assert words == list(task.attributes["item"]) and len(task) == 15
    rows = number_rows()
    rows[2]["positions"]["X"] = "fo"
    with pytest.raises(ValueError, match="row 2: position 'X': the word 'fo' is not cut from its neighbours in"):
        task_from_rows(rows, model)


def test_a_tokenizer_that_drops_what_it_does_not_know_is_found_out():
    "Without a token for it, some models drop a letter and say nothing."
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdef ")}, []))
    reader = TokenReader(PreTrainedTokenizerFast(tokenizer_object=letters))
    assert reader.read("a bad fad").strings() == list("a bad fad")
    with pytest.raises(ValueError, match="the tokenizer drops 'z' in prompt 'a baz fad'; write it otherwise"):
        reader.read("a baz fad")
    with pytest.raises(ValueError, match="the tokenizer drops 'z' at the end of prompt 'a baz'; take it off"):
        reader.read("a baz")


def test_longer_words_can_be_patched(kinds, tasks):
    "Roles of p and of p′ are both used, so a swap of words of different lengths is patched at the right tokens."
    model, task = kinds("gpt2"), tasks("gpt2", "order", word_tokens=None, answers="first")
    assert max(task.notes["tokens of words"]["A"]) > 1
    scores = exact_patching(model, task, "first", ["L0.resid_pre@A", "L1.resid_post@END"])
    cf = task.counterfactual("first")
    whole = run(model, cf.prompts, lambda logits, rows: task.metric("first")(logits, rows))
    clean = run(model, task.prompts, task.metric("first"))
    torch.testing.assert_close(scores.effects[:, 1], whole - clean, rtol=1e-4, atol=1e-5)
