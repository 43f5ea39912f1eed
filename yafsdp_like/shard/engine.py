"""The runtime of one sharded model: fills, reads and releases slots in stream order, and reduces gradients.

The engine owns the plan, the arena of everything but main shards, and every transition of a slot's state. It knows
nothing of module hooks and autograd graphs: ``hooks.py`` tells it what starts and what ends.

    gather slot      EMPTY --gather--> FILLED --unshard--> HELD --keep--> KEPT --unshard--> HELD --release--> EMPTY
                                                           HELD --rest--> IDLE --unshard--> HELD
                     FILLED, KEPT or IDLE --a neighbour needs the bytes--> EMPTY
    gradient slot    EMPTY --first gradient--> HELD --reduce--> EMPTY

[Note: spills]
When a unit needs its slot while a neighbour's is HELD, execution has left the order that the plan was made for. In
forward the unit then gets a slot of its own, allocated once and kept, counted in ``spills`` and reported by a
warning; the next iteration finds it there. In backward an address cannot change any more, and the only honest answer
is an error.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from yafsdp_like.memory.arena import Arena, Place, give_back, room_nbytes
from yafsdp_like.memory.plan import MemoryPlan
from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE, Event, streams_of
from yafsdp_like.shard.blueprint import (
    Blueprint,
    build,
    depth_for,
    draw,
    own_slot_regions,
    reshards_after_forward,
    slot_at,
)
from yafsdp_like.shard.depth import Depth
from yafsdp_like.shard.linear import attach
from yafsdp_like.shard.schedule import Schedule, schedule_of
from yafsdp_like.shard.stopwatch import Found, Stopwatch, agreed
from yafsdp_like.shard.unit import GatherSlot, GradientSlot, ShardedParam, SlotState, Unit, UnitLayout, Use, unit_of

if TYPE_CHECKING:
    from yafsdp_like.shard.hooks import Call

EMPTY, FILLED, HELD = SlotState.EMPTY, SlotState.FILLED, SlotState.HELD
KEPT, IDLE = SlotState.KEPT, SlotState.IDLE


EARLY_NUMEL = 1 << 23  # a reduction of fewer elements costs more in latency than it hides


class SpillWarning(UserWarning):
    """A unit was given memory beyond the plan, because modules ran in an order that the plan did not expect."""


@dataclass(frozen=True)
class Spill:
    """A unit that got a slot of its own at run time, why, and for how many bytes."""

    region: str
    reason: str
    nbytes: int


@dataclass(frozen=True)
class Report:
    """Bytes held now, and what did not go by the plan since the model was sharded: nothing, in a well-planned run."""

    arena_nbytes: int
    spills: tuple[Spill, ...]
    wasted_prefetches: int  # gathers ahead of time that nobody read
    evictions: int  # units that were to stay gathered and had to make room


class Engine:
    """One root module and the units below it, in order of registration."""

    def __init__(self, root: nn.Module, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self.root_unit = next((unit for unit in units if root in unit.modules), None)
        self.streams = streams_of(units[0].device)
        self.schedule = schedule_of(root, _units_of_modules(self.units), len(self.units))
        self.after_in_forward = _following(self.units, self.schedule.forward_order)
        self.after_in_backward = _following(self.units, self.schedule.backward_order)
        self.transports = list(dict.fromkeys(unit.transport for unit in units))
        self.depth = Depth()
        self.depth_reason = ""  # empty until measured times have decided it
        self.stopwatch: Stopwatch | None = None  # from ``follow_times`` until it is decided
        self._blueprint: Blueprint | None = None
        self._arena: Arena | None = None
        self.built_for: tuple[object, ...] = ()  # the units' signatures when the slots were made
        self.num_layouts = 0  # how often slots were given places
        self.spills: list[Spill] = []
        self.wasted_prefetches = 0
        self.evictions = 0
        self.last_reduce: Event = None  # the end of the latest reduction; None once compute has waited for it
        self.reduced_early = _reduced_early(self.units, self.schedule)
        self.is_last_backward = True  # whether the end of a backward waits for its reductions
        self.iteration: Call | None = None  # the forward that everything running now is part of
        self.tasks: dict[int, list[Use]] = {}  # running backwards by autograd's number, and the uses they reached
        for unit in self.units:
            unit.engine = self

    # --- the plan ---

    def plan(self) -> MemoryPlan:
        """What the arenas hold; before they are built, what they will hold. Allocates nothing."""
        if self._blueprint is not None and self.built_for == self._signatures():
            return self._blueprint.plan
        return self._draw(self.depth).with_depth(self.depth_reason).plan

    def _draw(self, depth: Depth) -> Blueprint:
        return draw(self.units, self.schedule, self.root_unit, depth)

    @property
    def arena_nbytes(self) -> int:
        """The bytes held now, main shards included."""
        return sum(unit.arena.nbytes for unit in self.units) + (self._arena.nbytes if self._arena else 0)

    def report(self) -> Report:
        return Report(self.arena_nbytes, tuple(self.spills), self.wasted_prefetches, self.evictions)

    def build_if_changed(self) -> None:
        """Makes shards and slots before the first iteration, and again when parameters were moved, cast or (un)frozen.

        Slots that autograd still refers to live on until their graph is gone. Raises the same error on every rank
        when a rank cannot go on, or when ranks shard different models.
        """
        if self._arena is not None and self.built_for == self._signatures():
            return
        error: Exception | None = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._build()
        except Exception as e:
            error = e
        try:
            for transport in self.transports:
                transport.agree(self._fingerprint(), error)
            for transport in self.transports:
                if transport.maps_memory and self._arena is not None:
                    transport.connect(self._arena.blocks)
        except BaseException:
            self._forget_build()  # so that every rank comes back here, once the model is mended
            raise

    def _build(self) -> None:
        for unit in self.units:
            self.reshard(unit)
            unit.materialize()
        on_meta = [name for unit in self.units for name in unit.meta_params()]
        if on_meta:
            raise RuntimeError(
                "FSDP parameters should be materialized from meta device before training, but the following were still "
                f"on meta device: {on_meta}\nCall model.to_empty(device=...), then initialize or load the parameters"
            )
        unsynced = [slot for unit in self.units if (slot := unit.unsynced()) is not None]
        self._leave_arena()
        self._blueprint = self._draw(self.depth).with_depth(self.depth_reason)
        self._arena = build(self._blueprint)
        for unit in self.units:
            watch_gradients(unit.gather_slot)
        for slot in unsynced:
            for k in slot.arrived:
                self.accumulate(slot.unit, k, slot.views[k])
        self.built_for = self._signatures()
        self.num_layouts += 1

    def _leave_arena(self) -> None:
        for stream in (GATHER, REDUCE):  # the old arena's bytes go back to the allocator, which knows only compute
            self.streams.wait(COMPUTE, self.streams.record(stream))
        self._forget_build()

    def _forget_build(self) -> None:
        self._arena = self._blueprint = None
        self.built_for = ()
        for unit in self.units:
            unit.forget_slots()

    def _signatures(self) -> tuple[object, ...]:
        return (self.depth, *(unit.signature for unit in self.units))

    def _fingerprint(self) -> list[str]:
        """What must be the same on every rank: a line for each parameter, and one for each unit's policy."""
        return [
            f"{p.name} {list(p.shards.shape)} of unit {unit.name!r}, {p.main_dtype} computed in {p.compute_dtype} and "
            f"reduced in {p.reduce_dtype}, {'trainable' if p.trainable else 'frozen'}"
            for unit in self.units
            for p in unit.params
        ] + [
            f"unit {unit.name!r} with reshard_after_forward={self.reshards_after_forward(unit)}, "
            f"reshard_after_backward={unit.policy.reshard_after_backward}, {unit.reduction()}, prefetching "
            f"{[u.name for u in unit.policy.forward_prefetch]} and {[u.name for u in unit.policy.backward_prefetch]}"
            f", {self.depth}"
            for unit in self.units
        ]

    # --- the depth, from measured times ---

    def follow_times(self) -> None:
        """Measures one of the next iterations, and lets the depth follow; nothing where nothing can be measured."""
        self.stopwatch = Stopwatch(self.streams) if self._can_measure() else None

    def _can_measure(self) -> bool:
        """On GPUs that share the same units between the same ranks; elsewhere nothing is measured or changed."""
        is_shared = any(transport.world_size > 1 for transport in self.transports)
        return self.units[0].device.type == "cuda" and is_shared and len({unit.mesh for unit in self.units}) == 1

    def _measured(self, stream: str, unit: Unit | None) -> AbstractContextManager[None]:
        """Work of one unit on a side stream, or a wait of COMPUTE behind which the unit computes."""
        if self.stopwatch is None or not self.stopwatch.is_running:
            return nullcontext()
        return self.stopwatch.span(stream, unit, backward_task() is not None)

    def _follow_times(self, watch: Stopwatch) -> None:
        """An iteration begins: if one was measured, ranks choose the depth together, once, and the plan follows.

        They exchange what they have whatever it is, since one may still wait for times that another has.
        """
        watch.is_running = False
        if not torch.is_grad_enabled() or not watch.next_iteration():
            return
        times = None if self._holds_something() else watch.times(self.units)
        found = Found(times, room_nbytes(self.units[0].device)) if times is not None else None
        found = agreed(found, self.units[0].mesh)
        if found is not None or watch.gives_up:
            self.stopwatch = None
        if found is not None:
            self.depth, self.depth_reason = depth_for(self.units, self.schedule, self.root_unit, *found)
            self._leave_other_plan(found)

    def _holds_something(self) -> bool:
        """Whether memory of the plan is referred to beyond the arena, and would not be free with it."""
        if self._arena is None or any(u.pending or u.gradient_slot.state is not EMPTY for u in self.units):
            return True
        return any(p.sharded.grad is not None for unit in self.units for p in unit.params)

    def _leave_other_plan(self, found: Found) -> None:
        """Before a plan of another depth is built, every rank has left the one before, whose bytes peers map too."""
        if self.built_for == self._signatures() and self._blueprint is not None:
            self._blueprint = self._blueprint.with_depth(self.depth_reason)
            return
        for unit in self.units:
            self.reshard(unit)
        self._leave_arena()
        give_back(self.units[0].device)
        agreed(found, self.units[0].mesh)

    # --- gather slots ---

    def begin(self) -> None:
        """A forward starts: what compute wrote (optimizer, loaded weights) comes before all gathers; stale slots go."""
        if self.stopwatch is not None:
            self._follow_times(self.stopwatch)
        self.build_if_changed()
        self.publish()
        for unit in self.units:
            slot = unit.gather_slot
            if slot.state is IDLE:  # left by a forward without a backward; weights may have changed since, uncounted
                slot.state = EMPTY
            elif slot.state is not EMPTY and slot.generation != unit.generation():
                self.release(slot)

    def publish(self) -> None:
        """Gathers from here on, of any rank, bring what this rank's main shards are now.

        Where peers read compute shards in place, all are made current between two meetings: the first says that
        nobody reads them any more, the second that they are written. Otherwise each is when it is gathered.
        """
        self.streams.wait(GATHER, self.streams.record(COMPUTE))
        mapping = [transport for transport in self.transports if transport.maps_memory]
        if not mapping:
            return
        with self.streams.on(GATHER), torch.no_grad():
            for transport in mapping:
                transport.meet(GATHER)
            cast = [unit.refresh_compute_shard() for unit in self.units if unit.transport.maps_memory]
            for transport in mapping:
                transport.meet(GATHER)
        self._expect(self.streams.record(GATHER))
        if any(cast):  # the next update of the main shards comes after
            self.streams.wait(COMPUTE, self.streams.record(GATHER))

    def before_update(self) -> None:
        """An optimizer will write compute shards from here on: on no rank a gather reads them any more."""
        self.streams.wait(COMPUTE, self.streams.record(GATHER))
        for transport in self.transports:
            transport.meet(COMPUTE)

    def after_update(self, unit: Unit, is_whole: bool) -> None:
        """An optimizer has written main and compute shards of the unit's parameters (all, if ``is_whole``): gathers it
        for the next forward, if its bytes are free and peers need not take part.
        """
        unit.written_by_update = is_whole
        if is_whole:
            unit.cast = unit.generation()
        slot = unit.gather_slot
        is_free = all(s.state in (EMPTY, IDLE) for s in (slot, *slot.neighbours))
        if not is_whole or not is_free or not unit.transport.maps_memory:
            return
        self._make_room(slot)
        slot.state = EMPTY  # the values in it are from before the update
        self.streams.wait(GATHER, self.streams.record(COMPUTE))
        with self.streams.on(GATHER):
            unit.transport.meet(GATHER)
        self.gather(slot, refresh=False)

    def gather(self, slot: GatherSlot, refresh: bool) -> None:
        """Issues the gather of an EMPTY slot whose neighbours are all EMPTY; the slot is FILLED. Does not wait.

        ``refresh`` casts the main shard first: in forward, and not in backward, which must see forward's values again.
        Compute shards that peers read in place are left to ``publish``.
        """
        assert slot.state is EMPTY and all(other.state is EMPTY for other in slot.neighbours)
        unit = slot.unit
        with label("gather", unit), self.streams.on(GATHER):
            self._wait_for_readers(GATHER, slot)
            with self._measured(GATHER, unit):
                if refresh and not unit.transport.maps_memory:
                    unit.refresh_compute_shard()
                slot.gather()
        slot.ready = self.streams.record(GATHER)
        slot.generation = unit.cast
        slot.state = FILLED

    def _wait_for_readers(self, stream: str, slot: GatherSlot | GradientSlot) -> None:
        """Orders ``stream``, the only writer of these slots, after the last access of every other stream to their
        bytes.
        """
        for other in (slot, *slot.neighbours):
            if other.released is not None:
                self.streams.wait(stream, other.released)
                other.released = None

    def prefetch(self, unit: Unit, refresh: bool) -> None:
        """Gathers ahead when the unit's bytes are free; otherwise the unit waits for its own turn."""
        slot = unit.gather_slot
        if slot.state is EMPTY and all(other.state in (EMPTY, FILLED, IDLE) for other in slot.neighbours):
            self._make_room(slot)
            self.gather(slot, refresh)

    def unshard(self, slot: GatherSlot, refresh: bool) -> None:
        """Makes the slot's full parameters readable by compute and visible to modules: the slot is HELD.

        Its HELD neighbours must be asked about before, with ``blockers``.
        """
        if slot.state is EMPTY:
            self._make_room(slot)
            self.gather(slot, refresh)
        with self._measured(COMPUTE, slot.unit):
            if slot.state is FILLED:
                self._wait_until_ready(slot)
        slot.state = HELD
        slot.unit.register(slot)

    def _wait_until_ready(self, slot: GatherSlot) -> None:
        if slot.ready is not None:
            self.streams.wait(COMPUTE, slot.ready)

    def blockers(self, slot: GatherSlot) -> list[GatherSlot]:
        """Neighbours in use, whose bytes ``slot`` would need and cannot have."""
        if slot.state is not EMPTY:
            return []
        return [other for other in slot.neighbours if other.state is HELD]

    def _make_room(self, slot: GatherSlot) -> None:
        for other in slot.neighbours:
            if other.state is FILLED:
                self.wasted_prefetches += 1
                other.state = EMPTY  # only GATHER has touched it, and GATHER runs in order
            elif other.state is KEPT:
                self.evictions += 1
                self.release(other)
            elif other.state is IDLE:
                other.state = EMPTY

    def keep(self, slot: GatherSlot) -> None:
        """The work on the slot is over, but the user wants it to stay gathered."""
        slot.state = KEPT

    def rest(self, slot: GatherSlot) -> None:
        """As ``release``, but who comes back before a neighbour took the bytes finds them filled."""
        self.release(slot)
        slot.state = IDLE

    def release(self, slot: GatherSlot) -> None:
        """All reads of the slot have been issued: its bytes are free after them, and modules see the shards again."""
        if slot.state is FILLED:  # a gather that nobody read: compute may write the shards only after it
            self._wait_until_ready(slot)
        elif slot.state in (HELD, KEPT):
            slot.released = self.streams.record(COMPUTE)
        slot.state = EMPTY
        if slot.unit.registered is slot:
            slot.unit.register(None)

    def reshard(self, unit: Unit) -> None:
        for slot in unit.slots:
            self.release(slot)

    def reshards_after_forward(self, unit: Unit) -> bool:
        return reshards_after_forward(unit, self.root_unit)

    def forget_updates(self) -> None:
        """A forward is over: whatever writes main shards from here on may do so uncounted."""
        for unit in self.units:
            unit.written_by_update = False

    def settle_prefetches(self) -> None:
        """An iteration ends: gathers that nobody read are dropped, so that the optimizer may write the shards."""
        for unit in self.units:
            if unit.gather_slot.state is FILLED:
                self.wasted_prefetches += 1
                self.release(unit.gather_slot)

    # --- gradient slots ---

    def accumulate(self, unit: Unit, k: int, grad: torch.Tensor | None) -> None:
        """Parameter ``k``'s full gradient of the running backward, ``(rows, ...)``, is complete: what was not written
        to the gradient slot as it was computed is moved there now.
        """
        if grad is not None:
            view, holds_some = self.open_gradient(unit, k)
            with torch.no_grad():
                if holds_some:
                    view.add_(grad)
                else:
                    view.copy_(grad)
        slot = unit.gradient_slot
        if k not in slot.holds:
            return  # no gradient came
        slot.arrived[k] = backward_task()
        if unit.policy.requires_gradient_sync and k in self.reduced_early.get(unit, ()):
            together = list(slot.arrived)
            slot.early |= dict.fromkeys(together, self._reduce_arrived(unit))

    def open_gradient(self, unit: Unit, k: int) -> tuple[torch.Tensor, bool]:
        """Where to write parameter ``k``'s full gradient, and whether to add it to what is there already."""
        slot = unit.gradient_slot
        if slot.state is EMPTY:
            slot = self._acquire_gradient_slot(unit)
        if k in slot.early:
            self.streams.wait(COMPUTE, slot.early.pop(k))
        holds_some = k in slot.holds
        slot.holds.add(k)
        return slot.views[k], holds_some

    def gradients_complete(self, unit: Unit) -> bool:
        """Whether the running backward has brought every gradient that the unit can get from it."""
        slot, task = unit.gradient_slot, backward_task()
        return all(k in slot.early or slot.arrived.get(k) == task for k in unit.trainable)

    def _acquire_gradient_slot(self, unit: Unit) -> GradientSlot:
        slot = unit.gradient_slot
        held = [other.unit.name for other in slot.neighbours if other.state is HELD]
        if held:
            self.isolate_gradients(unit, f"its gradients arrived before those of {held} were complete")
            slot = unit.gradient_slot
        with self._measured(COMPUTE, unit):
            self._wait_for_readers(COMPUTE, slot)
        slot.state = HELD
        return slot

    def reduce(self, unit: Unit) -> None:
        """Reduces the gradients that have arrived, and frees the slot, unless it holds parts of others."""
        slot = unit.gradient_slot
        if not slot.arrived and not slot.early:
            return
        slot.released = self._reduce_arrived(unit) if slot.arrived else self.last_reduce
        if not slot.holds:
            slot.early.clear()
            slot.state = EMPTY

    def _reduce_arrived(self, unit: Unit) -> Event:
        """Reduces into the gradient shard, sets or adds to ``.grad``, and returns when that is done."""
        slot = unit.gradient_slot
        arrived = sorted(slot.arrived)  # the same order on every rank
        complete = self.streams.record(COMPUTE)
        with label("reduce", unit), self.streams.on(REDUCE), torch.no_grad():
            self.streams.wait(REDUCE, complete)
            adding = [k for k in arrived if unit.params[k].has_own_grad]
            setting = [k for k in arrived if k not in adding]
            for k in setting:
                unit.params[k].spare_kept_grad()
            with self._measured(REDUCE, unit):
                for which, adds in ((setting, False), (adding, True)):
                    if which:
                        slot.reduce(which)(unit.reduction(), adds)
            for k in arrived:
                _deliver(unit.params[k], k in adding)
        self.last_reduce = self.streams.record(REDUCE)
        slot.holds.difference_update(arrived)
        slot.arrived.clear()
        return self.last_reduce

    def wait_for_reductions(self) -> None:
        """A backward ends: what follows on compute (clipping, the optimizer) sees every gradient."""
        if self.last_reduce is not None:
            with self._measured(COMPUTE, None):
                self.streams.wait(COMPUTE, self.last_reduce)
            self._expect(self.last_reduce)
            self.last_reduce = None

    def _expect(self, event: Event) -> None:
        """Ranks that wait for each other ahead of ``event`` must not do so for ever."""
        for transport in self.transports:
            transport.expect(event)

    def discard_gradients(self) -> None:
        """Drops gradients that are complete in part only, after a backward that failed."""
        for unit in self.units:
            unit.gradient_slot.state = EMPTY
            unit.gradient_slot.holds.clear()
            unit.gradient_slot.early.clear()
            unit.gradient_slot.arrived.clear()

    # --- steps that are recorded (graph.py) ---

    def repeatable_state(self) -> tuple[object, ...] | None:
        """What a step that starts now would decide by; None when it cannot be repeated as it is: something is running
        or held between steps, ``.grad`` is none of ours, or times are still to be measured, which a recording
        cannot do.
        """
        if self._arena is None or self.built_for != self._signatures() or self.stopwatch is not None:
            return None
        busy = self.iteration is not None or self.tasks or not self.is_last_backward
        if busy or not all(unit.policy.requires_gradient_sync for unit in self.units):
            return None
        state: list[object] = []
        for unit in self.units:
            slot, is_current = unit.gather_slot, unit.is_current
            if slot.state is IDLE:
                slot.state = EMPTY
            elif slot.state is FILLED and slot.generation != unit.generation():
                self.release(slot)
            if slot.state not in (EMPTY, FILLED) or unit.gradient_slot.state is not EMPTY:
                return None
            grads = tuple(p.has_own_grad for p in unit.params)
            if any(p.sharded.grad is not None and not p.has_own_grad for p in unit.params):
                return None
            state.append((slot.state is FILLED, is_current, grads))
        return (self.num_layouts, tuple(unit.reduction() for unit in self.units), *state)

    def fork_streams(self) -> None:
        """Side streams start here."""
        for stream in (GATHER, REDUCE):
            self.streams.wait(stream, self.streams.record(COMPUTE))

    def join_streams(self) -> None:
        """Compute waits for all that side streams were given, so that no event is left to wait for."""
        for stream in (GATHER, REDUCE):
            self.streams.wait(COMPUTE, self.streams.record(stream))
        self.last_reduce = None
        for unit in self.units:
            unit.gather_slot.ready = unit.gather_slot.released = unit.gradient_slot.released = None

    def after_recording(self, state: tuple[object, ...] | None, reduced: Sequence[ShardedParam]) -> None:
        """Nothing of the step has run yet: back to what it was recorded from."""
        assert state is not None
        for unit, (was_filled, *_) in zip(self.units, cast("list[tuple[bool, ...]]", state[2:]), strict=True):
            unit.gather_slot.state = FILLED if was_filled else EMPTY
        for p in reduced:
            p.sharded.grad = None

    def after_replay(self, reduced: Sequence[ShardedParam]) -> None:
        self._expect(self.streams.record(COMPUTE))
        for unit in self.units:
            unit.gather_slot.state = EMPTY
            unit.cast, unit.written_by_update = unit.generation(), False
        for p in reduced:
            p.sharded.grad = p.grad_dtensor

    # --- leaving the plan ---

    def isolate(self, unit: Unit, reason: str) -> None:
        """Gives ``unit`` a gather slot of its own, from its next forward on."""
        self.release(unit.gather_slot)  # of a gather ahead of time
        unit.own_gather_slot = True
        place, layout = self._reserve_own(unit, 0, reason)
        unit.gather_slot = slot_at(unit, place, layout.gather_slot)
        watch_gradients(unit.gather_slot)

    def isolate_gradients(self, unit: Unit, reason: str) -> None:
        """Gives ``unit`` a gradient slot of its own, from its next gradient on."""
        unit.own_gradient_slot = True
        place, layout = self._reserve_own(unit, -1, reason)
        unit.gradient_slot = GradientSlot(unit, place, layout.gradient_slot)

    def _reserve_own(self, unit: Unit, which: int, reason: str) -> tuple[Place, UnitLayout]:
        assert self._blueprint is not None and self._arena is not None
        layout = self._blueprint.layouts[unit]
        region = own_slot_regions(unit, layout)[which]
        known = len(self._arena.blocks)
        self._arena.reserve([region])
        if region.mapped:
            unit.transport.connect(self._arena.blocks[known:])
        self._blueprint = self._blueprint.with_region(region)
        self.num_layouts += 1
        self.spills.append(Spill(region.name, reason, region.nbytes))
        warnings.warn(
            f"{region.name} takes {region.nbytes:,} bytes beyond the memory plan: {reason}. Numbers are right, and "
            "later iterations reuse the slot. To plan for it, register modules in the order in which they run, and set "
            "reshard_after_forward=False on a unit whose forward runs another that is not its submodule",
            SpillWarning,
            stacklevel=2,
        )
        return self._arena.place(region.name), layout


