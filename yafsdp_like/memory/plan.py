"""The memory plan: every long-lived region by name and bytes, and slots placed by live range. Integers only.

[Note: live ranges]
Time is counted in ticks: one each time a module that belongs to a unit starts, through forward and then backward. A
slot's live range is the set of ticks from the start of its all-gather to the end of its last reader. Two slots may
share bytes when their live ranges do not overlap, so the slots of a chain of equal blocks take two blocks' bytes, and a
large embedding shares bytes with blocks that are not live when it is, instead of making every slot as large.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import Segment, aligned

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class LiveRange:
    """Closed intervals of ticks, ``(first, last)`` each, in which a slot's bytes are in use."""

    intervals: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        assert all(first <= last for first, last in self.intervals), f"an interval ends before it starts: {self}"

    def overlaps(self, other: LiveRange) -> bool:
        """Return whether both are live at some tick."""
        return any(a <= d and c <= b for a, b in self.intervals for c, d in other.intervals)

    def ticks(self) -> Iterable[int]:
        """Yield the ticks of every interval."""
        return (tick for first, last in self.intervals for tick in range(first, last + 1))


@dataclass(frozen=True)
class SlotRequest:
    """A slot to be placed: its name, size, and live range."""

    name: str
    nbytes: int
    live: LiveRange


def _place_in_order(requests: Sequence[SlotRequest], order: Sequence[int]) -> list[int]:
    """Place each request, in ``order``, at the lowest offset that none of those before it takes at one of its ticks."""
    offsets: dict[int, int] = {}
    for index in order:
        request = requests[index]
        taken = sorted(
            (offsets[i], offsets[i] + aligned(requests[i].nbytes))
            for i in offsets
            if request.live.overlaps(requests[i].live)
        )
        offset = 0
        for start, end in taken:
            if offset + aligned(request.nbytes) <= start:
                break
            offset = max(offset, end)
        offsets[index] = offset
    return [offsets[i] for i in range(len(requests))]


def _extent(requests: Sequence[SlotRequest], offsets: Sequence[int]) -> int:
    return max((o + aligned(r.nbytes) for r, o in zip(requests, offsets, strict=True)), default=0)


def place(requests: Sequence[SlotRequest]) -> tuple[tuple[Segment, ...], int]:
    """Place slots so that two whose live ranges overlap never share a byte.

    Greedy, lowest fitting offset first, tried once in order of size and once in the order given; the smaller result
    wins (the problem itself, dynamic storage allocation, is NP-hard). Returns a segment per request and the bytes in
    all.
    """
    by_size = sorted(range(len(requests)), key=lambda i: (-requests[i].nbytes, i))
    tries = [_place_in_order(requests, order) for order in (by_size, range(len(requests)))]
    offsets = min(tries, key=lambda offsets: _extent(requests, offsets))
    segments = tuple(Segment(o, aligned(r.nbytes)) for r, o in zip(requests, offsets, strict=True))
    return segments, _extent(requests, offsets)


def live_nbytes_peak(requests: Sequence[SlotRequest]) -> int:
    """Return the most bytes live at any one tick: no placement can take less."""
    per_tick: dict[int, int] = {}
    for request in requests:
        for tick in set(request.live.ticks()):
            per_tick[tick] = per_tick.get(tick, 0) + aligned(request.nbytes)
    return max(per_tick.values(), default=0)


@dataclass(frozen=True)
class Region:
    """A named range of memory that an arena holds for as long as the plan lives.

    Or, ``transient``, tensors that PyTorch's allocator holds for a part of every step. On the device, or the host.
    """

    name: str
    kind: str
    nbytes: int
    mapped: bool = False  # mapped by peers, who read it where it is
    granule_nbytes: int = 0  # made of whole granules of this size, which slots alias; 0: none does
    transient: bool = False
    on_host: bool = False


@dataclass(frozen=True)
class SlotPlace:
    """Where in its region one unit's slot lies, and when the plan expects it to be live."""

    name: str
    kind: str
    segment: Segment
    live: LiveRange


