"""GPT-2 small, Pythia-70M-deduped and Gemma-2-2B as the hub has them: true configurations, few layers, random weights.

Their SAEs stand in the file formats of their releases and under the names of sae_lens' own list. Each is an identity
in d directions, written as an SAE: a latent for each direction and its opposite, the rest dead. So what comes out must
be what went in, and any mistake on the way from the file shows.
"""
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM)

from sage_nb.lab.zoo import build_tokenizer

from fake_hub import add_to_cache

GPT2, PYTHIA, GEMMA = "gpt2", "EleutherAI/pythia-70m-deduped", "google/gemma-2-2b"
WIDTH = {GPT2: 768, PYTHIA: 512, GEMMA: 2304}


def gpt2(layers: int, vocabulary: int | None):
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary or 50257, n_positions=1024, n_embd=768, n_layer=layers, n_head=12,
        activation_function="gelu_new", layer_norm_epsilon=1e-5, initializer_range=0.02, bos_token_id=50256,
        eos_token_id=50256, pad_token_id=None))


def pythia(layers: int, vocabulary: int | None):
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=vocabulary or 50304, hidden_size=512, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=2048, hidden_act="gelu", rotary_pct=0.25, rotary_emb_base=10000, max_position_embeddings=2048,
        initializer_range=0.02, layer_norm_eps=1e-5, use_parallel_residual=True, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0))


def gemma(layers: int, vocabulary: int | None):
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=vocabulary or 256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=8192, initializer_range=0.02, rms_norm_eps=1e-6, rope_theta=10000.0,
        query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        bos_token_id=2, eos_token_id=1, pad_token_id=0, attn_implementation="eager"))


STRENGTH = 5.0
MODELS = {GPT2: gpt2, PYTHIA: pythia, GEMMA: gemma}


def plant(model, name: str):
    """Let the last layer look at all tokens alike, and what it sees count against a word: who is named twice is out.

    Queries and keys are 0, values and outputs the identity up to a sign, and the unembedding is the embedding. So the
    model solves `ioi`, and where it keeps IO and S is known: in the values of their tokens, and in z at the end.
    """
    layer = [module for path, module in model.named_modules() if re.search(r"(h|layers)\.\d+$", path)][-1]
    if name == GPT2:
        layer.attn.c_attn.weight[:, :1536], layer.attn.c_attn.bias[:1536] = 0, 0
        layer.attn.c_attn.weight[:, 1536:] = torch.eye(768)
        layer.attn.c_proj.weight.copy_(-STRENGTH * torch.eye(768))
    if name == PYTHIA:
        W, b = layer.attention.query_key_value.weight.view(8, 3, 64, 512), layer.attention.query_key_value.bias
        W[:, :2], b.view(8, 3, 64)[:, :2] = 0, 0
        W[:, 2] = torch.eye(512).view(8, 64, 512)
        layer.attention.dense.weight.copy_(-STRENGTH * torch.eye(512))
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    if name == GEMMA:
        attention = layer.self_attn
        for weights in (attention.q_proj.weight, attention.k_proj.weight): weights.zero_()
        attention.v_proj.weight.copy_(torch.eye(1024, 2304))
        groups = torch.eye(1024).view(4, 1, 256, 1024).expand(4, 2, 256, 1024)  # two queries share keys and values
        written = torch.nn.functional.pad(groups.reshape(2048, 1024).T, (0, 0, 0, 1280))
        attention.o_proj.weight.copy_(-STRENGTH * written)


def add_model(cache: Path, name: str, layers: int = 2, vocabulary: int | None = None, dtype=torch.float32) -> Path:
    "Put such a model into a cache, with a tokenizer of the zoo's words; the folder of its snapshot."
    torch.manual_seed(0)
    with torch.device("meta"): shell = MODELS[name](layers, vocabulary)
    model = shell.to_empty(device="cpu").to(dtype)
    model.init_weights()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 1: weights += 0.1 * torch.randn_like(weights)  # no bias is 0, no norm as it begins
        embedding = model.get_input_embeddings().weight
        embedding.mul_(20 if name != GEMMA else 5)  # words outweigh the rest; Gemma itself takes them times 48
        if name != GEMMA: embedding.add_(0.4)  # so that streams have a mean over d_model
        plant(model, name)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        model.save_pretrained(folder, max_shard_size="500MB")
        build_tokenizer(2000).save_pretrained(folder)
        return add_to_cache(cache, name, Path(folder))


