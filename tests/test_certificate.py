"""Edits and certificates recomputed prompt by prompt, dictionaries that must fail, prompts that cannot be edited."""
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from sage_nb.core.activations import Node
from sage_nb.core.intervals import Estimate, interval, means
from sage_nb.discovery.sections import CrossSection
from sage_nb.measures.certificate import Criteria, certificate, certify, probe, reading_accuracy
from sage_nb.tasks.task import load_task
from sage_nb.truth.dictionaries import Dictionaries, fit_dictionaries
from sage_nb.truth.runs import Edit, Outcome, compare_edit, disturbed, edit_effect, set_up, supervised_edit


@pytest.fixture(scope="module")
def part(task):
    "All training prompts and a quarter of the held-out ones."
    return task[~task.held_out | (torch.arange(len(task)) % 4 == 0)]


@pytest.fixture(scope="module")
def keys_of_s(model, task, sections, truth):
    "A bench in which another attribute, Pos, can be read."
    return set_up(model, task, named(sections, "S:k@S1"), truth)


def named(sections, name): return next(s for s in sections if s.name == name)


def vector(dictionary, name, value):
    "What one value adds to an activation, looked up by itself."
    features = dictionary[name]
    return features.weight * features.vectors[features.values.index((value,))]


def nearest(truth, acts, name):
    "The value nearest to the activations of one prompt at several nodes, one value and one node after the other."
    away = {}
    for node, x in acts.items():
        counts = dict(zip(truth[node][name].values, truth[node][name].counts.tolist()))
        average = sum(count * vector(truth[node], name, v) for (v,), count in counts.items()) / sum(counts.values())
        for value, in counts:
            at = truth[node].mean + vector(truth[node], name, value) - average
            away[value] = away.get(value, 0) + (x - at).square().sum().item()
    return min(away, key=away.get)


def run_one(model, test, i, put):
    "The logits at END of one prompt when the nodes have these values, by hooks written out."
    def hook(node, value):
        def edit(x, hook): x[0, test.prompts.index(node.position)[i], node.head] = value
        return node.hook, edit
    hooks = [hook(node, value) for node, value in put.items()]
    return model.run_with_hooks(test.prompts.tokens[i : i + 1], fwd_hooks=hooks)[0, test.prompts.index("END")[i]]


def acts_of_one(model, prompts, i, nodes):
    "What the nodes hold on one prompt."
    cache = model.run_with_cache(prompts.tokens[i : i + 1])[1]
    return {n: cache[n.hook][0, prompts.index(n.position)[i], n.head] for n in nodes}


def plain_certificate(model, task, section, truth):
    "R², edits and off-target change from one hooked run per prompt and intervention, values looked up one by one."
    test, cf, attribute = task.test, task.test.counterfactual(section.attribute), section.attribute

    def run(i, put):
        logits = run_one(model, test, i, put)
        return (logits[test.answers[i]] - logits[cf.distractors[i]]).item(), int(logits.argmax())
    missed = spread = hit = floor = up = down = 0.0
    others = [b for b in task.attributes if b != attribute]
    changed, right = dict.fromkeys(others, 0), dict.fromkeys(others, 0)
    for i, row in enumerate(test.attributes.to_dict("records")):
        a, target_a = (acts_of_one(model, prompts, i, section.nodes) for prompts in (test.prompts, cf.prompts))
        edited = {}
        for n, x in a.items():
            edited[n] = x - vector(truth[n], attribute, row[attribute]) + vector(truth[n], attribute, cf.values[i])
            off_mean = x - truth[n].mean
            missed += (off_mean - sum(vector(truth[n], b, v) for b, v in row.items())).square().sum().item()
            spread += off_mean.square().sum().item()
        m, token = run(i, {})
        target, wanted = run(i, target_a)
        got, predicted = run(i, edited)
        hit += predicted == wanted
        floor += token == wanted
        up += (got - m) * (target - m)
        down += (target - m) ** 2
        for b in changed:
            before = nearest(truth, a, b)
            right[b] += before == row[b]
            changed[b] += before != nearest(truth, edited, b) and before == nearest(truth, target_a, b)
    n = len(test)
    measures = {"R²": 1 - missed / spread, "edit effect": up / down}
    measures |= {"edit success": hit / n, "no edit success": floor / n}
    for b, times in changed.items():
        chance = task.train.attributes[b].value_counts(normalize=True).max()
        if (right[b] / n - chance) / (1 - chance) >= 0.5: measures[f"off-target change of {b}"] = times / n
    return measures


