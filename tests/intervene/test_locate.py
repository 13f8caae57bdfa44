"""Wrappers, refusals, fingerprints, and what the errors say."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from intervene.errors import (
    InterveneError,
    SiteOutOfRange,
    UnknownComponent,
    UnknownFamily,
    UnsupportedModel,
)
from intervene.families import FAMILIES, Family, fingerprint, locate, register_family, resolve, unwrap
from tests.intervene.check_hooks import changed, logits, read
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def families() -> Iterator[None]:
    """Undo what a test registers."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# --- out of range -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("L31.mlp_output", "Site L31.mlp_output: this llama has layers 0-2. Use a layer below 3."),
        ("L-4.mlp_output", "Site L-4.mlp_output: this llama has layers 0-2. Use a layer from -3 to 2."),
        (
            "L0.head_output[9]",
            "Site L0.head_attention_value_output[9]: a block of this llama has 4 query heads. Use a head below 4.",
        ),
        ("L0.head_query_output[4]", "a block of this llama has 4 query heads. Use a head below 4."),
        ("L0.head_key_output[3]", "a block of this llama has 2 key/value heads. Use a head below 2."),
        ("L0.head_value_output[1,2]", "a block of this llama has 2 key/value heads. Use a head below 2."),
        ("L0.mlp_neurons[48]", "mlp_neurons of this llama has 48 columns. Use a column below 48."),
        ("L0.key_output[16]", "key_output of this llama has 16 columns. Use a column below 16."),
        ("embedding_output[32]", "embedding_output of this llama has 32 columns. Use a column below 32."),
        ("path:model.layers.0.mlp.up_proj.output[48]", "the output of model.layers.0.mlp.up_proj has 48 columns."),
    ],
)
def test_out_of_range(llama: PreTrainedModel, site: str, message: str) -> None:
    with pytest.raises(SiteOutOfRange, match=re.escape(message)):
        resolve(llama, site)


def test_expert_out_of_range() -> None:
    with pytest.raises(SiteOutOfRange, match=r"a block of this mixtral has 4 experts\. Use an expert below 4"):
        resolve(tiny_model("mixtral"), "L0.expert_output[4]")


# --- components a family lacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("llama", "L0.expert_output", r"llama has no experts\. It has embedding_output, block_input, .*mlp_write"),
        ("llama", "L0.router_output", r"llama has no mixture of experts, so no router\. It has embedding_output"),
        ("mixtral", "L0.mlp_activation", r"mixtral has no single activation module \(its experts are fused"),
        ("gpt_oss", "L0.mlp_neurons", r"gpt_oss has no single down projection \(its experts are fused"),
    ],
)
def test_unknown_component(name: str, site: str, message: str) -> None:
    with pytest.raises(UnknownComponent, match=message):
        resolve(tiny_model(name), site)


def test_an_opt_without_final_norm_has_no_final_norm_output() -> None:
    model = tiny_model("opt", _remove_final_layer_norm=True)
    assert resolve(model, "L0.block_output").width == 32
    with pytest.raises(UnknownComponent, match="opt has no such module"):
        resolve(model, "final_norm_output")


