"""Memory of one process that makes many cells: it must not grow with their number.

Quick cells of a tiny model (one site, one test, 48 prompts): of one SAE set with many seeds, each a frame of its own,
and then of many SAE sets in one frame. `python benchmarks/memory_of_sweeps.py 200` makes so many of each."""
import gc
import shutil
import sys
import tempfile
from pathlib import Path

import psutil
from safetensors.torch import load_file, save_file

from sage_nb.core.models import EMBEDDED
from sage_nb.lab.sweeps import SweepOptions, sweep

QUICK = SweepOptions(sites=("v",), attributes=("IO",), tests=(1,), twins=False)
SET = "tiny-gpt2-res-topk"


def mib() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def another_set(folder: Path, i: int) -> Path:
    "The embedded SAEs, each encoder turned down a little."
    place = shutil.copytree(EMBEDDED / "saes" / SET, folder / f"set-{i}", dirs_exist_ok=True)
    for path in place.rglob("sae_weights.safetensors"):
        tensors = load_file(path)
        save_file(tensors | {"W_enc": tensors["W_enc"] * (1 - i / 10_000)}, path)
    return place


def many_seeds(out: Path, some: range) -> None:
    for i in some: sweep("tiny-gpt2", "ioi", SET, out, seeds=[i], n=48, options=QUICK, progress=False)


def many_sets(out: Path, some: range) -> None:
    for i in some:
        place = another_set(out / "sets", i)
        sweep("tiny-gpt2", "ioi", str(place), out, n=48, options=QUICK, progress=False)
        shutil.rmtree(place)


def grown(make, most: int) -> None:
    "MiB after 10 cells, and after more."
    with tempfile.TemporaryDirectory() as out:
        make(Path(out), range(10))
        first = mib()
        print(f"{make.__name__:10} after 10 cells {first:.0f} MiB", flush=True)
        for start in range(10, most, 50):
            make(Path(out), range(start, min(start + 50, most)))
            now = mib()
            cells = min(start + 50, most)
            each = 1024 * (now - first) / (cells - 10)
            print(f"{'':10} after {cells} cells {now:.0f} MiB: {each:+.0f} KiB a cell", flush=True)


if __name__ == "__main__":
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    for make in (many_seeds, many_sets): grown(make, most)
