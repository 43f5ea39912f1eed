"""Which models of a pool are on their way into host memory, and what becomes of the bytes when they get there or not.

Owns the books of loads; `loading.py` reads, `host_weights.py` gives out bytes.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.pool.host_weights import HostFullError
from yafsdp_like.inference.pool.loading import Loading

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from yafsdp_like.inference.pool.host_weights import HostWeights
    from yafsdp_like.inference.pool.member import Member
    from yafsdp_like.inference.pool.ranks import PoolRanks
    from yafsdp_like.inference.weights.loading import Model, Source

LOOK_S = 0.01  # between two looks at a load that somebody waits for
LAST_READ_S = 5.0  # for what is being read when a pool is closed
UNWANTED_LOAD_S = 600.0  # for which a load goes on after the last request that wanted it has left


class Loads:
    """Loads of a pool's models. Not safe for threads: those that read touch none of this."""

    def __init__(self, host_weights: HostWeights, device: torch.device, ranks: PoolRanks) -> None:
        self._host_weights, self._device, self._ranks = host_weights, device, ranks
        self._cancelled: list[Loading] = []  # that may still be read

    def start(self, member: Member, others: Iterable[Member], on_demand: bool, waits: bool = False) -> bool:
        """Begin to read a model, unless it is there or on its way; return whether it begins now.

        Raises HostFullError where there is no room, and then cancels the loads of ``others`` that nobody wants: their
        bytes are free soon. ``on_demand``: for requests, unless somebody asks otherwise meanwhile. ``waits``: where
        loads that are cancelled hold the room that is missing, wait for them.
        """
        if member.image is not None:
            return False
        if member.loading is not None:
            member.loading.on_demand &= on_demand
            return False
        try:
            image = self._host_weights.put(member.name, member.plan.image_nbytes)
        except HostFullError:
            self.give_up(others)
            if waits:
                self.wait_for_cancelled()
            image = self._host_weights.put(member.name, member.plan.image_nbytes)
        read = partial(member.weights.read, image.places)
        member.failure = None
        member.loading = Loading(image, partial(_open, member.model, self._device), read, on_demand)
        return True

    def wait(self, member: Member, watch: Callable[[], object]) -> None:
        """Wait until a model is no longer read, and call ``watch`` now and then; what it raises ends this on all ranks.

        If anything is raised meanwhile only requests may want it yet: without any the load is cancelled.
        """
        try:
            while member.loading is not None:
                is_over, error = member.loading.wait(LOOK_S), None
                if not is_over:
                    error = _error_of(watch)
                if self._ranks.all_over(is_over, error):
                    return
        except BaseException:
            if member.loading is not None:
                member.loading.on_demand = True
            self.give_up((member,))
            raise

    def wait_a_little(self, members: Collection[Member]) -> None:
        """Wait until the next look at loads that requests wait for, or that are over here, but not on another rank."""
        wanted = [each.loading for each in members if each.loading is not None and each.engine.has_work]
        if wanted and not wanted[0].is_over:
            wanted[0].wait(LOOK_S)
        elif wanted or self.has_ended(members):
            time.sleep(LOOK_S)

    def wait_for_cancelled(self) -> None:
        """Wait until no load that was cancelled holds room."""
        while self._cancelled:
            self._cancelled[0].wait(LOOK_S)
            self.settle(())

    def cancel(self, member: Member) -> None:
        """Read a model no further, if it is being read; its bytes are free once nobody writes them."""
        if member.loading is not None:
            member.loading.cancel()
            self._cancelled.append(member.loading)
            member.loading = None

    def close(self, members: Iterable[Member]) -> None:
        """Cancel all loads, and wait until none is read, or no longer than ``LAST_READ_S``.

        What a file system still writes then lies in memory that the load keeps.
        """
        for member in members:
            self.cancel(member)
        until = time.monotonic() + LAST_READ_S
        for loading in self._cancelled:
            loading.wait(max(0.0, until - time.monotonic()))

    def give_up(self, members: Iterable[Member]) -> None:
        """Cancel loads that were wanted by requests alone, which have all left."""
        for member in members:
            if member.is_unwanted:
                self.cancel(member)

    def settle(self, members: Iterable[Member]) -> list[Member]:
        """Take in which loads have ended since the last call, and return the models that have failed.

        A load that nobody has wanted for ``UNWANTED_LOAD_S`` is cancelled: until then it goes on, so that clients that
        soon give up still get the model in the end.
        """
        loading = {member.loading: member for member in members if member.loading is not None}
        if not (loading or self._cancelled):
            return []
        ended = self._ranks.ended([*self._cancelled, *loading])
        for cancelled in [each for each in self._cancelled if each in ended]:
            self._cancelled.remove(cancelled)
            self._host_weights.drop(cancelled.image)
        failed = []
        for each, member in loading.items():
            if each not in ended:
                continue
            member.loading, member.failure = None, ended[each]
            if member.failure is None:
                member.image = each.image
                member.weights.attach(each.image.places)
            else:
                self._host_weights.drop(each.image)
                failed.append(member)
        self._cancel_unwanted([member for each, member in loading.items() if each not in ended])
        return failed

    def _cancel_unwanted(self, members: Sequence[Member]) -> None:
        """Cancel loads under way that nobody has wanted for ``UNWANTED_LOAD_S``."""
        now = self._ranks.called_at() if members else 0.0
        for member in members:
            assert member.loading is not None
            if not member.is_unwanted or member.loading.wanted_at is None:
                member.loading.wanted_at = now
            elif now - member.loading.wanted_at >= UNWANTED_LOAD_S:
                self.cancel(member)

    def has_ended(self, members: Iterable[Member]) -> bool:
        """Return whether ``settle`` may have anything to take in: any load is over on this rank."""
        under_way = [*self._cancelled, *(member.loading for member in members if member.loading is not None)]
        return any(loading.is_over for loading in under_way)

    def drop(self, member: Member) -> None:
        """Free the bytes of a model that is on the host alone."""
        if member.image is not None:
            member.weights.unload()
            self._host_weights.drop(member.image)
            member.image = None


def _error_of(act: Callable[[], object]) -> Exception | None:
    try:
        act()
    except Exception as error:
        return error
    return None


def _open(model: Model, device: torch.device) -> Source:
    """Open where the values come from, in the thread of a load: each thread has a current GPU of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return model.source(device)
