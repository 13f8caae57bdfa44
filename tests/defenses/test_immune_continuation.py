"""Continuation: what is estimated, that all ranks inject it, and that checkpointing changes nothing."""

from __future__ import annotations

import pytest
import torch

from defenses.batch import collate
from defenses.defense import Step
from defenses.errors import DefenseError
from defenses.immune_continuation import (
    ImmuneContinuation,
    ImmuneContinuationOptions,
    aligned,
    shared_out,
    weighted_singular_vectors,
)
from defenses.objectives import learned
from defenses.plans import Scope, scope_columns
from defenses.schedules import Strength
from intervene import InterveneError, Site, capture
from intervene.families import resolve
from records.config_files import ConfigError
from tests.defenses.small_training import Rotating, backend_of, directions, examples, on_ranks, stored, trained
from tests.tiny import TINY, tiny_batch

BOUNDARY, TOKENS = 3, 20
DOWN, O_PROJ = "model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"


def continuing(*layers, **options):
    made = {"boundary": BOUNDARY, "minimum_tokens": TOKENS, "strength": Strength(2.0), **options}
    return ImmuneContinuation(directions(*(layers or (1,)), length=3.0), ImmuneContinuationOptions(**made))


# --- sites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_sites_are_the_input_and_the_output_of_the_projections_in_every_family(family):
    model = TINY[family]()
    for part, read in (("attention", "attention_value_output"), ("mlp", "mlp_neurons")):
        try:
            tap = resolve(model, Site(read, 1))
        except InterveneError:
            assert part == "mlp"  # fused experts
            continue
        seen = {}

        def keep(_module, args, output, seen=seen):
            seen["input"], seen["output"] = args[0].clone(), output.clone()  # falcon writes into it later

        handle = tap.module.register_forward_hook(keep)
        with torch.no_grad(), capture(model, [Site(read, 1), Site(f"{part}_output", 1)]) as acts:
            model(**tiny_batch(model))
        handle.remove()
        shape = acts[Site(read, 1)].shape
        torch.testing.assert_close(acts[Site(read, 1)], seen["input"].reshape(shape))
        output = acts[Site(f"{part}_output", 1)]
        torch.testing.assert_close(output, seen["output"].reshape(output.shape))


# --- the estimate ---------------------------------------------------------------------------------------------------


class Watched(ImmuneContinuation):
    """Keeps the weights that calibration began and ended with."""

    def start(self, backend, total):
        super().start(backend, total)
        self.first = {name: backend.value(name) for name in (DOWN, O_PROJ)}
        self.ready = None

    def after_step(self, backend, step):
        super().after_step(backend, step)
        if self.vectors and self.ready is None:
            self.ready = step.number
            self.now = {name: backend.value(name) for name in (DOWN, O_PROJ)}


def test_the_vector_is_the_change_times_the_mean_input_over_answer_tokens_on_the_side_of_v():
    options = ImmuneContinuationOptions(boundary=BOUNDARY, minimum_tokens=1, strength=Strength(2.0), scale="raw")
    defense = Watched(directions(1), options)
    before, _ = trained(ImmuneContinuation(directions(1), options), BOUNDARY, total=8)  # the model at the boundary
    trained(defense, 8)
    assert defense.ready == BOUNDARY
    inputs = {DOWN: [], O_PROJ: []}
    for batch in Rotating(examples()).batches(BOUNDARY, 0, 1):
        sites = {DOWN: "L1.mlp_neurons", O_PROJ: "L1.attention_value_output"}
        with torch.no_grad(), capture(before.model, list(sites.values())) as acts:
            before.model(**batch.inputs())
        for name, site in sites.items():
            inputs[name].append(acts[site][learned(batch)])
    v = directions(1).at(1)
    for name, site in ((DOWN, "L1.mlp_output"), (O_PROJ, "L1.attention_output")):
        expected = (defense.now[name] - defense.first[name]) @ torch.cat(inputs[name]).mean(0)
        expected = expected if expected @ v >= 0 else -expected
        torch.testing.assert_close(defense.vectors[site], expected, rtol=1e-4, atol=1e-6)
        assert float(defense.vectors[site] @ v) > 0


