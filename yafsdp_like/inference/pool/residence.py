"""Which slabs of its home a model has, and which of its units lie there.

[Note: what is still there]
A model that loses its slabs leaves its weights where they are. Until a slab is lent to pages or claimed by another
model its bytes stay, and the units in it need not be copied again: slabs count how often that happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yafsdp_like.inference.engine.adapters import Adapters
    from yafsdp_like.inference.kv.pages import PagePool
    from yafsdp_like.inference.pool.plan import ModelPlan
    from yafsdp_like.inference.pool.weights import PooledWeights


class Residence:
    """One model's slabs and units on the device. Work is O(slabs of its home + pages that are evicted from them)."""

    def __init__(self, plan: ModelPlan, pages: PagePool, weights: PooledWeights, adapters: Adapters) -> None:
        """``adapters`` have their slots in the home, too."""
        self._plan, self._pages, self._weights, self._adapters = plan, pages, weights, adapters
        self.owned: set[int] = set()
        self.nbytes_copied = 0  # since the start
        self._present: set[int] = set()  # units that are there, or on their way
        self._written: dict[int, int] = {}  # of slabs that were let go: how often they had been lent or claimed
        self._slabs = [plan.slabs_of(unit) for unit in range(len(plan.units))]

    def blocked(self) -> list[int]:
        """Return the slabs of the home that cannot be had: with pages that are referred to, or others' weights."""
        return [slab for slab in self._plan.home if slab not in self.owned and not self._pages.may_claim(slab)]

    def missing_nbytes(self) -> int:
        """Return the bytes to copy of units that are neither there, as far as slabs are its own, nor on their way."""
        units = self._present if self.owned else ()
        return sum(part.nbytes for index, part in enumerate(self._plan.host_units) if index not in units)

    def copy_in(self, most_on_their_way: int | None = None) -> int:
        """Claim slabs, and copy each unit that is absent as soon as it has all of its own; return the bytes copied.

        Pages that are cached in them are evicted while the units before are on their way already. Units whose slabs
        are blocked are left out; no more than ``most_on_their_way`` units are under way then.
        """
        room = len(self._slabs) if most_on_their_way is None else most_on_their_way - self._weights.num_arriving()
        nbytes = 0
        for unit, slabs in enumerate(self._slabs):
            if room <= 0:
                break
            if not self._claim(slabs) or unit in self._present:
                continue
            self._weights.copy_in(unit)
            self._present.add(unit)
            nbytes += self._plan.host_units[unit].nbytes
            room -= 1
        if room > 0 or most_on_their_way is None:
            self._claim(self._plan.slabs_of_slots)  # filled when requests need them
        self.nbytes_copied += nbytes
        return nbytes

    def _claim(self, slabs: range) -> bool:
        """Claim all of ``slabs`` that can be had, and return whether these are all."""
        for slab in slabs:
            if slab in self.owned:
                continue
            num_written = self._pages.slabs.num_written[slab]
            if not self._pages.claim(slab):
                return False
            self.owned.add(slab)
            if self._written.get(slab) != num_written:
                self._present -= {unit for unit, slabs in enumerate(self._slabs) if slab in slabs}
                if slab in self._plan.slabs_of_slots:
                    self._adapters.lose_slots()
        return True

    def let_go(self) -> None:
        """Give all slabs back. Nothing is copied; what is issued from now on may write them."""
        self._weights.let_go()
        self._adapters.await_copies()
        for slab in self.owned:
            self._written[slab] = self._pages.slabs.num_written[slab]
            self._pages.slabs.returned(slab)
        self.owned.clear()

    def forget(self) -> None:
        """Let go, and rely on no byte that is there."""
        self.let_go()
        self._present.clear()
        self._adapters.lose_slots()
