"""Debug mode: reads and writes of memory where there should be none become errors that name the units.

Owns what is checked and when, and the words of the errors; the marks in memory are those of ``memory/guards.py``. It
waits for the GPU at every check, and is off unless ``FSDPModule.set_debug_mode`` was called or ``YAFSDP_DEBUG`` is set.

[Note: what debug mode finds]
* A write past the end of a parameter or before its start, in a slot or a shard, or behind a gradient shard: guard bytes
  lie there, a canary is written to those of a slot when it is taken, and checked when it is released; those of shards
  are checked at the begins and ends of forwards, backwards and updates.
* A read of what was released: it is NaN, and so is then the unit's output.
* A write to what was released, a gradient after its reduce-scatter began, say: the poison is looked at when somebody
  takes the bytes, and at those ends.
* Two units that hold the same bytes, and a unit that uses a slot which it does not hold: this file keeps its own books,
  by address, and not by the neighbours that slots know of.

Everything that takes, uses or releases a slot is noted, so that an error can say what ran since memory was last intact.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from yafsdp_like.memory.guards import Borders, damage_of, poison, written
from yafsdp_like.memory.layout import FlatLayout
from yafsdp_like.shard.runtime.nested import tensors_in
from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot, SlotState
from yafsdp_like.shard.spec.memory_layout import DOWNLOAD, GATHERED, REDUCED, STAGING, UPLOAD

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from yafsdp_like.comm.transport import AllGather
    from yafsdp_like.memory.arena import Arena
    from yafsdp_like.memory.streams import Event
    from yafsdp_like.shard.runtime.shared_slots import SlotSharing
    from yafsdp_like.shard.runtime.unit_state import Unit
    from yafsdp_like.shard.spec.memory_layout import MemoryLayout
    from yafsdp_like.shard.spec.unit_spec import UnitLayout

AnySlot = GatherSlot | GradientSlot
_NUM_TOLD = 12  # things that ran, in an error


class _WatchedGatherSlot(GatherSlot):
    """A gather slot in debug mode."""

    watch: _Watch

    @cached_property
    def all_gather(self) -> AllGather:
        """Take the bytes, and all-gather."""
        return self._taking(super().all_gather)

    @cached_property
    def gather_kept(self) -> AllGather:
        """See ``GatherSlot``."""
        return self._taking(super().gather_kept)

    def _taking(self, all_gather: AllGather) -> AllGather:
        def run() -> None:
            self.watch.take("all-gathers into")
            all_gather()

        return run

    def hold(self) -> None:
        """See ``GatherSlot``."""
        super().hold()
        self.watch.use("computes with")

    def hold_edited(self) -> None:
        """See ``GatherSlot``."""
        super().hold_edited()
        self.watch.take("is given values in")

    def release(self, done: Event) -> None:
        """See ``GatherSlot``."""
        super().release(done)
        self.watch.release()

    def drop(self) -> None:
        """See ``GatherSlot``."""
        super().drop()
        self.watch.release()


class _WatchedGradientSlot(GradientSlot):
    """A gradient slot in debug mode."""

    watch: _Watch

    def hold(self) -> None:
        """See ``GradientSlot``."""
        super().hold()
        self.watch.take("puts gradients into")

    def open(self, k: int) -> tuple[torch.Tensor, bool]:
        """See ``GradientSlot``."""
        self.watch.use(f"puts that of {self.unit.params[k].name!r} into")
        return super().open(k)

    def release(self, done: Event) -> None:
        """See ``GradientSlot``."""
        super().release(done)
        if self.state is SlotState.EMPTY:
            self.watch.release()

    def drop(self) -> None:
        """See ``GradientSlot``."""
        super().drop()
        self.watch.release()


class _Watch:
    """What debug mode knows of one slot: its guards, its values, and who holds it."""

    def __init__(self, debugger: Debugger, slot: AnySlot, layout: FlatLayout, values: Sequence[torch.Tensor]) -> None:
        assert slot.extent is not None
        kind = "all-gather" if isinstance(slot, GatherSlot) else "gradient"
        self.name = slot.unit.name
        self.what = f"the {kind} slot of {self.name!r}"
        self._debugger, self._values = debugger, values
        self._borders = Borders(self.what, slot.extent, layout, [p.name for p in slot.unit.params])
        storage, start = slot.extent.arena.storage(slot.extent.region)
        begin = storage.data_ptr() + start + slot.extent.segment.offset_nbytes
        self.addresses = range(begin, begin + slot.extent.segment.nbytes)
        self.held = ""  # by what, in words
        self.is_poisoned = False  # and was not taken since
        self.last_check = debugger.count
        sharing = debugger.sharing(self)
        if any(other.held for other in sharing):
            return  # by another model
        for other in sharing:
            other.forget_poison()
        for flat in values:
            poison(flat)

    def shares(self, other: _Watch) -> bool:
        """Return whether the two have a byte in common."""
        mine, others = self.addresses, other.addresses
        return max(mine.start, others.start) < min(mine.stop, others.stop)

    def take(self, does: str) -> None:
        """Note that the unit is about to write the bytes, of which nobody may hold any."""
        note = self._debugger.note(f"{self.name!r} {does} its {self.what.split()[1]} slot")
        sharing = self._debugger.sharing(self)
        for other in sharing:
            if other.held:
                self._debugger.fail(
                    f"two units hold the same bytes: {self.what} is taken ({note}) while {other.what} is held "
                    f"({other.held})",
                    other.last_check,
                    "the plan gave overlapping places to slots that are in use at the same time, or a slot was taken "
                    "without asking its neighbours",
                )
        self._debugger.wait()
        for watch in (self, *sharing):
            watch.forget_poison()
        self._borders.write()
        self.held, self.last_check = note, self._debugger.count

    def use(self, does: str) -> None:
        """Note that the unit uses the slot, which it must hold."""
        note = self._debugger.note(f"{self.name!r} {does} its {self.what.split()[1]} slot")
        if not self.held:
            self._debugger.fail(
                f"{note}, which it does not hold",
                self.last_check,
                "the slot was released, or never filled, and is used all the same",
            )
        self._debugger.wait()
        self.check_guards()

    def release(self) -> None:
        """Check the guards, and poison the values; nothing for a slot that was not taken."""
        if not self.held:
            return
        self.held = ""
        self._debugger.note(f"{self.name!r} releases its {self.what.split()[1]} slot")
        self._debugger.wait()
        for flat in self._values:
            poison(flat)
        self.is_poisoned = True
        self._debugger.wait()
        self.check_guards()

    def check(self) -> None:
        """Check the guards of a slot that is held, and the poison of one that nobody has taken since its release."""
        if self.held:
            self.check_guards()
        else:
            self.check_released()

    def forget_poison(self) -> None:
        """Check the slot for the last time before somebody else writes its bytes."""
        self.check_released()
        self.is_poisoned = False

    def check_guards(self) -> None:
        """Raise unless the guard bytes are intact."""
        self._debugger.require_intact(self._borders.damage, self)

    def check_released(self) -> None:
        """Raise if anything was written to the slot since it was released."""
        if not self.is_poisoned:
            return
        self.check_guards()
        changed = [flat for flat in self._values if written(flat)]
        if changed:
            for flat in changed:
                poison(flat)
            self._debugger.fail(
                f"{self.what} was written after it had been released",
                self.last_check,
                "a view of it was kept (a gradient that is written after its reduce-scatter began, say), or a kernel "
                "that was issued before the release runs after it",
            )
        self.last_check = self._debugger.count


class _Checked:
    """Guards of memory that has no states: shards and scratch."""

    def __init__(self, damage: Callable[[], str | None], count: int) -> None:
        self.damage, self.last_check = damage, count


class Debugger:
    """The checks of one model's memory. Raises ``RuntimeError`` for the first thing that is wrong."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self._device, self._rank = units[0].device, units[0].transport.rank
        self._ran: deque[str] = deque(maxlen=1000)
        self.count = 0  # of what ran
        self.watches: list[_Watch] = []
        self._shared: SlotSharing | None = None
        self._shards: list[_Checked] = []

    def close(self) -> None:
        """Check nothing more; slots that graphs still refer to are watched no longer."""
        self.watches.clear()
        self._shards.clear()

    # --- what is watched

    def sharing(self, watch: _Watch) -> list[_Watch]:
        """Return the watches of other slots, other models' among them, that have a byte in common with it."""
        debuggers = [self] if self._shared is None else self._shared.debuggers()
        return [o for debugger in debuggers for o in debugger.watches if o is not watch and o.shares(watch)]

    def watch(self, memory: MemoryLayout, arena: Arena, shared: SlotSharing | None = None) -> None:
        """Watch what was just built, and nothing else from now on; its slots may be ``shared`` with other models."""
        self.close()
        self._shared = shared
        for unit, layout in zip(self._units, memory.layouts, strict=True):
            self.watch_gather_slot(unit.gather_slot, layout)
            self.watch_gradient_slot(unit.gradient_slot, layout)
            self._watch_shards(unit, layout, arena)
        for region in (STAGING, UPLOAD, DOWNLOAD, GATHERED, REDUCED):
            if region in arena.regions:
                guard_nbytes, nbytes = self._units[0].needs.guard_nbytes, arena.regions[region].nbytes
                inside = FlatLayout.pack([nbytes - 2 * guard_nbytes], guard_nbytes=guard_nbytes)
                self._watch_borders(Borders("the scratch of all units", arena.place(region), inside, [region]))

    def watch_gather_slot(self, slot: GatherSlot, layout: UnitLayout) -> None:
        """Watch a slot, unless it is the shard."""
        if slot.extent is not None:
            slot.__class__ = _WatchedGatherSlot
            assert isinstance(slot, _WatchedGatherSlot)
            slot.watch = _Watch(self, slot, layout.gather_slot, slot.outputs)
            self.watches.append(slot.watch)

    def watch_gradient_slot(self, slot: GradientSlot, layout: UnitLayout) -> None:
        """Watch a slot, unless nothing is trainable."""
        if slot.extent is not None:
            slot.__class__ = _WatchedGradientSlot
            assert isinstance(slot, _WatchedGradientSlot)
            slot.watch = _Watch(self, slot, layout.gradient_slot, list(slot.inputs.values()))
            self.watches.append(slot.watch)

    def _watch_shards(self, unit: Unit, layout: UnitLayout, arena: Arena) -> None:
        names = [p.name for p in unit.params]
        of_unit = f"of {unit.name!r}"
        self._watch_borders(
            Borders(f"the main shard {of_unit}", unit.arena.place("main_shard"), layout.main_shard, names)
        )
        if layout.remainder.nbytes:
            place = unit.remainder_arena.place("remainder")
            self._watch_borders(Borders(f"the remainder {of_unit}", place, layout.remainder, names))
        if layout.compute_shard.nbytes:
            place = arena.place(f"{unit.name}.compute_shard")
            self._watch_borders(Borders(f"the compute shard {of_unit}", place, layout.compute_shard, names))
        if unit.grad_arena is not None:
            place = unit.grad_arena.place("grad_shard")
            self._watch_borders(Borders(f"the gradient shard {of_unit}", place, layout.grad_shard, names))
        else:
            self._shards.append(_Checked(lambda: _damage_of_gradients(unit), self.count))

    def _watch_borders(self, borders: Borders) -> None:
        borders.write()
        self._shards.append(_Checked(borders.damage, self.count))

    # --- checks

    def check(self, when: str) -> None:
        """Check everything, now that ``when``."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self.note(when)
        self.wait()
        for watch in self.watches:
            watch.check()
        for shard in self._shards:
            self.require_intact(shard.damage, shard)

    def require_intact(self, damage: Callable[[], str | None], checked: _Watch | _Checked) -> None:
        """Raise for what ``damage`` finds; otherwise note that all was well until now."""
        found = damage()
        if found is not None:
            self.fail(found, checked.last_check, "a kernel or an index with another number of elements than is there")
        checked.last_check = self.count

    def wait(self) -> None:
        """Wait for all work on the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def note(self, what: str) -> str:
        """Note what runs, and return it with its phase."""
        in_backward = torch._C._current_graph_task_id() != -1
        words = f"{what}, in backward" if in_backward else what
        self._ran.append(words)
        self.count += 1
        return words

    def fail(self, what: str, last_check: int, cause: str) -> None:
        """Raise an error for ``what`` is wrong now, was not at ``last_check``, and has probably this ``cause``."""
        ran = list(self._ran)[-max(1, self.count - last_check) :]
        left_out = f"({len(ran) - _NUM_TOLD} more) ... " if len(ran) > _NUM_TOLD else ""
        raise RuntimeError(
            f"debug mode: {what} (rank {self._rank}, noticed when: {ran[-1]}). Probable cause: {cause}. What ran since "
            f"memory was last intact: {left_out}{'; '.join(ran[-_NUM_TOLD:])}"
        )


