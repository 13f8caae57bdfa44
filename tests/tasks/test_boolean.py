from __future__ import annotations

import itertools

import numpy as np
import pytest

from tasks import DistributiveLaw, HierarchicalEquality, TaskError, UnknownName

MODELS = ("and_or_and", "and_or")


def equalities(inputs, width=4):
    """(N, objects * width) -> (N, equalities): which neighbours are equal, read off the arrays."""
    objects = inputs.reshape(len(inputs), -1, 2, width)
    return (objects[:, :, 0] == objects[:, :, 1]).all(-1)


def inputs_of(pattern):
    """One input (1, 24) whose three equalities are `pattern`."""
    objects = np.arange(24, dtype=np.float32).reshape(6, 4)
    for i, equal in enumerate(pattern):
        if equal:
            objects[2 * i + 1] = objects[2 * i]
    return objects.reshape(1, 24)


ALL = list(itertools.product((False, True), repeat=3))


def test_both_models_give_the_same_answer_on_every_pattern():
    for p, q, r in ALL:
        answers = []
        for name in MODELS:
            task = DistributiveLaw(name)
            answers.append(bool(task.causal_model.run(task.setting(inputs_of((p, q, r))))["answer"][0]))
        assert answers == [p and (q or r)] * 2


@pytest.mark.parametrize(
    ("model", "variable", "expected"),
    [
        ("and_or_and", "left_and", lambda b, s: (s[0] and s[1]) or (b[0] and b[2])),
        ("and_or_and", "right_and", lambda b, s: (b[0] and b[1]) or (s[0] and s[2])),
        ("and_or_and", "first_equal", lambda b, s: s[0] and (b[1] or b[2])),
        ("and_or", "either", lambda b, s: b[0] and (s[1] or s[2])),
        ("and_or", "first_equal", lambda b, s: s[0] and (b[1] or b[2])),
    ],
)
def test_every_joint_pattern_comes_once_and_is_labelled_by_the_formula(model, variable, expected):
    pairs = DistributiveLaw(model).pairs("train", variables=[variable], n=64)
    base, source = equalities(pairs.base), equalities(pairs.sources[variable])
    assert len({(*b, *s) for b, s in zip(base.tolist(), source.tolist(), strict=True)}) == 64
    np.testing.assert_array_equal(pairs.labels, [expected(b, s) for b, s in zip(base, source, strict=True)])
    np.testing.assert_array_equal(pairs.base_labels, [p and (q or r) for p, q, r in base])
    assert pairs.interchanged.all() and pairs.interchanged.shape == (64, 1)


def test_the_rival_predicts_something_else_on_some_pairs():
    """Counted by hand over all 64 joint patterns: no score on the other 44 tells the models apart."""
    differ = 0
    for b, s in itertools.product(ALL, ALL):
        left_and = (s[0] and s[1]) or (b[0] and b[2])
        either = b[0] and (s[1] or s[2])
        differ += left_and != either
    one, two = DistributiveLaw("and_or_and"), DistributiveLaw("and_or")
    assert one.rival() == two and two.rival() == one
    pairs = one.pairs("train", variables=["left_and"], n=64)
    sources = {"either": one.setting(pairs.sources["left_and"])}
    other = two.causal_model.interchange(two.setting(pairs.base), sources)["answer"]
    assert (other.astype(int) != pairs.labels).sum() == differ == 20


def test_examples_are_dealt_over_the_eight_patterns():
    examples = DistributiveLaw().examples("train", n=800, seed=1)
    assert examples.inputs.shape == (800, 24) and examples.inputs.dtype == np.float32
    patterns = equalities(examples.inputs)
    assert [int((patterns == pattern).all(1).sum()) for pattern in ALL] == [100] * 8
    np.testing.assert_array_equal(examples.labels, [p and (q or r) for p, q, r in patterns])
    assert examples.labels.mean() == 3 / 8
    again = DistributiveLaw().examples("train", n=800, seed=1)
    np.testing.assert_array_equal(again.inputs, examples.inputs)


def test_baselines_by_enumeration():
    copy_base = copy_source = yes = 0
    for b, s in itertools.product(ALL, ALL):
        label = (s[0] and s[1]) or (b[0] and b[2])
        copy_base += label == (b[0] and (b[1] or b[2]))
        copy_source += label == (s[0] and (s[1] or s[2]))
        yes += label
    assert DistributiveLaw().pairs("test", variables=["left_and"], n=64).baselines() == {
        "copy_base": copy_base / 64,
        "copy_source": copy_source / 64,
        "majority": max(yes, 64 - yes) / 64,
    }


