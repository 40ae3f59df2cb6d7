"""What the public names of sage_nb are, read from the exported modules without running them, as HTML for the doc site.

nbdev's own renderer runs each notebook's imports and prints `def Task(...)->None` with comments; this one shows a class
as a class, with its fields and methods, and what a parameter means in a table.
"""
import ast
import io
import posixpath
import re
import tokenize
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WIDE = 84  # characters of a signature that still stand on one line
CLASS_KINDS = {"NamedTuple": "named tuple", "Protocol": "protocol", "Exception": "error", "ValueError": "error",
               "RuntimeError": "error", "Enum": "choice"}


@dataclass(frozen=True)
class Param:
    "A parameter of a function, a field of a class, or what is returned (no name)."
    name: str
    type: str = ""
    default: str = ""
    meaning: str = ""
    stars: str = ""
    only_by_name: bool = False


@dataclass
class Symbol:
    "A public name of a module, or a public method of a class in it."
    name: str  # Task, Task.edit
    kind: str  # function, class, method, property, constant
    module: str  # tasks.task
    page: str  # 2_tasks/task.html
    file: str  # sage_nb/tasks/task.py
    line: int
    doc: str = ""
    params: list[Param] = field(default_factory=list)
    returns: Param | None = None
    bases: list[str] = field(default_factory=list)
    what: str = ""  # of a class: dataclass, named tuple …; of a method: class method …
    methods: list["Symbol"] = field(default_factory=list)
    patched: bool = False  # a method that is defined in a cell of its own
    value: str = ""  # of a constant
    anchor: str = ""

    def __post_init__(self): self.anchor = self.name.lower()  # as nbdev has it, for the indices of other projects

    @property
    def short(self) -> str: return self.name.rpartition(".")[2]

    @property
    def summary(self) -> str: return self.doc.split("\n\n")[0]


# Reading a module

def comments(source: str) -> dict[int, str]:
    "Line -> the comment at its end, or that fills it."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}


def unquoted(annotation: ast.expr | None) -> str:
    "An annotation as it is read: without the quotes around names, with those around the axes of a tensor."
    if annotation is None: return ""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str): return annotation.value
    if isinstance(annotation, ast.BinOp):
        return f"{unquoted(annotation.left)} | {unquoted(annotation.right)}"
    if not isinstance(annotation, ast.Subscript): return ast.unparse(annotation)
    parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if ast.unparse(annotation.value) == "Literal": return " | ".join(map(ast.unparse, parts)).replace("'", '"')
    of_tensor = len(parts) == 2 and isinstance(parts[1], ast.Constant)
    inner = [ast.unparse(part).replace("'", '"') if of_tensor else unquoted(part) for part in parts]
    return f"{ast.unparse(annotation.value)}[{', '.join(inner)}]"


def default_of(value: ast.expr | None) -> str:
    "A default as it is read: what a factory makes, no `<factory>`."
    if value is None: return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in given: return default_of(given["default"])
        factory = given.get("default_factory")
        if isinstance(factory, ast.Lambda): return default_of(factory.body)
        return f"{ast.unparse(factory)}()".replace("dict()", "{}").replace("list()", "[]") if factory else ""
    return re.sub(r"^'(.*)'$", r'"\1"', ast.unparse(value))


def doc_of(node) -> str: return ast.get_docstring(node) or ""


