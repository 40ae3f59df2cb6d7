"""What it costs to find cross-sections in a model of GPT-2 small's size, against the bare passes that it is made of.

Random weights, 64 prompts of 20 tokens, counterfactuals that differ in two tokens, four named positions. Every row is
the median of runs that alternate with those of the other rows, in one process. A warm-up run of each row, not timed,
measures memory: the largest sum of what PyTorch's allocator holds at once above what it held before (on a CPU from the
profiler's record of every allocation and release). The time of exact patching includes one clean run, which more nodes
would share. The second clock counts the seconds of all processor cores: other processes disturb it less.
"""
import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler that counts memory
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.simplefilter("ignore", DeprecationWarning)  # HookedTransformer is, and is asked for

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from sage_nb.core.activations import SITES, Node, Prompts, capture, run_each
from sage_nb.core.models import load_model
from sage_nb.discovery.attribution import Contrast, all_nodes, first_order, sites_of
from sage_nb.lab.zoo import build_tokenizer

TOKENS = 20
POSITIONS = {"A": 4, "A+1": 5, "B": 12, "END": TOKENS - 1}
BARE, END, FORWARD = "bare passes", "bare passes, logits at END", "one forward pass"
CHANGED = [POSITIONS["A"], POSITIONS["B"]]  # apart, so that two things change


def build_models(layers: int, device: str) -> dict:
    "The same random GPT-2 small, as each of TransformerLens's two classes."
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()
    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=layers, d_model=c.n_embd, n_ctx=c.n_positions, n_heads=c.n_head, d_head=c.n_embd // c.n_head,
        d_vocab=c.vocab_size, act_fn="gelu_new", eps=c.layer_norm_epsilon, normalization_type="LN", device=device)
    hooked = HookedTransformer(cfg)
    hooked.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    hooked.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        build_tokenizer(100).save_pretrained(folder)
        return {"TransformerBridge": load_model(folder, device), "HookedTransformer": hooked}


def difference(logits, rows): return logits[:, 0] - logits[:, 1]


def build_contrast(n: int) -> Contrast:
    "Random prompts and counterfactuals."
    g = torch.Generator().manual_seed(0)
    tokens, other = (torch.randint(50257, (n, length), generator=g) for length in (TOKENS, len(CHANGED)))
    positions, cf = {role: torch.full((n,), at) for role, at in POSITIONS.items()}, tokens.clone()
    cf[:, CHANGED] = other
    return Contrast(Prompts(tokens, positions), Prompts(cf, positions), difference)


def bare_passes(model, contrast: Contrast, end_only: bool):
    "Two forward passes and one backward, from the metric to the embedding, of a model whose parameters are frozen."
    device, start = next(model.parameters()).device, []

    def begin(x, hook):
        start.append(x.detach().requires_grad_())
        return start[0]
    name = "unembed.hook_in" if "unembed.hook_in" in model.hook_dict else "ln_final.hook_normalized"
    last = [(name, lambda x, hook: x[:, -1:].contiguous())] if end_only else []
    with torch.no_grad(): model.run_with_hooks(contrast.cf.tokens.to(device), fwd_hooks=last)
    tokens = contrast.prompts.tokens.to(device)
    logits = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", begin), *last])
    return torch.autograd.grad(difference(logits[:, -1], None).sum(), start)


@torch.no_grad()
def forward(model, prompts): model(prompts.tokens.to(next(model.parameters()).device))


def clocks(device: str) -> list[str]: return ["wall clock", "all cores"] if device == "cpu" else ["wall clock"]


def timed(job, device: str) -> tuple[float, float]:
    "Seconds that pass, and seconds of all processor cores, which other processes on the machine disturb less."
    def now():
        if device != "cpu": torch.cuda.synchronize(device)
        return time.perf_counter(), time.process_time()
    wall, cores = now()
    job()
    wall_end, cores_end = now()
    return wall_end - wall, cores_end - cores


def peak(job, device: str) -> int:
    "The most bytes of tensors held at once while a job runs, above those held before."
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler: job()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return sizes.cumsum(0).max().item()


def sample_nodes(nodes: list[Node], n_layers: int, sample: int) -> list[Node]:
    "A few nodes, from the first layer to the last, each at another place of its layer."
    layers = torch.linspace(0, n_layers - 1, sample).round().int().tolist()
    of_layer = {layer: [node for node in nodes if node.layer == layer] for layer in layers}
    return [of_layer[layer][37 * i % len(of_layer[layer])] for i, layer in enumerate(layers)]


