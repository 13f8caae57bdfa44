"""What the tests of `pyvene_compat` share: pyvene's modules, and both ways of running them."""

from __future__ import annotations

import torch

from intervene import interchange

from . import oracle
from .tiny import random_tensor, tiny, token_ids

pyvene = oracle.pyvene

# Compared in fp64: pyvene rotates the whole activation there and back, in fp32 an error of 4e-6 in logits of size 4.
TOLERANCE = 1e-6
WIDTH = 32
BASE, SOURCE = token_ids(0), token_ids(1)
BASE_AT, SOURCE_AT = [[4], [5]], [[2], [3]]
LOCATIONS = oracle.positions(BASE_AT, SOURCE_AT)
HERE = {"layer": 1, "component": "mlp_output"}
VECTOR = random_tensor(WIDTH, seed=1)


def wide():
    """Return the tiny Llama in fp64."""
    return tiny("llama").double()


def ours(plan, model=None):
    """Return our logits, with a source run where some edit needs one."""
    model = wide() if model is None else model
    with torch.no_grad():
        return interchange(model, plan, {"input_ids": BASE}, {"input_ids": SOURCE}).logits


def theirs(representations, locations=LOCATIONS, **options):
    """Return pyvene's logits, with a source run unless the locations are of the base alone."""
    source = None if "base" in locations else SOURCE
    for one in representations if isinstance(representations, list) else [representations]:
        one["intervention"].double()
    return oracle.run(wide(), representations, BASE, source=source, locations=locations, **options)


def same(found, wanted):
    assert (wanted - wide()(input_ids=BASE).logits).abs().max() > 1e-3, "the edit shows in nothing"
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = make()
        return made.double() if isinstance(made, torch.nn.Module) else made


def shaken(module):
    """Return the module as training leaves it: a rotation off its start, gates neither all open nor all shut."""
    for name, parameter in module.named_parameters():
        if name.endswith("weight.original"):
            parameter.data += 0.3 * random_tensor(*parameter.shape, seed=3).tril(-1)  # the rest gets no gradient
        if name in ("mask", "masks"):
            parameter.data = random_tensor(*parameter.shape, seed=2)
        if name == "temperature":
            parameter.data = torch.tensor(0.7)
    return module


MODULES = {
    "Vanilla": lambda: pyvene.VanillaIntervention(),
    "Vanilla, part": lambda: _part(pyvene.VanillaIntervention(embed_dim=WIDTH)),
    "Vanilla, constant": lambda: pyvene.VanillaIntervention(source_representation=VECTOR),
    "Zero": lambda: pyvene.ZeroIntervention(),
    "Addition": lambda: pyvene.AdditionIntervention(source_representation=VECTOR),
    "Addition, part": lambda: _part(pyvene.AdditionIntervention(embed_dim=WIDTH, source_representation=VECTOR)),
    "Subtraction": lambda: pyvene.SubtractionIntervention(source_representation=VECTOR[None, None]),
    "LowRankRotatedSpace": lambda: shaken(
        pyvene.LowRankRotatedSpaceIntervention(embed_dim=WIDTH, low_rank_dimension=4)
    ),
    "RotatedSpace": lambda: pyvene.RotatedSpaceIntervention(embed_dim=WIDTH),
    "RotatedSpace, part": lambda: shaken(_part(pyvene.RotatedSpaceIntervention(embed_dim=WIDTH))),
    "SigmoidMask": lambda: shaken(pyvene.SigmoidMaskIntervention(embed_dim=WIDTH)),
    "SigmoidMaskRotatedSpace": lambda: shaken(pyvene.SigmoidMaskRotatedSpaceIntervention(embed_dim=WIDTH)),
}


def _part(module):
    module.set_interchange_dim(5)
    return module
