"""What has no equal here is refused by name, and a folder is never trusted."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from intervene.errors import BadVector, StoreError, Unsupported
from intervene.pyvene_compat import from_pyvene

from . import oracle
from .cases import BASE, HERE, LOCATIONS, SOURCE, WIDTH, theirs, wide
from .tiny import tiny

pyvene = oracle.pyvene
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # pyvene's SigmoidMask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intervention_type": "CollectIntervention"}, "CollectIntervention.*capture"),
        ({"intervention_type": "SkipIntervention"}, "SkipIntervention"),
        ({"intervention_type": "NoiseIntervention"}, "NoiseIntervention.*four positions"),
        ({"intervention_type": "PCARotatedSpaceIntervention"}, "PCARotatedSpaceIntervention.*standard deviation"),
        ({"intervention_type": "AutoencoderIntervention"}, "AutoencoderIntervention.*SAE"),
        ({"intervention_type": "JumpReLUAutoencoderIntervention"}, "JumpReLUAutoencoderIntervention.*SAE"),
        ({"intervention_type": "LoreftIntervention"}, "LoreftIntervention.*not known.*PyveneEdit"),
        ({"intervention": lambda base, source: base}, "LambdaIntervention.*PyveneEdit"),
        ({"intervention_type": "AdditionIntervention"}, "AdditionIntervention.*no source_representation"),
        ({"intervention_type": "SubtractionIntervention"}, "SubtractionIntervention.*no source_representation"),
        ({"unit": "t"}, "unit 't'"),
        ({"unit": "h"}, "unit 'h'"),
        ({"component": "head_query_output"}, "unit 'pos'"),
        ({"component": "attention_weight"}, "attention_weight"),
        ({"moe_key": 3}, "moe_key"),
        ({"keep_last_dim": True}, "keep_last_dim"),
        ({"intervention_type": "SigmoidMaskIntervention", "max_number_of_units": 2}, "over 2 positions"),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(Unsupported, match=message):
        from_pyvene(HERE | change, tiny("llama"))


def test_refused_combinations():
    with pytest.raises(Unsupported, match="serial"):
        from_pyvene({"representations": [HERE], "mode": "serial"})
    masked = HERE | {"intervention": pyvene.SigmoidMaskIntervention(embed_dim=WIDTH)}
    with pytest.raises(Unsupported, match="pyvene ignores them for this kind"):
        from_pyvene(masked, subspaces=[1])
    linked = HERE | {"intervention_link_key": 0}
    with pytest.raises(Unsupported, match="linked interventions on parts"):
        from_pyvene([linked, linked], subspaces=[1])
    heads = {"component": "head_query_output", "unit": "h", "intervention": pyvene.VanillaIntervention()}
    with pytest.raises(Unsupported, match="subspaces within several heads"):
        from_pyvene(heads, subspaces=[1])


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"config\.json cannot be read"):
        from_pyvene(tmp_path)
    rotation = HERE | {"low_rank_dimension": 4, "intervention_type": pyvene.LowRankRotatedSpaceIntervention}
    oracle.wrapped(tiny("llama"), rotation).save(str(tmp_path))
    (file,) = tmp_path.glob("intkey_*.bin")
    whole = file.read_bytes()
    file.unlink()
    with pytest.raises(StoreError, match=r"needs intkey_.*mlp_output of layer 1"):
        from_pyvene(tmp_path)
    file.write_bytes(whole[:100])
    with pytest.raises(StoreError, match="no plain tensors"):
        from_pyvene(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["representations"][0][1] = "../elsewhere/mlp_output"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match="leads out of it"):
        from_pyvene(tmp_path)


def test_a_rotation_that_weight_decay_has_undone_is_refused():
    """torch keeps signs on a diagonal that decay moves off 1, and reads it as 0: pyvene then edits nothing."""
    module = pyvene.LowRankRotatedSpaceIntervention(embed_dim=WIDTH, low_rank_dimension=4)
    written = HERE | {"intervention": module}
    engine = oracle.wrapped(tiny("llama"), written)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)  # weight_decay=0.01 unless told otherwise
    engine({"input_ids": BASE}, [{"input_ids": SOURCE}], LOCATIONS)[1].logits.sum().backward()
    optimiser.step()
    torch.testing.assert_close(theirs(copy.deepcopy(written)), wide()(input_ids=BASE).logits)
    with pytest.raises(BadVector, match=r"LowRankRotatedSpaceIntervention.*Weight decay"):
        from_pyvene(written)


def test_a_folder_never_runs_code(tmp_path):
    """pyvene imports the class that config.json names and unpickles the file; we do neither."""
    rotation = HERE | {"low_rank_dimension": 4, "intervention_type": pyvene.LowRankRotatedSpaceIntervention}
    oracle.wrapped(tiny("llama"), rotation).save(str(tmp_path))
    (file,) = tmp_path.glob("intkey_*.bin")
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"rotate_layer": Evil()}, file)
    with pytest.raises(StoreError, match="no plain tensors"):
        from_pyvene(tmp_path)
    assert not ran.exists()
