"""Reading, replacing and differentiating activations, against TransformerLens's own tools and plain loops."""
import pandas as pd
import pytest
import torch
from conftest import few_nodes, sites_of
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching

from sage_nb.core.activations import HEAD_SITES, SITES, Node, Prompts
from sage_nb.core.activations import capture, clean_run, differentiate, gradients, hooked, run, run_each, run_several
from sage_nb.core.attention import n_heads
from sage_nb.discovery.attribution import all_nodes, attribution_patching, exact_patching
from sage_nb.tasks.task import load_task

THEIRS = {
    "q": patching.get_act_patch_attn_head_q_by_pos, "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos, "z": patching.get_act_patch_attn_head_out_by_pos,
}


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


def test_patching_a_stream_is_patching_it_where_the_next_layer_reads_it(random_model, random_task):
    post, pre = (Node(site, layer, None, "S2") for site, layer in (("resid_post", 1), ("resid_pre", 2)))
    there = capture(random_model, random_task.counterfactual("S").prompts, [post, pre])
    clean, patched = run_each(random_model, random_task.prompts, random_task.metric(), there)
    assert_close(patched[:, 0], patched[:, 1])
    assert (patched[:, 0] - clean).abs().max() > 0.01


# One node at a time

@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3, 20])
def test_each_edit_alone_is_a_run_with_that_edit(random_model, random_task, batch_size):
    prompts, metric = random_task.prompts, random_task.metric("S")
    nodes = [Node(site, layer, None, position) for site in sites_of(random_model)
             for layer, position in ((3, "END"), (0, "S2"), (1, None))]  # not in the order of layers
    nodes += [Node(site, 2, 1, "S2") for site in HEAD_SITES]
    edits = capture(random_model, random_task.counterfactual("S").prompts, nodes)
    clean, each = run_each(random_model, prompts, metric, edits, batch_size)
    assert_close(clean, run(random_model, prompts, metric))
    alone = [run(random_model, prompts, metric, {node: value}) for node, value in edits.items()]
    assert_close(each, torch.stack(alone, 1))
    moved = (each - clean[:, None]).abs().amax(0) > 1e-4
    assert moved.sum() > 0.8 * len(nodes), "most edits do nothing, so that one in the wrong place would not show"


# Capture, run and gradients

@pytest.mark.parametrize("position", ["S2", "END", "IO", None])
@pytest.mark.parametrize("site", SITES)
def test_what_an_edit_can_reach_is_what_the_whole_run_says(random_model, random_task, site, position):
    if site not in sites_of(random_model): pytest.skip(f"{type(random_model).__name__} has no {site}")
    prompts, metric, last = random_task.prompts, random_task.metric(), random_model.cfg.n_layers - 1
    head, clean = 0 if site in HEAD_SITES else None, clean_run(random_model, prompts)
    assert clean.whole is None, "nothing but whole runs is tried here"
    for layer in (0, 2, last):
        nodes = [Node(site, at, head, position) for at in {layer, last}]
        edits = capture(random_model, random_task.counterfactual("S").prompts, nodes)
        whole, logits = (run(random_model, prompts, m, edits) for m in (metric, None))
        if layer == 0 and position != "IO":  # elsewhere some edits reach nothing
            assert (whole - run(random_model, prompts, metric)).abs().max() > 1e-5
        for batch_size in (3, 64):
            assert_close(run(random_model, prompts, metric, edits, batch_size, clean), whole, rtol=1e-5, atol=1e-5)
        assert_close(run(random_model, prompts, None, edits, start=clean), logits, rtol=1e-5, atol=1e-5)
        keyless = clean.without_keys()
        assert_close(run(random_model, prompts, metric, edits, start=keyless), whole, rtol=1e-5, atol=1e-5)
        rows = torch.tensor([4, 1])
        some = {node: x[rows] for node, x in edits.items()}
        few = run(random_model, prompts[rows], metric[rows], some, start=clean[rows])
        assert_close(few, whole[rows], rtol=1e-5, atol=1e-5)
    assert_close(run(random_model, prompts, metric), metric(random_model(prompts.tokens)[
        torch.arange(len(prompts)), prompts.index("END")], slice(None)))  # all as before


