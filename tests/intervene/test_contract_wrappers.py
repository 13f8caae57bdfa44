"""Clause 9: PEFT, DistributedDataParallel, plain modules; what has not been shown to work is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from intervene import (
    Add,
    AllTokens,
    At,
    Intervention,
    LastToken,
    ShapeMismatch,
    Swap,
    UnknownComponent,
    UnknownFamily,
    UnsupportedModel,
    Zero,
    capture,
    interchange,
    intervene,
)
from tests.intervene.by_hand import added, block_output, close, hook_state, vector
from tests.tiny import tiny_batch, tiny_model

SITE, V = "L1.block_output", vector(1)
# what peft and torch.compile warn of on import is no business of these tests
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}


# --- PEFT ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora():
    """A LoRA model whose adapter does something, and the same weights merged into a plain model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.eval()
    return model, copy.deepcopy(model).merge_and_unload().eval()


PLANS = {
    "block": [Intervention(SITE, Add(V), LastToken())],
    "adapted module": [Intervention("L1.mlp_output", Add(V)), Intervention("L0.head_value_output[1]", Zero())],
    "neurons": [Intervention("L2.mlp_neurons[1,2,3]", Zero(), At(1, -1))],
}


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_peft_forward_and_generate_equal_the_merged_model(lora, name):
    model, merged = lora
    batch = tiny_batch(model, "left")
    before = hook_state(model)
    with intervene(model, PLANS[name]):
        logits = model(**batch).logits
        steps = model.generate(**batch, **GREEDY).logits
        uncached = model.generate(**batch, **GREEDY, use_cache=False).logits
    with intervene(merged, PLANS[name]):
        close(logits, merged(**batch).logits)
        close(torch.stack(steps), torch.stack(merged.generate(**batch, **GREEDY).logits))
    close(torch.stack(uncached), torch.stack(steps))
    assert hook_state(model) == before


def test_peft_trains_its_adapter_under_an_intervention(lora):
    model, _ = lora
    batch, edit = tiny_batch(model, "right"), Add(V, trainable=True)
    with intervene(model, [Intervention(SITE, edit)]):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert ours and all("lora_" in name for name in ours)
    model.zero_grad()
    by_hand = V.clone().requires_grad_()
    real = batch["attention_mask"][..., None]
    with block_output(model.base_model.model, 1, lambda h: h + real * by_hand):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if name in ours:
            close(ours[name], parameter.grad)
    close(edit.vector.grad, by_hand.grad)


@torch.no_grad()
def test_peft_interchange_and_labels(lora):
    model, merged = lora
    base, source = tiny_batch(model, "left"), tiny_batch(model, "right", seed=2)
    plan = [Intervention(SITE, Swap(), LastToken())]
    close(interchange(model, plan, base, source).logits, interchange(merged, plan, base, source).logits)
    with model.disable_adapter(), capture(model, SITE) as acts:
        model(**base)
    plain = tiny_model("llama")
    with capture(plain, SITE) as expected:
        plain(**base)
    close(acts[SITE], expected[SITE])


# --- compiled, parallel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_a_compiled_model_is_refused(how):
    model = tiny_model("llama")
    if how == "wrapped":
        model = torch.compile(model)
    elif how == "in place":
        model.compile()
    else:
        model.model.layers[1].compile()
    for block in (intervene(model, [Intervention(SITE, Zero())]), capture(model, SITE)):
        with (
            pytest.raises(UnsupportedModel, match=r"has not been shown to honour hooks.*Pass the model as it was"),
            block,
        ):
            pass


def test_data_parallel_is_refused():
    with (
        pytest.raises(UnsupportedModel, match="hooks on the original never fire"),
        intervene(nn.DataParallel(tiny_model("llama")), [Intervention(SITE, Zero())]),
    ):
        pass


_DDP = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from intervene import *
from tests.tiny import tiny_model, tiny_batch
from tests.intervene.by_hand import vector
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
model = tiny_model("llama").train()
batch = tiny_batch(model, "right", lengths=(7, 4, 5, 6))
mine = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
wrapped = DDP(model)
edit = Add(vector(1), trainable=True)
plan = [Intervention("L1.block_output", edit), Intervention("L0.mlp_output", Scale(0.5), LastToken())]
with intervene(wrapped, plan) as applied, capture(wrapped, "L2.block_output", LastToken()) as acts:
    out = wrapped(**mine)
    out.logits[mine["attention_mask"].bool()].square().sum().backward()
try:
    with intervene(wrapped, plan):
        raise KeyError
except KeyError:
    pass
