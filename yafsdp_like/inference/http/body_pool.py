"""A pool of threads that read request bodies off the event loop, with limits on how many wait and how large they are.

[Note: executors]
Short bodies have threads of their own, so that they never wait for long ones. Long bodies are read one at a time, and
after each its thread sleeps as long as it has worked: while Python runs there, the engine and the event loop get the
interpreter late. After one that is refused it sleeps `REFUSED_REST` times as long, while other long bodies wait: who
sends such bodies again and again has the event loop receive them all, and that loop slows the engine, too. The number
of bodies that wait for an executor is limited, and so are the bytes of long bodies, whether they wait or are still
being received.

Bodies with images have two of their own, by size: short ones wait for hosts that images are fetched from, long ones
have images in them, whose decoding leaves the interpreter to others, so that nobody rests. So neither keeps texts
waiting, nor does a host that does not answer keep those waiting who send what they show.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SHORT_COST = 32 * 2**10  # of a body, in bytes
CONTAINER_COST = 256  # of an object in it, a message say, in bytes of text that take as long
MAX_SHORT_BODIES, MAX_LONG_BODIES = 1024, 16  # that wait
MAX_IMAGE_BODIES = 128  # that wait, of either size
MAX_RESERVED_NBYTES = 64 * 2**20  # of long bodies
IMAGE_FACTOR = 4  # as many bytes where bodies may have images
REST, REFUSED_REST, MAX_REST_S = 1.0, 9.0, 2.0  # times as long as the work, and in all
# The type of a part with an image, and the same however its letters are escaped, which only short bodies are asked for.
_IMAGE = b'"image_url"'
_ESCAPED_IMAGE = re.compile(b'"' + b"".join(rb"(?:%c|\\u00%02x)" % (each, each) for each in _IMAGE[1:-1]) + b'"', re.I)


class ReaderBusyError(RuntimeError):
    """Too many bodies wait to be read; try again later."""


class BoundedExecutor:
    """Threads with a bounded queue."""

    def __init__(self, name: str, num_threads: int, most: int, rests: bool) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._name, self._most, self._rests = name, most, rests
        self._lock = threading.Lock()
        self._num_waiting = 0  # under the lock, as `_rested_at`: those that are being read, too
        self._rested_at = 0.0

    async def do(self, function: Callable[[], T]) -> T:
        """What `function()` gives or raises. Raises ReaderBusyError."""
        with self._lock:
            if self._num_waiting >= self._most:
                raise ReaderBusyError(f"{self._num_waiting} {self._name} wait to be read; try again later")
            self._num_waiting += 1
        future = self._threads.submit(self._run, function)
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """What has not begun is cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _leave(self, _: Future[T]) -> None:
        with self._lock:
            self._num_waiting -= 1

    def _run(self, function: Callable[[], T]) -> T:
        began = time.monotonic()
        if self._rests and (left := self._rested_at - began) > 0:
            time.sleep(left)
            began = time.monotonic()
        rest = REFUSED_REST
        try:
            result = function()
            rest = REST
            return result
        finally:
            ended = time.monotonic()
            self._rested_at = ended + min(MAX_REST_S, rest * (ended - began))


class BodyReservation:
    """Bytes of one body, of all that are held."""

    def __init__(self, pool: BodyReaderPool) -> None:
        self._pool = pool
        self.nbytes = 0

    def __enter__(self) -> BodyReservation:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.num_reserved_nbytes -= max(0, self.nbytes - SHORT_COST)

    def add(self, nbytes: int) -> None:
        """Raises ReaderBusyError where long bodies are too many; short ones are not counted."""
        more = max(0, self.nbytes + nbytes - SHORT_COST) - max(0, self.nbytes - SHORT_COST)
        if more and self._pool.num_reserved_nbytes + more > self._pool.max_reserved_nbytes:
            raise ReaderBusyError("too many long bodies are being read; try again later")
        self.nbytes += nbytes
        self._pool.num_reserved_nbytes += more


class BodyReaderPool:
    """[Note: executors] For one event loop."""

    def __init__(self, takes_images: bool = False) -> None:
        self._short = BoundedExecutor("short bodies", 2, MAX_SHORT_BODIES, rests=False)
        self._long = BoundedExecutor("long bodies", 1, MAX_LONG_BODIES, rests=True)
        self._fetching = BoundedExecutor("bodies with URLs of images", 4, MAX_IMAGE_BODIES, rests=False)
        self._decoding = BoundedExecutor("bodies with images", 2, MAX_IMAGE_BODIES, rests=False)
        self.max_reserved_nbytes = MAX_RESERVED_NBYTES * (IMAGE_FACTOR if takes_images else 1)
        self._takes_images = takes_images
        self.num_reserved_nbytes = 0  # of long bodies

    def reserve(self) -> BodyReservation:
        """To be entered while a body comes and is read."""
        return BodyReservation(self)

    async def read(self, raw: bytes, function: Callable[[], T]) -> T:
        """What `function()` gives or raises, which reads this body. Raises ReaderBusyError."""
        cost = len(raw) + CONTAINER_COST * raw.count(b"{")
        is_short = cost <= SHORT_COST
        if self._takes_images and (_IMAGE in raw or (is_short and b"\\u00" in raw and _ESCAPED_IMAGE.search(raw))):
            return await (self._fetching if is_short else self._decoding).do(function)
        return await (self._short if is_short else self._long).do(function)

    def close(self) -> None:
        """Cancel what has not begun."""
        for executor in (self._short, self._long, self._fetching, self._decoding):
            executor.close()
