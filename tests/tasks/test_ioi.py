from __future__ import annotations

import itertools

import pytest

from tasks import IOI, SPLITS, BadModel, NotEnough, UnknownName, check, distinguishes, leakage, token_span
from tasks.ioi import CAUSAL_MODEL, NAMES, OBJECTS, PLACES, TEMPLATES
from tests.tasks.words import WordTokenizer

TEMPLATE = "When {name1} and {name2} went to the {place}, {subject} gave a {object} to"


def setting(name1, name2, subject, template=TEMPLATE):
    return {
        "template": template,
        "name1": name1,
        "name2": name2,
        "subject": subject,
        "place": "store",
        "object": "drink",
    }


MARY_JOHN_JOHN = setting("Mary", "John", "John")  # ABB
MARY_JOHN_MARY = setting("Mary", "John", "Mary")  # BAB
ANNA_PAUL_PAUL = setting("Anna", "Paul", "Paul")
ANNA_PAUL_ANNA = setting("Anna", "Paul", "Anna")


def test_the_example_of_the_paper():
    example = IOI().render(MARY_JOHN_JOHN)
    assert example.prompt == "When Mary and John went to the store, John gave a drink to"
    assert example.answer == " Mary"
    assert {name: example.prompt[slice(*span)] for name, span in example.spans.items()} == {
        "name1": "Mary",
        "name2": "John",
        "place": "store",
        "subject2": "John",
        "after_subject2": "gave",
        "object": "drink",
        "last": "to",
    }
    assert example.spans["subject2"][0] > example.spans["place"][1]


@pytest.mark.parametrize(
    ("base", "source", "variable", "label"),
    [
        (MARY_JOHN_JOHN, ANNA_PAUL_PAUL, "position", " Mary"),
        (MARY_JOHN_JOHN, ANNA_PAUL_ANNA, "position", " John"),
        (MARY_JOHN_MARY, ANNA_PAUL_PAUL, "position", " Mary"),
        (MARY_JOHN_MARY, ANNA_PAUL_ANNA, "position", " John"),
        (MARY_JOHN_JOHN, ANNA_PAUL_PAUL, "token", " Anna"),
        (MARY_JOHN_JOHN, ANNA_PAUL_ANNA, "token", " Paul"),
        (MARY_JOHN_MARY, ANNA_PAUL_ANNA, "token", " Paul"),
    ],
)
def test_labels_by_hand(base, source, variable, label):
    assert IOI().label(variable, base, source) == label


def test_trivial_answers_by_hand():
    task = IOI()
    pair = task.pair("position", MARY_JOHN_JOHN, ANNA_PAUL_ANNA)
    assert task.trivial_answers(pair) == {"copy_base": " Mary", "copy_source": " Paul", "flip": " John"}
    assert task.kind(pair) == "different"
    assert task.kind(task.pair("position", MARY_JOHN_JOHN, ANNA_PAUL_PAUL)) == "same"


def test_every_pair_of_four_names_has_the_documented_baselines():
    """All 24 x 4 ways to give four names to a base and a source, counted one by one."""
    task = IOI()
    right = dict.fromkeys(("copy_base", "copy_source", "flip"), 0)
    total = 0
    for a, b, c, d in itertools.permutations(("Mary", "John", "Anna", "Paul")):
        for first, second in itertools.product((1, 2), repeat=2):
            base, source = setting(a, b, (a, b)[first - 1]), setting(c, d, (c, d)[second - 1])
            pair = task.pair("position", base, source)
            expected = (b, a)[second - 1]  # the base's name that the source's position leaves over
            assert pair.label == f" {expected}"
            answers = task.trivial_answers(pair)
            assert (answers["copy_base"] == pair.label) == (first == second)
            assert (answers["flip"] == pair.label) == (first != second)
            total += 1
            for name in right:
                right[name] += answers[name] == pair.label
            assert task.label("token", base, source) == pair.source.answer
    assert total == 96
    assert right == {"copy_base": 48, "copy_source": 0, "flip": 48}


@pytest.mark.parametrize("split", SPLITS)
def test_baselines_of_drawn_sets_are_exact(split):
    task = IOI()
    report = check(task, task.pairs(split, variable="position", n=200, seed=3))
    assert report.baselines["copy_base"] == report.baselines["flip"] == 0.5
    assert report.baselines["copy_source"] == 0.0
    assert report.baselines["majority"] < 0.1
    assert report.informative == 0.5
    assert report.kinds == {"same": 100, "different": 100}
    assert report.warnings == ()


def test_the_token_variable_is_flagged_as_solved_by_copying_the_source():
    task = IOI()
    report = check(task, task.pairs("train", variable="token", n=100))
    assert report.baselines["copy_source"] == 1.0
    assert report.informative == 0.0
    assert report.best_trivial == ("copy_source", 1.0)
    assert "copy_source is right on 100% of the pairs" in report.warnings[0]
    assert "beware: copy_source" in str(report)


def test_one_kind_alone_is_solved_by_a_constant_strategy():
    task = IOI()
    flipped = check(task, task.pairs("train", variable="position", n=50, kind="different"))
    assert flipped.baselines["flip"] == 1.0 and flipped.informative == 1.0
    same = check(task, task.pairs("train", variable="position", n=50, kind="same"))
    assert same.baselines["copy_base"] == 1.0 and same.informative == 0.0


def test_position_and_token_never_agree():
    task = IOI()
    pairs = task.pairs("test", variable="position", n=100)
    assert distinguishes(task, pairs, "position", "token") == 1.0
    assert distinguishes(task, pairs, "position", "position") == 0.0
    assert distinguishes(task, pairs, "token", "answer") == 0.0


