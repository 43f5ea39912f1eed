"""The memory of one sharded model: what was built of the plan, for what, and what was added since.

Owns the plan in force, the arena of everything but main shards, and where on it units' shards and slots lie. It does
not know what is in a slot: ``rebuild.py`` releases them all and orders the streams before it builds or leaves.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from yafsdp_like.comm.consistency import check_same_on_all_ranks
from yafsdp_like.memory.arena import Arena, Place
from yafsdp_like.memory.layout import FlatLayout, Segment
from yafsdp_like.shard.runtime.host_shard import HostStaging
from yafsdp_like.shard.runtime.layout_staging import LayoutStaging
from yafsdp_like.shard.runtime.param import NOWHERE
from yafsdp_like.shard.runtime.sinks import watch_gradients
from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot, find_neighbours
from yafsdp_like.shard.spec.memory_layout import (
    COLUMN,
    DOWNLOAD,
    GATHER_SLOTS,
    GATHERED,
    GRADIENT_SLOTS,
    REDUCED,
    STAGING,
    UPLOAD,
    MemoryLayout,
    own_slot_regions,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.shard.runtime.collective_log import CollectiveLog
    from yafsdp_like.shard.runtime.debug import Debugger
    from yafsdp_like.shard.runtime.shared_slots import SlotSharing
    from yafsdp_like.shard.runtime.unit_state import Unit
    from yafsdp_like.shard.runtime.unit_tree import UnitTree
    from yafsdp_like.shard.spec.unit_spec import UnitLayout


OF_UNITS = ("main_shard", "remainder", "grad_shard")  # kinds of regions that units hold themselves


class SpillWarning(UserWarning):
    """A unit was given memory beyond the plan, because modules ran in an order that the plan did not expect."""


@dataclass(frozen=True)
class Spill:
    """A unit that got a slot of its own at run time, why, and for how many bytes."""

    region: str
    reason: str
    nbytes: int


class AllocatedMemory:
    """The memory of one root module's units; empty until it is built, and again once it is left."""

    def __init__(self, tree: UnitTree, collective_log: CollectiveLog) -> None:
        self.arena: Arena | None = None
        self.num_layouts = 0  # how often slots were given places
        self.spills: list[Spill] = []
        self.debugger: Debugger | None = None  # what checks it, in debug mode
        self.shared: SlotSharing | None = None  # the slots of this and other models, see [Note: shared slots]
        self.shared_arena: Arena | None = None  # of those, whose regions are in ``arena`` too, once built
        self._tree, self._collective_log = tree, collective_log
        self._layout: MemoryLayout | None = None
        self._built_for: tuple[object, ...] = ()  # the units' signatures then
        self._trains = all(unit.needs.trains for unit in tree.units)  # units may have been evaluated alone before

    @property
    def is_built(self) -> bool:
        """Whether there are shards and slots for the units as they are now."""
        is_moved = self.shared is not None and self.shared.arena is not self.shared_arena
        return self._built_for == self._signatures() and not is_moved

    def _signatures(self) -> tuple[object, ...]:
        return tuple(unit.signature for unit in self._tree.units)

    def use_shared(self, shared: SlotSharing) -> None:
        """Have slots among those of other models from the next build on; gradients' are planned from the start."""
        self.shared = shared

    def next_layout(self) -> MemoryLayout:
        """Plan what would be built now. Changes nothing."""
        return self._tree.plan() if self.shared is None else self.shared.layout_of(self)

    def plan(self) -> MemoryPlan:
        """Return what is built, or else what would be, and whether gradients stay in place. Allocates nothing."""
        plan = self._layout.plan if self._layout is not None and self.is_built else self.next_layout().plan
        on_device = (p.grad_shard for unit in self._tree.units if not unit.is_on_host for p in unit.params)
        return replace(plan, keeps_gradients=any(shard is not None and shard.is_pinned for shard in on_device))

    @property
    def nbytes(self) -> int:
        """The bytes held on the device now, main shards included."""
        on_device = sum(unit.arena.nbytes for unit in self._tree.units if not unit.is_on_host)
        return on_device + (self.arena.nbytes if self.arena else 0)

    def build(self) -> None:
        """Give every unit its shards and slots, on an arena of their own. Units must have their main shards."""
        self._layout = self.next_layout()
        if self.shared is not None:
            self.shared_arena = self.shared.take(self, self._layout.plan, self._tree.units[0].device)
        self.arena = build(self._tree.units, self._layout, self.shared_arena)
        if self.shared is not None:
            self.shared.add(self._tree.units)
        if self.debugger is not None:
            self.debugger.watch(self._layout, self.arena, self.shared)
        self._built_for = self._signatures()
        self.num_layouts += 1

    def check_same_on_all_ranks(self, error: Exception | None) -> None:
        """Let peers map what was built, if all ranks have built the same.

        Otherwise all leave it and raise the same error: one for what differs, or ``error`` of any rank.
        """
        transports = list(dict.fromkeys(unit.transport for unit in self._tree.units))
        try:
            for transport in transports:
                check_same_on_all_ranks(transport.everybody, self._fingerprint(), error)
            for transport in transports:
                if transport.mapped is not None and self.arena is not None:
                    transport.mapped.connect(self.arena.blocks)
        except BaseException:
            self.leave()  # so that every rank builds again, once the model is mended
            if self.shared is not None:
                self.shared.leave()  # which may not be there on every rank
            raise

    def _fingerprint(self) -> list[str]:
        """Say what must be the same on every rank: a line for each parameter, each unit's policy, and shared slots."""
        lines = [
            f"{p.name} {list(p.shards.shape)}{p.placement.words} of unit {unit.name!r}, {p.main_dtype} computed in "
            f"{p.compute_dtype} and "
            f"reduced in {p.reduce_dtype} to {p.grad_dtype}, {'trainable' if p.trainable else 'frozen'}"
            + (f", all-gathered as {p.extension.pieces}" if p.extension is not None else "")
            + ("" if unit.needs.trains else ", without room for gradients")
            + (", in debug mode" if unit.needs.guards else "")
            for unit in self._tree.units
            for p in unit.params
        ] + [
            f"unit {unit.name!r} with reshard_after_forward="
            f"{unit.policy.forward_ranks or self._tree.reshards_after_forward(unit)}, "
            f"reshard_after_backward={unit.policy.reshard_after_backward}, {unit.reduction()}, prefetching "
            f"{[u.name for u in unit.forward_prefetch]} and {[u.name for u in unit.backward_prefetch]}"
            for unit in self._tree.units
        ]
        if self.shared is not None and self.shared_arena is not None:
            regions = self.shared_arena.regions.values()
            sizes = ", ".join(f"{region.name} of {region.nbytes:,} bytes" for region in regions)
            lines.append(f"slots of {', '.join(self.shared.names)} in one arena: {sizes}")
        return lines

    def follow_grad_mode(self) -> None:
        """Give a model that begins without grad mode room for gradients once a forward may lead to a backward."""
        if not self._trains and torch.is_grad_enabled():
            self.make_trainable()
        elif self.num_layouts == 0 and not torch.is_grad_enabled() and self.shared is None:
            self._trains = any(p.sharded.grad is not None for unit in self._tree.units for p in unit.params)
            for unit in self._tree.units:
                unit.need(trains=self._trains)

    def make_trainable(self) -> None:
        """Let the next forward find room for gradients."""
        self._trains = True
        for unit in self._tree.units:
            unit.need(trains=True)
        self.invalidate()

    def invalidate(self) -> None:
        """Let the next forward build it anew, whatever it was built for."""
        self._built_for = ()

    def leave(self) -> None:
        """Free the memory as soon as nothing else, autograd say, refers to it."""
        self.arena = self.shared_arena = self._layout = None
        self._built_for = ()
        for unit in self._tree.units:
            unit.forget_slots()

    def add_gather_slot(self, unit: Unit, reason: str) -> None:
        """Give ``unit`` a gather slot of its own from here on, beyond the plan."""
        unit.need(own_gather_slot=True)
        place, layout = self._spill(unit, 0, reason)
        unit.use_gather_slot(slot_at(unit, place, layout.gather_slot))
        watch_gradients(unit, unit.gather_slot)
        if self.debugger is not None:
            self.debugger.watch_gather_slot(unit.gather_slot, layout)
        self._warn()

    def add_gradient_slot(self, unit: Unit, reason: str) -> None:
        """Give ``unit`` a gradient slot of its own from here on, beyond the plan."""
        unit.need(own_gradient_slot=True)
        place, layout = self._spill(unit, -1, reason)
        unit.use_gradient_slot(GradientSlot(unit, place, layout.gradient_slot))
        if self.debugger is not None:
            self.debugger.watch_gradient_slot(unit.gradient_slot, layout)
        self._warn()

    def _warn(self) -> None:
        """Warn of the last spill."""
        spill = self.spills[-1]
        more = "" if self.shared is None else ". Of models that share slots, end one's backward before another begins"
        warnings.warn(
            f"{spill.region} takes {spill.nbytes:,} bytes beyond the memory plan: {spill.reason}. Numbers are right, "
            "and later iterations reuse the slot. To plan for it, register modules in the order in which they run, and "
            f"set reshard_after_forward=False on a unit whose forward runs another that is not its submodule{more}",
            SpillWarning,
            stacklevel=2,
        )

    def _spill(self, unit: Unit, which: int, reason: str) -> tuple[Place, UnitLayout]:
        assert self._layout is not None and self.arena is not None
        index = self._tree.units.index(unit)
        layout = self._layout.layouts[index]
        region = own_slot_regions(replace(self._layout.units[index], needs=unit.needs), layout)[which]
        known = len(self.arena.blocks)
        self.arena.reserve([region])
        if region.mapped and (mapped := unit.transport.mapped) is not None:
            self._collective_log.adds_slot(unit)
            mapped.connect(self.arena.blocks[known:])
        self._layout = self._layout.with_region(region)
        self.num_layouts += 1
        self.spills.append(Spill(region.name, reason, region.nbytes))
        return self.arena.place(region.name), layout


