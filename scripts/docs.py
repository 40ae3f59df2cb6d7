"""Processes the notebooks for the doc site, and renders the site where Quarto is installed (unless --no-render).

nbdev_docs stops without Quarto (or tries to install it) and writes its own README.md; the processing alone already
runs every import and every show_doc, which is what breaks.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent


def render(cache):
    "Render the processed notebooks with Quarto and move the site to _docs/."
    subprocess.run(["quarto", "render", "--no-cache"], cwd=cache, check=True)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(cache / "_docs", ROOT)
    print("site: _docs/index.html")


if __name__ == "__main__":
    os.chdir(ROOT)
    refresh_quarto_yml()
    cache = proc_nbs(n_workers=0, force=True)
    print(f"processed {len(list(cache.rglob('*.ipynb')))} notebooks")
    if "--no-render" not in sys.argv:
        if shutil.which("quarto"): render(cache)
        else: print("Quarto is not installed: the site was not rendered")
