"""How long one iteration's gathers, computations and reductions take, by timed events on their streams.

Owns the events of that iteration, when it is, and what ranks agree on then; what follows from the times is
``depth.py``'s. Nothing waits for an event: times are read when a later iteration begins, and only if all work has come
that far.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.memory.arena import room_nbytes
from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE, Mark, Streams
from yafsdp_like.shard.depth import Times

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from yafsdp_like.shard.unit import Unit

MEASURED = 3  # iterations before it: kernels are compiled and chosen in them, and PyTorch's allocator settles
MAX_TRIES = 64  # later iterations that find times incomplete, or something still held


@dataclass(frozen=True)
class Span:
    """Work on ``stream`` for ``unit``; on COMPUTE no work but a wait, behind which the unit computes."""

    stream: str
    unit: Unit | None
    in_backward: bool
    start: Mark
    end: Mark


class Found(NamedTuple):
    """What one rank has measured, or all agree on: each unit's times, and the bytes to spare."""

    times: list[Times]
    room_nbytes: int


class Stopwatch:
    """Of one model, from its first iteration until its depth is decided."""

    def __init__(self, streams: Streams) -> None:
        self.is_running = False
        self._streams = streams
        self._iterations = 0
        self._spans: list[Span] = []

    def next_iteration(self) -> bool:
        """One begins: whether the measured one is behind."""
        self.is_running = self._iterations == MEASURED
        self._iterations += 1
        return self._iterations > MEASURED + 1

    def found(self, units: Sequence[Unit]) -> Found | None:
        """An iteration begins: if one was measured, what ranks agree on; None as long as one of them has no times, or
        still holds memory that another plan would leave.

        They exchange what they have whatever it is, since one may still wait for times that another has.
        """
        self.is_running = False
        if not torch.is_grad_enabled() or not self.next_iteration():
            return None
        times = None if any(unit.holds_something for unit in units) else self.times(units)
        found = Found(times, room_nbytes(units[0].device)) if times is not None else None
        return agreed(found, units[0].mesh)

    @property
    def gives_up(self) -> bool:
        return self._iterations > MEASURED + MAX_TRIES

    @contextmanager
    def span(self, stream: str, unit: Unit | None, in_backward: bool) -> Iterator[None]:
        start = self._streams.mark(stream)
        yield
        self._spans.append(Span(stream, unit, in_backward, start, self._streams.mark(stream)))

    def times(self, units: Sequence[Unit]) -> list[Times] | None:
        """Each unit's; None until all is done, and if there was no backward."""
        waits = [span for span in self._spans if span.stream == COMPUTE]
        is_done = all(span.end.query() for span in self._spans)
        if not is_done or not any(span.in_backward and span.unit for span in waits):
            return None
        computing: dict[tuple[Unit | None, bool], float] = defaultdict(float)
        for span, following in pairwise(waits):
            computing[span.unit, span.in_backward] += span.end.elapsed_time(following.start)
        gathers, reductions = self._durations(GATHER), self._durations(REDUCE)
        return [
            Times(
                gather=sum(gathers[unit]) / max(1, len(gathers[unit])),
                forward=computing[unit, False],
                backward=computing[unit, True],
                reduce=sum(reductions[unit]),
            )
            for unit in units
        ]

    def _durations(self, stream: str) -> dict[Unit | None, list[float]]:
        found: dict[Unit | None, list[float]] = defaultdict(list)
        for span in self._spans:
            if span.stream == stream:
                found[span.unit].append(span.start.elapsed_time(span.end))
        return found


def can_measure(units: Sequence[Unit]) -> bool:
    """On GPUs that share the same units between the same ranks; elsewhere nothing is measured or changed."""
    is_shared = any(unit.transport.world_size > 1 for unit in units)
    return units[0].device.type == "cuda" and is_shared and len({unit.mesh for unit in units}) == 1


def agreed(found: Found | None, mesh: DeviceMesh) -> Found | None:
    """The largest times and the smallest room of all ranks of ``mesh``; None while one has none. Blocks the CPU."""
    for dim in range(mesh.ndim):
        found = _slowest(all_gather_object(found, mesh.get_group(dim)))
    return found


def _slowest(of_ranks: Sequence[Found | None]) -> Found | None:
    found = [one for one in of_ranks if one is not None]
    if len(found) < len(of_ranks):
        return None
    by_unit = zip(*(one.times for one in found), strict=True)
    times = [Times(*map(max, zip(*of_unit, strict=True))) for of_unit in by_unit]
    return Found(times, min(one.room_nbytes for one in found))