class Reader:
    "The public names of one module."

    def __init__(self, source: str, module: str, file: str, page: str):
        self.source, self.tree, self.said = source, ast.parse(source), comments(source)
        self.where = {"module": module, "file": file, "page": page}

    def param(self, arg: ast.arg, value=None, last: bool = True, **how) -> Param:
        end = max(node.end_lineno for node in (arg, arg.annotation, value) if node is not None)
        meaning = self.said.get(end, "") if last else ""
        return Param(arg.arg, unquoted(arg.annotation), default_of(value), meaning, **how)

    def params(self, function) -> list[Param]:
        "What can be given to a function; its comment counts where the parameter stands alone on its line."
        a = function.args
        plain = [*a.posonlyargs, *a.args]
        values = [None] * (len(plain) - len(a.defaults)) + a.defaults
        given = [(arg, value, {}) for arg, value in zip(plain, values)]
        if a.vararg: given.append((a.vararg, None, {"stars": "*"}))
        given += [(arg, value, {"only_by_name": True}) for arg, value in zip(a.kwonlyargs, a.kw_defaults)]
        if a.kwarg: given.append((a.kwarg, None, {"stars": "**"}))
        lines = [arg.lineno for arg, _, _ in given]
        alone = {line for line in lines if lines.count(line) == 1 and line != function.lineno}
        return [self.param(arg, value, arg.lineno in alone, **how) for arg, value, how in given]

    def returned(self, function) -> Param | None:
        "What a function gives back; a comment counts where the body begins below it."
        if function.returns is None: return None
        end = function.returns.end_lineno
        own_line = function.body[0].lineno > end and end > function.lineno
        return Param("", unquoted(function.returns), meaning=self.said.get(end, "") if own_line else "")

    def function(self, node, owner: str = "") -> Symbol:
        decorators = [ast.unparse(d) for d in node.decorator_list]
        is_property = any(d in ("property", "cached_property") or "as_prop=True" in d for d in decorators)
        kind = "property" if owner and is_property else "method" if owner else "function"
        what = "class method" if {"classmethod"} & set(decorators) or any("cls_method=True" in d for d in decorators) \
            else "static method" if "staticmethod" in decorators else "context manager" \
            if "contextmanager" in decorators else ""
        params = self.params(node)
        if owner and what != "static method": params = params[1:]
        name = f"{owner}.{node.name}" if owner else node.name
        return Symbol(name, kind, **self.where, line=node.lineno, doc=doc_of(node), params=params,
                      returns=self.returned(node), what=what)

    def class_(self, node: ast.ClassDef) -> Symbol:
        bases = [ast.unparse(base) for base in node.bases]
        decorators = [ast.unparse(d) for d in node.decorator_list]
        made = next((d for d in decorators if d.split("(")[0] == "dataclass"), None)
        what = ("frozen " if "frozen=True" in made else "") + "dataclass" if made else \
            next((CLASS_KINDS[base] for base in bases if base in CLASS_KINDS), "class")
        symbol = Symbol(node.name, "class", **self.where, line=node.lineno, doc=doc_of(node), bases=bases, what=what)
        functions = [f for f in node.body if isinstance(f, FUNCTIONS)]
        if made or "NamedTuple" in bases or "Protocol" in bases: symbol.params = self.fields(node)
        for f in functions:
            if f.name == "__init__": symbol.params = self.params(f)[1:]
            elif is_public(f.name) or is_dunder(f.name) and doc_of(f):
                symbol.methods.append(self.function(f, node.name))
        return symbol

    def fields(self, node: ast.ClassDef) -> list[Param]:
        return [Param(f.target.id, unquoted(f.annotation), default_of(f.value), self.said.get(f.end_lineno, ""))
                for f in node.body if isinstance(f, ast.AnnAssign) and is_public(f.target.id)]

    def constants(self, node) -> list[Symbol]:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        value = "" if node.value is None else ast.unparse(node.value)
        if len(names) > 1: value = ""
        doc = self.said.get(node.end_lineno) or self.said.get(node.lineno) or ""
        return [Symbol(name, "constant", **self.where, line=node.lineno, doc=doc, value=value)
                for name in names if is_public(name)]

    def symbols(self) -> list[Symbol]:
        "All of them, in the order of the module; patched methods by `Class.method`."
        found = {}
        for node in self.tree.body:
            new = []
            if isinstance(node, ast.ClassDef) and is_public(node.name): new = [self.class_(node)]
            elif isinstance(node, FUNCTIONS): new = self.defined(node)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)): new = self.constants(node)
            for symbol in new: found.setdefault(symbol.name, symbol)
        return list(found.values())

    def defined(self, node) -> list[Symbol]:
        "A function, or the methods that `@patch` makes of it."
        if not any(ast.unparse(d).split("(")[0] == "patch" for d in node.decorator_list):
            return [self.function(node)] if is_public(node.name) else []
        owners = unquoted(node.args.args[0].annotation).split(" | ")
        if not is_public(node.name) and not (is_dunder(node.name) and doc_of(node)): return []
        methods = [self.function(node, owner) for owner in owners if is_public(owner)]
        for method in methods: method.patched = True
        return methods


def is_public(name: str) -> bool: return not name.startswith("_")


def is_dunder(name: str) -> bool: return name.startswith("__") and name.endswith("__")


# The package

CODE = re.compile(r"(!?\[(?:[^\[\]`]|`[^`]*`)*\]\([^)]*\)|``.+?``)|`([^`\n]+)`")
NAME = re.compile(r"[A-Za-z_][\w.]*")


