"""Ray Serve's part of a fleet: replicas of a pool, ingresses that pass requests on to them, and whom these choose.

    client -> Ray's HTTP proxy -> Ingress -> PoolRequestRouter -> PoolReplica -> application of `launch.serve --pool`

Owns what crosses Ray, and everything that needs it. Which replica is best, and how many there should be, is decided by
`inference/fleet/` from numbers. Ingresses and Ray's controller import no torch.

[Note: a request's way]
An ingress reads a body only as far as its model and prompt, for the choice of a replica, and passes it on as it came.
The replica calls its application as an HTTP server would and gives back what that sends: a status with headers, then
bytes. An answer of 429, or of 503 with the header `NOT_BEGUN`, is a refusal before any work: the ingress asks the next
one. Any other 503 is final, since the request may be what made the engine fail. A replica that is offered a request
again says so at once, and the client gets the refusal that came before. When a replica dies, its open streams end with
an error event, its other requests with 503, and Ray starts another one. When a client leaves, the engine cancels its
requests.

[Note: alpha]
Two of Ray's interfaces that are used here are alpha as of Ray 2.60, and may change. The request router and its
statistics: `RequestRouterConfig`, `RequestRouter` with `choose_replicas`, `on_request_routed`, `update_replicas`,
`initialize_state`, `routing_stats`, the deadline for a queue's length, and `record_routing_stats`. And the policy that
decides how many replicas there are: `AutoscalingPolicy`, the `AutoscalingContext` that it is called with, and
`record_autoscaling_stats`. A Ray without one of these names cannot import this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import logging
import os
import pickle
import signal
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from launch.fleet_figures import NO_ANSWER, ReplicaAnswer, merged_metrics, merged_status
from launch.options import KEY_VARIABLE, SERVE_POOL, FleetOptions
from yafsdp_like.inference.fleet.router import FleetRouter, blocks_of, model_and_prompt
from yafsdp_like.inference.fleet.routing import wanted_replicas
from yafsdp_like.inference.http.errors import NOT_BEGUN, ApiError, unavailable

NAME = "yafsdp_like"  # of the application
TRIES = 3  # replicas that a request is offered to
ASKED_AGAIN = 0  # in place of a status: of a replica that has refused the request before
MAX_REQUESTS = 65536  # that Ray lets a process have under way: pools say themselves what is too much
LARGE = 2**16  # bytes of a body that are read in a thread
ONE_REPLICAS = "/admin/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"  # what would reach one replica of many
FIGURES_S = 4.0  # that a replica has for its part of what all answer together; Prometheus waits 10 s for the whole
OF_ALL = {  # paths that all replicas answer together, unless one is named: by what, and the type of that
    "/metrics": (merged_metrics, CONTENT_TYPE_LATEST),
    "/status.json": (merged_status, "application/json"),
}
KEYED = "/v1/", "/tokenize", "/detokenize"  # what needs the key, where there is one
REPLICA_HEADER = "x-replica"  # of an answer: whose it is; of a request: who is asked first, as for its /status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassedRequest:
    """A request on its way to a replica."""

    scope: dict[str, Any]  # of ASGI
    body: bytes
    model: str  # that its body names; "": none
    blocks: tuple[bytes, ...]  # of its prompt
    ingress: str = ""  # that passes it on
    number: int = 0  # of the times that this ingress has offered a request to a replica
    replica: str | None = None  # that the client wants, by the header
    tried: tuple[str, ...] = ()  # replicas that have refused it
    was_full: bool = False  # one of them for want of time, with 429
    there: list[str] | None = None  # where it is a list, the router puts the names of all replicas into it

    @property
    def is_last(self) -> bool:
        """Whether it is offered to no other replica after this one."""
        return not self.model or len(self.tried) >= TRIES - 1


@dataclass(frozen=True)
class AnswerHead:
    """What an answer begins with."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]


# --- the replica ---


