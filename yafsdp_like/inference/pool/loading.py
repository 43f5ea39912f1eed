"""Reads a model into host memory on a thread of its own, beside whoever steps.

Owns the thread, how much of a model it has read, and how a load is given up. Knows nothing of a pool's books.

[Note: who reads]
The thread writes the bytes of one image that nobody else reads, and what is read here of a ``Loading`` while it is
under way: ``nbytes_read`` and ``is_over``. Everything else is the pool's, whose thread sees at its next call that a
load is over. Copies between tensors release Python's lock, so that steps of other models go on. Each load has its own
thread, so that a file system that stands still holds up no other load; it does not keep the process from ending.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from yafsdp_like.inference.pool.host_weights import HostImage
    from yafsdp_like.inference.weights.loading import Source


class _CancelledError(Exception):
    """Nobody wants what is read any more."""


class Loading:
    """One model on its way into host memory; see [Note: who reads]."""

    def __init__(
        self, image: HostImage, open_source: Callable[[], Source], read: Callable[[Source], None], on_demand: bool
    ) -> None:
        """``read`` fills the image from what ``open_source`` returns; both are called in the thread of the load.

        ``on_demand``: wanted by requests only.
        """
        self.image, self.on_demand = image, on_demand
        self.wanted_at: float | None = None  # by the pool, which looks at it now and then
        self.nbytes_read = 0
        self.error: BaseException | None = None  # once it is over
        self._open_source, self._read = open_source, read
        self._is_cancelled = False
        self._over = threading.Event()
        threading.Thread(target=self._run, name=f"load {image.name}", daemon=True).start()

    @property
    def is_over(self) -> bool:
        """Whether the image is whole, or why it is not is known; nobody writes it from then on."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is over, or for ``timeout_s`` seconds; return whether it is over."""
        return self._over.wait(timeout_s)

    def cancel(self) -> None:
        """Have it end before the next parameter is read; the one that is being read is read to its end."""
        self._is_cancelled = self.image.is_cancelled = True

    def _run(self) -> None:
        try:
            self.check()
            self._read(_WatchedSource(self._open_source(), self))
        except BaseException as error:  # the pool's thread raises it, or says it
            self.error = error
        finally:
            self._over.set()

    def check(self) -> None:
        """Raise where it has been cancelled, in the thread of the load."""
        if self._is_cancelled:
            raise _CancelledError


class _WatchedSource:
    """A source that counts what is read of it, and ends where its load is cancelled."""

    def __init__(self, source: Source, loading: Loading) -> None:
        self._source, self._loading = source, loading

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read as the source does."""
        self._loading.check()
        self._source.read_into(name, start, out)
        self._loading.nbytes_read += out.numel() * out.itemsize
