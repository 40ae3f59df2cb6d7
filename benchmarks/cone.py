"""What an edit costs that is run from where it is made, against a whole pass, in a model of GPT-2 small's size.

Random weights, 16 prompts of 18 tokens, names at tokens 2 and 4, one head edited. A whole pass computes all tokens in
all layers, and the logits of the vocabulary at END. Every row is the median of runs that alternate with those of the
others, in one process, in seconds of the processor, as a share of the whole pass; beside it stands the share that
counts as computed, and the largest difference from what the whole pass says, as a share of its largest metric.

python benchmarks/cone.py [--quick]
"""
import argparse
import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore", DeprecationWarning)  # HookedTransformer is, and is asked for

import pandas as pd
import torch
from discovery import build_models

from sage_nb.core.activations import Node, Prompts, capture, clean_run, count_passes, run
from sage_nb.core.cone import LogitDifference

PROMPTS, TOKENS = 16, 18
POSITIONS = {"first": 2, "second": 4, "END": TOKENS - 1}


def cases(layers: int) -> dict[str, Node]:
    "The edits, by name."
    low, middle, last = 0, 2 * layers // 3, layers - 1
    return {f"{site}@{position}, layer {layer}": Node(site, layer, 0, position)
            for site, position in (("z", "END"), ("v", "first"), ("v", "second")) for layer in (low, middle, last)}


def seconds(f) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def measure(model, repeats: int) -> pd.DataFrame:
    "One row per edit and metric."
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.cfg.d_vocab, (PROMPTS, TOKENS), generator=g)
    prompts = Prompts(tokens, {role: torch.full((PROMPTS,), at) for role, at in POSITIONS.items()})
    two, clean, asks, rows = LogitDifference(tokens[:, 0], tokens[:, 1]), clean_run(model, prompts), {}, {}

    def every(logits, rows): return two(logits, rows)  # by all logits
    for name, node in cases(model.cfg.n_layers).items():
        edits = {node: torch.randn(PROMPTS, model.cfg.d_head, generator=g)}
        whole = run(model, prompts, every, edits)
        for said, metric in (("all logits", every), ("two logits", two)):
            asks[name, said] = lambda metric=metric, edits=edits: run(model, prompts, metric, edits, start=clean)
            with count_passes(model, PROMPTS) as passes: off = (asks[name, said]() - whole).abs().max()
            rows[name, said] = {"computed": passes.forward, "off": (off / whole.abs().max()).item()}
    times = {key: [] for key in ("whole", *asks)}
    for _ in range(repeats):
        times["whole"].append(seconds(lambda: run(model, prompts, every)))
        for key, ask in asks.items(): times[key].append(seconds(ask))
    unit = statistics.median(times["whole"])
    for key in asks: rows[key] = {"of a whole pass": statistics.median(times[key]) / unit} | rows[key]
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["edit", "metric by"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layers, two repeats")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for kind, model in build_models(3 if args.quick else 12, "cpu").items():
        table = measure(model, 2 if args.quick else 7)
        table = table.round({"of a whole pass": 3, "computed": 3})
        print(f"{kind}, {model.cfg.n_layers} layers\n{table.to_string()}\n")
