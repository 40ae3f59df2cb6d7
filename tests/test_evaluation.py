"""Test 1 and the score prompt by prompt, what must rank above what, reports that survive saving and hostile names."""
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from plain import read_share, run_cost
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import sage_nb
from sage_nb.core.activations import Node, capture
from sage_nb.core.intervals import interval, resample_counts
from sage_nb.core.models import EMBEDDED
from sage_nb.measures.certificate import Criteria, certificate
from sage_nb.measures.faithfulness import SPARSE_KS, TEST_1, Runs, largest
from sage_nb.measures.named import NAMED_KS, named_steps
from sage_nb.measures.score import PARTS, SCORE_VERSION, compare
from sage_nb.measures.units import name_units
from sage_nb.report.evaluation import SKYLINE, evaluate
from sage_nb.report.trials import (
    FLOOR, IDENTITY, Settings, baselines, coordinates, planted, section_weight, try_section, twin_name)
from sage_nb.views.style import to_html
from sage_nb.report.report import SageReport
from sage_nb.saes.codes import SparseSAE
from sage_nb.saes.fidelity import check_saes
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.truth.dictionaries import fit_dictionaries
from sage_nb.truth.runs import editable, set_up

KINDS = ("topk", "standard")
ALONE = dict(tests=(1,), twins=False, progress=False)  # test 1 of the given SAEs


@pytest.fixture(scope="module")
def part(task):
    "Three fifths of the training prompts, in which every value is, and a third of the held-out ones."
    i = torch.arange(len(task))
    return task[torch.where(task.held_out, i % 3 == 0, i % 5 < 3)]


@pytest.fixture(scope="module")
def io_sections(sections):
    "Only the cross-sections of IO."
    of_io = replace(sections, sections=tuple(sections.of("IO")))
    assert {s.site for s in of_io} >= {"v", "z"}
    return of_io


@pytest.fixture(scope="module")
def values(io_sections):
    return replace(io_sections, sections=tuple(s for s in io_sections if s.site == "v"))


@pytest.fixture(scope="module")
def trained(sae_sets):
    sets = [saes for name, saes in sae_sets.items() if "-frozen-" not in name]
    if not sets: pytest.skip("no SAE set is embedded")
    return sets[0]


def row_bytes(x): return [row.tobytes() for row in x.flatten(0, -2).numpy()]


def counting(saes, encoded):
    "The same SAEs, which add to `encoded` what each encodes, by its place."
    def counted(sae):
        def encode(x):
            encoded[sae.node].update(row_bytes(x))
            return sae.encoder(x)
        return replace(sae, encoder=encode)
    return replace(saes, saes={place: counted(sae) for place, sae in saes.saes.items()})


@pytest.fixture(scope="module")
def evaluated(model, part, io_sections, truth, trained):
    "A report; how often each SAE was given each activation for it; and the same of its check alone."
    nodes = [node for section in io_sections for node in section.nodes]
    in_check, encoded = ({sae.node: Counter() for sae in trained} for _ in range(2))
    check_saes(model, part, counting(trained, in_check), nodes)
    saes = counting(trained, encoded)
    return evaluate(model, part, io_sections, truth, saes, ks=(1, 4), twins=False, progress=False), encoded, in_check


@pytest.fixture(scope="module")
def report(evaluated): return evaluated[0]


def test_for_a_card_alone_saes_are_tried_only_where_it_counts(model, part, io_sections, truth, trained):
    "The section whose ground truth explains least is made one that does not count."
    quick = dict(twins=False, diagnostics=False, explorers=False, progress=False)
    explained = evaluate(model, part, io_sections, truth, trained, **quick).table.query("metric == 'R²'")
    strict = Criteria(min_r2=explained.lo.min())
    whole = evaluate(model, part, io_sections, truth, trained, criteria=strict, **quick)
    card = evaluate(model, part, io_sections, truth, trained, criteria=strict, table=False, **quick)
    assert 0 < whole.sections.counts.sum() < len(whole.sections)
    columns = ["sae", "score", "lo", "hi", *PARTS]
    pd.testing.assert_frame_equal(card.scores[columns], whole.scores[columns])
    took = [report.settings["cost"]["passes"]["tests"] for report in (card, whole)]
    assert took[0] < took[1]


# Test 1 by a plain loop

def indicators(attributes, values):
    return np.stack([(attributes[a] == v).to_numpy(float) for a in values for v in values[a]], 1)


def plain_supervised(attributes, x, train):
    "The training mean and a vector per value, by NumPy's least squares."
    values = {a: sorted(attributes[a].iloc[train].unique()) for a in attributes}
    C, mean = indicators(attributes, values), x[train].mean(0)
    vectors = np.linalg.lstsq(C[train], (x[train] - mean).double().numpy(), rcond=None)[0]
    return mean + torch.from_numpy(C @ vectors).float()


