"""What a rank's memory holds, by category, and beside it what was planned: ``model.memory_report()``.

Owns the counting. Nothing is allocated and no stream waits; on a CPU nobody counts what activations take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from yafsdp_like.memory.plan import readable
from yafsdp_like.shard.forecast.quantities import CATEGORIES, NO_TENSORS, OF_KIND
from yafsdp_like.shard.runtime.engine import engine_of
from yafsdp_like.shard.runtime.rebuild import Report
from yafsdp_like.shard.runtime.unit_state import unit_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from yafsdp_like.memory.plan import MemoryPlan, Region
    from yafsdp_like.shard.forecast.quantities import TrainingForecast
    from yafsdp_like.shard.runtime.engine import ShardEngine

GRADIENTS, STATES, ACTIVATIONS, CACHE, OTHER = (
    "gradient shards",
    "optimizer states",
    "activations and the rest",
    "allocator, unused",
    "context, NCCL and other processes",
)
ARENAS = "arenas of the plan"
TRACED = "activations, logits and gradients, at most"  # all that comes and goes within a step
ALLOCATED, RESERVED, DEVICE = "all tensors, at most", "reserved by the allocator, at most", "on the device"


@dataclass(frozen=True)
class AllocatorPeaks:
    """The most that PyTorch's allocator has had, in bytes."""

    allocated_nbytes: int
    reserved_nbytes: int

    @classmethod
    def of(cls, device: torch.device) -> AllocatorPeaks | None:
        """Return those since they were reset last (``torch.cuda.reset_peak_memory_stats``); None for a CPU."""
        if device.type != "cuda":
            return None
        return cls(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


@dataclass(frozen=True)
class ComparedMemory:
    """One kind of memory: the bytes that are planned, and those that are held or were; None where nobody knows."""

    name: str
    planned_nbytes: int | None
    measured_nbytes: int | None

    @property
    def off(self) -> str:
        """By how much more or less was measured than planned, in words."""
        planned, measured = self.planned_nbytes, self.measured_nbytes
        return f"{measured / planned - 1:+.2%}" if planned and measured is not None else ""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """A row of a table."""
        planned = "" if self.planned_nbytes is None else readable(self.planned_nbytes)
        measured = "not known" if self.measured_nbytes is None else readable(self.measured_nbytes)
        return self.name, planned, measured, self.off


@dataclass(frozen=True)
class MemoryReport(Report):
    """What one rank holds now or has held at most, beside what was planned, and what did not go by the plan."""

    rows: tuple[ComparedMemory, ...] = ()

    def __str__(self) -> str:
        cells = [("", "planned", "measured", ""), *(row.cells for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        lines.append(f"{len(self.spills)} slots beyond the plan, {self.evictions} evictions")
        return "\n".join(line.rstrip() for line in lines)


def compared(
    model: nn.Module,
    plan: MemoryPlan,
    forecast: TrainingForecast | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    peaks: AllocatorPeaks | None = None,
) -> tuple[ComparedMemory, ...]:
    """Return planned and measured bytes of a sharded model, by category, then what was held at most in all.

    Regions, gradients and states are what they are now; ``peaks`` are the allocator's since they were reset, by default
    since then. Without ``forecast`` nothing is planned of activations and states, without ``optimizer`` its states
    count as activations.
    """
    held, regions = holders_of(model, optimizer), regions_of(model)
    device = device_of(model)
    planned: dict[str, int] = {}
    for region in (region for region in plan.regions if not region.on_host):
        category = OF_KIND.get(region.kind, region.kind)
        planned[category] = planned.get(category, 0) + region.nbytes
    if forecast is not None:
        planned |= {name: _most(forecast, (name,)) for name in (GRADIENTS, STATES)}
    found = [ComparedMemory(ARENAS, plan.nbytes, sum(region.nbytes for region in regions))]
    for name in CATEGORIES:
        if (planned.get(name) or held.get(name)) and name not in NO_TENSORS and name != "activations":
            is_known = name in held or name not in (STATES, GRADIENTS)  # gradients have no memory before backward
            found.append(ComparedMemory(name, planned.get(name), held.get(name, 0) if is_known else None))
    in_allocator = sum(region.nbytes for region in regions if not _is_outside(region))
    outside = sum(region.nbytes for region in plan.regions if _is_outside(region))
    peaks = peaks or AllocatorPeaks.of(device)
    measured: dict[str, int] = {}
    if peaks is not None:
        measured = {
            TRACED: peaks.allocated_nbytes - in_allocator - held.get(STATES, 0),
            ALLOCATED: peaks.allocated_nbytes,
            RESERVED: peaks.reserved_nbytes,
        }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        measured[DEVICE] = total - free
    expected: dict[str, int] = {}
    if forecast is not None:
        expected = {
            TRACED: _most(forecast, (GRADIENTS, "activations", "logits and loss", "buffers", "checkpoint")),
            ALLOCATED: max(phase.tensors_nbytes for phase in forecast.phases) - outside,
            RESERVED: max(p.total_nbytes - _of(p.nbytes, ("NCCL", "context")) for p in forecast.phases) - outside,
            DEVICE: forecast.peak.total_nbytes,
        }
    shown = (TRACED, ALLOCATED, RESERVED, DEVICE) if device.type == "cuda" else (TRACED,)
    names = [name for name in shown if name in measured or name in expected]
    return (*found, *(ComparedMemory(name, expected.get(name), measured.get(name)) for name in names))


def _most(forecast: TrainingForecast, names: Sequence[str]) -> int:
    return max(_of(phase.nbytes, names) for phase in forecast.phases)


def _of(nbytes: Mapping[str, int], names: Sequence[str]) -> int:
    return sum(nbytes.get(name, 0) for name in names)


def _is_outside(region: Region) -> bool:
    """Whether it is the driver's memory, which peers or slots map, rather than PyTorch's allocator's."""
    return region.mapped or region.granule_nbytes > 0


def engine_below(model: nn.Module) -> ShardEngine | None:
    """Return the engine of the outermost sharded part of ``model`` that has run."""
    units = (unit_of(module) for module in model.modules())
    return next((engine for unit in units if unit is not None and (engine := engine_of(unit)) is not None), None)


@torch.no_grad()
def holders_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Return this rank's bytes on the device by category, the largest first, without those that hold none.

    The arenas know their regions, gradients and states are counted by their tensors, and what else PyTorch's allocator
    holds counts as activations. On a CPU nothing counts what else there is.
    """
    device = device_of(model)
    regions, params = regions_of(model), list(model.parameters())
    nbytes: dict[str, int] = {}
    in_allocator = outside = 0
    for region in regions:
        category = OF_KIND.get(region.kind, region.kind)
        nbytes[category] = nbytes.get(category, 0) + region.nbytes
        is_outside = _is_outside(region)
        outside, in_allocator = outside + is_outside * region.nbytes, in_allocator + (not is_outside) * region.nbytes
    if not regions:
        in_allocator = nbytes["parameters"] = _storages_nbytes(params, device)
    nbytes[GRADIENTS] = _storages_nbytes([*(p.grad for p in params), *_gradient_shards(model)], device)
    states = [] if optimizer is None else pytree.tree_leaves(list(optimizer.state.values()))
    nbytes[STATES] = _storages_nbytes([*states, *getattr(optimizer, "moment_buffers", [])], device)
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        nbytes[ACTIVATIONS] = allocated - in_allocator - nbytes[GRADIENTS] - nbytes[STATES]
        nbytes[CACHE] = reserved - allocated
        nbytes[OTHER] = total - free - reserved - outside
    return dict(sorted(((k, v) for k, v in nbytes.items() if v > 0), key=lambda pair: -pair[1]))


def regions_of(model: nn.Module) -> list[Region]:
    """Return what arenas hold on the device now: main shards, and the rest once a forward has made it."""
    engine = engine_below(model)
    if engine is None:
        return []
    arenas = [unit.arena for unit in engine.units if not unit.is_on_host]
    arenas += [engine.memory.arena] if engine.memory.arena is not None else []
    return [region for arena in dict.fromkeys(arenas) for region in arena.regions.values()]


def _gradient_shards(model: nn.Module) -> Iterator[Tensor]:
    """Yield what reductions write: of units that are unsharded now too, and where nobody reads it any more."""
    engine = engine_below(model)
    for unit in [] if engine is None else engine.units:
        yield from (p.grad_shard.flat for p in unit.params if p.grad_shard is not None)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _storages_nbytes(values: Iterable[Any], device: torch.device) -> int:
    """Return the bytes of the storages on the device that tensors among ``values`` have, each counted once."""
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    here = [t.untyped_storage() for t in tensors if isinstance(t, Tensor) and t.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in here}.values())
