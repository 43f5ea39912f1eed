"""Memory that the ranks of one host map of each other: what a transport that has it offers beside its operations.

Owns the maps of peers' blocks, and the barriers that order what ranks do in them. Knows nothing of what is copied.

[Note: mapped memory]
Four things follow for whoever uses a transport whose ``mapped`` is not None:

* Peers read inputs where they are. So inputs lie in blocks that ``connect`` was given, and every parameter has a
  compute shard, also where it would be equal to the main shard.
* What peers read is written between two stream barriers: after the first no rank reads the old values any more, after
  the second all have written the new ones.
* A reduction adds up in fp32, so gradients wait for it in the dtype in which they were computed.
* On one host (``reads_shards``) an all-gather is this rank's own reading and no collective, and a rank's own chunk of
  the output may be its shard, mapped there: see [Note: aliased granules].
"""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import TYPE_CHECKING

from yafsdp_like.comm.descriptors import map_all_ranks
from yafsdp_like.comm.signals import Barrier, Flags
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.streams import Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    import torch.distributed as dist

    from yafsdp_like.memory.arena import MemoryBlock
    from yafsdp_like.memory.streams import Event
    from yafsdp_like.memory.vmm import MappedRange


def column_nbytes(num_hosts: int, chunks_nbytes: Sequence[int]) -> int:
    """Count the bytes of scratch for a column of chunks of these sizes over ``num_hosts``; none on one host."""
    return 0 if num_hosts == 1 else sum(aligned(num_hosts * nbytes) for nbytes in chunks_nbytes)


class MappedMemory:
    """The blocks of ``group``'s ranks, all on one host, of ``num_hosts`` that share a parameter."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, num_hosts: int = 1) -> None:
        self.num_hosts = num_hosts
        self._group = group
        self._ranges: weakref.WeakKeyDictionary[MemoryBlock, list[MappedRange]] = weakref.WeakKeyDictionary()  # by rank
        self._barrier = Flags(group, device) if device.type == "cuda" else Barrier(group)

    def over_hosts(self, num_hosts: int) -> MappedMemory:
        """Return the same maps and barriers, for a transport over ``num_hosts`` hosts."""
        found = copy.copy(self)
        found.num_hosts = num_hosts
        return found

    @property
    def reads_shards(self) -> bool:
        """Whether an all-gather reads the shards themselves, not columns that other ranks have written first."""
        return self.num_hosts == 1

    def column_nbytes(self, chunks_nbytes: Sequence[int]) -> int:
        """Count the bytes of scratch for a column of chunks of these sizes; none on one host.

        The chunks are the inputs of an all-gather, or the outputs of a reduce-scatter.
        """
        return column_nbytes(self.num_hosts, chunks_nbytes)

    def connect(self, blocks: Sequence[MemoryBlock]) -> None:
        """Make the ranks' blocks readable by each other, those that are not yet.

        Called by all ranks with blocks of the same sizes, in the same order; blocks the CPU.
        """
        for block in blocks:
            if block not in self._ranges:
                self._ranges[block] = map_all_ranks(block.physical, self._group)

    def of_all_ranks(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Find the place of ``mine``, contiguous, in every rank's memory; by rank, of its shape and dtype."""
        for block, ranges in self._ranges.items():
            if (where := block.find(mine)) is not None:
                offset, nbytes = where
                theirs = [r.bytes[offset : offset + nbytes] for r in ranges]
                parts = [part.view(mine.dtype).view(mine.shape) for part in theirs]
                return [mine if rank == self._group.rank() else part for rank, part in enumerate(parts)]
        raise AssertionError(f"a tensor of shape {tuple(mine.shape)} lies outside the memory that peers map")

    def pull_chunks(self, whole: torch.Tensor) -> Callable[[], None]:
        """Prepare to pull every other rank's chunk of ``whole``, ``(ranks * n,)``, out of the same place in its memory.

        This rank's own chunk is there already. Calling what is returned issues copies to the current stream, the next
        rank's first, so that no rank is read by all at once; the caller orders them behind the writing of all chunks.
        """
        rank, size = self._group.rank(), self._group.size()
        here, theirs = whole.view(size, -1), [each.view(size, -1) for each in self.of_all_ranks(whole)]
        others = [(rank + step) % size for step in range(1, size)]
        return Recording(whole.device, [partial(copy_all, [(here[other], theirs[other][other]) for other in others])])

    def stream_barrier(self, stream: str) -> None:
        """Order what ranks issue to ``stream``, the current one, from here on after all that any has issued to it."""
        self._barrier.stream_barrier(stream)

    def arm_watchdog(self, event: Event) -> None:
        """Have the process end with a message, unless ``event`` is complete before the timeout of the ranks' group.

        Stream barriers have no timeout of their own on GPUs; collectives have.
        """
        self._barrier.arm_watchdog(event)


def copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Issue copies of the second of each pair into the first, on the current stream."""
    for destination, source in pairs:
        destination.copy_(source, non_blocking=True)
