"""Directions, scopes, injection, ablation and the gradient probe, against hooks written by hand."""

from __future__ import annotations

import pytest
import torch

from defenses.batch import Batch as Microbatch
from defenses.batch import Example, collate
from defenses.errors import VectorError
from defenses.plans import (
    Directions,
    Scope,
    ablation,
    gradient_probe,
    injection,
    joint_injection,
    scope_columns,
    selects,
)
from intervene import AllTokens, fingerprint, intervene
from tests.tiny import TINY

WIDTH = 32
IGNORED = -100


def example(prompt, response, index=0, template=()):
    """Tokens of a prompt, then of a response that is learned; `template` lists positions."""
    ids = (*prompt, *response)
    labels = (*(IGNORED for _ in prompt), *response)
    marks = tuple(position in template for position in range(len(ids)))
    return Example(ids, labels, index, template=marks if template else ())


def two_rows():
    # <s> user(T) a b end(T) assistant(T) | r r r end(T)      and a shorter one
    first = example((1, 5, 10, 11, 6, 7), (20, 21, 22, 6), 0, template=(1, 4, 5, 9))
    second = example((1, 5, 12, 6, 7), (30, 31, 6), 1, template=(1, 3, 4, 7))
    return collate([first, second], pad_token_id=0)


def packed_row():
    """Two samples in one row of 12 columns, the second at column 5, and 2 of padding."""
    ids = torch.tensor([[1, 10, 11, 20, 21, 1, 12, 30, 31, 32, 0, 0]])
    labels = torch.tensor([[IGNORED] * 3 + [20, 21] + [IGNORED] * 2 + [30, 31, 32] + [IGNORED] * 2])
    sample = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2])
    return Microbatch(
        input_ids=ids,
        labels=labels,
        attention_mask=(sample >= 0).long(),
        sample=sample,
        indices=torch.tensor([0, 1]),
        poison=torch.tensor([-1, -1], dtype=torch.int8),
        template=torch.zeros_like(ids, dtype=torch.bool),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]),
    )


