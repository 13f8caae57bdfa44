"""Plans and vectors on disk: the same outputs bit for bit, whole or refused, and nothing run that a file names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from functools import cache

import pytest
import torch
from torch import nn

from intervene import (
    PCA,
    SAE,
    Add,
    Affine,
    AllTokens,
    At,
    Block,
    BoundarySwap,
    BudgetSwap,
    Coordinates,
    DecodeSteps,
    FaithfulBoundarySwap,
    First,
    GatedSwap,
    HardConcreteSwap,
    Identity,
    Intervention,
    LastToken,
    LowRankAffine,
    Marked,
    Mask,
    Match,
    Noise,
    ProbeAbove,
    Project,
    ProjectionAbove,
    Prompt,
    Response,
    Scale,
    SecondBoundarySwap,
    Set,
    Site,
    Span,
    SteeringVector,
    StopGradient,
    StoreError,
    Subspace,
    Swap,
    WrongModel,
    Zero,
    collect_sources,
    fingerprint,
    interchange,
    intervene,
)
from intervene.codecs import CONDITION_CODECS, EDIT_CODECS, FEATURIZER_CODECS, POSITION_CODECS
from intervene.conditions import CONDITIONS
from intervene.edits import Edit
from intervene.featurizers import Featurizer
from intervene.interventions import modules_of
from intervene.positions import Positions
from intervene.store import _ITEM_KEYS, load_plan, save_plan
from tests.intervene.values import classes
from tests.tiny import tiny_batch, tiny_model

D = 32
llama = cache(lambda: tiny_model("llama", num_hidden_layers=2))  # no test changes it


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frame(rank):
    return torch.linalg.qr(randn(D, rank, seed=2)).Q


def frozen_after_training():
    made = Subspace.from_weight(randn(D, 4))  # as an optimiser leaves it: far from orthonormal
    made.weight.requires_grad_(False)
    return made


def sae(activation, **options):
    threshold = randn(6, seed=8).abs() if activation == "jumprelu" else None
    return SAE(
        randn(D, 6), randn(6, D, seed=5), encoder_bias=randn(6, seed=6), decoder_bias=randn(D, seed=7),
        threshold=threshold, activation=activation, **options,
    )  # fmt: skip


LENSES = {
    "identity": Identity,
    "coordinates": lambda: Coordinates([5, 0, 31]),
    "subspace": lambda: Subspace.from_weight(randn(D, 4)),
    "subspace, frozen after training": frozen_after_training,
    "subspace, random": lambda: Subspace(D, 3, seed=4, trainable=False),
    "subspace, given": lambda: Subspace.from_frame(frame(4)),
    "subspace, given in column order": lambda: Subspace.from_frame(frame(4).mT.contiguous().mT),
    "subspace, cayley": lambda: filled(Subspace(D, 4, frame="cayley")),
    "subspace, householder": lambda: filled(Subspace(D, 4, frame="householder")),
    "subspace, matrix_exp": lambda: filled(Subspace(D, 4, frame="matrix_exp")),
    "block": lambda: Block(filled(Subspace(D, 6, frame="cayley")), 1, 5),
    "pca": lambda: PCA.fit(randn(50, D), 4),
    "sae relu": lambda: sae("relu", centred=True),
    "sae jumprelu": lambda: sae("jumprelu"),
}


def filled(module):
    """Return `module` with every parameter redrawn, as if it had learned."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * randn(*parameter.shape, seed=20 + number))
    return module


def vector_at(site="L1.block_output", width=D, **changes):
    values = {"vector": randn(width, seed=9), "site": Site.parse(site), "fingerprint": fingerprint(llama())}
    return SteeringVector(**{**values, "method": "mean_difference", "model": "tiny", "pooling": "last", **changes})


