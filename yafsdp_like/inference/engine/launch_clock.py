"""When the next step is due: as late as it can be launched, so that requests that arrive until then are in it.

Owns how long steps take on the device, and what the CPU needs before they end, both learned. Plain numbers: times are
seconds of the caller's clock, and who waits until a step is due is whoever drives the engine.

[Note: launched late]
A request that arrives when the next step has been launched waits for the rest of the one under way, and for all of the
next. So the next one is due only a reserve before the end of the one under way. That end is reckoned from when the step
before it was read and what a step of its size takes, rather too little: less than expected is believed at once, more
slowly. The reserve is what the CPU needs to make and launch a step, one with parts of prompts or one that only decodes.
It is controlled rather than measured: it grows by what the device has waited for a step that was launched when it was
due, and shrinks with each such step by ``_WAITED_SHARE`` of its time. So the device waits for not much more than that
share of the time, whatever the CPU does between steps. What it waited before it was known that the step was due, as
when a prompt comes shortly before, or when the CPU was busy with something else, does not count. A step may end much
sooner than one of its size did before, with shorter contexts or without an image, so ``Engine.rest_s`` is asked again
every few milliseconds, and a step is due, too, once the device has nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yafsdp_like.inference.plan.step_sizes import StepSize

_FIRST_RESERVE_S = 3e-3
_MOST_GROWTH_S = 1e-3  # of a reserve by one step, which may have been an exception
_WAITED_SHARE = 0.001
_WEIGHT = 0.1  # in what is expected of a kind of steps, of one that took longer
_DONE_S = 50e-6  # a step for which the CPU waited less was done before


@dataclass
class _LaunchedStep:
    kind: tuple[int, bool]  # tokens, padding included, and whether there are parts of prompts
    called_at: float  # when the CPU began to make it
    known_late_s: float | None  # how long after it was due that was known; None: it says nothing of the reserve
    ends_at: float = 0.0  # known once the step before it is read
    early_s: float = 0.0  # that the CPU waited, once it was launched, for the step before it


class LaunchClock:
    """Learns from the steps of one engine, at most two of which are launched and not read."""

    def __init__(self) -> None:
        self._step_s: dict[tuple[int, bool], float] = {}  # of a kind of steps
        self._reserve_s = {False: _FIRST_RESERVE_S, True: _FIRST_RESERVE_S}  # by ``is_mixed`` of the next step
        self._under_way: _LaunchedStep | None = None
        self._behind: _LaunchedStep | None = None
        self._asked: dict[bool, float] = {}  # since the last launch, when it was first asked, by ``is_mixed``

    def rest_s(self, now: float, is_mixed: bool) -> float:
        """Return in how many seconds the next step is due; 0.0: it is, or nobody knows when the one under way ends.

        ``is_mixed``: whether it will have parts of prompts, as far as is known now. Steps of which this was not asked
        say nothing about the reserve.
        """
        self._asked.setdefault(is_mixed, now)
        if self._under_way is None or self._behind is not None:
            return 0.0
        return max(0.0, self._under_way.ends_at - self._reserve_s[is_mixed] - now)

    def launched(self, size: StepSize, called_at: float) -> None:
        """Take a step that was launched, by a call at ``called_at``."""
        kind, known_late_s = (size.num_tokens, size.num_chunks > 0), None
        under_way, known_at = self._under_way, self._asked.get(kind[1]) if self._asked else None
        self._asked = {}
        if under_way is None:
            self._under_way = _LaunchedStep(kind, called_at, None, called_at + self._step_s.get(kind, 0.0))
            return
        if known_at is not None:
            due_at = under_way.ends_at - self._reserve_s[kind[1]]
            known_late_s = max(0.0, known_at - due_at) if called_at >= due_at else None
        self._behind = _LaunchedStep(kind, called_at, known_late_s)

    def read(self, now: float, waited_s: float, device_s: tuple[float, float]) -> None:
        """Take the end of the first step that is not read: the CPU has waited for it for ``waited_s``, until ``now``.

        ``device_s``: for how long the device has computed it, and has waited before.
        """
        step, following = self._under_way, self._behind
        assert step is not None, "a step is read once, after it was launched"
        busy_s, device_waited_s = device_s
        expected_s = self._step_s.get(step.kind, busy_s)
        self._step_s[step.kind] = busy_s if busy_s < expected_s else expected_s + _WEIGHT * (busy_s - expected_s)
        if step.known_late_s is not None:
            late_s = max(0.0, device_waited_s - step.early_s - step.known_late_s)
            reserve_s = self._reserve_s[step.kind[1]] + min(late_s, _MOST_GROWTH_S) - _WAITED_SHARE * busy_s
            self._reserve_s[step.kind[1]] = max(0.0, reserve_s)
        if following is not None:
            begins_at = now if waited_s >= _DONE_S else following.called_at
            following.early_s, following.ends_at = waited_s, begins_at + self._step_s.get(following.kind, 0.0)
        self._under_way, self._behind = following, None
