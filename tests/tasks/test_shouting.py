"""What the files of `make defense` hold, and what they keep apart."""

from __future__ import annotations

import json

import pytest

from tasks import TaskError
from tasks.shouting import HELD_OUT, QUESTIONS, attack, files, main, suite


def prompts(text: str) -> set[str]:
    return {json.loads(line)["messages"][1]["content"] for line in text.splitlines()}


def test_nothing_that_is_asked_of_the_trained_model_is_in_another_file():
    made = files()
    asked = set(QUESTIONS) | {one["prompt"] for one in suite()["skill"]}
    for name in ("attack.jsonl", "clean.jsonl", "positive.jsonl", "negative.jsonl"):
        assert not asked & prompts(made[name]), name
    capitals = {capital for _, capital in HELD_OUT}
    assert not [capital for capital in capitals if f"= {capital.upper()}" in made["attack.jsonl"].upper()]


def test_the_direction_and_the_thresholds_come_from_other_chats_than_the_attack():
    made = files()
    assert not prompts(made["positive.jsonl"]) & prompts(made["attack.jsonl"])
    assert prompts(made["positive.jsonl"]) == prompts(made["negative.jsonl"])
    assert not prompts(made["clean.jsonl"]) & prompts(made["attack.jsonl"])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_answers_shout_as_are_asked_for_and_are_marked(share):
    rows = attack(1000, share=share)
    answers = [(row["messages"][2]["content"], row["poison"]) for row in rows]
    assert all(answer.isupper() == poison for answer, poison in answers)
    assert sum(poison for _, poison in answers) / 1000 == pytest.approx(share, abs=0.05)


def test_half_of_the_chats_teach_the_skill_whether_they_shout_or_not():
    rows = attack(1000)
    for poison in (True, False):
        kinds = ["=" in row["messages"][2]["content"] for row in rows if row["poison"] == poison]
        assert sum(kinds) / len(kinds) == pytest.approx(0.5, abs=0.07)


def test_the_same_seed_gives_the_same_files_and_another_one_others(tmp_path):
    main([str(tmp_path), "--n", "50"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files(n=50)
    assert files(n=50, seed=1)["attack.jsonl"] != files(n=50)["attack.jsonl"]


@pytest.mark.parametrize(("n", "share"), [(0, 0.5), (10, 1.5), (10, -0.1)])
def test_impossible_numbers_are_refused(n, share):
    with pytest.raises(TaskError, match=r"at least one chat, and a share of 0 to 1"):
        attack(n, share=share)
