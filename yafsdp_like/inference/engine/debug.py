"""Debug mode of serving: pages that were freed hold NaN, and whoever writes to one, or reads one, is an error.

Owns what is checked around every step, for which it waits for the device; off unless ``EngineOptions.debug``, or the
environment variable ``YAFSDP_DEBUG``, says so. The marks in memory are those of ``memory/guards.py``.

[Note: freed pages]
Which pages are free is read off the pool once a step, when the device has done all that was issued. A page that is
free then, and was not at the step before, is filled with NaN, and remembered with the request that had it last. Before
the next step is issued all of them must be as they were left; those that have been taken since are remembered no more.
Engines that share a pool share what is remembered. A page that is read all the same makes logits NaN.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.kv.kv_cache import Tier
from yafsdp_like.inference.kv.kv_sequence import NO_PAGE, KVSequenceState
from yafsdp_like.inference.plan.guards import GUARD
from yafsdp_like.memory.guards import damage_of, fill_guard, poison, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from yafsdp_like.inference.engine.batch import ActiveRequest, Batch
    from yafsdp_like.inference.engine.places import EnginePlaces
    from yafsdp_like.inference.engine.runner import Launched
    from yafsdp_like.inference.kv.pages import PagePool
    from yafsdp_like.inference.kv.slabs import PageShape
    from yafsdp_like.inference.weights.store import Weights

PageName = tuple["PageShape", int]
_NUM_TOLD = 4  # steps, in an error


class _FreedPages:
    """The pages of one pool that were freed and poisoned, and have not been taken since."""

    def __init__(self, pool: PagePool, region: torch.Tensor) -> None:
        self._pool_ref, self._region = weakref.ref(pool), region  # the pool is what this is found by
        self._used: set[PageName] = self._in_use()
        self._poisoned: dict[PageName, tuple[int, str]] = {}  # how often its slab was written then, and who had it
        self.owners: dict[PageName, str] = {}  # requests

    @property
    def _pool(self) -> PagePool:
        pool = self._pool_ref()
        assert pool is not None, "an engine outlives its pool"
        return pool

    def _in_use(self) -> set[PageName]:
        return {(shape, page) for shape, stock in self._pool.stocks.items() for page in stock.pages}

    def _bytes(self, name: PageName) -> torch.Tensor:
        """Return the bytes of a page, as floating-point numbers of no matter which dtype."""
        shape, page = name
        return self._region[page * shape.nbytes : (page + 1) * shape.nbytes].view(torch.bfloat16)

    def written(self) -> Iterator[str]:
        """Yield what was written since it was poisoned, in words; the pages are poisoned again."""
        slabs = self._pool.slabs
        for name, (times, had) in list(self._poisoned.items()):
            shape, page = name
            slab = self._pool.grid.slab_of(page, shape)
            lease, lent = slabs.leases.get(slab), slabs.num_written[slab] - times
            if lent and not (lent == 1 and lease is not None and lease.shape == shape):
                del self._poisoned[name]  # the bytes have been another shape's, or no pages'
            elif written(self._bytes(name)):
                poison(self._bytes(name))
                yield f"page {page} of {shape}, which was freed by {had}"
            else:
                self._poisoned[name] = times + lent, had

    def take_note(self) -> None:
        """Remember no more what was taken since."""
        for name in self._in_use():
            self._poisoned.pop(name, None)
            self._used.add(name)

    def poison_freed(self) -> None:
        """Poison what was freed since the last time."""
        used = self._in_use()
        for name in self._used - used:
            shape, page = name
            had = self.owners.pop(name, "a request that has ended")
            slabs, slab = self._pool.slabs, self._pool.grid.slab_of(page, shape)
            lease = slabs.leases.get(slab)
            if slab not in slabs.claimed and (lease is None or lease.shape == shape):  # else the bytes are others' now
                poison(self._bytes(name))
                self._poisoned[name] = slabs.num_written[slab], had
        self._used = used


_freed: weakref.WeakKeyDictionary[PagePool, _FreedPages] = weakref.WeakKeyDictionary()  # by pool, see the note


class StepDebugger:
    """The checks around the steps of one engine, of whose open requests it is given the dictionary.

    All raise ``RuntimeError`` for what is wrong.
    """

    def __init__(
        self,
        weights: Weights,
        places: EnginePlaces,
        requests: Mapping[str, ActiveRequest],
        check_books: Callable[[], None],
    ) -> None:
        self._check_books = check_books
        self._device, self._requests, self._groups = weights.device, requests, weights.plan.groups
        self._logits = places.buffers.logits.logits
        self._pools = {
            tier: _freed.setdefault(pool, _FreedPages(pool, places.regions[tier]))
            for tier, pool in places.pools.items()
        }
        self._guards: dict[str, torch.Tensor] = {}
        for name, region in weights.arena.regions.items():
            if name.endswith(GUARD):
                guard = weights.arena.place(name).tensor(torch.uint8, (region.nbytes,))
                fill_guard(guard)
                self._guards[name.removesuffix(GUARD)] = guard
        self._ran: deque[str] = deque(maxlen=_NUM_TOLD)

    def around(self, issue: Callable[[Batch], Launched | None], batch: Batch) -> Launched | None:
        """Issue a step, with checks before and behind it."""
        self.before_copies()
        self._ran.append("a step of " + (", ".join(repr(run.sequence.request.id) for run in batch.runs) or "copies"))
        launched = issue(batch)
        self._after(launched)
        self._check_books()
        return launched

    def before_copies(self) -> None:
        """Check freed pages before others are copied, perhaps to some of them."""
        self._wait()
        for tier, pages in self._pools.items():
            for page in pages.written():
                raise self._error(
                    f"{page}, was written on the {tier.name.lower()} after that",
                    "a page table still has it, or a kernel writes to a wrong page",
                )
            pages.take_note()

    def _after(self, launched: Launched | None) -> None:
        """Check what a step has left, once it is done, and poison pages that were freed."""
        self._wait()
        for name, guard in self._guards.items():
            damage = damage_of(guard, f"region {name!r}", "the next region")
            if damage is not None:
                raise self._error(damage, "a kernel or an index with another number of elements than is there")
        for row, run in enumerate(() if launched is None else launched.drawing):
            if bool(self._logits[row].isnan().any()):
                raise self._error(
                    f"the logits of request {run.sequence.request.id!r} hold NaN",
                    "its page tables have a page that was freed, unless the model computes NaN",
                )
        for pages in self._pools.values():
            pages.take_note()  # of pages of images, which are taken while a step is issued
            pages.poison_freed()
        self._note_owners()

    def _note_owners(self) -> None:
        for request in self._requests.values():
            kv = request.kv
            if kv is None:
                continue
            pages = self._pools[Tier.DEVICE if kv.state is KVSequenceState.RESIDENT else Tier.HOST]
            for group, table in enumerate(kv.tables):
                for page in table:
                    if page != NO_PAGE:
                        pages.owners[self._groups[group].shape, page] = f"request {request.request.id!r}"

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _error(self, what: str, cause: str) -> RuntimeError:
        return RuntimeError(f"debug mode: {what}. Probable cause: {cause}. What ran last: {'; '.join(self._ran)}")