def plain_v(block, head, x_hat, x):
    "The value that a head of transformers' GPT-2 computes from x_hat, with the scale of x."
    rows = slice(256 + 32 * head, 288 + 32 * head)
    normed = block.ln_1.weight * (x_hat - x_hat.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() + block.ln_1.bias
    return (normed @ block.attn.c_attn.weight[:, rows] + block.attn.c_attn.bias[rows]).detach()


def by_sae(sae): return lambda x: sae.dense_encode(x[None])[0] @ sae.W_dec + sae.b_dec


def plain_metric(model, task, i, position, values):
    "The metric of prompt i with a value at some nodes."
    def hook(value, node):
        def edit(x, hook): x[0, position, node.head] = value
        return edit
    hooks, end = [(node.hook, hook(value, node)) for node, value in values], task.prompts.index("END")[i]
    logits = model.run_with_hooks(task.prompts.tokens[i : i + 1], fwd_hooks=hooks)[0, end]
    return (logits[task.answers[i]] - logits[task.distractors[i]]).item()


def plain_test_1(model, task, nodes, saes):
    "The runs of each method with edits at v nodes, from transformers' weights, NumPy and one hooked run per prompt."
    hf = GPT2LMHeadModel.from_pretrained(EMBEDDED / "tiny-gpt2", dtype=torch.float32)
    prompts, layers = task.prompts, {n.layer for n in nodes}
    caches = [model.run_with_cache(tokens[None])[1] for tokens in prompts.tokens]
    at = prompts.index(nodes[0].position).tolist()
    train, test = ([i for i in range(len(task)) if bool(task.held_out[i]) == out] for out in (False, True))
    streams = {layer: [c[f"blocks.{layer}.hook_resid_pre"][0] for c in caches] for layer in layers}
    acts = {n: torch.stack([c[n.hook][0, p, n.head] for c, p in zip(caches, at)]) for n in nodes}
    means = {n: acts[n][train].mean(0) for n in nodes}

    def through(decoders):
        hat = {}
        for n in nodes:
            here, decode, block = streams[n.layer], decoders[n.layer], hf.transformer.h[n.layer]
            hat[n] = [plain_v(block, n.head, decode(x[p]), x[p]) for x, p in zip(here, at)]
        return hat
    methods = {
        FLOOR: {n: [means[n]] * len(task) for n in nodes}, IDENTITY: acts,
        SKYLINE: {n: plain_supervised(task.attributes, acts[n], train) for n in nodes},
        saes.name: through({layer: by_sae(saes.before(layer)) for layer in layers})}

    def in_each(put):
        return torch.tensor([plain_metric(model, task, i, at[i], put(i)) for i in test], dtype=torch.double)
    clean, ablated = in_each(lambda i: ()), in_each(lambda i: means.items())
    runs = {}
    for name, hat in methods.items():
        put_in = in_each(lambda i: [(n, hat[n][i]) for n in nodes])
        left_out = in_each(lambda i: [(n, means[n] + acts[n][i] - hat[n][i]) for n in nodes])
        runs[name] = Runs(clean, ablated, put_in, left_out)
    return runs


def test_the_table_equals_test_1_recomputed_prompt_by_prompt(model, part, values, trained):
    report = evaluate(model, part, values, fit_dictionaries(model, part, values), trained, **ALONE)
    assert len(values) == 1 and len({n.layer for n in values[0].nodes}) > 1
    recomputed, n = plain_test_1(model, part, values[0].nodes, trained), len(part.test)
    assert set(recomputed) == set(report.table[report.table.metric.isin(TEST_1)].sae)
    for name, runs in recomputed.items():
        clean, ablated, put_in, left_out = (sum(metrics.tolist()) / n for metrics in runs)
        expected = {"sufficiency": put_in / clean, "fraction recovered": (put_in - ablated) / (clean - ablated),
                    "necessity": 1 - abs(ablated - left_out) / abs(ablated - clean)}
        rows = report.table[(report.table.sae == name) & report.table.metric.isin(TEST_1)].set_index("metric")
        assert dict(rows.value) == pytest.approx(expected, abs=1e-5)
        clean, ablated, put_in, _ = (resample_counts(n) @ torch.stack(runs, 1) / n).numpy().T
        recovered = (put_in - ablated) / (clean - ablated)
        value, lo, hi = rows.loc["fraction recovered", ["value", "lo", "hi"]]
        far = abs(np.percentile(recovered, [2.5, 97.5]) - value).max()
        ends = max(value - far, recovered.min()), min(value + far, recovered.max())
        assert (lo, hi) == pytest.approx(ends, abs=1e-5)
        assert (rows.n == n).all()


def test_the_report_holds_the_certificate_and_counts_by_it(report, model, part, io_sections, truth):
    alone, rows = certificate(model, part, io_sections, truth, probes=False), report.table[report.table.test == 0]
    assert set(rows.sae) == {SKYLINE}
    for row in rows.itertuples(): assert alone.measures[row.section][row.metric][:3] == (row.value, row.lo, row.hi)
    of_skyline = report.table[(report.table.sae == SKYLINE) & (report.table.test < 2) & report.table.k.isna()]
    together = of_skyline.groupby("section").metric.agg(set).to_dict()
    assert together == {name: set(measures) for name, measures in alone.measures.items()}
    assert set(report.sections.section[report.sections.counts]) == set(alone.passed)


def test_floor_and_identity_are_0_and_1_everywhere(report):
    scores = report.table[report.table.test == 1].set_index(["sae", "metric"]).value
    for metric, worst in (("fraction recovered", 0), ("necessity", 0)):
        assert scores[FLOOR, metric].to_list() == pytest.approx([worst] * len(report.sections), abs=1e-5)
        assert scores[IDENTITY, metric].to_list() == pytest.approx([1] * len(report.sections), abs=1e-5)


def test_two_evaluations_are_identical(model, part, values, truth, trained):
    one, two = (evaluate(model, part, values, truth, trained, ks=(1, 4), progress=False) for _ in range(2))
    for name in ("table", "scores", "sections", "latents", "values"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)
    costs = [report.settings.pop("cost") for report in (one, two)]
    for phase in ("baselines", "true runs", "tests"):  # the first one's checks also ask the model what its maps are
        assert costs[0]["passes"][phase] == costs[1]["passes"][phase]
    assert one.settings == two.settings and one.notes == two.notes


# What an evaluation costs

def activations_needed(model, prompts, sections):
    "By place, what its SAE must encode of some prompts: all tokens up to END for z, one for each other node."
    needed = {}
    for node in {node for section in sections for node in section.nodes}:
        place = Node("resid_pre", node.layer)
        x = capture(model, prompts, [place])[place]
        end = prompts.index(node.position)
        rows = [x[i, : end[i] + 1] if node.site == "z" else x[i, end[i]][None] for i in range(len(x))]
        needed.setdefault(place, set()).update(row_bytes(torch.cat(rows)))
    return needed


def test_each_activation_is_encoded_once_and_only_what_is_needed(evaluated, model, part, io_sections):
    "Held-out prompts, their counterfactuals and training prompts, over all sections, tests and the check."
    _, encoded, in_check = evaluated
    expected, every = {}, [part.test.prompts, part.test.counterfactual("IO").prompts, part.train.prompts]
    for prompts in every:
        for place, rows in activations_needed(model, prompts, io_sections).items():
            expected.setdefault(place, set()).update(rows)
    assert len(expected) > 1 and {place for place, rows in encoded.items() if rows} == set(expected)
    for place, rows in expected.items():
        assert set(encoded[place].values()) == {1}, f"{place} encodes an activation twice"
        assert set(encoded[place]) - set(in_check[place]) == rows - set(in_check[place])
        tokens = sum(prompts.tokens.numel() for prompts in every)
        assert len(rows) < tokens, "many tokens stand behind END, or are the same as in another prompt"


def cost_of_changes(bench, steps, before=None):
    "What it costs to run the prompts in which a step puts in something else than the one before, all in all."
    cost = 0
    for step in steps:
        rows = [torch.ones(len(x), dtype=torch.bool) if before is None else (x != before[node]).any(1)
                for node, x in step.items()]
        cost, before = cost + run_cost(bench, torch.stack(rows).any(0)), step
    return cost


def cost_of_score(bench, task, saes, whole):
    "Of what must be run with what one set says: few latents kept and left out, all of them, and edits by name."
    read, rows = name_units(bench, task, saes), editable(bench)
    kept = [{node: largest(some, k) for node, some in read.items()} for k in SPARSE_KS]
    if whole: kept.append({node: some.test.reconstruction for node, some in read.items()})
    left_out = [{node: bench.means[node] + x - put_in[node] for node, x in bench.acts.items()} for put_in in kept]
    edits = [{node: x[rows] for node, x in step.items()} for step in named_steps(bench, read, task.train.attributes)]
    edited = cost_of_changes(bench.editing, edits, bench.editing.acts)
    return cost_of_changes(bench, kept) + cost_of_changes(bench, left_out) + edited


@pytest.mark.parametrize("batch_size", [64, 16])
def test_no_forward_pass_is_repeated(model, part, values, truth, trained, batch_size):
    "One section of v, one SAE set beside PCA, planted dictionary and identity: rows through the model, counted."
    report = evaluate(model, part, values, truth, trained, ks=(1,), twins=False, batch_size=batch_size, progress=False)
    (section,), moves = values, report.table[report.table.metric == "moves"]
    assert (moves.value == 1).all() and set(moves.sae) == {trained.name}, "every prompt that can be edited is moved"
    test, train = len(part.test), len(part.train)
    bench = set_up(model, part, section, truth, batch_size)
    l0 = report.settings["saes"][trained.name]["l0"]
    pca, = baselines(model, part, [trained], {trained.name: l0}, twins=False)
    asked = [(planted(bench), False), (coordinates(bench), False), (pca, False), (trained, True)]
    once, edited, reading = run_cost(bench), run_cost(bench.editing), read_share(bench)
    costs = {
        "clean metric": test, "clean run, to start from": test, "all that is read, held out": test * reading,
        "counterfactual": test * reading, "training": train * reading,
        "mean ablation": once, "counterfactual's nodes put in": once, "what was there put in": once,
        "supervised dictionary put in, and left out": 2 * once, "supervised edit": edited, "one greedy move": edited,
        "score": sum(cost_of_score(bench, part, saes, whole) for saes, whole in asked)}
    rows = sum(costs.values())
    counted = report.settings["cost"]["passes"]
    assert counted["true runs"] + counted["tests"] == pytest.approx(rows / len(part), abs=0.011)


# What must rank above what

@pytest.fixture(scope="module", params=KINDS)
def tried(request, model, part, io_sections, truth, sae_sets):
    "By section, what trained SAEs, their random twin and the planted dictionary did."
    saes = sae_sets[f"tiny-gpt2-res-{request.param}"]
    sets = [saes, baselines(model, part, [saes], {saes.name: 4.0})[0]]
    return {s.name: try_section(set_up(model, part, s, truth), part, sets, Settings(), whole=[t.name for t in sets])
            for s in io_sections}, saes.name


@pytest.mark.parametrize("metric", ["fraction recovered", "necessity"])
def test_trained_is_above_random_in_each_io_section(tried, metric):
    trials, name = tried
    for section, trial in trials.items():
        pair = [trial.runs[name], trial.runs[twin_name(name)]]
        difference = interval(pair, lambda means: TEST_1[metric](means[0]) - TEST_1[metric](means[1]))
        assert difference.lo > 0, f"{metric} in {section}: trained above random by {difference}"


def test_the_score_ranks_skyline_trained_random(tried):
    trials, name = tried
    order = SKYLINE, name, twin_name(name)
    evidence = [[trial.evidence(method) for trial in trials.values()] for method in order]
    for better, worse, both in zip(evidence, evidence[1:], zip(order, order[1:])):
        comparison = compare(better, worse, both)
        assert comparison.difference.lo > 0 and comparison.verdict == f"{both[0]} scores higher than {both[1]}"


def test_the_weight_of_a_section_is_what_the_counterfactual_does_there(tried, model, part, io_sections, truth):
    for section in io_sections:
        bench = set_up(model, part, section, truth)
        clean, target = (sum(outcome.metric.tolist()) for outcome in (bench.untouched, bench.target))
        weight = min(1, abs((target - clean) / clean))
        assert tried[0][section.name].weight == section_weight(bench) == pytest.approx(weight)
        weaker = replace(bench, target=bench.target._replace(metric=0.75 * bench.untouched.metric))
        assert section_weight(weaker) == pytest.approx(0.25)


CURVES = {"sparse faithfulness": SPARSE_KS, "control by name": NAMED_KS, "coverage by named units": None}


def table_parts(report, name):
    "For each section that counts the three parts, from the numbers of the table, and the section's weight."
    table, sections = report.table.set_index(["sae", "section", "metric"]).value, []
    for s in report.sections[report.sections.counts].itertuples():
        parts = []
        for metric, ks in CURVES.items():
            own, most = (table.loc[[(sae, s.section, metric)]].to_numpy() for sae in (name, SKYLINE))
            if ks: own, most = (np.trapezoid(y, np.log(ks)) for y in (own, most))
            parts.append(min(float(np.squeeze(own)) / float(np.squeeze(most)), 1))
        sections.append((parts, s.weight))
    return sections


def test_the_score_is_made_of_the_numbers_of_the_table(report):
    "Each part as a share of the planted dictionary's, their geometric mean, and of that the mean by weight."
    card = report.scorecard()
    for name in report.evidence:
        if name == FLOOR: continue
        parts, weights = zip(*table_parts(report, name))
        scores = np.prod(parts, 1) ** (1 / 3)
        assert card.score[name] == pytest.approx(np.average(scores, weights=weights), abs=1e-6)
        assert card.loc[name, list(PARTS)].tolist() == pytest.approx(np.average(parts, 0, weights), abs=1e-6)
        assert report.parts().loc[name, list(PARTS)].to_numpy() == pytest.approx(np.array(parts), abs=1e-6)
        assert report.parts().loc[name].score.tolist() == pytest.approx(scores, abs=1e-6)
    assert report.parts().weight[SKYLINE].tolist() == report.sections.weight[report.sections.counts].tolist()


def test_the_margin_is_over_the_best_of_what_knows_no_feature(report, trained):
    card, plain = report.scorecard(), report.settings["baselines"]
    assert set(plain) == set(report.evidence) - {trained.name, FLOOR, SKYLINE} and IDENTITY in plain
    best = card.score[plain].idxmax()
    found = report.margin(trained.name)
    assert (found.b, found.difference.value) == (best, pytest.approx(card.score[trained.name] - card.score[best]))
    assert card.margin[trained.name] == found.difference.value and card.margin.drop(trained.name).isna().all()
    scores = report.parts().score
    for row in report.sections[report.sections.counts].itertuples():
        there = {name: scores[name, row.section] for name in plain}
        best_there = report.sections.set_index("section").loc[row.section, ["best baseline", "baseline score"]].tolist()
        assert best_there == [max(there, key=there.get), pytest.approx(max(there.values()))]
        told = any(note.startswith(f"{row.section} does not discriminate") for note in report.notes)
        assert told == (max(there.values()) >= 0.5)
    with pytest.raises(ValueError, match="SAE 'nobody' is not in the report"): report.margin("nobody")


def test_diagnostics_are_of_the_evaluated_sets_alone_and_change_no_score(model, part, values, truth, trained, report):
    short = evaluate(model, part, values, truth, trained, twins=False, diagnostics=False, progress=False)
    long = evaluate(model, part, values, truth, trained, twins=False, ks=(1, 4), progress=False)
    pd.testing.assert_frame_equal(short.scores, long.scores, check_exact=True)
    greedy, by_f1 = (long.table[long.table.metric.str.contains(word)] for word in ("moves", "coverage of|F1"))
    assert set(greedy.sae) == set(by_f1.sae) == {trained.name}
    of_short = set(short.table.metric)
    assert not of_short & {*greedy.metric, *by_f1.metric} and set(CURVES) <= of_short
    assert len(long.latents) and len(long.values) and not len(short.latents)


def test_what_reconstructs_perfectly_without_features_does_not_score_as_the_skyline(report):
    card = report.scorecard()
    assert (card.loc[IDENTITY, ["control", "coverage"]] < 0.5).all() and card.score[IDENTITY] < 0.5
    assert card.loc[SKYLINE, ["score", "lo", "hi", *PARTS]].to_list() == [1] * 6
    assert card.loc[FLOOR, ["score", "lo", "hi", *PARTS]].to_list() == [0] * 6
    assert card.score[SKYLINE] > card.score.drop(SKYLINE).max()


def test_reports_of_the_same_prompts_can_be_compared_and_others_not(
        model, report, part, io_sections, truth, trained):
    worse = load_saes([replace(sae, name="worse", encoder=lambda x, sae=sae: 0.5 * sae.dense_encode(x))
                       for sae in trained], "worse")
    other = evaluate(model, part, io_sections, truth, worse, ks=(1, 4), twins=False, progress=False)
    comparison = report.compare(trained.name, "worse", other)
    of_scores = report.scorecard().score[trained.name] - other.scorecard().score["worse"]
    assert comparison.difference.lo > 0 and comparison.difference.value == pytest.approx(of_scores)
    with pytest.raises(ValueError, match="is not in the report"): report.compare("nobody", trained.name)


def test_reports_that_differ_in_more_than_the_saes_are_not_compared(model, part, io_sections, values, truth, trained):
    def score(task=part, sections=values, truth=truth, **how):
        return evaluate(model, task, sections, truth, trained, **(ALONE | how))

    base, half = score(), part[torch.arange(len(part)) % 2 == 0]
    others = {
        "prompts": score(task=half), "cross-sections": score(sections=io_sections[:2]),
        "ground truth": score(truth=fit_dictionaries(model, part, values, "mean")),
        "certificate": score(criteria=Criteria(tolerance=0.4)), "projection": score(scale="recomputed"),
        "tests": score(tests=(1, 3)),
    }
    others["version of the score"] = replace(base, settings=base.settings | {"score_version": SCORE_VERSION - 1})
    assert base.settings["score_version"] == SCORE_VERSION
    for what, other in others.items():
        with pytest.raises(ValueError, match=f"the two reports differ in {what} "):
            base.compare(trained.name, trained.name, other)
    assert base.compare(trained.name, trained.name, score()).difference.value == 0


def test_the_results_can_be_read_as_saebench_reads_its_own(report, trained, tmp_path):
    report.save_saebench(tmp_path / "core")
    files = [p for p in tmp_path.rglob("*") if "eval_results.json" in p.name]  # as their plotting tools look for them
    data = json.loads(files[0].read_text(), parse_constant=not_json)
    flat = {key: value for group in data["eval_result_metrics"].values() for key, value in group.items()}
    assert len(files) == 1 and files[0].name.startswith(trained.name)
    assert data["sae_cfg_dict"]["architecture"] == trained.before(0).architecture != trained.name
    task = report.settings["task"]
    for other in (task | {"hash": "another draw"}, task | {"name": "order"}):
        replace(report, settings=report.settings | {"task": other}).save_saebench(tmp_path / "core")
    assert len(list((tmp_path / "core").iterdir())) == 3, "files of another task take the place of the first"
    assert flat["score"] == pytest.approx(report.scorecard().score[trained.name])
    assert flat["l0"] >= 1 and 0 < flat["ce_loss_score"] <= 1.01
    assert {"architecture", "d_sae"} <= set(data["sae_cfg_dict"]) and data["eval_config"]["task"]["name"] == "ioi"


# SAEs of one's own, and wrong ones

def perfect(layer, scale=1.0, name="own"):
    "Every coordinate and its negative is a latent: the reconstruction is exact (for scale 1)."
    W = torch.cat([torch.eye(128), -torch.eye(128)])
    return SparseSAE(Node("resid_pre", layer), W, torch.zeros(128), lambda x: scale * (x @ W.T).relu(), name)


def test_an_sae_of_ones_own_that_is_exact_reconstructs_as_the_identity(model, part, io_sections, truth):
    mine = load_saes([perfect(layer) for layer in range(4)])
    own = evaluate(model, part, io_sections, truth, mine, **ALONE)
    runs = own.table[own.table.metric.isin(TEST_1)]
    for name in (mine.name, IDENTITY):
        assert runs[runs.sae == name].value.to_list() == pytest.approx([1] * 3 * len(io_sections), abs=1e-5)
    assert own.scorecard().score[mine.name] < 0.5, "but not with few latents, of those that have a name"


def test_a_shrunken_sae_scores_below_an_exact_one(model, part, values, truth):
    sets = [load_saes([perfect(layer, s) for layer in range(4)], f"x {s}") for s in (1.0, 0.6, 0.3)]
    table = evaluate(model, part, values, truth, sets, **ALONE).table
    recovered = table[table.metric == "fraction recovered"].set_index("sae").value
    assert recovered["x 1.0"] > recovered["x 0.6"] > recovered["x 0.3"]


def test_every_embedded_set_is_accepted_for_its_own_model(model, task, sae_set):
    figures = check_saes(model, task, sae_set, [Node("v", layer, 0, "END") for layer in range(4)])
    assert len(figures) == 4 and (figures["L0"] >= 1).all() and (figures["verdict"] != "refused").all()
    if "frozen" not in sae_set.name: assert (figures["variance explained"] >= 0.8).all()


def test_a_trained_set_is_evaluated_beside_its_twin(model, part, values, truth, trained):
    methods = set(evaluate(model, part, values, truth, trained.name, tests=(1,), progress=False).table.sae)
    rest = {name for name in methods - {FLOOR, SKYLINE, IDENTITY} if not name.startswith("PCA-")}
    assert rest == {trained.name, twin_name(trained.name)}


def wrong_saes(kind, trained):
    g = torch.Generator().manual_seed(0)
    alter = {
        "shuffled decoder": lambda s: replace(s, W_dec=s.W_dec[torch.randperm(len(s.W_dec), generator=g)]),
        "other origin": lambda s: replace(s, b_dec=s.b_dec + 3),
        "other width": lambda s: replace(s, W_dec=s.W_dec[:, :64], b_dec=s.b_dec[:64]),
        "layers in reverse": lambda s: replace(s, node=Node("resid_pre", 3 - s.node.layer)),
    }[kind]
    return SAESet(kind, {(new := alter(s)).node: new for s in trained if s.node.site == "resid_pre"})


@pytest.mark.parametrize("kind,message", [
    ("shuffled decoder", r"shuffled decoder is refused \(L\d.resid_pre: explains -\d.*, less than the mean activation"),
    ("other origin", r"other origin is refused \(L\d.resid_pre: explains -\d"),
    ("other width", "other width is refused .*takes activations of width 64, and this model holds 128"),
    ("layers in reverse", "layers in reverse is refused .*it is of another layer"),
])
def test_wrong_saes_are_refused(model, part, values, truth, trained, kind, message):
    with pytest.raises(ValueError, match=f"no SAEs are left to evaluate: {message}"):
        evaluate(model, part, values, truth, wrong_saes(kind, trained), progress=False)


def not_a_number(trained): return load_saes([replace(sae, encoder=lambda x: x.new_full((len(x), sae.d_sae), torch.nan))
                                             for sae in trained], "not a number")


def dead(trained): return load_saes([replace(sae, encoder=lambda x: x.new_zeros(len(x), sae.d_sae))
                                     for sae in trained], "dead")


def test_one_refused_set_does_not_end_the_run_of_the_others(model, part, values, truth, trained):
    bad = [not_a_number(trained), dead(trained), wrong_saes("layers in reverse", trained)]
    report = evaluate(model, part, values, truth, [*bad, trained], **ALONE)
    card, notes = report.scorecard(), "\n".join(report.notes)
    assert card.fit[trained.name] == "good" and card.score[trained.name] > 0.5
    causes = "latents that are nan or infinite", "dead: no latent is active", "it is of another layer"
    for saes, cause in zip(bad, causes):
        assert card.fit[saes.name] == "refused" and pd.isna(card.score[saes.name]) and saes.name not in report.evidence
        assert f"{saes.name} at L" in notes and cause in notes


def test_a_refused_set_is_scored_when_forced_and_the_report_says_so(model, part, values, truth, trained):
    reverse = wrong_saes("layers in reverse", trained)
    report = evaluate(model, part, values, truth, [reverse, not_a_number(trained)], force=True, **ALONE)
    card = report.scorecard()
    assert card.fit[reverse.name] == "refused, forced" and card.score[reverse.name] >= 0
    assert report.settings["force"] is True and "refused, forced" in str(report)
    assert card.fit["not a number"] == "refused" and "not a number" not in report.evidence


def test_names_are_unique_and_not_those_of_baselines(model, part, values, truth, trained):
    unnamed = [load_saes([replace(sae, b_dec=sae.b_dec + shift) for sae in trained]) for shift in (0, 0.01)]
    assert unnamed[0].name != unnamed[1].name
    assert set(evaluate(model, part, values, truth, unnamed, **ALONE).evidence) >= {saes.name for saes in unnamed}
    for name in ("supervised", "identity", "mean ablation", "no edit", "PCA-4"):
        with pytest.raises(ValueError, match=f"an SAE set is called '{name}', which is what a baseline is called"):
            evaluate(model, part, values, truth, replace(trained, name=name), **ALONE)
    with pytest.raises(ValueError, match="several SAE sets are called 'a'"):
        evaluate(model, part, values, truth, [replace(trained, name="a"), replace(unnamed[0], name="a")], **ALONE)


def test_recomputed_scale_and_pattern_reach_every_test(model, part, values, truth, trained):
    how = dict(ks=(1, 4), twins=False, progress=False)
    frozen, recomputed = (evaluate(model, part, values, truth, trained, scale=scale, **how).table
                          for scale in ("frozen", "recomputed"))
    asked = ((1, "fraction recovered"), (1, "sparse faithfulness"), (2, "edit effect"), (2, "weight removed"),
             (3, "coverage by named units"))
    for test, metric in asked:
        a, b = (t[(t.sae == trained.name) & (t.test == test) & (t.metric == metric)].value.to_numpy()
                for t in (frozen, recomputed))
        assert len(a) and np.abs(a - b).max() > 1e-5, f"{metric} is the same with another scale"


# Results as they come

def test_what_is_known_is_given_after_each_section_but_the_last(model, part, io_sections, truth, trained, tmp_path):
    given, how = [], dict(tests=(1, 3), twins=False, progress=False)
    whole = evaluate(model, part, io_sections, truth, trained, on_section=given.append, **how)
    n = len(io_sections)
    assert [r.settings["partial"] for r in given] == [f"{i} of {n} cross-sections" for i in range(1, n)]
    assert "partial" not in whole.settings and "(partial: 1 of" in str(given[0]).splitlines()[0]
    assert list(given[0].sections.section) == [io_sections[0].name]
    of_first = whole.table[whole.table.section == io_sections[0].name].reset_index(drop=True)
    pd.testing.assert_frame_equal(given[0].table, of_first)
    for report in (*given, whole): report.save(tmp_path)  # each in the place of the one before
    assert "partial" not in SageReport.load(tmp_path).settings


def test_an_interrupted_evaluation_leaves_what_was_given(model, part, io_sections, truth, trained, tmp_path):
    def stop(report):
        report.save(tmp_path)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, part, io_sections, truth, trained, on_section=stop, **ALONE)
    kept = SageReport.load(tmp_path)
    assert kept.settings["partial"].startswith("1 of") and not list(tmp_path.glob("*.part"))
    evaluate(model, part, io_sections[:1], truth, trained, **ALONE)  # nothing is left hooked


