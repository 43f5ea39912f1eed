"""Parameters that are sharded on another dimension than the first: their way to and from their places in slots.

Owns what all-gathers and reduce-scatters do beside the transport for these. Knows tensors and shapes, no units.

[Note: layout staging]
A collective concatenates what ranks have. Slices on another dimension than the first are not together in a contiguous
tensor, which is what modules compute on, so such a parameter is all-gathered into the region ``gathered``, rank by
rank, with the others of its unit in the same collective, and copied from there into its unit's slot. Only all-gathers
use the region, whose stream orders them; it is as large as what the unit that has most of these needs. Gradients need
none: nobody but the engine sees a gradient slot, so there such a parameter's gradient is stored with the sharded
dimension first, as whoever computes it writes it. This rank's chunk of the sum arrives in the region ``reduced``, which
only reductions use, and is copied to the gradient shard, whose dimensions are in the parameter's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import FlatLayout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Reduction
    from yafsdp_like.memory.arena import Place
    from yafsdp_like.memory.layout import RowShards


@dataclass(frozen=True, eq=False)
class Move:
    """One parameter's bytes in two orders, ``(numel,)`` each, complex numbers as pairs of reals.

    ``arranged`` is in the parameter's own order, and ``staged`` has what a collective moves.
    """

    arranged: torch.Tensor
    staged: torch.Tensor
    shards: RowShards
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class LayoutStaging:
    """The regions on the device, ``(nbytes,)`` uint8 each, that units share. See [Note: layout staging]."""

    gathered: torch.Tensor
    reduced: torch.Tensor

    def gathered_chunks(self, full: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return where to all-gather parameters that have the ``full`` tensors ``(numel,)`` in a slot."""
        return _cut(self.gathered, full)

    def reduced_chunks(self, grads: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return where to reduce gradients whose shards are ``grads``, ``(numel,)``."""
        return _cut(self.reduced, grads)


def _cut(region: torch.Tensor, like: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    layout = FlatLayout.pack([tensor.numel() * tensor.itemsize for tensor in like.values()])
    parts = zip(like.items(), layout.segments, strict=True)
    return {k: region[part.offset_nbytes : part.end_nbytes].view(tensor.dtype) for (k, tensor), part in parts}


def gradient_view(place: Place, dtype: torch.dtype, shards: RowShards) -> torch.Tensor:
    """Return a full gradient, of the parameter's shape, on memory in which the ranks' chunks are together."""
    if not shards.is_permuted:
        return place.tensor(dtype, shards.shape)
    dim, shape = shards.dim, shards.shape
    return place.tensor(dtype, (shape[dim], *shape[:dim], *shape[dim + 1 :])).movedim(0, dim)


def arrange_after(all_gather: AllGather, moves: Sequence[Move]) -> AllGather:
    """Return what all-gathers to what is ``staged``, and then copies it to what is ``arranged``: full parameters."""
    copies = []
    for move in moves:
        shards, full = move.shards, move.arranged.view(move.dtype).view(move.shards.shape)
        by_rank = full.unflatten(shards.dim, (shards.world_size, shards.rows_per_rank)).movedim(shards.dim, 0)
        copies.append((by_rank, move.staged.view(move.dtype).view(by_rank.shape)))

    def run() -> None:
        all_gather()
        for arranged, staged in copies:
            arranged.copy_(staged)

    return run


def arrange_around(reduce: ReduceScatter, moves: Sequence[Move]) -> ReduceScatter:
    """Return what reduces to what is ``staged``, and then copies it to what is ``arranged``: gradient shards."""

    def run(reduction: Reduction, accumulate: bool) -> None:
        pairs = [_in_one_order(move) for move in moves]  # anew, since gradient shards get other memory at times
        for shard, chunk in pairs if accumulate else ():
            chunk.copy_(shard)
        reduce(reduction, accumulate)
        for shard, chunk in pairs:
            shard.copy_(chunk)

    return run


def _in_one_order(move: Move) -> tuple[torch.Tensor, torch.Tensor]:
    dim, local = move.shards.dim, move.shards.local_shape(0)
    chunk = move.staged.view(move.dtype).view((local[dim], *local[:dim], *local[dim + 1 :]))
    return move.arranged.view(move.dtype).view(local), chunk.movedim(0, dim)
