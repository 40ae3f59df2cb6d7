"""Whether an SAE belongs where it stands: losses against HookedTransformer, and verdicts against known faults."""
import re
from dataclasses import replace

import pytest
import torch
from families import hooked_transformer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import sage_nb.saes.fidelity as room
from sage_nb.core.activations import Node, capture
from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.saes.codes import SparseSAE
from sage_nb.saes.fidelity import (FitLimits, check_saes, expected_figures, loss_recovered, next_token_loss, sae_inputs,
                                   splice_losses, variance_explained_by)
from sage_nb.saes.sets import SAESet, embedded_saes, load_saes
from sage_nb.tasks.builtin import RECIPES
from sage_nb.tasks.task import load_task

TRAINED = [name for name in embedded_saes() if re.fullmatch(r".*-(topk|standard|batchtopk|jumprelu)", name)]
MODELS = ("tiny-gpt2", "tiny-pythia", "tiny-gemma")
MID, STREAM = Node("resid_mid", 2), Node("resid_pre", 2)


def model_of(name): return next(model for model in MODELS if name.startswith(model))


@pytest.fixture(scope="module")
def models(): return {name: load_model(name) for name in MODELS}


@pytest.fixture(scope="module")
def tasks(models):
    made = {}

    def task(model, name):
        if (model, name) not in made: made[model, name] = load_task(name, models[model], n=96)
        return made[model, name]
    return task


def nodes_of(saes):
    "One node at each place of a set, so that all its SAEs are asked."
    return [Node(n.site, n.layer, 0 if n.site == "z" else None, "END") for n in saes.saes]


def rotated(saes, by):
    "The SAEs of a set, each at the place of another."
    places = list(saes.saes)
    moved = {places[(i + by) % len(places)]: sae for i, sae in enumerate(saes)}
    return replace(saes, saes={place: replace(sae, node=place) for place, sae in moved.items()})


def with_one(saes, place, sae): return replace(saes, saes=saes.saes | {place: sae})


# Losses, against HookedTransformer and plain loops

def plain_loss(hooked, prompts, place, change):
    "The loss by HookedTransformer's own hooks, prompt by prompt, <bos> untouched."
    total = count = 0
    for tokens, end in zip(prompts.tokens, prompts.index("END").tolist()):
        def hook(x, hook): return torch.cat([x[:, :1], change(x[:, 1:].flatten(2)).reshape(x[:, 1:].shape)], 1)
        logits = hooked.run_with_hooks(tokens[None, :end + 1], fwd_hooks=[(place.hook, hook)])[0]
        log_p = logits.log_softmax(-1)
        total -= sum(log_p[i, tokens[i + 1]].item() for i in range(end))
        count += end
    return total / count


@pytest.mark.parametrize("place", [MID, STREAM, Node("z", 1), Node("mlp_out", 1)], ids=str)
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-gemma"])
def test_loss_with_changed_activations_equals_hooked_transformer(models, tasks, name, place):
    model, prompts = models[name], tasks(name, "ioi").test.prompts[:6]
    hf = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    theirs = hooked_transformer(hf, model.tokenizer)
    mean = sae_inputs(model, prompts, place).mean(0)
    if place.site in ("resid_pre", "resid_mid"):
        ablated = next_token_loss(model, prompts, place, lambda x: mean.expand_as(x))
        assert ablated > next_token_loss(model, prompts) + 1, "a loss that hardly moves would not show a wrong place"
    for change in (lambda x: mean.expand_as(x), lambda x: 0.5 * x):
        ours = next_token_loss(model, prompts, place, change)
        assert ours == pytest.approx(plain_loss(theirs, prompts, place, change), abs=2e-4)
        assert next_token_loss(theirs, prompts, place, change) == pytest.approx(ours, abs=2e-4)


def test_ablating_the_stream_within_a_block_is_not_ablating_what_the_mlp_reads(models, tasks):
    "At L2.resid_mid of tiny-gpt2, TransformerBridge's hook alone changes the loss by far too little."
    model, prompts = models["tiny-gpt2"], tasks("tiny-gpt2", "ioi").test.prompts
    mean = sae_inputs(model, prompts, MID).mean(0)
    identity = SparseSAE(MID, torch.eye(128), torch.zeros(128), lambda x: x)
    losses = splice_losses(model, prompts, MID, identity, mean)
    before, after = (splice_losses(model, prompts, n, identity, sae_inputs(model, prompts, n).mean(0))
                     for n in (STREAM, Node("resid_pre", 3)))
    assert losses.recovered == pytest.approx(1, abs=1e-4)
    assert min(before.cost, after.cost) / 2 < losses.cost < 2 * max(before.cost, after.cost)


@pytest.mark.parametrize("place", [MID, Node("z", 1)], ids=str)
def test_batches_change_no_loss(models, tasks, place):
    model, prompts = models["tiny-gpt2"], tasks("tiny-gpt2", "ioi").test.prompts[:10]
    whole = next_token_loss(model, prompts, place, lambda x: 0.5 * x)
    assert next_token_loss(model, prompts, place, lambda x: 0.5 * x, batch_size=3) == pytest.approx(whole, abs=1e-6)