EDIT_CASES = {
    "swap": lambda k: Swap(),
    "zero": lambda k: Zero(),
    "scale": lambda k: Scale(1 / 3),
    "add": lambda k: Add(randn(k), 0.7),
    "add, relative": lambda k: Add(randn(k), 0.1, relative=True),
    "add, per example": lambda k: Add(randn(2, k), torch.tensor([0.3, -2.0])),
    "add, per position": lambda k: Add(randn(2, 2, k)),
    "add, trainable": lambda k: Add(torch.zeros(k), trainable=True),
    "set": lambda k: Set(randn(k)),
    "set, trained": lambda k: filled(Set(torch.zeros(k), trainable=True)),
    "project": lambda k: Project(randn(k)),
    "gated": lambda k: filled(GatedSwap(k, temperature=0.37)),
    "gated, hard": lambda k: filled(GatedSwap(k)).eval(),
    "gated, tied": lambda k: filled(GatedSwap(k, tied=True)),
    "boundary": lambda k: BoundarySwap(k, fraction=0.6, temperature=0.11),
    "boundary, hard": lambda k: BoundarySwap(k, fraction=0.6).eval(),
    "gated, groups": lambda k: filled(GatedSwap(k, groups=torch.arange(k).flip(0) // 2)),
    "hard concrete": lambda k: filled(HardConcreteSwap(k, temperature=0.3, stretch=(-0.2, 1.3), seed=4)),
    "budget": lambda k: filled(BudgetSwap(k, 1, temperature=0.2)),
    "faithful": lambda k: FaithfulBoundarySwap(k, temperature=3.0, fraction=0.6),
    "faithful, hard": lambda k: FaithfulBoundarySwap(k, fraction=0.9, hard_eval=True).eval(),
    "second": lambda k: SecondBoundarySwap(FaithfulBoundarySwap(k, temperature=2.0, variables=2)),
    "affine": lambda k: filled(Affine(k)),
    "low rank affine": lambda k: filled(LowRankAffine(k, 2)),
    "stop gradient": lambda k: StopGradient(torch.arange(k) % 2 == 0),
    "stop all gradient": lambda k: StopGradient(),
    "noise": lambda k: Noise(0.2, seed=5),
}
WHERE = At([[1, -1], [0, 2]])


def logits(plan):
    model = llama()
    with torch.no_grad():
        return interchange(model, plan, tiny_batch(model, "left"), tiny_batch(model, "left", seed=1)).logits


def same_flags(left, right):
    assert type(left) is type(right) and left.training == right.training
    ours, theirs = dict(left.named_parameters()), dict(right.named_parameters())
    ours, theirs = {**ours, **dict(left.named_buffers())}, {**theirs, **dict(right.named_buffers())}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
        assert tensor.requires_grad == theirs[name].requires_grad, name
        assert isinstance(tensor, nn.Parameter) == isinstance(theirs[name], nn.Parameter), name


def round_trip(plan, folder, **options):
    return load_plan(save_plan(plan, folder / "plan"), **options)


def test_every_class_has_a_codec_and_no_other():
    assert EDIT_CODECS.keys() == classes(Edit)
    assert FEATURIZER_CODECS.keys() == classes(Featurizer)
    assert CONDITION_CODECS.keys() == CONDITIONS.keys()
    ours = {kind.__name__ for kind in Positions.__subclasses__() if kind.__module__.startswith("intervene.")}
    assert POSITION_CODECS.keys() == ours
    assert {type(make(4)).__name__ for make in EDIT_CASES.values()} == classes(Edit)
    assert {type(make()).__name__ for make in LENSES.values()} == classes(Featurizer)


def test_no_field_is_left_out():
    """A field that someone adds to positions or to Intervention must be stored, or it is lost without a word."""
    for name, codec in POSITION_CODECS.items():
        kept = {*codec.options, *(["selected"] if name == "Mask" else []), *(["tokenizer"] if name == "Match" else [])}
        assert kept == {field.name for field in fields(codec.kind)}, name
    assert {field.name for field in fields(Intervention)} == _ITEM_KEYS


@pytest.mark.parametrize("lens", LENSES)
def test_the_loaded_plan_gives_the_same_logits_bit_for_bit(lens, tmp_path):
    featurizer = LENSES[lens]()
    edits = {name: make(featurizer.features(D)) for name, make in EDIT_CASES.items()}
    plan = [Intervention("L1.block_output", edit, WHERE, featurizer) for edit in edits.values()]
    loaded = round_trip(plan, tmp_path)
    plain = logits([Intervention("L1.block_output", Scale(1.0), WHERE)])
    same_flags(featurizer, loaded[0].featurizer)
    for name, old, new in zip(edits, plan, loaded, strict=True):
        same_flags(old.edit, new.edit)
        before = logits([old])
        assert torch.equal(before, logits([new])), name
        shows = name not in ("stop gradient", "stop all gradient", "add, trainable")
        assert not shows or not torch.equal(before, plain), f"{name} shows in nothing"


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_loaded_plan_are_the_same_bit_for_bit(training, tmp_path):
    plan = [Intervention("L0.mlp_output", filled(GatedSwap(4)).train(training), LastToken(), Subspace(D, 4))]
    model, gradients = llama(), []
    for each in (plan, round_trip(plan, tmp_path)):
        base, source = tiny_batch(model), tiny_batch(model, seed=1)
        with intervene(model, each, collect_sources(model, each, source)):
            model(**base).logits.square().mean().backward()
        gradients.append([parameter.grad for module in modules_of(each) for parameter in module.parameters()])
    model.zero_grad()
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]] == [False, not training]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


