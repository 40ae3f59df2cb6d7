"""How long the command line takes to say what needs no computing: help, versions, and refusals of what is misspelled.

Each command line runs in a fresh process, as a shell starts it, and all of them in turn, so that a busy machine slows
all alike; the median over the rounds is shown, after one round that fills the disk cache. `an empty program` is what
Python itself takes, `import torch` what everything would take that imports it.

python benchmarks/cli.py [--quick]
"""
import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = "from sage_nb.lab.cli import main; raise SystemExit(main())"
LINES = [  # (command line, exit status); {file} is a file where a folder should be
    ("--help", 0), ("evaluate --help", 0), ("sweep --help", 0), ("--version", 0), ("evalaute", 2),
    ("evaluate --sae tiny-gpt2-res-topk", 2),
    ("evaluate --saes tiny-gpt2-res-topl", 1), ("evaluate --saes gpt2-small-res-bj", 1), ("evaluate --out {file}", 1),
    ("evaluate --task ioy", 1), ("evaluate --task {broken}", 1), ("evaluate --task {rows}", 1),
    ("sweep --saes re:tiny-gpt3.*", 1), ("leaderboard {file}", 1), ("evaluate --model tiny-gtp2", 1),
    ("evaluate --sites Z", 1), ("evaluate --attributes Foo", 1),
]


def seconds(program: str, argv: list[str], status: int) -> float:
    "How long a Python program takes that ends with this status."
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True)
    took = time.perf_counter() - start
    if done.returncode != status: raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stderr.decode()}")
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, without `import torch`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.json") for name in ("file", "broken", "rows")}
        for name, text in {"file": "", "broken": '{"rows": [', "rows": '{"rows": []}'}.items():
            Path(files[name]).write_text(text)
        jobs = {"an empty program": ("", [], 0)}
        for line, status in LINES: jobs[f"sage_nb {line}"] = PROGRAM, line.format(**files).split(), status
        if not args.quick: jobs["import torch"] = "import torch", [], 0
        rounds = [{name: seconds(*job) for name, job in jobs.items()} for _ in range(1 if args.quick else 6)]
    print(f"Python {platform.python_version()}, {platform.processor() or platform.machine()}")
    for name in jobs: print(f"{statistics.median(r[name] for r in rounds[1:] or rounds):6.2f} s  {name}")


if __name__ == "__main__": main()
