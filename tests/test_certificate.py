"""Edits and certificates recomputed prompt by prompt, dictionaries that must fail, and prompts that cannot be edited."""
from dataclasses import fields as dataclass_fields
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from sage_nb.core.activations import Node
from sage_nb.measures.certificate import Criteria, certificate, certify, off_target, probe
from sage_nb.truth.dictionaries import Dictionaries, fit_dictionaries
from sage_nb.core.intervals import Estimate, interval
from sage_nb.discovery.sections import CrossSection
from sage_nb.truth.runs import EditStage, Outcome, edit_effect, edit_floor, edit_success, set_edit_stage, set_stage, supervised_edit
from sage_nb.tasks.task import load_task


@pytest.fixture(scope="module")
def part(task):
    "All training prompts and a quarter of the held-out ones."
    return task[~task.held_out | (torch.arange(len(task)) % 4 == 0)]


def named(sections, name): return next(s for s in sections if s.name == name)


def plain_certificate(model, task, section, truth):
    "R², edits and off-target change from one hooked run per prompt and intervention, values looked up one by one."
    test, cf, attribute = task.test, task.test.counterfactual(section.attribute), section.attribute
    spot, end = (test.prompts.index(p).tolist() for p in (section.position, "END"))
    there = cf.prompts.index(section.position).tolist()

    def run(i, put):
        def hook(value, head):
            def edit(x, hook): x[0, spot[i], head] = value
            return edit
        hooks = [(n.hook, hook(value, n.head)) for n, value in put.items()]
        logits = model.run_with_hooks(test.prompts.tokens[i : i + 1], fwd_hooks=hooks)[0, end[i]]
        return (logits[test.answers[i]] - logits[cf.distractors[i]]).item(), int(logits.argmax())

    def acts(prompts, i, at):
        cache = model.run_with_cache(prompts.tokens[i : i + 1])[1]
        return {n: cache[n.hook][0, at[i], n.head] for n in section.nodes}

    def vector(node, name, value):
        d = truth[node]
        return d.weights[name] * d.vectors[name][d.values[name].index(value)]

    def read(x, name):
        best = {}
        for value in truth[section.nodes[0]].values[name]:
            best[value] = 0
            for node in section.nodes:
                d = truth[node]
                average = sum(c * vector(node, name, v) for c, v in zip(d.counts[name].tolist(), d.values[name])) / d.counts[name].sum()
                best[value] += (x[node] - d.mean - vector(node, name, value) + average).square().sum().item()
        return min(best, key=best.get)
    missed = spread = hit = floor = up = down = 0.0
    changed, right = {b: 0 for b in task.attributes if b != attribute}, {b: 0 for b in task.attributes if b != attribute}
    for i, row in enumerate(test.attributes.to_dict("records")):
        a, target_a = acts(test.prompts, i, spot), acts(cf.prompts, i, there)
        edited = {n: x - vector(n, attribute, row[attribute]) + vector(n, attribute, cf.values[i]) for n, x in a.items()}
        for n, x in a.items():
            missed += (x - truth[n].mean - sum(vector(n, name, v) for name, v in row.items())).square().sum().item()
            spread += (x - truth[n].mean).square().sum().item()
        (m, token), (target, wanted), (got, predicted) = run(i, {}), run(i, target_a), run(i, edited)
        hit, floor = hit + (predicted == wanted), floor + (token == wanted)
        up, down = up + (got - m) * (target - m), down + (target - m) ** 2
        for b in changed:
            before = read(a, b)
            right[b] += before == row[b]
            changed[b] += before != read(edited, b) and before == read(target_a, b)
    n, found = len(test), {"R²": 1 - missed / spread, "edit success": hit / len(test), "no edit success": floor / len(test), "edit effect": up / down}
    for b, times in changed.items():
        chance = task.train.attributes[b].value_counts(normalize=True).max()
        if (right[b] / n - chance) / (1 - chance) >= 0.5: found[f"off-target change of {b}"] = times / n
    return found


