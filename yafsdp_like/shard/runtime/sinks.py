"""How gradients of gathered parameters come to their place in the unit's gradient slot.

Owns the two ways there: linear layers write the gradient where it belongs as they compute it (``GradientSink``), and
what autograd completes is handed over (``watch_gradients``). What then becomes of it is the engine's.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from yafsdp_like.ops.linear import attach

if TYPE_CHECKING:
    from yafsdp_like.shard.runtime.unit_state import GatherSlot, Unit


def watch_gradients(slot: GatherSlot) -> None:
    """From now on, gradients that autograd completes for the slot's parameters move into the unit's gradient slot."""
    for k in [k for k, p in enumerate(slot.unit.params) if p.trainable]:
        # Weak, since the garbage collector does not see through a parameter's hooks.
        unit_ref = weakref.ref(slot.unit)
        slot.params[k].register_post_accumulate_grad_hook(partial(_take_gradient, unit_ref, k))
        if slot.params[k].dim() == 2 and not slot.params[k].is_complex():
            attach(slot.params[k], GradientSink(unit_ref, k))


@dataclass(frozen=True)
class GradientSink:
    """Where linear layers write the gradient of parameter ``k`` of a unit: its place in the gradient slot."""

    unit: weakref.ref[Unit]
    k: int

    def open(self) -> tuple[torch.Tensor, bool] | None:
        """Nowhere, unless the gradient to come is all that the slot will hold, in the dtype that it is computed in:
        sums over several uses are left to autograd, whose order and rounding they then have, and which needs no slot
        before the last of them.
        """
        unit = self.unit()
        assert unit is not None
        p = unit.params[self.k]
        if p.gradient_dtype != p.compute_dtype or len(unit.pending) > 1 or self.k in unit.gradient_slot.holds:
            return None
        if unit.registered is not None and unit.registered.params[self.k]._backward_hooks:
            return None  # of the user's, on the full parameter: they are to see its gradient
        engine = unit.engine
        assert engine is not None
        return engine.open_gradient(unit, self.k)

    def withdraw(self) -> torch.Tensor | None:
        unit = self.unit()
        assert unit is not None
        slot = unit.gradient_slot
        if self.k not in slot.holds or self.k in slot.arrived:
            return None
        slot.holds.discard(self.k)
        return slot.views[self.k].clone()


def _take_gradient(unit_ref: weakref.ref[Unit], k: int, param: torch.Tensor) -> None:
    unit, grad = unit_ref(), param.grad
    engine = unit.engine if unit is not None else None
    assert unit is not None and engine is not None
    param.grad = None
    if grad is not None and grad.layout is not torch.strided:
        raise RuntimeError(
            f"{unit.params[k].name}: expected a dense gradient to reduce, found {grad.layout}; "
            "sparse gradients cannot be sharded, use sparse=False"
        )
    if torch._C._current_graph_task_id() not in unit.reached:
        engine.check_entered(unit, k)
    engine.accumulate(unit, k, grad)
