"""The page of a training and of a comparison: what it says, and what its figures draw."""

from __future__ import annotations

import json

from defenses.compare import compared
from defenses.prompts import over_prompts
from defenses.report import _evaluations_on_the_way, _last_evaluation, _sentence, comparison_page
from defenses.report_figures import COLOURS, histogram, lines, pareto

SKILL = {"skill_accuracy": 0.5}
TABLE = {
    "sft": {0: {"trait_rate": 0.8, **SKILL}, 1: {"trait_rate": 0.8, **SKILL}},
    "good": {0: {"trait_rate": 0.2, **SKILL}, 1: {"trait_rate": 0.2, **SKILL}},
}


def test_the_sentence_gives_value_and_interval_of_the_same_prompts():
    # the rates differ by -0.6; over the prompts that both answered coherently every gap is -1
    made = {**compared(TABLE), "before": {}}
    asked = [f"q{number}" for number in range(5)]
    runs = {"sft": {0: dict.fromkeys(asked, 1.0)}, "good": {0: dict.fromkeys(asked, 0.0)}}
    made["prompts"] = {"trait_rate": over_prompts(runs, "sft")}
    sentence, lowered = _sentence(made)
    assert lowered and "good -1.000 [-1.000, -1.000]" in sentence and "over prompts" in sentence


def test_a_reference_of_which_no_answer_counted_is_told_and_not_an_error(tmp_path):
    table = {"sft": {0: dict(SKILL)}, "good": TABLE["good"]}
    (tmp_path / "comparison.json").write_text(json.dumps({**compared(table), "before": {}, "prompts": {}}, default=str))
    assert "sft: trait_rate unknown, no answer counted" in comparison_page(tmp_path)


def test_a_variant_keeps_its_colour_and_a_lone_one_its_name():
    drawn = lines({"delta": [(1, 2.0)]}, y="blocked", places={"sft": 0, "delta": 1})
    assert drawn["data"][0]["line"]["color"] == COLOURS[1] and drawn["layout"]["showlegend"]
    assert not lines({"loss": [(1, 2.0), (2, 1.0)]}, y="loss")["layout"]["showlegend"]


def test_kinds_of_sample_are_counted_in_the_same_bins():
    drawn = histogram({"poisoned": [0.0, 1.0], "clean": [-3.0, 5.0]})["data"]
    assert drawn[0]["xbins"] == drawn[1]["xbins"] == {"start": -3.0, "end": 5.2, "size": 0.2}


def test_an_evaluation_without_a_value_is_a_gap_and_the_last_one_is_drawn():
    rows = [{"step": 0, "kind": "evaluation", "trait_rate": 0.0}, {"step": 2, "kind": "evaluation"}]
    figures = {}
    last = _last_evaluation({"steps": 4, "evaluation": {"trait_rate": {"value": 1.0}, "kl": {"value": 0.1}}})
    assert _evaluations_on_the_way([*rows, *last], figures)
    (drawn,) = figures["on-the-way"]["data"]
    assert (drawn["x"], drawn["y"]) == ([0, 2, 4], [0.0, None, 1.0])


def test_the_axes_say_which_end_is_good():
    made = compared(TABLE)
    layout = pareto(made)["layout"]
    assert layout["xaxis"]["title"]["text"] == "trait_rate (low is good)"
    assert layout["yaxis"]["title"]["text"] == "skill_accuracy (high is good)"
