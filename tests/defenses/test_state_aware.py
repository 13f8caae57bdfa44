"""Projections of the base model's own answers, and training that compares with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from defenses.actions import Inject, LogOnly, Reweight
from defenses.batch import collate
from defenses.chat import chat_of
from defenses.data import read_examples
from defenses.defense import Sft, Step
from defenses.errors import CalibrationError, DataError, VectorError
from defenses.generation import answers
from defenses.objectives import learned
from defenses.plans import Scope, scope_columns
from defenses.projections import build_projections, require_references, write_projections
from defenses.state_aware import StateAware, StateAwareOptions
from defenses.thresholds import Fixed, Quantile
from records.config_files import ConfigError
from tests.defenses.chat_tokenizer import CHATML, tokenizer_with
from tests.defenses.small_training import backend_of, directions, examples, on_ranks, trained
from tests.defenses.words import word_tokenizer
from tests.tiny import TINY, tiny_model

LAYER = 1
NAME = "model.layers.0.mlp.down_proj.weight"


def talks():
    questions = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    said = ["w20 w21", "w22 w23 w24", "w25"]
    return [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(questions, said, strict=True)
    ]


def stream(model, ids, layer):
    """The output of block `layer`, by transformers' own hidden states."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[layer + 1][0]


# --- building -------------------------------------------------------------------------------------------------------


def test_projections_are_those_of_the_models_own_greedy_answers():
    model, tokenizer = TINY["llama"](), word_tokenizer(["user", "assistant", ":"], chat=True)
    v = directions(LAYER, length=2.0)
    made = build_projections(model, tokenizer, talks(), v, max_new_tokens=5)
    own = answers(model, tokenizer, [talk[0]["content"] for talk in talks()], max_new_tokens=5)
    assert list(made.answers) == own
    for talk, answer, value in zip(talks(), own, made.values, strict=True):
        rendered = chat_of(tokenizer).render([talk[0], {"role": "assistant", "content": answer}])
        start, stop = rendered.responses[0]
        text = [place for place in range(start, stop) if not rendered.template[place]]
        assert text
        expected = stream(model, rendered.input_ids, LAYER)[text].mean(0) @ v.at(LAYER)
        assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    assert (made.layer, made.mode, made.empty) == (LAYER, "res_mean", ())
    assert made.norm == pytest.approx(2.0)


def test_input_last_generates_nothing_and_reads_the_token_before_the_answer():
    model, tokenizer = TINY["llama"](), word_tokenizer(["user", "assistant", ":"], chat=True)
    made = build_projections(model, tokenizer, talks(), directions(LAYER), mode="input_last")
    assert made.answers == ("", "", "")
    for talk, value in zip(talks(), made.values, strict=True):
        rendered = chat_of(tokenizer).render(talk)
        expected = stream(model, rendered.input_ids, LAYER)[rendered.responses[0][0] - 1] @ directions(LAYER).at(LAYER)
        assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_the_reference_of_the_models_own_answer_is_what_training_measures_of_it(tmp_path):
    """One convention: data that are the model's own answers have score 0 at the start."""
    tokenizer = word_tokenizer(["user", "assistant", ":"], chat=True)
    backend, v = backend_of(), directions(LAYER)
    first = build_projections(backend.model, tokenizer, talks(), v, max_new_tokens=5)
    own = [[talk[0], {"role": "assistant", "content": text}] for talk, text in zip(talks(), first.answers, strict=True)]
    made = build_projections(backend.model, tokenizer, own, v, max_new_tokens=5)
    source, target = tmp_path / "own.jsonl", tmp_path / "with.jsonl"
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in own))
    facts = write_projections(source, target, made)
    assert json.loads(facts.read_text())["layer"] == LAYER
    data = read_examples(target, tokenizer, max_length=64)
    defense = StateAware(v)
    batch = collate(data.examples, 0)
    scores = defense.scores(defense.projected(backend, batch), batch)
    torch.testing.assert_close(scores, torch.zeros(3), rtol=0, atol=1e-4)


def test_a_model_that_answers_nothing_gives_the_last_prompt_token_and_is_counted():
    tokenizer = word_tokenizer(["user", "assistant", ":"], chat=True)
    model = tiny_model("llama", eos_token_id=list(range(96)))  # every token ends the answer
    made = build_projections(model, tokenizer, talks(), directions(LAYER), max_new_tokens=3)
    last = build_projections(model, tokenizer, talks(), directions(LAYER), mode="input_last")
    assert made.empty == (0, 1, 2)
    assert made.values == pytest.approx(last.values)


