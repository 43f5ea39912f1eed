"""The slot map: every slot and every region is drawn once, where the plan puts it, and nothing lies over anything."""

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.serving_plan import plan_serving
from yafsdp_like.memory.layout import Segment, aligned
from yafsdp_like.memory.plan import KINDS, Clock, LiveRange, MemoryPlan, Phase, Region, SlotPlace, SlotRequest, place
from yafsdp_like.memory.slot_map import ALL, HOST, Panel, Rectangle, slot_map
from yafsdp_like.models import PRESETS

GATHER, GRADIENT = "gather slots", "gradient slots"
PHASES = (Phase("forward", 0, 3), Phase("backward", 4, 7), Phase("update", 8, 8))
CLOCK = Clock((GATHER, GRADIENT), PHASES)


def slots_of_units(first: int) -> st.SearchStrategy[list[tuple[int, LiveRange]]]:
    """Sizes and live ranges of slots, within ticks from ``first`` to the end of backward."""
    ticks = st.integers(first, 7)
    intervals = st.tuples(ticks, ticks).map(sorted).map(tuple)
    live_ranges = st.lists(intervals, min_size=1, max_size=3).map(tuple).map(LiveRange)
    return st.lists(st.tuples(st.integers(1, 5000), live_ranges), max_size=8)


kinds = st.sampled_from([kind for kind in KINDS if not kind.endswith("slots")])
others = st.lists(st.tuples(kinds, st.integers(0, 3000), st.sampled_from(["", "transient", "host"])), max_size=6)


@st.composite
def plans(draw: st.DrawFn) -> MemoryPlan:
    """Slots placed as any plan places them, between other regions."""
    regions, slots = [], []
    for kind, first in ((GATHER, 0), (GRADIENT, PHASES[1].first)):
        found = draw(slots_of_units(first))
        requests = [SlotRequest(f"unit{i}", nbytes, live) for i, (nbytes, live) in enumerate(found)]
        places, nbytes = place(requests)
        regions.append(Region(kind, kind, nbytes))
        slots += [SlotPlace(r.name, kind, segment, r.live) for r, segment in zip(requests, places, strict=True)]
    for index, (kind, nbytes, where) in enumerate(draw(others)):
        name = f"unit{index}.{kind}"
        regions.append(Region(name, kind, aligned(nbytes), transient=where == "transient", on_host=where == "host"))
    return MemoryPlan(2, tuple(draw(st.permutations(regions))), tuple(slots), clocks=(CLOCK,))


properties = settings(deadline=None, max_examples=100)


@properties
@given(plans())
def test_rectangles_that_overlap_in_time_do_not_overlap_in_address(plan: MemoryPlan) -> None:
    for panel in slot_map(plan):
        assert not [pair for pair in combinations(panel.rectangles, 2) if pair[0].overlaps(pair[1])]
        assert all(0 <= r.first <= r.last < panel.num_ticks for r in panel.rectangles)
        assert all(r.segment.end_nbytes <= panel.nbytes for r in panel.rectangles)


@properties
@given(plans())
def test_every_slot_is_drawn_once_at_its_place_and_at_all_its_ticks(plan: MemoryPlan) -> None:
    by_title = {panel.title: panel for panel in slot_map(plan)}
    for kind in (GATHER, GRADIENT):
        slots = [slot for slot in plan.slots if slot.kind == kind]
        drawn = by_title[kind].rectangles if slots else ()
        assert len({(r.name, r.first) for r in drawn}) == len(drawn)
        for slot in slots:
            mine = [r for r in drawn if r.name == slot.name]
            assert {r.segment for r in mine} == {slot.segment}
            assert [tick for r in mine for tick in range(r.first, r.last + 1)] == sorted(set(slot.live.ticks()))
            assert not any(a.last >= b.first for a, b in pairwise(mine))