def test_singular_vectors_are_each_turned_to_the_side_of_v():
    delta, v = torch.randn(10, 7), torch.randn(10)
    left, values, _ = torch.linalg.svd(delta, full_matrices=False)
    expected = sum(s * (u if u @ v >= 0 else -u) for s, u in zip(values[:3], left.T[:3], strict=True))
    torch.testing.assert_close(weighted_singular_vectors(delta, v, 3, "x"), expected, rtol=1e-2, atol=1e-2)


def test_svd_u_is_injected_too():
    defense = continuing(estimate="svd_u", rank=2)
    trained(defense, 9)
    assert set(defense.vectors) == {"L1.attention_output", "L1.mlp_output"}


def test_scales():
    parts = {"attention": torch.tensor([3.0, 0.0]), "mlp": torch.tensor([0.0, 1.0])}
    lengths = {
        scale: {part: float(vector.norm()) for part, vector in shared_out(parts, 8.0, scale).items()}
        for scale in ("preserve_ratio", "equal_share", "raw")
    }
    assert lengths == {
        "preserve_ratio": {"attention": 6.0, "mlp": 2.0},
        "equal_share": {"attention": 4.0, "mlp": 4.0},
        "raw": {"attention": 3.0, "mlp": 1.0},
    }


def test_what_points_away_from_v_is_turned_round():
    assert aligned(torch.tensor([-2.0, 1.0]), torch.tensor([1.0, 0.0])).tolist() == [2.0, -1.0]
    assert aligned(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])).tolist() == [2.0, 1.0]


# --- phases ---------------------------------------------------------------------------------------------------------


def test_calibration_lasts_until_the_minimum_is_reached_and_is_a_real_minimum():
    per_step = [
        sum(int(learned(batch).sum()) for batch in Rotating(examples()).batches(step, 0, 1)) for step in range(12)
    ]
    wanted = sum(per_step[BOUNDARY : BOUNDARY + 2]) + 1  # three steps of calibration
    defense = Watched(
        directions(1), ImmuneContinuationOptions(boundary=BOUNDARY, minimum_tokens=wanted, strength=Strength(2.0))
    )
    _, rows = trained(defense, 12)
    assert [row["phase"] for row in rows] == [0.0] * 3 + [1.0] * 3 + [2.0] * 6
    assert defense.tokens == sum(per_step[BOUNDARY : BOUNDARY + 3])
    assert rows[-1]["b_norm"] > 0


def test_too_few_tokens_in_all_that_is_left_are_refused_at_the_boundary():
    with pytest.raises(DefenseError, match=r"Calibrate on 100000 tokens: the steps from 3 to 9 hold about"):
        trained(continuing(minimum_tokens=100_000), 9)


def test_calibration_itself_changes_nothing_that_is_learned():
    from defenses.injection import Injection, InjectionOptions

    calibrating, rows = trained(continuing(minimum_tokens=60), BOUNDARY + 2, total=9)
    steered, _ = trained(Injection(directions(1, length=3.0), InjectionOptions(Strength(2.0))), BOUNDARY + 2, total=9)
    assert [row["phase"] for row in rows] == [0, 0, 0, 1, 1]
    for name in steered.parameters():
        assert torch.equal(calibrating.value(name), steered.value(name))


@pytest.mark.parametrize("point", ["output", "write"])
def test_the_last_phase_injects_at_the_projections_and_not_in_the_stream(point):
    defense = continuing(1, 2, point=point)
    trained(defense, 9, backend=backend_of("gemma2"))
    batch = collate(examples()[:2], 0)
    columns = scope_columns(batch, Scope.RESPONSE)
    plan = defense.plan(1.0, columns)
    names = [str(item.site) for item in plan]
    assert names == [f"L{layer}.{part}_{point}" for layer in (1, 2) for part in ("attention", "mlp")]
    for layer in (1, 2):
        lengths = [float(defense.vectors[f"L{layer}.{part}_{point}"].norm()) for part in ("attention", "mlp")]
        assert sum(lengths) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("phase", ["calibrate", "continue"])
