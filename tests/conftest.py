"""What the tests share: the embedded model with all that is found on it, and small random models of each family."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test may need the network

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_gemma_weights, convert_gpt2_weights, convert_neox_weights)
from transformers import GPT2TokenizerFast

from sage_nb.core.activations import HEAD_SITES, SITES
from sage_nb.discovery.attribution import all_nodes
from sage_nb.truth.dictionaries import fit_dictionaries
from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.saes.sets import embedded_saes, load_saes
from sage_nb.discovery.sections import find_cross_sections
from sage_nb.tasks.task import load_task
from sage_nb.lab.zoo import build_model, build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("gpt2", "pythia", "gemma")
RANDOM = ("gpt2", "gpt2-hooked", "pythia", "pythia-hooked", "gemma", "gemma-hooked")

settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.load_profile("same")


def complete_sets(model="tiny-gpt2", layers=4):
    "The embedded SAE sets of a model that have an SAE before each of its layers."
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(layers)]
    return [s for s in embedded_saes() if s.startswith(model) and
            all((EMBEDDED / "saes" / s / hook / "cfg.json").exists() for hook in hooks)]


def sites_of(model): return [s for s in SITES if f"blocks.0.{SITES[s]}" in model.hook_dict]


def few_nodes(model, step):
    "Some nodes of every site, with and without heads."
    with_heads = all_nodes(model, ["IO", "S1+1", "END"], HEAD_SITES)
    without = all_nodes(model, ["S2", "END"], [site for site in sites_of(model) if site not in HEAD_SITES])
    return with_heads[::step] + without[::step]


@pytest.fixture(scope="session")
def model(): return load_model("tiny-gpt2")


@pytest.fixture(scope="session")
def task(model): return load_task("ioi", model, n=384)


@pytest.fixture(scope="session")
def sections(model, task): return find_cross_sections(model, task, max_prompts=96, verbose=False)


@pytest.fixture(scope="session")
def truth(model, task, sections): return fit_dictionaries(model, task, sections)


@pytest.fixture(scope="session")
def sae_sets():
    "The embedded SAE sets by name."
    return {name: load_saes(name) for name in complete_sets()}


@pytest.fixture(params=complete_sets())
def sae_set(request, sae_sets): return sae_sets[request.param]


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    data = [Path(os.environ["SAGE_NB_DATA"])] if "SAGE_NB_DATA" in os.environ else []
    folders = [d / "gpt2_tokenizer" for d in data] + sorted(ROOT.parent.glob("*/data/gpt2_tokenizer"))
    found = [f for f in folders if (f / "vocab.json").exists()]
    if not found: pytest.skip("no GPT-2 tokenizer: put its vocab.json and merges.txt in $SAGE_NB_DATA/gpt2_tokenizer")
    return GPT2TokenizerFast.from_pretrained(found[0])


@pytest.fixture(scope="session")
def hf_models():
    "Random transformers models, every weight perturbed so that no bias is 0 and no norm 1."
    torch.manual_seed(0)
    models = {}
    for family in FAMILIES:
        models[family] = build_model(f"tiny-{family}", build_tokenizer(2000)).eval().requires_grad_(False)
        for p in models[family].parameters(): p += 0.1 * torch.randn_like(p)
    return models


def _gpt2_cfg(c): return dict(
    n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, n_heads=c.n_head, d_head=c.n_embd // c.n_head,
    act_fn="gelu_new", eps=c.layer_norm_epsilon, normalization_type="LN")


def _neox_cfg(c):
    d_head = c.hidden_size // c.num_attention_heads
    return dict(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=c.max_position_embeddings,
        n_heads=c.num_attention_heads, d_head=d_head, d_mlp=c.intermediate_size, act_fn=c.hidden_act,
        eps=c.layer_norm_eps, normalization_type="LN", parallel_attn_mlp=True,
        positional_embedding_type="rotary", rotary_adjacent_pairs=False,
        rotary_dim=round(c.rope_parameters["partial_rotary_factor"] * d_head))


def _gemma_cfg(c): return dict(
    n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=c.max_position_embeddings, n_heads=c.num_attention_heads,
    n_key_value_heads=c.num_key_value_heads, d_head=c.head_dim, d_mlp=c.intermediate_size, act_fn=c.hidden_activation,
    eps=c.rms_norm_eps, normalization_type="RMS", final_rms=True, gated_mlp=True,
    use_normalization_before_and_after=True, positional_embedding_type="rotary",
    rotary_base=c.rope_parameters["rope_theta"], attn_scores_soft_cap=c.attn_logit_softcapping,
    output_logits_soft_cap=c.final_logit_softcapping,
    use_local_attn=True, window_size=c.sliding_window, attn_types=["local", "global"] * (c.num_hidden_layers // 2))


TWINS = {
    "gpt2": (_gpt2_cfg, convert_gpt2_weights),
    "pythia": (_neox_cfg, convert_neox_weights),
    "gemma": (_gemma_cfg, convert_gemma_weights),
}


def hooked_transformer(hf, tokenizer, family="gpt2"):
    "The same model as a HookedTransformer, by TransformerLens's own conversion of its weights."
    options, convert = TWINS[family]
    cfg = HookedTransformerConfig(d_vocab=hf.config.vocab_size, default_prepend_bos=True, **options(hf.config))
    model = HookedTransformer(cfg)
    missing, unexpected = model.load_state_dict(convert(hf, cfg), strict=False)
    made = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "b_U")  # by the model itself; b_U is zero
    assert not unexpected and all(name.rpartition(".")[2] in made for name in missing), (missing, unexpected)
    model.tokenizer = tokenizer
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def random_models(hf_models, tmp_path_factory):
    "Each family as a TransformerLens model, with the zoo's tokenizer."
    tokenizer, models = build_tokenizer(2000), {}
    for family, hf in hf_models.items():
        folder = tmp_path_factory.mktemp(family)
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        models[family] = load_model(folder)
        models[family].cfg.default_prepend_bos = True
    return models | {f"{family}-hooked": hooked_transformer(hf, tokenizer, family) for family, hf in hf_models.items()}


@pytest.fixture(params=RANDOM)
def random_model(request, random_models): return random_models[request.param]


@pytest.fixture
def random_task(random_model): return load_task("ioi", random_model, n=24)[:7]


@pytest.fixture(scope="session")
def aligned(task):
    "Prompts of one template and one order of names: each role has one token index."
    return task[(task.template == 0) & torch.tensor((task.attributes.Pos == "ABB").to_numpy())][:8]
