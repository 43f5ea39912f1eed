"""The numbers of a run on their way from the device to its files and the console.

Owns when ranks exchange them: once every few steps, so that no step waits. Knows nothing of how they are computed.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from launch import metrics
from launch.config import Config
from launch.console import Console
from launch.memory_timeline import MemoryTimeline
from launch.world import World
from yafsdp_like.comm.consistency import raise_on_all_ranks
from yafsdp_like.memory.plan import readable
from yafsdp_like.shard.memory_report import AllocatorPeaks


class Pending(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    loss: Tensor  # () this rank's
    norm: Tensor  # () of all ranks
    rate: float


class Log:
    """The clock, the first rank's files, and the console, from `step` on."""

    def __init__(
        self,
        options: Config,
        world: World,
        console: Console,
        flops_per_step: int | None,
        step: int,
        memory: MemoryTimeline | None = None,
    ) -> None:
        self._memory = memory
        self._options, self._world, self._console, self._flops_per_step = options, world, console, flops_per_step
        self.timeline = metrics.Timeline(world.device)
        self.peak_tflops = metrics.peak_tflops(world, options.log.peak_tflops)
        self._start = time.perf_counter()
        self._pending: list[Pending] = []
        self._recorder: metrics.Recorder | None = None
        with raise_on_all_ranks():
            if world.is_first:
                self._recorder = metrics.Recorder(Path(options.output_dir), options.log.tensorboard, step + 1)

    def say(self, text: str) -> None:
        """A line of its own, on the first rank."""
        self._console.say(text)

    def add(self, step: int, loss: Tensor, norm: Tensor, rate: float) -> None:
        """Keep the numbers of a step; nothing is waited for."""
        self._pending.append(Pending(step, loss, norm, rate))

    def write(self, held_out_loss: float | None) -> int | None:
        """Bring the numbers of all steps since the last call to the host, average them over ranks, write them.

        Returns the first step whose loss is not finite, if any. In the files such numbers are null.
        """
        if not self._pending:
            return None
        losses = self._world.mean(torch.stack([done.loss for done in self._pending])).tolist()
        norms = torch.stack([done.norm for done in self._pending]).tolist()
        num_tokens = self._options.global_batch_size * self._options.seq_len  # of one step
        records: list[metrics.Record] = [
            {
                "step": done.step,
                "tokens": done.step * num_tokens,
                "loss": _finite(loss),
                "grad_norm": _finite(norm),
                "lr": done.rate,
            }
            for done, loss, norm in zip(self._pending, losses, norms, strict=True)
        ]
        records[-1] |= self._speed(len(records), num_tokens) | self._peaks()
        if self._memory is not None:
            records[-1]["memory_gib"] = self._memory.take()
        if held_out_loss is not None:
            records[-1]["held_out_loss"] = _finite(held_out_loss)
        self._pending.clear()
        with raise_on_all_ranks():
            if self._recorder is not None:
                self._recorder.write(records)
        self._console.show(records[-1])
        return next((record["step"] for record in records if record["loss"] is None), None)

    def _speed(self, num_steps: int, num_tokens: int) -> metrics.Record:
        flops = None if self._flops_per_step is None else num_steps * self._flops_per_step
        return metrics.speed(self.timeline.take(), num_steps * num_tokens, flops, self._world, self.peak_tflops)

    def _peaks(self) -> metrics.Record:
        """Peaks of the whole run, on this rank."""
        return metrics.memory(self._world.device) | (self._memory.peaks_gib() if self._memory is not None else {})

    def peaks(self) -> AllocatorPeaks | None:
        """The allocator's peaks of the whole run, on this rank; None on a CPU."""
        peaks = self._peaks()
        found = [round(peaks[name] * metrics.GIB) for name in ("allocated_gib", "reserved_gib") if peaks[name]]
        return AllocatorPeaks(*found) if found else None

    def totals(self) -> str:
        """Time and memory of the whole run, on this rank."""
        peaks = self._peaks()
        held = {name: readable(round(gib * metrics.GIB)) for name, gib in peaks.items() if gib is not None}
        words = f"{held['host_gib']} of host memory"
        if "allocated_gib" in held:
            words = f"{held['allocated_gib']} allocated, {held['reserved_gib']} reserved"
        return f"{time.perf_counter() - self._start:.0f} s; peak on one rank: {words}"


def _finite(number: float) -> float | None:
    """JSON has no word for what is not finite."""
    return number if math.isfinite(number) else None
