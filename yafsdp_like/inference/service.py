"""A thread that steps the engine, and streams of its events on an event loop.

Owns the thread: nothing else touches the engine while it runs, so the engine needs no locks. Owns what becomes of
requests whose reader goes away, and of all of them at the end. Knows nothing of text or HTTP.

[Note: two threads]
What the event loop wants of the engine is a call, put in a queue and made between two steps; what the engine has to say
goes the other way as one callback of the loop per step. Streams and the table of them belong to the loop, the engine
to the thread, and only the queue is shared.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

from yafsdp_like.inference.request import Event, Request

T = TypeVar("T")


class Stepped(Protocol):
    """What the thread needs of an engine; `engine.Engine` says what each does."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def step(self) -> list[Event]: ...

    def metrics(self) -> Any: ...


EngineT = TypeVar("EngineT", bound=Stepped)


class Unavailable(RuntimeError):
    """The service takes no requests: it is shutting down, or its engine has failed."""


class State(Enum):
    """Where a service is in its life; it never goes back."""

    NEW = "new"
    SERVING = "serving"
    DRAINING = "draining"  # what runs may end, nothing begins
    FAILED = "failed"  # the engine has raised
    CLOSED = "closed"


@dataclass(frozen=True)
class _Call(Generic[EngineT]):
    """Something to do in the engine's thread; `fail` is called instead if it will never be done."""

    run: Callable[[EngineT], None]
    fail: Callable[[Exception], None]


