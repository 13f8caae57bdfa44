"""One Python file that a user wrote: its names, the lines they stand on, and errors that say both.

file = UserFile.load("my_task.py")
file.need("entities", Mapping, "entities = {...}")      # the value, or BadData "my_task.py, line 7: entities ..."
"""

from __future__ import annotations

import ast
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.errors import BadData, TaskError, require_known


@dataclass(frozen=True)
class UserFile:
    """A file that has been run: `values` maps its top-level names to what they are, `lines` to where they stand."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    @classmethod
    def load(cls, path: str | Path) -> UserFile:
        """Return the file, once it has been run.

        Raises:
            BadData: there is no such file, it is no Python, or running it fails; the message names the line.
        """
        path = Path(path)
        if not path.is_file():
            raise BadData(f"{path}: there is no such file. Write one, from tasks.user.template() if you like.")
        text = path.read_text(encoding="utf-8")
        try:
            tree = ast.parse(text, filename=str(path))
        except SyntaxError as error:
            raise BadData(f"{path}, line {error.lineno}: it is no Python ({error.msg}). Mend this line.") from None
        # A module of its own, by a name that no other file has: dataclasses look their module up in sys.modules.
        module = ModuleType(f"{__name__}:{path.resolve()}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        found = cls(path, vars(module), _lines(tree))
        found.call("", exec, compile(tree, str(path), "exec"), vars(module))
        return found

    def need(self, name: str, kind: Any, example: str) -> Any:
        """Return the value of `name`.

        Raises:
            BadData: it is missing, or no instance of `kind`.
        """
        if name not in self.values:
            raise BadData(f"{self.path}: it does not define {name}. Write {example}.")
        value = self.values[name]
        if not isinstance(value, kind):
            raise self.bad(name, f"it is {type(value).__name__}, not {kind.__name__}", f"Write {example}.")
        return value

    def optional(self, name: str, kind: type, text: str) -> Any:
        """Return the value of `name`, or None where the file does not define it.

        Raises:
            BadData: it is no instance of `kind`.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, kind):
            raise self.bad(name, f"it is {type(value).__name__}", f"Make it {text}.")
        return value

    def names(self, name: str, known: Iterable[str] | None) -> tuple[str, ...] | None:
        """Return the texts that `name` lists, or None where the file does not define it.

        Raises:
            BadData: it is no list of texts, empty, or names something that is not among `known`.
        """
        if name not in self.values:
            return None
        value = self.values[name]
        listed = isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
        if not listed:
            raise self.bad(name, f"it is {value!r}", f'Write {name} = ("...",), texts in a tuple.')
        for item in value:
            try:
                if known is not None:
                    require_known(name, item, known)
            except TaskError as error:
                raise BadData(f"{self._where(name)}: {error}") from None
        return tuple(value)

    def function(self, name: str, arguments: tuple[str, ...], instead: str = "") -> Callable[..., Any]:
        """Return the function `name`, which takes as many arguments as `arguments`.

        Raises:
            BadData: it is missing, cannot be called, or takes other arguments.
        """
        example = f"def {name}({', '.join(arguments)}): ..." + (f", {instead}" if instead else "")
        if name not in self.values:
            raise BadData(f"{self.path}: it does not define {name}. Write {example}.")
        value: Callable[..., Any] = self.values[name]
        if not callable(value):
            raise self.bad(name, f"it is {type(value).__name__}, not a function", f"Write {example}.")
        try:
            inspect.signature(value).bind(*arguments)
        except TypeError:
            found = f"it takes {inspect.signature(value)}, and is called with {len(arguments)} arguments"
            raise self.bad(name, found, f"Write {example}.") from None
        return value

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function` gives; whatever it raises becomes an error of this file.

        Raises:
            BadData: `function` failed; the message names the last line of this file that was running.
        """
        try:
            return function(*arguments)
        except Exception as error:
            if isinstance(error, BadData) and str(error).startswith(str(self.path)):
                raise  # said already, by a call within this one
            ran = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if self._is_own(frame.filename)]
            line = ran[-1] if ran else self.lines.get(name)
            where = f"{self.path}, line {line}" if line else f"{self.path}"
            what = f"{name} fails" if name else "running it fails"
            said = str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"
            raise BadData(f"{where}: {what} ({said}). Mend it.") from error

    def bad(self, name: str, found: str, do: str) -> BadData:
        """Return the error that `name` is not as it should be, with its line."""
        return BadData(f"{self._where(name)}: {name}: {found}. {do}")

    def _where(self, name: str) -> str:
        return f"{self.path}, line {self.lines[name]}" if name in self.lines else str(self.path)

    def _is_own(self, filename: str) -> bool:
        return filename == str(self.path)


def _lines(tree: ast.Module) -> dict[str, int]:
    """Return top-level name -> the line of its last definition."""
    found = {}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = statement.lineno
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id: statement.lineno for target in targets if isinstance(target, ast.Name)}
    return found
