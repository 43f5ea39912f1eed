"""The life of full gradients: computed into a unit's gradient slot, complete, reduced into the gradient shard.

Owns every transition of a gradient slot's state and the order of streams around it. A gradient takes three steps:
whatever computes it writes to its ``view``, it has ``arrived``, and the unit's are reduced by ``reduce_scatter``.

    EMPTY --first gradient--> HELD --reduce-scatter--> EMPTY

[Note: update in backward]
Where a unit has an ``Updater``, its parameters are updated behind the reduction that completes their gradients, on the
same stream: once no use of the unit awaits its backward any more, in the last backward of a step. What that may write:

* main shards: nobody else reads them in backward. On one rank slots are shards, and compute reads those in the unit's
  backward, which is over: the reduction has waited for it, or the update does where all was reduced early.
* compute shards: all-gathers read them, and where memory is mapped so do other ranks' ones, without a barrier of their
  own. But every rank's compute has waited for its all-gather before it computed the gradients, and the reduction's
  first barrier says that all ranks have: so a unit is updated only behind a reduction of its own.

All-gathers of the next forward come after the end of the backward, for which compute waits.

[Note: who frees what another stream reads]
Gradient shards, and what was written to a split master, are allocated by compute and freed in its order: a block is
compute's again as soon as the CPU frees it, however far the device is behind. So what reads one on another stream is
waited for by compute first. The memory of gradients that an update in backward has read is freed at the next unit's
reduction, so that updates run beside the backward, and gradients of one unit have memory; others' at the next forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.memory.streams import COMPUTE, REDUCE
from yafsdp_like.shard.runtime.context import EngineContext, label, without_grad
from yafsdp_like.shard.runtime.running import backward_task
from yafsdp_like.shard.runtime.slots import SlotState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from yafsdp_like.memory.streams import Event
    from yafsdp_like.shard.runtime.param import ShardedParam
    from yafsdp_like.shard.runtime.unit_state import Unit, Updater
    from yafsdp_like.shard.runtime.unit_tree import UnitTree

EARLY_NUMEL = 1 << 23  # a reduction of fewer elements costs more in latency than it hides


class GradientLifecycle:
    """Moves the gradient slots of one model's units from state to state."""

    def __init__(self, context: EngineContext) -> None:
        self._context, self._streams = context, context.streams
        self._ticks = context.tree.backward_ticks
        self._reduced_early = _reduced_early(context.tree)
        self._writes_host = any(unit.is_on_host for unit in context.tree.units)
        self._last_reduce: Event = None  # the end of the latest reduction; None once compute has waited for it
        self._reduced: set[Unit] = set()  # by the running backward
        self.filled: list[Unit] = []  # whose unused parameters the running backward reduces, in order of reduction
        self._updated: list[tuple[Event, list[ShardedParam], list[torch.Tensor]]] = []  # until their gradients are free
        self.is_last_backward = True  # whether the end of a backward waits for its reductions
        self.is_finalized_by_user = False  # who waits for them after it

    def finalize_by_user(self, by_user: bool) -> None:
        """Set whether the user, and not the end of a backward, waits for reductions."""
        self.is_finalized_by_user = by_user

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Set whether the end of a backward waits for its reductions."""
        self.is_last_backward = is_last_backward

    # --- from the product to the slot ---

    def view(self, unit: Unit, k: int) -> tuple[torch.Tensor, bool]:
        """Return where to write parameter ``k``'s full gradient, and whether to add it to what is there already."""
        if not unit.needs.trains:
            self._context.memory.make_trainable()
            raise RuntimeError(
                f"a gradient of {unit.params[k].name!r} came from a forward that began without grad mode, as all did "
                f"so far: there is no room for it yet (rank {unit.transport.rank}). There will be in the next forward: "
                "run it again"
            )
        slot = unit.gradient_slot
        if slot.state is SlotState.EMPTY:
            held = [other.unit.name for other in slot.neighbours if other.state is SlotState.HELD]
            if held:
                self.isolate(unit, f"its gradients arrived before those of {held} were complete")
                slot = unit.gradient_slot
            self._context.wait_for_last_accesses(COMPUTE, slot)
            slot.hold()
        if k in slot.early:
            self._streams.wait(COMPUTE, slot.forget_early(k))
        return slot.open(k)

    def isolate(self, unit: Unit, reason: str) -> None:
        """Give ``unit`` a gradient slot of its own, from its next gradient on."""
        self._context.memory.add_gradient_slot(unit, reason)

    def arrived(self, unit: Unit, k: int, grad: torch.Tensor | None, task: int | None) -> None:
        """Note that parameter ``k``'s full gradient of the backward ``task``, ``(rows, ...)``, is complete.

        ``grad`` is what was not written to its view as it was computed; it is copied there, or added, now.
        """
        if grad is not None:
            view, holds_some = self.view(unit, k)
            with without_grad():
                if holds_some:
                    view.add_(grad)
                else:
                    view.copy_(grad)
        slot = unit.gradient_slot
        if k not in slot.holds:
            return  # no gradient came
        slot.arrive(k, task)
        early, policy = self._reduced_early.get(unit), unit.policy
        if early and k in early and policy.requires_gradient_sync and not policy.reduces_unused:
            together = list(slot.arrived)
            slot.reduced_early(together, self._reduce_arrived(unit))

    def all_arrived(self, unit: Unit) -> bool:
        """Return whether the running backward has computed every gradient that the unit can get from it."""
        slot, task = unit.gradient_slot, backward_task()
        return all(k in slot.early or slot.arrived.get(k) == task for k in slot.views)

    def check_entered(self, unit: Unit, k: int) -> None:
        """Raise ``RuntimeError`` if the unit is released, though the backward has computed parameter ``k``'s gradient.

        The backward has entered the unit by none of its outputs: what it read there may have been another unit's.
        """
        slot = unit.gather_slot
        is_released = slot.state not in (SlotState.HELD, SlotState.KEPT)
        if slot.extent is not None and is_released and unit.policy.unshard_in_backward:
            raise RuntimeError(
                f"a gradient of {unit.params[k].name!r} came while {unit.name!r} was released: backward entered it by "
                "a tensor that its forward did not return, or returned inside an object (rank "
                f"{unit.transport.rank}). Return such tensors in tuples, lists, dicts or dataclasses, and use what the "
                "module's call gives; or call set_unshard_in_backward(False) if its backward reads no parameter"
            )

    # --- from the slot to the gradient shard ---

    def reduce_scatter(self, unit: Unit) -> None:
        """Reduce the gradients that have arrived, and free the slot, unless it holds parts of others."""
        slot = unit.gradient_slot
        if unit.policy.reduces_unused and unit not in self._reduced:
            self._reduced.add(unit)
            self.reduce_unused(self._ticks[unit][1])
            self._fill_unused(unit)
            slot = unit.gradient_slot
        if not slot.arrived and not slot.early:
            return
        if self.filled and unit not in self._reduced:
            self._reduced.add(unit)
            self.reduce_unused(self._ticks[unit][1])
        all_early = not slot.arrived
        slot.release(self._last_reduce if all_early else self._reduce_arrived(unit))
        if unit.updater is not None and self.is_last_backward and not slot.holds and not unit.running.pending:
            self._update(unit, unit.updater, all_early)

    def _reduce_arrived(self, unit: Unit) -> Event:
        """Reduce what has arrived into gradient shards, set or add to ``.grad``, and return the event behind that."""
        slot = unit.gradient_slot
        arrived = sorted(slot.arrived)  # the same order on every rank
        adding = [k for k in arrived if unit.params[k].has_own_grad]
        setting = [k for k in arrived if k not in adding]
        self._check_not_updated(unit, arrived)
        self._free_updated()
        for k in setting:
            unit.params[k].take_grad()  # of memory that compute has used before, and is done with then
        complete = self._streams.record(COMPUTE)
        with label("reduce_scatter", unit), self._streams.on(REDUCE), without_grad():
            self._streams.wait(REDUCE, complete)
            self._context.collective_log.reduces(unit, setting, adding)
            for which, adds in ((setting, False), (adding, True)):
                if which:
                    slot.reduce_scatter(which)(unit.reduction(), adds)
            if unit.is_on_host and any(unit.params[k].is_grad_read for k in arrived):
                self._streams.synchronize(self._streams.record(REDUCE))
            for k in arrived:
                unit.params[k].deliver_grad(k in adding)
        self._last_reduce = self._streams.record(REDUCE)
        slot.reduced(arrived)
        return self._last_reduce

    # --- the update ---

    def _update(self, unit: Unit, updater: Updater, all_early: bool) -> None:
        """Update the unit's parameters behind the reduction: see [Note: update in backward]."""
        if unit.policy.averaged == "nothing":
            return
        if all_early:  # when compute was not done with the unit
            self._streams.wait(REDUCE, self._streams.record(COMPUTE))
        with label("update", unit), self._streams.on(REDUCE), without_grad():
            if unit.settle():  # see [Note: who frees what another stream reads]
                self._streams.wait(COMPUTE, self._streams.record(REDUCE))
            params = updater.update(unit)
        if params:
            self._last_reduce = self._streams.record(REDUCE)
            grads = [p.sharded.grad for p in params if p.sharded.grad is not None]
            self._updated.append((self._last_reduce, params, grads))
            unit.updated_in_backward(params)
            for p in params:
                p.sharded.grad = None

    def _check_not_updated(self, unit: Unit, arrived: Sequence[int]) -> None:
        again = [unit.params[k].name for k in arrived if unit.params[k] in unit.updated] if unit.updated else []
        if again:
            raise RuntimeError(
                f"a gradient of {again[0]!r} came after a backward had updated it (rank {unit.transport.rank}): call "
                "model.set_is_last_backward(False) before every backward of a step but the last, and optimizer.step() "
                "after that"
            )

    def _free_updated(self) -> None:
        """Give the memory of gradients back that an update has read, unless somebody holds them."""
        while self._updated:
            done, params, grads = self._updated.pop()
            self._streams.wait(COMPUTE, done)
            grads.clear()
            for p in params:
                p.release_grad()

    # --- parameters that no gradient comes for ---

    def begin_backward(self) -> None:
        """Note that the first gradient of an outermost backward has come."""
        self.filled = [unit for unit in self._ticks if unit.policy.reduces_unused]
        self._reduced.clear()
        for updater in dict.fromkeys(unit.updater for unit in self._ticks if unit.updater is not None):
            updater.begin()

    def reduce_unused(self, tick: int) -> None:
        """Reduce units whose backward was expected to end before ``tick``, and will not come.

        Only those that are to be reduced whether they are used or not: where they are on ranks that use them.
        """
        for unit in self.filled:
            if self._ticks[unit][1] >= tick:
                return
            if unit.policy.requires_gradient_sync and not unit.running.pending and unit not in self._reduced:
                self.reduce_scatter(unit)

    def _fill_unused(self, unit: Unit) -> None:
        for k in unit.trainable:
            if k not in unit.gradient_slot.holds:
                view, _ = self.view(unit, k)
                with without_grad():
                    view.zero_()
                unit.gradient_slot.arrive(k, backward_task())

    # --- the end of a backward ---

    def wait_for_reductions(self) -> None:
        """End a backward: what follows on compute (clipping, the optimizer) sees every gradient."""
        if self._last_reduce is not None:
            self._streams.wait(COMPUTE, self._last_reduce)
            self._context.arm_watchdog(self._last_reduce)
            if self._writes_host:  # the CPU reads gradients
                self._streams.synchronize(self._last_reduce)
            self._last_reduce = None
        self._free_updated()

    def release_unused(self) -> None:
        """Give back the memory of gradients that an update has read: a forward's activations need it now."""
        if self._last_reduce is None:  # compute, in whose order memory is reused, has waited for every reduction
            for unit in self._context.tree.units:
                for p in unit.params:
                    p.release_grad()

    def forget_events(self) -> None:
        """Note that compute has waited for all reductions that were issued."""
        self._last_reduce = None

    def discard(self) -> None:
        """Drop gradients that are complete in part only, after a backward that failed."""
        for unit in self._context.tree.units:
            unit.gradient_slot.drop()


def _reduced_early(tree: UnitTree) -> dict[Unit, set[int]]:
    """Return large parameters of units whose backward contains that of others: they do not wait for the unit's end.

    A head's gradient is then reduced behind the blocks, and only an embedding's is left for the end.
    """
    spans = zip(tree.units, tree.schedule.spans, strict=True)
    outer = (unit for unit, span in spans if tree.schedule.surrounds(span))
    return {u: {k for k in u.trainable if u.params[k].shards.padded_numel >= EARLY_NUMEL} for u in outer}