@properties
@given(plans())
def test_the_map_has_the_bytes_of_the_plan(plan: MemoryPlan) -> None:
    panels = {panel.title: panel for panel in slot_map(plan)}
    on_device = plan.nbytes + plan.transient_nbytes
    assert sum(panel.nbytes for title, panel in panels.items() if title == ALL) == on_device
    assert sum(panel.nbytes for title, panel in panels.items() if title == HOST) == plan.host_nbytes
    bands = [r for title in (ALL, HOST) if title in panels for r in panels[title].rectangles]
    for region in plan.regions:
        if not region.kind.endswith("slots"):
            found = [r.segment.nbytes for r in bands if (r.name, r.kind) == (region.name, region.kind)]
            assert found == ([region.nbytes] if region.nbytes else [])


def test_the_map_of_a_known_plan() -> None:
    """Literal: shards below, slots one by one, and gradients on top from the end of their unit's backward on."""
    plan = MemoryPlan(
        2,
        (
            Region("a.grad_shard", "grad_shard", 256, transient=True),
            Region(GATHER, GATHER, 1024),
            Region("a.main_shard", "main_shard", 512),
            Region(GRADIENT, GRADIENT, 256),
        ),
        (
            SlotPlace("a", GATHER, Segment(0, 512), LiveRange(((0, 1), (5, 6)))),
            SlotPlace("b", GATHER, Segment(512, 512), LiveRange(((1, 3), (3, 5)))),
            SlotPlace("a", GRADIENT, Segment(0, 256), LiveRange(((5, 7),))),
        ),
        clocks=(CLOCK,),
    )
    tenants = (
        Rectangle("a", GATHER, Segment(0, 512), 0, 1),
        Rectangle("a", GATHER, Segment(0, 512), 5, 6),
        Rectangle("b", GATHER, Segment(512, 512), 1, 5),
    )
    gradient = Rectangle("a", GRADIENT, Segment(0, 256), 5, 7)
    everything = (
        Rectangle("a.main_shard", "main_shard", Segment(0, 512), 0, 8),
        *(Rectangle(r.name, r.kind, Segment(r.segment.offset_nbytes + 512, 512), r.first, r.last) for r in tenants),
        Rectangle("a", GRADIENT, Segment(1536, 256), 5, 7),
        Rectangle("a.grad_shard", "grad_shard", Segment(1792, 256), 6, 8),
    )
    assert slot_map(plan) == (
        Panel(ALL, 2048, PHASES, everything),
        Panel(GATHER, 1024, PHASES, tenants),
        Panel(GRADIENT, 256, PHASES, (gradient,)),
    )


def test_a_plan_without_slots_is_one_band_for_each_region() -> None:
    (panel,) = slot_map(MemoryPlan(1, (Region("a.main_shard", "main_shard", 512),)))
    assert panel.rectangles == (Rectangle("a.main_shard", "main_shard", Segment(0, 512), 0, 0),)
    assert slot_map(MemoryPlan(1, ())) == ()


def test_slots_that_share_bytes_by_no_schedule_are_one_band() -> None:
    """A pool of models: whichever is awake has them."""
    slots = tuple(SlotPlace(name, "weights", Segment(0, 512), LiveRange(((0, 0),))) for name in ("one", "other"))
    (panel,) = slot_map(MemoryPlan(1, (Region("weights", "weights", 512),), slots))
    assert panel.rectangles == (Rectangle("weights", "weights", Segment(0, 512), 0, 0),)


def test_the_map_of_a_serving_plan_has_a_clock_for_weights_and_one_for_activations() -> None:
    plan = plan_serving(PRESETS["8b"], EngineOptions(memory_limit_nbytes=12 << 30)).memory
    everything, weights, workspace = slot_map(plan)
    assert everything.nbytes == plan.nbytes
    assert [(phase.name, phase.first, phase.last) for phase in weights.phases] == [
        ("embed_tokens", 0, 0),
        ("layers", 1, 32),
        ("lm_head", 33, 33),
    ]
    assert [phase.name for phase in workspace.phases] == ["project", "attend", "output", "feed forward", "draw"]
    assert {r.name for r in everything.rectangles} >= {"kv slabs", "workspace", "logits", "tables"}
    assert {r.name for r in workspace.rectangles} >= {"hidden", "qkv", "gate_up"}
    for panel in (everything, weights, workspace):
        assert not [pair for pair in combinations(panel.rectangles, 2) if pair[0].overlaps(pair[1])]
