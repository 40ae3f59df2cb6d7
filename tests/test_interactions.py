"""Attention scores and composition by feature, against the model's own scores and plain loops, on every family."""
from dataclasses import replace
from types import SimpleNamespace

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
        assert found.rows == ["mean", "IO", "S", "Pos", "S×Pos", "error"] == found.columns
        assert_close(found.score, true_scores(lab, key), rtol=1e-3, atol=1e-3)
    batched = interactions(lab.model, lab.task, lab.truth, lab.query, key, batch_size=7)
    assert_close(batched.values, found.values, rtol=1e-4, atol=1e-5)


def test_parts_equal_scores_of_single_vectors(lab):
    "Put two vectors into the model's own attention instead of query and key: the score that it reports is their part."
    key, rows = lab.keys[0], [0, 5, 11]
    found = interactions(lab.model, lab.task, lab.truth, lab.query, key)
    cap = getattr(lab.model.cfg, "attn_scores_soft_cap", None)
    vectors = [{"mean": d.mean, "IO": None, "S": None} for d in (lab.truth[lab.query], lab.truth[key])]
    for i in rows:
        row = lab.test.attributes.iloc[i]
        for parts, node in zip(vectors, (lab.query, key)):
            d = lab.truth[node]
            for a in ("IO", "S"):
                average = sum(c * u for c, u in zip(d.counts[a].tolist(), d.vectors[a])) / d.counts[a].sum()
                parts[a] = d.vectors[a][d.values[a].index(row[a])] - average
        for a, q in vectors[0].items():
            for b, k in vectors[1].items():
                def put(vector, head, position):
                    def edit(x, hook): x[0, lab.test.prompts.index(position)[i], head] = vector
                    return edit
                scores = []
                with lab.model.hooks([(lab.query.hook, put(q, lab.query.head, "END")), (key.hook, put(k, key.head, key.position)),
                                      ("blocks.2.attn.hook_attn_scores", lambda x, hook: scores.append(x.clone()))]):
                    lab.model(lab.test.prompts.tokens[i : i + 1])
                score = scores[0][0, lab.query.head, lab.test.prompts.index("END")[i], lab.test.prompts.index(key.position)[i]]
                score = cap * torch.atanh(score / cap) if cap and cap > 0 else score
                assert found.values[i, found.rows.index(a), found.columns.index(b)].item() == pytest.approx(score.item(), rel=2e-3, abs=2e-3)


def test_the_reconstructed_score_leaves_the_errors_out_and_keys_can_be_compared(lab):
    one, two = (interactions(lab.model, lab.task, lab.truth, lab.query, key) for key in lab.keys)
    left = sum(one.values[:, i, j] for i, a in enumerate(one.rows) for j, b in enumerate(one.columns) if "error" not in (a, b))
    assert_close(one.reconstructed, left)
    difference = one - two
    assert_close(difference.score, one.score - two.score, rtol=1e-3, atol=1e-4)
    assert difference.key.position == "S1 − S2"
    assert difference.table().loc["S", "mean"] == pytest.approx(difference.estimate("S", "mean").value, abs=1e-5)


def test_value_scores_are_what_single_prompts_get_on_average(lab):
    key = lab.keys[0]
    table, found = value_scores(lab.model, lab.task, lab.truth, lab.query, key, ("S", "IO")), interactions(lab.model, lab.task, lab.truth, lab.query, key)
    attributes = lab.test.attributes
    apart = lab.test.prompts.index("END") - lab.test.prompts.index(key.position)
    if lab.model.cfg.positional_embedding_type == "standard":  # no place in the score, so every prompt has its entry of the table
        expected = [table.loc[s, io] for s, io in zip(attributes.S, attributes.IO)]
        assert_close(found.values[:, 2, 1], torch.tensor(expected), rtol=1e-3, atol=1e-4)
    else:  # how far apart they stand matters, and the table is the mean over prompts: check one entry by moving the vectors to every prompt
        s, io = attributes.S[0], attributes.IO[0]
        moved = lab.task[lab.task.held_out]
        everywhere = attributes.assign(S=s, IO=io)
        same = SimpleNamespace(test=SimpleNamespace(prompts=moved.prompts, attributes=everywhere))
        per_prompt = interactions(lab.model, same, lab.truth, lab.query, key).values[:, 2, 1]
        assert per_prompt.std() > 1e-6 and len(set(apart.tolist())) > 1
        assert table.loc[s, io] == pytest.approx(per_prompt.mean().item(), rel=1e-3, abs=1e-4)