def test_splits_share_no_name_place_object_or_template():
    task = IOI()
    assert leakage(task) == {}
    for kind, words in (("name", NAMES), ("place", PLACES), ("object", OBJECTS)):
        assert len(set(words)) == len(words)
        assert frozenset().union(*(task.entities(split)[kind] for split in SPLITS)) == set(words)
    for a, b in itertools.combinations(SPLITS, 2):
        verbs_a, verbs_b = ({verb(template) for template in TEMPLATES[split]} for split in (a, b))
        assert not verbs_a & verbs_b


def verb(template):
    return template.split("{subject} ")[1].split()[0]


def test_leakage_names_the_shared_words():
    words = {split: {"name": ("A", "B", "C", "D"), "place": (split,), "object": (split,)} for split in SPLITS}
    shared = leakage(IOI(words=words))
    assert shared["name: train, test"] == {"A", "B", "C", "D"}
    assert not any(kind.startswith(("place", "object", "template")) for kind in shared)


def test_all_templates_have_the_same_words_in_the_same_places():
    lengths = {len(template.replace(",", " ,").split()) for split in SPLITS for template in TEMPLATES[split]}
    assert lengths == {14}
    task = IOI()
    tokenizer = WordTokenizer()
    for split in SPLITS:
        for example in task.examples(split, n=40):
            tokens = {name: token_span(tokenizer, example.prompt, span) for name, span in example.spans.items()}
            assert tokens == {
                "name1": (1,),
                "name2": (3,),
                "place": (7,),
                "subject2": (9,),
                "after_subject2": (10,),
                "object": (12,),
                "last": (13,),
            }


def test_each_test_split_holds_more_than_a_thousand_pairs_and_all_are_distinct():
    pairs = IOI().pairs("test", variable="position", n=1200)
    assert len({(pair.base.prompt, pair.source.prompt) for pair in pairs}) == 1200


def test_base_and_source_have_no_name_in_common():
    task = IOI()
    for pair in task.pairs("select", variable="position", n=100):
        assert not task.entities_in(pair.base)["name"] & task.entities_in(pair.source)["name"]


def test_for_tokenizer_drops_words_that_are_several_tokens_and_moves_none():
    task = IOI()
    kept = task.for_tokenizer(WordTokenizer(split_up=("Mary", "store", "ring")))
    for split in SPLITS:
        for kind in ("name", "place", "object"):
            assert kept.entities(split)[kind] == task.entities(split)[kind] - {"Mary", "store", "ring"}


def test_for_tokenizer_refuses_when_too_few_names_are_left():
    task = IOI()
    with pytest.raises(NotEnough, match=r"ioi, test: 4 of kind 'name' are needed, and 0 are one token"):
        task.for_tokenizer(WordTokenizer(split_up=tuple(task.words["test"]["name"])))


def test_a_subject_that_is_neither_name_is_refused():
    with pytest.raises(BadModel, match="'Anna': it must repeat exactly one of 'Mary' and 'John'"):
        CAUSAL_MODEL.run(setting("Mary", "John", "Anna"))


def test_unknown_names_are_refused_with_the_nearest():
    task = IOI()
    with pytest.raises(UnknownName, match=r"ioi variable 'positon'.*Did you mean position"):
        task.pairs("train", variable="positon", n=2)
    with pytest.raises(UnknownName, match=r"ioi split 'tset'.*Did you mean test"):
        task.pairs("tset", variable="position", n=2)
    with pytest.raises(UnknownName, match=r"ioi kind 'other'.*Known: same, different"):
        task.pairs("train", variable="position", n=2, kind="other")


def test_asking_for_more_pairs_than_there_are_says_how_many_there_are():
    words = {split: {"name": ("A", "B", "C", "D"), "place": ("p",), "object": ("o",)} for split in SPLITS}
    tiny = IOI(words=words, templates={split: (TEMPLATE,) for split in SPLITS})
    # 24 orders of four names x 4 positions = 96 pairs, half of each kind.
    assert len(tiny.pairs("train", variable="position", n=96)) == 96
    with pytest.raises(NotEnough, match="97 distinct pairs were asked for, and after 96 only repeats came"):
        tiny.pairs("train", variable="position", n=97)
    # 4 x 3 orders of two names x 2 positions = 24 prompts.
    assert len(tiny.examples("train", n=24)) == 24
    with pytest.raises(NotEnough, match="25 distinct prompts were asked for, and after 24"):
        tiny.examples("train", n=25)


@pytest.mark.slow
def test_the_default_model_reads_every_prompt_as_14_tokens_and_names_the_right_person(smollm):
    torch = pytest.importorskip("torch")
    model, tokenizer = smollm
    task = IOI().for_tokenizer(tokenizer)
    examples = task.examples("select", n=128)
    ids = torch.tensor([tokenizer(example.prompt)["input_ids"] for example in examples])  # (128, 14)
    assert ids.shape[1] == 14
    with torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=1).logits[:, -1]  # (B, V)
    right = torch.tensor([tokenizer(example.answer)["input_ids"][0] for example in examples])
    wrong = torch.tensor([tokenizer(f" {example.setting['subject']}")["input_ids"][0] for example in examples])
    rows = torch.arange(len(examples))
    assert (logits.argmax(-1) == right).float().mean() >= 0.85
    assert (logits[rows, right] > logits[rows, wrong]).float().mean() >= 0.95
