"""The zoo's SAEs and their twins: what is frozen stays frozen, in training, in files and on the cards."""
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

import sage_nb.lab.zoo as zoo
from sage_nb.core.models import EMBEDDED
from sage_nb.lab.zoo import (
    D_SAE, FROZEN, LEAST_COSINE, SAE_KINDS, ZooModel, ZooSAEs, make_saes, sae_figures, train_sae, within_cosine,
    zoo_sets)
from sage_nb.saes.adapters import from_sae_lens
from sage_nb.saes.sets import embedded_saes, load_saes

HOOK, D_IN = "blocks.2.hook_resid_pre", 16
HALF = 2e-3  # what is lost of a cosine or a norm where weights are stored in half precision


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Directions that may go only so far

def nearest_on_a_grid(direction, start, least):
    "The nearest unit vector of the circle through both that keeps the cosine, by trying many."
    aside = direction - (direction @ start) * start
    turns = torch.linspace(0, torch.acos(torch.tensor(least)).item(), 20_001, dtype=torch.double)
    tried = turns.cos()[:, None] * start + turns.sin()[:, None] * aside / aside.norm()
    return tried[(tried @ direction).argmax()]


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.1, 10))
def test_directions_are_turned_back_to_the_nearest_that_is_allowed(seed, least, size):
    start = torch.nn.functional.normalize(draw(1, 5, seed=seed).double(), dim=-1)
    went = size * draw(1, 5, seed=seed + 1).double()
    turned = within_cosine(went, start, least)
    assert_close(turned.norm(), went.norm())
    cosine, before = (torch.cosine_similarity(d, start).item() for d in (turned, went))
    assert cosine >= least - 1e-9
    if before >= least: assert torch.equal(turned, went)
    else: assert_close(turned / turned.norm(), nearest_on_a_grid(went[0], start[0], least)[None], rtol=0, atol=1e-3)
    assert_close(within_cosine(turned, start, least), turned)


# Training

@pytest.fixture(autouse=True)
def small_batches(monkeypatch): monkeypatch.setattr(zoo, "_BATCH", 128)


@pytest.fixture(scope="module")
def activations(): return 2 * draw(4096, 48) @ draw(48, D_IN, seed=1) + draw(D_IN, seed=2)


def train(activations, kind, frozen, steps):
    return train_sae(activations, kind, dict(hook_name=HOOK), steps * zoo._BATCH, frozen)


@pytest.mark.parametrize("kind", SAE_KINDS)
def test_a_frozen_decoder_keeps_its_directions(kind, activations):
    few, many = (train(activations, kind, "decoder", steps).W_dec for steps in (2, 10))
    assert_close(few, many)
    assert_close(many.norm(dim=1), many.norm(dim=1)[:1].expand(D_SAE))


@pytest.mark.parametrize("kind", SAE_KINDS)
def test_a_soft_frozen_decoder_stays_near_the_directions_of_the_frozen_one(kind, activations, monkeypatch):
    monkeypatch.setitem(zoo.SAE_KINDS, kind, SAE_KINDS[kind]._replace(lr=0.03))  # few steps that go far
    start = train(activations, kind, "decoder", 2).W_dec
    free, soft = (train(activations, kind, frozen, 150).W_dec for frozen in (None, "soft-decoder"))
    cosines, unbound = (torch.cosine_similarity(W_dec, start, dim=1) for W_dec in (soft, free))
    assert unbound.min() < LEAST_COSINE - 0.1  # the bound is needed
    assert LEAST_COSINE - 1e-5 <= cosines.min() < LEAST_COSINE + 1e-3  # and reached
    assert_close(soft.norm(dim=1), soft.norm(dim=1)[:1].expand(D_SAE))  # one that shrinks to 0 ends in nan


def test_training_that_diverges_is_no_sae(activations, monkeypatch):
    monkeypatch.setitem(zoo.SAE_KINDS, "topk", SAE_KINDS["topk"]._replace(lr=1e30))
    with pytest.raises(ValueError, match="training diverged: .*W_dec.* are not finite: use another seed"):
        train(activations, "topk", None, 10)