@pytest.mark.parametrize("name", ["IO:v@IO", "S:k@S1"])
def test_a_certificate_equals_one_made_prompt_by_prompt(model, part, sections, truth, name):
    section = named(sections, name)
    measures = certify(set_up(model, part, section, truth))
    expected = plain_certificate(model, part, section, truth)
    test_1 = {"ablation cost", "sufficiency", "fraction recovered", "necessity"}
    assert set(measures) - test_1 == set(expected)
    assert {m: measures[m].value for m in expected} == pytest.approx(expected, abs=1e-4)
    assert name != "S:k@S1" or "off-target change of Pos" in expected, "it is here because Pos can be read in it"


def looked_up(features, *value):
    "The vector of a value or of a combination; 0 for a combination that there is not."
    return features.vectors[features.values.index(value)] if value in features.values else 0


def test_an_edit_with_a_product_takes_the_product_along(model):
    order, nodes = load_task("order", model, n=256), [Node("z", 3, 2, "END"), Node("z", 3, 3, "END")]
    products = [("ordinal", "first"), ("ordinal", "second")]
    truth = fit_dictionaries(model, order, nodes, products=products, unseen="additive")
    known = {"attribute": "ordinal", "site": "z", "position": "END", "nodes": tuple(nodes), "scores": (0.0, 0.0)}
    effects = {f.name: Estimate(-1.0, -1.0, -1.0, 9) for f in dataclass_fields(CrossSection) if f.name not in known}
    bench = set_up(model, order, CrossSection(**known, **effects), truth)  # the effects play no part
    edited, rows = supervised_edit(bench).acts, bench.task.attributes.to_dict("records")
    for node in nodes:
        d = truth[node]
        for i, (row, new) in enumerate(zip(rows, bench.counterfactual.values)):
            assert (new,) in d["ordinal"].values and (row["ordinal"],) in d["ordinal"].values
            change = looked_up(d["ordinal"], new) - looked_up(d["ordinal"], row["ordinal"])
            for name in ("first", "second"):
                pairs = d["ordinal", name]
                change = change + looked_up(pairs, new, row[name]) - looked_up(pairs, row["ordinal"], row[name])
            assert_close(edited[node][i], bench.acts[node][i] + change, rtol=1e-4, atol=1e-5)


def test_wrong_dictionaries_fail_their_certificate(model, part, sections, truth):
    section = named(sections, "IO:v@IO")

    def altered(change):
        nodes = {n: replace(truth[n], features=tuple(map(change, truth[n].features))) for n in section.nodes}
        return Dictionaries("wrong", nodes, truth.fit)

    def shuffled(f): return replace(f, values=f.values[1:] + f.values[:1]) if f.name == "IO" else f

    def weighing(weight): return altered(lambda f: replace(f, weight=weight))
    wrong = {"shuffled values": altered(shuffled), "nothing": weighing(0.0), "too much": weighing(3.0),
             "half": weighing(0.3)}
    assert certificate(model, part, [section], truth, probes=False).passed == ["IO:v@IO"]
    for name, dictionaries in wrong.items():
        made = certificate(model, part, [section], dictionaries, probes=False)
        assert not made.passed and "IO:v@IO" in repr(made) and "fails" in repr(made), name
        if name == "nothing": assert made.measures["IO:v@IO"]["edit effect"].value == pytest.approx(0, abs=1e-4)


def of_held_out(task, keep):
    "All training prompts, and those held-out ones that are kept."
    return task[~task.held_out | torch.zeros(len(task), dtype=torch.bool).masked_scatter(task.held_out, keep)]


