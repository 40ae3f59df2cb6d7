"""The rules of the house that a program can check: each function takes source or cells and returns what breaks it."""
import ast
import io
import re
import tokenize

MAX_LINE, MAX_CELL, MAX_BODY = 120, 60, 40
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# Cells

def directives(source):
    "The words after `#|` at the top of a cell."
    for line in source.splitlines():
        if not (m := re.match(r"\s*#\s*\|\s*([\w-]*)", line)): return
        yield m[1]


def is_exported(cell):
    return cell["cell_type"] == "code" and not {"export", "exports"}.isdisjoint(directives(cell["source"]))


def is_hidden(cell): return "hide" in directives(cell["source"])


def parse(source):
    "The syntax tree of a cell; lines for the shell are left out, lines keep their numbers."
    return ast.parse(re.sub(r"^[%!].*", "", source, flags=re.M))


# Lines and statements

def long_lines(source):
    lines = enumerate(source.splitlines(), 1)
    return [f"line {n} has {len(line)}: {line.strip()[:60]}…" for n, line in lines if len(line) > MAX_LINE]


def tuple_statements(source):
    "Tuples that stand as statements: two things done on one line."
    return _statements(source, ast.Tuple)


def comprehension_statements(source):
    "Comprehensions that stand as statements: loops for what they do, not for what they make."
    return _statements(source, COMPREHENSIONS)


def _statements(source, kind):
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and isinstance(n.value, kind)]
    return [f"line {n.lineno}: {ast.unparse(n)}" for n in found]


def semicolons(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [f"line {t.start[0]}: {t.line.strip()}" for t in tokens if t.type == tokenize.OP and t.string == ";"]


# Functions and cells

def long_bodies(source):
    "Functions whose body, without the docstring, is longer than `MAX_BODY` lines."
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    return [f"{f.name} (line {f.lineno}) has {body_lines(f)}" for f in functions if body_lines(f) > MAX_BODY]


def body_lines(function):
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def long_cells(cells):
    "Exported cells longer than `MAX_CELL` lines, by their first definition or line."
    lengths = {cell["source"]: len(cell["source"].strip().splitlines()) for cell in cells if is_exported(cell)}
    return [f"the cell of {_title(source)} has {n}" for source, n in lengths.items() if n > MAX_CELL]


def _title(source): return next(iter(definitions(source)), source.strip().splitlines()[-1])


# Imports

def unused_imports(source):
    "Imported names that nothing uses. A name in an annotation that is a string is a use, the axes of a tensor are not."
    tree = ast.parse(source)
    unused = {name: line for name, line in _imported(tree, source.splitlines()) if name not in _used(tree)}
    return [f"line {line}: {name}" for name, line in unused.items()]


def _imported(tree, lines):
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or "noqa: F401" in lines[node.lineno - 1]: continue
        for alias in node.names: yield (alias.asname or alias.name).split(".")[0], node.lineno


def _used(tree):
    "Names that are read, listed in `__all__`, or named by an annotation that is a string."
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        for annotation in _annotations(node): names |= _quoted_names(annotation)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= set(ast.literal_eval(node.value))
    return names


def _annotations(node):
    if isinstance(node, (ast.arg, ast.AnnAssign)): return [node.annotation] if node.annotation else []
    return [node.returns] if isinstance(node, FUNCTIONS) and node.returns else []


def _quoted_names(annotation):
    "The names in strings of an annotation: those of \"Decomposition\", but not of Float[Tensor, \"prompt d_model\"]."
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _names_in(annotation.value)
    if isinstance(annotation, ast.Subscript) and _is_tensor(annotation): return set()
    return set().union(*map(_quoted_names, ast.iter_child_nodes(annotation)))


def _names_in(text):
    "The names in a piece of code; none if it is no code."
    try: tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError: return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _is_tensor(subscript):
    "Is it the type of a tensor with axes, `Float[Tensor, \"axes\"]`?"
    parts = getattr(subscript.slice, "elts", [])
    return len(parts) == 2 and isinstance(parts[1], ast.Constant) and isinstance(parts[1].value, str)


def imported_rooms(source, package="sage_nb", folder=""):
    "The rooms (`folder.word`) of the package that a module in `folder` imports, by whole or relative names."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from _inside(package, [alias.name for alias in node.names])
        if not isinstance(node, ast.ImportFrom): continue
        base = {0: None, 1: f"{package}.{folder}", 2: package}[node.level]
        module = ".".join(filter(None, [base, node.module]))
        is_room = module.count(".") >= 2
        yield from _inside(package, [module] if is_room else [f"{module}.{alias.name}" for alias in node.names])


def _inside(package, names):
    for name in names:
        if name.startswith(package + "."): yield name.removeprefix(package + ".")


# Public names, and whether a reader sees what they do

def definitions(source):
    "Public functions and classes defined at the top level."
    return [node.name for node in parse(source).body if isinstance(node, DEFINITIONS) and not node.name.startswith("_")]


def public_names(source):
    "Public functions, classes and constants of a module; what is patched into a class is a method of it."
    names = set()
    for statement in ast.parse(source).body:
        if isinstance(statement, DEFINITIONS) and not _is_patch(statement): names.add(statement.name)
        if isinstance(statement, ast.Assign): names |= _stored(statement.targets)
        if isinstance(statement, ast.AnnAssign): names |= _stored([statement.target])
    return {name for name in names if not name.startswith("_")}


def _is_patch(definition): return any(ast.unparse(d).split("(")[0] == "patch" for d in definition.decorator_list)


def _stored(targets):
    "The names that an assignment to these targets gives a value."
    nodes = [node for target in targets for node in ast.walk(target)]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def has_assertion(source):
    "Does the code assert: `assert`, or a call of a function named test_… or assert_…?"
    nodes = list(ast.walk(parse(source)))
    if any(isinstance(node, ast.Assert) for node in nodes): return True
    called = [ast.unparse(node.func).split(".")[-1] for node in nodes if isinstance(node, ast.Call)]
    return any(name.startswith(("test_", "assert_")) for name in called)


def unseen_definitions(cells):
    "Public definitions that no visible output or assertion follows before the next exported ones, or the end."
    unseen, waiting = [], []
    for cell in (c for c in cells if c["cell_type"] == "code" and not is_hidden(c)):
        if is_exported(cell) and (names := definitions(cell["source"])):
            unseen += waiting
            waiting = names
        elif not is_exported(cell) and (cell["outputs"] or has_assertion(cell["source"])): waiting = []
    return unseen + waiting


def hidden_assertions(cells):
    "The first lines of hidden cells that assert."
    code = [c["source"] for c in cells if c["cell_type"] == "code" and is_hidden(c) and has_assertion(c["source"])]
    return [next(line for line in source.splitlines() if not line.startswith("#|")) for source in code]
