"""Tensor parallel ranks of which one takes requests: it broadcasts each call of its engine, and all make the same.

Owns what is broadcast between the engines' steps. Knows nothing of threads, text or HTTP.

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


Message = Request | Cancel | TPCommand  # a request is to be added


class TPDriver:
    """The engine of the first of ranks that compute together, with the others' behind it.

    For a service: what is asked of it is asked of all, and it answers as `engine.Engine` does. Not safe for threads. If
    a rank has failed, RuntimeError is raised here and by every ``step`` from then on.
    """

    def __init__(self, engine: Engine, tp_group: TPGroup) -> None:
        assert tp_group.rank == 0, f"the first rank leads, this is {tp_group.rank}"
        self.config, self.options = engine.config, engine.options
        self._engine, self._tp_group = engine, tp_group
        self._last_broadcast_s = time.monotonic()  # of the last broadcast; -inf: it may have failed

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return, a sign of life for the other ranks included."""
        return self._engine.has_work or time.monotonic() - self._last_broadcast_s >= KEEP_ALIVE_S

    def add(self, request: Request) -> None:
        """Add a request on all ranks. Raises what `Engine.add` does."""
        self._broadcast(request)
        self._engine.add(request)

    def cancel(self, request_id: str) -> None:
        """Cancel a request on all ranks."""
        self._broadcast(Cancel(request_id))
        self._engine.cancel(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step on all ranks, and return its outputs; or keep the others listening if there is nothing to do."""
        if not self._engine.has_work:
            self._broadcast(TPCommand.LISTEN)
            return []
        self._broadcast(TPCommand.STEP)
        return self._engine.step()

    def close(self) -> None:
        """End `follow` on the other ranks. Not after an error: they may not be listening."""
        self._broadcast(TPCommand.END)

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

    def _broadcast(self, message: Message) -> None:
        self._last_broadcast_s = (
            -math.inf
        )  # if this fails there is work: a step, which fails again where a service notices it
        self._tp_group.broadcast(message)
        self._last_broadcast_s = time.monotonic()


def follow(engine: Engine, tp_group: TPGroup) -> None:
    """Make the calls on this rank's engine that the first rank makes, until it closes its `TPDriver`.

    Blocks the CPU while there is nothing to do. Raises what a step raises, and RuntimeError if the first rank has ended
    otherwise or was silent for longer than the timeout of the group.
    """
    listening: Message = TPCommand.LISTEN
    while (message := tp_group.broadcast(listening)) is not TPCommand.END:
        _apply(engine, message)


def _apply(engine: Engine, message: Message) -> None:
    match message:
        case Request():
            with contextlib.suppress(ValueError, QueueFullError):  # the first rank raises it, too, and answers
                engine.add(message)
        case Cancel(request_id):
            engine.cancel(request_id)
        case TPCommand.STEP:
            engine.step()