def weights(lab, layer):
    "The layer's norms and matrices from transformers' own weights: gain of the norm before, W_Q, gain of the norm behind (or None), W_O of each head."
    hf, heads = AutoModelForCausalLM.from_pretrained(EMBEDDED / lab.model.cfg.model_name, dtype=torch.float32), lab.model.cfg.n_heads
    if lab.model.cfg.model_name == "tiny-gpt2":
        block = hf.transformer.h[layer]
        return block.ln_1.weight, block.attn.c_attn.weight[:, : hf.config.n_embd].T, None, block.attn.c_proj.weight.split(hf.config.n_embd // heads)
    if lab.model.cfg.model_name == "tiny-pythia":
        block = hf.gpt_neox.layers[layer]
        W = block.attention.query_key_value.weight.unflatten(0, (heads, 3, -1))[:, 0].flatten(0, 1)
        return block.input_layernorm.weight, W, None, block.attention.dense.weight.T.split(hf.config.hidden_size // heads)
    block = hf.model.layers[layer]
    return 1 + block.input_layernorm.weight, block.self_attn.q_proj.weight, 1 + block.post_attention_layernorm.weight, block.self_attn.o_proj.weight.T.split(hf.config.head_dim)


def test_composition_equals_a_plain_loop(lab):
    writer, attribute, eps = lab.writers[1], "S", lab.model.cfg.eps
    found = composition(lab.model, lab.task, lab.truth, writer, lab.query, attribute)
    gamma, W_Q, _, _ = weights(lab, lab.query.layer)
    _, _, behind, W_O = weights(lab, writer.layer)
    d_head, gpt = W_Q.shape[0] // lab.model.cfg.n_heads, lab.model.cfg.model_name != "tiny-gemma"
    stream, z = Node("resid_pre", lab.query.layer, None, "END"), Node("z", writer.layer, None, "END")
    acts = capture(lab.model, lab.test.prompts, [stream, z])

    def rms(x): return (x.square().mean() + eps).sqrt()

    def centred(dictionary, j):
        average = sum(c * u for c, u in zip(dictionary.counts[attribute].tolist(), dictionary.vectors[attribute])) / dictionary.counts[attribute].sum()
        return dictionary.vectors[attribute][j] - average
    for i, value in enumerate(lab.test.attributes[attribute]):
        j = lab.truth[writer].values[attribute].index(value)
        x, v = acts[stream][i], centred(lab.truth[writer], j) @ W_O[writer.head]
        if behind is not None: v = behind * v / rms(sum(acts[z][i, h] @ W for h, W in enumerate(W_O)))
        v, x = (y - y.mean() if gpt else y for y in (v, x))
        r = (W_Q @ (gamma * v / rms(x)))[d_head * lab.query.head : d_head * (lab.query.head + 1)]
        own = centred(lab.truth[lab.query], j)
        assert_close(found.columns[i], torch.stack([r @ own, r @ r, own @ own]).detach(), rtol=1e-3, atol=1e-5)
    up, received, wanted = found.columns.double().sum(0)
    assert found.share.value == pytest.approx((up / wanted).item()) and found.cosine.value == pytest.approx((up / (received * wanted).sqrt()).item())
    table = compositions(lab.model, lab.task, lab.truth, lab.writers, [lab.query], attribute)
    assert len(table) == len(lab.writers) and table.share.abs().is_monotonic_decreasing
    assert table.set_index("writer").share[str(writer)] == pytest.approx(found.share.value)


def test_a_head_that_writes_exactly_the_query_has_share_one(lab):
    "A reader's dictionary that is what it receives points the same way value by value, and twice as large a one makes the share one half."
    writer, found = lab.writers[0], composition(lab.model, lab.task, lab.truth, lab.writers[0], lab.query, "S")
    shares = []
    for factor in (1, 2):
        made = replace(lab.truth, nodes=lab.truth.nodes | {lab.query: replace(lab.truth[lab.query], vectors=lab.truth[lab.query].vectors | {"S": factor * found.received})})
        again = composition(lab.model, lab.task, made, writer, lab.query, "S")
        shares.append(again.share.value)
        centred = made[lab.query].centred("S")
        assert_close(again.features, centred)
        assert_close(torch.tensor(again.similarity().to_numpy()), torch.nn.functional.normalize(found.received, dim=-1) @ torch.nn.functional.normalize(centred, dim=-1).T, rtol=1e-4, atol=1e-5)
    assert shares[0] == pytest.approx(2 * shares[1], rel=1e-5) and 0.9 < shares[0] < 1.1  # 1 but for the norm's scale, which differs between prompts


def test_wrong_nodes_are_refused(lab):
    query, key, more = lab.query, lab.keys[0], (lab.model, lab.task, lab.truth)
    for wrong, message in ((key._replace(layer=1), "not one head's q and k"), (key._replace(position=None), "not one head's"), (key._replace(head=key.head - 1), "meet the keys of head")):
        with pytest.raises(ValueError, match=message): interactions(*more, query, wrong)
    truth = fit_dictionaries(lab.model, lab.task, [query._replace(position="S1"), key._replace(position="END")])
    with pytest.raises(ValueError, match="cannot see"): interactions(lab.model, lab.task, truth, query._replace(position="S1"), key._replace(position="END"))
    for writer, reader, message in ((lab.query, lab.query, "does not write where"), (lab.writers[0]._replace(position="S1"), query, "does not write where"),
                                    (lab.writers[0]._replace(layer=2), query, "not in an earlier layer")):
        with pytest.raises(ValueError, match=message): composition(*more, writer, reader, "S")
    with pytest.raises(ValueError, match="no writer is in an earlier layer"): compositions(*more, [], [query], "S")