def directions(*layers, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    return Directions({layer: torch.randn(WIDTH, generator=generator) for layer in layers}, **fields)


def run(model, batch):
    """Logits; without a cache, beside which transformers does not keep the samples of a packed row apart."""
    return model(**{**batch.inputs(), "use_cache": False}).logits


def mask_of(columns, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, line in enumerate(columns.tolist()):
        mask[row, [column for column in line if column >= 0]] = True
    return mask


def by_hand(model, batch, changes):
    """Logits with `changes[layer](h)` in place of each block's output, by torch's own hooks."""
    handles = [
        model.model.layers[layer].register_forward_hook(lambda _m, _i, out, change=change: change(out))
        for layer, change in changes.items()
    ]
    try:
        return run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


# --- scopes -----------------------------------------------------------------------------------------------------------


def test_scopes_by_hand():
    batch = two_rows()
    assert scope_columns(batch, Scope.RESPONSE).tolist() == [[6, 7, 8], [5, 6, -1]]
    assert scope_columns(batch, Scope.RESPONSE_SHIFTED).tolist() == [[5, 6, 7, 8], [4, 5, 6, -1]]
    assert scope_columns(batch, Scope.ALL).tolist() == [[2, 3, 6, 7, 8], [2, 5, 6, -1, -1]]


def test_scopes_of_packed_rows_begin_anew_with_each_sample():
    batch = packed_row()
    assert scope_columns(batch, Scope.RESPONSE).tolist() == [[3, 4, 7, 8, 9]]
    assert scope_columns(batch, Scope.RESPONSE_SHIFTED).tolist() == [[2, 3, 6, 7, 8]]
    assert scope_columns(batch, Scope.ALL).tolist() == [[1, 2, 3, 4, 6, 7, 8, 9]]
    second = torch.tensor([False, True])
    assert scope_columns(batch, Scope.RESPONSE, chosen=second).tolist() == [[7, 8, 9]]


def test_the_first_token_of_a_sample_is_never_in_a_scope_even_if_it_is_learned():
    everything = Example((9, 10, 11), (9, 10, 11), 0)
    batch = collate([everything], pad_token_id=0)
    assert scope_columns(batch, Scope.RESPONSE).tolist() == [[1, 2]]
    assert scope_columns(batch, Scope.RESPONSE_SHIFTED).tolist() == [[1]]
    assert scope_columns(batch, Scope.ALL).tolist() == [[1, 2]]


def test_a_label_on_the_first_token_of_a_packed_sample_marks_nothing_in_the_sample_before_it():
    batch = packed_row()
    batch.labels[0, 5] = 1
    assert scope_columns(batch, Scope.RESPONSE_SHIFTED).tolist() == [[2, 3, 6, 7, 8]]


def test_a_batch_without_response_tokens_gives_empty_plans_and_still_runs():
    batch = collate([example((1, 10, 11), ())], pad_token_id=0)
    columns = scope_columns(batch, Scope.RESPONSE)
    assert columns.tolist() == [[-1]]
    assert not selects(columns)
    model = TINY["llama"]()
    plan, leaf = gradient_probe(1, columns, WIDTH)
    plans = [injection(directions(1), 1.0, columns=columns), ablation(directions(1), columns=columns), plan]
    assert plans == [(), (), ()]
    with intervene(model, plan, prompt=batch.prompt(columns)):
        loss = run(model, batch).sum()
        (gradient,) = torch.autograd.grad(loss, [leaf], materialize_grads=True)
    assert gradient.shape == (1, 1, WIDTH)
    assert not gradient.any()


@pytest.mark.parametrize("text", ["response", "response_shifted", "all"])
def test_scopes_are_named_by_text(text):
    assert Scope(text).value == text


# --- injection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("make", [two_rows, packed_row])
def test_injection_is_the_hand_written_hook(scope, make):
    model, batch = TINY["llama"](), make()
    chosen = directions(0, 2)
    columns = scope_columns(batch, scope)
    mask = mask_of(columns, batch.input_ids.shape)[..., None]
    expected = by_hand(model, batch, {layer: lambda h, v=v: h + 3.0 * v * mask for layer, v in chosen.vectors.items()})
    with intervene(model, injection(chosen, 3.0, columns=columns), prompt=batch.prompt(columns)) as applied:
        logits = run(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert [report.tokens for report in applied.report()] == [int(mask.sum())] * 2
    assert not torch.allclose(logits, run(model, batch))


def test_strengths_per_row():
    model, batch = TINY["llama"](), two_rows()
    chosen, strengths = directions(1), torch.tensor([0.0, 2.5])
    columns = scope_columns(batch, Scope.RESPONSE)
    mask = mask_of(columns, batch.input_ids.shape)[..., None]
    vector = chosen.at(1)
    expected = by_hand(model, batch, {1: lambda h: h + strengths[:, None, None] * vector * mask})
    with intervene(model, injection(chosen, strengths), prompt=batch.prompt(columns)):
        logits = run(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_relative_strength_is_a_fraction_of_each_tokens_norm():
    model, batch = TINY["llama"](), two_rows()
    chosen = directions(1)
    columns = scope_columns(batch, Scope.ALL)
    mask = mask_of(columns, batch.input_ids.shape)[..., None]
    unit = chosen.unit().at(1)
    expected = by_hand(model, batch, {1: lambda h: h + 0.5 * h.norm(dim=-1, keepdim=True) * unit * mask})
    with intervene(model, injection(chosen, 0.5, relative=True), prompt=batch.prompt(columns)):
        logits = run(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_relative_doses_of_several_traits_are_of_the_stream_before_any_of_them(order):
    model, batch = TINY["llama"](), two_rows()
    traits = [directions(1, seed=1), directions(0, 1, seed=2), directions(1, seed=3)]
    doses = [0.8, -0.3, 2.0]
    columns = scope_columns(batch, Scope.ALL)
    mask = mask_of(columns, batch.input_ids.shape)[..., None]

    def moved(layer, of):
        total = sum(dose * one.unit().at(layer) for one, dose in of if layer in one.layers)
        return lambda h: h + h.norm(dim=-1, keepdim=True) * total * mask

    pairs = list(zip(traits, doses, strict=True))
    expected = by_hand(model, batch, {0: moved(0, pairs), 1: moved(1, pairs)})
    chosen = [[held[place] for place in order] for held in (traits, doses)]
    plan = joint_injection(*chosen, relative=True, columns=columns)
    assert len(plan) == 2
    with intervene(model, plan, prompt=batch.prompt(columns)):
        logits = run(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_several_injections_that_are_not_relative_are_those_of_each():
    model, batch = TINY["llama"](), two_rows()
    traits = [directions(1, seed=1), directions(0, 1, seed=2)]
    columns = scope_columns(batch, Scope.RESPONSE)
    seen = []
    for plan in (
        joint_injection([*traits, directions(2)], [2.0, -1.0, 0.0], columns=columns),
        (*injection(traits[0], 2.0), *injection(traits[1], -1.0)),
    ):
        with intervene(model, plan, prompt=batch.prompt(columns)):
            seen.append(run(model, batch))
    assert torch.equal(*seen)


def test_relative_doses_that_cancel_leave_nothing_and_one_alone_stays_what_it_was():
    v = directions(1)
    assert joint_injection([v, v], [0.7, -0.7], relative=True) == ()
    assert joint_injection([v, v], [0.7, 0.7], relative=True, columns=torch.tensor([[-1]])) == ()
    [alone] = joint_injection([v, directions(2)], [0.7, 0.0], relative=True)
    assert torch.equal(alone.edit.vector, v.at(1)) and alone.edit.strength == 0.7 and alone.edit.relative


def test_injection_at_other_positions_steers_generation():
    model, batch = TINY["llama"](), collate([example((1, 10, 11, 12, 13, 14, 15, 16), ())], 0)
    chosen = directions(2)
    expected = by_hand(model, batch, {2: lambda h: h + 4.0 * chosen.at(2)})
    with intervene(model, injection(chosen, 4.0, positions=AllTokens())):
        logits = run(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


# --- ablation ---------------------------------------------------------------------------------------------------------


def test_ablation_removes_the_span():
    model, batch = TINY["llama"](), two_rows()
    traits = [directions(0, 1, seed=1), directions(0, 1, seed=2)]
    columns = scope_columns(batch, Scope.ALL)
    mask = mask_of(columns, batch.input_ids.shape)[..., None]

    def removed(layer):
        span = torch.stack([trait.at(layer) for trait in traits], 1)
        projector = span @ torch.linalg.inv(span.T @ span) @ span.T  # (D, D)
        return lambda h: torch.where(mask, h - h @ projector, h)

    expected = by_hand(model, batch, {0: removed(0), 1: removed(1)})
    with intervene(model, ablation(traits, columns=columns), prompt=batch.prompt(columns)):
        logits = run(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_along_an_ablated_direction():
    model, batch = TINY["llama"](), two_rows()
    chosen = directions(1)
    columns = scope_columns(batch, Scope.RESPONSE)
    probe, leaf = gradient_probe(1, columns, WIDTH)  # in plan order: what reaches the stream before the ablation
    with intervene(model, (*probe, *ablation(chosen)), prompt=batch.prompt(columns)):
        run(model, batch).square().sum().backward()
    along = leaf.grad @ chosen.unit().at(1)
    assert along.abs().max() < 1e-4 * leaf.grad.norm(dim=-1).max()
    assert leaf.grad.norm(dim=-1)[columns >= 0].min() > 0


def test_ablation_of_a_basis_and_of_a_mapping_agree():
    basis = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(4))
    one, other = ablation(basis, layers=[1]), ablation({1: basis})
    torch.testing.assert_close(one[0].featurizer.frame(), other[0].featurizer.frame())
    with pytest.raises(VectorError, match="no layers were given"):
        ablation(basis)
    with pytest.raises(VectorError, match=r"layer 2: there are directions of layer 1\."):
        ablation({1: basis}, layers=[2])
    with pytest.raises(VectorError, match="2 directions that are linearly dependent"):
        ablation([directions(1), directions(1)])


# --- gradient probe ---------------------------------------------------------------------------------------------------


def loss_of(model, batch):
    logits = run(model, batch)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())


def gradient_by_hand(model, batch, layer):
    held = []
    handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: held.append(out))
    loss = loss_of(model, batch)
    handle.remove()
    return torch.autograd.grad(loss, held)[0]  # (B, S, D)


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("make", [two_rows, packed_row])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_leaf_receives_the_gradient_of_the_stream(scope, make, layer):
    model, batch = TINY["llama"](), make()
    expected = gradient_by_hand(model, batch, layer)
    columns = scope_columns(batch, scope)
    plan, leaf = gradient_probe(layer, columns, WIDTH)
    with intervene(model, plan, prompt=batch.prompt(columns)):
        loss = loss_of(model, batch)
        loss.backward()
    torch.testing.assert_close(loss, loss_of(model, batch))
    rows = torch.arange(len(columns))[:, None]
    wanted = expected[rows, columns.clamp_min(0)] * (columns >= 0)[..., None]
    torch.testing.assert_close(leaf.grad, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [two_rows, packed_row])
def test_gradients_are_the_same_with_checkpointing(make, reentrant):
    batch, chosen = make(), directions(0, 1)
    columns = scope_columns(batch, Scope.RESPONSE)
    found = []
    for checkpointing in (False, True):
        model = TINY["llama"]().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # new name
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        probe, leaf = gradient_probe(1, columns, WIDTH)
        plan = (*injection(chosen, 2.0, relative=True), *probe, *ablation(directions(2)))
        with intervene(model, plan, prompt=batch.prompt(columns)):
            loss_of(model, batch).backward()
        found.append({"leaf": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert found[0]["leaf"].abs().sum() > 0


# --- directions -------------------------------------------------------------------------------------------------------


def test_directions_are_kept_in_order_as_copies_in_fp32():
    vector = torch.ones(4, dtype=torch.bfloat16)
    made = Directions({3: vector, 1: 2 * vector})
    vector.zero_()
    assert made.layers == (1, 3)
    assert made.width == 4
    assert made.norms == {1: 4.0, 3: 2.0}
    assert made.at(3).dtype == torch.float32
    assert made.only([3]).layers == (3,)
    assert made.unit().norms == {1: 1.0, 3: 1.0}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "Directions of no layer"),
        ({-1: torch.ones(4)}, "layer -1: layers count blocks from 0"),
        ({True: torch.ones(4)}, "layer True: layers count"),
        ({1: torch.zeros(4)}, "layer 1: its norm is 0"),
        ({1: torch.tensor([1.0, float("nan")])}, "layer 1: 1 of 2 entries are NaN"),
        ({1: torch.tensor([1e300], dtype=torch.float64)}, "layer 1: 1 of 1 entries are NaN or infinite"),
        ({1: torch.ones(2, 4)}, r"layer 1: found torch.float32 \(2, 4\)"),
        ({1: [1.0, 2.0]}, "layer 1: found list"),
        ({1: torch.ones(4), 2: torch.ones(5)}, r"several widths: \{1: 4, 2: 5\}"),
    ],
)
def test_directions_that_are_none(vectors, message):
    with pytest.raises(VectorError, match=message):
        Directions(vectors)


def test_directions_are_checked_against_the_model():
    model, other = TINY["llama"](), TINY["llama"](seed=1)
    made = directions(0, 2, fingerprint=fingerprint(model), model="tiny")
    assert made.check(model) is made
    with pytest.raises(VectorError, match=rf"model tiny \({fingerprint(model)}\): this one is .*{fingerprint(other)}"):
        made.check(other)
    assert made.check(other, force="the same base, further trained") is made
    with pytest.raises(VectorError, match=r"L3.block_output.*layers 0-2"):
        directions(3).check(model)
    with pytest.raises(VectorError, match="it is 5 wide, this model is 32 wide"):
        Directions({1: torch.ones(5)}).check(model)
    with pytest.raises(VectorError, match=r"layer 1: there are those of layers 0, 2\. Use"):
        made.at(1)
