"""From measurements to rows, printed tables and a JSON file, whose fields `results/README.md` explains."""

import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.accounting import CATEGORIES
from bench.machine import Machine
from bench.measure import Metrics
from bench.options import Options, Shape
from launch.metrics import GIB
from launch.world import World

Row = dict[str, Any]
Columns = Mapping[str, tuple[str, str]]  # field of a row -> heading and format

TIMES = ("forward_backward_ms", "clip_ms", "optimizer_ms", "step_ms")
MEMORY = (
    "device_used_gib",
    "peak_allocated_gib",
    "peak_reserved_gib",
    "allocator_requests_per_step",
    "device_allocs",
    "alloc_retries",
)
SUBJECT = {"impl": ("impl", ""), "checkpointing": ("ckpt", ""), "batch_size": ("B", "d"), "seq_len": ("T", "d")}
STEPS: Columns = {
    **SUBJECT,
    "forward_backward_ms": ("fwd+bwd ms", ".1f"),
    "ratio_to_floor": ("x floor", ".3f"),
    "clip_ms": ("clip", ".1f"),
    "optimizer_ms": ("update", ".1f"),
    "ratio_to_copy": ("x copy", ".2f"),
    "step_ms": ("step ms", ".1f"),
    "tokens_per_second_per_rank": ("tok/s/rank", ".0f"),
    "mfu": ("MFU", ".1%"),
    "device_gib": ("device GiB", ".2f"),
    "peak_allocated_gib": ("alloc", ".2f"),
    "peak_reserved_gib": ("reserved", ".2f"),
    "device_allocs": ("cudaMallocs", "d"),
    "alloc_retries": ("retries", "d"),
    "loss": ("loss", ".4f"),
}
PEAKS: Columns = {**SUBJECT, "phase": ("peak of", ""), **{name: (name, ".2f") for name in CATEGORIES}}


@dataclass(frozen=True)
class BenchCase:
    """What a row is about."""

    impl: str
    checkpointing: str
    shape: Shape

    @property
    def row(self) -> Row:
        """Return the fields that name it."""
        return {"impl": self.impl, "checkpointing": self.checkpointing, **dataclasses.asdict(self.shape)}


@dataclass(frozen=True)
class Measurement:
    """What one round found out about a case: metrics over ranks, and what rank 0's step was made of."""

    metrics: Metrics
    account: Row


# --- rows ---


def make_row(case: BenchCase, rounds: Sequence[Measurement | None], options: Options, machine: Machine) -> Row:
    """Return a case's row; fields that the device cannot tell are None."""
    row: Row = {**case.row, "status": "ok", "rounds": len(rounds)}
    found = [measured for measured in rounds if measured is not None]
    if len(found) < len(rounds):
        return {**row, "status": "OOM"}
    done = [measured.metrics for measured in found]
    for field in TIMES:
        row[field] = spread([metrics[field] for metrics in done if field in metrics])
    for field in MEMORY:
        row[field] = max((metrics[field] for metrics in done if field in metrics), default=None)
    row["device_gib"] = None if row["device_used_gib"] is None else row["device_used_gib"] - machine.used_nbytes / GIB
    row["loss"] = statistics.median(metrics["loss"] for metrics in done)
    return {**row, **found[-1].account, **speed(row, case.shape, options, machine, found[-1].account["update_nbytes"])}


def speed(row: Row, shape: Shape, options: Options, machine: Machine, update_nbytes: int) -> Row:
    """Return what follows from a row's times; None where it has no whole step, or no peak or operations are known.

    MFU is `DecoderConfig.train_flops`, in which nothing counts that is computed twice, over the time of a whole step
    and the GPU's peak (`yafsdp_like.hardware.PEAK_TFLOPS`): model FLOPs utilization as in Chowdhery et al., "PaLM",
    2022, section 4.1. `copy_ms` is the least time of an update: its bytes at the rate of a copy.
    """
    flops = options.subject.train_flops(shape.batch_size, shape.seq_len)
    copy_ms = update_nbytes / machine.copy_rate * 1e3
    found: Row = dict.fromkeys(("tflops", "tokens_per_second_per_rank", "mfu", "ratio_to_copy", "ratio_to_floor"))
    found["copy_ms"] = copy_ms
    if flops is not None:
        found["tflops"] = flops / row["forward_backward_ms"]["median"] / 1e9
    if row["step_ms"] is not None:
        seconds = row["step_ms"]["median"] / 1e3
        found["tokens_per_second_per_rank"] = shape.batch_size * shape.seq_len / seconds
        found["ratio_to_copy"] = row["optimizer_ms"]["median"] / copy_ms
        if flops is not None and machine.peak_tflops is not None:
            found["mfu"] = flops / seconds / 1e12 / machine.peak_tflops
    return found


