"""Every family's sites: the laws that hold for a right table and fail for a wrong one. No download."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, DynamicCache, PreTrainedModel

from intervene.families import components_of, locate, resolve
from intervene.sites import COMPONENTS, HEAD_COMPONENTS, LAYERLESS
from tests.intervene.check_hooks import changed, hooked, logits, read
from tests.tiny import CONFIGURATIONS, TINY, tiny_batch, tiny_model

MOE = ("mixtral", "gpt_oss")
ONLY_IN_MOE = ("router_output", "expert_output")
NOT_IN_MOE = ("mlp_activation", "mlp_neurons")
ROTARY_FREE = ("gpt2", "gpt_neo", "opt", "bloom", "falcon_sequential")
QK_NORM = ("qwen3", "gemma3_text", "olmo2")
FUSED = (
    "gpt2",
    "phi3",
    "gpt_neox",
    "gpt_neox_sequential",
    "bloom",
    "falcon",
    "falcon_new_decoder",
    "falcon_sequential",
)
CASES = [  # every component of every family, but expert_output, whose tensor no module returns
    (name, component)
    for name in TINY
    for component in COMPONENTS
    if component != "expert_output" and component not in (NOT_IN_MOE if name in MOE else ONLY_IN_MOE)
]

model_of = cache(tiny_model)  # tests never change these models


def at(component: str, layer: int = 1, units: str = "") -> str:
    """Return the text of a site; a component without layer ignores `layer`."""
    return f"{component}{units}" if component in LAYERLESS else f"L{layer}.{component}{units}"


def heads_of(model: PreTrainedModel) -> tuple[int, int]:
    """Return (H, G) as the test's own reading of the configuration."""
    config = model.config
    heads = config.num_attention_heads
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return heads, config.num_kv_heads
        return heads, 1 if config.multi_query else heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_the_table_of_cases_is_the_table_of_components() -> None:
    for name in TINY:
        listed = {component for case, component in CASES if case == name}
        assert listed == set(components_of(locate(model_of(name)).family)) - {"expert_output"}


# --- laws for all families ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("name", TINY)
def test_block_input_plus_writes_is_block_output(name: str, padding: str | None) -> None:
    model = model_of(name)
    parts = ("block_input", "attention_write", "mlp_write", "block_output")
    sites = [at(part, layer) for layer in range(3) for part in parts]
    values = read(model, sites, tiny_batch(model, padding))
    for layer in range(3):
        x, attention, mlp, y = (values[at(part, layer)] for part in parts)
        torch.testing.assert_close(x + attention + mlp, y, atol=1e-5, rtol=1e-5)
        assert attention.abs().mean() > 1e-2, "not a trivial sum"
        assert mlp.abs().mean() > 1e-2, "not a trivial sum"


@pytest.mark.parametrize("name", TINY)
def test_stream_sites_equal_hidden_states_of_hugging_face(name: str) -> None:
    model = model_of(name)
    batch = tiny_batch(model, "left")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    values = read(model, ["embedding_output", *(at("block_output", layer) for layer in range(3))], batch)
    torch.testing.assert_close(values["embedding_output"], hidden[0], atol=0, rtol=0)
    torch.testing.assert_close(values[at("block_output", 0)], hidden[1], atol=0, rtol=0)
    torch.testing.assert_close(values[at("block_output", 1)], hidden[2], atol=0, rtol=0)
    # Hugging Face's last hidden state is after the final norm
    torch.testing.assert_close(read(model, ["final_norm_output"], batch)["final_norm_output"], hidden[3])


@pytest.mark.parametrize("name", TINY)
def test_layers_follow_one_another(name: str) -> None:
    model = model_of(name)
    sites = ["embedding_output", at("block_input", 0), at("block_output", 0), at("block_input", 1)]
    values = read(model, sites, tiny_batch(model))
    assert torch.equal(values["embedding_output"], values[at("block_input", 0)])
    assert torch.equal(values[at("block_output", 0)], values[at("block_input", 1)])


