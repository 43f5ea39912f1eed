"""The transport over ``torch.distributed`` process groups: NCCL or gloo, any topology, any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions

from yafsdp_like.comm.transport import Reduction

# Torch 2.12 renamed the coalesced collectives and kept the old names with a warning.
_NEW_NAMES = hasattr(dist.ProcessGroup, "all_gather_single_coalesced")
_GATHER = "all_gather_single_coalesced" if _NEW_NAMES else "allgather_into_tensor_coalesced"
_REDUCE = "reduce_scatter_single_coalesced" if _NEW_NAMES else "reduce_scatter_tensor_coalesced"

# One communicator for reductions per shard group, made on first use: on the gather's own communicator the two would run
# one after the other. Keyed by the group object, so that groups of a process's former life are never met again.
_reduce_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _reduce_group_of(group: dist.ProcessGroup) -> dist.ProcessGroup:
    if group not in _reduce_groups:
        ranks = dist.get_process_group_ranks(group)
        _reduce_groups[group] = dist.new_group(ranks, use_local_synchronization=True, group_desc="yafsdp_reduce")
    return _reduce_groups[group]


class ProcessGroupTransport:
    """Coalesced collectives: one call, one group launch, one piece per parameter, nothing packed or unpacked."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world_size = group.rank(), group.size()
        self._gather_group = group
        self._reduce_group = _reduce_group_of(group) if self.world_size > 1 else group

    def all_gather(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        if self.world_size == 1:
            return
        options = AllgatherOptions()
        options.asyncOp = False  # on the current stream, not on one of the group's own
        for out, inp in _by_dtype(outputs, inputs):
            _finish(getattr(self._gather_group, _GATHER)(out, inp, options))

    def reduce_scatter(
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
            for out, inp in _by_dtype(outputs, inputs):
                _finish(getattr(self._reduce_group, _REDUCE)(out, inp, options))
        if reduction.post_divisor != 1.0:
            torch._foreach_div_(list(outputs), reduction.post_divisor)

    def agree(self, lines: Sequence[str], error: BaseException | None) -> None:
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        reports = self._share((digest, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        failed = [(rank, message) for rank, (_, message) in enumerate(reports) if message is not None]
        if failed:
            raise RuntimeError("\n".join(f"rank {rank} failed to shard the model: {m}" for rank, m in failed))
        if any(other != digest for other, _ in reports):
            raise RuntimeError(_first_difference(self._share(list(lines))))

    def _share(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._gather_group)
        return values


def _finish(work: dist.Work | None) -> None:
    """Completes a synchronous collective: blocks the CPU on gloo, and only orders the current stream on NCCL."""
    if work is not None:
        work.wait()


def _by_dtype(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """One pair of lists per dtype, in order of first appearance; pieces without elements are left out."""
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


def _first_difference(lines_by_rank: Sequence[Sequence[str]]) -> str:
    """Names the first unit or parameter on which ranks differ, and what each rank has there."""
    longest = max(len(lines) for lines in lines_by_rank)
    padded = [[*lines, *["(nothing)"] * (longest - len(lines))] for lines in lines_by_rank]
    for position in range(longest):
        found: dict[str, list[int]] = {}
        for rank, lines in enumerate(padded):
            found.setdefault(lines[position], []).append(rank)
        if len(found) > 1:
            told = "; ".join(f"rank {', '.join(map(str, ranks))}: {line}" for line, ranks in found.items())
            return (
                f"ranks shard different models; the first difference is entry {position}: {told}. Build the same "
                "modules, and call fully_shard on them in the same order with the same arguments, on every rank"
            )
    raise AssertionError("ranks disagree, yet no line differs")
