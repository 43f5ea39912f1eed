"""How far ahead to gather, from hand-made times in ms: what a step takes, and what is chosen."""

from collections.abc import Mapping, Sequence

import pytest

from yafsdp_like.shard.depth import Course, Depth, Times, choose, depths, step_ms

MIB = 1 << 20


def chain(num: int) -> Course:
    return Course(range(num), range(num)[::-1])


def rooted_chain(num: int) -> Course:
    """Unit 0 is a root that stays gathered, around `num` blocks."""
    return Course(range(num + 1), [0, *range(num, 0, -1)], stays={0}, outer={0})


def block(gather: float, compute: float, reduce: float = 0.0) -> Times:
    """Its backward computes twice what its forward does."""
    return Times(gather, compute, 2 * compute, reduce)


def of_plan(depth: Depth) -> int:
    """Bytes beyond the plan of the least depth, for slots of 1 MiB."""
    return (depth.gathers - 1 + depth.gradients - 2) * MIB


def chosen(times: Sequence[Times], course: Course, room_nbytes: int = 1 << 40, given: bool = False) -> Depth:
    candidates = depths(given)
    steps = {depth: step_ms(times, course, depth) for depth in candidates}
    return choose(steps, {depth: of_plan(depth) for depth in candidates}, room_nbytes)


# --- what a step takes ---


def test_gathers_that_hide_cost_the_first_one_only() -> None:
    """Four blocks: a gather, then 4 x 3 ms of forward and 4 x 6 of backward without a gap."""
    for depth in depths(False):
        assert step_ms([block(1, 3)] * 4, chain(4), depth) == 1 + 12 + 24


def test_gathers_longer_than_compute_make_the_step() -> None:
    """Six gathers of 10 in forward, the last block's forward, backward of the two that are still there, and of the
    other four each gathered while the one before runs. The first of these takes the bytes of the last block when its
    backward is done; all others but the first wait for the link only.
    """
    assert step_ms([block(10, 1)] * 6, chain(6), Depth()) == 6 * 10 + 1 + 2 + 4 * 10 + 2


def test_a_deeper_chain_spares_a_gather_where_forward_turns_into_backward() -> None:
    times = [block(10, 1)] * 6
    steps = [step_ms(times, chain(6), Depth(gathers)) for gathers in (1, 2, 3)]
    assert steps == [105, 95, 85]


def test_a_gather_waits_for_the_bytes_that_it_takes() -> None:
    """Two slots: the third block's gather starts when the first block is done, at 14, not when the link is free."""
    assert step_ms([Times(4, 10, 0, 0), Times(4, 1, 0, 0), Times(4, 1, 0, 0)], Course([0, 1, 2], []), Depth(1)) == 19
    assert step_ms([Times(4, 10, 0, 0), Times(4, 1, 0, 0), Times(4, 1, 0, 0)], Course([0, 1, 2], []), Depth(2)) == 16


def test_what_stays_gathered_is_gathered_once_and_takes_no_turns() -> None:
    """A root and one block: both gathers, then forward and backward of both without another."""
    assert step_ms([block(5, 1), block(5, 1)], rooted_chain(1), Depth()) == 5 + 5 + 1 + 2 + 2


def test_reductions_run_behind_the_next_backward() -> None:
    """Only the last one is not hidden."""
    assert step_ms([block(0, 1, reduce=1)] * 4, chain(4), Depth()) == 4 + 8 + 1


def test_a_backward_waits_for_the_reduction_that_frees_its_gradient_slot() -> None:
    """One of 9 ms behind the first of four blocks: with two slots the third waits for it, with three the fourth."""
    times = [Times(0, 0, 2, 1), Times(0, 0, 2, 1), Times(0, 0, 2, 1), Times(0, 0, 2, 9)]
    assert step_ms(times, chain(4), Depth(1, 2)) == 2 + 9 + 2 + 2 + 1
    assert step_ms(times, chain(4), Depth(1, 3)) == 2 + 9 + 2 + 1


def test_an_outer_unit_is_reduced_at_the_end() -> None:
    assert step_ms([block(0, 1, reduce=7), block(0, 1, reduce=1)], rooted_chain(1), Depth()) == 2 + 4 + 1 + 7


def test_a_frozen_unit_takes_no_gradient_slot() -> None:
    """Prevents: its backward waiting for a reduction that frees bytes it does not need."""
    times = [Times(0, 0, 2, 0), Times(0, 0, 2, 9), Times(0, 0, 2, 9)]
    assert step_ms(times, chain(3), Depth()) == 2 + 9 + 9


# --- what is chosen ---


@pytest.mark.parametrize("num", [4, 32])
def test_equal_blocks_whose_gathers_hide_need_the_least(num: int) -> None:
    assert chosen([block(1, 3, reduce=1)] * num, chain(num)) == Depth()
    assert chosen([block(1, 3, reduce=1)] * (num + 1), rooted_chain(num)) == Depth()


def test_gathers_longer_than_compute_are_helped_by_no_depth() -> None:
    """In a long chain, where the gather that the turn spares is less than a hundredth of the step."""
    assert chosen([block(10, 1)] * 300, chain(300)) == Depth()


def test_a_large_unit_among_small_ones_is_gathered_while_several_run() -> None:
    """Its gather takes as long as two or three of the others compute, which hide it if it may begin so early."""
    small, large = block(0.1, 1), block(2.8, 3)
    times = [small, small, small, small, large, small, small, small]
    assert chosen(times, chain(8)).gathers in (2, 3)
    assert chosen([small] * 8, chain(8)) == Depth()


def test_a_reduction_of_a_large_unit_is_hidden_by_a_third_gradient_slot() -> None:
    times = [block(0.1, 1, reduce=0.5)] * 10
    times[5] = block(0.1, 1, reduce=5)
    assert chosen(times, chain(10)) == Depth(1, 3)


def test_a_difference_below_a_hundredth_is_not_worth_memory() -> None:
    steps = {Depth(1): 100.9, Depth(2): 100.0, Depth(3): 99.95}
    assert choose(steps, {depth: of_plan(depth) for depth in steps}, 1 << 40) == Depth(1)
    assert choose({**steps, Depth(1): 101.1}, {depth: of_plan(depth) for depth in steps}, 1 << 40) == Depth(2)


@pytest.mark.parametrize(("room_mib", "expected"), [(-5, 1), (0, 1), (1, 2), (2, 3)])
def test_only_what_fits_is_chosen(room_mib: int, expected: int) -> None:
    """The least depth is what there is, so it fits even where the margin is used up."""
    steps = {Depth(1): 120.0, Depth(2): 110.0, Depth(3): 100.0}
    more: Mapping[Depth, int] = {depth: of_plan(depth) for depth in steps}
    assert choose(steps, more, room_mib * MIB) == Depth(expected)


def test_of_equal_steps_the_plan_of_fewest_bytes_wins() -> None:
    """Prevents: taking the deeper one for the larger, where slots of several sizes fit together better."""
    steps = {Depth(1): 120.0, Depth(2): 100.0, Depth(3): 100.0}
    assert choose(steps, {Depth(1): 0, Depth(2): 9 * MIB, Depth(3): 8 * MIB}, 1 << 40) == Depth(3)


def test_where_the_user_names_what_to_gather_only_gradient_slots_are_chosen() -> None:
    assert depths(True) == [Depth(1, 2), Depth(1, 3)]
    assert chosen([block(10, 1)] * 6, chain(6), given=True) == Depth()