@pytest.mark.parametrize(("name", "component"), CASES)
def test_tap_has_its_width_and_changing_it_changes_the_logits(name: str, component: str) -> None:
    model = model_of(name)
    batch = tiny_batch(model, "left")
    before = logits(model, batch)
    for layer in range(3 if component not in LAYERLESS else 1):
        tap = resolve(model, at(component, layer))
        assert read(model, [at(component, layer)], batch)[at(component, layer)].shape == (2, 7, tap.width)
        with changed(tap, zeros):
            after = logits(model, batch)
        assert (after - before).abs().max() > 1e-3
        assert torch.equal(logits(model, batch), before), "the change must end with its hook"


@pytest.mark.parametrize(("name", "component"), CASES)
def test_units_are_the_columns_of_the_whole(name: str, component: str) -> None:
    model = model_of(name)
    whole = resolve(model, at(component))
    heads, groups = heads_of(model)
    n = groups if component in ("head_key_output", "head_value_output") else heads
    d = whole.width // n if component in HEAD_COMPONENTS else 1
    last = n - 1 if component in HEAD_COMPONENTS else whole.width - 1
    units = sorted({last, 0}, reverse=True)  # order is the user's
    text = at(component, units=f"[{','.join(map(str, units))}]")
    values = read(model, [at(component), text], tiny_batch(model))
    expected = torch.cat([values[at(component)][..., u * d : (u + 1) * d] for u in units], dim=-1)
    assert torch.equal(values[text], expected)
    assert resolve(model, text).width == d * len(units)


@pytest.mark.parametrize("name", TINY)
def test_only_declared_tensors_are_overwritten_by_the_model(name: str) -> None:
    model = model_of(name)
    for component in set(components_of(locate(model).family)) - {"expert_output"}:
        tap = resolve(model, at(component))
        seen: list[tuple[Tensor, int]] = []
        with torch.no_grad(), hooked(tap, lambda x, seen=seen: seen.append((x, x._version))):  # type: ignore[misc]
            model(**tiny_batch(model))
        ((tensor, version),) = seen
        assert (tensor._version != version) == tap.overwritten, component


