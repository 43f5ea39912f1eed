"""Guards of debug mode: bytes behind each region of a plan that nobody may write."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import GUARD_NBYTES
from yafsdp_like.memory.plan import MemoryPlan, Region

if TYPE_CHECKING:
    from yafsdp_like.models.decoder import DecoderConfig

GUARD = ", its end"  # of the name of a guard's region, behind that of the region before it


def most_guards_nbytes(config: DecoderConfig) -> int:
    """Return a bound on the bytes of guards: of weights by unit, of slots, pages, and buffers by kind."""
    return GUARD_NBYTES * (config.num_layers + 16)


def guarded(plan: MemoryPlan, most_nbytes: int) -> MemoryPlan:
    """Put a guard behind each region; what slots alias, or peers map, has none."""
    regions: list[Region] = []
    for region in plan.regions:
        regions.append(region)
        if not region.mapped and not region.granule_nbytes:
            regions.append(Region(f"{region.name}{GUARD}", "workspace guards", GUARD_NBYTES))
    nbytes = GUARD_NBYTES * (len(regions) - len(plan.regions))
    assert nbytes <= most_nbytes, f"{nbytes} bytes of guards, of {most_nbytes} that are left for them"
    return replace(plan, regions=tuple(regions), debug_nbytes=nbytes)
