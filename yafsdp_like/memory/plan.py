"""The memory plan: every long-lived region by name and bytes, and slots placed by live range. Integers only.

[Note: live ranges]
Time is counted in ticks: one each time a module that belongs to a unit starts, through forward and then backward. A
slot's live range is the set of ticks from the start of its all-gather to the end of its last reader. Two slots may
share bytes when their live ranges do not overlap, so the slots of a chain of equal blocks take two blocks' bytes, and a
large embedding shares bytes with blocks that are not live when it is, instead of making every slot as large.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import Segment, aligned

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


MAX_ROUNDS = 40  # in which slots are placed anew, in search of a smaller region
MAX_PLACED = 20_000  # slots placed in all of them


@dataclass(frozen=True)
class LiveRange:
    """Closed intervals of ticks, ``(first, last)`` each, in which a slot's bytes are in use."""

    intervals: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        assert all(first <= last for first, last in self.intervals), f"an interval ends before it starts: {self}"

    def overlaps(self, other: LiveRange) -> bool:
        """Return whether both are live at some tick."""
        return any(a <= d and c <= b for a, b in self.intervals for c, d in other.intervals)

    @property
    def num_ticks(self) -> int:
        """Ticks of all intervals."""
        return sum(last - first + 1 for first, last in self.intervals)

    def ticks(self) -> Iterable[int]:
        """Yield the ticks of every interval."""
        return (tick for first, last in self.intervals for tick in range(first, last + 1))


@dataclass(frozen=True)
class SlotRequest:
    """A slot to be placed: its name, size, and live range."""

    name: str
    nbytes: int
    live: LiveRange


class _Neighbours:
    """Finds the requests that are live together with one, without comparing it with all others."""

    def __init__(self, requests: Sequence[SlotRequest]) -> None:
        self._requests = requests
        spans = sorted((first, last, i) for i, r in enumerate(requests) for first, last in r.live.intervals)
        self._starts = [first for first, _, _ in spans]
        self._started = [i for _, _, i in spans]
        self._live_at: dict[int, list[int]] = {}  # by tick at which some request starts
        live: list[tuple[int, int]] = []
        for first, last, i in spans:
            live = [(end, other) for end, other in live if end >= first] + [(last, i)]
            self._live_at[first] = [other for _, other in live]

    def of(self, index: int) -> set[int]:
        """Return the requests whose live ranges overlap that of ``index``, by their numbers; it is one of them."""
        found: set[int] = set()
        for first, last in self._requests[index].live.intervals:
            started = self._started[bisect_left(self._starts, first) : bisect_right(self._starts, last)]
            found.update(started, self._live_at[first])
        return found


def _lowest(taken: Iterable[tuple[int, int]], nbytes: int) -> int:
    """Return the lowest offset from which ``nbytes`` are free; ``taken`` are ranges, sorted."""
    offset = 0
    for start, end in taken:
        if offset + nbytes <= start:
            break
        offset = max(offset, end)
    return offset


@dataclass
class _Placing:
    """Places requests one by one: at the lowest free offset, or from both ends of a region by turns."""

    requests: Sequence[SlotRequest]
    neighbours: _Neighbours
    height_nbytes: int  # of the region; what does not fit below it is placed above

    def in_order(self, order: Sequence[int], both_ends: bool) -> list[int]:
        """Return offsets; with ``both_ends`` a request lies at the end other than its latest neighbour's."""
        sizes = [aligned(request.nbytes) for request in self.requests]
        offsets: dict[int, int] = {}
        at_top: dict[int, bool] = {}
        turns: dict[int, int] = {}
        for turn, index in enumerate(order):
            near = [i for i in self.neighbours.of(index) if i in offsets]
            taken = sorted((offsets[i], offsets[i] + sizes[i]) for i in near)
            latest = max(near, key=turns.__getitem__, default=None)
            at_top[index] = both_ends and latest is not None and not at_top[latest]
            if at_top[index]:
                from_top = sorted((self.height_nbytes - end, self.height_nbytes - start) for start, end in taken)
                offsets[index] = self.height_nbytes - _lowest(from_top, sizes[index]) - sizes[index]
                at_top[index] = offsets[index] >= 0
            if not at_top[index]:
                offsets[index] = _lowest(taken, sizes[index])
            turns[index] = turn
        return [offsets[i] for i in range(len(self.requests))]

    def best(self, order: Sequence[int], both_ends: bool, rounds: int) -> tuple[int, list[int]]:
        """Return the fewest bytes of several rounds, and the offsets; what ended highest goes first in the next."""
        order, found = list(order), list[tuple[int, list[int]]]()
        for _ in range(rounds):
            offsets = self.in_order(order, both_ends)
            ends = [offset + aligned(request.nbytes) for request, offset in zip(self.requests, offsets, strict=True)]
            found.append((max(ends), offsets))
            if max(ends) == self.height_nbytes:
                break
            highest = ends.index(max(ends))
            order.remove(highest)
            order.insert(0, highest)
        return min(found, key=lambda one: one[0])


