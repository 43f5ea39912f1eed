"""How many units are gathered ahead, and how many gradient slots they take turns with, from measured times.

Numbers only: what was measured, and what memory a depth takes, is given (``stopwatch.py``, ``blueprint.py``).

[Note: a step on three streams]
Gathers run one after the other, and so do reductions; the two run beside compute. A gather waits for the bytes that the
unit longest out of use leaves; a unit's computation waits for its gather and, in backward, for the reduction that
frees a gradient slot. What waits last is the step. Slots count as equal, and the CPU as never late.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

MAX_GATHERS, MAX_GRADIENTS = 3, 3
WORTH = 0.01  # of a step: a smaller difference is not worth memory


@dataclass(frozen=True, order=True)
class Depth:
    """What a plan has room for: ``gathers`` units ahead of the one that runs, and ``gradients`` slots for those whose
    backward or reduction runs.
    """

    gathers: int = 1
    gradients: int = 2

    def __str__(self) -> str:
        return f"gathering {self.gathers} ahead, reducing {self.gradients - 1} behind"


class Times(NamedTuple):
    """Of one unit, in ms, each alone on its stream: one gather, the rest of a step's work in all."""

    gather: float
    forward: float
    backward: float
    reduce: float


@dataclass(frozen=True)
class Course:
    """The units of a step by number, in the order in which they start."""

    forward: Sequence[int]
    backward: Sequence[int]
    stays: Collection[int] = ()  # gathered from forward to backward, in bytes that no other unit takes
    outer: Collection[int] = ()  # whose backward ends with that of all others


def depths(gathers_are_given: bool) -> list[Depth]:
    """What there is to choose from; the user's own prefetch lists leave only gradient slots."""
    gathers = (1,) if gathers_are_given else range(1, MAX_GATHERS + 1)
    return [Depth(*pair) for pair in product(gathers, range(2, MAX_GRADIENTS + 1))]


def choose(steps: Mapping[Depth, float], more_nbytes: Mapping[Depth, int], room_nbytes: int) -> Depth:
    """Of the depths that fit, the one of least memory whose step, in ms, is as good as the best; ``Depth()`` fits."""
    fitting = [depth for depth in steps if depth == Depth() or more_nbytes[depth] <= room_nbytes]
    enough = (1 + WORTH) * min(steps[depth] for depth in fitting)
    return min((d for d in fitting if steps[d] <= enough), key=lambda d: (more_nbytes[d], d))


def step_ms(times: Sequence[Times], course: Course, depth: Depth) -> float:
    """How long forward and backward take, up to the end of the last reduction. See [Note: a step on three streams]."""
    step = _Step(times, course, depth)
    for unit in course.forward:
        step.visit(unit, times[unit].forward)
    for unit in course.backward:
        step.wait_for_gradient_slot(times[unit].reduce)
        step.visit(unit, times[unit].backward)
        if unit not in course.outer:
            step.reduce(times[unit].reduce)
    for unit in course.outer:
        step.reduce(times[unit].reduce)
    return max(step.computed, step.reduced)


@dataclass
class _Step:
    """How far the three streams have come, in ms from the start of the step."""

    times: Sequence[Times]
    course: Course
    depth: Depth
    computed: float = 0.0
    gathered: float = 0.0
    reduced: float = 0.0
    slots: dict[int, float] = field(default_factory=dict)  # the units in them, and since when nobody reads them
    reductions: list[float] = field(default_factory=list)  # when each was done

    def visit(self, unit: int, ms: float) -> None:
        """Computes on the unit, gathered now unless it is still there from its forward."""
        if unit not in self.slots:
            free = 0.0 if unit in self.course.stays else self._free_slot()
            self.gathered = max(self.gathered, free) + self.times[unit].gather
            self.computed = max(self.computed, self.gathered)
        self.computed += ms
        self.slots.pop(unit, None)
        self.slots[unit] = self.computed

    def _free_slot(self) -> float:
        """When there are bytes for one more unit: those of who is longest out of use."""
        taking_turns = [unit for unit in self.slots if unit not in self.course.stays]
        return self.slots.pop(taking_turns[0]) if len(taking_turns) > self.depth.gathers else 0.0

    def wait_for_gradient_slot(self, reduce_ms: float) -> None:
        """Nothing is reduced of a unit that is frozen."""
        if reduce_ms and len(self.reductions) >= self.depth.gradients:
            self.computed = max(self.computed, self.reductions[-self.depth.gradients])

    def reduce(self, ms: float) -> None:
        if ms:
            self.reduced = max(self.reduced, self.computed) + ms
            self.reductions.append(self.reduced)