def identity_in(directions: Tensor, d_sae: int) -> dict[str, Tensor]:
    "An SAE that gives back what lies in some orthonormal directions: ± each of them, and dead latents."
    d, d_in = directions.shape
    W_dec = torch.zeros(d_sae, d_in)
    W_dec[:d], W_dec[d : 2 * d] = directions, -directions
    b_enc = torch.zeros(d_sae)
    b_enc[2 * d :] = -1e4
    return {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": torch.zeros(d_in)}


def directions(width: int, centred: bool = False) -> Tensor:
    "An orthonormal basis, in some order; of what has mean 0 over its entries, if centred."
    g = torch.Generator().manual_seed(0)
    ones, first = torch.full((width,), width**-0.5), torch.eye(width)[0]
    u = torch.nn.functional.normalize(first - ones if centred else torch.randn(width, generator=g), dim=0)
    reflected = torch.eye(width) - 2 * torch.outer(u, u)  # takes the first axis to that of all ones, if centred
    rows = reflected[1:] if centred else reflected
    return rows[torch.randperm(len(rows), generator=g)]


def sae_lens_files(weights: dict[str, Tensor], hook: str, model: str, folder: Path) -> list[Path]:
    "A file of weights and one of settings as sae_lens wrote them before its version 6, as these releases are."
    d_in, d_sae = weights["W_enc"].shape
    settings = {
        "architecture": "standard", "d_in": d_in, "d_sae": d_sae, "dtype": "torch.float32", "device": "cpu",
        "model_name": model, "hook_name": hook, "hook_layer": int(hook.split(".")[1]), "hook_head_index": None,
        "activation_fn_str": "relu", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "prepend_bos": True, "context_size": 128, "dataset_path": "Skylion007/openwebtext",
        "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file(weights, folder / "sae_weights.safetensors")
    return [folder / "cfg.json", folder / "sae_weights.safetensors"]


def gemma_scope_files(weights: dict[str, Tensor], hook: str, model: str, folder: Path) -> list[Path]:
    "An archive of numpy arrays and nothing else; what it is stands in its path."
    threshold = torch.full_like(weights["b_enc"], 1e-3)
    np.savez(folder / "params.npz", **{name: w.numpy() for name, w in (weights | {"threshold": threshold}).items()})
    return [folder / "params.npz"]


def dictionary_learning_files(weights: dict[str, Tensor], hook: str, model: str, folder: Path) -> list[Path]:
    "A torch file of an AutoEncoder's state, and the settings of its trainer."
    d_in, d_sae = weights["W_enc"].shape
    state = {"encoder.weight": weights["W_enc"].T.contiguous(), "decoder.weight": weights["W_dec"].T.contiguous(),
             "encoder.bias": weights["b_enc"], "bias": weights["b_dec"]}
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "activation_dim": d_in, "dict_size": d_sae, "lm_name": model,
               "layer": int(hook.split(".")[1])}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return [folder / "ae.pt", folder / "config.json"]


FORMATS = {None: sae_lens_files, "gemma_2": gemma_scope_files, "dictionary_learning_1": dictionary_learning_files}


def add_release(cache: Path, release: str, label: str, hook: str, weights: dict[str, Tensor]) -> None:
    "Put one SAE of a release into a cache, in the format and at the path that sae_lens' list says."
    entry = get_pretrained_saes_directory()[release]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        files = FORMATS[entry.conversion_func](weights, hook, entry.model, Path(folder))
        named = {f"{entry.saes_map[label]}/{path.name}": path for path in files}
        add_to_cache(cache, entry.repo_id, named)
