"""Every family that SAEs exist for: load, patch, project, attribute and recompute, against transformers' own model."""
from dataclasses import replace

import pytest
import torch
from families import CHECKED, CONFIGS, HOOKED, N_LAYERS, WINDOW, contrast, evaluated, fixed_by_hand, make, make_reader
from families import nodes_of, off, off_evaluated, off_exact, off_fixed, off_identity, off_pattern, off_recomputed, save
from torch.testing import assert_close

from sage_nb.core import attention
from sage_nb.core.activations import HEAD_SITES, Node, capture, clean_run, run
from sage_nb.core.attention import Attention, UnknownAttention, require_mixture
from sage_nb.core.cone import LogitDifference, can_narrow, why_whole
from sage_nb.core.doctor import EXPERIMENTS, doctor
from sage_nb.core.models import load_model
from sage_nb.core.sublayers import require_identity
from sage_nb.discovery.attribution import all_nodes, exact_effects, first_order, sites_of
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.saes.composition import _meetings

LIMIT = 1e-5
KNOWN = [family for family in CONFIGS if family != "qwen-3.5"]  # whose queries and patterns are known
CLASSES = [(family, "bridge") for family in CONFIGS] + [(family, "hooked") for family in HOOKED]
each = pytest.mark.parametrize("family,kind", CLASSES)
each_known = pytest.mark.parametrize("family,kind", [pair for pair in CLASSES if pair[0] in KNOWN])


def both(family, kind):
    made = make(family)
    return made, getattr(made, kind)


@each
def test_logits_are_those_of_transformers(family, kind):
    made, model = both(family, kind)
    tokens = contrast().prompts.tokens
    theirs = made.theirs(tokens).logits
    assert off(model(tokens).log_softmax(-1), theirs.log_softmax(-1)) <= LIMIT


@each
def test_exact_patching_equals_transformers_own_hooks(family, kind):
    made, model = both(family, kind)
    assert off_exact(made, model) <= LIMIT


@each
def test_sites_hold_what_the_maps_claim(family, kind):
    _, model = both(family, kind)
    errors = off_identity(model)
    gated = {"z"} if family == "qwen-3.5" else set()
    assert set(errors) == set(CHECKED) - ({"q"} if gated else set())
    assert max(error for site, error in errors.items() if site not in gated) <= LIMIT, errors
    assert all(errors[site] > 0.1 for site in gated), "the gate of z does nothing, so that to ignore it would not show"


@each_known
def test_the_qk_fix_is_the_slope_at_a_pattern_that_moves_as_in_a_real_run(family, kind):
    by_hand, _, _ = off_fixed(family, kind)
    assert by_hand <= LIMIT


def test_the_qk_fix_is_nearer_to_the_truth_than_plain_slopes_in_most_families():
    "Not in each: weights are random, and what lies behind the pattern is not linear either."
    errors = {family: off_fixed(family, "bridge")[1:] for family in KNOWN}
    nearer = [family for family, (fixed, plain) in errors.items() if fixed < plain]
    assert len(nearer) >= 0.8 * len(KNOWN), errors


@each_known
def test_recomputed_patterns_are_transformers_own(family, kind):
    made, model = both(family, kind)
    assert off_pattern(made, model) <= LIMIT
    assert off_recomputed(model) <= LIMIT


@pytest.mark.parametrize("family", HOOKED)
def test_both_transformer_lens_classes_give_the_same_numbers(family):
    made = make(family)
    nodes, case = nodes_of(made.bridge, CHECKED), contrast()
    assert nodes == nodes_of(made.hooked, CHECKED)
    everywhere = [Node(site, layer) for site in CHECKED for layer in range(N_LAYERS)]
    ours, theirs = (capture(model, case.prompts, everywhere) for model in (made.bridge, made.hooked))
    for node in everywhere: assert off(ours[node], theirs[node]) <= LIMIT, node
    for how in (dict(), dict(qk_fix=True), dict(steps=3, qk_fix=True)):
        ours, theirs = (first_order(model, case, nodes, **how).effect for model in (made.bridge, made.hooked))
        assert off(ours, theirs) <= LIMIT


@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 0.1), (torch.float64, 1e-5)])
@pytest.mark.parametrize("family", ["gpt-j", "opt", "gemma-3"])
def test_the_qk_fix_works_in_other_precisions(family, dtype, limit, tmp_path):
    model, case = load_model(save(make(family).theirs, tmp_path), dtype=dtype), contrast()
    nodes = nodes_of(model, ("q", "k"))
    effects = first_order(model, case, nodes, qk_fix=True).effect
    assert off(effects.double(), fixed_by_hand(family).double()) <= limit


FEW = [("gpt-oss", "hooked"), ("qwen-3.5", "bridge")]


