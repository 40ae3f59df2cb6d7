"""The rendered doc site as a reader meets it: every page opened once, looked at on a desk and on a phone."""
import posixpath
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urlsplit

DESK, PHONE = 1440, 390
CANONICAL = "https://sage-nb.github.io/sage_nb/"  # links to it are links inside the site

WIDTH = """() => {
    const root = document.documentElement, main = document.querySelector("main");
    const edge = main.getBoundingClientRect().right, scrolls = ["auto", "scroll"], clips = ["hidden", "clip"];
    const seen = (box) => box.checkVisibility() && !box.closest(".visually-hidden, .sr-only");
    const say = (box) => `${box.tagName.toLowerCase()}.${box.getAttribute("class")}: ` +
        (box.innerText || box.getAttribute("src") || "").trim().slice(0, 60).replaceAll("\\n", " / ");
    const cut = [];
    const wide = new Set();
    const kinds = "pre, table, img, svg, iframe, math, p, li, dd, dt, td, th, h1, h2, h3, h4";
    for (const box of main.querySelectorAll(kinds)) {
        if (!seen(box) || box.parentElement.closest("svg, math")) continue;
        const own = getComputedStyle(box).overflowX;
        const inner = box.scrollWidth - box.clientWidth > 1 && box.clientWidth > 0;
        if (inner && scrolls.includes(own)) wide.add(box);
        if (inner && clips.includes(own)) cut.push(say(box));
        const right = box.getBoundingClientRect().right;
        for (let up = box.parentElement; up && up !== main.parentElement; up = up.parentElement) {
            const how = getComputedStyle(up).overflowX, end = up === main ? edge : up.getBoundingClientRect().right;
            if (scrolls.includes(how)) { if (right > end + 1) wide.add(up); break; }
            if (right > end + 1 && (clips.includes(how) || up === main)) { cut.push(say(box)); break; }
        }
    }
    for (const frame of main.querySelectorAll("iframe")) {
        const inside = frame.contentDocument?.documentElement;
        if (inside && inside.scrollWidth > inside.clientWidth + 1) cut.push(`frame ${frame.title}`);
    }
    return {overflow: root.scrollWidth - root.clientWidth, cut, wide: wide.size};
}"""

WORDS = """() => {
    const main = document.querySelector("main"), plain = main.cloneNode(true);
    for (const code of plain.querySelectorAll("pre, code, script, style, iframe, math, .math, svg")) code.remove();
    const faults = [], bad = {
        flag: /^\\s*#\\|.*$/m, traceback: /Traceback \\(most recent call last\\)/, "name of a cell": /__main__\\.\\w+/,
        "an object's address": /<(lambda|factory|function|class '|bound method)[^>]*>/, fence: /^:::.*$|\\{=html\\}/m};
    for (const [name, pattern] of Object.entries(bad)) {
        const found = main.innerText.match(pattern);
        if (found) faults.push(`${name}: ${found[0]}`);
    }
    const raw = plain.textContent.match(
        /`[^`\\n]+`|\\*\\*\\w[^*\\n]*\\*\\*|\\]\\([^)\\s]+\\)|\\$[a-z\\\\\\\\][^$\\n]*\\$/i);
    if (raw) faults.push(`raw markdown: ${raw[0]}`);
    return {
        faults, title: document.title, words: main.innerText.split(/\\s+/).length,
        links: [...document.querySelectorAll("a[href]")].map((a) => a.href),
        ids: [...document.querySelectorAll("[id], a[name]")].map((e) => e.id || e.name),
        images: [...document.querySelectorAll("img:not([alt]), main svg[role=img]:not([aria-label])")]
            .map((i) => i.outerHTML.slice(0, 99)),
        unsaid: [...main.querySelectorAll("img[alt='']")].map((i) => i.src),
    };
}"""


@dataclass
class Page:
    "What was seen on one page."
    name: str
    desk: dict
    phone: dict
    words: dict
    problems: list[str] = field(default_factory=list)  # of the console, and requests that leave the site


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


class Site:
    "A folder with a site, served on this machine."

    def __init__(self, folder: Path):
        self.folder = folder
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self): self.server.shutdown()

    @property
    def names(self) -> list[str]:
        pages = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.html"))
        return sorted(p for p in pages if not p.startswith("site_libs/"))

    def visit(self, page, name: str) -> Page:
        "Open a page wide, then make the window narrow."
        problems = []
        page.set_viewport_size({"width": DESK, "height": 900})

        def said(message):
            if message.type in ("error", "warning"): problems.append(f"{message.type}: {message.text}")

        def failed(error): problems.append(f"exception: {error}")

        def asked(request):
            if not request.url.startswith((self.address, "data:", "about:", "blob:")):
                problems.append(f"request: {request.url}")
        heard = {"console": said, "pageerror": failed, "request": asked}
        for event, hear in heard.items(): page.on(event, hear)
        page.goto(self.address + name, wait_until="load")
        desk, words = page.evaluate(WIDTH), page.evaluate(WORDS)
        page.set_viewport_size({"width": PHONE, "height": 844})
        phone = page.evaluate(WIDTH)
        for event, hear in heard.items(): page.remove_listener(event, hear)
        return Page(name, desk, phone, words, problems)

    def dead_links(self, pages: list[Page]) -> list[str]:
        "Links inside the site whose page or anchor does not exist."
        ids = {page.name: {"", "top", *page.words["ids"]} for page in pages}
        dead = set()
        for page in pages:
            for link in page.words["links"]:
                link, anchor = urldefrag(link.replace(CANONICAL, self.address))
                if not link.startswith(self.address): continue
                target = unquote(urlsplit(link).path).lstrip("/")
                if not target or target.endswith("/"): target = posixpath.join(target, "index.html")
                if not (self.folder / target).is_file(): dead.add(f"{page.name}: no page {target}")
                elif target in ids and unquote(anchor) not in ids[target]:
                    dead.add(f"{page.name}: no {target}#{anchor}")
        return sorted(dead)

    def megabytes(self) -> float: return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file()) / 1e6


def counts(site: Site, pages: list[Page]) -> dict:
    "How many faults of each kind there are: for a report."
    def of(width, what): return sum(len(getattr(p, width)[what]) for p in pages)
    return {
        "pages": len(pages), "MB": round(site.megabytes(), 1), "dead links": len(site.dead_links(pages)),
        "pages that overflow, desk": sum(p.desk["overflow"] > 0 for p in pages),
        "pages that overflow, phone": sum(p.phone["overflow"] > 0 for p in pages),
        "cut, desk": of("desk", "cut"), "cut, phone": of("phone", "cut"),
        "scrolls in itself, desk": sum(p.desk["wide"] for p in pages),
        "scrolls in itself, phone": sum(p.phone["wide"] for p in pages),
        "images without alt": sum(len(p.words["images"]) for p in pages),
        "pictures with an empty alt": sum(len(p.words["unsaid"]) for p in pages),
        "pages with console problems": sum(bool(p.problems) for p in pages),
        "faults of text": sum(len(p.words["faults"]) for p in pages)}