def test_a_shuffled_b_dec_shows_in_the_variance_explained(model, part, trained):
    g, layers = torch.Generator().manual_seed(0), range(4)
    shuffled = [replace(s, b_dec=s.b_dec[torch.randperm(128, generator=g)]) for s in map(trained.before, layers)]
    nodes = [Node("v", layer, 0, "END") for layer in layers]
    good, bad = (check_saes(model, part, s, nodes) for s in (trained, load_saes(shuffled)))
    for layer in layers:
        place = str(trained.before(layer).node)
        assert bad.loc[place, "variance explained"] < good.loc[place, "variance explained"]
        assert 0.9 <= good.loc[place, "loss recovered"] <= 1.02
        assert bad.loc[place, "L0"] == good.loc[place, "L0"], "the encoder is the same"
        prompts = part.test.prompts[:64]
        x = capture(model, prompts, [Node("resid_pre", layer)])[Node("resid_pre", layer)]
        x = torch.cat([row[1 : end + 1] for row, end in zip(x, prompts.index("END"))]).double()
        sae = trained.before(layer)
        x_hat = sae.dense_encode(x.float()) @ sae.W_dec + sae.b_dec
        r2 = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        assert good.loc[place, "variance explained"] == pytest.approx(r2.item(), abs=1e-5)


