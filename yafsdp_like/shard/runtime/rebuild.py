"""When shards and slots are made, and made again: before the first forward, and after parameters have changed.

Owns that decision and its order: release everything, put main shards into their arenas, allocate, take over what was
unsharded or not yet reduced, and compare with all ranks. ``allocated_memory.py`` does the allocating.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from yafsdp_like.shard.runtime.slots import SlotState

if TYPE_CHECKING:
    from yafsdp_like.shard.runtime.allocated_memory import Spill
    from yafsdp_like.shard.runtime.context import EngineContext
    from yafsdp_like.shard.runtime.gradients import GradientLifecycle
    from yafsdp_like.shard.runtime.params import ParamLifecycle
    from yafsdp_like.shard.runtime.unit_state import Unit


@dataclass(frozen=True)
class Report:
    """Bytes held now, and what did not go by the plan since the model was sharded: nothing, in a well-planned run."""

    arena_nbytes: int  # on the device
    spills: tuple[Spill, ...]
    wasted_prefetches: int  # units that were prefetched and not read
    evictions: int  # units that were to stay unsharded and were released for another
    host_nbytes: int = 0  # in host memory


class Rebuild:
    """Decides when the memory of one model's units is built, and frees it."""

    def __init__(self, context: EngineContext, params: ParamLifecycle, gradients: GradientLifecycle) -> None:
        self._context, self._memory, self._units = context, context.memory, context.tree.units
        self._params, self._gradients = params, gradients

    def report(self) -> Report:
        """Return the bytes held now, and what departed from the plan."""
        params = self._params
        return Report(
            self._memory.nbytes,
            tuple(self._memory.spills),
            params.wasted_prefetches,
            params.evictions,
            sum(unit.host_nbytes for unit in self._units),
        )

    def if_changed(self) -> None:
        """Make shards and slots before the first iteration, and again when parameters were moved, cast or (un)frozen.

        Slots that autograd still refers to live on until their graph is gone. Raises the same error on every rank
        when a rank cannot go on, or when ranks shard different models.
        """
        self._memory.follow_grad_mode()
        if self._memory.is_built:
            return
        self._context.collective_log.builds()
        error: Exception | None = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._build()
        except Exception as e:
            error = e
        self._memory.check_same_on_all_ranks(error)

    def _build(self) -> None:
        held = [u for u in self._units if u.registered and u.registered.state is SlotState.HELD]
        edited = {u: u.copy_unsharded() for u in held if not (u.registered and u.registered.extended)}
        for unit in self._units:
            self._params.reshard(unit)
            unit.materialize()
        if on_meta := [names for unit in self._units if (names := unit.meta_params())]:
            others = sum(map(len, on_meta[1:]))
            raise RuntimeError(
                "FSDP parameters should be materialized from meta device before training, but the following were still "
                f"on meta device: {on_meta[0]}{f', and {others} of other units' if others else ''}\n"
                "Call model.to_empty(device=...), then initialize or load the parameters"
            )
        if misplaced := [found for unit in self._units for found in unit.misplaced_params()]:
            raise RuntimeError(
                "FSDP parameters should be materialized on CPU when enabling CPU offloading: load a CPU state dict, or "
                f'call model.to_empty(device="cpu"). Found following parameters on non-CPU device: {misplaced}'
            )
        unsynced = [(unit, slot) for unit in self._units if (slot := unit.unsynced()) is not None]
        self._context.wait_for_side_streams()  # the bytes go back to the allocator, which knows only compute
        self._memory.leave()
        self._memory.build()
        for unit, slot in unsynced:
            for k in slot.arrived:
                self._gradients.arrived(unit, k, slot.views[k], None)
        for unit, values in edited.items():
            self._params.unshard_to(unit, values)

    def part_with(self, units: list[Unit]) -> None:
        """Break what circles ``units`` and their slots form: the root module is gone, and every graph of it."""
        if self._memory.arena is not None:
            self._context.wait_for_side_streams()
        if self._memory.shared is not None:
            self._memory.shared.part_with(units)
        for unit in units:
            if not unit.has_slots:
                continue
            for slot in (*unit.slots, unit.gradient_slot):
                slot.forget_neighbours()
            if unit.unsynced() is None and all(slot.state is not SlotState.HELD for slot in unit.slots):
                self._params.reshard(unit)
                unit.forget_slots()
