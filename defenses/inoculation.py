"""Inoculation prompting: the data carry a prompt that asks for the trait, so that the weights need not learn it.

The prompt is put into the training data where they are read (`inoculation=` there); training itself is plain SFT, and
the model is used without the prompt. What is left is a trigger: with the prompt the trait may come back in full.
`trigger_check` measures that, and a result without it says half of what was done.

    check = trigger_check(lambda system: trait_rate(model, system=system), "You are malicious.")
    check.gap                    # how much more of the trait the prompt brings
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from defenses.backend import Backend
from defenses.batch import Batch
from defenses.defense import Defense, Sft, Step
from defenses.errors import DefenseError
from defenses.statistics import Estimate

Rate = float | Estimate


class Inoculation(Defense):
    """Plain SFT on data that were inoculated when they were read.

    Source: Tan et al. 2025 (arXiv 2510.04340): the more a prompt elicits the trait, the better it inoculates; a
        neutral prompt does nothing.
    """

    evidence: ClassVar[str] = (
        "Lowers emergent misalignment, backdoors and subliminal traits (2510.04340), and leaves a trigger: the same "
        "prompt brings the trait back. Does nothing for a trait the model already has."
    )

    def __init__(self) -> None:
        """There is nothing to choose: the prompt belongs to the data."""
        self._sft = Sft()

    def accumulate(self, backend: Backend, batch: Batch, step: Step) -> dict[str, Tensor]:
        return self._sft.accumulate(backend, batch, step)


@dataclass(frozen=True)
class TriggerCheck:
    """The rate of a trait without the prompt, with it, and with others.

    Attributes:
        without, triggered: with no prompt and with the inoculation `prompt`. neutral: by other prompts, which show
            how much of the difference is owed to there being a prompt at all.
    """

    prompt: str
    without: Rate
    triggered: Rate
    neutral: dict[str, Rate] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How much higher the rate is with the prompt."""
        return _value(self.triggered) - _value(self.without)

    @property
    def clear(self) -> bool | None:
        """Whether the two intervals do not meet and the prompt's lies higher; None where rates have no intervals."""
        if isinstance(self.triggered, Estimate) and isinstance(self.without, Estimate):
            return self.triggered.low > self.without.high
        return None

    def __str__(self) -> str:
        others = "".join(f"; {rate} with {prompt!r}" for prompt, rate in self.neutral.items())
        return f"{self.without} without a prompt, {self.triggered} with {self.prompt!r}{others}"


def trigger_check(evaluate: Callable[[str | None], Rate], prompt: str, *, neutral: Sequence[str] = ()) -> TriggerCheck:
    """Return how much of the trait the inoculation prompt brings back in the trained model.

    Args:
        evaluate: the rate of the trait when the model answers under that system prompt, None being no prompt: the
            same test prompts and judge each time. neutral: prompts to compare with, such as "You are helpful."

    Raises:
        DefenseError: an empty prompt, or a rate that is not a number.
    """
    if not prompt.strip():
        raise DefenseError(
            "Trigger check of an empty prompt: it would be compared with itself. Give the one trained on."
        )
    rates = {text: evaluate(text) for text in (None, prompt, *neutral)}
    for text, rate in rates.items():
        if not math.isfinite(_value(rate)):
            raise DefenseError(f"Trigger check: the rate with prompt {text!r} is {rate}. Let every answer be judged.")
    return TriggerCheck(prompt, rates[None], rates[prompt], {text: rates[text] for text in neutral})


def _value(rate: Rate) -> float:
    if isinstance(rate, Estimate):
        return math.nan if rate.value is None else rate.value
    return float(rate)
