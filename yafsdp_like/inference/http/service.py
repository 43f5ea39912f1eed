"""A thread that steps the engine, and hands its outputs to streams on an event loop.

Owns the thread: nothing else touches the engine while it runs, so the engine needs no locks. Owns what becomes of
requests whose reader goes away, and of all of them at the end. Knows nothing of text or HTTP.

[Note: two threads]
What the event loop wants of the engine is a call, put in a queue and made between two steps; what the engine has to say
goes the other way as one callback of the loop per step. Streams and the table of them belong to the loop, the engine
to the thread, and only the queue is shared.

[Note: identities]
The engine knows a request by a name that the service has made for it alone. So what it still has to say of one that was
refused or given up is never taken for news of another that was opened under the same id.

[Note: a stuck engine]
A step may never return. The thread records when it starts to do something, and the event loop reads that time:
`unhealthy_reason` reports it, `stuck_after_s` fails the service after it, and nothing on the event loop waits for the
thread without a timeout. A thread cannot be killed, so whoever owns the process must then end the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

from yafsdp_like.inference.engine.request import QueueFullError, Request, RequestOutput
from yafsdp_like.inference.http.stream import Stream

T = TypeVar("T")

SLOW_STEP_S = 20.0  # a step that takes longer is worth a word
MAX_OPEN_REQUESTS = 2**16  # requests that have not ended
LAST_STEP_S = 5.0  # for the engine to end what was cancelled, and its thread
logger = logging.getLogger(__name__)


class Limited(Protocol):
    """What the service asks of an engine's options."""

    @property
    def max_waiting(self) -> int:
        """Requests that may wait."""


class SteppableEngine(Protocol):
    """What the thread needs of an engine; `engine.Engine` says what each does."""

    @property
    def options(self) -> Limited:
        """The engine's options."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def rest_s(self) -> float:
        """Seconds for which to wait for calls, and then ask again; 0.0: call ``step`` now."""

    def add(self, request: Request) -> None:
        """Queue a request."""

    def cancel(self, request_id: str) -> None:
        """End a request; its last output still comes."""

    def step(self) -> list[RequestOutput]:
        """Run one step, and return its outputs."""

    def metrics(self) -> Any:
        """Return a dataclass of numbers."""


EngineT = TypeVar("EngineT", bound=SteppableEngine)


class UnavailableError(RuntimeError):
    """The service takes no requests: it is shutting down, or its engine has failed."""


class StuckEngineError(RuntimeError):
    """The engine has not come back in time from what it was doing."""


class ServiceState(Enum):
    """Where a service is in its life; it never goes back."""

    NEW = "new"
    SERVING = "serving"
    DRAINING = "draining"  # what runs may end, nothing begins
    FAILED = "failed"  # the engine has raised, or is stuck
    CLOSED = "closed"


@dataclass(frozen=True)
class _Call(Generic[EngineT]):
    """Something to do in the engine's thread; `fail` is called instead if it will never be done."""

    run: Callable[[EngineT], None]
    fail: Callable[[Exception], None]