def test_gradients_are_those_without_checkpointing(phase, reentrant):
    gradients = []
    for checkpointed in (False, True):
        backend = backend_of()
        defense = continuing(1, 2, minimum_tokens=1)
        trained(defense, BOUNDARY if phase == "calibrate" else BOUNDARY + 1, backend=backend, total=9)
        assert bool(defense.vectors) == (phase == "continue")
        if checkpointed:
            backend.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            backend.model.enable_input_require_grads()
        batch = collate(examples()[:3], 0)
        sums = defense.accumulate(backend, batch, Step(BOUNDARY + 1, 9, 0, 1, int(learned(batch).sum()), 3))
        assert sums["phase"] == (1 if phase == "calibrate" else 2)
        gradients.append({name: backend.gradient(name) for name in backend.parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)
    # and they are not those of a pass in which nothing is injected
    plain = backend_of()
    plain.model.load_state_dict(backend.model.state_dict())
    silent = continuing(1, 2, minimum_tokens=1, strength=Strength(0.0))
    silent.start(plain, 9)
    silent.accumulate(plain, batch, Step(0, 9, 0, 1, int(learned(batch).sum()), 3))
    assert not torch.allclose(plain.gradient(DOWN), gradients[0][DOWN], rtol=1e-3, atol=1e-6)


# --- resumption, ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [2, BOUNDARY, BOUNDARY + 1, BOUNDARY + 4])
def test_a_resumed_run_ends_exactly_as_one_that_was_not(cut):
    options = {"minimum_tokens": 40}  # two or three steps
    expected, _ = trained(continuing(**options), 10)
    first = continuing(**options)
    backend, _ = trained(first, cut, total=10)
    state, weights = stored(first.state_dict()), backend.state()
    second, resumed = continuing(**options), backend_of()
    second.load_state_dict(state)
    resumed.load_state(weights)
    trained(second, 10, backend=resumed, start=cut)
    for name in expected.parameters():
        assert torch.equal(expected.value(name), resumed.value(name))


def test_every_rank_injects_the_same_vectors_and_they_are_those_of_one_rank():
    (first, backend, rows), (second, other, _) = on_ranks(2, continuing, 9)
    alone = continuing()
    _, alone_rows = trained(alone, 9)
    assert set(first.vectors) == set(second.vectors) == set(alone.vectors)
    for site, vector in first.vectors.items():
        assert torch.equal(vector, second.vectors[site])
        torch.testing.assert_close(vector, alone.vectors[site], rtol=1e-2, atol=2e-3)
    assert first.tokens == second.tokens == alone.tokens
    assert torch.equal(backend.value(DOWN), other.value(DOWN))
    for name in ("phase", "b_norm", "calibration_tokens"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone_rows], rel=1e-3)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_experts_are_refused_and_attention_alone_is_not():
    with pytest.raises(DefenseError, match="Output projection of mlp in layer 1"):
        continuing().start(backend_of("mixtral"), 9)
    defense = continuing(parts=("attention",))
    trained(defense, 9, backend=backend_of("mixtral"))
    assert list(defense.vectors) == ["L1.attention_output"]
    assert float(defense.vectors["L1.attention_output"].norm()) == pytest.approx(3.0, rel=1e-4)


def test_a_layer_without_a_direction_is_refused():
    from defenses.errors import VectorError

    with pytest.raises(VectorError, match="Direction of layer 2"):
        continuing(1, layers=(1, 2)).start(backend_of(), 9)


@pytest.mark.parametrize("options", [{"minimum_tokens": 0}, {"rank": 0}, {"parts": ()}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigError, match="nothing could be estimated"):
        ImmuneContinuationOptions(**options)


def test_a_boundary_without_two_phases_is_refused():
    with pytest.raises(ConfigError, match="one of the phases"):
        continuing(boundary=9).start(backend_of(), 9)
