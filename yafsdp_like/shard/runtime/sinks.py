"""How gradients of unsharded parameters get to their place in the unit's gradient slot.

Owns the two ways there: linear layers write the gradient where it belongs as they compute it (``GradientSink``), and
what autograd completes is handed over (``watch_gradients``). What then becomes of it is the engine's.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from yafsdp_like.ops.linear import attach

if TYPE_CHECKING:
    from torch import nn

    from yafsdp_like.shard.runtime.slots import GatherSlot
    from yafsdp_like.shard.runtime.unit_state import Unit


def watch_gradients(unit: Unit, slot: GatherSlot) -> None:
    """Take gradients that autograd completes for the parameters of ``unit`` in ``slot`` from now on."""
    unit_ref = weakref.ref(unit)  # weak, since the garbage collector does not see through a parameter's hooks
    for k in [k for k, p in enumerate(unit.params) if p.trainable]:
        if k in slot.extended:
            slot.extended[k].on_made = partial(_watch, unit_ref, k)
            continue
        slot.params[k].register_post_accumulate_grad_hook(partial(_take_gradient, unit_ref, k))
        is_plain = not isinstance(slot.params[k], DTensor)
        if is_plain and slot.params[k].dim() == 2 and not slot.params[k].is_complex():
            attach(slot.params[k], GradientSink(unit_ref, k))


def _watch(unit_ref: weakref.ref[Unit], k: int, param: nn.Parameter) -> None:
    param.register_post_accumulate_grad_hook(partial(_take_gradient, unit_ref, k))


@dataclass(frozen=True, slots=True)
class GradientSink:
    """Where linear layers write the gradient of parameter ``k`` of a unit: its place in the gradient slot."""

    unit: weakref.ref[Unit]
    k: int

    def open(self) -> tuple[torch.Tensor, bool] | None:
        """Return the place and whether to add there, or None where the gradient is to go through autograd.

        The place is for a gradient that is all the slot will hold, in the dtype that it is computed in. Sums over
        several uses are left to autograd, whose order and rounding they then have, and which needs no slot before the
        last of them.
        """
        unit, k = self.unit(), self.k
        assert unit is not None
        p, registered = unit.params[k], unit.registered
        if p.gradient_dtype is not p.compute_dtype or len(unit.running.pending) > 1 or k in unit.gradient_slot.holds:
            return None
        if registered is not None and registered.params[k]._backward_hooks:
            return None  # of the user's, on the full parameter: they are to see its gradient
        return unit.gradients.view(unit, k)

    def withdraw(self) -> torch.Tensor | None:
        """Take out what was written there, if autograd is to sum it with others after all."""
        unit = self.unit()
        assert unit is not None
        return unit.gradient_slot.withdraw(self.k)

    def check_readable(self) -> None:
        """Raise ``RuntimeError`` if the unit is released: see [Note: hidden slots]."""
        unit = self.unit()
        assert unit is not None
        unit.gradients.check_entered(unit, self.k)


def _take_gradient(unit_ref: weakref.ref[Unit], k: int, param: torch.Tensor) -> None:
    unit, grad = unit_ref(), param.grad
    assert unit is not None
    if grad is not None:  # not written to its view by a linear layer
        param.grad = None
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{unit.params[k].name}: expected a dense gradient to reduce, found {grad.layout}; "
                "sparse gradients cannot be sharded, use sparse=False"
            )
        if (placement := unit.params[k].placement).inner_mesh is not None:
            grad = placement.gradient_of_whole(grad)
    gradients, task = unit.gradients, torch._C._current_graph_task_id()
    if task not in unit.running.reached:
        gradients.check_entered(unit, k)
    gradients.arrived(unit, k, grad, task)
