"""Which slabs of its home a model has, and which of its units lie there.

[Note: what is still there]
A model that loses its slabs leaves its weights where they are. Until a slab is lent to pages or claimed by another
model its bytes stay, and the units in it need not be brought again: slabs count how often that happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yafsdp_like.inference.kv.pages import PagePool
    from yafsdp_like.inference.pool.plan import ModelPlan
    from yafsdp_like.inference.pool.weights import PooledWeights


class Residence:
    """One model's slabs and units on the device. Work is O(slabs of its home)."""

    def __init__(self, plan: ModelPlan, pages: PagePool, weights: PooledWeights) -> None:
        self._plan, self._pages, self._weights = plan, pages, weights
        self.owned: set[int] = set()
        self._present: set[int] = set()  # units that are there, or on their way
        self._written: dict[int, int] = {}  # of slabs that were let go: how often they had been lent or claimed
        self._slabs = [plan.slabs_of(unit) for unit in range(len(plan.units))]

    def claim(self) -> list[int]:
        """Claim all slabs of the home that can be had, evicting what is cached there, and return those that cannot."""
        refused = []
        for slab in self._plan.home:
            if slab in self.owned:
                continue
            num_written = self._pages.slabs.num_written[slab]
            if not self._pages.claim(slab):
                refused.append(slab)
                continue
            self.owned.add(slab)
            if self._written.get(slab) != num_written:
                self._present -= {unit for unit, slabs in enumerate(self._slabs) if slab in slabs}
        return refused

    def absent(self) -> list[int]:
        """Return the units that are neither there nor on their way, but could be brought, in order."""
        return [
            unit
            for unit, slabs in enumerate(self._slabs)
            if unit not in self._present and all(slab in self.owned for slab in slabs)
        ]

    def copy_in(self, most_on_their_way: int | None = None) -> int:
        """Bring the units that are absent, or as many as may be on their way; return their bytes."""
        units = self.absent()
        if units and most_on_their_way is not None:
            units = units[: max(0, most_on_their_way - self._weights.num_arriving())]
        if units:
            self._weights.copy_in(units)
        self._present |= set(units)
        return sum(self._plan.units[unit].nbytes for unit in units)

    def let_go(self) -> None:
        """Give all slabs back. Nothing is copied; what is issued from now on may write them."""
        self._weights.let_go()
        for slab in self.owned:
            self._written[slab] = self._pages.slabs.num_written[slab]
            self._pages.slabs.returned(slab)
        self.owned.clear()

    def forget(self) -> None:
        """Let go, and rely on no byte that is there."""
        self.let_go()
        self._present.clear()