def page_of(source: str) -> str | None:
    "The page of the site that a module's notebook becomes."
    made = re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", source)
    if not made: return None
    folder, _, name = made[1].rpartition("/")
    return f"{folder}/{re.sub(r'^[0-9]+[a-zA-Z0-9]*_', '', name.lower())}.html"


class Library:
    "The public names of the package, and where each of them stands on the site."

    def __init__(self, symbols: list[Symbol], homes: dict[str, str] | None = None, package: str = "sage_nb",
                 repository: str = ""):
        self.symbols, self.homes, self.package, self.repository = symbols, homes or {}, package, repository
        self.named, self.pages = {}, {}
        for symbol in symbols:
            for name in {symbol.name, f"{symbol.module}.{symbol.name}"}: self.named.setdefault(name, []).append(symbol)
            self.pages.setdefault(symbol.module, symbol.page)
        classes = {symbol.name: symbol for symbol in symbols if symbol.kind == "class"}
        self._tell_apart()
        for symbol in classes.values(): self._inherit(symbol, classes)
        for method in [s for s in symbols if s.patched]:
            owner = classes.get(method.name.partition(".")[0])
            if owner and method not in owner.methods: owner.methods.append(method)
        for owner in classes.values():
            for method in owner.methods:
                if not method.patched: self.named.setdefault(method.name, []).append(method)

    def _tell_apart(self):
        "`Certificate` and `certificate` stand on one page: the class keeps its capital."
        taken = {(s.page, s.anchor) for s in self.symbols if s.name == s.name.lower()}
        for symbol in self.symbols:
            if symbol.name != symbol.anchor and (symbol.page, symbol.anchor) in taken: symbol.anchor = symbol.name

    def _inherit(self, symbol: Symbol, classes: dict[str, Symbol]):
        "A dataclass also has the fields of those that it is a kind of."
        for base in symbol.bases:
            if base not in classes or "dataclass" not in symbol.what: continue
            own = {p.name: p for p in symbol.params}
            before = [own.pop(p.name, p) for p in classes[base].params]
            symbol.params = before + list(own.values())

    @cached_property
    def modules(self) -> list[str]: return sorted(self.pages, key=lambda module: self.pages[module])

    def on(self, page: str) -> list[Symbol]: return [s for s in self.symbols if s.page == page]

    def find(self, name: str, page: str = "") -> Symbol | None:
        "What a name means on a page: what the page defines, else what the package exports, else the only one there is."
        name = name.removeprefix(f"{self.package}.")
        found = self.named.get(name, [])
        for near in ([s for s in found if s.page == page], [s for s in found if self.homes.get(name) == s.module]):
            if near: return near[0]
        return found[0] if len(found) == 1 else None

    def address(self, name: str, page: str = "") -> str | None:
        "The address of a name or a module, as seen from a page of the site."
        symbol, module = self.find(name, page) or self._field(name, page), name.removeprefix(f"{self.package}.")
        target = f"{symbol.page}#{symbol.anchor}" if symbol else self.pages.get(module) if "." in module else None
        if target is None or target == page: return None
        if symbol and symbol.page == page: return f"#{symbol.anchor}"
        return posixpath.relpath(target, posixpath.dirname(page) or ".")

    def _field(self, name: str, page: str) -> Symbol | None:
        "The class of a field, for `Class.field`."
        owner, _, short = name.rpartition(".")
        symbol = self.find(owner, page) if owner else None
        return symbol if symbol and short in {p.name for p in symbol.params} and symbol.kind == "class" else None

    def source(self, symbol: Symbol) -> str: return f"{self.repository}/{symbol.file}#L{symbol.line}"

    # Markdown of notebooks

    def linked(self, text: str, page: str) -> str:
        "Markdown whose backticked names lead to their definitions, but for headings, code and what is a link already."
        lines, fenced = text.split("\n"), False
        for i, line in enumerate(lines):
            if re.match(r"\s*(```|~~~|:::)", line): fenced = fenced != (":::" not in line)
            elif not fenced and not line.startswith(("#", "    ", "\t", "<")):
                lines[i] = CODE.sub(lambda m: m[0] if m[1] else self._link(m[2], page), line)
        return "\n".join(lines)

    def _link(self, code: str, page: str) -> str:
        address = self._of_code(code, page)
        return f"[`{code}`]({address})" if address else f"`{code}`"

    def _of_code(self, code: str, page: str) -> str | None:
        "The address of a name, or of a name with a call behind it."
        name = NAME.match(code)
        rest = code[name.end():] if name else None
        if rest is None or rest and not re.fullmatch(r"\(.*\)", rest): return None
        return self.address(name[0], page)

    def inline(self, text: str, page: str) -> str:
        "A sentence of a docstring or a comment as HTML."
        parts = re.split(r"`+([^`\n]+)`+", text)
        return "".join(escape(part, quote=False) if i % 2 == 0 else self._code(part, page)
                       for i, part in enumerate(parts))

    def _code(self, code: str, page: str) -> str:
        address, shown = self._of_code(code, page), f"<code>{escape(code, quote=False)}</code>"
        return f'<a href="{address}">{shown}</a>' if address else shown

    def type_html(self, text: str, page: str) -> str:
        "A type as code, each class of the package in it a link, with places to break at."
        def name(m):
            symbol = self.find(m[0], page)
            if not symbol or symbol.kind != "class": return m[0]
            return f'<a href="{self.address(m[0], page) or "#" + symbol.anchor}">{m[0]}</a>'
        pieces = re.split(r'("[^"]*")', text)
        html = "".join(escape(piece, quote=False) if i % 2 else NAME.sub(name, escape(piece, quote=False))
                       for i, piece in enumerate(pieces))
        return f"<code>{html.replace(' | ', ' | <wbr>')}</code>" if text else ""


