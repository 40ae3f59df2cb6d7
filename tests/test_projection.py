"""A residual-stream SAE at q, k, v and z: parts that sum to the truth, against plain loops and real runs."""
import copy
import json

import pytest
import torch
from torch.testing import assert_close

from sage_nb.activations import HEAD_SITES, Node, capture
from sage_nb.attribution import all_nodes
from sage_nb.models import EMBEDDED
from sage_nb.reconstruction import decompose, reconstruct
from sage_nb.saes import SAESet, SparseSAE
from sage_nb.tasks import load_task

POSITIONS = ("IO", "S2", "END")


def random_saes(d_model=128, d_sae=200, layers=4):
    "SAEs that reconstruct badly, with a different number of active latents on every token."
    g = torch.Generator().manual_seed(0)

    def draw(*shape): return torch.randn(*shape, generator=g)

    def sae(layer):
        W_enc, b_enc = draw(d_model, d_sae) / d_model**0.5, draw(d_sae)
        W_dec, b_dec = 0.3 * draw(d_sae, d_model), 0.2 + 0.1 * draw(d_model)
        return SparseSAE(Node("resid_pre", layer), W_dec, b_dec, lambda x: (x @ W_enc + b_enc - 2).relu(), "random")
    return SAESet("random", {Node("resid_pre", layer): sae(layer) for layer in range(layers)})


def largest_relative_error(model, prompts, saes, nodes):
    "The largest over nodes and prompts of ‖latents + bias + error − true‖ / ‖true‖, per site."
    worst, missed = dict.fromkeys(HEAD_SITES, 0.0), dict.fromkeys(HEAD_SITES, 0.0)
    for node, true in capture(model, prompts, nodes).items():
        parts = decompose(model, prompts, node, saes.before(node.layer))
        off = parts.latents.sum(1) + parts.bias + parts.error - true
        worst[node.site] = max(worst[node.site], (off.norm(dim=1) / true.norm(dim=1)).max().item())
        missed[node.site] = max(missed[node.site], (parts.error.norm() / true.norm()).item())
    assert min(missed.values()) > 0.05, f"the SAE is perfect, so that leaving out its error would not show: {missed}"
    return worst


# Parts sum to the truth

def test_parts_sum_to_the_truth_on_the_embedded_model(model, task, sae_set):
    worst = largest_relative_error(model, task.prompts[:18], sae_set, all_nodes(model, POSITIONS))
    assert max(worst.values()) <= 1e-5, worst


def test_parts_sum_to_the_truth_in_every_family(random_model):
    task = load_task("ioi", random_model, n=24)[:9]
    worst = largest_relative_error(random_model, task.prompts, random_saes(), all_nodes(random_model, POSITIONS))
    assert max(worst.values()) <= 1e-5, worst


def test_parts_sum_to_the_truth_where_weights_are_folded_and_centred(random_models):
    folded = copy.deepcopy(random_models["gpt2-hooked"])
    folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    assert type(folded.blocks[2].ln1) is not type(random_models["gpt2-hooked"].blocks[2].ln1)
    task = load_task("ioi", folded, n=24)[:9]
    worst = largest_relative_error(folded, task.prompts, random_saes(), all_nodes(folded, ["IO", "END"]))
    assert max(worst.values()) <= 1e-5, worst


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
    parts = decompose(model, task.prompts, node, sae)
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


# Real runs

def run_with_reconstruction(model, prompts, node, saes, hold):
    "The activation at a node when the stream before its layer is the SAE's, and the hooks in `hold` keep their values."
    tokens, stream = prompts.tokens, f"blocks.{node.layer}.hook_resid_pre"
    _, cache = model.run_with_cache(tokens)
    x_hat, found = saes.before(node.layer).reconstruct(cache[stream]), []
    hooks = [(stream, lambda x, hook: x_hat)] + [(h, lambda x, hook, h=h: cache[h]) for h in hold]
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, (node.hook, lambda x, hook: found.append(x.clone()))])
    return found[0][torch.arange(len(tokens)), prompts.index(node.position), node.head]


@pytest.mark.parametrize("site", HEAD_SITES)
def test_reconstruction_with_recomputed_scale_equals_a_run_on_the_reconstructed_stream(random_model, site):
    prompts, node, saes = load_task("ioi", random_model, n=24)[:9].prompts, Node(site, 2, 1, "END"), random_saes()
    hold = ["blocks.2.attn.hook_pattern"] if site == "z" else []
    real = run_with_reconstruction(random_model, prompts, node, saes, hold)
    recomputed, frozen = (reconstruct(random_model, prompts, [node], saes, scale, 4)[node]
                          for scale in ("recomputed", "frozen"))
    assert_close(recomputed, real, rtol=1e-4, atol=1e-5)
    assert (frozen - real).abs().max() > 0.01, "both scales give the same: the test shows nothing"


def test_reconstruction_with_frozen_scale_is_everything_but_the_error(random_model):
    prompts, saes = load_task("ioi", random_model, n=24)[:9].prompts, random_saes()
    nodes = all_nodes(random_model, ["S2", "END"])[::5]
    for node, value in reconstruct(random_model, prompts, nodes, saes, batch_size=4).items():
        parts = decompose(random_model, prompts, node, saes.before(node.layer))
        assert_close(value, parts.reconstruction, rtol=1e-4, atol=1e-5)
        assert_close(value + parts.error, capture(random_model, prompts, [node])[node], rtol=1e-4, atol=1e-5)


# Faults and files

@pytest.mark.parametrize("node", [
    Node("q", 1, None, "END"), Node("q", 1, 0), Node("resid_pre", 1, None, "END"), Node("mlp_out", 1, None, "END"),
])
def test_what_cannot_be_projected_to_is_refused(model, task, node):
    saes, prompts = random_saes(), task.prompts[:2]
    for call in (lambda: decompose(model, prompts, node, saes.before(1)),
                 lambda: reconstruct(model, prompts, [node], saes)):
        with pytest.raises(ValueError, match="cannot be projected to: it must be one head of q, k, v or z"): call()


def test_wrong_requests_say_what_is_wrong(model, task):
    prompts, node = task.prompts[:2], Node("q", 1, 0, "END")
    with pytest.raises(ValueError, match="takes activations of width 64, got 128"):
        reconstruct(model, prompts, [node], random_saes(d_model=64))
    with pytest.raises(ValueError, match="scale 'true' is not one of frozen, recomputed"):
        reconstruct(model, prompts, [node], random_saes(), "true")
    with pytest.raises(ValueError, match="no SAE of the residual stream before layer 3"):
        reconstruct(model, prompts, [Node("q", 3, 0, "END")], random_saes(layers=2))


def test_every_embedded_set_with_a_card_has_an_sae_before_every_layer(sae_sets):
    for card in (EMBEDDED / "saes").glob("tiny-gpt2-res-*/card.json"):
        assert card.parent.name in sae_sets, f"{card.parent.name} is incomplete"
        assert len(json.loads(card.read_text())["figures on fresh text"]) == len(sae_sets[card.parent.name].saes)
