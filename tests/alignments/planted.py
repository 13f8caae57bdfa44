"""A network whose answer to 'where is the variable?' is known by construction, and a toy language for tiny models."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignments import VectorPairs
from intervene.networks import MLP

WIDTH = 6
DIRECTION = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0]) / 5


def planted_mlp() -> MLP:
    """Return an MLP whose layer-0 state is x itself and whose answer is whether x . DIRECTION > 0.

    ReLU is made harmless by a bias that keeps everything positive, so the variable "sign along DIRECTION" lives in
    exactly one direction of L0 and L1.
    """
    model = MLP(WIDTH, WIDTH, 2, 2)
    with torch.no_grad():
        for layer in model.layers:
            layer.linear.weight.copy_(torch.eye(WIDTH))
            layer.linear.bias.fill_(10.0)
        model.head.weight.copy_(torch.stack([-DIRECTION, DIRECTION]))
        shift = float(torch.full((WIDTH,), 20.0) @ DIRECTION)
        model.head.bias.copy_(torch.tensor([shift, -shift]))
    return model.eval()


def planted_pairs(model: MLP, n: int, seed: int) -> VectorPairs:
    """Return pairs labelled by executing the rule on the source: the sign along DIRECTION is what is interchanged."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, WIDTH, generator=generator)
    source = torch.randn(n, WIDTH, generator=generator)
    return VectorPairs(model, base, source, (source @ DIRECTION > 0).long())


WORDS = [
    "<pad>",
    "<eos>",
    "While",
    "When",
    "and",
    "went",
    "to",
    "the",
    "store",
    "park",
    ",",
    "gave",
    "a",
    "drink",
    "ring",
    "Ann",
    "Bob",
    "Cid",
    "Dan",
    "Eve",
    "Fay",
    "Gus",
    "Hal",
]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of `WORDS`, with offsets."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
