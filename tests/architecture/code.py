"""Reads the project's own source with `ast`: which module imports which, and how long things are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("intervene", "records", "alignments", "tasks", "defenses")
SCRIPTS = ("run_das", "train_defense")


@cache
def sources() -> dict[str, Path]:
    """Every module of the packages and every script, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found |= {script: ROOT / f"{script}.py" for script in SCRIPTS if (ROOT / f"{script}.py").exists()}
    return found


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def names_of(statement: ast.Import | ast.ImportFrom, module: str, path: Path) -> list[str]:
    """Dotted names that one import statement may load; relative ones are made absolute."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    start = statement.module or ""
    if statement.level:
        parts = module.split(".")
        package = parts if path.name == "__init__.py" else parts[:-1]
        package = package[: len(package) - statement.level + 1]
        start = ".".join([*package, *([start] if start else [])])
    return [start, *(f"{start}.{alias.name}" for alias in statement.names)]


def only_for_types(test: ast.expr) -> bool:
    """Whether an `if` asks TYPE_CHECKING, so that its imports never run."""
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below `node` that can run; with `inside_functions=False` only those that run on import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and only_for_types(child.test):
            for other in child.orelse:
                yield from import_statements(other, inside_functions=inside_functions)
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from import_statements(child, inside_functions=inside_functions)


@cache
def imports(module: str, *, inside_functions: bool = True) -> frozenset[str]:
    """Dotted names that `module` imports."""
    path = sources()[module]
    found = import_statements(tree(path), inside_functions=inside_functions)
    return frozenset(name for statement in found for name in names_of(statement, module, path))


@cache
def own_imports(module: str) -> frozenset[str]:
    """The project's own modules that `module` imports; of "package.module" only the module, not the package."""
    known = imports(module) & sources().keys()
    return frozenset(name for name in known if not any(other.startswith(f"{name}.") for other in known))


def reach(module: str) -> dict[str, list[str]]:
    """Every own module that `module` leads to, each with the way there."""
    ways: dict[str, list[str]] = {}
    waiting = [[module]]
    while waiting:
        way = waiting.pop(0)
        for name in sorted(own_imports(way[-1])):
            if name not in ways:
                ways[name] = [*way, name]
                waiting.append(ways[name])
    return ways


def python_files() -> list[Path]:
    """Every Python file of the project, tests included."""
    folders = [*PACKAGES, "tests", "benchmarks"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(found + list(ROOT.glob("*.py")))
