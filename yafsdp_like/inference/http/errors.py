"""Errors as OpenAI's clients read them: a status, words, the field, a code.

Owns their form, and what is said of a body that pydantic refuses. Needs starlette, which comes with FastAPI.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

UNSUPPORTED = "unsupported_parameter"
RETRY_AFTER_S = 1
NOT_BEGUN = "x-not-begun"  # header of a 503 that came before any work
SHORT = reprlib.Repr()
SHORT.maxlevel = 3
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 80


class ApiError(HTTPException):
    """A status, and an error as OpenAI's clients read it.

    FastAPI passes on what is one of starlette's while it reads a body; anything else it calls a body that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """What is answered."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        param = self.param and _sendable(self.param)
        return {"error": {"message": _sendable(self.detail), "type": kind, "param": param, "code": self.code}}


def too_long(param: str, found: str, max_seq_len: int) -> ApiError:
    """`found`: what is more than fits, in words."""
    message = f"{found}, are more than the {max_seq_len} that fit; shorten the prompt or lower max_tokens"
    return invalid(param, message, code="context_length_exceeded")


def _sendable(text: str) -> str:
    """Text that a client sent, without what UTF-8 cannot say."""
    return text.encode("utf-8", "backslashreplace").decode()


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the error of a field: status 400."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def too_many_choices(count: int, most: int) -> ApiError:
    """Return the error of a request for more choices than ``most``."""
    return invalid("n", f"at most {most} choices in all, found {count}")


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    """Return the error of what cannot be served now: status 503, and when to come again."""
    return ApiError(503, message, code=code, headers={"retry-after": str(RETRY_AFTER_S)})


def not_begun(message: str, code: str = "unavailable") -> ApiError:
    """Return the error of a request that was not begun: status 503, and a header that lets others be asked for it."""
    error = unavailable(message, code)
    error.headers = {**(error.headers or {}), NOT_BEGUN: "true"}
    return error


def no_object() -> ApiError:
    """Return the error of a body that is no JSON object."""
    return ApiError(400, "the body must be a JSON object, sent with content-type: application/json")


def invalid_body(found: Mapping[str, Any]) -> ApiError:
    """One of pydantic's errors: what is wrong, and where."""
    kind, message = found["type"], str(found["msg"]).removeprefix("Value error, ")
    param = _path(found["loc"])
    if not param:
        return no_object()
    if kind == "extra_forbidden":
        return invalid(param, "no such field is known here")
    if kind == UNSUPPORTED:
        return invalid(param, message, UNSUPPORTED)
    return invalid(param, message if kind == "missing" else f"{message}; found {shorten(found['input'])}")


def shorten(value: Any) -> str:
    """The beginning of what was sent, however long or deep it is."""
    return SHORT.repr(value).encode("ascii", "backslashreplace").decode()[:80]


def _path(places: Sequence[str | int]) -> str:
    """messages[0].content, say."""
    text = ""
    for place in places:
        text += f"[{place}]" if isinstance(place, int) else f".{place}" if text else place
    return text
