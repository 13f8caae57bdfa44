"""What is refused before the model runs, and what is derived."""

from __future__ import annotations

import pytest
import torch

from alignments.config import ConfigError, load_config
from alignments.problem import check_rank, resolve_device
from alignments.text_problem import draw_text
from alignments.vector_problem import task_defaults
from intervene import Site
from tasks import NotEnough, task_named
from tests.tiny import tiny_model


def config(**values):
    return load_config(flags={"task": "cities", "variable": "country", **values})


def test_all_splits_are_drawn_before_any_pass():
    task = task_named("cities")
    name = task.variables[0]
    drawn = draw_text(config(variable=name, n_train=8, n_select=4, n_test=6), task)
    assert {split: len(pairs) for split, (pairs, _) in drawn.items()} == {"train": 8, "select": 4, "test": 6}
    assert all(report.n == len(pairs) and not report.problems for pairs, report in drawn.values())


@pytest.mark.slow
def test_a_split_that_is_too_small_is_named():
    task = task_named("cities")
    with pytest.raises(NotEnough, match="cities, test: 100000 distinct pairs were asked for"):
        draw_text(config(variable=task.variables[0], n_train=8, n_select=4, n_test=100_000), task)


def test_a_rank_above_the_width_is_refused_only_where_something_is_learned():
    model, sites = tiny_model("llama"), [Site("block_output", 0)]
    with pytest.raises(ConfigError, match=r"rank 33: L0\.block_output is 32 wide\. Choose 1 to 32"):
        check_rank(config(rank=33), model, sites)
    check_rank(config(rank=32), model, sites)
    check_rank(config(rank=33, methods="full_vector"), model, sites)


def test_the_device_is_derived_once_and_checked():
    derived = resolve_device(config())
    assert derived.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert derived.sources["device"] == "derived"
    assert resolve_device(config(device="cpu")).sources["device"] == "flag"
    with pytest.raises(ConfigError, match="device foo: "):
        resolve_device(config(device="foo"))


def test_a_task_with_its_own_network_takes_no_other():
    with pytest.raises(ConfigError, match=r"dtype bfloat16: hierarchical_equality trains .* with dtype float32"):
        task_defaults(config(task="hierarchical_equality", variable=None, dtype="bfloat16"))
    assert task_defaults(config(task="hierarchical_equality", variable=None, device="cpu")).model == "mlp"
