"""Units of a model for a plan and a trace: read off a sharded model, or cut as ``fully_shard`` would, without ranks.

Owns the walk over modules that are not sharded, and what is known of ranks that are not there. Needs no process group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from yafsdp_like.comm.mapped_memory import column_nbytes
from yafsdp_like.memory.layout import RowShards
from yafsdp_like.shard.runtime.gradients import EARLY_NUMEL
from yafsdp_like.shard.runtime.param import statistics_dtype
from yafsdp_like.shard.spec.memory_layout import MemoryLayout, plan_memory
from yafsdp_like.shard.spec.schedule import Residency, Schedule, schedule_of
from yafsdp_like.shard.spec.unit_spec import ParamSpec, RankSpec, UnitNeeds, UnitPolicy, UnitSpec, param_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.comm import TransportName
    from yafsdp_like.shard.runtime.unit_tree import UnitTree

Group = nn.Module | list[nn.Module]  # what one call of ``fully_shard`` is given
Places = tuple[tuple[nn.Module, str], ...]  # which modules register a parameter, and under what name


@dataclass(frozen=True)
class Cluster:
    """The ranks of a run: how many, how many of them on one host, and how many replicas they form."""

    num_ranks: int = 1
    ranks_per_host: int = 8
    num_replicas: int = 1
    transport: TransportName = "auto"

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_host < 1 or self.num_replicas < 1:
            raise ValueError(f"expected at least one rank, rank per host and replica, found {self}")
        if self.num_ranks % self.num_replicas:
            raise ValueError(f"{self.num_ranks} ranks do not divide into {self.num_replicas} replicas")
        if self.transport == "peer" and self.num_hosts > 1:
            raise ValueError(
                f"transport 'peer' is of one host, and {self.num_shards} ranks are {self.num_hosts} hosts of "
                f"{self.ranks_per_host}: use 'auto', or 'hierarchical'"
            )

    @property
    def num_shards(self) -> int:
        """Ranks over which one replica is sharded."""
        return self.num_ranks // self.num_replicas

    @property
    def num_hosts(self) -> int:
        """Hosts over which one replica is sharded."""
        return -(-self.num_shards // self.ranks_per_host)

    @property
    def maps_memory(self) -> bool:
        """Whether the ranks of a host read each other's memory, by what ``transport_over`` would choose."""
        if self.num_shards == 1 or self.transport == "process_group":
            return False
        return self.num_hosts == 1 or self.transport == "hierarchical"

    @property
    def description(self) -> str:
        """What moves the bytes."""
        if not self.maps_memory:
            return "process group" if self.num_shards > 1 else "one rank"
        inside = f"peers: {min(self.num_shards, self.ranks_per_host)} GPUs of one host"
        return inside if self.num_hosts == 1 else f"{self.num_hosts} hosts; in each, {inside}"

    def rank_spec(self, params: Sequence[ParamSpec]) -> RankSpec:
        """Return what a plan needs to know of ranks that share ``params``."""
        num_hosts = self.num_hosts if self.maps_memory else 1
        gathered = [p.shards.chunk_numel * p.compute_dtype.itemsize for p in params]
        reduced = [p.shards.chunk_numel * p.reduce_dtype.itemsize for p in params if p.has_gradient]
        return RankSpec(
            self.num_shards,
            self.num_ranks,
            self.description,
            is_mapped=self.maps_memory,
            reads_shards=self.maps_memory and num_hosts == 1,
            gather_column_nbytes=column_nbytes(num_hosts, gathered),
            reduce_column_nbytes=column_nbytes(num_hosts, reduced),
        )


@dataclass(frozen=True)
class TracedUnit:
    """One unit: its modules and parameters, and what the runtime does around its forward and backward."""

    name: str
    modules: tuple[nn.Module, ...]
    params: tuple[ParamSpec, ...]
    places: tuple[Places, ...]  # of each parameter
    policy: UnitPolicy
    early: frozenset[int] = frozenset()  # parameters that are reduced as soon as their gradients are complete

    @property
    def is_on_host(self) -> bool:
        """Whether main shards and gradients are in host memory."""
        return self.policy.offload is not None

    def gradient_nbytes(self, k: int) -> int:
        """Return the bytes of one rank's rows of parameter ``k``'s gradient."""
        return self.params[k].shards.chunk_numel * self.params[k].grad_dtype.itemsize


@dataclass(frozen=True)
class PlannedModel:
    """A model's units, numbered as in the plan, when they run, and their memory."""

    units: tuple[TracedUnit, ...]
    schedule: Schedule
    layout: MemoryLayout
    cluster: Cluster