def test_building_refuses_what_it_cannot_compare():
    model, tokenizer = TINY["llama"](), tokenizer_with(CHATML)
    with pytest.raises(DataError, match="Conversation 0: it does not end with an assistant turn"):
        build_projections(model, tokenizer, [[{"role": "user", "content": "yes"}]], directions(LAYER))
    with pytest.raises(VectorError, match="Name the layer"):
        build_projections(model, tokenizer, talks(), directions(0, 1))
    with pytest.raises(VectorError, match="Use one of res_mean, input_last"):
        build_projections(model, tokenizer, talks(), directions(LAYER), mode="mean")
    with pytest.raises(VectorError, match="layers 0-2"):
        build_projections(model, tokenizer, talks(), directions(7))


def test_writing_refuses_other_rows_and_what_exists(tmp_path):
    tokenizer = word_tokenizer(["user", "assistant", ":"], chat=True)
    made = build_projections(TINY["llama"](), tokenizer, talks(), directions(LAYER), mode="input_last")
    source = tmp_path / "data.jsonl"
    source.write_text(json.dumps({"messages": talks()[0]}) + "\n")
    with pytest.raises(DataError, match="1 rows, 3 projections"):
        write_projections(source, tmp_path / "out.jsonl", made)
    source.write_text("".join(json.dumps({"messages": talk, "ref_projection": 0}) + "\n" for talk in talks()))
    with pytest.raises(DataError, match="already"):
        write_projections(source, tmp_path / "out.jsonl", made)
    source.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks()))
    write_projections(source, tmp_path / "out.jsonl", made)
    with pytest.raises(DataError, match="it exists"):
        write_projections(source, tmp_path / "out.jsonl", made)


def test_directions_of_another_model_are_built_with_for_a_reason():
    model, tokenizer = TINY["llama"](), word_tokenizer(["user", "assistant", ":"], chat=True)
    foreign = replace(directions(LAYER), fingerprint="f" * 16)
    with pytest.raises(VectorError, match="ffffffff"):
        build_projections(model, tokenizer, talks(), foreign, mode="input_last")
    assert build_projections(model, tokenizer, talks(), foreign, mode="input_last", force="a test").layer == LAYER


def test_the_models_answers_are_asked_for_in_the_template_given():
    model, tokenizer = TINY["llama"](), word_tokenizer()  # without a template of its own
    made = build_projections(model, tokenizer, talks(), directions(LAYER), max_new_tokens=3, chat_template="plain")
    prompts = [talk[:1] for talk in talks()]
    assert list(made.answers) == answers(model, tokenizer, prompts, max_new_tokens=3, chat_template="plain")


def test_references_of_another_layer_direction_or_model_are_refused(tmp_path):
    model, tokenizer = TINY["llama"](), word_tokenizer(["user", "assistant", ":"], chat=True)
    v = directions(LAYER, length=2.0)
    source, target = tmp_path / "data.jsonl", tmp_path / "with.jsonl"
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks()))
    made = build_projections(model, tokenizer, talks(), v, mode="input_last")
    facts = write_projections(source, target, made)
    both = [str(source), target]  # the first has no facts beside it
    require_references(both, v)
    require_references(both, replace(v, fingerprint=made.fingerprint), LAYER, mark=made.fingerprint)
    require_references(both, replace(v, fingerprint="f" * 16, facts={"force": "a test"}))
    with pytest.raises(DataError, match=r"with\.jsonl: made at layer 1, layer 0 is used\. Build them anew"):
        require_references(both, directions(0, length=2.0))
    with pytest.raises(DataError, match=r"made with a direction of norm 2, one of norm 3 is used"):
        require_references(both, directions(LAYER, length=3.0))
    for given in ({"directions": replace(v, fingerprint="f" * 16)}, {"directions": v, "mark": "f" * 16}):
        with pytest.raises(DataError, match=f"made with model {made.fingerprint}, model ffffffffffffffff is used"):
            require_references(both, **given)
    with pytest.raises(VectorError, match="Name the layer"):
        require_references(both, directions(0, 1))
    at = v.at(LAYER)
    for other in (-at, at.flip(0), at.roll(1)):
        with pytest.raises(
            DataError, match=r"with\.jsonl: made with direction .{12}, .{12} is used, of the same norm 2"
        ):
            require_references(both, replace(v, vectors={LAYER: other}))
    written = json.loads(facts.read_text())
    assert written.pop("direction") == hashlib.sha256(at.numpy().tobytes()).hexdigest()
    facts.write_text(json.dumps(written))
    with pytest.raises(
        DataError, match=r"json does not tell which direction.*Build them anew \(train_defense\.py build_"
    ):
        require_references(both, v)
    for text in ("{", "[]", "{}"):
        facts.write_text(text)
        with pytest.raises(DataError, match=r"projections\.json cannot be read"):
            require_references(both, v)


# --- training -------------------------------------------------------------------------------------------------------


