"""The HTTP interface: OpenAI's completions and chat completions over one service, health and metrics.

Owns routes and streamed responses. Keys and sizes are checked in middleware.py, bodies are parsed in protocol.py, and
responses are written in responses.py. Needs FastAPI and prometheus_client (`pip install 'yafsdp_like[serve]'`), so
nothing of the package imports this file.

[Note: disconnects]
While a response is made, a task waits for the client to disconnect and then closes the stream, which cancels its
requests. Every other way out of a response closes the stream, too.

[Note: late]
The engine ends what is late, between two steps. If no step ends, the loop answers in its place, a little later: by an
error that the stream gives its parser, since a cancellation would meet whoever the answer's generator has yielded to.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar, get_type_hints

import prometheus_client
from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from yafsdp_like.inference.engine.request import FinishReason, QueueFullError
from yafsdp_like.inference.http.adapter_routes import add_adapter_routes
from yafsdp_like.inference.http.bodies import ChatBody, CompletionBody
from yafsdp_like.inference.http.body_pool import BodyReaderPool, ReaderBusyError
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.direct import SCOPE_KEY, ChunkWriter, DirectLines
from yafsdp_like.inference.http.errors import (
    RETRY_AFTER_S,
    ApiError,
    no_object,
    not_begun,
    too_many_choices,
    unavailable,
)
from yafsdp_like.inference.http.foreign_fields import header_of
from yafsdp_like.inference.http.long_answers import AnswerWriter, num_values, written
from yafsdp_like.inference.http.metrics import LatencyTracker, ServerMetrics
from yafsdp_like.inference.http.middleware import AuthMiddleware, error_response
from yafsdp_like.inference.http.model_routes import add_model_routes, ask
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.http.responses import Choice, ParsedRequest
from yafsdp_like.inference.http.service import Service, ServiceState, UnavailableError
from yafsdp_like.inference.http.status import add_status_routes
from yafsdp_like.inference.http.stream import Stream
from yafsdp_like.inference.http.text_routes import add_text_routes
from yafsdp_like.inference.pool.host_weights import ModelUnavailableError
from yafsdp_like.inference.text.codec import Codec, Piece

T = TypeVar("T")

logger = logging.getLogger(__name__)
Kind = type[CompletionBody] | type[ChatBody]

LATE_S = 0.5  # after its deadline an answer is not waited for, [Note: late]
BODY_S = 30.0  # from a body's headers to its end
METRICS_S = 5.0  # that the engine has to say how things stand
SEND_S = 60.0  # after which a client that takes nothing has gone


# --- answers ---


class OpenAIHandler:
    """From bodies to answers, through the service."""

    def __init__(self, service: Service[Any], catalog: Catalog) -> None:
        self.service, self.options = service, catalog.options
        self.catalog, self.pool = catalog, BodyReaderPool(catalog.takes_images)
        self.metrics, self.writer = ServerMetrics(), AnswerWriter()

    async def answer(self, kind: Kind, http: HttpRequest) -> Response:
        """The answer to a body of this kind. Raises ApiError."""
        return await self.respond(http, partial(self.catalog.read, kind))

    async def respond(self, http: HttpRequest, function: Callable[[bytes, float], ParsedRequest]) -> Response:
        """The answer to a body that ``function`` reads, whole or as a stream. Raises ApiError."""
        parsed = await self.read(http, function)
        if parsed.wants_stream:
            stream = await self._open(parsed)
            lines = self._lines(parsed, stream, http.scope.get(SCOPE_KEY))
            return EventStreamResponse(lines, stream, header_of(parsed.ignored))
        if not await self.collect(parsed, http):
            return Response(status_code=499)  # nobody reads it
        return await self.write(parsed, lambda: parsed.format.body(parsed))

    async def write(self, parsed: ParsedRequest, make: Callable[[], dict[str, Any]]) -> Response:
        """The answer that ``make()`` gives once all choices have ended, made in a thread where it is long."""
        sizes = [num_values(each.request, each.whole_piece(), len(each.hidden)) for each in parsed.choices]
        count = sum(sizes) + sum(len(each.request.prompt) for each in parsed.choices if parsed.format.has_ids)
        content = await self.writer.do(count, lambda: written(make(), count))
        return Response(content, media_type="application/json", headers=header_of(parsed.ignored))

    async def collect(self, parsed: ParsedRequest, http: HttpRequest) -> bool:
        """Have all choices answered; False if the client has gone. Raises ApiError."""
        stream = await self._open(parsed)
        try:
            async with close_on_disconnect(http.receive, stream):
                async for choice, piece in self._pieces(parsed, stream):
                    choice.add(piece)
        except ApiError:
            raise
        except Exception as error:
            raise _bug(error) from error
        return all(choice.transcript.finish is not None for choice in parsed.choices)

    async def read(self, http: HttpRequest, function: Callable[[bytes, float], T]) -> T:
        """What ``function(body, arrival)`` makes of a body, off the event loop. Raises ApiError."""
        try:
            return await self._read(http, function)
        except ReaderBusyError as error:
            raise _full(str(error)) from error
        except ClientDisconnect:
            raise ApiError(499, "the client has gone") from None  # nobody reads it

    async def _read(self, http: HttpRequest, function: Callable[[bytes, float], T]) -> T:
        """Others have the event loop while a long text is cut into tokens."""
        _check_is_json(http)
        with self.pool.reserve() as reservation:
            raw = bytearray()
            try:
                async with asyncio.timeout(BODY_S):
                    async for part in http.stream():
                        reservation.add(len(part))
                        raw += part
            except TimeoutError:
                words = f"the body has not come within {BODY_S:.0f} s"
                raise ApiError(408, words, code="body_too_slow", headers={"connection": "close"}) from None
            arrival, sent = time.monotonic(), bytes(raw)
            async with until_deadline(None if self.options.timeout_s is None else arrival + self.options.timeout_s):
                reading = self.pool.read(sent, lambda: _understand(function, sent, arrival))
                return await _cancel_on_disconnect(reading, http.receive)

    async def _open(self, parsed: ParsedRequest) -> Stream:
        try:
            async with until_deadline(parsed.deadline):
                stream = await self.service.open([choice.request for choice in parsed.choices])
            self.metrics.prompt_tokens.inc(parsed.num_prompt_tokens)
            return stream
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except QueueFullError as error:
            if len(parsed.choices) > (most := self.service.max_waiting):  # to come again would not help
                raise too_many_choices(len(parsed.choices), most) from error
            raise _full(str(error), error.retry_after_s) from error
        except ModelUnavailableError as error:
            raise not_begun(str(error), code="model_unavailable") from error
        except UnavailableError as error:
            raise not_begun(str(error)) from error

    async def _pieces(
        self, parsed: ParsedRequest, stream: Stream, writer: ChunkWriter | None = None
    ) -> AsyncIterator[tuple[Choice, Piece]]:
        """Pieces of all choices as they come, but for those whose lines go straight to ``writer``.

        Ends early if the stream is closed. Raises ApiError.
        """
        choices = {choice.request.id: choice for choice in parsed.choices}
        latency, timer = LatencyTracker(self.metrics, parsed.arrival), None
        if writer is not None:
            stream.sink = DirectLines(parsed, writer, latency, _line).take
        if parsed.deadline is not None:
            delay = parsed.deadline + LATE_S - time.monotonic()
            timer = asyncio.get_running_loop().call_later(delay, stream.fail, _deadline_error())
        try:
            async for output in stream:
                choice = choices[output.request_id]
                if choice.transcript.finish is not None:  # by a stop string; what the engine says after is not text
                    continue
                choice.hidden = choice.hidden or output.hidden
                choice.num_cached_tokens = max(choice.num_cached_tokens, output.num_cached_tokens)
                piece = choice.transcript.push(output)
                latency.observe_output(choice.index, len(output.tokens), piece.finish)
                _check_finish(piece.finish, output.error)
                if piece.finish is not None and output.finish is None:
                    stream.cancel(output.request_id)
                yield choice, piece
                if all(choice.transcript.finish is not None for choice in parsed.choices):
                    return
        except UnavailableError as error:
            raise unavailable(str(error)) from error
        finally:
            if timer is not None:
                timer.cancel()
            num_abandoned = sum(choice.transcript.finish is None for choice in parsed.choices)
            self.metrics.finished.labels("abandoned").inc(num_abandoned)

    async def _lines(self, parsed: ParsedRequest, stream: Stream, writer: ChunkWriter | None) -> AsyncIterator[bytes]:
        """The answer as server-sent events, but for those that go straight to ``writer``."""
        try:
            for event in parsed.format.opening_events(parsed):
                yield _line(event)
            async for choice, piece in self._pieces(parsed, stream, writer):
                has_news = piece.text or piece.tokens or piece.prompt or (piece.ids and parsed.format.has_ids)
                if has_news or piece.finish is not None:
                    count, events = num_values(choice.request, piece), parsed.format.part_events(parsed, choice, piece)
                    for line in await self.writer.do(count, partial(_lines_of, events, count)):
                        yield line
            for event in parsed.format.closing_events(parsed):
                yield _line(event)
        except ApiError as error:  # the status is out already
            yield _line(error.body())
        except Exception as error:
            yield _line(_bug(error).body())
        yield b"data: [DONE]\n\n"


def _understand(function: Callable[[bytes, float], T], sent: bytes, arrival: float) -> T:
    """What it makes of a body. Raises ApiError, also for values that nobody has thought of."""
    try:
        return function(sent, arrival)
    except ApiError:
        raise
    except (ValueError, ArithmeticError, RecursionError) as error:  # which values cause
        logger.error("a body is not understood", exc_info=error)
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body: {why}") from error
    except Exception as error:
        raise _bug(error) from error


async def _cancel_on_disconnect(doing: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What it gives or raises; cancelled if the client disconnects, which raises ClientDisconnect."""
    done, gone = asyncio.create_task(doing), asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise ClientDisconnect
    finally:
        done.cancel()
        gone.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def until_deadline(deadline: float | None) -> AsyncIterator[None]:
    """[Note: late] Raises ApiError where what is done here has not ended then, in seconds of time.monotonic()."""
    scope = asyncio.timeout(None if deadline is None else deadline + LATE_S - time.monotonic())
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise _deadline_error() from None


