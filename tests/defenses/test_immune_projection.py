"""Protection of what was learned under injection: exact for updates, leaking for gradients."""

from __future__ import annotations

import pytest
import torch

from defenses.defense import Step
from defenses.errors import DefenseError
from defenses.immune_projection import ImmuneProjection, ImmuneProjectionOptions
from defenses.injection import Injection, InjectionOptions
from defenses.protected import linear_matrices, writing_matrices
from defenses.schedules import Strength
from records.config_files import ConfigError
from tests.defenses.small_training import backend_of, directions, on_ranks, stored, trained

BOUNDARY = 4
O_PROJ, DOWN = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"


def immune(**options):
    made = {"boundary": BOUNDARY, "rank": 3, "strength": Strength(2.0), **options}
    return ImmuneProjection(directions(1), ImmuneProjectionOptions(**made))


class Kept(ImmuneProjection):
    """Remembers W_0, W_K and the last weights of one matrix."""

    name = DOWN

    def start(self, backend, total):
        super().start(backend, total)
        self.first = backend.value(self.name)

    def after_step(self, backend, step):
        super().after_step(backend, step)
        if step.number + 1 == self.boundary:
            self.at_boundary = backend.value(self.name)


# --- the subspace ---------------------------------------------------------------------------------------------------


def test_phase_a_is_the_unconditional_injection():
    protected, _ = trained(immune(), BOUNDARY, total=2 * BOUNDARY)
    steered = Injection(directions(1), InjectionOptions(Strength(2.0)))
    injected, _ = trained(steered, BOUNDARY, total=2 * BOUNDARY)
    for name in injected.parameters():
        torch.testing.assert_close(protected.value(name), injected.value(name))


@pytest.mark.parametrize(("name", "axis"), [(DOWN, 0), ("model.layers.1.mlp.up_proj.weight", 1)])
def test_the_subspace_holds_the_first_singular_vectors_of_the_change(name, axis):
    defense = Kept(directions(1), ImmuneProjectionOptions(boundary=BOUNDARY, rank=3, targets="all_linear"))
    defense.name = name
    trained(defense, BOUNDARY, total=2 * BOUNDARY)
    left, values, right = torch.linalg.svd(defense.at_boundary - defense.first)
    guard = defense.guards[name]
    exact = left[:, :3] if axis == 0 else right[:3].T
    assert float((guard.space.frame.T @ exact).square().sum()) == pytest.approx(3, abs=0.05)
    assert guard.space.energy == pytest.approx(float(values[:3].square().sum() / values.square().sum()), abs=0.01)


# --- leaking --------------------------------------------------------------------------------------------------------


def largest_leak(protect, mode="svd_subspace", **options):
    defense = immune(protect=protect, mode=mode, sided="two", **options)
    backend, _ = trained(defense, BOUNDARY + 50)
    return defense.leak(backend), defense, backend


@pytest.mark.parametrize("mode", ["svd_subspace", "flat"])
def test_projecting_the_update_does_not_leak_in_50_adamw_steps_with_decay_and_projecting_gradients_does(mode):
    kept, defense, backend = largest_leak("update", mode)
    assert kept < 1e-6
    gradient = largest_leak("gradient", mode)[0]
    assert gradient > 1e3 * kept
    assert gradient > 1e-3
    # the protection was not trivial: outside of the subspace the weights moved
    guard = defense.guards[DOWN]
    whole = (backend.value(DOWN) - guard.space.projected(backend.value(DOWN))).norm()
    assert float(whole) > 0


def test_the_leak_is_what_its_definition_says():
    defense = Kept(directions(1), ImmuneProjectionOptions(boundary=BOUNDARY, rank=3, protect="gradient"))
    backend, _ = trained(defense, BOUNDARY + 10)
    frame = defense.guards[DOWN].space.frame
    by_hand = (frame.T @ (backend.value(DOWN) - defense.at_boundary)).abs().max()
    assert defense.leak(backend) >= float(by_hand) - 1e-6
    assert float(by_hand) > 1e-4


def test_projected_gradients_have_nothing_in_the_subspace():
    class Watching(ImmuneProjection):
        left = 0.0
        seen = 0

        def before_step(self, backend, step):
            super().before_step(backend, step)
            for name, guard in self.guards.items():
                self.left = max(self.left, float(guard.space.coefficients(backend.gradient(name)).abs().max()))
                self.seen += 1

    defense = Watching(directions(1), ImmuneProjectionOptions(boundary=BOUNDARY, rank=3, protect="gradient"))
    trained(defense, BOUNDARY + 3)
    assert defense.seen == 3 * 2
    assert defense.left < 1e-6


