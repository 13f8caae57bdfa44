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
