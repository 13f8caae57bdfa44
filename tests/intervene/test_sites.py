"""Site: its text form, its equality, its errors."""

from __future__ import annotations

import pytest

from intervene.errors import InterveneError, UnknownComponent
from intervene.sites import COMPONENTS, HEAD_COMPONENTS, LAYERLESS, Site


@pytest.mark.parametrize(
    ("text", "component", "layer", "units"),
    [
        ("L3.mlp_output", "mlp_output", 3, None),
        ("L0.block_input", "block_input", 0, None),
        ("L-1.block_output", "block_output", -1, None),
        ("L3.head_value_output[2,5]", "head_value_output", 3, (2, 5)),
        ("L3.head_value_output[5,2]", "head_value_output", 3, (5, 2)),
        ("L12.mlp_neurons[7]", "mlp_neurons", 12, (7,)),
        ("embedding_output", "embedding_output", None, None),
        ("final_norm_output[0,1]", "final_norm_output", None, (0, 1)),
        ("path:encoder.layers.2.linear1.output", "path:encoder.layers.2.linear1.output", None, None),
        ("path:gru.input[3]", "path:gru.input", None, (3,)),
    ],
)
def test_text_form_round_trips(text: str, component: str, layer: int | None, units: tuple[int, ...] | None) -> None:
    site = Site.parse(text)
    assert site == Site(component, layer, units)
    assert str(site) == text
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_every_component_round_trips(name: str) -> None:
    site = Site(name) if name in LAYERLESS else Site(name, 2)
    assert Site.parse(str(site)) == site


def test_parse_returns_a_site_as_it_is() -> None:
    site = Site("mlp_output", 1)
    assert Site.parse(site) is site


def test_spaces_are_ignored_around_the_text_and_between_units() -> None:
    assert Site.parse(" L3.head_output[2, 5] ") == Site("head_output", 3, (2, 5))


def test_alias_equals_the_full_name() -> None:
    short, full = Site.parse("L3.head_output[1]"), Site.parse("L3.head_attention_value_output[1]")
    assert short == full
    assert hash(short) == hash(full)
    assert str(short) == "L3.head_attention_value_output[1]"


def test_units_become_a_tuple_of_int() -> None:
    assert Site("mlp_neurons", 0, [1, 2]).units == (1, 2)  # type: ignore[arg-type]


def test_head_components_are_those_with_head_in_their_name() -> None:
    assert {
        "head_attention_value_output",
        "head_query_output",
        "head_key_output",
        "head_value_output",
    } == HEAD_COMPONENTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L3.mlp_outptu", r"Component 'mlp_outptu': there is none of that name\. Did you mean .*mlp_output"),
        ("L3.zzzz", r"Component 'zzzz': there is none of that name\. Known: "),
        ("path:encoder.linear1", r"must say which side it means\. Write path:encoder\.linear1\.output"),
    ],
)
def test_unknown_component(text: str, message: str) -> None:
    with pytest.raises(UnknownComponent, match=message):
        Site.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp_output", r"exists once per layer, and no layer was given\. Write 'L0\.mlp_output'"),
        ("L0.embedding_output", r"belongs to no layer\. Write 'embedding_output'"),
        ("L0.path:gru.input", r"belongs to no layer"),
        ("L3.head_output[]", r"empty brackets"),
        ("L3.head_output[1,1]", r"units must be distinct numbers from 0, found \[1, 1\]"),
        ("L3.head_output[-1]", r"units must be distinct numbers from 0, found \[-1\]"),
        ("", r"not understood"),
    ],
)
def test_malformed_sites(text: str, message: str) -> None:
    with pytest.raises(InterveneError, match=message):
        Site.parse(text)


def test_empty_units_are_refused() -> None:
    with pytest.raises(InterveneError, match="Leave units out for all of them"):
        Site("head_output", 0, ())
