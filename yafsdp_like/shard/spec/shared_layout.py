"""Plans of several models whose slots and staging lie in the same regions, each as large as any of them needs.

Integers only, as in ``memory_layout.py``. Models run one after the other, so each has its slots placed as if it were
alone; ``runtime/shared_slots.py`` says what happens where they do not.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from yafsdp_like.memory.plan import Clock, LiveRange, MemoryPlan, Phase, Region, SlotPlace
from yafsdp_like.shard.spec.memory_layout import (
    DOWNLOAD,
    GATHER_SLOTS,
    GATHERED,
    GRADIENT_SLOTS,
    GRANULE_END,
    REDUCED,
    STAGING,
    UPLOAD,
    MemoryLayout,
    granule_end,
    plan_memory,
    without_debug,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from yafsdp_like.shard.spec.schedule import Schedule
    from yafsdp_like.shard.spec.unit_spec import UnitSpec

SHARED_END = "granule end of slots"
# What the units of a model share, and in the order of one stream. Columns over several hosts are read by other ranks
# until their group's next barrier, which another model's ranks need not take part in.
_SHARED = (GATHER_SLOTS, GRADIENT_SLOTS, STAGING, UPLOAD, DOWNLOAD, GATHERED, REDUCED)


def plan_together(
    models: Mapping[str, tuple[Sequence[UnitSpec], Schedule]], held: Sequence[Region] = ()
) -> dict[str, MemoryLayout]:
    """Plan each model with its shards, and with the regions that all share: those ``held``, if they suffice."""
    every = [unit for units, _ in models.values() for unit in units]
    alone = {name: plan_memory(units, schedule, every) for name, (units, schedule) in models.items()}
    largest = _largest([layout.plan for layout in alone.values()])
    regions = list(held) if _suffice(held, largest) else largest
    names = tuple(models)
    layouts = {
        name: replace(layout, plan=replace(_with(layout.plan, regions), shared_by=names))
        for name, layout in alone.items()
    }
    if any(unit.needs.guards for unit in every):
        plain = plan_together({name: (without_debug(units), schedule) for name, (units, schedule) in models.items()})
        layouts = {name: _of_debug(layout, plain[name].plan) for name, layout in layouts.items()}
    return layouts


def shared_regions(plan: MemoryPlan) -> list[Region]:
    """Return the regions of a plan that models may share."""
    return [region for region in plan.regions if region.name in (*_SHARED, SHARED_END)]


def plan_of_all(plans: Mapping[str, MemoryPlan]) -> MemoryPlan:
    """Return the plan of all models that share slots, with what they share once, as if they ran in this order."""
    first, *_ = plans.values()
    own = [region for plan in plans.values() for region in _own(plan)]
    slots, phases, tick = list[SlotPlace](), list[Phase](), 0
    for name, plan in plans.items():
        slots += (replace(slot, live=_later(slot.live, tick)) for slot in plan.slots)
        for clock in plan.clocks:
            phases += (Phase(f"{name} {p.name}", p.first + tick, p.last + tick) for p in clock.phases)
        tick = phases[-1].last + 1
    return replace(
        first,
        regions=(*own, *_largest(list(plans.values()))),
        slots=tuple(slots),
        transports=tuple(dict.fromkeys(chain.from_iterable(plan.transports for plan in plans.values()))),
        keeps_gradients=any(plan.keeps_gradients for plan in plans.values()),
        clocks=(Clock(first.clocks[0].kinds, tuple(phases)),),
        debug_nbytes=0,
    )


def _own(plan: MemoryPlan) -> Iterator[Region]:
    shared = shared_regions(plan)
    return (region for region in plan.regions if region not in shared)


def _largest(plans: Sequence[MemoryPlan]) -> list[Region]:
    """Return each region that models share as large as any plan has it."""
    found = []
    for name in _SHARED:
        if regions := [region for plan in plans for region in plan.regions if region.name == name]:
            largest = max(regions, key=lambda region: region.nbytes)
            found.append(replace(largest, mapped=any(region.mapped for region in regions)))
    return found + granule_end(SHARED_END, found)


def _suffice(held: Sequence[Region], needed: Sequence[Region]) -> bool:
    """Return whether regions that are there already are what is needed, or larger."""
    there = {region.name: region for region in held}

    def is_there(region: Region) -> bool:
        found = there.get(region.name, region)
        return region.name in there and found.nbytes >= region.nbytes and replace(region, nbytes=found.nbytes) == found

    return all(is_there(region) for region in needed if region.name != SHARED_END)


def _with(plan: MemoryPlan, shared: Sequence[Region]) -> MemoryPlan:
    """Return a plan with the ``shared`` regions in the place of its own."""
    own = [region for region in _own(plan) if region.kind != GRANULE_END]
    return replace(plan, regions=(*own, *granule_end(GRANULE_END, own), *shared))


def _of_debug(layout: MemoryLayout, plain: MemoryPlan) -> MemoryLayout:
    return replace(layout, plan=replace(layout.plan, debug_nbytes=layout.plan.nbytes - plain.nbytes))


def _later(live: LiveRange, ticks: int) -> LiveRange:
    return LiveRange(tuple((first + ticks, last + ticks) for first, last in live.intervals))
