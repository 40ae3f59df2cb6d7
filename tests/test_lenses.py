"""What a score is judged by: known SAEs, snapshots of training, noise between seeds, and the measures of others."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

import sage_nb.lab.snapshots as snapshots
from sage_nb.core.activations import Node, capture
from sage_nb.lab.known import KNOWN_ORDER, known_sets, oracle_sae, order_kept
from sage_nb.lab.snapshots import (
    Plan, l0_plans, make_snapshots, snapshot_figures, snapshot_plans, snapshot_steps)
from sage_nb.lab.zoo import train_sae
from sage_nb.report.lenses import order_along_training, paired_difference, reseed_noise, reseeded
from sage_nb.report.peers import peer_metrics, probe_auc, top_latents, tpp, value_classes
from sage_nb.saes.fidelity import sae_inputs, splice_losses
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.tasks.planted import planted_circuit
from sage_nb.tasks.task import load_task


# Known features

@pytest.fixture(scope="module")
def planted(): return planted_circuit(rotated=True)


@pytest.fixture(scope="module")
def planted_task(planted): return planted.task(96)


def test_a_turned_model_answers_as_the_one_it_was_made_of(planted):
    straight = planted_circuit()
    tokens = torch.randint(4, straight.model.cfg.d_vocab, (32, 6), generator=torch.Generator().manual_seed(0))
    assert_close(planted.model(tokens), straight.model(tokens), rtol=0, atol=1e-4)
    directions, there = (torch.stack([*p.features.values()]) for p in (straight, planted))
    assert_close(there @ there.T, torch.eye(len(there)), rtol=0, atol=1e-5)
    assert_close(directions, torch.eye(len(directions)))
    node = Node("resid_post", 1)
    held = [capture(p.model, p.task(8).prompts, [node])[node] for p in (straight, planted)]
    assert_close(held[1] @ there.T, held[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("position,says", [
    ("first", "place first"), ("second", "place second"), ("second+1", "place verb"), ("END", "place which")])
def test_the_oracle_says_what_stands_at_a_token(planted, planted_task, position, says):
    names, node = [*planted.features], Node("resid_pre", 0, position=position)
    x = sae_inputs(planted.model, planted_task.prompts, node)
    codes = oracle_sae(planted, "L0.resid_pre").dense_encode(x)
    index = planted_task.prompts.index(position)
    tokens = planted_task.prompts.tokens[torch.arange(len(index)), index]
    for row, token in zip(codes, tokens):
        word = planted.model.tokenizer.decode(token).strip()
        assert {names[i] for i in row.nonzero()[:, 0]} == {says, f"word {word}"}
    assert_close(codes.sum(-1), torch.full((len(codes),), 2.0))


def test_known_sets_are_what_they_are_called(planted, planted_task):
    sets = known_sets(planted, planted_task)
    oracle, permuted, noisy = (sets[name].before(1) for name in ("oracle", "permuted", "noise 1"))
    x = sae_inputs(planted.model, planted_task.prompts, oracle.node)
    assert_close(oracle.reconstruct(x), x, rtol=0, atol=1e-3)
    for sae in (permuted, noisy): assert_close(sae.dense_encode(x), oracle.dense_encode(x))  # only what is written
    order = torch.cdist(permuted.W_dec, oracle.W_dec).argmin(1)
    assert_close(permuted.W_dec, oracle.W_dec[order])
    assert order.sort().values.tolist() == list(range(oracle.d_sae)) and (order != torch.arange(oracle.d_sae)).any()
    assert_close((noisy.W_dec - oracle.W_dec).norm(dim=1), torch.ones(oracle.d_sae))
    energy = oracle.dense_encode(x).square().mean(0)
    for share in (0.75, 0.25):
        kept = torch.cdist(sets[f"best {share:g}"].before(1).W_dec, oracle.W_dec).argmin(1)
        rest = [i for i in range(oracle.d_sae) if i not in kept.tolist()]
        assert len(kept) == round(share * int((energy > 0).sum()))
        assert energy[kept].min() >= energy[rest].max()
    assert sets["random"].before(1).encode(x).l0 == pytest.approx(oracle.encode(x).l0, abs=0.6)


def test_order_is_kept_by_the_right_scores_alone():
    names = list(dict.fromkeys(name for chain in KNOWN_ORDER for name in chain))
    falling = {name: -i for i, name in enumerate(names)}
    assert order_kept(falling).kept.all()
    swapped = falling | {"oracle": falling["random"], "random": falling["oracle"]}
    assert set(order_kept(swapped).query("~kept").better) == {"oracle", "best 0.75", "noise 0.25"}
    nan = order_kept(falling | {"permuted": float("nan")})
    assert nan[~nan.kept].worse.tolist() == ["permuted"]  # no score is not in order
    near = falling | {"oracle": falling["noise 0.25"] - 0.01}
    assert not order_kept(near).kept.all() and order_kept({"a": 1.0, "b": 1.01}, [("a", "b")], 0.02).kept.all()


# Snapshots

@pytest.fixture(scope="module")
def small_text():
    "Few documents, captured once."
    with pytest.MonkeyPatch.context() as patched:
        take, seen = snapshots.training_activations, {}

        def once(model, hooks, n, seed=1):
            if seed not in seen: seen[seed] = take(model, hooks, 256, seed)
            return seen[seed]
        patched.setattr(snapshots, "training_activations", once)
        yield patched


@pytest.fixture(scope="module")
def made(small_text, tmp_path_factory):
    "Snapshots of two kinds whose training is warmed up or thresholded, after few steps."
    out = tmp_path_factory.mktemp("snapshots")
    plans = [*snapshot_plans(["batchtopk", "standard"], samples=24 * 1024, n=3), *l0_plans([2], samples=4 * 1024)]
    return out, plans, make_snapshots(plans, out)


def test_snapshots_are_sets_of_every_place_at_every_step(made):
    out, plans, folders = made
    assert [*folders] == ["tiny-gpt2-res-batchtopk", "tiny-gpt2-res-standard", "tiny-gpt2-res-topk-k2"]
    assert [*folders["tiny-gpt2-res-batchtopk"]] == [0, 16, 24]
    for name, by_step in folders.items():
        for step, path in by_step.items():
            saes = load_saes(path)
            assert saes.name == f"{name}-step-{step}" and len(saes) == 5
    assert not [*out.glob("**/*.part")]
    explained = snapshot_figures(out)["variance explained"].unstack("step")
    assert (explained[24] > explained[0])[explained[0].notna()].all() and explained[4].notna().sum() == 5


def test_a_batchtopk_sae_is_as_sparse_as_it_is_asked_to_be_from_the_start_on(made):
    l0 = snapshot_figures(made[0]).loc["tiny-gpt2-res-batchtopk", "L0"]
    assert l0.between(1.5, 8).all()  # with sae_lens' own threshold, 25 after 16 steps


def test_a_batchtopk_threshold_is_not_that_of_every_64th_token():
    generator = torch.Generator().manual_seed(0)
    activations, kept = torch.randn(2**16, 16, generator=generator), {}
    activations[::64] *= 50  # as <bos> of each document may be
    train_sae(activations, "batchtopk", dict(hook_name="blocks.0.hook_resid_pre"), 4 * 1024,
              after={4: lambda sae: kept.setdefault(4, sae)})
    f, of_large = (kept[4].encode(x) for x in (activations[:2**12], activations[::64]))  # the k of a batch
    least, least_of_large = f[f > 0].min(), of_large[of_large > 0].min()
    assert least_of_large > 20 * least  # a threshold of those alone would let nothing else through
    assert least / 2 < kept[4].topk_threshold < 2 * least


def test_what_is_there_is_not_trained_again_and_what_is_not_is(made, monkeypatch):
    out, plans, folders = made
    monkeypatch.setattr(snapshots, "train_sae", None)  # whoever calls it fails
    assert make_snapshots(plans, out) == folders
    with pytest.raises(TypeError): make_snapshots(l0_plans([3], samples=4 * 1024), out)


def test_an_interrupted_run_goes_on_and_gives_the_same(made, tmp_path, monkeypatch):
    (plan,) = [plan for plan in made[1] if plan.name.endswith("k2")]
    train, trained = snapshots.train_sae, []

    def interrupted(activations, kind, metadata, *args, **kwargs):
        if len(trained) == 2: raise KeyboardInterrupt
        trained.append(metadata["hook_name"])
        return train(activations, kind, metadata, *args, **kwargs)
    monkeypatch.setattr(snapshots, "train_sae", interrupted)
    with pytest.raises(KeyboardInterrupt): make_snapshots([plan], tmp_path)
    assert not (tmp_path / plan.name).exists()  # only what is whole has its name
    monkeypatch.setattr(snapshots, "train_sae", lambda *a, **k: trained.append(a[2]["hook_name"]) or train(*a, **k))
    folder = make_snapshots([plan], tmp_path)[plan.name][4]
    assert len(trained) == len(set(trained)) == 5
    for path in folder.rglob("*.safetensors"):
        assert_close(load_file(path), load_file(made[2][plan.name][4] / path.relative_to(folder)))


def test_plans_say_what_they_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="are for 2 models"):
        make_snapshots([Plan(m, m, "topk", {}, (4,)) for m in ("tiny-gpt2", "tiny-pythia")], tmp_path)
    with pytest.raises(ValueError, match="holds no snapshots"): snapshot_figures(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"): make_snapshots(l0_plans(), tmp_path / "file")


@given(st.integers(200, 10**6), st.integers(3, 9))
def test_steps_rise_from_the_start_to_the_end_in_equal_ratios(last, n):
    steps = np.array(snapshot_steps(last, n))
    assert steps[0] == 0 and steps[1] == 16 and steps[-1] == last and (np.diff(steps) > 0).all()
    ratios = steps[2:] / steps[1:-1]
    assert ratios.max() / ratios.min() < 1.2  # but for rounding


def test_cards_say_how_the_snapshots_were_made(made):
    card = json.loads((made[0] / "tiny-gpt2-res-standard" / "card.json").read_text())
    assert card["settings"] == {"l1_warm_up_steps": 4} and card["samples"] == 24 * 1024


# Lenses

def table_of(values, sets="AB"):
    "Set by seed, of an array (set, seed)."
    index = pd.MultiIndex.from_product([list(sets), range(values.shape[1])], names=["set", "seed"])
    return pd.DataFrame({"score": values.ravel()}, index)


@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.1, 10))
def test_noise_scales_with_the_measure_and_ignores_its_zero(seed, n, scale):
    values = np.random.default_rng(seed).normal(5, 1, (2, n))
    noise, scaled, shifted = (reseed_noise(table_of(v)) for v in (values, scale * values, values + 3))
    assert np.allclose(noise.sd, values.std(axis=1, ddof=1))
    assert np.allclose(scaled[["mean", "sd", "smallest"]], scale * noise[["mean", "sd", "smallest"]])
    assert np.allclose(scaled.cv, noise.cv) and np.allclose(shifted.sd, noise.sd)
    assert (noise.lo < noise.sd).all() and (noise.sd < noise.hi).all()


def test_the_interval_of_the_noise_covers_it():
    draws = np.random.default_rng(0).normal(0, 2, (1000, 8))
    noise = reseed_noise(table_of(draws, [f"set {i}" for i in range(1000)]))
    assert ((noise.lo < 2) & (2 < noise.hi)).mean() == pytest.approx(0.95, abs=0.02)


def test_what_prompts_do_to_both_sets_is_no_noise_of_their_difference():
    shared, own = np.random.default_rng(0).normal(0, 1, (1, 50)), np.random.default_rng(1).normal(0, 0.1, (2, 50))
    table = table_of(shared + own + [[1.0], [0.0]])
    pair = paired_difference(table, "A", "B").loc["score"]
    assert pair["mean"] == pytest.approx(1, abs=0.1) and pair.sd == pytest.approx(0.1 * 2**0.5, rel=0.3)
    assert pair.smallest < 0.3 * reseed_noise(table).smallest.min()


def test_order_along_training_is_spearmans_of_the_means_and_of_each_seed():
    values = np.random.default_rng(3).normal(0, 1, (6, 4)) + np.arange(6)[:, None] / 2
    table = table_of(values, "ABCDEF").sample(frac=1, random_state=0)  # rows in any order
    steps = dict(zip("ABCDEF", [("run", 2**i) for i in range(6)]))
    row = order_along_training(table, steps).loc[("run", "score")]
    assert row.spearman == pytest.approx(spearmanr(values.mean(1), range(6)).statistic)
    assert row.least == pytest.approx(min(spearmanr(seed, range(6)).statistic for seed in values.T))
    assert row.noise == pytest.approx(values.var(axis=1, ddof=1).mean() ** 0.5)
    assert row["signal over noise"] == pytest.approx(values.mean(1).std(ddof=1) / row.noise)


def test_a_measure_may_give_several_numbers_or_one():
    sets = [load_saes("tiny-gpt2-res-topk")]
    one = reseeded(lambda saes, seed: len(saes) + seed, sets, range(3))
    several = reseeded(lambda saes, seed: {"places": len(saes), "seed": seed}, sets, range(3))
    assert one.score.tolist() == [5, 6, 7] and several.columns.tolist() == ["places", "seed"]


# The measures of others

def test_probes_are_those_of_a_slow_plain_loop():
    generator = np.random.default_rng(0)
    f = generator.normal(size=(120, 9)).clip(min=0)
    has = f[:, 4] + 0.3 * generator.normal(size=120) > 0.5
    held_out = np.arange(120) % 3 == 0
    difference = [abs(np.mean([row[i] for row in f[has]]) - np.mean([row[i] for row in f[~has]])) for i in range(9)]
    assert top_latents(f, has, 3).tolist() == sorted(range(9), key=lambda i: -difference[i])[:3]
    probe = LogisticRegression(max_iter=1000).fit(f[~held_out], has[~held_out])
    pairs = [(a, b) for a in np.flatnonzero(held_out & has) for b in np.flatnonzero(held_out & ~has)]
    says = probe.decision_function(f)
    area = np.mean([says[a] > says[b] for a, b in pairs])
    assert probe_auc(f, has, held_out) == pytest.approx(area) == roc_auc_score(has[held_out], says[held_out])


def test_tpp_is_that_of_a_slow_plain_loop():
    generator = np.random.default_rng(1)
    value, W_dec = generator.integers(0, 4, 160), generator.normal(size=(6, 8))
    f = np.eye(6)[value] * 3 + generator.random((160, 6)) * (generator.random((160, 6)) > 0.7)
    has, held_out = value[:, None] == np.arange(3), np.arange(160) >= 100
    x = f @ W_dec + 0.1 * generator.normal(size=(160, 8))
    probes = [LogisticRegression(max_iter=1000).fit(x[:100], has[:100, i]) for i in range(3)]

    def accuracy(i, activations):
        right = probes[i].predict(activations[100:]) == has[100:, i]
        return (right[has[100:, i]].mean() + right[~has[100:, i]].mean()) / 2
    scores = []
    for i in range(3):
        yes, no = f[:100][has[:100, i]], f[:100][~has[:100, i]]
        gains = [max(yes[:, j].mean() - no[:, j].mean(), 0) * (W_dec[j] @ probes[i].coef_[0]) for j in range(6)]
        out = [j for j in sorted(range(6), key=lambda j: -gains[j])[:2] if gains[j] > 0]
        ablated = x - sum(np.outer(f[:, j], W_dec[j]) for j in out)
        drops = [accuracy(j, x) - accuracy(j, ablated) for j in range(3)]
        scores.append(drops[i] - np.mean([drops[j] for j in range(3) if j != i]))
    assert tpp(x, f, W_dec, has, held_out, n=2) == pytest.approx(np.mean(scores))


def test_peers_do_not_see_how_a_latent_is_scaled(model):
    task = load_task("agreement", model, n=96)
    sae = load_saes("tiny-gpt2-res-topk").before(3)
    factor = torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(0)) + 0.5

    def encoder(x):
        codes = sae.encode(x)
        return codes._replace(values=codes.values / factor[codes.indices])
    scaled = replace(sae, W_dec=sae.W_dec * factor[:, None], encoder=encoder)
    sets = [SAESet(name, {sae.node: same}) for name, same in {"as it is": sae, "scaled": scaled}.items()]
    one, other = peer_metrics(model, task, sets).values
    assert np.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_loss_recovered_is_that_of_one_splice(model):
    task, saes = load_task("agreement", model, n=96), load_saes("tiny-gpt2-res-topk")
    sae = saes.before(1)
    x = sae_inputs(model, task.test.prompts, sae.node)
    losses = splice_losses(model, task.test.prompts, sae.node, sae, x.mean(0))
    row = peer_metrics(model, task, SAESet("one", {sae.node: sae})).loc["one"]
    assert row["loss recovered"] == pytest.approx(losses.recovered, abs=1e-5)


def test_classes_are_values_that_occur_on_both_sides(model):
    task = load_task("capitals", model, n=96)
    for found in value_classes(task):
        column = task.attributes[found.attribute]
        assert found.has.tolist() == [value == found.value for value in column]
        for side in (task.held_out.numpy(), ~task.held_out.numpy()):
            assert 2 <= found.has[side].sum() <= side.sum() - 2
    by_attribute = pd.Series([c.attribute for c in value_classes(task)]).value_counts()
    assert by_attribute["relation"] == 1  # one of two that are each other's opposite
