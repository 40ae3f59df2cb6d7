"""One view of every SAE: against sae_lens' own encode and decode, without state, in blocks, from files, and refused."""
import copy
import functools
import itertools
import shutil
import sys
import types
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_kinds import NORMALISATIONS, Own
from sklearn.decomposition import PCA
from torch.testing import assert_close

import sage_nb.saes.codes as saes_room
from sage_nb.core.activations import Node
from sage_nb.core.digest import digest_of
from sage_nb.core.models import EMBEDDED
from sage_nb.truth.features import Dictionary, Features
from sage_nb.saes.adapters import ARCHITECTURES, TRANSCODERS, from_object, from_sae_lens, random_sae_lens
from sage_nb.saes.codes import (
    BlockEncoder, Codes, Pursuit, RoundsPursuit, SparseSAE, TranscoderInput, remembered_codes, to_codes)
from sage_nb.saes.sets import SAESet, embedded_saes, load_saes
from sage_nb.saes.baselines import identity_sae, pca_sae, random_decoder, signs_apart, supervised_as_sae


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


def test_sequence_saes_are_refused():
    with pytest.raises(ValueError, match="reads a whole sequence at a time"):
        load_saes([sae_of("temporal", n_heads=1, bottleneck_factor=64, kval_topk=4)])