def read_off(tree: UnitTree, layout: MemoryLayout) -> PlannedModel:
    """Return the units of a sharded model as they are now, with the ``layout`` of their memory.

    Raises ``NotImplementedError`` for parameters that are DTensors without being sharded.
    """
    named = (
        pair
        for unit, names in zip(tree.units, tree.param_names, strict=True)
        for pair in zip(names, unit.params, strict=True)
    )
    for name, p in ((name, p) for name, p in named if p.placement.inner_mesh is not None):
        raise NotImplementedError(
            f"{name} is a DTensor on {p.placement.inner_mesh} wherever modules compute on it, and such a step cannot "
            "be traced yet: memory_plan() without a batch returns the runtime's regions"
        )
    units = [
        TracedUnit(
            spec.name,
            tuple(unit.modules),
            spec.params,
            tuple(tuple(p.owners) for p in unit.params),
            unit.policy,
            _early(spec.params, tree.schedule, index),
        )
        for index, (unit, spec) in enumerate(zip(tree.units, layout.units, strict=True))
    ]
    ranks = layout.units[0].ranks
    transport: TransportName = "process_group"
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks.num_ranks)))
    if ranks.is_mapped:
        transport = "peer" if ranks.reads_shards else "hierarchical"
        per_host = max(per_host, ranks.world_size) if ranks.reads_shards else per_host
    cluster = Cluster(ranks.num_ranks, per_host, ranks.num_ranks // ranks.world_size, transport)
    return PlannedModel(tuple(units), tree.schedule, layout, cluster)


def cut(model: nn.Module, groups: Sequence[Group], policy: UnitPolicy, cluster: Cluster) -> PlannedModel:
    """Return the units that ``fully_shard`` would make of each of ``groups``, in order, and of ``model`` last.

    Parameters may have memory or none; nothing is changed. Raises ``ValueError`` for scalars, which cannot be sharded.
    """
    full_names = {module: name for name, module in model.named_modules()}
    made: list[tuple[list[nn.Module], dict[nn.Parameter, list[tuple[nn.Module, str]]]]] = []
    taken: dict[nn.Parameter, int] = {}
    inner: set[nn.Module] = set()
    for group in [*groups, *([] if any(group is model for group in groups) else [model])]:
        modules = list(group) if isinstance(group, list) else [group]
        owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module, name, param in _params_below(modules, inner):
            if param in taken:  # tied into the unit that has it, which then runs here too
                made[taken[param]][1][param].append((module, name))
                made[taken[param]][0].append(module)
            else:
                owners.setdefault(param, []).append((module, name))
        taken.update(dict.fromkeys(owners, len(made)))
        made.append((modules, owners))
        inner.update(modules)
    position = {module: index for index, module in enumerate(model.modules())}
    made.sort(key=lambda unit: min(position[module] for module in unit[0]))
    units_of: dict[nn.Module, list[int]] = {}
    for index, (modules, _) in enumerate(made):
        for module in dict.fromkeys(modules):
            units_of.setdefault(module, []).append(index)
    schedule = schedule_of(model, units_of, len(made))
    specs, units = [], []
    for index, (modules, owners) in enumerate(made):
        params = tuple(_spec(param, places, full_names, policy, cluster) for param, places in owners.items())
        name = ", ".join(full_names[module] or "root" for module in dict.fromkeys(modules))
        reshards = model not in modules if policy.reshard_after_forward is None else policy.reshard_after_forward
        residency = Residency(not reshards, not policy.reshard_after_backward)
        on_host = policy.offload is not None
        ranks = cluster.rank_spec(params)
        specs.append(UnitSpec(name, params, ranks, UnitNeeds(), residency, on_host=on_host))
        places = tuple(tuple(where) for where in owners.values())
        units.append(
            TracedUnit(name, tuple(dict.fromkeys(modules)), params, places, policy, _early(params, schedule, index))
        )
    return PlannedModel(tuple(units), schedule, plan_memory(specs, schedule), cluster)


def _params_below(modules: Sequence[nn.Module], inner: set[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return what ``modules`` and those below them register, except below modules that are units of their own."""
    found, seen, waiting = [], set(), list(reversed(modules))
    while waiting:
        module = waiting.pop()
        if module in seen or (module in inner and module not in modules):
            continue
        seen.add(module)
        found += [(module, name, param) for name, param in module._parameters.items() if param is not None]
        waiting += reversed(list(module.children()))
    return found


def _spec(
    param: nn.Parameter,
    places: Sequence[tuple[nn.Module, str]],
    full_names: dict[nn.Module, str],
    policy: UnitPolicy,
    cluster: Cluster,
) -> ParamSpec:
    module, attribute = places[0]
    name = f"{full_names[module]}.{attribute}" if full_names[module] else attribute
    if param.dim() == 0:
        raise ValueError(f"fully_shard cannot shard a scalar. Change {name} to a 1D tensor with numel equal to 1.")
    return param_spec(
        name,
        RowShards(tuple(param.shape), cluster.num_shards),
        param.dtype,
        policy,
        computed_in=statistics_dtype(module),
        as_computed=cluster.maps_memory or cluster.num_ranks == 1,
        has_gradient=param.requires_grad,
    )


def _early(params: Sequence[ParamSpec], schedule: Schedule, index: int) -> frozenset[int]:
    """Return the large parameters of a unit whose backward contains that of others."""
    if not schedule.surrounds(schedule.spans[index]):
        return frozenset()
    return frozenset(k for k, p in enumerate(params) if p.has_gradient and p.shards.padded_numel >= EARLY_NUMEL)
