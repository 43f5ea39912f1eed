"""The ranks of tensor parallelism: sums of their parts, and values that one of them sends to all.

Owns the collectives; knows nothing of what is summed.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllreduceOptions

from yafsdp_like.comm.consistency import all_gather_object

Value = TypeVar("Value")


class TPGroup:
    """The ranks of ``group``, which all make the same calls in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group

    def sum_(self, part: torch.Tensor) -> None:
        """Replace every rank's ``part``, contiguous and of any shape, by the sum of all, with the same bits on all.

        In order on the current stream, so that it can be recorded in a CUDA graph; blocks the CPU on gloo.
        """
        options = AllreduceOptions()
        options.asyncOp = False  # on the current stream, not on one of the group's own
        work = self._group.allreduce([part], options)
        if work is not None:
            work.wait()  # blocks the CPU on gloo, and only orders the current stream on NCCL

    def broadcast(self, value: Value) -> Value:
        """Return the first rank's ``value``. Blocks the CPU; on the first rank perhaps until it is sent only."""
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """Return every rank's ``value``, in order of rank. Blocks the CPU."""
        return all_gather_object(value, self._group)

    def check_same(self, what: str, value: object) -> None:
        """Raise RuntimeError on all ranks unless they pass equal values. Blocks the CPU."""
        values = self.all_gather(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise RuntimeError(f"{what} must be the same on all ranks that compute together; those of {others} differ")


def world_tp_group() -> TPGroup:
    """Return all ranks of this process's world, which there must be."""
    group = dist.group.WORLD
    assert group is not None, "there is no process group"
    return TPGroup(group)