def test_bos_keeps_its_activation_when_all_others_are_replaced(monkeypatch, models, tasks):
    model, prompts = models["tiny-gemma"], tasks("tiny-gemma", "ioi").test.prompts[:4]
    put = []

    def spy(model, batch, edits, batch_size):
        put.extend(edits.items())
        return losses(model, batch, edits, batch_size)
    losses = room.prompt_losses
    monkeypatch.setattr(room, "prompt_losses", spy)
    next_token_loss(model, prompts, STREAM, torch.zeros_like)
    (place, values), = put
    assert place == STREAM and torch.equal(values[:, 0], capture(model, prompts, [STREAM])[STREAM][:, 0])
    assert not values[:, 1:].any()


def test_loss_recovered_is_nan_where_ablation_costs_nothing(models, tasks):
    model, prompts = models["tiny-gpt2"], tasks("tiny-gpt2", "ioi").test.prompts[:4]
    place = Node("resid_pre", 0)
    x = sae_inputs(model, prompts, place)
    same = SparseSAE(place, torch.eye(128), torch.zeros(128), lambda x: x)
    assert room.Losses(2.0, 2.0, 3.0).recovered != room.Losses(2.0, 2.0, 3.0).recovered
    assert loss_recovered(model, prompts, place, same, x.mean(0)) == pytest.approx(1, abs=1e-4)


# Verdicts of what is known to be right, and of what is known to be wrong

TASKS = [pytest.param(name, marks=() if name == "ioi" else pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize("name", TRAINED)
def test_trained_sets_are_good_at_their_own_places(models, tasks, name, task_name):
    model, saes = models[model_of(name)], load_saes(name)
    fit = check_saes(model, tasks(model_of(name), task_name), saes, nodes_of(saes))
    assert len(fit) == len(saes.saes) and set(fit.verdict) == {"good"}, fit.to_string()


def trained_but_slow(*fast): return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in TRAINED]


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize("name", trained_but_slow("tiny-gpt2-res-topk", "tiny-gemma-res-jumprelu"))
def test_no_trained_sae_is_good_at_the_place_of_another(models, tasks, name, task_name):
    model, saes = models[model_of(name)], load_saes(name)
    task, verdicts = tasks(model_of(name), task_name), []
    for by in range(1, len(saes.saes)):
        for named in (saes.name, "without a card"):
            wrong = replace(rotated(saes, by), name=named)
            verdicts += check_saes(model, task, wrong, nodes_of(saes), max_prompts=24).verdict.tolist()
    assert len(verdicts) == 2 * len(saes.saes) * (len(saes.saes) - 1)
    assert "good" not in verdicts and verdicts.count("refused") >= 0.95 * len(verdicts), verdicts


@pytest.fixture(scope="module")
def lab(models, tasks):
    "One model, its task and a set of it."
    return models["tiny-gpt2"], tasks("tiny-gpt2", "ioi"), load_saes("tiny-gpt2-res-topk")


def test_swapped_layers_are_named(lab):
    model, task, saes = lab
    places = {1: Node("resid_pre", 1), 3: Node("resid_pre", 3)}
    swapped = {place: replace(saes.before(4 - layer), node=place) for layer, place in places.items()}
    fit = check_saes(model, task, SAESet("swapped", swapped), nodes_of(SAESet("swapped", swapped)))
    assert fit.verdict.tolist() == ["refused"] * 2
    assert "at L3.resid_pre" in fit.cause["L1.resid_pre"] and "at L1.resid_pre" in fit.cause["L3.resid_pre"]


def read_as(sae, change):
    "The SAE with something done to its activations first."
    return replace(sae, encoder=lambda x: sae.encoder(change(x)))


def nearest(x, place):
    "An SAE that knows some activations by heart and takes the nearest."
    return SparseSAE(place, x, torch.zeros(x.shape[1]),
                     lambda y: torch.nn.functional.one_hot(torch.cdist(y, x).argmin(1), len(x)).float())


def test_causes_are_found(lab):
    model, task, saes = lab
    place, prompts = Node("resid_pre", 2), task.test.prompts
    sae = saes.saes[place]
    without = room._judged(capture(model, room._other_start(model, prompts), [place])[place],
                           room._other_start(model, prompts), place, first=1)
    of_four_times = read_as(sae, lambda x: 4 * x)
    faults = {
        "activations multiplied by 0.25": replace(of_four_times, W_dec=sae.W_dec / 4, b_dec=sae.b_dec / 4),
        "activations without <bos>": nearest(without, place),
        "less than the mean": replace(sae, b_dec=sae.b_dec + 3),
        "dead: no latent": replace(sae, encoder=lambda x: torch.zeros(len(x), 512)),
        "gives latents that are nan or infinite": read_as(sae, lambda x: x * torch.nan),
        "nan or inf in its reconstruction": replace(sae, encoder=lambda x: torch.full((len(x), 512), 3e38)),
    }
    for cause, wrong in faults.items():
        fit = check_saes(model, task, with_one(saes, place, wrong), nodes_of(saes))
        assert cause in fit.cause[str(place)] and fit.verdict[str(place)] == "refused", (cause, fit.cause[str(place)])
        assert (fit.drop(str(place)).verdict == "good").all(), "one bad SAE must not spoil the others"


def test_saes_of_another_width_are_refused_without_being_run(lab):
    model, task, saes = lab
    narrow = {node: replace(sae, W_dec=sae.W_dec[:, :64], b_dec=sae.b_dec[:64]) for node, sae in saes.saes.items()}
    fit = check_saes(model, task, replace(saes, saes=narrow), nodes_of(saes), max_prompts=8)
    assert set(fit.verdict) == {"refused"} and fit["L0"].isna().all()
    assert fit.cause.str.contains("takes activations of width 64, and this model holds 128 here").all()


def test_centred_activations_are_noticed(lab):
    "A stream with a large mean over d_model, and an SAE that was made without it."
    model, task, saes = lab
    place = Node("resid_pre", 2)
    trial = room._Trial.of(model, task.test.prompts, [place], 64)
    x = trial.inputs[place]
    moved = x + 4 * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True)
    trial = replace(trial, inputs=trial.inputs | {place: moved})
    better = room.best_alternative(trial, place, nearest(centred, place))
    assert better.what == "centred over d_model" and better.explained > 0.99
    assert [f.verdict for f in room._misplaced(better, 0.1, FitLimits())] == ["refused"]


