"""Tensor parallel ranks of which one takes requests: it broadcasts each call of its engine, and all make the same.

Owns what is broadcast between the engines' steps, and that it is often enough (`TPBroadcaster`); a pool of models has
messages of its own (`pool/tp_pool.py`). Knows nothing of threads, text or HTTP.

[Note: one rank is asked]
Ranks that compute together must make the same calls of their engines in the same order (``store.py``, [Note:
together]), and requests come to the first one only. It broadcasts each call before it makes it (`TPDriver`); the others
receive the call and make it too (`follow`). Engines with the same calls have the same state, so what one refuses all
refuse; the caller gets the error of the first rank.

Receiving is a collective, which must end within the timeout of its group. So the first rank is not silent for long:
after ``KEEP_ALIVE_S`` its engine has work again, a step in which it broadcasts that there is nothing to do.

A rank that fails leaves the others in a collective that it will not join. Its process must end and with it its
connections, by which the others fail, too.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from yafsdp_like.inference.engine.request import QueueFullError, Request, RequestOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.comm.tp_group import TPGroup
    from yafsdp_like.inference.engine.adapters import Adapters
    from yafsdp_like.inference.engine.engine import Engine
    from yafsdp_like.inference.engine.metrics import Metrics
    from yafsdp_like.inference.kv.occupancy import Stretch

KEEP_ALIVE_S = 5.0  # of silence; far less than the timeout of any group


class TPCommand(Enum):
    """What all ranks are to do next."""

    STEP = auto()
    LISTEN = auto()  # there is nothing to do
    END = auto()


@dataclass(frozen=True)
class Cancel:
    """Cancel the request of this id."""

    request_id: str


class TPBroadcaster:
    """Broadcasts what the first rank tells the others, and notes when: it must not be silent for long."""

    def __init__(self, tp_group: TPGroup) -> None:
        self._tp_group = tp_group
        self._last_s = time.monotonic()  # of the last broadcast; -inf: it may have failed

    @property
    def is_due(self) -> bool:
        """Whether the others must hear something now, or would have had to: a broadcast has failed."""
        return time.monotonic() - self._last_s >= KEEP_ALIVE_S

    def tell(self, message: object) -> None:
        """Broadcast a message. Raises RuntimeError if a rank has failed, as every later one then does."""
        assert self._tp_group.rank == 0, f"the first rank leads, this is {self._tp_group.rank}"
        self._last_s = -math.inf  # if this fails there is work: a step, which fails again where a service notices it
        self._tp_group.broadcast(message)
        self._last_s = time.monotonic()


def received(tp_group: TPGroup) -> Iterator[object]:
    """Yield on another rank what the first one tells, until that is ``TPCommand.END``.

    Blocks the CPU. Raises RuntimeError if the first rank has ended otherwise, or was silent for longer than the timeout
    of the group.
    """
    listening: object = TPCommand.LISTEN
    while (message := tp_group.broadcast(listening)) is not TPCommand.END:
        yield message


class TPDriver:
    """The engine of the first of ranks that compute together, with the others' behind it.

    For a service: what is asked of it is asked of all, and it answers as `engine.Engine` does. Not safe for threads. If
    a rank has failed, RuntimeError is raised here and by every ``step`` from then on.
    """

    def __init__(self, engine: Engine, tp_group: TPGroup) -> None:
        self.config, self.options = engine.config, engine.options
        self._engine, self._broadcaster = engine, TPBroadcaster(tp_group)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return, a sign of life for the other ranks included."""
        return self._engine.has_work or self._broadcaster.is_due

    @property
    def rest_s(self) -> float:
        """0.0: engines that step together do not rest; see `Engine.rest_s`."""
        return self._engine.rest_s

    def add(self, request: Request) -> None:
        """Add a request on all ranks. Raises what `Engine.add` does."""
        self._broadcaster.tell(request)
        self._engine.add(request)

    def cancel(self, request_id: str) -> None:
        """Cancel a request on all ranks."""
        self._broadcaster.tell(Cancel(request_id))
        self._engine.cancel(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step on all ranks, and return its outputs; or keep the others listening if there is nothing to do."""
        if not self._engine.has_work:
            self._broadcaster.tell(TPCommand.LISTEN)
            return []
        self._broadcaster.tell(TPCommand.STEP)
        return self._engine.step()

    def close(self) -> None:
        """End `follow` on the other ranks. Not after an error: they may not be listening."""
        self._broadcaster.tell(TPCommand.END)

    @property
    def adapters(self) -> Adapters:
        """Raises ValueError: loading is no call that ranks make together yet."""
        raise ValueError("tensor parallel ranks load LoRA adapters only when the server starts: name them there")

    def metrics(self) -> Metrics:
        """Return this rank's metrics, which all ranks have."""
        return self._engine.metrics()

    def occupancy(self) -> list[Stretch]:
        """Return who has which of this rank's bytes; see `Engine.occupancy`."""
        return self._engine.occupancy()

    def check_integrity(self) -> None:
        """Check this rank's pages; see `Engine.check_integrity`."""
        self._engine.check_integrity()


def follow(engine: Engine, tp_group: TPGroup) -> None:
    """Make the calls on this rank's engine that the first rank makes, until it closes its `TPDriver`.

    Blocks the CPU while there is nothing to do. Raises what a step and ``received`` raise.
    """
    for message in received(tp_group):
        _apply(engine, message)


def _apply(engine: Engine, message: object) -> None:
    match message:
        case Request():
            with contextlib.suppress(ValueError, QueueFullError):  # the first rank raises it, too, and answers
                engine.add(message)
        case Cancel(request_id):
            engine.cancel(request_id)
        case TPCommand.STEP:
            engine.step()