def test_mixed_sets_are_thirds_and_each_row_is_labelled_by_its_own_part():
    pairs = DistributiveLaw().mixed_pairs("train", variables=["left_and", "right_and"], n=3 * 512)
    parts, counts = np.unique(pairs.interchanged, axis=0, return_counts=True)
    assert parts.tolist() == [[False, True], [True, False], [True, True]] and counts.tolist() == [512] * 3
    base, left, right = map(equalities, (pairs.base, pairs.sources["left_and"], pairs.sources["right_and"]))
    for row, (use_left, use_right) in enumerate(pairs.interchanged):
        one = left[row] if use_left else base[row]
        two = right[row] if use_right else base[row]
        assert pairs.labels[row] == ((one[0] and one[1]) or (two[0] and two[2]))
    for i, name in enumerate(pairs.variables):
        untouched = ~pairs.interchanged[:, i]
        np.testing.assert_array_equal(pairs.sources[name][untouched], pairs.base[untouched])
        assert (pairs.sources[name][~untouched] != pairs.base[~untouched]).any(1).all()
    both = pairs[pairs.interchanged.all(axis=1)]
    joint = np.concatenate([equalities(both.base), *(equalities(both.sources[n]) for n in both.variables)], axis=1)
    assert len({tuple(row) for row in joint.tolist()}) == 512


def test_mixed_labels_derived_anew_agree_and_a_planted_one_does_not():
    task = DistributiveLaw("and_or")
    pairs = task.mixed_pairs("select", variables=["either", "first_equal"], n=300, seed=2)
    np.testing.assert_array_equal(task.relabel(pairs), pairs.labels)
    pairs.labels[7] = 1 - pairs.labels[7]
    assert np.flatnonzero(task.relabel(pairs) != pairs.labels).tolist() == [7]
    np.testing.assert_array_equal(task.relabel(pairs[:5]), pairs.labels[:5])


def test_mixed_labels_of_hierarchical_equality():
    pairs = HierarchicalEquality().mixed_pairs("test", variables=["left_equal", "right_equal"], n=192)
    base, left, right = map(equalities, (pairs.base, pairs.sources["left_equal"], pairs.sources["right_equal"]))
    use_left, use_right = pairs.interchanged.T
    expected = np.where(use_left, left[:, 0], base[:, 0]) == np.where(use_right, right[:, 1], base[:, 1])
    np.testing.assert_array_equal(pairs.labels, expected)
    assert pairs.baselines()["majority"] == 0.5
    np.testing.assert_array_equal(pairs.source_labels["left_equal"][~use_left], pairs.base_labels[~use_left])


def test_a_variable_that_is_not_interchanged_is_not_held_either():
    """w moves and left_equal is computed from it, though left_equal is one of the set's variables."""
    task = HierarchicalEquality()
    pairs = task.mixed_pairs("train", variables=["first_object", "left_equal"], n=192)
    only_first = pairs[pairs.interchanged[:, 0] & ~pairs.interchanged[:, 1]]
    # A fresh w equals no x: left is False wherever only w moves, whatever it was before.
    np.testing.assert_array_equal(only_first.labels, ~equalities(only_first.base)[:, 1])
    assert (only_first.labels != only_first.base_labels).any()


def test_one_variable_mixed_is_always_interchanged_and_three_come_in_sevenths():
    assert HierarchicalEquality().mixed_pairs("train", variables=["left_equal"], n=16).interchanged.all()
    three = DistributiveLaw().mixed_pairs("train", variables=["left_and", "right_and", "first_equal"], n=70)
    assert np.unique(three.interchanged, axis=0, return_counts=True)[1].tolist() == [10] * 7


def test_mixed_sets_are_reproducible():
    task = HierarchicalEquality()
    one = task.mixed_pairs("train", variables=["left_equal", "right_equal"], n=48, seed=3)
    two = task.mixed_pairs("train", variables=["left_equal", "right_equal"], n=48, seed=3)
    np.testing.assert_array_equal(one.base, two.base)
    np.testing.assert_array_equal(one.interchanged, two.interchanged)
    assert not np.array_equal(one.base, task.pairs("train", variables=["left_equal", "right_equal"], n=48, seed=3).base)


def test_refusals():
    with pytest.raises(UnknownName, match=r"model 'and_or_or'.*Did you mean"):
        DistributiveLaw("and_or_or")
    with pytest.raises(UnknownName, match=r"distributive_law variable 'either'.*Known: left_and"):
        DistributiveLaw().pairs("train", variables=["either"], n=4)
    with pytest.raises(TaskError, match="each may stand once, and one is needed"):
        DistributiveLaw().mixed_pairs("train", variables=[], n=4)
    with pytest.raises(TaskError, match="n=0"):
        DistributiveLaw().mixed_pairs("train", variables=["left_and"], n=0)
