"""How long it takes to read a leaderboard: seconds by number of results.

python benchmarks/leaderboard.py [N …]
"""
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from made_up_cells import write_many, write_one  # noqa: E402

from sage_nb.lab.leaderboard import comparisons, leaderboard, leaderboard_explorer  # noqa: E402


def timed(function, *args):
    "What it gives, and the seconds that it took, on the clock and of the processor."
    start, used = time.perf_counter(), time.process_time()
    found = function(*args)
    return found, time.perf_counter() - start, time.process_time() - used


def read(n: int) -> None:
    "Write and read n results."
    with tempfile.TemporaryDirectory() as folder:
        _, wrote, _ = timed(write_many, folder, n)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.json"))
        table, seconds, used = timed(leaderboard, folder)
        print(f"{n:6d} results of {size / n / 1e3:.1f} KB: table of {len(table)} rows in {seconds:.1f} s "
              f"({used:.1f} s of CPU; written in {wrote:.0f} s)", flush=True)


def compare(saes: int, tasks: int) -> None:
    "All pairs of so many SAEs, and the page."
    with tempfile.TemporaryDirectory() as folder:
        for i in range(saes):
            for task in range(tasks): write_one(folder, f"sae-{i}", i / saes, f"task {task}", l0=4 + i)
        pairs, seconds, used = timed(comparisons, folder)
        print(f"{saes} SAEs × {tasks} tasks: {len(pairs)} pairs in {seconds:.1f} s ({used:.1f} s of CPU)", flush=True)
        page, seconds, used = timed(leaderboard_explorer, folder)
        print(f"   page of {len(page.page()) / 1e3:.0f} KB in {seconds:.1f} s ({used:.1f} s of CPU)", flush=True)


if __name__ == "__main__":
    for n in map(int, sys.argv[1:] or ("1000", "10000")): read(n)
    for saes, tasks in ((24, 3), (100, 3)): compare(saes, tasks)
