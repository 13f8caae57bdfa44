from __future__ import annotations

import pytest

from tasks import SPLITS, BadData, NotEnough, UserTask, check, leakage, task_from_file, task_named
from tasks.user import template, write_template
from tests.tasks.words import WordTokenizer

# Line numbers below count from the first line of this text.
HEAD = """import random
from tasks import CausalModel
causal_model = CausalModel(
    ("number", "next", "answer"),
    {"next": ("number",), "answer": ("next",)},
    {"next": lambda number: number + 1, "answer": lambda following: f" {following}"},
)
"""
ENTITIES = """entities = {
    "train": {"number": [1, 2, 3]},
    "select": {"number": [4, 5, 6]},
    "test": {"number": [7, 8, 9]},
}
"""
DRAW = """def draw(rng, split):
    return {"number": rng.choice(entities[split]["number"])}
"""
TEMPLATE = """template = "After {number} comes"
"""


def written(tmp_path, *parts):
    path = tmp_path / "counting.py"
    path.write_text("".join(parts), encoding="utf-8")
    return path


@pytest.fixture
def mine(tmp_path):
    return write_template(tmp_path / "my_task.py")


def test_the_template_runs_as_it_is(mine):
    task = task_from_file(mine)
    assert isinstance(task, UserTask) and task.name == "my_task"
    assert task.variables == ("place", "name")
    assert leakage(task) == {}
    for split in SPLITS:
        for variable in task.variables:
            report = check(task, task.pairs(split, variable=variable, n=60))
            assert report.kinds == {"kept": 30, "changed": 30}
            assert report.baselines["copy_base"] == 0.5
    kept = task.for_tokenizer(WordTokenizer())
    assert isinstance(kept, UserTask) and kept.entities("train") == task.entities("train")


@pytest.mark.parametrize(
    ("source", "variable", "label"),
    [
        (("box", "Sarah", "bag", "James", "box"), "place", " Mary"),
        (("box", "Sarah", "bag", "James", "bag"), "place", " John"),
        (("box", "Sarah", "bag", "James", "box"), "name", " Sarah"),
    ],
)
def test_the_templates_labels_by_hand(mine, source, variable, label):
    task = task_named(str(mine))
    base, other = (
        dict(zip(("thing1", "name1", "thing2", "name2", "asked"), values, strict=True))
        for values in (("hat", "Mary", "cup", "John", "cup"), source)
    )
    example = task.render(base)
    assert example.prompt == "The hat is for Mary and the cup is for John. The cup is for"
    assert example.answer == " John"
    assert example.prompt[slice(*example.spans["asked"])] == "cup" and example.spans["asked"][0] > 40
    assert example.prompt[slice(*example.spans["last"])] == "for"
    assert task.label(variable, base, other) == label


def test_a_template_is_written_once(mine):
    assert mine.read_text(encoding="utf-8") == template()
    with pytest.raises(BadData, match=r"my_task\.py: the file exists"):
        write_template(mine)
    write_template(mine, overwrite=True)


def test_the_same_arguments_give_the_same_pairs(mine):
    one = task_from_file(mine).pairs("test", variable="place", n=40, seed=1)
    assert one.items == task_from_file(mine).pairs("test", variable="place", n=40, seed=1).items
    assert list(one) != list(task_from_file(mine).pairs("test", variable="place", n=40, seed=2))


def test_a_small_file_of_each_needed_part(tmp_path):
    task = task_from_file(written(tmp_path, HEAD, ENTITIES, DRAW, TEMPLATE))
    assert (task.name, task.variables, task.kinds) == ("counting", ("next",), ("kept", "changed"))
    pair = task.pair("next", {"number": 1}, {"number": 7})
    assert (pair.base.prompt, pair.base.answer, pair.label) == ("After 1 comes", " 2", " 8")
    assert task.entities_in(pair.base) == {"number": {"1"}}


def test_render_draw_pair_positions_and_kinds_are_used(tmp_path):
    render = """def render(setting):
    prompt = f"After {setting['number']} comes"
    return prompt, f" {setting['number'] + 1}", {"number": (6, 7), "comes": (8, 13)}
def draw_pair(rng, split, variable):
    one, two = rng.sample(entities[split]["number"], 2)
    return {"number": one}, {"number": two}
positions = ("number",)
kinds = ("changed",)
name = "successor"
"""
    task = task_from_file(written(tmp_path, HEAD, ENTITIES, DRAW, render))
    pairs = task.pairs("train", variable="next", n=6)
    assert task.name == "successor" and len({(p.base.prompt, p.source.prompt) for p in pairs}) == 6
    assert all(pair.label != pair.base.answer for pair in pairs)
    assert dict(pairs[0].base.spans) == {"number": (6, 7)}


def test_a_file_may_define_the_task_itself(tmp_path):
    path = written(tmp_path, "from tasks import MultipleChoice\ntask = MultipleChoice(n_choices=3)\n")
    assert task_from_file(path) == task_from_file(path)
    assert task_from_file(path).n_choices == 3
    with pytest.raises(BadData, match=r"counting\.py, line 2: task: it is int\. Make it an instance of a subclass"):
        task_from_file(written(tmp_path, "import random\ntask = 3\n"))


def test_a_file_may_define_a_dataclass_with_annotations_as_texts(tmp_path):
    text = """from __future__ import annotations
from dataclasses import dataclass
from tasks import IOI
@dataclass(frozen=True)
class Mine(IOI):
    extra: int = 3
task = Mine()
"""
    assert task_from_file(written(tmp_path, text)).extra == 3


