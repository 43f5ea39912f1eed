"""A server's life in its process: from a model that is loaded to the last answer, and the end of one that is stuck.

Owns the HTTP server, signals and the exit status of a server whose engine does not come back. Options are serve.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from socket import socket
from types import FrameType
from typing import Any, NoReturn

import torch
import uvicorn
from fastapi import FastAPI

from launch.inference import LoadedModel
from launch.options import ADMIN_KEY_VARIABLE, KEY_VARIABLE, ServeOptions, ServePoolOptions, model_names
from launch.pool import LoadedPool
from yafsdp_like.inference.engine.tp_driver import KEEP_ALIVE_S, TPDriver, follow
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.connections import limit_connections
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.http.server import create_catalog_app
from yafsdp_like.inference.http.service import LAST_STEP_S, Service, ServiceState, SteppableEngine
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.tp_pool import follow_pool

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text takes one core: the engine needs the others
STUCK_STATUS = 3
SWITCH_S = 0.0001  # for which the event loop may hold up the engine, at each of its calls to the GPU; Python has 5 ms
MAX_POLL_S = 1.0  # between two looks for models that are idle
LAST_WORDS_S = 5  # for answers to be written after the grace period
SIGNALS = signal.SIGTERM, signal.SIGINT


class Server(uvicorn.Server):
    """Says where it listens, and ends what it serves before its connections."""

    def __init__(self, config: uvicorn.Config, service: Service[Any], grace_s: float, outlives_engine: bool) -> None:
        super().__init__(config)
        self._service, self._grace_s, self._outlives_engine = service, grace_s, outlives_engine

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and print the address."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The end has bounds everywhere; this one holds even if the event loop does not get to them."""
        if not self.should_exit:
            timer = threading.Timer(self._grace_s + 3 * LAST_STEP_S + LAST_WORDS_S, end_stuck, ["the process"])
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether it is to end."""
        has_failed = not self._outlives_engine and self._service.state is ServiceState.FAILED
        return await super().on_tick(counter) or has_failed or self._service.is_stuck

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Drain the service while connections are closed."""
        draining = asyncio.create_task(self._service.drain(self._grace_s))
        await super().shutdown(sockets)
        await draining


def serve(model: LoadedModel, options: ServeOptions, address: socket) -> None:
    """Serve until a signal comes: on one rank, or on the first of those that are tensor parallel.

    Raises RuntimeError if the engine has failed; if it is stuck, the process ends here.
    """
    leader = None if model.engine.tp_group is None else TPDriver(model.engine, model.engine.tp_group)
    engine: SteppableEngine = model.engine if leader is None else leader
    service = Service(
        engine,
        prepare=lambda _: _use(model.engine.device),
        poll_interval_s=None if leader is None else KEEP_ALIVE_S,
        stuck_after_s=options.stuck_after_s or None,
    )
    catalog = Catalog([RequestParser(model.codec, server_options(model, options), model.images)])
    for name in options.adapters:
        catalog.add_adapter(name, next(iter(catalog.parsers)))
    app = create_catalog_app(service, catalog)
    run_server(service, app, options, address, outlives_engine=leader is None)
    if leader is not None:
        _check_closed(service)
        leader.close()


def pool_service(pool: LoadedPool, options: ServePoolOptions) -> Service[PoolDriver]:
    """Return the service of a pool, not started yet."""
    assert pool.driver is not None, "the first rank serves, others follow it"
    device, entries = pool.device, options.models.values()
    polled = [ttl_s / 4 for entry in entries for ttl_s in (entry.ttl_s, entry.host_ttl_s) if ttl_s]
    polled += [] if pool.pool.tp_group is None else [KEEP_ALIVE_S]
    return Service(
        pool.driver,
        prepare=lambda _: _use(device),
        poll_interval_s=min([*polled, MAX_POLL_S]) if polled else None,
        stuck_after_s=options.stuck_after_s or None,
    )


