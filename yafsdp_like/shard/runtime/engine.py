"""The runtime of one sharded model: which owner keeps which part of its state, and how the engine of a unit is found.

params      the life of full parameters: all-gathers, gather slots
gradients   the life of full gradients: reduce-scatters, gradient slots
rebuild     when shards and slots are made again
running     what forwards and backwards run, which ``hooks.py`` keeps
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from yafsdp_like.memory.streams import streams_of
from yafsdp_like.ops import linear
from yafsdp_like.shard.runtime.allocated_memory import AllocatedMemory
from yafsdp_like.shard.runtime.collective_log import CollectiveLog
from yafsdp_like.shard.runtime.context import EngineContext
from yafsdp_like.shard.runtime.gradients import GradientLifecycle
from yafsdp_like.shard.runtime.params import ParamLifecycle
from yafsdp_like.shard.runtime.rebuild import Rebuild
from yafsdp_like.shard.runtime.unit_tree import UnitTree, unit_tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from yafsdp_like.shard.runtime.running import Call, ForwardUse
    from yafsdp_like.shard.runtime.shared_slots import SlotSharing
    from yafsdp_like.shard.runtime.unit_state import Unit


@dataclass(eq=False)
class RunningModel:
    """The forward and the backwards of one model that have begun and not ended."""

    iteration: Call | None = None  # the forward that everything running now is part of
    # What each backward has reached, by autograd's number.
    backwards: dict[int, list[tuple[Unit, ForwardUse]]] = field(default_factory=dict)


class ShardEngine:
    """The owners of the run-time state of one root module and of the units below it."""

    def __init__(self, tree: UnitTree) -> None:
        self.tree, self.units = tree, tree.units
        for unit, name, params in zip(tree.units, tree.names, tree.param_names, strict=True):
            unit.rename(name, params)
        self.collective_log = CollectiveLog(self.units)
        self.memory = AllocatedMemory(tree, self.collective_log)
        self.streams = streams_of(self.units[0].device)
        mapped = [unit.transport.mapped for unit in self.units if unit.transport.mapped is not None]
        self.context = EngineContext(tree, self.streams, list(dict.fromkeys(mapped)), self.collective_log, self.memory)
        self.params = ParamLifecycle(self.context)
        self.gradients = GradientLifecycle(self.context)
        self.rebuild = Rebuild(self.context, self.params, self.gradients)
        self.running = RunningModel()
        for unit in self.units:
            unit.run_by(self, self.gradients)

    def join(self, name: str, shared: SlotSharing) -> None:
        """Have slots among those of other models, for which this one's name goes before its units'."""
        for unit, of_unit, params in zip(self.tree.units, self.tree.names, self.tree.param_names, strict=True):
            unit.rename(f"{name}.{of_unit}", params)
        self.memory.use_shared(shared)

    @property
    def beside(self) -> Sequence[ShardEngine]:
        """Those of other models that share the slots."""
        others = () if self.memory.shared is None else self.memory.shared.beside(self)
        return cast("Sequence[ShardEngine]", others)

    def __del__(self) -> None:
        """Break what keeps units, slots and linear layers alive, once the root module is gone, and every graph of it.

        See [Note: who owns whom]. Units whose modules are still there get another engine when they run.
        """
        if sys.is_finalizing():
            return
        units = [unit for unit in self.units if unit.engine in (self, None)]
        for owner in _owners(units):
            linear.uninstall(owner)
        self.rebuild.part_with(units)


def engine_of(unit: Unit) -> ShardEngine | None:
    """Return the engine that runs ``unit``; None before its root is known, and once that is gone."""
    engine = unit.engine
    assert engine is None or isinstance(engine, ShardEngine)
    return engine


def engine_for(unit: Unit, module: nn.Module) -> ShardEngine:
    """Return the engine that runs ``unit``. The first module to run becomes the root of all units below it.

    When a module above runs later, it becomes the root, and takes its units over with a plan of its own. Raises
    ``RuntimeError`` where those share slots with other models.
    """
    engine = engine_of(unit)
    if engine is None:
        for below in module.modules():
            former: ShardEngine | None = vars(below).get("_yafsdp_engine")
            if former is not None and former.memory.shared is not None:
                raise RuntimeError(
                    f"expected a model that shares its slots to be a root, found {type(below).__name__} inside of "
                    f"{type(module).__name__}, which is sharded and runs too (rank {unit.transport.rank}): give "
                    "share_slots the outermost sharded modules"
                )
        engine = ShardEngine(unit_tree_of(module))
        for below in module.modules():
            vars(below).pop("_yafsdp_engine", None)  # of a root that is no longer one
        vars(module)["_yafsdp_engine"] = engine
        for owner in _owners(engine.units):
            linear.install(owner)
    return engine


def _owners(units: Sequence[Unit]) -> Iterator[nn.Module]:
    return (module for unit in units for p in unit.params for module, _ in p.owners)