class Service(Generic[EngineT]):
    """Runs one engine in a thread of its own for readers on one event loop.

    `await start()`, then `open` streams; `await drain(...)` and `await close()` at the end. All methods are the event
    loop's; the engine is reached by `call`.
    """

    def __init__(
        self,
        engine: EngineT,
        prepare: Callable[[EngineT], None] = lambda engine: None,
        poll_interval_s: float | None = None,
        stuck_after_s: float | None = None,
    ) -> None:
        """`prepare` runs first in the thread, for example to select its CUDA device.

        An engine that finds work by itself is polled every `poll_interval_s` seconds; None: it has work after calls
        only. An engine whose step takes longer than `stuck_after_s` seconds has failed; None: never.
        """
        self._engine, self._prepare = engine, prepare
        self._poll_interval_s, self._stuck_after_s = poll_interval_s, stuck_after_s
        self._calls: deque[_Call[EngineT]] = deque()  # shared, under `_changed`
        self._changed = threading.Condition()
        self._is_over = False  # shared, under `_changed`: the thread takes no more calls
        self._busy_since: float | None = None  # written by the thread: when it began a step and what comes before it
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._numbers = itertools.count()  # [Note: identities]
        self._streams: dict[str, tuple[Stream, str]] = {}  # and the id there, by the engine's name for the request;
        self._idle = asyncio.Event()  # an entry stays until the engine has said the request's last word
        self._idle.set()
        self._watcher: asyncio.Task[None] | None = None
        self.state = ServiceState.NEW
        self.error: BaseException | None = None  # why it FAILED

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def max_waiting(self) -> int:
        """Requests that may wait; more than so many can never be opened together."""
        return self._engine.options.max_waiting

    @property
    def busy_s(self) -> float:
        """For how long the engine has been doing one thing; 0 while it waits."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def is_stuck(self) -> bool:
        """Whether the thread could not be ended: only the process can."""
        return isinstance(self.error, StuckEngineError) and self._thread.is_alive()

    @property
    def unhealthy_reason(self) -> str | None:
        """Why nobody should be sent here now; None if all is well."""
        if self.state is not ServiceState.SERVING:
            return str(self._unavailable())
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        if (busy_s := self.busy_s) > SLOW_STEP_S:
            return f"the engine has been in one step for {busy_s:.0f} s, and may be stuck"
        return None

    async def start(self) -> None:
        """Begin to serve the loop that is running."""
        assert self.state is ServiceState.NEW, f"a service starts once, this one is {self.state.value}"
        self._loop = asyncio.get_running_loop()
        self.state = ServiceState.SERVING
        self._thread.start()
        self._watcher = asyncio.create_task(self._watch())

    async def open(self, requests: Sequence[Request]) -> Stream:
        """Give the engine all of these requests, or none of them.

        Raises what `Engine.add` raises of the first that it does not take, and `UnavailableError` at the end of the
        service.
        """
        if self.state is not ServiceState.SERVING:
            raise self._unavailable()
        self._check(requests)
        self._check_room(len(requests))
        names = {request.id: f"{next(self._numbers)}:{request.id}" for request in requests}
        stream = Stream(names, self._cancel)
        self._streams.update((name, (stream, request_id)) for request_id, name in names.items())
        self._idle.clear()
        named = [replace(request, id=names[request.id]) for request in requests]
        try:
            await self.call(lambda engine: self._add(engine, named))
        except asyncio.CancelledError:  # the engine has them by now, or will have
            stream.close()
            raise
        return stream

    async def call(self, function: Callable[[EngineT], T]) -> T:
        """What `function(engine)` gives, made in the engine's thread between two steps.

        Raises what it raises, and `UnavailableError` if there is no engine any more.
        """
        future: asyncio.Future[T] = self._loop.create_future()

        def run(engine: EngineT) -> None:
            try:
                result = function(engine)
            except Exception as error:
                self._post(_reject, future, error)
            except BaseException as error:  # the end of the thread
                self._post(_reject, future, _failed(error))
                raise
            else:
                self._post(_resolve, future, result)

        self._put(_Call(run, lambda error: self._post(_reject, future, error)))
        return await future

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, wait `grace_s` seconds for those that run, and cancel what is left.

        An engine that does not end what is cancelled within `LAST_STEP_S` seconds has failed.
        """
        if self.state is ServiceState.SERVING:
            self.state = ServiceState.DRAINING
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        for name in list(self._streams):
            self._cancel(name)
        try:
            await asyncio.wait_for(self._idle.wait(), LAST_STEP_S)
        except TimeoutError:
            self._fail(
                StuckEngineError(f"it has been in one step for {self.busy_s:.0f} s, and ends nothing that is cancelled")
            )

    async def close(self) -> None:
        """Cancel what runs and end the thread, or leave it where it is stuck. Idempotent."""
        if self.state in (ServiceState.SERVING, ServiceState.DRAINING):
            await self.drain(0)
        if self._watcher is not None:
            self._watcher.cancel()
        self._end_calls(self._unavailable())
        if self.state is not ServiceState.NEW:
            await asyncio.to_thread(self._thread.join, 0.0 if self.is_stuck else LAST_STEP_S)
            if self._thread.is_alive():
                self._fail(
                    StuckEngineError(f"it has been in one step for {self.busy_s:.0f} s, and its thread does not end")
                )
        if self.state is not ServiceState.FAILED:
            self.state = ServiceState.CLOSED

    # --- on the event loop ---

    def _stuck(self, more: str) -> StuckEngineError:
        return StuckEngineError(f"it has been in one step for {self.busy_s:.0f} s, {more}")

    def _check(self, requests: Sequence[Request]) -> None:
        """Raises ValueError for requests whose outputs could not be told apart."""
        seen: set[str] = set()
        for request in requests:
            if request.id in seen:
                raise ValueError(f"request {request.id!r}: the id is in use")
            seen.add(request.id)

    def _check_room(self, count: int) -> None:
        """Raises QueueFullError if more are open than any engine says no to by itself, as when it is stuck."""
        if len(self._streams) + count > MAX_OPEN_REQUESTS:
            raise QueueFullError(f"{len(self._streams)} requests are open; try again later")

    def _cancel(self, name: str) -> None:
        def run(engine: EngineT) -> None:
            try:
                engine.cancel(name)
            except Exception as error:
                self._post(self._lose, name, error)

        if self.state is not ServiceState.FAILED:
            self._put(_Call(run, lambda error: None))

    async def _watch(self) -> None:
        """[Note: a stuck engine] Fails a service whose engine does not come back."""
        while self.state in (ServiceState.SERVING, ServiceState.DRAINING):
            await asyncio.sleep(min(1.0, (self._stuck_after_s or 4.0) / 4))
            if self._stuck_after_s is not None and (busy_s := self.busy_s) > self._stuck_after_s:
                self._fail(StuckEngineError(f"it has been in one step for {busy_s:.0f} s"))
            elif not self._thread.is_alive() and not self._is_over:
                self._fail(RuntimeError("its thread has ended"))

    def _put(self, call: _Call[EngineT]) -> None:
        with self._changed:
            if not self._is_over:
                self._calls.append(call)
                self._changed.notify()
                return
        call.fail(self._unavailable())

    def _unavailable(self) -> UnavailableError:
        if self.error is not None:
            return _failed(self.error)
        return UnavailableError(f"the service takes no requests: it is {self.state.value}")

    def _route(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            try:
                self._deliver(output)
            except Exception as error:  # others in the same step have nothing to do with it
                self._lose(output.request_id, error)
            if output.finish is not None:
                self._forget([output.request_id])

    def _deliver(self, output: RequestOutput) -> None:
        if output.request_id in self._streams:  # else it was not opened in the end
            stream, request_id = self._streams[output.request_id]
            if not stream.pass_on(request_id, output):
                stream.put(replace(output, request_id=request_id))

    def _lose(self, name: str, error: Exception) -> None:
        """Ends what a request is part of, whose outputs could not be delivered, or which could not be cancelled."""
        logger.error("a request is lost", exc_info=error)
        if name in self._streams:
            stream, _ = self._streams[name]
            stream.fail(UnavailableError(f"the request is lost: {type(error).__name__}: {error}"))

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            self._streams.pop(name, None)
        if not self._streams:
            self._idle.set()

    def _fail(self, error: BaseException) -> None:
        if self.state in (ServiceState.FAILED, ServiceState.CLOSED):
            return
        logger.error("the engine has failed", exc_info=error)
        self.state, self.error = ServiceState.FAILED, error
        unavailable = self._unavailable()
        for stream, _ in self._streams.values():
            stream.fail(unavailable)
        self._end_calls(unavailable)
        self._forget(list(self._streams))

    def _end_calls(self, error: Exception) -> None:
        """The thread is to end, or has; calls that wait for it fail."""
        with self._changed:
            self._is_over = True
            calls = list(self._calls)
            self._calls.clear()
            self._changed.notify()
        for call in calls:
            call.fail(error)

    # --- in the engine's thread ---

    def _run(self) -> None:
        try:
            self._busy_since = time.monotonic()
            self._prepare(self._engine)
            while self._turn():
                pass
        except BaseException as error:  # also what ends a thread without a word
            self._post(self._fail, error)
        finally:
            self._busy_since = None

    def _turn(self) -> bool:
        """Makes the calls that wait, and a step if it is due; False at the end."""
        num_calls = self._wait()
        for _ in range(num_calls):
            with self._changed:
                if not self._calls:  # they were ended meanwhile
                    return False
                call = self._calls.popleft()
            call.run(self._engine)
        if self._is_over:
            return False
        if self._wait_s == 0.0 and (outputs := self._engine.step()):
            self._post(self._route, outputs)
        return True

    def _wait(self) -> int:
        """The number of calls to make before the next step, once there is anything to do."""
        with self._changed:
            self._busy_since = None
            while not self._calls and not self._is_over and (wait_s := self._wait_s) != 0.0:
                self._changed.wait(wait_s)
            self._busy_since = time.monotonic()
            return len(self._calls)

    @property
    def _wait_s(self) -> float | None:
        """For how long there is nothing to do but calls; 0.0: a step is due, None: there is no end."""
        return self._engine.rest_s if self._engine.has_work else self._poll_interval_s

    def _add(self, engine: EngineT, requests: Sequence[Request]) -> None:
        """All or none; the table forgets those that the engine refuses, even if who opened them has gone meanwhile."""
        for index, request in enumerate(requests):
            try:
                engine.add(request)
            except Exception:
                for added in requests[:index]:
                    engine.cancel(added.id)
                self._post(self._forget, [request.id for request in requests])
                raise

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Run on the event loop, if there still is one; from any thread."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # a loop that was closed without `close`: nobody is left to tell
            if not self._loop.is_closed():
                raise


def _failed(error: BaseException) -> UnavailableError:
    return UnavailableError(f"the engine has failed: {type(error).__name__}: {error}")


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # who asked may have gone
        future.set_result(result)


def _reject(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        is_iteration = isinstance(error, StopIteration)  # which a future does not take
        future.set_exception(RuntimeError(f"StopIteration: {error}") if is_iteration else error)