def _deadline_error() -> ApiError:
    message = "the time that a request may take is over; ask for fewer tokens"
    return ApiError(504, message, code="deadline_exceeded")


def _check_finish(finish: FinishReason | None, error: str | None) -> None:
    if finish is FinishReason.FAILED:
        raise unavailable(error or "the request has failed", code="model_unavailable")
    if finish is FinishReason.GRAMMAR:
        raise ApiError(400, error or "what the text must be cannot be followed", code="grammar_too_complex")
    if finish is FinishReason.DEADLINE:
        raise _deadline_error()
    if finish is FinishReason.CANCELLED:
        raise unavailable("the request was cancelled because the service is shutting down")


def _check_is_json(http: HttpRequest) -> None:
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise no_object()


def _bug(error: Exception) -> ApiError:
    logger.error("an answer has failed", exc_info=error)
    return ApiError(500, f"the answer has failed: {type(error).__name__}")


def _full(message: str, retry_after_s: float = RETRY_AFTER_S) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"retry-after": str(math.ceil(retry_after_s))})


def _line(content: dict[str, Any], count: int = 0) -> bytes:
    name = f"event: {content['type']}\n" if "type" in content else ""
    return name.encode() + b"data: " + written(content, count) + b"\n\n"


def _lines_of(events: Iterable[dict[str, Any]], count: int) -> list[bytes]:
    return [_line(event, count) for event in events]