class PoolReplica:
    """A pool of models in a process of its own, behind the HTTP application that a single server has."""

    async def __init__(self, pool_file: str) -> None:  # type: ignore[misc]
        """Load the pool; Ray waits for it."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from launch.pool import load_pool
        from launch.server import pool_service, serving_switches
        from yafsdp_like.inference.http.server import create_catalog_app
        from yafsdp_like.inference.http.service import ServiceState

        options = SERVE_POOL.load([pool_file])
        self._pool, self._grace_s, self._failed = load_pool(options), options.grace_s, ServiceState.FAILED
        self._service = pool_service(self._pool, options)
        self._app = create_catalog_app(self._service, self._pool.catalog)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._num_refused = 0  # requests that all refused to whom they were offered, since the last report
        self._arrived: dict[str, int] = {}  # the number of the last request of each ingress
        self._answering: dict[asyncio.Task[None], str] = {}  # the model of each request that the application is at
        self._ends = contextlib.AsyncExitStack()
        self._ends.enter_context(serving_switches())
        await self._ends.enter_async_context(self._app.router.lifespan_context(self._app))

    async def answer(self, asked: PassedRequest) -> AsyncIterator[AnswerHead | bytes]:
        """Yield the head of the application's answer, then its bytes as they come; see [Note: a request's way]."""
        self._arrived[asked.ingress] = max(asked.number, self._arrived.get(asked.ingress, 0))
        if self._name in asked.tried:  # there is no replica that has not refused it
            self._num_refused += asked.was_full
            yield AnswerHead(self._name, ASKED_AGAIN, [])
            return
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received: list[Message] = [{"type": "http.request", "body": asked.body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if received:
                return received.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.create_task(self._app(asked.scope, receive, sent.put))
        self._answering[answering] = asked.model
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        answering.add_done_callback(self._answering.pop)
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    self._num_refused += message["status"] == 429 and asked.is_last
                    yield AnswerHead(self._name, message["status"], list(message["headers"]))
                    continue
                parts = [message.get("body", b"")]
                while not sent.empty() and (more := sent.get_nowait()) is not None:
                    parts.append(more.get("body", b""))
                if content := b"".join(parts):
                    yield content
                if answering.done():
                    break
        finally:
            gone.set()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Tell routers how the pool stands; they alone can read it."""
        arrived, under_way = dict(self._arrived), Counter(self._answering.values())  # before the pool is asked
        standing = await self._service.call(lambda driver: driver.standing())
        parsers = self._pool.catalog.parsers
        aliases = {name: each.options.adapter_of for name, each in parsers.items() if each.options.adapter_of}
        standing = replace(standing, aliases=aliases, arrived=arrived).with_at_least(under_way)
        return {"number": standing.number, "standing": pickle.dumps(standing)}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray's controller what decides how many replicas there should be."""
        standing = await self._service.call(lambda driver: driver.standing())
        num_refused, self._num_refused = self._num_refused, 0
        return {"load": standing.load, "num_refused": float(num_refused)}

    def check_health(self) -> None:
        """Raise RuntimeError once the engine has failed, or is stuck: Ray then starts another replica."""
        if self._service.state is self._failed:
            raise RuntimeError(self._service.unhealthy_reason)

    async def __del__(self) -> None:
        """End what runs, once Ray sends nothing any more."""
        await self._service.drain(self._grace_s)
        await self._ends.aclose()
        if not self._service.is_stuck:
            assert self._pool.driver is not None, "a replica is one rank"
            self._pool.driver.close()


# --- the choice of a replica ---


class PoolRequestRouter(RequestRouter):
    """Offers a request to replicas in the order of ``FleetRouter``; lives beside each ingress's handle."""

    # For a replica to say whether it takes one request more, before the next best is asked: not only that it is busy.
    queue_len_response_deadline_s = max_queue_len_response_deadline_s = 5.0

    def initialize_state(self, **_: Any) -> None:
        """Begin to remember."""
        self._fleet = FleetRouter()
        self._numbers: dict[ReplicaID, int] = {}  # of the last report that was read

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all candidates, one of each rank, the best first; the one that the client names before all."""
        for candidate in candidate_replicas:
            stats = candidate.routing_stats or {}
            if stats.get("number", 0) > self._numbers.get(candidate.replica_id, 0):
                self._numbers[candidate.replica_id] = stats["number"]
                self._fleet.heard(candidate.replica_id, pickle.loads(stats["standing"]))
        asked = _asked(pending_request)
        if asked.there is not None:
            asked.there[:] = [each.replica_id.unique_id for each in candidate_replicas]
        fresh = [each for each in candidate_replicas if each.replica_id.unique_id not in asked.tried]
        found = fresh or candidate_replicas
        order = self._fleet.order([each.replica_id for each in found], asked.model, asked.blocks)
        order.sort(key=lambda index: found[index].replica_id.unique_id != asked.replica)
        return [[found[index]] for index in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember what was sent where."""
        asked = _asked(pending_request)
        if asked.model:
            self._fleet.sent(replica_id, asked.model, asked.blocks, asked.ingress, asked.number)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Forget replicas that are no more."""
        super().update_replicas(replicas)
        kept = {each.replica_id for each in replicas}
        self._fleet.keep(kept)
        self._numbers = {replica: number for replica, number in self._numbers.items() if replica in kept}


def _asked(pending: PendingRequest | None) -> Any:
    """Return what an ingress passed on; not by its class, of which Ray's copy of the router has one of its own."""
    return pending.args[0] if pending is not None and pending.args else PassedRequest({}, b"", "", ())


