"""The transport of a model that is sharded inside each replica and the same on all of them (HSDP).

Owns the mean of gradients over replicas. All-gathers and mapped memory are those of the ranks that share one replica's
shards, whose own transport it wraps.

[Note: what replicas average]
Replicas must hold the same bits, so gradients always come out of one all-reduce. New gradients are averaged
in the dtype that they were reduced in, before they are cast or added: the sum waits in this rank's own chunk of the
inputs, which no peer reads. In two cases what the gradient shard holds after the addition is averaged instead, which is
the same number, since the mean of what is equal on all replicas is that: when earlier reductions were not averaged
(``Reduction.averaged``), and when the inputs have fewer bits than their sum, for which the chunk then has no room.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllreduceCoalescedOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Reduction, Transport


class ReplicatedTransport:
    """A transport inside each replica, and an all-reduce between replicas.

    ``shards`` is between the ranks of one replica, ``replicas`` between those that hold the same shard of each;
    ``everybody`` is all of them, for host memory. ``after`` is called with what was all-reduced, before it is divided.
    """

    def __init__(
        self,
        shards: Transport,
        replicas: dist.ProcessGroup,
        everybody: dist.ProcessGroup,
        after: Callable[[Sequence[torch.Tensor]], None] = lambda _: None,
    ) -> None:
        self.rank, self.world_size = shards.rank, shards.world_size
        self.description = f"{replicas.size()} replicas over their process group; in each, {shards.description}"
        self.shards, self.replicas, self.everybody, self._after = shards, replicas, everybody, after
        self.mapped = shards.mapped

    def all_gather(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        in_place: Collection[int] = (),
        scratch: torch.Tensor | None = None,
    ) -> AllGather:
        """See ``Transport``."""
        return self.shards.all_gather(outputs, inputs, in_place, scratch)

    def reduce_scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        scratch: torch.Tensor,
    ) -> ReduceScatter:
        """See ``Transport``, and [Note: what replicas average]."""
        chunks = [i.view(self.world_size, i.numel() // self.world_size)[self.rank] for i in inputs]
        straight = self.shards.reduce_scatter(outputs, inputs, dtypes, scratch)
        in_place = self.shards.reduce_scatter(chunks, inputs, dtypes, scratch) if _are(chunks, dtypes) else None
        replaces_as_reduced = _are(outputs, dtypes)

        def run(reduction: Reduction, accumulate: bool) -> None:
            if reduction.averaged != "nothing" and replaces_as_reduced and not accumulate:
                straight(_undivided(reduction), False)
                self._combine(outputs, reduction)
            elif reduction.averaged == "new" and in_place is not None:
                in_place(_undivided(reduction), False)
                self._combine(chunks, reduction)
                if accumulate:
                    torch._foreach_add_(list(outputs), chunks)
                else:
                    torch._foreach_copy_(list(outputs), chunks)
            else:
                straight(self._before_mean(reduction), accumulate)
                if reduction.averaged != "nothing":
                    self._all_reduce(outputs, dist.ReduceOp.AVG)

        return run

    def _before_mean(self, reduction: Reduction) -> Reduction:
        """Return what to do inside the replica, so that only a mean over replicas is left."""
        if reduction.mean:
            return reduction
        return replace(reduction, post_divisor=reduction.post_divisor / self.replicas.size())

    def _combine(self, tensors: Sequence[torch.Tensor], reduction: Reduction) -> None:
        """Combine and divide over replicas after a reduction inside the replica that was ``_undivided``."""
        self._all_reduce(tensors, dist.ReduceOp.AVG if reduction.mean else dist.ReduceOp.SUM)
        if reduction.post_divisor != 1.0:
            torch._foreach_div_(list(tensors), reduction.post_divisor)

    def _all_reduce(self, tensors: Sequence[torch.Tensor], op: dist.ReduceOp.RedOpType) -> None:
        options = AllreduceCoalescedOptions()
        options.reduceOp = dist.ReduceOp(op)
        options.asyncOp = False  # on the current stream, not on one of the group's own
        for dtype in dict.fromkeys(t.dtype for t in tensors if t.numel()):
            work = self.replicas.allreduce_coalesced([t for t in tensors if t.numel() and t.dtype == dtype], options)
            if work is not None:
                work.wait()  # blocks the CPU on gloo, and only orders the current stream on NCCL
        self._after(tensors)


def _are(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> bool:
    return all(tensor.dtype == dtype for tensor, dtype in zip(tensors, dtypes, strict=True))


def _undivided(reduction: Reduction) -> Reduction:
    return replace(reduction, post_divisor=1.0)
