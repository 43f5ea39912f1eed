"""From units and their schedule to the memory plan: which regions there are, and where in them each unit's slots lie.

Integers only: it works before anything is allocated, on the meta device too. ``allocated_memory.py`` makes it memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yafsdp_like.memory import vmm
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, Segment, aligned
from yafsdp_like.memory.plan import LiveRange, MemoryPlan, Region, SlotPlace, SlotRequest, place
from yafsdp_like.shard.spec.schedule import Residency, gather_starts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from yafsdp_like.shard.runtime.unit_spec import UnitLayout
    from yafsdp_like.shard.runtime.unit_state import Unit
    from yafsdp_like.shard.runtime.unit_tree import UnitTree

GATHER_SLOTS, GRADIENT_SLOTS = "gather slots", "gradient slots"  # the two regions that slots share
STAGING, COLUMN = "staging", "gather staging"
MAX_STAGING_NBYTES = 256 << 20
MAX_GRANULE_NBYTES = 16 << 20  # slots end at a granule


@dataclass(frozen=True)
class MemoryLayout:
    """The plan and what it was made from: the units' layouts, and the slots' places in the shared regions."""

    plan: MemoryPlan
    layouts: Mapping[Unit, UnitLayout]
    gather_places: Mapping[Unit, Segment]
    gradient_places: Mapping[Unit, Segment]

    def with_region(self, region: Region) -> MemoryLayout:
        """The same with one more region, which execution asked for."""
        return replace(self, plan=replace(self.plan, regions=(*self.plan.regions, region)))


def plan_memory(tree: UnitTree) -> MemoryLayout:
    """The plan for the units as they are now."""
    units, schedule = tree.units, tree.schedule
    granule_nbytes = _granule_nbytes(units)
    layouts = {unit: unit.plan_layout(granule_nbytes) for unit in units}
    gather_live = _gather_ranges(tree)
    gradient_live = {unit: schedule.gradient_range(i) for i, unit in enumerate(units)}
    gather = {
        u: aligned(x.gathered_nbytes, granule_nbytes or 1) for u, x in layouts.items() if not u.needs.own_gather_slot
    }
    gradient = {u: x.gradient_slot.nbytes for u, x in layouts.items() if not u.needs.own_gradient_slot}
    gather_places, gather_nbytes = _place_shared(gather, gather_live)
    gradient_places, gradient_nbytes = _place_shared(gradient, gradient_live)
    regions = [shard for unit in units for shard in _shards(unit, layouts[unit], granule_nbytes)]
    regions += [
        Region(GATHER_SLOTS, GATHER_SLOTS, gather_nbytes, granule_nbytes=granule_nbytes),
        Region(GRADIENT_SLOTS, GRADIENT_SLOTS, gradient_nbytes, any(u.transport.mapped is not None for u in units)),
    ]
    regions += _staging(layouts)
    regions += [region for unit in units for region in own_slot_regions(unit, layouts[unit])]
    regions += _granule_end(regions)
    slots = [SlotPlace(u.name, GATHER_SLOTS, segment, gather_live[u]) for u, segment in gather_places.items()]
    slots += [SlotPlace(u.name, GRADIENT_SLOTS, segment, gradient_live[u]) for u, segment in gradient_places.items()]
    transports = dict.fromkeys(unit.transport.description for unit in units)
    plan = MemoryPlan(units[0].mesh.size(), tuple(regions), tuple(slots), tuple(transports))
    return MemoryLayout(plan, layouts, gather_places, gradient_places)


def _granule_nbytes(units: Sequence[Unit]) -> int:
    """The largest granule that chunks are made of; 0 where no slot can alias its shard."""
    for unit in units:
        unit.plan_dtypes()
    chunks = [p.chunk_nbytes for unit in units if unit.aliases_shards for p in unit.params]
    in_granules = [nbytes for nbytes in chunks if nbytes and nbytes % vmm.GRANULE_NBYTES == 0]
    return math.gcd(MAX_GRANULE_NBYTES, *in_granules) if in_granules else 0


def _shards(unit: Unit, layout: UnitLayout, granule_nbytes: int) -> list[Region]:
    aliased, mapped = layout.aliased_shard.nbytes, unit.transport.mapped is not None
    return [
        *([Region(f"{unit.name}.aliased_shard", "compute_shard", aliased, True, granule_nbytes)] if aliased else []),
        Region(f"{unit.name}.main_shard", "main_shard", layout.main_shard.nbytes),
        Region(f"{unit.name}.compute_shard", "compute_shard", layout.compute_shard.nbytes, mapped),
        Region(f"{unit.name}.grad_shard", "grad_shard", layout.grad_shard.nbytes),
    ]


def _staging(layouts: Mapping[Unit, UnitLayout]) -> list[Region]:
    """Where peers' chunks of one unit's gradients wait for their sum; large units go through it in several rounds, and
    the smallest round has a piece of each peer. Over several hosts, a column of sums lies behind them, and a gathered
    one in memory of its own (``comm/hierarchical.py``).
    """
    needs = [
        max(x.gradient_slot.nbytes, (unit.transport.world_size - 1) * ALIGNMENT_NBYTES)
        for unit, x in layouts.items()
        if unit.transport.mapped is not None and x.gradient_slot.nbytes
    ]
    sums = max(
        _column_nbytes(u, [p.reduce_dtype if p.trainable and u.needs.trains else None for p in u.params])
        for u in layouts
    )
    column = max(_column_nbytes(u, [p.compute_dtype for p in u.params]) for u in layouts)
    staging = [Region(STAGING, STAGING, min(max(needs), MAX_STAGING_NBYTES) + sums)] if needs else []
    return staging + ([Region(COLUMN, STAGING, column, mapped=True)] if column else [])


def _column_nbytes(unit: Unit, dtypes: Sequence[torch.dtype | None]) -> int:
    """Of the parameters that have a dtype."""
    if unit.transport.mapped is None:
        return 0
    pairs = zip(unit.params, dtypes, strict=True)
    return unit.transport.mapped.column_nbytes([p.shards.chunk_numel * dtype.itemsize for p, dtype in pairs if dtype])


def _granule_end(regions: Sequence[Region]) -> list[Region]:
    """The unused end of the last granule of the block that peers map."""
    in_block = sum(region.nbytes for region in regions if region.mapped and not region.granule_nbytes)
    left = aligned(in_block, vmm.GRANULE_NBYTES) - in_block
    return [Region("granule end", "granule end", left, mapped=True)] if left else []


def own_slot_regions(unit: Unit, layout: UnitLayout) -> list[Region]:
    """The regions of slots that ``unit`` shares with nobody."""
    regions = []
    if unit.needs.own_gather_slot:
        regions.append(Region(f"{unit.name}.gather_slot", "spill", layout.gather_slot.nbytes))
    if unit.needs.own_gradient_slot:
        kind = "unsynced gradients" if unit.needs.unsynced_gradients else "spill"
        mapped = unit.transport.mapped is not None
        nbytes = aligned(layout.gradient_slot.nbytes, vmm.GRANULE_NBYTES if mapped else 1)
        regions.append(Region(f"{unit.name}.gradient_slot", kind, nbytes, mapped))
    return regions


def _gather_ranges(tree: UnitTree) -> dict[Unit, LiveRange]:
    schedule, index = tree.schedule, {unit: i for i, unit in enumerate(tree.units)}
    forward = {i: [index[t] for t in u.forward_prefetch if t in index] for u, i in index.items()}
    backward = {i: [index[t] for t in u.backward_prefetch if t in index] for u, i in index.items()}
    forward_from = gather_starts(schedule.forward_order, [schedule.forward_start(i) for i in index.values()], forward)
    backward_from = gather_starts(
        schedule.backward_order, [schedule.backward_start(i) for i in index.values()], backward
    )
    return {
        unit: schedule.gather_range(i, forward_from[i], backward_from[i], _residency(tree, unit))
        for unit, i in index.items()
    }


def _residency(tree: UnitTree, unit: Unit) -> Residency:
    return Residency(
        after_forward=not tree.reshards_after_forward(unit), after_backward=not unit.policy.reshard_after_backward
    )


def _place_shared(nbytes: Mapping[Unit, int], live: Mapping[Unit, LiveRange]) -> tuple[dict[Unit, Segment], int]:
    units = [unit for unit in nbytes if nbytes[unit]]
    segments, total = place([SlotRequest(unit.name, nbytes[unit], live[unit]) for unit in units])
    return dict(zip(units, segments, strict=True)), total
