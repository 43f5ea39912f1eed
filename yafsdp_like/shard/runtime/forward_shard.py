"""What a rank keeps of a unit's full parameters from forward to backward, if that is more than its own shard.

[Note: forward shards]
``reshard_after_forward=n`` lets each group of ``n`` ranks that follow each other keep the parameters together: after
forward a rank copies its ``n``-th part of the gather slot to a region of the plan, and the all-gather for backward is
one among those ``n`` ranks, a host's as a rule, over their process group. It brings the values that forward has read
back to the same address, so numbers do not depend on ``n``. All-gathers of forwards, and units that stay unsharded or
whose slot nobody has taken meanwhile, are not concerned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.comm.transport import AllGather, Transport


class ForwardShard:
    """This rank's parts of one unit's parameters, ``(padded_numel / n,)`` each; ``transport`` is of the ``n`` ranks."""

    def __init__(self, transport: Transport, parts: Sequence[torch.Tensor]) -> None:
        self._transport, self._parts = transport, list(parts)
        self.is_kept = False  # whether the parts are what the unit's last forward has read

    def keep(self, full: Sequence[torch.Tensor]) -> None:
        """Copy this rank's parts of the ``full`` parameters, ``(padded_numel,)`` each, on the current stream."""
        num_ranks, rank = self._transport.world_size, self._transport.rank
        parts = [f.view(num_ranks, f.numel() // num_ranks)[rank] for f in full]
        with torch.no_grad():
            torch._foreach_copy_(self._parts, parts)
        self.is_kept = True

    def drop(self) -> None:
        """Note that another forward of the unit begins, or that its parameters were updated."""
        self.is_kept = False

    def all_gather(self, full: Sequence[torch.Tensor]) -> AllGather:
        """Return what all-gathers the parts into the ``full`` parameters."""
        return self._transport.all_gather(full, self._parts)
