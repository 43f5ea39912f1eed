"""What the ranks of one sharded model do together, noted so that ranks which do something else are found.

Owns the words and numbers for it, made once each, and when digests are exchanged (``comm/journal.py`` does that).
Decides nothing of what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from yafsdp_like.comm.journal import Entry, journal_of

if TYPE_CHECKING:
    from yafsdp_like.memory.streams import Event
    from yafsdp_like.shard.runtime.slots import SlotUnit
    from yafsdp_like.shard.runtime.unit_state import Unit

Recorded = list[Sequence[Entry]]  # of each journal


class CollectiveLog:
    """The notes of what is done with one engine's units."""

    def __init__(self, units: Sequence[Unit]) -> None:
        transports = dict.fromkeys(unit.transport for unit in units)
        self._journal_of = {t: journal_of(t.everybody, units[0].device) for t in transports}
        self.journals = list(dict.fromkeys(self._journal_of.values()))
        self._mapping = list(dict.fromkeys(self._journal_of[t] for t in transports if t.mapped is not None))
        self._number = 0  # of this model, on all ranks; 0: nothing was built yet
        self._entries: dict[object, Entry] = {}

    def builds(self) -> None:
        """Note that memory is planned, and compare with all ranks. Blocks the CPU, on GPUs too."""
        if not self._number:
            for journal in self.journals:
                journal.num_subjects += 1
            self._number = max(journal.num_subjects for journal in self.journals)
        entry = self._entry("builds", lambda: "plans the memory of the model (again, if a parameter was changed)")
        for journal in self.journals:
            journal.note(entry)
            journal.compare()

    def begins_forward(self) -> None:
        """Note a forward, before which ranks wait for each other where they map memory; post what was noted by now."""
        entry = self._entry("forward", lambda: "begins a forward of the model")
        for journal in self._mapping:
            journal.note(entry)
        for journal in self.journals:
            journal.settle(keep=1)
            journal.post()

    def gathers(self, unit: SlotUnit, kept: bool = False) -> None:
        """Note an all-gather, where it is a collective: also of what few ranks have ``kept`` from forward on."""
        if kept or unit.transport.mapped is None or not unit.transport.mapped.reads_shards:
            more = " that were kept from forward on" if kept else ""
            key = (unit, "gather", kept)
            entry = self._entry(key, lambda: f"all-gathers the parameters of unit {unit.name!r}{more}")
            self._journal_of[unit.transport].note(entry)

    def reduces(self, unit: Unit, setting: Sequence[int], adding: Sequence[int]) -> None:
        """Note a reduce-scatter of parameters whose gradients replace ``.grad``, and of those added to it."""
        key = (unit, tuple(setting), tuple(adding), unit.policy.averaged)

        def words() -> str:
            kinds = {"": setting, "adds up ": adding}
            named = [prefix + ", ".join(unit.params[k].name for k in which) for prefix, which in kinds.items() if which]
            over = "" if unit.policy.averaged == "new" else f", replicas averaging {unit.policy.averaged}"
            return f"reduce-scatters gradients of unit {unit.name!r}: {'; '.join(named)}{over}"

        self._journal_of[unit.transport].note(self._entry(key, words))

    def ends_backward(self) -> None:
        """Note the end of a backward, and post what was noted by now."""
        entry = self._entry("backward", lambda: "ends a backward of the model")
        for journal in self.journals:
            journal.note(entry)
            journal.post()

    def updates(self, unit: Unit | None = None) -> None:
        """Note that an optimizer updates what ranks share, or that ``unit`` is all-gathered behind its update."""
        if unit is None:
            entry = self._entry("update", lambda: "begins an optimizer's step")
            for journal in self.journals:
                journal.note(entry)
        else:
            entry = self._entry((unit, "update"), lambda: f"all-gathers the updated parameters of unit {unit.name!r}")
            self._journal_of[unit.transport].note(entry)

    def adds_slot(self, unit: Unit) -> None:
        """Note that memory which peers map is added beyond the plan."""
        entry = self._entry((unit, "slot"), lambda: f"gives unit {unit.name!r} a slot of its own")
        self._journal_of[unit.transport].note(entry)

    def settle(self) -> None:
        """Check, before gradients are used, that all ranks have done the same; or all raise ``RuntimeError``."""
        for journal in self.journals:
            journal.settle()

    def watch(self, event: Event) -> None:
        """Have a hang letter written where a device waits for other ranks too long before it completes ``event``."""
        for journal in self.journals:
            journal.watch(event)

    def record(self) -> None:
        """Take what is noted from here on as planned only, until ``recorded``."""
        for journal in self.journals:
            journal.record()

    def recorded(self) -> Recorded:
        """Return what was noted since ``record``; what follows is noted as done again."""
        return [journal.recorded() for journal in self.journals]

    def repeat(self, recorded: Recorded) -> None:
        """Note that a recorded step is done."""
        for journal, entries in zip(self.journals, recorded, strict=True):
            journal.repeat(entries)

    def _entry(self, key: object, words: Callable[[], str]) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry.of(words(), self._number)
        return entry
