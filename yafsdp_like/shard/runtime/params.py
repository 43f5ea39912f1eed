"""The life of full parameters: all-gathered ahead, read by compute, released, and gathered again for backward.

Owns every transition of a gather slot's state and the order of streams around it. It knows nothing of module hooks and
autograd graphs: ``hooks.py`` calls it when a forward or a backward of a unit starts and ends.

    EMPTY --all-gather--> FILLED --unshard--> HELD --keep--> KEPT --unshard--> HELD --release--> EMPTY
                                         HELD --release_but_keep--> STALE --unshard--> HELD
    FILLED, KEPT or STALE --a neighbour needs the bytes--> EMPTY

[Note: spills]
When a unit needs its slot while a neighbour's is HELD, execution has left the order that the plan was made for. In
forward the unit then gets a slot of its own, allocated once and kept, counted in ``spills`` and reported by a
warning; the next iteration finds it there. In backward an address cannot change any more, and the only honest answer
is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory.streams import COMPUTE, GATHER
from yafsdp_like.shard.runtime.context import EngineContext, label
from yafsdp_like.shard.runtime.debug import Debugger
from yafsdp_like.shard.runtime.slots import SlotState

if TYPE_CHECKING:
    from collections.abc import Collection

    from yafsdp_like.shard.runtime.param import ShardedParam
    from yafsdp_like.shard.runtime.slots import GatherSlot
    from yafsdp_like.shard.runtime.unit_state import Unit

EMPTY, FILLED, HELD = SlotState.EMPTY, SlotState.FILLED, SlotState.HELD
KEPT, STALE = SlotState.KEPT, SlotState.STALE


class ParamLifecycle:
    """Moves the gather slots of one model's units from state to state."""

    def __init__(self, context: EngineContext) -> None:
        self._context, self._streams, self._units = context, context.streams, context.tree.units
        self._reads_host = any(unit.is_on_host for unit in self._units)
        self.wasted_prefetches = 0
        self.evictions = 0
        self.debug: Debugger | None = None  # in debug mode, what checks memory; outputs are checked too
        asked = [unit.needs for unit in self._units if unit.needs.guards]
        if asked:
            self.set_debug(True, own_slots=any(needs.own_gather_slot for needs in asked))

    def set_debug(self, debug: bool, own_slots: bool = True) -> None:
        """Set debug mode, in which no unit's slot is another's, so that what it leaves there, poison, stays.

        Without ``own_slots`` they share bytes as planned, which shows errors of the schedule.
        """
        if self.debug is not None:
            self.debug.close()
        self.debug = Debugger(self._units) if debug else None
        for unit in self._units:
            unit.need(guards=debug, own_gather_slot=debug and own_slots)
        self._context.memory.debugger = self.debug
        self._context.memory.invalidate()

    # --- before a forward, and around an update ---

    def begin(self) -> None:
        """Start a forward: order all-gathers behind what compute wrote (by an optimizer, say), and drop stale slots."""
        self._context.collective_log.begins_forward()
        self.publish()
        for unit in self._units:
            slot = unit.gather_slot
            if slot.state is STALE:  # left by a forward without a backward; weights may have changed since, uncounted
                slot.drop()
            elif slot.state is not EMPTY and slot.version != unit.freshness.main_version():
                self.release(slot)
        if self.debug is not None:
            self.debug.check("a forward begins")

    def publish(self) -> None:
        """Let all-gathers from here on, of any rank, read what this rank's main shards are now.

        Where peers read compute shards in place, all are made current between two stream barriers: the first says that
        nobody reads them any more, the second that they are written. Otherwise each is made so when it is all-gathered,
        from halves of a split master that are written here, on compute: it has what was written, and frees that.
        """
        self._settle()
        self._streams.wait(GATHER, self._streams.record(COMPUTE))
        if not self._context.mapped:
            return
        with self._streams.on(GATHER), torch.no_grad():
            for mapped in self._context.mapped:
                mapped.stream_barrier(GATHER)
            units = (unit for unit in self._units if unit.transport.mapped is not None)
            written = [work for unit in units for work in (unit.settle(), unit.refresh_compute_shard())]
            for mapped in self._context.mapped:
                mapped.stream_barrier(GATHER)
        self._context.arm_watchdog(self._streams.record(GATHER))
        if any(written):  # what next updates main shards comes after, and what takes the memory that settling freed
            self._streams.wait(COMPUTE, self._streams.record(GATHER))

    def _settle(self) -> None:
        """Split what was written to split masters, for units whose compute shard is read by this rank alone."""
        split = [unit for unit in self._units if unit.split and unit.transport.mapped is None]
        written = [unit for unit in split if any(p.is_written for p in unit.split)]
        if written:
            self._streams.wait(COMPUTE, self._streams.record(GATHER))  # which may still read it
            with torch.no_grad():
                for unit in written:
                    unit.settle()

    def before_update(self) -> None:
        """Order an optimizer's writes to compute shards, from here on, behind every rank's all-gathers from them."""
        self._streams.wait(COMPUTE, self._streams.record(GATHER))
        for mapped in self._context.mapped:
            mapped.stream_barrier(COMPUTE)

    def after_update(self, unit: Unit, params: Collection[ShardedParam]) -> None:
        """Note that an optimizer has written main and compute shards of ``params``; all-gather if these are all."""
        unit.freshness.updated(params)
        if unit.freshness.is_current():
            self.gather_ahead(unit)

    def gather_ahead(self, unit: Unit) -> None:
        """All-gather an updated unit for the next forward, if its bytes are free and peers need not take part."""
        slot = unit.gather_slot
        is_free = slot.state in (EMPTY, STALE) and slot.has_neighbours_in((EMPTY, STALE))
        mapped = unit.transport.mapped
        if not is_free or mapped is None:
            return
        self._context.collective_log.updates(unit)
        if unit.forward_shard is not None:
            unit.forward_shard.drop()
        slot.drop()  # the values in it are from before the update
        self._streams.wait(GATHER, self._streams.record(COMPUTE))
        with self._streams.on(GATHER):
            mapped.stream_barrier(GATHER)
        self.all_gather(slot, refresh=False)

    # --- all-gathers ---

    def all_gather(self, slot: GatherSlot, refresh: bool) -> None:
        """Issue the all-gather of an EMPTY slot, none of whose neighbours is HELD; the slot is FILLED. Does not wait.

        ``refresh`` casts the main shard first: in forward, and not in backward, which must see forward's values again.
        Compute shards that peers read in place are left to ``publish``.
        """
        assert slot.state is EMPTY
        self._make_room(slot)
        unit = slot.unit
        kept = unit.forward_shard is not None and unit.forward_shard.is_kept and not refresh
        self._context.collective_log.gathers(unit, kept)
        with label("all_gather", unit), self._streams.on(GATHER):
            self._context.wait_for_last_accesses(GATHER, slot)
            if refresh and unit.transport.mapped is None:
                unit.refresh_compute_shard()
            if kept:
                slot.gather_kept()
            else:
                slot.all_gather()
        slot.fill(self._streams.record(GATHER), kept)

    def prefetch(self, unit: Unit, refresh: bool) -> None:
        """All-gather the unit ahead of its use if its slot's bytes are free; do nothing otherwise."""
        slot = unit.gather_slot
        if slot.state is EMPTY and slot.has_neighbours_in((EMPTY, FILLED, STALE)):
            self.all_gather(slot, refresh)

    def unshard(self, slot: GatherSlot, refresh: bool) -> None:
        """Make the slot's full parameters readable by compute and visible to modules: the slot is HELD.

        Its HELD neighbours must be asked about before, with ``blockers``.
        """
        if refresh and slot.unit.forward_shard is not None:
            slot.unit.forward_shard.drop()
        if slot.state is EMPTY:
            self.all_gather(slot, refresh)
        if slot.state is FILLED:
            self._wait_until_ready(slot)
        slot.look_at_shards()
        slot.hold()
        if slot.extended:
            slot.arrive()
        slot.unit.register(slot)

    def _wait_until_ready(self, slot: GatherSlot) -> None:
        if slot.ready is not None:
            self._streams.wait(COMPUTE, slot.ready)

    def unshard_to(self, unit: Unit, values: list[torch.Tensor]) -> None:
        """Unshard a unit that was unsharded before its slot was made, to the ``values`` that the user saw or wrote."""
        if blockers := self.blockers(unit.gather_slot):
            self.isolate(unit, f"it and {[b.unit.name for b in blockers]} were unsharded before the root's forward")
        slot = unit.gather_slot
        with torch.no_grad():
            for param, value in zip(slot.params, values, strict=True):
                param.detach().copy_(value)
        slot.hold_edited()
        unit.register(slot)

    # --- room ---

    def blockers(self, slot: GatherSlot) -> list[GatherSlot]:
        """Return the neighbours in use, whose bytes ``slot`` would need and cannot have."""
        if slot.state is not EMPTY:
            return []
        return [other for other in slot.neighbours if other.state is HELD]

    def others_awaiting_backward(self, slot: GatherSlot) -> list[str]:
        """Return the names of other models' units that will need ``slot``'s bytes for a backward."""
        if self._context.memory.shared is None:
            return []
        others = (other.unit for other in slot.neighbours if other.unit not in self._units)
        return [unit.name for unit in others if unit.awaits_backward]

    def _make_room(self, slot: GatherSlot) -> None:
        for other in slot.neighbours:
            if other.state is EMPTY:
                continue
            assert other.state is not HELD, f"{slot.unit.name!r} needs what {other.unit.name!r} computes on"
            if other.state is FILLED:
                self.wasted_prefetches += 1
                other.drop()  # only GATHER has touched it, and GATHER runs in order
            elif other.state is KEPT:
                self.evictions += 1
                self.release(other)
            else:
                other.drop()

    def isolate(self, unit: Unit, reason: str) -> None:
        """Give ``unit`` a gather slot of its own, from its next forward on."""
        self.release(unit.gather_slot)  # of a prefetch
        self._context.memory.add_gather_slot(unit, reason)

    # --- releasing ---

    def release_but_keep(self, slot: GatherSlot) -> None:
        """Release the slot but leave its values: a later unshard skips the all-gather if nobody took the bytes."""
        unit = slot.unit
        if unit.forward_shard is not None and unit.awaits_backward:
            unit.forward_shard.keep(slot.outputs)
        self.release(slot)
        if self.debug is None:
            slot.leave_stale()

    def release(self, slot: GatherSlot) -> None:
        """Free the bytes after all reads that were issued; modules see the shards again."""
        if slot.state in (HELD, KEPT):
            slot.release(self._streams.record(COMPUTE))
            if slot.extended:
                slot.leave()
            if slot.unit.awaits_backward and slot.unit.policy.unshard_in_backward:
                slot.hide()
        else:
            if slot.state is FILLED:  # a prefetch that nobody read: compute may write the shards only after it
                self._wait_until_ready(slot)
            slot.drop()
        if slot.unit.registered is slot:
            slot.unit.register(None)

    def reshard(self, unit: Unit) -> None:
        """Release whatever holds the unit's full parameters; modules see the shards again."""
        for slot in unit.slots:
            self.release(slot)
        unit.register(None)

    def settle_prefetches(self) -> None:
        """End an iteration: drop prefetches that nobody read, and values that no backward will read again.

        The optimizer may write the shards then, also on the CPU, which waits until those in host memory were read.
        """
        for unit in self._units:
            if unit.gather_slot.state is FILLED:
                self.wasted_prefetches += 1
                self.release(unit.gather_slot)
            elif unit.gather_slot.state is STALE and not unit.running.pending:
                unit.gather_slot.drop()
        if self._reads_host:
            self._streams.synchronize(self._streams.record(GATHER))
        if self.debug is not None:
            self.debug.check("a forward or a backward ends")