def test_wrong_requests_say_what_is_wrong(model, part, sections, values, truth, trained, tmp_path):
    with pytest.raises(ValueError, match="there is no cross-section to evaluate on: Pos +no cross-section: largest"):
        nowhere = replace(sections, sections=(), scores={"Pos": sections.scores["Pos"]})
        evaluate(model, part, nowhere, truth, trained)
    nothing_counts = "no cross-section counts: IO:v@IO: fraction recovered .* is not within 0 of 1"
    with pytest.raises(ValueError, match=nothing_counts):
        evaluate(model, part, values, truth, trained, criteria=Criteria(tolerance=0), **ALONE)
    with pytest.raises(ValueError, match="no SAE of the residual stream before layer"):
        evaluate(model, part, values, truth, [perfect(0)], progress=False)
    with pytest.raises(FileNotFoundError, match="report.json is missing"): SageReport.load(tmp_path)
    with pytest.raises(ValueError, match="neither embedded"): load_saes("no-such-saes")
    with pytest.raises(ValueError, match="cfg.json"): load_saes(tmp_path)
    with pytest.raises(TypeError, match="are neither a name, a folder nor an iterable"): load_saes(7)


def test_an_empty_list_of_saes_is_refused(model, part, values, truth):
    with pytest.raises(ValueError, match="SAE"): evaluate(model, part, values, truth, [], progress=False)


