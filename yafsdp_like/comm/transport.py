"""What the ranks that share parameters do with each other: all-gathers and reduce-scatters.

A transport moves pieces between buffers it is given; it owns no memory that lives longer than a call, and knows
nothing of units or schedules. It issues work on the stream that is current when it is called and does not block the
CPU, except where that is said.

Buffers never move, so ``all_gather`` and ``reduce_scatter`` are asked once for a list of buffers, and return what runs
the operation on them as often as it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from yafsdp_like.comm.mapped_memory import MappedMemory

Averaged = Literal["new", "all", "nothing"]


@dataclass(frozen=True)
class Reduction:
    """How gradients are combined: the mean over ranks, or ``sum / divisor`` for a divisor of the user's.

    ``pre_divisor`` is applied to every rank's input before the sum and ``post_divisor`` to the result after it;
    together with the mean (when ``mean`` is set) they make up the whole division. ``averaged`` is what replicas, where
    there are any, average: the new gradients, which are then added to what is the same on all of them; all that the
    outputs then hold; or nothing yet, so that a later reduction must average all.
    """

    mean: bool = True
    pre_divisor: float = 1.0
    post_divisor: float = 1.0
    averaged: Averaged = "new"


AllGather = Callable[[], None]
ReduceScatter = Callable[[Reduction, bool], None]  # how to combine; whether to add to the outputs or to replace them


class Transport(Protocol):
    """The ranks of one shard mesh dimension."""

    rank: int
    world_size: int
    description: str  # what moves the bytes, and why this transport was chosen
    everybody: dist.ProcessGroup  # all ranks that must do the same, in the same order

    @property
    def mapped(self) -> MappedMemory | None:
        """The memory that ranks map of each other, see [Note: mapped memory]; None if all goes by collectives."""

    def all_gather(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        in_place: Collection[int] = (),
        scratch: torch.Tensor | None = None,
    ) -> AllGather:
        """Prepare to collect every rank's ``inputs[i]``, ``(n_i,)``, in order of rank, in every rank's outputs.

        ``outputs[i]`` is ``(world_size * n_i,)``, of the same dtype. For ``i`` in ``in_place`` this rank's chunk of the
        output is the input, mapped at another address. ``scratch``, ``(mapped.column_nbytes(...),)`` uint8 or more,
        lies in memory that peers map, and every all-gather of the stream writes it.
        At world size 1 outputs and inputs are the same memory, and there is nothing to do.
        """

    def reduce_scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        scratch: torch.Tensor,
    ) -> ReduceScatter:
        """Prepare to reduce all ranks' ``inputs[i]``, ``(world_size * n_i,)``, and keep chunk ``rank`` of the result.

        ``outputs[i]``, ``(n_i,)``, is replaced by the chunk, or has it added to it, rounded to ``dtypes[i]`` before it
        is cast to the output's own dtype. Inputs are scratch afterwards. ``scratch``, ``(nbytes,)`` uint8, is written
        by every reduce-scatter of the stream, and may be empty where no memory is mapped.
        """