def serve_pool(pool: LoadedPool, options: ServePoolOptions, address: socket) -> None:
    """Serve the models of a pool until a signal comes, on one rank or the first of several.

    Raises RuntimeError if it has failed.
    """
    assert pool.driver is not None, "the first rank serves, others follow it"
    service, is_alone = pool_service(pool, options), pool.pool.tp_group is None
    run_server(service, create_catalog_app(service, pool.catalog), options, address, outlives_engine=is_alone)
    _check_closed(service)
    pool.driver.close()


def _check_closed(service: Service[Any]) -> None:
    assert service.state is ServiceState.CLOSED, f"the service is {service.state.value}, and may still use the engine"


def run_server(
    service: Service[Any],
    app: FastAPI,
    options: ServeOptions | ServePoolOptions,
    address: socket,
    outlives_engine: bool,
) -> None:
    """Serve an application until a signal comes, or its engine has failed; ends the process if that is stuck."""
    config = uvicorn.Config(
        app,
        http=limit_connections(options.max_connections),
        log_level="info" if options.access_log else "warning",
        access_log=options.access_log,
        ws="none",
        timeout_graceful_shutdown=int(options.grace_s + LAST_STEP_S) + LAST_WORDS_S,
    )
    for number in SIGNALS:  # uvicorn raises again what it was ended by
        signal.signal(number, lambda *_: None)
    with serving_switches():
        Server(config, service, options.grace_s, outlives_engine).run([address])
    if service.is_stuck:
        end_stuck(f"the engine ({service.error})")
    if service.error is not None:
        raise RuntimeError("the engine has failed") from service.error


@contextlib.contextmanager
def serving_switches() -> Iterator[None]:
    """Have Python not hold up the engine's thread.

    Threads take turns after ``SWITCH_S``, and what exists by now is never searched for garbage, which takes 0.15 s.
    """
    before_s, num_frozen = sys.getswitchinterval(), gc.get_freeze_count()
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not num_frozen:
            gc.unfreeze()
        sys.setswitchinterval(before_s)


def server_options(model: LoadedModel, options: ServeOptions) -> ServerOptions:
    """The options of the HTTP interface; prints the model's name."""
    name, *aliases = (options.name,) if options.name else model_names(options.model)
    print(f"requests call the model {name!r}", flush=True)
    return ServerOptions(
        api_key=options.http.api_key or os.environ.get(KEY_VARIABLE),
        admin_key=options.admin_key or os.environ.get(ADMIN_KEY_VARIABLE) or None,
        timeout_s=options.http.timeout_s or None,
        max_choices=options.http.max_choices,
        max_body_nbytes=options.http.max_body_nbytes,
        max_images=options.http.max_images,
        max_image_nbytes=options.http.max_image_nbytes,
        max_image_pixels=options.http.max_image_pixels,
        image_hosts=options.http.image_hosts,
        takes_images=model.images is not None,
        has_grammars=model.engine.tp_group is None,
        strict=options.http.strict,
        priorities=options.http.priorities,
        model_name=name,
        aliases=tuple(aliases),
        vocab_size=model.model.config.vocab_size,
        max_seq_len=model.engine.max_seq_len,
        sampling=model.sampling,
    )


def follow_first_rank(model: LoadedModel) -> None:
    """Follow the first tensor parallel rank until it ends; it finishes requests after a signal, which all ranks get.

    Raises RuntimeError if it has failed.
    """
    assert model.engine.tp_group is not None
    _leave_signals_to_first_rank()
    follow(model.engine, model.engine.tp_group)


def follow_first_pool(pool: LoadedPool) -> None:
    """Follow the first rank of a pool until it ends, as ``follow_first_rank`` does."""
    _leave_signals_to_first_rank()
    follow_pool(pool.pool)


def _leave_signals_to_first_rank() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_stuck(what: str) -> NoReturn:
    """No thread can be ended from outside, and leaving it to itself would wait for it: for GPUs, for other ranks."""
    print(f"error: {what} is stuck and does not end; the process is ended", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(STUCK_STATUS)


def _use(device: torch.device) -> None:
    """Each thread has a current GPU of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