# HTML of a symbol

def call(symbol: Symbol) -> list[str]:
    "The parts between the parentheses of a signature: names and defaults; types are in the table."
    parts, by_name = [], False
    for p in symbol.params:
        if p.stars == "*": by_name = True
        if p.only_by_name and not by_name:
            parts.append("*")
            by_name = True
        parts.append(f"{p.stars}{p.name}" + (f"={shortened(p.default)}" if p.default else ""))
    return parts


def shortened(text: str, limit: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit - 1] + "…"


def signature(symbol: Symbol, library: Library, address: str | None = None) -> str:
    "A name as it is called, in HTML: on one line where that fits, else one parameter a line."
    word = "class " if symbol.kind == "class" else ""
    parts = [escape(part, quote=False) for part in call(symbol)]
    name = f"<b>{symbol.short}</b>"
    head = f'<span class="api-word">{word}</span>' * bool(word)
    head += f'<a href="{address}">{name}</a>' if address else name
    back = symbol.returns.type if symbol.returns and symbol.returns.type != "None" else ""
    arrow = f" → {library.type_html(back, symbol.page)[6:-7]}" if back else ""
    if symbol.kind == "property": return f"<code>{head}{arrow}</code>"
    one = len(word + symbol.short + ", ".join(call(symbol)) + back) + 6 <= WIDE
    inside = ", ".join(parts) if one else "\n    " + ",\n    ".join(parts) + ",\n"
    return f"<code>{head}({inside}){arrow}</code>"


def table(symbol: Symbol, library: Library, title: str) -> str:
    "Parameters or fields: name, type, default, meaning; a column that says nothing is left out."
    rows = [p for p in symbol.params if p.type or p.meaning or symbol.kind == "class"]
    back = symbol.returns
    if back and back.meaning: rows = [*rows, back]
    if not rows: return ""
    columns = {title: lambda p: f"<code>{p.stars}{p.name}</code>" if p.name else "<i>returns</i>",
               "Type": lambda p: library.type_html(p.type, symbol.page),
               "Default": lambda p: f"<code>{escape(shortened(p.default), quote=False)}</code>" if p.default else "",
               "Meaning": lambda p: library.inline(p.meaning, symbol.page)}
    shown = {name: [of(p) for p in rows] for name, of in columns.items()}
    shown = {name: cells for name, cells in shown.items() if any(cells)}
    head = "".join(f'<th scope="col">{name}</th>' for name in shown)
    starts = {"Default": '<td class="default">', "Meaning": '<td class="meaning">'}
    rows = ("".join(f"{starts.get(name, '<td>')}{cell}</td>" for name, cell in zip(shown, row))
            for row in zip(*shown.values()))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="api-params"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def paragraphs(symbol: Symbol, library: Library) -> str:
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", symbol.doc) if block.strip()]
    return "".join(f"<p>{library.inline(block, symbol.page)}</p>" for block in blocks)