torch.save({
    "logits": out.logits.detach(), "last": acts["L2.block_output"].detach(),
    "edit": edit.vector.grad, "tokens": [r.tokens for r in applied.report()],
    "grads": {n: p.grad for n, p in model.named_parameters()},
}, os.environ["SAVE"] + str(rank))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_on_two_ranks_equals_one_process(tmp_path):
    """Each rank edits its own rows; the model's gradients are the mean of the ranks'."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 400),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "SAVE": str(tmp_path / "rank"),
    }
    ranks = [
        subprocess.Popen([sys.executable, "-c", _DDP], env={**environment, "RANK": str(rank)}, cwd=ROOT)
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    found = [torch.load(tmp_path / f"rank{rank}") for rank in (0, 1)]
    model = tiny_model("llama").train()
    batch = tiny_batch(model, "right", lengths=(7, 4, 5, 6))
    from intervene import Scale

    edit = Add(V, trainable=True)
    plan = [Intervention(SITE, edit), Intervention("L0.mlp_output", Scale(0.5), LastToken())]
    with intervene(model, plan), capture(model, "L2.block_output", LastToken()) as acts:
        out = model(**batch)
        out.logits[batch["attention_mask"].bool()].square().sum().backward()
    close(torch.cat([part["logits"] for part in found]), out.logits)
    close(torch.cat([part["last"] for part in found]), acts["L2.block_output"])
    assert [part["tokens"] for part in found] == [[11, 2], [11, 2]]
    torch.testing.assert_close(found[0]["edit"] + found[1]["edit"], edit.vector.grad, rtol=1e-5, atol=1e-4)
    for name, parameter in model.named_parameters():
        for part in found:
            torch.testing.assert_close(2 * part["grads"][name], parameter.grad, rtol=1e-5, atol=1e-3)


def test_ddp_in_one_process():
    """The wrapper's own forward is followed: positions come from what it was called with."""
    assert torch.distributed.is_available()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        batch = tiny_batch(model, "right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        wrapped = nn.parallel.DistributedDataParallel(model)
        plan = [Intervention(SITE, Add(V), LastToken())]
        with intervene(wrapped, plan):
            found = wrapped(**batch, labels=labels)
        with intervene(model, plan):
            close(found.logits, model(**batch).logits)
        assert hook_state(model) == {}
    finally:
        torch.distributed.destroy_process_group()


# --- modules of no family -----------------------------------------------------------------------------------------


def test_a_plain_network():
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(4, 3)
    with torch.no_grad():
        hidden = torch.tanh(x @ network[0].weight.T + network[0].bias)
        edited = hidden.clone()
        edited[:, [1, 4]] = 0
        expected = edited @ network[2].weight.T + network[2].bias
        with intervene(network, [Intervention("path:1.output[1,4]", Zero())]) as applied:
            close(network(x), expected)
        assert (applied.report()[0].tokens, applied.report()[0].elements) == (4, 8)
        for positions in (LastToken(), AllTokens(), At(0)):
            with intervene(network, [Intervention("path:2.input[1,4]", Zero(), positions)]):
                close(network(x), expected)
        with capture(network, ["path:1.output", "path:0.input"]) as acts:
            network(x)
    close(acts["path:1.output"], hidden[:, None])
    close(acts["path:0.input"], x[:, None])


@torch.no_grad()
def test_an_interchange_in_a_plain_network():
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    base, source = torch.randn(4, 3), torch.randn(4, 3)
    plan = [Intervention("path:1.output", Swap())]
    found = interchange(_named(network), plan, {"x": base}, {"x": source})
    close(found, network(source))


def _named(network):
    class Named(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    return Named(*network)


class Tagger(nn.Module):
    """A GRU over embedded tokens, and a readout of every step."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.gru = nn.GRU(6, 8, batch_first=batch_first)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        steps, _ = self.gru(self.embed(ids))
        return self.out(steps)


@torch.no_grad()
def test_a_recurrent_network():
    torch.manual_seed(0)
    model, ids, v = Tagger(batch_first=True), torch.randint(0, 20, (2, 5)), torch.randn(8)
    steps, _ = model.gru(model.embed(ids))
    steps[:, -1] += v
    with intervene(model, [Intervention("path:gru.output", Add(v), LastToken())]) as applied:
        found = model(ids)
    close(found, model.out(steps))
    assert applied.report()[0].tokens == 2
    embedded = model.embed(ids)
    embedded[:, 1] = 0
    with intervene(model, [Intervention("path:gru.input", Zero(), At(1))]):
        found = model(ids)
    close(found, model.out(model.gru(embedded)[0]))


def test_a_recurrent_network_with_time_first_is_refused():
    model = Tagger(batch_first=False)
    for site in ("path:gru.output", "path:gru.input"):
        with (
            pytest.raises(UnsupportedModel, match=r"gru, a GRU, has batch_first=False.*batch_first=True"),
            intervene(model, [Intervention(site, Zero())]),
        ):
            pass
    with (
        pytest.raises(UnsupportedModel, match="the model, a GRU, has batch_first=False"),
        capture(Holder(model.gru).inner, "path:.output"),
    ):
        pass
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    with (
        pytest.raises(UnsupportedModel, match="self_attn, a MultiheadAttention, has batch_first=False"),
        capture(encoder, "path:layers.1.linear1.output"),
    ):
        pass


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def test_axes_that_are_not_examples_by_tokens_are_refused():
    model = Transposed()
    with (
        pytest.raises(ShapeMismatch, match=r"shape \(5, 2, 4\): expected \(2, 5, D\), examples by tokens"),
        intervene(model, [Intervention("path:inner.output", Zero())]),
    ):
        model(torch.randn(2, 5, 4))


def test_components_need_a_family_and_paths_a_module():
    network = nn.Sequential(nn.Linear(3, 5), nn.LSTM(5, 4, batch_first=True))
    with pytest.raises(UnknownFamily):
        capture(network, "L0.block_output").__enter__()
    with pytest.raises(UnknownComponent, match="has no child '7'"):
        capture(network, "path:7.output").__enter__()


@torch.no_grad()
def test_a_path_into_a_language_model_is_the_component_there():
    model = tiny_model("llama")
    batch = tiny_batch(model, "left")
    with intervene(model, [Intervention("path:model.layers.1.mlp.output", Add(V), LastToken())]):
        found = model(**batch).logits
    with intervene(model, [Intervention("L1.mlp_output", Add(V), LastToken())]):
        close(found, model(**batch).logits)


@torch.no_grad()
def test_the_backbone_alone():
    model = tiny_model("llama")
    batch = tiny_batch(model, "left")
    chosen = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
    chosen[:, -1] = True
    with intervene(model.model, [Intervention(SITE, Add(V), LastToken())]):
        found = model.model(**batch).last_hidden_state
    with block_output(model, 1, added(V, chosen)):
        close(found, model.model(**batch).last_hidden_state)
