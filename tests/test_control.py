"""Test 2 recomputed by brute force and prompt by prompt, edits whose outcome is known, and what must be refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import added, kept_share, patched, plain_readable, read_share, run_cost
from torch.testing import assert_close

from sage_nb.core.activations import Node, Prompts, capture, count_passes
from sage_nb.core.intervals import interval, intervals, means
from sage_nb.measures.certificate import certify
from sage_nb.measures.control import (
    KS, METRICS, NO_EDIT, OVER_K, SKYLINE, Control, EditOutcomes, control, controllability, effect_agreement,
    gather_control, isolation, run_edits, summarise_control)
from sage_nb.measures.edits import LatentEdits, choose_edits, find_edits, greedy, read_latents, shares
from sage_nb.report.trials import Settings, try_section
from sage_nb.views.plots import plot_control
from sage_nb.saes.baselines import identity_sae
from sage_nb.saes.reconstruction import Decomposition, decompose
from sage_nb.saes.sets import SAESet
from sage_nb.truth.dictionaries import Dictionaries
from sage_nb.truth.runs import Outcome, set_up

NAMES = ("IO:v@IO", "S:k@S1", "S:z@END")


@pytest.fixture(scope="module")
def part(task):
    "All training prompts and every sixth of the held-out ones."
    return task[~task.held_out | (torch.arange(len(task)) % 6 == 0)]


@pytest.fixture(scope="module")
def topk(sae_sets): return sae_sets["tiny-gpt2-res-topk"]


def named(sections, name): return next(s for s in sections if s.name == name)


@pytest.fixture(scope="module")
def benches(model, part, sections, truth):
    return {name: set_up(model, part, named(sections, name), truth).editing for name in NAMES}


def fresh(bench):
    "The same bench, nothing that it makes on demand made yet."
    return replace(bench)


@pytest.fixture(scope="module")
def controls(benches, topk):
    for bench in benches.values(): read_latents(bench, topk)  # asks the model once whether it holds what is claimed
    return {name: control(fresh(bench), [topk]) for name, bench in benches.items()}


# Choosing

def by_brute_force(moves, missing, k):
    "For one prompt: try every move that is left, and make the one that comes nearest, if it comes nearer."
    left, rest, picks = dict(enumerate(moves)), missing, []
    while left and len(picks) < k:
        away = {i: (rest - w) @ (rest - w) for i, w in left.items()}
        best = min(left, key=lambda i: (away[i], i))
        if not away[best] < rest @ rest: break
        rest = rest - left.pop(best)
        picks.append(best)
    return picks


whole_numbers = st.integers(-4, 4)  # so that both ways are exact, and ties are ties


def vectors(d, n): return st.lists(st.lists(whole_numbers, min_size=d, max_size=d), min_size=n, max_size=n)


@given(st.integers(1, 3).flatmap(lambda d: st.tuples(
    st.lists(vectors(d, 4), min_size=1, max_size=3),
    st.lists(whole_numbers, min_size=3 * d, max_size=3 * d), st.integers(1, 6))))
def test_greedy_equals_brute_force(case):
    rows, missing, k = case
    moves = torch.tensor(rows, dtype=torch.float)
    missing = torch.tensor(missing, dtype=torch.float).reshape(3, -1)[: len(rows)]
    picks = greedy(moves, missing, k).tolist()
    expected = [by_brute_force(m, r, k) for m, r in zip(moves, missing)]
    assert [[i for i in row if i >= 0] for row in picks] == expected
    for row in picks:
        stop = row.index(-1) if -1 in row else len(row)
        assert all(i == -1 for i in row[stop:]), "steps that do nothing stand last"


def dense_picks(source, target, U, V, missing, k):
    "The same from all latents: prompts × (latents out, then latents in) × d."
    moves = torch.cat([-source[..., None] * U, target[..., None] * V], 1)
    left, picks = torch.ones(moves.shape[:2], dtype=torch.bool), []
    for _ in range(k):
        away = (missing[:, None] - moves).square().sum(-1).masked_fill(~left, torch.inf)
        value, best = away.min(1)
        gains = value < missing.square().sum(-1)
        picks.append(torch.where(gains, best, -1))
        left[torch.arange(len(best)), best] = False
        missing = missing - moves[torch.arange(len(best)), best] * gains[:, None]
    return torch.stack(picks, 1)


def made_of(latents, indices) -> Decomposition:
    "A decomposition without bias and error."
    nothing = torch.zeros(len(latents), latents.shape[-1])
    node = Node("q", 0, 0, "END")
    return Decomposition(latents, indices, nothing, nothing, torch.zeros_like(indices), (node,), "direct")


def sparse(codes, U) -> Decomposition:
    "The active latents of dense codes as parts."
    active = int((codes != 0).sum(1).max())
    indices = codes.abs().topk(active, 1).indices
    return made_of(codes.gather(1, indices)[..., None] * U[indices], indices)


@pytest.mark.parametrize("seed", range(4))
def test_choosing_among_the_active_equals_choosing_among_all(seed):
    g, prompts, latents, d = torch.Generator().manual_seed(seed), 7, 150, 5
    U, V = torch.randn(2, latents, d, generator=g).double()
    source, target = torch.relu(torch.randn(2, prompts, latents, generator=g).double() - 1.5)
    source[0] = 0  # a prompt without active latents
    x, a_t = source @ U + torch.randn(prompts, d, generator=g), target @ V
    edits = choose_edits(x, a_t, sparse(source, U), sparse(target, V), 12)
    expected = dense_picks(source, target, U, V, a_t - x, 12)
    picks = torch.where(edits.latents < 0, -1, edits.latents + latents * edits.adds)
    steps = picks.shape[1]
    assert torch.equal(picks, expected[:, :steps]) and (expected[:, steps:] == -1).all()
    for k in range(13):  # what an edit is, and the weight it removes, latent by latent
        for p in range(prompts):
            whole, edited, removed = source[p] @ U, x[p], 0.0
            for i in [i for i in expected[p, :k].tolist() if i >= 0]:
                if i >= latents:
                    edited = edited + target[p, i - latents] * V[i - latents]
                    continue
                out = source[p, i] * U[i]
                edited = edited - out
                removed += (out @ whole / (whole @ whole)).item()
            assert_close(edits.edit(x, k)[p], edited)
            assert edits.removed(k)[p].item() == pytest.approx(removed)
            assert edits.count(k)[p] == (expected[p, :k] >= 0).sum()


def test_where_nothing_is_missing_nothing_is_done():
    U = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.eye(9)[:3]
    edits = choose_edits(codes @ U, codes @ U, sparse(codes, U), sparse(codes, U), 5)
    assert edits.count(5).tolist() == [0, 0, 0] and edits.removed(5).tolist() == [0, 0, 0]
    assert_close(edits.edit(codes @ U, 5), codes @ U)


pairs_of_numbers = st.tuples(st.integers(-5, 5), st.integers(-5, 5))


@given(st.lists(st.lists(pairs_of_numbers, min_size=3, max_size=3), min_size=1, max_size=4))
def test_shares_add_up_to_one(rows):
    latents = torch.tensor(rows, dtype=torch.double)
    whole = latents.sum(1)
    total = shares(made_of(latents, torch.arange(3).expand(len(rows), -1))).sum(1)
    assert_close(total, (whole.square().sum(1) > 0).double())


@pytest.mark.parametrize("site", ["q", "k", "v", "z"])
def test_moves_take_latents_out_and_put_others_in_and_come_nearer(random_model, site):
    "In every architecture, and with latents active at many tokens."
    model, g = random_model, torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 200, (2, 3, 9), generator=g)
    prompts, other = (Prompts(t, {"END": torch.tensor([8, 6, 7])}) for t in tokens)
    node = Node(site, 1, 0, "END")
    saes = SAESet("identity", {Node("resid_pre", 1): identity_sae(model.cfg.d_model, Node("resid_pre", 1))})
    both = [decompose(model, p, [node], saes)[node] for p in (prompts, other)]
    source, target = (part.by_latent() for part in both)
    assert source.latents.shape[1] <= model.cfg.d_model, "one entry per latent, not per token"
    x, a_t = capture(model, prompts, [node])[node], capture(model, other, [node])[node]
    near = choose_edits(x, a_t, source, target, 40)
    away = torch.stack([(near.edit(x, k) - a_t).norm(dim=1) for k in range(41)])
    assert (away.diff(dim=0) < 1e-4).all() and (away[-1] < away[0]).all()
    for i, (out, put) in enumerate(zip(*map(added, both))):
        moves = [(latent, adds) for latent, adds in zip(near.latents[i].tolist(), near.adds[i].tolist()) if latent >= 0]
        change = sum(put[node_of(saes), latent] if adds else -out[node_of(saes), latent] for latent, adds in moves)
        assert len(set(moves)) == len(moves) > 0
        np.testing.assert_allclose(near.edit(x, 40)[i].numpy(), x[i].numpy() + change, rtol=1e-3, atol=1e-4)


def node_of(saes): return next(iter(saes)).node


# Reading

def test_latents_are_read_of_counterfactuals_only_where_asked(benches, topk):
    bench = benches["S:z@END"]
    n, nodes = len(bench.task), bench.section.nodes
    read_latents(bench, topk)  # asks the model once whether it holds what is claimed
    with count_passes(bench.model, n) as passes: both = read_latents(bench, topk)
    small = replace(bench, batch_size=7)
    with count_passes(bench.model, n) as half: alone = read_latents(small, topk, counterfactuals=False)
    assert (passes.forward, half.forward) == (2 * read_share(bench), read_share(bench))
    assert alone.counterfactual is None
    assert set(alone.source) == set(both.source) == set(both.counterfactual) == set(nodes)
    for node in nodes:
        for some, prompts in ((alone.source, bench.task.prompts), (both.source, bench.task.prompts),
                              (both.counterfactual, bench.counterfactual.prompts)):
            expected = added(decompose(bench.model, prompts, [node], topk)[node])
            for here, wanted in zip(added(some[node]), expected, strict=True):
                assert set(here) == set(wanted)
                for unit, c in here.items(): np.testing.assert_allclose(c, wanted[unit], rtol=1e-4, atol=1e-4)


def test_the_size_of_batches_does_not_change_edits(benches, topk):
    bench = benches["S:k@S1"]
    batched = replace(bench, batch_size=5)
    whole, parts = (find_edits(b, read_latents(b, topk), 4) for b in (bench, batched))
    for node, x in bench.acts.items():
        for k in range(1, 5): assert_close(parts[node].edit(x, k), whole[node].edit(x, k), rtol=1e-4, atol=1e-4)


# Running

def plain_edit(x, goal, s, t, k):
    "One activation after an edit by brute force, the weight removed and the moves made; `s` and `t` hold the latents."
    moves, whole = torch.cat([-s, t]), s.sum(0)
    picks = by_brute_force(moves, goal - x, k)
    removed = sum((s[i] @ whole / (whole @ whole)).item() for i in picks if i < len(s))
    return (x + sum(moves[picks]) if picks else x), removed, len(picks)


def plain_control(bench, saes, ks):
    "Every number for one prompt after the other, each edit run by itself."
    model, task, nodes, cf = bench.model, bench.task, bench.section.nodes, bench.counterfactual
    n, others, parts = len(task), plain_readable(bench), {}
    for node in nodes:
        parts[node] = [decompose(model, p, [node], saes)[node].by_latent().latents for p in (task.prompts, cf.prompts)]

    def metric(logits, i): return (logits[task.answers[i]] - logits[cf.distractors[i]]).item()
    expected = {name: np.full((n, len(ks)), np.nan) for name in ("success", "got", "removed", "isolation", "moves")}
    floor, wanted = np.zeros(n), np.zeros(n)
    for i in range(n):
        source, goal = ({node: acts[node][i] for node in nodes} for acts in (bench.acts, bench.goal))
        clean, target = patched(model, task, {}, i), patched(model, task, goal, i)
        floor[i] = clean.argmax() == target.argmax()
        wanted[i] = metric(target, i) - metric(clean, i)
        for j, k in enumerate(ks):
            made = {node: plain_edit(source[node], goal[node], *(p[i] for p in parts[node]), k) for node in nodes}
            edited, removed, moves = ([edit[part] for edit in made.values()] for part in range(3))
            edited = dict(zip(nodes, edited))
            logits = patched(model, task, edited, i)
            expected["success"][i, j] = logits.argmax() == target.argmax()
            expected["got"][i, j] = metric(logits, i) - metric(clean, i)
            expected["removed"][i, j] = np.mean(removed)
            expected["moves"][i, j] = np.mean(moves)
            expected["isolation"][i, j] = kept_share(bench, edited, i, others)
    return expected, floor, wanted, others


@pytest.mark.parametrize("name", NAMES)
def test_control_equals_edits_made_one_prompt_at_a_time(benches, topk, name):
    bench, ks = benches[name].at(torch.arange(12)), (1, 3, 6)
    made = control(bench, [topk], ks)
    expected, floor, wanted, others = plain_control(bench, topk, ks)
    assert list(made.readable) == others and (name == "S:k@S1") == (others == ["Pos"])
    table = summarise_control(made).set_index(["sae", "metric", "k"]).value

    def ours(metric): return [table[topk.name, metric, k] for k in ks]
    effect = (expected["got"] * wanted[:, None]).sum(0) / (wanted**2).sum()
    assert ours("edit success") == pytest.approx(expected["success"].mean(0), abs=2e-4)
    assert ours("edit effect") == pytest.approx(effect, rel=1e-3, abs=2e-4)
    assert ours("weight removed") == pytest.approx(expected["removed"].mean(0), abs=2e-4)
    assert ours("moves") == pytest.approx(expected["moves"].mean(0))
    assert ours("isolation") == pytest.approx(expected["isolation"].mean(0), nan_ok=True)
    assert table[topk.name].loc["mean edit success"].item() == pytest.approx(expected["success"].mean())
    assert table[NO_EDIT].loc["edit success"].item() == pytest.approx(floor.mean())
    assert table[NO_EDIT].loc["edit effect"].item() == 0


def by_k(tokens, metrics, removed):
    "The outcomes of four prompts, written k by k."
    ones, weight = torch.ones(4, len(tokens)), torch.tensor(removed).expand(4, -1)
    return EditOutcomes(torch.tensor(tokens).T, torch.tensor(metrics).T, ones, weight, ones)


@pytest.fixture(scope="module")
def four_prompts():
    "Four prompts whose outcomes are written down."
    clean = Outcome(torch.tensor([2.0, 2.0, 2.0, 2.0]), torch.tensor([1, 1, 1, 1]))
    target = Outcome(torch.tensor([-2.0, -2.0, 0.0, 2.0]), torch.tensor([0, 0, 0, 1]))  # effects wanted: -4, -4, -2, 0
    skyline = by_k([[0, 0, 1, 1]], [[-2.0, -2.0, 2.0, 2.0]], [0.4])
    ours = by_k([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]],
                [[2.0] * 4, [0.0, 0.0, 1.0, 2.0], [-8.0, -8.0, -3.0, 2.0]], [0.1, 0.4, 1.0])
    return Control("IO:z@END", (1, 2, 4), clean, target, skyline, {"ours": ours}, ("S",), 1.0)


def test_normalised_numbers_by_hand(four_prompts):
    c = four_prompts
    e = {metric: [x.value for x in values] for metric, values in c.estimates("ours").items()}
    assert e["edit success"] == [0.25, 0.5, 1.0] and e["mean edit success"] == [pytest.approx(1.75 / 3)]
    effects = [0.0, (8 + 8 + 2) / 36, (40 + 40 + 10) / 36]
    assert e["edit effect"] == pytest.approx(effects)
    sky = c.edge(SKYLINE)
    assert sky["edit success"].value == 0.75 and sky["edit effect"].value == pytest.approx(32 / 36)
    m = means(c.evidence(c.methods["ours"]))
    # (0.25 - 0.25, 0.5 - 0.25, 1 - 0.25) / 0.5, the last clipped
    assert_close(controllability(m, c.ks), torch.tensor((0 + 2 * 0.5 + 1) / 4, dtype=torch.double))
    agreement = [max(1 - abs(1 - x), 0) / (32 / 36) for x in effects]
    expected = (agreement[0] + 2 * agreement[1] + agreement[2]) / 4
    assert controllability(m, c.ks, "effect").item() == pytest.approx(expected)
    assert e["edit magnitude"] == pytest.approx([-0.5, 0.0, 1.0])


def test_evidence_by_hand(four_prompts):
    evidence = four_prompts.evidence(four_prompts.methods["ours"])
    assert evidence.edits.success.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 1], [1, 1, 1]]
    assert evidence.edits.product.tolist() == [[0, 8, 40], [0, 8, 40], [0, 2, 10], [0, 0, 0]]
    assert evidence.floor.success.tolist() == [[0], [0], [0], [1]]
    assert evidence.floor.product.tolist() == [[0]] * 4
    assert evidence.skyline.success.tolist() == [[1], [1], [0], [1]]
    assert evidence.skyline.product.tolist() == [[16], [16], [0], [0]]
    assert evidence.target.success.tolist() == [[1]] * 4
    assert evidence.target.product.tolist() == [[16], [16], [4], [0]]
    assert_close(evidence.removed, torch.tensor([[0.1, 0.4, 1.0]] * 4).double())
    assert_close(evidence.skyline_removed, torch.tensor([[0.4]] * 4).double())


def new_steps(edits, ks):
    "For each k, the prompts to which some node makes a move that it did not make before."
    counts = torch.stack([torch.stack([e.count(k) for e in edits.values()], 1) for k in (0, *ks)])
    return (counts.diff(dim=0) != 0).any(2)


def test_every_prompt_is_run_only_when_its_edit_has_changed(benches, controls, topk):
    saved = []
    for name, bench in benches.items():
        edits, n = find_edits(bench, read_latents(bench, topk)), len(bench.task)
        steps = new_steps(edits, KS)
        runs = sum(run_cost(bench, rows) for rows in steps) + run_cost(bench)  # the last is the skyline
        assert controls[name].passes == pytest.approx(runs / n + 2 * read_share(bench)), "nodes are seen twice"
        saved.append(len(KS) * n - steps.sum().item())
        made = controls[name].methods[topk.name]
        for j, k in enumerate(KS):
            outcome = bench.outcome({node: e.edit(bench.acts[node], k) for node, e in edits.items()})
            assert torch.equal(made.token[:, j], outcome.token)
            assert_close(made.metric[:, j], outcome.metric, rtol=1e-4, atol=1e-4)
    assert any(saved), "in some section prompts have nothing left to gain"


def test_no_step_no_run(benches):
    "Edits written down: the first prompt gets none, the second one at k = 1, the third its second one at k = 4."
    bench = benches["IO:v@IO"].at(torch.arange(3))
    made = torch.tensor([[False] * 4, [True, False, False, False], [True, False, False, True]])
    edits = {}
    for node, x in bench.acts.items():
        steps = (bench.goal[node] - x)[:, None] * made[..., None] / 2
        edits[node] = LatentEdits(steps, torch.where(made, 5, -1), 0 * made.long(), made, 0.25 * made)
    with count_passes(bench.model, 1) as passes: outcomes = run_edits(bench, edits, (1, 2, 4))
    steps = [1, 2], [], [2]  # of 1, 2 and 4 moves
    assert passes.forward == pytest.approx(sum(run_cost(bench, rows) for rows in steps))
    halfway = bench.outcome({node: (x + bench.goal[node]) / 2 for node, x in bench.acts.items()})
    expected = [[bench.untouched.metric[0]] * 3, [halfway.metric[1]] * 3,
                [halfway.metric[2], halfway.metric[2], bench.target.metric[2]]]
    assert_close(outcomes.metric, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert outcomes.moves.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 2]]
    assert outcomes.removed.tolist() == [[0, 0, 0], [0.25] * 3, [0.25, 0.25, 0.5]]
    nothing = {node: e.at(torch.tensor([0, 0, 0])) for node, e in edits.items()}
    with count_passes(bench.model, 1) as passes: outcomes = run_edits(bench, nothing, KS)
    assert passes.forward == 0 and torch.equal(outcomes.metric, bench.untouched.metric[:, None].expand(3, len(KS)))


def test_the_supervised_edit_and_the_target_are_run_once_per_bench(model, part, sections, truth, topk):
    section, n = named(sections, "IO:v@IO"), len(part.test)
    with count_passes(model, n) as passes: bench = set_up(model, part, section, truth)
    share, reading = run_cost(bench) / n, read_share(bench)
    assert passes.forward == pytest.approx(2 + 2 * reading + 2 * share), "clean twice, two captures; ablated, target"
    with count_passes(model, n) as passes: certify(bench)
    assert passes.forward == pytest.approx(3 * share), "two for test 1, one for the supervised edit"
    with count_passes(model, n) as passes: alone = control(bench, [])
    assert passes.forward == alone.passes == 0
    edits = find_edits(bench, read_latents(bench, topk))
    with count_passes(model, n) as passes: beside = control(bench, [topk])
    runs = sum(run_cost(bench, rows) for rows in new_steps(edits, KS))
    assert passes.forward == beside.passes == pytest.approx(2 * reading + runs / n)
    assert torch.equal(alone.skyline.metric, beside.skyline.metric)
    other = fresh(bench)
    with count_passes(model, n) as passes: control(other, [])
    with count_passes(model, n) as again: certify(other)
    assert (passes.forward, again.forward) == pytest.approx((share, 2 * share)), "whichever comes first"


def test_smaller_k_do_not_depend_on_larger_ones(benches, controls, topk):
    few, more = control(benches["IO:v@IO"], [topk], (1, 2)), controls["IO:v@IO"]
    for a, b in zip(few.methods[topk.name], more.methods[topk.name]):
        assert_close(a, b[:, :2], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_when_everything_is_exchanged_the_target_is_reached(benches):
    bench = benches["IO:v@IO"].at(torch.arange(16))
    read = read_latents(bench, SAESet("identity", {node: identity_sae(32, node) for node in bench.section.nodes}))
    edits = {}
    for node, source in read.source.items():
        target = read.counterfactual[node]
        moves, adds = torch.cat([-source.latents, target.latents], 1), torch.arange(64).expand(16, 64) >= 32
        weight = torch.cat([shares(source), torch.zeros(16, 32)], 1)
        edits[node] = LatentEdits(moves, torch.cat([source.indices, target.indices], 1), 0 * adds.long(), adds, weight)
    outcomes = run_edits(bench, edits, (64,))
    assert_close(outcomes.token[:, 0], bench.target.token)
    assert_close(outcomes.metric[:, 0], bench.target.metric, rtol=1e-3, atol=1e-3)
    assert_close(outcomes.removed, torch.ones(16, 1))
    e = gather_control(bench, {"identity": outcomes}, (64,)).estimates("identity")
    assert e["edit success"][0].value == 1 and e["edit effect"][0].value == pytest.approx(1, abs=1e-3)
    assert 0.99 < e["controllability"][0].value <= 1


def test_isolation_counts_what_the_counterfactual_does_not_change(benches, truth):
    bench = benches["S:k@S1"]  # Pos can be read here
    assert list(bench.readings) == ["Pos"]
    labels, attributes = truth[bench.section.nodes[0]]["Pos"].labels, bench.task.attributes
    flipped = attributes.Pos.map(dict(zip(labels, labels[::-1])))
    other = {node: truth[node].edit(x, "Pos", attributes, flipped) for node, x in bench.acts.items()}
    assert isolation(bench, bench.acts).eq(1).all() and isolation(bench, bench.goal).eq(1).all()
    assert isolation(bench, other).mean() < 0.2
    mixing = replace(bench, goal=other)
    assert isolation(mixing, other).eq(1).all(), "what the counterfactual changes too is no fault"
    nothing = benches["S:z@END"]
    assert nothing.readings == {} and isolation(nothing, nothing.goal).isnan().all()


# What is said of it

def test_what_is_undefined_is_said_and_left_out(controls, topk):
    made = controls["S:k@S1"]
    table = summarise_control(made)
    assert made.bounds.measure == "effect" and table[table.metric == "normalised success"].value.isna().all()
    why = "S:k@S1: normalised success is undefined: the supervised edit succeeds in"
    assert any(note.startswith(why) for note in made.notes)
    still = made.skyline._replace(token=made.clean.token[:, None], metric=made.clean.metric[:, None])
    nothing = replace(made, target=made.clean, skyline=still)
    assert nothing.bounds.measure is None
    assert summarise_control(nothing).query("metric == 'controllability'").value.isna().all()
    undefined = [note.split(" is ")[0].split(": ")[1] for note in nothing.notes]
    assert undefined[:2] == ["normalised success", "normalised effect"]
    assert set(nothing.estimates(topk.name)) == set(METRICS)


def test_wrong_requests_are_refused(benches, topk):
    bench = benches["S:z@END"]
    for ks in ((), (0, 1), (2, 2), (4, 1)):
        with pytest.raises(ValueError, match="are not ascending numbers from 1"): control(bench, [topk], ks)
    with pytest.raises(TypeError, match="settings 'write' are no ProjectionSettings"):
        control(bench, [topk], settings="write")


# Prompts that cannot be edited

def without(dictionary, attribute, *labels):
    "The same dictionary without some values of an attribute."
    features = dictionary[attribute]
    keep = [i for i, label in enumerate(features.labels) if label not in labels]
    values = tuple(features.values[i] for i in keep)
    fewer = replace(features, values=values, vectors=features.vectors[keep], counts=features.counts[keep])
    return replace(dictionary, features=tuple(fewer if f is features else f for f in dictionary.features))


@pytest.fixture(scope="module")
def partly(part, benches):
    "A bench, not all of whose prompts can be edited, and the one that it was before."
    bench = benches["IO:v@IO"]
    gone = sorted(set(bench.counterfactual.values))[:3]
    nodes = {node: without(bench.truth[node], "IO", *gone) for node in bench.section.nodes}
    known = torch.tensor([value not in gone for value in bench.task.attributes["IO"]])
    whole = bench.at(known)  # so that only edits need the values that are gone
    return replace(whole, truth=Dictionaries("mse", nodes, bench.truth.fit)), whole


def can_edit(bench):
    "Which prompts have a new value that the dictionaries have, by a plain loop."
    labels = bench.truth[bench.section.nodes[0]]["IO"].labels
    return torch.tensor([value in labels for value in bench.counterfactual.values])


def test_only_what_can_be_edited_is_edited(partly, topk):
    bench, whole = partly
    rows = can_edit(bench)
    assert 2 <= rows.sum() < len(rows)
    assert bench.editing.task.texts == [text for text, row in zip(bench.task.texts, rows) if row]
    assert bench.editing is bench.editing and bench.editing.editing is bench.editing
    made, expected = control(bench, [topk], (2, 4)), control(whole, [topk], (2, 4))
    assert made.clean.token.tolist() == expected.clean.token[rows].tolist()
    for a, b in zip(made.methods[topk.name], expected.methods[topk.name]):
        assert_close(a, b[rows], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert_close(made.skyline.metric, expected.skyline.metric[rows], rtol=1e-4, atol=1e-4)


def test_a_bench_without_a_prompt_that_can_be_edited(benches, part, topk):
    bench = fresh(benches["IO:v@IO"])
    unknown = replace(bench, counterfactual=replace(bench.counterfactual, values=["nobody"] * len(bench.task)))
    none = torch.zeros(len(bench.task), dtype=torch.bool)
    for empty in (unknown.editing, bench.at(none), bench.at(slice(0, 0)), bench.at(none.nonzero()[:, 0])):
        assert len(empty.task) == len(empty.counterfactual.values) == 0
        assert empty.readings == {} and not any(len(x) for x in (empty.clean, empty.ablated))
        for node, x in bench.acts.items():
            assert empty.acts[node].shape == empty.goal[node].shape == empty.means[node].shape == (0, x.shape[1])
        assert not any(len(x) for outcome in (empty.untouched, empty.target) for x in outcome)
    with pytest.raises(ValueError, match="only 0 held-out prompts of cross-section IO:v@IO can be edited"):
        control(unknown, [topk])
    trial = try_section(unknown, part, [topk], Settings(tests=(1, 2)), [topk.name])
    assert trial.control is None and trial.trials[topk.name].edits is None
    assert trial.measure is None and trial.evidence(topk.name).own.asked == (True, False, False)
    assert trial.verdict == "only 0 held-out prompts can be edited"


def test_a_part_of_a_bench_is_the_bench_of_a_part(model, part, sections, truth):
    section = named(sections, "S:z@END")
    bench = set_up(model, part, section, truth)
    rows = torch.tensor([5, 0, 3, 8])
    test = part.test[rows]
    expected = set_up(model, replace(test, held_out=torch.ones(4, dtype=torch.bool)), section, truth)
    mine = bench.at(rows)
    assert mine.task.texts == expected.task.texts and mine.counterfactual.values == expected.counterfactual.values
    for name in ("clean", "ablated"):
        assert_close(getattr(mine, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    for name in ("acts", "goal", "means"):
        for node in section.nodes:
            assert_close(getattr(mine, name)[node], getattr(expected, name)[node], rtol=1e-4, atol=1e-4)
    for name in ("untouched", "target"):
        assert_close(getattr(mine, name).metric, getattr(expected, name).metric, rtol=1e-4, atol=1e-4)
        assert torch.equal(getattr(mine, name).token, getattr(expected, name).token)
    assert_close(mine.supervised.outcome.metric, bench.supervised.outcome.metric[rows], rtol=1e-4, atol=1e-4)


# Scores

@given(st.floats(-3, 5))
def test_effects_agree_most_at_one(e):
    agreement = effect_agreement(torch.tensor(e, dtype=torch.double)).item()
    assert agreement == pytest.approx(e if e <= 1 else 2 - e)


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=2, max_size=12))
def test_intervals_drawn_together_equal_intervals_drawn_alone(rows):
    columns = torch.tensor(rows)
    scores = {"each": lambda m: m, "sum": lambda m: m.sum(-1, keepdim=True)}
    both = intervals(columns, scores, n_resamples=100)
    assert both["each"] == [pytest.approx(interval(columns[:, i], n_resamples=100)) for i in range(3)]
    assert both["sum"] == [pytest.approx(interval(columns, lambda m: m.sum(-1), n_resamples=100))]


def test_the_table_holds_every_number_once(controls, topk):
    for c in controls.values():
        table = summarise_control(c)
        assert list(table.columns) == ["sae", "metric", "k", "value", "lo", "hi", "n"]
        assert not table.duplicated(["sae", "metric", "k"]).any()
        ours = table[table.sae == topk.name]
        sizes = {metric: len(rows) for metric, rows in ours.groupby("metric")}
        assert sizes == {metric: 1 if metric in OVER_K else len(KS) for metric in METRICS}
        assert ours[ours.metric.isin(OVER_K)].k.isna().all() and (ours.n == len(c.clean.token)).all()
        inside = table[table.value.notna()]
        assert ((inside.lo <= inside.value + 1e-9) & (inside.value <= inside.hi + 1e-9)).mean() > 0.95
        assert inside[inside.metric == "controllability"].value.between(0, 1).all()
        figure = plot_control(table, "edit effect")
        assert [len(ax.lines) for ax in figure.axes] == [3, 3]
        effects = ours[ours.metric == "edit effect"].value.tolist()
        assert list(figure.axes[0].lines[0].get_ydata()) == effects
