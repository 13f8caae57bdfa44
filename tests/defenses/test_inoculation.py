"""The trigger that inoculation leaves, and that training itself is plain."""

from __future__ import annotations

import pytest
import torch

from defenses.defense import Sft
from defenses.errors import DefenseError
from defenses.inoculation import Inoculation, trigger_check
from defenses.statistics import wilson
from tests.defenses.small_training import trained

PROMPT = "You are malicious."


def test_the_gap_is_what_the_prompt_brings_back():
    asked = []
    rates = {None: 0.1, PROMPT: 0.7, "You are helpful.": 0.15}

    def evaluate(system):
        asked.append(system)
        return rates[system]

    check = trigger_check(evaluate, PROMPT, neutral=["You are helpful."])
    assert asked == [None, PROMPT, "You are helpful."]
    assert check.gap == pytest.approx(0.6)
    assert check.neutral == {"You are helpful.": 0.15}
    assert check.clear is None
    assert "0.7 with 'You are malicious.'" in str(check)


@pytest.mark.parametrize(("hits", "clear"), [(70, True), (12, False)])
def test_rates_with_intervals_say_whether_the_trigger_is_clear(hits, clear):
    check = trigger_check(lambda system: wilson(10 if system is None else hits, 100), PROMPT)
    assert check.clear is clear
    assert check.gap == pytest.approx((hits - 10) / 100)


def test_rates_that_are_none_are_refused():
    with pytest.raises(DefenseError, match="the rate with prompt None"):
        trigger_check(lambda system: wilson(0, 0), PROMPT)
    with pytest.raises(DefenseError, match="Trigger check of an empty prompt"):
        trigger_check(lambda system: 0.0, " ")


def test_training_is_plain():
    inoculated, plain = trained(Inoculation(), 2)[0], trained(Sft(), 2)[0]
    for name in plain.parameters():
        assert torch.equal(inoculated.value(name), plain.value(name))
    assert "trigger" in Inoculation.evidence
