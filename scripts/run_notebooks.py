"""Runs notebooks (all, or those named) and saves their outputs, so that what a reader sees is what the code prints now.

execnb's own exec_nb runs every cell. This one leaves the cells that nbdev_test would skip (test flags, `eval: false`)
with the outputs they have, so that a machine without a GPU does not wipe what one with a GPU printed; `--flags slow`
runs those too. It also drops stderr (progress bars and warnings differ from run to run; they are shown here instead)
and outputs of cells that print nothing any more. Each notebook gets a fresh process.
"""
import os
import sys
import time
from argparse import ArgumentParser
from multiprocessing import get_context
from pathlib import Path

from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
SKIPPED_DIRS = ("_proc", "_docs", ".ipynb_checkpoints")


def run(path, flags=()):
    "Execute the notebook `path` and write it back; a cell that fails leaves the file as it was and raises."
    skip = set(get_config(path=ROOT).tst_flags.split()) - set(flags)
    os.environ["IN_TEST"] = "1"  # as nbdev_test has it: no export from inside a notebook
    os.chdir(path.parent)
    sys.path.insert(0, str(ROOT))
    nb, shell = NBProcessor(path, rm_directives=False).nb, CaptureShell(mpl_format="png")
    for cell in nb.cells:
        if cell.cell_type != "code" or "nbdev_export(" in cell.source: continue
        if skip & cell.directives_.keys() or cell.directives_.get("eval:") == ["false"]: continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc: raise RuntimeError(shell.prettytb(path)) from None
        for out in cell.outputs:
            if out.get("name") == "stderr": print("".join(out["text"]), file=sys.stderr)
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    write_nb(nb, path)
    nbdev_clean.__wrapped__(str(path))


def every_notebook():
    "Numbered rooms first, then tutorials and explanations, index last."
    found = [p for p in ROOT.glob("nbs/**/*.ipynb") if not set(p.parts) & set(SKIPPED_DIRS)]
    return sorted(found, key=lambda p: (p.stem == "index", not p.parent.name[0].isdigit(), p))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", default="", help="test flags whose cells are run too, e.g. 'slow gpu'")
    args = parser.parse_args()
    for path in [p.resolve() for p in args.notebooks] or every_notebook():
        start = time.time()
        process = get_context("spawn").Process(target=run, args=(path, args.flags.split()))
        process.start()
        process.join()
        if process.exitcode: sys.exit(f"{path.relative_to(ROOT)} failed; it was left as it was")
        print(f"{path.relative_to(ROOT)}: {time.time() - start:.0f} s", flush=True)
