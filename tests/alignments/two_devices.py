"""A tiny llama whose last block lies on the pretend device: prints how far it is from the same model on the CPU.

A process of its own, as the pretend device cannot be taken back. Inside `HostCounter`, an operation that mixes tensors
of both devices raises, as it would on two GPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BOUNDARY = 2  # the first block on the other device


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(one, device) for one in value)
    return {name: moved(one, device) for name, one in value.items()} if type(value) is dict else value


def send_to(module, device, back=None):
    """Do for one module what accelerate does: move its inputs to it (not the cache), and its output back if asked."""
    forward = module.forward

    def sent(*args, **kwargs):
        kept = {name: value for name, value in kwargs.items() if name == "past_key_values"}
        out = forward(*moved(args, device), **{**moved(kwargs, device), **kept})
        return out if back is None else moved(out, back)

    module.forward = sent


def split(model: nn.Module):
    from benchmarks.pretend import register, to_pretend

    device = register()
    parts = [*model.model.layers[BOUNDARY:], model.model.norm, model.lm_head]
    for part in parts:
        to_pretend(part)
        send_to(part, device, back="cpu" if part is model.lm_head else None)
    return model


if __name__ == "__main__":
    from alignments import METHODS, LanguagePairs, Setup
    from alignments.answers import predict
    from alignments.fit import Budget, fit_together
    from benchmarks.pretend import HostCounter
    from intervene.interventions import placed_for, trainable_parameters
    from intervene.marked import Marked
    from tests.alignments.planted import toy_tokenizer
    from tests.alignments.together import name_pairs
    from tests.tiny import tiny_model

    torch.set_num_threads(1)
    sites = ["L0.block_output", "L1.mlp_output", f"L{BOUNDARY}.block_input", f"L{BOUNDARY}.block_output",
             f"L{BOUNDARY}.attention_output", f"L{BOUNDARY}.head_output[1]"]  # fmt: skip
    whole, halves = tiny_model("llama"), split(tiny_model("llama"))
    told = {}

    def everything(model):
        found = {}
        data = LanguagePairs(model, toy_tokenizer(), name_pairs(8), sites=sites, positions=["last"], batch_size=4)
        assert data.prefix.exact, data.exactness()
        for site in data.sites:
            width = 8 if site.units is not None else 32
            plan = placed_for(model, METHODS["das"].make(Setup(site, Marked("last"), width, 3, 0)))
            with torch.no_grad():
                found[f"{site}"] = data.logits(plan, torch.arange(8)).cpu()
            if sys.argv[1] == "fit":
                fit_together(model, [plan], data, Budget(3, 4, 0.01), seeds=[0])
                found[f"{site} fitted"] = trainable_parameters(plan)[0].detach().cpu()
                found[f"{site} answers"] = predict(plan, data).cpu().float()
            told[str(site)] = str(trainable_parameters(plan)[0].device)
        return found, {name: str(one.device) for name, one in vars(data)["prefix"].streams.items()}

    expected, _ = everything(whole)
    with HostCounter():
        found, streams = everything(halves)
    worst = {name: float((found[name] - one).abs().max()) for name, one in expected.items()}
    print(json.dumps({"worst": worst, "plans": told, "streams": streams}))
