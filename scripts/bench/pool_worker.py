"""A process that serves one model, or a pool of them, from files: requests come by one queue, news leave by another.

Owns what goes on in that process, and its handle in the one that asks. Times are `time.monotonic()`'s, which all
processes of a host share.
"""

import queue
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import open_model

READY, TOKENS, END, CLOSED, FAILED = "ready", "tokens", "end", "closed", "failed"


@dataclass(frozen=True)
class ProcessSpec:
    """What a process serves, and within which memory; without ``pool`` it is one model."""

    name: str  # of the process
    directories: Mapping[str, str]  # by name of the model
    engine: EngineOptions
    pool: PoolOptions | None
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class News:
    """What a process says."""

    process: str
    kind: str  # READY, ...
    at: float
    request_id: str = ""
    num_tokens: int = 0
    text: str = ""


class Worker:
    """The handle of a process."""

    def __init__(self, context: Any, served: ProcessSpec, outbox: Any) -> None:
        """``context`` is one of `multiprocessing`'s, or `multiprocessing.dummy`, whose processes are threads."""
        self.served = served
        self._inbox = context.Queue()
        self._process = context.Process(target=serve, args=(served, self._inbox, outbox), name=served.name)
        self._process.daemon = True
        self._process.start()

    def send(self, request: Request) -> None:
        """Ask for an answer."""
        self._inbox.put(request)

    def stop(self) -> None:
        """Have it end, whatever is under way; it says CLOSED."""
        self._inbox.put(None)

    def join(self) -> None:
        """Wait for its end."""
        self._process.join()


def serve(served: ProcessSpec, inbox: Any, outbox: Any) -> None:
    """Serve what comes by ``inbox`` until that is None; everything is said to ``outbox``."""
    try:
        engine = _load(served)
        outbox.put(News(served.name, READY, time.monotonic()))
        while _take(engine, inbox):
            if engine.has_work:
                _say(engine.step(), served.name, outbox)
        engine.close()
        outbox.put(News(served.name, CLOSED, time.monotonic()))
    except BaseException:
        outbox.put(News(served.name, FAILED, time.monotonic(), text=traceback.format_exc()))


def _load(served: ProcessSpec) -> Engine | PoolDriver:
    models = {name: open_model(directory) for name, directory in served.directories.items()}
    if served.pool is None:
        (model,) = models.values()
        return Engine.load(model, served.engine, device=served.device, dtype=served.dtype)
    pooled = {name: PooledModel(model.config, served.dtype, served.engine) for name, model in models.items()}
    plan = plan_pool(pooled, served.pool, Hardware.of(torch.device(served.device)))
    driver = PoolDriver(ModelPool(plan, models, served.device))
    failed = driver.load_all()
    assert not failed, failed
    return driver


def _take(engine: Engine | PoolDriver, inbox: Any) -> bool:
    """Take all requests that are there, waiting for one where there is nothing to do; False at the end."""
    while True:
        try:
            request = inbox.get(block=not engine.has_work)
        except queue.Empty:
            return True
        if request is None:
            return False
        engine.add(request)


def _say(outputs: Any, name: str, outbox: Any) -> None:
    at = time.monotonic()
    for output in outputs:
        kind = TOKENS if output.finish is None else END
        if output.tokens or kind == END:
            outbox.put(News(name, kind, at, output.request_id, len(output.tokens)))
