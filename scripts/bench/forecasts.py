"""Forecasts of runs that `bench_train.py` has measured, drawn without a GPU and put beside what the reports hold.

Owns how a row of a report is read as settings, and which figures of which reports today's plans can be held against.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from bench.dtypes import DTYPES
from bench.implementations import literal
from bench.subjects import Subject, new_subject
from launch.metrics import GIB
from yafsdp_like.hardware import MachineRates, published_rates
from yafsdp_like.shard.forecast.activations import ExampleBatch
from yafsdp_like.shard.forecast.fit import Settings
from yafsdp_like.shard.forecast.settings import SettingsForecaster
from yafsdp_like.shard.forecast.step_time import StepKind, step_time
from yafsdp_like.shard.forecast.traced_units import Cluster
from yafsdp_like.shard.forecast.training_forecast import ForecastOptions
from yafsdp_like.shard.spec.unit_spec import UnitPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bench.report import Row
    from yafsdp_like.shard.forecast.quantities import PhaseMemory, TrainingForecast

META = torch.device("meta")
ENGINE = {  # a forecast's categories of the runtime's own regions, by a report's
    "main shards": ("main shards",),
    "compute shards": ("compute shards",),
    "gradients": ("gradient shards",),
    "slots": ("gather slots", "gradient slots", "granule ends"),
    "staging": ("staging",),
}
IN_GIB = ("device", "reserved", "allocated", "engine")
IN_MS = ("step", "forward_backward", "update")

# What a figure is older than, so that it says nothing of a forecast of today's code: (report, impl, checkpointing, T),
# of which None is any.
Key = tuple[str, str | None, str | None, int | None]
OLDER: dict[Key, tuple[tuple[str, ...], str]] = {
    ("2026-11-29-h200-3b-graph-three-lengths", None, None, None): (IN_GIB, "gradients beside the recordings' pool"),
    ("2026-11-29-h200-3b-graph-and-offload", "ours-graph", None, None): (
        IN_GIB,
        "gradients beside the recordings' pool",
    ),
    ("2026-11-29-h200x2-8b-clip-in-update", None, None, None): (("update", "step"), "the update as it first clipped"),
    ("2026-11-29-h200x2-8b-graph", None, None, None): (
        (*IN_GIB, "update", "step"),
        "gradients beside the recordings' pool",
    ),
    ("2026-11-29-h200x2-8b-checkpointing", None, None, 1024): (IN_MS, "a third more of the CPU's time for a unit"),
    ("2026-11-29-h200-3b-checkpointing", None, None, 1024): (IN_MS, "a third more of the CPU's time for a unit"),
}
# The times that the rates of `H200_MACHINE` and `BOTH_WAYS` were fitted to; all others only check them.
FITTED: tuple[Key, ...] = (
    ("2026-11-29-h200x2-8b-graph-gradients", "ours-graph", "none", 1024),
    ("2026-11-29-h200-3b-graph-three-lengths", "ours-graph", "none", 1024),
    ("2026-11-29-h200-3b-graph-three-lengths", "ours-graph", "none", 4096),
    ("2026-11-29-h200x2-8b-checkpointing", "ours:split_master=True", "block", 4096),
    ("2026-11-29-h200-3b-split", "ours", "none", 1024),
    ("2026-11-29-h200-3b-graph-and-offload", "ours:split_master=True+offload_moments=True", "none", 4096),
    ("2026-11-30-h200x2-8b-whole", "ours", "none", 1024),
    ("2026-11-30-h200x2-8b-whole", "ours", "none", 4096),
    ("2026-11-30-h200x2-8b-whole", "ours-graph", "none", 8192),
    ("2026-11-30-h200-qwen2.5-3b", "ours", "none", 4096),
    ("2026-11-30-h200-moe-7b", "ours", "none", 2048),
)


@dataclass(frozen=True)
class MeasuredRun:
    """One row of a report, and what it says of the run."""

    report: str  # its file's name without the ending
    row: Row
    model: str
    num_ranks: int
    reduce_dtype: str
    copy_rate: float  # bytes/s, as measured on that machine just before
    settings: Settings

    @property
    def is_graph(self) -> bool:
        """Whether forward and backward were replayed."""
        return self.row["impl"].startswith("ours-graph")

    @property
    def rates(self) -> MachineRates:
        """What the machine sustains: its own rate of copies, and published figures for the rest."""
        return replace(published_rates("NVIDIA H200", self.num_ranks), memory_nbytes=self.copy_rate)

    def is_of(self, key: Key) -> bool:
        """Return whether a key names this run; an implementation is named with its keywords, or for all of them."""
        report, impl, checkpointing, seq_len = key
        own = self.row["impl"]
        return (
            report == self.report
            and impl in (None, own, own.partition(":")[0])
            and checkpointing in (None, self.row["checkpointing"])
            and seq_len in (None, self.settings.seq_len)
        )

    @property
    def is_fitted(self) -> bool:
        """Whether its times are among those that rates were fitted to."""
        return any(self.is_of(key) for key in FITTED)

    @property
    def older(self) -> dict[str, str]:
        """What of it is older than something that changed it, and than what."""
        return {name: why for key, (names, why) in OLDER.items() if self.is_of(key) for name in names}


def runs_of(name: str, report: Mapping[str, Any]) -> Iterator[MeasuredRun]:
    """Yield this package's rows of a report of `bench_train.py`; of one with cycles of many lengths, the last."""
    options, machine = report["options"], report["machine"]
    num_ranks = report["hardware"]["ranks"]
    rows = [row for row in report["rows"] if row["status"] == "ok"]
    for row in rows:
        impl, _, keywords = row["impl"].partition(":")
        later = any(other["impl"] == row["impl"] and other.get("cycle", -1) > row.get("cycle", -1) for other in rows)
        if impl not in ("ours", "ours-graph") or later:
            continue
        chosen = {key: literal(value) for key, value in (pair.split("=", 1) for pair in keywords.split("+") if pair)}
        seq_len = row.get("seq_len") or row.get("largest_seq_len") or max(options["seq_lens"])
        batch_size = row.get("batch_size", 1)
        settings = Settings(
            num_ranks * batch_size,
            seq_len,
            batch_size,
            num_ranks,
            split_master=chosen.get("split_master", False),
            moments=chosen.get("moments", "fp32"),
            update_in_backward=chosen.get("in_backward", False),
            checkpointing=row["checkpointing"] == "block",
            offload_moments=chosen.get("offload_moments", False),
        )
        yield MeasuredRun(
            name, row, options["model"], num_ranks, options["reduce_dtype"], machine["copy_rate"], settings
        )


