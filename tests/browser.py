"""A real browser for tests: pages of explorers, alone or in a frame, and a JupyterLab with a live kernel.

The fixtures `audit`, `browse`, `chromium`, `lab` and `notebook` are shared through conftest.py: a file that imported
them would start a browser of its own, and two in one process refuse to run.
Every page is watched: a console error, a warning, a script that fails or a request to anywhere fails the test.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent
DESKTOP, PHONE = 1280, 400  # widths at which pages are looked at
LAB_SECONDS = 180  # at most, until a server answers, and until a notebook is open, on a busy machine


def executable() -> str | None:
    "The browser: $SAGE_NB_CHROMIUM, or the system's own."
    given = os.environ.get("SAGE_NB_CHROMIUM")
    return given or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# A browser and its pages

@pytest.fixture(scope="session")
def chromium():
    "Headless Chromium."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test installs it")
    path = executable()
    if not path: pytest.skip("no chromium here: install Debian's package, or name one in $SAGE_NB_CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--font-render-hinting=none"])
        yield browser
        browser.close()


def watch(page, allowed: tuple[str, ...] = ("file:", "data:", "about:", "blob:")):
    "Everything that goes wrong in the page, from now on, in `page.problems`."
    page.problems = []

    def said(message):
        if message.type in ("error", "warning"): page.problems.append(f"{message.type}: {message.text}")

    def asked(request):
        if not request.url.startswith(allowed): page.problems.append(f"request: {request.url}")
    page.on("console", said)
    page.on("pageerror", lambda error: page.problems.append(f"exception: {error}"))
    page.on("request", asked)
    page.on("dialog", lambda dialog: (page.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    return page


@pytest.fixture
def browse(chromium, tmp_path):
    "browse(html) opens a page from a file, by default as wide as a desk; whatever goes wrong in it fails the test."
    contexts, pages = [], []

    def open_page(html: str, width: int = DESKTOP, dark: bool = False, scripts: bool = True, fragment: str = ""):
        whole = html if html.lstrip().lower().startswith("<!doctype") else in_page(html)
        path = tmp_path / f"page{len(pages)}.html"
        path.write_text(whole, encoding="utf-8")
        context = chromium.new_context(viewport={"width": width, "height": 900}, java_script_enabled=scripts,
                                       color_scheme="dark" if dark else "light")
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = watch(context.new_page())
        pages.append(page)
        page.goto(f"{path.as_uri()}{fragment}")
        return page
    yield open_page
    problems = [problem for page in pages for problem in page.problems]
    for context in contexts: context.close()
    assert not problems, "\n".join(["the page is not clean:", *problems])


def in_page(html: str, background: str = "#ffffff") -> str:
    "A page of someone else, with the HTML somewhere in it."
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape("a page")}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"></head>'
            f'<body style="background:{background}"><main><h1>A page</h1>{html}</main></body></html>')


def overflow(page) -> int:
    "By how many pixels the page is wider than the window."
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def axe_source() -> str | None:
    "axe-core: $SAGE_NB_AXE, or what npm put in the repository."
    places = [os.environ.get("SAGE_NB_AXE"), ROOT / "node_modules" / "axe-core" / "axe.min.js"]
    found = [Path(place) for place in places if place and Path(place).is_file()]
    return found[0].read_text(encoding="utf-8") if found else None


@pytest.fixture(scope="session")
def audit():
    "audit(page or frame) lists what axe-core finds fault with; skips where axe-core is not installed."
    source = axe_source()
    if source is None: pytest.skip("no axe-core here: npm install axe-core, or name its axe.min.js in $SAGE_NB_AXE")

    def faults(page, impacts: tuple[str, ...] = ("serious", "critical", "moderate")) -> list[str]:
        page.evaluate(source)
        found = page.evaluate("async () => (await axe.run()).violations")
        return [f"{v['impact']}: {v['help']} ({node['html'][:120]}; {node['failureSummary'][:200]})"
                for v in found if v["impact"] in impacts for node in v["nodes"]]
    return faults


# JupyterLab with a live kernel

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


QUIET = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}


def _own_folders(folder: Path) -> dict[str, str]:
    "The environment of a server that touches no one's settings, and imports this checkout."
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR",
             "IPYTHONDIR")
    for name, values in QUIET.items():
        path = folder / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    kept = {name: value for name, value in os.environ.items() if name != "JUPYTER_PREFER_ENV_PATH"}
    own = {name: str(folder / name) for name in names}
    return kept | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _wait_for(url: str, server: subprocess.Popen, log: Path):
    end = time.monotonic() + LAB_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None: raise RuntimeError(f"JupyterLab ended at once:\n{log.read_text()[-3000:]}")
        try:
            with urlopen(url, timeout=2): return
        except (URLError, OSError): time.sleep(0.2)
    raise TimeoutError(f"JupyterLab does not answer:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "The address of a JupyterLab on a free port, and the folder that it shows."
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: make test installs it")
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    shown, log = folder / "notebooks", folder / "log"
    shown.mkdir()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--ServerApp.disable_check_xsrf=True", "--IdentityProvider.token=",
               "--expose-app-in-browser", "--LabApp.news_url=None", f"--ServerApp.root_dir={shown}"]
    with open(log, "w") as out:
        server = subprocess.Popen(command, cwd=shown, env=_own_folders(folder), stdout=out, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status", server, log)
        yield f"http://127.0.0.1:{port}", shown
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill()


def write_notebook(path: Path, sources: list[str]):
    cells = [{"cell_type": "code", "id": f"cell{i}", "metadata": {}, "source": source, "outputs": [],
              "execution_count": None} for i, source in enumerate(sources)]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}))


RUN_ALL = """async () => {
    const panel = jupyterapp.shell.currentWidget;
    await panel.sessionContext.ready;
    await jupyterapp.commands.execute("notebook:run-all-cells");
    return panel.content.widgets.map((cell) => cell.model.outputs.toJSON())
        .flat().filter((output) => output.output_type === "error").map((output) => output.evalue);
}"""


@pytest.fixture
def notebook(lab, chromium):
    "notebook(cells) opens a notebook of these cells in JupyterLab, runs all of them, and returns the page."
    (address, folder), opened = lab, []

    def run(sources: list[str], width: int = DESKTOP, dark: bool = False):
        name = f"n{time.monotonic_ns()}.ipynb"
        write_notebook(folder / name, sources)
        context = chromium.new_context(viewport={"width": width, "height": 1000})
        context.set_default_timeout(1000 * LAB_SECONDS)
        page = context.new_page()
        opened.append(context)
        page.goto(f"{address}/lab/workspaces/{name[:-6]}/tree/{name}")
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext")
        if dark: page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        failed = page.evaluate(RUN_ALL)
        assert not failed, f"cells failed: {failed}"
        return page
    yield run
    for context in opened: context.close()
    shut_down_kernels(address)


def shut_down_kernels(address: str):
    with urlopen(f"{address}/api/kernels") as answer: kernels = json.load(answer)
    for kernel in kernels:
        with urlopen(Request(f"{address}/api/kernels/{kernel['id']}", method="DELETE")): pass
