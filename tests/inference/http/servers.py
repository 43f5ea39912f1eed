"""Servers of small models, and engines that are disturbed, for tests of the HTTP interface."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import openai
import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from yafsdp_like.comm.transport import Transport
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import FinishReason, Request, RequestOutput
from yafsdp_like.inference.http.protocol import ServerOptions
from yafsdp_like.inference.http.server import create_app
from yafsdp_like.inference.http.service import Service, ServiceState
from yafsdp_like.inference.http.stream import Stream
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.weights.loading import load, model_of
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models import Decoder, DecoderConfig

if TYPE_CHECKING:
    from yafsdp_like.inference.options import AnyMode

T = TypeVar("T")

MODEL = "tiny"
MAX_SEQ_LEN = 256
PROMPT = "The quick brown fox"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
SECONDS = 30.0  # that nothing here should take, on the slowest machine


# --- engines and servers ---


def make_decoder(codec: Codec) -> Decoder:
    """A small one of the codec's vocabulary with random weights, the same each time."""
    decoder = Decoder(DecoderConfig(32, 2, 4, 2, 64, vocab_size=codec.vocab_size, max_seq_len=MAX_SEQ_LEN))
    decoder.init_weights(0)
    with torch.no_grad():
        decoder.lm_head.weight.mul_(8)  # opinions, so that a greedy answer is no accident of rounding
    return decoder


def make_engine(codec: Codec, transport: Transport | None = None, **options: Any) -> Engine:
    """Of the small decoder; with a transport, this rank's of all that compute together."""
    limits: dict[str, Any] = {"kv_nbytes": 1 << 20, "max_batch_size": 8, "max_batch_tokens": 64, "max_waiting": 64}
    engine_options = EngineOptions(max_seq_len=MAX_SEQ_LEN, **{**limits, **options})
    mode: AnyMode = "auto" if transport is None else "tensor_parallel"
    weights = load(model_of(make_decoder(codec)), engine_options, mode=mode, transport=transport)
    return Engine(weights)


class Wrapped:
    """An engine whose steps are disturbed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Turnstile(Wrapped):
    """An engine that takes requests and does nothing about them until it is let."""

    is_open = False
    error: Exception | None = None  # of its first step

    @property
    def has_work(self) -> bool:
        return self.is_open and self.engine.has_work

    def step(self) -> list[RequestOutput]:
        if self.error is not None:
            raise self.error
        return self.engine.step()


def let(engine: Turnstile) -> None:
    """To be called in the engine's thread, which looks for work afterwards."""
    engine.is_open = True


class Slow(Wrapped):
    """An engine whose steps take at least some milliseconds, so that requests can be met while they run."""

    def step(self) -> list[RequestOutput]:
        time.sleep(0.02)
        return self.engine.step()


@dataclass
class Running:
    """A server in a thread of its own, and its address."""

    engine: Any
    service: Service[Any]
    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop
    url: str
    http: httpx.Client  # one for all, since each reads the world's certificates first

    def client(self, **options: Any) -> openai.OpenAI:
        told = {"api_key": "none", "max_retries": 0, "timeout": SECONDS, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", http_client=self.http, **told)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        sent = {"json": body} if "content" not in options else {}
        return self.http.post(path, **sent, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def call(self, function: Callable[[Any], T]) -> T:
        """In the engine's thread."""
        return asyncio.run_coroutine_threadsafe(self.service.call(function), self.loop).result(SECONDS)

    def check_idle(self) -> None:
        """Everything ends by itself, and no page is held or lost."""
        until = time.monotonic() + SECONDS
        while self.service.num_requests or self.call(lambda engine: engine.has_work):
            assert time.monotonic() < until, "requests do not end"
            time.sleep(0.01)
        metrics = self.call(lambda engine: engine.metrics())
        assert (metrics.num_running, metrics.num_waiting, metrics.kv_nbytes_used) == (0, 0, 0)
        self.call(lambda engine: engine.check_integrity())

    def numbers(self) -> dict[str, float]:
        """/metrics, by name and labels."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {
            ",".join([sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
        }


@contextlib.contextmanager
def serving(engine: Any, codec: Codec, poll_interval_s: float | None = None, **options: Any) -> Iterator[Running]:
    """A server of one model on a free port, which is down and has freed everything at the end."""
    service = Service(engine, poll_interval_s=poll_interval_s)
    told = ServerOptions(model_name=MODEL, vocab_size=engine.config.vocab_size, max_seq_len=MAX_SEQ_LEN, **options)
    with serving_app(service, engine, create_app(service, codec, told)) as running:
        yield running


@contextlib.contextmanager
def serving_app(service: Service[Any], engine: Any, app: FastAPI) -> Iterator[Running]:
    """The same of any application of a service."""
    config = uvicorn.Config(app, port=0, log_level="error", ws="none")
    server, started = uvicorn.Server(config), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(SECONDS)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=SECONDS, verify=False) as http:
            yield Running(engine, service, server, loops[0], url, http)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert service.state in (ServiceState.CLOSED, ServiceState.FAILED)


@dataclass
class Served:
    """A server, its tokenizer, and an engine of the same weights that is asked directly."""

    running: Running
    codec: Codec
    reference: Engine
    num_asked: int = 0
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.running.client()

    def ask(self, prompt: tuple[int, ...], **fields: Any) -> tuple[list[int], str]:
        """Ids and text of what follows, less the token that stops; greedy unless sampling is said."""
        self.num_asked += 1
        told = {"sampling": SamplingParams(temperature=0), "max_tokens": 24, "stop_tokens": self.codec.stop_tokens}
        request = Request(str(self.num_asked), prompt, **{**told, **fields})
        completion = self.reference.generate([request])[request.id]
        ids = completion.ids[:-1] if completion.finish is FinishReason.STOP else completion.ids
        before = self.codec.decode(prompt)
        return ids, self.codec.decode([*prompt, *ids])[len(before) :]


@contextlib.contextmanager
def served_with(codec: Codec) -> Iterator[Served]:
    with serving(make_engine(codec), codec) as running:
        yield Served(running, codec, make_engine(codec))
        running.check_idle()


def requests(count: int, **fields: Any) -> list[Request]:
    told = {"max_tokens": 3, "sampling": SamplingParams(temperature=0), **fields}
    return [Request(f"r{number}", (1, 2, 3 + number), **told) for number in range(count)]


async def drawn(stream: Stream) -> dict[str, int]:
    """Tokens by request."""
    counts: dict[str, int] = {}
    async for output in stream:
        counts[output.request_id] = counts.get(output.request_id, 0) + len(output.tokens)
    return counts


def run(engine: Any, main: Callable[[Service[Any]], Any]) -> None:
    """`main` with a started service, which is closed and empty after it."""

    async def whole() -> None:
        service = Service(engine)
        await service.start()
        try:
            await asyncio.wait_for(main(service), SECONDS)
        finally:
            await service.close()
        assert service.num_requests == 0

    asyncio.run(whole())
