"""The runtime of one sharded model: fills, reads and releases slots in stream order, and reduces gradients.

The engine owns every transition of a slot's state and the order of streams around it, and decides when memory is
built again, which ``allocated_memory.py`` does. It knows nothing of module hooks and autograd graphs: ``hooks.py``
calls it when a forward or a backward starts and ends.

    gather slot      EMPTY --all-gather--> FILLED --unshard--> HELD --keep--> KEPT --unshard--> HELD --release--> EMPTY
                                                           HELD --release_but_keep--> STALE --unshard--> HELD
                     FILLED, KEPT or STALE --a neighbour needs the bytes--> EMPTY
    gradient slot    EMPTY --first gradient--> HELD --reduce-scatter--> EMPTY

[Note: spills]
When a unit needs its slot while a neighbour's is HELD, execution has left the order that the plan was made for. In
forward the unit then gets a slot of its own, allocated once and kept, counted in ``spills`` and reported by a
warning; the next iteration finds it there. In backward an address cannot change any more, and the only honest answer
is an error.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE, Event, streams_of
from yafsdp_like.ops import linear
from yafsdp_like.shard.runtime.allocated_memory import AllocatedMemory, Spill
from yafsdp_like.shard.runtime.collective_log import CollectiveLog
from yafsdp_like.shard.runtime.debug import poison
from yafsdp_like.shard.runtime.sinks import watch_gradients
from yafsdp_like.shard.runtime.unit_spec import SlotState
from yafsdp_like.shard.runtime.unit_tree import UnitTree, unit_tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.shard.runtime.unit_state import Call, ForwardUse, GatherSlot, GradientSlot, Unit

EMPTY, FILLED, HELD = SlotState.EMPTY, SlotState.FILLED, SlotState.HELD
KEPT, STALE = SlotState.KEPT, SlotState.STALE


EARLY_NUMEL = 1 << 23  # a reduction of fewer elements costs more in latency than it hides


class SpillWarning(UserWarning):
    """A unit was given memory beyond the plan, because modules ran in an order that the plan did not expect."""


@dataclass(frozen=True)
class Report:
    """Bytes held now, and what did not go by the plan since the model was sharded: nothing, in a well-planned run."""

    arena_nbytes: int
    spills: tuple[Spill, ...]
    wasted_prefetches: int  # gathers ahead of time that nobody read
    evictions: int  # units that were to stay gathered and had to make room


class ShardEngine:
    """Of one root module and the units below it."""

    def __init__(self, tree: UnitTree) -> None:
        self.tree = tree
        self.units = tree.units
        self.streams = streams_of(self.units[0].device)
        self.mapped = list(
            dict.fromkeys(unit.transport.mapped for unit in self.units if unit.transport.mapped is not None)
        )
        self.collective_log = CollectiveLog(self.units)
        self.memory = AllocatedMemory(tree, self.collective_log)
        self.wasted_prefetches = 0
        self.evictions = 0
        self.last_reduce: Event = None  # the end of the latest reduction; None once compute has waited for it
        self.reduced_early = _reduced_early(tree)
        self.debug = False  # released slots are poisoned, and outputs checked
        self.filled: list[Unit] = []  # whose unused parameters the running backward reduces, in order of reduction
        self.reduced: set[Unit] = set()  # by the running backward
        self._trains = all(unit.trains for unit in self.units)  # units may have been evaluated alone before
        self.is_last_backward = True  # whether the end of a backward waits for its reductions
        self.iteration: Call | None = None  # the forward that everything running now is part of
        self.tasks: dict[int, list[ForwardUse]] = {}  # by autograd's number of a running backward: what it reached
        for unit in self.units:
            unit.engine = self

    def __del__(self) -> None:
        """The root module is gone, and every graph of it: breaks what keeps units, slots and linear layers alive. See
        [Note: who owns whom]. Units whose modules are still there get another engine when they run.
        """
        if sys.is_finalizing():
            return
        units = [unit for unit in self.units if unit.engine in (self, None)]
        for owner in _owners(units):
            linear.uninstall(owner)
        if self.memory.arena is not None:
            self._wait_for_side_streams()
        for unit in units:
            if unit.has_slots:
                self._part_with_slots(unit)

    def _part_with_slots(self, unit: Unit) -> None:
        for slot in unit.slots:
            slot.neighbours.clear()  # which lead to each other
        unit.gradient_slot.neighbours.clear()
        if unit.unsynced() is None and all(slot.state is not HELD for slot in unit.slots):
            self.reshard(unit)
            unit.forget_slots()

    # --- the plan ---

    def plan(self) -> MemoryPlan:
        """What the arenas hold; before they are built, what they will hold. Allocates nothing."""
        return self.memory.plan()

    @property
    def is_built(self) -> bool:
        """Whether there are shards and slots for the units as they are now."""
        return self.memory.is_built

    @property
    def num_layouts(self) -> int:
        """How often slots were given places."""
        return self.memory.num_layouts

    @property
    def arena_nbytes(self) -> int:
        """The bytes held now, main shards included."""
        return self.memory.nbytes

    def report(self) -> Report:
        return Report(self.arena_nbytes, tuple(self.memory.spills), self.wasted_prefetches, self.evictions)

    def build_if_changed(self) -> None:
        """Makes shards and slots before the first iteration, and again when parameters were moved, cast or (un)frozen.

        Slots that autograd still refers to live on until their graph is gone. Raises the same error on every rank
        when a rank cannot go on, or when ranks shard different models.
        """
        self._follow_grad_mode()
        if self.is_built:
            return
        self.collective_log.builds()
        error: Exception | None = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._build()
        except Exception as e:
            error = e
        self.memory.check_same_on_all_ranks(error)

    def _follow_grad_mode(self) -> None:
        """A model that begins without grad mode gets room for gradients only once a forward may lead to a backward."""
        if not self._trains and torch.is_grad_enabled():
            self.make_trainable()
        elif self.num_layouts == 0 and not torch.is_grad_enabled():
            self._trains = any(p.sharded.grad is not None for unit in self.units for p in unit.params)
            for unit in self.units:
                unit.trains = self._trains

    def make_trainable(self) -> None:
        """The next forward finds room for gradients."""
        self._trains = True
        for unit in self.units:
            unit.trains = True
        self.memory.invalidate()

    def _build(self) -> None:
        edited = {
            unit: unit.copy_unsharded() for unit in self.units if unit.registered and unit.registered.state is HELD
        }
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
        self._leave_memory()
        self.memory.build()
        for unit in self.units:
            watch_gradients(unit.gather_slot)
        for slot in unsynced:
            for k in slot.arrived:
                self.accumulate(slot.unit, k, slot.views[k])
        for unit, values in edited.items():
            self._unshard_to(unit, values)

    def _unshard_to(self, unit: Unit, values: Sequence[torch.Tensor]) -> None:
        """The user unsharded ``unit`` before this was built, and may have edited what he saw: it is unsharded here too,
        with his values.
        """
        if blockers := self.blockers(unit.gather_slot):
            self.isolate(unit, f"it and {[b.unit.name for b in blockers]} were unsharded before the root's forward")
        slot = unit.gather_slot
        with torch.no_grad():
            for param, value in zip(slot.params, values, strict=True):
                param.detach().copy_(value)
        slot.state, slot.version = HELD, unit.freshness.main_version()
        unit.register(slot)

    def _leave_memory(self) -> None:
        self._wait_for_side_streams()
        self.memory.leave()

    def _wait_for_side_streams(self) -> None:
        for stream in (GATHER, REDUCE):  # its bytes go back to the allocator, which knows only compute
            self.streams.wait(COMPUTE, self.streams.record(stream))

    def set_debug(self, debug: bool) -> None:
        """In debug mode no unit's slot is another's, so that what it leaves there, poison, stays to be found."""
        self.debug = debug
        for unit in self.units if debug else ():
            unit.own_gather_slot = True
        self.memory.invalidate()

    # --- gather slots ---

    def begin(self) -> None:
        """A forward starts: what compute wrote (optimizer, loaded weights) comes before all gathers; stale slots go."""
        self.build_if_changed()
        self.collective_log.begins_forward()
        self.publish()
        for unit in self.units:
            slot = unit.gather_slot
            if slot.state is STALE:  # left by a forward without a backward; weights may have changed since, uncounted
                slot.state = EMPTY
            elif slot.state is not EMPTY and slot.version != unit.freshness.main_version():
                self.release(slot)

    def publish(self) -> None:
        """Gathers from here on, of any rank, bring what this rank's main shards are now.

        Where peers read compute shards in place, all are made current between two stream barriers: the first says that
        nobody reads them any more, the second that they are written. Otherwise each is when it is gathered.
        """
        self.streams.wait(GATHER, self.streams.record(COMPUTE))
        if not self.mapped:
            return
        with self.streams.on(GATHER), torch.no_grad():
            for mapped in self.mapped:
                mapped.stream_barrier(GATHER)
            cast = [unit.refresh_compute_shard() for unit in self.units if unit.transport.mapped is not None]
            for mapped in self.mapped:
                mapped.stream_barrier(GATHER)
        self.arm_watchdog(self.streams.record(GATHER))
        if any(cast):  # the next update of the main shards comes after
            self.streams.wait(COMPUTE, self.streams.record(GATHER))

    def before_update(self) -> None:
        """An optimizer will write compute shards from here on: on no rank a gather reads them any more."""
        self.streams.wait(COMPUTE, self.streams.record(GATHER))
        self.collective_log.updates()
        for mapped in self.mapped:
            mapped.stream_barrier(COMPUTE)

    def after_update(self, unit: Unit, is_whole: bool) -> None:
        """An optimizer has written main and compute shards of the unit's parameters (all, if ``is_whole``): gathers it
        for the next forward, if its bytes are free and peers need not take part.
        """
        if is_whole:
            unit.freshness.compute_shard_written(by_update=True)
        else:
            unit.freshness.main_shards_written()
        slot = unit.gather_slot
        is_free = all(s.state in (EMPTY, STALE) for s in (slot, *slot.neighbours))
        mapped = unit.transport.mapped
        if not is_whole or not is_free or mapped is None:
            return
        self._make_room(slot)
        self.collective_log.updates(unit)
        slot.state = EMPTY  # the values in it are from before the update
        self.streams.wait(GATHER, self.streams.record(COMPUTE))
        with self.streams.on(GATHER):
            mapped.stream_barrier(GATHER)
        self.all_gather(slot, refresh=False)

    def all_gather(self, slot: GatherSlot, refresh: bool) -> None:
        """Issues the gather of an EMPTY slot whose neighbours are all EMPTY; the slot is FILLED. Does not wait.

        ``refresh`` casts the main shard first: in forward, and not in backward, which must see forward's values again.
        Compute shards that peers read in place are left to ``publish``.
        """
        assert slot.state is EMPTY and all(other.state is EMPTY for other in slot.neighbours)
        unit = slot.unit
        self.collective_log.gathers(unit)
        with label("all_gather", unit), self.streams.on(GATHER):
            self._wait_for_readers(GATHER, slot)
            if refresh and unit.transport.mapped is None:
                unit.refresh_compute_shard()
            slot.all_gather()
        slot.ready = self.streams.record(GATHER)
        slot.version = unit.freshness.compute_version
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
        if slot.state is EMPTY and all(other.state in (EMPTY, FILLED, STALE) for other in slot.neighbours):
            self._make_room(slot)
            self.all_gather(slot, refresh)

    def unshard(self, slot: GatherSlot, refresh: bool) -> None:
        """Makes the slot's full parameters readable by compute and visible to modules: the slot is HELD.

        Its HELD neighbours must be asked about before, with ``blockers``.
        """
        if slot.state is EMPTY:
            self._make_room(slot)
            self.all_gather(slot, refresh)
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
            elif other.state is STALE:
                other.state = EMPTY

    def keep(self, slot: GatherSlot) -> None:
        """The work on the slot is over, but the user wants it to stay gathered."""
        slot.state = KEPT

    def release_but_keep(self, slot: GatherSlot) -> None:
        """As ``release``, but who comes back before a neighbour took the bytes finds them filled."""
        self.release(slot)
        if not self.debug:
            slot.state = STALE

    def release(self, slot: GatherSlot) -> None:
        """All reads of the slot have been issued: its bytes are free after them, and modules see the shards again."""
        if slot.state is FILLED:  # a gather that nobody read: compute may write the shards only after it
            self._wait_until_ready(slot)
        elif slot.state in (HELD, KEPT):
            if self.debug and slot.extent is not None:
                poison(slot)
            slot.released = self.streams.record(COMPUTE)
        slot.state = EMPTY
        if slot.unit.registered is slot:
            slot.unit.register(None)

    def reshard(self, unit: Unit) -> None:
        for slot in unit.slots:
            self.release(slot)
        unit.register(None)

    def settle_prefetches(self) -> None:
        """An iteration ends: gathers that nobody read are dropped, so that the optimizer may write the shards, and so
        are values that no backward will come back for.
        """
        for unit in self.units:
            if unit.gather_slot.state is FILLED:
                self.wasted_prefetches += 1
                self.release(unit.gather_slot)
            elif unit.gather_slot.state is STALE and not unit.pending:
                unit.gather_slot.state = EMPTY

    # --- gradient slots ---

    def check_entered(self, unit: Unit, k: int) -> None:
        """The running backward, which has entered the unit by none of its outputs, has computed parameter ``k``'s
        gradient: raises ``RuntimeError`` if the unit is released, since what was read there may have been another's.
        """
        slot = unit.gather_slot
        if slot.extent is not None and slot.state not in (HELD, KEPT) and unit.policy.unshard_in_backward:
            raise RuntimeError(
                f"a gradient of {unit.params[k].name!r} came while {unit.name!r} was released: backward entered it by "
                "a tensor that its forward did not return, or returned inside an object (rank "
                f"{unit.transport.rank}). Return such tensors in tuples, lists, dicts or dataclasses, and use what the "
                "module's call gives; or call set_unshard_in_backward(False) if its backward reads no parameter"
            )

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
        policy = unit.policy
        if policy.requires_gradient_sync and not policy.reduces_unused and k in self.reduced_early.get(unit, ()):
            together = list(slot.arrived)
            slot.early |= dict.fromkeys(together, self._reduce_arrived(unit))

    def open_gradient(self, unit: Unit, k: int) -> tuple[torch.Tensor, bool]:
        """Where to write parameter ``k``'s full gradient, and whether to add it to what is there already."""
        if not unit.trains:
            self.make_trainable()
            raise RuntimeError(
                f"a gradient of {unit.params[k].name!r} came from a forward that began without grad mode, as all did "
                f"so far: there is no room for it yet (rank {unit.transport.rank}). There will be in the next forward: "
                "run it again"
            )
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
        self._wait_for_readers(COMPUTE, slot)
        slot.state = HELD
        return slot

    def begin_backward(self) -> None:
        """The first gradient of an outermost backward has come."""
        self.filled = [unit for unit in self.tree.backward_ticks if unit.policy.reduces_unused]
        self.reduced.clear()

    def reduce_unused(self, tick: int) -> None:
        """Units that are to be reduced whether they are used or not, whose backward was expected to end before ``tick``
        and will not come: they are reduced where they are on ranks that use them.
        """
        for unit in self.filled:
            if self.tree.backward_ticks[unit][1] >= tick:
                return
            if unit.policy.requires_gradient_sync and not unit.pending and unit not in self.reduced:
                self.reduce_scatter(unit)

    def _fill_unused(self, unit: Unit) -> None:
        for k in unit.trainable:
            if k not in unit.gradient_slot.holds:
                view, _ = self.open_gradient(unit, k)
                with torch.no_grad():
                    view.zero_()
                unit.gradient_slot.arrived[k] = backward_task()

    def reduce_scatter(self, unit: Unit) -> None:
        """Reduces the gradients that have arrived, and frees the slot, unless it holds parts of others."""
        slot = unit.gradient_slot
        if unit.policy.reduces_unused and unit not in self.reduced:
            self.reduced.add(unit)
            self.reduce_unused(self.tree.backward_ticks[unit][1])
            self._fill_unused(unit)
            slot = unit.gradient_slot
        if not slot.arrived and not slot.early:
            return
        if self.filled and unit not in self.reduced:
            self.reduced.add(unit)
            self.reduce_unused(self.tree.backward_ticks[unit][1])
        slot.released = self._reduce_arrived(unit) if slot.arrived else self.last_reduce
        if not slot.holds:
            slot.early.clear()
            slot.state = EMPTY

    def _reduce_arrived(self, unit: Unit) -> Event:
        """Reduces into the gradient shard, sets or adds to ``.grad``, and returns when that is done."""
        slot = unit.gradient_slot
        arrived = sorted(slot.arrived)  # the same order on every rank
        complete = self.streams.record(COMPUTE)
        with label("reduce_scatter", unit), self.streams.on(REDUCE), torch.no_grad():
            self.streams.wait(REDUCE, complete)
            adding = [k for k in arrived if unit.params[k].has_own_grad]
            setting = [k for k in arrived if k not in adding]
            self.collective_log.reduces(unit, setting, adding)
            slot.spare_kept_grads(setting)
            for which, adds in ((setting, False), (adding, True)):
                if which:
                    slot.reduce_scatter(which)(unit.reduction(), adds)
            for k in arrived:
                unit.params[k].deliver_grad(k in adding)
        self.last_reduce = self.streams.record(REDUCE)
        slot.holds.difference_update(arrived)
        slot.arrived.clear()
        return self.last_reduce

    def wait_for_reductions(self) -> None:
        """A backward ends: what follows on compute (clipping, the optimizer) sees every gradient."""
        if self.last_reduce is not None:
            self.streams.wait(COMPUTE, self.last_reduce)
            self.arm_watchdog(self.last_reduce)
            self.last_reduce = None

    def arm_watchdog(self, event: Event) -> None:
        """Ranks that wait for each other ahead of ``event`` must not do so for ever."""
        for mapped in self.mapped:
            mapped.arm_watchdog(event)

    def discard_gradients(self) -> None:
        """Drops gradients that are complete in part only, after a backward that failed."""
        for unit in self.units:
            unit.gradient_slot.state = EMPTY
            unit.gradient_slot.holds.clear()
            unit.gradient_slot.early.clear()
            unit.gradient_slot.arrived.clear()

    # --- leaving the plan ---

    def isolate(self, unit: Unit, reason: str) -> None:
        """Gives ``unit`` a gather slot of its own, from its next forward on."""
        self.release(unit.gather_slot)  # of a gather ahead of time
        spill = self.memory.add_gather_slot(unit, reason)
        watch_gradients(unit.gather_slot)
        _warn_of(spill)

    def isolate_gradients(self, unit: Unit, reason: str) -> None:
        """Gives ``unit`` a gradient slot of its own, from its next gradient on."""
        _warn_of(self.memory.add_gradient_slot(unit, reason))


