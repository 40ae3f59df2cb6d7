"""What the tests share: the embedded model with all that is found on it, small random models, and a hub."""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test may need the network

from pathlib import Path

import pytest
import torch
from browser import audit, browse, chromium, lab, notebook  # noqa: F401  one browser and one Lab for all tests
from fake_hub import FakeHub, connect, disconnect
from families import hooked_transformer
from huggingface_hub import constants
from hypothesis import settings
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
def sections(model, task): return find_cross_sections(model, task, max_prompts=64, verbose=False)


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
    return models | {f"{family}-hooked": hooked_transformer(hf, tokenizer) for family, hf in hf_models.items()}


@pytest.fixture(params=RANDOM)
def random_model(request, random_models): return random_models[request.param]


@pytest.fixture
def random_task(random_model): return load_task("ioi", random_model, n=24)[:7]


@pytest.fixture(scope="session")
def aligned(task):
    "Prompts of one template and one order of names: each role has one token index."
    return task[(task.template == 0) & torch.tensor((task.attributes.Pos == "ABB").to_numpy())][:8]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache of the hub, offline."
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def online(cache, monkeypatch):
    "A hub that can be reached, with nothing on it."
    yield connect(monkeypatch, FakeHub())
    disconnect()
