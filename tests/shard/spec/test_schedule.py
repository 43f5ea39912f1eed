"""Schedules of small module trees, as literal lists: when units start and end, and when their slots are live.

A tree is written as nested calls; `unit(u, ...)` is a module that needs unit `u`, whose children are given in order.
"""

from collections.abc import Mapping, Sequence

import pytest
import torch.nn as nn

from yafsdp_like.memory.plan import LiveRange
from yafsdp_like.shard.spec.schedule import Residency, Schedule, UnitSpan, gather_starts, schedule_of

RESHARDED = Residency(after_forward=False, after_backward=False)
KEPT_AFTER_FORWARD = Residency(after_forward=True, after_backward=False)
KEPT_FOR_GOOD = Residency(after_forward=True, after_backward=True)


class Tree(nn.Module):
    """A module that needs some units, and its children in order of registration."""

    def __init__(self, units: Sequence[int], children: Sequence["Tree"]) -> None:
        super().__init__()
        self.units = units
        for index, child in enumerate(children):
            self.add_module(str(index), child)


def unit(index: int, *children: Tree) -> Tree:
    return Tree([index], children)


def plain(*children: Tree) -> Tree:
    return Tree([], children)


def schedule(root: Tree) -> Schedule:
    """The schedule of a tree whose units are numbered from 0."""
    units_of = {module: module.units for module in root.modules() if isinstance(module, Tree)}
    num_units = 1 + max(index for units in units_of.values() for index in units)
    return schedule_of(root, units_of, num_units)


def spans(root: Tree) -> list[tuple[int, int]]:
    return [(span.first, span.last) for span in schedule(root).spans]


def chain(num: int) -> Tree:
    """A root without parameters over `num` units in a row."""
    return plain(*(unit(index) for index in range(num)))


def rooted_chain(num: int) -> Tree:
    """Unit 0 is the root, units 1 to `num` its blocks."""
    return unit(0, *(unit(1 + index) for index in range(num)))


# --- spans ---


def test_units_of_a_chain_start_and_end_one_by_one() -> None:
    assert spans(chain(4)) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert schedule(chain(4)).num_ticks == 4


def test_a_root_spans_all_units_below_it() -> None:
    assert spans(rooted_chain(3)) == [(0, 3), (1, 1), (2, 2), (3, 3)]
    assert schedule(rooted_chain(3)).num_ticks == 4


def test_nested_parents_span_their_children() -> None:
    root = unit(0, unit(1, unit(2), unit(3)), unit(4), plain(unit(5, plain(unit(6)))))
    assert spans(root) == [(0, 6), (1, 3), (2, 2), (3, 3), (4, 4), (5, 6), (6, 6)]


def test_units_are_numbered_by_their_owner_not_by_the_tree() -> None:
    """Prevents: taking the number of a unit for its place in the order."""
    assert spans(plain(unit(2), unit(0), unit(1))) == [(1, 1), (2, 2), (0, 0)]


def test_a_list_group_spans_from_its_first_module_to_its_last() -> None:
    """An embedding and a head that are one unit (0) hold it while the blocks between them (1, 2) run."""
    assert spans(plain(unit(0), unit(1), unit(2), unit(0))) == [(0, 3), (1, 1), (2, 2)]


def test_a_tied_module_needs_two_units() -> None:
    """A head (2) whose weight is the embedding's (0) keeps that unit live until it has run."""
    assert spans(plain(unit(0), unit(1), Tree([2, 0], []))) == [(0, 2), (1, 1), (2, 2)]


def test_a_module_shared_in_the_tree_counts_from_its_first_parent_to_the_last_other_one() -> None:
    """A second place below one parent need not be a second call, which would cost a gather that waits.

    Below another unit it runs while that one holds its bytes.
    """
    shared = unit(1)
    assert spans(plain(unit(0), shared, unit(2), shared)) == [(0, 0), (1, 1), (2, 2)]
    assert spans(plain(unit(0, shared), unit(2, shared))) == [(0, 1), (1, 2), (2, 2)]
    assert spans(plain(unit(0, shared), unit(2, plain(shared)), unit(3))) == [(0, 1), (1, 2), (2, 2), (3, 3)]


def test_modules_without_a_unit_take_no_time() -> None:
    assert spans(plain(plain(), unit(0), plain(plain()), unit(1), plain())) == [(0, 0), (1, 1)]


# --- orders ---


