"""The process group's transport with collectives of the user's own, and with hooks on what was reduced.

Owns what FSDP2's ``set_custom_all_gather``, ``set_custom_reduce_scatter`` and ``set_all_reduce_hook`` promise: which
buffers the user's code is called with, on which stream, and what it returns. The buffers of a custom collective are
those that it allocates, flat ones for a whole unit, so they are in no plan; values are copied to and from their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from yafsdp_like.comm.process_group import ProcessGroupTransport, by_dtype, finish
from yafsdp_like.comm.replicated import ReplicatedTransport
from yafsdp_like.memory.streams import UserStream, on_stream_of_user

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.comm.process_group import Pieces
    from yafsdp_like.comm.transport import ReduceScatter, Reduction, Transport

Hook = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class CustomComm:
    """What the user has written for one unit; None where nothing.

    ``all_gather`` and ``reduce_scatter`` have the interfaces of FSDP2's classes of these names: ``allocate`` makes a
    buffer, and a call moves values between two of them. ``hook`` is called with each reduced tensor, ``(numel,)``
    before it is divided, cast and added to ``.grad``, on ``stream`` if that is given.
    """

    all_gather: Any = None
    reduce_scatter: Any = None
    hook: Hook | None = None
    stream: UserStream | None = None

    @property
    def moves(self) -> list[str]:
        """The names of the collectives that are the user's own."""
        return [type(comm).__name__ for comm in (self.all_gather, self.reduce_scatter) if comm is not None]

    def run_hook(self, tensors: Sequence[torch.Tensor]) -> None:
        """Call the hook with each of ``tensors`` that has elements."""
        if self.hook is not None:
            with on_stream_of_user(self.stream):
                for tensor in tensors:
                    if tensor.numel():
                        self.hook(tensor)


def customized(transport: Transport, group: dist.ProcessGroup, custom: CustomComm) -> Transport:
    """Return a transport over ``group``, and the replicas of ``transport`` if it has any, that runs the user's code."""
    if not isinstance(transport, ReplicatedTransport):
        return CustomTransport(group, custom)
    shards = CustomTransport(group, replace(custom, hook=None))
    return ReplicatedTransport(shards, transport.replicas, transport.everybody, custom.run_hook)


class CustomTransport(ProcessGroupTransport):
    """Collectives over a process group, some of them the user's own."""

    def __init__(self, group: dist.ProcessGroup, custom: CustomComm) -> None:
        super().__init__(group, "the user's own collectives or hooks need one")
        self._custom = custom

    def _all_gather(self, pieces: Pieces) -> None:
        comm = self._custom.all_gather
        if comm is None:
            super()._all_gather(pieces)
            return
        for outputs, inputs in pieces:
            sizes = [i.numel() for i in inputs]
            mine, dtype, device = sum(sizes), inputs[0].dtype, inputs[0].device
            source = comm.allocate((mine,), dtype=dtype, device=device)
            target = comm.allocate((self.world_size * mine,), dtype=dtype, device=device)
            torch._foreach_copy_(list(source.split(sizes)), inputs)
            finish(comm(output_tensor=target, input_tensor=source, group=self._gather_group, async_op=False))
            chunks = target.view(self.world_size, mine).split(sizes, dim=1)
            torch._foreach_copy_([o.view(self.world_size, -1) for o in outputs], list(chunks))

    def reduce_scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        scratch: torch.Tensor,
    ) -> ReduceScatter:
        """See ``Transport``; one rank alone, which reduces nothing, calls the hook too."""
        straight = super().reduce_scatter(outputs, inputs, dtypes, scratch)
        if self.world_size > 1 or [i.dtype for i in inputs] == list(dtypes):
            return straight

        def run(reduction: Reduction, accumulate: bool) -> None:
            values = [i.to(dtype) for i, dtype in zip(inputs, dtypes, strict=True)]
            self._reduce_scatter(values, values, reduction)
            (torch._foreach_add_ if accumulate else torch._foreach_copy_)(list(outputs), values)

        return run

    def _reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], reduction: Reduction
    ) -> None:
        if self._custom.reduce_scatter is None or self.world_size == 1:
            super()._reduce_scatter(outputs, inputs, replace(reduction, post_divisor=1.0))
        else:
            if reduction.pre_divisor != 1.0:
                torch._foreach_div_(list(inputs), reduction.pre_divisor)
            for out, inp in by_dtype(outputs, inputs):
                self._reduce(out, inp, dist.ReduceOp.AVG if reduction.mean else dist.ReduceOp.SUM)
        self._custom.run_hook(outputs)
        if reduction.post_divisor != 1.0:
            torch._foreach_div_(list(outputs), reduction.post_divisor)

    def _reduce(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], op: dist.ReduceOp.RedOpType) -> None:
        comm, sizes = self._custom.reduce_scatter, [o.numel() for o in outputs]
        mine, dtype, device = sum(sizes), inputs[0].dtype, inputs[0].device
        source = comm.allocate((self.world_size * mine,), dtype=dtype, device=device)
        target = comm.allocate((mine,), dtype=dtype, device=device)
        chunks = source.view(self.world_size, mine).split(sizes, dim=1)
        torch._foreach_copy_(list(chunks), [i.view(self.world_size, -1) for i in inputs])
        finish(comm(output_tensor=target, input_tensor=source, group=self._reduce_group, op=op, async_op=False))
        torch._foreach_copy_(outputs, list(target.split(sizes)))
