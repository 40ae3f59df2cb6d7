"""Edits by name, one prompt, one value and one latent at a time, and by hooks; and those whose outcome is known."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import PlainUnits, kept_share, patched, plain_readable, run_cost
from torch.testing import assert_close

from sage_nb.core.activations import count_passes
from sage_nb.measures.named import NAMED_KS, named_steps, run_named
from sage_nb.measures.units import name_units
from sage_nb.report.trials import coordinates, planted
from sage_nb.truth.dictionaries import Dictionaries
from sage_nb.truth.runs import editable, set_up

SECTIONS = ("IO:v@IO", "IO:z@END", "S:k@S1")
FEW = 12  # held-out prompts


@pytest.fixture(scope="module")
def topk(sae_sets): return sae_sets["tiny-gpt2-res-topk"]


@pytest.fixture(scope="module")
def train(task): return task.train.attributes


@pytest.fixture(scope="module")
def benches(model, task, sections, truth):
    known = {name: next(s for s in sections if s.name == name) for name in SECTIONS}
    part = task[~task.held_out | (task.held_out.cumsum(0) <= FEW)]
    return {name: set_up(model, part, section, truth) for name, section in known.items()}


@pytest.fixture(scope="module")
def readings(benches, task, topk): return {name: name_units(bench, task, topk) for name, bench in benches.items()}


@pytest.fixture(scope="module")
def plain(benches, task, topk):
    return {name: {node: PlainUnits(bench, task, topk, node) for node in bench.section.nodes}
            for name, bench in benches.items()}


def plain_steps(bench, slow, i):
    "The activations of held-out prompt i at every node, for each number of exchanges."
    edited = []
    for j in NAMED_KS:
        edited.append({})
        for node, some in slow.items():
            labels = [value for value, in bench.truth[node][bench.section.attribute].values]
            change = some.exchange(i, labels.index(bench.counterfactual.values[i]), j)
            edited[-1][node] = bench.acts[node][i] + torch.as_tensor(change).float()
    return edited


@pytest.mark.parametrize("name", SECTIONS)
def test_the_exchange_equals_plain_loops(benches, readings, plain, train, name):
    bench = benches[name]
    steps, moved = named_steps(bench, readings[name], train), 0.0
    assert len(bench.task) == FEW and editable(bench).all()
    for i in range(FEW):
        expected = plain_steps(bench, plain[name], i)
        for ours, slow in zip(steps, expected, strict=True):
            for node, x in slow.items(): assert_close(ours[node][i], x, rtol=1e-4, atol=1e-4)
        moved += sum((b[node] - a[node]).norm().item() for a, b in zip(expected, expected[1:]) for node in a)
    assert moved > 1, "later exchanges add something"


@pytest.mark.parametrize("name", SECTIONS)
def test_edits_by_name_equal_edits_made_one_prompt_at_a_time(benches, readings, plain, train, name):
    bench = benches[name]
    model, task, cf = bench.model, bench.task, bench.counterfactual
    edits, others = run_named(bench, readings[name], train), plain_readable(bench)
    assert (name == "S:k@S1") == (others == ["Pos"])

    def metric(logits, i): return (logits[task.answers[i]] - logits[cf.distractors[i]]).item()
    for i in range(FEW):
        target = patched(model, task, {node: x[i] for node, x in bench.goal.items()}, i)
        clean = patched(model, task, {}, i)
        wanted = metric(target, i) - metric(clean, i)
        for j, acts in enumerate(plain_steps(bench, plain[name], i)):
            logits = patched(model, task, acts, i)
            assert edits.success[i, j] == float(logits.argmax() == target.argmax())
            got = metric(logits, i) - metric(clean, i)
            assert edits.product[i, j].item() == pytest.approx(got * wanted, rel=1e-3, abs=1e-3)
            kept = kept_share(bench, acts, i, others)
            assert edits.isolation[i, j] == (1 if np.isnan(kept) else kept)
        assert edits.floor[i] == float(clean.argmax() == target.argmax())
        assert edits.target[i].item() == pytest.approx(wanted**2, rel=1e-3, abs=1e-3)
    assert (edits.edited == 1).all()


def test_a_prompt_is_run_only_when_its_edit_has_changed(benches, readings, plain, train):
    for name, bench in benches.items():
        changed = []
        for i in range(FEW):
            before = {node: x[i] for node, x in bench.acts.items()}
            for step, acts in enumerate(plain_steps(bench, plain[name], i)):
                if any((acts[node] - before[node]).abs().max() > 1e-6 for node in acts): changed.append((step, i))
                before = acts
        steps = [[i for other, i in changed if other == step] for step in range(len(NAMED_KS))]
        with count_passes(bench.model, FEW) as passes: run_named(bench, readings[name], train)
        assert passes.forward == pytest.approx(sum(run_cost(bench, rows) for rows in steps) / FEW)


def read_rightly(some, i, old, new):
    "Whether the planted latents of two values are on where they should be: here for one, in training for the other."
    there = [(some.rankings[new][0] in here) == (value == new) for here, value in zip(some.train_on, some.train_values)]
    return some.rankings[old][0] in some.test_on[i] and all(there)


def test_the_planted_dictionarys_first_exchange_is_the_supervised_edit(benches, task, train):
    for name in ("IO:v@IO", "S:k@S1"):
        bench = benches[name]
        saes, attribute, right = planted(bench), bench.section.attribute, 0
        first, *_ = named_steps(bench, name_units(bench, task, saes), train)
        for node in bench.section.nodes:
            some, labels = PlainUnits(bench, task, saes, node), [v for v, in bench.truth[node][attribute].values]
            for i, new in enumerate(bench.counterfactual.values):
                if not read_rightly(some, i, some.test_values[i], labels.index(new)): continue
                right += 1
                assert_close(first[node][i], bench.supervised.acts[node][i], rtol=1e-4, atol=1e-4)
        assert right > FEW / 2, "the encoder finds most values"


def test_coordinates_edit_nothing_where_there_are_many_values(benches, task, train):
    "Each is on above its mean, or below; so in half of the prompts, of which few have any one value."
    bench = benches["IO:v@IO"]
    read = name_units(bench, task, coordinates(bench))
    edits = run_named(bench, read, train)
    assert edits.success.mean() < 0.2 < run_named(bench, name_units(bench, task, planted(bench)), train).success.mean()


# Prompts that cannot be edited

def without(dictionary, attribute, *labels):
    "The same dictionary without some values of an attribute."
    features = dictionary[attribute]
    keep = [i for i, label in enumerate(features.labels) if label not in labels]
    values = tuple(features.values[i] for i in keep)
    fewer = replace(features, values=values, vectors=features.vectors[keep], counts=features.counts[keep])
    return replace(dictionary, features=tuple(fewer if f is features else f for f in dictionary.features))


def test_prompts_that_cannot_be_edited_hold_zeros_and_the_others_what_they_held(benches, task, topk, train):
    whole = benches["IO:v@IO"]
    gone = [value for value in set(whole.counterfactual.values) if value not in set(whole.task.attributes.IO)][:2]
    nodes = {node: without(whole.truth[node], "IO", *gone) for node in whole.section.nodes}
    bench = replace(whole, truth=Dictionaries("mse", nodes, whole.truth.fit))
    rows = torch.tensor([value not in gone for value in whole.counterfactual.values])
    assert gone and 2 <= rows.sum() < FEW
    some, everything = (run_named(b, name_units(b, task, topk), train) for b in (bench, whole))
    assert torch.equal(some.edited[:, 0].bool(), rows)
    for here, there in zip(some, everything):
        assert not here[~rows].any()
        assert_close(here[rows], there[rows], rtol=1e-4, atol=1e-4)