def spread(values: list[float]) -> dict[str, float] | None:
    """Return median, least and largest value; None of no values."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def add_ratios(rows: list[Row]) -> None:
    """Relate each row's forward and backward to the floor's of the same shape, where both ran."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["checkpointing"], row["batch_size"], row["seq_len"]

    ran = [row for row in rows if row["status"] == "ok"]
    floors = {key(row): row["forward_backward_ms"]["median"] for row in ran if row["impl"] == "unsharded"}
    for row in ran:
        if key(row) in floors:
            row["ratio_to_floor"] = row["forward_backward_ms"]["median"] / floors[key(row)]


# --- tables ---


def step_tables(rows: list[Row]) -> str:
    """Return the table of steps, by shape, and that of what memory holds at the peaks."""
    ordered = sorted(rows, key=lambda row: (row["checkpointing"], row["batch_size"] * row["seq_len"], row["seq_len"]))
    peaks = [{**row, **peak} for row in ordered for peak in highest(row.get("peaks", []))]
    steps = format_table(ordered, STEPS)
    if not any(row.get("device_gib") for row in rows):  # a CPU's tensors are not counted
        return steps
    return f"GiB of rank 0 at the highest point of a step\n{format_table(peaks, PEAKS)}\n\n{steps}"


def highest(peaks: Sequence[Row]) -> Sequence[Row]:
    """Return the phase that holds most; its tensors, since the cache stays."""
    return sorted(peaks, key=lambda peak: -sum(peak[name] for name in CATEGORIES[:-2]))[:1]


def format_table(rows: Sequence[Row], columns: Columns) -> str:
    """Format rows, medians of times, blanks where there is no figure; columns without any figure are left out."""
    shown = {field: spec for field, spec in columns.items() if any(format_cell(row, field, spec[1]) for row in rows)}
    lines = [[heading for heading, _ in shown.values()]]
    lines += [[format_cell(row, field, spec) for field, (_, spec) in shown.items()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def format_cell(row: Row, field: str, spec: str) -> str:
    """Format one field of a row: its median where it has one, nothing where there is no figure."""
    if field == "forward_backward_ms" and row["status"] != "ok":
        return str(row["status"])
    value = row.get(field)
    if value is None:
        return ""
    return format(value["median"] if isinstance(value, dict) else value, spec)


def format_metrics(metrics: Metrics | None) -> str:
    """Format one measurement as a line; `OOM` where memory ran out."""
    if metrics is None:
        return "OOM"
    return ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())


# --- the report ---


def describe_run(options: Options, world: World, machine: Machine, arguments: Sequence[str]) -> Row:
    """Return everything in a report but what was measured of implementations."""
    return {
        "command": f"torchrun --nproc-per-node {world.size} scripts/bench_train.py {shlex.join(arguments)}",
        "hardware": hardware(world),
        "machine": dataclasses.asdict(machine),
        "versions": versions(world),
        "model": options.subject.description,
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
    }


def heading(report: Row) -> str:
    """Return one line above the tables: model, hardware, and what rates are related to."""
    model, hardware, machine, options = (report[name] for name in ("model", "hardware", "machine", "options"))
    return (
        f"{options['model']}, {model['num_params'] / 1e9:.2f}B parameters, {hardware['ranks']} x {hardware['device']}, "
        f"torch {report['versions']['torch']}, {options['reduce_dtype']} reduce, AdamW {options['optimizer']}, "
        f"copies at {machine['copy_rate'] / 1e9:.0f} GB/s, {machine['used_nbytes'] / GIB:.2f} GiB used before"
    )


def hardware(world: World) -> Row:
    """Describe the device, its memory in GiB, and the numbers of ranks and CPU cores."""
    on_gpu = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "device_memory_gib": torch.cuda.mem_get_info(world.device)[1] / GIB if on_gpu else None,
        "ranks": world.size,
        "cpu_cores": os.cpu_count(),
    }


def versions(world: World) -> Row:
    """Return the versions of Python, torch, CUDA, NCCL and DeepSpeed; None for what is not used."""
    on_gpu = world.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "deepspeed": getattr(sys.modules.get("deepspeed"), "__version__", None),  # None where it did not run
    }


def write(report: Row, out: Path) -> None:
    """Write a report as JSON, with the directories that its path needs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