@pytest.mark.parametrize("name", ["IO:v@IO", "S:k@S1"])
def test_a_certificate_equals_one_made_prompt_by_prompt(model, part, sections, truth, name):
    section = named(sections, name)
    found, expected = certify(set_stage(model, part, section, truth), truth), plain_certificate(model, part, section, truth)
    test_1 = {"ablation cost", "sufficiency", "fraction recovered", "necessity"}
    assert set(found) - test_1 == set(expected)
    assert {m: found[m].value for m in expected} == pytest.approx(expected, abs=1e-4)
    assert name != "S:k@S1" or "off-target change of Pos" in expected, "this section is here because Pos can be read in it"


def test_an_edit_with_a_product_takes_the_product_along(model):
    order, nodes = load_task("order", model, n=256), [Node("z", 3, 2, "END"), Node("z", 3, 3, "END")]
    truth = fit_dictionaries(model, order, nodes, products=[("ordinal", "first"), ("ordinal", "second")], unseen="additive")
    fields = {"attribute": "ordinal", "site": "z", "position": "END", "nodes": tuple(nodes), "scores": (0.0, 0.0)}  # the effects play no part
    section = CrossSection(**fields, **{f.name: Estimate(-1.0, -1.0, -1.0, 9) for f in dataclass_fields(CrossSection) if f.name not in fields})
    editing = set_edit_stage(set_stage(model, order, section, truth))
    edited, attributes = supervised_edit(editing, truth), editing.stage.task.attributes
    for node in nodes:
        d = truth[node]
        for i, (row, new) in enumerate(zip(attributes.to_dict("records"), editing.counterfactual.values)):
            change = d.vectors["ordinal"][d.values["ordinal"].index(new)] - d.vectors["ordinal"][d.values["ordinal"].index(row["ordinal"])]
            for name in ("first", "second"):
                combinations = d.values[f"ordinal×{name}"]
                for sign, ordinal in ((1, new), (-1, row["ordinal"])):
                    value = f"{ordinal}×{row[name]}"
                    if value in combinations: change = change + sign * d.vectors[f"ordinal×{name}"][combinations.index(value)]
            assert_close(edited[node][i], editing.stage.acts[node][i] + change, rtol=1e-4, atol=1e-5)


def test_wrong_dictionaries_fail_their_certificate(model, part, sections, truth):
    section = named(sections, "IO:v@IO")

    def altered(change): return Dictionaries("wrong", {n: replace(truth[n], **change(truth[n])) for n in section.nodes}, truth.fit)
    wrong = {
        "shuffled values": altered(lambda d: {"values": d.values | {"IO": d.values["IO"][1:] + d.values["IO"][:1]}}),
        "nothing": altered(lambda d: {"weights": dict.fromkeys(d.weights, 0.0)}),
        "too much": altered(lambda d: {"weights": dict.fromkeys(d.weights, 3.0)}),
        "half": altered(lambda d: {"weights": dict.fromkeys(d.weights, 0.3)}),
    }
    assert certificate(model, part, [section], truth, probes=False).passed == ["IO:v@IO"]
    for name, dictionaries in wrong.items():
        found = certificate(model, part, [section], dictionaries, probes=False)
        assert not found.passed and "IO:v@IO" in repr(found) and "fails" in repr(found), name
        if name == "nothing": assert found.measures["IO:v@IO"]["edit effect"].value == pytest.approx(0, abs=1e-4)


def test_prompts_whose_new_value_is_unknown_are_left_out_of_edits(model, task, sections, truth):
    section = named(sections, "IO:v@IO")
    stage = set_stage(model, task, section, truth)
    values = set_edit_stage(stage).counterfactual.values
    keep = torch.tensor([v != values[0] for v in task.test.attributes["IO"]])  # so that only edits need it
    part = task[~task.held_out | torch.zeros(len(task), dtype=torch.bool).masked_scatter(task.held_out, keep)]

    def without(d):
        rows = [i for i, v in enumerate(d.values["IO"]) if v != values[0]]
        return replace(d, values=d.values | {"IO": [d.values["IO"][i] for i in rows]}, vectors=d.vectors | {"IO": d.vectors["IO"][rows]}, counts=d.counts | {"IO": d.counts["IO"][rows]})
    fewer = Dictionaries("mse", {n: without(truth[n]) for n in section.nodes}, truth.fit)
    stage = set_stage(model, part, section, fewer)
    new = set_edit_stage(stage).counterfactual.values
    expected = sum(v != values[0] for v in new)
    assert expected < len(new)
    found = certify(stage, fewer)
    assert found["edit effect"].n == found["edit success"].n == expected and found["R²"].n == len(new)
    with pytest.raises(ValueError, match=f"value '{values[0]}' of attribute 'IO' was not in the training prompts"):
        supervised_edit(set_edit_stage(stage), fewer)
    only = part[~part.held_out | torch.zeros(len(part), dtype=torch.bool).masked_scatter(part.held_out, torch.tensor([v == values[0] for v in new]))]
    assert len(only.test) == len(new) - expected > 1
    none = certify(set_stage(model, only, section, fewer), fewer)
    assert "only 0 held-out prompts can be edited" in Criteria().failures(none)


