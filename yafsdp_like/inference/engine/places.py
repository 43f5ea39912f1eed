"""Where an engine's steps write and its pages lie: on its weights' arenas, or where engines of one device share them.

[Note: engines that share pages]
Engines that share pools of pages belong to one thread, and issue all work on one stream. What one of them hands out to
be copied is issued before another makes a step: a page may then be another engine's as soon as its copy is issued, and
the stream has the order. An engine that finds no page asks for room (``make_room``) before it preempts a sequence: idle
models lose their places then, and working ones too if it runs a single sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.kv.eviction import GDSF, LRU, Policy, Tenant
from yafsdp_like.inference.kv.kv_cache import Tier
from yafsdp_like.inference.kv.pages import PagePool
from yafsdp_like.inference.plan.adapter_layout import ADAPTER_IMAGES, ADAPTER_SLOTS
from yafsdp_like.inference.plan.serving_plan import HOST_KV_SLABS, KV_SLABS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from yafsdp_like.inference.kv.slabs import SlabGrid
    from yafsdp_like.inference.plan.buffers import StepBuffers
    from yafsdp_like.inference.weights.store import Weights
    from yafsdp_like.memory.arena import Arena

POLICIES: dict[str, Callable[[], Policy]] = {"lru": LRU, "gdsf": GDSF}


def nobody_else(by_force: bool) -> bool:
    """Make no room: there is no engine that could."""
    return False


@dataclass(frozen=True)
class EnginePlaces:
    """The buffers of an engine's steps, and its pages on the device and, where there are any, on the host."""

    buffers: StepBuffers
    regions: Mapping[Tier, torch.Tensor]  # the bytes (nbytes,) uint8 that pages lie in
    pools: Mapping[Tier, PagePool]
    # Frees slabs of idle models and, by force, those of working ones; False where there was nothing to free.
    make_room: Callable[[bool], bool] = nobody_else
    adapter_slots: torch.Tensor | None = None  # bytes (nbytes,) uint8 of slots of LoRA adapters, on the device
    adapter_images: torch.Tensor | None = None  # and of their images on the host

    @classmethod
    def of(cls, weights: Weights) -> EnginePlaces:
        """Make the places of an engine that shares none."""
        plan, options = weights.plan, weights.plan.options

        def pool(grid: SlabGrid, tenants: Iterable[Tenant] = ()) -> PagePool:
            return PagePool(grid, POLICIES[options.policy](), tenants)

        regions = {Tier.DEVICE: bytes_of(weights.arena, KV_SLABS)}
        pools = {Tier.DEVICE: pool(plan.grid, options.tenants)}
        if plan.host_grid is not None:
            regions[Tier.HOST], pools[Tier.HOST] = bytes_of(weights.host, HOST_KV_SLABS), pool(plan.host_grid)
        buffers = plan.buffers.tensors(weights.arena.place)
        if plan.adapters is None:
            return cls(buffers, regions, pools)
        slots, images = bytes_of(weights.arena, ADAPTER_SLOTS), bytes_of(weights.host, ADAPTER_IMAGES)
        return cls(buffers, regions, pools, adapter_slots=slots, adapter_images=images)


def bytes_of(arena: Arena, region: str) -> torch.Tensor:
    """Return all bytes of a region, (nbytes,) uint8."""
    whole = arena.place(region)
    return whole.tensor(torch.uint8, (whole.segment.nbytes,))
