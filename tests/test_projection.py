"""A residual-stream SAE at the sublayers: parts that sum to the truth, against plain loops and real runs."""
import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import RANDOM
from sae_kinds import KINDS, random_saes, random_set
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sage_nb.core.activations import HEAD_SITES, Node, capture, hooked
from sage_nb.discovery.attribution import all_nodes
from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.core.sublayers import Norm, Reader, _agreed, require_identity
from sage_nb.saes.adapters import from_sae_lens
from sage_nb.saes.baselines import identity_sae
from sage_nb.saes.codes import MOST_FORMED
from sage_nb.saes.reconstruction import ProjectionSettings, decompose, reconstruct
from sage_nb.saes.routes import route_taken
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.tasks.task import load_task

POSITIONS = ("IO", "S2", "END")
ZOO = ("tiny-gpt2", "tiny-pythia", "tiny-gemma")


def largest_relative_error(model, prompts, saes, nodes):
    "The largest over nodes and prompts of ‖latents + bias + error − true‖ / ‖true‖, per site."
    worst, missed = dict.fromkeys(HEAD_SITES, 0.0), dict.fromkeys(HEAD_SITES, 0.0)
    decomposed = {}
    for layer in dict.fromkeys(node.layer for node in nodes):
        here = [node for node in nodes if node.layer == layer]
        decomposed |= decompose(model, prompts, here, saes.before(layer))
    for node, true in capture(model, prompts, nodes).items():
        parts = decomposed[node]
        off = parts.latents.sum(1) + parts.bias + parts.error - true
        worst[node.site] = max(worst[node.site], (off.norm(dim=1) / true.norm(dim=1)).max().item())
        missed[node.site] = max(missed[node.site], (parts.error.norm() / true.norm()).item())
    assert min(missed.values()) > 0.05, f"the SAE is perfect, so that leaving out its error would not show: {missed}"
    return worst


# Decomposition sum to the truth

def test_parts_sum_to_the_truth_on_the_embedded_model(model, task, sae_set):
    worst = largest_relative_error(model, task.prompts[:18], sae_set, all_nodes(model, POSITIONS))
    assert max(worst.values()) <= 1e-5, worst


def test_parts_sum_to_the_truth_in_every_family(random_model):
    task = load_task("ioi", random_model, n=24)[:9]
    worst = largest_relative_error(random_model, task.prompts, random_saes(), all_nodes(random_model, POSITIONS))
    assert max(worst.values()) <= 1e-5, worst


def test_parts_sum_to_the_truth_where_a_hooked_transformer_shares_key_heads(random_models):
    model = random_models["gemma-hooked"]
    assert model.cfg.n_key_value_heads < model.cfg.n_heads and model.blocks[1].attn.W_K.shape[0] == model.cfg.n_heads
    task = load_task("ioi", model, n=24)[:9]
    worst = largest_relative_error(model, task.prompts, random_saes(), all_nodes(model, ["IO", "END"]))
    assert max(worst.values()) <= 1e-5, worst


def test_parts_sum_to_the_truth_where_weights_are_folded_and_centred(random_models):
    folded = copy.deepcopy(random_models["gpt2-hooked"])
    folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    assert type(folded.blocks[2].ln1) is not type(random_models["gpt2-hooked"].blocks[2].ln1)
    task = load_task("ioi", folded, n=24)[:9]
    worst = largest_relative_error(folded, task.prompts, random_saes(), all_nodes(folded, ["IO", "END"]))
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("name", ZOO)
def test_parts_sum_to_the_truth_where_a_bridge_folds_its_norms(name):
    model, kind = load_model(name), {"tiny-gpt2": "topk", "tiny-pythia": "batchtopk", "tiny-gemma": "jumprelu"}
    prompts, nodes = load_task("ioi", model, n=24)[:4].prompts, [Node.parse(n) for n in NODES]
    gamma = Norm.of(model, 1).gamma
    model.enable_compatibility_mode()
    assert not torch.allclose(gamma, torch.ones(128))
    assert_close(Norm.of(model, 1).gamma, torch.ones(128))
    true = capture(model, prompts, nodes)
    for node, parts in decompose(model, prompts, nodes, load_saes(f"{name}-res-{kind[name]}")).items():
        assert ((parts.reconstruction + parts.error - true[node]).norm() / true[node].norm()).item() <= 1e-5


