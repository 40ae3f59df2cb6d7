"""Test 2 recomputed by brute force and prompt by prompt, edits whose outcome is known, and what must be refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from sage_nb.core.activations import Node, Prompts, capture
from sage_nb.measures.control import KS, METRICS, NO_EDIT, OVER_K, SUPERVISED, Control, EditOutcomes, area, choose_edits, control, controllability, editable, effect_agreement, find_edits, greedy, intervals, isolation, plot_control, read_others, summarise_control, weights
from sage_nb.core.intervals import interval
from sage_nb.saes.reconstruction import Decomposition, decompose
from sage_nb.saes.sets import SAESet
from sage_nb.saes.baselines import identity_sae, supervised_as_sae
from sage_nb.truth.runs import Outcome, set_stage, supervised_edit


@pytest.fixture(scope="module")
def part(task):
    "All training prompts and every sixth of the held-out ones."
    return task[~task.held_out | (torch.arange(len(task)) % 6 == 0)]


@pytest.fixture(scope="module")
def topk(sae_sets): return sae_sets["tiny-gpt2-res-topk"]


def named(sections, name): return next(s for s in sections if s.name == name)


@pytest.fixture(scope="module")
def stages(model, part, sections, truth):
    return {name: editable(set_stage(model, part, named(sections, name), truth), truth) for name in ("IO:v@IO", "S:k@S1", "S:z@END")}


@pytest.fixture(scope="module")
def controls(stages, truth, topk): return {name: control(e, truth, [topk]) for name, e in stages.items()}


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


@given(st.integers(1, 3).flatmap(lambda d: st.tuples(
    st.lists(st.lists(st.lists(whole_numbers, min_size=d, max_size=d), min_size=4, max_size=4), min_size=1, max_size=3),
    st.lists(whole_numbers, min_size=3 * d, max_size=3 * d), st.integers(1, 6))))
def test_greedy_equals_brute_force(case):
    rows, missing, k = case
    moves = torch.tensor(rows, dtype=torch.float)
    missing = torch.tensor(missing, dtype=torch.float).reshape(3, -1)[: len(rows)]
    found = greedy(moves, missing, k)
    assert [[i for i in row if i >= 0] for row in found.tolist()] == [by_brute_force(m, r, k) for m, r in zip(moves, missing)]
    assert all(i == -1 for row in found.tolist() for i in row[row.index(-1) if -1 in row else len(row):]), "steps that do nothing stand last"


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


def sparse(codes, U) -> Decomposition:
    "The active latents of dense codes as parts."
    active = int((codes != 0).sum(1).max())
    indices = codes.abs().topk(active, 1).indices
    latents = codes.gather(1, indices)[..., None] * U[indices]
    return Decomposition(latents, indices, torch.zeros(len(codes), U.shape[1]), torch.zeros(len(codes), U.shape[1]), torch.zeros_like(indices), (Node("q", 0, 0, "END"),), "direct")


@pytest.mark.parametrize("seed", range(4))
def test_choosing_among_the_active_equals_choosing_among_all(seed):
    g, prompts, latents, d = torch.Generator().manual_seed(seed), 7, 150, 5
    U, V = torch.randn(2, latents, d, generator=g).double()
    source, target = torch.relu(torch.randn(2, prompts, latents, generator=g).double() - 1.5)
    source[0] = 0  # a prompt without active latents
    x, a_t = source @ U + torch.randn(prompts, d, generator=g), target @ V
    moves = choose_edits(x, a_t, sparse(source, U), sparse(target, V), 12)
    expected = dense_picks(source, target, U, V, a_t - x, 12)
    found = torch.where(moves.latents < 0, -1, moves.latents + latents * moves.adds)
    assert torch.equal(found, expected[:, : found.shape[1]]) and (expected[:, found.shape[1] :] == -1).all()
    for k in range(13):  # what an edit is, and the weight it removes, latent by latent
        for p in range(prompts):
            whole, edited, removed = source[p] @ U, x[p], 0.0
            for i in [i for i in expected[p, :k].tolist() if i >= 0]:
                if i >= latents: edited = edited + target[p, i - latents] * V[i - latents]
                else: edited, removed = edited - source[p, i] * U[i], removed + (source[p, i] * U[i] @ whole / (whole @ whole)).item()
            assert_close(moves.edit(x, k)[p], edited)
            assert moves.removed(k)[p].item() == pytest.approx(removed) and moves.count(k)[p] == (expected[p, :k] >= 0).sum()


def test_where_nothing_is_missing_nothing_is_done():
    U = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.eye(9)[:3]
    moves = choose_edits(codes @ U, codes @ U, sparse(codes, U), sparse(codes, U), 5)
    assert moves.count(5).tolist() == [0, 0, 0] and moves.removed(5).tolist() == [0, 0, 0]
    assert_close(moves.edit(codes @ U, 5), codes @ U)


@given(st.lists(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=3), min_size=1, max_size=4))
def test_weights_add_up_to_one(rows):
    latents = torch.tensor(rows, dtype=torch.double)
    indices = torch.arange(3).expand(len(rows), -1)
    parts = Decomposition(latents, indices, latents[:, 0] * 0, latents[:, 0] * 0, indices * 0, (Node("q", 0, 0, "END"),), "direct")
    whole = latents.sum(1)
    assert_close(weights(parts).sum(1), (whole.square().sum(1) > 0).double())


@pytest.mark.parametrize("site", ["q", "k", "v", "z"])
def test_all_moves_exchange_one_reconstruction_for_the_other(random_model, site):
    "In every architecture, and with latents active at many tokens."
    model, g = random_model, torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 200, (2, 3, 9), generator=g)
    prompts, other = (Prompts(t, {"END": torch.tensor([8, 6, 7])}) for t in tokens)
    node = Node(site, 1, 0, "END")
    saes = SAESet("identity", {Node("resid_pre", 1): identity_sae(model.cfg.d_model, Node("resid_pre", 1))})
    source, target = (decompose(model, p, [node], saes)[node].by_latent() for p in (prompts, other))
    assert source.latents.shape[1] <= model.cfg.d_model, "one entry per latent, not per token"
    x, a_t = capture(model, prompts, [node])[node], capture(model, other, [node])[node]
    everything = choose_edits(x, a_t, source, target, 10**6, tuple(torch.zeros(p.indices.shape) for p in (source, target)))
    assert_close(everything.edit(x, 10**6), x - source.latents.sum(1) + target.latents.sum(1), rtol=1e-3, atol=1e-4)
    near = choose_edits(x, a_t, source, target, 40)
    away = torch.stack([(near.edit(x, k) - a_t).norm(dim=1) for k in range(41)])
    assert (away.diff(dim=0) < 1e-4).all() and (away[-1] < away[0]).all()


# Running

def patched(model, task, values, i):
    "Logits at END of prompt i when the nodes have these values, by hooks written out."
    def hook(node, value):
        def put(x, hook):
            x = x.clone()
            x[0, task.prompts.positions[node.position][i], node.head] = value
            return x
        return node.hook, put
    with torch.no_grad(), model.hooks(fwd_hooks=[hook(node, v) for node, v in values.items()]):
        return model(task.prompts.tokens[i : i + 1])[0, task.prompts.positions["END"][i]]


def plain_control(editing, truth, saes, ks):
    "Every number for one prompt after the other, each edit run by itself."
    stage, a = editing.stage, editing.stage.section.attribute
    model, task, nodes, new, cf = stage.model, stage.task, stage.section.nodes, editing.counterfactual.values, editing.counterfactual
    n, rows = len(task), task.attributes.to_dict("records")

    def metric(logits, i): return (logits[task.answers[i]] - logits[cf.distractors[i]]).item()

    def read(acts, b, i):
        away = [sum((acts[node] - truth[node].mean - truth[node].centred(b)[j]).square().sum() for node in nodes) for j in range(len(truth[nodes[0]].values[b]))]
        return int(torch.stack(away).argmin())
    others = []
    for b in task.attributes.columns.drop(a):
        right = np.mean([truth[nodes[0]].values[b][read({node: stage.acts[node][i] for node in nodes}, b, i)] == rows[i][b] for i in range(n)])
        counts = truth[nodes[0]].counts[b]
        if counts.numel() > 1 and right - counts.max() / counts.sum() >= 0.5 * (1 - counts.max() / counts.sum()): others.append(b)
    found = {name: np.full((n, len(ks)), np.nan) for name in ("success", "got", "removed", "isolation", "moves")}
    floor, wanted = np.zeros(n), np.zeros(n)
    parts = {node: [decompose(model, p, [node], saes)[node].by_latent() for p in (task.prompts, cf.prompts)] for node in nodes}
    for i in range(n):
        clean, source = patched(model, task, {}, i), {node: stage.acts[node][i] for node in nodes}
        target_acts = {node: editing.acts[node][i] for node in nodes}
        target = patched(model, task, target_acts, i)
        floor[i], wanted[i] = clean.argmax() == target.argmax(), metric(target, i) - metric(clean, i)
        for j, k in enumerate(ks):
            edited, removed, moves = {}, [], []
            for node in nodes:
                s, t = (p.latents[i] for p in parts[node])
                picks = by_brute_force(torch.cat([-s, t]), target_acts[node] - source[node], k)
                edited[node] = source[node] + sum(torch.cat([-s, t])[picks]) if picks else source[node]
                whole = s.sum(0)
                removed.append(sum((s[c] @ whole / (whole @ whole)).item() for c in picks if c < len(s)))
                moves.append(len(picks))
            logits = patched(model, task, edited, i)
            found["success"][i, j] = logits.argmax() == target.argmax()
            found["got"][i, j] = metric(logits, i) - metric(clean, i)
            found["removed"][i, j], found["moves"][i, j] = np.mean(removed), np.mean(moves)
            if others:
                kept = [read(source, b, i) == read(edited, b, i) or read(source, b, i) != read(target_acts, b, i) for b in others]
                found["isolation"][i, j] = np.mean(kept)
    return found, floor, wanted, others


@pytest.mark.parametrize("name", ["IO:v@IO", "S:k@S1", "S:z@END"])
def test_control_equals_edits_made_one_prompt_at_a_time(stages, truth, topk, name):
    editing, ks = stages[name].at(torch.arange(12)), (1, 3, 6)
    found, (expected, floor, wanted, others) = control(editing, truth, [topk], ks), plain_control(editing, truth, topk, ks)
    assert list(found.readable) == others and (name == "S:k@S1") == (others == ["Pos"])
    table = summarise_control(found).set_index(["sae", "metric", "k"]).value
    us = lambda metric: [table[topk.name, metric, k] for k in ks]
    close = dict(abs=2e-4)
    assert us("edit success") == pytest.approx(expected["success"].mean(0), **close)
    assert us("edit effect") == pytest.approx((expected["got"] * wanted[:, None]).sum(0) / (wanted**2).sum(), rel=1e-3, **close)
    assert us("weight removed") == pytest.approx(expected["removed"].mean(0), **close)
    assert us("moves") == pytest.approx(expected["moves"].mean(0))
    assert us("isolation") == pytest.approx(expected["isolation"].mean(0), nan_ok=True)
    assert table[topk.name].loc["mean edit success"].item() == pytest.approx(expected["success"].mean())
    assert table[NO_EDIT].loc["edit success"].item() == pytest.approx(floor.mean()) and table[NO_EDIT].loc["edit effect"].item() == 0


def test_normalised_numbers_by_hand():
    "Four prompts whose outcomes are written down."
    token, metric = torch.tensor([1, 1, 1, 1]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    target = Outcome(torch.tensor([-2.0, -2.0, 0.0, 2.0]), torch.tensor([0, 0, 0, 1]))  # effects wanted: -4, -4, -2, 0

    def edited(tokens, metrics, removed): return EditOutcomes(torch.tensor(tokens).T, torch.tensor(metrics).T, torch.ones(4, len(tokens)), torch.tensor(removed).expand(4, -1), torch.ones(4, len(tokens)))
    sky = edited([[0, 0, 1, 1]], [[-2.0, -2.0, 2.0, 2.0]], [0.4])
    ours = edited([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], [[2.0] * 4, [0.0, 0.0, 1.0, 2.0], [-8.0, -8.0, -3.0, 2.0]], [0.1, 0.4, 1.0])
    c = Control("IO:z@END", (1, 2, 4), Outcome(metric, token), target, sky, {"ours": ours}, ("S",), 1.0)
    e = {metric: [x.value for x in found] for metric, found in c.estimates("ours").items()}
    assert e["edit success"] == [0.25, 0.5, 1.0] and e["mean edit success"] == [pytest.approx(1.75 / 3)]
    effects = [0.0, (8 + 8 + 2) / 36, (40 + 40 + 10) / 36]
    assert e["edit effect"] == pytest.approx(effects)
    assert c.edge(SUPERVISED)["edit success"].value == 0.75 and c.edge(SUPERVISED)["edit effect"].value == pytest.approx(32 / 36)
    means = c.columns("ours").mean(0)
    assert_close(controllability(means, c.ks), torch.tensor((0 + 2 * 0.5 + 1) / 4, dtype=torch.double))  # (0.25 - 0.25, 0.5 - 0.25, 1 - 0.25) / 0.5, the last clipped
    agreement = [max(1 - abs(1 - x), 0) / (32 / 36) for x in effects]
    assert controllability(means, c.ks, "effect").item() == pytest.approx((agreement[0] + 2 * agreement[1] + agreement[2]) / 4)
    assert e["edit magnitude"] == pytest.approx([-0.5, 0.0, 1.0])


def test_every_prompt_is_run_only_when_its_edit_has_changed(stages, controls, truth, topk):
    saved = []
    for name, editing in stages.items():
        moves, n = find_edits(editing, topk), len(editing.stage.task)
        counts = torch.stack([torch.stack([m.count(k) for m in moves.values()], 1) for k in (0, *KS)])
        runs = (counts.diff(dim=0) != 0).any(2).sum().item()
        assert controls[name].passes == pytest.approx((runs + n + 2 * n * len(moves)) / n)  # runs, skyline, two sights of each node
        saved.append(len(KS) * n - runs)
        for j, k in enumerate(KS):
            outcome = editing.stage.outcome({node: m.edit(editing.stage.acts[node], k) for node, m in moves.items()})
            assert torch.equal(controls[name].methods[topk.name].token[:, j], outcome.token)
            assert_close(controls[name].methods[topk.name].metric[:, j], outcome.metric, rtol=1e-4, atol=1e-4)
    assert any(saved), "in some section prompts have nothing left to gain"


def test_smaller_k_do_not_depend_on_larger_ones(stages, controls, truth, topk):
    found, more = control(stages["IO:v@IO"], truth, [topk], (1, 2)), controls["IO:v@IO"]
    for a, b in zip(found.methods[topk.name], more.methods[topk.name]): assert_close(a, b[:, :2], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_when_everything_is_exchanged_the_target_is_reached(stages, truth):
    editing = stages["IO:v@IO"].at(torch.arange(16))
    saes = SAESet("identity", {node: identity_sae(32, node) for node in editing.stage.section.nodes})
    found = control(editing, truth, [saes], (64,), order=lambda node, values, parts: torch.zeros(parts.indices.shape))  # 32 entries out, 32 in
    assert_close(found.methods["identity"].token[:, 0], editing.target.token)
    assert_close(found.methods["identity"].metric[:, 0], editing.target.metric, rtol=1e-3, atol=1e-3)
    assert_close(found.methods["identity"].removed, torch.ones(16, 1))
    e = found.estimates("identity")
    assert e["edit success"][0].value == 1 and e["edit effect"][0].value == pytest.approx(1, abs=1e-3) and 0.99 < e["controllability"][0].value <= 1


def test_in_the_order_of_known_meanings_two_moves_are_the_supervised_edit(stages, truth):
    for name, editing in stages.items():
        a, nodes = editing.stage.section.attribute, editing.stage.section.nodes
        saes = SAESet("supervised as SAE", {node: supervised_as_sae(truth[node], node) for node in nodes})
        meanings = [(b, v) for b, values in truth[nodes[0]].values.items() for v in values]

        def order(node, values, parts):
            means = [[meanings[i] == (a, v) for i in row] for row, v in zip(parts.indices.tolist(), values)]
            return torch.zeros(parts.indices.shape).masked_fill(~torch.tensor(means), -torch.inf)
        moves, edited = find_edits(editing, saes, 32, order), supervised_edit(editing, truth)
        for node, m in moves.items():
            both = m.count(32) == 2
            assert both.float().mean() > 0.5 and m.count(32).max() == 2
            assert_close(m.edit(editing.stage.acts[node], 2)[both], edited[node][both], rtol=1e-4, atol=1e-4)
            assert (m.adds[both, :2] == torch.tensor([False, True])).all()


def test_isolation_counts_what_the_counterfactual_does_not_change(stages, truth):
    editing = stages["S:k@S1"]  # Pos can be read here
    readings, attributes = read_others(editing, truth), editing.stage.task.attributes
    assert list(readings) == ["Pos"]
    flipped = attributes.Pos.map(dict(zip(truth[editing.stage.section.nodes[0]].values["Pos"], truth[editing.stage.section.nodes[0]].values["Pos"][::-1])))
    other = {node: truth[node].edit(x, "Pos", attributes, flipped) for node, x in editing.stage.acts.items()}
    assert isolation(readings, truth, editing.stage.acts).eq(1).all() and isolation(readings, truth, editing.acts).eq(1).all()
    assert isolation(readings, truth, other).mean() < 0.2
    assert isolation(read_others(replace(editing, acts=other), truth), truth, other).eq(1).all(), "what the counterfactual changes too is no fault"
    assert isolation({}, truth, other).isnan().all()


def test_what_is_undefined_is_said_and_left_out(stages, controls, truth, topk):
    found = controls["S:k@S1"]
    table = summarise_control(found)
    assert found.measure == "effect" and table[table.metric == "normalised success"].value.isna().all()
    assert any(note.startswith("S:k@S1: normalised success is undefined: the supervised edit succeeds in") for note in found.notes)
    nothing = replace(found, target=found.clean, skyline=found.skyline._replace(token=found.clean.token[:, None], metric=found.clean.metric[:, None]))
    assert nothing.measure is None and summarise_control(nothing).query("metric == 'controllability'").value.isna().all()
    assert [note.split(" is ")[0].split(": ")[1] for note in nothing.notes][:2] == ["normalised success", "normalised effect"]
    assert set(nothing.estimates(topk.name)) == set(METRICS)


def test_wrong_requests_are_refused(stages, truth, topk):
    for ks in ((), (0, 1), (2, 2), (4, 1)):
        with pytest.raises(ValueError, match="are not ascending numbers from 1"): control(stages["S:z@END"], truth, [topk], ks)
    with pytest.raises(ValueError, match="route 'up' is not one of read, write"): control(stages["S:z@END"], truth, [topk], route="up")


# Scores

@given(st.lists(st.floats(-2, 3), min_size=1, max_size=6), st.data())
def test_the_area_is_the_mean_over_log_k_and_stays_in_range(values, data):
    ks = sorted(data.draw(st.sets(st.integers(1, 64), min_size=len(values), max_size=len(values))))
    found = area(torch.tensor(values, dtype=torch.double), ks).item()
    grid = np.linspace(np.log(ks[0]), np.log(ks[-1]), 20_001)
    assert found == pytest.approx(np.interp(grid, np.log(ks), np.clip(values, 0, 1)).mean(), abs=1e-3) and -1e-12 <= found <= 1 + 1e-12
    better = [v + 0.1 for v in values]
    assert area(torch.tensor(better, dtype=torch.double), ks).item() >= found - 1e-12


@given(st.floats(-3, 5))
def test_effects_agree_most_at_one(e):
    found = effect_agreement(torch.tensor(e, dtype=torch.double)).item()
    assert found == pytest.approx(e if e <= 1 else 2 - e)


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=2, max_size=12))
def test_intervals_drawn_together_equal_intervals_drawn_alone(rows):
    columns = torch.tensor(rows)
    both = intervals(columns, {"each": lambda m: m, "sum": lambda m: m.sum(-1, keepdim=True)}, n_resamples=100)
    assert both["each"] == [pytest.approx(interval(columns[:, i], n_resamples=100)) for i in range(3)]
    assert both["sum"] == [pytest.approx(interval(columns, lambda m: m.sum(-1), n_resamples=100))]


def test_the_table_holds_every_number_once(controls, topk):
    for c in controls.values():
        table = summarise_control(c)
        assert list(table.columns) == ["sae", "metric", "k", "value", "lo", "hi", "n"] and not table.duplicated(["sae", "metric", "k"]).any()
        ours = table[table.sae == topk.name]
        assert {m: len(g) for m, g in ours.groupby("metric")} == {m: 1 if m in OVER_K else len(KS) for m in METRICS}
        assert ours[ours.metric.isin(OVER_K)].k.isna().all() and (ours.n == len(c.clean.token)).all()
        inside = table[table.value.notna()]
        assert ((inside.lo <= inside.value + 1e-9) & (inside.value <= inside.hi + 1e-9)).mean() > 0.95
        assert inside[inside.metric == "controllability"].value.between(0, 1).all()
        figure = plot_control(table, "edit effect")
        assert [len(ax.lines) for ax in figure.axes] == [3, 3]
        assert list(figure.axes[0].lines[0].get_ydata()) == ours[ours.metric == "edit effect"].value.tolist()
