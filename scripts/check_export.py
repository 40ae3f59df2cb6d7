"""Proves that sage_nb/*/*.py is what the notebooks export and that the notebooks are clean.

The modules are deleted first, because an export leaves the module of a removed notebook in place and all looks well.
Files are compared with what they were before, not with the last commit: uncommitted work is no fault.
In CI, where nothing is uncommitted, git must find the checkout clean as well.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parent.parent


def modules():
    "Every module but the package itself, which is written by hand."
    return sorted(p for p in ROOT.glob("sage_nb/**/*.py") if p != ROOT / "sage_nb/__init__.py")


def snapshot():
    return {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in [*modules(), *ROOT.glob("nbs/**/*.ipynb")]}


def export_from_nothing():
    "Delete the modules, export and clean; put the modules back if that fails."
    with tempfile.TemporaryDirectory() as kept:
        moved = {p: Path(kept) / str(i) for i, p in enumerate(modules())}
        for p, safe in moved.items(): shutil.move(p, safe)
        try:
            nbdev_export.__wrapped__()
            nbdev_clean.__wrapped__()
        except BaseException:
            for p, safe in moved.items(): shutil.move(safe, p)
            raise


def main():
    os.chdir(ROOT)
    before = snapshot()
    export_from_nothing()
    after = snapshot()
    wrong = [f"{'stale, removed' if f not in after else 'missing, made' if f not in before else 'changed'}: {f}"
             for f in sorted(before | after) if before.get(f) != after.get(f)]
    remedy = "Export and clean changed these files: look at them, commit them, run this again."
    if wrong: sys.exit("\n".join([remedy, *wrong]))
    if os.environ.get("CI"):
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        if status: sys.exit("The checkout is not clean after export:\n" + status)


if __name__ == "__main__": main()