# Reports

@pytest.fixture(scope="module")
def hostile(model, part, values):
    "A report in which every name that a user can choose is an attack on the page."
    attack = "<b onclick=alert(1)>IO"
    edits = {attack if a == "IO" else a: c for a, c in part.counterfactuals.items()}
    attributes = part.attributes.rename(columns={"IO": attack})
    task = replace(part, name="<script>alert('task')</script>", attributes=attributes, counterfactuals=edits)
    section, scores = replace(values[0], attribute=attack), values.scores["IO"]
    truth = fit_dictionaries(model, task, [section])
    saes = load_saes([perfect(layer) for layer in range(4)], "<img src=x onerror=alert(1)>")
    renamed = replace(values, sections=(section,), scores={section.attribute: scores})
    return evaluate(model, task, renamed, truth, saes, ks=(1, 4), twins=False, progress=False)


def not_json(constant): raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_a_saved_report_is_read_back_as_it_was(request, which, tmp_path):
    report = request.getfixturevalue(which)
    assert report.save(tmp_path) == tmp_path / "report.html"
    files = ["evidence.safetensors", "explorers.json", "report.html", "report.json", "table.csv"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=not_json)
    again = SageReport.load(tmp_path)
    for name in ("table", "scores", "sections", "latents", "values"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(report, name), check_exact=True, check_dtype=False)
    pd.testing.assert_frame_equal(again.parts(), report.parts(), check_exact=True)
    assert again.settings == report.settings and again.notes == report.notes
    before, after = ([(name, e.record()) for name, e in r.explorers.items()] for r in (report, again))
    assert before == after
    assert str(again.discovery) == str(report.discovery)
    assert again.to_json() == report.to_json()