@pytest.mark.parametrize(
    "positions",
    [
        AllTokens(),
        LastToken(),
        First(3),
        At(2),
        At(0, -1),
        At([[3, 1], [5, 2]]),
        Span(1, -1),
        Span(2),
        Prompt(),
        Prompt(marker=(5, 6)),
        Response((7,)),
        DecodeSteps(1, 4),
        DecodeSteps(),
        Match([4, 5], occurrence=-1, token=0),
        Marked("subject2"),
    ],
    ids=repr,
)
def test_positions_come_back_equal(positions, tmp_path):
    loaded = round_trip([Intervention("L0.mlp_output", Swap(), LastToken(), source_positions=positions)], tmp_path)
    assert loaded[0].source_positions == positions
    assert loaded[0].positions == LastToken()


def test_a_mask_comes_back_equal(tmp_path):
    mask = torch.tensor([[True, False], [False, True]])
    loaded = round_trip([Intervention("L0.mlp_output", Zero(), Mask(mask), source_positions=Mask(~mask))], tmp_path)
    assert loaded[0].positions.selected.dtype == torch.bool
    assert torch.equal(loaded[0].positions.selected, mask)
    assert torch.equal(loaded[0].source_positions.selected, ~mask)


class Tokenizer:
    """Equal to none but itself, as tokenizers are."""


def test_a_match_on_text_asks_for_its_tokenizer(tmp_path):
    tokenizer = Tokenizer()
    plan = [Intervention("L0.mlp_output", Zero(), Match(" Paris", tokenizer=tokenizer, occurrence=-1, token=0))]
    save_plan(plan, tmp_path / "plan", tokenizer_name="org/some-model")
    with pytest.raises(StoreError, match=r"Match\(' Paris'\).*Pass tokenizer=.*saved with 'org/some-model'"):
        load_plan(tmp_path / "plan")
    assert load_plan(tmp_path / "plan", tokenizer=tokenizer)[0].positions == plan[0].positions


def test_everything_else_of_an_intervention_comes_back(tmp_path):
    when = ProjectionAbove(randn(D), 0.1, cosine=True, per="example")
    plan = [
        Intervention("L-1.head_output[1,3]", Zero(), AllTokens(), phase="decode", when=when),
        Intervention("embedding_output", Zero(), phase="prompt", when=ProbeAbove(randn(D), -0.3, 0.7)),
        Intervention("path:model.layers.1.mlp.output", Zero(), elsewhere="a test"),
    ]
    loaded = round_trip(plan, tmp_path)
    for old, new in zip(plan, loaded, strict=True):
        for field in ("site", "phase", "elsewhere", "positions"):
            assert getattr(old, field) == getattr(new, field)
    assert loaded[2].when is None
    h = randn(2, 5, D, seed=3)
    for old, new in zip(plan[:2], loaded[:2], strict=True):
        assert (old.when.per, old.when.threshold) == (new.when.per, new.when.threshold)
        assert torch.equal(old.when.score(h), new.when.score(h))
    assert loaded[0].when.cosine is True and loaded[1].when.bias == -0.3


def test_a_shared_module_stays_one_object_and_others_stay_apart(tmp_path):
    lens, edit = Subspace(D, 2), Swap()
    plan = [
        Intervention("L0.mlp_output", edit, LastToken(), lens),
        Intervention("L1.mlp_output", edit, LastToken(), lens),
        Intervention("L1.mlp_output", Swap(), LastToken(), Subspace(D, 2)),
    ]
    loaded = round_trip(plan, tmp_path)
    assert loaded[0].featurizer is loaded[1].featurizer and loaded[0].edit is loaded[1].edit
    assert loaded[2].featurizer is not loaded[0].featurizer and loaded[2].edit is not loaded[0].edit
    assert len(list(modules_of(loaded))) == len(list(modules_of(plan))) == 4


