from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from defenses.batch import Example, collate
from defenses.batches import Batches, Order, check_cut, micro_batches, pack, require_packing
from defenses.errors import DataError
from tests.tiny import TINY


@pytest.mark.parametrize("bucket", [0, 3])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (12, 4), (7, 3), (5, 8), (1, 2), (50, 4)])
def test_every_example_comes_once_per_epoch(n, batch_size, bucket):
    order = Order(n, batch_size, 0, lengths=range(n), bucket=bucket)
    seen = [one for step in range(4 * n) for one in order.step(step)]
    for epoch in range(4 * batch_size):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert all(len(order.step(step)) == batch_size for step in range(3))


def test_the_last_step_shows_the_last_example():
    order = Order(10, 4, 0)
    assert [order.steps(epochs) for epochs in (0.1, 1, 2, 3)] == [1, 3, 5, 8]
    counts = Counter(one for step in range(order.steps(3)) for one in order.step(step))
    assert min(counts.values()) == 3 and sum(counts.values()) - 30 < 4


def test_a_step_is_a_function_of_its_number_and_the_seed():
    order = Order(20, 3, 5, lengths=range(20), bucket=2)
    forward = [order.step(step) for step in range(30)]
    again = Order(20, 3, 5, lengths=range(20), bucket=2)
    assert [again.step(step) for step in reversed(range(30))][::-1] == forward
    assert [Order(20, 3, 6).step(step) for step in range(3)] != [Order(20, 3, 5).step(step) for step in range(3)]
    epochs = [one for step in range(20) for one in Order(20, 3, 5).step(step)]
    assert epochs[:20] != epochs[20:40]


def test_the_order_is_the_same_on_every_machine():
    assert [Order(6, 2, 0).step(step) for step in range(3)] == [[2, 0], [4, 5], [1, 3]]


