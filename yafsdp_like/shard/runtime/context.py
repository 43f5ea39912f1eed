"""What the owners of one sharded model's run-time state share: its units, their streams, ranks and log."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.comm.mapped_memory import MappedMemory
    from yafsdp_like.memory.streams import Event, Streams
    from yafsdp_like.shard.runtime.allocated_memory import AllocatedMemory
    from yafsdp_like.shard.runtime.collective_log import CollectiveLog
    from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot, SlotUnit
    from yafsdp_like.shard.runtime.unit_tree import UnitTree


@dataclass(frozen=True)
class EngineContext:
    """What one engine's owners share; nothing here is replaced as long as the engine lives."""

    tree: UnitTree
    streams: Streams
    mapped: Sequence[MappedMemory]  # of the transports that map any
    collective_log: CollectiveLog
    memory: AllocatedMemory

    def wait_for_last_accesses(self, stream: str, slot: GatherSlot | GradientSlot) -> None:
        """Order ``stream``, the only writer of these slots, after all other streams' accesses to the slot's bytes."""
        for event in slot.last_accesses():
            self.streams.wait(stream, event)

    def wait_for_side_streams(self) -> None:
        """Order compute after all that was issued to the other streams."""
        for stream in (GATHER, REDUCE):
            self.streams.wait(COMPUTE, self.streams.record(stream))

    def arm_watchdog(self, event: Event) -> None:
        """End the process if ``event``, behind waits for other ranks, is not reached within the group's timeout."""
        for mapped in self.mapped:
            mapped.arm_watchdog(event)
        self.collective_log.watch(event)


_NOTHING = nullcontext()


def without_grad() -> AbstractContextManager[Any]:
    """Turn grad mode off: in a backward it is already, and ``torch.no_grad`` takes as long as a small launch."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def label(work: str, unit: SlotUnit) -> AbstractContextManager[Any]:
    """Name ``work`` in profiles; costs nothing without a profiler."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"yafsdp::{work} {unit.name}")
    return _NOTHING
