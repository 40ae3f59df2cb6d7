"""Every family that SAEs exist for: load, patch, project, attribute and recompute, against transformers' own model."""
import pytest
import torch
from families import CHECKED, CONFIGS, HOOKED, N_LAYERS, WINDOW, contrast, make, nodes_of, off, off_exact, off_fixed
from families import off_identity, off_pattern, off_recomputed
from torch.testing import assert_close

from sage_nb.core.activations import HEAD_SITES, Node, capture, run
from sage_nb.core.attention import Attention, UnknownAttention, require_mixture
from sage_nb.discovery.attribution import all_nodes, exact_effects, first_order, sites_of

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
    made, model = both(family, kind)
    by_hand, fixed, plain = off_fixed(made, model)
    assert by_hand <= LIMIT
    assert fixed < plain


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
