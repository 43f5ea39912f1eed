"""Outputs of requests on their way from a service to one reader, on one event loop.

Owns what a reader sees: outputs in order, the end, an error. Knows nothing of engines or threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from yafsdp_like.inference.engine.request import RequestOutput


class Stream:
    """Outputs of requests that were opened together, as they come; ends when all of them have ended.

    `close` it in the end: requests that nobody reads any more are cancelled. Outputs that are not read yet are kept;
    there are at most as many as tokens were asked for.
    """

    def __init__(self, names: Mapping[str, str], cancel: Callable[[str], None]) -> None:
        """`names`: what the engine calls each request, by its id; `cancel` is called with that."""
        self._live = dict(names)
        self._cancel = cancel
        self._outputs: deque[RequestOutput] = deque()
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._is_closed = False
        self._is_awaited = False  # by a reader that has dealt with all outputs before
        self.sink: Callable[[str, RequestOutput], bool] | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output of any of the requests. Raises `UnavailableError` if the engine has failed."""
        while not self._is_closed:
            if self._outputs:
                return self._outputs.popleft()
            if self._error is not None:
                raise self._error
            if not self._live:
                break
            self._news.clear()
            self._is_awaited = True
            try:
                await self._news.wait()
            finally:
                self._is_awaited = False
        raise StopAsyncIteration

    def cancel(self, request_id: str) -> None:
        """Ask the engine to end one of the requests; its last output still comes. Harmless once it has ended."""
        if request_id in self._live:
            self._cancel(self._live[request_id])

    def close(self) -> None:
        """Stop reading, and cancel what has not ended. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._outputs.clear()
        for name in self._live.values():
            self._cancel(name)
        self._wake()

    def pass_on(self, request_id: str, output: RequestOutput) -> bool:
        """For the service: give an output to ``sink`` if the reader waits, and return whether that took it.

        The reader never sees what was taken. ``output`` bears the engine's name of the request.
        """
        if not self._is_awaited or self.sink is None:
            return False
        try:
            return self.sink(request_id, output)
        except Exception as error:  # the reader knows what to say of it
            self.fail(error)
            return True

    def put(self, output: RequestOutput) -> None:
        """For the service: an output of one of the requests.

        Tokens join those of the same request that are not read yet: a reader that lags has fewer pieces to send. What
        comes after an error is not read: outputs before it may be missing.
        """
        if output.finish is not None:
            del self._live[output.request_id]
        if not self._is_closed and self._error is None:
            if output.tokens and self._outputs and self._outputs[-1].request_id == output.request_id:
                output = output.after(self._outputs.pop())
            self._outputs.append(output)
        self._wake()

    def fail(self, error: Exception) -> None:
        """For the service: no output will come any more."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        self._is_awaited = False
        self._news.set()