@pytest.mark.parametrize(
    ("root", "forward", "backward"),
    [
        (chain(4), [0, 1, 2, 3], [3, 2, 1, 0]),
        (rooted_chain(3), [0, 1, 2, 3], [0, 3, 2, 1]),
        (unit(0, unit(1, unit(2), unit(3)), unit(4)), [0, 1, 2, 3, 4], [0, 4, 1, 3, 2]),
        (unit(1, unit(0)), [1, 0], [1, 0]),
        (plain(unit(2), unit(0), unit(1)), [2, 0, 1], [1, 0, 2]),
        (plain(unit(0), unit(1), unit(2), unit(0)), [0, 1, 2], [0, 2, 1]),
        (plain(unit(0), unit(1), Tree([2, 0], [])), [0, 1, 2], [0, 2, 1]),
    ],
    ids=["chain", "rooted chain", "nested", "child numbered first", "numbered backwards", "list group", "tied"],
)
def test_backward_mirrors_forward_with_parents_first(root: Tree, forward: list[int], backward: list[int]) -> None:
    assert schedule(root).forward_order == forward
    assert schedule(root).backward_order == backward


def test_units_of_one_module_keep_their_numbers_order() -> None:
    """Prevents: an order that depends on hashes where two units start and end at the same ticks."""
    both = Schedule((UnitSpan(0, 0), UnitSpan(0, 0)), 1)
    assert both.forward_order == both.backward_order == [0, 1]


# --- live ranges ---


def test_backward_mirrors_the_ticks_of_forward() -> None:
    """Forward takes ticks 0 to 3, backward 4 to 7: unit (first, last) runs in backward from 7 - last to 7 - first."""
    it = schedule(rooted_chain(3))
    assert [it.forward_start(u) for u in range(4)] == [0, 1, 2, 3]
    assert [it.backward_start(u) for u in range(4)] == [4, 6, 5, 4]
    assert [it.backward_end(u) for u in range(4)] == [7, 6, 5, 4]


@pytest.mark.parametrize(
    ("residency", "intervals"),
    [
        (RESHARDED, ((0, 1), (5, 6))),
        (KEPT_AFTER_FORWARD, ((0, 6),)),
        (KEPT_FOR_GOOD, ((0, 7),)),
        (Residency(after_forward=False, after_backward=True), ((0, 7),)),
    ],
)
def test_a_gather_slot_is_live_as_long_as_its_unit_stays(
    residency: Residency, intervals: tuple[tuple[int, int], ...]
) -> None:
    """Unit 1 of four ticks, gathered when the unit before it starts: at 0 in forward, and at 5 in backward."""
    it = schedule(rooted_chain(3))
    assert it.gather_range(1, forward_from=0, backward_from=5, residency=residency) == LiveRange(intervals)


def test_gather_ranges_of_a_chain() -> None:
    it = schedule(chain(4))
    forward = gather_starts(it.forward_order, [it.forward_start(u) for u in range(4)], {})
    backward = gather_starts(it.backward_order, [it.backward_start(u) for u in range(4)], {})
    assert [it.gather_range(u, forward[u], backward[u], RESHARDED).intervals for u in range(4)] == [
        ((0, 0), (6, 7)),
        ((0, 1), (5, 6)),
        ((1, 2), (4, 5)),
        ((2, 3), (4, 4)),
    ]


def test_a_gradient_slot_is_live_until_the_next_unit_is_done() -> None:
    it = schedule(rooted_chain(3))
    assert [it.gradient_range(u).intervals for u in range(4)] == [((4, 8),), ((6, 7),), ((5, 6),), ((4, 5),)]


# --- when gathers are issued ---


@pytest.mark.parametrize(
    ("prefetches", "issued"),
    [
        ({}, [0, 0, 1, 2, 3]),
        ({0: [1, 2], 1: [3], 2: [4]}, [0, 0, 0, 1, 2]),
        ({0: [1, 2, 3, 4]}, [0, 0, 0, 0, 0]),
        ({1: [4]}, [0, 0, 2, 2, 1]),
        ({3: [0, 2]}, [0, 0, 1, 2, 4]),
        ({0: []}, [0, 0, 1, 2, 3]),
    ],
    ids=["the next", "two ahead", "all at once", "not the next", "too late to help", "an empty list is none"],
)
def test_gathers_are_issued_when_the_unit_that_names_them_starts(
    prefetches: Mapping[int, Sequence[int]], issued: list[int]
) -> None:
    """In a chain of five; a unit that nobody names is gathered at its own start, and no list delays a gather."""
    assert gather_starts([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], prefetches) == issued


def test_gathers_follow_the_order_given_not_the_units_numbers() -> None:
    it = schedule(rooted_chain(3))
    assert it.backward_order == [0, 3, 2, 1]
    assert gather_starts(it.backward_order, [it.backward_start(u) for u in range(4)], {}) == [4, 5, 4, 4]
