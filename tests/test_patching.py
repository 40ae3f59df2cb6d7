"""Reading, replacing and differentiating activations, against TransformerLens's own tools and plain loops."""
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformer_lens import patching

from sage_nb.activations import HEAD_SITES, SITES, Node, capture, gradients, hooked, run
from sage_nb.attribution import all_nodes, attribution_patching, exact_patching, n_heads
from sage_nb.tasks import load_task

THEIRS = {
    "q": patching.get_act_patch_attn_head_q_by_pos, "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos, "z": patching.get_act_patch_attn_head_out_by_pos,
}


def sites_of(model): return [s for s in SITES if f"blocks.0.{SITES[s]}" in model.hook_dict]


def few_nodes(model, task, step):
    "Some nodes of every site, with and without heads."
    sites = sites_of(model)
    with_heads = all_nodes(model, ["IO", "S1+1", "END"], HEAD_SITES)
    return with_heads[::step] + all_nodes(model, ["S2", "END"], [s for s in sites if s not in HEAD_SITES])[::step]


@pytest.fixture(scope="module")
def aligned(task):
    "Prompts of one template and one order of names: each role has one token index."
    return task[(task.template == 0) & torch.tensor((task.attributes.Pos == "ABB").to_numpy())][:8]


@pytest.fixture
def random_task(random_model): return load_task("ioi", random_model, n=24)[:7]


# Exact patching

@pytest.mark.parametrize("attribute", ["IO", "S"])
@pytest.mark.parametrize("site", HEAD_SITES)
def test_exact_patching_equals_transformer_lens(model, aligned, site, attribute):
    nodes = all_nodes(model, {"IO": ["IO", "END"], "S": ["S1", "S2", "END"]}[attribute], [site])
    ours = exact_patching(model, aligned, attribute, nodes)
    cf, end = aligned.counterfactual(attribute), aligned.prompts.index("END")[0]

    def mean_logit_difference(logits):
        right, wrong = (logits[:, end].gather(1, x[:, None]) for x in (aligned.answers, cf.distractors))
        return (right - wrong).mean()
    where = [(n.layer, aligned.prompts.index(n.position)[0].item(), n.head) for n in nodes]
    _, theirs_is_clean = model.run_with_cache(cf.prompts.tokens)  # they patch what they call clean into the corrupted
    theirs = THEIRS[site](model, aligned.prompts.tokens, theirs_is_clean, mean_logit_difference, index_axis_names=None,
                          index_df=pd.DataFrame(where, columns=["layer", "pos", "head"]))
    clean = mean_logit_difference(model(aligned.prompts.tokens))
    assert ((theirs - clean) / clean).abs().max() > 0.01, "no patch has an effect, so there is nothing to compare"
    assert ((ours.effects.mean(0) - (theirs - clean)) / clean).abs().max() <= 1e-5
    assert_close(ours.clean.mean(), clean)


def test_replacing_the_whole_first_stream_is_running_the_counterfactual(random_model, random_task):
    first, metric = Node("resid_pre", 0), random_task.metric("S")
    for attribute in ("IO", "S", "Pos"):
        there = random_task.counterfactual(attribute).prompts
        patched = run(random_model, random_task.prompts, metric, capture(random_model, there, [first]))
        assert_close(patched, run(random_model, there, metric))


# Attribution patching

