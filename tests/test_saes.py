"""One view of every SAE: against sae_lens' own encode and decode, without state, in blocks, from files, and refused."""
import copy
import itertools

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_kinds import NORMALISATIONS, Own
from torch.testing import assert_close

import sage_nb.saes.codes as saes_room
from sage_nb.core.activations import Node
from sage_nb.truth.features import Dictionary, Features
from sage_nb.saes.adapters import ARCHITECTURES, from_object, from_sae_lens, random_sae_lens
from sage_nb.saes.codes import Codes, Pursuit, SparseSAE, to_codes
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.saes.baselines import random_decoder, supervised_as_sae


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


# Agreement with sae_lens

@torch.no_grad()
def encode_and_decode(sae, x):
    f = sae.encode(x)
    return f, sae.decode(f)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_codes_and_reconstruction_are_those_of_sae_lens(architecture, normalise, apply_b_dec):
    theirs, x = random_sae_lens(architecture, normalise, apply_b_dec_to_input=apply_b_dec), 3 * draw(3, 50, 16) + 1
    f, x_hat = encode_and_decode(theirs, x)
    view = from_sae_lens(theirs)
    assert 1 < view.encode(x).l0 < 90
    assert off(view.dense_encode(x), f) <= 1e-6 and off(view.reconstruct(x), x_hat) <= 1e-6
    exact = from_sae_lens(copy.deepcopy(theirs).double(), dtype=torch.double)
    theirs = theirs.to(torch.double)
    f, x_hat = encode_and_decode(theirs, x.double())
    assert off(exact.dense_encode(x.double()), f) <= 1e-12 and off(exact.reconstruct(x.double()), x_hat) <= 1e-12


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_top_k_without_rescaling(architecture):
    theirs, x = random_sae_lens(architecture, rescale_acts_by_decoder_norm=False), draw(60, 16)
    f, x_hat = encode_and_decode(theirs, x)
    view = from_sae_lens(theirs)
    assert off(view.dense_encode(x), f) <= 1e-6 and off(view.reconstruct(x), x_hat) <= 1e-6
    assert (f < 0).any() == (architecture == "abstopk")


@pytest.mark.parametrize("settings", [
    dict(residual_threshold=2.0), dict(residual_threshold=0.0, stop_on_duplicate_support=False),
    dict(stop_on_duplicate_support=False), dict(max_iterations=None), dict(max_iterations=1)])
def test_matching_pursuit_stops_where_sae_lens_stops(settings):
    theirs, x = random_sae_lens("matching_pursuit", d_sae=20, **settings), 2 * draw(60, 16)
    with torch.no_grad(): f = theirs.encode(x)
    assert off(from_sae_lens(theirs).dense_encode(x), f) <= 1e-6


TRAINED = ("standard", "gated", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "matching_pursuit")


@pytest.mark.parametrize("architecture", TRAINED)
def test_an_sae_in_training_is_viewed_as_it_would_be_saved(architecture, tmp_path):
    cls, config = get_sae_training_class(architecture)
    settings = {"matryoshka_widths": [10, 40]} if "matryoshka" in architecture else {}
    if "topk" in architecture: settings |= dict(k=4)
    metadata, x = SAEMetadata(hook_name="blocks.0.hook_resid_pre"), draw(300, 16)
    sae = cls(config(d_in=16, d_sae=40, metadata=metadata, **settings))
    for p in sae.parameters(): p.data += 0.2 * draw(*p.shape, seed=1)
    if hasattr(sae, "topk_threshold"):
        for _ in range(200): sae.training_forward_pass(TrainStepInput(x, {}, None, 1, False))
        assert sae.topk_threshold > 0.1
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    view = from_sae_lens(sae)
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items()), "looking at an SAE changes it"
    assert all(p.requires_grad for p in sae.parameters() if p.is_floating_point()) and sae.training
    assert not view.W_dec.requires_grad
    copy.deepcopy(sae).save_inference_model(tmp_path / "sae")
    saved = SAE.load_from_disk(str(tmp_path / "sae"))
    f, x_hat = encode_and_decode(saved, x)
    assert off(view.dense_encode(x), f) <= 1e-6 and off(view.reconstruct(x), x_hat) <= 1e-6
    assert off(load_saes(tmp_path).before(0).reconstruct(x), x_hat) <= 1e-6


def test_sae_at_hook_z_takes_heads_side_by_side():
    theirs = random_sae_lens("topk", hook="blocks.1.attn.hook_z", d_in=32, reshape_activations="hook_z")
    z = draw(5, 7, 4, 8)  # prompt pos head d_head
    with torch.no_grad(): x_hat = theirs.decode(theirs.encode(z))
    view = from_sae_lens(theirs)
    assert view.node == Node("z", 1) and view.d_in == 32
    assert off(view.reconstruct(z.flatten(-2)).unflatten(-1, (4, 8)), x_hat) <= 1e-6


