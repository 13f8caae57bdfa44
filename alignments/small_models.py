"""Small language models trained here for a task that no given model can do, kept in the cache once trained.

    model, tokenizer, accuracy = trained("price_tagging")           # minutes the first time, then a moment
    model, tokenizer, accuracy = trained(PriceTagging(words=("True", "False")), Training(layers=2, steps=3000))

The model is a Llama of a few narrow layers, the tokenizer has one token per word. Only the answer after each prompt is
learned. Accuracy is measured on the select split, whose entities were not trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from alignments.pairs import Progress
from alignments.tokens import first_token
from intervene.embedded import cache_root, quiet_bars
from intervene.errors import ShapeMismatch, asked_found_do
from intervene.files import beside, sha256_of, sync
from intervene.models import load_model
from tasks import SPLITS, NotEnough, Task, task_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of every cache key: raise it when training, prompts or drawing change what a model would become.
VERSION = 1
PAD, UNKNOWN = "[pad]", "[unk]"
FACTS = "training.json"
_WEIGHTS = "model.safetensors"
_POOL = 20_000  # examples drawn of a task that cannot list its prompts
_CHUNK = 4096  # prompts scored at once


@dataclass(frozen=True)
class Training:
    """What model is trained and how; the defaults learn short price tagging.

    Attributes:
        layers, width, heads: of the transformer; the width is a multiple of the heads.
        warmup: share of the steps in which the learning rate rises; after it falls to 0 along a cosine.
        weight_decay: of AdamW.
    """

    layers: int = 3
    width: int = 64
    heads: int = 4
    steps: int = 1500
    batch_size: int = 512
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    seed: int = 0


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per word between blanks: " Yes" and "Yes" are the same token.

    Ids are those of `words` in their order, after padding (0) and unknown words (1). Batches are padded on the right.

    Raises:
        ShapeMismatch: there is no word, or one holds a blank.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    listed = list(dict.fromkeys(words))
    broken = [word for word in listed if len(word.split()) != 1]
    if broken or not listed:
        found = f"{broken[0]!r} is not one word." if broken else "there are none."
        raise ShapeMismatch(asked_found_do("word_tokenizer: words", found, "Give words without blanks."))
    ids = {word: index for index, word in enumerate(dict.fromkeys([PAD, UNKNOWN, *listed]))}
    inner = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # not Whitespace(), which would cut "1.25" at its point
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast  # transformers leaves it untyped
    made: PreTrainedTokenizerBase = fast(tokenizer_object=inner, pad_token=PAD, unk_token=UNKNOWN, padding_side="right")
    return made


def small_transformer(
    vocab: int, *, layers: int = 3, width: int = 64, heads: int = 4, seed: int = 0
) -> PreTrainedModel:
    """Return an untrained Llama in eval mode with `vocab` tokens; the same seed gives the same weights.

    Raises:
        ShapeMismatch: the width of a head is not a positive even number, as rotary positions need.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if min(layers, width, heads, vocab) < 1 or width % (2 * heads):
        asked = f"small_transformer: {layers} layers, {vocab} tokens, width {width} in {heads} heads"
        raise ShapeMismatch(asked_found_do(asked, "no such model.", "Make width a multiple of twice the heads."))
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(config)
    model.train(False)
    return model


@dataclass(frozen=True, eq=False)
class _Answered:
    """Prompts as tokens: ids (N, S), padded on the left; mask (N, S) or None where nothing is; answers (N,)."""

    ids: Tensor
    mask: Tensor | None
    answers: Tensor

    def __len__(self) -> int:
        return len(self.answers)

    def logits(self, model: nn.Module, rows: Tensor | slice) -> Tensor:
        """Return the logits (b, V) after the prompts `rows`."""
        more = {} if self.mask is None else {"attention_mask": self.mask[rows]}
        output = model(input_ids=self.ids[rows], logits_to_keep=1, use_cache=False, **more)
        return cast(Tensor, output.logits[:, -1])


def _texts(task: Task, split: str) -> list[tuple[str, str]]:
    """Return prompts of `split` with their answers: all, where the task lists them, else a large sample."""
    listed: Callable[[str], Iterable[tuple[str, str]]] | None = getattr(task, "texts", None)
    if listed is not None:
        return list(listed(split))
    wanted = _POOL
    while True:
        try:
            return [(example.prompt, example.answer) for example in task.examples(split, n=wanted)]
        except NotEnough:  # how many there are is not known before
            if wanted == 1:
                raise
            wanted //= 2


def words_of(task: Task) -> list[str]:
    """Return every word of the task's prompts and answers, all splits, in the order of the alphabet."""
    return sorted({word for split in SPLITS for text in _texts(task, split) for part in text for word in part.split()})