def tensors_of(numbers, name):
    "The tensors of nested NamedTuples, by the path to each."
    if isinstance(numbers, torch.Tensor): return {name: numbers}
    tensors = {}
    for field, part in numbers._asdict().items(): tensors |= tensors_of(part, f"{name}.{field}")
    return tensors


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_every_tensor_of_the_evidence_comes_back_by_its_name(request, which, tmp_path):
    report = request.getfixturevalue(which)
    report.save(tmp_path)
    again, expected = SageReport.load(tmp_path), {}
    assert list(again.evidence) == list(report.evidence)
    for method, evidence in report.evidence.items():
        read = again.evidence[method]
        for a, b in zip(read, evidence, strict=True):
            assert (a.section, a.measure, a.weight, a.own.asked) == (b.section, b.measure, b.weight, b.own.asked)
        for i, (before, after) in enumerate(zip(evidence, read)):
            for whose in ("own", "planted"):
                wanted, got = (tensors_of(getattr(e, whose), whose) for e in (before, after))
                assert list(wanted) == list(got)
                for name, x in wanted.items(): torch.testing.assert_close(got[name], x, rtol=0, atol=0)
                expected |= {f"{method}|{i}|{name}": x for name, x in wanted.items()}
    saved = load_file(tmp_path / "evidence.safetensors")
    assert set(saved) == set(expected)
    parts = {FLOOR: "own.sparse.left_out", SKYLINE: "planted.named.success", IDENTITY: "own.values.holds"}
    for name, part in parts.items(): assert f"{name}|0|{part}" in saved
    for name, x in expected.items(): torch.testing.assert_close(saved[name], x, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["NaN", "BaNaNa SAE", "Infinity", "null", 'a "quoted" \\ name', "naïve ☃", "1e3"])
