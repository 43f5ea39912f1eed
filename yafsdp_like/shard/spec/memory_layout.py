"""From units and their schedule to the memory plan: which regions there are, and where in them each unit's slots lie.

Integers only: it works before anything is allocated, on the meta device too. ``runtime/allocated_memory.py``
allocates what is planned here. A unit is known by its number in the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yafsdp_like.memory import vmm
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, FlatLayout, Segment, aligned
from yafsdp_like.memory.plan import Clock, LiveRange, MemoryPlan, Region, SlotPlace, SlotRequest, place
from yafsdp_like.shard.spec.schedule import Schedule, gather_starts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from yafsdp_like.shard.spec.unit_spec import UnitLayout, UnitSpec

GATHER_SLOTS, GRADIENT_SLOTS = "gather slots", "gradient slots"  # the two regions that slots share
FORWARD_SHARD = "forward shards"  # a kind, of one region a unit
STAGING, COLUMN = "staging", "gather staging"
UPLOAD, DOWNLOAD = "upload staging", "download staging"
GATHERED, REDUCED = "staging of gathered chunks", "staging of reduced chunks"
GRANULE_END = "granule end"
MAX_UPLOAD_NBYTES = 64 << 20  # larger parameters are cast in parts
MAX_STAGING_NBYTES = 256 << 20
MAX_GRANULE_NBYTES = 16 << 20  # slots end at a granule


@dataclass(frozen=True)
class MemoryLayout:
    """The plan and what it was made from: units and their layouts, and the slots' places in the shared regions."""

    plan: MemoryPlan
    units: tuple[UnitSpec, ...]
    layouts: tuple[UnitLayout, ...]
    gather_places: Mapping[int, Segment]
    gradient_places: Mapping[int, Segment]

    def with_region(self, region: Region) -> MemoryLayout:
        """Return the same with one more region, which execution asked for."""
        return replace(self, plan=replace(self.plan, regions=(*self.plan.regions, region)))


def plan_memory(units: Sequence[UnitSpec], schedule: Schedule, beside: Sequence[UnitSpec] = ()) -> MemoryLayout:
    """Plan the memory of ``units``, numbered as in ``schedule``; those ``beside`` have slots on the same granules."""
    guard_nbytes = max(unit.needs.guard_nbytes for unit in units)
    granule_nbytes = 0 if guard_nbytes else _granule_nbytes([*units, *beside])
    layouts = [unit.layout(granule_nbytes) for unit in units]
    pairs = list(zip(units, layouts, strict=True))
    gather_live = _gather_ranges(units, schedule)
    in_flight = max(unit.reductions_in_flight for unit in units)
    gradient_live = [schedule.gradient_range(i, in_flight) for i in range(len(units))]
    gather_places, gather_nbytes = _place_shared(
        units,
        [0 if u.needs.own_gather_slot else aligned(x.gathered_nbytes, granule_nbytes or 1) for u, x in pairs],
        gather_live,
    )
    gradient_places, gradient_nbytes = _place_shared(
        units, [0 if u.needs.own_gradient_slot else x.gradient_slot.nbytes for u, x in pairs], gradient_live
    )
    regions = [shard for unit, layout in pairs for shard in _shards(unit, layout, granule_nbytes)]
    regions += [
        Region(GATHER_SLOTS, GATHER_SLOTS, gather_nbytes, granule_nbytes=granule_nbytes),
        Region(GRADIENT_SLOTS, GRADIENT_SLOTS, gradient_nbytes, any(u.ranks.is_mapped for u in units)),
    ]
    scratch = _staging(units, layouts) + _host_staging(units, layouts) + _layout_staging(units)
    regions += [replace(region, nbytes=region.nbytes + 2 * guard_nbytes) for region in scratch]
    regions += [region for unit, layout in pairs for region in own_slot_regions(unit, layout)]
    regions += granule_end(GRANULE_END, regions)
    slots = [SlotPlace(units[i].name, GATHER_SLOTS, part, gather_live[i]) for i, part in gather_places.items()]
    slots += [SlotPlace(units[i].name, GRADIENT_SLOTS, part, gradient_live[i]) for i, part in gradient_places.items()]
    transports = tuple(dict.fromkeys(u.ranks.transport for u in units))
    clock = Clock((GATHER_SLOTS, GRADIENT_SLOTS), schedule.phases)
    plan = MemoryPlan(units[0].ranks.num_ranks, tuple(regions), tuple(slots), transports, clocks=(clock,))
    if guard_nbytes:
        plain = plan_memory(without_debug(units), schedule).plan
        plan = replace(plan, debug_nbytes=plan.nbytes - plain.nbytes)
    return MemoryLayout(plan, tuple(units), tuple(layouts), gather_places, gradient_places)


def without_debug(units: Sequence[UnitSpec]) -> list[UnitSpec]:
    """Return the units as they would be planned without debug mode."""
    return [replace(u, needs=replace(u.needs, guards=False, own_gather_slot=False)) for u in units]


def _granule_nbytes(units: Sequence[UnitSpec]) -> int:
    """Return the largest granule that divides all chunks which slots can alias; 0 where there are none."""
    chunks = [p.aliasable_nbytes for unit in units if unit.ranks.reads_shards for p in unit.params]
    in_granules = [nbytes for nbytes in chunks if nbytes and nbytes % vmm.GRANULE_NBYTES == 0]
    return math.gcd(MAX_GRANULE_NBYTES, *in_granules) if in_granules else 0


