"""The one place where CUDA streams and events are made; everything else says which stream must wait for what.

[Note: stream order]
Three streams touch an arena: ``COMPUTE`` (whatever stream the user's code runs on), ``GATHER`` and ``REDUCE``. Every
dependency between them is an event recorded after the last access on one and waited for before the next access on the
other. The CPU never waits, and ``record_stream`` is never used, since arena memory is not returned to the allocator.
``HOST_TO_DEVICE`` and ``DEVICE_TO_HOST`` copy what is offloaded, one in each direction, in the same way.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from yafsdp_like.memory.allocator import transient_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

COMPUTE, GATHER, REDUCE = "compute", "gather", "reduce"
HOST_TO_DEVICE, DEVICE_TO_HOST = "host to device", "device to host"
SIDE_STREAMS = (GATHER, REDUCE, HOST_TO_DEVICE, DEVICE_TO_HOST)

UserStream = torch.Stream  # of a user's own
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

    def is_complete(self, event: Event) -> bool:
        """Return whether ``event`` is complete, as far as the CPU knows, without waiting."""


@contextmanager
def on_stream_of_user(stream: UserStream | None) -> Iterator[None]:
    """Run the work issued inside on a stream that the user made, in order with the current one; None: on that."""
    if stream is None or stream.device.type == "cpu":
        yield
        return
    current = torch.accelerator.current_stream(stream.device)
    stream.wait_stream(current)
    with stream:
        yield
    current.wait_stream(stream)


class CudaStreams:
    """High-priority side streams of one device, so that communication is not queued behind compute kernels.

    ``torch.cuda`` makes new Python objects whenever it is asked for the current stream, an event or a ``with`` block,
    which takes longer than the calls to CUDA, a dozen per unit and step. So the calls beneath are made here.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = {name: torch.cuda.Stream(device, priority=-1) for name in SIDE_STREAMS}
        self._index = self._side[GATHER].device_index
        self._computed: dict[int, torch.cuda.Stream] = {}  # streams that were current, by id

    def _stream(self, stream: str) -> torch.cuda.Stream:
        if stream != COMPUTE:
            return self._side[stream]
        number, index, kind = torch._C._cuda_getCurrentStream(self._index)
        found = self._computed.get(number)
        if found is None:
            found = torch.cuda.Stream(stream_id=number, device_index=index, device_type=kind)
            self._computed[number] = found
        return found

    def on(self, stream: str) -> AbstractContextManager[Any]:
        """See ``Streams``."""
        return _OnStream(self._stream(stream))

    def record(self, stream: str) -> Event:
        """See ``Streams``."""
        event = torch._C._CudaEventBase()
        event.record(self._stream(stream))
        return event

    def wait(self, stream: str, event: Event) -> None:
        """See ``Streams``."""
        event.wait(self._stream(stream))

    def synchronize(self, event: Event) -> None:
        """See ``Streams``."""
        event.synchronize()

    def is_complete(self, event: Event) -> bool:
        """See ``Streams``."""
        return bool(event.query())


class _OnStream:
    """``torch.cuda.stream``, at a third of its cost: the device and its stream are current inside."""

    __slots__ = ("_before", "_device_before", "_stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        stream = self._stream
        self._device_before = torch._C._cuda_getDevice()
        self._before = torch._C._cuda_getCurrentStream(stream.device_index)
        torch._C._cuda_setStream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )

    def __exit__(self, *_: object) -> None:
        number, index, kind = self._before
        torch._C._cuda_setStream(stream_id=number, device_index=index, device_type=kind)
        if self._device_before != index:
            torch._C._cuda_setDevice(self._device_before)


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

    def is_complete(self, event: Event) -> bool:
        """See ``Streams``."""
        return True


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

    def is_complete(self, event: Event) -> bool:
        """Return whether the device has got to the place of a mark, without waiting."""
        return self._device.type != "cuda" or bool(event.query())

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


class _Kept:
    """Bytes of a pool at their address, for PyTorch to make a tensor of, which keeps the pool's recorder alive."""

    def __init__(self, storage: torch.UntypedStorage, recorder: StepRecorder) -> None:
        self._recorder = recorder
        where = {"shape": (storage.nbytes(),), "typestr": "|u1", "data": (storage.data_ptr(), False)}
        self.__cuda_array_interface__ = {**where, "version": 3}


class StepRecorder:
    """Records steps on a stream of its own, in a memory pool that all its recordings share.

    [Note: one pool]
    A recording finds in its pool what the last one has left free: neither memory of the allocator's default pool, nor
    of another stream. Steps that run as they are before one is recorded would leave their activations in the default
    pool, beside the recordings'. They run ``in_pool``, on the recordings' stream, so that the pool grows to what the
    largest step takes, and no further. What they leave there must die before the next replay, which may write anywhere
    in memory that was free when it was recorded: see ``live``.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        # The allocator lets nobody use a pool again after its last graph has gone: this one stays.
        self._first = self.record(lambda: transient_storage(1, self._stream.device).fill_(0))  # type: ignore[attr-defined]

    @staticmethod
    def works_on(device: torch.device) -> bool:
        """Return whether steps of a model on ``device`` can be recorded."""
        return device.type == "cuda"

    def record(self, work: Callable[[], Any]) -> StepRecording:
        """Call ``work`` once, and record it. Cached memory of the default pool is given back first."""
        return StepRecording(work, self._stream, self._pool)

    @contextmanager
    def in_pool(self) -> Iterator[None]:
        """Run the work issued inside on the recordings' stream, between what the current one did and will do.

        All that is allocated on that stream, by whatever thread, comes from the pool: autograd has threads of its own.
        Cached memory of the default pool is given back first, which the allocator would not do inside.
        """
        torch.cuda.empty_cache()
        current, device = torch.cuda.current_stream(self._stream.device), self._stream.device_index
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                torch._C._cuda_beginAllocateCurrentStreamToPool(device, self._pool)
                try:
                    yield
                finally:
                    torch._C._cuda_endAllocateToPool(device, self._pool)
                    torch._C._cuda_releasePool(device, self._pool)  # the use that the beginning counted
        finally:
            current.wait_stream(self._stream)

    def keep(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return another storage on bytes of the pool, for what a replay leaves there once this one has been freed.

        The bytes stay mapped as long as it lives, and are others' too: of every later recording.
        """
        return torch.as_tensor(_Kept(storage, self), device=storage.device).untyped_storage()

    def live(self) -> set[tuple[int, int]]:
        """Return the address and size of each block of the pool that somebody holds."""
        blocks = (
            block
            for segment in torch.cuda.memory_snapshot(self._pool, include_traces=False)
            for block in segment["blocks"]
        )
        return {(block["address"], block["size"]) for block in blocks if block["state"] == "active_allocated"}


@cache
def streams_of(device: torch.device) -> Streams:
    """Return the streams of ``device``, shared by all models and optimizers on it: one of each name is enough."""
    return CudaStreams(device) if device.type == "cuda" else InOrder()
