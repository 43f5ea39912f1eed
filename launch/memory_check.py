"""Whether a run fits into the memory that is free, asked before anything is allocated, and what would fit.

Owns the sum: the plan, the optimizer's moments, and what is kept beside them on the host. Activations, which depend on
the batch, are not in it: what is refused here could not have trained a single step.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from launch import build
from launch.config import Config
from launch.recipe import decoder_config, recipe_of
from launch.world import World
from yafsdp_like.comm.consistency import AgreedError, all_gather_object
from yafsdp_like.memory.plan import MemoryPlan, readable
from yafsdp_like.memory.room import free_nbytes
from yafsdp_like.models import PRESETS
from yafsdp_like.optim.offload import CHUNK_NBYTES, NUM_BUFFERS

SHARDED = ("main_shard", "compute_shard")  # kinds of the plan's regions that more ranks make smaller
MARGIN = 20  # of what is free, one part in so many is left to what no sum knows
COPY = "a checkpoint's copy on its way to the disk"
MOMENTS, FLOATS = "AdamW's moments", "moments as a checkpoint has them"
REMAINDERS = "remainders of split masters"
BUFFERS = "buffers for offloaded moments"


@dataclass(frozen=True)
class Allocation:
    """Something that a rank allocates in one memory."""

    name: str
    nbytes: int
    sharded_nbytes: int = 0  # of these, those that more ranks make smaller


@dataclass(frozen=True)
class MemoryDemand:
    """What one rank takes of one memory: of a GPU, or of its host's."""

    place: str  # equal for those who share it
    free_nbytes: int
    parts: tuple[Allocation, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all allocations."""
        return sum(part.nbytes for part in self.parts)

    @property
    def sharded_nbytes(self) -> int:
        """Return the bytes that more ranks make smaller."""
        return sum(part.sharded_nbytes for part in self.parts)


def check_memory(model: Any, options: Config, world: World) -> None:
    """`AgreedError`, on all ranks, if plan, moments and copies do not fit into the memory that some rank finds."""
    _check(_demands(model, options, world), world, lambda demand, count: _remedies(demand, count, options, world))


def _demands(model: Any, options: Config, world: World) -> list[MemoryDemand]:
    plan: MemoryPlan = model.memory_plan()
    optimizer = options.optimizer
    moments, saved = (build.moments_nbytes(model, world, optimizer.moments, saved) for saved in (False, True))
    sharded = sum(plan.nbytes_of(kind) for kind in SHARDED)
    gradients = sorted(region.nbytes for region in plan.regions if region.transient)
    at_once = sum(gradients[-2:] if optimizer.update_in_backward else gradients)  # the root's early ones, and a block's
    parts = [Allocation("memory plan", plan.nbytes, sharded), Allocation("gradients", at_once, at_once)]
    states = [Allocation(MOMENTS, moments, moments)]
    if optimizer.moments == "int8":
        states.append(Allocation(FLOATS, saved, saved))  # made for a save, and given back
    copies = []
    if options.checkpoint.asynchronous and 0 < options.checkpoint.every < options.num_steps:
        copied = build.values_nbytes(model, world) + saved
        copies = [Allocation(COPY, copied, copied)]
    if plan.host_nbytes:
        copies.append(Allocation(REMAINDERS, plan.host_nbytes, plan.host_nbytes))
    if optimizer.offload_moments:
        copies += states
        parts.append(Allocation(BUFFERS, build.buffers_nbytes(model, world, optimizer)))
    else:
        parts += states
    if world.device.type != "cuda":
        return [_host_demand([*parts, *copies])]
    free = free_nbytes(world.device)
    assert free is not None
    name = f"{platform.node()}, GPU {torch.cuda.get_device_properties(world.device).uuid}"
    return [MemoryDemand(name, free, tuple(parts)), _host_demand(copies)]


def _host_demand(parts: Sequence[Allocation]) -> MemoryDemand:
    free = free_nbytes(torch.device("cpu"))
    return MemoryDemand(platform.node(), 1 << 62 if free is None else free, tuple(parts))


def _check(demands: Sequence[MemoryDemand], world: World, remedies: Any) -> None:
    """Ranks see all demands, and come to the same end: the first memory that is too small."""
    everyone = [demand for there in all_gather_object(list(demands)) for demand in there]
    for place in dict.fromkeys(demand.place for demand in everyone):
        sharing = [demand for demand in everyone if demand.place == place]
        needed, free = sum(demand.nbytes for demand in sharing), min(demand.free_nbytes for demand in sharing)
        if needed > free - free // MARGIN:
            most = max(sharing, key=lambda demand: demand.nbytes)
            raise AgreedError(_words(most, len(sharing), needed, free, remedies(most, len(sharing))))


def _words(demand: MemoryDemand, count: int, needed: int, free: int, remedies: list[str]) -> str:
    parts = ", ".join(f"{part.name} {readable(part.nbytes)}" for part in demand.parts)
    many = f" × {count} ranks on {demand.place} = {readable(needed)}" if count > 1 else f" on {demand.place}"
    cure = " or ".join(remedies) or "a smaller model, or more memory"
    return (
        f"training needs {readable(demand.nbytes)} a rank ({parts}){many}, and {readable(free)} are free: take {cure}"
    )


def _remedies(demand: MemoryDemand, count: int, options: Config, world: World) -> list[str]:
    """What would fit, as far as is known without trying: each a few words."""
    free = demand.free_nbytes - demand.free_nbytes // MARGIN
    found = []
    without = demand.nbytes - sum(part.nbytes for part in demand.parts if part.name == COPY)
    if count * without <= free:
        found.append("--checkpoint.asynchronous=false")
    on_gpu = world.device.type == "cuda" and demand.place != platform.node()
    kept = sum(part.nbytes for part in demand.parts if part.name in (MOMENTS, FLOATS))
    if on_gpu and kept and count * (demand.nbytes - kept + NUM_BUFFERS * CHUNK_NBYTES) <= free:
        found.append("--optimizer.offload_moments=true")
    fixed = demand.nbytes - demand.sharded_nbytes
    if free > count * fixed:
        num_places = math.ceil(demand.sharded_nbytes * world.size / (free - count * fixed))
        found.append(f"{num_places} such GPUs" if on_gpu else f"{num_places} such hosts, of {count} ranks each")
    if (smaller := _smaller_preset(free // count, options, world)) is not None:
        found.append(f"--model.preset={smaller}")
    return found


def _smaller_preset(free_nbytes: int, options: Config, world: World) -> str | None:
    """The largest preset that a rank has room for, with the same overrides; its plan is drawn, not estimated."""
    if options.model.preset is None:
        return None
    most = decoder_config(options.model).num_params
    smaller: dict[int, Config] = {}
    for name in PRESETS:
        model = dataclasses.replace(options.model, preset=name)
        try:
            num_params = decoder_config(model).num_params
        except ValueError:  # the overrides do not fit it
            continue
        if num_params < most:
            smaller[num_params] = dataclasses.replace(options, model=model)
    for _, there in sorted(smaller.items(), reverse=True):
        drawn = build.build_model(recipe_of(there.model, there.seed), there, world)
        if _demands(drawn, there, world)[0].nbytes <= free_nbytes:
            return there.model.preset
    return None
