"""Tokens of a streamed answer on the short way: from a step's outputs to the client's connection, in one callback.

Owns chunks of a body that is under way, and lines that differ by their text alone. Beginnings and ends of answers,
errors, and all other lines are sent through ASGI (server.py).

[Note: the short way]
Through ASGI a token takes a switch of tasks, a coroutine of each layer of middleware, and a state machine of HTTP,
while the engine's thread waits for the interpreter. So while the reader of a stream waits, all that it had being
written, the service's callback of a step makes the line of a token and writes it to the transport. It does so only
where a line is a prepared beginning, a text and a prepared end, and where the client takes what it is sent: whatever
else comes wakes the reader, which goes on the long way from there. An application with middleware of others has no
writer, since such a layer may not have passed on yet what the reader has sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from yafsdp_like.inference.http.long_answers import written
from yafsdp_like.inference.text.codec import Piece

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, MutableMapping

    from starlette.types import Send

    from yafsdp_like.inference.engine.request import RequestOutput
    from yafsdp_like.inference.http.metrics import LatencyTracker
    from yafsdp_like.inference.http.responses import Choice, ParsedRequest

SCOPE_KEY = "yafsdp_like.chunks"  # of a request's ``ChunkWriter``, where it has one
_MARK = "\ue000\uf8ff\ue000"  # a text that no id or name has


class ChunkWriter:
    """Writes chunks of one response's body to its transport, between those that are sent through ASGI."""

    def __init__(self, transport: asyncio.Transport, flow: Any) -> None:
        self._transport, self._flow = transport, flow

    @classmethod
    def of(cls, scope: MutableMapping[str, Any], send: Send) -> ChunkWriter | None:
        """Return the writer of a request to uvicorn, whose ``send`` this is.

        None for any other server, and where a body without a length is not sent in chunks.
        """
        cycle = getattr(send, "__self__", None)
        transport, flow = getattr(cycle, "transport", None), getattr(cycle, "flow", None)
        is_chunked = scope["http_version"] == "1.1" and scope["method"] != "HEAD"
        if not is_chunked or transport is None or not hasattr(flow, "write_paused"):
            return None
        return cls(transport, flow)

    @property
    def is_ready(self) -> bool:
        """Whether the client is there, and takes what it is sent."""
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, data: bytes) -> None:
        """Write one chunk, which has at least one byte."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class DirectLines:
    """Lines of the tokens of one streamed answer. See [Note: the short way]."""

    def __init__(
        self,
        parsed: ParsedRequest,
        writer: ChunkWriter,
        latency: LatencyTracker,
        line_of: Callable[[dict[str, Any]], bytes],
    ) -> None:
        self._parsed, self._writer, self._latency, self._line_of = parsed, writer, latency, line_of
        found = {choice.request.id: (choice, self._ends(choice)) for choice in parsed.choices}
        self._choices = {name: (choice, *ends) for name, (choice, ends) in found.items() if ends is not None}

    def _ends(self, choice: Choice) -> tuple[bytes, bytes] | None:
        """Return what comes before and behind the text in a choice's lines, if they differ by nothing else."""
        if not choice.transcript.is_plain or not self._parsed.format.says_text_alone(choice):
            return None
        events = self._parsed.format.part_events(self._parsed, choice, Piece(_MARK))
        ends = b"".join(map(self._line_of, events)).split(written(_MARK))
        return (ends[0], ends[1]) if len(ends) == 2 else None

    def take(self, request_id: str, output: RequestOutput) -> bool:
        """Write the line of an output, and return whether that was possible."""
        found = self._choices.get(request_id)
        if found is None or output.finish is not None or output.hidden or output.prompt or not self._writer.is_ready:
            return False
        choice, before, behind = found
        choice.num_cached_tokens = max(choice.num_cached_tokens, output.num_cached_tokens)
        text = choice.transcript.push_text(output.tokens)
        self._latency.observe_output(choice.index, len(output.tokens), None)
        if text:
            self._writer.write(before + written(text) + behind)
        return True
