"""Filters: training on what they keep is training without what they leave out."""

from __future__ import annotations

import pytest
import torch

from defenses.batch import collate
from defenses.defense import Sft, Step
from defenses.errors import CalibrationError, DataError
from defenses.filtering import Filtering, FilteringOptions, drawn_at_random
from defenses.methods import Materials, entry_of, options_of
from defenses.objectives import learned
from records.config_files import ConfigError
from tests.defenses.small_training import Rotating, backend_of, examples, on_ranks, trained

NAME = "model.layers.1.mlp.down_proj.weight"


def gradient(defense, data, tokens, micros=1):
    backend = backend_of()
    size = len(data) // micros
    for micro in range(micros):
        batch = collate(data[micro * size : (micro + 1) * size], 0)
        defense.accumulate(backend, batch, Step(0, 1, micro, micros, tokens, len(data)))
    return backend.gradient(NAME)


def count(data):
    return sum(one.n_response for one in data)


def scored(**options):
    table = {index: float(index) for index in range(8)}
    return Filtering(FilteringOptions("scores", **options), scores=table)


CHOOSE = {
    "oracle": lambda **more: Filtering(FilteringOptions("oracle", **more)),
    "scores": lambda **more: scored(threshold=1.5, **more),  # leaves out 2 and 3
    "random": lambda **more: Filtering(FilteringOptions("random", rate=0.5, **more), indices=range(4)),
}


@pytest.mark.parametrize("by", CHOOSE)
@pytest.mark.parametrize("denominator", ["all", "kept"])
def test_the_gradient_is_that_of_the_kept_samples_alone(by, denominator):
    data = examples(4, poison=lambda index: index in (0, 3))
    defense = CHOOSE[by](denominator=denominator)
    out = defense.left_out(collate(data, 0)).tolist()
    assert sum(out) == 2
    kept = [one for one, leave in zip(data, out, strict=True) if not leave]
    tokens = count(data) if denominator == "all" else count(kept)
    torch.testing.assert_close(
        gradient(defense, data, count(data)), gradient(Sft(), kept, tokens), rtol=1e-4, atol=1e-7
    )


def test_what_is_left_out():
    data = examples(8, poison=lambda index: index % 3 == 0)
    batch = collate(data, 0)
    assert CHOOSE["oracle"]().left_out(batch).tolist() == [index % 3 == 0 for index in range(8)]
    assert scored(threshold=5.0).left_out(batch).tolist() == [index > 5 for index in range(8)]
    for share, kept in ((0.75, 6), (1.0, 8), (0.0, 0), (0.5, 4)):
        assert scored(quantile=share).left_out(batch).tolist() == [index >= kept for index in range(8)]


def test_the_random_filter_leaves_out_exactly_its_share_the_same_on_every_rank_and_epoch():
    drawn = drawn_at_random(range(1000), 0.137, 3)
    assert len(drawn) == 137
    assert drawn == drawn_at_random(reversed(range(1000)), 0.137, 3)
    assert drawn != drawn_at_random(range(1000), 0.137, 4)
    # a share of any part of the data, not a run of it: 500 * .137 = 68.5, sd 5.4
    assert 45 < len([one for one in drawn if one < 500]) < 92


def test_the_random_filter_draws_by_the_seed_of_the_run_unless_it_is_given_one():
    def drawn(run, **options):
        held = Materials(examples=examples(40), seed=run)
        given = {"name": "filtering", "by": "random", "rate": 0.5, **options}
        return entry_of("filtering").build(options_of(given), held).drawn

    assert drawn(0) != drawn(1) != drawn(2)
    assert drawn(1) == drawn(1) == drawn(5, seed=1)
    assert drawn(0, seed=0) == drawn(1, seed=0) == drawn(0)
    assert Filtering(FilteringOptions("random", rate=0.5), indices=range(40), seed=3).drawn == drawn(3)


def test_an_oracle_of_no_poison_is_plain_training():
    data = examples(8, poison=lambda index: False)
    filtered, rows = trained(CHOOSE["oracle"](), 4, data=data)
    plain, _ = trained(Sft(), 4, data=data)
    assert torch.equal(filtered.value(NAME), plain.value(NAME))
    assert rows[-1]["blocked"] == 0


def test_everything_left_out_leaves_no_gradient_but_decay_still_works():
    data = examples(4, poison=lambda index: True)
    for denominator in ("all", "kept"):
        assert not gradient(CHOOSE["oracle"](denominator=denominator), data, count(data)).any()
    decayed, rows = trained(CHOOSE["oracle"](), 1, data=data, lr=1e-2)
    torch.testing.assert_close(decayed.value(NAME), backend_of().value(NAME) * (1 - 1e-2 * 0.1))
    assert (rows[0]["blocked"], rows[0]["samples"]) == (4, 4)
    assert rows[0]["loss"] > 0  # told of all samples


def test_one_rank_that_leaves_out_everything_does_not_stop_the_other():
    def make():
        return CHOOSE["oracle"]()

    data = examples(8, poison=lambda index: index % 4 < 2)  # all of rank 0, none of rank 1
    (_, backend, rows), (_, other, _) = on_ranks(2, make, 4, data=data)
    alone, alone_rows = trained(make(), 4, data=data)
    assert torch.equal(backend.value(NAME), other.value(NAME))
    torch.testing.assert_close(backend.value(NAME), alone.value(NAME), rtol=0, atol=5e-4)
    assert [row["blocked"] for row in rows] == [row["blocked"] for row in alone_rows] == [2, 2, 2, 2]


def test_rows_say_what_became_of_each_sample():
    data = examples(4, poison=lambda index: index == 1)
    defense = scored(threshold=2.5)
    backend = backend_of()
    batch = Rotating(data, micro=4).batches(0, 0, 1)[0]
    defense.accumulate(backend, batch, Step(0, 1, 0, 1, int(learned(batch).sum()), 4))
    rows = defense.told()
    assert [(row["index"], row["score"], row["blocked"], row["poison"]) for row in rows] == [
        (0, 0.0, False, False),
        (1, 1.0, False, True),
        (2, 2.0, False, False),
        (3, 3.0, True, False),
    ]
    assert defense.told() == []


def test_samples_that_nothing_is_known_of_are_refused():
    batch = collate(examples(3), 0)
    with pytest.raises(DataError, match=r"example 0 does not say whether it is.*Label all of the data"):
        CHOOSE["oracle"]().left_out(batch)
    few = Filtering(FilteringOptions("scores", threshold=0.0), scores={0: 0.1})
    with pytest.raises(DataError, match="example 1 has no score"):
        few.left_out(batch)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"by": "scores"}, "exactly one of the two"),
        ({"by": "scores", "threshold": 0.0, "quantile": 0.5}, "exactly one of the two"),
        ({"by": "random"}, "no rate was given"),
        ({"by": "random", "rate": 1.5}, "it is a share"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        FilteringOptions(**options)


def test_scores_and_indices_have_to_be_there():
    with pytest.raises(CalibrationError, match="there are none"):
        Filtering(FilteringOptions("scores", threshold=0.0))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        Filtering(FilteringOptions("scores", quantile=0.5), scores={0: float("nan")})
    with pytest.raises(CalibrationError, match="Pass indices="):
        Filtering(FilteringOptions("random", rate=0.5))