@pytest.mark.parametrize("family,kind", FEW + [
    pytest.param(*pair, marks=pytest.mark.slow) for pair in CLASSES if pair not in FEW])
def test_an_identity_goes_through_the_whole_pipeline_as_one(family, kind):
    report = evaluated(getattr(make_reader(family), kind))
    assert off_evaluated(report) <= LIMIT
    assert report.sections.counts.sum() >= (1 if family == "qwen-3.5" else 3), report.sections


# What the formula needs, and when it is not believed

MATTERS = {  # family -> what its recomputed patterns would be wrong without
    "gpt2": set(), "opt": set(), "pythia": {"rotary"}, "phi": {"rotary"}, "gpt-j": {"rotary", "adjacent"},
    "llama-3": {"rotary"}, "mistral": {"rotary", "visible"}, "qwen-2.5": {"rotary"},
    "qwen-3": {"rotary", "q_norm", "k_norm"}, "gemma-2": {"rotary", "cap", "visible"},
    "gemma-3": {"rotary", "q_norm", "k_norm", "visible"}, "gpt-oss": {"rotary", "sinks", "visible"},
}


@pytest.mark.parametrize("family", KNOWN)
def test_the_parts_of_the_formula_that_a_family_needs_are_found(family):
    model, prompts = make(family).bridge, contrast().prompts
    acts = capture(model, prompts, Attention.reads(model, 0))
    found = Attention.of(model, 0, acts)
    q, k, pattern = (acts[Node(site, 0)] for site in ("q", "k", "pattern"))
    causal = torch.ones(12, 12).tril().bool()[None, :, None].expand_as(found.visible)
    without = dict(cap=None, rotary=None, adjacent=False, q_norm=None, k_norm=None, sinks=None, visible=causal)
    others = {part: replace(found, **{part: value}).pattern(q, k) for part, value in without.items()}
    assert {part for part, other in others.items() if off(other, pattern) > 1e-3} == MATTERS[family]
    assert found.visible.sum(-1).max() == (WINDOW if "visible" in MATTERS[family] else 12)


def test_the_two_rotary_tables_of_gemma_3_are_not_mixed_up():
    model, prompts = make("gemma-3").bridge, contrast().prompts
    acts = capture(model, prompts, [node for layer in (0, 1) for node in Attention.reads(model, layer)])
    swapped = acts | {Node(table, 1): acts[Node(table, 0)] for table in ("cos", "sin")}
    assert off(swapped[Node("cos", 1)], acts[Node("cos", 1)]) > 0.1
    Attention.of(model, 1, acts)
    with pytest.raises(UnknownAttention, match="scores of layer 1 are not scaled products"):
        Attention.of(model, 1, swapped)


@pytest.mark.parametrize("family,part", [
    ("gpt-oss", "_sinks"), ("qwen-3", "_head_norm"), ("gpt-j", "_tables"), ("llama-3", "_tables")])
def test_a_formula_without_what_the_model_has_is_refused(family, part, monkeypatch):
    monkeypatch.setattr(attention, part, lambda *args: None)
    model, prompts = make(family).bridge, contrast().prompts
    acts = capture(model, prompts, Attention.reads(model, 1))
    what = "pattern of layer 1 is not the softmax" if family in ("gpt-oss", "gpt-j") else "scores of layer 1 are not"
    with pytest.raises(UnknownAttention, match=what): Attention.of(model, 1, acts)


@pytest.mark.parametrize("family", ["qwen-3", "gemma-3"])
def test_parts_of_normalised_queries_and_keys_add_up_to_the_score(family):
    model, case = make(family).bridge, contrast()
    prompts, query, key = case.prompts[1:], Node("q", 1, 3, "END"), Node("k", 1, 1, "A")
    true = capture(model, prompts, [Node("scores", 1, 3, "END")])[Node("scores", 1, 3, "END")]
    true = true[torch.arange(3), prompts.index("A")]
    for meeting in _meetings(model, prompts, query, key, 2):
        query_parts, key_parts = (torch.stack([0.3 * x + 1, 0.7 * x - 1], 1) for x in (meeting.query, meeting.key))
        split = meeting.contributions(query_parts, key_parts)
        assert_close(split.sum((1, 2)), true[meeting.rows], rtol=1e-4, atol=1e-5)
        assert split.abs().amax() > 0.05


# Gates, and layers without attention