def test_sae_of_one_head_stands_at_that_head():
    theirs = random_sae_lens("standard", hook="blocks.1.attn.hook_q", d_in=8)
    theirs.cfg.metadata.hook_head_index = 3
    assert from_sae_lens(theirs).node == Node("q", 1, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_computed_with_in_single(dtype):
    theirs, x = random_sae_lens("topk"), draw(40, 16)
    half, whole = from_sae_lens(theirs, dtype=dtype), from_sae_lens(copy.deepcopy(theirs).to(dtype).float())
    assert half.W_dec.dtype == dtype and half.reconstruct(x).dtype == torch.float32
    rescaled = whole.W_dec.to(dtype).float()  # the unit directions are rounded once more
    assert off(half.encode(x).values, whole.encode(x).values) < 1e-6
    assert off(half.directions(torch.arange(96)), rescaled) < 1e-2
    loop, codes = [], half.encode(x)
    for indices, weights in zip(codes.indices, codes.weights):
        loop.append(sum(weight * half.W_dec[i].float() for i, weight in zip(indices, weights)))
    assert_close(half.reconstruct(x), torch.stack(loop) + half.b_dec.float())


# No state

@given(st.permutations(range(6)))
def test_codes_decode_the_same_in_any_order_and_company(order):
    sae, x = from_sae_lens(random_sae_lens("standard", "layer_norm")), 5 * draw(6, 16) + 2
    codes = sae.encode(x)
    other = sae.encode(x[list(order)])
    assert off(sae.decode(other), sae.decode(codes)[list(order)]) <= 1e-6
    latents = (other.weights[..., None] * sae.directions(other.indices)).sum(1)
    assert off(latents + sae.bias(other), sae.decode(other)) <= 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_and_chunks_change_nothing(architecture, monkeypatch):
    sae, x = from_sae_lens(random_sae_lens(architecture, "layer_norm")), draw(30, 16)
    whole, rebuilt = sae.dense_encode(x), sae.reconstruct(x)
    monkeypatch.setattr(saes_room, "LATENT_BLOCK", 7)
    sae = from_sae_lens(random_sae_lens(architecture, "layer_norm"))
    assert off(sae.dense_encode(x), whole) <= 1e-6
    assert off(sae.decode(sae.encode(x, chunk=4)), rebuilt) <= 1e-6


@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 30), st.floats(0, 1))
def test_codes_hold_what_is_not_zero_largest_first(seed, rows, latents, density):
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, latents, generator=g) * (torch.rand(rows, latents, generator=g) < density)
    codes = to_codes(dense)
    assert_close(torch.zeros_like(dense).scatter_add(-1, codes.indices, codes.values), dense)
    assert (codes.values.abs().diff(dim=-1) <= 0).all()


def test_nothing_to_encode_is_no_error():
    for architecture in ARCHITECTURES:
        sae = from_sae_lens(random_sae_lens(architecture))
        assert sae.reconstruct(torch.zeros(0, 16)).shape == (0, 16)
        assert sae.reconstruct(torch.zeros(2, 3, 16)).shape == (2, 3, 16)


def test_pursuit_against_a_plain_loop():
    W, x = torch.nn.functional.normalize(draw(30, 8), dim=-1), draw(20, 8, seed=1)
    codes = Pursuit(W, 3, stop_on_repeat=False)(x)
    for row, indices, values in zip(x, codes.indices, codes.values):
        rest, found = row.clone(), torch.zeros(30)
        for _ in range(3):
            i = (W @ rest).argmax()
            amount = (W[i] @ rest).relu()
            found[i] += amount
            rest = rest - amount * W[i]
        assert_close(torch.zeros(30).scatter_add(0, indices, values), found)


# What is refused

def sae_of(architecture, **settings):
    metadata = dict(hook_name="blocks.0.hook_resid_mid")
    return SAE.from_dict(dict(architecture=architecture, d_in=16, d_sae=64, metadata=metadata, **settings))


TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_are_refused(architecture):
    with pytest.raises(ValueError, match="latents of a transcoder are no parts of what it reads"):
        load_saes([sae_of(architecture, d_out=16, apply_b_dec_to_input=False)])


def test_sequence_saes_are_refused():
    with pytest.raises(ValueError, match="reads a whole sequence at a time"):
        load_saes([sae_of("temporal", n_heads=1, bottleneck_factor=64, kval_topk=4)])


