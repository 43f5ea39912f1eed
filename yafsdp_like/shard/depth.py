"""How many units are all-gathered ahead, and how many gradient slots take turns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Depth:
    """What a plan has room for: ``gathers`` units ahead of the one that runs, and ``gradients`` slots.

    A gradient slot is taken from a unit's first gradient to the end of its reduce-scatter, so two let one unit's
    reduce-scatter run beside the next unit's backward.
    """

    gathers: int = 1
    gradients: int = 2

    def __str__(self) -> str:
        return f"gathering {self.gathers} ahead, reducing {self.gradients - 1} behind"
