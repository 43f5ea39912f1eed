"""Sizes that steps are padded to."""

import random

import pytest

from yafsdp_like.inference.plan.step_sizes import StepBuckets, StepSize

LIMITS = [(1, 1), (1, 40), (4, 16), (33, 33), (100, 512), (256, 2048), (1024, 8192)]


def random_size(draw: random.Random, buckets: StepBuckets) -> StepSize:
    """Of any step that the limits allow: every sequence has a token at least, every chunk two."""
    num_sequences = draw.randint(1, buckets.max_batch_size)
    num_chunks = draw.randint(0, min(num_sequences, buckets.max_batch_tokens - num_sequences))
    least = num_sequences + num_chunks
    num_tokens = draw.randint(least, buckets.max_batch_tokens) if num_chunks else num_sequences
    return StepSize(num_tokens, num_sequences - num_chunks, num_chunks, draw.randint(0, num_sequences))


@pytest.mark.parametrize("limits", LIMITS)
def test_every_step_has_a_size_that_holds_it_with_little_padding(limits: tuple[int, int]) -> None:
    buckets, draw = StepBuckets(*limits), random.Random(0)
    sizes = {*buckets.decode, *buckets.mixed}
    for _ in range(2000):
        size = random_size(draw, buckets)
        fit = buckets.fit(size)
        assert fit in sizes and buckets.fit(fit) == fit
        assert all(most >= n for most, n in zip(vars(fit).values(), vars(size).values(), strict=True))
        assert fit.num_tokens <= max(size.num_tokens + 16, 1.34 * size.num_tokens)
        assert fit.num_tokens <= limits[1] and fit.num_drawing <= limits[0]


def test_steps_that_only_decode_have_sizes_of_their_own() -> None:
    def sizes(most: int) -> list[int]:
        return [size.num_single for size in StepBuckets(most, 2048).decode]

    assert sizes(1) == [1]
    assert sizes(4) == [1, 2, 4]
    assert sizes(33) == [1, 2, 4, 8, 16, 24, 32, 33]
    assert sizes(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    assert StepBuckets(33, 2048).fit(StepSize.decode(25)) == StepSize.decode(32)


def test_a_prompt_that_goes_on_has_no_rows_for_decoding_and_drawing() -> None:
    assert StepBuckets(256, 2048).fit(StepSize(2048, 0, 1)) == StepSize(2048, 0, 8)
    assert StepBuckets(256, 2048).fit(StepSize(544, 32, 1, 33)) == StepSize(576, 32, 32, 64)