def test_prompts_whose_new_value_is_unknown_are_left_out_of_edits(model, task, sections, truth):
    section = named(sections, "IO:v@IO")
    unknown = task.test.counterfactual("IO").values[0]
    keep = torch.tensor([v != unknown for v in task.test.attributes["IO"]])  # so that only edits need it
    part = of_held_out(task, keep)

    def without(d):
        features = d["IO"]
        rows = [i for i, value in enumerate(features.values) if value != (unknown,)]
        values = tuple(features.values[i] for i in rows)
        fewer = replace(features, values=values, vectors=features.vectors[rows], counts=features.counts[rows])
        return replace(d, features=tuple(fewer if f.name == "IO" else f for f in d.features))
    fewer = Dictionaries("mse", {n: without(truth[n]) for n in section.nodes}, truth.fit)
    bench = set_up(model, part, section, fewer)
    new = bench.counterfactual.values
    expected = sum(v != unknown for v in new)
    assert expected < len(new)
    assert bench.editing.counterfactual.values == [v for v in new if v != unknown]
    measures = certify(bench)
    assert measures["edit effect"].n == measures["edit success"].n == expected and measures["R²"].n == len(new)
    with pytest.raises(ValueError, match=f"value '{unknown}' of attribute 'IO' was not in the training prompts"):
        supervised_edit(bench)
    only = of_held_out(part, torch.tensor([v == unknown for v in new]))
    assert len(only.test) == len(new) - expected > 1
    nothing = certify(set_up(model, only, section, fewer))
    assert "only 0 held-out prompts can be edited" in Criteria().failures(nothing)
    assert "edit success" not in nothing and nothing["edit effect"].n == 0 and np.isnan(nothing["edit effect"].value)


def flipped_pos(bench, acts):
    "Activations after Pos, too, has been turned round."
    labels = bench.truth[bench.section.nodes[0]]["Pos"].labels
    attributes = bench.task.attributes
    flipped = attributes.Pos.map(dict(zip(labels, labels[::-1])))
    return {n: bench.truth[n].edit(x, "Pos", attributes, flipped) for n, x in acts.items()}


def test_editing_an_attribute_that_is_read_elsewhere_is_off_target(keys_of_s):
    edited = keys_of_s.supervised.acts
    both = flipped_pos(keys_of_s, edited)
    assert disturbed(keys_of_s, both)["Pos"].float().mean() > 0.8
    assert disturbed(keys_of_s, edited)["Pos"].float().mean() < 0.1
    mixing = replace(keys_of_s, goal=both)  # a model whose own counterfactual changes it is not to be corrected
    assert disturbed(mixing, both)["Pos"].sum() == 0


def test_what_is_disturbed_equals_a_plain_loop(keys_of_s, truth):
    bench = keys_of_s.at(torch.arange(24))
    flipped = flipped_pos(bench, bench.goal)
    mixing = replace(bench, goal={node: x.clone() for node, x in bench.goal.items()})
    for node, x in flipped.items(): mixing.goal[node][::2] = x[::2]  # changes the reading in every other prompt
    tried = {"no edit": bench.acts, "means": bench.means, "supervised": bench.supervised.acts, "flipped": flipped}

    def read(acts, i): return nearest(truth, {node: x[i] for node, x in acts.items()}, "Pos")

    def plain(goal, edited):
        changed = []
        for i in range(len(bench.task)):
            before = read(bench.acts, i)
            changed.append(before != read(edited, i) and before == read(goal, i))
        return changed
    times = {}
    for name, edited in tried.items():
        for whose, judge in {"own": bench, "mixing": mixing}.items():
            expected, changed = plain(judge.goal, edited), disturbed(judge, edited)
            assert list(changed) == ["Pos"] and changed["Pos"].tolist() == expected
            times[name, whose] = sum(expected)
    assert times["no edit", "own"] == 0 < times["means", "own"] < times["flipped", "own"]
    assert 0 < times["flipped", "mixing"] < times["flipped", "own"]


outcomes_of_three = st.tuples(*[st.integers(0, 3)] * 3, *[st.floats(-5, 5, width=32)] * 3)