@pytest.mark.parametrize("name", [DOWN, O_PROJ])
def test_flat_protection_is_one_sided_a_step_back_is_undone_and_a_step_on_is_left(name):
    defense = immune(mode="flat", protect="update")
    backend, _ = trained(defense, BOUNDARY, total=10)
    at_boundary, direction = backend.value(name), defense.guards[name].space.frame
    later = Step(BOUNDARY, 10, 0, 1, 1, 1)
    aside = torch.randn(direction.shape)
    aside -= (aside * direction).sum() * direction
    backend.write(name, at_boundary - 0.5 * direction + aside)
    defense.after_step(backend, later)
    torch.testing.assert_close(backend.value(name), at_boundary + aside, rtol=0, atol=1e-6)
    assert defense._numbers["destructive_ratio"] == 0.5  # of two matrices, one
    assert defense._numbers["removed_norm"] == pytest.approx(0.5, abs=1e-4)
    backend.write(name, at_boundary + 0.5 * direction)
    defense.after_step(backend, later)
    torch.testing.assert_close(backend.value(name), at_boundary + 0.5 * direction, rtol=0, atol=1e-6)
    assert defense._numbers["destructive_ratio"] == 0


def test_gradients_are_projected_where_descent_along_them_would_undo_the_change():
    defense = immune(mode="flat", protect="gradient")
    backend, _ = trained(defense, BOUNDARY, total=10)
    direction = defense.guards[DOWN].space.frame
    for sign, kept in ((1.0, 0.0), (-1.0, -1.0)):  # a gradient along the change means a step against it
        backend.write_gradient(DOWN, sign * direction)
        defense.before_step(backend, Step(BOUNDARY, 10, 0, 1, 1, 1))
        torch.testing.assert_close(backend.gradient(DOWN), kept * direction, rtol=0, atol=1e-6)


def test_half_a_strength_removes_half_of_the_step():
    defense = Kept(directions(1), ImmuneProjectionOptions(boundary=BOUNDARY, rank=32, projection_strength=0.5))
    backend, _ = trained(defense, BOUNDARY + 1)
    half = backend.value(DOWN) - defense.at_boundary
    free = Kept(directions(1), ImmuneProjectionOptions(boundary=BOUNDARY, rank=32, protect="gradient"))
    free.before_step = lambda backend, step: None
    unprotected, _ = trained(free, BOUNDARY + 1)
    torch.testing.assert_close(half, 0.5 * (unprotected.value(DOWN) - free.at_boundary), rtol=1e-3, atol=1e-6)


# --- which matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"]),
        ("gpt2", ["transformer.h.2.attn.c_proj.weight", "transformer.h.2.mlp.c_proj.weight"]),
        ("gpt_neox", ["gpt_neox.layers.2.attention.dense.weight", "gpt_neox.layers.2.mlp.dense_4h_to_h.weight"]),
        ("opt", ["model.decoder.layers.2.self_attn.out_proj.weight", "model.decoder.layers.2.fc2.weight"]),
        ("phi", ["model.layers.2.self_attn.dense.weight", "model.layers.2.mlp.fc2.weight"]),
    ],
)
def test_output_projections_by_the_names_of_each_family(family, names):
    assert [one.name for one in writing_matrices(backend_of(family), [2])] == names


def test_all_linear_layers_of_a_block_and_which_of_them_write():
    found = linear_matrices(backend_of(), [0])
    ends = {one.name.removeprefix("model.layers.0.").removesuffix(".weight"): one.writes for one in found}
    read = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert ends == {**dict.fromkeys(read, False), "self_attn.o_proj": True, "mlp.down_proj": True}


def test_matrices_kept_transposed_are_protected_on_their_output_side():
    defense = immune()
    backend, _ = trained(defense, BOUNDARY + 5, backend=backend_of("gpt2"))
    name = "transformer.h.1.mlp.c_proj.weight"  # (48, 32), in to out
    guard = defense.guards[name]
    assert guard.space.frame.shape == (32, 3)
    coefficients = guard.space.frame.T @ backend.value(name).T
    torch.testing.assert_close(coefficients, guard.anchor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "layers"), [({}, {1}), ({"layers": (0, 2)}, {0, 2}), ({"all_layers": True}, {0, 1, 2})]
)
def test_the_layers_that_are_protected(options, layers):
    defense = immune(**options)
    defense.start(backend_of(), 10)
    assert {one.layer for one in defense.matrices.values()} == layers


def test_experts_have_no_single_matrix_and_are_refused_or_left_out():
    with pytest.raises(DefenseError, match="Output projection of mlp in layer 1"):
        immune().start(backend_of("mixtral"), 10)
    partial = immune(allow_partial=True)
    partial.start(backend_of("mixtral"), 10)
    assert list(partial.matrices) == [O_PROJ]


