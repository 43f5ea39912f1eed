"""The one place where CUDA streams and events are made; everything else says which stream must wait for what.

[Note: stream order]
Three streams touch an arena: ``COMPUTE`` (whatever stream the user's code runs on), ``GATHER`` and ``REDUCE``. Every
dependency between them is an event recorded after the last access on one and waited for before the next access on the
other. The CPU never waits, and ``record_stream`` is never used, since arena memory is not returned to the allocator.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import torch

COMPUTE, GATHER, REDUCE = "compute", "gather", "reduce"

Event = Any  # what ``record`` returned; opaque to everyone but the streams that made it


class Streams(Protocol):
    """What the engine asks of streams. Implementations: CUDA, a CPU that runs in order, and a vector-clock test
    double.
    """

    def on(self, stream: str) -> AbstractContextManager[Any]:
        """Work issued inside runs on ``stream``."""

    def record(self, stream: str) -> Event:
        """An event that is complete when all work issued to ``stream`` so far is."""

    def wait(self, stream: str, event: Event) -> None:
        """Work issued to ``stream`` from now on starts after ``event``."""


class CudaStreams:
    """Two high-priority side streams of one device, so that communication is not queued behind compute kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = {name: torch.cuda.Stream(device, priority=-1) for name in (GATHER, REDUCE)}

    def _stream(self, stream: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if stream == COMPUTE else self._side[stream]

    def on(self, stream: str) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream(stream))

    def record(self, stream: str) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(stream))
        return event

    def wait(self, stream: str, event: torch.cuda.Event) -> None:
        self._stream(stream).wait_event(event)


class InOrder:
    """A device that runs everything in the order issued (the CPU): there is nothing to wait for."""

    def on(self, stream: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def record(self, stream: str) -> Event:
        return None

    def wait(self, stream: str, event: Event) -> None:
        pass


@cache
def streams_of(device: torch.device) -> Streams:
    """The streams of ``device``, shared by every model on it: two side streams a device are enough."""
    return CudaStreams(device) if device.type == "cuda" else InOrder()
