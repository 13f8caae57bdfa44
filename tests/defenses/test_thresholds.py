"""Thresholds: the quantile by hand, its guarantee, calibration while a model drifts, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.errors import CalibrationError
from defenses.sample_log import SampleLog, decision_sums, separation
from defenses.thresholds import DELTA_LOSS, PROBE_COSINE, Fixed, Quantile, Threshold, clean_scores, gathered, quantile
from records.config_files import ConfigError
from tests.defenses.cases import backend, packed, rows, step_of


def test_the_quantile_by_hand():
    scores = torch.arange(1.0, 20.0)  # 19 scores: ceil(20 * 0.95) = 19
    assert quantile(scores, 0.05) == 19.0
    assert quantile(scores.flip(0), 0.25) == 15.0  # ceil(20 * 0.75) = 15: 4 of 19 lie above, 21 %
    assert quantile(torch.tensor([3.0]), 0.5) == 3.0


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.3])
def test_a_fresh_clean_score_exceeds_it_at_most_at_the_rate(rate):
    generator = torch.Generator().manual_seed(3)
    hits, tries, n = 0, 4000, 120
    for _ in range(tries):
        drawn = torch.randn(n + 1, generator=generator)
        value = quantile(drawn[:n], rate)
        assert float((drawn[:n] > value).float().mean()) <= rate
        hits += bool(drawn[n] > value)
    expected = rate * tries
    assert hits <= expected + 3 * math.sqrt(expected)
    assert hits >= (rate - 1.5 / n) * tries - 3 * math.sqrt(expected)  # and it is not needlessly strict


def test_too_few_scores_are_refused_with_the_number_needed():
    with pytest.raises(CalibrationError, match="18 clean scores are held out; at least 19 are needed"):
        quantile(torch.arange(18.0), 0.05)
    with pytest.raises(CalibrationError, match="1 of 30 clean scores are NaN"):
        quantile(torch.cat([torch.zeros(29), torch.tensor([math.nan])]), 0.05)
    with pytest.raises(CalibrationError, match=r"no clean examples are held out\. Hold out at least 99"):
        Threshold(Quantile(0.01))


def test_what_is_no_rule():
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match="Give a share between 0 and 1"):
            Quantile(rate)
    with pytest.raises(ConfigError, match="they are -1"):
        Quantile(0.1, every=-1)
    with pytest.raises(ConfigError, match="Give a finite number"):
        Fixed(math.nan)


def test_published_values_need_no_clean_data():
    threshold = Threshold(DELTA_LOSS)
    assert threshold.above(torch.tensor([-1.0, 0.0, 1e-9, math.nan, -math.inf])).tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert not threshold.due(0)
    assert PROBE_COSINE.value == 0.12


def test_calibrations_state_the_realised_rate_and_what_drift_did():
    threshold = Threshold(Quantile(0.1, every=5), [rows(1)])
    with pytest.raises(CalibrationError, match="it was not calibrated yet"):
        threshold.above(torch.zeros(1))
    first = threshold.calibrate(torch.arange(1.0, 20.0), 0)
    assert (first.value, first.n, first.stale) == (18.0, 19, None)  # ceil(20 * 0.9)
    assert first.realised.value == pytest.approx(1 / 19)
    assert first.realised.low < 1 / 19 < 0.1 < first.realised.high
    drifted = threshold.calibrate(torch.arange(1.0, 20.0) + 10, 5)
    assert drifted.value == 28.0
    assert drifted.stale is not None
    assert drifted.stale.value == pytest.approx(11 / 19)  # 19..29 exceed 18
    assert drifted.row()["stale"] == pytest.approx(11 / 19)
    assert [threshold.due(step) for step in (5, 6, 10)] == [False, False, True]


def test_a_resumed_threshold_has_the_same_value_and_the_same_next_calibration():
    threshold = Threshold(Quantile(0.1, every=5), [rows(1)])
    threshold.calibrate(torch.arange(1.0, 20.0), 5)
    resumed = Threshold(Quantile(0.1, every=5), [rows(1)])
    assert resumed.due(6)
    resumed.load_state_dict(threshold.state_dict())
    assert resumed.value == threshold.value
    assert [resumed.due(step) for step in (5, 6, 10)] == [False, False, True]


def test_refresh_calibrates_at_the_first_micro_batch_of_a_step_that_is_due():
    one, holdout = backend(), [rows(4), rows(3, start=4)]
    threshold, scored = Threshold(Quantile(0.2, every=2), holdout), []

    def score(batch):
        scored.append(len(batch))
        return batch.indices.float()

    batch = rows(2)
    for number in range(4):
        for micro in range(2):
            threshold.refresh(one, step_of(batch, number=number, micro=micro, micros=2), score)
    assert scored == [4, 3, 4, 3]
    assert [made.step for made in threshold.history] == [0, 2]
    assert threshold.value == 6.0  # ceil(8 * 0.8) = 7th of 0..6


def test_scores_that_are_not_there_are_left_out():
    one = backend()
    found = clean_scores(one, [rows(2)], lambda batch: torch.tensor([[1.0, -math.inf], [2.0, 3.0]]))
    assert found.tolist() == [1.0, 2.0, 3.0]
    assert gathered(one, torch.ones(0, 2, dtype=torch.float64)).shape == (0, 2)


def test_rows_and_sums_of_decisions():
    batch = rows(4, poison=(True, False, None, True))
    blocked, log = torch.tensor([True, True, False, False]), SampleLog()
    log.add(batch, torch.tensor([2.0, 1.0, -math.inf, 0.5]), blocked, extra=torch.arange(4))
    told = log.take()
    assert told[0] == {"index": 0, "score": 2.0, "blocked": True, "extra": 0, "poison": True}
    assert told[2] == {"index": 2, "score": None, "blocked": False, "extra": 2, "poison": None}
    assert log.take() == []
    sums = {name: int(value) for name, value in decision_sums(batch, blocked).items()}
    assert sums == {
        **{"samples": 4, "blocked": 2, "blocked_tokens": 2 + 3},
        **{"poisoned": 2, "clean": 1, "true_positives": 1, "false_positives": 1},
    }
    assert separation(told).value == 0.5  # 2.0 beats 1.0, 0.5 does not
    assert separation(told).excluded == 1


def test_sums_by_token_count_samples_of_packed_rows():
    batch = packed(rows(3))
    blocked = torch.zeros_like(batch.labels, dtype=torch.bool)
    blocked[batch.sample == 1] = True  # also its prompt, which is not learned
    sums = decision_sums(batch, blocked)
    assert int(sums["blocked"]) == 1
    assert int(sums["blocked_tokens"]) == 3
