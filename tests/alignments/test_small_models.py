from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from alignments.small_models import (  # noqa: E402
    FACTS,
    Training,
    small_transformer,
    task_accuracy,
    train_on_task,
    trained,
    word_tokenizer,
    words_of,
)
from intervene.errors import ShapeMismatch  # noqa: E402
from tasks import IOI, NotEnough, UnknownName, token_span  # noqa: E402
from tasks.price_tagging import PriceTagging  # noqa: E402

# One bracket and sixty amounts to train on: learned in a second, and held-out amounts are twenty.
TASK = PriceTagging(bracket=(3.45, 6.45))
TINY = Training(layers=1, width=16, heads=2, steps=150, batch_size=32, lr=0.01)


def counted(calls):
    return lambda done, total: calls.append((done, total))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache that holds TASK's model as TINY trains it."""
    root = tmp_path_factory.mktemp("cache")
    calls = []
    model, tokenizer, accuracy = trained(TASK, TINY, cache_dir=root, progress=counted(calls))
    assert calls[-1] == (150, 150)
    return root, model, tokenizer, accuracy


def folder_in(root):
    (folder,) = (root / "trained").iterdir()
    return folder


def test_a_word_is_a_token_with_or_without_the_blank_before_it():
    tokenizer = word_tokenizer(["1.25", "4.75", "=", "Yes", "No", "Yes"])
    assert len(tokenizer) == 7
    assert tokenizer("1.25 4.75 =")["input_ids"] == [2, 3, 4]
    assert tokenizer(" Yes")["input_ids"] == tokenizer("Yes")["input_ids"] == [5]
    assert tokenizer("9.99")["input_ids"] == [tokenizer.unk_token_id] == [1]
    batch = tokenizer(["1.25", "1.25 4.75"], padding=True)
    assert batch["input_ids"] == [[2, tokenizer.pad_token_id], [2, 3]]
    assert batch["attention_mask"] == [[1, 0], [1, 1]]


def test_its_offsets_find_the_tasks_positions():
    task = PriceTagging()
    example = task.render(task.setting(125, 475, 305))
    tokenizer = word_tokenizer(example.prompt.split())
    tokens = {name: token_span(tokenizer, example.prompt, span) for name, span in example.spans.items()}
    assert tokens == {"lower": (0,), "upper": (1,), "amount": (2,), "last": (3,)}


@pytest.mark.parametrize(
    ("words", "found"), [(["a b"], "'a b' is not one word"), ([""], "is not one word"), ([], "none")]
)
def test_words_that_are_none_are_refused(words, found):
    with pytest.raises(ShapeMismatch, match=found):
        word_tokenizer(words)


def test_the_words_of_a_task_are_those_of_its_prompts_and_answers():
    words = words_of(TASK)
    assert set(words) == {f"{cents / 100:.2f}" for cents in range(5, 1000, 10)} | {"=", "Yes", "No"}
    assert words == sorted(words)


@pytest.mark.slow
def test_a_task_that_does_not_list_its_prompts_is_sampled():
    assert {"Mary", "store,", "to"} <= set(words_of(IOI()))