def plain_attribution(model, task, attribute, node, i, steps=1):
    "(a(p′) − a(p)) · ∂m/∂a of a node for prompt i, ∂m/∂a averaged over `steps` points between the embeddings."
    cf = task.counterfactual(attribute)
    tokens, tokens_cf = task.prompts.tokens[i : i + 1], cf.prompts.tokens[i : i + 1]
    position, position_cf = task.prompts.index(node.position)[i], cf.prompts.index(node.position)[i]
    cache, cache_cf = (model.run_with_cache(t)[1] for t in (tokens, tokens_cf))
    head = slice(None) if node.head is None else node.head
    here, there = cache[node.hook][0, position, head], cache_cf[node.hook][0, position_cf, head]
    total = torch.zeros_like(here)
    hook_name = node.hook if node.site != "resid_mid" else node.hook.replace("resid_mid", "attn_out")  # what is added to either is added to the stream
    for k in range(steps):
        fraction, delta = k / max(steps - 1, 1), torch.zeros_like(here, requires_grad=True)

        def embed(x, hook): return (1 - fraction) * x + fraction * cache_cf["hook_embed"]

        def add(x, hook):
            x = x.clone()
            x[0, position, head] = x[0, position, head] + delta
            return x
        logits = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", embed), (hook_name, add)])
        logits = logits[0, task.prompts.index("END")[i]]
        total += torch.autograd.grad(logits[task.answers[i]] - logits[cf.distractors[i]], delta)[0]
    return ((there - here) * total / steps).sum()


@pytest.mark.parametrize("attribute,steps", [("IO", 1), ("S", 1), ("Pos", 1), ("IO", 3)])
def test_attribution_patching_equals_a_plain_loop(random_model, random_task, attribute, steps):
    nodes = few_nodes(random_model, random_task, 11)
    ours = attribution_patching(random_model, random_task, attribute, nodes, steps)
    plain = torch.stack([plain_attribution(random_model, random_task, attribute, node, 4, steps) for node in nodes])
    assert_close(ours.effects[4], plain)


def test_attribution_patching_equals_a_plain_loop_on_the_trained_model(model, aligned):
    nodes = all_nodes(model, ["S2", "END"])[::5]
    ours = attribution_patching(model, aligned, "S", nodes)
    assert_close(ours.effects[2], torch.stack([plain_attribution(model, aligned, "S", node, 2) for node in nodes]))


def test_integrated_gradients_of_the_embedding_add_up_to_the_exact_effect(model, aligned):
    node = [Node("resid_pre", 0, None, "IO")]  # all that an IO counterfactual changes passes through here
    exact = exact_patching(model, aligned, "IO", node).effects
    found = [attribution_patching(model, aligned, "IO", node, steps).effects for steps in (1, 8, 64)]
    error = [(effects - exact).abs().mean() for effects in found]
    assert error[2] < error[1] / 4 < error[0] / 4
    assert error[2] <= 0.02 * exact.abs().mean()


# Capture, run and gradients

def test_capture_equals_run_with_cache(random_model, random_task):
    prompts, nodes = random_task.prompts, [Node(site, layer) for site in sites_of(random_model) for layer in (0, 3)]
    _, cache = random_model.run_with_cache(prompts.tokens)
    for node, value in capture(random_model, prompts, nodes, batch_size=3).items():
        assert_close(value, cache[node.hook])
    rows = torch.arange(len(prompts))
    for node, value in capture(random_model, prompts, few_nodes(random_model, random_task, 5), batch_size=3).items():
        there = cache[node.hook][rows, prompts.index(node.position)]
        assert_close(value, there if node.head is None else there[:, node.head])


@pytest.mark.parametrize("site", SITES)
def test_both_transformer_lens_classes_agree(random_models, site):
    models = [random_models["gpt2"], random_models["gpt2-hooked"]]
    assert type(models[0]) is not type(models[1])
    task, node = load_task("ioi", models[0], n=24)[:7], Node(site, 1)
    acts, slopes = ([of(m)[node] for m in models] for of in (
        lambda m: capture(m, task.prompts, [node]), lambda m: gradients(m, task.prompts, [node], task.metric())))
    edited = [run(m, task.prompts, edits={node: 1.5 * acts[0]}) for m in models]
    for ours, theirs in (acts, slopes, edited): assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(batch_size=st.integers(1, 7))
