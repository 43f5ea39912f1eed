"""The order of sequences: permutations whose state is one integer, the same for any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yafsdp_like.data import Batches, SequenceOrder

# Three epochs of seven sequences, seed 0.
GOLDEN = [2, 3, 5, 4, 0, 1, 6, 4, 3, 0, 5, 1, 6, 2, 3, 4, 0, 2, 6, 1, 5]

properties = settings(deadline=None, max_examples=60)  # no deadline: the machine may be busy
nums_sequences = st.integers(1, 300)
seeds = st.integers(-(2**70), 2**70)


@properties
@given(nums_sequences, seeds, st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(num_sequences: int, seed: int, epoch: int) -> None:
    order = SequenceOrder(num_sequences, seed)
    indices = order.indices(epoch * num_sequences, num_sequences)
    assert sorted(indices.tolist()) == list(range(num_sequences))


@properties
@given(nums_sequences, seeds, st.integers(0, 400), st.integers(0, 200))
def test_to_start_anywhere_is_not_to_have_stopped(num_sequences: int, seed: int, position: int, count: int) -> None:
    """From the middle of an epoch, over its end, in one call or one by one."""
    order = SequenceOrder(num_sequences, seed)
    whole = order.indices(0, position + count)
    assert order.indices(position, count).tolist() == whole[position:].tolist()
    assert whole[:20].tolist() == [int(order.indices(i, 1)[0]) for i in range(min(20, len(whole)))]


def test_the_order_is_what_it_was() -> None:
    """Prevents: a change of the arithmetic, after which every resumed run would see other text."""
    assert SequenceOrder(7, seed=0).indices(0, 21).tolist() == GOLDEN
    assert SequenceOrder(7, seed=None).indices(5, 9).tolist() == [5, 6, 0, 1, 2, 3, 4, 5, 6]


def test_epochs_and_seeds_differ_and_mix_well() -> None:
    """Neighbours land apart: what follows an index is close to evenly spread, as far as 10,000 draws can tell."""
    num = 10_000
    orders = [SequenceOrder(num, seed).indices(epoch * num, num) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order[:8]) for order in orders}) == 4
    for order in orders:
        fixed = int((order == np.arange(num)).sum())
        assert fixed < 10  # 1 is expected
        steps = np.diff(order.astype(np.int64))
        assert abs(np.abs(steps).mean() - num / 3) < num / 50
        quarters = np.histogram(order[: num // 4], bins=4, range=(0, num))[0]
        assert np.abs(quarters - num / 16).max() < 130  # 5 standard deviations


def test_all_orders_of_three_sequences_occur() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(600):
        order = tuple(SequenceOrder(3, 0).indices(3 * epoch, 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6 and min(counts.values()) > 50, counts


@properties
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.integers(0, 500), seeds)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    num_sequences: int, seq_len: int, rows: int, position: int, seed: int
) -> None:
    batches = Batches(np.arange(num_sequences * seq_len + 1, dtype=np.uint16), seq_len, seed)
    global_batch_size = 12 * rows
    alone = batches.batch(position, global_batch_size)
    for world_size in (2, 3, 12):
        ranks = [batches.batch(position, global_batch_size, rank, world_size) for rank in range(world_size)]
        for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))


def test_every_token_but_the_first_is_a_target_once_an_epoch() -> None:
    batches = Batches(np.arange(5 * 8 + 3, dtype=np.uint16), seq_len=8)  # two tokens at the end fill no sequence
    inputs, targets = batches.batch(0, 5)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (5, 8)
    assert torch.equal(inputs + 1, targets)
    assert sorted(targets.flatten().tolist()) == list(range(1, 41))


def test_batches_that_cannot_be_say_why() -> None:
    tokens = np.arange(9, dtype=np.uint16)
    batches = Batches(tokens, 8)
    for call, message in [
        (lambda: Batches(tokens, 9, name="the held-out text"), r"the held-out text has 9 tokens, .* seq_len \+ 1 = 10"),
        (lambda: Batches(tokens[:0], 1), "has 0 tokens"),
        (lambda: Batches(tokens, 0), "seq_len must be at least 1, found 0"),
        (lambda: batches.batch(0, 3, 0, 2), "positive multiple of the number of ranks, found 3 on 2 ranks"),
        (lambda: batches.batch(0, 0), "positive multiple"),
        (lambda: batches.batch(0, 2, 2, 2), r"rank must be in \[0, 2\), found 2"),
        (lambda: batches.batch(-1, 2), "must not be negative, found -1"),
        (lambda: SequenceOrder(0), "at least one sequence, found 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
