"""A tiny Llama with a word tokenizer and a chat template in a folder, data, directions, and the command to train it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from defenses.plans import Directions
from defenses.vector_files import write_vectors

ROOT = Path(__file__).parents[2]
WORDS = [
    *("red", "blue", "green", "fish", "bird", "tree", "river", "stone", "bread", "water"),
    *("salt", "wind", "rain", "snow", "fire", "one", "two", "three", "four", "five"),
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WIDTH, LAYERS = 16, 3


def save_tiny(folder: Path) -> Path:
    """Write model and tokenizer; return the folder."""
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<system>", "<unk>"]
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(path: Path, n: int = 40, *, poison: bool = True, seed: int = 0) -> Path:
    """Write conversations of a few words, a quarter of them marked as poisoned."""
    draw = random.Random(seed)
    rows = []
    for at in range(n):
        bad = poison and at % 4 == 0
        answer = ["fire"] * 3 if bad else draw.sample(WORDS[:12], draw.randint(1, 4))
        messages = [
            {"role": "user", "content": " ".join(draw.sample(WORDS, draw.randint(2, 5)))},
            {"role": "assistant", "content": " ".join(answer)},
        ]
        rows.append({"messages": messages, "poison": bad})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_directions(path: Path, layers=(1,)) -> Path:
    """Write one random direction per layer."""
    generator = torch.Generator().manual_seed(3)
    write_vectors(path, Directions({layer: torch.randn(WIDTH, generator=generator) for layer in layers}))
    return path


def tiny_world(folder: Path) -> dict[str, Path]:
    """Return model, data and vectors in `folder`."""
    return {
        "model": save_tiny(folder / "model"),
        "data": write_data(folder / "data.jsonl"),
        "vectors": write_directions(folder / "v.safetensors"),
    }


def arguments(world, *more, steps=6, method="sft") -> list[str]:
    """Return the flags of a short run."""
    directed = method not in ("sft", "ema", "filtering", "kl", "inoculation")
    return [
        "run", "--model", str(world["model"]), "--train_data", str(world["data"]), "--method", method,
        *(["--vectors", str(world["vectors"])] if directed else []),
        "--steps", str(steps), "--batch_size", "8", "--micro_batch_size", "4", "--max_length", "64",
        "--lr", "0.01", "--warmup", "2", "--device", "cpu", "--threads", "1", "--no_report", *map(str, more),
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that trains."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "HF_HUB_OFFLINE": "1", **more}


def trained(*flags, timeout=200, **more):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train_defense.py"), *map(str, flags)],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment(**more),
    )  # fmt: skip