@pytest.mark.parametrize("hook", [
    "blocks.0.mlp.hook_post", "blocks.0.ln1.hook_normalized", "hook_pos_embed", "model.layers.3.mlp",
    "blocks.x.hook_resid_pre",
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


def test_twins_of_different_places_share_no_directions():
    x = draw(80, 16)
    lower, upper = (from_sae_lens(random_sae_lens("topk", hook=f"blocks.{i}.hook_resid_pre")) for i in (1, 2))
    assert torch.equal(lower.W_dec, upper.W_dec)
    first, second = random_decoder(lower, x).W_dec, random_decoder(upper, x).W_dec
    assert (first @ second.T).max() < 0.97, "a direction of one layer is one of the other"
    head = replace(lower, node="L1H0.z")
    other = replace(lower, node="L1H1.z")
    assert not torch.allclose(random_decoder(head, x).W_dec, random_decoder(other, x).W_dec)


def test_random_twins_are_made_alike_for_embedded_sets_and_own_ones():
    saes, x = load_saes("tiny-gpt2-res-topk"), draw(60, 128)
    assert not hasattr(saes, "twin")
    own = load_saes([SparseSAE(sae.node, sae.W_dec, sae.b_dec, sae.encoder) for sae in saes])
    for sae, same in zip(saes, own):
        twin, twin_of_own = random_decoder(sae, x), random_decoder(same, x)
        assert torch.equal(twin.W_dec, twin_of_own.W_dec) and twin.digest == twin_of_own.digest


def topk_of(d_sae):
    W = draw(d_sae, 48)
    encoder = BlockEncoder(lambda x, part: (x @ W[part].T).relu(), d_sae, k=20)
    return SparseSAE("L0.resid_pre", W, torch.zeros(48), encoder)


def test_the_twin_of_a_large_sae_is_as_hard_to_beat_as_if_it_chose_one_by_one():
    x, twin = draw(90, 48, seed=1), random_decoder(topk_of(6000), draw(90, 48, seed=1))
    assert isinstance(twin.encoder, RoundsPursuit)
    assert not isinstance(random_decoder(topk_of(4000), x).encoder, RoundsPursuit)
    one_by_one = Pursuit(twin.W_dec, 20)(x - twin.b_dec)
    def explained(x_hat): return 1 - ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert twin.encode(x).l0 > 19
    assert 0.5 < explained(twin.decode(one_by_one)) < explained(twin.reconstruct(x)) + 0.01


def plain_rounds(W, x, steps, rounds):
    "One token: in each round, pursuit among the directions that have most in common with what is left."
    share, rest, codes = -(-steps // rounds), x.clone(), {}
    for start in range(0, steps, share):
        common = W @ rest
        pool = [i for i in common.argsort(descending=True)[: max(64, 5 * share)].tolist() if i not in codes]
        now = {}
        for _ in range(min(share, steps - start)):
            best = max(pool, key=lambda i: (W[i] @ rest).item())
            amount = (W[best] @ rest).relu()
            rest = rest - amount * W[best]
            now[best] = now.get(best, 0) + amount.item()
        codes |= {i: amount for i, amount in now.items() if amount}
    return codes


@pytest.mark.parametrize("steps,rounds", [(30, 4), (7, 2), (5, 5), (3, 9)])
def test_rounds_of_pursuit_against_a_plain_loop(steps, rounds, monkeypatch):
    W, x = torch.nn.functional.normalize(draw(500, 24), dim=-1), draw(12, 24, seed=1)
    expected = [plain_rounds(W, row - 0.1, steps, rounds) for row in x]
    for block in (2**14, 90):
        monkeypatch.setattr(saes_room, "LATENT_BLOCK", block)
        codes = RoundsPursuit(W, torch.full((24,), 0.1), steps, rounds)(x)
        for indices, values, wanted in zip(codes.indices.tolist(), codes.values.tolist(), expected):
            got = {i: value for i, value in zip(indices, values) if value}
            assert got == pytest.approx(wanted, abs=1e-4)


# What is remembered

some_rows = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(st.lists(some_rows, min_size=1, max_size=6), st.sampled_from([0, 4000, 2**30]))
def test_remembered_codes_are_those_of_the_sae(asked, most):
    "Whatever is asked in which order, and however much is kept; only the filling of rows may differ."
    x, seen = 5 * draw(10, 16) + 2, []
    plain = from_sae_lens(random_sae_lens("standard", "layer_norm"))

    def watched(rows):
        seen.append(len(rows))
        return plain.encoder(rows)
    watching = replace(plain, encoder=watched)
    with remembered_codes(most):
        for rows in asked:
            ours, theirs = watching.encode(x[rows]), plain.encode(x[rows])
            assert_close(watching.decode(ours), plain.decode(theirs), rtol=1e-5, atol=1e-5)
            assert_close(ours.values[ours.values != 0], theirs.values[theirs.values != 0], rtol=1e-5, atol=1e-5)
            assert_close(ours.indices[ours.values != 0], theirs.indices[theirs.values != 0])
    if most == 2**30: assert sum(seen) == len({row for rows in asked for row in rows})


def test_remembered_codes_of_a_transcoder_hold_what_it_passes_on():
    reading = TranscoderInput("L0.mlp_in", 8, draw(16, 8, seed=3))
    sae = SparseSAE("L0.mlp_out", draw(20, 16), draw(16), lambda x: x.repeat(1, 3)[:, :20].relu(), reading=reading)
    x = draw(4, 5, 8)
    with remembered_codes(): first, again = sae.encode(x), sae.encode(x[:, 2:])
    assert_close(first.skip, sae.encode(x).skip)
    assert_close(sae.decode(again), sae.reconstruct(x)[:, 2:])


def test_what_is_remembered_is_of_one_sae_and_ends_with_the_block():
    x, calls = draw(3, 16), []

    def encoder(rows):
        calls.append(len(rows))
        return rows.relu()
    first = SparseSAE("L0.resid_pre", torch.eye(16), torch.zeros(16), encoder)
    second = replace(first, b_dec=torch.ones(16))
    with remembered_codes():
        for sae in (first, second, first): sae.encode(x)
        with remembered_codes(): first.encode(x)
        first.encode(x)
    first.encode(x)
    assert calls == [3, 3, 3, 3]
    broken = replace(first, encoder=lambda rows: rows / 0)
    with remembered_codes():
        for _ in range(2):
            with pytest.raises(ValueError, match="nan or infinite"): broken.encode(x)


# Components, and signs apart

@pytest.mark.parametrize("k", [1, 5, 24])
def test_components_are_scikit_learns(k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(200, 24, generator=g) * torch.linspace(0.2, 3, 24) + torch.randn(24, generator=g)
    theirs, ours = PCA(k).fit(x.double().numpy()), pca_sae(x, k, "L0.z")
    seen = torch.randn(30, 24, generator=g)
    expected = theirs.inverse_transform(theirs.transform(seen.double().numpy()))
    assert_close(ours.reconstruct(seen).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_with_signs_apart_each_latent_is_two_of_which_one_is_on():
    g = torch.Generator().manual_seed(0)
    x, seen = torch.randn(200, 24, generator=g), torch.randn(30, 24, generator=g)
    whole = pca_sae(x, 5, "L0.z")
    apart = signs_apart(whole)
    assert_close(apart.reconstruct(seen), whole.reconstruct(seen))
    for mine, theirs in zip(apart.dense_encode(seen), whole.dense_encode(seen)):
        for i, code in enumerate(theirs.tolist()):
            assert (mine[i].item(), mine[5 + i].item()) == pytest.approx((max(code, 0), max(-code, 0)))


# Digests

W, BIAS = draw(16, 96), 0.1 * draw(96, seed=4)
MASK = torch.ones(96)
MODULE = types.ModuleType("one_of_ones_own")
MODULE.gain = 2.0


class Layers(torch.nn.Module):
    "An encoder that is a module with a module in it."

    def __init__(self, k=5):
        super().__init__()
        self.linear = torch.nn.Linear(16, 96)
        self.linear.weight.data, self.linear.bias.data = draw(96, 16), draw(96)
        self.register_buffer("threshold", torch.zeros(96), persistent=False)
        self.k = k

    @torch.no_grad()
    def forward(self, x):
        y = self.linear(x)
        return self.only_largest(y * (y > self.threshold))

    def only_largest(self, y): return torch.zeros_like(y).scatter(-1, (top := y.topk(self.k)).indices, top.values)


class Slotted:
    __slots__ = ("weights", "cut")

    def __init__(self, weights, cut): self.weights, self.cut = weights, cut
    def __call__(self, x): return (x @ self.weights - self.cut).relu()


def masked(x): return (x @ W).relu() * MASK


def closed_over(mask): return lambda x: (x @ W + BIAS).relu() * mask
def in_a_list(mask): return lambda x, held=[{"mask": mask}]: (x @ W).relu() * held[0]["mask"]
def bound(cut): return Slotted(W, cut).__call__
def partly(cut): return functools.partial(lambda x, cut: (x @ W - cut).relu(), cut=cut)
def in_blocks(k): return BlockEncoder(lambda x, part: (x @ W[:, part]).relu(), 96, k)


def with_layers(change):
    layers = Layers()
    change(layers)
    return layers


def raise_threshold(layers): layers.threshold[:64] = torch.inf
def lower_bias(layers): layers.linear.bias.data[:64] = -torch.inf
def fewer(layers): layers.k = 3
def hook(layers): layers.linear.register_forward_hook(lambda module, args, out: out * (torch.arange(96) > 63))


OFF = torch.cat([torch.zeros(64), torch.ones(32)])
ENCODERS = {  # how 64 latents are switched off, or other codes made: the encoder, one that is changed
    "a mask in a closure": (lambda: closed_over(MASK), lambda: closed_over(OFF)),
    "a mask in a container": (lambda: in_a_list(MASK), lambda: in_a_list(OFF)),
    "a field with slots": (lambda: Slotted(W, 0.5), lambda: Slotted(W, 0.6)),
    "the object of a method": (lambda: bound(0.5), lambda: bound(0.6)),
    "an argument that is held": (lambda: partly(0.5), lambda: partly(0.6)),
    "a number in the code": (lambda: lambda x: (x @ W - 0.5).relu(), lambda: lambda x: (x @ W - 0.6).relu()),
    "another operation": (lambda: lambda x: (x @ W).relu(), lambda: lambda x: (x @ W).sigmoid()),
    "a library's function": (lambda: torch.relu, lambda: torch.sigmoid),
    "k": (lambda: in_blocks(5), lambda: in_blocks(4)),
    "steps of pursuit": (lambda: Pursuit(W.T, 3), lambda: Pursuit(W.T, 2)),
    "a buffer": (Layers, lambda: with_layers(raise_threshold)),
    "a bias in a module": (Layers, lambda: with_layers(lower_bias)),
    "an attribute of a module": (Layers, lambda: with_layers(fewer)),
    "a hook of a module": (Layers, lambda: with_layers(hook)),
    "a view in a view": (lambda: replace(VIEW, name="a").dense_encode, lambda: replace(VIEW, b_dec=OTHER).dense_encode),
}
VIEW, OTHER = from_sae_lens(random_sae_lens("standard")), draw(16)


def viewed(encoder): return SparseSAE("L0.resid_pre", W.T, torch.zeros(16), encoder)


@pytest.mark.parametrize("how", ENCODERS)
def test_a_digest_follows_everything_that_the_encoder_reaches(how):
    make, change = ENCODERS[how]
    sae, again, changed = viewed(make()), viewed(make()), viewed(change())
    assert sae.digest == again.digest != changed.digest
    assert len(sae.digest) == 16 and int(sae.digest, 16) >= 0
    assert SAESet("a", {sae.node: sae}).digest == SAESet("b", {again.node: again}).digest
    assert SAESet("a", {sae.node: sae}).digest != SAESet("a", {sae.node: changed}).digest


def test_a_digest_follows_global_variables_modules_and_classes_of_ones_own(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)
    def digests():
        encoders = [lambda x: x @ W * MODULE.gain, lambda x: (x @ W).relu() * MASK, lambda x: masked(x), Layers()]
        return [viewed(encoder).digest for encoder in encoders]
    before = digests()
    assert digests() == before
    monkeypatch.setattr(MODULE, "gain", 3.0)
    monkeypatch.setitem(globals(), "MASK", OFF)
    monkeypatch.setattr(Layers, "only_largest", lambda self, y: y.relu())
    assert all(a != b for a, b in zip(before, digests()))


@pytest.mark.parametrize("architecture,tensor,value", [
    ("standard", "b_enc", -torch.inf), ("topk", "b_enc", -torch.inf), ("jumprelu", "b_enc", -torch.inf),
    ("jumprelu", "threshold", torch.inf), ("gated", "b_gate", -torch.inf)])
def test_latents_switched_off_in_a_library_sae_change_the_digest_and_the_codes(architecture, tensor, value):
    off_64, x = random_sae_lens(architecture), draw(50, 16)
    getattr(off_64, tensor).data[:64] = value
    whole, part = from_sae_lens(random_sae_lens(architecture)), from_sae_lens(off_64)
    assert whole.digest != part.digest
    assert (part.dense_encode(x)[:, :64] == 0).all() and (whole.dense_encode(x)[:, :64] != 0).any()
    assert torch.equal(whole.W_dec, part.W_dec) and torch.equal(whole.b_dec, part.b_dec), "only the encoder differs"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_and_setting_of_a_library_sae_is_in_its_digest(architecture):
    digest = from_sae_lens(random_sae_lens(architecture)).digest
    for name, _ in random_sae_lens(architecture).named_parameters():
        other = random_sae_lens(architecture)
        getattr(other, name).data.flatten()[0] += 0.01
        assert from_sae_lens(other).digest != digest, f"{name} is not in the digest"
    settings = {"topk": [dict(k=4), dict(rescale_acts_by_decoder_norm=False)], "abstopk": [dict(k=4)],
                "matching_pursuit": [dict(max_iterations=3), dict(residual_threshold=1.0)]}.get(architecture, [])
    for changed in [*settings, dict(apply_b_dec_to_input=False)]:
        assert from_sae_lens(random_sae_lens(architecture, **changed)).digest != digest, changed
    assert from_sae_lens(random_sae_lens(architecture, "layer_norm")).digest != digest
    assert from_sae_lens(random_sae_lens(architecture, hook="blocks.1.hook_resid_pre")).digest != digest
    assert from_sae_lens(random_sae_lens(architecture), dtype="float16").digest != digest


@pytest.mark.parametrize("name", embedded_saes())
def test_a_set_has_the_same_digest_whenever_and_from_wherever_it_is_loaded(name, tmp_path):
    shutil.copytree(EMBEDDED / "saes" / name, tmp_path / "elsewhere")
    first, again, copied = load_saes(name), load_saes(name), load_saes(tmp_path / "elsewhere", "another name")
    assert first.digest == again.digest == copied.digest
    next(iter(again)).encode(draw(20, next(iter(again)).d_in))
    assert replace(again).digest == first.digest, "use changes the digest"
    folders = sorted(cfg.parent for cfg in (EMBEDDED / "saes" / name).rglob("cfg.json"))
    objects = [SAE.load_from_disk(str(folder), dtype="float32") for folder in folders]
    assert load_saes(objects).digest == first.digest


def test_digests_of_the_embedded_sets_differ():
    digests = {name: load_saes(name).digest for name in embedded_saes()}
    assert len(set(digests.values())) == len(digests)


def test_a_digest_is_the_same_on_every_machine():
    pursuit = SparseSAE("L0.resid_pre", torch.eye(3), torch.zeros(3), Pursuit(torch.eye(3), 2))
    assert pursuit.digest == "ed50f89feb1bb838", "digests in reports that were saved no longer fit"


def test_things_that_hold_each_other_have_digests():
    one, other = {"name": "one"}, {"name": "other"}
    one["other"], other["one"] = other, one
    assert digest_of(one) == digest_of(one) != digest_of(other)
    ring = Layers()
    ring.__dict__["itself"] = ring
    assert digest_of(ring) == digest_of(ring) != digest_of(Layers())


# Names and kinds

def test_unnamed_sets_say_what_they_are_and_differ():
    first, second = (load_saes([replace(VIEW, name="mine", b_dec=draw(16, seed=i))]) for i in (1, 2))
    assert first.name != second.name and all(s.name.startswith("mine L2.resid_pre ") for s in (first, second))
    assert first.name.endswith(first.digest[:6])
    own = load_saes({f"L{layer}.resid_pre": Own(16) for layer in range(3)})
    assert own.name == f"Own L0.resid_pre … L2.resid_pre {own.digest[:6]}"
    assert load_saes({f"L{layer}.resid_pre": Own(16) for layer in range(3)}).name == own.name
    library = random_sae_lens("topk")
    assert load_saes([library]).name.startswith("TopKSAE L2.resid_pre ")
    library.cfg.metadata.release = "some-release"
    assert load_saes(library).name.startswith("some-release L2.resid_pre ")
    assert load_saes(library, "named").name == "named"


def test_names_of_stored_sets_say_where_they_came_from(tmp_path, monkeypatch):
    shutil.copytree(EMBEDDED / "saes" / "tiny-gpt2-z-topk", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert load_saes(".").name == load_saes("./").name == load_saes("../mine").name == "mine"
    assert load_saes(tmp_path / "mine", ids="blocks.2*").name == "mine (blocks.2*)"
    assert load_saes("tiny-gpt2-z-topk").name == "tiny-gpt2-z-topk"
    assert next(iter(load_saes("."))).name == "mine"


def test_architectures_are_said():
    for architecture in ARCHITECTURES: assert from_sae_lens(random_sae_lens(architecture)).architecture == architecture
    assert {sae.architecture for sae in load_saes("tiny-gemma-res-jumprelu")} == {"jumprelu"}
    x = draw(40, 16)
    kinds = [from_object(Own(16), "L0.z"), pca_sae(x, 3, "L0.z"), identity_sae(16, "L0.z"), random_decoder(VIEW, x),
             supervised_as_sae(dictionary(), "L0H0.z@END")]
    assert [sae.architecture for sae in kinds] == ["Own", "pca", "identity", "random decoder", "supervised"]


def test_sets_and_saes_print_in_a_line():
    for name in embedded_saes():
        saes = load_saes(name)
        texts = [repr(saes), *map(repr, saes)]
        assert all(len(text) < 160 and "\n" not in text for text in texts)
        first = next(iter(saes))
        assert name in texts[0] and first.architecture in texts[0] and str(first.d_sae) in texts[0]
        assert f"{len(saes)} × " in texts[0]


# Where SAEs can stand

@pytest.mark.parametrize("name", embedded_saes())
def test_embedded_sets_fit_their_model_and_no_other_site(name, random_models):
    family = name.split("-")[1]
    load_saes(name).require(random_models[family])


@pytest.mark.parametrize("family", ["gpt2", "gpt2-hooked", "pythia", "pythia-hooked", "gemma", "gemma-hooked"])
def test_what_fits_a_model_is_what_can_be_captured_there(random_models, family):
    model, tokens = random_models[family], torch.randint(5, 200, (2, 6))
    _, cache = model.run_with_cache(tokens)
    for node in map(Node.parse, ("L1.resid_pre", "L1.resid_mid", "L3.resid_post", "L0.z", "L1H1.k", "L2.v", "L2.q")):
        if node.hook not in model.hook_dict: continue
        width = cache[node.hook].flatten(2).shape[-1] if node.head is None else cache[node.hook].shape[-1]
        fits, wide = (SAESet(str(d), {node: identity_sae(d, node)}) for d in (width, width + 1))
        fits.require(model)
        refused = f"activations of width {width} there, not {width + 1}"
        with pytest.raises(ValueError, match=refused): wide.require(model)


def test_blocks_in_parallel_have_no_middle(random_models):
    middle = SAESet("middle", {Node("resid_mid", 1): identity_sae(128, "L1.resid_mid")})
    middle.require(random_models["gpt2"])
    with pytest.raises(ValueError, match="the model has no resid_mid: is another"):
        middle.require(random_models["pythia"])


def test_the_stream_after_the_last_layer_may_be_called_before_the_next(random_models):
    def at(layer): return SAESet("end", {Node("resid_pre", layer): identity_sae(128, Node("resid_pre", layer))})
    at(4).require(random_models["gpt2"])
    with pytest.raises(ValueError, match="has 4 layers"): at(5).require(random_models["gpt2"])
