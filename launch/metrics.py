"""What a run measures and where it is written: times of phases, speed, memory; metrics.jsonl and TensorBoard.

Owns the clocks and the files. Knows nothing of the model but its FLOPs per step, and never synchronises the device
between two records.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from launch.world import World
from yafsdp_like.hardware import PEAK_TFLOPS

GIB = 2**30
METRICS_FILE, ENVIRONMENT_FILE = "metrics.jsonl", "environment.json"
Record = dict[str, Any]
Mark = torch.cuda.Event | float


def peak_tflops(world: World, given: float | None) -> float | None:
    """What MFU is a share of: the given number, or the device's by name; None on a CPU or an unknown device."""
    if given is not None or world.device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(world.device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class Timeline:
    """Where the time of a step goes. Marks are events of the compute stream on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Mark]] = []
        self._begin = self._now()

    def end(self, phase: str) -> None:
        """What has run since the last mark was `phase`."""
        self._spans.append((phase, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = defaultdict(float)
        for phase, mark in self._spans:
            seconds[phase] += _seconds(self._begin, mark)
            self._begin = mark
        self._spans.clear()
        return dict(seconds)

    def _now(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1e3


def speed(seconds: dict[str, float], num_tokens: int, flops: int | None, world: World, peak: float | None) -> Record:
    """Per device, over an interval of several steps, evaluation left out: tokens/s, TFLOP/s, MFU, shares of phases."""
    phases = {phase: taken for phase, taken in seconds.items() if phase != "evaluation"}
    total = sum(phases.values())
    tflops = None if flops is None else flops / total / world.size / 1e12
    return {
        "tokens_per_s_per_device": num_tokens / total / world.size,
        "tflops_per_device": tflops,
        "mfu": None if tflops is None or peak is None else tflops / peak,
        "peak_tflops": peak,
        "shares": {phase: taken / total for phase, taken in phases.items()},
    }


def memory(device: torch.device) -> Record:
    """Peaks so far: of the allocator on a GPU, of the process on a host."""
    record: Record = {"allocated_gib": None, "reserved_gib": None, "host_gib": _host_peak_nbytes() / GIB}
    if device.type == "cuda":
        record["allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        record["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return record


def _host_peak_nbytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Recorder:
    """metrics.jsonl, one object per line, and TensorBoard; made on the first rank only."""

    def __init__(self, directory: Path, tensorboard: bool, first_step: int) -> None:
        self._path = directory / METRICS_FILE
        _keep_lines_before(self._path, first_step)
        self._events = EventFile(directory / "tensorboard", first_step) if tensorboard else None

    def write(self, records: list[Record]) -> None:
        """Append, so that everything said so far is in the files when this returns; OSError where they take no more."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
            if self._events is not None:
                self._events.write(records)
        except OSError as error:
            raise OSError(f"cannot write metrics to {self._path.parent}: {error}") from error


class EventFile:
    """TensorBoard's file. Its own writer has a thread, which is not heard when the disk is full; this one has none."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

        directory.mkdir(exist_ok=True)
        self._path = directory / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        starts = SessionLog(status=SessionLog.START)  # hides what an earlier file says of this step and later ones
        self._append([{"file_version": "brain.Event:2"}, {"step": first_step, "session_log": starts}])

    def write(self, records: list[Record]) -> None:
        """Every number of each record, under its step."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        events = []
        for record in records:
            numbers = _numbers({key: value for key, value in record.items() if key != "step"})
            values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers]
            events.append({"step": record["step"], "summary": Summary(value=values)})
        self._append(events)

    def _append(self, events: list[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        with self._path.open("ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(Event(wall_time=time.time(), **event).SerializeToString())


def _numbers(values: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested values, by their keys with slashes between."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value


def read_records(directory: Path) -> list[Record]:
    """Read all whole lines of a run's metrics.jsonl; raise ValueError, with file and line, for what is no record."""
    path = directory / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(
                f"{path}, line {number}: expected a record with a step as JSON, found {line[:60]!r}; "
                "remove the line, or move the file away"
            )
        records.append(record)
    return records


def _keep_lines_before(path: Path, first_step: int) -> None:
    """Steps that are about to be trained again (a killed run got further than its checkpoint) leave the file."""
    kept = [record for record in read_records(path.parent) if record["step"] < first_step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(aside, path)


def environment(world: World) -> Record:
    """Versions and hardware, as saved beside the configuration."""
    on_gpu = world.device.type == "cuda"
    packages = ("torch", "numpy", "tokenizers", "transformers", "yafsdp_like")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.machine(),
        "device_memory_gib": torch.cuda.mem_get_info(world.device)[1] / GIB if on_gpu else None,
        "ranks": world.size,
        "cpu_cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