def test_mixtral_with_jitter_overwrites_its_mlp_input_in_training() -> None:
    model = tiny_model("mixtral", router_jitter_noise=0.1).train()
    tap = resolve(model, "L1.mlp_input")
    seen: list[tuple[Tensor, int]] = []
    with torch.no_grad(), hooked(tap, lambda x: seen.append((x, x._version))):  # type: ignore[func-returns-value]
        model(**tiny_batch(model))
    assert seen[0][0]._version > seen[0][1]
    assert tap.overwritten


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_zeroing_a_head_equals_zeroing_its_columns_of_the_output_projection(name: str) -> None:
    heads, _ = heads_of(model_of(name))
    for head in range(heads):
        model = tiny_model(name)
        batch = tiny_batch(model, "left")
        tap = resolve(model, f"L1.head_output[{head}]")
        with changed(tap, zeros):
            expected = logits(model, batch)
        projection = tap.module
        d = tap.width
        weight = projection.weight if isinstance(projection, torch.nn.Linear) else projection.weight.T  # Conv1D
        assert weight.shape[1] == heads * d
        with torch.no_grad():
            weight[:, head * d : (head + 1) * d] = 0.0
        torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_value_heads_are_those_of_the_cache(name: str) -> None:
    model = model_of(name)
    heads, groups = heads_of(model)
    batch = tiny_batch(model)
    cache_ = DynamicCache(config=model.config)
    sites = [f"L1.head_value_output[{group}]" for group in range(groups)]
    values = read(model, sites, batch)
    with torch.no_grad():
        model(**batch, past_key_values=cache_, use_cache=True)
    cached = cache_.layers[1].values  # (B, G, S, d); falcon's new decoder repeats each group for its query heads
    if cached.shape[2] < 7:  # a sliding layer keeps the last tokens only
        values = {site: value[:, -cached.shape[2] :] for site, value in values.items()}
    assert cached.shape[1] in (groups, heads)
    for group, site in enumerate(sites):
        torch.testing.assert_close(values[site], cached[:, group * cached.shape[1] // groups], atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in TINY if name not in QK_NORM])
def test_key_heads_are_those_of_the_cache(name: str) -> None:
    model = model_of(name)
    _, groups = heads_of(model)
    batch = {key: value[:, :4] for key, value in tiny_batch(model).items()}  # within every sliding window
    cache_ = DynamicCache(config=model.config)
    sites = [f"L1.head_key_output[{group}]" for group in range(groups)]
    values = read(model, sites, batch)
    with torch.no_grad():
        model(**batch, past_key_values=cache_, use_cache=True)
    cached = cache_.layers[1].keys
    tokens = slice(None) if name in ROTARY_FREE else slice(0, 1)  # a rotation by position 0 changes nothing
    for group, site in enumerate(sites):
        expected = cached[:, group * cached.shape[1] // groups, tokens]
        torch.testing.assert_close(values[site][:, tokens], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (name, part)
        for name in TINY
        for part in ("query", "key", "value")
        if name != "olmo2" or part == "value"  # olmo2's norm of queries and keys runs over all heads
    ],
)
def test_zeroing_a_head_changes_only_the_heads_that_read_it(name: str, part: str) -> None:
    model = model_of(name)
    heads, groups = heads_of(model)
    batch = tiny_batch(model)
    outputs = [f"L1.head_output[{head}]" for head in range(heads)]
    before = read(model, outputs, batch)
    for unit in range(heads if part == "query" else groups):
        with changed(resolve(model, f"L1.head_{part}_output[{unit}]"), zeros):
            after = read(model, outputs, batch)
        readers = {unit} if part == "query" else {head for head in range(heads) if head * groups // heads == unit}
        touched = {head for head, site in enumerate(outputs) if not torch.equal(before[site], after[site])}
        assert touched == readers


def split_by_hand(model: PreTrainedModel, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, each (B, S, heads, d), as the modeling file of each family splits its fused projection."""
    heads, groups = heads_of(model)
    b, s, width = fused.shape
    if model.config.model_type == "gpt2":
        q, k, v = fused.split(32, dim=2)
        return q.view(b, s, 4, 8), k.view(b, s, 4, 8), v.view(b, s, 4, 8)
    if model.config.model_type == "phi3":
        return (
            fused[..., :32].view(b, s, 4, 8),
            fused[..., 32:48].view(b, s, 2, 8),
            fused[..., 48:].view(b, s, 2, 8),
        )
    if model.config.model_type == "gpt_neox":
        q, k, v = fused.view(b, s, 4, 24).chunk(3, dim=-1)
        return q, k, v
    if model.config.model_type == "falcon" and groups == 2:
        split = fused.view(b, s, 2, 4, 8)  # two query heads, a key and a value per group
        return split[:, :, :, :-2].flatten(2, 3), split[:, :, :, -2], split[:, :, :, -1]
    if model.config.model_type == "falcon" and groups == 1:
        split = fused.view(b, s, 6, 8)
        return split[..., :-2, :], split[..., [-2], :], split[..., [-1], :]
    split = fused.view(b, s, heads, 3, width // heads // 3)  # bloom, falcon of the first kind
    return split[..., 0, :], split[..., 1, :], split[..., 2, :]


@pytest.mark.parametrize("name", FUSED)
def test_heads_of_a_fused_projection(name: str) -> None:
    model = model_of(name)
    batch = tiny_batch(model)
    path = resolve(model, "L1.query_output").path
    (fused,) = read(model, [f"path:{path}.output"], batch).values()
    for part, expected in zip(("query", "key", "value"), split_by_hand(model, fused), strict=True):
        sites = [f"L1.head_{part}_output[{head}]" for head in range(expected.shape[2])]
        values = read(model, [*sites, f"L1.{part}_output"], batch)
        for head, site in enumerate(sites):
            assert torch.equal(values[site], expected[:, :, head])
        assert torch.equal(values[f"L1.{part}_output"], expected.flatten(2))


def test_columns_are_slices_where_they_can_be() -> None:
    assert resolve(model_of("llama"), "L0.query_output").columns is None
    assert resolve(model_of("llama"), "L0.head_query_output[2]").columns == slice(16, 24)
    assert resolve(model_of("llama"), "L0.head_query_output[2,1]").columns == (*range(16, 24), *range(8, 16))
    assert resolve(model_of("gpt2"), "L0.key_output").columns == slice(32, 64)
    assert resolve(model_of("gpt_neox"), "L0.query_output").columns == (
        *range(8),
        *range(24, 32),
        *range(48, 56),
        *range(72, 80),
    )
    assert resolve(model_of("gpt_neox"), "L0.head_value_output[1]").columns == slice(40, 48)


def test_head_width_is_measured_not_divided() -> None:
    for name in ("qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt_oss"):
        assert resolve(model_of(name), "L0.head_output[1]").width == 12  # hidden_size // heads would be 8


# --- mixtures of experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOE)
def test_experts_contributions_sum_to_mlp_output(name: str) -> None:
    model = model_of(name)
    batch = tiny_batch(model, "left")
    tap = resolve(model, "L1.expert_output")
    assert tap.experts == (0, 1, 2, 3)
    assert tap.width == 4 * 32
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = tap.module.register_forward_pre_hook(lambda module, args: calls.append(args))
    values = read(model, ["L1.mlp_output"], batch)
    handle.remove()
    ((hidden, chosen, weights),) = calls  # (B*S, D), (B*S, top_k), (B*S, top_k)
    assert hidden.shape == (14, 32)
    assert chosen.shape == weights.shape == (14, 2)
    with torch.no_grad():
        contributions = [
            tap.module.forward(hidden, chosen, weights * (chosen == expert)) for expert in tap.experts or ()
        ]
    for expert, contribution in enumerate(contributions):
        routed = (chosen == expert).any(dim=-1)
        assert (contribution[~routed] == 0).all(), "an expert adds nothing to tokens that are not routed to it"
        assert (contribution[routed].abs().sum(dim=-1) > 0).all()
    torch.testing.assert_close(sum(contributions).view(2, 7, 32), values["L1.mlp_output"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MOE)
def test_router_output_unchanged_changes_nothing(name: str) -> None:
    model = model_of(name)
    batch = tiny_batch(model, "left")
    before = logits(model, batch)
    with changed(resolve(model, "L1.router_output"), lambda x: x.clone()):
        torch.testing.assert_close(logits(model, batch), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MOE)
def test_router_output_decides_which_experts_are_used(name: str) -> None:
    model = model_of(name)
    batch = tiny_batch(model)
    calls: list[Tensor] = []
    handle = resolve(model, "L1.expert_output").module.register_forward_pre_hook(
        lambda module, args: calls.extend(args[1:])
    )
    wanted = torch.tensor([0.0, 5.0, 0.0, 5.0 + torch.log(torch.tensor(3.0))])  # odds 1 : 3
    with changed(resolve(model, "L1.router_output"), lambda x: wanted.expand_as(x)):
        logits(model, batch)
    handle.remove()
    chosen, weights = calls
    assert (chosen == torch.tensor([3, 1])).all()
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25]).expand_as(weights))


# --- where the blocks are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_the_backbone_is_called_once_per_forward(name: str) -> None:
    model = model_of(name)
    place = locate(model)
    calls: list[int] = []
    handle = place.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    logits(model, tiny_batch(model))
    handle.remove()
    assert len(calls) == 1
    assert model.get_submodule(f"{place.layers_path}.1") is place.layers[1]
    assert place.n_layers == 3


@pytest.mark.parametrize("name", TINY)
def test_a_bare_backbone_is_found_too(name: str) -> None:
    model_type, _ = CONFIGURATIONS[name]
    with torch.random.fork_rng(devices=[]):
        bare = AutoModel.from_config(model_of(name).config, dtype=torch.float32).eval()
    place = locate(bare)
    assert place.model_type == model_type
    assert place.path == ("decoder" if model_type == "opt" else "")
    calls: list[int] = []
    handle = place.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    values = read(bare, ["L2.block_output"], tiny_batch(bare))
    handle.remove()
    assert values["L2.block_output"].shape == (2, 7, 32)
    assert len(calls) == 1


def test_negative_layers_count_from_the_end() -> None:
    tap = resolve(model_of("llama"), "L-1.mlp_output")
    assert tap.site.layer == 2
    assert tap.path == "model.layers.2.mlp"


def test_granite_scales_what_it_writes() -> None:
    model = model_of("granite")
    assert resolve(model, "L0.mlp_write").scale == pytest.approx(0.22)
    assert resolve(model, "L0.attention_write").scale == pytest.approx(0.22)
    assert resolve(model, "L0.mlp_output").scale == 1.0
