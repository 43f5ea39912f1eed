"""``share_slots``: several sharded models whose all-gathered units and full gradients take one model's memory.

Owns the checks of what is given, and what users may ask of it. How models live with each other is said in
``runtime/shared_slots.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.shard.fsdp_module import FSDPModule
from yafsdp_like.shard.runtime.engine import engine_for, engine_of
from yafsdp_like.shard.runtime.shared_slots import SlotSharing
from yafsdp_like.shard.runtime.unit_state import units_of
from yafsdp_like.shard.spec.shared_layout import plan_of_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.shard.runtime.engine import ShardEngine
    from yafsdp_like.shard.runtime.unit_state import Unit


class SharedSlots:
    """What ``share_slots`` returns: what the models' memory is, together."""

    def __init__(self, sharing: SlotSharing) -> None:
        self._sharing = sharing

    def memory_plan(self) -> MemoryPlan:
        """Return every region of all these models on this rank, in bytes; what they share is in it once.

        Changes nothing; models may still be on the meta device. Names of units begin with the model's. Raises
        ``RuntimeError`` where all models are gone.
        """
        if not self._sharing.engines:
            raise RuntimeError(f"expected a model of {self._sharing.names} to be there, found that all were deleted")
        return plan_of_all({name: engine.memory.plan() for name, engine in self._sharing.engines.items()})

    @property
    def arena_nbytes(self) -> int:
        """Bytes that arenas hold on the device now for all these models: the plan's, once each has run."""
        memories = [engine.memory for engine in self._sharing.engines.values()]
        shared = {memory.shared_arena: None for memory in memories if memory.shared_arena is not None}
        own = sum(memory.nbytes - (memory.shared_arena.nbytes if memory.shared_arena else 0) for memory in memories)
        return own + sum(arena.nbytes for arena in shared)


def share_slots(**models: nn.Module) -> SharedSlots:
    """Let models that run one after the other have their slots in one arena, as large as the largest of them needs.

        fully_shard(policy), fully_shard(reference), fully_shard(critic)
        slots = share_slots(policy=policy, reference=reference, critic=critic)
        print(slots.memory_plan())

    Shared are gather slots, gradient slots and staging; shards, gradients and optimizers stay each model's own. Numbers
    are those of models that share nothing. Names are those of plans and errors. To be called on all ranks alike, with
    the outermost sharded modules, after all calls that must come before a first forward, and before the first of any.

    Models may run in any order. What a model keeps unsharded between its forward and its backward (by default its
    root) is all-gathered again if another runs in between. A model that runs inside another's forward, or whose forward
    begins while another with gradients still awaits its backward, may need slots beyond the plan, with a
    ``SpillWarning``. A model that is not trained should be frozen (``requires_grad_(False)``): otherwise room for its
    gradients is planned. Where parameters of one model are changed so that its plan is made anew, all models get a new
    arena, and the old one goes when each has run again. ``GraphedStep`` refuses such models.

    Raises ``ValueError`` for fewer than two models, for what is no root that ``fully_shard`` returned, for models that
    have units in common, are on different devices or share slots already, and ``RuntimeError`` for one that has run.
    """
    _check(models)
    engines = {name: engine_for(units_of(model)[0], model) for name, model in models.items()}
    _set_debug_mode_alike(engines)
    sharing = SlotSharing(engines)
    for name, engine in engines.items():
        engine.join(name, sharing)
    return SharedSlots(sharing)


def _check(models: Mapping[str, nn.Module]) -> None:
    if len(models) < 2:
        raise ValueError(f"share_slots expects at least two models by name, found {list(models)}")
    has: dict[Unit, str] = {}
    for name, model in models.items():
        if not isinstance(model, FSDPModule):
            raise ValueError(
                f"share_slots expects modules that fully_shard returned, found {type(model).__name__} as {name!r}"
            )
        units = list(dict.fromkeys(unit for module in model.modules() for unit in units_of(module)))
        _check_is_new_root(name, model, units)
        for unit in units:
            if has.setdefault(unit, name) != name:
                raise ValueError(
                    f"share_slots expects models without a module in common, found unit {unit.name!r} in {name!r} and "
                    f"in {has[unit]!r}: the units of one model share their slots in any case"
                )
    devices = {name: unit.device for unit, name in has.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"share_slots expects models on one device, found {devices}")


def _check_is_new_root(name: str, model: nn.Module, units: Sequence[Unit]) -> None:
    engines, rank = [engine for unit in units if (engine := engine_of(unit)) is not None], units[0].transport.rank
    if any(engine.memory.shared for engine in engines):
        raise ValueError(f"{name!r}, or a module in it, shares slots already (rank {rank}): call share_slots once")
    if any(engine.memory.num_layouts for engine in engines):
        raise RuntimeError(
            f"share_slots was called when {name!r} had run (rank {rank}), and had slots of its own: call it before the "
            "first forward of any of the models"
        )
    engine = engine_of(units_of(model)[0])
    if engine is not None and vars(model).get("_yafsdp_engine") is not engine:
        raise ValueError(
            f"share_slots expects the outermost sharded modules, found {name!r} inside of another (rank {rank})"
        )


def _set_debug_mode_alike(engines: Mapping[str, ShardEngine]) -> None:
    """Check all models in debug mode where one is: what one writes, another's checks must know of."""
    checked = [engine for engine in engines.values() if engine.params.debug is not None]
    for engine in engines.values():
        if checked and engine not in checked:
            engine.params.set_debug(True, own_slots=any(unit.needs.own_gather_slot for unit in checked[0].units))
