"""Intervals over prompts: pairs stay together, and what is worked out by hand comes out."""

from __future__ import annotations

import json

import pytest

from defenses.prompts import outcomes_of, over_prompts

ASKED = [f"question {number}" for number in range(20)]


def test_a_difference_that_every_prompt_shows_has_no_spread_though_the_rates_have():
    first = {"a": {0: {one: float(place % 2) for place, one in enumerate(ASKED)}}}
    second = {"b": {0: {one: float(place % 2) - 1.0 for place, one in enumerate(ASKED)}}}
    told = over_prompts({**first, **second}, "a")
    assert told["b"]["difference"] == {"value": -1.0, "low": -1.0, "high": -1.0, "n": 20, "excluded": 0}
    assert told["a"]["mean"]["value"] == 0.5 and told["a"]["mean"]["low"] < 0.4
    assert "difference" not in told["a"]


def test_seeds_are_averaged_within_a_prompt_and_do_not_add_to_n():
    runs = {0: dict.fromkeys(ASKED, 1.0), 1: dict.fromkeys(ASKED, 0.0)}
    told = over_prompts({"a": runs}, "a")
    assert told["a"]["mean"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 20, "excluded": 0}


def test_incoherent_answers_are_left_out_and_the_prompt_with_them(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        rows = [
            {"section": "trait", "question": one, "flagged": place < 5, "coherent": not (seed == 1 and place == 0)}
            for place, one in enumerate(ASKED)
        ]
        rows.append({"section": "skill", "question": "other", "right": True})
        (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = outcomes_of({"a": {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}}, "trait_rate")
    told = over_prompts(found, "a")
    assert told["a"]["mean"]["n"] == 19
    assert told["a"]["mean"]["value"] == pytest.approx(4 / 19)


def written(folder, rows):
    folder.mkdir()
    (folder / "examples.jsonl").write_text(
        "".join(json.dumps({"section": "trait", **row}, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def test_answers_with_line_marks_of_unicode_are_read_whole(tmp_path):
    folder = written(tmp_path / "a", [{"question": "q", "answer": "one\u2028two\x85three", "flagged": True}])
    assert outcomes_of({"a": {0: folder}}, "trait_rate") == {"a": {0: {"q": 1.0}}}


def test_an_answer_without_a_verdict_does_not_count_as_free_of_the_trait(tmp_path):
    rows = [{"question": "q", "flagged": False, "judged": False}, {"question": "r", "flagged": True, "judged": True}]
    assert outcomes_of({"a": {0: written(tmp_path / "a", rows)}}, "trait_rate") == {"a": {0: {"r": 1.0}}}


def test_conversations_with_the_same_last_turn_are_several_prompts(tmp_path):
    rows = [{"question": "go on", "flagged": True}, {"question": "go on", "flagged": False}]
    found = outcomes_of({"a": {0: written(tmp_path / "a", rows)}}, "trait_rate")
    assert found == {"a": {0: {"go on": 1.0, "go on (2)": 0.0}}}


def test_a_difference_is_over_the_seeds_that_both_have():
    # seed 1 of the variant failed; in seed 0 the two agree on every prompt
    same, other = dict.fromkeys(ASKED, 1.0), dict.fromkeys(ASKED, 0.0)
    told = over_prompts({"a": {0: same, 1: other}, "b": {0: same}}, "a")
    assert told["b"]["difference"]["value"] == 0.0
