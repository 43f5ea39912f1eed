"""The units below one root module: what they are called, and in which order they are expected to be needed.

Owns what is known of them together as soon as the root is known, before any memory is planned; none of it changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.shard.runtime.unit_state import Unit, units_of
from yafsdp_like.shard.spec.memory_layout import MemoryLayout, plan_memory
from yafsdp_like.shard.spec.schedule import Residency, Schedule, schedule_of
from yafsdp_like.shard.spec.unit_spec import RankSpec, UnitSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import nn

    from yafsdp_like.shard.runtime.param import ShardedParam
    from yafsdp_like.shard.spec.unit_spec import ParamSpec


@dataclass(frozen=True, eq=False)
class UnitTree:
    """A root module's units, in order of registration, which is their number in ``schedule``.

    ``next_in_forward`` (one at most) and ``after_in_backward`` (all, nearest first) are, for each unit, those expected
    after it that have something to all-gather.
    """

    units: Sequence[Unit]
    names: Sequence[str]  # full names from the root, as those of each unit's parameters
    param_names: Sequence[Sequence[str]]
    root_units: Collection[Unit]  # those of the root module itself
    schedule: Schedule
    next_in_forward: Mapping[Unit, Sequence[Unit]]
    after_in_backward: Mapping[Unit, Sequence[Unit]]
    backward_ticks: Mapping[Unit, tuple[int, int]]  # when each is expected to start and to end; sorted by the latter

    def reshards_after_forward(self, unit: Unit) -> bool:
        """Return what the user said, or the default: the root stays unsharded, since its backward comes next."""
        asked = unit.policy.reshard_after_forward
        return unit not in self.root_units if asked is None else asked

    def plan(self) -> MemoryLayout:
        """Plan the memory for the units as they are now. Changes nothing."""
        return plan_memory(self.specs(), self.schedule)

    def specs(self, prefix: str = "") -> list[UnitSpec]:
        """Return what a plan needs to know of the units as they are now, with ``prefix`` before their names."""
        index = {unit: i for i, unit in enumerate(self.units)}
        specs = []
        for unit, name, param_names in zip(self.units, self.names, self.param_names, strict=True):
            params = unit.param_specs(param_names)
            residency = Residency(not self.reshards_after_forward(unit), not unit.policy.reshard_after_backward)
            forward = tuple(index[u] for u in unit.forward_prefetch if u in index)
            backward = tuple(index[u] for u in unit.backward_prefetch if u in index)
            ranks = _ranks_of(unit, params)
            policy = unit.policy
            specs.append(
                UnitSpec(
                    *(prefix + name, params, ranks, unit.needs, residency, forward, backward, unit.is_on_host),
                    *(policy.forward_ranks, policy.reductions_in_flight),
                )
            )
        return specs


def _ranks_of(unit: Unit, params: Sequence[ParamSpec]) -> RankSpec:
    """Return what a plan needs to know of the unit's ranks, which share ``params``."""
    mapped = unit.transport.mapped

    def column_nbytes(sizes: Iterable[int]) -> int:
        return mapped.column_nbytes(list(sizes)) if mapped else 0

    return RankSpec(
        unit.transport.world_size,
        unit.mesh.size(),
        unit.transport.description,
        is_mapped=mapped is not None,
        reads_shards=mapped is not None and mapped.reads_shards,
        gather_column_nbytes=column_nbytes(nbytes for p in params for nbytes in p.pieces_nbytes),
        reduce_column_nbytes=column_nbytes(
            p.shards.chunk_numel * p.reduce_dtype.itemsize for p in params if p.has_gradient
        ),
    )


def unit_tree_of(root: nn.Module) -> UnitTree:
    """Return all units below ``root``. Changes nothing, not even their names."""
    units = list(dict.fromkeys(unit for module in root.modules() for unit in units_of(module)))
    full_names = {module: name for name, module in root.named_modules()}
    schedule = schedule_of(root, _units_of_modules(units), len(units))
    ticks = {unit: (schedule.backward_start(i), schedule.backward_end(i)) for i, unit in enumerate(units)}
    return UnitTree(
        units,
        [_unit_name(unit, full_names) for unit in units],
        [[_full_name(p, full_names) for p in unit.params] for unit in units],
        units_of(root) or [unit for unit in units if root in unit.modules][:1],
        schedule,
        {unit: after[:1] for unit, after in _following(units, schedule.forward_order).items()},
        _following(units, schedule.backward_order),
        dict(sorted(ticks.items(), key=lambda item: item[1][1])),
    )


def _unit_name(unit: Unit, names: Mapping[nn.Module, str]) -> str:
    modules = [module for module in unit.modules if module in names]
    beside = units_of(modules[0]).index(unit) if modules and unit in units_of(modules[0]) else 0
    return ", ".join(names[m] or "root" for m in modules) + (f" (mesh {beside + 1})" if beside else "")


def _full_name(p: ShardedParam, names: Mapping[nn.Module, str]) -> str:
    for module, attribute in p.owners[:1]:  # none where the user has put another module there
        return f"{names[module]}.{attribute}" if names.get(module) else attribute
    return p.name


def _units_of_modules(units: Sequence[Unit]) -> dict[nn.Module, list[int]]:
    units_of: dict[nn.Module, list[int]] = {}
    for index, unit in enumerate(units):
        for module in unit.modules:
            units_of.setdefault(module, []).append(index)
    return units_of


def _following(units: Sequence[Unit], order: Sequence[int]) -> dict[Unit, list[Unit]]:
    """For each unit, those expected after it, nearest first; units without parameters have nothing to all-gather."""
    ordered = [units[i] for i in order]
    return {unit: [u for u in ordered[position + 1 :] if u.params] for position, unit in enumerate(ordered)}
