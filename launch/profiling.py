"""A trace of two steps and the allocator's history, for those who ask.

Owns their files. Costs nothing when neither was asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from launch.config import LogOptions
from launch.world import World

NUM_STEPS = 2  # in a trace: the second shows what the first only starts
NUM_ENTRIES = 100_000  # of the allocator's history


class Profiling:
    """What `log.profile_step` and `log.memory_snapshot` ask for, on one rank."""

    def __init__(self, options: LogOptions, world: World, directory: Path) -> None:
        if options.memory_snapshot and world.device.type != "cuda":
            raise ValueError("log.memory_snapshot is of the allocator on GPUs; this run is on the CPU")
        self._options, self._world, self._directory = options, world, directory
        self._profile: Any = None
        if options.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=NUM_ENTRIES)

    def before(self, step: int) -> None:
        """`step`, counted from 1, is about to run."""
        if step == self._options.profile_step:
            on_gpu = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profile.start()

    def after(self, step: int) -> None:
        """`step` has been issued."""
        if self._profile is not None and step == (self._options.profile_step or 0) + NUM_STEPS - 1:
            self._end_profile()

    def close(self) -> None:
        """Write what is left to write: the run has ended, or broken off."""
        self._end_profile()
        if self._options.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(self._directory / f"memory-rank{self._world.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _end_profile(self) -> None:
        if self._profile is not None:
            self._world.synchronize()
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._directory / f"trace-rank{self._world.rank}.json.gz"))
            self._profile = None