def test_a_seed_fixes_the_weights_and_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    one, same, other = (small_transformer(11, layers=2, width=16, heads=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    differ = [(a != b).any() for a, b in zip(one.parameters(), same.parameters(), strict=True)]
    assert not any(differ)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one(torch.zeros(2, 4, dtype=torch.long)).logits.shape == (2, 4, 11)
    assert len(one.model.layers) == 2 and not one.training


@pytest.mark.parametrize("sizes", [{"width": 10, "heads": 4}, {"width": 12, "heads": 4}, {"layers": 0}])
def test_a_width_that_the_heads_do_not_share_is_refused(sizes):
    with pytest.raises(ShapeMismatch, match="Make width a multiple of twice the heads"):
        small_transformer(5, **sizes)


def test_training_learns_the_answer_token_and_no_other():
    tokenizer = word_tokenizer(words_of(TASK))
    model = small_transformer(len(tokenizer), layers=1, width=16, heads=2)
    untrained = task_accuracy(TASK, model, tokenizer, "train")
    calls = []
    loss = train_on_task(
        TASK, model, tokenizer, steps=150, batch_size=32, lr=0.01, weight_decay=0.0, progress=counted(calls)
    )
    assert untrained < 0.9 < 0.97 <= task_accuracy(TASK, model, tokenizer, "train")
    assert loss < 0.1
    assert calls == [(step + 1, 150) for step in range(150)]
    assert not model.training
    yes, upper = (tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "6.45"))
    with torch.no_grad():
        logits = model(tokenizer("3.45 6.45 5.05 =", return_tensors="pt")["input_ids"]).logits[0]
    assert logits[-1].argmax() == yes
    assert logits[0].argmax() != upper  # though "6.45" follows "3.45" in every prompt


def test_the_same_seed_trains_the_same_model():
    tokenizer = word_tokenizer(words_of(TASK))
    models = [small_transformer(len(tokenizer), layers=1, width=16, heads=2) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train_on_task(TASK, model, tokenizer, steps=3, batch_size=8, lr=0.01, seed=seed)
    one, same, other = (model.lm_head.weight for model in models)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_prompts_of_different_lengths_are_padded_on_the_left():
    """The answer must be learned and read after the last token of each prompt, not after a pad."""

    class Mixed(PriceTagging):
        def texts(self, split):
            for index, (prompt, answer) in enumerate(super().texts(split)):
                yield ("so then " * (index % 3) + prompt, answer)

    task = Mixed(bracket=(3.45, 6.45))
    tokenizer = word_tokenizer(words_of(task))
    model = small_transformer(len(tokenizer), layers=1, width=16, heads=2)
    train_on_task(task, model, tokenizer, steps=150, batch_size=32, lr=0.01)
    texts = list(task.texts("train"))
    with torch.no_grad():
        right = [
            model(tokenizer(prompt, return_tensors="pt")["input_ids"]).logits[0, -1].argmax().item()
            == tokenizer(answer)["input_ids"][0]
            for prompt, answer in texts
        ]
    assert sum(right) / len(right) >= 0.95
    assert task_accuracy(task, model, tokenizer, "train") == sum(right) / len(right)


def test_accuracy_is_that_of_the_select_split_counted_prompt_by_prompt(kept):
    _, model, tokenizer, accuracy = kept
    right = 0
    texts = list(TASK.texts("select"))
    for prompt, answer in texts:
        with torch.no_grad():
            logits = model(tokenizer(prompt, return_tensors="pt")["input_ids"]).logits
        right += logits[0, -1].argmax().item() == tokenizer(answer)["input_ids"][0]
    assert accuracy == right / len(texts)


def test_a_trained_model_is_kept(kept):
    root, model, tokenizer, accuracy = kept
    calls = []
    again, words, same = trained(TASK, TINY, cache_dir=root, progress=counted(calls))
    assert calls == []
    assert same == accuracy
    assert words.get_vocab() == tokenizer.get_vocab()
    assert words("3.45 6.45")["input_ids"] == tokenizer("3.45 6.45")["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    facts = json.loads((folder_in(root) / FACTS).read_text())
    assert facts["config"]["steps"] == 150 and facts["accuracy"] == accuracy


@pytest.mark.parametrize(
    ("task", "config"),
    [
        (PriceTagging(bracket=(3.45, 6.55)), TINY),
        (PriceTagging(bracket=(3.45, 6.45), words=("True", "False")), TINY),
        (TASK, Training(layers=1, width=16, heads=2, steps=2, batch_size=32, lr=0.01)),
        (TASK, Training(layers=1, width=16, heads=2, steps=150, batch_size=32, lr=0.01, seed=1)),
    ],
)
def test_another_task_or_training_is_another_model(kept, task, config):
    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):  # so it would train
        trained(task, config, cache_dir=kept[0], progress=stop)
    assert len(list((kept[0] / "trained").iterdir())) == 1  # and leaves nothing behind


@pytest.mark.parametrize("damage", ["cut", "no facts", "no weights", "facts cut"])
def test_a_damaged_folder_is_trained_anew(tmp_path, damage):
    short = Training(layers=1, width=8, heads=2, steps=2, batch_size=8)
    model, _, _ = trained(TASK, short, cache_dir=tmp_path)
    before = [parameter.clone() for parameter in model.parameters()]  # those of the model lie in the file itself
    folder = folder_in(tmp_path)
    weights, facts = folder / "model.safetensors", folder / FACTS
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "facts cut":
        facts.write_text(facts.read_text()[:-20])
    else:
        (facts if damage == "no facts" else weights).unlink()
    calls = []
    again, _, _ = trained(TASK, short, cache_dir=tmp_path, progress=counted(calls))
    assert calls == [(1, 2), (2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))
    assert folder_in(tmp_path) == folder
    trained(TASK, short, cache_dir=tmp_path, progress=counted(calls))
    assert len(calls) == 2


def test_tasks_that_cannot_be_learned_are_refused_before_training(tmp_path):
    with pytest.raises(UnknownName, match="'prize_tagging'"):
        trained("prize_tagging", TINY, cache_dir=tmp_path)
    with pytest.raises(NotEnough, match="begin with the same token"):
        trained(PriceTagging(bracket=(3.45, 6.45), words=("so Yes", "so No")), TINY, cache_dir=tmp_path)
    assert not (tmp_path / "trained").exists()


@pytest.mark.slow
def test_a_small_transformer_learns_price_tagging_for_brackets_it_never_saw(tmp_path):
    _, _, accuracy = trained(PriceTagging(), Training(steps=450), cache_dir=tmp_path)
    assert accuracy >= 0.97