class Stream:
    """Events of requests that were opened together, as they come; ends when all of them have ended.

    `close` it in the end: requests that nobody reads any more are cancelled. Events that are not read yet are kept;
    there are at most as many as tokens were asked for.
    """

    def __init__(self, request_ids: Sequence[str], cancel: Callable[[str], None]) -> None:
        self._live = dict.fromkeys(request_ids)
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._is_closed = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        """The next event of any of the requests. Raises `Unavailable` if the engine has failed."""
        while not self._is_closed:
            if self._events:
                return self._events.popleft()
            if self._error is not None:
                raise self._error
            if not self._live:
                break
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration

    def cancel(self, request_id: str) -> None:
        """Ask the engine to end one of the requests; its last event still comes. Harmless once it has ended."""
        if request_id in self._live:
            self._cancel(request_id)

    def close(self) -> None:
        """Stop reading, and cancel what has not ended. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._events.clear()
        for request_id in self._live:
            self._cancel(request_id)
        self._news.set()

    def put(self, event: Event) -> None:
        """For the service: an event of one of the requests."""
        if event.finish is not None:
            del self._live[event.request_id]
        if not self._is_closed:
            self._events.append(event)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """For the service: no event will come any more."""
        self._error = error
        self._news.set()


class Service(Generic[EngineT]):
    """Runs one engine in a thread of its own for readers on one event loop.

    `await start()`, then `open` streams; `await drain(...)` and `await close()` at the end. All methods are the event
    loop's; the engine is reached by `call`.
    """

    def __init__(
        self, engine: EngineT, prepare: Callable[[EngineT], None] = lambda engine: None, look_s: float | None = None
    ) -> None:
        """`prepare` is called first in the thread, to choose its device, say. An engine that finds work by itself is
        looked at every `look_s` seconds; other engines only have work after calls."""
        self._engine, self._prepare, self._look_s = engine, prepare, look_s
        self._calls: deque[_Call[EngineT]] = deque()  # shared, under `_changed`
        self._changed = threading.Condition()
        self._is_over = False  # shared, under `_changed`: the thread takes no more calls
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._streams: dict[str, Stream] = {}  # by request; an entry until the engine has said the request's last word
        self._idle = asyncio.Event()
        self._idle.set()
        self.state = State.NEW
        self.error: Exception | None = None  # why it FAILED

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def start(self) -> None:
        """Begin to serve the loop that is running."""
        assert self.state is State.NEW, f"a service starts once, this one is {self.state.value}"
        self._loop = asyncio.get_running_loop()
        self.state = State.SERVING
        self._thread.start()

    async def open(self, requests: Sequence[Request]) -> Stream:
        """Give the engine all of these requests, or none of them.

        Raises what `Engine.add` raises of the first that it does not take, and `Unavailable` at the end of the service.
        """
        if self.state is not State.SERVING:
            raise self._unavailable()
        stream = Stream([request.id for request in requests], self._cancel)
        self._streams.update((request.id, stream) for request in requests)
        self._idle.clear()
        try:
            await self.call(lambda engine: self._add(engine, requests))
        except asyncio.CancelledError:  # the engine has them by now, or will have
            stream.close()
            raise
        return stream

    async def call(self, function: Callable[[EngineT], T]) -> T:
        """What `function(engine)` gives, made in the engine's thread between two steps.

        Raises what it raises, and `Unavailable` if there is no engine any more.
        """
        future: asyncio.Future[T] = self._loop.create_future()

        def run(engine: EngineT) -> None:
            try:
                result = function(engine)
            except Exception as error:
                self._post(_reject, future, error)
            else:
                self._post(_resolve, future, result)

        self._put(_Call(run, lambda error: self._post(_reject, future, error)))
        return await future

    async def drain(self, grace_s: float) -> None:
        """Take no more requests; wait `grace_s` seconds for those that run, and cancel what is left."""
        if self.state is State.SERVING:
            self.state = State.DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            for request_id in list(self._streams):
                self._cancel(request_id)
            await self._idle.wait()

    async def close(self) -> None:
        """Cancel what runs and end the thread. Idempotent."""
        if self.state in (State.SERVING, State.DRAINING):
            await self.drain(0)
        self._end_calls(self._unavailable())
        if self.state is not State.NEW:
            await asyncio.to_thread(self._thread.join)
        if self.state is not State.FAILED:
            self.state = State.CLOSED

    # --- on the event loop ---

    def _cancel(self, request_id: str) -> None:
        if self.state is not State.FAILED:
            self._put(_Call(lambda engine: engine.cancel(request_id), lambda error: None))

    def _put(self, call: _Call[EngineT]) -> None:
        with self._changed:
            if not self._is_over:
                self._calls.append(call)
                self._changed.notify()
                return
        call.fail(self._unavailable())

    def _unavailable(self) -> Unavailable:
        if self.error is not None:
            return Unavailable(f"the engine has failed: {type(self.error).__name__}: {self.error}")
        return Unavailable(f"the service takes no requests: it is {self.state.value}")

    def _route(self, events: Sequence[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:  # it was not opened in the end
                continue
            stream.put(event)
            if event.finish is not None:
                self._forget([event.request_id])

    def _forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()

    def _fail(self, error: Exception) -> None:
        self.state, self.error = State.FAILED, error
        unavailable = self._unavailable()
        for stream in self._streams.values():
            stream.fail(unavailable)
        self._end_calls(unavailable)
        self._forget(list(self._streams))

    def _end_calls(self, error: Exception) -> None:
        """The thread is to end, or has; what waits for it is told so."""
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
            self._prepare(self._engine)
            while (calls := self._next_calls()) is not None:
                for call in calls:
                    call.run(self._engine)
                if self._engine.has_work and (events := self._engine.step()):
                    self._post(self._route, events)
        except Exception as error:
            self._post(self._fail, error)

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

    def _next_calls(self) -> list[_Call[EngineT]] | None:
        """What is to be done before the next step, waiting if there is nothing to do at all; None at the end."""
        with self._changed:
            while not self._calls and not self._is_over and not self._engine.has_work:
                self._changed.wait(self._look_s)
            calls = list(self._calls)
            self._calls.clear()
            return None if self._is_over else calls

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Run on the event loop, if there still is one; from any thread."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # a loop that was closed without `close`: nobody is left to tell
            if not self._loop.is_closed():
                raise


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # who asked may have gone
        future.set_result(result)


def _reject(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