@pytest.mark.parametrize("hook", [
    "blocks.0.mlp.hook_post", "blocks.0.ln1.hook_normalized", "hook_embed", "model.layers.3", "blocks.x.hook_resid_pre",
])
def test_saes_at_other_hooks_are_refused(hook):
    sae = random_sae_lens("standard", hook=hook)
    with pytest.raises(ValueError, match=f"hook '{hook}' is not one of an SAE that can be used here"): load_saes([sae])


def test_every_registered_architecture_is_viewed_or_refused():
    from sae_lens.registry import SAE_CLASS_REGISTRY
    known = {*ARCHITECTURES, *TRANSCODERS, "temporal"}
    assert set(SAE_CLASS_REGISTRY) == known, "sae_lens has an architecture that nobody has looked at"


def toys(*nodes, d_in=4):
    places = [Node.parse(node) for node in nodes]
    return SAESet("toys", {place: SparseSAE(place, torch.eye(d_in), torch.zeros(d_in), torch.relu) for place in places})


@pytest.mark.parametrize("nodes,match", [
    (("L0.resid_pre", "L1.z"), "mixes SAEs of the residual stream .L0.resid_pre. with SAEs at a site .L1.z."),
    (("L0.resid_post", "L1.resid_pre"), "two SAEs for the same place, L0.resid_post and L1.resid_pre"),
])
def test_sets_that_leave_open_which_sae_is_meant_are_refused(nodes, match):
    with pytest.raises(ValueError, match=match): toys(*nodes)


def test_sets_of_different_widths_are_refused():
    sae = toys("L0.resid_pre", d_in=3).saes | toys("L1.resid_pre").saes
    with pytest.raises(ValueError, match="residual streams of different widths: L0.resid_pre 3, L1.resid_pre 4"):
        SAESet("toys", sae)


def test_two_saes_of_a_folder_at_one_place_must_be_chosen_from(tmp_path):
    for width in (32, 64): random_sae_lens("standard", d_sae=width).save_model(tmp_path / f"width_{width}" / "layer_2")
    both = "two SAEs at L2.resid_pre, width_32/layer_2 and width_64/layer_2: choose some with `ids`"
    with pytest.raises(ValueError, match=both): load_saes(tmp_path)
    assert load_saes(tmp_path, ids="width_64/*").before(2).d_sae == 64
    with pytest.raises(ValueError, match="ids='width_9/.' is none of the SAEs"): load_saes(tmp_path, ids="width_9/*")
    release = "is none of the SAEs of release 'gpt2-small-res-jb' .has blocks.0.hook_resid_pre"
    with pytest.raises(ValueError, match=release):
        load_saes("gpt2-small-res-jb", ids="nothing")


# Own objects

def test_own_object_with_decode_only():
    view, x = load_saes({"L1.resid_pre": Own(16)}).before(1), draw(30, 16)
    assert off(view.reconstruct(x), Own(16).decode(Own(16).encode(x))) < 1e-5
    assert load_saes({Node("z", 2, 1, "END"): Own(16)}).find(Node("z", 2, 1, "END")).d_in == 16


def test_w_dec_is_used_only_where_it_is_the_decoder():
    class Scaled(Own):
        hook_name = "blocks.3.hook_resid_pre"
        @property
        def W_dec(self): return self.dec  # the decoder divides by its norms
        def decode(self, f): return f @ (self.dec / self.dec.norm(dim=-1, keepdim=True)) - 1

    view, x = load_saes(Scaled(16)).before(3), draw(30, 16)
    assert_close(view.W_dec.norm(dim=-1), torch.ones(96), rtol=1e-4, atol=1e-4)
    assert off(view.reconstruct(x), Scaled(16).decode(Scaled(16).encode(x))) < 1e-5


def test_object_without_decode_needs_its_matrix():
    class Bare:
        node, W_dec, b_dec = Node("resid_pre", 0), draw(6, 4), draw(4, seed=2)
        def encode(self, x): return x @ self.W_dec.T

    x = draw(5, 4, seed=3)
    assert_close(load_saes([Bare()]).before(0).reconstruct(x), x @ Bare.W_dec.T @ Bare.W_dec + Bare.b_dec)


def test_object_that_keeps_a_scale_is_refused():
    class Keeps(Own):
        def encode(self, x):
            self.scale = x.norm(dim=-1, keepdim=True)
            return super().encode(x / self.scale)
        def decode(self, f): return super().decode(f) * (self.scale if len(self.scale) == len(f) else 1)

    with pytest.raises(ValueError, match="it keeps a scale in between"): from_object(Keeps(16), Node("resid_pre", 0))


@pytest.mark.parametrize("decode", [
    lambda self, f: (f @ self.dec).tanh(),
    lambda self, f: f @ self.dec * f.sum(-1, keepdim=True),
])
def test_decoder_that_is_not_affine_is_refused(decode):
    bent = type("Bent", (Own,), {"decode": decode})
    with pytest.raises(ValueError, match="does not decode affinely"): from_object(bent(16), Node("resid_pre", 0))


