"""A task of one's own from one Python file: `task_from_file`, and `template()`, a file to start from.

    Path("my_task.py").write_text(template())
    task = task_from_file("my_task.py")
    pairs = task.pairs("train", variable="color", n=100)

The file defines either `task`, an instance of `tasks.Task`, or these names:

causal_model   a `CausalModel` whose variable `answer` is the text that continues the prompt
entities       {split: {kind: [words]}} for "train", "select" and "test"; no word in two splits
draw           draw(rng, split) -> the causal model's input, by a `random.Random`
template       a text with the fields {input}, or instead of it
render         render(setting) -> (prompt, answer, {name: (begin, end)})

and, where the defaults do not suit:

name           default: the file's name
variables      what a search may look for; default: all that the causal model computes but `answer`
positions      names of the spans that a search may use; default: all that are marked
draw_pair      draw_pair(rng, split, variable) -> (base input, source input); default: two draws
kinds          strata of pairs, of "kept" (the label is the base's answer) and "changed"; default: both, half and half
single_token   kinds of entities of which `for_tokenizer` keeps only words that are one token; default: none

The file is run as any Python file is: use only files that you trust.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks.base import SPLITS, Example, Pair, Task, fill
from tasks.causal_model import CausalModel
from tasks.errors import BadData, NotEnough, TaskError
from tasks.tokens import Tokenizer, single_tokens, token_ids
from tasks.user_file import UserFile

Setting = Mapping[str, Any]
Rendered = tuple[str, str, Mapping[str, tuple[int, int]]]
_KINDS = ("kept", "changed")
_PATIENCE = 1000
_SAMPLE = 200  # examples per split on which `for_tokenizer` compares answers


@dataclass(frozen=True)
class UserTask(Task):
    """A task whose parts were defined in a file, `source`; made by `task_from_file`, which says what they mean."""

    name: str
    causal_model: CausalModel
    variables: tuple[str, ...]
    words: Mapping[str, Mapping[str, tuple[str, ...]]]
    draw: Callable[[random.Random, str], Setting]
    write: Callable[[Setting], Rendered]
    source: UserFile = field(repr=False)
    draw_pair: Callable[[random.Random, str, str], tuple[Setting, Setting]] | None = None
    positions: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = _KINDS
    single_token: tuple[str, ...] = ()
    dropped: frozenset[str] = frozenset()

    def entities(self, split: str) -> Mapping[str, frozenset[str]]:
        """Return kind -> the words of `split`."""
        return {kind: frozenset(words) - self.dropped for kind, words in self.words[split].items()}

    def entities_in(self, example: Example) -> Mapping[str, frozenset[str]]:
        """Return kind -> those of the listed words, of any split, that are values of the example's setting."""
        values = {str(value) for value in example.setting.values()}
        listed: dict[str, set[str]] = {}
        for lists in self.words.values():
            for kind, words in lists.items():
                listed.setdefault(kind, set()).update(words)
        return {kind: frozenset(words & values) for kind, words in listed.items()}

    def render(self, setting: Mapping[str, Any]) -> Example:
        """Return the prompt of `setting`, with the spans of `positions`.

        Raises:
            BadData: the file's render gives something else than (prompt, answer, spans), an answer that the causal
                model does not give, or a span outside the prompt.
        """
        prompt, answer, spans = self._written(setting)
        right = self.source.call("causal_model", self.causal_model.run, setting)["answer"]
        if answer != right:
            raise self.source.bad(
                "render", f"it writes the answer {answer!r}, and the causal model gives {right!r}", "Make them agree."
            )
        for name in self.positions or ():
            if name not in spans:
                raise self.source.bad(
                    "positions", f"{name!r} is not marked; marked are {', '.join(spans)}", "Name some of those."
                )
        for name, (begin, end) in spans.items():
            if not 0 <= begin < end <= len(prompt):
                raise self.source.bad(
                    "render",
                    f"span {name!r} is {(begin, end)} in a prompt of {len(prompt)} characters",
                    "Give a non-empty part of the prompt.",
                )
        kept = {name: spans[name] for name in self.positions or spans}
        return Example(prompt, answer, dict(setting), kept)

    def kind(self, pair: Pair) -> str:
        """Return "kept" if the label is the base's own answer, else "changed"."""
        return _KINDS[int(pair.label != pair.base.answer)]

    def for_tokenizer(self, tokenizer: Tokenizer) -> UserTask:
        """Return this task without the words of the `single_token` kinds that are several tokens.

        Raises:
            NotEnough: a kind is left without words.
            BadData: among some hundred examples, two different answers begin with the same token.
        """
        words = {word for lists in self.words.values() for kind in self.single_token for word in lists.get(kind, ())}
        task = replace(self, dropped=frozenset(words - set(single_tokens(tokenizer, words))))
        for split in task.splits:
            for kind, left in task.entities(split).items():
                if not left:
                    raise NotEnough(
                        f"{self.name}, {split}: no word of kind {kind!r} is one token for this tokenizer. "
                        f"Write others into entities[{split!r}][{kind!r}]."
                    )
        task._require_told_apart(tokenizer)
        return task

    def draw_setting(self, rng: random.Random, split: str) -> dict[str, Any]:
        """Return one random input of `split` without dropped words.

        Raises:
            NotEnough: every one of many draws had a dropped word in it.
            BadData: the file's draw gives no mapping, or fails.
        """
        for _ in range(_PATIENCE):
            setting = self._checked("draw", self.source.call("draw", self.draw, rng, split))
            if not self._has_dropped(setting):
                return setting
        raise NotEnough(
            f"{self.name}, {split}: {_PATIENCE} draws all had a word in them that is several tokens. "
            f"Draw from entities[{split!r}], and write shorter words into it."
        )

    def draw_settings(
        self, rng: random.Random, split: str, variable: str, kind: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the inputs of a base and a source whose label is, or is not, the base's answer, by `kind`.

        Raises:
            NotEnough: none of many draws made such a pair.
        """
        for _ in range(_PATIENCE):
            base, source = self._two(rng, split, variable)
            if self._has_dropped(base) or self._has_dropped(source):
                continue
            own = str(self.source.call("causal_model", self.causal_model.run, base)["answer"])
            label = self.source.call("causal_model", self.label, variable, base, source)
            if _KINDS[int(label != own)] == kind:
                return base, source
        other = _KINDS[1 - _KINDS.index(kind)]
        raise NotEnough(
            f"{self.name}, {split}: none of {_PATIENCE} draws gave a {kind!r} pair for variable {variable!r}. "
            f"Write draw_pair(rng, split, variable), or kinds = ({other!r},)."
        )

    def _two(self, rng: random.Random, split: str, variable: str) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.draw_pair is None:
            return self.draw_setting(rng, split), self.draw_setting(rng, split)
        two = self.source.call("draw_pair", self.draw_pair, rng, split, variable)
        if not isinstance(two, Sequence) or len(two) != 2:
            raise self.source.bad("draw_pair", f"it returns {two!r}", "Return (base input, source input).")
        base, source = (self._checked("draw_pair", setting) for setting in two)
        return base, source

    def _checked(self, function: str, setting: Any) -> dict[str, Any]:
        if not isinstance(setting, Mapping) or set(setting) != set(self.causal_model.inputs):
            raise self.source.bad(
                function,
                f"it gives {setting!r}",
                f"Return a dict with the causal model's inputs: {', '.join(self.causal_model.inputs)}.",
            )
        return dict(setting)

    def _written(self, setting: Setting) -> Rendered:
        given = self.source.call("render", self.write, setting)
        whole = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 3
        if not whole or not isinstance(given[0], str) or not isinstance(given[1], str) or not _are_spans(given[2]):
            raise self.source.bad(
                "render",
                f"it returns {given!r}",
                "Return (prompt, answer, {name: (begin, end)}), two texts and a dict.",
            )
        return given[0], given[1], {name: (begin, end) for name, (begin, end) in given[2].items()}

    def _has_dropped(self, setting: Setting) -> bool:
        return bool(self.dropped and self.dropped & {str(value) for value in setting.values()})

    def _require_told_apart(self, tokenizer: Tokenizer) -> None:
        owner: dict[int, str] = {}
        for split in self.splits:
            rng = random.Random(f"{self.name}/{split}/answers")
            for _ in range(_SAMPLE):
                answer = self.render(self.draw_setting(rng, split)).answer
                other = owner.setdefault(token_ids(tokenizer, answer)[0], answer)
                if other != answer:
                    raise self.source.bad(
                        "entities",
                        f"answers {other!r} and {answer!r} begin with the same token, and only the first is scored",
                        "Use words that begin differently, or name their kind in single_token = (...).",
                    )


def _are_spans(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(span, Sequence) and len(span) == 2 and all(type(end) is int for end in span)
        for span in value.values()
    )


def task_from_file(path: str | Path) -> Task:
    """Return the task that a Python file defines; the head of this module says how.

    Everything that can be checked is: one example of each split is drawn, rendered and run.

    Raises:
        BadData: the file is missing, does not run, or lacks something; the message names file, line and what to write.
    """
    source = UserFile.load(path)
    if "task" in source.values:
        task = source.values["task"]
        if not isinstance(task, Task):
            raise source.bad("task", f"it is {type(task).__name__}", "Make it an instance of a subclass of tasks.Task.")
        return task
    made = _made(source)
    for split in made.splits:
        made.render(made.draw_setting(random.Random(0), split))
    return made


def _made(source: UserFile) -> UserTask:
    model = source.need("causal_model", CausalModel, "causal_model = CausalModel(variables=..., parents=..., ...)")
    if "answer" not in model.variables:
        raise source.bad("causal_model", "it has no variable 'answer'", "Name the text after the prompt so.")
    computed = tuple(name for name in model.variables if name in model.mechanisms and name != "answer")
    variables = source.names("variables", model.variables) or computed
    if not variables:
        raise source.bad("causal_model", "it computes nothing but the answer", "Write variables = (...) to search for.")
    words = _words(source)
    kinds = tuple(dict.fromkeys(kind for lists in words.values() for kind in lists))
    return UserTask(
        name=source.optional("name", str, "a text") or source.path.stem,
        causal_model=model,
        variables=variables,
        words=words,
        draw=source.function("draw", ("rng", "split")),
        write=_writer(source, model),
        source=source,
        draw_pair=source.function("draw_pair", ("rng", "split", "variable")) if "draw_pair" in source.values else None,
        positions=source.names("positions", None),
        kinds=source.names("kinds", _KINDS) or _KINDS,
        single_token=source.names("single_token", kinds) or (),
    )


def _words(source: UserFile) -> dict[str, dict[str, tuple[str, ...]]]:
    example = 'entities = {"train": {"name": ["Mary", ...]}, "select": {...}, "test": {...}}'
    given = source.need("entities", Mapping, example)
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for split in SPLITS:
        lists = given.get(split)
        if not isinstance(lists, Mapping) or not all(
            not isinstance(words, str) and isinstance(words, Sequence | frozenset | set) for words in lists.values()
        ):
            raise source.bad("entities", f"split {split!r} is {lists!r}", f"Write {example}.")
        found[split] = {kind: tuple(str(word) for word in words) for kind, words in lists.items()}
    owner: dict[tuple[str, str], str] = {}
    for split, lists in found.items():
        for kind, words in lists.items():
            for word in words:
                if owner.setdefault((kind, word), split) != split:
                    raise source.bad(
                        "entities",
                        f"{kind} {word!r} is in {owner[kind, word]} and in {split}",
                        "Leave it in one split.",
                    )
    return found


def _writer(source: UserFile, model: CausalModel) -> Callable[[Setting], Rendered]:
    if "render" in source.values or "template" not in source.values:
        return source.function("render", ("setting",), 'or a template = "The {input} is"')
    text: str = source.need("template", str, 'template = "The {input} is"')
    _, fields = fill(text, _Unset())
    unknown = sorted(set(fields) - set(model.inputs))
    if unknown:
        raise source.bad(
            "template",
            f"{{{unknown[0]}}} is no input of the causal model",
            f"Use {', '.join(f'{{{name}}}' for name in model.inputs)}.",
        )

    def write(setting: Setting) -> Rendered:
        prompt, spans = fill(text, setting)
        spans = {name: span for name, span in spans.items() if span[0] < span[1]}
        words = prompt.rstrip()
        spans["last"] = (words.rfind(" ") + 1, len(words))
        return prompt, str(source.call("causal_model", model.run, setting)["answer"]), spans

    return write


class _Unset(dict[str, str]):
    """Gives every field of a template an empty value, to see which fields it has."""

    def __missing__(self, key: str) -> str:
        return ""


def template() -> str:
    """Return the text of a file that `task_from_file` reads as it is: a small task, with a word on each part."""
    return (Path(__file__).parent / "user_template.py").read_text(encoding="utf-8")


def write_template(path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `template()` to `path` and return the path.

    Raises:
        BadData: the file exists and `overwrite` is not given, or its folder does not exist.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise BadData(f"{path}: the file exists. Choose another name, or pass overwrite=True.")
    if not path.parent.is_dir():
        raise TaskError(f"{path}: there is no folder {path.parent}. Make it first.")
    path.write_text(template(), encoding="utf-8")
    return path
