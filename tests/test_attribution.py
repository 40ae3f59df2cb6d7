"""First-order effects and attention patterns, against plain loops: one prompt, one node and one path at a time."""
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import FAMILIES, few_nodes, sites_of
from torch.testing import assert_close
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sage_nb.core.activations import Node, Prompts, capture
from sage_nb.core.attention import Attention
from sage_nb.discovery.attribution import Contrast, all_nodes, attribution_patching, exact_patching
from sage_nb.discovery.attribution import exact_effects, first_order
from sage_nb.tasks.task import load_task

CONFIGS = {
    "learned positions": {},
    "rotary": dict(positional_embedding_type="rotary", rotary_dim=8),
    "rotary, adjacent pairs": dict(positional_embedding_type="rotary", rotary_dim=8, rotary_adjacent_pairs=True),
    "shared heads, soft-cap, window": dict(
        positional_embedding_type="rotary", n_key_value_heads=2, attn_scores_soft_cap=2.0,
        use_local_attn=True, window_size=9, attn_types=["local", "local"]),
}
HOW = {"AtP": {}, "QK": {"qk_fix": True}, "paths": {"steps": 3}, "paths and QK": {"steps": 3, "qk_fix": True}}


def from_config(**options):
    "A small HookedTransformer with random weights, whose attention is far from uniform."
    shape = dict(n_layers=2, d_model=32, n_heads=4, d_head=16, n_ctx=12, d_vocab=20, act_fn="gelu", dtype=torch.float64)
    cfg = HookedTransformerConfig(**shape | options)
    model, g = HookedTransformer(cfg).eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / 2)
    return model


def random_pair():
    "Prompts, and counterfactuals in which two neighbouring tokens differ and the role A stands elsewhere."
    g = torch.Generator().manual_seed(1)
    tokens, other = torch.randint(20, (5, 12), generator=g), torch.randint(20, (5, 2), generator=g)
    end, cf = torch.tensor([11, 11, 10, 9, 11]), tokens.clone()
    cf[:, 3:5] = other
    here, there = torch.full((5,), 4), torch.tensor([4, 3, 4, 2, 5])
    return Prompts(tokens, {"A": here, "END": end}), Prompts(cf, {"A": there, "END": end})


def first_logit(logits, rows): return logits[:, 0]


def logit_difference(logits, rows): return logits[:, 0] - logits[:, 1]


def pattern_hook(layer): return f"blocks.{layer}.attn.hook_pattern"


class Plain:
    "The first-order effects of prompt `i`, by TransformerLens's own hooks and the gradient of what is added at a node."

    def __init__(self, model, prompts, cf, right, wrong, i):
        self.model, self.end, self.right, self.wrong = model, prompts.index("END")[i], right, wrong
        self.tokens, self.tokens_cf = prompts.tokens[i : i + 1], cf.tokens[i : i + 1]
        self.place = {role: index[i].item() for role, index in prompts.positions.items()}
        self.place_cf = {role: index[i].item() for role, index in cf.positions.items()}
        self.here, self.there = self.activations(self.tokens), self.activations(self.tokens_cf)
        self.pattern_change = cache(self.pattern_change)

    @classmethod
    def of(cls, model, task, attribute, i):
        cf = task.counterfactual(attribute)
        return cls(model, task.prompts, cf.prompts, task.answers[i], cf.distractors[i], i)

    @torch.no_grad()
    def activations(self, tokens): return self.model.run_with_cache(tokens)[1]

    def change(self, node): return self.at(self.there, node, self.place_cf) - self.at(self.here, node, self.place)

    def at(self, acts, node, place):
        x = acts[node.hook][0, place[node.position]]
        return x if node.head is None else x[node.head]

    def added(self, node, delta):
        "A hook that adds to a node. What is added to resid_mid is added by attn_out."
        def add(x, hook):
            x = x.clone()
            where = (0, self.place[node.position]) + (() if node.head is None else (node.head,))
            x[where] = x[where] + delta
            return x
        return node.hook.replace("resid_mid", "attn_out"), add

    def pattern_change(self, node):
        "How the pattern moves in a real run with the counterfactual query or key."
        patched, name = [], pattern_hook(node.layer)
        def keep(x, hook): patched.append(x)
        with torch.no_grad():
            self.model.run_with_hooks(self.tokens, fwd_hooks=[self.added(node, self.change(node)), (name, keep)])
        return patched[0] - self.here[name]

    def slopes(self, nodes, stream, qk_fix):
        "The effect of each node by the slope in a run that starts from `stream`, and the activations of that run."
        fixed = [node for node in nodes if qk_fix and node.site in ("q", "k")]
        names = {pattern_hook(node.layer) for node in fixed}
        patterns = {name: torch.zeros_like(self.here[name]) for name in names}
        deltas = [torch.zeros_like(self.change(node)) for node in nodes]
        for delta in (*deltas, *patterns.values()): delta.requires_grad_()
        hooks = [("blocks.0.hook_resid_pre", lambda x, hook: stream)]
        hooks += [(name, lambda x, hook, delta=delta: x + delta) for name, delta in patterns.items()]
        hooks += [self.added(node, delta) for node, delta in zip(nodes, deltas)]
        logits = self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)[0, self.end]
        m = logits[self.right] - logits[self.wrong]
        grads = dict(zip([*nodes, *patterns], torch.autograd.grad(m, [*deltas, *patterns.values()])))

        def effect(node):
            if node not in fixed: return self.change(node) @ grads[node]
            return (self.pattern_change(node) * grads[pattern_hook(node.layer)]).sum()
        return torch.stack([effect(node) for node in nodes])

    def things(self):
        "What differs, one by one: token -> the counterfactual's token that takes its place."
        differ, runs = [a != b for a, b in zip(self.tokens[0].tolist(), self.tokens_cf[0].tolist())], []
        for t, yes in enumerate(differ):
            if yes and t and differ[t - 1]: runs[-1][t] = t
            elif yes: runs.append({t: t})
        return runs + [{self.place[r]: self.place_cf[r]} for r in self.place if self.place[r] != self.place_cf[r]]

    def effects(self, nodes, steps=1, qk_fix=False):
        "One number per node."
        start, goal = (acts["blocks.0.hook_resid_pre"] for acts in (self.here, self.there))
        clean = self.slopes(nodes, start, qk_fix)
        if steps == 1: return clean
        shares, means = [], []
        for thing in self.things():
            target = start.clone()
            for t, source in thing.items(): target[0, t] = goal[0, source]
            path = [self.slopes(nodes, start + a * (target - start), qk_fix) for a in torch.linspace(0, 1, steps)]
            means.append(torch.trapezoid(torch.stack(path), dx=1 / (steps - 1), dim=0))
            with torch.no_grad(), self.model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: target)]):
                end = self.model.run_with_cache(self.tokens)[1]
            moved = [self.at(end, node, self.place) - self.at(self.here, node, self.place) for node in nodes]
            shares.append(torch.stack([m @ self.change(node) for m, node in zip(moved, nodes)]).relu())
        shares, means = torch.stack(shares), torch.stack(means)
        along = [(s * m).sum() / s.sum() if s.sum() > 0 else c for s, m, c in zip(shares.T, means.T, clean)]
        if qk_fix: along = [(x + c) / 2 if n.site in ("q", "k") else x for x, c, n in zip(along, clean, nodes)]
        return torch.stack(along)


