"""When each unit is expected to be needed, from the structure of the module tree alone. Integers only, no tensors.

[Note: order is a hint]
The schedule says which unit to all-gather next and which slots may share bytes. It comes from the order of modules in
the tree, never from a recorded iteration, since the next one may be an evaluation. Execution may differ: a wrong guess
costs an all-gather that compute waits for, or a slot of its own, never a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yafsdp_like.memory.plan import LiveRange, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn


@dataclass(frozen=True)
class UnitSpan:
    """The forward ticks of one unit: when its first module starts, and the last tick inside its last module."""

    first: int
    last: int


@dataclass(frozen=True)
class Residency:
    """How long one unit stays unsharded, by the user's policy."""

    after_forward: bool  # its parameters stay until its backward
    after_backward: bool  # and beyond, into the next iteration


@dataclass(frozen=True)
class Schedule:
    """Spans of units in one forward of ``num_ticks`` ticks; backward mirrors it, from tick ``num_ticks`` on.

    ``forward_order`` and ``backward_order`` list units by index in the order they are expected to start. In
    backward a parent starts before its children, the last child first.
    """

    spans: tuple[UnitSpan, ...]
    num_ticks: int

    @property
    def forward_order(self) -> list[int]:
        """Units in the order in which their forwards are expected to start."""
        return sorted(range(len(self.spans)), key=lambda u: (self.spans[u].first, u))

    @property
    def backward_order(self) -> list[int]:
        """Units in the order in which their backwards are expected to start."""
        return sorted(range(len(self.spans)), key=lambda u: (-self.spans[u].last, self.spans[u].first, u))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Forward, backward, and the update after it, in one tick; the last reductions end there."""
        n = self.num_ticks
        return Phase("forward", 0, n - 1), Phase("backward", n, 2 * n - 1), Phase("update", 2 * n, 2 * n)

    def surrounds(self, span: UnitSpan) -> bool:
        """Return whether another unit starts within ``span``."""
        return any(other is not span and span.first < other.first <= span.last for other in self.spans)

    def forward_start(self, unit: int) -> int:
        """Return the tick at which the unit's forward starts."""
        return self.spans[unit].first

    def backward_start(self, unit: int) -> int:
        """Return the tick at which the unit's backward starts."""
        return 2 * self.num_ticks - 1 - self.spans[unit].last

    def backward_end(self, unit: int) -> int:
        """Return the last tick of the unit's backward."""
        return 2 * self.num_ticks - 1 - self.spans[unit].first

    def gather_range(self, unit: int, forward_from: int, backward_from: int, residency: Residency) -> LiveRange:
        """Return when the unit's gather slot is live, all-gathered from ``forward_from`` and ``backward_from`` on."""
        end = 2 * self.num_ticks - 1
        if residency.after_backward:
            return LiveRange(((0, end),))
        if residency.after_forward:
            return LiveRange(((forward_from, self.backward_end(unit)),))
        return LiveRange(((forward_from, self.spans[unit].last), (backward_from, self.backward_end(unit))))

    def gradient_range(self, unit: int, reductions_in_flight: int = 1) -> LiveRange:
        """Return when its gradient slot is live: until so many more units in backward are done."""
        end = min(self.backward_end(unit) + reductions_in_flight, 2 * self.num_ticks)
        return LiveRange(((self.backward_start(unit), end),))


def schedule_of(root: nn.Module, units_of: Mapping[nn.Module, Sequence[int]], num_units: int) -> Schedule:
    """Walk the tree in order of registration; ``units_of`` says which units each module's forward needs.

    A module that is found again below another parent runs again there.
    """
    walk = _Walk(units_of)
    walk.visit(root)
    spans = tuple(UnitSpan(walk.first[unit], walk.last[unit]) for unit in range(num_units))
    return Schedule(spans, walk.tick + 1)


@dataclass
class _Walk:
    """The state of one walk through the module tree by ``schedule_of``."""

    units_of: Mapping[nn.Module, Sequence[int]]
    tick: int = -1
    seen: set[nn.Module] = field(default_factory=set)
    first: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)

    def visit(self, module: nn.Module) -> None:
        if module in self.seen:
            again = (unit for m in module.modules() for unit in self.units_of.get(m, ()))
            self.last.update(dict.fromkeys(again, self.tick))
            return
        self.seen.add(module)
        units = self.units_of.get(module, ())
        self.tick += bool(units)
        for unit in units:
            self.first.setdefault(unit, self.tick)
        for child in module.children():
            self.visit(child)
        self.last.update(dict.fromkeys(units, self.tick))


def gather_starts(order: Sequence[int], starts: Sequence[int], prefetches: Mapping[int, Sequence[int]]) -> list[int]:
    """Return the tick at which each unit's all-gather is issued: when the first unit that prefetches it starts.

    ``starts[u]`` is unit ``u``'s own tick. By default every unit prefetches the next in ``order``; a unit in
    ``prefetches`` names its own list instead.
    """
    issued = list(starts)
    for position, unit in enumerate(order):
        targets = prefetches.get(unit) or order[position + 1 : position + 2]
        for target in targets:
            issued[target] = min(issued[target], starts[unit])
    return issued
