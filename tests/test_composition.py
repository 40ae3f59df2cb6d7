"""Attention scores and composition by feature, against the model's own scores and plain loops, on every family."""
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sage_nb.core.activations import Node, capture
from sage_nb.truth.dictionaries import fit_dictionaries
from sage_nb.saes.composition import composition, compositions, interactions, value_scores
from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.tasks.task import load_task

MODELS = ("tiny-gpt2", "tiny-pythia", "tiny-gemma")


@pytest.fixture(scope="module", params=MODELS)
def lab(request):
    "A model, a task, and dictionaries of one head's query, two keys and earlier heads' outputs."
    model = load_model(request.param)
    task = load_task("ioi", model, n=96)
    kv = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    query, keys = Node("q", 2, 3, "END"), [Node("k", 2, 3 // (model.cfg.n_heads // kv), p) for p in ("S1", "S2")]
    writers = [Node("z", layer, head, "END") for layer in (0, 1) for head in range(model.cfg.n_heads)]
    truth = fit_dictionaries(model, task, [query, *keys, *writers], products=[("S", "Pos")], unseen="additive")
    return SimpleNamespace(model=model, task=task, test=task.test, query=query, keys=keys, writers=writers, truth=truth)


def true_scores(lab, key):
    "The model's own scores before the mask and without the soft-cap, prompt by prompt."
    found, cap = [], getattr(lab.model.cfg, "attn_scores_soft_cap", None)
    for i, tokens in enumerate(lab.test.prompts.tokens):
        score = lab.model.run_with_cache(tokens[None])[1]["blocks.2.attn.hook_attn_scores"][0, lab.query.head]
        score = score[lab.test.prompts.index("END")[i], lab.test.prompts.index(key.position)[i]]
        found.append(cap * torch.atanh(score / cap) if cap and cap > 0 else score)
    return torch.stack(found)


def test_all_parts_sum_to_the_models_own_score(lab):
    for key in lab.keys:
        found = interactions(lab.model, lab.task, lab.truth, lab.query, key)
        assert found.query_parts == ["mean", "IO", "S", "Pos", "S×Pos", "error"] == found.key_parts
        assert_close(found.score, true_scores(lab, key), rtol=1e-3, atol=1e-3)
    batched = interactions(lab.model, lab.task, lab.truth, lab.query, key, batch_size=7)
    assert_close(batched.values, found.values, rtol=1e-4, atol=1e-5)


def put(vector, node, token):
    "A hook that puts a vector at one head and token of the only prompt."
    def edit(x, hook): x[0, token, node.head] = vector
    return node.hook, edit


def score_of(lab, row, key, q, k):
    "The score that the model's own attention gives two vectors in the place of a prompt's query and key."
    i, j = (int(lab.test.prompts.index(node.position)[row]) for node in (lab.query, key))
    cap, scores = getattr(lab.model.cfg, "attn_scores_soft_cap", None), []
    look = "blocks.2.attn.hook_attn_scores", lambda x, hook: scores.append(x.clone())
    with lab.model.hooks([put(q, lab.query, i), put(k, key, j), look]):
        lab.model(lab.test.prompts.tokens[row : row + 1])
    score = scores[0][0, lab.query.head, i, j]
    return (cap * torch.atanh(score / cap) if cap and cap > 0 else score).item()


def feature(features, value):
    "The vector of a value minus the average over the training prompts, value by value."
    average = sum(c * u for c, u in zip(features.counts.tolist(), features.vectors)) / features.counts.sum()
    return features.vectors[features.values.index((value,))] - average


def test_parts_equal_scores_of_single_vectors(lab):
    "Put two vectors into the model's own attention instead of query and key: the score that it reports is their part."
    key = lab.keys[0]
    found = interactions(lab.model, lab.task, lab.truth, lab.query, key)
    for row in (0, 5, 11):
        values, vectors = lab.test.attributes.iloc[row], []
        for d in (lab.truth[lab.query], lab.truth[key]):
            vectors.append({"mean": d.mean, "IO": feature(d["IO"], values["IO"]), "S": feature(d["S"], values["S"])})
        in_query, in_key = vectors
        for a, b in itertools.product(in_query, in_key):
            score = score_of(lab, row, key, in_query[a], in_key[b])
            assert found.of(a, b)[row].item() == pytest.approx(score, rel=2e-3, abs=2e-3)


def test_the_reconstructed_score_leaves_the_errors_out_and_keys_can_be_compared(lab):
    one, two = (interactions(lab.model, lab.task, lab.truth, lab.query, key) for key in lab.keys)
    names = [name for name in one.query_parts if name != "error"]
    left = sum(one.of(a, b) for a, b in itertools.product(names, names))
    assert_close(one.reconstructed, left)
    difference = one - two
    assert_close(difference.score, one.score - two.score, rtol=1e-3, atol=1e-4)
    assert difference.key.position == "S1 − S2"
    assert difference.table().loc["S", "mean"] == pytest.approx(difference.estimate("S", "mean").value, abs=1e-5)


def test_value_scores_are_what_single_prompts_get_on_average(lab):
    key, attributes = lab.keys[0], lab.test.attributes
    table = value_scores(lab.model, lab.task, lab.truth, lab.query, key, ("S", "IO"))
    if lab.model.cfg.positional_embedding_type == "standard":  # no place in the score: each prompt has its entry
        expected = [table.loc[s, io] for s, io in zip(attributes.S, attributes.IO)]
        found = interactions(lab.model, lab.task, lab.truth, lab.query, key)
        assert_close(found.of("S", "IO"), torch.tensor(expected), rtol=1e-3, atol=1e-4)
        return
    # how far apart they stand matters, and the table is the mean over prompts: give one pair of values to every prompt
    s, io = attributes.S[0], attributes.IO[0]
    same = SimpleNamespace(test=SimpleNamespace(prompts=lab.test.prompts, attributes=attributes.assign(S=s, IO=io)))
    per_prompt = interactions(lab.model, same, lab.truth, lab.query, key).of("S", "IO")
    apart = lab.test.prompts.index("END") - lab.test.prompts.index(key.position)
    assert per_prompt.std() > 1e-6 and len(set(apart.tolist())) > 1
    assert table.loc[s, io] == pytest.approx(per_prompt.mean().item(), rel=1e-3, abs=1e-4)


class Weights(NamedTuple):
    "A layer's norms and matrices as transformers has them."
    before: torch.Tensor  # gain of the norm before attention
    W_Q: torch.Tensor
    behind: torch.Tensor | None  # gain of the norm behind it
    W_O: tuple[torch.Tensor, ...]  # of each head


def weights(lab, layer):
    name, heads = lab.model.cfg.model_name, lab.model.cfg.n_heads
    hf = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32)
    if name == "tiny-gpt2":
        block, d = hf.transformer.h[layer], hf.config.n_embd
        W_Q, W_O = block.attn.c_attn.weight[:, :d].T, block.attn.c_proj.weight.split(d // heads)
        return Weights(block.ln_1.weight, W_Q, None, W_O)
    if name == "tiny-pythia":
        block = hf.gpt_neox.layers[layer]
        W_Q = block.attention.query_key_value.weight.unflatten(0, (heads, 3, -1))[:, 0].flatten(0, 1)
        W_O = block.attention.dense.weight.T.split(hf.config.hidden_size // heads)
        return Weights(block.input_layernorm.weight, W_Q, None, W_O)
    block = hf.model.layers[layer]
    W_O = block.self_attn.o_proj.weight.T.split(hf.config.head_dim)
    gains = 1 + block.input_layernorm.weight, 1 + block.post_attention_layernorm.weight
    return Weights(gains[0], block.self_attn.q_proj.weight, gains[1], W_O)


def test_composition_equals_a_plain_loop(lab):
    writer, attribute, eps = lab.writers[1], "S", lab.model.cfg.eps
    found = composition(lab.model, lab.task, lab.truth, writer, lab.query, attribute)
    reading, writing = weights(lab, lab.query.layer), weights(lab, writer.layer)
    d_head, gpt = reading.W_Q.shape[0] // lab.model.cfg.n_heads, lab.model.cfg.model_name != "tiny-gemma"
    stream, z = Node("resid_pre", lab.query.layer, None, "END"), Node("z", writer.layer, None, "END")
    acts = capture(lab.model, lab.test.prompts, [stream, z])

    def rms(x): return (x.square().mean() + eps).sqrt()

    for i, value in enumerate(lab.test.attributes[attribute]):
        x, v = acts[stream][i], feature(lab.truth[writer][attribute], value) @ writing.W_O[writer.head]
        if writing.behind is not None:
            v = writing.behind * v / rms(sum(acts[z][i, h] @ W for h, W in enumerate(writing.W_O)))
        v, x = (y - y.mean() if gpt else y for y in (v, x))
        r = (reading.W_Q @ (reading.before * v / rms(x)))[d_head * lab.query.head : d_head * (lab.query.head + 1)]
        own = feature(lab.truth[lab.query][attribute], value)
        plain = torch.stack([r @ own, r @ r, own @ own]).detach()
        assert_close(torch.stack([part[i] for part in found.overlap]), plain, rtol=1e-3, atol=1e-5)
    up, received, wanted = (part.double().sum() for part in found.overlap)
    assert found.share.value == pytest.approx((up / wanted).item())
    assert found.cosine.value == pytest.approx((up / (received * wanted).sqrt()).item())
    table = compositions(lab.model, lab.task, lab.truth, lab.writers, [lab.query], attribute)
    assert len(table) == len(lab.writers) and table.share.abs().is_monotonic_decreasing
    assert table.set_index("writer").share[str(writer)] == pytest.approx(found.share.value)


def with_features(truth, node, features):
    "The dictionaries, with other features of the same attributes at one node."
    old = truth[node]
    new = tuple(features if f.attributes == features.attributes else f for f in old.features)
    return replace(truth, nodes=truth.nodes | {node: replace(old, features=new)})


def test_a_head_that_writes_exactly_the_query_has_share_one(lab):
    "A reader's dictionary that is what it receives points the same way; a twice as large one makes the share one half."
    writer, found = lab.writers[0], composition(lab.model, lab.task, lab.truth, lab.writers[0], lab.query, "S")
    shares, unit = [], torch.nn.functional.normalize
    for factor in (1, 2):
        own = replace(lab.truth[lab.query]["S"], vectors=factor * found.received)
        made = with_features(lab.truth, lab.query, own)
        again = composition(lab.model, lab.task, made, writer, lab.query, "S")
        shares.append(again.share.value)
        assert_close(again.features, own.centred)
        expected = unit(found.received, dim=-1) @ unit(own.centred, dim=-1).T
        assert_close(torch.tensor(again.similarity().to_numpy()), expected, rtol=1e-4, atol=1e-5)
    assert shares[0] == pytest.approx(2 * shares[1], rel=1e-5)
    assert 0.9 < shares[0] < 1.1  # 1 but for the norm's scale, which differs between prompts


def test_wrong_nodes_are_refused(lab):
    query, key, more = lab.query, lab.keys[0], (lab.model, lab.task, lab.truth)
    for wrong, message in ((key._replace(layer=1), "not one head's q and k"),
                           (key._replace(position=None), "not one head's"),
                           (key._replace(head=key.head - 1), "meet the keys of head")):
        with pytest.raises(ValueError, match=message): interactions(*more, query, wrong)
    early, late = query._replace(position="S1"), key._replace(position="END")
    truth = fit_dictionaries(lab.model, lab.task, [early, late])
    with pytest.raises(ValueError, match="cannot see"): interactions(lab.model, lab.task, truth, early, late)
    writer = lab.writers[0]
    for sent, reader, message in ((query, query, "does not write where"),
                                  (writer._replace(position="S1"), query, "does not write where"),
                                  (writer._replace(layer=2), query, "not in an earlier layer")):
        with pytest.raises(ValueError, match=message): composition(*more, sent, reader, "S")
    with pytest.raises(ValueError, match="no writer is in an earlier layer"): compositions(*more, [], [query], "S")
