"""Writes README.md from nbs/index.ipynb, or with --check says whether it is up to date.

nbdev_readme does the same through Quarto, which CI and most users do not have.
"""
import re
import sys
from pathlib import Path, PurePosixPath

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n"
HIDDEN = {"hide", "export", "exporti", "default_exp"}


def link(url, cfg):
    "The address in README.md of what the notebook calls `url`: pages on the doc site, files in the repository."
    page, hash_, anchor = url.partition("#")
    if page and ":" not in page and not page.endswith(".ipynb"): return f"nbs/{url}"  # such as a picture
    if page.endswith(".ipynb") and "://" not in page:
        return f"{cfg.doc_host}{cfg.doc_baseurl}/{_nbpath2html(PurePosixPath(page))}{hash_}{anchor}"
    return url.removeprefix(f"{cfg.git_url}/blob/{cfg.branch}/")


def outputs(cell):
    "The cell's saved outputs: markdown where there is some, else plain text. Errors, stderr and frames are left out."
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if "<iframe" in "".join(data.get("text/html", "")): continue  # alive on the doc site only
        if "text/markdown" in data: yield "".join(data["text/markdown"])
        elif "text/plain" in data and "image/png" not in data: yield fence("".join(data["text/plain"]))
        elif out["output_type"] == "stream" and out["name"] == "stdout": yield fence("".join(out["text"]))


def fence(text, lang=""): return f"```{lang}\n{text.rstrip()}\n```"


def blocks(cell, lookup):
    "The pieces of markdown that one cell becomes."
    if cell.cell_type == "markdown": yield lookup.linkify(cell.source)
    if cell.cell_type != "code" or HIDDEN & cell.directives_.keys(): return
    if cell.source.strip() and cell.directives_.get("echo:") != ["false"]: yield fence(cell.source, "python")
    if cell.directives_.get("output:") != ["false"]: yield from outputs(cell)


def readme():
    cfg, lookup = get_config(path=ROOT), NbdevLookup(incl_libs="sage_nb")
    nb = NBProcessor(ROOT / "nbs" / "index.ipynb").nb
    text = HEAD + "\n\n".join(b.strip() for cell in nb.cells for b in blocks(cell, lookup)) + "\n"
    return re.sub(r"\]\(([^)\s]+)", lambda m: "](" + link(m[1], cfg), text)


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" not in sys.argv: path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`")
