"""Main shards and gradients in host memory (FSDP2's ``CPUOffloadPolicy``), and their way to the device and back.

Owns their arenas, and what all-gathers and reduce-scatters do beside the transport. Knows tensors, no units.

[Note: shards on the host]
Main shards and gradients are in host memory, pinned for a GPU, and with them the optimizer's states and its update.
Slots are on the device, and nothing else of a parameter is, so that there is no compute shard: an all-gather first
copies this rank's rows to their place in the unit's own gather slot, and then gathers in place. It does so in backward
too, where main shards are what forward has read. Rows that change their dtype on the way are cast on the device, out of
the staging region ``upload``, in parts where they are larger. A reduce-scatter writes to the region ``download``, which
is as large as the largest unit's gradients; what it adds to is copied there before. Each region is used by one stream
alone, that of all-gathers and that of reductions, which order their uses; so what is copied for a unit is prefetched,
and released, as the unit's all-gathers and gradients are anywhere.

The CPU writes main shards and reads gradients, and no event orders it. So it waits: at the end of each forward and
backward for all-gathers (``ParamLifecycle.settle_prefetches``), of which the last was issued one unit ahead of compute;
at the end of a backward for reductions; and before a user's hooks read a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import FlatLayout
from yafsdp_like.memory.pinned import pin_arena

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.fsdp import CPUOffloadPolicy

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Reduction
    from yafsdp_like.memory.plan import Region


def shard_arena(region: Region, device: torch.device, offload: CPUOffloadPolicy | None) -> Arena:
    """Return an arena that holds ``region``: on ``device``, or, offloaded, in host memory that is pinned for a GPU."""
    arena = Arena(device if offload is None else torch.device("cpu"))
    arena.reserve([region])
    if offload is not None and offload.pin_memory and device.type == "cuda":
        pin_arena(arena, device)
    return arena


@dataclass(frozen=True, eq=False)
class HostStaging:
    """The regions on the device, ``(nbytes,)`` uint8 each, that units share. See [Note: shards on the host]."""

    upload: torch.Tensor
    download: torch.Tensor

    def upload_before(
        self, all_gather: AllGather, rows: Sequence[torch.Tensor], chunks: Sequence[torch.Tensor]
    ) -> AllGather:
        """Return what copies ``rows``, flat, on the host, to ``chunks`` on the device, and then all-gathers."""
        straight = [(chunk, host) for host, chunk in zip(rows, chunks, strict=True) if host.dtype == chunk.dtype]
        cast = [(chunk, host) for host, chunk in zip(rows, chunks, strict=True) if host.dtype != chunk.dtype]
        parts = []
        for chunk, host in cast:
            staged = self.upload.view(host.dtype)
            for part, of_host in zip(chunk.split(staged.numel()), host.split(staged.numel()), strict=True):
                parts.append((part, staged[: part.numel()], of_host))

        def run() -> None:
            for chunk, host in straight:
                chunk.copy_(host, non_blocking=True)
            for chunk, staged, host in parts:
                staged.copy_(host, non_blocking=True)
                chunk.copy_(staged)
            all_gather()

        return run

    def staged(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors like ``grads``, flat, on the device, behind each other in the region ``download``."""
        layout = FlatLayout.pack([grad.nbytes for grad in grads])
        return [
            self.download[segment.offset_nbytes : segment.offset_nbytes + segment.nbytes].view(grad.dtype)
            for grad, segment in zip(grads, layout.segments, strict=True)
        ]


def download_after(
    reduce: ReduceScatter, outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> ReduceScatter:
    """Return what reduces to ``outputs`` on the device, and then copies these to ``grads`` on the host."""
    pairs = list(zip(outputs, grads, strict=True))

    def run(reduction: Reduction, accumulate: bool) -> None:
        for output, grad in pairs if accumulate else ():
            output.copy_(grad, non_blocking=True)
        reduce(reduction, accumulate)
        for output, grad in pairs:
            grad.copy_(output, non_blocking=True)

    return run
