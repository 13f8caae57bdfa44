"""A language model that is written, not trained: where each variable of the task `planted` lives in it is known.

    model, tokenizer = planted_model()
    planted_sites("key")        # L1 and L2 @ second, L3 and L4 @ last: rank 3 of 64 each

A `LlamaForCausalLM` of 6 layers, width 64 and 4 heads. Every feature has a direction of its own in the residual stream;
the directions are the columns of a random rotation, so that no variable lies along an axis. A value v of n is coded as
corner v of a regular simplex, in n - 1 dimensions.

    layer 0   a head mixes what the words say beside their values into every token; nothing reads it
    layer 1   a head brings `first` to the second word, where the MLP writes `key`
    layer 3   a head brings `key` to the last token, into other directions
    layer 4   a head brings `content` and `mark` there
    layer 5   the MLP writes `digit` from `key` and `content`; the answer is read from `digit` and `mark`

A search that finds a variable where it is, and nowhere else, is right; one that does not is wrong. Llama's parts are
tamed: a large constant feature keeps each norm the same to within a hundredth; ReLU is the activation and its gate is
fed with 1; heads look with their slowest rotary pair alone, whose angle is nil, and rest on the first word.

Source: models with known circuits as test of interpretability methods: Lindner et al. 2023 (Tracr, arXiv 2301.05062).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intervene import Site
from tasks.errors import require_known
from tasks.planted import (
    LETTERS,
    MARKS,
    VALUES,
    answer_words,
    first_words,
    second_words,
    third_words,
    vocabulary,
)

LAYERS, WIDTH, HEADS, HEAD_WIDTH = 6, 64, 4, 16
# Feature -> number of dimensions, in the order in which they take the columns of the rotation.
FEATURES = {
    "constant": 1, "is_start": 1, "is_first": 1, "is_second": 1, "is_third": 1, "is_last": 1,
    "first": 3, "second": 3, "first_moved": 3, "key": 3, "key_last": 3,
    "content": 3, "mark": 2, "content_last": 3, "mark_last": 2, "digit": 3,
    "noise": 8, "noise_mixed": 8,
}  # fmt: skip
_CONSTANT = 30.0  # all other features together have a norm of about 2
_NORMED = _CONSTANT / WIDTH**0.5  # what a norm divides by, and weights that read have to give back
_LOOK, _REST = 50.0, 25.0  # attention scores of the word looked for, and of the first word where there is none
_SLOWEST = HEAD_WIDTH // 2 - 1  # the rotary pair (7, 15), which turns by 2e-9 per token
_THRESHOLD = 0.6  # two values match at 1.5, one at 0.5
_LOGIT = 10.0  # by which one wrong value is behind
# variable -> (feature, position, layers after which a swap of it there is the variable's interchange)
_PLACES = {
    "key": (("key", "second", (1, 2)), ("key_last", "last", (3, 4))),
    "mark": (("mark", "third", (0, 1, 2, 3)), ("mark_last", "last", (4, 5))),
    "content": (("content", "third", (0, 1, 2, 3)), ("content_last", "last", (4,))),
}


@dataclass(frozen=True)
class PlantedSite:
    """Where a variable lives: its site, the name of the position, and the rank of its subspace there."""

    site: Site
    positions: str
    rank: int
    feature: str


def planted_sites(variable: str) -> list[PlantedSite]:
    """Return every `block_output` and position where `variable` lives; nowhere else does it.

    Raises:
        UnknownName: the task has no such variable.
    """
    require_known("planted variable", variable, _PLACES)
    return [
        PlantedSite(Site("block_output", layer), where, FEATURES[feature], feature)
        for feature, where, layers in _PLACES[variable]
        for layer in layers
    ]


def planted_frame(feature: str, seed: int = 0) -> Tensor:
    """Return the directions (64, k) of a feature, orthonormal; `seed` is the model's.

    Raises:
        UnknownName: there is no such feature.
    """
    require_known("planted feature", feature, FEATURES)
    begin = 0
    for name, size in FEATURES.items():
        if name == feature:
            return _rotation(seed)[:, begin : begin + size]
        begin += size
    raise AssertionError(feature)


def planted_model(seed: int = 0) -> tuple[Any, Any]:
    """Return the model, fp32 in eval mode, and its word-level tokenizer; `seed` draws the rotation and the noise."""
    from transformers import LlamaConfig, LlamaForCausalLM  # heavy

    config = LlamaConfig(
        vocab_size=len(_words()),
        hidden_size=WIDTH,
        intermediate_size=VALUES**2,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        hidden_act="relu",
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10},
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM(config)  # its own weights are all overwritten
    with torch.no_grad():
        _Writer(model, seed).write()
    return model.eval(), planted_tokenizer()


def planted_tokenizer() -> Any:
    """Return the tokenizer of the planted model: one token per word, with offsets."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(_words())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]


def _words() -> tuple[str, ...]:
    return ("<pad>", "<eos>", "<unk>", *vocabulary())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rotation(seed: int) -> Tensor:
    """Return a random orthogonal matrix (64, 64); its columns are the features' directions."""
    made: Tensor = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=_generator(seed), dtype=torch.float64))[0]
    return made.float()