def build(units: Sequence[Unit], memory_layout: MemoryLayout, shared: Arena | None = None) -> Arena:
    """Allocate everything but main shards, which units hold already, and give every unit its shards and slots.

    Regions that ``shared`` has are used as they are there.
    """
    arena = Arena(units[0].device)
    if shared is not None:
        arena.include(shared)
    arena.reserve([r for r in memory_layout.plan.regions if r.kind not in OF_UNITS and r.name not in arena.regions])
    for i, (unit, layout) in enumerate(zip(units, memory_layout.layouts, strict=True)):
        unit.take_dtypes(memory_layout.units[i].params)
        _place_shards(unit, layout, arena)
        unit.use_gather_slot(_gather_slot(unit, layout, memory_layout.gather_places.get(i), arena))
        unit.use_gradient_slot(_gradient_slot(unit, layout, memory_layout.gradient_places.get(i), arena))
        guard_nbytes = unit.needs.guard_nbytes
        staging, column, upload, download, gathered, reduced = (
            _scratch(arena, region, guard_nbytes) for region in (STAGING, COLUMN, UPLOAD, DOWNLOAD, GATHERED, REDUCED)
        )
        unit.use_scratch(staging, column, HostStaging(upload, download), LayoutStaging(gathered, reduced))
        unit.use_forward_shard(_forward_parts(unit, layout, arena))
        watch_gradients(unit, unit.gather_slot)
    find_neighbours([unit.gather_slot for unit in units])
    find_neighbours([unit.gradient_slot for unit in units])
    return arena


