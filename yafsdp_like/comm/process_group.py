"""The transport over ``torch.distributed`` process groups: NCCL or gloo, any topology, any number of ranks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Reduction

# Torch 2.12 renamed the coalesced collectives and kept the old names with a warning.
_NEW_NAMES = hasattr(dist.ProcessGroup, "all_gather_single_coalesced")
_GATHER = "all_gather_single_coalesced" if _NEW_NAMES else "allgather_into_tensor_coalesced"
_REDUCE = "reduce_scatter_single_coalesced" if _NEW_NAMES else "reduce_scatter_tensor_coalesced"

# One communicator for reductions per shard group, made on first use: on the gather's own communicator the two would run
# one after the other. Keyed by the group object, so that groups that were destroyed are never found again.
_reduce_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _reduce_group_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if group not in _reduce_groups:
        ranks = dist.get_process_group_ranks(group)
        _reduce_groups[group] = dist.new_group(ranks, use_local_synchronization=True, group_desc="yafsdp_reduce")
    return _reduce_groups[group]


class ProcessGroupTransport:
    """Coalesced collectives: one call, one group launch, one piece per parameter, nothing packed or unpacked.

    [Note: gloo gathers piece by piece]
    The two threads of a gloo group write the name of what they have done last to one string, without a lock. A name of
    more than 15 characters has memory of its own, which they then may free twice. Only coalesced all-gathers have one.
    """

    mapped = None

    def __init__(self, group: dist.ProcessGroup, reason: str) -> None:
        self.rank, self.world_size = group.rank(), group.size()
        self.description = f"process group: {reason}"
        self._gather_group = self.everybody = group
        self._is_threaded = dist.get_backend(group) == "threaded"  # torch's ranks in threads, for tests
        self._reduce_group = _reduce_group_of(group) if self.world_size > 1 else group

    def all_gather(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        in_place: Collection[int] = (),
        scratch: torch.Tensor | None = None,
    ) -> AllGather:
        """See ``Transport``."""
        pieces = by_dtype(outputs, inputs) if self.world_size > 1 else []
        return partial(self._all_gather, pieces)

    def _all_gather(self, pieces: Pieces) -> None:
        options = AllgatherOptions()
        options.asyncOp = False  # on the current stream, not on one of the group's own
        for out, inp in pieces:
            if out[0].is_cpu and not self._is_threaded:  # see [Note: gloo gathers piece by piece]
                # As bytes, since gloo lacks float8.
                both = [(o.view(torch.uint8), i.view(torch.uint8)) for o, i in zip(out, inp, strict=True)]
                works = [self._gather_group._allgather_base(o, i, options) for o, i in both]
            else:
                works = [getattr(self._gather_group, _GATHER)(out, inp, options)]
            for work in works:
                finish(work)

    def reduce_scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        scratch: torch.Tensor,
    ) -> ReduceScatter:
        """See ``Transport``. One rank alone takes inputs of any dtype."""
        if self.world_size == 1 and [i.dtype for i in inputs] != list(dtypes):
            return partial(_cast, outputs, inputs, dtypes)
        assert [i.dtype for i in inputs] == list(dtypes), "a collective sums in the dtype that it sends"
        # In place into this rank's chunk of the inputs when a cast or an addition follows, straight away otherwise.
        chunks = [i.view(self.world_size, -1)[self.rank] for i in inputs]
        if self._is_threaded:
            chunks = [chunk.clone() for chunk in chunks]
        same_dtype = all(out.dtype == inp.dtype for out, inp in zip(outputs, inputs, strict=True))

        def run(reduction: Reduction, accumulate: bool) -> None:
            if same_dtype and not accumulate:
                self._reduce_scatter(outputs, inputs, reduction)
                return
            self._reduce_scatter(chunks, inputs, reduction)
            if accumulate:
                torch._foreach_add_(list(outputs), chunks)
            else:
                torch._foreach_copy_(list(outputs), chunks)

        return run

    def _reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], reduction: Reduction
    ) -> None:
        if reduction.pre_divisor != 1.0:
            torch._foreach_div_(list(inputs), reduction.pre_divisor)
        if self.world_size == 1:
            _copy_unless_same(outputs, inputs)
        else:
            options = ReduceScatterOptions()
            options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG if reduction.mean else dist.ReduceOp.SUM)
            options.asyncOp = False
            for out, inp in by_dtype(outputs, inputs):
                finish(getattr(self._reduce_group, _REDUCE)(out, inp, options))
        if reduction.post_divisor != 1.0:
            torch._foreach_div_(list(outputs), reduction.post_divisor)


def _cast(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
    reduction: Reduction,
    accumulate: bool,
) -> None:
    """Write one rank's gradients to its shards, or add them, rounded to ``dtypes`` and divided there."""
    divisors = [d for d in (reduction.pre_divisor, reduction.post_divisor) if d != 1.0]
    values = [
        i if torch.promote_types(i.dtype, d) == d and not divisors else i.to(d)
        for i, d in zip(inputs, dtypes, strict=True)
    ]
    for divisor in divisors:
        torch._foreach_div_(values, divisor)
    (torch._foreach_add_ if accumulate else torch._foreach_copy_)(list(outputs), values)


def finish(work: dist.Work | None) -> None:
    """Complete a synchronous collective: block the CPU on gloo, and only order the current stream on NCCL."""
    if work is not None:
        work.wait()


Pieces = list[tuple[list[torch.Tensor], list[torch.Tensor]]]  # outputs and inputs of one dtype each


def by_dtype(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Pieces:
    """Make one pair of lists per dtype, in order of first appearance, without pieces that have no elements."""
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for out, inp in zip(outputs, inputs, strict=True):
        if out.numel():
            out_list, in_list = groups.setdefault(out.dtype, ([], []))
            out_list.append(out)
            in_list.append(inp)
    return list(groups.values())


def _copy_unless_same(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
    pairs = [(o, i) for o, i in zip(outputs, inputs, strict=True) if o.data_ptr() != i.data_ptr()]
    if pairs:
        torch._foreach_copy_([o for o, _ in pairs], [i for _, i in pairs])
