"""Bundles: prototypes by hand, everything back bit for bit, and refusals that say what was found."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from alignments import LanguagePairs, Row
from alignments.bundle import MANIFEST, PROTOTYPES, load_bundle, prototypes, save_bundle
from alignments.made_for import tokenizer_hash
from intervene import Intervention, ShapeMismatch, Site, StoreError, Subspace, Swap, WrongModel, fingerprint
from intervene.featurizers import Block
from intervene.marked import Marked
from tasks import Example, Pair
from tests.alignments.planted import toy_tokenizer
from tests.tiny import tiny_model

SITE = Site("block_output", 1)
NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay")


def example(first, second, subject):
    prompt = f"When {first} and {second} went to the park , {subject} gave a ring to"
    begin = prompt.rindex(subject)
    answer = second if subject == first else first
    setting = {"first": first, "second": second, "subject": subject}
    return Example(
        prompt, f" {answer}", setting, {"subject2": (begin, begin + 3), "last": (len(prompt) - 2, len(prompt))}
    )


def position(one):
    return 1 if one.setting["subject"] == one.setting["first"] else 2


def pairs():
    bases = [example("Ann", "Bob", "Ann"), example("Cid", "Dan", "Dan"), example("Eve", "Fay", "Eve")]
    sources = [example("Gus", "Hal", "Hal"), example("Gus", "Hal", "Gus"), example("Fay", "Gus", "Gus")]
    made = []
    for base, source in zip(bases, sources, strict=True):
        held = base.setting["first" if position(source) == 2 else "second"]
        made.append(Pair(base, source, "position", f" {held}"))
    return made


def prepared(model, tokenizer=None):
    listed = pairs()
    values = [position(one.base) for one in listed], [position(one.source) for one in listed]
    return LanguagePairs(
        model, tokenizer or toy_tokenizer(), listed, sites=[SITE], positions=["subject2", "last"], values=values
    )


def plan(where="subject2"):
    return [Intervention(SITE, Swap(), Marked(where), Subspace(32, 4, seed=3))]


def row(seed=0, split="test", site=SITE, variable="position", iia=0.75, low=0.6, high=0.9):
    return Row(
        task="toy", model="tiny", variable=variable, site=str(site), layer=site.layer, component=site.component,
        positions="subject2", position_label="subject2", method="das", rank=4, seed=seed, split=split, n=40, iia=iia,
        low=low, high=high, copy_base=0.5, copy_source=0.0, majority=0.2, task_accuracy=1.0, seconds=1.0,
        kinds={"same": 0.9}, facts={"width": 32.0},
    )  # fmt: skip


def saved(folder, model, **more):
    return save_bundle(
        folder, plan(), model, toy_tokenizer(), pairs=prepared(model), scores=[row(0), row(1, iia=0.65)], task="toy",
        variable="position", licence="CC-BY-4.0", **more,
    )  # fmt: skip


def test_prototypes_are_the_means_of_the_sources_that_have_the_value():
    model = tiny_model("llama")
    data = prepared(model)
    values, held = prototypes(plan(), data)
    assert [(one.name, one.value, one.count) for one in values] == [("2", 2, 2), ("1", 1, 1)]
    acts = []
    for pair in pairs():  # each source alone, the subject's second mention counted by hand: the tenth word
        ids = toy_tokenizer()(pair.source.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            acts.append(model(ids, output_hidden_states=True).hidden_states[SITE.layer + 1][0, 9])
    torch.testing.assert_close(held["2"][0][0], (acts[0] + acts[2]) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held["1"][0][0], acts[1], atol=1e-5, rtol=1e-5)


def test_a_bundle_comes_back_from_another_place_bit_for_bit(tmp_path):
    model = tiny_model("llama")
    folder = shutil.copytree(saved(tmp_path / "a", model, extra={"seen": [1, 2]}), tmp_path / "far" / "b")
    bundle = load_bundle(folder, model=model, tokenizer=toy_tokenizer())
    assert torch.equal(bundle.plan[0].featurizer.weight, plan()[0].featurizer.weight)
    _, held = prototypes(plan(), prepared(model))
    assert all(torch.equal(bundle.prototypes[name][0], held[name][0]) for name in ("1", "2"))
    told = bundle.manifest
    assert told["model"]["fingerprint"] == fingerprint(model)
    assert (told["task"], told["variable"], told["licence"]) == ("toy", "position", "CC-BY-4.0")
    assert told["extra"] == {"seen": [1, 2]} and told["method"] == "DAS rank 4"
    place = {"site": str(SITE), "positions": "subject2", "marked": True, "rank": 4, "width": 32, "edit": "Swap"}
    assert told["places"] == [place]
    (score,) = bundle.test_scores()
    assert score["iia"] == pytest.approx(0.7) and score["seeds"] == [0, 1] and score["n"] == 40
    assert score["baselines"]["copy-base"] == 0.5 and score["kinds"] == {"same": 0.9}
    assert sorted(one.name for one in (tmp_path / "a").parent.iterdir()) == ["a", "far"]  # no draft is left


def test_several_interventions_and_blocks_of_one_frame_are_kept(tmp_path):
    model, whole = tiny_model("llama"), Subspace(32, 4)
    two = [Intervention(SITE, Swap(), Marked("subject2"), Block(whole, 0, 2)), *plan("last")]
    save_bundle(
        tmp_path / "a", two, model, toy_tokenizer(), pairs=prepared(model), scores=[], task="toy", variable="position"
    )
    bundle = load_bundle(tmp_path / "a")
    assert [len(parts) for parts in bundle.prototypes.values()] == [2, 2]
    assert bundle.manifest["places"][0]["rank"] == 2


def test_another_model_is_refused_unless_there_is_a_reason(tmp_path):
    folder = saved(tmp_path / "a", tiny_model("llama"))
    other = tiny_model("llama", seed=1)
    with pytest.raises(WrongModel, match=r"made for model .*, this one is .* force='<reason>'"):
        load_bundle(folder, model=other)
    bundle = load_bundle(folder, model=other, force="a fine-tuned copy")
    assert bundle.force == "a fine-tuned copy" and bundle.plan[0].elsewhere == "a fine-tuned copy"


def test_another_tokenizer_is_refused_by_what_differs(tmp_path):
    model = tiny_model("llama")
    folder = saved(tmp_path / "a", model)
    other = toy_tokenizer()
    other.add_tokens(["Zoe"])
    with pytest.raises(WrongModel, match=r"this one, .*, differs in vocabulary\."):
        load_bundle(folder, model=model, tokenizer=other)
    padded = toy_tokenizer()
    padded.pad_token = "<eos>"
    assert tokenizer_hash(padded) == tokenizer_hash(toy_tokenizer())  # padding changes no prompt


def test_a_bundle_never_replaces_anything_else(tmp_path):
    model = tiny_model("llama")
    folder = saved(tmp_path / "a", model)
    with pytest.raises(StoreError, match="there is one already"):
        saved(folder, model)
    saved(folder, model, overwrite=True, extra="new")
    assert load_bundle(folder).manifest["extra"] == "new"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(StoreError, match="no bundle is there already"):
        saved(tmp_path / "notes", model, overwrite=True)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_what_cannot_be_stored_leaves_nothing_behind(tmp_path):
    with pytest.raises(StoreError, match="plain"):
        saved(tmp_path / "a", tiny_model("llama"), extra=torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / PROTOTYPES).unlink(), r"prototypes\.safetensors missing"),
        (lambda folder: (folder / PROTOTYPES).write_bytes(b"x"), "changed since it was saved"),
        (lambda folder: edit(folder, schema=99), r"schema 99, this version reads up to 1: upgrade"),
        (lambda folder: edit(folder, run="os.system"), "too many of run"),
        (lambda folder: edit(folder, values=[]), "does not hold what manifest.json lists"),
        (lambda folder: edit(folder, values=[{"name": 3}]), "values are damaged"),
        (lambda folder: edit(folder, model={"name": "x"}), "model in manifest.json is damaged"),
        (lambda folder: edit(folder, files=[], scores=3), "files, scores in manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cut off or damaged"),
    ],
)
def test_a_damaged_bundle_says_so(tmp_path, damage, message):
    folder = saved(tmp_path / "a", tiny_model("llama"))
    damage(folder)
    with pytest.raises(StoreError, match=message):
        load_bundle(folder)


def edit(folder, **changes):
    told = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**told, **changes}))


def test_scores_of_another_cell_are_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(StoreError, match=r"a score is of position at L0\.block_output"):
        save_bundle(
            tmp_path / "a", plan(), model, None, pairs=prepared(model), scores=[row(site=Site("block_output", 0))],
            task="toy", variable="position",
        )  # fmt: skip


def test_pairs_without_values_are_refused():
    data = prepared(tiny_model("llama"))
    data.values = ((), ())
    with pytest.raises(ShapeMismatch, match="3 pairs name 0 values"):
        prototypes(plan(), data)


def test_a_missing_folder_and_an_unreachable_hub_are_told_apart(tmp_path):
    with pytest.raises(StoreError, match=r"there is no such folder\. Give the one that save_bundle returned"):
        load_bundle(tmp_path / "none")
    with pytest.raises(StoreError, match=r"Bundle someone/alignment: no such folder here, and the Hub did not give it"):
        load_bundle("someone/alignment")  # the tests run offline


def test_an_unknown_value_names_those_there_are(tmp_path):
    bundle = load_bundle(saved(tmp_path / "a", tiny_model("llama")))
    assert bundle.named(2) is bundle.named("2")
    with pytest.raises(StoreError, match=r"Value 7 of position: this bundle has no prototype of it\. Known: 1, 2"):
        bundle.named(7)
