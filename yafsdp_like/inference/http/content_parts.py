"""Parts of messages: texts and images, and where the bytes of images come from.

Owns the forms of a message's content, and of URLs. An image is taken from the URL itself (`data:`), or from a host that
the server's options name: whoever may send requests could otherwise have the server fetch what only it can reach.

[Note: fetching]
A host is compared as it is written, nothing is fetched from where it redirects to, and neither time nor size is the
host's to choose.
"""

from __future__ import annotations

import base64
import binascii
import time
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from yafsdp_like.inference.http.errors import shorten

if TYPE_CHECKING:
    from collections.abc import Collection
    from email.message import Message
    from typing import IO

FETCH_S, READ_S = 10.0, 5.0  # for a whole image, and for its next bytes
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


def image_bytes(url: str, max_nbytes: int, hosts: Collection[str] = ()) -> bytes:
    """The bytes of an image at a `data:` URL, or at one of ``hosts``, which are names, with ports if these are said.

    Raises ValueError for any other URL, for more than ``max_nbytes``, and for what cannot be fetched.
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
    return _fetched(url, max_nbytes)


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


def _fetched(url: str, max_nbytes: int) -> bytes:
    """See [Note: fetching]."""
    until = time.monotonic() + FETCH_S
    found = bytearray()
    try:
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(url, timeout=READ_S) as answer:
            while part := answer.read1(_READ_NBYTES):
                found += part
                if len(found) > max_nbytes:
                    raise ValueError(f"an image may have {max_nbytes} bytes at most, {shorten(url)} has more")
                if time.monotonic() > until:
                    raise ValueError(f"{shorten(url)} has not come within {FETCH_S:.0f} s")
    except (OSError, HTTPException) as error:
        raise ValueError(f"{shorten(url)} cannot be fetched: {error}") from error
    return bytes(found)