NODES = ("L1H1.q@END", "L1H1.k@S2", "L1H1.v@IO", "L1H3.z@END", "L1.attn_out@S2", "L1.mlp_out@END")
PLACES = {  # where the SAEs of a set stand
    "stream": ("resid_pre", "resid_post"),
    "middle": ("resid_pre", "resid_mid", "resid_post"),
    "site": ("z", "attn_out", "mlp_out"),
}


@pytest.fixture(scope="module")
def every_model(random_models): return random_models | {name: load_model(name) for name in ZOO}


PAIRS = [pytest.param(family, kind, marks=() if family in RANDOM or kind == "topk" else pytest.mark.slow)
         for family in (*ZOO, *RANDOM) for kind in KINDS]  # trained models are of the same families


@pytest.mark.parametrize("family,kind", PAIRS)
def test_parts_sum_to_the_truth_for_every_kind_of_sae_at_every_site(every_model, family, kind):
    model = every_model[family]
    prompts = load_task("ioi", model, n=24)[:4].prompts
    nodes, routes = [Node.parse(n) for n in NODES], set()
    true = capture(model, prompts, nodes)
    for where, sites in PLACES.items():
        places = [Node(site, 1) for site in sites if Node(site, 1).hook in model.hook_dict]
        saes = random_set(kind, capture(model, prompts, places))
        written = nodes[3:]  # z, attn_out and mlp_out
        for route, here in [("read", written)] if where == "site" else [("read", nodes), ("write", written)]:
            how = ProjectionSettings(route=route)
            rebuilt = reconstruct(model, prompts, here, saes, how)
            for node, parts in decompose(model, prompts, here, saes, how).items():
                off = parts.latents.sum(1) + parts.bias + parts.error - true[node]
                relative = (off.norm() / true[node].norm()).item()
                assert relative <= 1e-5, f"{where} {parts.route} {node}: {relative:.1e}"
                missed = (parts.error.norm() / true[node].norm()).item()
                assert kind in ("identity", "pca") or missed > 0.05, f"{node}: the SAE is perfect"
                assert_close(rebuilt[node], parts.reconstruction, rtol=1e-3, atol=1e-3)
                routes.add(parts.route)
    assert routes == {"read", "write", "difference", "direct"}


# Plain loops, from transformers' weights and a cache

def weights(family, hf, site, layer, head):
    "W (d_model, d_head), b, γ, β and whether the norm centres, as transformers stores them."
    nth, d = "qkv".index(site), 32
    if family == "gpt2":
        block = hf.transformer.h[layer]
        rows = slice(nth * 128 + head * d, nth * 128 + (head + 1) * d)
        return block.attn.c_attn.weight[:, rows], block.attn.c_attn.bias[rows], block.ln_1.weight, block.ln_1.bias, True
    if family == "pythia":
        block = hf.gpt_neox.layers[layer]
        rows = slice((3 * head + nth) * d, (3 * head + nth + 1) * d)
        joint, norm = block.attention.query_key_value, block.input_layernorm
        return joint.weight[rows].T, joint.bias[rows], norm.weight, norm.bias, True
    block = hf.model.layers[layer]
    head = head if site == "q" else head // 2
    W = getattr(block.self_attn, f"{site}_proj").weight[head * d : (head + 1) * d].T
    return W, torch.zeros(d), 1 + block.input_layernorm.weight, torch.zeros(128), False