@dataclass
class Forecasts:
    """Forecasts of measured runs; a model is traced once for all runs of one shape."""

    _forecasters: dict[Any, SettingsForecaster] = field(default_factory=dict)

    def beside(self, run: MeasuredRun) -> Row:
        """Return what is planned beside what was measured: GiB and ms, as `{"planned": ..., "measured": ...}`."""
        forecaster = replace(self._forecaster(run), options=ForecastOptions(is_recorded=run.is_graph))
        forecast = forecaster(run.settings)
        figures = {**memory_of(run, forecast), **times_of(run, forecast)}
        settings = run.settings
        return {
            "report": run.report,
            "model": run.model,
            "ranks": run.num_ranks,
            "impl": run.row["impl"],
            "checkpointing": run.row["checkpointing"],
            "batch_size": settings.micro_batch_size,
            "seq_len": settings.seq_len,
            "fitted": run.is_fitted,
            **{name: pair for name, pair in figures.items() if name not in run.older},
            **({"older": run.older} if run.older else {}),
        }

    def _forecaster(self, run: MeasuredRun) -> SettingsForecaster:
        key = run.model, run.num_ranks, run.reduce_dtype
        if key not in self._forecasters:
            subject = new_subject(run.model)
            policy = UnitPolicy(MixedPrecisionPolicy(torch.bfloat16, DTYPES[run.reduce_dtype]), None)
            made, batch = partial(_made, subject), partial(_batch, subject)
            self._forecasters[key] = SettingsForecaster(made, batch, policy, Cluster(run.num_ranks))
        return self._forecasters[key]


def _made(subject: Subject) -> tuple[nn.Module, list[nn.Module]]:
    model = subject.model(META)
    return model, list(model.layers)


def _batch(subject: Subject, batch_size: int, seq_len: int) -> ExampleBatch:
    return ExampleBatch(subject.batch(batch_size, seq_len, torch.Generator()))


def _pair(planned: float, measured: float) -> dict[str, float]:
    return {"planned": round(planned, 3), "measured": round(measured, 3)}


def memory_of(run: MeasuredRun, forecast: TrainingForecast) -> dict[str, dict[str, float]]:
    """Return the device's peak, what PyTorch's allocator reserves and holds, and the runtime's own regions."""
    row = run.row
    phases = [p for p in forecast.phases if p.phase != "checkpoint" or "cycle" in row]  # which other rows do not save
    peak = max(phases, key=lambda phase: (phase.total_nbytes, phase.tensors_nbytes))
    mapped = sum(r.nbytes for r in forecast.plan.regions if not (r.transient or r.on_host) and _is_mapped(r))
    held = max(phase.tensors_nbytes for phase in phases) - mapped
    reserved = peak.tensors_nbytes + peak.nbytes.get("allocator", 0) - mapped
    found = {"device": _pair(peak.total_nbytes / GIB, row["device_used_gib"])}
    if row["peak_reserved_gib"]:
        found["reserved"] = _pair(reserved / GIB, row["peak_reserved_gib"])
    if not run.is_graph:  # whose pool is reserved, and not allocated
        found["allocated"] = _pair(held / GIB, row["peak_allocated_gib"])
    if "peaks" in row:
        found["engine"] = _engine(run, forecast.phases)
    return found


def _is_mapped(region: Any) -> bool:
    return bool(region.mapped or region.granule_nbytes)


def _engine(run: MeasuredRun, phases: Sequence[PhaseMemory]) -> dict[str, float]:
    """Return the runtime's regions in the phase in which they are most; a replay's record has no gradients."""
    names = [name for name in ENGINE if not (run.is_graph and name == "gradients")]
    measured = max(run.row["peaks"], key=lambda peak: sum(peak[name] for name in names))
    (phase,) = (phase for phase in phases if phase.phase == measured["phase"])
    planned = sum(phase.nbytes.get(part, 0) for name in names for part in ENGINE[name])
    return _pair(planned / GIB, sum(measured[name] for name in names))


def times_of(run: MeasuredRun, forecast: TrainingForecast) -> dict[str, dict[str, float]]:
    """Return a step's time and its parts. One that clips before its update is compared without that."""
    row = run.row
    if "forward_backward_ms" not in row:
        return {}
    medians = {name: (row[f"{name}_ms"] or {"median": 0.0})["median"] for name in ("clip", "optimizer", "step")}
    clips = row["clip_ms"] is not None and medians["clip"] < 1.0  # in the update
    predicted = step_time(forecast, run.rates, StepKind(clips, run.is_graph))
    found = {"step": _pair(predicted.seconds * 1e3, medians["step"] - medians["clip"])}
    if not run.settings.update_in_backward:
        before = (predicted.seconds - predicted.update) * 1e3
        found["forward_backward"] = _pair(before, row["forward_backward_ms"]["median"])
        found["update"] = _pair(predicted.update * 1e3, medians["optimizer"])
    return found