# --- configurations that are refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, r"opt with do_layer_norm_before=False: with norms after the sum"),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            r"bloom with apply_residual_connection_post_layernorm=True: .*'path:<module>",
        ),
        ("bloom", {"pretraining_tp": 2, "slow_but_exact": True}, r"bloom with slow_but_exact=True"),
        ("gpt2", {"add_cross_attention": True}, r"gpt2 with add_cross_attention=True: .* third write"),
    ],
)
def test_configurations_that_are_refused(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        resolve(tiny_model(name, **overrides), "L0.mlp_output")


def test_bloom_with_slow_but_exact_but_no_slices_is_accepted() -> None:
    model = tiny_model("bloom", slow_but_exact=True)
    assert read(model, ["L0.attention_write"], tiny_batch(model))


# --- wrappers -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_ddp_is_taken_off(one_rank: None) -> None:
    model = tiny_model("llama")
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert locate(wrapped).hf is model
    assert resolve(wrapped, "L1.mlp_output") == resolve(model, "L1.mlp_output")
    assert fingerprint(wrapped) == fingerprint(model)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_fsdp2_has_cut_is_its_own_model_still(one_rank: None) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    for part in (*model.model.layers, model):
        torch.distributed.fsdp.fully_shard(part)
    assert locate(model).hf is model
    sites = ["L1.block_output", "L0.head_output[1]", "L2.mlp_neurons", "final_norm_output"]
    assert [resolve(model, site).width for site in sites] == [resolve(plain, site).width for site in sites]
    found, wanted = (read(one, sites, tiny_batch(plain)) for one in (model, plain))
    for site in sites:
        torch.testing.assert_close(found[site], wanted[site])
    with pytest.raises(InterveneError, match=r"Fingerprint: parameter \S+ is cut over the ranks\. Take it before"):
        fingerprint(model)


def named(kind: str, base: type = nn.Module) -> type:
    """Return a wrapper class of that name."""

    def start(self: nn.Module, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    return type(kind, (base,), {"__init__": start})


def test_the_first_fsdp_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(
        UnsupportedModel, match=r"the first FSDP has not been shown to work\. Shard the model with \S+fully_shard"
    ):
        locate(named("FullyShardedDataParallel")(llama))


def test_data_parallel_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModel, match=r"of class DataParallel: it copies the model .* Pass model\.module"):
        locate(nn.DataParallel(llama))


def test_deepspeed_engines_are_taken_off_by_class_name(llama: PreTrainedModel) -> None:
    engine = named("DeepSpeedEngine")
    assert locate(engine(llama)).hf is llama
    with pytest.raises(UnsupportedModel, match=r"class PipelineEngine: a pipeline of DeepSpeed has not been shown"):
        resolve(named("PipelineEngine", engine)(llama), "L0.mlp_output")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_a_compiled_model_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModel, match=r"OptimizedModule: a compiled model .* as it was before torch\.compile"):
        locate(torch.compile(model))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_block_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].compile()
    with pytest.raises(UnsupportedModel, match=r"LlamaDecoderLayer \(inside, at model\.layers\.1\): a compiled model"):
        resolve(model, "L0.mlp_output")


@pytest.mark.parametrize(
    ("name", "targets", "site"),
    [("llama", ["q_proj", "o_proj", "down_proj"], "L1.head_output[1]"), ("gpt2", ["c_attn"], "L1.head_key_output[2]")],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
def test_lora_models_resolve_to_the_adapted_modules(name: str, targets: list[str], site: str) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_model(name)
    before, expected = fingerprint(plain), resolve(plain, site)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    tap = resolve(adapted, site)
    assert (tap.width, tap.columns, tap.path) == (expected.width, expected.columns, expected.path)
    assert type(tap.module).__module__.startswith("peft")
    assert fingerprint(adapted) == before
    batch = tiny_batch(plain)
    clean = logits(adapted, batch)
    with changed(tap, torch.zeros_like):
        assert (logits(adapted, batch) - clean).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_prompt_learning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedModel, match=r"prompt learning puts virtual tokens before the prompt"):
        locate(peft.get_peft_model(tiny_model("llama"), config))


# --- shared modules -----------------------------------------------------------------------------------------------


def test_a_module_that_serves_two_layers_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.act_fn = model.model.layers[0].mlp.act_fn
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2\.mlp\.act_fn is one module that serves layers 0, 2"):
        resolve(model, "L2.mlp_activation")
    assert resolve(model, "L1.mlp_activation").width == 48
    with pytest.raises(UnsupportedModel, match=r"one module with 2 names \(model\.layers\.0\.mlp\.act_fn, model"):
        resolve(model, "path:model.layers.0.mlp.act_fn.output")


def test_a_block_that_is_used_twice_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(UnsupportedModel, match="serves layers 0, 2"):
        resolve(model, "L0.block_output")
    with pytest.raises(UnsupportedModel, match="serves layers 0, 2"):
        resolve(model, "embedding_output")


# --- dotted paths -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A model of no family: an embedding, a GRU and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 4)])


