"""What is done to gradients between backward and the update: their norm, clipping, and whether they can be trusted.

Owns the one small all-reduce of a step. It carries the norm, and beside it what each rank wishes for all of them (to
stop), so that ranks agree without another message. Nothing here waits for the device but `Measured.read`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launch.world import World
from yafsdp_like.comm.consistency import AgreedError, all_gather_object
from yafsdp_like.optim import AdamW
from yafsdp_like.optim.clipping import clipping_factor
from yafsdp_like.optim.moments import local


class NotFiniteError(AgreedError):
    """Training has left the numbers; the message says where. The same on all ranks."""


@dataclass(eq=False)
class Measured:
    """What is known of one step's gradients, on the device until it is read."""

    step: int
    norm: Tensor  # () fp32, over all ranks; NaN where gradients are dropped
    names: list[str]  # of the parameters that had a gradient
    norms: list[Tensor]  # () each, of this rank's part of each
    _packet: Tensor  # (2,) the norm, and how many ranks wish to stop; on the host once `_arrived`
    _arrived: torch.cuda.Event | None

    def read(self) -> tuple[float, bool]:
        """Return the norm, 0 where gradients are dropped, and whether any rank wishes to stop; wait for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, stops = self._packet.tolist()
        return norm, stops > 0


class Gradients:
    """Of one model, for one optimizer; `max_norm` None leaves them as they are.

    There is nothing to measure of those that are dropped by updates in backward.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
        world: World,
        are_dropped: bool = False,
    ) -> None:
        self._named = list(model.named_parameters())
        self._optimizer, self._max_norm, self._world = optimizer, max_norm, world
        self._are_dropped = are_dropped

    @torch.no_grad()
    def finish(self, step: int, wishes_stop: bool) -> Measured:
        """Measure the reduced gradients of `step`, and scale them down to `max_norm`. Called by all ranks.

        This package's AdamW gets the factor instead, and multiplies by it as it reads them.
        """
        if self._are_dropped:
            nothing, packet = self._over_ranks([], wishes_stop)
            return Measured(step, torch.full_like(nothing, math.nan), [], [], *_on_host(packet))
        found = [(name, local(param.grad)) for name, param in self._named if param.grad is not None]
        names, grads = [name for name, _ in found], [grad for _, grad in found]
        norms = list(torch._foreach_norm(grads, dtype=torch.float32)) if grads else []
        norm, packet = self._over_ranks(norms, wishes_stop)
        if self._max_norm is not None and grads:
            factor = clipping_factor(norm, self._max_norm)
            if isinstance(self._optimizer, AdamW):
                self._optimizer.clip_factor = factor
            else:
                torch._foreach_mul_(grads, factor)
        return Measured(step, norm, names, norms, *_on_host(packet))

    def _over_ranks(self, norms: list[Tensor], wishes_stop: bool) -> tuple[Tensor, Tensor]:
        """The norm of all ranks' shards, and it with the number of wishes in one tensor: squares add up."""
        device = self._world.device
        here = torch.linalg.vector_norm(torch.stack(norms)).float() if norms else torch.zeros((), device=device)
        wishes = torch.full((), float(wishes_stop), device=device)
        if self._world.size > 1:
            here, wishes = self._world.sum(torch.stack([here**2, wishes])).unbind()
            here = here**0.5
        return here, torch.stack([here, wishes])


def _on_host(packet: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if packet.device.type != "cuda":
        return packet, None
    copy = torch.empty(packet.shape, dtype=packet.dtype, pin_memory=True)
    copy.copy_(packet, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived


def where_not_finite(names: list[str], norms: list[Tensor]) -> str | None:
    """Return which tensors are not finite, in words, or None; all ranks call it with the norms of their parts."""
    finite = torch.isfinite(torch.stack([norm.float() for norm in norms])).tolist() if norms else []
    here = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    bad = {name for there in all_gather_object(here) for name in there}
    found = [name for name in names if name in bad]
    if not found:
        return None
    module, _, parameter = found[0].rpartition(".")
    others = f", the first of {len(found)} of {len(names)} parameters" if len(found) > 1 else ""
    return f"{module or 'the model'} ({parameter}{others})"
