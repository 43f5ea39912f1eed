"""What one rank of a run will take, by phase: the plan's regions, a traced step, the optimizer's states, and the rest.

Owns the sum. The plan's part is exact, activations are those of the trace, moments those of the optimizer's formats;
what the driver and libraries keep for themselves is measured elsewhere and named here.

[Note: the phases]
A run from its second step on, in which states of the optimizer exist. "start" is what is there before the first
forward; "forward" and "backward" are at their highest moments; "update" has all gradients; "checkpoint" what is made on
the device to save a step, while gradients still have their memory, which the next forward gives back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory.layout import aligned
from yafsdp_like.optim.moments import MomentsFormat, moments_nbytes
from yafsdp_like.optim.offload import NUM_BUFFERS, buffer_nbytes
from yafsdp_like.shard.forecast.activations import Args, ExampleBatch, StepOptions, Trace, trace_step
from yafsdp_like.shard.forecast.caching_allocator import reserved_nbytes
from yafsdp_like.shard.forecast.quantities import OF_KIND, ModuleCost, Phase, PhaseMemory, TrainingForecast, Transfer
from yafsdp_like.shard.forecast.storages import BLOCK_NBYTES, StepPlace
from yafsdp_like.shard.forecast.transfers import transfers_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.shard.forecast.traced_units import PlannedModel, TracedUnit
    from yafsdp_like.shard.spec.unit_spec import ParamSpec

Nbytes = dict[str, int]  # by category


@dataclass(frozen=True)
class Overhead:
    """Device memory that nothing of this package allocates, in bytes.

    Measured on H200s with torch 2.11 (scripts/results/2026-11-29-h200-3b-checkpointing.json and
    2026-11-29-h200x2-8b-checkpointing.json): what the device counts beside all tensors is 1.38 GiB on one rank, and
    0.31 GiB more with another.
    """

    context_nbytes: int = 1_481_800_000  # the CUDA context, kernels, and libraries' workspaces
    nccl_nbytes: int = 332_000_000  # of a process group of several ranks


@dataclass(frozen=True)
class OptimizerMemory:
    """AdamW, as far as memory goes: in which format its moments are kept, and where."""

    moments: MomentsFormat | None = "fp32"  # None: no optimizer
    offload_moments: bool = False
    update_in_backward: bool = False


@dataclass(frozen=True)
class ForecastOptions:
    """What of a run a forecast depends on, beside the model, its units and a batch."""

    optimizer: OptimizerMemory = field(default_factory=OptimizerMemory)
    accumulates: bool = False  # a step has several backwards
    copies_checkpoints: bool = False  # they are written behind the next steps, from a copy in host memory
    is_recorded: bool = False  # forward and backward are a CUDA graph, whose memory pool stays (``GraphedStep``)
    on_gpu: bool = True
    overhead: Overhead = field(default_factory=Overhead)

    @property
    def step(self) -> StepOptions:
        """What of these changes a trace."""
        return StepOptions(self.on_gpu, self.accumulates, self.optimizer.update_in_backward)


def forecast_training(
    model: nn.Module,
    planned: PlannedModel,
    batch: ExampleBatch | Args,
    options: ForecastOptions,
    traced: Trace | None = None,
) -> TrainingForecast:
    """Trace one step of ``model`` and put it beside the plan; the model is unchanged, and nothing is allocated.

    A tuple as ``batch`` is what the forward is called with. ``traced``: the trace, where one of such a model, batch,
    shards and ``options.step`` is there already. Raises ``ValueError`` where no loss comes of the batch, ``TypeError``
    where it is neither, and what the model's forward raises.
    """
    if not isinstance(batch, ExampleBatch | tuple):
        raise TypeError(
            f"expected an ExampleBatch, or a tuple of what the forward is called with, found {type(batch).__name__}"
        )
    batch = ExampleBatch(batch) if isinstance(batch, tuple) else batch
    trace = traced or trace_step(model, planned.units, batch, options.step)
    plan = planned.layout.plan
    held = _Held(model, planned, options)
    costs = [
        ModuleCost(unit, phase, kind, w.flops, w.read_nbytes, w.written_nbytes, w.num_kernels)
        for (unit, phase, kind), w in trace.work.items()
    ]
    return TrainingForecast(
        plan,
        tuple(held.phases(trace)),
        tuple(costs),
        (*transfers_of(planned), *held.moments_transfers(), *_activations_transfers(trace)),
        trace.notes,
        _root_tail(planned.units),
    )


def _root_tail(units: Sequence[TracedUnit]) -> float:
    """Return the share of the root's reduction that is left at the end of backward.

    Of several large parameters the last to be complete is an embedding; a head's is reduced beside backward.
    """
    root = next((unit for unit in units if unit.name == "root"), None)
    if root is None or len(root.early) < 2:
        return 1.0
    sizes = [p.shards.padded_numel for p in root.params]
    return max(sizes[k] for k in root.early) / sum(sizes)


def least_nbytes(model: nn.Module, planned: PlannedModel, options: ForecastOptions) -> int:
    """Return bytes on the device that a step of any batch takes at least, without a trace.

    These are shards, slots, states, buffers and the context, with all gradients, as an update finds them.
    """
    return _Held(model, planned, options).least_nbytes()


_TRACED: tuple[Phase, ...] = ("forward", "backward")
_BEHIND: tuple[Phase, ...] = ("update", "checkpoint")


class _Held:
    """What lives longer than a phase."""

    def __init__(self, model: nn.Module, planned: PlannedModel, options: ForecastOptions) -> None:
        self._planned, self._options, self._plan = planned, options, planned.layout.plan
        self._trained = [p for unit in planned.units for p in unit.params if p.has_gradient]
        self._base = _base(model, planned, options)
        self._regions = _regions(self._plan)
        self._moments = self._moments_nbytes()

    def _moments_nbytes(self, saved: bool = False) -> int:
        name = self._options.optimizer.moments
        if name is None:
            return 0
        each = (moments_nbytes(_rows(p), p.main_dtype, name, saved) // 2 for p in self._trained)
        return sum(2 * aligned(nbytes, BLOCK_NBYTES) for nbytes in each)

    @property
    def _states(self) -> Nbytes:
        """What the optimizer has on the device."""
        options = self._options.optimizer
        if options.moments is None:
            return {}
        if options.offload_moments:
            rows = [(_rows(p), p.main_dtype) for p in self._trained]
            each = buffer_nbytes(rows, options.moments, sum(map(aligned, self._remainders())))
            return {"optimizer states": NUM_BUFFERS * each}
        return {"optimizer states": self._moments}

    def phases(self, trace: Trace) -> Iterable[PhaseMemory]:
        """Yield the phases in order."""
        steady = _sum(self._base, self._regions, self._states)
        host = self._host()
        kept = {"activations": trace.host_nbytes}
        main = {"main shards": self._regions.get("main shards", 0)}
        yield PhaseMemory("start", _nonzero(_sum(self._base, main)), "", _nonzero(host))
        reserved = self._reserved_nbytes(trace) if self._options.on_gpu else 0
        highest = {phase: trace.peak(phase) for phase in _TRACED}
        left = trace.end("backward")
        if self._options.is_recorded:  # the pool, in which gradients lie where activations were
            left = max((live for _, live in highest.values()), key=lambda live: sum(live.values()))
        highest |= {phase: (StepPlace(phase=phase), left) for phase in _BEHIND}
        made = {"checkpoint": self._checkpoint_nbytes()}
        for phase, (place, live) in highest.items():
            live = _sum(live, made if phase == "checkpoint" else {})
            unused = {"allocator": max(0, reserved - sum(self._in_allocator()) - sum(live.values()))}
            there = _sum(host, kept, self._copies() if phase == "checkpoint" else {})
            where = place.unit if phase in _TRACED else ""
            yield PhaseMemory(phase, _nonzero(_sum(steady, live, unused)), where, _nonzero(there))

    def least_nbytes(self) -> int:
        """Return the bytes that an update finds, activations left out."""
        gradients = 0
        if not self._options.optimizer.update_in_backward:
            units = [unit for unit in self._planned.units if not unit.is_on_host]
            trained = ((unit, k) for unit in units for k, p in enumerate(unit.params) if p.has_gradient)
            gradients = sum(aligned(unit.gradient_nbytes(k), BLOCK_NBYTES) for unit, k in trained)
        return gradients + sum(_sum(self._base, self._regions, self._states).values())

    def _in_allocator(self) -> list[int]:
        """Return the bytes of what PyTorch's allocator holds all the time: regions that nobody maps, then states."""
        regions = [r for r in self._plan.regions if not (r.transient or r.on_host or r.mapped or r.granule_nbytes)]
        return [*(r.nbytes for r in regions if r.nbytes), *self._states_each()]

    def _states_each(self) -> list[int]:
        """Return the bytes of each tensor that the optimizer's first step makes."""
        options = self._options.optimizer
        if options.moments is None:
            return []
        if options.offload_moments:
            return [self._states["optimizer states"] // NUM_BUFFERS] * NUM_BUFFERS
        each = (moments_nbytes(_rows(p), p.main_dtype, options.moments) // 2 for p in self._trained)
        return [nbytes for nbytes in each for _ in range(2) if nbytes]

    def _reserved_nbytes(self, trace: Trace) -> int:
        """Return what PyTorch's allocator takes of the device in a run of such steps."""
        states = self._states_each()
        held = self._in_allocator()
        return reserved_nbytes(held[: len(held) - len(states)], states, trace.timeline)

    def _checkpoint_nbytes(self) -> int:
        """Return what a state dict makes on the device: floats of 8 bit moments, fp32 values of a split master."""
        options = self._options.optimizer
        floats = 0
        if options.moments == "int8" and not options.offload_moments:
            floats = self._moments_nbytes(saved=True)
        split = [4 * p.shards.chunk_numel for unit in self._planned.units for p in unit.params if p.is_split]
        return floats + max(split, default=0)

    def moments_transfers(self) -> Iterable[Transfer]:
        """Yield what an update copies of offloaded moments, and of remainders with them."""
        if self._options.optimizer.offload_moments:
            for what, nbytes in (("moments", self._moments), ("remainders", sum(self._remainders()))):
                for way in ("in", "out") if nbytes else ():
                    yield Transfer("", "update", f"{what} {way}", "host", nbytes)

    def _remainders(self) -> list[int]:
        """Return the bytes of each parameter's remainder that is in host memory, on the rank that has most."""
        dtypes = [(p, p.remainder_dtype) for p in self._trained]
        return [_rows(p).numel() * dtype.itemsize for p, dtype in dtypes if dtype is not None]

    def _host(self) -> Nbytes:
        offloaded = self._moments if self._options.optimizer.offload_moments else 0
        return {"shards and gradients": self._plan.host_nbytes, "optimizer states": offloaded}

    def _copies(self) -> Nbytes:
        if not self._options.copies_checkpoints:
            return {}
        numel = sum(4 * p.shards.chunk_numel for unit in self._planned.units for p in unit.params)
        return {"copy of a checkpoint": numel + self._moments_nbytes(saved=True)}


def _activations_transfers(trace: Trace) -> Iterable[Transfer]:
    """Yield what a forward copies of offloaded activations, and a backward copies back."""
    for (unit, way), nbytes in trace.copied.items():
        yield Transfer(unit, "forward" if way == "out" else "backward", f"activations {way}", "host", nbytes)


def _base(model: nn.Module, planned: PlannedModel, options: ForecastOptions) -> Nbytes:
    """Return what is there whatever runs: buffers, parameters that are not sharded, the context, NCCL."""
    sharded = {
        module._parameters.get(name) for unit in planned.units for places in unit.places for module, name in places
    }
    left = [p for p in model.parameters() if p not in sharded]
    nbytes = sum(aligned(t.numel() * t.itemsize, BLOCK_NBYTES) for t in [*model.buffers(), *left])
    if not options.on_gpu:
        return {"buffers": nbytes}
    is_group = planned.layout.plan.world_size > 1
    overhead = options.overhead
    return {"buffers": nbytes, "context": overhead.context_nbytes, "NCCL": overhead.nccl_nbytes if is_group else 0}


def _regions(plan: MemoryPlan) -> Nbytes:
    """Return the plan's own bytes on the device by category, without gradient shards, which are in the trace."""
    totals: Counter[str] = Counter()
    for region in plan.regions:
        if not (region.transient or region.on_host):
            totals[OF_KIND[region.kind]] += region.nbytes
    return dict(totals)


def _rows(p: ParamSpec) -> torch.Size:
    """Return the shape of the rows of the rank that has most."""
    shards = p.shards
    return torch.Size((*shards.shape[: shards.dim], shards.rows_per_rank, *shards.shape[shards.dim + 1 :]))


def _sum(*parts: Mapping[str, int]) -> Nbytes:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _nonzero(nbytes: Nbytes) -> Nbytes:
    return {category: count for category, count in nbytes.items() if count}
