"""What a sweep adds to the work itself, what it saves, what workers bring, and whether a kill can hurt it.

On the embedded tiny-gpt2 and indirect object identification, with sets that differ from tiny-gpt2-res-topk by noise,
and one thread a process.

overhead: a sweep of --cells sets on one task. The share of its seconds that are neither in `evaluate` nor in discovery
  and ground truth, which any way of scoring needs; also without `cell_of`, which finds the intervals of margin and
  parts that a sweep asks `evaluate` to leave out; and without the checks of what fits. Bar: at most 5 %.
shared: the same sweep against as many separate calls of `evaluate`, with the same options and a model that is loaded;
  with discovery and ground truth for each, as `score` finds them, and with those given; and against calls as users
  make them, with all that `evaluate` makes by default (diagnostics, table, explorers). Bar: at most 0.35.
workers: --seeds frames of --cells sets each, on one worker and on two. The clock of the one divided by that of the
  other, without what starting workers takes (the imports), which stands beside it. Bar: at least 1.7.
kills: a sweep whose process group is killed (SIGKILL) --kills times, each time at a random moment, and resumed; when
  all its cells are there it begins anew in another folder. In the end all cells of all folders must have the numbers,
  and the hashes of evidence, of a sweep that nothing disturbed, and nothing else may be left in a folder.

python benchmarks/sweeps.py [--only overhead|shared|workers|kills] [--cells N] [--rounds R] [--kills K --seed S]
"""
import argparse
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import torch
from joblib import Parallel, delayed, parallel_config
from safetensors.torch import load_file, save_file

from sage_nb.core.models import EMBEDDED, load_model
from sage_nb.lab import sweeps
from sage_nb.lab.cells import cells_in
from sage_nb.lab.sweeps import SweepOptions, find_ground, sweep, sweep_items
from sage_nb.report.evaluation import evaluate
from sage_nb.saes.sets import load_sets
from sage_nb.tasks.task import load_task

MODEL, TASK = "tiny-gpt2", "ioi"
FEW = SweepOptions(sites=("v",), attributes=("IO",), tests=(1, 3))  # of the sweeps that are killed
PROGRAM = f"""
import sys
from sage_nb.lab.sweeps import SweepOptions, sweep
print("ready", flush=True)
options = SweepOptions(sites={FEW.sites}, attributes={FEW.attributes}, tests={FEW.tests})
sweep("{MODEL}", "{TASK}", sys.argv[3:], sys.argv[1], n=64, options=options, jobs=int(sys.argv[2]), progress=False)
"""


def make_sets(folder: Path, n: int) -> list[str]:
    "Folders with the embedded SAEs and some noise each, so that nothing made for one serves another."
    for i in range(n):
        noise, place = torch.Generator().manual_seed(i), folder / f"set-{i:03}"
        shutil.copytree(EMBEDDED / "saes" / "tiny-gpt2-res-topk", place)
        for file in place.rglob("sae_weights.safetensors"):
            tensors = load_file(file)
            tensors["b_enc"] = tensors["b_enc"] + 1e-3 * torch.randn(tensors["b_enc"].shape, generator=noise)
            save_file(tensors, file)
    return [str(path) for path in sorted(folder.glob("set-*"))]


# Time

def seconds_of(function, *args, **kwargs) -> tuple[float, float]:
    "Clock and processor seconds of a call."
    clock, processor = time.perf_counter(), time.process_time()
    function(*args, **kwargs)
    return time.perf_counter() - clock, time.process_time() - processor


