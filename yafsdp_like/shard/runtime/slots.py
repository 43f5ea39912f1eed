"""A unit's slots: its full parameters, and its full gradients, at fixed addresses, and what state their bytes are in.

Owns the tensors on a slot's bytes and the fields of its state, which the methods here alone write. When they may be
called is decided by ``params.py`` and ``gradients.py``, and which bytes a slot has by ``allocated_memory.py``.

[Note: one address per unit]
Autograd saves views of a unit's full parameters in forward and reads them in backward. They must find the same values
at the same address, so a slot belongs to one unit for good: slots share bytes with other units' slots
(``neighbours``), never addresses with "any free slot". When execution asks for two slots at once that share bytes,
one unit moves to a slot of its own for its later forwards, while what was saved earlier keeps the old slot
(``ForwardUse.slot``).

[Note: hidden slots]
While a slot is released, other units' values may lie there, and no backward may read what autograd has saved of it: one
that does has reached a tensor of the unit which forward did not return (a regularizer kept on the module, say). So
PyTorch's version counters say of a slot that is released before its backward that it was written to, until it is held
again, and autograd refuses to read it meanwhile. They say so for good of parameters whose values have changed, by a
step between a forward and its backward say: what autograd saved before is then as unreadable as without sharding.
"""

from __future__ import annotations

import enum
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from yafsdp_like.shard.runtime.extension import ExtendedParam
from yafsdp_like.shard.runtime.host_shard import download_after
from yafsdp_like.shard.runtime.layout_staging import Move, arrange_after, arrange_around, gradient_view
from yafsdp_like.shard.runtime.nested import addresses_in
from yafsdp_like.shard.spec.unit_spec import GatheredPiece

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Transport
    from yafsdp_like.memory.arena import Place
    from yafsdp_like.memory.layout import FlatLayout
    from yafsdp_like.memory.streams import Event
    from yafsdp_like.shard.runtime.forward_shard import ForwardShard
    from yafsdp_like.shard.runtime.freshness import Freshness, Version, Writes
    from yafsdp_like.shard.runtime.host_shard import HostStaging
    from yafsdp_like.shard.runtime.layout_staging import LayoutStaging
    from yafsdp_like.shard.runtime.param import ShardedParam
    from yafsdp_like.shard.spec.unit_spec import UnitPolicy


class SlotState(enum.Enum):
    """What a slot's bytes are to the compute stream.

    The transitions are in ``params.py`` and ``gradients.py``, and those of a replayed step in ``graph.py``.
    """

    EMPTY = "free: any neighbour may take the bytes"
    FILLED = "prefetched, not yet read: a neighbour in need may still take the bytes"
    STALE = "read and released, the values still there: any neighbour may take the bytes"
    HELD = "being read or written by running work: no neighbour may take the bytes"
    KEPT = "idle but left unsharded on purpose: given up when a neighbour needs the bytes"


class SlotUnit(Protocol):
    """What slots, and the owners of their transitions, use of a unit."""

    name: str  # the full name of the unit's modules
    policy: UnitPolicy
    params: list[ShardedParam]  # in order of registration
    transport: Transport
    staging: torch.Tensor  # scratch of reduce-scatters, (nbytes,) uint8
    column: torch.Tensor  # scratch of all-gathers over several hosts, (nbytes,) uint8
    layout_staging: LayoutStaging  # scratch for parameters that are not sharded by rows
    host_staging: HostStaging | None  # of main shards and gradients in host memory; None: they are on the device
    freshness: Freshness
    forward_shard: ForwardShard | None  # what stays of a gather slot from forward to backward
    registered: GatherSlot | None  # the slot whose parameters modules see; None while they see the sharded ones

    @property
    def trainable(self) -> list[int]:
        """The parameters for whose gradients there is room."""

    @property
    def awaits_backward(self) -> bool:
        """Whether a backward of one of the unit's forwards may still come."""

    def register(self, slot: GatherSlot | None) -> None:
        """Make modules see ``slot``'s parameters, or the sharded ones for None."""

    def refresh_compute_shard(self) -> bool:
        """Cast main shards into the compute shard, unless that is current; return whether there was any to cast."""