@asynccontextmanager
async def close_on_disconnect(receive: Receive, stream: Stream) -> AsyncIterator[None]:
    """Close the stream when the client disconnects, and at the end: [Note: disconnects]."""

    async def watch() -> None:
        await _wait_for_disconnect(receive)
        stream.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        stream.close()


class EventStreamResponse(StreamingResponse):
    """Server-sent events made from a stream, which ends with this."""

    def __init__(
        self, lines: AsyncIterator[bytes], stream: Stream, more_headers: Mapping[str, str] | None = None
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies are to pass lines on as they come
        super().__init__(lines, media_type="text/event-stream", headers={**headers, **(more_headers or {})})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send lines, until the client leaves or takes none for `SEND_S` seconds."""

        async def patient_send(message: Message) -> None:
            async with asyncio.timeout(SEND_S):
                await send(message)

        async with close_on_disconnect(receive, self._stream):
            await self.stream_response(patient_send)


# --- the application ---


class _Application(FastAPI):
    """Notes what a server's own ``send`` writes to, before middleware wraps it.

    Not where there is middleware of others: it may keep what it is sent for a while, or change it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_bare = len(self.user_middleware) == 1  # AuthMiddleware, which passes on what it is sent at once
        if is_bare and scope["type"] == "http" and (writer := ChunkWriter.of(scope, send)) is not None:
            scope[SCOPE_KEY] = writer
        await super().__call__(scope, receive, send)


def create_app(service: Service[Any], codec: Codec, options: ServerOptions) -> FastAPI:
    """The application of one model; it starts the service, and closes it at the end."""
    return create_catalog_app(service, Catalog([RequestParser(codec, options)]))


def create_catalog_app(service: Service[Any], catalog: Catalog) -> FastAPI:
    """As ``create_app``, of all models of a catalog; the service's engine is a ``PoolDriver`` if it is a pool's."""
    handler = OpenAIHandler(service, catalog)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            handler.pool.close()
            handler.writer.close()
            await service.close()

    # No pages of documentation: they would load scripts from elsewhere. /openapi.json is there.
    app = _Application(title="yafsdp_like", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(AuthMiddleware, options=catalog.options, metrics=handler.metrics)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_routes(app, handler)
    return app


async def _on_http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and error.headers:
        allowed = {name.strip() for name in error.headers.get("Allow", "").split(",") if name.strip()}
        allow = ", ".join(sorted(allowed | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))
        if http.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": allow})
        error.headers = {**error.headers, "Allow": allow}
    if isinstance(error, ApiError):
        return error_response(error)
    return error_response(
        ApiError(error.status_code, str(error.detail), headers=error.headers)
    )  # FastAPI's own, 405 say


def raw_body_route(handler: OpenAIHandler) -> type[APIRoute]:
    """Routes whose bodies are not read by FastAPI, which does it on the event loop and whatever they cost."""

    class RawBodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
            return partial(handler.answer, get_type_hints(self.endpoint)["body"])

    return RawBodyRoute


def _add_answers(app: FastAPI, handler: OpenAIHandler) -> None:
    """The functions only say what bodies look like."""
    router = APIRouter(route_class=raw_body_route(handler))

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody) -> Response:
        raise NotImplementedError

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody) -> Response:
        raise NotImplementedError

    app.include_router(router)


def _add_routes(app: FastAPI, handler: OpenAIHandler) -> None:
    _add_answers(app, handler)
    add_text_routes(app, handler)
    add_adapter_routes(app, handler.service, handler.catalog)
    add_model_routes(app, handler.service, handler.catalog)
    add_status_routes(app, handler.service, handler.catalog, handler.metrics)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        state, unhealthy_reason = handler.service.state, handler.service.unhealthy_reason
        if unhealthy_reason is None:
            return JSONResponse({"status": state.value})
        if state not in (ServiceState.SERVING, ServiceState.FAILED):
            return JSONResponse({"status": state.value}, 503)
        status = "stuck" if state is ServiceState.SERVING else state.value
        return JSONResponse({"status": status, "message": unhealthy_reason}, 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        of_engine = await ask(handler.service, lambda engine: engine.metrics(), METRICS_S)
        return Response(handler.metrics.text(of_engine), media_type=prometheus_client.CONTENT_TYPE_LATEST)
