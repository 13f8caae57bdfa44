"""What every peer is asked to do: one model, two batches, and the cases.

The cases act on the residual stream after every block (`block_output`), except `zero_head`, which acts on one head of
every block before the output projection, and `steer`, which acts on the middle block while generating.
"""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counting import Parts

CASES = {
    "add_all": "add a fixed vector to every token",
    "add_last": "add a fixed vector to the last token",
    "swap_last": "interchange at the last token, every site from one source",
    "das_last": "interchange of 8 learned directions at the last token",
    "zero_head": "zero one head at every token",
    "collect": "keep every token's activation",
}
RANK = 8
HEAD = 1


@dataclass(frozen=True)
class Workload:
    """A model with its batches (B, S) and what to add (L, D), keep (D, K) and zero; `layers` are the edited blocks."""

    model: nn.Module
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    prompt: dict[str, Tensor]
    vectors: Tensor
    frame: Tensor
    layers: tuple[int, ...]
    new_tokens: int

    @property
    def parts(self) -> Parts:
        """The modules of `model` whose calls are counted."""
        inner = self.model.transformer if hasattr(self.model, "transformer") else self.model.model
        if hasattr(inner, "wte"):
            return Parts(inner.wte, list(inner.h), inner.ln_f)
        return Parts(inner.embed_tokens, list(inner.layers), inner.norm)

    @property
    def blocks(self) -> list[Any]:
        """The model's blocks, in order."""
        return list(self.parts.blocks)

    @property
    def out_projections(self) -> list[Any]:
        """The modules that read all heads' outputs side by side, one a block."""
        return [block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj for block in self.blocks]

    @property
    def head_columns(self) -> slice:
        """The columns of head `HEAD` in what an output projection reads."""
        config: Any = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return slice(HEAD * width, (HEAD + 1) * width)

    @property
    def width(self) -> int:
        """D."""
        return self.vectors.shape[1]

    @property
    def middle(self) -> int:
        """The block that `steer` edits."""
        return len(self.blocks) // 2

    def own_copy(self) -> Workload:
        """Return the same work on a copy of the model: some peers change the model they are given."""
        return Workload(**{**vars(self), "model": copy.deepcopy(self.model)})

    def at(self, layers: tuple[int, ...]) -> Workload:
        """Return the same work on the same model at other layers."""
        return Workload(**{**vars(self), "layers": layers})

    def moved(self, model: Callable[[nn.Module], nn.Module], tensor: Callable[[Tensor], Tensor]) -> Workload:
        """Return the same work with model and tensors moved by the given functions."""
        batches = {
            name: {key: tensor(value) for key, value in getattr(self, name).items()}
            for name in ("base", "source", "prompt")
        }
        values = {"vectors": tensor(self.vectors), "frame": tensor(self.frame)}
        return Workload(**{**vars(self), **batches, **values, "model": model(copy.deepcopy(self.model))})


def make_workload(
    model: nn.Module, *, batch: int, length: int, prompts: int, new_tokens: int, device: str, seed: int = 0
) -> Workload:
    """Return the work for `model`: random tokens, no padding, every layer edited."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    width, layers = config.hidden_size, config.num_hidden_layers

    def tokens(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(3, config.vocab_size, (rows, length), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Workload(
        model=model.to(device).eval(),
        base=tokens(batch),
        source=tokens(batch),
        prompt=tokens(prompts),
        vectors=torch.randn(layers, width, generator=generator).to(device),
        frame=torch.linalg.qr(torch.randn(width, RANK, generator=generator)).Q.contiguous().to(device),
        layers=tuple(range(layers)),
        new_tokens=new_tokens,
    )


def make_model(name: str, *, width: int, layers: int, vocabulary: int) -> nn.Module:
    """Return a random model in the shape of `name` ("gpt2" or "llama"), or the one `load_model` knows by that name."""
    import transformers

    torch.manual_seed(0)
    heads = max(1, width // 64) if width >= 128 else 4
    marks: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        gpt2 = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=512, **marks
        )
        model: nn.Module = transformers.GPT2LMHeadModel(gpt2)
    elif name == "llama":
        llama = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            **marks,
        )
        model = transformers.LlamaForCausalLM(llama)
    else:
        from intervene.models import load_model

        model = load_model(name)[0]
    return model.eval()


@functools.cache
def token_names(vocabulary: int) -> Any:
    """Return a tokenizer that names token i "t<i>": two peers insist on a tokenizer, none is used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0")
    marks = {"bos_token": "t1", "eos_token": "t2", "pad_token": "t0", "unk_token": "t0"}
    folder = tempfile.mkdtemp()  # one peer loads the tokenizer again from where it came
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **marks).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