def _warn_of(spill: Spill) -> None:
    warnings.warn(
        f"{spill.region} takes {spill.nbytes:,} bytes beyond the memory plan: {spill.reason}. Numbers are right, and "
        "later iterations reuse the slot. To plan for it, register modules in the order in which they run, and set "
        "reshard_after_forward=False on a unit whose forward runs another that is not its submodule",
        SpillWarning,
        stacklevel=2,
    )


def label(work: str, unit: Unit) -> AbstractContextManager[Any]:
    """Names ``work`` in profiles; costs nothing without a profiler."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"yafsdp::{work} {unit.name}")
    return nullcontext()


def backward_task() -> int | None:
    """Autograd's number of the backward that runs on this thread, or None outside of backward."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def engine_of(unit: Unit) -> ShardEngine | None:
    """Return the engine that runs ``unit``; None before its root is known, and once that is gone."""
    engine = unit.engine
    assert engine is None or isinstance(engine, ShardEngine)
    return engine


def engine_for(unit: Unit, module: nn.Module) -> ShardEngine:
    """The engine that runs ``unit``. The first module to run becomes the root of all units below it.

    When a module above runs later, it becomes the root, and takes its units over with a plan of its own.
    """
    engine = engine_of(unit)
    if engine is None:
        engine = ShardEngine(unit_tree_of(module))
        for below in module.modules():
            vars(below).pop("_yafsdp_engine", None)  # of a root that is none any more
        vars(module)["_yafsdp_engine"] = engine
        for owner in _owners(engine.units):
            linear.install(owner)
    return engine


def _owners(units: Sequence[Unit]) -> Iterator[nn.Module]:
    return (module for unit in units for p in unit.params for module, _ in p.owners)


def _reduced_early(tree: UnitTree) -> dict[Unit, set[int]]:
    """Large parameters of units whose backward contains that of others: they do not wait for the unit's end.

    A head's gradient is then reduced behind the blocks, and only an embedding's is left for the end.
    """
    spans = zip(tree.units, tree.schedule.spans, strict=True)
    outer = (unit for unit, span in spans if tree.schedule.surrounds(span))
    return {u: {k for k in u.trainable if u.params[k].shards.padded_numel >= EARLY_NUMEL} for u in outer}
