"""The one place where CUDA streams and events are made; everything else says which stream must wait for what.

[Note: stream order]
Three streams touch an arena: ``COMPUTE`` (whatever stream the user's code runs on), ``GATHER`` and ``REDUCE``. Every
dependency between them is an event recorded after the last access on one and waited for before the next access on the
other. The CPU never waits, and ``record_stream`` is never used, since arena memory is not returned to the allocator.
``HOST_TO_DEVICE`` and ``DEVICE_TO_HOST`` copy what is offloaded, one in each direction, in the same way.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMPUTE, GATHER, REDUCE = "compute", "gather", "reduce"
HOST_TO_DEVICE, DEVICE_TO_HOST = "host to device", "device to host"
SIDE_STREAMS = (GATHER, REDUCE, HOST_TO_DEVICE, DEVICE_TO_HOST)

Event = Any  # what ``record`` returned; opaque to everyone but the streams that made it


class Streams(Protocol):
    """Streams by name, and events between them: CUDA's, a CPU that runs in order, or the tests' vector clocks."""

    def on(self, stream: str) -> AbstractContextManager[Any]:
        """Run the work issued inside on ``stream``."""

    def record(self, stream: str) -> Event:
        """Return an event that is complete when all work issued to ``stream`` so far is."""

    def wait(self, stream: str, event: Event) -> None:
        """Have work issued to ``stream`` from now on start after ``event``."""

    def synchronize(self, event: Event) -> None:
        """Block the CPU until ``event`` is complete; never called in a training step."""


class CudaStreams:
    """High-priority side streams of one device, so that communication is not queued behind compute kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {name: torch.cuda.Stream(device, priority=-1) for name in SIDE_STREAMS}

    def _stream(self, stream: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if stream == COMPUTE else self._side[stream]

    def on(self, stream: str) -> AbstractContextManager[Any]:
        """See ``Streams``."""
        return torch.cuda.stream(self._stream(stream))

    def record(self, stream: str) -> torch.cuda.Event:
        """See ``Streams``."""
        event = torch.cuda.Event()
        event.record(self._stream(stream))
        return event

    def wait(self, stream: str, event: torch.cuda.Event) -> None:
        """See ``Streams``."""
        self._stream(stream).wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        """See ``Streams``."""
        event.synchronize()


class InOrder:
    """A device that runs everything in the order issued (the CPU): there is nothing to wait for."""

    def on(self, stream: str) -> AbstractContextManager[Any]:
        """See ``Streams``."""
        return nullcontext()

    def record(self, stream: str) -> Event:
        """See ``Streams``."""
        return None

    def wait(self, stream: str, event: Event) -> None:
        """See ``Streams``."""

    def synchronize(self, event: Event) -> None:
        """See ``Streams``."""


class Timer:
    """Times at which a device gets to a place in ``COMPUTE``, without waiting for it; on a CPU the clock's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Event:
        """Return an event as ``Streams.record(COMPUTE)`` does, whose time can be asked for once it is complete."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Event, end: Event) -> float:
        """Return the seconds between two complete events."""
        return float(end - begin) if self._device.type != "cuda" else float(begin.elapsed_time(end)) / 1e3


class Recording:
    """Work on fixed addresses that is repeated at the cost of one launch.

    ``branches`` run side by side and must not depend on each other, nor allocate. On a GPU they are recorded as a CUDA
    graph by the first call, on the stream that is current then; elsewhere, and inside a graph that somebody else
    records, they are issued one by one.
    """

    def __init__(self, device: torch.device, branches: Sequence[Callable[[], None]]) -> None:
        self._device = device
        self._branches = list(branches)
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Issue the work to the current stream."""
        if self._device.type != "cuda":
            for branch in self._branches:
                branch()
        elif torch.cuda.is_current_stream_capturing():
            self._issue()
        else:
            if self._graph is None:
                self._graph = self._recorded()
            self._graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self._issue()
        finally:
            graph.capture_end()
        return graph

    def _issue(self) -> None:
        current, begin = torch.cuda.current_stream(self._device), torch.cuda.Event()
        begin.record(current)
        ends = []
        for branch in self._branches[1:]:
            side = torch.cuda.Stream(self._device)
            side.wait_event(begin)
            with torch.cuda.stream(side):
                branch()
            ends.append(side.record_event())
        self._branches[0]()
        for end in ends:
            current.wait_event(end)


class StepRecording:
    """One call of ``work``, allocations included, as a CUDA graph, made by a ``StepRecorder``.

    ``result`` is what the call returned; every ``replay`` writes it again.
    """

    def __init__(self, work: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.result = work()

    def replay(self) -> None:
        """Do the work again."""
        self._graph.replay()


class StepRecorder:
    """Records on a stream of its own; all recordings allocate from one pool."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Any]) -> StepRecording:
        """Call ``work`` once, and record it."""
        torch.cuda.empty_cache()  # what eager steps have cached is about to be needed by the recording
        return StepRecording(work, self._stream, self._pool)


@cache
def streams_of(device: torch.device) -> Streams:
    """Return the streams of ``device``, shared by all models and optimizers on it: one of each name is enough."""
    return CudaStreams(device) if device.type == "cuda" else InOrder()
