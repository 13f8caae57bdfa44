"""Transfer: scores of plans that are known by construction, baselines by hand, correlations by numpy's formula."""

from __future__ import annotations

from dataclasses import replace
from statistics import correlation

import pytest
import torch

from alignments import evaluate
from alignments.bundle import load_bundle, save_bundle
from alignments.transfer import consistency, heatmap_correlation, transfer, transfer_text
from intervene import AllTokens, InterveneError, Intervention, ShapeMismatch, Site, Subspace, Swap
from tests.alignments.planted import DIRECTION, WIDTH, planted_mlp, planted_pairs, toy_tokenizer
from tests.alignments.test_bundle import plan, prepared, row
from tests.tiny import tiny_model

SITE = Site("block_output", 0)


def swapping(direction):
    return [Intervention(SITE, Swap(), AllTokens(), Subspace.from_frame(direction[:, None]))]


def test_the_planted_direction_transfers_and_an_orthogonal_one_does_not():
    model = planted_mlp()
    sets = {"train": planted_pairs(model, 200, 0), "test": planted_pairs(model, 300, 1)}
    other = torch.zeros(WIDTH)
    other[5] = 1.0
    rows = transfer({"planted": swapping(DIRECTION), "other": swapping(other)}, sets)
    assert [(one.fitted_on, one.scored_on, one.n) for one in rows] == [
        ("planted", "train", 200), ("planted", "test", 300), ("other", "train", 200), ("other", "test", 300)
    ]  # fmt: skip
    assert rows[0].iia == rows[1].iia == 1.0
    unmoved = (sets["test"].base @ DIRECTION > 0).long() == sets["test"].labels
    assert rows[3].iia == pytest.approx(float(unmoved.float().mean()))
    share = float((sets["test"].labels == 1).float().mean())
    assert rows[3].majority == pytest.approx(max(share, 1 - share)) and rows[3].copy_source is None
    text = transfer_text(rows)
    assert "1.000" in text.splitlines()[1] and text.splitlines()[-1].startswith("best trivial baseline")


def test_a_bundle_is_scored_as_its_plan(tmp_path):
    model = tiny_model("llama")
    data = prepared(model)
    folder = save_bundle(
        tmp_path / "b", plan(), model, toy_tokenizer(), pairs=data, scores=[], task="toy", variable="position"
    )
    (one,) = transfer(load_bundle(folder), {"toy": data})
    assert one.iia == evaluate(plan(), data).iia
    assert one.copy_source == 0.0  # base and source share no name that is a label
    base = float((data.labels == data.base_answers).float().mean())
    assert one.copy_base == pytest.approx(base) and one.majority == pytest.approx(1 / 3)


def test_consistency_splits_by_what_the_model_itself_gets_right():
    model = tiny_model("llama")
    data = prepared(model)
    data.base_answers = data.base_answers.clone()
    data.base_answers[0] = data.prefix.logits[0].argmax()
    data.source_answers = data.source_logits.argmax(-1)
    found = consistency(plan(), data)
    base, source = data.task_correct()
    right = int((base & source).sum())
    assert right >= 1
    assert {one.scored_on: one.n for one in found} == {
        name: n for name, n in (("right on base and source", right), ("wrong on one of them", 3 - right)) if n
    }


def test_nothing_to_score_is_refused():
    with pytest.raises(ShapeMismatch, match="0 alignments to 0 datasets"):
        transfer({}, {})


def heatmap(values, **changes):
    rows = []
    for layer, iia in enumerate(values):
        one = row(site=Site("block_output", layer), iia=iia, low=iia, high=iia)
        rows.append(replace(one, **changes))
    return rows


def test_heatmaps_correlate_over_common_cells():
    first, second = [0.1, 0.5, 0.9, 0.4], [0.2, 0.6, 0.7, 0.1, 0.9]
    found = heatmap_correlation(heatmap(first), heatmap(second))
    assert found.n == 4 and found.r == pytest.approx(correlation(first, second[:4]))
    with pytest.raises(InterveneError, match="0 in common"):
        heatmap_correlation(heatmap(first), heatmap(second, method="boundless"))
    with pytest.raises(InterveneError, match="all common cells are equal"):
        heatmap_correlation(heatmap(first), heatmap([0.5] * 4))
