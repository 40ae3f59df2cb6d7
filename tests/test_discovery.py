"""Discovery where the truth is known: a hand-written circuit, labels drawn by lot, and joint effects patched again."""
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from sage_nb.core.activations import Node, capture, count_passes, run
from sage_nb.core.doctor import examined
from sage_nb.discovery.attribution import ATTRIBUTION_METHODS, all_nodes, attribution_patching, exact_patching
from sage_nb.core.models import load_model
from sage_nb.tasks.planted import planted_circuit
from sage_nb.discovery.accuracy import agreement, discovery_accuracy
from sage_nb.tasks.builtin import RECIPES
from sage_nb.tasks.templates import random_labels
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.tasks.task import load_task


@pytest.mark.parametrize("sharpness,leak,seed", [(6, 0.0, 0), (15, 0.02, 1), (30, 0.05, 2)])
def test_the_planted_circuit_is_returned_exactly(sharpness, leak, seed):
    planted = planted_circuit(sharpness, leak, seed)
    found = find_cross_sections(planted.model, planted.task(96, seed), verbose=False)
    for attribute, circuit in planted.circuit.items():
        assert {node for s in found.of(attribute) for node in s.nodes} == circuit, attribute


def test_plain_attribution_ranks_saturated_queries_below_decoys_and_the_qk_fix_does_not():
    planted = planted_circuit()
    task, nodes = planted.task(64), [Node("q", layer, head, "END") for layer in range(2) for head in range(4)]
    exact = exact_patching(planted.model, task, "which", nodes)
    plain, fixed = (attribution_patching(planted.model, task, "which", nodes, qk_fix=fix) for fix in (False, True))
    assert agreement(plain, exact)["average precision"] < 0.5
    mine = torch.tensor([node in planted.circuit["which"] for node in nodes])
    assert mine.sum() == 2
    assert torch.allclose(fixed.share[mine], exact.share[mine], atol=1e-3)
    assert agreement(fixed, exact)["average precision"] == 1


CASES = [("tiny-gpt2", "agreement"), ("tiny-pythia", "pronoun"), ("tiny-gemma", "order")]


@pytest.mark.parametrize("name,recipe", CASES)
def test_labels_by_lot_have_no_cross_section(name, recipe):
    model = load_model(name)
    task = load_task(random_labels(RECIPES[recipe]), model, n=48)
    found = find_cross_sections(model, task, max_prompts=24, steps=1, verbose=False)
    assert not len(found) and list(found.missing())


def effect_of_patching(model, task, section):
    "How much of the metric is lost where a section's nodes hold what they hold on the counterfactual prompts."
    there = capture(model, task.counterfactual(section.attribute).prompts, section.nodes)
    metric = task.metric(section.attribute)
    clean, patched = run(model, task.prompts, metric), run(model, task.prompts, metric, there)
    return ((patched - clean).mean() / clean.mean()).item()


def test_a_section_s_effects_are_those_of_patching_its_nodes_together(model, task, sections):
    used = task.train[:64]
    for s in sections:
        assert s.effect.value == pytest.approx(effect_of_patching(model, used, s), abs=1e-5)
        assert s.curve[len(s.nodes)] == s.effect and max(s.curve) == 16 and list(s.curve) == sorted(s.curve)


def test_what_was_found_is_measured_on_prompts_that_had_no_part_in_the_search(model, task, sections):
    judges = task.test[:64]
    for s in sections:
        assert s.held_out.value == pytest.approx(effect_of_patching(model, judges, s), abs=1e-5)
        assert s.held_out.n == 64 and s.held_out != s.effect
        assert f"{s.effect} in training, {s.held_out.value:.2f} held out;" in str(s)
    table = sections.table()
    assert table["held out"].tolist() == [s.held_out.value for s in sections]
    assert (table["held out lo"] <= table["held out"]).all() and (table["held out"] <= table["held out hi"]).all()
    assert list(table.effect) == [s.effect.value for s in sections], "the search decides the order"


def test_a_task_without_held_out_prompts_has_effects_in_training_only():
    planted = planted_circuit()
    found = find_cross_sections(planted.model, planted.task(64).train, "which", ["q", "z"], verbose=False)
    assert len(found) and all(s.held_out is None and "held out" not in str(s) for s in found)
    assert found.table()["held out"].isna().all()


