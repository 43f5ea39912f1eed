"""Debug mode: bytes that a unit has released hold NaN, and an error names the module that computes on them.

Owns what is written there and what is checked after every forward. It waits for the GPU, and is off unless
``FSDPModule.set_debug_mode`` was called, which gives each unit a gather slot of its own: nothing else is written there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from yafsdp_like.shard.runtime.nested import tensors_in

if TYPE_CHECKING:
    from yafsdp_like.shard.runtime.slots import GatherSlot


def poison(slot: GatherSlot) -> None:
    """Fill the slot with NaN (integers with their largest value), except where it aliases this rank's shard."""
    with torch.no_grad():
        for k, (p, output) in enumerate(zip(slot.unit.params, slot.outputs, strict=True)):
            chunks = output.view(p.shards.world_size, -1)
            for rank, chunk in enumerate(chunks):
                if k not in slot.aliased or rank != p.rank:
                    chunk.fill_(_poison_of(chunk.dtype))


def _poison_of(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def holds_nan(value: Any) -> bool:
    """Return whether any tensor in ``value`` holds a NaN. Waits for the device."""
    return any(
        (t.is_floating_point() or t.is_complex()) and not t.is_meta and bool(t.detach().isnan().any())
        for t in tensors_in(value)
    )


def output_error(slot: GatherSlot, output: Any) -> RuntimeError | None:
    """Return what to raise where ``output`` holds NaN, but neither the inputs nor the parameters in ``slot`` do."""
    if holds_nan(output) and not holds_nan([param.detach() for param in slot.params]):
        return RuntimeError(
            f"debug mode: the output of {slot.unit.name!r} holds NaN, though neither its inputs nor its parameters do "
            f"(rank {slot.unit.transport.rank}). If nothing in it computes NaN, it reads parameters that another unit "
            "has released, by a view that was kept outside of that unit's forward: return the view from the forward, "
            "keep a clone of it, or set reshard_after_forward=False on that unit"
        )
    return None