def plain_parts(cache, node, at, sae, W, b, gamma, beta, centred, eps):
    "Contribution of every (source token, latent), and the bias, one at a time."
    def P(v, sigma): return (gamma * (v - v.mean() if centred else v) / sigma) @ W
    stream = cache[f"blocks.{node.layer}.hook_resid_pre"][0]
    attention = torch.eye(len(stream))[at]
    if node.site == "z": attention = cache[f"blocks.{node.layer}.attn.hook_pattern"][0, node.head, at]
    latents, bias = {}, 0
    for s, x in enumerate(stream):
        centre = x - x.mean() if centred else x
        sigma = (centre.square().mean() + eps).sqrt()
        bias = bias + attention[s] * (P(sae.b_dec, sigma) + beta @ W + b)
        for i, f in enumerate(sae.dense_encode(x[None])[0].tolist()):
            if f: latents[s, i] = attention[s] * f * P(sae.W_dec[i], sigma)
    return latents, bias


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma"])
@pytest.mark.parametrize("site", HEAD_SITES)
def test_each_latents_part_equals_a_plain_loop(random_models, hf_models, family, site):
    model, sae = random_models[family], random_saes().before(2)
    task = load_task("ioi", model, n=24)[:4]
    node = Node(site, 2, 1 if family == "gemma" and site in "kv" else 3, "END")
    parts = decompose(model, task.prompts, [node], sae)[node]
    for p in range(len(task)):
        _, cache = model.run_with_cache(task.prompts.tokens[p : p + 1])
        at, n = task.prompts.index("END")[p].item(), task.prompts.tokens.shape[1]
        head = 2 * node.head if family == "gemma" and site in "kv" else node.head  # the first query head that shares it
        read = weights(family, hf_models[family], "v" if site == "z" else site, 2, head)
        latents, bias = plain_parts(cache, node, at, sae, *read, model.cfg.eps)
        active = parts.latents.shape[1] // n  # z has these for each source token
        expected, got = torch.zeros(n, sae.d_sae, 32), torch.zeros(n, sae.d_sae, 32)
        for (s, i), value in latents.items(): expected[s, i] = value
        for j, (i, value) in enumerate(zip(parts.indices[p], parts.latents[p])):
            got[j // active if site == "z" else at, i] += value
        assert_close(got[: at + 1], expected[: at + 1], rtol=1e-4, atol=1e-5)
        assert_close(parts.bias[p], bias, rtol=1e-4, atol=1e-5)
        assert not got[at + 1 :].any(), "a token after END contributes"


def output_weights(family, hf, layer):
    "W_O (head, d_head, d_model), its bias, and the weights of the norm behind attention, or None."
    if family == "gpt2":
        proj = hf.transformer.h[layer].attn.c_proj
        return proj.weight.reshape(4, 32, 128), proj.bias, None
    if family == "pythia":
        dense = hf.gpt_neox.layers[layer].attention.dense
        return dense.weight.T.reshape(4, 32, 128), dense.bias, None
    block = hf.model.layers[layer]
    W_O = block.self_attn.o_proj.weight.T.reshape(4, 32, 128)
    return W_O, torch.zeros(128), 1 + block.post_attention_layernorm.weight


def behind(write, full, post, eps):
    "A part of what attention writes, behind the norm whose scale the full write sets."
    return write if post is None else post * write / (full.square().mean() + eps).sqrt()


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma"])
def test_parts_of_attn_out_equal_a_plain_loop_over_heads_and_tokens(random_models, hf_models, family):
    model, sae = random_models[family], random_saes().before(2)
    prompts = load_task("ioi", model, n=24)[:2].prompts
    W_O, b_O, post = output_weights(family, hf_models[family], 2)
    parts, = decompose(model, prompts, [Node("attn_out", 2, None, "END")], sae).values()
    for p in range(len(prompts)):
        _, cache = model.run_with_cache(prompts.tokens[p : p + 1])
        at, n = prompts.index("END")[p].item(), prompts.tokens.shape[1]
        full = sum(cache["blocks.2.attn.hook_z"][0, at, h] @ W_O[h] for h in range(4)) + b_O
        expected, bias = torch.zeros(n, sae.d_sae, 128), behind(b_O, full, post, model.cfg.eps)
        for h in range(4):
            read = weights(family, hf_models[family], "v", 2, h)
            latents, head_bias = plain_parts(cache, Node("z", 2, h, "END"), at, sae, *read, model.cfg.eps)
            for key, value in latents.items(): expected[key] += behind(value @ W_O[h], full, post, model.cfg.eps)
            bias = bias + behind(head_bias @ W_O[h], full, post, model.cfg.eps)
        active, got = parts.latents.shape[1] // n, torch.zeros(n, sae.d_sae, 128)
        for j, (i, value) in enumerate(zip(parts.indices[p], parts.latents[p])): got[j // active, i] += value
        assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert_close(parts.bias[p], bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma"])
def test_mlp_out_is_the_difference_of_the_streams(random_models, family):
    model, saes, node = random_models[family], random_saes(), Node("mlp_out", 2, None, "END")
    prompts = load_task("ioi", model, n=24)[:5].prompts
    pre, post, mid = (Node(site, 2, None, "END") for site in ("resid_pre", "resid_post", "resid_mid"))
    x = capture(model, prompts, [pre, post])
    attn = reconstruct(model, prompts, [Node("attn_out", 2, None, "END")], saes).popitem()[1]
    expected = saes.before(3).reconstruct(x[post]) - saes.before(2).reconstruct(x[pre]) - attn
    assert_close(reconstruct(model, prompts, [node], saes)[node], expected, rtol=1e-4, atol=1e-4)
    parts = decompose(model, prompts, [node], saes)[node]
    assert parts.route == "difference"
    assert parts.saes == (Node("resid_pre", 3), Node("resid_pre", 2), Node("resid_pre", 2))
    if family == "pythia": return
    middle = SAESet("middle", saes.saes | {(there := mid._replace(position=None)): replace(saes.before(1), node=there)})
    expected = saes.before(3).reconstruct(x[post]) - saes.before(1).reconstruct(capture(model, prompts, [mid])[mid])
    assert_close(reconstruct(model, prompts, [node], middle)[node], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "pythia", "gemma"])
def test_write_side_equals_least_squares_prompt_by_prompt(random_models, hf_models, family):
    model, saes = random_models[family], random_saes()
    prompts = load_task("ioi", model, n=24)[:5].prompts
    nodes = [Node("z", 2, 1, "END"), Node("attn_out", 2, None, "END"), Node("mlp_out", 2, None, "END")]
    post = Node("resid_post", 2, None, "END")
    true = capture(model, prompts, [*nodes, post])
    got = reconstruct(model, prompts, nodes, saes, ProjectionSettings(route="write"))
    W_O, _, gamma = output_weights(family, hf_models[family], 2)
    W = W_O[1] if gamma is None else W_O[1] * gamma
    for p in range(len(prompts)):
        active = saes.before(3).dense_encode(true[post][p]) != 0
        D = saes.before(3).W_dec[active].double()
        assert 5 < len(D) < 100
        def onto(u): return torch.linalg.lstsq(D.T, u.double()[:, None]).solution[:, 0] @ D
        z = torch.linalg.lstsq(W.double().T, onto(true[nodes[0]][p] @ W)[:, None]).solution[:, 0]
        assert_close(got[nodes[0]][p], z.float(), rtol=1e-3, atol=1e-4)
        for node in nodes[1:]: assert_close(got[node][p], onto(true[node][p]).float(), rtol=1e-3, atol=1e-4)


def test_sae_at_z_equals_a_run_of_sae_lens_on_all_heads(model, task):
    from sae_lens import SAE
    saes, prompts = load_saes("tiny-gpt2-z-topk"), task.prompts[:20]
    theirs = SAE.load_from_disk(str(EMBEDDED / "saes" / "tiny-gpt2-z-topk" / "blocks.2.attn.hook_z"), dtype="float32")
    nodes = [Node("z", 2, head, "END") for head in range(4)]
    z = torch.stack(list(capture(model, prompts, nodes).values()), 1)
    with torch.no_grad(): expected = theirs.decode(theirs.encode(z.flatten(1))).unflatten(1, (4, 32))
    rebuilt = torch.stack(list(reconstruct(model, prompts, nodes, saes).values()), 1)
    assert_close(rebuilt, expected, rtol=1e-4, atol=1e-5)
    assert {route_taken(node, saes) for node in nodes} == {"direct"}


# Real runs

def run_with(model, prompts, node, put, hold=()):
    "The activation at a node when hooks are given other values, and the hooks in `hold` keep theirs."
    tokens, found = prompts.tokens, []
    _, cache = model.run_with_cache(tokens)
    hooks = [(hook, lambda x, v=value: v) for hook, value in put.items()] + [(h, lambda x, h=h: cache[h]) for h in hold]
    with torch.no_grad(), hooked(model, [*hooks, (node.hook, lambda x: found.append(x.clone()))]): model(tokens)
    at = found[0][torch.arange(len(tokens)), prompts.index(node.position)]
    return at if node.head is None else at[:, node.head]


def stream_and_reconstruction(model, prompts, saes):
    x = capture(model, prompts, [Node("resid_pre", 2)])[Node("resid_pre", 2)]
    return x, saes.before(2).reconstruct(x)


@pytest.mark.parametrize("site", HEAD_SITES)
def test_recomputed_scale_equals_a_run_on_the_reconstructed_stream(random_model, site):
    prompts, node, saes = load_task("ioi", random_model, n=24)[:9].prompts, Node(site, 2, 1, "END"), random_saes()
    put = {"blocks.2.hook_resid_pre": stream_and_reconstruction(random_model, prompts, saes)[1]}
    real = run_with(random_model, prompts, node, put, ["blocks.2.attn.hook_pattern"] if site == "z" else [])
    settings = [ProjectionSettings(scale) for scale in ("recomputed", "frozen")]
    recomputed, frozen = (reconstruct(random_model, prompts, [node], saes, how, 4)[node] for how in settings)
    assert_close(recomputed, real, rtol=1e-4, atol=1e-5)
    assert (frozen - real).abs().max() > 0.01, "both scales give the same: the test shows nothing"


@pytest.mark.parametrize("node", [Node("z", 2, 1, "END"), Node("z", 2, 2, "S2"), Node("attn_out", 2, None, "END")])
def test_recomputed_pattern_equals_a_run_on_the_reconstructed_stream(random_model, node):
    prompts, saes = load_task("ioi", random_model, n=24)[:9].prompts, random_saes()
    put = {"blocks.2.hook_resid_pre": stream_and_reconstruction(random_model, prompts, saes)[1]}
    real = run_with(random_model, prompts, node, put)
    settings = [ProjectionSettings("recomputed", pattern) for pattern in ("recomputed", "frozen")]
    recomputed, frozen = (reconstruct(random_model, prompts, [node], saes, how, 4)[node] for how in settings)
    assert_close(recomputed, real, rtol=1e-4, atol=1e-5)
    assert (frozen - real).abs().max() > 1e-3, "both patterns give the same: the test shows nothing"


def test_recomputed_pattern_with_frozen_scale_equals_a_run_on_projected_queries_keys_and_values(random_model):
    prompts, saes, node = load_task("ioi", random_model, n=24)[:9].prompts, random_saes(), Node("z", 2, 1, "END")
    x, x_hat = stream_and_reconstruction(random_model, prompts, saes)
    scale = Norm.of(random_model, 2).scale(x)
    put = {Node(site, 2).hook: Reader.of(random_model, site, 2)(x_hat, scale) for site in "qkv"}
    assert_close(reconstruct(random_model, prompts, [node], saes, ProjectionSettings(pattern="recomputed"), 4)[node],
                 run_with(random_model, prompts, node, put), rtol=1e-4, atol=1e-5)


def test_reconstruction_with_frozen_scale_is_everything_but_the_error(random_model):
    prompts, saes = load_task("ioi", random_model, n=24)[:9].prompts, random_saes()
    nodes = all_nodes(random_model, ["S2", "END"])[::5]
    for node, value in reconstruct(random_model, prompts, nodes, saes, batch_size=4).items():
        parts = decompose(random_model, prompts, [node], saes.before(node.layer))[node]
        assert_close(value, parts.reconstruction, rtol=1e-4, atol=1e-5)
        assert_close(value + parts.error, capture(random_model, prompts, [node])[node], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale,pattern", [("recomputed", "frozen"), ("frozen", "recomputed"), ("recomputed",) * 2])
def test_recomputed_parts_are_the_recomputed_reconstruction_and_sum_to_the_truth(random_model, scale, pattern):
    prompts, saes = load_task("ioi", random_model, n=24)[:9].prompts, random_saes()
    how, without_heads = ProjectionSettings(scale, pattern), ["L2.attn_out@END", "L1.mlp_out@END"]
    nodes = [*all_nodes(random_model, ["S2", "END"])[::9], *map(Node.parse, without_heads)]
    true, rebuilt = capture(random_model, prompts, nodes), reconstruct(random_model, prompts, nodes, saes, how)
    frozen, changed = reconstruct(random_model, prompts, nodes, saes), 0
    for node, parts in decompose(random_model, prompts, nodes, saes, how, 4).items():
        assert_close(parts.reconstruction, rebuilt[node], rtol=1e-4, atol=1e-4)
        assert_close(parts.reconstruction + parts.error, true[node], rtol=1e-4, atol=1e-4)
        changed = max(changed, (rebuilt[node] - frozen[node]).abs().max().item())
    assert changed > 1e-3, "recomputed and frozen give the same: the test shows nothing"


# The model must agree with the maps

def test_an_identity_sae_is_exact_where_one_layer_shares_key_heads(random_models):
    model = random_models["gemma-hooked"]
    prompts = load_task("ioi", model, n=24)[:9].prompts
    saes = SAESet("identity", {Node("resid_pre", 0): identity_sae(model.cfg.d_model, Node("resid_pre", 0))})
    nodes = [node for node in all_nodes(model, ["IO", "END"]) if node.layer == 0]
    for node, true in capture(model, prompts, nodes).items():
        rebuilt = reconstruct(model, prompts, [node], saes)[node]
        assert (rebuilt - true).norm() <= 1e-5 * true.norm(), node


@pytest.mark.parametrize("site", HEAD_SITES)
def test_nothing_is_projected_to_a_site_where_the_model_does_something_else(random_models, site):
    model = random_models["gemma"]
    prompts, saes = load_task("ioi", model, n=24)[:9].prompts, random_saes()
    point = model.hook_dict[Node(site, 3).hook]
    for wrong in (lambda x: 2 * x, lambda x: x.flip(2)):  # scaled; heads in another order
        hook = point.register_forward_hook(lambda module, inputs, x: wrong(x))
        with pytest.raises(ValueError, match=f"{site} of layer 3 is not what this model's weights and stream say"):
            require_identity_anew(model, prompts, [(site, 3)])
        hook.remove()
    decompose(model, prompts, [Node(site, 3, 1, "END")], saes)


def require_identity_anew(model, prompts, claims):
    _agreed.pop(model, None)
    require_identity(model, prompts, claims)


def test_decomposing_asks_the_model_first(random_models, monkeypatch):
    model, asked = random_models["pythia"], []
    monkeypatch.setattr("sage_nb.saes.reconstruction.require_identity", lambda m, p, claims: asked.extend(claims))
    prompts, saes = load_task("ioi", model, n=24)[:4].prompts, random_saes()
    how = ProjectionSettings(pattern="recomputed")
    decompose(model, prompts, ["L1H0.q@END", "L2H1.z@END", "L1.mlp_out@END"], saes, how)
    of_z = {(site, 2) for site in ("v", "z", "pattern", "q", "k")}
    assert {("q", 1), ("mlp_out", 1), ("attn_out", 1), *of_z} <= set(asked)
    asked.clear()
    reconstruct(model, prompts, [Node("z", 2, 1, "END")], saes, ProjectionSettings(route="write"))
    assert set(asked) == {("attn_out", 2), ("mlp_out", 2)}


def test_one_entry_per_latent_keeps_the_sum(random_model):
    prompts, saes = load_task("ioi", random_model, n=24)[:5].prompts, random_saes()
    nodes = [Node("z", 2, 1, "END"), Node("mlp_out", 2, None, "END")]
    for parts in decompose(random_model, prompts, nodes, saes, batch_size=2).values():
        merged = parts.by_latent()
        assert merged.latents.shape[1] < parts.latents.shape[1]
        for p in range(len(prompts)):
            expected, got = {}, {}
            for o, i, value in zip(parts.origin[p].tolist(), parts.indices[p].tolist(), parts.latents[p]):
                if value.any(): expected[o, i] = expected.get((o, i), 0) + value
            for o, i, value in zip(merged.origin[p].tolist(), merged.indices[p].tolist(), merged.latents[p]):
                if not value.any(): continue
                assert (o, i) not in got, "a latent has two entries"
                got[o, i] = value
            assert got.keys() == expected.keys()
            for key in got: assert_close(got[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [ProjectionSettings(), ProjectionSettings("recomputed", "recomputed"),
                                 ProjectionSettings(route="write")], ids=["frozen", "recomputed", "write"])
def test_summed_before_or_after_it_is_projected_a_latent_adds_the_same(random_model, how):
    prompts, saes = load_task("ioi", random_model, n=24)[:5].prompts, random_saes()
    nodes = [Node("z", 2, 1, "END"), Node("attn_out", 2, None, "END"), Node("mlp_out", 2, None, "END")]
    if how.route == "read": nodes.append(Node("q", 1, 0, "S2"))
    apart, merged = (decompose(random_model, prompts, nodes, saes, how, 3, by_latent) for by_latent in (False, True))
    for node in nodes:
        after, before = apart[node].by_latent(), merged[node]
        for name in ("bias", "error", "reconstruction"):
            assert_close(getattr(before, name), getattr(after, name), rtol=1e-4, atol=1e-5)
        for p in range(len(prompts)):
            on = [part.latents[p].ne(0).any(-1) for part in (before, after)]
            assert_close(before.indices[p][on[0]], after.indices[p][on[1]])
            assert_close(before.origin[p][on[0]], after.origin[p][on[1]])
            assert_close(before.latents[p][on[0]], after.latents[p][on[1]], rtol=1e-4, atol=1e-5)


def test_tokens_behind_every_node_are_not_encoded(random_model):
    prompts, rows = load_task("ioi", random_model, n=24)[:5].prompts, []

    def counted(sae):
        def encode(x):
            rows.append(len(x))
            return sae.encoder(x)
        return replace(sae, encoder=encode)
    saes = random_saes()
    saes = SAESet("counted", {place: counted(sae) for place, sae in saes.saes.items()})
    decompose(random_model, prompts, [Node("z", 2, 1, "S2"), Node("z", 2, 0, "IO")], saes)
    last = torch.maximum(prompts.index("S2"), prompts.index("IO"))
    assert sum(rows) == (last + 1).sum() < prompts.tokens.numel()


# Memory

class Largest(TorchDispatchMode):
    "The number of entries of the largest tensor that is formed, weights and views of them aside."
    def __init__(self, weights):
        super().__init__()
        self.weights, self.size = {w.untyped_storage().data_ptr() for w in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(t, torch.Tensor) or t.untyped_storage().data_ptr() in self.weights: continue
            self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("k", [32, None])
def test_a_million_latents_are_never_formed_at_once(model, task, k):
    d_sae, prompts = 2**20, task.prompts[:4]
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_pre")
    sae = TopKSAE(TopKSAEConfig(d_in=128, d_sae=d_sae, k=k or 1, device="meta", dtype="bfloat16", metadata=metadata))
    g = torch.Generator().manual_seed(0)
    row = torch.randn(2**14, 128, generator=g).bfloat16()
    W_dec = torch.cat([row * (1 + i / 64) for i in range(64)])  # each direction in every block, so that blocks compete
    b_enc = torch.full((d_sae,), -20.0 if k else -60.0).bfloat16()
    state = {"W_dec": W_dec, "W_enc": W_dec.T.contiguous(), "b_dec": torch.zeros(128).bfloat16(), "b_enc": b_enc}
    sae.load_state_dict(state, assign=True)
    view = from_sae_lens(sae, "wide", dtype=torch.bfloat16)
    if k is None: view = replace(view, encoder=replace(view.encoder, k=None))  # as a standard SAE: all above 0
    saes, nodes = SAESet("wide", {view.node: view}), [Node("z", 1, 0, "END"), Node("q", 1, 0, "END")]
    with Largest([sae.W_dec, sae.W_enc, sae.b_enc]) as largest: found = reconstruct(model, prompts, nodes, saes)
    tokens = prompts.tokens.numel()
    assert largest.size <= MOST_FORMED < tokens * d_sae / 8
    x = capture(model, prompts, [Node("resid_pre", 1)])[Node("resid_pre", 1)][0, -3:]
    dense = (x @ sae.W_enc.float() + sae.b_enc.float()).relu()
    codes = view.encode(x)
    kept = dense if k is None else torch.zeros_like(dense).scatter(-1, dense.topk(k).indices, dense.topk(k).values)
    assert_close(torch.zeros_like(dense).scatter_add(-1, codes.indices, codes.values), kept, rtol=1e-3, atol=1e-3)
    assert math.isfinite(found[nodes[0]].norm()) and (codes.values > 0).sum(-1).min() >= (k or 1)


# Faults and files

@pytest.mark.parametrize("node", [
    Node("q", 1, None, "END"), Node("q", 1, 0), Node("mlp_out", 1, 0, "END"), Node("mlp_out", 1),
    Node("pattern", 1, 0, "END"),
])
def test_what_cannot_be_projected_to_is_refused(model, task, node):
    saes, prompts = random_saes(), task.prompts[:2]
    for call in (lambda: decompose(model, prompts, [node], saes.before(1)),
                 lambda: reconstruct(model, prompts, [node], saes)):
        with pytest.raises(ValueError, match="cannot be projected to: it must be one head of q, k, v or z"): call()


def test_wrong_requests_say_what_is_wrong(model, task):
    prompts, node = task.prompts[:2], Node("q", 1, 0, "END")
    with pytest.raises(ValueError, match="has activations of width 128 there, not 64"):
        reconstruct(model, prompts, [node], random_saes(d_model=64))
    with pytest.raises(ValueError, match="scale 'true' is not one of frozen, recomputed"):
        reconstruct(model, prompts, [node], random_saes(), ProjectionSettings("true"))
    with pytest.raises(ValueError, match="no SAE of the residual stream before layer 3"):
        reconstruct(model, prompts, [Node("q", 3, 0, "END")], random_saes(layers=2))
    with pytest.raises(ValueError, match="no SAE of the residual stream after L1.mlp_out@END, at L1.resid_post"):
        decompose(model, prompts, [Node("mlp_out", 1, None, "END")], random_saes().before(1))
    with pytest.raises(ValueError, match="pattern 'true' is not one of frozen, recomputed"):
        reconstruct(model, prompts, [node], random_saes(), ProjectionSettings(pattern="true"))
    with pytest.raises(ValueError, match="route 'up' is not one of read, write"):
        reconstruct(model, prompts, [node], random_saes(), ProjectionSettings(route="up"))
    with pytest.raises(ValueError, match="head 4 of node L1H4.z@END is not in this model .has 4."):
        reconstruct(model, prompts, [Node("z", 1, 4, "END")], random_saes())
    with pytest.raises(ValueError, match="has no SAE at L1H0.q@END .has L0.z"):
        reconstruct(model, prompts, [node], load_saes("tiny-gpt2-z-topk"))


def test_every_embedded_set_with_a_card_has_an_sae_before_every_layer(sae_sets):
    for card in (EMBEDDED / "saes").glob("tiny-gpt2-res-*/card.json"):
        assert card.parent.name in sae_sets, f"{card.parent.name} is incomplete"
        assert len(json.loads(card.read_text())["figures on fresh text"]) == len(sae_sets[card.parent.name].saes)