def test_any_name_survives_saving(report, name, tmp_path):
    table, scores = (frame.replace({"sae": {FLOOR: name}}) for frame in (report.table, report.scores))
    renamed = replace(report, table=table, scores=scores, notes=[name])
    renamed.save(tmp_path)
    again = SageReport.load(tmp_path)
    assert again.table.sae[0] == again.scores.sae[0] == again.notes[0] == name


@pytest.mark.parametrize("name", ["costs $5 or $6", r"$\frac{$", "under_score^hat", "_hidden", "naïve"])
def test_any_name_can_be_drawn(report, name):
    named = report.table.replace({"sae": {FLOOR: name}}).assign(section=report.table.section + name)
    to_html(replace(report, table=named).plot(), name)


def test_numbers_that_are_not_finite_are_saved_as_strict_json(report, tmp_path):
    odd = replace(report, table=report.table.assign(value=float("nan"), lo=float("-inf"), hi=float("inf")))
    json.loads(odd.to_json(), parse_constant=not_json)


@pytest.mark.parametrize("schema", [1, 2, 3, 4, 99])
def test_a_report_of_another_schema_is_refused(report, tmp_path, schema):
    report.save(tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(data | {"schema": schema}))
    (tmp_path / "evidence.safetensors").unlink()  # is not looked at
    with pytest.raises(ValueError, match=f"has schema {schema}, this version reads 5: evaluate again"):
        SageReport.load(tmp_path)