class Clock(dict):
    "Processor seconds by part; what one part takes inside another is not counted twice."

    def __init__(self):
        super().__init__()
        self.open, self.since = ["the rest"], time.process_time()

    def _switch(self):
        now = time.process_time()
        self[self.open[-1]] = self.get(self.open[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def watching(self, *names):
        "Within it, functions of the room of sweeps are parts."
        with patch.multiple(sweeps, **{name: self._timed(name) for name in names}):
            yield
            self._switch()

    def _timed(self, name):
        inner = getattr(sweeps, name)

        def timed(*args, **kwargs):
            self._switch()
            self.open.append(name)
            try: return inner(*args, **kwargs)
            finally:
                self._switch()
                self.open.pop()
        return timed


def fresh(sets, n, **others):
    "A sweep into a folder of its own."
    sweeps._leave()
    with tempfile.TemporaryDirectory() as out: sweep(MODEL, TASK, sets, out, n=n, progress=False, **others)


WORK = "evaluate", "find_ground"
PARTS = "load_model", "load_task", "load_sets", "key_of", "_check_one", "cell_of", "write_cell", "is_done", "read_cell"


def overhead(sets, args):
    "How much of a sweep is not the work itself."
    fresh(sets[:1], args.n)  # what happens once in a process: imports
    nothing = patch.object(sweeps, "_check_one", lambda *others: None)
    for label, changed in (("as it is", None), ("without checks", nothing)):
        shares = []
        for _ in range(args.rounds):
            with changed or patch.dict({}):
                sweeps._named_model.cache_clear()
                clock = Clock()
                with clock.watching(*WORK, *PARTS): fresh(sets, args.n)
            whole, work = sum(clock.values()), sum(clock[name] for name in WORK)
            shares.append([(whole - work) / whole, (whole - work - clock["cell_of"]) / whole])
        share, without = (statistics.median(column) for column in zip(*shares))
        print(f"overhead, {label}: {share:.1%} of {whole:.1f} s for {len(sets)} cells (bar 5 %), {without:.1%} without "
              f"the intervals of cell_of; {(whole - work) / len(sets):.3f} s a cell, beside "
              f"{clock['evaluate'] / len(sets):.3f} s in evaluate and {clock['find_ground']:.2f} s once for discovery "
              "and ground truth")
        print("  " + ", ".join(f"{name} {clock.get(name, 0):.3f}" for name in (*PARTS, "the rest")) + " s")


# What is shared

QUICK = dict(diagnostics=False, explorers=False, table=False, progress=False)  # as a sweep asks


def separately(sets, model, task, ground, options=QUICK):
    "Each set by calls of its own; discovery and ground truth, too, where none are given."
    for source in sets:
        mine = ground or find_ground(model, task)
        evaluate(model, task, *mine, load_sets(source), **SweepOptions().of_evaluation, **options)


def shared(sets, args):
    "A sweep against separate calls."
    model = load_model(MODEL)
    task = load_task(TASK, model, n=args.n)
    ground = find_ground(model, task)
    fresh(sets[:1], args.n)
    rows = []
    for _ in range(args.rounds):
        rows.append([seconds_of(fresh, sets, args.n), seconds_of(separately, sets, model, task, None),
                     seconds_of(separately, sets, model, task, ground),
                     seconds_of(separately, sets, model, task, ground, {"progress": False})])
    for label, which in (("with discovery and ground truth for each", 1), ("with these given", 2),
                         ("with these given and all that is made by default", 3)):
        clock, processor = (statistics.median(row[0][i] / row[which][i] for row in rows) for i in (0, 1))
        took = [statistics.median(row[i][1] for row in rows) for i in (0, which)]
        print(f"shared: a sweep of {len(sets)} cells takes {processor:.2f} of separate calls {label} "
              f"({took[0]:.1f} of {took[1]:.1f} processor seconds; by the clock {clock:.2f}; bar 0.35)")


# Workers

def imported() -> int:
    "What a worker does before its first cell."
    import sae_lens  # noqa: F401  that it takes seconds is why it is here
    load_model(MODEL)
    return os.getpid()


def processor_seconds() -> float:
    "Of this process and its workers, those that are gone included."
    gone = resource.getrusage(resource.RUSAGE_CHILDREN)
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in mine]
    return gone.ru_utime + gone.ru_stime + sum(each.user + each.system for each in times)


def started(jobs: int) -> float:
    "Seconds until that many workers are ready."
    start, found = time.perf_counter(), set()
    with parallel_config(backend="loky", n_jobs=jobs):
        while len(found) < jobs: found |= set(Parallel()(delayed(imported)() for _ in range(jobs)))
    return time.perf_counter() - start


def workers(sets, args):
    "One worker against two."
    rows, starts, seeds = [], [], list(range(args.seeds))
    imported()
    for _ in range(args.rounds):
        row = []
        for jobs in (1, 2):
            if jobs == 2: starts.append(started(jobs))  # workers end with a sweep
            before = processor_seconds()
            clock, _ = seconds_of(fresh, sets, args.n, seeds=seeds, jobs=jobs)
            row += [clock, processor_seconds() - before]
        rows.append(row)
    one, cpu_one, two, cpu_two = (statistics.median(column) for column in zip(*rows))
    prepared, _ = seconds_of(sweep_items, MODEL, TASK, sets, seeds, args.n)
    gain = statistics.median(row[0] / row[2] for row in rows)
    print(f"workers: {len(sets) * len(seeds)} cells of {len(seeds)} frames take {one:.1f} s on one worker and "
          f"{two:.1f} s on two, {gain:.2f} times as fast (bar 1.7); processor seconds {cpu_one:.1f} and {cpu_two:.1f}; "
          f"not counted: {statistics.median(starts):.1f} s until two workers have imported everything; counted: "
          f"{prepared:.1f} s to list and check the cells")


# Kills

def numbers(out) -> dict:
    "All that must not depend on how a sweep went; evidence by the hash of its bytes."
    return {c.key.name: (c.status, c.methods, c.margin, c.sections, c.evidence) for c in cells_in(out).cells}


def files_in(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def begin(out: Path, jobs: int, sets) -> subprocess.Popen:
    "A sweep in a process group of its own, ready to begin."
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, str(out), str(jobs), *sets], stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, start_new_session=True)
    run.stdout.readline()
    return run


