"""The weights of one model of a pool: they arrive at fixed places unit by unit, and a forward waits for each.

Owns the copies from the host and their order. Which slabs a model has, and when, is `residence.py`'s.

[Note: units on their way]
Units are copied in the order in which a forward reads them, on a stream of copies of their own: behind all that was
issued to ``COMPUTE`` before, which may read or write these bytes. A forward waits for each unit where it first reads
it, so that it computes with the first ones while the last are on their way. A recording of a step cannot: as long as
units are on their way steps are issued kernel by kernel, which changes no bits, and recordings hold no such wait. Units
have arrived when the pool says so, to all ranks that compute together (``ranks.py``).

[Note: pulls]
Of a unit that comes in parts (``plan.py``, [Note: whole on all ranks]) a rank's copy is followed by a pull, on a stream
of its own and between two stream barriers: behind the first all ranks' parts are there, behind the second all have
pulled, so that whatever is written there next, by any rank, is behind the pulls of all.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from yafsdp_like.checkpoint.safetensors import hold_files
from yafsdp_like.inference.pool.plan import SLABS, ModelPlan
from yafsdp_like.inference.weights.loading import Source, fill
from yafsdp_like.inference.weights.store import Store, Weights, flat_bytes
from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.streams import COMPUTE, GATHER, HOST_TO_DEVICE, Event, Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from yafsdp_like.comm.mapped_memory import MappedMemory
    from yafsdp_like.memory.arena import Arena, Place


class PooledWeights(Weights):
    """Weights at their home on ``arena``, see [Note: units on their way]; what is there is for others to know."""

    def __init__(
        self, plan: ModelPlan, arena: Arena, host: Arena, streams: Streams, mapped: MappedMemory | None = None
    ) -> None:
        """``mapped`` is the memory of ranks whose units come in parts, the arena's slabs among it."""
        first_nbytes = plan.home.start * plan.serving.grid.slab_nbytes
        self._home, self._units = arena.place(SLABS).part(Segment(first_nbytes, plan.home_nbytes)), plan.units
        self._host_units = plan.host_units
        self._arriving: dict[int, Event] = {}  # units on their way, in order
        self._last_copy: Event | None = None
        self._image: list[list[Store]] = []  # pieces of each unit, on the host
        super().__init__(plan.serving, arena, host, None, streams)
        self._places = [flat_bytes(self._home.part(unit)) for unit in self._units]
        self._mapped = mapped
        self._pulls: dict[int, Callable[[], None]] = {}  # of units that come in parts
        if mapped is not None:
            places = enumerate(self._places)
            self._pulls = {u: mapped.pull_chunks(place) for u, place in places if plan.is_pulled(u)}
        with streams.on(GATHER):
            for pull in self._pulls.values():
                pull()  # of nothing yet; what is recorded is recorded now
        streams.wait(COMPUTE, streams.record(GATHER))

    def _whole(self, unit: int) -> Place:
        return self._home.part(self._units[unit])

    @hold_files()
    def read(self, image: Sequence[Place], source: Source) -> None:
        """Read all units from ``source`` into ``image``, in any thread: nothing else of this object is touched."""
        watched = self.watched(source)
        for pieces in self._pieces(image):
            for piece in pieces:
                fill(piece, watched)
        self.finish_loading()

    def attach(self, image: Sequence[Place]) -> None:
        """Bring units from ``image``, which is whole, from now on."""
        self._image = self._pieces(image)

    def _pieces(self, image: Sequence[Place]) -> list[list[Store]]:
        """Return each unit's pieces of the places of an image, which hold all units' bytes back to back."""
        found: list[list[Store]] = [[] for _ in self._units]
        starts = [self.rank * part.nbytes if unit in self._pulls else 0 for unit, part in enumerate(self._host_units)]
        begin = 0  # of a place, in the image
        for place in image:
            end = begin + place.segment.nbytes
            for pieces, part, start, packed in zip(
                found, self._host_units, starts, self.plan.placement.packed_units, strict=True
            ):
                first, last = max(begin, part.offset_nbytes), min(end, part.end_nbytes)
                if first < last:
                    values = flat_bytes(place.part(Segment(first - begin, last - first)))
                    pieces.append(Store(packed, start + first - part.offset_nbytes, values, self.rank))
            begin = end
        return found

    def unload(self) -> None:
        """Forget the image, whose bytes may then be another's; blocks the CPU while copies of it are under way."""
        if self._last_copy is not None:
            self._streams.synchronize(self._last_copy)
        self._image = []

    # --- on their way ---

    def copy_in(self, unit: int) -> None:
        """Issue the copy of a unit, and the pull of its other parts, behind all that was issued before."""
        self._streams.wait(HOST_TO_DEVICE, self._streams.record(COMPUTE))
        with self._streams.on(HOST_TO_DEVICE):
            for piece in self._image[unit]:
                self._places[unit][piece.start_nbytes :][: len(piece.values)].copy_(piece.values, non_blocking=True)
        self._arriving[unit] = self._last_copy = self._streams.record(HOST_TO_DEVICE)
        if unit in self._pulls:
            self._arriving[unit] = self._pull(unit)

    def _pull(self, unit: int) -> Event:
        """See [Note: pulls]."""
        assert self._mapped is not None, "ranks that pull map each other's memory"
        self._streams.wait(GATHER, self._arriving[unit])
        with self._streams.on(GATHER):
            self._mapped.stream_barrier(GATHER)
            self._pulls[unit]()
            self._mapped.stream_barrier(GATHER)
        pulled = self._streams.record(GATHER)
        self._mapped.arm_watchdog(pulled)
        return pulled

    def num_arriving(self) -> int:
        """Return how many units no forward has waited for, and are not known to be there."""
        return len(self._arriving)

    def is_arriving(self) -> bool:
        """Return whether a step must be issued kernel by kernel, so that it waits for each unit."""
        return bool(self._arriving)

    def count_arriving(self) -> int:
        """Return how many of these units have not arrived on this rank by now."""
        num_complete = sum(1 for _ in takewhile(self._streams.is_complete, self._arriving.values()))
        return len(self._arriving) - num_complete

    def note_arrivals(self, num_arriving: int) -> None:
        """Take in that all units but the last ``num_arriving`` are there."""
        for unit in [*self._arriving][: len(self._arriving) - num_arriving]:
            del self._arriving[unit]

    def let_go(self) -> None:
        """Have all that is issued from now on come behind the copies that are under way, into bytes now others'."""
        for event in self._arriving.values():
            self._streams.wait(COMPUTE, event)
        self._arriving.clear()

    def _acquire(self, unit: int) -> None:
        event = self._arriving.pop(unit, None)
        if event is not None:
            self._streams.wait(COMPUTE, event)
