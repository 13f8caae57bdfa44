"""`build_projections`: how far the base model's own answer to each prompt lies along a direction, before training.

    made = build_projections(model, tokenizer, conversations, directions)
    write_projections("train.jsonl", "train_with_projections.jsonl", made)   # adds "ref_projection" to every row

State-aware training compares the answers of the data with these. Layers are 0-based block outputs here as there, and
both take the mean over the answer's text, without tokens of the template.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from defenses.errors import DataError, VectorError
from defenses.generation import answers
from defenses.plans import Directions
from defenses.pooling import Pooling, pooled
from intervene import fingerprint
from intervene.errors import asked_found_do

REFERENCE = "ref_projection"
Mode = Literal["res_mean", "input_last"]
Message = Mapping[str, str]


@dataclass(frozen=True)
class Projections:
    """One number per conversation, and how it was made.

    Attributes:
        values: <h, v> of each, v as long as it was given. answers: what the model said; "" for "input_last".
        empty: conversations it said nothing to, whose value is that of the last prompt token.
        layer, mode, norm, fingerprint: of the direction's site, the mean, the direction's length, the model.
        direction: digest of the direction itself, see `direction_digest`.
    """

    values: tuple[float, ...]
    answers: tuple[str, ...]
    empty: tuple[int, ...]
    layer: int
    mode: Mode
    norm: float
    fingerprint: str
    direction: str

    def facts(self) -> dict[str, Any]:
        """Return how they were made, as a record stores it."""
        made = {"layer": self.layer, "mode": self.mode, "norm": self.norm, "fingerprint": self.fingerprint}
        return {**made, "direction": self.direction, "n": len(self.values), "empty": list(self.empty)}


def build_projections(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    directions: Directions,
    *,
    layer: int | None = None,
    mode: Mode = "res_mean",
    max_new_tokens: int = 128,
    batch_size: int = 8,
    chat_template: str | None = None,
    force: str | None = None,
) -> Projections:
    """Return, for each conversation, the projection on the direction of what `model` itself would have answered.

    Only the last turn is answered. Training that learns earlier assistant turns too takes its mean over all of them,
    and so compares other text with this reference; use `learn="last_assistant"` for conversations of several turns.

    Args:
        conversations: messages that end with an assistant turn, whose prompt is all before it. layer: of the
            direction; None where there is only one. mode: "res_mean": the greedy answer is read, and its mean
            activation projected. "input_last": the last token before the answer is, and nothing is generated; it
            foretells the answer (r = .75-.83 over kinds of prompts, less within one).
        chat_template: instead of the tokenizer's own, that of the training data: jinja, or "plain". force: the reason
            for using directions of another model.

    Raises:
        DataError: a conversation that does not end with an assistant turn, or cannot be rendered.
        VectorError: no such layer, several and none named, an unknown mode, or another model without a reason.

    Source: projection difference, Chen et al. 2025 (arXiv 2507.21509), without dividing by the direction's norm.
    """
    if mode not in get_args(Mode):
        raise VectorError(f"Projections of mode {mode!r}: there is none. Use one of {', '.join(get_args(Mode))}.")
    chosen = one_layer(directions, layer)
    directions.only([chosen]).check(model, force=force)
    prompts, gold = zip(*(_split(one, number) for number, one in enumerate(conversations)), strict=True)
    said = [""] * len(prompts)
    if mode == "res_mean":
        said = answers(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, chat_template=chat_template
        )
    empty = [number for number, answer in enumerate(said) if not answer] if mode == "res_mean" else []
    values = [0.0] * len(prompts)
    spoken = [number for number, answer in enumerate(said) if answer]
    silent = [number for number, answer in enumerate(said) if not answer]
    vector = directions.at(chosen).cpu()
    reads: list[tuple[list[int], Sequence[str], Pooling]] = [
        (spoken, said, "response_mean"),
        (silent, gold, "prompt_last"),
    ]
    for rows, texts, pooling in reads:
        if rows:
            read = [(prompts[row], texts[row]) for row in rows]
            settings = {"batch_size": batch_size, "chat_template": chat_template}
            found = pooled(model, tokenizer, read, [chosen], pooling=pooling, **settings)  # type: ignore[arg-type]
            for row, value in zip(rows, (found.values[:, 0] @ vector).tolist(), strict=True):
                values[row] = value
    norm = float(vector.norm())
    mark, digest = fingerprint(model), direction_digest(vector)
    return Projections(tuple(values), tuple(said), tuple(empty), chosen, mode, norm, mark, digest)


def direction_digest(vector: Tensor) -> str:
    """Return the sha256 (hex) of the fp32 numbers of a direction (D,): the same on whatever device it is."""
    held = vector.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(held.numpy().tobytes()).hexdigest()


def write_projections(source: str | Path, destination: str | Path, made: Projections) -> Path:
    """Write the JSONL rows of `source` with their `ref_projection`, and how it was made beside them; return that path.

    Blank lines are left out, as they are when data are read.

    Raises:
        DataError: another number of rows than projections, a row that has one already, or an existing destination.
    """
    lines = [line for line in Path(source).read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = [json.loads(line) for line in lines]
    if len(rows) != len(made.values):
        found = f"{len(rows)} rows, {len(made.values)} projections."
        raise DataError(asked_found_do(f"Projections of {source}", found, "Build them from this file, whole."))
    if any(REFERENCE in row for row in rows):
        found = f"a row has a {REFERENCE!r} already."
        raise DataError(asked_found_do(f"Projections of {source}", found, "Take it out first."))
    target = Path(destination)
    facts = _facts_beside(target)
    for path in (target, facts):
        if path.exists():
            raise DataError(asked_found_do(f"Write {path}", "it exists.", "Choose another name, or move it away."))
    text = "".join(
        json.dumps({**row, REFERENCE: value}, ensure_ascii=False) + "\n"
        for row, value in zip(rows, made.values, strict=True)
    )
    target.write_text(text, encoding="utf-8")
    facts.write_text(json.dumps(made.facts(), indent=2) + "\n", encoding="utf-8")
    return facts


def require_references(
    paths: Iterable[str | Path], directions: Directions, layer: int | None = None, *, mark: str = ""
) -> None:
    """Refuse data whose references were built along another direction, or with another model, than are used now.

    What is not known is not compared: a path without `<path>.projections.json` beside it, or no fingerprint. One that
    does not tell its direction is refused: older versions wrote such, and only the length could be compared.

    Args:
        paths: the training data. directions: those in use. layer: of them, as in `one_layer`.
        mark: fingerprint of the model before training; "": that of the directions, unless they were forced on it.

    Raises:
        DataError: another layer, direction or model, or facts that cannot be read. VectorError: as `one_layer`.
    """
    chosen = one_layer(directions, layer)
    if not mark and not directions.facts.get("force"):
        mark = directions.fingerprint
    length, used = float(directions.at(chosen).norm()), direction_digest(directions.at(chosen))
    do = "Build them anew (train_defense.py build_projections) with what you train with, or train with what they had."
    for path in map(Path, paths):
        place = _facts_beside(path)
        if not place.is_file():
            continue
        try:
            made = json.loads(place.read_text(encoding="utf-8"))
            built, norm, model = int(made["layer"]), float(made["norm"]), str(made["fingerprint"])
            direction = str(made.get("direction") or "")
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"{place.name} cannot be read ({error!r})."
            raise DataError(asked_found_do(f"References of {path}", found, "Build them anew.")) from error
        differ = []
        if built != chosen:
            differ.append(f"made at layer {built}, layer {chosen} is used")
        if not math.isclose(norm, length, rel_tol=1e-4):
            differ.append(f"made with a direction of norm {norm:.6g}, one of norm {length:.6g} is used")
        elif not direction:
            differ.append(f"{place.name} does not tell which direction they were made with, as older ones do not")
        elif direction != used and built == chosen:
            told = f"{direction[:12]}, {used[:12]} is used, of the same norm {length:.6g}"
            differ.append(f"made with direction {told}")
        if model and mark and model != mark:
            differ.append(f"made with model {model}, model {mark} is used")
        if differ:
            raise DataError(asked_found_do(f"References of {path}", f"{'; '.join(differ)}.", do))


def one_layer(directions: Directions, layer: int | None) -> int:
    """Return `layer`, or the only one there is.

    Raises:
        VectorError: it has no direction, or there are several and none was named.
    """
    if layer is None and len(directions.layers) > 1:
        raise VectorError(f"Projection on directions of layers {directions.layers}: one is needed. Name the layer.")
    chosen = directions.layers[0] if layer is None else layer
    directions.at(chosen)
    return chosen


def _facts_beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.projections.json")


def _split(conversation: Sequence[Message], number: int) -> tuple[list[Message], str]:
    if len(conversation) < 2 or conversation[-1].get("role") != "assistant":
        raise DataError(f"Conversation {number}: it does not end with an assistant turn. Cut it after one.")
    return list(conversation[:-1]), conversation[-1]["content"]
