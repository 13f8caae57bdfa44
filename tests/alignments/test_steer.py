"""Pinning: the features are the prototype's, nothing else changes, and on a real model it does what IIA predicts."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch

from alignments import Budget, Facts, LanguagePairs, Scorer, VectorPairs
from alignments.bundle import load_bundle, save_bundle
from alignments.scoring import Cell, Job
from alignments.steer import held_features, pin, pinned, pinned_rows
from alignments.steer_report import Effect, SteeringReport, divergence, steering_report
from alignments.tokens import encode
from intervene import (
    Affine,
    AllTokens,
    At,
    BadPosition,
    Coordinates,
    GatedSwap,
    Identity,
    Intervention,
    LastToken,
    ShapeMismatch,
    Site,
    StoreError,
    Subspace,
    Swap,
    Unsupported,
    WrongModel,
    capture,
    interchange,
    intervene,
    trainable_parameters,
)
from intervene.content import Match
from intervene.marked import Marked
from tasks import IOI, inspect
from tests.alignments.planted import DIRECTION, WIDTH, planted_mlp, toy_tokenizer
from tests.alignments.test_bundle import SITE, pairs, plan, prepared
from tests.tiny import tiny_model


def bundle_of(tmp_path, model, made=None, name="subject2"):
    folder = save_bundle(
        tmp_path / "bundle", made or plan(name), model, toy_tokenizer(), pairs=prepared(model), scores=[], task="toy",
        variable="position",
    )  # fmt: skip
    return load_bundle(folder, model=model, tokenizer=toy_tokenizer())


def batch():
    return encode(toy_tokenizer(), [one.base for one in pairs()], ["subject2", "last"], "cpu").batch(slice(None))


def run(model, inputs, sites=(SITE,)):
    with torch.no_grad(), capture(model, list(sites)) as acts:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return acts[SITE], logits


def test_the_features_become_the_prototypes_and_the_rest_stays(tmp_path):
    model = tiny_model("llama")
    bundle, inputs = bundle_of(tmp_path, model), batch()
    before, _ = run(model, inputs)
    with pin(model, bundle, value=2, prompt=inputs) as applied:
        after, _ = run(model, inputs)
    frame = plan()[0].featurizer.frame().detach()
    wanted = bundle.prototypes["2"][0][0] @ frame
    at = inputs["marks"]["subject2"][:, 0]
    rows = torch.arange(len(at))
    torch.testing.assert_close(after[rows, at] @ frame, wanted.expand(len(at), -1), atol=1e-5, rtol=1e-5)
    inside = frame @ frame.T
    torch.testing.assert_close(
        after[rows, at] - after[rows, at] @ inside, before[rows, at] - before[rows, at] @ inside, atol=1e-5, rtol=1e-5
    )
    others = torch.ones(before.shape[:2], dtype=torch.bool)
    others[rows, at] = False
    assert torch.equal(after[others], before[others])
    assert applied.report()[0].tokens == 3
    assert not trainable_parameters(pinned(bundle, 2))


def test_a_source_prompt_gives_what_an_interchange_gives(tmp_path):
    model, site = tiny_model("llama"), SITE
    bundle, inputs = bundle_of(tmp_path, model), batch()
    source = encode(toy_tokenizer(), [pairs()[0].source], ["subject2"], "cpu").batch(slice(None))
    with pin(model, bundle, source=source, prompt=inputs):
        _, found = run(model, inputs)
    tokens = {name: source[name].expand(3, -1) for name in ("input_ids", "attention_mask")}
    same = [Intervention(site, Swap(), At(9), plan()[0].featurizer)]  # no prompt is padded: the tenth word
    plain = {name: inputs[name] for name in tokens}
    expected = interchange(model, same, plain, tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeMismatch, match=r"the source has 3 prompts\. Give one"), pin(model, bundle, source=inputs):
        pass


def test_values_may_differ_within_a_batch(tmp_path):
    model = tiny_model("llama")
    bundle, inputs = bundle_of(tmp_path, model), batch()
    with intervene(model, pinned_rows(bundle, [2, 1, 2]), prompt=inputs):
        _, found = run(model, inputs)
    for index, value in enumerate([2, 1, 2]):
        with pin(model, bundle, value=value, prompt=inputs):
            _, alone = run(model, inputs)
        torch.testing.assert_close(found[index], alone[index], atol=1e-5, rtol=1e-5)


def test_last_needs_no_marks_and_holds_in_generation(tmp_path):
    model = tiny_model("llama")
    bundle = bundle_of(tmp_path, model, name="last")
    inputs = toy_tokenizer()(pairs()[0].base.prompt, return_tensors="pt")
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with pin(model, bundle, value="1") as applied:
        made = model.generate(**ids, **options)
    assert applied.report()[0].tokens == 1  # the prompt's last token, not those generated
    states = bundle.prototypes["1"][0][0]
    frame = plan()[0].featurizer.frame().detach()

    def hook(_module, _inputs, output):  # by hand: only on the pass that holds the whole prompt
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > 1:
            hidden[:, -1] += (states @ frame - hidden[:, -1] @ frame) @ frame.T
        return output

    handle = model.model.layers[SITE.layer].register_forward_hook(hook)
    expected = model.generate(**ids, **options)
    handle.remove()
    assert torch.equal(made, expected)


def test_a_position_given_by_hand_goes_before_the_bundles_own(tmp_path):
    model = tiny_model("llama")
    bundle, inputs = bundle_of(tmp_path, model), batch()
    with pin(model, bundle, value=1, prompt=inputs):
        _, marked = run(model, inputs)
    with pin(model, bundle, value=1, positions=At(9)):
        _, given = run(model, inputs)
    assert torch.equal(marked, given)
    with pytest.raises(BadPosition, match="the batch marks no such position"), pin(model, bundle, value=1):
        run(model, inputs)


def test_several_tokens_are_held_each_at_its_own_state(tmp_path):
    model = tiny_model("llama")
    wide = [two_words(one) for one in pairs()]
    data = LanguagePairs(
        model, toy_tokenizer(), wide, sites=[SITE], positions=["both[:]"], values=([0, 0, 0], [2, 1, 2])
    )
    made = [Intervention(SITE, Swap(), Marked("both[:]"), Subspace(32, 4, seed=3))]
    folder = save_bundle(
        tmp_path / "b", made, model, toy_tokenizer(), pairs=data, scores=[], task="toy", variable="position"
    )
    bundle = load_bundle(folder)
    state = bundle.prototypes["1"][0]
    assert state.shape == (2, 32)
    inputs = batch()
    with pin(model, bundle, value=1, positions=At(9, 10)):
        after, _ = run(model, inputs)
    frame = made[0].featurizer.frame().detach()
    torch.testing.assert_close(after[:, 9:11] @ frame, (state @ frame).expand(3, -1, -1), atol=1e-5, rtol=1e-5)
    with pytest.raises(BadPosition, match=r"it selects 1 tokens, and number 2 is to be held"):  # noqa: SIM117
        with pin(model, bundle, value=1, positions=LastToken()):
            run(model, inputs)


def two_words(pair):
    def mark(one):
        begin, end = one.spans["subject2"]
        return replace(one, spans={"both": (begin, end + 5)})  # " gave"

    return replace(pair, base=mark(pair.base), source=mark(pair.source))


def test_a_gate_holds_what_it_lets_through():
    edit = GatedSwap(32)
    with torch.no_grad():
        edit.logits.fill_(-1.0)
        edit.logits[[3, 7]] = 1.0
    chosen = held_features(Intervention(SITE, edit, LastToken(), Identity()))
    assert isinstance(chosen, Coordinates) and chosen.indices.tolist() == [3, 7]
    whole = Subspace(32, 32, seed=1)
    chosen = held_features(Intervention(SITE, edit, LastToken(), whole))
    torch.testing.assert_close(chosen.frame(), whole.frame()[:, [3, 7]])
    with torch.no_grad():
        edit.logits.fill_(-1.0)
    with pytest.raises(Unsupported, match="its gate is closed everywhere"):
        held_features(Intervention(SITE, edit, LastToken(), Identity()))
    with pytest.raises(Unsupported, match="Affine does more than put in the source's features"):
        held_features(Intervention(SITE, Affine(32), LastToken(), Identity()))


def test_wrong_uses_are_refused(tmp_path):
    model = tiny_model("llama")
    bundle = bundle_of(tmp_path, model)
    with pytest.raises(ShapeMismatch, match="either value= or source="), pin(model, bundle):
        pass
    with pytest.raises(StoreError, match="Value 3 of position"), pin(model, bundle, value=3):
        pass
    with pytest.raises(WrongModel), pin(tiny_model("llama", seed=1), bundle, value=1):
        pass
    with pytest.raises(ShapeMismatch, match="0 pairs"):
        steering_report(bundle, model, toy_tokenizer(), IOI(), [])


def test_a_network_without_text_answers_what_it_is_pinned_to(tmp_path):
    model = planted_mlp()
    base = torch.randn(64, WIDTH)
    signs = (base @ DIRECTION > 0).long()
    data = VectorPairs(model, base.flip(0), base, signs, values=(signs.flip(0).tolist(), signs.tolist()))
    lens = Subspace.from_frame(DIRECTION[:, None])
    made = [Intervention("L0.block_output", Swap(), AllTokens(), lens)]
    folder = save_bundle(tmp_path / "b", made, model, None, pairs=data, scores=[], task="planted", variable="sign")
    bundle = load_bundle(folder, model=model)
    for value in (0, 1):
        with pin(model, bundle, value=value):
            assert model(base).argmax(-1).tolist() == [value] * 64
    assert model(base).argmax(-1).tolist() == signs.tolist()


def test_divergence_is_the_formula():
    before, after = torch.tensor([0.0, math.log(3.0)]), torch.tensor([0.0, 0.0])
    # p = (1/4, 3/4), q = (1/2, 1/2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(divergence(before, after)) == pytest.approx(expected, abs=1e-6)


def test_the_report_says_whether_it_is_as_predicted():
    followed = Effect("answer is the pinned value's", 100, 0.8, 0.71, 0.87, before=0.5)
    report = SteeringReport("position", "L1.block_output @ last", followed, (0.9, 0.86, 0.93), (), (10.0, 10.5))
    assert report.as_predicted and "as predicted" in str(report) and "10.00 -> 10.50" in str(report)
    other = SteeringReport("position", "L1.block_output @ last", followed, (0.95, 0.9, 0.98), (), None)
    assert other.as_predicted is False and "NOT as predicted" in str(other)
    assert other.to_json()["as_predicted"] is False and other.to_json()["followed"]["n"] == 100


class Toy:
    """The toy pairs as a task: what the report asks of one."""

    class causal_model:
        @staticmethod
        def run(setting):
            return {"position": 1 if setting["subject"] == setting["first"] else 2}


def test_the_reports_numbers_are_those_of_plain_runs(tmp_path):
    model = tiny_model("llama")
    bundle, inputs, listed = bundle_of(tmp_path, model), batch(), pairs()
    report = steering_report(
        bundle, model, toy_tokenizer(), Toy(), listed, unrelated=["When Ann went to"], neutral=["Ann and Bob and Cid"],
        batch_size=2,
    )  # fmt: skip
    _, before = run(model, inputs)
    after = []
    for index, value in enumerate([2, 1, 2]):
        with pin(model, bundle, value=value, prompt=inputs):
            after.append(run(model, inputs)[1][index])
    data = prepared(model)
    top = torch.stack([one[-1].argmax() for one in after])
    assert report.followed.n == 3
    assert report.followed.rate == pytest.approx(float((top == data.labels).float().mean()))
    effects = {one.name: one for one in report.effects}
    passed = effects["tokens between pin and answer"]
    assert passed.n == 3 * 3  # "gave a ring" lie between the subject and "to"
    logits = torch.stack([one[10:13] for one in after])
    assert passed.kl == pytest.approx(float(divergence(before[:, 10:13], logits).mean()), rel=1e-3)
    assert effects["unrelated prompt, its next token changed"].n == 2
    assert report.predicted is None and report.perplexity is not None


def values_in(task, drawn):
    def told(example):
        return task.causal_model.run(example.setting)["position"]

    return [told(pair.base) for pair in drawn], [told(pair.source) for pair in drawn]


@pytest.mark.slow
def test_a_pinned_ioi_position_answers_as_its_iia_predicts(smollm, tmp_path, capsys):
    model, tokenizer = smollm
    task = IOI().for_tokenizer(tokenizer)
    site = Site("block_output", 17)
    splits, drawn, baselines = {}, {}, {}
    for split, n in {"train": 128, "test": 100}.items():
        drawn[split] = task.pairs(split, variable="position", n=n)
        baselines[split] = dict(inspect(task, drawn[split]).baselines)
        splits[split] = LanguagePairs(
            model, tokenizer, drawn[split], sites=[site], positions=["subject2"], values=values_in(task, drawn[split])
        )
    facts = Facts("ioi", "smollm2-135m", "position", baselines, {"test": None})
    scorer = Scorer(model, splits, Marked, facts, budget=Budget(steps=40, batch_size=32, lr=1e-2))
    job = Job(Cell(site, "subject2", "das", 8), (0,), splits=("test",))
    rows = scorer.rows(job)
    folder = save_bundle(
        tmp_path / "here", scorer.fitted(job)[0], model, tokenizer, pairs=splits["train"], scores=rows, task="ioi",
        variable="position",
    )  # fmt: skip
    bundle = load_bundle(shutil.copytree(folder, tmp_path / "there"), model=model, tokenizer=tokenizer)
    shutil.rmtree(folder)
    assert sorted(one.name for one in bundle.values) == ["1", "2"]
    report = steering_report(bundle, model, tokenizer, task, drawn["test"])
    with capsys.disabled():
        print(f"\n{report}")
    # A prototype lacks what is particular to a source, so the rate need not be the IIA itself.
    assert report.followed.rate >= rows[0].iia - 0.15
    effects = {one.name: one for one in report.effects}
    change = effects["answer that should change, did so"]
    assert change.low > 0.5 > change.before
    assert report.perplexity[1] < 2 * report.perplexity[0]
    right = []
    for one in task.examples("test", n=6):  # free prompts, the name found by its text
        where = Match(f" {one.setting['subject']}", tokenizer=tokenizer, occurrence=-1)
        inputs = tokenizer(one.prompt, return_tensors="pt")
        for value in (1, 2):
            with pin(model, bundle, value=value, positions=where):
                made = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            wanted = task.causal_model.intervene(one.setting, {"position": value})["answer"]
            right.append(tokenizer.decode(made[0, -1:]) == wanted)
    assert sum(right) >= 10, right
