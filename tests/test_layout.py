"""The package is laid out as docs/design.md says: imports point downward, and nothing is too large.

`TABLE` is the layout. Imports are read from the source, so those inside functions and those for
type annotations count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median

import qitos_mlflow

ROOT = Path(qitos_mlflow.__file__).parent
BELOW = "all below"

TABLE: dict[str, tuple[str, ...]] = {
    "cli": (BELOW,),
    "__init__": (BELOW,),
    "auto": (BELOW,),
    "_startup": (BELOW,),
    "wiring": (BELOW,),
    "mlflow_plugin": (
        "mlflow_plugin.fluent",
        "mlflow_plugin.mapping",
        "mlflow_plugin.sink",
        "mlflow_plugin.server",
        "recording",
        "plugins",
        "bridge",
        "tracing",
        "delivery",
        "redaction",
        "settings",
    ),
    "comparison": ("mlflow_plugin.mapping",),
    "mlflow_plugin.fluent": (
        "mlflow_plugin.mapping",
        "mlflow_plugin.server.tracking_uri",
        "mlflow_plugin.server.pages",
        "recording.normalize",  # What MLflow's own tracer gets is redacted, too, ...
        "recording.pictures",  # ... and its pictures are apart.
        "recording.to_json",
        "redaction.redact",
        "settings",
    ),
    "mlflow_plugin.sink": (
        "mlflow_plugin.mapping",
        "mlflow_plugin.server",
        "recording.record",
        "recording.conversation",  # Of which each message is worked on once.
        "delivery",
        "redaction.redact",
    ),
    "mlflow_plugin.server": (
        "mlflow_plugin.mapping.entities",
        "delivery.sink",
        "redaction",
        "settings",
    ),
    "mlflow_plugin.mapping": (
        "recording.record",
        "redaction.trim",  # What a file that was left out looks like.
        "redaction.pictures",
    ),
    "recording": ("delivery", "redaction", "tracing", "settings"),
    "bridge": ("tracing",),
    "plugins": ("tracing",),
    "tracing": (),
    "delivery": ("delivery.spool",),
    "delivery.spool": (),
    "settings": ("redaction.redact",),
    "_guard": ("_texts",),
    "_texts": ("redaction.redact", "redaction.names"),
    "redaction": (),
    "errors": (),
    "_threads": (),
    "_forks": (),
    "_selection": (),
    "_entry_points": (),
    "_interruption": (),
    "_usage": (),
    "_inheritance": (),
    "_stop_reasons": (),
    "_after_import": (),
    "_json": (),
}
"""Each package, from the top down, with what it may import beside itself and `LEAVES`.

A sub-package that is not in the table belongs to the package above it. An entry is a package, which
stands for all modules in it but not for sub-packages that have a row of their own, or one module.
"""

LEAVES = (
    *("errors", "_threads", "_entry_points", "_guard", "_texts", "_interruption", "_usage"),
    *("_inheritance", "_stop_reasons", "_after_import", "_json", "_forks", "_selection"),
)
"""Modules that every package may import."""

MODULE_LINES = 350
MEDIAN_LINES = 140
FUNCTION_LINES = 50
"""Of a function's body, its docstring left out; functions inside it count with it."""
PACKAGE_LINES = 27_800
"""15,500 before tenants, credentials, forks and the exit of local stores had code of their own;
17,300 before evaluations, scores, contexts, comparisons, pictures and MLflow's own trees;
23,100 before what may be done for a segment of another origin, stuck segments and quick ends;
23,600 before each file of the spool was checked and read with a bound;
24,000 before plugins' exceptions were told from interruptions, and failed threads went on;
24,300 before answers had limits and types, and every text one way out;
24,800 before redaction knew tables, commands, notations and the formats of 90 vendors;
26,500 before threads waited for memory, and redaction was measured on a second corpus;
26,940 before each message of a conversation was worked on once;
27,400 before `import qitos` loaded no plugin."""


@dataclass(frozen=True)
class Import:
    """One import statement; `to` is the module that defines what is imported."""

    at: str
    """`file:line`."""
    by: str
    named: str
    """The module that the statement names."""
    to: str


@cache
def sources() -> dict[str, tuple[Path, str]]:
    """Path and text of each module, by its name below `qitos_mlflow`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = (path, path.read_text("utf-8"))
    return found


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(sources()[module][1])


def short(dotted: str) -> str:
    """A module's name below `qitos_mlflow`: `__init__` for the package itself."""
    return dotted.removeprefix("qitos_mlflow").removeprefix(".") or "__init__"


