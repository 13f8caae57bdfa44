"""`answers`: what a model says to prompts, in batches, the same as one by one; `token_ids`: prompts as token ids.

    said = answers(model, tokenizer, ["Name a river."], max_new_tokens=32)
    with_vector = answers(model, tokenizer, prompts, plan=[Intervention("L14.block_output", Add(v))])

Greedy unless a temperature is given. Sampling draws from one generator per prompt, so that an answer depends on the
seed and on its prompt's place in the list, not on the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from defenses.chat import PLAIN_TEMPLATE, Message, chat_of
from defenses.errors import DataError
from intervene import Plan, intervene
from intervene.errors import asked_found_do

Prompt = str | Sequence[Message]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in eval mode inside the block, without gradient, and restore each one's own flag."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def messages_of(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """Return `prompt` as chat messages: a text is one user turn; `system` goes first.

    Raises:
        DataError: `system` is given and the messages have a system turn of their own.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if system is None:
        return turns
    if turns and turns[0].get("role") == "system":
        raise DataError("A prompt with a system turn of its own: a system prompt was given too. Keep one of the two.")
    return [{"role": "system", "content": system}, *turns]


def token_ids(tokenizer: Any, prompt: Prompt, system: str | None = None, chat_template: str | None = None) -> list[int]:
    """Return `prompt` as the ids after which the model answers.

    With a chat template a text becomes one user turn and the template opens the answer; without one a text is taken
    as it is.

    Args:
        chat_template: instead of the tokenizer's own, the one the model was trained with: jinja, or "plain".

    Raises:
        DataError: messages or a system prompt for a tokenizer without a chat template, or a prompt of no tokens.
    """
    template = PLAIN_TEMPLATE if chat_template == "plain" else chat_template
    if template or getattr(tokenizer, "chat_template", None):
        turns = messages_of(prompt, system)
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
    elif isinstance(prompt, str) and system is None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        asked = "A prompt of messages" if system is None else "A system prompt"
        found, do = "this tokenizer has no chat template.", "Give plain texts, with everything in them."
        raise DataError(asked_found_do(asked, found, do))
    if not ids:
        raise DataError(f"Prompt {prompt!r}: it has no tokens. Give a text that is not empty.")
    return [int(one) for one in ids]


def answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    system: str | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    plan: Plan = (),
) -> list[str]:
    """Return the model's answer to each prompt, in order, without special tokens and outer white space.

    Batches are padded on the left by hand, so the tokenizer is not touched; the model answers in eval mode and gets
    its flags back. Of the checkpoint's own generation settings (repetition penalty, top-p, beams) only the end tokens
    are used; the one that the chat template puts after an answer ends one too. Every rank of a sharded model must call
    this with the same prompts.

    Args:
        max_new_tokens: answers are cut there. temperature: 0 is greedy; above, softmax(logits / temperature) is drawn.
        chat_template: as in `token_ids`. plan: interventions that hold while it answers (steering at inference).

    Raises:
        DataError: as `token_ids`; a prompt that leaves the model no room for the answer; a negative temperature.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
        asked = f"Answers at temperature {temperature}, {max_new_tokens} new tokens, batches of {batch_size}"
        raise DataError(asked_found_do(asked, "one is too small.", "Use at least 0, 1 and 1."))
    ids = [token_ids(tokenizer, prompt, system, chat_template) for prompt in prompts]
    _check_room(model, ids, max_new_tokens)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # like lengths together: little padding
    said = [""] * len(ids)
    settings = _settings(model, tokenizer, max_new_tokens, _turn_end(tokenizer, chat_template))
    with evaluating(model), ExitStack() as stack:
        if plan:
            stack.enter_context(intervene(model, plan))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            draws = [_Draws(seed, rows, temperature)] if temperature > 0 else []
            new = _generated(model, [ids[row] for row in rows], settings, draws)
            for row, tokens in zip(rows, new, strict=True):
                said[row] = tokenizer.decode(_until(tokens, settings.eos_token_id), skip_special_tokens=True).strip()
    return said


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` (B, S), the rows ending at the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter lies, which is where its inputs go."""
    return next(model.parameters()).device


def _generated(model: Any, rows: list[list[int]], settings: Any, draws: list[Any]) -> list[list[int]]:
    batch = left_padded(rows, settings.pad_token_id, device_of(model))
    out = model.generate(**batch, generation_config=settings, logits_processor=draws)  # (B, S + new)
    new: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return new


def _turn_end(tokenizer: Any, chat_template: str | None) -> list[int]:
    """Return the token that the chat template puts after an answer: a base model's own end token is often another."""
    if not (chat_template or getattr(tokenizer, "chat_template", None)) or not getattr(tokenizer, "is_fast", False):
        return []
    end = chat_of(tokenizer, chat_template).end_of_turn
    return [int(tokenizer.convert_tokens_to_ids(end))] if end else []


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, also: Sequence[int] = ()) -> Any:
    """Generation settings in which nothing of the checkpoint's own is left that would change a greedy answer.

    Answers end at the checkpoint's end tokens, and at those in `also`.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends = list(dict.fromkeys([*ends, *also]))
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    # set outright, because what is left None is filled in from the checkpoint
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        use_cache=True,
        return_dict_in_generate=False,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )


class _Draws:
    """A logits processor that adds Gumbel noise, so that the greedy choice is a draw from softmax(logits / T)."""

    def __init__(self, seed: int, rows: Sequence[int], temperature: float) -> None:
        # on the CPU, whatever the model's device: the same draws everywhere
        self.generators = [torch.Generator().manual_seed(_mixed(seed, row)) for row in rows]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=one) for one in self.generators])  # (B, V)
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + noise.to(scores.device)


def _mixed(seed: int, row: int) -> int:
    # 32 bits, because torch's generator on the CPU looks at no more
    return int.from_bytes(sha256(f"{seed} {row}".encode()).digest()[:4], "big")


def _until(tokens: list[int], ends: Sequence[int] | None) -> list[int]:
    """The tokens before the first end token; what follows it in a batch is padding."""
    stop = next((place for place, token in enumerate(tokens) if token in (ends or ())), len(tokens))
    return tokens[:stop]


def _check_room(model: nn.Module, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max((len(row) for row in ids), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        number = next(index for index, row in enumerate(ids) if len(row) == longest)
        asked = f"Prompt {number} of {longest} tokens and {max_new_tokens} new ones"
        found, do = f"the model has {limit} positions.", "Shorten the prompt or ask for fewer new tokens."
        raise DataError(asked_found_do(asked, found, do))