class LoadPolicy:
    """How many replicas Ray's controller keeps: `wanted_replicas` of what they report.

    A refusal counts against the replicas that were there when it was made, once: Ray shows it for half a minute.
    """

    def __init__(self, aim_load: float, high_load: float) -> None:
        self._aim, self._high = aim_load, high_load
        self._there, self._since = 0, 0.0  # so many replicas are there, since that time

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number; Ray keeps it within bounds, and waits as long as its configuration says."""
        there = context.current_num_replicas
        if there != self._there:
            self._there, self._since = there, context.current_time
        loads = [float(load) for load in (context.aggregated_metrics or {}).get("load", {}).values()]
        loads = (loads + [0.0] * there)[:there]  # one that has not reported yet has nothing to do
        reports = (context.raw_metrics or {}).get("num_refused", {}).values()
        num_refused = sum(each.value for report in reports for each in report if each.timestamp > self._since)
        return wanted_replicas(loads, int(num_refused), self._aim, self._high), {}


# --- the ingress ---


class Ingress:
    """Reads requests, and passes them on to replicas and their answers back; see [Note: a request's way]."""

    def __init__(self, pool: Any, most_nbytes: int, api_key: str | None = None) -> None:
        """``most_nbytes``: of a body. ``api_key``: of the pool's file, else that of this process's environment."""
        self._pool, self._most_nbytes = pool.options(method_name="answer", stream=True), most_nbytes
        self._key = api_key or os.environ.get(KEY_VARIABLE)
        self._name, self._numbers = uuid.uuid4().hex, itertools.count(1)

    async def __call__(self, http: Request) -> Response:
        """Return the answer of a replica, as a stream where it is one."""
        try:
            if http.scope["path"].startswith(ONE_REPLICAS):
                raise ApiError(501, "this would change one replica of a fleet: change the pool's file, and deploy it")
            self._check_head(http)
            asked = await self._read(http)
            is_of_all = asked.replica is None and http.scope["path"] in OF_ALL
            return await (self._ask_all(asked) if is_of_all else self._pass_on(asked))
        except ApiError as error:
            return JSONResponse(error.body(), error.status_code, error.headers)

    def _check_head(self, http: Request) -> None:
        """Raise ApiError before a body is read that a replica would refuse by its headers, which it checks again."""
        if self._key is not None and http.scope["path"].startswith(KEYED):
            found, expected = http.headers.get("authorization", ""), f"Bearer {self._key}"
            if not hmac.compare_digest(found.encode("latin-1"), expected.encode()):
                message = "expected the header 'authorization: Bearer KEY' with this server's key"
                raise ApiError(401, message, code="invalid_api_key")
        length = http.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > len(str(self._most_nbytes)) or int(length) > self._most_nbytes):
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body may have {self._most_nbytes} bytes at most", code="body_too_large")

    async def _read(self, http: Request) -> PassedRequest:
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > self._most_nbytes:
                raise self._too_large()
        names = "type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client"
        scope = {name: http.scope[name] for name in names if name in http.scope}
        scope |= {"asgi": {"version": "3.0"}, "root_path": "", "headers": [tuple(pair) for pair in scope["headers"]]}
        sent = bytes(body)
        model, text = await asyncio.to_thread(model_and_prompt, sent) if len(sent) > LARGE else model_and_prompt(sent)
        blocks, replica = blocks_of(model, text), http.headers.get(REPLICA_HEADER)
        return PassedRequest(scope, sent, model, blocks, self._name, replica=replica)

    async def _pass_on(self, asked: PassedRequest) -> Response:
        refusal: Response | None = None
        while True:
            head, parts = await self._offer(asked)
            if head.status == ASKED_AGAIN and refusal is not None:
                return refusal
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
            headers[REPLICA_HEADER] = head.replica
            if headers.get("content-type", "").startswith("text/event-stream"):
                return StreamingResponse(_events(parts), head.status, headers)
            answer = Response(await _whole(parts), head.status, headers)
            is_refused = head.status == 429 or (head.status == 503 and NOT_BEGUN in headers)
            if asked.is_last or not is_refused:
                return answer
            was_full = asked.was_full or head.status == 429
            refusal, asked = answer, replace(asked, tried=(*asked.tried, head.replica), was_full=was_full)

    async def _ask_all(self, asked: PassedRequest) -> Response:
        """Ask any replica, by which it is known who else is there, then all others together; say which gave nothing."""
        merge, media_type = OF_ALL[asked.scope["path"]]
        there: list[str] = []
        first = await self._figures(replace(asked, there=there))
        answers = dict([first] if first is not None else [])
        others = [name for name in there if name not in answers]
        found = await asyncio.gather(*(self._figures(replace(asked, replica=name)) for name in others))
        for name, answer in zip(others, found, strict=True):  # another replica answers for one that is there no more
            answers[name] = answer[1] if answer is not None and answer[0] == name else NO_ANSWER
        if not answers:
            raise unavailable("no replica answers", code="replica_lost")
        return Response(await asyncio.to_thread(merge, answers), media_type=media_type)  # streams go on meanwhile

    async def _figures(self, asked: PassedRequest) -> tuple[str, ReplicaAnswer] | None:
        """Return which replica has answered, and what; None where it was lost, or takes too long."""
        try:
            async with asyncio.timeout(FIGURES_S):
                head, parts = await self._offer(asked)
                return head.replica, ReplicaAnswer(head.status, await _whole(parts))
        except (ApiError, TimeoutError):
            return None

    async def _offer(self, asked: PassedRequest) -> tuple[AnswerHead, Any]:
        """Return the head of a replica's answer, and the parts that follow."""
        parts = self._pool.remote(replace(asked, number=next(self._numbers)))
        try:
            return await anext(aiter(parts)), parts
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise _lost(error) from error


