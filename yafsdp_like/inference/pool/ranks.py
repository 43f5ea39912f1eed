"""What ranks that share a pool see at different times, and take in alike: ends of copies and of loads, and the time.

Owns these exchanges; they block the CPU. Knows nothing of turns, pages or requests.

[Note: ranks of a pool]
Models of a pool over several ranks are tensor parallel (``store.py``, [Note: tensor parallel]). Each rank has a pool of
its own, with its parts of all weights in host memory of its own, so that a model arrives over all links at once. All
make the same calls in the same order, and what a call does follows from the calls before it, so that slabs, pages and
turns are the same everywhere. Three things do not follow from calls. Ranks exchange them in calls that change
something, and only while there is something under way, which all know alike:

* a unit has arrived once it has on all ranks, since a step is a recording on all of them or on none;
* a load is over once it is on all ranks, and has failed if it has on any;
* the time is the first rank's. That of a call comes with the call where one rank is asked (``tp_pool.py``), so that a
  step exchanges one more, its end.

Exchanges have names: where ranks have not made the same calls, and one is in another exchange, all raise.

Calls that only look at a pool of several ranks, such as ``states``, exchange nothing: they see what was taken in last.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from yafsdp_like.comm.consistency import AgreedError, message_of, raise_on_all_ranks
from yafsdp_like.comm.tp_group import TPGroup, world_tp_group

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from yafsdp_like.inference.pool.loading import Loading
    from yafsdp_like.inference.pool.weights import PooledWeights

Value = TypeVar("Value")

_SAME_CALLS = "make the same calls in the same order on all ranks"


@dataclass(frozen=True)
class _Time:
    seconds: float


class PoolRanks:
    """The ranks of one pool, see [Note: ranks of a pool]; without a ``tp_group`` there is one."""

    def __init__(self, tp_group: TPGroup | None = None) -> None:
        self.tp_group = tp_group
        self.told_at: float | None = None  # when the call that is being made was made, where the first rank has told it

    @classmethod
    def of(cls, num_ranks: int) -> PoolRanks:
        """Return this process's ranks. Raises ValueError where a plan of ``num_ranks`` needs others."""
        if num_ranks == 1:
            return cls()
        found = dist.get_world_size() if dist.is_initialized() else 1
        if found != num_ranks:
            raise ValueError(
                f"the pool is planned for {num_ranks} ranks, found {found}: start as many processes, or plan with "
                f"num_ranks={found}"
            )
        return cls(world_tp_group())

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank."""
        return self.tp_group is None

    def raising_together(self) -> AbstractContextManager[None]:
        """Raise on all ranks where the body, which does not communicate, raises on any."""
        return contextlib.nullcontext() if self.is_alone else raise_on_all_ranks()

    def check_same(self, what: str, value: object) -> None:
        """Raise RuntimeError on all ranks unless they pass equal values."""
        if self.tp_group is not None:
            self.tp_group.check_same(what, value)

    def clock(self) -> float:
        """Return ``time.monotonic()`` of the first rank, which broadcasts it."""
        now = time.monotonic()
        if self.tp_group is None:
            return now
        found = self.tp_group.broadcast(_Time(now))
        if not isinstance(found, _Time):
            raise RuntimeError(f"expected the time from the first rank of a pool, found {found}: {_SAME_CALLS}")
        return found.seconds

    def called_at(self) -> float:
        """Return when the first rank has made this call, in seconds of ``clock``; it asks that where none was told."""
        return self.clock() if self.told_at is None else self.told_at

    def all_over(self, is_over: bool, error: Exception | None) -> bool:
        """Return whether what all wait for is over on all ranks.

        Where any has an ``error`` instead, all raise: that rank its own, others AgreedError with its message.
        """
        words = None if error is None else message_of(error)
        found = self._gathered("the wait for a load", (is_over, words))
        if error is not None:
            raise error
        failed = _failed([words for _, words in found])
        if failed is not None:
            raise failed
        return all(is_over for is_over, _ in found)

    def note_arrivals(self, models: Iterable[PooledWeights]) -> None:
        """Take in which units have arrived by now."""
        arriving = [weights for weights in models if weights.is_arriving()]
        if arriving:
            counts = self._gathered("arrivals", [weights.count_arriving() for weights in arriving])
            for weights, found in zip(arriving, zip(*counts, strict=True), strict=True):
                weights.note_arrivals(max(found))

    def ended(self, loadings: Sequence[Loading]) -> dict[Loading, BaseException | None]:
        """Return those of ``loadings`` that are over by now, and why they have failed."""
        reports = self._gathered("the ends of loads", [_report(loading) for loading in loadings])
        ended: dict[Loading, BaseException | None] = {}
        for loading, found in zip(loadings, zip(*reports, strict=True), strict=True):
            if all(is_over for is_over, _ in found):
                ended[loading] = loading.error or _failed([words for _, words in found])
        return ended

    def _gathered(self, what: str, value: Value) -> list[Value]:
        """Return all ranks' values. Raises RuntimeError on all ranks where one exchanges something else."""
        if self.tp_group is None:
            return [value]
        found = self.tp_group.all_gather((what, value))
        names = [name for name, _ in found]
        if len({*names}) > 1:
            exchanged = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(names))
            raise RuntimeError(f"ranks of a pool exchange different things, {exchanged}: {_SAME_CALLS}")
        return [value for _, value in found]


def _failed(words: Sequence[str | None]) -> AgreedError | None:
    """Return the error of the first rank that has one; ``words`` are all ranks'."""
    found = [f"{each} (rank {rank})" for rank, each in enumerate(words) if each is not None]
    return AgreedError(found[0]) if found else None


def _report(loading: Loading) -> tuple[bool, str | None]:
    """Return whether a load is over on this rank, and why it has failed."""
    if not loading.is_over:
        return False, None
    return True, None if loading.error is None else message_of(loading.error)