class Page(HTMLParser):
    "Tags, attributes and text of a page."
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data): self.text += data


def scripts_of(html):
    "What the page would run, and its data."
    found = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.S)
    return [text for about, text in found if "json" not in about], [text for about, text in found if "json" in about]


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_the_page_needs_no_other_file_and_runs_no_script_but_the_package_s(request, which, tmp_path):
    html = request.getfixturevalue(which).save(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert {"h1", "h2", "table", "svg", "style"} <= page.tags
    assert not page.tags & {"link", "iframe", "object", "embed", "base", "form"}
    addresses = [v for k, v in page.attributes if k in ("src", "href", "srcset", "data")]
    outside = [v for v in addresses if v[:5] != "data:" and v[0] != "#"]
    assert not outside
    assert not [k for k, _ in page.attributes if k.startswith("on")], "an event handler"
    assert "@import" not in html and not re.search(r"url\((?!#)", html) and "default-src 'none'" in html
    own = {path.read_text(encoding="utf-8") for path in (Path(sage_nb.__file__).parent / "views/assets").glob("*.js")}
    run, data = scripts_of(html)
    assert run and set(run) <= own
    for text in data: json.loads(text)
    if which == "hostile":
        for name in ("<script>alert('task')</script>", "<img src=x onerror=alert(1)>", "<b onclick=alert(1)>IO"):
            assert name in page.text


def test_the_scorecard_prints_and_names_what_it_is_of(report, trained):
    text = str(report)
    assert text.startswith("SAGE scorecard: ioi on tiny-gpt2")
    assert all(name in text for name in (trained.name, FLOOR, SKYLINE, IDENTITY))
    assert report.scorecard().index[0] == FLOOR
    assert report.settings["task"]["seed"] == 0 and len(report.settings["model"]["hash"]) == 16