def killed(out: Path, jobs: int, sets, after: float) -> bool:
    "Begin a sweep and kill it with all its workers after some seconds, if it is not over."
    run = begin(out, jobs, sets)
    try: run.wait(after)
    except subprocess.TimeoutExpired: os.killpg(run.pid, signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


def kills(sets, args):
    "Kill and resume, over and over."
    rng, root, counts = random.Random(args.seed), Path(tempfile.mkdtemp()), Counter()
    try:
        start = time.perf_counter()
        if begin(root / "undisturbed", args.jobs, sets).wait(): raise RuntimeError("the undisturbed sweep failed")
        whole, expected = time.perf_counter() - start, numbers(root / "undisturbed")
        folders = [root / "0"]
        while counts["kills"] < args.kills:
            out = folders[-1]
            there = len(numbers(out)) if out.is_dir() else 0
            hit = killed(out, args.jobs, sets, rng.uniform(0, whole / 2))
            found = cells_in(out) if out.is_dir() else None
            counts["kills" if hit else "runs that were over before"] += 1
            if found:
                counts["cells made by runs that were killed"] += hit * (len(found.cells) - there)
                counts["damaged cells after a kill"] += len(found.refused)
                counts["half-written files after a kill"] += len([*out.rglob("*.part")])
                counts["cells in the making at a kill"] += hit * len([*out.glob("running/*")])
            if not hit: folders.append(root / str(len(folders)))
        for out in folders:
            if begin(out, args.jobs, sets).wait(): counts["last runs that failed"] += 1
            counts["folders"] += 1
            got = numbers(out)
            counts["cells that are not there"] += len(expected.keys() - got.keys())
            counts["cells with other numbers or evidence"] += sum(got[name] != expected[name] for name in got)
            counts["files too many or too few"] += len({*files_in(out)} ^ {*files_in(root / "undisturbed")})
    finally: shutil.rmtree(root, ignore_errors=True)
    bad_ones = ("cells that are not there", "cells with other numbers or evidence", "files too many or too few",
                "last runs that failed")
    print(f"kills, seed {args.seed}, {len(sets)} cells a folder, {args.jobs} worker(s): "
          + "; ".join(f"{name} {n}" for name, n in counts.items()))
    bad = sum(counts[name] for name in bad_ones)
    print(f"kills: {bad} things are not as they should be" if bad else
          "kills: every cell is there, with the numbers and the evidence of a sweep that nothing disturbed")
    return bad


CASES = {"overhead": overhead, "shared": shared, "workers": workers, "kills": kills}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--cells", type=int, default=8, help="SAE sets")
    parser.add_argument("--seeds", type=int, default=4, help="frames, of `workers`")
    parser.add_argument("--n", type=int, default=192, help="prompts, but for `kills`")
    parser.add_argument("--rounds", type=int, default=1, help="of which the median is shown")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parser.add_argument("--jobs", type=int, default=1, help="workers of the sweeps that are killed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sets = make_sets(Path(folder), args.cells)
        status = [case(sets, args) for name, case in CASES.items() if args.only in (None, name)]
    raise SystemExit(any(status))


if __name__ == "__main__": main()
