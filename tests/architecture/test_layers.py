"""Who may import whom (docs/design.md, section 3), and how long a file or a function may grow."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.architecture.code import PACKAGES, ROOT, SCRIPTS, imports, python_files, reach, sources, tree

# Left of an arrow knows nothing of what is right of it, not even through others.
CHAINS = (
    ("errors", "sites", "families", "hooks", "run"),
    ("positions", "interventions", "run"),
    ("featurizers", "interventions", "run"),
    ("edits", "interventions", "run"),
)
STRANGERS = {
    "records": {"tasks", "alignments", "defenses", "torch", "transformers"},
    "tasks": {"intervene", "alignments", "defenses", "torch", "transformers"},
    "intervene": {"records", "tasks", "alignments", "defenses"},
    "alignments": {"defenses"},
    "defenses": {"alignments"},
}
# Not every user has these, and some take seconds: they are imported inside the function that needs them.
IMPORTED_WHERE_USED = (
    *("transformers", "datasets", "peft", "deepspeed", "sklearn", "plotly", "pyvene", "accelerate", "ray"),
)
LONGEST_FILE, LONGEST_FUNCTION = 400, 60

# "path" or "path::function" -> why it may be longer
LONGER: dict[str, str] = {}
# "path" -> why it registers hooks besides intervene/hooks.py
REGISTERS_HOOKS: dict[str, str] = {
    "intervene/block.py": "a tensor's gradient hook, which is gone with its graph: nothing stays on the model",
}


def modules_of(package: str) -> list[str]:
    return [name for name in sources() if name.split(".")[0] == package]


def tops(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_no_module_of_the_core_leads_to_a_later_one(chain):
    for place, name in enumerate(chain):
        if f"intervene.{name}" not in sources():
            continue
        ways = reach(f"intervene.{name}")
        for later in chain[place + 1 :]:
            way = ways.get(f"intervene.{later}")
            assert way is None, f"{name} leads to {later}: {' -> '.join(way)}. Move what is shared below both."


@pytest.mark.parametrize("module", sources())
def test_no_module_leads_back_to_itself(module):
    way = reach(module).get(module)
    assert way is None, f"circle of imports: {' -> '.join(way)}"


@pytest.mark.parametrize("package", STRANGERS)
def test_packages_keep_to_themselves(package):
    for module in modules_of(package):
        found = tops(imports(module)) & STRANGERS[package]
        assert not found, f"{module} imports {sorted(found)}; {package} must not know it."


def test_nothing_imports_a_script():
    for module in sources():
        found = tops(imports(module)) & set(SCRIPTS)
        assert not found, f"{module} imports the script {sorted(found)}; move what it needs into a package."


@pytest.mark.parametrize("module", modules_of("intervene"))
def test_the_core_loads_only_torch_safetensors_and_numpy(module):
    allowed = set(sys.stdlib_module_names) | {"torch", "safetensors", "numpy", "intervene"}
    found = tops(imports(module, inside_functions=False)) - allowed
    assert not found, f"{module} imports {sorted(found)} when it is loaded; import it in the function that uses it."


@pytest.mark.parametrize("package", ["records", "alignments", "tasks", "defenses"])
def test_heavy_libraries_are_imported_where_they_are_used(package):
    for module in modules_of(package):
        found = tops(imports(module, inside_functions=False)) & set(IMPORTED_WHERE_USED)
        assert not found, f"{module} imports {sorted(found)} when it is loaded; import it in the function that uses it."


def test_import_intervene_loads_no_heavy_library():
    code = f"import sys, intervene; print([n for n in {IMPORTED_WHERE_USED!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_only_hooks_py_registers_hooks():
    for module, path in sources().items():
        if module == "intervene.hooks" or str(path.relative_to(ROOT)) in REGISTERS_HOOKS:
            continue
        for node in ast.walk(tree(path)):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            found = called.startswith("register_") and called.endswith("_hook")
            assert not found, f"{path.relative_to(ROOT)}:{node.lineno} calls {called}; go through intervene/hooks.py."


def test_no_star_imports():
    for path in python_files():
        for node in ast.walk(tree(path)):
            star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
            assert not star, f"{path.relative_to(ROOT)}:{node.lineno}: name what is imported."


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, which may be as long as its contract."""
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        first = function.body[0]
        total -= first.end_lineno - first.lineno + 1
    return total


def overlong() -> dict[str, int]:
    found = {}
    for path in python_files():
        name = str(path.relative_to(ROOT))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_FILE:
            found[name] = lines
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > LONGEST_FUNCTION:
                found[f"{name}::{node.name}"] = lines_of(node)
    return found


def test_files_and_functions_stay_short():
    found = {name: lines for name, lines in overlong().items() if name not in LONGER}
    assert not found, f"longer than {LONGEST_FILE} (file) or {LONGEST_FUNCTION} (function) lines: {found}"


def test_every_exception_is_still_needed():
    assert set(LONGER) <= set(overlong())
    assert all((ROOT / name).is_file() for name in REGISTERS_HOOKS)


def test_the_packages_are_there_and_say_that_they_are_typed():
    for package in PACKAGES:
        if modules_of(package):
            assert (ROOT / package / "py.typed").is_file(), f"{package}/py.typed is missing"
            assert (ROOT / package / "__init__.py").is_file(), f"{package}/__init__.py is missing"