class _Slot:
    """What both kinds have: bytes that neighbours share, a state, and the end of the last access."""

    def __init__(self, unit: SlotUnit, extent: Place | None) -> None:
        self.unit = unit
        self.extent = extent
        self.neighbours: list[Self] = []  # slots that share bytes with this one
        self.state = SlotState.EMPTY
        self._released: Event = None  # the last access is done; None once a writer has waited for it

    def has_neighbours_in(self, states: Collection[SlotState]) -> bool:
        """Return whether each neighbour is in one of ``states``."""
        for other in self.neighbours:  # noqa: SIM110 - a generator takes twice as long
            if other.state not in states:
                return False
        return True

    def forget_neighbours(self) -> None:
        """Break the circle that the slot and its neighbours form."""
        self.neighbours.clear()

    def part_with(self, units: Collection[SlotUnit]) -> None:
        """Forget neighbours of these units."""
        self.neighbours = [other for other in self.neighbours if other.unit not in units]

    def hold(self) -> None:
        """Note that running work reads or writes the bytes."""
        self.state = SlotState.HELD

    def release(self, done: Event) -> None:
        """Free the bytes for writers that wait for ``done``."""
        self.state, self._released = SlotState.EMPTY, done

    def drop(self) -> None:
        """Free the bytes: a writer has nothing to wait for but what was noted before."""
        self.state = SlotState.EMPTY

    def last_accesses(self) -> list[Event]:
        """Return, once, what a writer of these bytes has to wait for: of this slot and of its neighbours."""
        events = []
        slots: list[_Slot] = [self, *self.neighbours]
        for slot in slots:
            if slot._released is not None:
                events.append(slot._released)
                slot._released = None
        return events

    def forget_events(self) -> None:
        """Note that compute has waited for all that was issued to other streams."""
        self._released = None


Slot = TypeVar("Slot", bound=_Slot)


def find_neighbours(slots: Sequence[Slot]) -> None:
    """Set each slot's ``neighbours``: the others that share bytes with it."""
    for slot in slots:
        slot.neighbours = [other for other in slots if other is not slot and _share_bytes(slot, other)]


def introduce(slots: Sequence[Slot], others: Sequence[Slot]) -> None:
    """Make each of ``slots`` a neighbour of those ``others``, of other models, that share bytes with it."""
    for slot in slots:
        for other in others:
            if _share_bytes(slot, other):
                slot.neighbours.append(other)
                other.neighbours.append(slot)


def _share_bytes(slot: _Slot, other: _Slot) -> bool:
    return slot.extent is not None and other.extent is not None and slot.extent.overlaps(other.extent)


