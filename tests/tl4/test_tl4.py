"""The method on TransformerLens 4, which has no HookedTransformer, and without sae_lens, which does not allow it yet.

`make test-tl4` makes the environment that these tests are for; in any other they are skipped.
"""
import os
from importlib.metadata import version
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM

from sage_nb import evaluate, find_cross_sections, fit_dictionaries, load_model, load_saes, load_task
from sage_nb.core.activations import Node, capture, run_each
from sage_nb.core.models import EMBEDDED, embedded_models
from sage_nb.tasks.planted import planted_circuit

FOUR = int(version("transformer_lens").split(".")[0]) >= 4
pytestmark = pytest.mark.skipif(not FOUR, reason="for TransformerLens 4: make test-tl4")


class OwnSAE:
    "An SAE that is no module of any library: random directions, read and written."

    def __init__(self, layer, d_model=128, d_sae=256):
        generator = torch.Generator().manual_seed(layer)
        self.hook_name, self.d_in = f"blocks.{layer}.hook_resid_pre", d_model
        self.W_dec = torch.randn(d_sae, d_model, generator=generator) / d_model**0.5

    def encode(self, x): return (x @ self.W_dec.T).relu()

    def decode(self, codes): return codes @ self.W_dec / 2


@pytest.fixture(scope="module", params=embedded_models())
def model(request): return load_model(request.param)


def transformers_own(model):
    "The same model as transformers loads it, and its blocks."
    own = AutoModelForCausalLM.from_pretrained(EMBEDDED / model.cfg.model_name, dtype=torch.float32).eval()
    base = own.base_model
    return own, base.h if hasattr(base, "h") else base.layers


def test_sae_lens_is_not_here():
    assert find_spec("sae_lens") is None


def test_logits_are_those_of_transformers(model):
    tokens = load_task("ioi", model, n=16).prompts.tokens
    theirs = transformers_own(model)[0](tokens).logits
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_exact_patching_equals_plain_forward_hooks(model):
    task = load_task("ioi", model, n=16)
    other, (own, blocks) = task.counterfactual("IO"), transformers_own(model)
    difference = task.metric()
    nodes = [Node("resid_pre", layer, None, "IO") for layer in range(model.cfg.n_layers)]
    values = capture(model, other.prompts, nodes)
    _, ours = run_each(model, task.prompts, difference, values)
    rows, index = torch.arange(len(task)), task.prompts.index("IO")
    for column, node in enumerate(nodes):
        def put(block, args, kwargs, value=values[node]):
            stream = (args[0] if args else kwargs["hidden_states"]).clone()
            stream[rows, index] = value
            return ((stream, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": stream})
        handle = blocks[node.layer].register_forward_pre_hook(put, with_kwargs=True)
        logits = own(task.prompts.tokens).logits[rows, task.prompts.index("END")]
        handle.remove()
        torch.testing.assert_close(ours[:, column], difference(logits, slice(None)), rtol=1e-4, atol=1e-4)


def test_the_whole_method_with_own_saes():
    model = load_model("tiny-gpt2")
    task = load_task("ioi", model, n=96)
    sections = find_cross_sections(model, task, max_prompts=48, verbose=False)
    truth = fit_dictionaries(model, task, sections)
    report = evaluate(model, task, sections, truth, [OwnSAE(layer) for layer in range(4)], force=True)
    score = report.scorecard().score
    own = next(score[name] for name in score.index if name.startswith("OwnSAE") and "twin" not in name)
    assert score["mean ablation"] == 0 < own < score["supervised"]
    assert report.settings["versions"]["sae_lens"] is None


def test_what_needs_the_missing_packages_says_so():
    with pytest.raises(ImportError, match="install 'transformer_lens<4'"): planted_circuit()
    with pytest.raises(ImportError, match="install sae_lens"): load_saes("tiny-gpt2-res-topk")
