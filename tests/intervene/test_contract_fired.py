"""Clause 2: what never fired is an error, and `report()` says what was done."""

from __future__ import annotations

import pytest
import torch

from intervene import (
    Add,
    AllTokens,
    DecodeSteps,
    First,
    Intervention,
    LastToken,
    NotApplied,
    Response,
    Scale,
    Set,
    Zero,
    capture,
    intervene,
)
from tests.intervene.by_hand import blocks_of, vector
from tests.tiny import tiny_batch, tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model():
    return tiny_model("llama")


@torch.no_grad()
def test_a_block_in_which_no_forward_ran(model):
    plan = [Intervention("L1.block_output", Add(vector(1)), LastToken())]
    with (
        pytest.raises(NotApplied, match=r"Add at L1.block_output on LastToken\(\).*0 times.*0 forward passes"),
        intervene(model, plan),
    ):
        pass


@torch.no_grad()
def test_a_module_that_the_forward_skips(model):
    plan = [Intervention("L1.block_output", Add(vector(1))), Intervention("path:lm_head.output", Scale(2.0))]
    with (
        pytest.raises(NotApplied, match=r"Scale at path:lm_head.output.*0 times.*1 forward passes") as raised,
        intervene(model, plan),
    ):
        model.model(**tiny_batch(model))
    assert "Add" not in str(raised.value)


@pytest.mark.parametrize("positions", [AllTokens(), LastToken(), Response()])
@torch.no_grad()
def test_only_the_excluded_phase_ran(model, positions):
    plan = [Intervention("L1.block_output", Add(vector(1)), positions, phase="decode")]
    with pytest.raises(NotApplied, match=r"ran 1 times.*in the phase"), intervene(model, plan):
        model(**tiny_batch(model))


@torch.no_grad()
def test_decode_steps_beyond_what_is_generated(model):
    plan = [Intervention("L1.block_output", Add(vector(1)), DecodeSteps(3))]
    with pytest.raises(NotApplied, match=r"DecodeSteps\(start=3, stop=None\)"), intervene(model, plan):
        model.generate(**tiny_batch(model), **GREEDY)  # four tokens: the last is never fed back
    with intervene(model, [Intervention("L1.block_output", Add(vector(1)), DecodeSteps(2))]) as applied:
        model.generate(**tiny_batch(model), **GREEDY)
    assert applied.report()[0].tokens == 2


@torch.no_grad()
def test_a_capture_that_never_fired(model):
    with (
        pytest.raises(NotApplied, match=r"Capture of path:lm_head.output.*1 passes"),
        capture(model, ["L0.block_output", "path:lm_head.output"]),
    ):
        model.model(**tiny_batch(model))
    with capture(model, "L0.block_output", DecodeSteps()) as acts:
        model(**tiny_batch(model))
    with pytest.raises(NotApplied, match="its module ran 1 times, but none of those passes held the positions"):
        acts["L0.block_output"]


@torch.no_grad()
def test_an_error_of_the_user_is_not_hidden_by_not_applied(model):
    plan = [Intervention("L1.block_output", Add(vector(1)))]
    with pytest.raises(ZeroDivisionError), intervene(model, plan):
        _ = 1 / 0


def _relative(change: torch.Tensor, stream: torch.Tensor) -> float:
    return float((change.norm(dim=-1) / stream.norm(dim=-1)).mean())


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_report_equals_a_count_by_hand_with_padding(model, padding):
    batch, v = tiny_batch(model, padding), vector(1)
    v[:5] = 0  # these columns do not change
    streams = []
    handle = blocks_of(model)[1].register_forward_hook(lambda _m, _a, out: streams.append(out.clone()))
    model(**batch)
    handle.remove()
    real = streams[0][batch["attention_mask"].bool()]  # 7 + 4 tokens
    first = streams[0][[0, 1], batch["attention_mask"].argmax(1)]
    plan = [
        Intervention("L1.block_output", Add(v, 2.0)),
        Intervention("L0.mlp_neurons[3,4]", Zero(), LastToken()),
        Intervention("L2.head_output[1]", Set(torch.ones(8)), First(3)),
    ]
    with intervene(model, plan[:1]) as applied:
        model(**batch)
        model(**batch)
    dense = applied.report()[0]
    assert (dense.calls, dense.tokens, dense.elements) == (2, 22, 22 * 27)
    assert dense.relative_norm == pytest.approx(_relative(2 * v.expand_as(real), real), rel=1e-5)
    with intervene(model, plan[1:]) as applied:
        model(**batch)
    neurons, head = applied.report()
    assert (neurons.calls, neurons.tokens, neurons.elements) == (1, 2, 4)
    assert (head.calls, head.tokens, head.elements) == (1, 6, 48)
    with intervene(model, [Intervention("L1.block_output", Add(v, 2.0), First())]) as applied:
        model(**batch)
    assert applied.report()[0].relative_norm == pytest.approx(_relative(2 * v.expand_as(first), first), rel=1e-5)
    assert "Zero at L0.mlp_neurons[3,4]: 1 calls, 2 tokens, 4 elements changed" in str(neurons)


@torch.no_grad()
def test_report_of_a_generation_counts_each_token_once_with_a_cache(model):
    batch = tiny_batch(model, "left")
    plan = [
        Intervention("L1.block_output", Add(vector(1))),
        Intervention("L1.block_output", Add(vector(1)), phase="prompt"),
        Intervention("L1.block_output", Add(vector(1)), phase="decode"),
        Intervention("L1.block_output", Add(vector(1)), LastToken()),
    ]
    with intervene(model, plan) as applied:
        model.generate(**batch, **GREEDY)  # one prompt pass, three decode steps
    assert [report.tokens for report in applied.report()] == [11 + 6, 11, 6, 2 + 6]
    assert [report.calls for report in applied.report()] == [4, 4, 4, 4]


@torch.no_grad()
def test_ragged_positions_count_what_is_there(model):
    batch = tiny_batch(model, "right")
    labels = torch.full((2, 7), -100)
    labels[0, 4:], labels[1, 3] = 5, 5
    with intervene(model, [Intervention("L1.block_output", Zero(), Response())]) as applied:
        model(**batch, labels=labels)
    report = applied.report()[0]
    assert (report.tokens, report.elements) == (4, 4 * 32)
    assert report.relative_norm == pytest.approx(1.0)


def test_a_long_run_keeps_bounded_memory_and_exact_sums(model):
    batch = tiny_batch(model)
    with torch.no_grad(), intervene(model, [Intervention("L0.block_output", Zero(), LastToken())]) as applied:
        for _ in range(70):  # more than are kept before they are summed
            model.model(**batch)
        kept = applied._recorders[0]
        assert len(kept._later) + len(kept._pending) < 64
    report = applied.report()[0]
    assert (report.calls, report.tokens, report.elements) == (70, 140, 140 * 32)