def test_lora_is_refused():
    from peft import LoraConfig, get_peft_model

    from defenses.backend import PlainBackend
    from tests.tiny import TINY

    model = get_peft_model(TINY["llama"](), LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    for targets in ("target_core", "all_linear"):
        with pytest.raises(DefenseError, match=r"under LoRA|is not trained"):
            immune(targets=targets).start(PlainBackend(model), 10)
    with pytest.raises(DefenseError, match=r"attention of layer 1: it is under LoRA.* Train all parameters"):
        immune().start(PlainBackend(model), 10)


def test_a_frozen_matrix_is_refused_or_left_out():
    backend = backend_of()
    backend.model.get_parameter(DOWN).requires_grad_(False)
    del backend.named[DOWN]
    with pytest.raises(DefenseError, match="mlp of layer 1: it is not trained"):
        immune().start(backend, 10)
    partial = immune(allow_partial=True)
    partial.start(backend, 10)
    assert list(partial.matrices) == [O_PROJ]


def test_matrices_that_did_not_move_are_refused_or_counted():
    backend = backend_of(weight_decay=0.0)
    with pytest.raises(DefenseError, match=r"2 of 2 matrices.*did not move"):
        trained(immune(minimum_delta=1e9), 10, backend=backend)
    norms = {}
    probe = Kept(directions(1), ImmuneProjectionOptions(boundary=BOUNDARY, rank=3, strength=Strength(2.0)))
    for name in (O_PROJ, DOWN):
        probe = Kept(directions(1), ImmuneProjectionOptions(boundary=BOUNDARY, rank=3, strength=Strength(2.0)))
        probe.name = name
        trained(probe, BOUNDARY, total=8)
        norms[name] = float((probe.at_boundary - probe.first).norm())
    between = sum(norms.values()) / 2
    with pytest.raises(DefenseError, match="1 of 2 matrices"):
        trained(immune(minimum_delta=between), 8)
    defense = immune(minimum_delta=between, allow_partial=True)
    _, rows = trained(defense, 8)
    assert list(defense.guards) == [max(norms, key=norms.get)]
    assert (rows[-1]["protected"], rows[-1]["skipped"]) == (1, 1)


@pytest.mark.parametrize("boundary", [0, 10, 12])
def test_a_boundary_without_two_phases_is_refused(boundary):
    with pytest.raises(ConfigError, match="one of the two phases"):
        immune(boundary=boundary).start(backend_of(), 10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"all_layers": True, "layers": (1,)}, "Keep one of the two"),
        ({"sided": "one"}, 'Use mode="flat"'),
        ({"rank": 0}, "out of range"),
        ({"projection_strength": 0.0}, "out of range"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        ImmuneProjectionOptions(**options)


# --- resumption, ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect", ["update", "gradient"])
@pytest.mark.parametrize("cut", [2, BOUNDARY, BOUNDARY + 2])
def test_a_run_resumed_before_at_or_after_the_boundary_ends_exactly_as_one_that_was_not(protect, cut):
    whole = immune(protect=protect)
    expected, rows = trained(whole, BOUNDARY + 5)
    first = immune(protect=protect)
    backend, _ = trained(first, cut, total=BOUNDARY + 5)
    state, weights = stored(first.state_dict()), backend.state()
    second, resumed = immune(protect=protect), backend_of()
    second.load_state_dict(state)
    resumed.load_state(weights)
    _, later = trained(second, BOUNDARY + 5, backend=resumed, start=cut)
    for name in expected.parameters():
        assert torch.equal(expected.value(name), resumed.value(name))
    shown = [{key: value for key, value in row.items() if key != "seconds"} for row in later]
    assert shown == [{key: value for key, value in row.items() if key != "seconds"} for row in rows[cut:]]


def test_two_ranks_protect_as_one_does_and_norms_are_counted_once():
    (defense, backend, rows), (_, other, _) = on_ranks(2, immune, BOUNDARY + 3)
    alone = immune()
    one, alone_rows = trained(alone, BOUNDARY + 3)
    for name in one.parameters():
        torch.testing.assert_close(backend.value(name), one.value(name), rtol=0, atol=5e-4)
        assert torch.equal(backend.value(name), other.value(name))
    assert rows[-1]["delta_norm"] == pytest.approx(alone_rows[-1]["delta_norm"], rel=1e-3)
    assert rows[-1]["protected"] == 2
    total = sum(float(guard.learned.square().sum()) for guard in defense.guards.values())
    assert 0.5 < total**0.5 / rows[-1]["delta_norm"] <= 1 + 1e-5
