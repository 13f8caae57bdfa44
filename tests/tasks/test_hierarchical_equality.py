from __future__ import annotations

import itertools

import numpy as np
import pytest

from tasks import SPLITS, HierarchicalEquality, TaskError, UnknownName

A, B, C, D = (np.full(4, value, dtype=np.float32) for value in (0.1, 0.2, 0.3, 0.4))


def setting(*objects):
    return dict(zip("wxyz", objects, strict=True))


@pytest.mark.parametrize(
    ("objects", "answer"),
    [((A, A, B, B), True), ((A, B, C, D), True), ((A, B, C, C), False), ((A, A, B, C), False), ((A, A, A, A), True)],
)
def test_the_four_patterns_by_hand(objects, answer):
    assert HierarchicalEquality().causal_model.run(setting(*objects))["answer"] == answer


def test_one_number_that_differs_makes_objects_different():
    near = A.copy()
    near[3] += 1e-3
    assert not HierarchicalEquality().causal_model.run(setting(A, near, B, C))["left_equal"]


@pytest.mark.parametrize(
    ("base", "sources", "answer"),
    [
        ((A, A, B, B), {"left_equal": (A, B, C, C)}, False),  # left becomes False, right stays True
        ((A, B, C, C), {"left_equal": (D, D, A, B)}, True),
        ((A, A, B, C), {"right_equal": (A, B, D, D)}, True),
        ((A, A, B, B), {"left_equal": (A, B, C, D), "right_equal": (A, A, B, C)}, True),  # False = False
        ((A, A, B, B), {"left_equal": (A, A, C, D), "right_equal": (A, A, B, C)}, False),
        ((A, A, B, B), {"first_object": (C, C, B, B)}, False),  # w becomes C, x is A
        ((A, B, C, D), {"first_object": (B, A, A, A)}, False),  # w becomes B, and so equal to x
    ],
)
def test_counterfactuals_by_hand(base, sources, answer):
    model = HierarchicalEquality().causal_model
    result = model.interchange(setting(*base), {name: setting(*objects) for name, objects in sources.items()})
    assert result["answer"] == answer


def patterns(inputs):
    """(N, 16) -> (N, 2): whether w = x and y = z, read off the arrays."""
    w, x, y, z = np.split(inputs, 4, axis=1)
    return np.stack([(w == x).all(1), (y == z).all(1)], axis=1)


def test_examples_are_balanced_over_the_four_patterns_and_rightly_labelled():
    examples = HierarchicalEquality().examples("train", n=400, seed=1)
    assert examples.inputs.shape == (400, 16) and examples.inputs.dtype == np.float32
    assert examples.labels.dtype == np.int64 and len(examples) == 400
    kinds = patterns(examples.inputs)
    assert {kind: 100 for kind in itertools.product((False, True), repeat=2)} == {
        kind: int((kinds == kind).all(1).sum()) for kind in itertools.product((False, True), repeat=2)
    }
    np.testing.assert_array_equal(examples.labels, kinds[:, 0] == kinds[:, 1])
    assert np.abs(examples.inputs).max() <= 1


@pytest.mark.parametrize("side", [0, 1])
def test_single_interventions_have_every_joint_pattern_once_and_exact_baselines(side):
    name = ("left_equal", "right_equal")[side]
    pairs = HierarchicalEquality().pairs("train", variables=[name], n=16)
    base, source = patterns(pairs.base), patterns(pairs.sources[name])
    assert len({(*map(bool, b), *map(bool, s)) for b, s in zip(base, source, strict=True)}) == 16
    expected = source[:, side] == base[:, 1 - side]
    np.testing.assert_array_equal(pairs.labels, expected)
    np.testing.assert_array_equal(pairs.base_labels, base[:, 0] == base[:, 1])
    np.testing.assert_array_equal(pairs.source_labels[name], source[:, 0] == source[:, 1])
    assert pairs.baselines() == {"copy_base": 0.5, "copy_source": 0.5, "majority": 0.5}


def test_double_interventions_have_every_joint_pattern_once_and_exact_baselines():
    pairs = HierarchicalEquality().pairs("test", variables=["left_equal", "right_equal"], n=64)
    assert pairs.variables == ("left_equal", "right_equal")
    one, two = (patterns(pairs.sources[name]) for name in pairs.variables)
    rows = np.concatenate([patterns(pairs.base), one, two], axis=1)
    assert len({tuple(row) for row in rows.tolist()}) == 64
    np.testing.assert_array_equal(pairs.labels, one[:, 0] == two[:, 1])
    assert pairs.baselines() == {
        "copy_base": 0.5,
        "copy_source[left_equal]": 0.5,
        "copy_source[right_equal]": 0.5,
        "majority": 0.5,
    }


def test_the_control_variable_has_exact_baselines_too():
    pairs = HierarchicalEquality().pairs("train", variables=["first_object"], n=64)
    assert pairs.baselines() == {"copy_base": 0.5, "copy_source": 0.5, "majority": 0.5}
    # Fresh objects: the source's w is never the base's x, so only the base's right side matters.
    np.testing.assert_array_equal(pairs.labels, ~patterns(pairs.base)[:, 1])


def test_labels_derived_anew_agree_and_a_planted_one_does_not():
    task = HierarchicalEquality()
    pairs = task.pairs("train", variables=["left_equal"], n=64)
    np.testing.assert_array_equal(task.relabel(pairs), pairs.labels)
    pairs.labels[5] = 1 - pairs.labels[5]
    assert np.flatnonzero(task.relabel(pairs) != pairs.labels).tolist() == [5]


def test_seeds_are_reproducible_and_no_two_sets_share_an_object():
    task = HierarchicalEquality()
    first = task.pairs("train", variables=["left_equal"], n=64, seed=3)
    again = HierarchicalEquality().pairs("train", variables=["left_equal"], n=64, seed=3)
    np.testing.assert_array_equal(first.base, again.base)
    np.testing.assert_array_equal(first.labels, again.labels)
    sets = [task.examples(split, n=64, seed=seed).inputs for split in SPLITS for seed in (0, 1)]
    sets += [task.pairs(split, variables=["left_equal"], n=64).base for split in SPLITS] + [first.base]
    for one, two in itertools.combinations(sets, 2):
        vectors, others = ({tuple(row) for row in inputs.reshape(-1, 4).tolist()} for inputs in (one, two))
        assert not vectors & others


def test_slices_of_pairs():
    pairs = HierarchicalEquality().pairs("train", variables=["left_equal", "right_equal"], n=64)
    part = pairs[10:20]
    assert len(part) == 10
    np.testing.assert_array_equal(part.sources["right_equal"], pairs.sources["right_equal"][10:20])
    np.testing.assert_array_equal(HierarchicalEquality().relabel(part), part.labels)


def test_other_widths():
    assert HierarchicalEquality(width=2).examples("train", n=4).inputs.shape == (4, 8)


def test_refusals():
    task = HierarchicalEquality()
    with pytest.raises(UnknownName, match=r"'left_eqal'.*Did you mean left_equal"):
        task.pairs("train", variables=["left_eqal"], n=4)
    with pytest.raises(UnknownName, match=r"split 'dev'.*Known: train, select, test"):
        task.examples("dev", n=4)
    with pytest.raises(TaskError, match="each may stand once, and one is needed"):
        task.pairs("train", variables=[], n=4)
    with pytest.raises(TaskError, match="each may stand once"):
        task.pairs("train", variables=["left_equal", "left_equal"], n=4)
    with pytest.raises(TaskError, match="n=0: at least one is needed"):
        task.examples("train", n=0)
