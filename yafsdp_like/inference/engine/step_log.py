"""What steps took: the device's time, what it waited for the CPU, and the CPU's time of each step.

Owns the figures; when a step begins and ends is the engine's.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from yafsdp_like.memory.streams import Event, Timer

NUM_KEPT = 1024  # steps that quantiles and shares are of
_LEAST_SPARE = 0.15  # of a step, waits included, that it may wait in any case: 1 / (1 - 0.15) is below 1.2
_MOST_BUSY = 0.9  # of a step, that the CPU may work and wait in it without holding up the device


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Seconds of steps, which no two ranks have alike; shares and quantiles are of the last ``NUM_KEPT`` steps."""

    device_busy_seconds: float = field(compare=False)
    device_waiting_seconds: float = field(compare=False)  # for the CPU, while there were requests
    device_waiting_share: float = field(compare=False)
    decode_step_cpu_p50_seconds: float = field(compare=False)  # scheduling, staging, launching and reading
    decode_step_cpu_p99_seconds: float = field(compare=False)
    mixed_step_cpu_p50_seconds: float = field(compare=False)  # of steps with parts of prompts
    mixed_step_cpu_p99_seconds: float = field(compare=False)


class StepLog:
    """Counts the seconds of an engine's steps, each of which adds a few numbers.

    The device waits for the CPU from the end of one step to the beginning of the next, if there was a request in
    between. What it waits inside a step, launched kernel by kernel, counts as busy.
    """

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._busy_s = self._waiting_s = 0.0
        self.num_steps = self.num_prompt_tokens = 0  # of steps that are done, since the start
        self._last_done: Event | None = None  # of the step before, if there was work since
        self._device_s: deque[tuple[float, float]] = deque(maxlen=NUM_KEPT)  # busy, and waiting before it
        self._last_cpu_s = 0.0
        self._cpu_s: dict[bool, deque[float]] = {mixed: deque(maxlen=NUM_KEPT) for mixed in (False, True)}

    def add_device(self, began: Event, done: Event, num_prompt_tokens: int = 0) -> tuple[float, float]:
        """Add a step that is done, and return for how many seconds the device was busy with it, and waited before.

        It has not waited for the first step after there was nothing to do. ``num_prompt_tokens``: how many tokens of
        prompts the step computed.
        """
        self.num_steps += 1
        self.num_prompt_tokens += num_prompt_tokens
        busy_s = self._timer.seconds(began, done)
        waiting_s = 0.0 if self._last_done is None else max(0.0, self._timer.seconds(self._last_done, began))
        self._busy_s += busy_s
        self._waiting_s += waiting_s
        self._last_done = done
        self._device_s.append((busy_s, waiting_s))
        return busy_s, waiting_s

    def add_cpu(self, seconds: float, mixed: bool) -> None:
        """Add the CPU's time of a step: all but waiting. ``mixed``: it computes parts of prompts."""
        self._cpu_s[mixed].append(seconds)
        self._last_cpu_s = seconds

    @property
    def spare_s(self) -> float:
        """For how many seconds a step may wait for something beside the device: what the last one had left.

        That is its time less the CPU's, or ``_LEAST_SPARE`` of it where that is more: steps that use all of the latter
        each time take less than 1.2 times as long.
        """
        step_s = sum(self._device_s[-1]) if self._device_s else 0.0
        return max(_LEAST_SPARE * step_s, _MOST_BUSY * step_s - self._last_cpu_s)

    def pause(self) -> None:
        """There is nothing to do, for which the device waits without fault."""
        self._last_done = None

    def figures(self) -> StepFigures:
        """Return the figures; those of no steps are 0."""
        busy_s, waiting_s = (sum(pair[column] for pair in self._device_s) for column in (0, 1))
        decode, mixed = self._cpu_s[False], self._cpu_s[True]
        return StepFigures(
            device_busy_seconds=self._busy_s,
            device_waiting_seconds=self._waiting_s,
            device_waiting_share=waiting_s / (busy_s + waiting_s or 1.0),
            decode_step_cpu_p50_seconds=quantile(decode, 0.5),
            decode_step_cpu_p99_seconds=quantile(decode, 0.99),
            mixed_step_cpu_p50_seconds=quantile(mixed, 0.5),
            mixed_step_cpu_p99_seconds=quantile(mixed, 0.99),
        )


def quantile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that so large a share of all does not exceed; 0 of no values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
