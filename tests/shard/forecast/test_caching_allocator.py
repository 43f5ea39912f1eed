"""PyTorch's allocator as arithmetic: what it maps, splits, joins and keeps, by hand on a few blocks.

Against GPUs it is compared in ``test_against_measurements.py``.
"""

from yafsdp_like.shard.forecast.caching_allocator import (
    LARGE_STEP_NBYTES,
    SMALL_STEP_NBYTES,
    CachingAllocator,
    reserved_nbytes,
)
from yafsdp_like.shard.forecast.storages import StepPlace, StorageTimeline

MIB = 1 << 20


def test_memory_is_mapped_in_steps_and_kept() -> None:
    allocator = CachingAllocator()
    found, block = allocator.take(30 * MIB)
    assert allocator.peak_reserved_nbytes == 2 * LARGE_STEP_NBYTES
    allocator.take(512)
    assert allocator.peak_reserved_nbytes == 2 * LARGE_STEP_NBYTES + SMALL_STEP_NBYTES
    found.give_back(block)
    allocator.take(35 * MIB)  # what was mapped behind it joins it
    assert allocator.peak_reserved_nbytes == 2 * LARGE_STEP_NBYTES + SMALL_STEP_NBYTES


def test_the_smallest_block_that_is_large_enough_is_taken_and_the_rest_stays_free() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.take(nbytes * MIB) for nbytes in (40, 20, 20, 40)]
    for index in (0, 2):
        found, block = blocks[index]
        found.give_back(block)
    _, taken = allocator.take(15 * MIB)
    assert taken.start == 60 * MIB  # in the hole of 20
    _, other = allocator.take(30 * MIB)
    assert other.start == 0
    assert allocator.take(10 * MIB)[1].start == 30 * MIB  # what the second has left
    assert allocator.peak_reserved_nbytes == 120 * MIB


def test_a_block_that_does_not_fit_between_others_is_mapped_behind_them() -> None:
    """Prevents: holes that count as if they were one."""
    allocator = CachingAllocator()
    blocks = [allocator.take(20 * MIB) for _ in range(4)]
    for index in (0, 2):
        found, block = blocks[index]
        found.give_back(block)
    allocator.take(40 * MIB)
    assert allocator.peak_reserved_nbytes == 120 * MIB


def test_an_emptied_cache_unmaps_whole_steps_which_are_mapped_again_first() -> None:
    allocator = CachingAllocator()
    found, block = allocator.take(50 * MIB)
    allocator.take(30 * MIB)
    found.give_back(block)
    allocator.empty_cache()
    assert allocator.peak_reserved_nbytes == 40 * MIB  # of the step that both share 10 MiB are free
    assert allocator.take(45 * MIB)[1].start == 0
    assert allocator.peak_reserved_nbytes == 80 * MIB


def test_a_run_reserves_what_its_steps_and_states_need() -> None:
    timeline, place = StorageTimeline(), StepPlace()
    first = timeline.birth(20 * MIB, place)
    timeline.birth(40 * MIB, place)
    timeline.death(first, place)
    timeline.birth(20 * MIB, place)  # where the first was
    assert reserved_nbytes([20 * MIB], [], timeline) == 120 * MIB  # 80, and a workspace of 32
    assert reserved_nbytes([20 * MIB], [60 * MIB], timeline) >= 160 * MIB