SPARSE = [kind for kind in SAE_KINDS if SAE_KINDS[kind].apart is not None]


@pytest.mark.parametrize("kind", SPARSE)
def test_a_frozen_encoder_reads_what_it_read_at_first(kind, activations):
    few, many = (train(activations, kind, "encoder", steps) for steps in (2, 20))
    assert_close(few.W_enc, many.W_enc)
    assert_close(few.b_enc, many.b_enc)
    centre = activations.mean(0)  # b_dec learns, and the encoder does not see it
    centred = (activations - centre) @ many.W_enc
    assert_close(activations @ many.W_enc + many.b_enc, centred, rtol=0, atol=0.02 * centred.std().item())
    assert not torch.allclose(few.W_dec, many.W_dec) and not torch.allclose(few.b_dec, many.b_dec)
    with_the_decoders = torch.cosine_similarity(many.W_enc.T, train(activations, kind, "decoder", 2).W_dec, dim=1)
    assert with_the_decoders.abs().mean() < 0.3  # drawn apart: 0.2 in 16 dimensions, 1 if it were the transpose
    if kind != "jumprelu": assert_close(few.encode(activations), many.encode(activations))


@pytest.mark.parametrize("frozen", FROZEN)
def test_twins_of_one_seed_are_equal_and_of_two_are_not(frozen, activations):
    one, again, other = (
        train_sae(activations, "topk", dict(hook_name=HOOK), 5 * zoo._BATCH, frozen, seed) for seed in (0, 0, 1))
    assert_close(one.state_dict(), again.state_dict())
    fixed = "W_enc" if frozen == "encoder" else "W_dec"
    assert not torch.allclose(one.state_dict()[fixed], other.state_dict()[fixed])
    assert one.cfg.metadata.frozen == frozen and from_sae_lens(one).encode(activations).l0 == pytest.approx(4, abs=0.1)


# Making sets

@pytest.fixture
def short(monkeypatch):
    "The recipe, with few activations and few steps; the hooks that are trained at, in order."
    trained, train, fresh = [], zoo.train_sae, zoo._fresh_text

    def record(activations, kind, metadata, *args):
        trained.append(metadata["hook_name"])
        return train(activations, kind, metadata, *args)
    monkeypatch.setitem(zoo.ZOO, "tiny-gpt2", ZooModel(4000, (ZooSAEs("z", "topk", 4096, ("encoder",)),)))
    monkeypatch.setattr(zoo, "DOCUMENTS", 256)
    monkeypatch.setattr(zoo.training_activations, "__defaults__", (256, 1))
    monkeypatch.setattr(zoo, "_fresh_text", lambda model, documents: fresh(model, 8))
    monkeypatch.setattr(zoo, "train_sae", record)
    return trained


def test_making_a_set_goes_on_where_it_was_interrupted(model, short, tmp_path):
    name = "tiny-gpt2-z-topk-frozen-encoder"
    folder = make_saes(name, tmp_path, model)
    hooks = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    assert short == hooks and folder == tmp_path / "saes" / name
    whole = {hook: load_file(folder / hook / "sae_weights.safetensors") for hook in hooks}
    (folder / hooks[2] / "cfg.json").unlink()
    written = (folder / hooks[0] / "sae_weights.safetensors").stat().st_mtime_ns
    for path in (folder / hooks[2]).iterdir(): path.unlink()
    make_saes(name, tmp_path, model)
    assert short == [*hooks, hooks[2]]
    assert (folder / hooks[0] / "sae_weights.safetensors").stat().st_mtime_ns == written
    assert_close(load_file(folder / hooks[2] / "sae_weights.safetensors"), whole[hooks[2]])
    card = json.loads((folder / "card.json").read_text())
    assert (card["frozen"], card["twin of"], card["training activations"]) == ("encoder", "tiny-gpt2-z-topk", 4096)
    assert card["settings"] == dict(k=4, apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=False)
    stored = json.loads((folder / hooks[0] / "cfg.json").read_text())
    assert stored["metadata"]["frozen"] == "encoder" and not stored["apply_b_dec_to_input"]