class GatherSlot(_Slot):
    """A unit's full parameters at a fixed address.

    ``params[k]`` is the ``nn.Parameter`` that modules compute on; ``outputs[k]``, ``(padded_numel,)``, is the same
    bytes for the collective to write. They are different tensors: see [Note: version counters]. ``places`` has one
    place per parameter; ``extent`` is the bytes that all-gathers write, or None when the slot is the shard (one rank).
    Of the parameters in ``aliased`` the places alias this rank's shard: see [Note: aliased granules].
    """

    def __init__(
        self, unit: SlotUnit, places: Sequence[Place], extent: Place | None, aliased: Collection[int] = ()
    ) -> None:
        super().__init__(unit, extent)
        self.aliased = frozenset(aliased)
        self.ready: Event = None  # the all-gather has arrived
        self.version: Version = ()  # of the main shards whose values are in it
        self._active: set[object] = set()  # uses whose backward is running
        self._is_hidden = False
        self._shown: Writes | None = None  # of the values that autograd may have saved
        self._brought: Writes | None = None  # of those that are in it
        pairs = list(zip(unit.params, places, strict=True))
        # Of classes that say themselves what is all-gathered; what modules compute on is made when it has arrived.
        self.extended = {
            k: ExtendedParam.at(place, p.extension) for k, (p, place) in enumerate(pairs) if p.extension is not None
        }
        self.params = [_full_param(p, place) if p.extension is None else p.sharded for p, place in pairs]
        self.outputs = [
            place.flat(p.compute_dtype, p.shards.padded_numel)
            if p.extension is None
            else place.flat(torch.uint8, place.segment.nbytes)
            for p, place in pairs
        ]

    @cached_property
    def _addresses(self) -> range:
        """What the slot occupies; nothing where it is the shard, which stays."""
        if self.extent is None or not self.outputs:
            return range(0)
        start = min(output.data_ptr() for output in self.outputs)
        return range(start, max(output.data_ptr() + output.nbytes for output in self.outputs))

    @cached_property
    def _counted(self) -> dict[torch.Tensor, int]:
        """What autograd may have saved of the slot, and of which parameter."""
        full = {param: k for k, param in enumerate(self.params) if k not in self.extended}
        return full | {param._local_tensor: k for param, k in full.items() if isinstance(param, DTensor)}

    def hide(self) -> None:
        """Have autograd refuse to read the full parameters until they are held again: see [Note: hidden slots]."""
        if not self._is_hidden and self.extent is not None and self._counted:
            increment_version(self._counted)
            self._is_hidden = True

    def look_at_shards(self) -> None:
        """Note writes to shards that are part of the slot itself."""
        if self.extent is None or self.aliased:
            self._brought = self.unit.freshness.gathered()

    def hold(self) -> None:
        """Note that running work reads the bytes; autograd may have saved them, unless values have changed since."""
        super().hold()
        brought, shown = self._brought, self._shown
        has_changed = brought is not shown and brought != shown
        if self._is_hidden or has_changed:
            changed = _changed(brought, shown) if has_changed else set()
            versions = tuple([t._version - self._is_hidden + (k in changed) for t, k in self._counted.items()])
            torch._C._autograd._unsafe_set_version_counter(tuple(self._counted), versions)
            self._is_hidden = False
        self._shown = brought

    def aliases(self, tensor: torch.Tensor) -> bool:
        """Return whether ``tensor`` is a full parameter of this slot, or a view of one: values go with the slot."""
        return any(address in self._addresses for address in addresses_in(tensor))

    @cached_property
    def all_gather(self) -> AllGather:
        """The all-gather of every rank's compute shard into the slot; made once ranks are connected."""
        unit, host = self.unit, self.unit.host_staging
        permuted = {k: self.outputs[k] for k, p in enumerate(unit.params) if p.shards.is_permuted}
        staged = unit.layout_staging.gathered_chunks(permuted)
        outputs = [staged.get(k, output) for k, output in enumerate(self.outputs)]
        if host is None:
            run = self._all_gather(outputs)
        else:
            num_ranks, rank = unit.transport.world_size, unit.transport.rank
            chunks = [output.view(num_ranks, output.numel() // num_ranks)[rank] for output in outputs]
            in_place = unit.transport.all_gather(outputs, chunks)
            run = host.upload_before(in_place, [p.main for p in unit.params], chunks)
        params = unit.params
        moves = [Move(full, staged[k], params[k].shards, params[k].compute_dtype) for k, full in permuted.items()]
        return arrange_after(run, moves) if moves else run

    @cached_property
    def gather_kept(self) -> AllGather:
        """The all-gather for backward of what few ranks have kept together. See [Note: forward shards]."""
        assert self.unit.forward_shard is not None
        return self.unit.forward_shard.all_gather(self.outputs)

    def _all_gather(self, full: Sequence[torch.Tensor]) -> AllGather:
        """Return what all-gathers compute shards to ``full``, one piece per parameter, or those of its extension."""
        unit = self.unit
        outputs: list[torch.Tensor] = []
        inputs: list[torch.Tensor] = []
        in_place: list[int] = []
        for k, (p, output) in enumerate(zip(unit.params, full, strict=True)):
            in_place += [len(outputs)] if k in self.aliased else []
            if p.extension is None:
                outputs.append(output)
                inputs.append(p.compute)
            else:
                outputs += self.extended[k].chunks
                inputs += [piece.view(torch.uint8) for piece in GatheredPiece.cut(p.compute, p.extension.pieces)]
        return unit.transport.all_gather(outputs, inputs, in_place, unit.column)

    def arrive(self) -> None:
        """Make or update full parameters of classes that say what is all-gathered, on the current stream."""
        for k, extended in self.extended.items():
            if not extended.is_current:
                self.params[k] = extended.arrive(self.unit.params[k])

    def leave(self) -> None:
        """Give back what these classes have made beside the slot, which was released."""
        for extended in self.extended.values():
            extended.leave()

    def fill(self, ready: Event, kept: bool) -> None:
        """Note that an all-gather of compute shards, or of what was ``kept``, was issued; it is done at ``ready``."""
        if self.extended:
            for extended in self.extended.values():
                extended.is_current = False
        if not kept:
            self._brought = self.unit.freshness.gathered()
        self.state, self.ready, self.version = SlotState.FILLED, ready, self.unit.freshness.compute_version

    def hold_edited(self) -> None:
        """Hold the slot with values that the user has written to it and to the main shards of now."""
        self.state, self.version = SlotState.HELD, self.unit.freshness.main_version()

    def keep(self) -> None:
        """Note that the work on the slot is over, but the user wants it to stay unsharded."""
        self.state = SlotState.KEPT

    def rewind(self, is_filled: bool) -> None:
        """Return to the state before a step that was recorded and has not run."""
        self.state = SlotState.FILLED if is_filled else SlotState.EMPTY

    def leave_stale(self) -> None:
        """Leave the values of a slot that has just been released, for as long as no neighbour takes the bytes."""
        self.state = SlotState.STALE

    def forget_events(self) -> None:
        """Note that compute has waited for all that was issued to other streams."""
        super().forget_events()
        self.ready = None

    @property
    def is_in_backward(self) -> bool:
        """Whether the backward of some use of it is running."""
        return bool(self._active)

    def begin_backward(self, use: object) -> None:
        """Note that the backward of ``use`` reads the slot from now on."""
        self._active.add(use)

    def is_read_by(self, use: object) -> bool:
        """Return whether the backward of ``use`` is running."""
        return use in self._active

    def end_backward(self, use: object) -> None:
        """Note that the backward of ``use`` is over."""
        self._active.discard(use)

    def abandon_backwards(self) -> None:
        """Note that no backward runs any more."""
        self._active.clear()


def _changed(brought: Writes | None, shown: Writes | None) -> set[int]:
    """Return the parameters that were written in between; none where shards were moved, which counts nothing."""
    if brought is None or shown is None or brought[0] != shown[0]:
        return set()
    return {k for k, (now, before) in enumerate(zip(brought[1], shown[1], strict=True)) if now != before}


def _full_param(p: ShardedParam, place: Place) -> nn.Parameter:
    whole = place.tensor(p.compute_dtype, p.shards.shape)
    full = nn.Parameter(p.placement.full(whole), requires_grad=p.trainable)
    vars(full).update(vars(p.sharded))
    return full


class GradientSlot(_Slot):
    """A unit's full gradients from their arrival in backward until they are reduced.

    For each trainable parameter ``k``: ``views[k]`` has its shape and ``inputs[k]`` is ``(padded_numel,)``, in its
    ``gradient_dtype``. ``holds`` are those with some gradient in the slot, ``arrived`` those for which it is all that
    the backwards so far have computed. Padding holds anything. ``extent`` is None where nothing is trainable.
    """

    def __init__(self, unit: SlotUnit, extent: Place | None, layout: FlatLayout) -> None:
        super().__init__(unit, extent)
        self.holds: set[int] = set()
        self.arrived: dict[int, int | None] = {}  # parameter -> the backward in which it arrived last
        self.early: dict[int, Event] = {}  # reduced before the rest, and when that was done
        self.views: dict[int, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self._reductions: dict[tuple[int, ...], ReduceScatter] = {}
        for k in unit.trainable:
            assert extent is not None
            p, place = unit.params[k], extent.part(layout.segments[k])
            self.views[k] = gradient_view(place, p.gradient_dtype, p.shards)
            self.inputs[k] = place.flat(p.gradient_dtype, p.shards.padded_numel)

    def open(self, k: int) -> tuple[torch.Tensor, bool]:
        """Return where parameter ``k``'s gradient goes, and whether it is added to what is there already."""
        holds_some = k in self.holds
        self.holds.add(k)
        return self.views[k], holds_some

    def withdraw(self, k: int) -> torch.Tensor | None:
        """Take out what was written for parameter ``k``, unless nothing was, or all of it has arrived."""
        if k not in self.holds or k in self.arrived:
            return None
        self.holds.discard(k)
        return self.views[k].clone()

    def arrive(self, k: int, task: int | None) -> None:
        """Note that parameter ``k``'s gradient of the backward ``task`` is complete."""
        self.arrived[k] = task

    def reduced(self, which: Iterable[int]) -> None:
        """Note that the gradients of these parameters were read, by work that is issued."""
        self.holds.difference_update(which)
        self.arrived.clear()

    def reduced_early(self, which: Iterable[int], done: Event) -> None:
        """Note that these parameters' gradients were reduced before the rest, which is done at ``done``."""
        self.early |= dict.fromkeys(which, done)

    def forget_early(self, k: int) -> Event:
        """Note that parameter ``k``'s gradient is written again, and return what that has to wait for."""
        return self.early.pop(k)

    def release(self, done: Event) -> None:
        """Free the bytes for writers that wait for ``done``, unless gradients that were not reduced are in them."""
        self._released = done
        if not self.holds:
            self.early.clear()
            self.state = SlotState.EMPTY

    def drop(self) -> None:
        """Drop what has arrived, all or in part."""
        super().drop()
        self.holds.clear()
        self.early.clear()
        self.arrived.clear()

    def reduce_scatter(self, which: Sequence[int]) -> ReduceScatter:
        """Return what reduces the gradients of these parameters into their gradient shards."""
        key = tuple(which)
        if key not in self._reductions:
            params, host = [self.unit.params[k] for k in which], self.unit.host_staging
            grads = [p.grad_shard.flat for p in params if p.grad_shard is not None]
            outputs = grads if host is None else host.staged(grads)
            permuted = {i: outputs[i] for i, p in enumerate(params) if p.shards.is_permuted}
            staged = self.unit.layout_staging.reduced_chunks(permuted)
            reduce = self.unit.transport.reduce_scatter(
                [staged.get(i, output) for i, output in enumerate(outputs)],
                [self.inputs[k] for k in which],
                [p.reduce_dtype.to_real() for p in params],
                self.unit.staging,
            )
            if permuted:
                moves = [Move(to, staged[i], params[i].shards, params[i].grad_dtype) for i, to in permuted.items()]
                reduce = arrange_around(reduce, moves)
            self._reductions[key] = reduce if host is None else download_after(reduce, outputs, grads)
        return self._reductions[key]
