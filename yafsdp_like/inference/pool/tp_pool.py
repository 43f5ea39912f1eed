"""A pool over several ranks, of which one takes requests: it broadcasts each call that changes its pool.

Owns which calls these are. Ranks that make the same calls have the same pools (``ranks.py``, [Note: ranks of a pool]);
how its messages are received, and what a rank's end means for the others, is `engine/tp_driver.py`'s.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from yafsdp_like.inference.engine.request import QueueFullError
from yafsdp_like.inference.engine.tp_driver import TPBroadcaster, TPCommand, received
from yafsdp_like.inference.pool.host_weights import ModelUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.inference.engine.request import Request, RequestOutput
    from yafsdp_like.inference.pool.member import ModelFigures
    from yafsdp_like.inference.pool.pool import ModelPool

Method: TypeAlias = Literal["add", "cancel", "step", "load_all", "start_loading", "unload", "sleep", "wake_up"]
_REFUSED = ValueError, QueueFullError, ModelUnavailableError


@dataclass(frozen=True)
class PoolCall:
    """A call of a pool that all ranks make."""

    method: Method
    made_at: float  # in seconds of time.monotonic() of the first rank
    arguments: tuple[Any, ...] = ()


class TPPool:
    """The first rank's pool with the others' behind it: a call is made on all, and raises what it does on this one.

    Not safe for threads. If a rank has failed, RuntimeError is raised here and by every ``step`` from then on.
    """

    def __init__(self, pool: ModelPool) -> None:
        assert pool.tp_group is not None, "one rank has nobody to lead"
        self._pool, self._broadcaster = pool, TPBroadcaster(pool.tp_group)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to return, a sign of life for the other ranks included."""
        return self._pool.has_work or self._pool.has_news or self._broadcaster.is_due

    def step(self) -> list[tuple[str, RequestOutput]]:
        """Make a step on all ranks, or keep the others listening if there is nothing to do; see ``ModelPool.step``."""
        if not (self._pool.has_work or self._pool.has_news):
            self._broadcaster.tell(TPCommand.LISTEN)
            return []
        self._tell("step")
        return self._pool.step()

    def add(self, name: str, request: Request) -> None:
        """Take a request on all ranks; see ``ModelPool.add``."""
        self._tell("add", name, request)
        self._pool.add(name, request)

    def cancel(self, name: str, request_id: str) -> None:
        """Cancel a request on all ranks."""
        self._tell("cancel", name, request_id)
        self._pool.cancel(name, request_id)

    def load_all(self, watch: Callable[[str, ModelFigures], object]) -> dict[str, Exception]:
        """Load all models on all ranks; see ``ModelPool.load_all``."""
        self._tell("load_all")
        return self._pool.load_all(watch)

    def start_loading(self, name: str) -> None:
        """Begin to read a model on all ranks; see ``ModelPool.start_loading``."""
        self._tell("start_loading", name)
        self._pool.start_loading(name)

    def unload(self, name: str) -> None:
        """Take a model from the devices and hosts of all ranks; see ``ModelPool.unload``."""
        self._tell("unload", name)
        self._pool.unload(name)

    def sleep(self, name: str) -> None:
        """Let a model sleep on all ranks."""
        self._tell("sleep", name)
        self._pool.sleep(name)

    def wake_up(self, name: str) -> object:
        """Wake a model on all ranks; see ``ModelPool.wake_up``."""
        self._tell("wake_up", name)
        return self._pool.wake_up(name)

    def _tell(self, method: Method, *arguments: Any) -> None:
        """Have the others make a call; this rank then makes it, at the same time."""
        call = PoolCall(method, time.monotonic(), arguments)
        self._broadcaster.tell(call)
        self._pool.ranks.told_at = call.made_at

    def close(self) -> None:
        """End ``follow_pool`` on the other ranks, and close. Not after an error: they may not be listening."""
        self._broadcaster.tell(TPCommand.END)
        self._pool.close()


def follow_pool(pool: ModelPool) -> None:
    """Make the calls on this rank's pool that the first rank makes, until it closes its own; then close this one.

    Blocks the CPU while there is nothing to do. Raises what ``received``, a step and ``load_all`` raise: their errors
    may be this rank's alone. What other calls refuse all ranks refuse, and the first one answers.
    """
    assert pool.tp_group is not None, "one rank has nobody to follow"
    for message in received(pool.tp_group):
        if isinstance(message, PoolCall):
            pool.ranks.told_at = message.made_at
            refused = () if message.method in ("step", "load_all") else _REFUSED
            with contextlib.suppress(*refused):
                getattr(pool, message.method)(*message.arguments)
        elif message is not TPCommand.LISTEN:
            raise RuntimeError(f"expected a call of the first rank's pool, found {message}: make all by one TPPool")
    pool.close()
