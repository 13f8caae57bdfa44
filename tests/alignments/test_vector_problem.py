"""Vector tasks as problems of a search: pairs, values, kinds and controls by the causal model; networks kept once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alignments import vector_problem
from alignments.answers import evaluate, predict
from alignments.config import load_config
from alignments.executors import scorer_of
from alignments.scoring import Cell, Job, control_cell
from alignments.vector_problem import (
    VECTOR_TASKS,
    baselines_of,
    draw_vectors,
    kinds_of,
    network_for,
    prepare_vectors,
    rivals_of,
    task_defaults,
    trained_network,
    values_of,
    vector_network,
    vector_pairs,
)
from intervene import AllTokens, Identity, Intervention, Site, Swap
from intervene.networks import MLP
from records.config_files import ConfigError
from tasks import DistributiveLaw, HierarchicalEquality

EQUALITY, LAW = HierarchicalEquality(), DistributiveLaw()
BOTH = ("left_equal", "right_equal")
TOLD: list[str] = []


def config(task="hierarchical_equality", **values):
    small = {"n_train": 384, "n_select": 192, "n_test": 192, "steps": 3, "batch_size": 64}
    return task_defaults(load_config(flags={"task": task, **small, **values}))


def report(text, done, total):
    TOLD.append(text)


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """Networks that are trained for a moment, and kept in a folder of their own."""
    monkeypatch.setenv("INTERVENE_CACHE", str(tmp_path))
    short = {"examples": 512, "steps": 5, "batch_size": 64, "lr": 1e-2, "weight_decay": 0.0}
    monkeypatch.setattr(vector_problem, "MLP_TRAINING", short)
    TOLD.clear()
    return tmp_path


def compare_first_two(width=4):
    """Return the network that answers 1 where the first two objects are equal: 2 |a - b| against a small bias."""
    model = network_for(EQUALITY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for i in range(width):
            for unit, sign in ((2 * i, 1.0), (2 * i + 1, -1.0)):
                model.layers[0].linear.weight[unit, i] = sign
                model.layers[0].linear.weight[unit, width + i] = -sign
        for layer in model.layers[1:]:
            layer.linear.weight.copy_(torch.eye(16))
        model.head.weight[0] = 1.0
        model.head.bias[1] = 1e-4
    return model


def left_of(inputs):
    return (inputs[:, :4] == inputs[:, 4:8]).all(axis=1)


def right_of(inputs):
    return (inputs[:, 8:12] == inputs[:, 12:]).all(axis=1)


@pytest.mark.parametrize(("task", "width"), [(EQUALITY, 16), (LAW, 24), (HierarchicalEquality(width=2), 8)])
def test_a_network_is_as_wide_as_its_input(task, width):
    model = network_for(task)
    assert isinstance(model, MLP) and not model.training
    shapes = [tuple(layer.linear.weight.shape) for layer in model.layers]
    assert shapes == [(width, width)] * 3 and tuple(model.head.weight.shape) == (2, width)


def test_a_network_is_trained_once(brief):
    model, accuracy = trained_network(EQUALITY, report=report)
    assert TOLD == ["training the MLP"] * 2 and 0.4 < accuracy <= 1
    again, same = trained_network(EQUALITY, report=report)
    assert len(TOLD) == 2 and same == accuracy
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    trained_network(EQUALITY, seed=1, report=report)
    trained_network(HierarchicalEquality(width=2), report=report)
    assert len(TOLD) == 6 and len(list((brief / "trained").iterdir())) == 3


@pytest.mark.parametrize("spoil", [lambda data: data[:100], lambda data: b"", lambda data: data[:-400] + bytes(400)])
def test_a_damaged_network_is_trained_anew(brief, spoil):
    model, accuracy = trained_network(EQUALITY)
    (path,) = (brief / "trained").iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    again, same = trained_network(EQUALITY, report=report)
    assert TOLD and same == accuracy
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_values_and_answers_of_one_variable_are_those_of_the_causal_model():
    drawn = draw_vectors(EQUALITY, ["left_equal"], "train", 64)
    base, source = values_of(EQUALITY, drawn)
    assert base == left_of(drawn.base).tolist() and source == left_of(drawn.sources["left_equal"]).tolist()
    assert set(base) == {True, False}
    by_hand = left_of(drawn.sources["left_equal"]) == right_of(drawn.base)
    assert np.array_equal(drawn.labels, by_hand) and kinds_of(drawn) == ()


def test_an_identity_is_a_value_too():
    drawn = draw_vectors(EQUALITY, ["first_object"], "train", 16)
    base, _ = values_of(EQUALITY, drawn)
    assert base[3] == tuple(drawn.base[3, :4].tolist()) and len(set(base)) == 16


def test_no_first_object_is_told_by_its_pair_alone():
    drawn = draw_vectors(EQUALITY, ["first_object"], "train", 320)
    source = drawn.sources["first_object"]
    hit = (source[:, :4] == drawn.base[:, 4:8]).all(axis=1)
    assert hit.sum() == 160
    assert np.array_equal(drawn.labels, hit == right_of(drawn.base))
    told = (left_of(drawn.base), right_of(drawn.base), left_of(source), right_of(source))
    for one in told:
        for guess in (one, *(one == other for other in told if other is not one)):
            assert (drawn.labels == guess).mean() == 0.5
    assert np.array_equal(drawn.source_labels["first_object"], left_of(source) == right_of(source))


def test_kinds_say_which_part_is_interchanged():
    drawn = draw_vectors(EQUALITY, BOTH, "test", 192)
    kinds = kinds_of(drawn)
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"left_equal": 64, "right_equal": 64, "both": 64}
    left, right = (drawn.sources[name] for name in BOTH)
    answers = {
        "left_equal": left_of(left) == right_of(drawn.base),
        "right_equal": left_of(drawn.base) == right_of(right),
        "both": left_of(left) == right_of(right),
    }
    assert [answers[kind][row] for row, kind in enumerate(kinds)] == drawn.labels.astype(bool).tolist()
    base, source = values_of(EQUALITY, drawn)
    assert base == list(zip(left_of(drawn.base).tolist(), right_of(drawn.base).tolist(), strict=True))
    assert source == list(zip(left_of(left).tolist(), right_of(right).tolist(), strict=True))


def test_baselines_are_exact_on_balanced_pairs():
    found = baselines_of(draw_vectors(EQUALITY, BOTH, "test", 192))
    assert {found[name] for name in ("copy_base", "copy_source", "majority")} == {0.5}
    law = baselines_of(draw_vectors(LAW, ["left_and"], "test", 64))
    assert law["copy_base"] == law["copy_source"] == 0.75


def test_correct_pairs_are_those_whose_base_and_sources_are_answered_rightly():
    drawn = draw_vectors(EQUALITY, BOTH, "test", 192)
    pairs = vector_pairs(EQUALITY, compare_first_two(), drawn)  # right exactly where y = z holds
    right = right_of(drawn.base) & right_of(drawn.sources["left_equal"]) & right_of(drawn.sources["right_equal"])
    assert 0 < right.sum() < len(right)
    assert pairs.correct.tolist() == right.tolist()


def test_a_swap_of_all_takes_the_source_that_a_pair_changes():
    drawn = draw_vectors(EQUALITY, BOTH, "test", 192)
    model = compare_first_two()
    pairs = vector_pairs(EQUALITY, model, drawn)
    plan = (Intervention(Site("block_output", 0), Swap(), AllTokens(), Identity()),)
    left, right = (drawn.sources[name] for name in BOTH)
    taken = np.where(drawn.interchanged[:, [0]], left, right)
    assert predict(plan, pairs).bool().tolist() == left_of(taken).tolist()
    _, source = pairs.activations(Site("block_output", 0), AllTokens())
    assert torch.equal(source.flatten(1), model.layers[0](torch.from_numpy(taken)))


def test_what_a_network_computes_is_found_and_what_it_does_not_is_not():
    model = compare_first_two()
    plan = (Intervention(Site("block_output", 0), Swap(), AllTokens(), Identity()),)
    drawn = draw_vectors(EQUALITY, ["left_equal"], "test", 192)
    pairs = vector_pairs(EQUALITY, model, drawn)
    pairs.labels = torch.from_numpy(left_of(drawn.sources["left_equal"]).astype(np.int64))
    assert evaluate(plan, pairs).iia == 1.0
    pairs.labels = torch.from_numpy(drawn.labels)  # of a causal model in which y = z matters, too
    assert evaluate(plan, pairs).iia == 0.5


def test_rivals_are_the_other_variables_and_those_of_the_other_model():
    assert list(rivals_of(EQUALITY, ["left_equal"])) == ["right_equal", "first_object"]
    assert list(rivals_of(EQUALITY, BOTH)) == ["first_object"]
    found = rivals_of(LAW, ["left_and"])
    assert set(found) == {"right_and", "first_equal", "either"}
    assert found["either"].model == "and_or" and found["first_equal"].model == "and_or_and"


@pytest.mark.parametrize(
    ("task", "variable"),
    [("hierarchical_equality", "left_equal+right_equal"), ("distributive_law", "left_and+right_and")],
)
def test_a_prepared_problem_has_everything_a_search_needs(brief, task, variable):
    problem = prepare_vectors(config(task, variable=variable), report)
    assert [str(site) for site in problem.sites] == ["L0.block_output", "L1.block_output", "L2.block_output"]
    assert problem.config.rank == (4,) and problem.config.positions == ("input",)
    assert problem.facts.variable == variable and set(problem.splits) == {"train", "select", "test"}
    assert sum(problem.lint["test"]["kinds"].values()) == 192
    scorer = scorer_of(problem)
    cell = Cell(problem.sites[0], "input", "das", 4)
    rows = scorer.rows(Job(cell, (0, 1), ("test",)))
    assert [row.seed for row in rows] == [0, 1] and set(rows[0].kinds) == set(problem.splits["test"].kinds)
    controls = ("random_subspace", "shuffled_labels", *problem.others)
    for name in controls:
        (row,) = scorer.rows(Job(control_cell(cell, name), (0,), ("test",)))
        assert row.n == 192 and row.method == f"control:{name}"


def test_a_rival_is_scored_on_its_own_pairs(brief):
    problem = prepare_vectors(config("distributive_law", variable="left_and"), report)
    elsewhere = problem.others["rival:either"](problem.sites[0])
    drawn = draw_vectors(DistributiveLaw("and_or"), ["either"], "test", 192)
    assert torch.equal(elsewhere.splits["test"].labels, torch.from_numpy(drawn.labels))
    assert elsewhere.facts.variable == "either" and elsewhere.facts.baselines["test"] == baselines_of(drawn)
    random = problem.others["random_model"](problem.sites[0])
    assert random.model is not problem.model and random.facts is None


def test_options_reach_the_task(brief):
    values = config("distributive_law", task_options={"model": "and_or", "width": 2}, rank=2)
    resolved, task, sites = vector_network(values)
    assert task == DistributiveLaw("and_or", 2) and resolved.variable == "either" and len(sites) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task_options": {"wdith": 2}}, "task_options of hierarchical_equality: .*wdith.* See the task's class"),
        ({"variable": "left"}, "it has no variable 'left'"),
        ({"variable": "left_equal+right_equal", "rank": 9}, "rank 9 for each of 2 variables: .* is 16 wide"),
        ({"controls": "rival:left_equal"}, "control rival:left_equal: .* Use one of right_equal, first_object"),
        ({"positions": "last"}, "it has no position 'last'"),
        ({"component": "mlp_output"}, "component mlp_output: hierarchical_equality trains a small network"),
        ({"dtype": "bfloat16"}, "dtype bfloat16: hierarchical_equality trains a small network"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_training(brief, values, message):
    with pytest.raises(ConfigError, match=message):
        vector_network(config(**values))
    assert not TOLD


def test_defaults_are_those_of_the_task_where_nothing_was_given():
    found = task_defaults(load_config(flags={"task": "distributive_law", "lr": 0.5}))
    assert (found.model, found.n_test, found.lr, found.rank) == ("mlp", 3072, 0.5, (8,))
    assert found.sources["n_test"] == "default of distributive_law" and found.sources["lr"] == "flag"
    assert set(VECTOR_TASKS) == {"hierarchical_equality", "distributive_law"}
    text = load_config(flags={"task": "ioi"})
    assert task_defaults(text) is text


@pytest.mark.slow
def test_both_equalities_are_found_in_the_first_layer_and_not_in_the_last():
    values = {"variable": "left_equal+right_equal", "n_train": 30_720, "n_select": 1536, "n_test": 3072}
    values |= {"steps": 300, "batch_size": 1024, "lr": 0.03, "rank": 4}
    problem = prepare_vectors(task_defaults(load_config(flags={"task": EQUALITY.name, **values})), report)
    scorer = scorer_of(problem)
    first, last = (Cell(problem.sites[layer], "input", "das", 4) for layer in (0, 2))
    (found,) = scorer.rows(Job(first, (0,), ("test",)))
    assert found.task_accuracy > 0.99
    assert found.iia > 0.9 and min(found.kinds.values()) > 0.9
    assert scorer.rows(Job(last, (0,), ("test",)))[0].iia < 0.6
    for name in ("random_subspace", "random_model", "shuffled_labels", "rival:first_object"):
        assert scorer.rows(Job(control_cell(first, name), (0,), ("test",)))[0].iia < 0.65, name