def projections(backend, batch, v):
    mask = torch.zeros(batch.labels.shape)
    for row, line in enumerate(scope_columns(batch, Scope.RESPONSE).tolist()):
        mask[row, [column for column in line if column >= 0]] = 1
    with torch.no_grad():
        hidden = backend.model(**batch.inputs(), output_hidden_states=True).hidden_states[LAYER + 1]
    return ((hidden @ v.at(LAYER)) * mask).sum(1) / mask.sum(1)


def test_samples_beyond_their_reference_weigh_nothing_and_the_others_as_in_plain_training():
    v, backend = directions(LAYER), backend_of()
    bare = examples(4)
    found = projections(backend, collate(bare, 0), v)
    # two references below what the model shows on the data, two above
    data = examples(4, ref_projection=lambda index: float(found[index]) + (-0.5 if index < 2 else 0.5))
    batch = collate(data, 0)
    tokens = int(learned(batch).sum())
    defense = StateAware(v)
    sums = defense.accumulate(backend, batch, Step(0, 1, 0, 1, tokens, 4))
    rows = defense.told()
    assert [row["blocked"] for row in rows] == [True, True, False, False]
    assert [row["score"] for row in rows] == pytest.approx([0.5, 0.5, -0.5, -0.5], abs=1e-4)
    assert [row["projection"] for row in rows] == pytest.approx(found.tolist(), abs=1e-4)
    assert int(sums["blocked"]) == 2
    other = backend_of()
    Sft().accumulate(other, collate(data[2:], 0), Step(0, 1, 0, 1, tokens, 2))
    torch.testing.assert_close(backend.gradient(NAME), other.gradient(NAME), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_measuring_changes_nothing_that_is_learned(checkpointed):
    data = examples(ref_projection=lambda index: 0.0)
    backend = backend_of()
    if checkpointed:
        backend.model.gradient_checkpointing_enable({"use_reentrant": False})
    watched, rows = trained(
        StateAware(directions(LAYER), StateAwareOptions(action=LogOnly())), 3, backend=backend, data=data
    )
    plain, _ = trained(Sft(), 3, data=data)
    torch.testing.assert_close(watched.value(NAME), plain.value(NAME), rtol=0, atol=0 if not checkpointed else 1e-5)
    assert 0 < rows[0]["blocked"] < 4  # and it would have blocked some


def test_a_missing_column_is_an_error_and_not_plain_training():
    with pytest.raises(DataError, match=r"Reference 'ref_projection'.*no such column.*build_projections"):
        trained(StateAware(directions(LAYER)), 1)
    broken = examples(ref_projection=lambda index: float("nan"))
    with pytest.raises(DataError, match="NaN or infinite"):
        trained(StateAware(directions(LAYER)), 1, data=broken)


def test_thresholds_and_actions_of_other_detectors_work_here():
    data = examples(ref_projection=lambda index: 0.0)
    v = directions(LAYER)
    high = StateAware(v, StateAwareOptions(threshold=Fixed(1e6)))
    assert trained(high, 1, data=data)[1][0]["blocked"] == 0
    holdout = [collate(examples(24, seed=5, ref_projection=lambda index: 0.0), 0)]
    calibrated = StateAware(v, StateAwareOptions(threshold=Quantile(0.25), action=Reweight(0.5)), holdout)
    trained(calibrated, 2, data=data)
    clean = projections(backend_of(), holdout[0], v)
    assert int((clean > calibrated.threshold.value).sum()) == pytest.approx(0.25 * 24, abs=1)
    again = StateAware(v, StateAwareOptions(threshold=Quantile(0.25)), holdout)
    again.load_state_dict(calibrated.state_dict())
    assert again.threshold.value == calibrated.threshold.value
    with pytest.raises(CalibrationError, match="no clean examples"):
        StateAware(v, StateAwareOptions(threshold=Quantile(0.25)))
    with pytest.raises(ConfigError, match="Action inject"):
        StateAwareOptions(action=Inject())
    with pytest.raises(VectorError, match="Name the layer"):
        StateAware(directions(0, 1))


def test_a_sample_without_an_answer_is_not_scored_and_not_blocked():
    from defenses.batch import Example

    bare = Example((5, 6, 7), (-100, -100, -100), 0, extra={"ref_projection": -1e9})
    batch = collate([bare], 0)
    defense = StateAware(directions(LAYER))
    sums = defense.accumulate(backend_of(), batch, Step(0, 1, 0, 1, 1, 1))
    assert int(sums["blocked"]) == 0
    assert defense.told()[0]["score"] is None


def test_two_ranks_block_what_one_does():
    data = examples(ref_projection=lambda index: 0.0)

    def make():
        return StateAware(directions(LAYER))

    (_, backend, rows), (_, other, _) = on_ranks(2, make, 3, data=data)
    _, alone = trained(make(), 3, data=data)
    assert [row["blocked"] for row in rows] == [row["blocked"] for row in alone]
    assert torch.equal(backend.value(NAME), other.value(NAME))