def time_all(jobs: dict, runs: int, once: dict, device: str) -> dict[str, list[tuple[float, float]]]:
    "The times of jobs that alternate, and of those that run once."
    times = {name: [] for name in [*jobs, *once]}
    for name, job in [*jobs.items()] * runs + [*once.items()]: times[name].append(timed(job, device))
    return times


def tabulate(times: dict, peaks: dict, device: str) -> pd.DataFrame:
    "Seconds by each clock, alone and against the bare passes, and memory."
    columns = {}
    for i, clock in enumerate(clocks(device)):
        seconds = pd.Series({name: statistics.median(t[i] for t in pairs) for name, pairs in times.items()})
        columns[clock, "seconds"] = seconds
        columns[clock, "of bare"] = seconds / seconds[BARE]
        columns[clock, "of bare, END"] = seconds / seconds[END]
    columns["", "runs"] = pd.Series({name: len(pairs) for name, pairs in times.items()})
    columns["", "peak MB"] = pd.Series(peaks) / 1e6
    return pd.DataFrame(columns, index=list(times))


def measure(model, contrast: Contrast, runs: int, sample: int, device: str) -> tuple[pd.DataFrame, dict]:
    "Seconds and bytes of each job, and what they say about patching all nodes."
    nodes = all_nodes(model, POSITIONS, [site for site in SITES if site in sites_of(model)])
    whole = list(dict.fromkeys(node._replace(head=None) for node in nodes))
    edits = capture(model, contrast.cf, sample_nodes(nodes, model.cfg.n_layers, sample))
    held = sum(x.nbytes for x in capture(model, contrast.prompts, whole).values())
    passes = {
        BARE: lambda: bare_passes(model, contrast, False),
        END: lambda: bare_passes(model, contrast, True),
        "AtP": lambda: first_order(model, contrast, nodes),
        "AtP + QK fix": lambda: first_order(model, contrast, nodes, qk_fix=True),
    }
    exact = f"exact patching of {sample} nodes"
    others = {
        FORWARD: lambda: forward(model, contrast.prompts),
        exact: lambda: run_each(model, contrast.prompts, contrast.metric, edits),
    }
    once = {"paths, 5 points": lambda: first_order(model, contrast, nodes, steps=5)}
    peaks = {name: peak(job, device) for name, job in passes.items()}
    table = tabulate(time_all(passes | others, runs, once, device), peaks, device)
    facts = {"nodes": len(nodes), "MB of activations at the asked positions": held / 1e6}
    for name in (BARE, END):
        facts[f"AtP's peak above that of the {name}, of those bytes"] = (peaks["AtP"] - peaks[name]) / held
    for clock in clocks(device):
        seconds = table[clock, "seconds"]
        per_node = seconds[exact] / sample
        facts[f"{clock}: exact patching of one node, of a forward pass"] = per_node / seconds[FORWARD]
        facts[f"{clock}: exact patching of all nodes, hours (extrapolated)"] = per_node * len(nodes) / 3600
        facts[f"{clock}: AtP is faster by"] = per_node * len(nodes) / seconds["AtP"]
    return table, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="4 layers, 16 prompts, one run of each: shows that it works, and no more")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, default=1,
                        help="more are slower, and by different amounts, where cores are wanted elsewhere")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layers, n, runs, sample = (4, 16, 1, 4) if args.quick else (12, 64, 3, 6)
    if args.device == "cpu": name = platform.processor() or platform.machine()
    else: name = torch.cuda.get_device_name(args.device)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformer_lens", "transformers"))
    machine = f"{name}, {torch.get_num_threads()} threads"
    print(f"{layers} layers, {n} prompts of {TOKENS} tokens; {machine}; {versions}", flush=True)
    disable_progress_bar()
    contrast = build_contrast(n)
    for kind, model in build_models(layers, args.device).items():
        table, facts = measure(model, contrast, runs, sample, args.device)
        print(f"\n{kind}\n{table.round(2).to_string(na_rep='')}")
        for key, value in facts.items(): print(f"{key}: {value:,.2f}".removesuffix(".00"), flush=True)


if __name__ == "__main__": main()