def test_buckets_put_like_lengths_together_in_random_order():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (203,), generator=draw).tolist()

    def spread(order, steps):
        found = [[lengths[one] for one in order.step(step)] for step in range(*steps)]
        return sum(max(one) - min(one) for one in found) / len(found)

    plain, bucketed = Order(203, 8, 1), Order(203, 8, 1, lengths=lengths, bucket=10)
    for epoch in (0, 1, 4):
        steps = (epoch * 203 // 8 + 1, (epoch + 1) * 203 // 8 - 1)
        assert spread(bucketed, steps) < spread(plain, steps) / 4
    firsts = [max(lengths[one] for one in bucketed.step(step)) for step in range(10)]
    assert firsts != sorted(firsts)


def test_orders_that_cannot_be():
    with pytest.raises(DataError, match="at least one example"):
        Order(0, 1, 0)
    with pytest.raises(DataError, match="bucket=2 with no lengths for 4 examples"):
        Order(4, 1, 0, bucket=2)
    with pytest.raises(DataError, match="counted from 0"):
        Order(4, 1, 0).step(-1)


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 4), (2, 3), (3, 2), (12, 1), (4, 3)])
def test_a_step_is_the_same_whatever_the_ranks(world, micro):
    step = [7, 3, 9, 1, 0, 2, 11, 5, 4, 8, 6, 10]
    ranks = [micro_batches(step, rank, world, micro) for rank in range(world)]
    assert [one for rank in ranks for part in rank for one in part] == step
    assert {len(rank) for rank in ranks} == {12 // (world * micro)}
    assert {len(part) for rank in ranks for part in rank} == {micro}


def test_a_cut_that_does_not_come_out_even():
    with pytest.raises(DataError, match=r"batch_size=12 over 2 ranks in micro-batches of 4: 12 is not a multiple of"):
        check_cut(12, 2, 4)
    with pytest.raises(DataError, match=r"Choose micro_batch_size 1, 2, 3, 6, or batch_size 8 or 16"):
        check_cut(12, 2, 4)
    with pytest.raises(DataError, match=r"Choose a number of ranks that divides 12, or batch_size 10 or 15"):
        check_cut(12, 5, 1)
    with pytest.raises(DataError, match=r"Rank 2 of 2"):
        micro_batches([0, 1], 2, 2, 1)
    with pytest.raises(DataError, match=r"batch_size=12 over 0 ranks"):
        check_cut(12, 0, 1)


def samples(*lengths, vocabulary=96):
    draw = torch.Generator().manual_seed(3)
    made = []
    for at, n in enumerate(lengths):
        ids = tuple(torch.randint(3, vocabulary, (n,), generator=draw).tolist())
        labels = tuple(-100 if 0 < column < n // 2 else token for column, token in enumerate(ids))
        made.append(Example(ids, labels, index=10 + at, template=(True,) + (False,) * (n - 1), poison=at == 1))
    return [replace(one, extra={"shift": float(at)}) for at, one in enumerate(made)]


def test_samples_go_where_they_first_fit():
    batch = pack(samples(5, 6, 4, 3, 1), 10, 0)
    assert batch.sample.tolist() == [[0] * 5 + [2] * 4 + [4], [1] * 6 + [3] * 3 + [-1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]]
    assert batch.attention_mask.tolist() == [[1] * 10, [1] * 9 + [0]]
    assert batch.indices.tolist() == [10, 11, 12, 13, 14]
    assert batch.poison.tolist() == [0, 1, 0, 0, 0]
    assert batch.extra["shift"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert batch.template.nonzero().tolist() == [[0, 0], [0, 5], [0, 9], [1, 0], [1, 6]]
    assert set(batch.inputs()) == {"input_ids", "position_ids"}
    starts = (batch.position_ids == 0) & (batch.sample >= 0)
    assert (batch.labels[starts] == -100).all()
    assert (batch.labels[~starts] != -100).sum() == sum(one.n_response for one in samples(5, 6, 4, 3, 1))


def test_what_does_not_fit():
    with pytest.raises(DataError, match=r"Pack example 10 .* 5 tokens into rows of 4"):
        pack(samples(5), 4, 0)
    with pytest.raises(DataError, match="no examples"):
        pack([], 4, 0)


def losses(model, batch):
    """Return the cross entropy of every labelled token, (B, S) at the token itself, 0 elsewhere."""
    with torch.no_grad():
        logits = model(**batch.inputs(), use_cache=False).logits
    each = cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none")
    return torch.nn.functional.pad(each, (1, 0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3", "mistral", "gemma3_text", "mixtral"])
def test_packed_samples_lose_what_they_lose_alone(name, attention):
    model = TINY[name]()
    model.set_attn_implementation(attention)
    require_packing(model)
    made = samples(9, 7, 1, 12, 4, 8)
    batch = pack(made, 20, 0)
    together = losses(model, batch)
    assert len(together) < len(made)
    for at, one in enumerate(made):
        alone = losses(model, collate([one], 0, multiple=1))[0]
        torch.testing.assert_close(together[batch.sample == at], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bloom", "opt", "falcon", "gpt_oss"])
def test_models_that_do_not_tell_packed_samples_apart_are_refused(name):
    model = TINY[name]().train()
    with pytest.raises(
        DataError, match=r"Pack several samples per row for .*neighbour's tokens.*Train without packing"
    ):
        require_packing(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packing_is_found_to_hold_in_half_precision(dtype):
    require_packing(TINY["llama"]().to(dtype))


def test_padded_and_packed_feeds_hold_the_same_samples():
    made = [replace(one, index=at) for at, one in enumerate(samples(9, 7, 5, 12, 4, 8))]
    order = Order(6, 4, 0)
    padded, packed = Batches(made, order, 2, 0), Batches(made, order, 2, 0, width=24)
    for step in range(3):
        for rank in range(2):
            one, other = padded.batches(step, rank, 2), packed.batches(step, rank, 2)
            assert [batch.indices.tolist() for batch in one] == [batch.indices.tolist() for batch in other]
            assert [batch.input_ids.shape[1] % 8 for batch in one] == [0]
            assert [len(batch.input_ids) for batch in other] == [1]
        cut = [
            index for rank in range(2) for batch in padded.batches(step, rank, 2) for index in batch.indices.tolist()
        ]
        assert cut == list(padded.indices(step)) == order.step(step)
    with pytest.raises(DataError, match="Order of 6 examples over 5"):
        Batches(made[:5], order, 2, 0)
