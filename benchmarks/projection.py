"""What projection costs: time and memory of `reconstruct` beside the model's own forward pass on the same tokens.

Models have two layers of the true width (GPT-2 small: 768; Gemma-2-2B: 2,304 with 8 query and 4 key/value heads of
256 and an MLP of 9,216) and random weights; all layers of such a model cost the same, so the ratio per layer is that
of the whole model, its vocabulary left out. SAEs are TopK with k = 64. A ratio is (time of the call - time of one
forward pass, which the call makes to see the activations) / time of one forward pass, with nodes in every layer:
calls alternate, each is divided by the forward pass of its own round, and the median over rounds is shown.
Memory is the largest resident size during a call above what stood before it (Linux with glibc).

python benchmarks/projection.py [--quick]
"""
import argparse
import ctypes
import os
import statistics
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from sage_nb.core.activations import HEAD_SITES, Node, Prompts
from sage_nb.core.attention import n_heads
from sage_nb.core.models import load_model
from sage_nb.lab.zoo import build_tokenizer
from sage_nb.saes.codes import BlockEncoder, SparseSAE
from sage_nb.saes.reconstruction import reconstruct
from sage_nb.saes.sets import SAESet

LAYERS, VOCAB = 2, 1000


def gpt2(width):
    heads = width // 64
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=width, n_layer=LAYERS, n_head=heads))


def gemma2(width):
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
        max_position_embeddings=64, attn_implementation="eager"))


def load(make, width):
    "The random model as TransformerLens sees it."
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make(width).save_pretrained(folder)
        build_tokenizer(VOCAB).save_pretrained(folder)
        return load_model(folder)


def topk_set(width, d_sae, k=64):
    "One SAE, standing before every layer and after the last."
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, width), dim=-1)
    W_enc = W_dec.T.contiguous()
    encoder = BlockEncoder(lambda x, part: (x @ W_enc[:, part]).relu(), d_sae, k)
    nodes = [Node("resid_pre", layer) for layer in range(LAYERS + 1)]
    return SAESet("topk", {node: SparseSAE(node, W_dec, torch.zeros(width), encoder) for node in nodes})


def node_sets(model):
    "What is projected to, in every layer."
    def at(site, heads): return [Node(site, layer, head, "END") for layer in range(LAYERS) for head in heads]
    heads = {site: range(n_heads(model, site)) for site in HEAD_SITES}
    return {"q k v at END": [node for site in "qkv" for node in at(site, heads[site])],
            "z at END": at("z", heads["z"]),
            "attn_out, mlp_out at END": at("attn_out", [None]) + at("mlp_out", [None])}


def status(key):
    with open("/proc/self/status") as f: return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024


def peak(call):
    "MB above what stood before; None where the system does not say."
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed goes back to the system
        with open("/proc/self/clear_refs", "w") as f: f.write("5")  # starts the high-water mark anew
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except OSError: return None


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def measure(name, make, width, d_sae, prompts, rounds):
    "Print one block of the table."
    model, saes = load(make, width), topk_set(width, d_sae)
    calls = {"forward pass": lambda: model(prompts.tokens)}
    for label, nodes in node_sets(model).items():
        calls[label] = lambda nodes=nodes: reconstruct(model, prompts, nodes, saes, batch_size=len(prompts))
    for call in calls.values(): call()
    memory = {label: peak(call) for label, call in calls.items()}
    times = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items(): times[label].append(seconds(call))
    n, length = prompts.tokens.shape
    print(f"\n{name}, width {width}, {d_sae:,} latents, {n} x {length} tokens, {rounds} rounds")
    print(f"{'':26}{'ms':>9}{'(call - forward) / forward':>30}{'peak MB':>10}")
    for label, measured in times.items():
        extra = statistics.median((call - forward) / forward for call, forward in zip(measured, times["forward pass"]))
        mb = "-" if memory[label] is None else f"{memory[label]:.0f}"
        print(f"{label:26}{1000 * statistics.median(measured):9.0f}{extra:30.2f}{mb:>10}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small widths, two rounds: only to see that it runs")
    quick = parser.parse_args().quick
    logging.disable_progress_bar()
    shape, rounds = ((4, 16), 2) if quick else ((16, 24), 7)
    tokens = torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(0))
    prompts = Prompts(tokens, {"END": torch.full((shape[0],), shape[1] - 1)})
    widths, sizes = ((128, 256), (512, 1024)) if quick else ((768, 2304), (2**14, 2**16))
    for (name, make), width in zip({"GPT-2 small": gpt2, "Gemma-2-2B": gemma2}.items(), widths):
        for d_sae in sizes: measure(name, make, width, d_sae, prompts, rounds)
