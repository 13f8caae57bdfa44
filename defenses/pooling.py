"""What a model's stream holds while it reads a conversation: one vector per conversation and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from defenses.batch import Batch, Example, collate
from defenses.chat import Chat, chat_of
from defenses.errors import DataError, VectorError
from defenses.generation import Prompt, device_of, evaluating, messages_of
from defenses.plans import ABSENT
from intervene import Marked, Site, capture
from intervene.content import IGNORED_LABEL

Conversation = tuple[Prompt, str]  # what is said to the model, as text or messages, and its answer
Pooling = Literal["response_mean", "prompt_last", "prompt_mean"]


@dataclass(frozen=True, eq=False)
class Pooled:
    """The residual stream of N conversations behind L blocks.

    Attributes:
        values: (N, L, D) fp32 on the CPU, the pooled activation. stream_norms: (N, L), mean norm of the tokens pooled.
    """

    values: Tensor
    stream_norms: Tensor


def pooled(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    layers: Sequence[int],
    *,
    pooling: Pooling = "response_mean",
    batch_size: int = 8,
    chat_template: str | None = None,
) -> Pooled:
    """Return the block outputs of `layers`, pooled over each conversation's tokens.

    One forward pass per batch serves all layers and ends behind the last; of a batch only the pooled tokens are kept,
    L x batch_size x tokens x D numbers, until they are pooled.

    Args:
        pooling: "response_mean" over the answer's text, "prompt_mean" over the prompt's text, both without tokens of
            the template; or "prompt_last", the token before the answer, of the template or not. Never the first token.
        chat_template: as in `chat.chat_of`; None: the tokenizer's own, and "plain" for one that has none.

    Raises:
        VectorError: no conversation, no layer, no such pooling, or a conversation without a token to pool.
        DataError: a conversation that the chat template cannot render.
    """
    if pooling not in get_args(Pooling):
        raise VectorError(f"Pooling {pooling!r}: there is none. Use one of {', '.join(get_args(Pooling))}.")
    if not conversations or not layers or batch_size < 1:
        asked = f"{len(conversations)} conversations at {len(layers)} layers in batches of {batch_size}"
        raise VectorError(f"Activations of {asked}: nothing to read. Give at least one of each.")
    chat = template_of(tokenizer, chat_template)
    examples = [_example(chat, one, number) for number, one in enumerate(conversations)]
    chosen = [_columns(example, pooling, number) for number, example in enumerate(examples)]
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    values, norms = [torch.empty(0)] * len(examples), [torch.empty(0)] * len(examples)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any token will do
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = collate([examples[number] for number in members], pad).to(device_of(model))
            columns = _padded([chosen[number] for number in members]).to(batch.input_ids.device)
            means, lengths = _read(model, batch, columns, layers)
            for row, number in enumerate(members):
                values[number], norms[number] = means[row], lengths[row]
    return Pooled(torch.stack(values), torch.stack(norms))


def template_of(tokenizer: Any, chat_template: str | None = None) -> Chat:
    """Return the chat template given, else the tokenizer's own, else the plain one."""
    if chat_template is None and not tokenizer.chat_template:
        chat_template = "plain"
    return chat_of(tokenizer, chat_template)


def _example(chat: Chat, conversation: Conversation, number: int) -> Example:
    """Return the conversation tokenised, with labels on its last answer."""
    prompt, answer = conversation
    try:
        rendered = chat.render([*messages_of(prompt), {"role": "assistant", "content": answer}])
    except DataError as error:
        raise DataError(f"Conversation {number}: {error}") from error
    start, stop = rendered.responses[-1]
    labels = [IGNORED_LABEL] * len(rendered.input_ids)
    labels[start:stop] = rendered.input_ids[start:stop]
    return Example(rendered.input_ids, tuple(labels), number, template=rendered.template, text=rendered.text)


def _columns(example: Example, pooling: Pooling, number: int) -> list[int]:
    answer = next(place for place, label in enumerate(example.labels) if label != IGNORED_LABEL)
    if pooling == "prompt_last":
        found = [answer - 1]
    else:
        of_answer = pooling == "response_mean"
        found = [
            place
            for place, of_template in enumerate(example.template)
            if not of_template and (example.labels[place] != IGNORED_LABEL if of_answer else place < answer)
        ]
    found = [place for place in found if place > 0]
    if not found:
        raise VectorError(f"Conversation {number}: {pooling} finds no token in {example.text[:60]!r}. Leave it out.")
    return found


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *(ABSENT for _ in range(width - len(row)))] for row in rows])


def _read(model: nn.Module, batch: Batch, columns: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mean over `columns` of each layer's stream, (B, L, D), and of its norm, (B, L)."""
    sites = [Site("block_output", layer) for layer in layers]
    with capture(model, sites, Marked("scope"), stop_after_last=True, prompt=batch.prompt(columns)) as acts:
        model(**{**batch.inputs(), "use_cache": False})
    present = columns != ABSENT  # (B, P)
    means, norms = [], []
    for site in sites:
        wide = acts[site].float()
        valid = present.to(wide.device)[..., None]
        count = valid.sum(1)  # (B, 1)
        means.append((wide.masked_fill(~valid, 0).sum(1) / count).cpu())
        norms.append((wide.norm(dim=-1, keepdim=True).masked_fill(~valid, 0).sum(1) / count)[:, 0].cpu())
    return torch.stack(means, 1), torch.stack(norms, 1)