def label(work: str, unit: Unit) -> AbstractContextManager[Any]:
    """Names ``work`` in profiles; costs nothing without a profiler."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"yafsdp::{work} {unit.name}")
    return nullcontext()


def watch_gradients(slot: GatherSlot) -> None:
    """From now on, gradients that autograd completes for the slot's parameters move into the unit's gradient slot."""
    for k in slot.unit.trainable:
        # Weak, since the garbage collector does not see through a parameter's hooks.
        unit_ref = weakref.ref(slot.unit)
        slot.params[k].register_post_accumulate_grad_hook(partial(_take_gradient, unit_ref, k))
        if slot.params[k].dim() == 2:
            attach(slot.params[k], GradientSink(unit_ref, k))


@dataclass(frozen=True)
class GradientSink:
    """Where linear layers write the gradient of parameter ``k`` of a unit: its place in the gradient slot."""

    unit: weakref.ref[Unit]
    k: int

    def open(self) -> tuple[torch.Tensor, bool] | None:
        """Nowhere, unless the gradient to come is all that the slot will hold, in the dtype that it is computed in:
        sums over several uses are left to autograd, whose order and rounding they then have, and which needs no slot
        before the last of them.
        """
        unit = self.unit()
        assert unit is not None and unit.engine is not None
        p = unit.params[self.k]
        if p.gradient_dtype != p.compute_dtype or len(unit.pending) > 1 or self.k in unit.gradient_slot.holds:
            return None
        return unit.engine.open_gradient(unit, self.k)

    def withdraw(self) -> torch.Tensor | None:
        unit = self.unit()
        assert unit is not None
        slot = unit.gradient_slot
        if self.k not in slot.holds or self.k in slot.arrived:
            return None
        slot.holds.discard(self.k)
        return slot.views[self.k].clone()


def _take_gradient(unit_ref: weakref.ref[Unit], k: int, param: torch.Tensor) -> None:
    unit, grad = unit_ref(), param.grad
    assert unit is not None and unit.engine is not None
    param.grad = None
    if grad is not None and grad.layout is not torch.strided:
        raise RuntimeError(
            f"{unit.params[k].name}: expected a dense gradient to reduce, found {grad.layout}; "
            "sparse gradients cannot be sharded, use sparse=False"
        )
    unit.engine.accumulate(unit, k, grad)


def backward_task() -> int | None:
    """Autograd's number of the backward that runs on this thread, or None outside of backward."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def engine_for(unit: Unit, module: nn.Module) -> Engine:
    """The engine that runs ``unit``. The first module to run becomes the root of all units below it.

    When a module above runs later, it becomes the root, and takes its units over with a plan of its own.
    """
    if unit.engine is None:
        units = {found: None for m in module.modules() if (found := unit_of(m)) is not None}
        _name(module, list(units))
        return Engine(module, list(units))
    return unit.engine