def _encoded(tokenizer: Any, texts: list[tuple[str, str]]) -> _Answered:
    found = tokenizer([prompt for prompt, _ in texts], padding=True, padding_side="left", return_tensors="pt")
    answers = {answer: first_token(tokenizer, answer) for answer in {answer for _, answer in texts}}
    mask = found["attention_mask"]
    return _Answered(
        ids=found["input_ids"],
        mask=None if bool(mask.all()) else mask,
        answers=torch.tensor([answers[answer] for _, answer in texts]),
    )


def train_on_task(
    task: Task,
    model: nn.Module,
    tokenizer: Any,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int = 0,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    progress: Progress | None = None,
) -> float:
    """Train `model` in place on the train split, and return the last step's loss in nats; eval mode after.

    The loss is the cross-entropy of the answer's first token over the whole vocabulary, after the prompt's last token;
    no other token is learned. AdamW, gradients clipped to norm 1; batches are drawn with replacement.
    `progress` is told (steps done, steps in all).
    """
    data = _encoded(tokenizer, _texts(task, "train"))
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_share(step, steps, warmup))
    model.train()
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        loss = nn.functional.cross_entropy(data.logits(model, rows), data.answers[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    model.eval()
    return float(loss.detach())


def rate_share(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rate: up in a line, then down along a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def task_accuracy(task: Task, model: nn.Module, tokenizer: Any, split: str = "select") -> float:
    """Return the share of the split's prompts (all, or a large sample) after which the top token is the answer's."""
    data = _encoded(tokenizer, _texts(task, split))
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), _CHUNK):
            rows = slice(start, start + _CHUNK)
            right += int((data.logits(model, rows).argmax(-1) == data.answers[rows]).sum())
    return right / len(data)


def trained(
    task: Task | str,
    config: Training | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, float]:
    """Return a model trained on `task`, its tokenizer, and its accuracy on the select split.

    It is trained once: `trained/<digest>` under the cache of `intervene.load_model` holds it afterwards. The digest
    covers the task with its parameters, `config` and `VERSION`. A folder is moved into place when it is complete, and
    one whose weights are not those recorded is trained anew.

    Raises:
        UnknownName: there is no task of that name.
        NotEnough: the task lacks answers that one token tells apart.
        TaskError: it can neither list its prompts nor be sampled.
    """
    task = task_named(task) if isinstance(task, str) else task
    config = config or Training()
    folder = cache_root(cache_dir) / "trained" / _digest(task, config)
    facts = facts_in(folder)
    if facts is None:
        facts = _train_into(folder, task, config, progress)
    model, tokenizer = load_model(folder)
    return model, tokenizer, float(facts["accuracy"])


def _digest(task: Task, config: Training) -> str:
    # a task is a frozen dataclass, so that its text holds all its parameters
    text = json.dumps([VERSION, task.name, repr(task), asdict(config)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def facts_in(folder: Path) -> dict[str, Any] | None:
    """Return what was recorded of the trained model in `folder`, or None if it is not there or not whole."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        whole = facts["sha256"] == sha256_of(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def _train_into(folder: Path, task: Task, config: Training, progress: Progress | None) -> dict[str, Any]:
    """Train the model, move it to `folder` when complete, and return what is recorded of it."""
    started = time.monotonic()
    tokenizer = word_tokenizer(words_of(task))
    task = task.for_tokenizer(tokenizer)
    model = small_transformer(
        len(cast(Any, tokenizer)), layers=config.layers, width=config.width, heads=config.heads, seed=config.seed
    )
    loss = train_on_task(
        task,
        model,
        tokenizer,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=config.seed,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        progress=progress,
    )
    accuracy = task_accuracy(task, model, tokenizer)
    with beside(folder) as draft:
        with quiet_bars():
            model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        facts = {
            "version": VERSION,
            "task": task.name,
            "config": asdict(config),
            "accuracy": accuracy,
            "loss": loss,
            "seconds": round(time.monotonic() - started, 1),
            "sha256": sha256_of(draft / _WEIGHTS),
        }
        (draft / FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
        keep_draft(draft, folder)
    return facts_in(folder) or facts


def keep_draft(draft: Path, folder: Path) -> None:
    """Make `draft` the folder, unless another process has meanwhile put a whole one there."""
    if facts_in(folder) is not None:
        return
    with beside(folder) as aside:
        if folder.exists():
            os.replace(folder, aside)  # a folder that is not empty cannot be replaced in one step
        os.replace(draft, folder)
    sync(folder.parent)