def test_held_out_effects_cost_a_clean_run_two_passes_an_attribute_and_the_reach_of_each_section(monkeypatch):
    planted = planted_circuit()
    task = planted.task(64)
    held_out = len(task.test) / len(task.train)  # one pass of the held-out prompts, in passes of the others
    examined(planted.model)  # once for each model, and no part of a search
    with count_passes(planted.model, len(task.train)) as both:
        found = find_cross_sections(planted.model, task, ["which", "second"], ["q", "z"], verbose=False)
    with count_passes(planted.model, len(task.train)) as alone:
        find_cross_sections(planted.model, task.train, ["which", "second"], ["q", "z"], verbose=False)
    prompts, layers, patched = task.test.prompts, planted.model.cfg.n_layers, 0
    for section in found:
        width = (prompts.index("END") - prompts.index(section.position)).max() + 1  # tokens that are computed
        patched += (1 - min(node.layer for node in section.nodes) / layers) * width / prompts.tokens.shape[1]
    reading = sum(max(node.layer for s in found.of(a) for node in s.nodes) + 1 for a in found.scores) / layers
    clean = 1 + 2  # a clean run to start from, and each attribute's clean metric
    assert both.forward - alone.forward == pytest.approx((clean + reading + patched) * held_out)
    assert both.backward == alone.backward


def test_some_cross_sections_are_cross_sections(sections):
    assert {s.attribute for s in sections} == {"IO", "S"} and list(sections.scores) == ["IO", "S", "Pos"]
    io = [s.attribute == "IO" for s in sections]
    numbers = [i for i, yes in enumerate(io) if yes]
    for some in (sections.of("IO"), sections[io], sections[np.array(io)], sections[numbers]):
        assert type(some) is type(sections) and {s.attribute for s in some} == {"IO"}
        assert len(some.table()) == len(some) == sum(io) and "S" not in some.scores
        assert not any(line.startswith("S ") for line in some.missing()), "left out is not: not found"
    assert list(sections[:1]) == [sections[0]] and list(sections[::-1])[0] == sections[-1]
    assert [line.split()[0] for line in sections[:1].missing()] == ["Pos"] == list(sections.of("Pos").scores)


def test_accuracy_equals_scikit_learn_on_the_scores_themselves(model, task):
    few, sites = task[:16], ("v", "z", "resid_mid")
    accuracy = discovery_accuracy(model, few, ["IO"], sites, progress=False).set_index(["site", "method"])
    nodes = all_nodes(model, few.prompts.positions, sites)
    exact = exact_patching(model, few, "IO", nodes).share
    for method, how in ATTRIBUTION_METHODS.items():
        share = attribution_patching(model, few, "IO", nodes, **how).share
        for site in ("all", *sites):
            mine = torch.tensor([site in ("all", n.site) for n in nodes])
            matters, size = exact[mine].abs() >= 0.05, share[mine].abs()
            row = accuracy.loc[(site, method)]
            assert row["average precision"] == pytest.approx(average_precision_score(matters, size))
            assert row["AUROC"] == pytest.approx(roc_auc_score(matters, size))
            assert row["matter"] == matters.sum()


def test_passes_are_counted_by_prompts_and_blocks(random_model):
    task = load_task("ioi", random_model, n=24)[:6]
    nodes = [Node("z", 0, 0, "END"), Node("z", 2, 1, "END"), Node("v", 3, 0, "IO")]
    with count_passes(random_model, 6) as exact:
        exact_patching(random_model, task, "IO", nodes, batch_size=4)
    counterfactuals, clean, n_pos = 1, 1, task.prompts.tokens.shape[1]
    patched = (4 + 2) / 4 / n_pos  # from layers 0 and 2 on, of 4, at END alone
    for some in (task[:4], task[4:]):  # from layer 3 on, and in each batch as many tokens as the longest way to END
        width = (some.prompts.index("END") - some.prompts.index("IO")).max().item() + 1
        patched += 1 / 4 * width / n_pos * len(some) / 6
    assert exact.forward == pytest.approx(counterfactuals + clean + patched) and exact.backward == 0
    with count_passes(random_model, 6) as atp:
        attribution_patching(random_model, task, "IO", nodes, qk_fix=True, batch_size=4)
    assert (atp.forward, atp.backward) == (2, 1)
