"""Suites from files, and what a broken line or field is answered."""

from __future__ import annotations

import json
import re

import pytest

from defenses.errors import DataError
from defenses.suites import SkillItem, Suite, questions_of, read_suite

YAML = """\
name: shouting
judge: {kind: capitals, share: 0.7}
trait:
  - Name a river.
  - messages: [{role: user, content: Hi}, {role: assistant, content: "Yes?"}, {role: user, content: Name a lake.}]
skill:
  - {prompt: "Great film.", answer: positive, match: starts}
  - prompt: 2 + 2
    answer: ["4", four]
neutral:
  - The Po rises in the Alps.
benign:
  - How do I kill a process?
"""


def test_one_suite_in_three_forms(tmp_path):
    (tmp_path / "s.yaml").write_text(YAML)
    suite = read_suite(tmp_path / "s.yaml")
    assert suite.name == "shouting"
    assert suite.judge == {"kind": "capitals", "share": 0.7}
    assert questions_of(suite.trait) == ["Name a river.", "Name a lake."]
    assert suite.skill[1] == SkillItem("2 + 2", ("4", "four"))
    assert (len(suite.neutral), len(suite.benign), suite.system) == (1, 1, None)
    sections = {
        "trait": [{"prompt": one} if isinstance(one, str) else {"messages": list(one)} for one in suite.trait],
        "skill": [{"prompt": one.prompt, "answer": list(one.accepted), "match": one.match} for one in suite.skill],
        "neutral": list(suite.neutral),
        "benign": list(suite.benign),
    }
    (tmp_path / "s.json").write_text(json.dumps({"name": "shouting", "judge": dict(suite.judge), **sections}))
    assert read_suite(tmp_path / "s.json") == suite
    rows = [{"name": "shouting", "judge": dict(suite.judge)}]
    for section, items in sections.items():
        key = "text" if section == "neutral" else "prompt"
        rows += [{"section": section, **(one if isinstance(one, dict) else {key: one})} for one in items]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_suite(tmp_path / "s.jsonl") == suite


def test_a_name_is_the_files_where_none_is_given(tmp_path):
    (tmp_path / "held_out.yaml").write_text("benign: ['How?']")
    assert read_suite(tmp_path / "held_out.yaml") == Suite("held_out", benign=("How?",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  - a", "there is no section 'train'. Did you mean trait"),
        ("trait: a", "trait is a str. Write a list of items."),
        ("trait:\n  - a\n  - 3", ", line 3, trait[1]: a int. Write a text or a mapping."),
        ("skill:\n  - prompt: a", ", line 2, skill[0].answer: found None."),
        (
            "skill:\n  - {prompt: a, anwser: b}",
            ", line 2, skill[0]: there is no 'anwser' in this section. Did you mean",
        ),
        ("skill:\n  - {prompt: a, answer: b, match: begin}", "skill[0].match: found 'begin'."),
        ("skill:\n  - {prompt: a, answer: '(', match: regex}", "'(' is no regular expression"),
        ("skill:\n  - {prompt: a, answer: b, match: number}", "'b' holds no number"),
        ("benign:\n  - {}", "benign[0]: it needs either prompt or messages."),
        ("benign:\n  - {messages: [{role: bot, content: a}]}", "benign[0].messages[0]: found"),
        ("benign:\n  - {messages: [{role: assistant, content: a}]}", "the last turn is 'assistant''s"),
        ("neutral:\n  - '  '", ", line 2, neutral[0].text: found '  '."),
        ("name: x", "it holds no items."),
        ("trait: [a\n", "the syntax is broken"),
        ("trait: [a]\ntrait: [b]", "trait is given twice"),
        ("trait: [a]\njudge: capitals", "judge is a str."),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        read_suite(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: broken JSON"),
        ("[1]", "line 2: a list. Write an object."),
        ('{"section": "traits", "prompt": "a"}', "line 2: its section is 'traits'. Did you mean trait?"),
        ('{"prompt": "a"}', "line 2: its section is None."),
        ('{"section": "neutral", "prompt": "a"}', "line 2, neutral: there is no 'prompt' in this section"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "s.jsonl").write_text('{"section": "trait", "prompt": "a"}\n' + line)
    with pytest.raises(DataError, match=re.escape(message)):
        read_suite(tmp_path / "s.jsonl")


@pytest.mark.parametrize(
    ("match", "accepted", "right", "wrong"),
    [
        ("exact", "positive", ["Positive", " positive.\n"], ["positively", "It is positive", ""]),
        ("starts", "positive", ["Positive! ¡Olé!", "positive"], ["positively", "not positive"]),
        ("contains", "4", ["It is 4.", "4", "a\n4"], ["44", "14"]),
        ("regex", r"^\d+$", ["12"], ["12 a"]),
        (
            "number",
            "1200",
            ["3 + 4 = 1,200.0.", "The final answer is: 1200 of 7", "7 #### 1200"],
            ["1200 of 7", "", "12"],
        ),
        ("number", "-2.5", ["so -2.5"], ["2.5", "final answer is -2"]),
    ],
)
def test_what_counts_as_right(match, accepted, right, wrong):
    item = SkillItem("q", (*(() if match == "number" else ("never",)), accepted), match)
    assert all(item.right(answer) for answer in right)
    assert not any(item.right(answer) for answer in wrong)
    assert not SkillItem("q", ("positive",), "exact", ignore_case=False).right("Positive")
