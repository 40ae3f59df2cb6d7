"""What choosing latents costs: `choose_edits` beside the form that gives every latent a vector in every prompt.

Both make the same greedy choice with the same closed form of the gain. The dense form computes it for all latents,
taken out and put in, from one tensor prompts x 2 latents x d; ours only for the active ones. Random directions, 64
latents active in each of source and counterfactual, 32 moves. Calls alternate; times are medians over rounds, and the
ratio is the median of the ratios within a round. "largest" is the largest tensor that any operation forms, counted as
it runs.

python benchmarks/control.py [--quick]
"""
import argparse
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sage_nb.core.activations import Node
from sage_nb.measures.edits import choose_edits
from sage_nb.saes.reconstruction import Decomposition

ACTIVE, STEPS = 64, 32


class Largest(TorchDispatchMode):
    "Remembers the most numbers that a newly formed tensor has; views form nothing."
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        formed = func(*args, **(kwargs or {}))
        for x in formed if isinstance(formed, (tuple, list)) else [formed]:
            if not isinstance(x, torch.Tensor): continue
            self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return formed


def dense(x, target, codes, directions, steps):
    "The picks: latents, those that are put in behind those that are taken out."
    source, counterfactual = codes
    moves = torch.cat([-source[..., None] * directions, counterfactual[..., None] * directions], 1)
    size, missing, picks = moves.square().sum(-1), target - x, []
    used, rows = torch.zeros_like(size, dtype=torch.bool), torch.arange(len(x))
    for _ in range(steps):
        gain, best = (2 * (moves @ missing[..., None])[..., 0] - size).masked_fill(used, -torch.inf).max(1)
        picks.append(best.masked_fill(gain <= 0, -1))
        used[rows, best] = True
        missing = missing - moves[rows, best] * (gain > 0)[:, None]
    return torch.stack(picks, 1)


def parts(codes, directions):
    "The active latents of dense codes, as `decompose` gives them."
    values, indices = codes.topk(ACTIVE, 1)
    bias = torch.zeros(len(codes), directions.shape[1])
    return Decomposition(
        latents=values[..., None] * directions[indices], indices=indices, bias=bias, error=bias,
        origin=torch.zeros_like(indices), saes=(Node("q", 0, 0, "END"),), route="read")


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(prompts, latents, d, rounds):
    "Print one line of the table."
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(latents, d, generator=g) / d**0.5
    noise = torch.rand(2, prompts, latents, generator=g)
    codes = []
    for n in noise:
        values = torch.rand(prompts, ACTIVE, generator=g) + 0.1
        codes.append(torch.zeros_like(n).scatter(1, n.topk(ACTIVE).indices, values))
    x, target = (c @ directions for c in codes)
    # the parts are made inside, so that ours pays for looking the directions up as well
    calls = {
        "ours": lambda: choose_edits(x, target, *(parts(c, directions) for c in codes), STEPS),
        "dense": lambda: dense(x, target, codes, directions, STEPS)}
    largest = {}
    for name, call in calls.items():
        with Largest() as mode: found = call()
        largest[name] = mode.numbers * 4 / 2**20
        picks = found if name == "dense" else torch.where(found.latents < 0, -1, found.latents + latents * found.adds)
        if name == "ours": ours = picks
    same = (ours == picks[:, : ours.shape[1]]).float().mean().item()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items(): times[name].append(seconds(call))
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["dense"]))
    ms = {name: 1000 * statistics.median(t) for name, t in times.items()}
    sizes = f"{largest['ours']:14.1f}{largest['dense']:14.1f}"
    columns = f"{ms['ours']:10.1f}{ms['dense']:10.1f}{ratio:9.1f}"
    print(f"{prompts:7}{latents:9,}{d:5}{columns}{sizes}{same:12.1%}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few prompts, two rounds: only to see that it runs")
    quick = parser.parse_args().quick
    print(f"{'':21}{'ms':>10}{'ms':>10}{'':9}{'largest MB':>14}{'largest MB':>14}{'':12}\n"
          f"{'prompts':>7}{'latents':>9}{'d':>5}{'ours':>10}{'dense':>10}{'ratio':>9}"
          f"{'ours':>14}{'dense':>14}{'same picks':>12}")
    for latents in ((2048,) if quick else (2048, 16384)): measure(8 if quick else 64, latents, 64, 2 if quick else 7)
