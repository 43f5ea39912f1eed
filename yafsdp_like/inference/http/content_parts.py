"""Parts of messages: texts and images, and where the bytes of images come from.

Owns the forms of a message's content, and of URLs. An image is taken from the URL itself (`data:`), or from a host that
the server's options name: whoever may send requests could otherwise have the server fetch what only it can reach.

[Note: fetching]
A host is compared as it is written, nothing is fetched from where it redirects to, and neither time nor size is the
host's to choose: at the deadline of a request's images the connection is shut down, whatever it is doing, and whoever
waits for its next bytes finds its end.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import socket
import threading
import time
import urllib.request
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from yafsdp_like.inference.http.errors import shorten

if TYPE_CHECKING:
    from collections.abc import Collection
    from email.message import Message
    from http.client import HTTPResponse
    from typing import IO

FETCH_S, READ_S = 10.0, 5.0  # for all images of a request, and for the next bytes of one
_READ_NBYTES = 1 << 16
IMAGE = "image_url"


def as_content(value: Any) -> str | list[dict[str, Any]] | None:
    """A message's content: none, a string, or parts: one string if all are text, and else texts and URLs of images."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [_part(part) for part in value]
        if all(part["type"] == "text" for part in parts):
            return "\n".join(part["text"] for part in parts)
        return parts
    raise ValueError("expected a string, or a list of parts of type 'text' or 'image_url'")


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == IMAGE:
        given = part.get(IMAGE)
        url = given.get("url") if isinstance(given, dict) else given
        if not isinstance(url, str):
            raise ValueError('a part with an image must be {"type": "image_url", "image_url": {"url": "..."}}')
        return {"type": IMAGE, "url": url}
    if kind != "text":
        raise ValueError(f"only parts of type 'text' and 'image_url' are understood, not {shorten(kind)[:40]}")
    if not isinstance(part.get("text"), str):
        raise ValueError('a part must be {"type": "text", "text": "..."}')
    return {"type": "text", "text": part["text"]}


def for_template(content: str | list[dict[str, Any]] | None) -> str | list[dict[str, Any]]:
    """What a chat template is given: of images only where they are."""
    if isinstance(content, list):
        return [part if part["type"] == "text" else {"type": "image"} for part in content]
    return content or ""


def image_bytes(url: str, max_nbytes: int, hosts: Collection[str] = (), until: float | None = None) -> bytes:
    """The bytes of an image at a `data:` URL, or at one of ``hosts``, which are names, with ports if these are said.

    Raises ValueError for any other URL, for more than ``max_nbytes``, and for what cannot be fetched ``until`` then, in
    seconds of time.monotonic(); None: `FETCH_S` from now on.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        return _decoded(rest, max_nbytes)
    if scheme.lower() not in ("http", "https"):
        raise ValueError(f"expected a data: URL with an image in base64, found {shorten(url)}")
    try:
        parsed = urlsplit(url)
        host, is_known = parsed.netloc, parsed.netloc.lower() in {name.lower() for name in hosts}
    except ValueError as error:
        raise ValueError(f"expected a URL, found {shorten(url)}: {error}") from None
    if not is_known:
        known = f"from {', '.join(sorted(hosts))} and " if hosts else ""
        raise ValueError(
            f"images are taken {known}out of data: URLs only, found the host {shorten(host)}: send "
            "data:image/png;base64,..., or have the server started with --image-hosts"
        )
    return _fetched(url, max_nbytes, time.monotonic() + FETCH_S if until is None else until)


def _decoded(rest: str, max_nbytes: int) -> bytes:
    head, comma, encoded = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("a data: URL must be data:image/png;base64,... or data:image/jpeg;base64,...")
    if (nbytes := len(encoded) * 3 // 4 - encoded[-2:].count("=")) > max_nbytes:
        raise ValueError(f"an image may have {max_nbytes} bytes at most, found {nbytes}")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):  # also for characters that are not ASCII
        raise ValueError("what a data: URL holds is no base64") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow none: the status is then an error."""


class _Connection(HTTPConnection):
    """One that is shut down at a time, unless ``end`` comes first."""

    until: float
    end: contextlib.ExitStack

    def connect(self) -> None:
        """Connect, with what is left of the time."""
        super().connect()
        watched = self.end.enter_context(self.sock.dup())  # also where the connection is encrypted later
        timer = threading.Timer(max(0.0, self.until - time.monotonic()), _shut_down, [watched])
        timer.daemon = True
        timer.start()
        self.end.callback(timer.join)
        self.end.callback(timer.cancel)


class _SecureConnection(HTTPSConnection, _Connection):
    """The same, encrypted."""


def _shut_down(watched: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has been by the host
        watched.shutdown(socket.SHUT_RDWR)


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens the connections of one image; see [Note: fetching]."""

    def __init__(self, until: float, end: contextlib.ExitStack) -> None:
        super().__init__()
        self._until, self._end = until, end

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        """Open a URL."""
        return self.do_open(partial(self._make, _Connection), req)

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        """Open a URL; certificates are checked as always."""
        return self.do_open(partial(self._make, _SecureConnection), req)

    def _make(self, kind: type[_Connection], host: str, **more: Any) -> _Connection:
        made = kind(host, **more)
        made.until, made.end = self._until, self._end
        return made


def _fetched(url: str, max_nbytes: int, until: float) -> bytes:
    """See [Note: fetching]."""
    found = bytearray()
    late = f"{shorten(url)} has not come in time: a request's images may take {FETCH_S:.0f} s"
    if (left_s := until - time.monotonic()) <= 0:
        raise ValueError(late)
    try:
        with contextlib.ExitStack() as end:
            opener = urllib.request.build_opener(_NoRedirects, _Handler(until, end))
            answer = end.enter_context(opener.open(url, timeout=min(READ_S, left_s)))
            while part := answer.read1(_READ_NBYTES):
                found += part
                if len(found) > max_nbytes:
                    raise ValueError(f"an image may have {max_nbytes} bytes at most, {shorten(url)} has more")
    except (OSError, HTTPException) as error:
        why = late if time.monotonic() >= until else f"{shorten(url)} cannot be fetched: {error}"
        raise ValueError(why) from error
    if time.monotonic() >= until:
        raise ValueError(late)
    return bytes(found)
