"""`__all__` is the public interface, no more and no less, and all of it is explained.

Its order is ruff's (RUF022): constants, classes, functions, each by the alphabet.
"""

from __future__ import annotations

import importlib
import inspect
import types

import pytest

from tests.architecture.code import PACKAGES, ROOT

PRESENT = [package for package in PACKAGES if (ROOT / package / "__init__.py").exists()]


def visible(package: types.ModuleType) -> set[str]:
    """Names that a reader sees in the package; modules, and what other people's modules define, left out."""
    return {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", package.__name__).split(".")[0] in PACKAGES
    }


def unexplained(name: str, value: object) -> list[str]:
    """Return `name` and those of its public methods that have no docstring; data needs none."""
    if not inspect.isclass(value):
        return [name] if inspect.isroutine(value) and not inspect.getdoc(value) else []
    own = vars(value).get("__doc__") or ""
    bare = [name] if not own or own.startswith(f"{value.__name__}(") else []  # that is what `dataclass` writes
    methods = {method: getattr(value, method) for method in vars(value) if not method.startswith("_")}
    routines = {method: member for method, member in methods.items() if inspect.isroutine(member)}
    return bare + [f"{name}.{method}" for method, member in routines.items() if not inspect.getdoc(member)]


@pytest.mark.parametrize("name", PRESENT)
def test_all_lists_every_visible_name_once(name):
    package = importlib.import_module(name)
    assert len(set(package.__all__)) == len(package.__all__)
    assert [public for public in package.__all__ if not hasattr(package, public)] == []
    assert visible(package) - set(package.__all__) == set()


@pytest.mark.parametrize("name", PRESENT)
def test_every_public_name_is_explained(name):
    package = importlib.import_module(name)
    bare = [text for public in package.__all__ for text in unexplained(public, getattr(package, public))]
    assert bare == []


@pytest.mark.parametrize("name", PRESENT)
def test_every_package_says_what_it_is(name):
    assert inspect.getdoc(importlib.import_module(name))