def test_a_mediocre_sae_of_which_nothing_is_said_is_doubtful_and_not_refused(lab):
    model, task, saes = lab
    for place in saes.saes:
        x = sae_inputs(model, task.test.prompts, place)
        mean = x.mean(0)
        _, _, V = torch.linalg.svd(x - mean, full_matrices=False)
        shares = ((x - mean) @ V.T).square().sum(0).cumsum(0) / (x - mean).square().sum()
        k = int((shares < 0.42).sum())  # so many components explain a little less than half
        pca = SparseSAE(place, V[:k + 1], mean, lambda x, mean=mean, V=V[:k + 1]: (x - mean) @ V.T)
        if variance_explained_by(pca, x) >= 0.5: continue  # a single component explains half here
        fit = check_saes(model, task, SAESet("mediocre", {place: pca}), [Node(place.site, place.layer, None, "END")])
        assert fit.verdict.tolist() == ["doubtful"], fit.to_string()


def test_figures_are_those_of_held_out_prompts(monkeypatch, lab):
    model, task, saes = lab
    seen = []

    def spy(model, prompts, nodes, *args):
        seen.append(prompts.tokens)
        return capture(model, prompts, nodes, *args)
    monkeypatch.setattr(room, "capture", spy)
    fit = check_saes(model, task, saes, ["L2H0.q@END"], max_prompts=16)
    test, train = ({tuple(row) for row in half.prompts.tokens.tolist()} for half in (task.test, task.train))
    with_bos = [tokens for tokens in seen if tokens.shape[1] == task.prompts.tokens.shape[1]]
    whole = [tuple(row) for row in torch.cat(with_bos).tolist()]
    assert whole and set(whole) <= test and not set(whole) & train
    assert fit.attrs["prompts"] == "16 held-out prompts of ioi"
    x = sae_inputs(model, task.test.prompts[:16], "L2.resid_pre")
    explained = variance_explained_by(saes.before(2), x)
    assert fit["variance explained"].item() == pytest.approx(explained, abs=1e-6)


def test_what_is_expected_comes_from_card_or_release(lab):
    _, _, saes = lab
    card = room._card(saes.name)
    expected = expected_figures(saes)
    for place in saes.saes: assert expected.loc[str(place)].to_dict() == {k: card[str(place)][k] for k in room.FIGURES}
    assert expected_figures(replace(saes, name="of somebody")).isna().to_numpy().all()
    released = expected_figures(replace(saes, name="gpt2-small-res-jb"))
    assert released.loc["L1.resid_pre"].tolist()[:2] == [0.999, 10.0]
    said = FitLimits()
    assert [f.verdict for f in room._low(0.3, 0.95, said)] == ["refused"]
    unmeasured = replace(said, far_below_card=float("inf"))
    assert [f.verdict for f in room._low(0.3, 0.95, unmeasured)] == ["doubtful"]


def test_twins_are_not_refused_where_their_card_expects_little(models, tasks):
    model, task = models["tiny-gpt2"], tasks("tiny-gpt2", "ioi")
    twin = load_saes("tiny-gpt2-res-topk-frozen-decoder")
    fit = check_saes(model, task, twin, nodes_of(twin))
    assert (fit["expected variance explained"] < 0.5).all() and "refused" not in set(fit.verdict), fit.to_string()


def test_saes_of_one_position_have_no_loss_recovered(lab):
    model, task, saes = lab
    place = Node("resid_pre", 2, None, "END")
    here = SAESet("at END", {place: replace(saes.before(2), node=place)})
    fit = check_saes(model, task, here, [place])
    assert fit["loss recovered"].isna().all()
    x = capture(model, task.test.prompts[:64], [place])[place]
    assert_close(fit["variance explained"].item(), variance_explained_by(saes.before(2), x), rtol=1e-5, atol=1e-5)
