"""Makes the pages of the doc site from the notebooks, for Quarto to render: `_proc/`, without running anything.

nbdev's processors do what they do well (titles, hidden cells, directives); ours put in what nbdev would run the
notebooks for, the documentation of what they export, and lead backticked names to the right place.
"""
import re
import shutil
from pathlib import Path

import api
import yaml
from execnb.nbio import read_nb, write_nb
from folds import fold_checks
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, Processor
from nbdev.processors import (
    clean_magics, filter_stream_, hide_, hide_line, mk_cell, populate_language, rm_export, rm_header_dash, strip_ansi,
    strip_hidden_metadata)
from nbdev.quarto import refresh_quarto_yml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"core": "Core", "tasks": "Tasks", "discovery": "Discovery", "truth": "Truth", "saes": "SAEs",
           "measures": "Measures", "views": "Views", "report": "Report", "lab": "Lab"}
MADE = ("api.qmd", "changelog.qmd")  # pages that no notebook stands behind


# Processors

def of_page(library: api.Library, page: str) -> list[type]:
    "Our processors for one page."
    names = {symbol.name: symbol for symbol in library.on(page)}
    taken = {symbol.anchor for symbol in names.values()}

    class add_entries(Processor):
        "Behind each exported cell, what it defines."
        def begin(self):
            for cell in reversed(list(self.nb.cells)):
                if cell.cell_type != "code" or not {"export", "exports"} & cell.directives_.keys(): continue
                found = [names[name] for name in defined_names(cell.source) if name in names]
                entries = [mk_cell(api.entry(symbol, library), "markdown") for symbol in found]
                for entry in entries: entry.is_entry = True
                self.nb.cells[cell.idx_ + 1:cell.idx_ + 1] = entries

    class add_links(Processor):
        "Backticked names in prose and in markdown that cells print."
        def cell(self, cell):
            if getattr(cell, "is_entry", False): return
            if cell.cell_type == "markdown": cell.source = library.linked(kept_apart(cell.source, taken), page)
            for out in cell.get("outputs", []):
                if "text/markdown" in out.get("data", {}):
                    out.data["text/markdown"] = library.linked("".join(out.data["text/markdown"]), page)
    return [add_entries, add_links]


def defined_names(source: str) -> list[str]:
    "The public names that a cell defines, in its order."
    return [symbol.name for symbol in api.Reader(source, "", "", "").symbols() if "__" not in symbol.name]


def kept_apart(markdown: str, taken: set[str]) -> str:
    "A heading whose anchor would be that of a name on the page gets another."
    def heading(m):
        anchor = re.sub(r"[^\w\s.-]", "", m[2]).strip().lower().replace(" ", "-")
        return f"{m[1]} {m[2]} {{#{anchor}-section}}" if anchor in taken and "{#" not in m[2] else m[0]
    return re.sub(r"^(#{2,})\s+(.+?)\s*$", heading, markdown, flags=re.M)


class raw_html(Processor):
    "HTML that cells print, as it is: Quarto would look through it, and load two libraries from the network for it."
    def cell(self, cell):
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/html" not in data: continue
            html = "".join(data.pop("text/html"))
            html = re.sub(r"<style scoped>.*?</style>\s*", "", html, flags=re.S)
            if re.match(r'\s*(<div>\s*)?<table', html): html = f'<div class="scrolls">{html}</div>'
            fence = max(["``", *re.findall(r"`{3,}", html)], key=len) + "`"
            data["text/markdown"] = f"{fence}{{=html}}\n{html}\n{fence}"


def described(markdown: str) -> str:
    "A drawing on a line of its own: Quarto would put its description below it, and leave it without one."
    def drawing(m): return f'![]({m[2]}){{.drawing fig-alt="{plain(m[1])}"}}'
    return re.sub(r"^!\[([^\]]+)\]\((\S+?)\)$", drawing, markdown, flags=re.M)


def plain(words: str) -> str:
    "Without what would end an attribute, or be taken for a name."
    return re.sub(r"[\\`]", "", words).replace('"', "'")


