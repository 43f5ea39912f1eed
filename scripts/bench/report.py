"""From measurements to rows, a printed table and one JSON object, whose fields `results/README.md` explains."""

import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import GIB, Metrics
from bench.options import Options
from launch.world import World

Row = dict[str, Any]

TIMES = ("forward_backward_ms", "optimizer_ms", "step_ms")
MEMORY = (
    "peak_allocated_gib",
    "peak_reserved_gib",
    "device_used_gib",
    "allocator_requests_per_step",
    "device_allocs",
    "alloc_retries",
)
COLUMNS = {  # of the printed table: field of a row -> heading and format
    "impl": ("impl", ""),
    "seq_len": ("T", "d"),
    "forward_backward_ms": ("fwd+bwd ms", ".1f"),
    "ratio_to_floor": ("x floor", ".3f"),
    "optimizer_ms": ("opt ms", ".1f"),
    "step_ms": ("step ms", ".1f"),
    "tokens_per_second_per_rank": ("tok/s/rank", ".0f"),
    "tflops": ("TFLOP/s", ".0f"),
    "peak_allocated_gib": ("alloc GiB", ".2f"),
    "peak_reserved_gib": ("reserved", ".2f"),
    "device_used_gib": ("device", ".2f"),
    "allocator_requests_per_step": ("requests/step", ".0f"),
    "device_allocs": ("cudaMallocs", "d"),
    "alloc_retries": ("retries", "d"),
    "loss": ("loss", ".4f"),
}


def make_row(name: str, seq_len: int, rounds: Sequence[Metrics | None], options: Options) -> Row:
    """One implementation at one sequence length; fields that the device cannot tell are None."""
    row: Row = {"impl": name, "seq_len": seq_len, "status": "ok", "rounds": len(rounds)}
    done = [metrics for metrics in rounds if metrics is not None]
    if len(done) < len(rounds):
        return {**row, "status": "OOM"}
    for field in TIMES:
        row[field] = spread([metrics[field] for metrics in done if field in metrics])
    for field in MEMORY:
        row[field] = max((metrics[field] for metrics in done if field in metrics), default=None)
    row["loss"] = statistics.median(metrics["loss"] for metrics in done)
    row["tokens_per_second_per_rank"] = row["ratio_to_floor"] = None
    seconds = row["forward_backward_ms"]["median"] / 1e3
    row["tflops"] = options.config.train_flops(options.batch_size, seq_len) / seconds / 1e12
    if row["step_ms"] is not None:
        row["tokens_per_second_per_rank"] = options.batch_size * seq_len / (row["step_ms"]["median"] / 1e3)
    return row


def spread(values: list[float]) -> dict[str, float] | None:
    """Return median, least and largest value; None of no values."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def add_ratios(rows: list[Row]) -> None:
    """Relate each row's forward and backward to the floor's at the same sequence length, where both ran."""
    ran = [row for row in rows if row["status"] == "ok"]
    floors = {row["seq_len"]: row["forward_backward_ms"]["median"] for row in ran if row["impl"] == "unsharded"}
    for row in ran:
        if row["seq_len"] in floors:
            row["ratio_to_floor"] = row["forward_backward_ms"]["median"] / floors[row["seq_len"]]


def format_table(rows: list[Row]) -> str:
    """Rows by sequence length, medians of times, blanks where there is no figure."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    for row in sorted(rows, key=lambda row: row["seq_len"]):
        lines.append([format_cell(row, field, spec) for field, (_, spec) in COLUMNS.items()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
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


def describe_run(options: Options, world: World, arguments: Sequence[str]) -> Row:
    """Everything in a report but what was measured."""
    return {
        "command": f"torchrun --nproc-per-node {world.size} scripts/bench_train.py {shlex.join(arguments)}",
        "hardware": hardware(world),
        "versions": versions(world),
        "model": {**dataclasses.asdict(options.config), "num_params": options.config.num_params},
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
    }


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
