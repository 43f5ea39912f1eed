"""JSON of answers: short ones are written at once, long ones in a thread, and a part at a time.

Owns what is long. The log-probabilities of a long prompt are a million values, which take seconds to write; one call
of C that wrote them all would have the interpreter to itself for as long, in whatever thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.http.body_pool import BoundedExecutor
from yafsdp_like.inference.text.codec import Piece

T = TypeVar("T")

SHORT_VALUES = 4096  # of an answer, or of one piece of a stream: some milliseconds
PART = 256  # values of a list that are written by one call
MAX_LONG_ANSWERS = 2**16  # as many as requests may be open: what is computed is never refused
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class AnswerWriter:
    """Calls what makes a short answer at once, and what makes a long one in its thread, one at a time."""

    def __init__(self) -> None:
        self._long = BoundedExecutor("long answers", 1, MAX_LONG_ANSWERS, rests=True)

    async def do(self, num_values: int, function: Callable[[], T]) -> T:
        """What ``function()`` gives or raises, which writes about so many values."""
        return function() if num_values <= SHORT_VALUES else await self._long.do(function)

    def close(self) -> None:
        """Cancel what has not begun."""
        self._long.close()


def num_values(request: Request, piece: Piece, hidden: int = 0) -> int:
    """About how many values say ``piece`` of an answer to ``request``, beside a vector of ``hidden`` numbers."""
    of_token = 2 + max(request.num_logprobs or 0, request.num_prompt_logprobs or 0)
    return of_token * (len(piece.prompt) + len(piece.tokens)) + len(piece.ids) + hidden


def written(content: Any, num_values: int = 0) -> bytes:
    """Return the JSON of an answer. Raises ValueError for numbers that JSON has not."""
    return (_ENCODER.encode(content) if num_values <= SHORT_VALUES else "".join(_parts(content))).encode()


def _parts(value: Any) -> Iterator[str]:
    """JSON of a value in parts; only lists may be long."""
    if isinstance(value, dict):
        for index, (name, each) in enumerate(value.items()):
            yield f"{',' if index else '{'}{_ENCODER.encode(name)}:"
            yield from _parts(each)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > PART:
        for start in range(0, len(value), PART):
            yield f"{',' if start else '['}{_ENCODER.encode(value[start : start + PART])[1:-1]}"
        yield "]"
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for index, each in enumerate(value):
            yield "," if index else "["
            yield from _parts(each)
        yield "]"
    else:
        yield _ENCODER.encode(value)