class described_pictures(Processor):
    "A picture without words of its own is described by the sentence that leads to it."
    def begin(self): self.said = ""

    def cell(self, cell):
        if cell.cell_type == "markdown": cell.source = described(cell.source)
        if cell.cell_type == "markdown" and not getattr(cell, "is_entry", False): self.said = last_sentence(cell.source)
        has_picture = any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))
        if has_picture and "fig-alt" not in cell.source and self.said:
            cell.source = f'#| fig-alt: "Picture: {plain(self.said)}"\n{cell.source}'


def last_sentence(markdown: str) -> str:
    "In plain text."
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[`*$#>|]", "", markdown))
    sentences = re.split(r"(?<=[.!?:])\s+", " ".join(plain.split()))
    return sentences[-1].rstrip(":") if sentences else ""


def page_name(path: Path) -> str:
    "The page that a notebook becomes, relative to the site."
    return path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.name.lower())).with_suffix(".html").as_posix()


def process(path: Path, target: Path, library: api.Library, nbs: Path):
    "One notebook as Quarto is to render it."
    add_entries, add_links = of_page(library, page_name(path.relative_to(nbs)))
    procs = [FrontmatterProc, fold_checks, populate_language, add_entries, strip_ansi, hide_line, filter_stream_,
             rm_header_dash, described_pictures, rm_export, clean_magics, hide_, add_links, raw_html,
             strip_hidden_metadata]
    nb = read_nb(path)
    NBProcessor(nb=nb, procs=procs).process()
    nb.metadata.pop("widgets", None)
    write_nb(nb, target)


# Pages and settings that are made of other files

def front_matter(**said) -> str: return f"---\n{yaml.safe_dump(said, allow_unicode=True)}---\n\n"


def changelog(library: api.Library) -> str:
    text = re.sub(r"\A# .*\n", "", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    return front_matter(title="Changelog") + library.linked(text, "changelog.html")


def api_index(library: api.Library) -> str:
    front = front_matter(title="Every public name", search=False,
                         description="All that the package exports, room by room; each name leads to its page.")
    return front + api.index(library, FOLDERS)


def search_entries() -> list[dict]:
    "What the site's search knows of public names: Quarto lists sections alone, and no definitions."
    library = api.read_package(ROOT, get_config(path=ROOT).lib_name)
    symbols = sorted(library.symbols, key=lambda s: (s.name not in library.homes, s.page))  # what users import first
    return [{"objectID": f"{s.page}#{s.anchor}", "href": f"{s.page}#{s.anchor}", "title": s.name, "section": s.name,
             "text": s.summary} for s in symbols]


def settings(cache: Path):
    "What settings.ini says, where Quarto reads it."
    cfg = get_config(path=ROOT)
    file = f"{cfg.git_url}/blob/{cfg.branch}"
    footer = {"left": f"{cfg.title} {cfg.version} · [Changelog](/changelog.qmd)",
              "right": f"[Apache-2.0 licence]({file}/LICENSE) · [Cite it]({file}/CITATION.cff)"}
    said = yaml.safe_load((cache / "nbdev.yml").read_text(encoding="utf-8"))
    said["website"] |= {"page-footer": footer, "repo-subdir": "nbs"}
    (cache / "nbdev.yml").write_text(yaml.safe_dump(said, allow_unicode=True), encoding="utf-8")


def shown_files(nbs: Path) -> list[Path]:
    "Notebooks, pictures, styles and settings, relative to their folder; nothing hidden."
    files = (path.relative_to(nbs) for path in sorted(nbs.rglob("*")) if path.is_file())
    return [f for f in files if f == Path("_quarto.yml") or not any(part[0] in "._" for part in f.parts)]


def make_pages(cache: Path = ROOT / "_proc") -> int:
    "All pages in `cache`, and how many there are."
    cfg = get_config(path=ROOT)
    refresh_quarto_yml()
    shutil.rmtree(cache, ignore_errors=True)
    library = api.read_package(ROOT, cfg.lib_name, f"{cfg.git_url}/blob/{cfg.branch}")
    nbs, files = cfg.nbs_path, shown_files(cfg.nbs_path)
    for file in files:
        target = cache / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".ipynb": process(nbs / file, target, library, nbs)
        else: shutil.copy(nbs / file, target)
    for name, text in zip(MADE, (api_index(library), changelog(library))):
        (cache / name).write_text(text, encoding="utf-8")
    settings(cache)
    return sum(file.suffix in (".ipynb", ".qmd") for file in files) + len(MADE)