class Judged(NamedTuple):
    edited: Edit
    floor: Edit
    target: Edit


@given(st.lists(outcomes_of_three, min_size=2, max_size=20))
def test_edit_scores_equal_a_plain_loop(rows):
    tokens, metrics = torch.tensor([r[:3] for r in rows]), torch.tensor([r[3:] for r in rows])
    clean, target, edited = (Outcome(metrics[:, i], tokens[:, i]) for i in range(3))
    m = means(Judged(*(compare_edit(outcome, clean, target) for outcome in (edited, clean, target))))
    assert m.edited.success.item() == pytest.approx(sum(r[2] == r[1] for r in rows) / len(rows))
    assert m.floor.success.item() == pytest.approx(sum(r[0] == r[1] for r in rows) / len(rows))
    assert m.floor.product == 0 and m.target.success == 1
    down = sum((r[4] - r[3]) ** 2 for r in rows)
    if down <= 1e-3: return
    expected = sum((r[5] - r[3]) * (r[4] - r[3]) for r in rows) / down
    assert edit_effect(m.edited, m.target).item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_edits_side_by_side_are_compared_like_one_after_the_other():
    g = torch.Generator().manual_seed(0)
    token, metric = torch.randint(3, (9, 4), generator=g), torch.randn(9, 4, generator=g)
    clean, target = (Outcome(torch.randn(9, generator=g), torch.randint(3, (9,), generator=g)) for _ in range(2))
    together = compare_edit(Outcome(metric, token), clean, target)
    for k in range(4):
        alone = compare_edit(Outcome(metric[:, k], token[:, k]), clean, target)
        for whole, column in zip(together, alone): assert torch.equal(whole[:, k], column)


def test_where_the_target_changes_nothing_the_edit_effect_is_undefined_and_fails():
    still = Outcome(torch.ones(20), torch.zeros(20, dtype=torch.long))
    tried = Outcome(torch.zeros(20), still.token), still, still
    evidence = Judged(*(compare_edit(outcome, still, still) for outcome in tried))
    estimate = interval(evidence, lambda m: edit_effect(m.edited, m.target))
    assert not np.isfinite(estimate.value)
    good = dict.fromkeys(["R²", "ablation cost", "fraction recovered", "necessity"], Estimate(0.9, 0.8, 1.0, 20))
    assert [f.split()[0] for f in Criteria().failures(good | {"edit effect": estimate})] == ["edit"]


def test_the_probe_is_a_logistic_regression_on_standardised_activations():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(3, (200,), generator=g)
    x = torch.randn(3, 6, generator=g)[codes] + 0.7 * torch.randn(200, 6, generator=g)
    values = [f"v{c}" for c in codes.tolist()]
    z = (x - x[:150].mean(0)) / x[:150].std(0, unbiased=False)
    expected = LogisticRegression(max_iter=1000).fit(z[:150].numpy(), values[:150]).predict(z[150:].numpy()).tolist()
    assert probe(x[:150], values[:150], x[150:]) == expected
    assert np.mean([a == b for a, b in zip(expected, values[150:])]) > 0.6


def test_a_certificate_tabulates_what_it_holds(model, part, sections, truth):
    made = certificate(model, part, sections[:1], truth)
    table = made.table
    assert list(table.columns) == ["section", "measure", "value", "lo", "hi", "n"]
    assert len(table) == sum(map(len, made.measures.values()))
    wide = made.summary()
    shown = table[~table.measure.str.startswith("off-target")]
    for row in shown.itertuples(): assert wide.loc[row.section, row.measure] == row.value
    section = sections[0]
    bench = set_up(model, part, section, truth)
    values = part.test.attributes[section.attribute]
    right = [a == b for a, b in zip(truth.read(bench.acts, section.attribute), values)]
    assert made.measures[section.name]["reading accuracy"].value == pytest.approx(np.mean(right))
    assert made.measures[section.name]["reading accuracy"] == reading_accuracy(bench, part)["reading accuracy"]
    pd.testing.assert_frame_equal(wide, certificate(model, part, sections[:1], truth).summary())
    assert "<table" in made._repr_html_()