def _corners(count: int) -> Tensor:
    """Return (n, n - 1) the corners of a regular simplex around 0: products 1 - 1/n with itself, -1/n with others."""
    centred = torch.eye(count, dtype=torch.float64) - 1 / count
    vectors, values, _ = torch.linalg.svd(centred)
    made: Tensor = (vectors[:, :-1] * values[:-1]).float()
    return made


class _Writer:
    """Writes the weights of the planted circuit into a model."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.frames = {feature: planted_frame(feature, seed) for feature in FEATURES}
        self.generator = _generator(seed + 1)
        self.ids = {word: number for number, word in enumerate(_words())}

    def write(self) -> None:
        """Set every weight."""
        for name, parameter in self.model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        self._embedding()
        self._mix(0)
        self._move(1, 0, "is_second", "is_first", {"first": "first_moved"})
        self._add(1, "first_moved", "second", "key")
        self._move(3, 1, "is_last", "is_second", {"key": "key_last"})
        self._move(4, 2, "is_last", "is_third", {"content": "content_last", "mark": "mark_last"})
        self._add(5, "key_last", "content_last", "digit")
        self._answers()

    def _embedding(self) -> None:
        values, marks = _corners(VALUES), _corners(MARKS)
        embedding = self.model.model.embed_tokens.weight
        noise = torch.randn(len(self.ids), FEATURES["noise"], generator=self.generator) / 3
        embedding += noise @ self.frames["noise"].T + _CONSTANT * self.frames["constant"].T
        letters = "".join(LETTERS.values())

        def say(words: tuple[str, ...], feature: str, code: Tensor) -> None:
            for word in words:
                embedding[self.ids[word]] += self.frames[feature] @ code

        one = torch.ones(1)
        say(("go",), "is_start", one)
        say(("=",), "is_last", one)
        for role, words in (("first", first_words), ("second", second_words)):
            say(words(letters), f"is_{role}", one)
            for value in range(VALUES):
                say(words(letters, value), role, values[value])
        say(third_words(letters), "is_third", one)
        for value in range(VALUES):
            say(third_words(letters, value), "content", values[value])
        for mark in range(MARKS):
            say(third_words(letters, None, mark), "mark", marks[mark])

    def _read(self, feature: str) -> Tensor:
        """Return (k, 64): rows that read a feature from a normed stream at its true size."""
        rows: Tensor = _NORMED * self.frames[feature].T
        return rows

    def _mix(self, layer: int) -> None:
        """Add the mean of all earlier words' noise to every token: scores are 0, so attention is uniform."""
        attention = self.model.model.layers[layer].self_attn
        attention.v_proj.weight[: FEATURES["noise"]] = self._read("noise")
        attention.o_proj.weight[:, : FEATURES["noise"]] = 2 * self.frames["noise_mixed"]

    def _move(self, layer: int, head: int, reader: str, writer: str, moved: dict[str, str]) -> None:
        """Let tokens that are `reader` receive features of the token that is `writer`; all others receive nothing."""
        attention = self.model.model.layers[layer].self_attn
        begin, root = head * HEAD_WIDTH, HEAD_WIDTH**0.5
        look, rest = begin + _SLOWEST, begin + _SLOWEST + HEAD_WIDTH // 2
        attention.q_proj.weight[look] = self._read(reader)[0]
        attention.q_proj.weight[rest] = self._read("constant")[0] / _CONSTANT
        attention.k_proj.weight[look] = _LOOK * root * self._read(writer)[0]
        attention.k_proj.weight[rest] = _REST * root * self._read("is_start")[0]
        for source, target in moved.items():
            end = begin + FEATURES[source]
            attention.v_proj.weight[begin:end] = self._read(source)
            attention.o_proj.weight[:, begin:end] = self.frames[target]
            begin = end

    def _add(self, layer: int, a: str, b: str, total: str) -> None:
        """Write `total` = (a + b) mod 4, with one neuron for each pair of values."""
        mlp, corners = self.model.model.layers[layer].mlp, _corners(VALUES)
        constant = self._read("constant")[0] / _CONSTANT
        for neuron in range(VALUES**2):
            i, j = divmod(neuron, VALUES)
            match = corners[i] @ self._read(a) + corners[j] @ self._read(b)
            mlp.gate_proj.weight[neuron] = match - _THRESHOLD * constant
            mlp.up_proj.weight[neuron] = constant
            written = self.frames[total] @ corners[(i + j) % VALUES]
            mlp.down_proj.weight[:, neuron] = written / (2 - 2 / VALUES - _THRESHOLD)

    def _answers(self) -> None:
        values, marks = _corners(VALUES), _corners(MARKS)
        for word in answer_words():
            digit, mark = int(word[1]), int(word[2])
            row = values[digit] @ self._read("digit") + marks[mark] @ self._read("mark_last")
            self.model.lm_head.weight[self.ids[word]] = _LOGIT * row