KINDS = {
    "main_shard": "what the optimizer updates; lower halves, where it is split",
    "compute_shard": "the same in param_dtype: what is all-gathered",
    "grad_shard": "reduced gradients, from backward to zero_grad",
    "gather slots": "units' full parameters, shared by live range",
    "gradient slots": "units' full gradients, shared by live range",
    "unsynced gradients": "full gradients kept while set_requires_gradient_sync(False)",
    "staging": "peers' chunks of gradients while they are added up",
    "host staging": "main shards and gradients on their way from and to host memory",
    "granule end": "the unused end of the last granule of the memory that peers map",
    "spill": "slots that the order of execution asked for beyond the plan",
    "weights": "served units that stay: whole, or this rank's part",
    "weight shards": "this rank's part of those that are all-gathered",
    "weight slots": "units all-gathered or streamed, shared by live range",
    "kv slabs": "keys and values, in pages",
    "workspace": "activations of one forward, shared by live range",
    "logits": "of the tokens to be drawn, and log-probabilities",
    "tables": "inputs of a step, and rotary tables",
    "host weights": "units in host memory that are streamed",
    "host kv slabs": "pages that were swapped out",
}


def readable(nbytes: int) -> str:
    """Format bytes in the largest unit that leaves at least one digit before the point."""
    value, suffixes = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while round(value, 2) >= 1024 and len(suffixes) > 1:
        value, suffixes = value / 1024, suffixes[1:]
    return f"{value:.0f} B" if suffixes[0] == "B" else f"{value:,.2f} {suffixes[0]}"


@dataclass(frozen=True)
class MemoryPlan:
    """Every region that the runtime holds on one rank, in bytes. Equal on all ranks, since shards are padded.

    ``nbytes`` is what the arenas hold once allocated (law: the plan is the truth). Beside it, ``transient_nbytes``
    are in PyTorch's allocator from backward to ``zero_grad``, as a rule where activations were. Not in the plan:
    activations, optimizer states (the optimizer), and the communication library's own buffers.
    """

    world_size: int
    regions: tuple[Region, ...]
    slots: tuple[SlotPlace, ...] = field(default=())
    transports: tuple[str, ...] = ()  # what moves bytes between the ranks, and why

    @property
    def nbytes(self) -> int:
        """Bytes of all regions that arenas hold on the device."""
        return sum(region.nbytes for region in self.regions if not (region.transient or region.on_host))

    @property
    def host_nbytes(self) -> int:
        """Bytes of regions in host memory, beside a plan that is all of the host's."""
        return sum(region.nbytes for region in self.regions if region.on_host)

    @property
    def transient_nbytes(self) -> int:
        """Bytes that PyTorch's allocator holds beside the arenas from backward to ``zero_grad``."""
        return sum(region.nbytes for region in self.regions if region.transient)

    def nbytes_of(self, kind: str) -> int:
        """Count the bytes of the regions of one kind, of those in ``KINDS``."""
        assert kind in KINDS, f"unknown kind of region: {kind}"
        return sum(region.nbytes for region in self.regions if region.kind == kind)

    def __str__(self) -> str:
        lines = [f"memory plan of one rank of {self.world_size}: {readable(self.nbytes)} ({self.nbytes:,} bytes)"]
        if self.transient_nbytes:
            lines[0] += f", and {readable(self.transient_nbytes)} from backward to zero_grad"
        if self.host_nbytes:
            lines[0] += f", and {readable(self.host_nbytes)} in host memory"
        lines += [f"  over {transport}" for transport in self.transports]
        for kind, meaning in KINDS.items():
            regions = [r for r in self.regions if r.kind == kind and r.nbytes]
            if not regions:
                continue
            count = f"{len(regions)} regions" if len(regions) > 1 else "1 region"
            meaning = ("in host memory: " if all(r.on_host for r in regions) else "") + meaning
            lines.append(f"  {kind:<18} {readable(sum(r.nbytes for r in regions)):>12}   {count:<12} {meaning}")
            lines += self._slot_lines(kind)
        return "\n".join(lines)

    def _slot_lines(self, kind: str) -> list[str]:
        """One line per distinct place, naming the units that share it: ``[offset, end)  units``."""
        places: dict[tuple[int, int], list[str]] = {}
        for slot in self.slots:
            if slot.kind == kind:
                places.setdefault((slot.segment.offset_nbytes, slot.segment.end_nbytes), []).append(slot.name)
        return [f"    [{start:>13,}, {end:>13,})  {_names(names)}" for (start, end), names in sorted(places.items())]


def _names(names: Sequence[str], most: int = 4) -> str:
    first = ", ".join(names[:most])
    return first if len(names) <= most else f"{first}, ... ({len(names)} units)"