def place(requests: Sequence[SlotRequest]) -> tuple[tuple[Segment, ...], int]:
    """Place slots so that two whose live ranges overlap never share a byte.

    Returns a segment per request and the bytes in all. The problem (dynamic storage allocation) is NP-hard; what is
    tried, until a region of ``live_nbytes_peak`` bytes is found, is deterministic: the lowest free offset in order of
    size and in the order given; then both ends of a region by turns, those that are live longest first, which suits
    chains of unequal units; and these again with what ended highest placed first.
    """
    if not requests:
        return (), 0
    numbers, least = range(len(requests)), live_nbytes_peak(requests)
    placing = _Placing(requests, _Neighbours(requests), least)
    by_size = sorted(numbers, key=lambda i: (-requests[i].nbytes, i))
    by_time = sorted(numbers, key=lambda i: (-requests[i].live.num_ticks, requests[i].live.intervals[0], i))
    rounds = max(min(MAX_ROUNDS, MAX_PLACED // len(requests)), 1)
    tries = (
        (by_size, False, 1),
        (numbers, False, 1),
        (by_time, True, rounds),
        (by_size, False, rounds),
        (by_size, True, rounds),
    )
    found: list[tuple[int, list[int]]] = []
    for order, both_ends, most in tries:
        found.append(placing.best(order, both_ends, most))
        if found[-1][0] == least:
            break
    nbytes, offsets = min(found, key=lambda one: one[0])
    return tuple(Segment(o, aligned(r.nbytes)) for r, o in zip(requests, offsets, strict=True)), nbytes


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


@dataclass(frozen=True)
class Phase:
    """Ticks from ``first`` to ``last``, by what runs in them."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Clock:
    """What the ticks of some kinds of slots count: phases that follow each other, from tick 0 on."""

    kinds: tuple[str, ...]
    phases: tuple[Phase, ...]


_UNTIL_ZERO_GRAD = "from backward to zero_grad"
KINDS = {
    "main_shard": "what the optimizer updates; lower halves, where it is split",
    "remainder": "lower halves of what the optimizer updates, which copies them to the device and back",
    "compute_shard": "the same in param_dtype: what is all-gathered",
    "grad_shard": f"reduced gradients, {_UNTIL_ZERO_GRAD}",
    "forward shards": "what few ranks keep together of full parameters, from forward to backward",
    "gather slots": "units' full parameters, shared by live range",
    "gradient slots": "units' full gradients, shared by live range",
    "unsynced gradients": "full gradients kept while set_requires_gradient_sync(False)",
    "staging": "peers' chunks of gradients while they are added up",
    "host staging": "main shards and gradients on their way from and to host memory",
    "layout staging": "parameters not sharded by rows, on their way to and from their places in slots",
    "granule end": "the unused end of the last granule of the memory that peers map",
    "spill": "slots that the order of execution asked for beyond the plan",
    "weights": "served units that stay: whole, or this rank's part",
    "weight shards": "this rank's part of those that are all-gathered",
    "weight slots": "units all-gathered or streamed, shared by live range",
    "kv slabs": "keys and values, in pages",
    "slabs": "weights of models that are awake, at these bytes, and keys and values in pages",
    "workspace": "activations of one forward, shared by live range",
    "logits": "of the tokens to be drawn, and log-probabilities",
    "adapter slots": "LoRA adapters that running requests use",
    "tables": "inputs of a step, and rotary tables",
    "host weights": "weights in host memory, as they lie on the device, from where they are streamed",
    "workspace guards": "bytes behind regions that nobody may write, in debug mode",
    "host kv slabs": "pages that were swapped out",
    "adapter images": "LoRA adapters in host memory, as they lie in slots",
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
    are in PyTorch's allocator from backward to ``zero_grad``, as a rule where activations were; or for good once
    recorded steps add to gradients (``keeps_gradients``). Not in the plan: activations, optimizer states (the
    optimizer), and the communication library's own buffers.
    ``launch.slot_map.draw(plan, "map.html")`` draws when each slot is live, and where.
    """

    world_size: int
    regions: tuple[Region, ...]
    slots: tuple[SlotPlace, ...] = field(default=())
    transports: tuple[str, ...] = ()  # what moves bytes between the ranks, and why
    keeps_gradients: bool = False  # whether recorded steps add to gradients
    clocks: tuple[Clock, ...] = ()  # of the slots, by kind
    debug_nbytes: int = 0  # of all regions, that are there in debug mode only
    shared_by: tuple[str, ...] = ()  # the models whose slots and staging are in the same regions

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

    def phases_of(self, kind: str) -> tuple[Phase, ...]:
        """Return what the ticks of slots of this kind count; nothing where they share bytes by no schedule."""
        return next((clock.phases for clock in self.clocks if kind in clock.kinds), ())

    def __str__(self) -> str:
        lines = [f"memory plan of one rank of {self.world_size}: {readable(self.nbytes)} ({self.nbytes:,} bytes)"]
        if self.transient_nbytes:
            until = "for good, since recorded steps add to gradients" if self.keeps_gradients else _UNTIL_ZERO_GRAD
            lines[0] += f", and {readable(self.transient_nbytes)} {until}"
        if self.host_nbytes:
            lines[0] += f", and {readable(self.host_nbytes)} in host memory"
        lines += [f"  over {transport}" for transport in self.transports]
        if self.shared_by:
            lines.append(f"  slots and staging shared by {', '.join(self.shared_by)}")
        if self.debug_nbytes:
            lines.append(
                f"  {readable(self.debug_nbytes)} of them for debug mode: guard bytes, and slots of units' own"
            )
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
