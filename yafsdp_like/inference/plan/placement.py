"""Where the weights of a served model lie: which units are resident on a device, and which are copied there when used.

Integers only. A non-resident unit is all-gathered from the ranks that hold a part each, or streamed from host memory,
into a slot that it shares with others by live range (`memory/plan.py`). Where ranks compute together, each keeps its
part.

[Note: around the end]
Forwards follow each other, so the order of non-resident units is a circle: while one is in use the next is prefetched,
and while the last one is, the first one for the forward after. The bytes of a slot are spoken for from the start of the
use before its own to the end of its own.

[Note: own parts]
A rank has its own part of an all-gathered unit already. Where ranks map each other's memory, a slot holds the others'
parts alone, and the unit is whole in a range of addresses that maps the slot's granules, with those of this rank's
shard between them (``memory/vmm.py``, [Note: aliased granules]). So parts are whole granules there, padded by less than
one in ``MIN_GRANULES_PER_PART``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from yafsdp_like.inference.plan.packed_weights import EMBEDDING, HEAD, PackedUnit, uses_of
from yafsdp_like.inference.plan.quantized_fields import stored_units
from yafsdp_like.memory import vmm
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, Segment, aligned
from yafsdp_like.memory.plan import Clock, LiveRange, Phase, Region, SlotPlace, SlotRequest, live_nbytes_peak, place
from yafsdp_like.models.tensor_parallel import cuts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from yafsdp_like.models.decoder import DecoderConfig

Mode = Literal["resident", "gathered", "streamed", "tensor_parallel"]
WEIGHT_SLOTS = "weight slots"  # a kind, and its region's name
MIN_GRANULES_PER_PART = 8  # of each part, where parts are made of granules
_ENOUGH_GRANULES = 64  # then granules are twice as large, since each is an allocation of its own, and a descriptor


@dataclass(frozen=True)
class Placement:
    """Which units stay on the device, and which are moved there when they are needed."""

    mode: Mode
    packed_units: tuple[PackedUnit, ...]
    uses: tuple[int, ...]  # unit of each step of a forward, see ``uses_of``
    non_resident: frozenset[int] = frozenset()  # units
    num_ranks: int = 1
    maps_memory: bool = False

    def part_nbytes(self, unit: int) -> int:
        """Return the bytes that this rank, or its host, holds of a unit that is moved."""
        return aligned(self.packed_units[unit].part_nbytes(self.num_ranks), self.granule_nbytes or ALIGNMENT_NBYTES)

    def slot_nbytes(self, unit: int) -> int:
        """Return the bytes that are moved, and that the slot holds: all parts, less this rank's if it is aliased."""
        return self.part_nbytes(unit) * (self.num_ranks - 1 if self.granule_nbytes else self.num_ranks)

    @cached_property
    def granule_nbytes(self) -> int:
        """Of the granules that parts are made of; 0 where they are too small for that, or are not aliased."""
        if not (self.maps_memory and self.non_resident):
            return 0
        num_granules = (
            min(self.packed_units[unit].part_nbytes(self.num_ranks) for unit in self.non_resident) // vmm.GRANULE_NBYTES
        )
        doublings = max(num_granules // _ENOUGH_GRANULES, 1).bit_length() - 1
        return vmm.GRANULE_NBYTES << doublings if num_granules >= MIN_GRANULES_PER_PART else 0

    @cached_property
    def runs(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Moved units in the order of a forward, each with its steps in a row; the first follows the last.

        A tied head and the next forward's embedding are one run.
        """
        found: list[tuple[int, tuple[int, ...]]] = []
        for step, unit in enumerate(self.uses):
            if unit in self.non_resident:
                found.append((unit, (step,)))
        if len(found) > 1 and found[0][0] == found[-1][0]:
            last = found.pop()
            found[0] = (last[0], (*last[1], *found[0][1]))
        return tuple(found)

    def following(self, unit: int) -> tuple[int, ...]:
        """Return the other moved units, in the order in which they are used after ``unit``."""
        order = [moved for moved, _ in self.runs]
        place = order.index(unit)
        return (*order[place + 1 :], *order[:place])

    def live_ranges(self) -> dict[int, LiveRange]:
        """Return when each moved unit's slot is live: from the start of the use before to the end of its own.

        Ranges go around the end of a forward into the next.
        """
        end = len(self.uses) - 1
        ranges = {}
        for index, (unit, steps) in enumerate(self.runs):
            first, last = self.runs[index - 1][1][0], steps[-1]
            alone = len(self.runs) == 1
            around = ((0, last), (first, end)) if first > last else ((first, last),)
            ranges[unit] = LiveRange(((0, end),) if alone else around)
        return ranges

    @cached_property
    def _requests(self) -> tuple[SlotRequest, ...]:
        live = self.live_ranges()
        return tuple(SlotRequest(self.packed_units[u].name, self.slot_nbytes(u), live[u]) for u, _ in self.runs)

    @cached_property
    def slots(self) -> tuple[dict[int, Segment], int]:
        """Where each moved unit's slot lies, and the bytes of all."""
        segments, nbytes = place(self._requests)
        return dict(zip([unit for unit, _ in self.runs], segments, strict=True)), nbytes

    @cached_property
    def resident_nbytes(self) -> int:
        """What weights take on the device, without slots."""
        parts = sum(self.part_nbytes(u) for u in self.non_resident) if self.mode == "gathered" else 0
        return parts + sum(packed.nbytes for u, packed in enumerate(self.packed_units) if u not in self.non_resident)

    @property
    def nbytes_at_least(self) -> int:
        """What weights take on the device, if slots can be placed without a gap."""
        return self.resident_nbytes + live_nbytes_peak(self._requests)

    @property
    def nbytes(self) -> int:
        """What weights take on the device."""
        return self.resident_nbytes + self.slots[1]

    def regions(self) -> Iterator[Region]:
        """Yield the regions on the device."""
        for unit, packed in enumerate(self.packed_units):
            if unit not in self.non_resident:
                yield Region(packed.name, "weights", packed.nbytes)
            elif self.mode == "gathered":
                nbytes = self.part_nbytes(unit)
                yield Region(f"{packed.name}.shard", "weight shards", nbytes, self.maps_memory, self.granule_nbytes)
        if self.non_resident:
            yield Region(WEIGHT_SLOTS, WEIGHT_SLOTS, self.slots[1], granule_nbytes=self.granule_nbytes)

    def host_regions(self) -> Iterator[Region]:
        """Yield a region in host memory for each streamed unit."""
        if self.mode == "streamed":
            for unit in sorted(self.non_resident):
                yield Region(self.packed_units[unit].name, "host weights", self.part_nbytes(unit))

    @property
    def clock(self) -> Clock:
        """What the ticks of weight slots count: the steps of a forward."""
        end = len(self.uses) - 1
        return Clock((WEIGHT_SLOTS,), (Phase(EMBEDDING, 0, 0), Phase("layers", 1, end - 1), Phase(HEAD, end, end)))

    def slot_places(self) -> Iterator[SlotPlace]:
        """Yield each moved unit's slot, as a plan prints it."""
        live = self.live_ranges()
        for unit, segment in self.slots[0].items():
            yield SlotPlace(self.packed_units[unit].name, WEIGHT_SLOTS, segment, live[unit])


def placements(
    config: DecoderConfig, dtype: torch.dtype, mode: Mode, num_ranks: int = 1, maps_memory: bool = False
) -> Iterator[Placement]:
    """Yield all placements that are considered, from the one that moves least.

    Raises ValueError where the mode is not possible.
    """
    if mode == "tensor_parallel":
        yield _tensor_parallel(config, dtype, num_ranks)
        return
    packed_units = stored_units(config, dtype)
    uses = uses_of(packed_units, config)
    if mode == "resident":
        yield Placement(mode, packed_units, uses)
        return
    if mode == "gathered" and num_ranks < 2:
        raise ValueError("weights are gathered from at least two ranks, found one; use streamed, or more ranks")
    gathered = mode == "gathered"
    layers = config.num_layers
    moved = [frozenset(_spread(num_moved, layers)) for num_moved in range(1, layers + 1)]
    if not config.tie_embeddings:
        moved.append(moved[-1] | {layers + 1})
    moved.append(moved[-1] | {0})
    for units in moved:
        yield Placement(mode, packed_units, uses, units, num_ranks if gathered else 1, maps_memory and gathered)


def _tensor_parallel(config: DecoderConfig, dtype: torch.dtype, num_ranks: int) -> Placement:
    """Keep this rank's part of each layer, and all of the embedding and the head."""
    if num_ranks < 2:
        raise ValueError("tensor_parallel takes at least two ranks, found one; use resident, or more ranks")
    packed_units = stored_units(config, dtype, cuts_of(config, num_ranks))
    return Placement("tensor_parallel", packed_units, uses_of(packed_units, config), num_ranks=num_ranks)


def _spread(count: int, layers: int) -> Iterator[int]:
    """Return the units of ``count`` layers, at even distances."""
    return (1 + (2 * i + 1) * layers // (2 * count) for i in range(count))
