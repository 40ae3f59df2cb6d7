"""Attention scores and composition by feature, against the model's own scores and plain loops, on every family."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from sage_nb.activations import Node, capture
from sage_nb.dictionaries import fit_dictionaries
from sage_nb.interactions import composition, compositions, interactions, value_scores
from sage_nb.models import load_model
from sage_nb.tasks import load_task

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


def test_composition_equals_a_plain_loop(lab):
    writer, attribute = lab.writers[1], "S"
    if "gemma" in str(lab.model.cfg.model_name):
        with pytest.raises(ValueError, match="layer 0 does not simply add its heads to the stream"): composition(lab.model, lab.task, lab.truth, writer, lab.query, attribute)
        return
    found = composition(lab.model, lab.task, lab.truth, writer, lab.query, attribute)
    acts = capture(lab.model, lab.test.prompts, [Node("resid_pre", 2, None, "END"), lab.query])
    q = acts[lab.query]
    d, own = lab.truth[writer], lab.truth[lab.query]
    norm, attn = lab.model.blocks[2].ln1, lab.model.blocks[2].attn
    for i, value in enumerate(lab.test.attributes[attribute]):
        x, j = acts[Node("resid_pre", 2, None, "END")][i], d.values[attribute].index(value)

        def centred(dictionary):
            average = sum(c * u for c, u in zip(dictionary.counts[attribute].tolist(), dictionary.vectors[attribute])) / dictionary.counts[attribute].sum()
            return dictionary.vectors[attribute][j] - average
        v = centred(d) @ lab.model.blocks[writer.layer].attn.W_O[writer.head]
        scale = ((x - x.mean()).square().mean() + lab.model.cfg.eps).sqrt()

        def query(y): return norm((y - y.mean())[None, None])[0, 0] @ attn.W_Q[lab.query.head]
        frozen = (query(1e3 * v) - query(-1e3 * v)) / 2 * ((v - v.mean()).square().mean() + lab.model.cfg.eps / 1e6).sqrt() / scale  # the norm is odd around its bias
        expected = [(frozen * centred(own)).sum(), frozen.square().sum(), centred(own).square().sum()]
        assert_close(found.columns[i], torch.stack(expected), rtol=2e-3, atol=1e-5)
    assert_close(query(x) + attn.b_Q[lab.query.head], q[i], rtol=1e-3, atol=1e-3)  # the plain query is the model's
    r, wanted = found.columns.double().sum(0)[0], found.columns.double().sum(0)[1:]
    assert found.share.value == pytest.approx((r / wanted[1]).item()) and found.cosine.value == pytest.approx((r / wanted.prod().sqrt()).item())
    table = compositions(lab.model, lab.task, lab.truth, lab.writers, [lab.query], attribute)
    assert len(table) == len(lab.writers) and table.share.abs().is_monotonic_decreasing
    assert table.set_index("writer").share[str(writer)] == pytest.approx(found.share.value)


def test_a_head_that_writes_exactly_the_query_has_share_one(lab):
    "A reader's dictionary that is what it receives points the same way value by value, and twice as large a one makes the share one half."
    if "gemma" in str(lab.model.cfg.model_name): pytest.skip("a norm stands behind the attention")
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