def method_item(method: Symbol, library: Library, page: str) -> str:
    "A method in the list of its class: how it is called, and one line."
    note = f' <span class="api-what">{method.what or method.kind}</span>' \
        if method.what or method.kind == "property" else ""
    if method.patched and method.short[0] != "_":
        address = library.address(method.name, page)
        return (f"<dt>{signature(method, library, address)}{note}</dt>"
                f"<dd>{library.inline(method.summary, page)}</dd>")
    meanings = table(method, library, "Parameter") if any(p.meaning for p in method.params) else ""
    return (f'<dt id="{method.anchor}">{signature(method, library)}{note}</dt>'
            f"<dd>{library.inline(method.summary, page)}{meanings}</dd>")


def methods_html(symbol: Symbol, library: Library) -> str:
    "The methods of a class, and which more it has from classes of the package that it is a kind of."
    items = "".join(method_item(m, library, symbol.page) for m in symbol.methods)
    html = f'<p class="api-head">Methods</p><dl class="api-methods">{items}</dl>' if items else ""
    for base in symbol.bases:
        parent = library.find(base, symbol.page)
        if not parent or not parent.methods: continue
        own = {m.short for m in symbol.methods}
        more = [m for m in parent.methods if m.short not in own]
        names = ", ".join(library._code(m.name, symbol.page) for m in more)
        if names: html += f"<p>From <code>{base}</code>: {names}</p>"
    return html


def about_class(symbol: Symbol, library: Library) -> str:
    kinds = [base for base in symbol.bases if base not in CLASS_KINDS or base.endswith(("Error", "Exception"))]
    of = f", a kind of {', '.join(library.type_html(base, symbol.page) for base in kinds)}" if kinds else ""
    return f'<p class="api-what">{symbol.what}{of}</p>' if symbol.what != "class" or of else ""


def body(symbol: Symbol, library: Library) -> str:
    "All there is to say of a symbol, below its heading."
    source = f'<a class="api-source" href="{library.source(symbol)}">source</a>'
    if symbol.kind == "constant":
        value = f" = {escape(shortened(symbol.value, 240), quote=False)}" if symbol.value else ""
        said = f"<p>{library.inline(symbol.doc, symbol.page)}</p>" if symbol.doc else ""
        return f'{source}<pre class="api-signature api-value"><code><b>{symbol.name}</b>{value}</code></pre>{said}'
    title = "Field" if symbol.kind == "class" and symbol.what != "class" else "Parameter"
    what = about_class(symbol, library) if symbol.kind == "class" else \
        f'<p class="api-what">{symbol.what or symbol.kind}</p>' if symbol.what or symbol.kind == "property" else ""
    return (f'{source}<pre class="api-signature">{signature(symbol, library)}</pre>{what}'
            f"{paragraphs(symbol, library)}{table(symbol, library, title)}{methods_html(symbol, library)}")


def entry(symbol: Symbol, library: Library, level: int = 3) -> str:
    "A symbol in markdown: its heading, for the contents and the search, and its HTML."
    return (f"{'#' * level} {symbol.name} {{#{symbol.anchor} .api-name}}\n\n"
            f'```{{=html}}\n<div class="api">{body(symbol, library)}</div>\n```')


def index(library: Library, titles: dict[str, str]) -> str:
    "The page of all public names, folder by folder and room by room."
    parts, folder = [], None
    for module in library.modules:
        if module.split(".")[0] != folder:
            folder = module.split(".")[0]
            parts.append(f"## {titles.get(folder, folder.title())}\n")
        page = library.pages[module]
        rows = "".join(f'<tr><td><a href="{page}#{s.anchor}"><code>{s.name}</code></a></td><td>{s.what or s.kind}</td>'
                       f"<td>{library.inline(s.summary, 'api.html')}</td></tr>"
                       for s in library.on(page) if not s.patched)
        parts.append(f"### [{module}]({page}) {{#{module}}}\n\n```{{=html}}\n"
                     f'<table class="api-index"><tbody>{rows}</tbody></table>\n```\n')
    return "\n".join(parts)


def read_package(root: Path, package: str = "sage_nb", repository: str = "") -> Library:
    "The library of a checkout."
    symbols = []
    for path in sorted((root / package).glob("*/*.py")):
        source = path.read_text(encoding="utf-8")
        page = page_of(source)
        if page is None: continue
        module, file = f"{path.parent.name}.{path.stem}", path.relative_to(root).as_posix()
        symbols += Reader(source, module, file, page).symbols()
    tree = ast.parse((root / package / "__init__.py").read_text(encoding="utf-8"))
    homes = next((ast.literal_eval(node.value) for node in tree.body
                  if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"), {})
    return Library(symbols, homes, package, repository)
