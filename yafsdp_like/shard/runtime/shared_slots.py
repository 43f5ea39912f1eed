"""One arena for the slots of several models, which run one after the other: the policy, reference and critic, say.

Owns that arena, and which models have slots in it. Each model has an engine, shards and a plan of its own; what its
slots do to another's is what neighbours in one model do to each other (``slots.py``, ``params.py``).

[Note: shared slots]
Every model places its slots from the start of the same regions, so that these are as large as the largest model's, and
almost every slot has neighbours of other models. All models of a device issue their work to the same streams, and a
writer waits for what was last done in a neighbour. So the order of models is free:

* Between one model's forward and its backward another may run. What the first has left in its slots is overwritten, and
  its backward all-gathers again; the root too, which would have stayed.
* A model that runs inside another's forward, or while a unit is unsharded by hand, finds bytes that are HELD: its units
  that need these get slots of their own, see [Note: spills]. So do, while another model awaits its backward, units
  that are unsharded by hand, and those with gradients at their end only (none of their inputs needs one, as a root's).

[Note: a model's second place]
What autograd has saved keeps the old slots when a model's memory is built again. So a model takes places in an arena
once: when it is built again, by whatever change of its parameters, there is a new arena, and the others move there with
their next forward. All ranks decide that alike, and the old arena goes when its last model has moved.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

from yafsdp_like.memory.arena import Arena
from yafsdp_like.shard.runtime.slots import Slot, introduce
from yafsdp_like.shard.spec.shared_layout import plan_together, shared_regions

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot
    from yafsdp_like.shard.runtime.unit_state import Unit
    from yafsdp_like.shard.runtime.unit_tree import UnitTree
    from yafsdp_like.shard.spec.memory_layout import MemoryLayout


class SharingMemory(Protocol):
    """What is asked of the memory of a model that shares slots."""

    shared_arena: Arena | None  # where they are, once built
    debugger: Any  # ``Debugger``, or None

    @property
    def nbytes(self) -> int:
        """The bytes held on the device now."""

    def plan(self) -> MemoryPlan:
        """Return what is built, or else what would be."""


class SharingModel(Protocol):
    """What is asked of such a model's engine."""

    @property
    def tree(self) -> UnitTree:
        """Its units."""

    @property
    def memory(self) -> SharingMemory:
        """Their memory."""


class SlotSharing:
    """The slots of several models in one arena, as long as one of the models lives: what their engines ask for."""

    def __init__(self, engines: Mapping[str, SharingModel]) -> None:
        self._arena: weakref.ref[Arena] | None = None  # see the property
        self._engines = {name: weakref.ref(engine) for name, engine in engines.items()}  # see [Note: who owns whom]
        self._taken: weakref.WeakSet[SharingMemory] = weakref.WeakSet()  # models with places in the arena
        self._gather_slots: list[weakref.ref[GatherSlot]] = []  # in it
        self._gradient_slots: list[weakref.ref[GradientSlot]] = []

    @property
    def arena(self) -> Arena | None:
        """Where models that are built from now on have their slots, as long as a model has."""
        return None if self._arena is None else self._arena()

    @property
    def names(self) -> list[str]:
        """Of all models, also of those that are gone."""
        return list(self._engines)

    @property
    def engines(self) -> dict[str, SharingModel]:
        """The models that are still there, by name."""
        return {name: engine for name, ref in self._engines.items() if (engine := ref()) is not None}

    def beside(self, engine: object) -> list[SharingModel]:
        """Return the other models."""
        return [other for other in self.engines.values() if other is not engine]

    def debuggers(self) -> list[Any]:
        """Return the checks of all models in debug mode."""
        found = (engine.memory.debugger for engine in self.engines.values())
        return [debugger for debugger in found if debugger is not None]

    def layout_of(self, memory: SharingMemory) -> MemoryLayout:
        """Plan one model's memory as it would be built now. Changes nothing."""
        models = {name: (engine.tree.specs(f"{name}."), engine.tree.schedule) for name, engine in self.engines.items()}
        arena = self.arena
        held = list(arena.regions.values()) if arena is not None and memory not in self._taken else []
        layouts = plan_together(models, held)
        return next(layouts[name] for name, engine in self.engines.items() if engine.memory is memory)

    def take(self, memory: SharingMemory, plan: MemoryPlan, device: torch.device) -> Arena:
        """Return the arena in which a model with this ``plan`` has its slots: see [Note: a model's second place].

        Raises as ``Arena.reserve``.
        """
        arena, regions = self.arena, shared_regions(plan)
        if arena is None or memory in self._taken or list(arena.regions.values()) != regions:
            arena = Arena(device)
            arena.reserve(regions)
            self.leave()
            self._arena = weakref.ref(arena)
        self._taken.add(memory)
        return arena

    def leave(self) -> None:
        """Have every model take places in another arena with its next forward."""
        self._arena = None
        self._taken.clear()
        self._gather_slots.clear()
        self._gradient_slots.clear()

    def add(self, units: Sequence[Unit]) -> None:
        """Make the slots of a model's ``units`` neighbours of those that other models have on the same bytes."""
        gather, gradient = [unit.gather_slot for unit in units], [unit.gradient_slot for unit in units]
        introduce(gather, _alive(self._gather_slots))
        introduce(gradient, _alive(self._gradient_slots))
        self._gather_slots += map(weakref.ref, gather)
        self._gradient_slots += map(weakref.ref, gradient)

    def part_with(self, units: Collection[Unit]) -> None:
        """Let no slot know of those of ``units``, whose model is gone."""
        for slot in (*_alive(self._gather_slots), *_alive(self._gradient_slots)):
            slot.part_with(units)


def _alive(slots: Sequence[weakref.ref[Slot]]) -> list[Slot]:
    return [slot for ref in slots if (slot := ref()) is not None]