def _shards(unit: UnitSpec, layout: UnitLayout, granule_nbytes: int) -> list[Region]:
    aliased, mapped, on_host = layout.aliased_shard.nbytes, unit.ranks.is_mapped, unit.on_host
    kept, rest = layout.forward_shard.nbytes, layout.remainder.nbytes
    return [
        *([Region(f"{unit.name}.aliased_shard", "compute_shard", aliased, True, granule_nbytes)] if aliased else []),
        Region(f"{unit.name}.main_shard", "main_shard", layout.main_shard.nbytes, on_host=on_host),
        *([Region(f"{unit.name}.remainder", "remainder", rest, on_host=True)] if rest else []),
        Region(f"{unit.name}.compute_shard", "compute_shard", layout.compute_shard.nbytes, mapped),
        Region(
            f"{unit.name}.grad_shard", "grad_shard", layout.grad_shard.nbytes, transient=not on_host, on_host=on_host
        ),
        *([Region(f"{unit.name}.forward_shard", FORWARD_SHARD, kept)] if kept else []),
    ]


def _staging(units: Sequence[UnitSpec], layouts: Sequence[UnitLayout]) -> list[Region]:
    """Plan where peers' chunks of one unit's gradients wait for their sum.

    Large units go through it in several rounds, and the smallest round has a piece of each peer. Over several hosts, a
    column of sums lies behind them, and one of all-gathers in memory of its own (``comm/hierarchical.py``).
    """
    needs = [
        max(layout.gradient_slot.nbytes, (unit.ranks.world_size - 1) * ALIGNMENT_NBYTES)
        for unit, layout in zip(units, layouts, strict=True)
        if unit.ranks.is_mapped and layout.gradient_slot.nbytes
    ]
    sums = max(unit.ranks.reduce_column_nbytes for unit in units)
    column = max(unit.ranks.gather_column_nbytes for unit in units)
    staging = [Region(STAGING, STAGING, min(max(needs), MAX_STAGING_NBYTES) + sums)] if needs else []
    return staging + ([Region(COLUMN, STAGING, column, mapped=True)] if column else [])


def _host_staging(units: Sequence[UnitSpec], layouts: Sequence[UnitLayout]) -> list[Region]:
    """Plan what main shards are cast from, and gradients are reduced to, between host memory and the slots.

    See [Note: shards on the host] in ``runtime/host_shard.py``.
    """
    offloaded = [(unit, layout) for unit, layout in zip(units, layouts, strict=True) if unit.on_host]
    casts = [p for unit, _ in offloaded for p in unit.params if p.main_dtype != p.compute_dtype]
    upload = max((p.shards.chunk_numel * p.main_dtype.itemsize for p in casts), default=0)
    download = max((layout.grad_shard.nbytes for _, layout in offloaded), default=0)
    nbytes = {UPLOAD: min(aligned(upload), MAX_UPLOAD_NBYTES), DOWNLOAD: download}
    return [Region(name, "host staging", size) for name, size in nbytes.items() if size]


def _layout_staging(units: Sequence[UnitSpec]) -> list[Region]:
    """Plan where chunks wait that do not lie together in slots. See [Note: layout staging]."""
    gathered = reduced = 0
    for unit in units:
        permuted = [p for p in unit.params if p.shards.is_permuted]
        full = [p.full_nbytes for p in permuted if not p.pieces]
        sums = [p.shards.chunk_numel * p.grad_dtype.itemsize for p in permuted if p.has_gradient]
        gathered = max(gathered, FlatLayout.pack(full).nbytes)
        reduced = max(reduced, FlatLayout.pack(sums).nbytes)
    return [Region(name, "layout staging", size) for name, size in ((GATHERED, gathered), (REDUCED, reduced)) if size]


def granule_end(name: str, regions: Sequence[Region]) -> list[Region]:
    """Return, as a region, the unused end of the last granule of the block that peers map of ``regions``."""
    in_block = sum(region.nbytes for region in regions if region.mapped and not region.granule_nbytes)
    left = aligned(in_block, vmm.GRANULE_NBYTES) - in_block
    return [Region(name, GRANULE_END, left, mapped=True)] if left else []


def own_slot_regions(unit: UnitSpec, layout: UnitLayout) -> list[Region]:
    """Return the regions of slots that ``unit`` shares with nobody."""
    regions = []
    if unit.needs.own_gather_slot:
        regions.append(Region(f"{unit.name}.gather_slot", "spill", layout.gather_slot.nbytes))
    if unit.needs.own_gradient_slot:
        kind = "unsynced gradients" if unit.needs.unsynced_gradients else "spill"
        mapped = unit.ranks.is_mapped
        nbytes = aligned(layout.gradient_slot.nbytes, vmm.GRANULE_NBYTES if mapped else 1)
        regions.append(Region(f"{unit.name}.gradient_slot", kind, nbytes, mapped))
    return regions


def _gather_ranges(units: Sequence[UnitSpec], schedule: Schedule) -> list[LiveRange]:
    numbers = range(len(units))
    forward = gather_starts(
        schedule.forward_order,
        [schedule.forward_start(i) for i in numbers],
        {i: unit.forward_prefetch for i, unit in enumerate(units)},
    )
    backward = gather_starts(
        schedule.backward_order,
        [schedule.backward_start(i) for i in numbers],
        {i: unit.backward_prefetch for i, unit in enumerate(units)},
    )
    return [schedule.gather_range(i, forward[i], backward[i], unit.residency) for i, unit in enumerate(units)]


def _place_shared(
    units: Sequence[UnitSpec], nbytes: Sequence[int], live: Sequence[LiveRange]
) -> tuple[dict[int, Segment], int]:
    """Place the slots that have bytes in one region; return where, and the bytes of all."""
    numbers = [i for i, size in enumerate(nbytes) if size]
    segments, total = place([SlotRequest(units[i].name, nbytes[i], live[i]) for i in numbers])
    return dict(zip(numbers, segments, strict=True)), total