def _scratch(arena: Arena, region: str, guard_nbytes: int) -> torch.Tensor:
    """Return the bytes of a region between its guards, ``(nbytes,)`` uint8; nothing where there is no such region."""
    if region not in arena.regions:
        return NOWHERE
    inside = Segment(guard_nbytes, arena.regions[region].nbytes - 2 * guard_nbytes)
    return arena.place(region).part(inside).tensor(torch.uint8, (inside.nbytes,))


def _place_shards(unit: Unit, layout: UnitLayout, arena: Arena) -> None:
    for k, p in enumerate(unit.params):
        shard = p.main
        for region, part in (("compute_shard", layout.compute_shard), ("aliased_shard", layout.aliased_shard)):
            if part.segments[k].nbytes:
                place = arena.place(f"{unit.name}.{region}").part(part.segments[k])
                if p.extension is None:
                    shard = place.flat(p.compute_dtype, p.shards.chunk_numel)
                else:
                    shard = place.flat(torch.uint8, part.segments[k].nbytes)
        p.place_compute(shard)
    unit.make_grads(layout.grad_shard)


def _forward_parts(unit: Unit, layout: UnitLayout, arena: Arena) -> list[torch.Tensor]:
    if not layout.forward_shard.nbytes:
        return []
    place = arena.place(f"{unit.name}.forward_shard")
    ranks = unit.policy.forward_ranks
    return [
        place.part(segment).flat(p.compute_dtype, p.shards.padded_numel // ranks)
        for p, segment in zip(unit.params, layout.forward_shard.segments, strict=True)
    ]


def _gather_slot(unit: Unit, layout: UnitLayout, shared: Segment | None, arena: Arena) -> GatherSlot:
    if shared is not None:
        extent = arena.place(GATHER_SLOTS).part(shared)
        if layout.aliased_shard.nbytes:
            return _aliased_slot(unit, layout, extent)
        return slot_at(unit, extent, layout.gather_slot)
    if unit.needs.own_gather_slot and layout.gather_slot.nbytes:
        return slot_at(unit, arena.place(f"{unit.name}.gather_slot"), layout.gather_slot)
    return _slot_on_shards(unit, layout, arena)


def slot_at(unit: Unit, extent: Place, layout: FlatLayout) -> GatherSlot:
    """Make the gather slot that lies in ``extent`` as ``layout`` says."""
    return GatherSlot(unit, [extent.part(segment) for segment in layout.segments], extent)


def _aliased_slot(unit: Unit, layout: UnitLayout, extent: Place) -> GatherSlot:
    """Make a slot that maps granules of ``extent``, and of the shard where this rank's chunks belong."""
    aliased = {k: segment for k, segment in enumerate(layout.aliased_shard.segments) if segment.nbytes}
    shard = extent.arena.place(f"{unit.name}.aliased_shard")
    parts, end, taken = [], 0, 0
    for k, own in aliased.items():
        start = layout.gather_slot.segments[k].offset_nbytes + unit.params[k].rank * own.nbytes
        parts += [extent.part(Segment(taken, start - end)), shard.part(own)]
        taken, end = taken + start - end, start + own.nbytes
    parts.append(extent.part(Segment(taken, layout.gather_slot.nbytes - end)))
    slot = extent.arena.alias(f"{unit.name}.aliased_slot", parts)
    return GatherSlot(unit, [slot.part(segment) for segment in layout.gather_slot.segments], extent, aliased)


def _slot_on_shards(unit: Unit, layout: UnitLayout, arena: Arena) -> GatherSlot:
    """Make a slot of the compute or main shard, which on one rank is the full parameter already."""
    places = []
    for p, main, compute in zip(unit.params, layout.main_shard.segments, layout.compute_shard.segments, strict=True):
        if p.compute is p.main:
            places.append(unit.arena.place("main_shard").part(main))
        else:
            places.append(arena.place(f"{unit.name}.compute_shard").part(compute))
    return GatherSlot(unit, places, None)


def _gradient_slot(unit: Unit, layout: UnitLayout, shared: Segment | None, arena: Arena) -> GradientSlot:
    extent: Place | None = None
    if shared is not None:
        extent = arena.place(GRADIENT_SLOTS).part(shared)
    elif unit.needs.own_gradient_slot:
        extent = arena.place(f"{unit.name}.gradient_slot")
    elif unit.trainable:  # parameters without elements have gradients too, but no bytes
        extent = arena.place(GRADIENT_SLOTS).part(Segment(0, 0))
    return GradientSlot(unit, extent, layout.gradient_slot)