def test_several_sets_of_edits_are_as_many_runs(random_model, random_task):
    prompts, metric = random_task.prompts, random_task.metric("S")
    nodes = [Node("z", 1, 0, "END"), Node("v", 0, 1, "S2"), Node("k", 2, 0, "IO"), Node("z", 3, 1, "END")]
    there = capture(random_model, random_task.counterfactual("S").prompts, nodes)
    sets = [{n: there[n] for n in some} for some in (nodes[:1], nodes[1:3], nodes, nodes[3:], nodes[:1])]
    alone = torch.stack([run(random_model, prompts, metric, edits) for edits in sets], 1)
    for start, batch_size in ((None, 64), (clean_run(random_model, prompts), 64), (None, 3)):
        assert_close(run_several(random_model, prompts, metric, sets, batch_size, start), alone, rtol=1e-5, atol=1e-5)


def test_capture_equals_run_with_cache(random_model, random_task):
    prompts, nodes = random_task.prompts, [Node(site, layer) for site in sites_of(random_model) for layer in (0, 3)]
    _, cache = random_model.run_with_cache(prompts.tokens)
    for node, value in capture(random_model, prompts, nodes, batch_size=3).items():
        assert_close(value, cache[node.hook])
    rows = torch.arange(len(prompts))
    for node, value in capture(random_model, prompts, few_nodes(random_model, 5), batch_size=3).items():
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
    prompts, metric = task.prompts, task.metric()
    calls = (
        lambda: capture(model, prompts, [node]),
        lambda: run(model, prompts, edits=edits),
        lambda: run_each(model, prompts, metric, edits),
        lambda: gradients(model, prompts, [node], metric),
        lambda: differentiate(model, prompts, metric, forward={node: print}))
    for call in calls:
        with pytest.raises(ValueError, match=f"hook '{node.hook}' is not in this model"): call()


def test_a_hook_that_does_not_fire_is_an_error():
    "A HookedTransformer without MLPs still has a hook for what they would give."
    cfg = HookedTransformerConfig(n_layers=2, d_model=8, n_heads=2, d_head=4, n_ctx=6, d_vocab=10, attn_only=True)
    model, silent = HookedTransformer(cfg), Node("mlp_out", 1, None, "END")
    prompts, edits = Prompts(torch.arange(6)[None], {"END": torch.tensor([5])}), {silent: torch.zeros(1, 8)}
    def metric(logits, rows): return logits[:, 0]
    calls = (
        lambda: capture(model, prompts, [silent]),
        lambda: run(model, prompts, edits=edits),
        lambda: run_each(model, prompts, metric, edits),
        lambda: differentiate(model, prompts, metric, forward={silent: print}),
        lambda: differentiate(model, prompts, metric, backward={silent: print}))
    for call in calls:
        with pytest.raises(RuntimeError, match=f"hooks did not fire: {silent.hook}"): call()


def traces(model):
    "All that an edit could leave behind: hooks, and methods hidden by attributes."
    kinds = ("fwd_hooks", "bwd_hooks", "_forward_hooks", "_backward_hooks")
    def lengths(hook): return [len(getattr(hook, kind)) for kind in kinds]
    hooks = {name: lengths(hook) for name, hook in model.hook_dict.items()}
    return hooks, [(set(vars(block)), len(block._forward_hooks)) for block in model.blocks]


def test_nothing_stays_on_the_model_after_an_error(random_model, random_task):
    prompts, metric = random_task.prompts, random_task.metric()
    before, clean = run(random_model, prompts), traces(random_model)

    def fails(*args): raise ArithmeticError
    z = Node("z", 2, 0, "END")
    fits, too_wide = {z: torch.zeros(7, 32)}, {z: torch.zeros(7, 33)}
    for error, broken in (
        (ArithmeticError, lambda: run(random_model, prompts, fails, fits)),
        (ArithmeticError, lambda: gradients(random_model, prompts, [Node("q", 0)], fails)),
        (ArithmeticError, lambda: differentiate(random_model, prompts, metric, backward={z: fails})),
        (ArithmeticError, lambda: run_each(random_model, prompts, fails, fits)),
        (ValueError, lambda: run_each(random_model, prompts, metric, too_wide)),  # in a run that starts at layer 2
    ):
        with pytest.raises(error): broken()
        assert traces(random_model) == clean
    assert torch.equal(run(random_model, prompts), before)
    assert_close(random_model(prompts.tokens)[torch.arange(7), prompts.index("END")], before)
