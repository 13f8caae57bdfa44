"""What `train_defense.py check` says of training data before a run: counts, lengths, what is learned and injected.

print(check_text(data, tokenizer, scope_columns_of, batch_size=16, held_out=evaluation))
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from torch import Tensor

from defenses.batch import Batch, Example, collate
from defenses.batches import Order
from defenses.data import Data
from defenses.errors import DataError
from intervene.content import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ColumnsOf = Callable[[Batch], Tensor]
LEARNED, INJECTED = ("«", "»"), ("⟦", "⟧")
LINES = 10  # dropped rows, duplicates and leaks that are named


@dataclass(frozen=True)
class Facts:
    """Numbers of a data set.

    Attributes:
        prompt, response: least, median and greatest number of tokens that are not learned, and that are. tokens,
            learned: of all examples. poison, clean, unknown: examples. duplicates: groups of indices with the same
            tokens. conflicts: groups with the same prompt and different responses. leaks: (index here, index there) of
            examples whose prompt, or whole text where there is none, the held-out data has too.
    """

    examples: int
    tokens: int
    learned: int
    prompt: tuple[int, float, int]
    response: tuple[int, float, int]
    poison: int
    clean: int
    unknown: int
    duplicates: tuple[tuple[int, ...], ...]
    conflicts: tuple[tuple[int, ...], ...]
    leaks: tuple[tuple[int, int], ...]


def facts_of(data: Data, held_out: Data | None = None) -> Facts:
    """Return the numbers of a data set, and what it shares with `held_out`."""
    learned = [one.n_response for one in data.examples]
    prompts = [len(one.input_ids) - count for one, count in zip(data.examples, learned, strict=True)]
    said = Counter(one.poison for one in data.examples)
    same, asked = defaultdict(list), defaultdict(list)
    for one in data.examples:
        same[one.input_ids].append(one.index)
        asked[_prompt(one)].append(one.index)
    conflicts = [
        tuple(group)
        for prompt, group in asked.items()
        if prompt and len({data.examples[index].input_ids for index in group}) > 1
    ]
    there = {} if held_out is None else {_prompt(one) or one.input_ids: one.index for one in held_out.examples}
    keys = [_prompt(one) or one.input_ids for one in data.examples]
    return Facts(
        examples=len(data),
        tokens=sum(prompts) + sum(learned),
        learned=sum(learned),
        prompt=(min(prompts), median(prompts), max(prompts)),
        response=(min(learned), median(learned), max(learned)),
        poison=said[True],
        clean=said[False],
        unknown=said[None],
        duplicates=tuple(tuple(group) for group in same.values() if len(group) > 1),
        conflicts=tuple(conflicts),
        leaks=tuple((index, there[key]) for index, key in enumerate(keys) if key in there),
    )


def check_text(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    columns_of: ColumnsOf | None = None,
    *,
    batch_size: int = 1,
    epochs: float = 1.0,
    held_out: Data | None = None,
    example: int = 0,
    markup: bool = False,
) -> str:
    """Return the report: counts, lengths, poison, rows left out, duplicates, leaks, steps and one example.

    Args:
        columns_of: batch -> (B, P) columns an injection touches, -1 for none; None: nothing is injected. held_out: the
            data the model will be evaluated on. example: index of the one shown. markup: for rich, in colours, in
            place of brackets.
    """
    facts = facts_of(data, held_out)
    order = Order(len(data), batch_size, seed=0)
    lines = [
        f"{facts.examples} examples ({data.kind}) from {', '.join(data.source)}",
        f"  tokens         {facts.tokens}, of which {facts.learned} learned ({facts.learned / facts.tokens:.0%})",
        f"  prompt         {_spread(facts.prompt)}",
        f"  response       {_spread(facts.response)}",
        f"  steps          {order.steps(1)} per epoch of {batch_size} examples, {order.steps(epochs)} in all",
        f"  poison         {_poison_text(facts)}",
        f"  digest         {data.digest[:16]}",
        *_end_lines(data),
        *_group_lines("dropped", [f"{one.path}:{one.line}: {one.reason}" for one in data.dropped]),
        *_group_lines("cut", [f"{one.path}:{one.line}: {one.tokens} tokens of the end" for one in data.cut]),
        *_group_lines("duplicates", [_places(data, group) for group in facts.duplicates]),
        *_group_lines("same prompt, other response", [_places(data, group) for group in facts.conflicts]),
        *_leak_lines(data, held_out, facts),
    ]
    if markup:
        lines = [_plain(line) for line in lines]
    return "\n".join([*lines, "", *_shown(data, tokenizer, columns_of, example, markup)])


def _prompt(example: Example) -> tuple[int, ...]:
    """Return the tokens before the first that is learned; of text that is learned whole, nothing."""
    first = next((at for at, label in enumerate(example.labels) if label != IGNORED_LABEL), 0)
    return example.input_ids[:first] if first > 1 else ()


def _spread(values: tuple[int, float, int]) -> str:
    return f"{values[0]} to {values[2]} tokens, median {values[1]:g}"


def _poison_text(facts: Facts) -> str:
    known = facts.poison + facts.clean
    if not known:
        return "not said of any example"
    unknown = f"; {facts.unknown} do not say" if facts.unknown else ""
    return f"{facts.poison} of {known} ({facts.poison / known:.1%}){unknown}"


def _end_lines(data: Data) -> list[str]:
    if data.end_of_turn is None:
        return []
    if data.end_of_turn:
        return [f"  end of turn    {data.end_of_turn}, learned"]
    return ["  end of turn    none: the chat template ends no answer, so the model does not learn to stop"]


def _group_lines(name: str, found: Sequence[str]) -> list[str]:
    """Return a count and the first `LINES` of what was found."""
    more = [f"    and {len(found) - LINES} more"] if len(found) > LINES else []
    return [f"  {name + ':':<14} {len(found)}", *(f"    {one}" for one in found[:LINES]), *more]


def _places(data: Data, indices: Sequence[int]) -> str:
    more = f" and {len(indices) - 4} more" if len(indices) > 4 else ""
    return ", ".join(data.place(index) for index in indices[:4]) + more


def _leak_lines(data: Data, held_out: Data | None, facts: Facts) -> list[str]:
    if held_out is None:
        return ["  leaks          not looked for: no evaluation file was given"]
    pairs = [f"{data.place(here)} is also {held_out.place(there)}" for here, there in facts.leaks]
    return _group_lines("leaks", pairs)


def _shown(
    data: Data, tokenizer: PreTrainedTokenizerBase, columns_of: ColumnsOf | None, which: int, markup: bool
) -> list[str]:
    """Return one example, token runs marked by whether they are learned and injected."""
    if not 0 <= which < len(data):
        raise DataError(f"Show example {which}: there are {len(data)}. Indices go from 0 to {len(data) - 1}.")
    example = data.examples[which]
    injected: set[int] = set()
    if columns_of is not None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        injected = {int(at) for at in columns_of(collate([example], pad, multiple=1))[0].tolist() if at >= 0}
    place = data.place(which)
    if markup:
        legend = f"Example {which} ({_plain(place)}): [green]learned[/green], [reverse]injected[/reverse]"
    else:
        legend = f"Example {which} ({place}): {LEARNED[0]}learned{LEARNED[1]}, {INJECTED[0]}injected{INJECTED[1]}"
    kinds = [(label != IGNORED_LABEL, at in injected) for at, label in enumerate(example.labels)]
    return [legend, "", _marked(tokenizer, example.input_ids, kinds, markup)]


def _marked(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], kinds: Sequence[tuple[bool, bool]], markup: bool
) -> str:
    """Return the tokens as text, each run of one kind (learned, injected) between its marks."""
    parts, start = [], 0
    for at in range(1, len(ids) + 1):
        if at < len(ids) and kinds[at] == kinds[start]:
            continue
        text = str(tokenizer.decode(list(ids[start:at])))
        learned, injected = kinds[start]
        if markup:
            style = " ".join(["green"] * learned + ["reverse"] * injected)
            parts.append(f"[{style}]{_plain(text)}[/{style}]" if style else _plain(text))
        else:
            text = f"{INJECTED[0]}{text}{INJECTED[1]}" if injected else text
            parts.append(f"{LEARNED[0]}{text}{LEARNED[1]}" if learned else text)
        start = at
    return "".join(parts)


def _plain(text: str) -> str:
    """Return text in which rich reads no markup."""
    from rich.markup import escape

    return escape(text)
