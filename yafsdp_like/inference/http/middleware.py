"""Middleware before the routes: API key, size of bodies, HEAD, and the count of responses."""

from __future__ import annotations

import contextlib
import hmac

from h11 import LocalProtocolError
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from yafsdp_like.inference.http.errors import ApiError
from yafsdp_like.inference.http.metrics import ServerMetrics
from yafsdp_like.inference.http.protocol import ServerOptions

LOAD_ADAPTER, UNLOAD_ADAPTER = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def error_response(error: ApiError) -> Response:
    """Return the JSON response of an error."""
    return JSONResponse(error.body(), error.status_code, error.headers)


class AuthMiddleware:
    """Check the API key and the size of the body before the routes do anything, and count responses."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: ServerMetrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of ASGI; HEAD is GET without a body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, is_head = 500, scope["method"] == "HEAD"  # the status if nothing is sent
        if is_head:
            scope = {**scope, "method": "GET"}

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif is_head:
                message = {**message, "body": b""}
            with contextlib.suppress(LocalProtocolError):  # the body breaks HTTP: uvicorn has answered, and closes
                await send(message)

        try:
            await self._enter(scope, receive, counting_send)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.responses.labels(route, status).inc()

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        key, whose = self._key_of(scope["path"])
        if key is not None and not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + key.encode()):
            message = f"expected the header 'authorization: Bearer KEY' with this server's {whose}"
            await error_response(ApiError(401, message, code="invalid_api_key"))(scope, receive, send)
            return
        if self._announced_nbytes(headers) > self._options.body_limit_nbytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _announced_nbytes(self, headers: dict[bytes, bytes]) -> int:
        length = headers.get(b"content-length", b"")
        return int(length) if length.isdigit() and len(length) < 20 else 0

    def _too_large(self) -> ApiError:
        words = f"a body may have {self._options.body_limit_nbytes} bytes at most; shorten the prompt"
        return ApiError(413, words, code="body_too_large", headers={"connection": "close"})  # nobody reads the rest

    def _key_of(self, path: str) -> tuple[str | None, str]:
        """The key that a path needs, if it needs one, and what it is called."""
        is_adapters = path in (LOAD_ADAPTER, UNLOAD_ADAPTER) and self._options.admin_key is not None
        if path.startswith("/admin/") or is_adapters:  # without a key there are no routes
            return self._options.admin_key, "admin key"
        return (self._options.api_key if path.startswith(("/v1/", "/tokenize", "/detokenize")) else None), "key"

    def _limited(self, receive: Receive) -> Receive:
        """Raises ApiError once more has come than a body may have, whatever its headers have said."""
        most, num_received = self._options.body_limit_nbytes, 0

        async def receive_limited() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > most:
                raise self._too_large()
            return message

        return receive_limited
