"""The frame around the science: notebooks, modules, package and pins must say the same thing."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import house
import pytest
import yaml
from house import directives
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LIB = ROOT / "sage_nb"
NBDEV_DIRECTIVES = set("default_exp export exporti exports hide hide_line exec_doc filter_stream".split())
QUARTO_DIRECTIVES = set("eval echo output include warning error label layout-ncol fold".split())

cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def page(path): return path.relative_to(NBS).as_posix()


NOTEBOOKS = {page(p): p for p in sorted(NBS.rglob("*.ipynb")) if not re.search(r"(^|/)[._]", page(p))}
ROOM = re.compile(r"\d_(?P<folder>\w+)/(?P<number>\d\d)_(?P<word>\w+)\.ipynb")
MATCHES = {name: ROOM.fullmatch(name) for name in NOTEBOOKS if ROOM.fullmatch(name)}
ROOMS = {f"{m['folder']}.{m['word']}": NOTEBOOKS[name] for name, m in MATCHES.items()}  # folder.word -> notebook
NUMBERS = {f"{m['folder']}.{m['word']}": m["number"] for m in MATCHES.values()}
EXPORTED = [p for p in sorted(LIB.rglob("*.py")) if p.stem not in ("__init__", "_modidx")]
MODULES = {".".join(p.relative_to(LIB).with_suffix("").parts): p for p in EXPORTED}
SCRIPTS = sorted(p for folder in ("tests", "benchmarks", "scripts") for p in (ROOT / folder).glob("*.py"))
BY_HAND = {p.relative_to(ROOT).as_posix(): p for p in [LIB / "__init__.py", *SCRIPTS]}
each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)
each_room = pytest.mark.parametrize("room", ROOMS)
each_module = pytest.mark.parametrize("room", MODULES)


def cells(path, kind=None):
    "The notebook's cells (of one kind), source and outputs as they are saved."
    saved = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [dict(c, source="".join(c["source"])) for c in saved if kind in (None, c["cell_type"])]


def code_of(room): return MODULES[room].read_text(encoding="utf-8")


def installed(req):
    "None if the environment satisfies the requirement, else what is wrong."
    try: have = version(req.name)
    except PackageNotFoundError: return f"{req} is not installed"
    return None if req.specifier.contains(have.split("+")[0], prereleases=True) else f"{req}, but {have} is installed"


def dev_pins():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def runtime_requirements(): return [Requirement(r) for r in cfg["requirements"].split()]


# Notebooks and modules

def test_modules_are_rooms():
    assert ROOMS, "no room (nbs/N_folder/NN_word.ipynb) was found"
    assert set(MODULES) == set(ROOMS), \
        "nbs/N_folder/NN_word.ipynb exports sage_nb/folder/word.py and nothing else does: run `make export`"


def test_file_list_is_the_reading_order():
    assert len(set(NUMBERS.values())) == len(ROOMS), "two rooms have the same number"
    for room, path in ROOMS.items():
        assert path.parent.name[0] == NUMBERS[room][0], f"{page(path)}: a room's number starts with that of its folder"


@each_room
def test_room_anatomy(room):
    code = [c["source"] for c in cells(ROOMS[room], "code")]
    assert re.search(rf"^#\|\s*default_exp {re.escape(room)}$", "\n".join(code), re.M), f"its default_exp is not {room}"
    last = code[-1]
    assert "nbdev_export()" in last and "hide" in directives(last), "the last code cell is a hidden nbdev_export()"


@each_notebook
def test_first_cell_is_title_and_promise(name):
    title, *rest = [line for line in cells(NOTEBOOKS[name])[0]["source"].splitlines() if line.strip()]
    assert re.match(r"# \S", title), "the first cell starts with `# title`"
    prose = [line for line in rest if not re.match(r"- \w+: ", line)]  # `- key: value` is metadata for nbdev
    assert len(prose) == 1 and prose[0].startswith("> "), \
        "the first cell is `# title` and one `> promise`: the doc site drops anything else that stands there"


@each_notebook
def test_directives_are_known(name):
    known = NBDEV_DIRECTIVES | QUARTO_DIRECTIVES | set(cfg["tst_flags"].split())
    used = {d for c in cells(NOTEBOOKS[name], "code") for d in directives(c["source"])}
    unknown = {d for d in used - known if not d.startswith(("fig-", "tbl-", "code-"))}
    assert not unknown, f"nbdev ignores a directive it does not know, so a typo here loses a cell: {unknown}"


@each_room
def test_room_imports_only_lower_rooms(room):
    code = "\n".join(c["source"] for c in cells(ROOMS[room], "code"))
    imported = re.findall(r"^\s*(?:from|import)\s+sage_nb\.([\w.]+)", code, re.M)
    upward = {r for r in imported if r != room and NUMBERS.get(r, "99") >= NUMBERS[room]}
    assert not upward, f"imports what is not below it: {upward}"
    whole = re.findall(r"^\s*(?:from\s+sage_nb\s|import\s+sage_nb\s*$)", code, re.M)
    assert not whole or room == max(NUMBERS, key=NUMBERS.get), "a room, but for the last, names the rooms that it needs"


def test_folders_have_one_number_each():
    numbered = {path.parent.name for path in ROOMS.values()}
    numbers = {name.partition("_")[0] for name in numbered}
    words = {name.partition("_")[2] for name in numbered}
    assert len(numbers) == len(numbered), f"two folders share a number: {sorted(numbered)}"
    assert len(words) == len(numbered), f"a folder has two numbers: {sorted(numbered)}"


@each_module
def test_folders_import_only_folders_before_them(room):
    order = {other.split(".")[0]: NUMBERS[other][0] for other in NUMBERS}
    folder = room.split(".")[0]
    imported = {r.split(".")[0] for r in house.imported_rooms(code_of(room), folder=folder)}
    later = {other for other in imported if order.get(other, "9") > order[folder]}
    assert not later, f"{folder} comes before {later}: move what is needed down, or the room up"


@each_room
def test_imports_stand_alone(room):
    for cell in cells(ROOMS[room], "code"):
        used = set(directives(cell["source"]))
        if used & {"export", "exports", "exporti", "eval"} or "nbdev_export()" in cell["source"]: continue
        if re.match(r"\s*[%!]", cell["source"]): continue
        kinds = {type(node) for node in ast.walk(ast.parse(cell["source"]))}
        assert not (kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign, ast.Assert}), \
            f"the docs run cells that import, but not those before them: give imports their own cell\n{cell['source']}"


def test_imports_are_declared():
    declared = {canonicalize_name(r.name) for r in runtime_requirements()}
    distributions = packages_distributions()
    missing = set()
    for path in [LIB / "__init__.py", *MODULES.values()]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            ours = {"sage_nb", "ray", "distributed"}  # the last two are extras
            for top in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - ours:
                if not declared & {canonicalize_name(d) for d in distributions.get(top, [top])}:
                    missing.add(f"{path.name}: {top}")
    assert not missing, f"imported, but not in `requirements` in settings.ini: {sorted(missing)}"


# The house: what keeps code readable

TOO_WIDE = f"at most {house.MAX_LINE} characters a line of code: give a part of it a name"


def findings(items, remedy):
    "An assertion message: what to do, and where."
    return "\n  ".join([remedy, *map(str, items)])


@each_notebook
def test_lines_of_code_cells_are_short(name):  # exported modules consist of such cells
    lines = [line for cell in cells(NOTEBOOKS[name], "code") for line in house.long_lines(cell["source"])]
    assert not lines, findings(lines, TOO_WIDE)


@pytest.mark.parametrize("file", BY_HAND)
def test_lines_of_files_written_by_hand_are_short(file):
    lines = house.long_lines(BY_HAND[file].read_text(encoding="utf-8"))
    assert not lines, findings(lines, TOO_WIDE)


@each_module
def test_one_statement_a_line(room):
    code = code_of(room)
    crowded = house.tuple_statements(code) + house.semicolons(code)
    assert not crowded, findings(crowded, "one statement a line: no tuple as a statement, no semicolon")
    loops = house.comprehension_statements(code)
    assert not loops, findings(loops, "a comprehension makes something; what only does something is a for loop")


@each_module
def test_function_bodies_are_short(room):
    bodies = house.long_bodies(code_of(room))
    assert not bodies, findings(bodies, f"at most {house.MAX_BODY} lines a body: give its parts names")


@each_room
def test_exported_cells_are_short(room):
    long = house.long_cells(cells(ROOMS[room]))
    assert not long, findings(long, f"at most {house.MAX_CELL} lines an exported cell: cut it between ideas")


@each_module
def test_imports_are_used(room):
    unused = house.unused_imports(code_of(room))
    assert not unused, findings(unused, "imported and not used: delete it, or say why with `# noqa: F401  reason`")


@each_room
def test_room_says_its_limits(room):
    prose = "\n".join(c["source"] for c in cells(ROOMS[room], "markdown"))
    assert re.search(r"^## Limits$", prose, re.M), "a room has a section `## Limits`: when does the number mislead?"


@each_room
def test_every_public_definition_is_shown(room):
    unseen = house.unseen_definitions(cells(ROOMS[room]))
    assert not unseen, findings(unseen, "show it or assert something about it in a visible cell before the next export")


@each_room
def test_assertions_are_visible(room):
    hidden = house.hidden_assertions(cells(ROOMS[room]))
    assert not hidden, findings(hidden, "tests beside the code are documentation: hide fixtures and imports only")


def test_public_names_live_in_one_room():
    homes = {}
    for room in MODULES:
        for name in house.public_names(code_of(room)): homes.setdefault(name, []).append(room)
    twice = {name: rooms for name, rooms in homes.items() if len(rooms) > 1}
    assert not twice, findings(twice.items(), "two rooms define it: keep it in the lower one, or give it two names")


# What is saved in notebooks

@each_notebook
def test_notebook_is_small(name):
    size, limit = NOTEBOOKS[name].stat().st_size, 100_000 if NOTEBOOKS[name] in ROOMS.values() else 500_000
    if name.startswith(("7_views/", "9_lab/98")): limit = 300_000  # an explorer is saved whole, with scripts and data
    assert size <= limit, f"{size:,} bytes; at most {limit:,}: save smaller pictures or shorter tables"


@each_notebook
def test_saved_outputs(name):
    for cell in cells(NOTEBOOKS[name], "code"):
        outs, where = cell["outputs"], f"\nin the output of the cell\n{cell['source']}"
        assert not any(o["output_type"] == "error" for o in outs), "a saved error" + where
        assert not any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outs), \
            "a saved widget view, whose id changes at every run: show its static form" + where
        texts = [o.get("text", "") for o in outs]
        texts += [v for o in outs for kind, v in o.get("data", {}).items() if not kind.startswith("image/")]
        text = "\n".join("".join(t) if isinstance(t, (str, list)) else json.dumps(t) for t in texts)
        private = re.search(rf"/home/\w+|/Users/\w+|/root/\w*|[A-Z]:\\+Users|/tmp/tmp\w+|{re.escape(str(ROOT))}/", text)
        assert not private, f"a path of this machine: {private[0]}" + where


# Docs

def sidebar(node):
    "All files named below a node of the sidebar, folders' globs expanded."
    if isinstance(node, str): return [page(p) for p in sorted(NBS.glob(node))] or ([] if "*" in node else [node])
    if isinstance(node, dict): return sidebar(node["contents"])
    return [f for child in node for f in sidebar(child)]


def test_sidebar_lists_every_notebook():
    listed = sidebar(yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"])
    assert not set(NOTEBOOKS) - set(listed), "not in the sidebar in _quarto.yml"
    made = {"api.qmd", "changelog.qmd"}  # by scripts/pages.py
    assert not set(listed) - set(NOTEBOOKS) - made, "in the sidebar in _quarto.yml, but there is no such notebook"
    rooms = [f for f in listed if ROOM.fullmatch(f)]
    assert rooms == sorted(rooms), "the sidebar's rooms are not in the order of their numbers"


def test_index_lists_every_room():
    prose = "\n".join(c["source"] for c in cells(NOTEBOOKS["index.ipynb"], "markdown"))
    missing = [page(path) for path in ROOMS.values() if f"]({page(path)})" not in prose]
    assert not missing, findings(missing, "not in the table of nbs/index.ipynb: say there what the room holds")


def test_quarto_file_is_linked():
    link = NBS / "_quarto.yml"
    assert link.is_symlink() and link.resolve() == ROOT / "_quarto.yml", \
        "nbs/_quarto.yml is a link to ../_quarto.yml, so that there is one file to edit"


@each_notebook
def test_links_lead_somewhere(name):
    blob = f"https://github.com/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/"
    broken = []
    for cell in cells(NOTEBOOKS[name], "markdown"):
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", cell["source"], flags=re.M | re.S)
        for url in re.findall(r"\]\(([^)\s#]+)", prose):
            if "://" in url and not url.startswith(blob): continue
            target = ROOT / url.removeprefix(blob) if url.startswith(blob) else NOTEBOOKS[name].parent / url
            if not target.exists(): broken.append(url)
    assert not broken, f"links to files that do not exist: {broken}"


def test_readme_is_in_sync():
    done = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Package and environment

def test_archives_hold_the_embedded_weights(tmp_path):
    for name in "setup.py pyproject.toml settings.ini MANIFEST.in README.md LICENSE CHANGELOG.md".split():
        shutil.copy(ROOT / name, tmp_path / name)
    embedded = {"embedded/README.md", "embedded/models/m/model.safetensors", "embedded/saes/m/blocks.0/cfg.json"}
    shipped = [*LIB.glob("embedded/**/*"), *LIB.glob("views/assets/*")]  # weights, and what explorers are drawn with
    embedded |= {p.relative_to(LIB).as_posix() for p in shipped if p.is_file()}
    for file in {"__init__.py", *embedded}:
        path = tmp_path / "sage_nb" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    build = [sys.executable, "-c", "import setuptools, runpy; runpy.run_path('setup.py')", "-q", "sdist", "bdist_wheel"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob("dist/*.whl")
    sdist, = tmp_path.glob("dist/*.tar.gz")
    in_wheel = {n.removeprefix("sage_nb/") for n in zipfile.ZipFile(wheel).namelist()}
    in_sdist = {n.partition("/sage_nb/")[2] for n in tarfile.open(sdist).getnames()}
    assert embedded <= in_wheel, f"not in the wheel (package_data in setup.py): {embedded - in_wheel}"
    assert embedded <= in_sdist, f"not in the source archive (MANIFEST.in): {embedded - in_sdist}"


def test_embedded_weights_are_safe_and_small():
    files = [p for p in LIB.glob("embedded/**/*") if p.is_file()]
    unsafe = [p.name for p in files if p.suffix not in {".safetensors", ".json", ".md"}]
    assert not unsafe, f"only safetensors, json and md files are embedded, and no pickles: {unsafe}"
    size = sum(p.stat().st_size for p in files)
    assert size <= 20e6, f"{size / 1e6:.1f} MB of embedded weights; at most 20"


def test_every_python_that_is_claimed_is_tested():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    claimed = ast.literal_eval(re.search(r"^py_versions = (.*)$", setup, re.M)[1])
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == claimed, f"setup.py claims Python {claimed}, test.yml tests {matrix['python']}"
    assert claimed[0] == cfg["min_python"], "settings.ini and setup.py start with different versions of Python"


def test_environment_has_the_pins():
    pins = dev_pins()
    loose = [str(r) for r in pins if [s.operator for s in r.specifier] != ["=="]]
    assert not loose, f"requirements-dev.txt pins everything with ==: {loose}"
    wrong = [w for w in map(installed, pins) if w]
    assert not wrong, f"the environment is not what requirements-dev.txt says: {wrong}"


def test_pins_are_within_the_ranges():
    pins = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in dev_pins()}
    for req in runtime_requirements():
        pin = pins.get(canonicalize_name(req.name))
        assert pin, f"{req.name} is in settings.ini, but has no pin in requirements-dev.txt"
        assert req.specifier.contains(pin), f"settings.ini asks for {req}, requirements-dev.txt pins {pin}"


@pytest.mark.skipif(not os.environ.get("CI"), reason="a developer's checkout may hold uncommitted work")
def test_nothing_is_left_behind():
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout, f"notebooks or tests left files in the checkout:\n{done.stdout}"