# First-order effects

@pytest.mark.parametrize("attribute", ["IO", "S", "Pos"])
def test_first_order_effects_equal_a_plain_loop(random_model, random_task, attribute):
    nodes, plain = few_nodes(random_model, 11), Plain.of(random_model, random_task, attribute, 4)
    ours = {}
    for name, how in HOW.items():
        ours[name] = attribution_patching(random_model, random_task, attribute, nodes, **how).effects[4]
        assert_close(ours[name], plain.effects(nodes, **how))
    q_or_k = torch.tensor([node.site in ("q", "k") for node in nodes])
    atp, qk, paths, both = ours.values()
    assert torch.equal(qk[~q_or_k], atp[~q_or_k])
    for x, y in ((qk[q_or_k], atp[q_or_k]), (paths, atp), (both[q_or_k], paths[q_or_k])):
        assert (x - y).abs().max() > 1e-4, "two ways give the same, so that to confuse them would not show"


@pytest.mark.parametrize("how", HOW)
def test_first_order_effects_equal_a_plain_loop_on_the_trained_model(model, aligned, how):
    nodes = all_nodes(model, ["S2", "END"])[::5]
    ours = attribution_patching(model, aligned, "S", nodes, **HOW[how])
    assert_close(ours.effects[2], Plain.of(model, aligned, "S", 2).effects(nodes, **HOW[how]))


def test_first_order_effects_equal_a_plain_loop_where_neighbours_differ():
    "Two neighbouring tokens are one thing, and some nodes change against the direction of every path."
    model, (prompts, cf) = from_config(**CONFIGS["rotary"]), random_pair()
    nodes = all_nodes(model, ["A", "END"], sites_of(model))
    for how in (HOW["paths"], HOW["paths and QK"]):
        ours = first_order(model, Contrast(prompts, cf, logit_difference), nodes, **how).effect
        assert_close(ours, torch.stack([Plain(model, prompts, cf, 0, 1, i).effects(nodes, **how) for i in range(5)]))


def test_integrated_gradients_of_the_embedding_add_up_to_the_exact_effect(model, aligned):
    node = [Node("resid_pre", 0, None, "IO")]  # all that an IO counterfactual changes passes through here
    exact = exact_patching(model, aligned, "IO", node).effects
    scores = [attribution_patching(model, aligned, "IO", node, steps) for steps in (1, 8, 64)]
    one, eight, many = ((s.effects - exact).abs().mean() for s in scores)
    assert many < eight / 4 < one / 4
    assert many <= 0.02 * exact.abs().mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_effects_are_exact_where_the_metric_is_linear(name):
    "With one layer of attention and no norm, logits are linear in pattern, z and v; q and k are left with the softmax."
    model = from_config(n_layers=1, attn_only=True, normalization_type=None, **CONFIGS[name])
    contrast, nodes = Contrast(*random_pair(), first_logit), all_nodes(model, ["A", "END"])
    fixed, slopes = (first_order(model, contrast, nodes, qk_fix=fix).effect for fix in (True, False))
    exact = exact_effects(model, contrast, nodes).effect
    assert_close(fixed, exact)
    q_or_k = torch.tensor([node.site in ("q", "k") for node in nodes])
    assert_close(slopes[:, ~q_or_k], exact[:, ~q_or_k])
    assert (slopes - exact)[:, q_or_k].abs().max() > 0.1, "slopes are exact for q and k too: the fix has nothing to do"