def _damage_of_gradients(unit: Unit) -> str | None:
    found = []
    for p in unit.params:
        guard = None if p.grad_shard is None else p.grad_shard.guard
        if guard is not None:
            found.append(damage_of(guard, f"the gradient of {p.name!r}", "the end of its memory"))
    return "; ".join(damage for damage in found if damage) or None


# --- what a unit computes


def holds_nan(value: Any) -> bool:
    """Return whether any tensor in ``value`` holds a NaN. Waits for the device."""
    return any(
        (t.is_floating_point() or t.is_complex()) and not t.is_meta and bool(t.detach().isnan().any())
        for t in tensors_in(value)
    )


def output_error(slot: GatherSlot, output: Any) -> RuntimeError | None:
    """Return what to raise where ``output`` holds NaN, but neither the inputs nor the parameters in ``slot`` do."""
    if holds_nan(output) and not holds_nan([param.detach() for param in slot.params]):
        return RuntimeError(
            f"debug mode: the output of {slot.unit.name!r} holds NaN, though neither its inputs nor its parameters do "
            f"(rank {slot.unit.transport.rank}). If nothing in it computes NaN, it reads parameters that another unit "
            "has released, by a view that was kept outside of that unit's forward: return the view from the forward, "
            "keep a clone of it, or set reshard_after_forward=False on that unit"
        )
    return None
