"""All memory of a pool of models, allocated once: arenas, the slabs that models share, and each model's places on them.

Owns who is given which bytes when a pool is made. Whose slabs they are later is `residence.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.places import POLICIES, EnginePlaces, bytes_of
from yafsdp_like.inference.kv.kv_cache import Tier
from yafsdp_like.inference.kv.pages import PagePool
from yafsdp_like.inference.plan.buffers import TABLES
from yafsdp_like.inference.plan.serving_plan import HOST_KV_SLABS
from yafsdp_like.inference.pool.member import Member
from yafsdp_like.inference.pool.plan import SLABS
from yafsdp_like.inference.pool.residence import Residence
from yafsdp_like.inference.pool.weights import PooledWeights
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.pinned import pin_arena

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from yafsdp_like.comm.mapped_memory import MappedMemory
    from yafsdp_like.comm.transport import Transport
    from yafsdp_like.inference.pool.plan import ModelPlan, PoolPlan
    from yafsdp_like.inference.pool.ranks import PoolRanks
    from yafsdp_like.inference.weights.loading import Model
    from yafsdp_like.memory.arena import Place
    from yafsdp_like.memory.streams import Streams


@dataclass(frozen=True)
class PoolMemory:
    """A pool's arenas, and the slabs on them that its models share."""

    arena: Arena
    host: Arena
    regions: dict[Tier, Tensor]  # (nbytes,) uint8: all slabs
    pools: dict[Tier, PagePool]
    mapped: MappedMemory | None  # of ranks that read each other's slabs

    @classmethod
    def reserve(cls, plan: PoolPlan, device: torch.device, ranks: PoolRanks, transport: Transport | None) -> PoolMemory:
        """Allocate all that ``plan`` says, on all ranks or on none.

        Raises what ``Arena.reserve`` does, and ValueError where ranks would read each other's slabs over a
        ``transport`` that cannot.
        """
        if plan.maps_memory and not maps_slabs(transport):
            raise ValueError(
                "the pool is planned for ranks that map each other's memory, and its transport does not: pass "
                "world_transport(device), or plan with maps_memory=False"
            )
        arena, host = Arena(device), Arena(torch.device("cpu"))
        with ranks.raising_together():
            arena.reserve(plan.memory.regions)
            host.reserve(plan.host.regions)
            if device.type == "cuda":
                pin_arena(host, device)
        mapped = transport.mapped if plan.maps_memory and transport is not None else None
        if mapped is not None:
            mapped.connect(arena.blocks)
        policy = POLICIES[plan.options.policy]
        regions = {Tier.DEVICE: bytes_of(arena, SLABS)}
        pools = {Tier.DEVICE: PagePool(plan.grid, policy(), plan.options.tenants, plan.lend_late)}
        if plan.host_grid is not None:
            regions[Tier.HOST] = bytes_of(host, HOST_KV_SLABS)
            pools[Tier.HOST] = PagePool(plan.host_grid, policy())
        return cls(arena, host, regions, pools, mapped)

    def member(self, plan: ModelPlan, model: Model, streams: Streams, make_room: Callable[[bool], bool]) -> Member:
        """Make one model of the pool at its places; ``make_room`` has others lose slabs, see ``EnginePlaces``."""

        def place_of(kind: str) -> Place:
            return self.arena.place(plan.tables_region if kind == TABLES else kind)

        weights = PooledWeights(plan, self.arena, self.host, streams, self.mapped)
        buffers = plan.serving.buffers.tensors(place_of)
        places = EnginePlaces(buffers, self.regions, self.pools, make_room)
        if plan.slots_nbytes:
            slots = self.regions[Tier.DEVICE][plan.slots.offset_nbytes : plan.slots.end_nbytes]
            places = replace(places, adapter_slots=slots, adapter_images=bytes_of(self.host, plan.images_region))
        engine = Engine(weights, places)
        residence = Residence(plan, self.pools[Tier.DEVICE], weights, engine.adapters)
        return Member(plan, model, weights, residence, engine)


def maps_slabs(transport: Transport | None) -> bool:
    """Return whether ranks that ``transport`` joins can read each other's slabs: those of one host, if any can."""
    mapped = None if transport is None else transport.mapped
    return mapped is not None and mapped.reads_shards
