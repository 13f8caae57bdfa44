"""Models on several devices and in bf16: the same answers as on one device, and as by hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from alignments import METHODS, LanguagePairs, Setup, evaluate, fit
from intervene import InterveneError, Intervention, ShapeMismatch, Site, Subspace, Swap
from intervene.interventions import placed_for
from intervene.marked import Marked
from intervene.models import load_model
from intervene.suffix import prefix_of, suffix_logits
from tests.alignments.planted import toy_tokenizer
from tests.alignments.together import name_pairs
from tests.tiny import tiny_batch, tiny_model

SITE = Site("block_output", 1)
SPLIT = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
         "lm_head": "cpu"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_model_on_two_devices_is_run_and_fitted_as_on_one():
    script = Path(__file__).with_name("two_devices.py")
    done = subprocess.run(
        [sys.executable, str(script), "fit"], capture_output=True, text=True, timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["worst"]) == 18 and max(told["worst"].values()) < 1e-5
    assert told["streams"] == {"0": "cpu", "1": "cpu", "2": "pretend:0"}
    assert {site: device for site, device in told["plans"].items() if site[:2] == "L2"} == dict.fromkeys(
        ("L2.block_input", "L2.block_output", "L2.attention_output", "L2.head_attention_value_output[1]"), "pretend:0"
    )
    assert told["plans"]["L1.mlp_output"] == "cpu"


def test_recomputation_leaves_accelerates_own_forwards_in_place():
    plain = tiny_model("llama")
    model = dispatch_model(tiny_model("llama"), SPLIT, force_hooks=True)
    forwards = [block.forward for block in model.model.layers]
    assert all("forward" in vars(block) for block in model.model.layers)  # else this shows nothing
    plan = [Intervention(SITE, Swap(), Marked("last"), Subspace(32, 4, seed=1))]
    made = [
        LanguagePairs(one, toy_tokenizer(), name_pairs(6), sites=[SITE], positions=["last"]) for one in (plain, model)
    ]
    with torch.no_grad():
        expected, found = (data.logits(plan, torch.arange(6)) for data in made)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert [block.forward for block in model.model.layers] == forwards


def test_a_device_map_is_handed_to_transformers(folder):
    model, _ = load_model(folder, device_map={"": "cpu"})
    assert not model.training
    ids = tiny_batch(model)["input_ids"] % 20
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(folder)[0](ids).logits)


def test_without_accelerate_a_device_map_says_what_to_install(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(InterveneError, match=r"device_map 'auto': accelerate is not installed\. Install it: pip"):
        load_model(folder, device_map="auto")


def test_weights_that_fit_on_no_device_are_refused(folder, tmp_path):
    (tmp_path / "offload").mkdir()
    where = {**SPLIT, "model.layers": "disk"}
    with pytest.raises(InterveneError, match=r"weights fit on no device and were offloaded, first model\.layers\.0"):
        load_model(folder, device_map=where)


def test_plans_are_placed_where_their_sites_are():
    model = tiny_model("llama")
    plan = METHODS["das"].make(Setup(SITE, Marked("last"), 32, 4, 0))
    lens = plan[0].featurizer
    weights = list(lens.parameters())
    assert placed_for(model, plan) is plan and list(lens.parameters()) == weights
    model.model.layers[1].to("meta")
    assert placed_for(model, plan)[0].featurizer is lens
    assert {parameter.device.type for parameter in lens.parameters()} == {"meta"}
    elsewhere = METHODS["das"].make(Setup(SITE, Marked("last"), 32, 4, 0))
    batch = {**tiny_batch(model), "marks": {"last": torch.tensor([[6], [6]])}}
    with pytest.raises(ShapeMismatch, match=r"learns and is on cpu, but the site is on meta"):
        suffix_logits(model, elsewhere, [torch.zeros(2, 1, 32)], prefix_of(tiny_model("llama"), batch, [1]))


def bf16(n=12):
    model = tiny_model("llama").to(torch.bfloat16)
    return LanguagePairs(model, toy_tokenizer(), name_pairs(n), sites=[SITE], positions=["last"])


def test_frames_stay_fp32_and_orthonormal_on_a_bf16_model():
    data = bf16()
    plan = METHODS["das"].make(Setup(SITE, Marked("last"), 32, 6, 0))
    before = plan[0].featurizer.frame().detach().clone()
    fit(data.model, plan, data, steps=15, batch_size=6, lr=0.02)
    frame = plan[0].featurizer.frame().detach()
    assert {one.dtype for one in plan[0].featurizer.parameters()} == {frame.dtype} == {torch.float32}
    assert (frame - before).abs().max() > 0.02
    torch.testing.assert_close(frame.T @ frame, torch.eye(6), atol=2e-6, rtol=0)


@torch.no_grad()
def test_bf16_scores_are_those_of_the_rule_computed_by_hand():
    data = bf16()
    lens = Subspace(32, 6, seed=4)
    plan = [Intervention(SITE, Swap(), Marked("last"), lens)]
    frame, layer, answers = lens.frame(), data.model.model.layers[1], []
    data.prefix = replace(data.prefix, exact=False)  # full passes of the same batch: no rounding between the two
    for row in range(len(data)):
        ids = [one.input_ids[row, one.attention_mask[row].bool()][None] for one in (data.base, data.source)]
        held = {}
        handle = layer.register_forward_hook(lambda _m, _a, out, held=held: held.update(h=out))
        data.model(ids[1])
        handle.remove()

        def patch(_module, _args, out, held=held):
            change = (held["h"][0, -1].float() - out[0, -1].float()) @ frame @ frame.T
            new = out.clone()
            new[0, -1] = (out[0, -1].float() + change).bfloat16()
            return new

        handle = layer.register_forward_hook(patch)
        answers.append(data.model(ids[0]).logits[0, -1])
        handle.remove()
    found = data.logits(plan, torch.arange(len(data)))
    expected = torch.stack(answers)
    spread = float(expected.float().std())
    assert float((found - expected).float().abs().max()) < 0.1 * spread  # one bf16 rounding is 0.02 to 0.03 here
    data.labels = expected.argmax(-1)
    margins = expected.float().topk(2).values.diff(dim=-1).abs()[:, 0]
    sure = margins > 0.2 * spread
    right = found.argmax(-1) == data.labels
    assert sure.any() and right[sure].all() and evaluate(plan, data).iia == float(right.float().mean())


def test_bf16_is_exact_where_it_is_no_farther_than_two_full_passes_are():
    data = bf16()
    assert data.prefix.exact and data.prefix.difference <= max(data.prefix.noise, 2**-7) < 0.1
    assert "(two full passes in bfloat16: " in data.exactness() and "too far" not in data.exactness()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_is_not_what_the_model_reads_is_refused(dtype, monkeypatch):
    import intervene.suffix as suffix

    model = tiny_model("llama").to(dtype)
    batch = tiny_batch(model, padding="left", lengths=(12, 12, 11, 12))
    assert prefix_of(model, batch, [0, 1]).exact
    past = suffix.Prefix.past
    wrong = lambda self, first, start: [(k.roll(1, 0), v) for k, v in past(self, first, start)]  # noqa: E731
    monkeypatch.setattr(suffix.Prefix, "past", wrong)
    assert not prefix_of(model, batch, [0, 1]).exact
