"""That the passes of a defense are counted right, and are what issue 4 bounds them by: on a tiny model, no times."""

from __future__ import annotations

import pytest
import torch

from benchmarks.defense_costs import CASES, Bench, Meter, bench_of, bounds, counted_passes
from defenses.batch import collate
from defenses.projections import REFERENCE
from tests.defenses.small_training import examples
from tests.tiny import TINY

LAYER, UPPER = 1, 1 / 3  # one of three blocks is above it
PLAIN = {"lora+checkpointing": 4, "full+checkpointing": 4, "lora": 3, "full": 3}


@pytest.fixture(scope="module", params=PLAIN)
def counted(request: pytest.FixtureRequest) -> tuple[str, dict[str, dict[str, float]]]:
    bench: Bench = bench_of(request.param, TINY["llama"](), batch(), LAYER, 4)
    bench.step("sft")
    return request.param, {case: bench.count(case) for case in CASES}


def batch():
    return collate(examples(4, **{REFERENCE: lambda index: 0.0}), 0)


def test_plain_training_is_one_forward_one_backward_and_what_is_computed_again(counted):
    setting, found = counted
    assert found["sft"]["backward"] == pytest.approx(1, abs=1e-5)
    assert found["sft"]["forward"] == pytest.approx(PLAIN[setting] - 2, abs=1e-5)


@pytest.mark.parametrize("case", ["injection", "first_order monitor", "state_aware"])
def test_methods_of_one_pass_cost_no_pass_more(counted, case: str):
    setting, found = counted
    assert found[case]["units"] == pytest.approx(PLAIN[setting], abs=1e-5)


@pytest.mark.parametrize(("case", "more"), [("delta_loss mask", UPPER), ("delta_loss inject", 1 + UPPER), ("kl", 1.0)])
def test_further_passes_cost_what_they_compute(counted, case: str, more: float):
    setting, found = counted
    assert found[case]["units"] == pytest.approx(PLAIN[setting] + more, abs=1e-5)


def test_the_probe_runs_only_the_blocks_above_its_layer_beside_the_plain_pass(counted):
    setting, found = counted
    # forward once, then backward twice through them; with checkpointing they are computed again for it
    assert found["gradient_probe"]["backward"] == pytest.approx(1 + 2 * UPPER, abs=1e-5)
    again = found["gradient_probe"]["forward"] - found["sft"]["forward"] - UPPER
    assert again == pytest.approx(0, abs=1e-5) if "+" not in setting else UPPER - 1e-5 < again < 2 * UPPER + 1e-5


@pytest.mark.parametrize("case", ["injection", "first_order monitor", "delta_loss mask"])
def test_the_counted_bounds_of_issue_4_are_kept(counted, case: str):
    setting, found = counted
    assert found[case]["units"] / found["sft"]["units"] <= bounds(setting, case, UPPER)[0] + 1e-5


def test_counting_leaves_the_model_as_it_was():
    model = TINY["llama"]()
    with pytest.raises(ZeroDivisionError), counted_passes(model):
        1 / 0  # noqa: B018
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_meter_counts_products_and_what_is_alive_at_once():
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    with torch.no_grad(), Meter() as meter:
        c = a @ b  # 1200 bytes
        del c
        d = a @ b  # in its place
        e = d.view(30, 10) + 1  # 1200 more; the view holds nothing of its own
    assert meter.flops == 2 * 2 * 10 * 20 * 30
    assert meter.peak == 2400, e.shape
