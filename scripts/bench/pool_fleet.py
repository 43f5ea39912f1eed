"""Processes that serve many models within one limit of memory: a pool, or one for each model, some of which start late.

Owns which process is asked, and when one makes room for another. Knows nothing of traffic or of times.

[Note: on demand]
Models without a process all the time share the memory of one, the largest of them. A process serves its model until
nothing is left of what it was given, and ends; then that of the model that has waited for longest starts, from the
files, and is given all that waits for it. A request of the model that is there queues where requests of others wait.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from bench.pool_worker import CLOSED, END, FAILED, News, ProcessSpec, Worker
from yafsdp_like.inference.engine.request import Request


class Fleet:
    """Processes, and who is asked; see [Note: on demand]."""

    def __init__(
        self, context: Any, residents: Mapping[str, ProcessSpec], on_demand: Mapping[str, ProcessSpec]
    ) -> None:
        """``residents`` and ``on_demand`` say by a model's name what serves it; a pool is one for all."""
        self.outbox = context.Queue()
        self.num_starts = 0  # of processes on demand
        self._context, self._on_demand = context, on_demand
        self._workers = {
            served.name: Worker(context, served, self.outbox)
            for served in {served.name: served for served in residents.values()}.values()
        }
        self._of_model = {name: self._workers[served.name] for name, served in residents.items()}
        self._late: Worker | None = None  # on demand
        self._late_model = ""
        self._is_closing = False
        self._under_way: set[str] = set()  # requests that were given to it
        self._waiting: deque[tuple[str, Request]] = deque()
        for _ in self._workers:
            self.take(self.outbox.get())

    def ask(self, name: str, request: Request) -> None:
        """Ask a model; its process may have to start."""
        if name in self._of_model:
            self._of_model[name].send(request)
            return
        self._waiting.append((name, request))
        if name == self._late_model and len(self._waiting) == 1:
            self._give()
        self._turn()

    def take(self, news: News) -> None:
        """Take note of what a process has said. Raises RuntimeError where it has failed."""
        if news.kind == FAILED:
            raise RuntimeError(f"the process of {news.process} has failed: {news.text}")
        if news.kind == END:
            self._under_way.discard(news.request_id)
        if news.kind == CLOSED and self._late is not None and news.process == self._late.served.name:
            self._late.join()  # the device is not free before
            self._late, self._late_model, self._is_closing = None, "", False
        self._turn()

    def close(self) -> None:
        """End all processes."""
        workers = [*self._workers.values(), *([] if self._late is None else [self._late])]
        for worker in workers:
            worker.stop()
        closed: set[str] = set()
        while len(closed) < len(workers):
            news = self.outbox.get()
            if news.kind in (CLOSED, FAILED):
                closed.add(news.process)
        for worker in workers:
            worker.join()

    def _turn(self) -> None:
        """Have the model that has waited for longest served, as soon as nothing of another is left."""
        if not self._waiting or self._under_way or self._is_closing:
            return
        name, _ = self._waiting[0]
        if self._late is None:
            self._late, self._late_model = Worker(self._context, self._on_demand[name], self.outbox), name
            self.num_starts += 1
        if name == self._late_model:
            self._give()
        else:
            self._late.stop()
            self._is_closing = True

    def _give(self) -> None:
        """Give all that waits for the model that is there to its process."""
        if self._late is None or self._is_closing:
            return
        for name, request in list(self._waiting):
            if name == self._late_model:
                self._waiting.remove((name, request))
                self._under_way.add(request.id)
                self._late.send(request)
