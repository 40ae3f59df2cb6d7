"""Models and SAEs of the hub: real names, real shapes and real file formats from a cache that a test wrote; what is said where something is missing."""
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import sage_nb
from conftest import hooked_transformer
from fake_hub import COMMIT, HTTP, FakeHub, add_to_cache, connect, contents, disconnect, no_network, refusal, repo_folder
from real_shapes import GEMMA, GPT2, PYTHIA, WIDTH, add_model, add_release, directions, identity_in
from sage_nb.core import hub
from sage_nb.core.activations import Node, capture
from sage_nb.core.models import EMBEDDED, ModelSettings, load_model
from sage_nb.lab.cli import main
from sage_nb.saes.adapters import from_sae_lens, random_sae_lens
from sage_nb.saes.fidelity import check_saes, sae_inputs, variance_explained_by
from sage_nb.saes.sets import SAESet, load_saes
from sage_nb.tasks.task import load_task

RES_JB, GEMMA_SCOPE, LM_SAE = "gpt2-small-res-jb", "gemma-scope-2b-pt-res-canonical", "sae_bench_pythia70m_sweep_standard_ctx128_0712"
TINY = contents(EMBEDDED / "tiny-gpt2")


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


def refused(function, *parts):
    "The one-line error of a function; it must hold all these parts."
    with pytest.raises(ValueError) as caught: function()
    said = str(caught.value)
    for part in parts: assert part in said, said
    return said


# Three real models in a cache, in the hub's own layout

@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    "GPT-2 small and Pythia-70M-deduped at true width, with few words, and SAEs of three releases in their formats."
    folder = tmp_path_factory.mktemp("real") / "hub"
    folder.mkdir()
    for name in (GPT2, PYTHIA): add_model(folder, name, vocabulary=2000)
    for layer in (0, 1):
        hook = f"blocks.{layer}.hook_resid_pre"
        add_release(folder, RES_JB, hook, hook, identity_in(directions(768, centred=True), 2048))
    hook = "blocks.0.hook_resid_post"
    add_release(folder, "pythia-70m-deduped-res-sm", hook, hook, identity_in(directions(512), 1024))
    hook = "blocks.3.hook_resid_post"
    add_release(folder, LM_SAE, f"{hook}__trainer_8", hook, identity_in(directions(512), 1024))
    return folder


@pytest.fixture
def real(real_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(real_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return real_cache


@pytest.mark.parametrize("names", [("gpt2", "gpt2-small"), (PYTHIA, "pythia-70m-deduped")])
def test_a_model_is_loaded_by_each_of_its_names_and_says_what_transformers_says(real, names):
    official, short = (load_model(name) for name in names)
    assert official.cfg.model_name == short.cfg.model_name == names[0]
    tokens = torch.arange(3, 19)[None]
    theirs = AutoModelForCausalLM.from_pretrained(names[0])(tokens).logits
    for model in (official, short): assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-4)


def test_a_release_says_what_it_was_made_on(real):
    saes = load_saes(RES_JB, ids="blocks.[01].*")
    assert saes.model_settings == ModelSettings("gpt2-small", prepend_bos=True, also=("center_writing_weights",))
    assert repr(saes).endswith("made on gpt2-small, with <bos>, center_writing_weights")
    assert all(sae.normalise == "centred" for sae in saes)
    assert load_saes("pythia-70m-deduped-res-sm", ids="blocks.0.hook_resid_post").model_settings.also == ()


def test_pythia_is_run_with_bos_as_its_saes_were_and_as_transformer_lens_does_not(real):
    saes = load_saes("pythia-70m-deduped-res-sm", ids="blocks.0.hook_resid_post")
    assert not load_model(PYTHIA).cfg.default_prepend_bos
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(PYTHIA, like=saes).cfg.default_prepend_bos
        assert load_model(like=saes).cfg.model_name == PYTHIA
