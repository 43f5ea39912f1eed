"""The memory plan: slots that meet never share bytes, the others do where they can, and the plan is the truth.

Memory laws are equations between named sizes: E an embedding, H a head, b a block, all multiples of the alignment.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranks import on_ranks
from tests.training import ours, world_mesh
from tests.twins import Twins
from tests.zoo import SPECIMENS, Chain, Specimen, layers_of, tokens
from yafsdp_like.memory import plan
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, Segment, aligned
from yafsdp_like.memory.plan import LiveRange, MemoryPlan, Region, SlotPlace, SlotRequest, live_nbytes_peak, place

properties = settings(deadline=None, max_examples=60)  # no deadline: the machine may be busy

NUM_TICKS = 8
ticks = st.integers(0, NUM_TICKS - 1)
intervals = st.tuples(ticks, ticks).map(sorted).map(tuple)
live_ranges = st.lists(intervals, min_size=1, max_size=3).map(tuple).map(LiveRange)
requests = st.lists(st.builds(SlotRequest, st.just("unit"), st.integers(1, 2000), live_ranges), max_size=10)
multiples = st.integers(1, 8).map(lambda count: count * ALIGNMENT_NBYTES)


def chain(sizes_nbytes: list[int]) -> list[SlotRequest]:
    """Gather slots of units that run one after the other, each gathered when the one before it starts.

    Unit i of n runs in forward at tick i and in backward at tick 2n - 1 - i.
    """
    n = len(sizes_nbytes)
    return [
        SlotRequest(f"unit{i}", nbytes, LiveRange(((max(0, i - 1), i), (max(n, 2 * n - 2 - i), 2 * n - 1 - i))))
        for i, nbytes in enumerate(sizes_nbytes)
    ]


# --- live ranges ---


@properties
@given(live_ranges, live_ranges)
def test_ranges_meet_where_they_share_a_tick(one: LiveRange, other: LiveRange) -> None:
    assert one.overlaps(other) == other.overlaps(one) == bool(set(one.ticks()) & set(other.ticks()))


def test_ranges_that_touch_at_their_ends_meet() -> None:
    """Prevents: half-open arithmetic on ticks, which would gather over what is still read in the same tick."""
    assert LiveRange(((0, 3),)).overlaps(LiveRange(((3, 5),)))
    assert not LiveRange(((0, 3),)).overlaps(LiveRange(((4, 5),)))


def test_a_range_meets_in_the_gaps_of_another_only_what_is_there() -> None:
    forward_and_backward = LiveRange(((0, 1), (8, 9)))
    assert not forward_and_backward.overlaps(LiveRange(((2, 7),)))
    assert forward_and_backward.overlaps(LiveRange(((2, 3), (7, 8))))


def test_an_interval_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(AssertionError, match="ends before it starts"):
        LiveRange(((0, 1), (5, 4)))


# --- placement ---


@settings(properties, max_examples=300)  # slots that nest inside others without meeting them are rare
@given(requests)
def test_slots_whose_ranges_meet_never_share_a_byte(slots: list[SlotRequest]) -> None:
    places, _ = place(slots)
    for i, j in combinations(range(len(slots)), 2):
        if slots[i].live.overlaps(slots[j].live):
            first, second = sorted((places[i], places[j]), key=lambda segment: segment.offset_nbytes)
            assert first.end_nbytes <= second.offset_nbytes


@properties
@given(requests)
def test_places_are_aligned_and_as_large_as_asked(slots: list[SlotRequest]) -> None:
    places, nbytes = place(slots)
    assert [segment.nbytes for segment in places] == [aligned(slot.nbytes) for slot in slots]
    assert all(segment.offset_nbytes % ALIGNMENT_NBYTES == 0 for segment in places)
    assert nbytes == max((segment.end_nbytes for segment in places), default=0)


@properties
@given(requests)
def test_the_extent_lies_between_the_peak_and_the_sum(slots: list[SlotRequest]) -> None:
    """live_nbytes_peak <= extent <= the sum of all slots; the peak is that of the tick with the most bytes live."""
    _, nbytes = place(slots)
    by_tick = [
        sum(aligned(slot.nbytes) for slot in slots if tick in set(slot.live.ticks())) for tick in range(NUM_TICKS)
    ]
    assert live_nbytes_peak(slots) == max(by_tick)
    assert max(by_tick) <= nbytes <= sum(aligned(slot.nbytes) for slot in slots)


@properties
@given(requests)
def test_equal_requests_get_equal_places_whatever_they_are_called(slots: list[SlotRequest]) -> None:
    """Prevents: ranks that place slots differently because something iterated a set or compared names."""
    renamed = [SlotRequest(f"other{i}", slot.nbytes, slot.live) for i, slot in enumerate(slots)]
    assert place(slots) == place(list(slots)) == place(renamed)


def test_places_of_a_known_case() -> None:
    """Literal, so that a change of placement is seen. B and D lie where A was before; C meets all of them."""
    a = SlotRequest("a", 1000, LiveRange(((0, 1),)))
    b = SlotRequest("b", 300, LiveRange(((2, 3),)))
    c = SlotRequest("c", 256, LiveRange(((1, 2),)))
    d = SlotRequest("d", 200, LiveRange(((2, 2),)))
    assert place([a, b, c, d]) == ((Segment(0, 1024), Segment(0, 512), Segment(1024, 256), Segment(512, 256)), 1280)


def test_no_request_takes_no_bytes() -> None:
    assert place([]) == ((), 0)
    assert live_nbytes_peak([]) == 0


@properties
@given(st.integers(2, 20), multiples)
def test_a_chain_of_equal_blocks_takes_two_blocks(n: int, b: int) -> None:
    """Total = 2 b: the block that computes and the one gathered ahead, however many there are."""
    slots = chain([b] * n)
    places, nbytes = place(slots)
    assert nbytes == live_nbytes_peak(slots) == 2 * b
    assert [segment.offset_nbytes for segment in places] == [i % 2 * b for i in range(n)]


@properties
@given(st.integers(1, 12), multiples, multiples, st.booleans())
def test_one_large_unit_at_an_end_costs_itself_and_one_block(n: int, b: int, extra: int, first: bool) -> None:
    """Total = embed + b < 2 embed, at either end of n blocks of b < embed; two slots of the largest take 2 embed."""
    embed = b + extra
    slots = chain([embed, *[b] * n] if first else [*[b] * n, embed])
    _, nbytes = place(slots)
    assert nbytes == live_nbytes_peak(slots) == embed + b < 2 * embed


@properties
@given(st.integers(1, 12), multiples, multiples, multiples)
def test_large_units_at_both_ends_share_bytes(n: int, b: int, more: int, extra: int) -> None:
    """Total = max(embed, head) + b for embed, head >= 2 b at the ends of n blocks: both lie in the same bytes."""
    embed, head = 2 * b + more, 2 * b + extra
    slots = chain([embed, *[b] * n, head])
    _, nbytes = place(slots)
    assert nbytes == live_nbytes_peak(slots) == max(embed, head) + b


@properties
@given(st.lists(multiples, min_size=2, max_size=30))
def test_a_chain_of_unequal_blocks_takes_the_two_neighbours_that_are_largest_together(sizes: list[int]) -> None:
    """Prevents: blocks of two kinds, as of dense and sparse layers, that cost a third more than is live at once."""
    slots = chain(sizes)
    _, nbytes = place(slots)
    assert nbytes == live_nbytes_peak(slots) == max(one + other for one, other in pairwise(sizes))


@properties
@given(st.lists(multiples, min_size=2, max_size=20), multiples)
def test_a_unit_that_stays_beside_a_chain_of_unequal_blocks_costs_itself(sizes: list[int], root: int) -> None:
    slots = [SlotRequest("root", root, LiveRange(((0, 2 * len(sizes) - 1),))), *chain(sizes)]
    assert place(slots)[1] == live_nbytes_peak(slots) == root + live_nbytes_peak(slots[1:])


def test_thousands_of_slots_are_placed_in_little_time() -> None:
    """Five thousand, by a bound of how many are placed, not by a clock; parents of unequal children are the hardest."""
    sizes = [ALIGNMENT_NBYTES * (1 + 7919 * i % 1000) for i in range(5000)]
    parents = [SlotRequest(f"parent{i}", sizes[-i], LiveRange(((2 * i, 2 * i + 5),))) for i in range(0, 5000, 3)]
    slots = [*parents, *chain(sizes)]
    placed = 0

    class Counting(plan._Placing):
        def in_order(self, order: Sequence[int], both_ends: bool) -> list[int]:
            nonlocal placed
            placed += len(order)
            return super().in_order(order, both_ends)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_Placing", Counting)
        _, nbytes = place(slots)
    assert len(slots) <= placed <= 2 * len(slots) + 3 * plan.MAX_PLACED
    assert nbytes <= 1.25 * live_nbytes_peak(slots)


# --- the plan ---


def test_the_total_is_the_sum_of_all_kinds() -> None:
    regions = (
        Region("a.main_shard", "main_shard", 512),
        Region("b.main_shard", "main_shard", 256),
        Region("gather slots", "gather slots", 1024),
    )
    plan = MemoryPlan(2, regions)
    assert plan.nbytes == 512 + 256 + 1024
    assert plan.nbytes_of("main_shard") == 512 + 256
    assert plan.nbytes_of("gather slots") == 1024
    assert plan.nbytes_of("spill") == 0


def test_a_kind_that_no_plan_has_is_refused() -> None:
    """Prevents: a misspelt kind that counts as zero bytes."""
    with pytest.raises(AssertionError, match="unknown kind of region: slots"):
        MemoryPlan(1, ()).nbytes_of("slots")


def test_the_printed_plan() -> None:
    """Kinds in a fixed order, those without bytes left out; one line per place with the units that share it."""
    live = LiveRange(((0, 1),))
    plan = MemoryPlan(
        4,
        (
            Region("root.main_shard", "main_shard", 768),
            Region("layers.0.main_shard", "main_shard", 3 * 2**19),
            Region("root.compute_shard", "compute_shard", 0),
            Region("layers.0.grad_shard", "grad_shard", 2**20, transient=True),
            Region("gather slots", "gather slots", 5 * 2**30),
            Region("layers.3.gather_slot", "spill", 2048),
        ),
        (
            *(SlotPlace(f"layers.{i}", "gather slots", Segment(0, 2**30), live) for i in range(6)),
            SlotPlace("root", "gather slots", Segment(2**30, 2**32), live),
        ),
    )
    assert str(plan) == (
        "memory plan of one rank of 4: 5.00 GiB (5,370,284,800 bytes), and 1.00 MiB from backward to zero_grad\n"
        "  main_shard             1.50 MiB   2 regions    what the optimizer updates; lower halves, where it is split\n"
        "  grad_shard             1.00 MiB   1 region     reduced gradients, from backward to zero_grad\n"
        "  gather slots           5.00 GiB   1 region     units' full parameters, shared by live range\n"
        "    [            0, 1,073,741,824)  layers.0, layers.1, layers.2, layers.3, ... (6 units)\n"
        "    [1,073,741,824, 5,368,709,120)  root\n"
        "  spill                  2.00 KiB   1 region     slots that the order of execution asked for beyond the plan"
    )


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (2**20 - 1024, "1,023.00 KiB"),
        (2**20 - 1, "1.00 MiB"),  # not 1,024.00 KiB
        (64_242_089_984, "59.83 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (2**51, "2,048.00 TiB"),
    ],
)
def test_bytes_are_printed_in_the_largest_unit_that_fits(nbytes: int, text: str) -> None:
    assert str(MemoryPlan(1, (Region("r", "spill", nbytes),))).startswith(
        f"memory plan of one rank of 1: {text} ({nbytes:,} bytes)"
    )


# --- the plan of a model ---

ROWS, WIDTH = 512, 32
lookup = Specimen(  # planned here, never run
    lambda: Chain([nn.Embedding(ROWS, WIDTH), *(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))]),
    tokens,
    layers_of,
)


@on_ranks()
def test_the_plan_of_a_model_is_an_equation_between_its_layers() -> None:
    """An embedding and four layers b on two ranks, in fp32: every byte has a term."""
    embed, b = 4 * ROWS * WIDTH, 4 * WIDTH * WIDTH
    model = lookup.wrap(lookup.fresh(), ours.fully_shard, mesh=world_mesh())
    plan = model.memory_plan()
    assert plan.nbytes_of("main_shard") == (embed + 4 * b) / 2
    assert plan.nbytes_of("compute_shard") == 0  # the same bytes as the main shard
    assert plan.nbytes_of("grad_shard") == (embed + 4 * b) / 2
    assert plan.nbytes_of("gather slots") == embed + b
    assert plan.nbytes_of("gradient slots") == embed + b
    assert str(plan) == (
        "memory plan of one rank of 2: 176.00 KiB (180,224 bytes), and 40.00 KiB from backward to zero_grad\n"
        "  over process group: on cpu, peer memory is used only when asked for\n"
        "  main_shard            40.00 KiB   5 regions    what the optimizer updates; lower halves, where it is split\n"
        "  grad_shard            40.00 KiB   5 regions    reduced gradients, from backward to zero_grad\n"
        "  gather slots          68.00 KiB   1 region     units' full parameters, shared by live range\n"
        "    [            0,         4,096)  layers.2, layers.4\n"
        "    [            0,        65,536)  layers.0\n"
        "    [        4,096,         8,192)  layers.3\n"
        "    [       65,536,        69,632)  layers.1\n"
        "  gradient slots        68.00 KiB   1 region     units' full gradients, shared by live range\n"
        "    [            0,         4,096)  layers.2, layers.4\n"
        "    [            0,        65,536)  layers.0\n"
        "    [        4,096,         8,192)  layers.3\n"
        "    [       65,536,        69,632)  layers.1"
    )


@pytest.mark.parametrize("name", SPECIMENS)
@on_ranks()
def test_the_plan_is_what_the_arenas_hold(name: str) -> None:
    """plan.nbytes == arena.nbytes, from before the first step to after it, and no byte beyond the plan."""
    twins = Twins(SPECIMENS[name])
    planned = twins.sharded.memory_plan()
    twins.train(0, 1)
    report = twins.sharded.memory_report()
    assert twins.sharded.memory_plan() == planned
    assert report.arena_nbytes == planned.nbytes
    assert report.spills == ()


@on_ranks()
def test_a_plan_can_be_drawn_before_there_is_memory() -> None:
    """Prevents: planning that needs what it plans for. Sizes are those of the same model with memory."""
    plans = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = lookup.build()
        plans.append(lookup.wrap(model, ours.fully_shard, mesh=world_mesh()).memory_plan())
    assert plans[0] == plans[1]
