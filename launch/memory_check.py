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
from yafsdp_like.comm.consistency import AgreedError, share
from yafsdp_like.memory.plan import MemoryPlan, readable
from yafsdp_like.memory.room import free_nbytes
from yafsdp_like.models import PRESETS

SHARDED = ("main_shard", "compute_shard", "grad_shard")  # kinds of regions that more ranks make smaller
MARGIN = 20  # of what is free, one part in so many is left to what no sum knows
COPY = "a checkpoint's copy on its way to the disk"


@dataclass(frozen=True)
class Part:
    """Something that a rank allocates in one memory."""

    name: str
    nbytes: int
    sharded_nbytes: int = 0  # of these, those that more ranks make smaller


@dataclass(frozen=True)
class Claim:
    """What one rank takes of one memory: of a GPU, or of its host's."""

    place: str  # equal for those who share it
    free_nbytes: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def sharded_nbytes(self) -> int:
        return sum(part.sharded_nbytes for part in self.parts)


def check_room(model: Any, options: Config, world: World) -> None:
    """`AgreedError`, on all ranks, if plan, moments and copies do not fit into the memory that some rank finds."""
    _check(_claims(model, options, world), world, lambda claim, count: _remedies(claim, count, options, world))


def _claims(model: Any, options: Config, world: World) -> list[Claim]:
    plan: MemoryPlan = model.memory_plan()
    moments = build.moments_nbytes(model, world)
    sharded = sum(plan.nbytes_of(kind) for kind in SHARDED)
    parts = [Part("memory plan", plan.nbytes, sharded), Part("AdamW's moments", moments, moments)]
    copies = []
    if options.checkpoint.asynchronous and 0 < options.checkpoint.every < options.num_steps:
        copied = plan.nbytes_of("main_shard") + moments
        copies = [Part(COPY, copied, copied)]
    if world.device.type != "cuda":
        return [_host_claim([*parts, *copies])]
    free = free_nbytes(world.device)
    assert free is not None
    name = f"{platform.node()}, GPU {torch.cuda.get_device_properties(world.device).uuid}"
    return [Claim(name, free, tuple(parts)), _host_claim(copies)]


def _host_claim(parts: Sequence[Part]) -> Claim:
    free = free_nbytes(torch.device("cpu"))
    return Claim(platform.node(), 1 << 62 if free is None else free, tuple(parts))


def _check(claims: Sequence[Claim], world: World, remedies: Any) -> None:
    """Ranks see all claims, and come to the same end: the first memory that is too small."""
    everyone = [claim for there in share(list(claims)) for claim in there]
    for place in dict.fromkeys(claim.place for claim in everyone):
        sharing = [claim for claim in everyone if claim.place == place]
        needed, free = sum(claim.nbytes for claim in sharing), min(claim.free_nbytes for claim in sharing)
        if needed > free - free // MARGIN:
            most = max(sharing, key=lambda claim: claim.nbytes)
            raise AgreedError(_words(most, len(sharing), needed, free, remedies(most, len(sharing))))


def _words(claim: Claim, count: int, needed: int, free: int, remedies: list[str]) -> str:
    parts = ", ".join(f"{part.name} {readable(part.nbytes)}" for part in claim.parts)
    many = f" × {count} ranks on {claim.place} = {readable(needed)}" if count > 1 else f" on {claim.place}"
    cure = " or ".join(remedies) or "a smaller model, or more memory"
    return f"training needs {readable(claim.nbytes)} a rank ({parts}){many}, and {readable(free)} are free: take {cure}"


def _remedies(claim: Claim, count: int, options: Config, world: World) -> list[str]:
    """What would fit, as far as is known without trying: each a few words."""
    free = claim.free_nbytes - claim.free_nbytes // MARGIN
    found = []
    without = claim.nbytes - sum(part.nbytes for part in claim.parts if part.name == COPY)
    if count * without <= free:
        found.append("--checkpoint.asynchronous=false")
    fixed = claim.nbytes - claim.sharded_nbytes
    if free > count * fixed:
        num_places = math.ceil(claim.sharded_nbytes * world.size / (free - count * fixed))
        whole = world.device.type == "cuda" and claim.place != platform.node()
        found.append(f"{num_places} such GPUs" if whole else f"{num_places} such hosts, of {count} ranks each")
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
        if _claims(drawn, there, world)[0].nbytes <= free_nbytes:
            return there.model.preset
    return None
