"""What the engine asks of the ranks that share one unit's parameters.

A transport moves pieces between buffers it is given; it owns no memory, keeps no state between calls, and knows
nothing of units or schedules. It issues work on the stream that is current when it is called and does not block the
CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Reduction:
    """How gradients are combined: the mean over ranks, or ``sum / divisor`` for a divisor of the user's.

    ``pre_divisor`` is applied to every rank's input before the sum and ``post_divisor`` to the result after it;
    together with the mean (when ``mean`` is set) they make up the whole division.
    """

    mean: bool = True
    pre_divisor: float = 1.0
    post_divisor: float = 1.0


class Transport(Protocol):
    """The ranks of one shard mesh dimension."""

    rank: int
    world_size: int

    def all_gather(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """``outputs[i]``, ``(world_size * n_i,)``, receives every rank's ``inputs[i]``, ``(n_i,)``, in order of rank.

        At world size 1 the engine makes outputs and inputs the same memory, and there is nothing to do.
        """

    def reduce_scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], reduction: Reduction
    ) -> None:
        """``outputs[i]``, ``(n_i,)``, receives chunk ``rank`` of the reduction of all ranks' ``inputs[i]``,
        ``(world_size * n_i,)``. An output may be that very chunk of its input; otherwise inputs are scratch afterwards
        only if ``pre_divisor`` is not 1."""

    def agree(self, lines: Sequence[str], error: BaseException | None) -> None:
        """Raises the same error on every rank unless all ranks pass the same ``lines`` and no ``error``.

        Blocks the CPU; called once per model, never in a step.
        """