@cache
def exported(module: str) -> Mapping[str, str]:
    """What a package's `__init__` imports from modules of ours: name to module."""
    names = {}
    for node in ast.walk(tree(module)) if sources()[module][0].name == "__init__.py" else ():
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qitos_mlflow"):
            names.update(
                {alias.asname or alias.name: short(node.module or "") for alias in node.names}
            )
    return names


def imports(module: str) -> Iterator[Import]:
    """Every import of ours in a module."""
    path = sources()[module][0].relative_to(ROOT.parent)
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            named = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            named = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for source, name in named:
            if source.split(".")[0] != "qitos_mlflow":
                continue
            home = short(source)
            if short(f"{source}.{name}") in sources():
                home = short(f"{source}.{name}")
            to = exported(home).get(name, home) if home in sources() else home
            yield Import(f"{path}:{node.lineno}", module, home, to if to in sources() else home)


@cache
def all_imports() -> tuple[Import, ...]:
    """Every import of ours in the package."""
    return tuple(found for module in sources() for found in imports(module))


def package(module: str) -> str:
    """The row of the table that a module belongs to."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in TABLE:
            return ".".join(parts[:length])
    raise AssertionError(f"{module} belongs to no row of the table")


def allowed(found: Import) -> bool:
    """Whether the table has this import."""
    above, below = package(found.by), package(found.to)
    rows = list(TABLE)
    if above == below or below in LEAVES:
        return True
    if TABLE[above] == (BELOW,):
        return rows.index(below) > rows.index(above)
    # A package may be asked for what it exports of its sub-packages.
    return not {package(found.named), found.named, below, found.to}.isdisjoint(TABLE[above])


def circles(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Each way round from a node to itself, as `a -> b -> a`; one for each closing edge."""
    graph: dict[str, list[str]] = {}
    for source, target in sorted(set(edges)):
        graph.setdefault(source, []).append(target)
    found: list[str] = []
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append(" -> ".join([*path[path.index(node) :], node]))
        elif node not in done:
            for target in graph.get(node, []):
                visit(target, [*path, node])
            done.add(node)

    for node in list(graph):
        visit(node, [])
    return found


def functions(module: str) -> Iterator[tuple[str, int]]:
    """`file:line name` of each function, and the lines of its body without its docstring."""
    path = sources()[module][0].relative_to(ROOT.parent)
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            yield f"{path}:{node.lineno} {node.name}", lines


def line_count(module: str) -> int:
    """As `wc -l` counts."""
    return sources()[module][1].count("\n")


def test_imports_point_downward() -> None:
    """No package imports one that the table does not give it."""
    broken = [
        f"{found.at} imports {found.to}: {package(found.by)} may not import {package(found.to)}"
        for found in all_imports()
        if not allowed(found)
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_the_table_has_what_there_is() -> None:
    """Each row is a package or module that exists, and stands above all that it may import."""
    rows = list(TABLE)
    entries = [
        (row, entry) for row, may_import in TABLE.items() for entry in may_import if entry != BELOW
    ]
    assert [pair for pair in entries if rows.index(package(pair[1])) <= rows.index(pair[0])] == []
    assert {*rows, *(entry for _, entry in entries)} <= sources().keys()


def test_there_is_no_circle_between_packages() -> None:
    """Following imports from package to package never leads back."""
    edges = [(package(f.by), package(f.to)) for f in all_imports()]
    assert circles(edge for edge in edges if edge[0] != edge[1]) == []


def test_there_is_no_circle_between_modules() -> None:
    """Following imports from module to module never leads back."""
    assert circles((f.by, f.named) for f in all_imports()) == []


def test_a_circle_is_found() -> None:
    """The search for circles names the whole way round."""
    assert circles(pairwise("abca")) == ["a -> b -> c -> a"]
    assert circles(pairwise("abcd")) == []


def test_no_module_is_too_long() -> None:
    """A module can be read in one go."""
    assert not {m: line_count(m) for m in sources() if line_count(m) > MODULE_LINES}
    assert median(map(line_count, sources())) < MEDIAN_LINES


def test_no_function_is_too_long() -> None:
    """A function fits on a screen."""
    assert not [f for m in sources() for f in functions(m) if f[1] > FUNCTION_LINES]


def test_the_package_stays_small() -> None:
    """What is added is paid for by what is simplified."""
    assert sum(map(line_count, sources())) <= PACKAGE_LINES