def test_what_else_is_in_a_batch_changes_nothing(random_model, random_task):
    "Four prompts that differ from their counterfactuals in other things, and in other numbers of them."
    prompts, cfs = random_task.prompts[:4], [random_task.counterfactual(a).prompts[:4] for a in ("S", "Pos", "IO")]
    cfs.append(prompts)

    def mixed(xs): return torch.stack([x[i] for i, x in enumerate(xs)])
    positions = {role: mixed([c.index(role) for c in cfs]) for role in prompts.positions}
    cf = Prompts(mixed([c.tokens for c in cfs]), positions)
    contrast, nodes = Contrast(prompts, cf, random_task[:4].metric("S")), few_nodes(random_model, 7)
    for how in (HOW["QK"], HOW["paths and QK"]):
        together, alone = (first_order(random_model, contrast, nodes, batch_size=b, **how).effect for b in (4, 1))
        assert_close(together, alone)
        assert together[:3].abs().amax(1).min() > 0.01 > 1e-6 > together[3].abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_transformer_lens_classes_give_the_same_scores(random_models, family):
    models = [random_models[family], random_models[f"{family}-hooked"]]
    assert type(models[0]) is not type(models[1])
    task, nodes = load_task("ioi", models[0], n=24)[:5], few_nodes(models[0], 5)
    assert {node.site for node in nodes} == set(sites_of(models[0])) == set(sites_of(models[1]))
    for attribute, hows in {"IO": ("AtP", "QK"), "Pos": ("paths and QK",)}.items():
        for how in hows:
            ours, theirs = (attribution_patching(m, task, attribute, nodes, **HOW[how]).effects for m in models)
            assert_close(ours, theirs)
    ours, theirs = (exact_patching(m, task, "S", nodes).effects for m in models)
    assert_close(ours, theirs)
    assert ours.abs().max() > 0.1


# Attention

def check_attention(model, prompts, cf, layer):
    "The model's own pattern, and those of real runs with other queries and other keys, at all tokens."
    q, k, pattern = Node("q", layer), Node("k", layer), Node("pattern", layer)
    acts, other = capture(model, prompts, [*Attention.reads(model, layer), pattern]), capture(model, cf, [q, k])
    attention = Attention.of(model, layer, acts)
    assert_close(attention.pattern(acts[q], acts[k]), acts[pattern])
    for node in (q, k):
        there, patched = acts | {node: other[node]}, []
        def put(x, hook): return other[node]
        def keep(x, hook): patched.append(x.transpose(1, 2))
        with torch.no_grad(): model.run_with_hooks(prompts.tokens, fwd_hooks=[(node.hook, put), (pattern.hook, keep)])
        assert_close(attention.pattern(there[q], there[k]), patched[0])
        assert (patched[0] - acts[pattern]).abs().max() > 0.01, "the patch did nothing"
    return attention, acts


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("kind", ["", "-hooked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_the_models_own(random_models, family, kind, layer):
    model = random_models[family + kind]
    task = load_task("ioi", model, n=24)[:7]
    check_attention(model, task.prompts, task.counterfactual("S").prompts, layer)


@pytest.mark.parametrize("name", CONFIGS)
def test_patterns_are_those_of_a_model_from_a_config(name):
    model = from_config(**CONFIGS[name])
    attention, acts = check_attention(model, *random_pair(), 1)
    assert attention.scale == pytest.approx(1 / 4)
    q, k, pattern = (acts[Node(site, 1)] for site in ("q", "k", "pattern"))
    wrong = {"cap": None, "adjacent": not attention.adjacent, "rotary": None}
    others = {key: replace(attention, **{key: value}).pattern(q, k) for key, value in wrong.items()}
    matters = {key for key, other in others.items() if (other - pattern).abs().max() > 0.01}
    rotary, cap = model.cfg.positional_embedding_type == "rotary", model.cfg.attn_scores_soft_cap > 0
    assert matters == ({"adjacent", "rotary"} if rotary else set()) | ({"cap"} if cap else set())


def test_a_bias_by_distance_is_refused_and_not_ignored():
    model, contrast = from_config(positional_embedding_type="alibi"), Contrast(*random_pair(), first_logit)
    nodes = [Node("q", 1, 0, "END"), Node("z", 1, 0, "END")]
    refusal = "scores of layer 1 are not scaled products of its queries and keys.*leave the QK fix"
    with pytest.raises(ValueError, match=refusal): first_order(model, contrast, nodes, qk_fix=True)
    for steps in (1, 3): assert first_order(model, contrast, nodes, steps).effect.all()
