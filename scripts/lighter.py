"""Makes the rendered pages lighter, and changes nothing that is seen.

Quarto writes the same 29 kB of script, the same styles and the same sidebar of a hundred links into every page, an
empty link before every line of code, into the index of its search whole tables, and into its style sheets the parts
of a dashboard and two thousand icons: a third of the site. What several pages hold becomes a file of its own; so do
the sidebar's folded lists, which no reader can unfold without scripts anyway.
"""
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

LEAST = 1000  # characters of a script that is worth a file
MOST = 1200  # characters of a section that the search looks through
INLINE = re.compile(r"<script(?P<attributes>(?: (?:id|type)=[\"'][^\"']*[\"'])*)>(?P<code>.*?)</script>", re.S)
LINE_LINK = re.compile(r'<a href="#cb\d+-\d+" aria-hidden="true" tabindex="-1"></a>')
LINE = re.compile(r'<span id="cb\d+-\d+">')
OPERATOR = re.compile(r'<span class="op">([^<]*)</span>')
FRAME = re.compile(r'srcdoc="[^"]*"')  # its scripts are known to its security policy by their hashes
HEAD_STYLE = re.compile(r"<style>(.*?)</style>(?=.*?</head>)", re.S)
TOP = re.compile(r"</head>.*?<main", re.S)  # bars and sidebar
RULE = re.compile(r"(?<=[{};/])([^{};/@]+)\{[^{}]*\}")  # of a style sheet, with its selectors
ICON = re.compile(r"\.(bi-[\w-]+)::before")
UNUSED = ("bslib-", "quarto-dashboard", "bg-gradient-", "quarto-listing")  # classes of what the site has none of
SIDEBAR = re.compile(r'<nav id="quarto-sidebar".*?</nav>', re.S)
# a folded list with its title, and no list in it
FOLDED = re.compile(r'<li class="sidebar-item sidebar-item-section">(?:(?!<li|<ul).)*<ul id="[^"]*" '
                    r'class="collapse list-unstyled sidebar-section depth\d ">(?:(?!<ul).)+?</ul>\s*</li>', re.S)
FILL = """(() => {
    const root = document.currentScript.getAttribute("src").split("site_libs/")[0] || "./";
    const lists = LISTS;
    const folded = document.getElementById("quarto-sidebar").getElementsByClassName("folded");
    while (folded.length)
        folded[0].outerHTML = lists[folded[0].dataset.list].replaceAll('href="./', `href="${root}`);
})();
"""


def short(text: str) -> str: return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_code(match: re.Match) -> bool:
    "Is it a script of this kind: classic JavaScript, long enough?"
    kind = re.search(r"type=[\"']([^\"']*)", match["attributes"])
    return len(match["code"]) >= LEAST and (kind is None or kind[1] in ("text/javascript", "application/javascript"))


def repeated(pages: dict[Path, str], pattern: re.Pattern, where=lambda match: True) -> set[str]:
    "What the pattern's last group finds in more than one page."
    found = Counter()
    for text in pages.values():
        found.update({match[pattern.groups] for match in pattern.finditer(text) if where(match)})
    return {part for part, times in found.items() if times > 1}


def without_shared(site: Path, pages: dict[Path, str]) -> dict[Path, str]:
    "The pages, with a file in place of a script or a style sheet that several hold."
    scripts, styles = repeated(pages, INLINE, is_code), repeated(pages, HEAD_STYLE)
    names = {code: f"site_libs/shared-{short(code)}.js" for code in scripts}
    names |= {code: f"site_libs/shared-{short(code)}.css" for code in styles}
    for code, name in names.items(): (site / name).write_text(code, encoding="utf-8")

    def source(code, path): return os.path.relpath(site / names[code], path.parent)

    def script(match, path):
        if match["code"] not in scripts: return match[0]
        return f'<script{match["attributes"]} src="{source(match["code"], path)}"></script>'

    def style(match, path):
        return f'<link rel="stylesheet" href="{source(match[1], path)}">' if match[1] in styles else match[0]
    return {path: HEAD_STYLE.sub(lambda match: style(match, path), INLINE.sub(lambda match: script(match, path), text))
            for path, text in pages.items()}


def without_lists(sidebar: str, root: str, lists: dict[str, str]) -> str:
    "A sidebar without its folded lists; they are put into `lists`, as seen from the root."
    def taken(match):  # \0 hides a list that is done, so that the one around it is next
        items = match[0].replace("\0", "<").replace(f'href="{root}', 'href="./')
        lists[short(items)] = items
        return f'\0li class="folded" data-list="{short(items)}">\0/li>'
    for _ in range(2): sidebar = FOLDED.sub(taken, sidebar)
    return sidebar.replace("\0", "<")


def without_sidebars(site: Path, pages: dict[Path, str]) -> dict[Path, str]:
    "The pages, with the folded lists of their sidebars in one file."
    lists, found, file = {}, {}, "site_libs/sidebar.js"

    def filled(match, root): return f'{without_lists(match[0], root, lists)}<script src="{root}{file}"></script>'
    for path, text in pages.items():
        root = "../" * (len(path.relative_to(site).parts) - 1) or "./"
        found[path] = SIDEBAR.sub(lambda match: filled(match, root), text)
    script = FILL.replace("LISTS", json.dumps(lists, ensure_ascii=False))
    (site / file).write_text(script, encoding="utf-8")
    return found


def lighter_search(file: Path):
    "The index of the search, of each section only the beginning."
    entries = json.loads(file.read_text(encoding="utf-8"))
    for entry in entries: entry["text"] = re.sub(r"\s+", " ", entry["text"])[:MOST]
    file.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def lighter_styles(site: Path):
    "Style sheets without the icons and components that neither a page nor a script names."
    named = "".join(path.read_text(encoding="utf-8") for kind in ("html", "js") for path in site.rglob(f"*.{kind}"))
    unused = [f".{name}" for name in UNUSED if name not in named]

    def needed(match):
        icon = ICON.search(match[1])
        if icon: return match[0] if icon[1] in named else ""
        return "" if all(any(name in one for name in unused) for one in match[1].split(",")) else match[0]
    for path in (site / "site_libs" / "bootstrap").glob("*.css"):
        path.write_text(RULE.sub(needed, path.read_text(encoding="utf-8")), encoding="utf-8")


def lighter(site: Path):
    "Rewrite the pages of a site, its style sheets and the index of its search; what frames hold stays as it is."
    frames = []

    def hidden(match):
        frames.append(match[0])
        return f"\1{len(frames) - 1}\1"

    def tight(match): return re.sub(r"\s*\n\s*", "\n", match[0])
    pages = {path: TOP.sub(tight, FRAME.sub(hidden, path.read_text(encoding="utf-8"))) for path in site.rglob("*.html")}
    for path, text in without_sidebars(site, without_shared(site, pages)).items():
        text = OPERATOR.sub(r"\1", LINE.sub("<span>", LINE_LINK.sub("", text)))
        path.write_text(re.sub("\1(\\d+)\1", lambda match: frames[int(match[1])], text), encoding="utf-8")
    lighter_styles(site)
    lighter_search(site / "search.json")
