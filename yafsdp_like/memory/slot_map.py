"""The slot map: a memory plan as rectangles of time × address. Integers only: how they are drawn is not decided here.

A panel is a range of addresses over a clock. The first one stacks everything that a device holds; each region that
slots share has a panel of its own, on the scale of its slots; what lies in host memory has one too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.plan import KINDS, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yafsdp_like.memory.plan import MemoryPlan, Region, SlotPlace

ALL, HOST = "device memory", "host memory"
WHOLE_TIME = (Phase("as long as the model lives", 0, 0),)


@dataclass(frozen=True)
class Rectangle:
    """A region, or a unit in its slot: it has the bytes ``segment`` of a panel from tick ``first`` to ``last``."""

    name: str
    kind: str
    segment: Segment
    first: int
    last: int

    def overlaps(self, other: Rectangle) -> bool:
        """Return whether both have some byte at some tick."""
        return self.first <= other.last and other.first <= self.last and self.segment.overlaps(other.segment)


@dataclass(frozen=True)
class Panel:
    """Rectangles of the addresses ``[0, nbytes)`` and the ticks of ``phases``, which follow each other from 0 on."""

    title: str
    nbytes: int
    phases: tuple[Phase, ...]
    rectangles: tuple[Rectangle, ...]

    @property
    def num_ticks(self) -> int:
        """Ticks of all phases."""
        return self.phases[-1].last + 1


def slot_map(plan: MemoryPlan) -> tuple[Panel, ...]:
    """Return the panels of a plan: of the device, of each region that slots share, and of host memory.

    Regions are stacked by kind, in the order of ``KINDS``; those that PyTorch's allocator holds for a part of a step
    lie on top, from the end of their unit's backward on, or all the time where recorded steps add to them.
    """
    zooms = [panel for region in plan.regions if (panel := _zoom(plan, region)) is not None]
    places = {kind: index for index, kind in enumerate(KINDS)}
    regions = sorted((r for r in plan.regions if r.nbytes), key=lambda r: (r.transient, places[r.kind]))
    on_device, on_host = ([r for r in regions if r.on_host == host] for host in (False, True))
    clock = plan.clocks[0].phases if plan.clocks else WHOLE_TIME
    panels = [_stack(ALL, on_device, clock, zooms, plan)] if on_device else []
    return (*panels, *zooms, *([_stack(HOST, on_host, clock, [], plan)] if on_host else []))


def _zoom(plan: MemoryPlan, region: Region) -> Panel | None:
    """A region that slots share by time, with a rectangle for each interval of each slot; None for any other."""
    slots = [slot for slot in plan.slots if slot.kind == region.name and slot.segment.nbytes]
    phases = plan.phases_of(region.name)
    if not (slots and phases):
        return None
    rectangles = tuple(rectangle for slot in slots for rectangle in _intervals_of(slot))
    return Panel(region.name, region.nbytes, phases, rectangles)


def _intervals_of(slot: SlotPlace) -> Iterator[Rectangle]:
    """Yield a rectangle for each interval; intervals that meet are one."""
    merged: list[list[int]] = []
    for first, last in sorted(slot.live.intervals):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return (Rectangle(slot.name, slot.kind, slot.segment, first, last) for first, last in merged)


def _stack(
    title: str, regions: Sequence[Region], clock: tuple[Phase, ...], zooms: Sequence[Panel], plan: MemoryPlan
) -> Panel:
    """Regions one above the other; those whose slots go by the same clock are shown slot by slot."""
    by_slot = {panel.title: panel.rectangles for panel in zooms if panel.phases == clock}
    starts = _gradient_starts(plan)
    end, offset, found = clock[-1].last, 0, list[Rectangle]()
    for region in regions:
        if region.name in by_slot:
            found += (
                replace(inner, segment=Segment(offset + inner.segment.offset_nbytes, inner.segment.nbytes))
                for inner in by_slot[region.name]
            )
        else:
            first = starts.get(region.name, starts[""]) if region.transient else 0
            found.append(Rectangle(region.name, region.kind, Segment(offset, region.nbytes), first, end))
        offset += region.nbytes
    return Panel(title, offset, clock, tuple(found))


def _gradient_starts(plan: MemoryPlan) -> dict[str, int]:
    """Return the tick at which each unit's backward ends, by its gradient shard's name; "" for any other unit.

    A gradient slot is live until the tick after that.
    """
    slots = [slot for slot in plan.slots if slot.kind == "gradient slots" and not plan.keeps_gradients]
    ends = {f"{slot.name}.grad_shard": max(last for _, last in slot.live.intervals) - 1 for slot in slots}
    return {"": min(ends.values(), default=0)} | ends