def test_editing_an_attribute_that_is_read_elsewhere_is_off_target(model, task, sections, truth):
    section = named(sections, "S:k@S1")  # Pos can be read here
    editing = set_edit_stage(set_stage(model, task, section, truth))
    flipped = editing.stage.task.attributes.Pos.map(dict(zip(truth[section.nodes[0]].values["Pos"], truth[section.nodes[0]].values["Pos"][::-1])))
    both = {n: truth[n].edit(x, "Pos", editing.stage.task.attributes, flipped) for n, x in supervised_edit(editing, truth).items()}
    assert off_target(editing, truth, both)["Pos"].float().mean() > 0.8
    assert off_target(editing, truth, supervised_edit(editing, truth))["Pos"].float().mean() < 0.1
    mixing = replace(editing, acts=both)  # a model whose own counterfactual changes the reading is not to be corrected
    assert off_target(mixing, truth, both)["Pos"].sum() == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), *[st.floats(-5, 5, width=32)] * 3), min_size=2, max_size=20))
def test_edit_scores_equal_a_plain_loop(rows):
    tokens, metrics = torch.tensor([r[:3] for r in rows]), torch.tensor([r[3:] for r in rows])
    clean, target, edited = (Outcome(metrics[:, i], tokens[:, i]) for i in range(3))
    editing = EditStage(type("Stage", (), {"untouched": clean})(), None, {}, target)
    means = editing.columns(edited).mean(0)
    assert edit_success(means).item() == pytest.approx(sum(r[2] == r[1] for r in rows) / len(rows))
    assert edit_floor(means).item() == pytest.approx(sum(r[0] == r[1] for r in rows) / len(rows))
    down = sum((r[4] - r[3]) ** 2 for r in rows)
    if down > 1e-3: assert edit_effect(means).item() == pytest.approx(sum((r[5] - r[3]) * (r[4] - r[3]) for r in rows) / down, rel=1e-3, abs=1e-3)


def test_where_the_target_changes_nothing_the_edit_effect_is_undefined_and_fails():
    still = Outcome(torch.ones(20), torch.zeros(20, dtype=torch.long))
    columns = EditStage(type("Stage", (), {"untouched": still})(), None, {}, still).columns(Outcome(torch.zeros(20), still.token))
    found = interval(columns, edit_effect)
    assert not np.isfinite(found.value)
    good = dict.fromkeys(["R²", "ablation cost", "fraction recovered", "necessity"], Estimate(0.9, 0.8, 1.0, 20))
    assert [f.split()[0] for f in Criteria().failures(good | {"edit effect": found})] == ["edit"]


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
    found = certificate(model, part, sections[:1], truth)
    table = found.table
    assert list(table.columns) == ["section", "measure", "value", "lo", "hi", "n"]
    assert len(table) == sum(map(len, found.measures.values()))
    wide = found.summary()
    for row in table[~table.measure.str.startswith("off-target")].itertuples(): assert wide.loc[row.section, row.measure] == row.value
    section = sections[0]
    stage = set_stage(model, part, section, truth)
    right = [a == b for a, b in zip(truth.nearest(stage.acts, section.attribute), part.test.attributes[section.attribute])]
    assert found.measures[section.name]["reading accuracy"].value == pytest.approx(np.mean(right))
    pd.testing.assert_frame_equal(wide, certificate(model, part, sections[:1], truth).summary())
    assert "<table" in found._repr_html_()