def test_for_tokenizer_drops_words_and_never_draws_them(mine):
    task = task_from_file(mine).for_tokenizer(WordTokenizer(split_up=("hat", "Mary")))
    assert "hat" not in task.entities("train")["thing"] and "Mary" not in task.entities("train")["name"]
    assert not any(" hat " in p.base.prompt + p.source.prompt for p in task.pairs("train", variable="place", n=100))
    with pytest.raises(NotEnough, match=r"my_task, select: no word of kind 'name' is one token"):
        task_from_file(mine).for_tokenizer(WordTokenizer(split_up=("Susan", "Robert", "Anna", "Paul")))


def test_for_tokenizer_refuses_answers_that_begin_alike(tmp_path):
    many = ENTITIES.replace("[1, 2, 3]", "[10, 11, 12]")
    tokenizer = WordTokenizer(split_up=("11", "12", "13"))
    with pytest.raises(BadData, match=r"counting\.py, line 8: entities: answers ' 1\d' and ' 1\d' begin with the same"):
        task_from_file(written(tmp_path, HEAD, many, DRAW, TEMPLATE)).for_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((ENTITIES, DRAW, TEMPLATE), r"counting\.py: it does not define causal_model\. Write causal_model = Causal"),
        ((HEAD, DRAW, TEMPLATE), r"counting\.py: it does not define entities\. Write entities = "),
        ((HEAD, ENTITIES, TEMPLATE), r"counting\.py: it does not define draw\. Write def draw\(rng, split\)"),
        ((HEAD, ENTITIES, DRAW), r"it does not define render\. Write def render\(setting\): \.\.\., or a template"),
        ((HEAD, "entities = []\n", DRAW, TEMPLATE), r"counting\.py, line 8: entities: it is list, not Mapping"),
        ((HEAD, ENTITIES.replace('"test"', '"tset"'), DRAW, TEMPLATE), r"line 8: entities: split 'test' is None"),
        ((HEAD, ENTITIES.replace("7", "4"), DRAW, TEMPLATE), r"line 8: entities: number '4' is in select and in test"),
        (
            (HEAD, ENTITIES, "def draw(rng):\n    return {}\n", TEMPLATE),
            r"line 13: draw: it takes \(rng\), and is called",
        ),
        ((HEAD, ENTITIES, "draw = 3\n", TEMPLATE), r"line 13: draw: it is int, not a function"),
        (
            (HEAD, ENTITIES, DRAW.replace('"number":', '"numbr":'), TEMPLATE),
            r"line 13: draw: it gives .* inputs: number",
        ),
        ((HEAD, ENTITIES, DRAW.replace("[split]", "[spilt]"), TEMPLATE), r"line 14: draw fails \(NameError"),
        (
            (HEAD, ENTITIES, DRAW, 'template = "After {nmber}"\n'),
            r"line 15: template: \{nmber\} is no input.*\{number\}",
        ),
        ((HEAD, ENTITIES, DRAW, TEMPLATE, 'variables = ("nxt",)\n'), r"line 16: variables 'nxt'.*Did you mean next"),
        (
            (HEAD, ENTITIES, DRAW, TEMPLATE, 'variables = "next"\n'),
            r"line 16: variables: it is 'next'\. Write variables",
        ),
        ((HEAD, ENTITIES, DRAW, TEMPLATE, 'kinds = ("same",)\n'), r"line 16: kinds 'same'.*Known: kept, changed"),
        (
            (HEAD, ENTITIES, DRAW, TEMPLATE, 'positions = ("end",)\n'),
            r"positions: 'end' is not marked; marked are number",
        ),
        ((HEAD, ENTITIES, DRAW, TEMPLATE, "name = 3\n"), r"line 16: name: it is int\. Make it a text"),
        ((HEAD.replace("+ 1", "+ '1'"), ENTITIES, DRAW, TEMPLATE), r"line 6: causal_model fails \(TypeError"),
        ((HEAD, "x = = 3\n"), r"counting\.py, line 8: it is no Python"),
        ((HEAD, "import nothing_of_that_name\n"), r"line 8: running it fails \(ModuleNotFoundError"),
        (
            (HEAD, ENTITIES, DRAW, "def render(setting):\n    return 'a', ' 99', {}\n"),
            r"line 15: render: it writes the answer ' 99', and the causal model gives",
        ),
        (
            (
                HEAD,
                ENTITIES,
                DRAW,
                "def render(setting):\n    return 'a', f\" {setting['number'] + 1}\", {'x': (0, 9)}\n",
            ),
            r"line 15: render: span 'x' is \(0, 9\) in a prompt of 1 characters",
        ),
        (
            (HEAD, ENTITIES, DRAW, "def render(setting):\n    return 'a'\n"),
            r"line 15: render: it returns 'a'\. Return \(",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named_with_its_line(tmp_path, parts, text):
    with pytest.raises(BadData, match=text):
        task_from_file(written(tmp_path, *parts))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadData, match=r"none\.py: there is no such file\. Write one, from tasks\.user\.template"):
        task_named(str(tmp_path / "none.py"))


def test_a_kind_of_pairs_that_is_never_drawn_is_refused(tmp_path):
    pair = "def draw_pair(rng, split, variable):\n    return {'number': 1}, {'number': 2}\n"
    task = task_from_file(written(tmp_path, HEAD, ENTITIES, DRAW, TEMPLATE, pair))
    with pytest.raises(
        NotEnough, match=r"none of 1000 draws gave a 'kept' pair for variable 'next'.*kinds = \('changed'"
    ):
        task.pairs("train", variable="next", n=1)
