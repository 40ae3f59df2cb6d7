"""Wrong calls of the zoo are refused, by name, value and remedy."""
import random
from types import SimpleNamespace

import pytest
import torch

import sage_nb.lab.zoo as zoo
from sage_nb.lab.zoo import (
    ZooModel, ZooSAEs, batches, build_model, build_tokenizer, make_saes, make_zoo, model_figures,
    sae_figures, task_sentence, train_model, train_sae, training_activations, within_cosine, write_cards)
from sage_nb.saes.sets import load_saes


@pytest.fixture(scope="session")
def fixtures(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "a file").write_text("")
    place = folder / "part" / "saes" / "tiny-gpt2-z-topk" / "blocks.0.attn.hook_z"
    for path in (folder / "mine" / "saes" / "my-saes", place): path.mkdir(parents=True)
    (place / "cfg.json").write_text("{}")
    return SimpleNamespace(model=model, x=torch.randn(2048, 16), folder=folder, saes=load_saes("tiny-gpt2-res-topk"))


def train(f, kind="topk", x=None, metadata=None, samples=4096, frozen=None):
    "A call of `train_sae` with one thing wrong."
    metadata = {"hook_name": "blocks.0.hook_resid_pre"} if metadata is None else metadata
    return train_sae(f.x if x is None else x, kind, metadata, samples, frozen)


def with_hole(x):
    x = x.clone()
    x[3] = torch.nan
    return x


def make_elsewhere(f):
    "A plan of one's own with a place that the zoo does not know."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.ZOO, "tiny-gpt2", ZooModel(4000, (ZooSAEs("q", "topk", 4096, ()),)))
        make_saes("tiny-gpt2-q-topk", f.folder, f.model)


ROWS = [  # (what, call, error, part of its text)
    ("a task that is not there", lambda f: task_sentence("iol", random.Random(0)), ValueError,
     "task 'iol' is not built in (has ioi"),
    ("a pool that is not there", lambda f: task_sentence("ioi", random.Random(0), "see"), ValueError,
     "pool='see' is not one of all, seen, unseen"),
    ("a vocabulary of nothing", lambda f: build_tokenizer(-1),
     ValueError, "n=-1 is not a positive whole number of sent"),
    ("empty batches", lambda f: next(batches(f.model.tokenizer, 0, 0)), ValueError, "batch_size=0 is not a positive"),
    ("a model that is not there", lambda f: build_model("tiny-llama", f.model.tokenizer), ValueError,
     "model 'tiny-llama' is not in the zoo (has tiny-gpt2"),
    ("training one that is not there", lambda f: train_model("tiny-llama", f.folder), ValueError, "has tiny-gpt2"),
    ("no steps", lambda f: train_model("tiny-gpt2", f.folder, steps=0), ValueError, "steps=0 is not a positive whole"),
    ("a zoo that is not there", lambda f: make_zoo("tiny-llama", f.folder), ValueError, "model 'tiny-llama'"),
    ("a zoo of no steps", lambda f: make_zoo("tiny-gpt2", f.folder, steps=0), ValueError, "steps=0"),
    ("no hooks", lambda f: training_activations(f.model, []), ValueError, "hooks=[] is not a list of hook names: give"),
    ("one hook as a string", lambda f: training_activations(f.model, "blocks.0.hook_resid_pre", 256), ValueError,
     "hooks='blocks.0.hook_resid_pre' is not a list"),
    ("a hook that is not there", lambda f: training_activations(f.model, ["blocks.9.hook_resid_pre"], 256), ValueError,
     "blocks.9.hook_resid_pre"),
    ("part of a batch of documents", lambda f: training_activations(f.model, ["blocks.0.hook_resid_pre"], 300),
     ValueError, "n=300 is not a positive multiple of 256 of documents"),
    ("no documents", lambda f: training_activations(f.model, ["blocks.0.hook_resid_pre"], 0), ValueError, "n=0"),
    ("a kind that is not there", lambda f: train(f, "top-k"),
     ValueError, "SAE kind 'top-k' is not in the zoo (has topk"),
    ("something else frozen", lambda f: train(f, frozen="W_dec"), ValueError,
     "frozen='W_dec' is not a kind of twin (has decoder, soft-decoder, encoder; None"),
    ("the former flag", lambda f: train(f, frozen=True), ValueError, "frozen=True is not a kind of twin"),
    ("a frozen encoder without a threshold", lambda f: train(f, "standard", frozen="encoder"), ValueError,
     "use one of topk, batchtopk, jumprelu"),
    ("no samples", lambda f: train(f, samples=0), ValueError, "samples=0 is not a whole number of at least 1024"),
    ("fewer samples than a batch", lambda f: train(f, samples=1000), ValueError, "samples=1000"),
    ("samples below nothing", lambda f: train(f, samples=-4096), ValueError, "samples=-4096"),
    ("a fraction of samples", lambda f: train(f, samples=4e3), ValueError, "samples=4000.0 is not a whole number"),
    ("activations by document", lambda f: train(f, x=f.x.reshape(2, 1024, 16)),
     ValueError, "shape (2, 1024, 16): give"),
    ("few activations", lambda f: train(f, x=f.x[:100]), ValueError, "shape (100, 16)"),
    ("activations with a hole", lambda f: train(f, x=with_hole(f.x)),
     ValueError, "1 of 2048 activations are not finite"),
    ("no place", lambda f: train(f, metadata={}), ValueError, "metadata {} has no hook_name: say where"),
    ("directions and starts of two shapes", lambda f: within_cosine(f.x, f.x[:5]), ValueError, "(2048, 16), those at"),
    ("a cosine above 1", lambda f: within_cosine(f.x, f.x, 1.5), ValueError, "least=1.5 is not a cosine in 0 … 1"),
    ("figures of a set", lambda f: sae_figures(f.model, f.saes), TypeError, "SAESet is not one SAE: take one of a set"),
    ("figures from no prompts", lambda f: model_figures(f.model, 0),
     ValueError, "n=0 is not a whole number of at least 2"),
    ("a set that is not there", lambda f: make_saes("tiny-gpt2-res-topk-random", f.folder), ValueError,
     "tiny-gpt2-res-topk-frozen-decoder"),
    ("a twin that cannot be", lambda f: make_saes("tiny-gpt2-res-standard-frozen-encoder", f.folder), ValueError,
     "SAE set 'tiny-gpt2-res-standard-frozen-encoder' is not in the zoo"),
    ("sets into a file", lambda f: make_saes("tiny-gpt2-z-topk", f.folder / "a file"), ValueError, "is a file: give"),
    ("a place that is not there", make_elsewhere, ValueError, "place 'q' is none that SAEs of the zoo stand at (has z"),
    ("cards of nothing", lambda f: write_cards(f.folder / "nowhere"),
     ValueError, "nowhere' holds no SAE sets: give one"),
    ("cards of sets of one's own", lambda f: write_cards(f.folder / "mine"), ValueError, "SAE set 'my-saes' is not in"),
    ("cards of half a set", lambda f: write_cards(f.folder / "part"), ValueError,
     "lacks blocks.1.attn.hook_z, blocks.2.attn.hook_z, blocks.3.attn.hook_z: make them with make_saes"),
]


@pytest.mark.parametrize("what,call,error,text", ROWS, ids=[row[0] for row in ROWS])
def test_wrong_calls_are_refused(what, call, error, text, fixtures):
    with pytest.raises(error) as caught: call(fixtures)
    assert text in str(caught.value)