# What is embedded

def weights(name):
    "The stored weights of each SAE of an embedded set."
    files = sorted((EMBEDDED / "saes" / name).glob("*/sae_weights.safetensors"))
    return [{key: value.float() for key, value in load_file(file).items()} for file in files]


def twins(frozen): return [name for name in embedded_saes() if zoo_sets()[name].frozen == frozen]


def test_what_is_embedded_is_what_the_recipe_says():
    sets = zoo_sets()
    assert embedded_saes() == sorted(name for name, made in sets.items() if made.embedded)
    assert {made.frozen for made in sets.values() if made.trained == "tiny-gpt2-res-topk" and made.embedded} == {
        None, *FROZEN}
    for name in embedded_saes():
        card = json.loads((EMBEDDED / "saes" / name / "card.json").read_text())
        stored = [json.loads(p.read_text())["metadata"] for p in (EMBEDDED / "saes" / name).glob("*/cfg.json")]
        assert {m["frozen"] for m in stored} == {card["frozen"]} == {sets[name].frozen}
        assert card.get("twin of", name) == sets[name].trained
        assert load_saes(name).name == name


@pytest.mark.parametrize("name", twins("decoder"))
def test_embedded_frozen_decoders_have_the_same_random_unit_directions_everywhere(name):
    directions = [torch.nn.functional.normalize(sae["W_dec"], dim=1) for sae in weights(name)]
    for W_dec in directions: assert_close(W_dec, directions[0], rtol=0, atol=HALF)
    alike = directions[0] @ directions[0].T - torch.eye(D_SAE)
    assert alike.abs().max() < 0.6 and alike.mean().abs() < 0.01


@pytest.mark.parametrize("name", twins("soft-decoder"))
def test_embedded_soft_frozen_decoders_stay_near_the_directions_of_the_frozen_ones(name):
    trained = zoo_sets()[name].trained
    start = weights(f"{trained}-frozen-decoder")[0]["W_dec"]
    for soft, free in zip(weights(name), weights(trained)):
        assert all(values.isfinite().all() for values in soft.values())
        cosines, unbound = (torch.cosine_similarity(sae["W_dec"], start, dim=1) for sae in (soft, free))
        assert cosines.min() >= LEAST_COSINE - HALF and (unbound < LEAST_COSINE).float().mean() > 0.5


@pytest.mark.parametrize("name", twins("encoder"))
def test_embedded_frozen_encoders_read_the_same_random_directions_everywhere(name):
    saes = weights(name)
    for sae in saes: assert_close(sae["W_enc"], saes[0]["W_enc"])
    assert_close(saes[0]["W_enc"].norm(dim=0), torch.ones(D_SAE), rtol=0, atol=HALF)


def test_bos_is_left_out_of_figures(model):
    sae = load_saes("tiny-gpt2-res-topk").before(2)
    text = zoo._fresh_text(model, 128)
    with torch.no_grad(): _, cache = model.run_with_cache(text.tokens, names_filter=HOOK)
    codes = [sae.dense_encode(document[1:]) for document in cache[HOOK]]
    latents = torch.stack(codes).flatten(0, 1)
    x = cache[HOOK][:, 1:].flatten(0, 1)
    missed = (x - latents @ sae.W_dec - sae.b_dec).square().sum() / (x - x.mean(0)).square().sum()
    figures = sae_figures(model, sae)
    assert figures["L0"] == pytest.approx((latents != 0).sum(1).float().mean().item(), rel=1e-6)
    assert figures["variance explained"] == pytest.approx(1 - missed.item(), abs=1e-5)
    assert figures["latents never active"] == int((latents == 0).all(0).sum())
