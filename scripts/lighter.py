"""Makes the rendered pages lighter, and changes nothing that is seen.

Quarto writes the same 29 kB of script into every page, an empty link before every line of code, and line ends and
spaces into a sidebar of a hundred links: a fifth of the site. A script of several pages becomes a file of its own.
"""
import hashlib
import os
import re
from collections import Counter
from pathlib import Path

LEAST = 1000  # characters of a script that is worth a file
INLINE = re.compile(r"<script(?P<attributes>(?: (?:id|type)=[\"'][^\"']*[\"'])*)>(?P<code>.*?)</script>", re.S)
LINE_LINK = re.compile(r'<a href="#cb\d+-\d+" aria-hidden="true" tabindex="-1"></a>')
LINE = re.compile(r'<span id="cb\d+-\d+">')
OPERATOR = re.compile(r'<span class="op">([^<]*)</span>')
SIDEBAR = re.compile(r'<nav id="quarto-sidebar".*?</nav>', re.S)


def is_code(match: re.Match) -> bool:
    "Is it a script of this kind: classic JavaScript, long enough?"
    kind = re.search(r"type=[\"']([^\"']*)", match["attributes"])
    return len(match["code"]) >= LEAST and (kind is None or kind[1] in ("text/javascript", "application/javascript"))


def without_spaces(match: re.Match) -> str:
    "A list of links without line ends and what stands before them."
    return re.sub(r"\s*\n\s*", "\n", match[0])


def shared_scripts(pages: dict[Path, str]) -> set[str]:
    "The scripts that stand in more than one page."
    found = Counter()
    for text in pages.values(): found.update({match["code"] for match in INLINE.finditer(text) if is_code(match)})
    return {code for code, times in found.items() if times > 1}


def lighter(site: Path):
    "Rewrite the pages of a site."
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    shared = {code: f"site_libs/shared-{hashlib.sha256(code.encode()).hexdigest()[:12]}.js"
              for code in shared_scripts(pages)}
    for code, name in shared.items(): (site / name).write_text(code, encoding="utf-8")
    for path, text in pages.items():
        def moved(match, folder=path.parent):
            if not is_code(match) or match["code"] not in shared: return match[0]
            source = os.path.relpath(site / shared[match["code"]], folder)
            return f'<script{match["attributes"]} src="{source}"></script>'
        text = INLINE.sub(moved, SIDEBAR.sub(without_spaces, text))
        text = OPERATOR.sub(r"\1", LINE.sub("<span>", LINE_LINK.sub("", text)))
        path.write_text(text, encoding="utf-8")