def _name(root: nn.Module, units: Sequence[Unit]) -> None:
    """Full names from the root, for units and their parameters."""
    names = {module: name for name, module in root.named_modules()}
    for unit in units:
        unit.name = ", ".join(names[m] or "root" for m in unit.modules if m in names)
        for p in unit.params:
            module, attribute = p.owners[0]
            p.name = f"{names[module]}.{attribute}" if names.get(module) else attribute


def _units_of_modules(units: Sequence[Unit]) -> dict[nn.Module, list[int]]:
    units_of: dict[nn.Module, list[int]] = {}
    for index, unit in enumerate(units):
        for module in unit.modules:
            units_of.setdefault(module, []).append(index)
    return units_of


def _reduced_early(units: Sequence[Unit], schedule: Schedule) -> dict[Unit, set[int]]:
    """Large parameters of units whose backward contains that of others: they do not wait for the unit's end.

    A head's gradient is then reduced behind the blocks, and only an embedding's is left for the end.
    """
    outer = (unit for unit, span in zip(units, schedule.spans, strict=True) if schedule.surrounds(span))
    return {u: {k for k in u.trainable if u.params[k].shards.padded_numel >= EARLY_NUMEL} for u in outer}


def _following(units: Sequence[Unit], order: Sequence[int]) -> dict[Unit, list[Unit]]:
    """For each unit, those expected after it, nearest first; units without parameters have nothing to gather."""
    ordered = [units[i] for i in order]
    return {unit: [u for u in ordered[position + 1 :] if u.params] for position, unit in enumerate(ordered)}


def _deliver(p: ShardedParam, was_added: bool) -> None:
    """Sets ``.grad`` to the gradient shard, where a reduction has just ended, or adds that to another ``.grad`` of the
    user's; then runs the user's hooks: autograd never accumulates into the sharded parameter, so the engine does.
    """
    if not was_added:
        grad = p.sharded.grad
        if grad is None:
            p.sharded.grad = p.grad_dtensor
        else:
            local = grad.to_local()  # type: ignore[attr-defined]  # a DTensor
            local.add_(p.grad[: local.numel()].view(local.shape))
    for hook in (getattr(p.sharded, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(p.sharded)
