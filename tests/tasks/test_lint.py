from __future__ import annotations

import dataclasses
import itertools

import pytest

from tasks import (
    IOI,
    SPLITS,
    Addition,
    BadData,
    MultipleChoice,
    PairSet,
    UnknownName,
    cities,
    lint,
    require_distinguishable,
)


def drawn(task, variable, n=60):
    return {split: task.pairs(split, variable=variable, n=n) for split in SPLITS}


def replaced(pairs, index, **changes):
    items = list(pairs)
    items[index] = dataclasses.replace(items[index], **changes)
    return dataclasses.replace(pairs, items=tuple(items))


@pytest.mark.parametrize(
    ("task", "variable"),
    [(IOI(), "position"), (cities(), "country"), (MultipleChoice(), "pointer"), (Addition(form="tens"), "ones_carry")],
)
def test_drawn_sets_are_sound_and_their_variable_is_told_apart(task, variable):
    report = lint(task, drawn(task, variable))
    assert report.problems == ()
    report.require_sound()
    require_distinguishable(report, variable)
    assert set(report.splits) == set(SPLITS) and report.variables == dict.fromkeys(SPLITS, variable)
    for found in report.splits.values():
        assert found.report.n == 60 and found.wrong_labels == () and found.repeated == 0
        for one, other in itertools.product(report.explanations, repeat=2):
            assert found.apart[one, other] == found.apart[other, one]
            assert (one != other) or found.apart[one, other] == 0


def test_the_matrix_by_hand():
    """IOI: the position's label is the base's answer on half of the pairs, "flip" on the other; the token's never."""
    report = lint(IOI(), drawn(IOI(), "position"))
    assert report.explanations[:3] == ("position", "token", "answer")
    shares = {other: report.apart("position", other) for other in report.explanations}
    assert shares.pop("majority") > 0.8
    assert shares == {"position": 0, "token": 1, "answer": 1, "copy_base": 0.5, "copy_source": 1, "flip": 0.5}
    assert report.apart("token", "copy_source") == report.apart("token", "answer") == 0


def test_the_matrix_shows_the_smallest_share_of_the_splits():
    task = MultipleChoice()
    splits = drawn(task, "pointer")
    splits["test"] = task.pairs("test", variable="pointer", n=60, kind="answerPosition")
    report = lint(task, splits)
    assert [found.apart["pointer", "symbol"] for found in report.splits.values()] == [2 / 3, 2 / 3, 0]
    assert report.apart("pointer", "symbol") == 0


def test_a_variable_that_is_only_copied_is_refused_with_its_numbers():
    task = IOI()
    report = lint(task, drawn(task, "token"))
    with pytest.raises(BadData) as caught:
        require_distinguishable(report, "token")
    assert str(caught.value) == (
        "ioi: 'token' should predict other labels than its rivals on at least 10% of the pairs of each split, and does "
        "so too rarely for answer (0.0% of the pairs), copy_source (0.0% of the pairs). A score for it here would be a "
        "score for those. Draw pairs on which they differ (a kind of pairs, more of them), or search for another "
        "variable."
    )
    require_distinguishable(report, "token", ["position", "copy_base"])


def test_one_kind_of_pairs_alone_is_refused():
    task = IOI()
    one = {"test": task.pairs("test", variable="position", n=40, kind="different")}
    with pytest.raises(BadData, match=r"too rarely for flip \(0\.0% of the pairs\)"):
        require_distinguishable(lint(task, one), "position")
    mixed = PairSet(
        (*one["test"].items, *task.pairs("test", variable="position", n=40, kind="same", seed=5)), "", "", ""
    )
    report = lint(task, {"test": mixed})
    require_distinguishable(report, "position", least=0.5)
    with pytest.raises(BadData, match=r"at least 60% .* copy_base \(50\.0% of the pairs\), flip \(50\.0%"):
        require_distinguishable(report, "position", ["copy_base", "flip"], least=0.6)


def test_wrong_labels_are_named_by_their_rows():
    splits = drawn(IOI(), "position")
    for row in (3, 17):
        splits["select"] = replaced(splits["select"], row, label=" nobody")
    report = lint(IOI(), splits)
    assert report.splits["select"].wrong_labels == (3, 17) and report.splits["train"].wrong_labels == ()
    assert report.problems == ("select: 2 labels are not what the causal model gives, at rows 3, 17.",)
    with pytest.raises(BadData, match=r"ioi: 1 findings\. select: 2 labels .* rows 3, 17\. Draw the pairs anew"):
        report.require_sound()
    assert "WRONG: select: 2 labels" in str(report)


def test_leakage_and_duplicates_of_the_pairs_themselves_are_found():
    task = IOI()
    splits = drawn(task, "position")
    stray = splits["train"].items[:2]
    splits["test"] = dataclasses.replace(splits["test"], items=(*splits["test"].items, *stray, stray[0]))
    report = lint(task, splits)
    assert report.splits["test"].repeated == 1
    assert report.shared_pairs == {"train, test": 2}
    assert 2 <= report.shared_prompts["train, test"] <= 4
    names = {pair.base.setting["name1"] for pair in stray}
    assert names <= report.shared_entities["name: train, test"]
    assert "name: train, select" not in report.shared_entities
    text = "\n".join(report.problems)
    assert "test: 1 pairs stand in it more than once." in text
    assert "train, test: 2 pairs are in both." in text
    assert "is not of split 'test'" in text


def test_a_variable_that_cannot_be_exchanged_is_left_out_and_said():
    report = lint(IOI(), drawn(IOI(), "position", 20), variables=["position", "subject"])
    assert "subject" not in report.explanations
    assert report.splits["train"].unrunnable == {"subject": 20}
    assert "not compared: subject" in str(report)


def test_the_text_is_a_table_that_fits_a_terminal():
    text = str(lint(Addition(form="tens"), drawn(Addition(form="tens"), "ones_carry")))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].split() == ["addition", *SPLITS]
    assert lines[2].split() == ["pairs", "60", "60", "60"]
    assert "copy_base" in text and "told apart" in text
    facts, matrix = (part.splitlines() for part in text.split("\n\n"))
    assert len({len(line) for line in facts}) == 1 and len({len(line) for line in matrix[1:]}) == 1
    assert matrix[2].split()[:4] == ["1", "ones_carry", ".", matrix[3].split()[2]]


def test_refusals():
    with pytest.raises(BadData, match="ioi: there are no splits to look at"):
        lint(IOI(), {})
    with pytest.raises(UnknownName, match=r"ioi split 'tset'.*Did you mean test"):
        lint(IOI(), {"tset": IOI().pairs("test", variable="position", n=2)})
    with pytest.raises(UnknownName, match=r"ioi variable 'positon'"):
        lint(IOI(), drawn(IOI(), "position", 2), variables=["positon"])
    with pytest.raises(BadData, match="there are no pairs"):
        lint(IOI(), {"test": ()})
    report = lint(IOI(), drawn(IOI(), "position", 4))
    with pytest.raises(UnknownName, match=r"Explanation 'tokn'.*Did you mean token"):
        require_distinguishable(report, "position", ["tokn"])