def test_a_parameter_tied_between_two_modules_is_refused(tmp_path):
    first, second = Affine(4), Affine(4)
    second.weight = first.weight
    plan = [Intervention("L0.mlp_output", edit, featurizer=Subspace(D, 4)) for edit in (first, second)]
    with pytest.raises(StoreError, match=r"edits\[1\]: its parameter weight is also one of edits\[0\].*whole module"):
        save_plan(plan, tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_every_tensor_keeps_its_dtype(dtype, tmp_path):
    edit = Add(randn(D).to(dtype), torch.tensor([0.1, 0.2], dtype=dtype))
    loaded = round_trip([Intervention("L0.mlp_output", edit)], tmp_path)[0].edit
    assert loaded.vector.dtype == loaded.strengths.dtype == dtype
    assert torch.equal(loaded.vector, edit.vector) and torch.equal(loaded.strengths, edit.strengths)


def test_a_vector_that_learned_to_be_zero_comes_back(tmp_path):
    edit = Add(torch.zeros(D), trainable=True)
    edit.vector.requires_grad_(False)
    loaded = round_trip([Intervention("L0.mlp_output", edit)], tmp_path)[0].edit
    assert not loaded.vector.any() and not loaded.vector.requires_grad


def test_noise_goes_on_where_it_was(tmp_path):
    edit = Noise(0.5, seed=3)
    first = edit.draw(torch.zeros(2, 3))
    loaded = round_trip([Intervention("L0.mlp_output", edit)], tmp_path)[0].edit
    second = edit.draw(torch.zeros(2, 3))
    assert torch.equal(loaded.draw(torch.zeros(2, 3)), second) and not torch.equal(first, second)


def test_an_empty_plan_and_one_without_tensors_can_be_stored(tmp_path):
    assert round_trip([], tmp_path) == ()
    assert len(load_plan(save_plan([Intervention("L0.mlp_output", Zero())], tmp_path / "zero"))) == 1


def test_the_provenance_of_a_vector_survives_and_still_guards(tmp_path):
    model, vector = llama(), vector_at("L1.block_output", stream_norm=1 / 3, n_positive=5)
    plan = [
        Intervention("L1.block_output", Add(vector, 2.0)),
        Intervention("L1.block_output", Project(vector)),
        Intervention("L0.block_output", Add(vector)),
    ]
    loaded = round_trip(plan, tmp_path, model=model)
    assert loaded[0].edit.made_for.provenance() == vector.provenance()
    assert torch.equal(loaded[0].edit.made_for.vector, vector.vector)
    with pytest.raises(WrongModel, match=r"made at L1\.block_output"), intervene(model, loaded[2:]):
        pass


def test_the_fingerprint_of_the_model_is_compared(tmp_path):
    other, folder = tiny_model("llama", seed=1), tmp_path / "plan"
    save_plan([Intervention("L1.block_output", Add(vector_at("L1.block_output")))], folder, model=llama())
    assert load_plan(folder, model=llama())[0].elsewhere is None
    assert load_plan(folder, model=llama(), elsewhere="needless")[0].elsewhere is None
    with pytest.raises(WrongModel, match=rf"{fingerprint(llama())}.*this one is .*{fingerprint(other)}.*elsewhere="):
        load_plan(folder, model=other)
    forced = load_plan(folder, model=other, elsewhere="transfer test")
    assert forced[0].elsewhere == "transfer test"
    with torch.no_grad(), intervene(other, forced):
        other(**tiny_batch(other))


def test_the_header_says_what_it_holds(tmp_path):
    folder = save_plan(
        [Intervention("L1.head_output[0]", Zero())], tmp_path / "a" / "plan", model=llama(), notes={"why": ["x", 1]}
    )
    header = json.loads((folder / "plan.json").read_text())
    assert header["schema"] == 1 and "0-based" in header["convention"] and header["notes"] == {"why": ["x", 1]}
    assert header["model"] == {"name": "LlamaForCausalLM", "fingerprint": fingerprint(llama())}
    assert header["sha256"] == hashlib.sha256((folder / "plan.safetensors").read_bytes()).hexdigest()
    assert header["interventions"][0]["site"] == "L1.head_attention_value_output[0]"