def test_batch_size_changes_nothing(model, batch_size):
    task = load_task("ioi", model, n=24)[:6]
    nodes = [Node("v", 1, 0, "IO"), Node("z", 3, 2, "END"), Node("resid_pre", 2, None, "S2")]
    edits = capture(model, task.counterfactual("S").prompts, nodes, 6)
    assert_close(capture(model, task.counterfactual("S").prompts, nodes, batch_size), edits)
    ran = [run(model, task.prompts, None, edits, b) for b in (batch_size, 6)]
    assert_close(*ran, rtol=1e-5, atol=1e-5)
    for score, options in ((attribution_patching, {"steps": 2}), (exact_patching, {})):
        ours, whole = (score(model, task, "IO", nodes, batch_size=b, **options).effects for b in (batch_size, 6))
        assert_close(ours, whole, rtol=1e-5, atol=1e-5)


# Grouped heads

def test_keys_and_values_have_fewer_heads_where_heads_are_grouped(random_models):
    model = random_models["gemma"]
    assert {site: n_heads(model, site) for site in HEAD_SITES} == {"q": 4, "k": 2, "v": 2, "z": 4}
    task = load_task("ioi", model, n=24)[:4]
    nodes = all_nodes(model, ["IO", "END"])
    assert {s: sum(n.site == s for n in nodes) for s in HEAD_SITES} == {"q": 32, "k": 16, "v": 16, "z": 32}
    acts = capture(model, task.prompts, nodes)
    assert all(a.shape == (4, 32) for a in acts.values())
    assert attribution_patching(model, task, "IO", nodes).effects.shape == (4, len(nodes))


def test_patching_a_shared_value_head_moves_only_the_query_heads_that_read_it(random_models):
    model = random_models["gemma"]
    task = load_task("ioi", model, n=24)[:3]
    value, heads = Node("v", 1, 1, "IO"), [Node("z", 1, h, "END") for h in range(4)]
    before = capture(model, task.prompts, heads)
    there = capture(model, task.counterfactual("IO").prompts, [value])[value]
    after, index = {}, task.prompts.index("IO")

    def put(x):
        x = x.clone()
        x[torch.arange(3), index, 1] = there
        return x
    def keep(z): after["z"] = z.clone()
    with torch.no_grad(), hooked(model, [(value.hook, put), ("blocks.1.attn.hook_z", keep)]): model(task.prompts.tokens)
    z = after["z"][torch.arange(3), task.prompts.index("END")]
    moved = [(z[:, h] - before[node]).abs().max().item() for h, node in enumerate(heads)]
    assert [m > 1e-6 for m in moved] == [False, False, True, True]


# Faults

@pytest.mark.parametrize("family,node", [
    ("pythia", Node("resid_mid", 1)), ("gpt2", Node("q", 4, 0)), ("gpt2-hooked", Node("q", 4, 0)),
])
def test_a_hook_that_the_model_has_not_is_an_error(random_models, family, node):
    model = random_models[family]
    task = load_task("ioi", model, n=24)[:2]
    edits = {node: torch.zeros(2, 17, 32)}
    for call in (lambda: capture(model, task.prompts, [node]), lambda: run(model, task.prompts, edits=edits),
                 lambda: gradients(model, task.prompts, [node], task.metric())):
        with pytest.raises(ValueError, match=f"hook '{node.hook}' is not in this model"): call()


def test_no_hook_stays_after_an_error(random_model, random_task):
    before = run(random_model, random_task.prompts)

    def fails(logits, rows): raise ArithmeticError
    edits, prompts = {Node("z", 1, 0, "END"): torch.zeros(7, 32)}, random_task.prompts
    for broken in (lambda: run(random_model, prompts, fails, edits),
                   lambda: gradients(random_model, prompts, [Node("q", 0)], fails)):
        with pytest.raises(ArithmeticError): broken()
    assert torch.equal(run(random_model, prompts), before)
    assert_close(random_model(prompts.tokens)[torch.arange(7), prompts.index("END")], before)