@pytest.mark.parametrize("sae,error,match", [
    (object(), TypeError, "needs `encode`, and `decode` or `W_dec`"),
    (Own(16), ValueError, "does not say where it stands"),
])
def test_other_objects_are_refused(sae, error, match):
    with pytest.raises(error, match=match): load_saes([sae])


# The ground truth as an SAE

def dictionary(sizes=(5, 3, 2), d=12, products=(), unseen="error", weight=1.0):
    values = {name: [f"{name}{i}" for i in range(n)] for name, n in zip("ABC", sizes)}

    def features(attributes, values, seed):
        vectors, counts = draw(len(values), d, seed=seed), torch.ones(len(values)).long()
        return Features(tuple(attributes), tuple(values), vectors, counts, weight)
    every = [features(name, [(v,) for v in values[name]], seed) for seed, name in enumerate(values)]
    for product in products:
        combinations = list(itertools.product(*(values[a] for a in product)))
        every.append(features(product, combinations[1:], 8))  # the first was never seen
    return Dictionary(draw(d, seed=9), tuple(every), unseen)


def all_rows(truth):
    "Every combination of the attributes' values."
    singles = [f for f in truth.features if not f.is_product]
    rows = itertools.product(*([value for (value,) in f.values] for f in singles))
    return pd.DataFrame(list(rows), columns=[f.name for f in singles])


def test_values_are_read_from_noisy_activations():
    truth = dictionary()
    combos = all_rows(truth)
    x = truth.reconstruct(combos) + 0.2 * draw(len(combos), 12, seed=5)
    sae, starts = supervised_as_sae(truth, Node("z", 0, 0, "END")), {"A": 0, "B": 5, "C": 8}
    said = [[starts[a] + truth[a].values.index((v,)) for a, v in row.items()] for _, row in combos.iterrows()]
    assert sae.encode(x).indices.tolist() == said and sae.encode(x).l0 == 3 and sae.d_sae == 10
    assert_close(sae.reconstruct(x), truth.reconstruct(combos))
    assert_close(sae.decode(Codes(torch.tensor(said), torch.ones(len(said), 3))), truth.reconstruct(combos))


@pytest.mark.parametrize("unseen", ["error", "additive"])
def test_products_are_latents_of_their_own_and_weights_count(unseen):
    truth = dictionary(products=["AB"], unseen=unseen, weight=0.7)
    combos = all_rows(truth)
    if unseen == "error": combos = combos[truth.knows(combos).tolist()].reset_index(drop=True)
    x, sae = truth.reconstruct(combos), supervised_as_sae(truth, Node("z", 0, 0, "END"))
    codes = sae.encode(x + 0.02 * draw(len(x), 12, seed=5))
    exact = (sae.decode(codes) - x).norm(dim=1) < 1e-4
    assert exact.float().mean() > 0.9, "local minima aside, noise of this size hides no value"
    active = (codes.values != 0).sum(1)[exact]
    assert sae.d_sae == 10 + 14 and active.min() == (4 if unseen == "error" else 3)
    assert_close(sae.W_dec[:5], 0.7 * truth["A"].vectors)


def test_no_single_change_of_value_comes_nearer():
    truth, x = dictionary((4, 4), d=3), 2 * draw(50, 3, seed=7)  # too few dimensions to tell the values apart
    sae = supervised_as_sae(truth, Node("z", 0, 0, "END"))
    A, B, chosen = truth["A"].vectors, truth["B"].vectors, sae.encode(x).indices - torch.tensor([0, 4])
    for row, (a, b) in zip(x - truth.mean, chosen.tolist()):
        distance = (row - A[a] - B[b]).norm()
        for other in range(4):
            assert distance <= (row - A[other] - B[b]).norm() + 1e-5
            assert distance <= (row - A[a] - B[other]).norm() + 1e-5


def test_random_decoder_keeps_shape_place_and_sparsity_and_its_seed():
    sae, x = from_sae_lens(random_sae_lens("topk", "layer_norm")), 3 * draw(80, 16) + 2
    twin, again, other = random_decoder(sae, x), random_decoder(sae, x), random_decoder(sae, x, seed=1)
    assert (twin.node, twin.d_sae, twin.d_in) == (sae.node, sae.d_sae, sae.d_in)
    assert twin.encode(x).values.shape[-1] == 5
    assert torch.equal(twin.W_dec, again.W_dec) and not torch.equal(twin.W_dec, other.W_dec)
    assert not torch.allclose(twin.W_dec, sae.W_dec)