@pytest.mark.parametrize(
    ("site", "width"),
    [
        ("path:embed.output", 6),
        ("path:embed.input", None),
        ("path:gru.output", None),
        ("path:norm.input", 5),
        ("path:heads.1.output", 4),
        ("path:heads.1.input", 5),
        ("path:heads.1.input[4,0]", 2),
        ("path:gru.output[1]", 1),
    ],
)
def test_paths_need_no_family(site: str, width: int | None) -> None:
    model = Small()
    tap = resolve(model, site)
    assert tap.width == width
    assert tap.module is model.get_submodule(tap.path)
    assert tap.side == site.split(".")[-1].split("[")[0]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("path:heads.2.output", r"heads has no child '2'\. Its children: 0, 1\."),
        ("path:encoder.output", r"the model has no child 'encoder'\. Its children: embed, gru, norm, heads\."),
        ("path:heads.output", r"heads is a ModuleList, which is never called\. Name one of its children\."),
    ],
)
def test_paths_that_lead_nowhere(site: str, message: str) -> None:
    with pytest.raises(UnknownComponent, match=message):
        resolve(Small(), site)


def test_a_path_and_the_component_it_is_are_the_same_tensor(llama: PreTrainedModel) -> None:
    values = read(llama, ["L1.mlp_output", "path:model.layers.1.mlp.output"], tiny_batch(llama))
    assert torch.equal(values["L1.mlp_output"], values["path:model.layers.1.mlp.output"])


# --- unknown families ---------------------------------------------------------------------------------------------


def stablelm() -> PreTrainedModel:
    """Return a tiny model of a family that is not registered."""
    config = AutoConfig.for_model(
        "stablelm",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_line_in_unknown_family_registers_it(families: None) -> None:
    model = stablelm()
    with pytest.raises(UnknownFamily) as caught:
        resolve(model, "L0.mlp_output")
    text = str(caught.value)
    assert "no family is registered for model_type 'stablelm'" in text
    assert "The blocks are probably model.layers (2 of them)" in text
    assert "self_attn: StableLmAttention" in text
    line = text.splitlines()[-1]
    assert line.startswith("register_family('stablelm', Family(")
    exec(line, {"register_family": register_family, "Family": Family})
    parts = [f"L1.{part}" for part in ("block_input", "attention_write", "mlp_write", "block_output")]
    x, attention, mlp, y = read(model, parts, tiny_batch(model)).values()
    torch.testing.assert_close(x + attention + mlp, y, atol=1e-6, rtol=1e-6)
    assert resolve(model, "L0.head_key_output[1]").columns == slice(8, 16)


def test_a_model_without_configuration_is_told_of_paths() -> None:
    with pytest.raises(UnknownFamily, match=r"class Small: it has no config\.model_type.*'path:<module>\.input'"):
        resolve(Small(), "L0.mlp_output")


def test_a_known_type_with_other_modules_says_where_it_looked() -> None:
    model = Small()
    model.config = SimpleNamespace(model_type="gpt2")  # type: ignore[assignment]
    with pytest.raises(UnknownFamily, match=r"blocks are not where that family keeps them \(tried transformer\.h, h\)"):
        locate(model)


def test_registering_a_function_of_the_configuration(families: None) -> None:
    register_family("stablelm", lambda config: Family(kv_heads="num_key_value_heads"))
    assert resolve(stablelm(), "L1.key_output").width == 16


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_for_float32_and_bfloat16(llama: PreTrainedModel) -> None:
    first = fingerprint(llama)
    assert re.fullmatch(r"[0-9a-f]{16}", first)
    assert fingerprint(copy.deepcopy(llama).bfloat16()) == first
    assert fingerprint(tiny_model("llama")) == first


def test_fingerprint_tells_weights_apart(llama: PreTrainedModel) -> None:
    assert fingerprint(tiny_model("llama", seed=1)) != fingerprint(llama)
    scaled = copy.deepcopy(llama)
    with torch.no_grad():
        scaled.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    assert fingerprint(scaled) != fingerprint(llama)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fingerprint_survives_modules_to_save() -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_model("llama")
    before = fingerprint(plain)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert fingerprint(peft.get_peft_model(plain, config)) == before


def test_fingerprint_of_empty_weights_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(InterveneError, match=r"parameter bias holds no values \(device meta.*Load the weights first"):
        fingerprint(model)


def test_unwrap_returns_a_plain_model_itself(llama: PreTrainedModel) -> None:
    assert unwrap(llama) is llama
