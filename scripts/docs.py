"""Makes the doc site: pages in _proc/ (scripts/pages.py), rendered by Quarto to _docs/ (unless --no-render).

Quarto is looked for in $SAGE_NB_QUARTO, on PATH, and beside the checkout, at ../shared/quarto. It renders one page
after another, so as many of it work side by side as there are cores, each on its own copy and on its own folders.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lighter import lighter
from pages import ROOT, make_pages, search_entries

SITE = ROOT / "_docs"
PAGE_COST = 60_000  # bytes of notebook that take as long to render as what every page costs
HOW = ("Quarto was not found: the site is not rendered. Install it from https://quarto.org/docs/get-started, "
       "or name its program in $SAGE_NB_QUARTO")


def quarto() -> str | None:
    "Quarto's program."
    beside = [ROOT.parent / "shared" / "quarto" / "quarto", ROOT.parent / "quarto" / "bin" / "quarto"]
    places = [os.environ.get("SAGE_NB_QUARTO"), shutil.which("quarto"), *beside]
    found = (str(place) for place in places if place and Path(place).is_file())
    return next((program for program in found if works(program)), None)


def works(program: str) -> bool:
    "Does it start? Its first call may install what it needs, and fail where that is not to be had."
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    if done.returncode: print(f"{program} does not start: {done.stderr.strip()[-500:]}", file=sys.stderr)
    return not done.returncode


def groups(cache: Path, n: int) -> list[list[str]]:
    "The folders and files to render, in n groups that take about as long as each other."
    def cost(path):
        pages = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".ipynb", ".qmd")]
        return sum(PAGE_COST + page.stat().st_size for page in pages)
    units = {p.name: cost(p) for p in cache.iterdir() if p.is_dir() or p.suffix in (".ipynb", ".qmd")}
    shares = [([], 0)] * n
    for name in sorted((name for name in units if units[name]), key=units.get, reverse=True):
        least = min(range(n), key=lambda i: shares[i][1])
        shares[least] = [*shares[least][0], name], shares[least][1] + units[name]
    return [names for names, _ in shares if names]


def render(program: str, cache: Path, names: list[str]) -> Path:
    "Render some of the pages, quietly unless that fails; the part of the site that they are."
    command = [program, "render", *names, "--no-execute"]
    done = subprocess.run(command, cwd=cache, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    warnings = [line for line in said.splitlines() if re.match(r"(WARN|ERROR)", line)]
    if done.returncode: sys.exit(f"{' '.join(command)}\n{said[-4000:]}")
    if warnings: sys.exit("Quarto warns:\n" + "\n".join(warnings))
    home = cache / "_docs" / "index.html"  # where the home page is not among them, Quarto puts one that leads elsewhere
    if "index" not in {Path(name).stem for name in names}: home.unlink(missing_ok=True)
    return cache / "_docs"


def joined(parts: list[Path]):
    "One site of its parts: files side by side, one index of the search, one map."
    shutil.rmtree(SITE, ignore_errors=True)
    for part in parts: shutil.copytree(part, SITE, dirs_exist_ok=True)
    found = [json.loads((part / "search.json").read_text(encoding="utf-8")) for part in parts]
    entries = {entry["objectID"]: entry for entries in [search_entries(), *found] for entry in entries}
    (SITE / "search.json").write_text(json.dumps(list(entries.values()), ensure_ascii=False), encoding="utf-8")
    maps = [(part / "sitemap.xml").read_text(encoding="utf-8") for part in parts]
    urls = dict.fromkeys(url for text in maps for url in re.findall(r"<url>.*?</url>", text, re.S))
    head, tail = maps[0].partition("<url>")[0], "</urlset>\n"
    (SITE / "sitemap.xml").write_text(head + "\n  ".join(urls) + "\n" + tail, encoding="utf-8")


def render_site(program: str, cache: Path):
    n = min(os.cpu_count() or 1, 4)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(n) as pool:
        shares = groups(cache, n)
        copies = [Path(folder) / str(i) for i in range(len(shares))]
        for copy in copies: shutil.copytree(cache, copy)
        joined(list(pool.map(render, [program] * len(shares), copies, shares)))
    lighter(SITE)


def main():
    start, cache = time.time(), ROOT / "_proc"
    print(f"{make_pages(cache)} pages made in {time.time() - start:.0f} s", flush=True)
    if "--no-render" in sys.argv: return
    program = quarto()
    if program is None: return print(HOW)
    render_site(program, cache)
    print(f"_docs/index.html rendered, {time.time() - start:.0f} s in all")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