def test_a_model_with_gates_and_layers_without_attention_says_what_it_has():
    model, case = make("qwen-3.5").bridge, contrast()
    assert sites_of(model) == ["resid_pre", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    assert {node.layer for node in all_nodes(model, "END", ["k", "v", "z", "attn_out", "resid_mid"])} == {1}
    assert {node.layer for node in all_nodes(model, "END", ["resid_pre", "mlp_out", "resid_post"])} == {0, 1}
    gates = "one hook of this model holds its queries and the gates of its heads .*has resid_pre.* k, v, z"
    with pytest.raises(ValueError, match=f"site 'q' is not known here: {gates}"): all_nodes(model, "END", HEAD_SITES)
    with pytest.raises(ValueError, match=f"L1H5.q@END is not in this model: {gates}"):
        capture(model, case.prompts, "L1H5.q@END")
    linear = "layer 0 of this model has linear_attn in place of attention .layer 0 has resid_pre, mlp_out, resid_post"
    for node in ("L0H0.v@END", "L0.attn_out@END", "L0.pattern"):
        with pytest.raises(ValueError, match=linear): capture(model, case.prompts, node)
    middle = capture(model, case.prompts, "L1.resid_mid@END")
    assert_close(run(model, case.prompts, edits=middle), run(model, case.prompts))
    edit = {"L0.resid_mid@END": middle[Node("resid_mid", 1, None, "END")]}
    with pytest.raises(ValueError, match=linear): run(model, case.prompts, edits=edit)


def test_the_doctor_knows_layers_without_attention_and_refuses_no_experiment_elsewhere():
    diagnosis = doctor(make("qwen-3.5").bridge)
    assert {check.name for check in diagnosis.of("failed")} == {"z", "pattern"}
    assert not {"z", "pattern"} & {*EXPERIMENTS}
    diagnosis.require(sites=["resid_pre", "resid_post"])


def test_gated_heads_are_no_mixture_of_values_and_get_no_qk_fix():
    model, case = make("qwen-3.5").bridge, contrast()
    held = capture(model, case.prompts, [Node(site, 1) for site in ("pattern", "v", "z")])
    with pytest.raises(UnknownAttention, match="its heads may be gated"): require_mixture(1, held)
    with pytest.raises(ValueError, match="z of layer 1 is not what this model's weights and stream say"):
        require_identity(model, case.prompts, [("z", 1)])
    keys = all_nodes(model, "A", "k")
    with pytest.raises(UnknownAttention, match="layer 1 has no queries to be seen"):
        first_order(model, case, keys, qk_fix=True)
    slopes, exact = first_order(model, case, keys).effect, exact_effects(model, case, keys).effect
    assert (slopes - exact).norm() < exact.norm()


@pytest.fixture
def stubborn():
    "The trained model, said to have a soft-cap that it has not."
    model = load_model("tiny-gpt2")
    model.cfg.attn_scores_soft_cap = 2.0
    return model


def test_cross_sections_without_the_qk_fix_say_so(stubborn, task, model):
    few, how = task[:40], dict(sites="q", attributes="IO", max_prompts=12, min_accuracy=0, steps=1, verbose=False)
    with pytest.warns(UserWarning, match="q and k by plain slopes, without the QK fix: the attention scores of layer"):
        found = find_cross_sections(stubborn, few, **how)
    assert found.settings["qk_fix"] is False
    assert found.scores["IO"].method == "AtP"
    assert "\nnote: q and k by plain slopes, without the QK fix: the attention scores of layer" in f"\n{found}"
    with pytest.raises(UnknownAttention, match="leave the QK fix"):
        find_cross_sections(stubborn, few, qk_fix=True, **how)
    fixed = find_cross_sections(model, few, **how)
    assert (fixed.settings["qk_fix"], fixed.scores["IO"].method, fixed.notes) == (True, "AtP + QK", [])


# Some tokens of a run

@each_known
def test_every_family_computes_some_tokens_as_it_computes_all(family, kind):
    model, there = getattr(make(family), kind), contrast()
    assert why_whole(model) is None and can_narrow(model)
    prompts, metric = there.prompts, LogitDifference(torch.tensor([5, 6, 7, 8]), torch.tensor([9, 3, 4, 5]))
    clean, sites = clean_run(model, prompts), [s for s in (*HEAD_SITES, "mlp_out") if s in sites_of(model)]
    for site in sites:
        for layer, position in ((0, "A"), (1, "END"), (1, "A")):
            node = Node(site, layer, 0 if site in HEAD_SITES else None, position)
            edits = capture(model, there.cf, [node])
            whole = run(model, prompts, lambda logits, rows: metric(logits, rows), edits)
            assert_close(run(model, prompts, metric, edits, start=clean), whole, rtol=1e-5, atol=2e-5)


def test_a_model_with_linear_attention_computes_all_tokens_and_says_why():
    model, prompts = make("qwen-3.5").bridge, contrast().prompts
    clean = clean_run(model, prompts)
    assert clean.whole == why_whole(model) and "Error" in clean.whole
    node = Node("mlp_out", 1, None, "END")
    edits = {node: torch.randn(4, model.cfg.d_model, generator=torch.Generator().manual_seed(0))}
    assert_close(run(model, prompts, None, edits, start=clean), run(model, prompts, None, edits), rtol=1e-5, atol=1e-5)
