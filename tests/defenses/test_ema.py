"""The average against the sum it is defined as, and what is evaluated."""

from __future__ import annotations

import pytest
import torch

from defenses.defense import Defense, Sft
from defenses.ema import Ema, EmaOptions
from defenses.errors import DefenseError
from records.config_files import ConfigError
from tests.defenses.small_training import backend_of, stored, trained

NAME = "model.layers.1.mlp.down_proj.weight"


class Remembering(Sft):
    """SFT that keeps the weights after every step."""

    def __init__(self):
        self.seen = []

    def after_step(self, backend, step):
        self.seen.append(backend.value(NAME))


def weighted(seen, decay):
    weights = [decay ** (len(seen) - 1 - place) for place in range(len(seen))]
    return sum(w * one for w, one in zip(weights, seen, strict=True)) / sum(weights)


@pytest.mark.parametrize("horizon", [1.0, 4.0, 1000.0])
def test_the_average_is_the_weighted_sum_of_all_readings_without_the_start(horizon):
    inner = Remembering()
    defense = Ema(EmaOptions(horizon=horizon), inner)
    trained(defense, 6)
    assert len(inner.seen) == 6
    expected = weighted([one.double() for one in inner.seen], 1 - 1 / horizon).float()
    torch.testing.assert_close(defense.average[NAME], expected, rtol=1e-5, atol=1e-6)


def test_readings_every_few_steps_forget_as_much_as_those_steps_would():
    inner = Remembering()
    defense = Ema(EmaOptions(horizon=4, every=2, onset=2), inner)
    trained(defense, 8)
    read = [inner.seen[place] for place in (3, 5, 7)]  # after steps 4, 6, 8
    torch.testing.assert_close(defense.average[NAME], weighted(read, 0.75**2), rtol=1e-5, atol=1e-6)


def test_inside_the_block_the_model_is_the_average_and_afterwards_what_was_trained():
    defense = Ema(EmaOptions(horizon=3))
    backend, _ = trained(defense, 4)
    before = {name: value.clone() for name, value in backend.model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7, 8]])
    trained_logits = backend.model(ids).logits
    with defense.averaged(backend):
        saved = backend.weights()
        assert not torch.allclose(backend.model(ids).logits, trained_logits)
    for name, value in defense.average.items():
        torch.testing.assert_close(saved[name], value)
    for name, value in backend.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_trained_weights_come_back_after_an_error_too():
    defense = Ema()
    backend, _ = trained(defense, 2)
    before = backend.value(NAME)
    with pytest.raises(KeyboardInterrupt), defense.averaged(backend):
        raise KeyboardInterrupt
    assert torch.equal(backend.value(NAME), before)


def test_training_itself_is_that_of_the_inner_defense():
    averaged, _ = trained(Ema(), 4)
    plain, _ = trained(Sft(), 4)
    assert torch.equal(averaged.value(NAME), plain.value(NAME))


def test_a_resumed_run_ends_in_the_same_average():
    whole = Ema(EmaOptions(horizon=5))
    trained(whole, 6)
    first = Ema(EmaOptions(horizon=5))
    backend, _ = trained(first, 3, total=6)
    state, weights = stored(first.state_dict()), backend.state()
    second, resumed = Ema(EmaOptions(horizon=5)), backend_of()
    second.load_state_dict(state)
    resumed.load_state(weights)
    trained(second, 6, backend=resumed, start=3)
    for name, value in whole.average.items():
        assert torch.equal(value, second.average[name])


def test_no_reading_yet_is_no_average():
    with pytest.raises(DefenseError, match="no such step was made yet"), Ema().averaged(backend_of()):
        pass


def test_before_the_first_reading_an_early_look_sees_the_weights_as_they_are():
    backend = backend_of()
    before = backend.value(NAME)
    with Ema().averaged(backend, early=True):
        assert torch.equal(backend.value(NAME), before)
    defense = Ema()
    backend, _ = trained(defense, 2)
    with defense.averaged(backend, early=True):  # and afterwards the average
        torch.testing.assert_close(backend.value(NAME), defense.average[NAME])


@pytest.mark.parametrize("options", [{"every": 5}, {"onset": 4}, {"onset": 0.5, "every": 3}])
def test_a_training_that_ends_before_the_first_reading_is_refused_before_its_first_step(options):
    with pytest.raises(ConfigError, match=r"has 4 steps, so that the weights would never be read\. Choose a smaller"):
        trained(Ema(EmaOptions(**options)), 4)
    last = Ema(EmaOptions(onset=0.5, every=2))
    trained(last, 4)
    assert last.readings == 1


@pytest.mark.parametrize("options", [{"horizon": 0.5}, {"every": 0}, {"horizon": float("nan")}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigError, match="both count steps"):
        EmaOptions(**options)


def test_it_is_a_defense():
    assert isinstance(Ema(), Defense)
    assert Ema.evidence