async def _whole(parts: Any) -> bytes:
    try:
        return b"".join([part async for part in parts])
    except (RayError, RayServeException) as error:
        raise _lost(error) from error


async def _events(parts: Any) -> AsyncIterator[bytes]:
    """Yield a stream's bytes; where its replica dies, an error event and the end."""
    try:
        async for part in parts:
            yield part
    except (RayError, RayServeException) as error:
        yield b"data: " + json.dumps(_lost(error).body()).encode() + b"\n\ndata: [DONE]\n\n"
    finally:
        parts.cancel()


def _lost(error: BaseException) -> ApiError:
    logger.warning("a replica is lost", exc_info=error)
    return unavailable(f"the replica that served this is lost: {type(error).__name__}", code="replica_lost")


# --- the application ---


def application(options: FleetOptions) -> Any:
    """Return the application of Ray Serve. Raises ValueError for a pool's file that cannot be."""
    path = str(Path(options.pool).resolve())
    pool_options = SERVE_POOL.load([path])
    pool = serve.deployment(PoolReplica).options(
        name="Pool",
        max_ongoing_requests=MAX_REQUESTS,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PoolRequestRouter, request_routing_stats_period_s=options.report_s
        ),
        health_check_period_s=5,
        graceful_shutdown_timeout_s=2 * pool_options.grace_s + 15,
        **_scale(options),
    )
    ingress = serve.deployment(Ingress).options(
        name="Ingress",
        num_replicas=options.ingresses,
        max_ongoing_requests=MAX_REQUESTS,
        ray_actor_options={"num_cpus": 1 if options.cpus else 0},
    )
    return ingress.bind(pool.bind(path), pool_options.http.max_body_nbytes, pool_options.http.api_key)


def _scale(options: FleetOptions) -> dict[str, Any]:
    if options.min_replicas == options.max_replicas:
        return {"num_replicas": options.min_replicas}
    kwargs = {"aim_load": options.aim_load, "high_load": options.high_load}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            upscale_delay_s=options.up_after_s,
            downscale_delay_s=options.down_after_s,
            policy=AutoscalingPolicy(policy_function=LoadPolicy, policy_kwargs=kwargs),
        )
    }


def serve_fleet(options: FleetOptions) -> None:
    """Deploy the application, and delete it when SIGTERM or SIGINT comes, be it while replicas load."""
    ray.init(ignore_reinit_error=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # now: Ray has a handler of its own for SIGTERM, which aborts
        signal.signal(number, signal.default_int_handler)
    try:
        serve.start(http_options=HTTPOptions(host=options.host, port=options.port), proxy_location="EveryNode")
        serve.run(application(options), name=NAME)
        print(f"serving on http://{options.host}:{options.port}", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        serve.delete(NAME)
