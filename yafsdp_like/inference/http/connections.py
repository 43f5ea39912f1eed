"""How many clients may be connected, and how long they may take to say what they want.

Owns limits of connections. Bodies have a limit of their own (server.py), which knows how to answer. Needs uvicorn.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS_S = 10.0  # from a connection, or from the first byte of a further request, to the end of its headers
NUM_SPARED_FILES = 128  # for what is no connection
_WORDS = b'{"error": {"message": "too many connections", "type": "server_error", "param": null, "code": "unavailable"}}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_WORDS), _WORDS)
)


class LimitedConnectionsProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's, for clients that are slow, or many."""

    max_connections: ClassVar[int]
    _timer: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        """Refuse the connection with status 503 where there are too many, else await its headers."""
        if len(self.connections) >= self.max_connections:
            self._is_refused = True
            transport.write(REFUSAL)
            transport.close()
            return
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Parse, and start or stop the timer of headers."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_refused:
            super().connection_lost(exc)

    def _watch(self) -> None:
        """Runs the timer just while headers are awaited; also while what follows an answer is none."""
        is_awaited = self.cycle is None or self.cycle.response_complete
        if is_awaited and self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self.transport.close)
        elif not is_awaited and self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limit_connections(max_connections: int) -> type[asyncio.Protocol]:
    """The protocol of a server of at most so many connections, and no more than the process may have files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max_connections if soft == resource.RLIM_INFINITY else min(max_connections, soft - NUM_SPARED_FILES)
    return type("Limited", (LimitedConnectionsProtocol,), {"max_connections": max(1, most)})
