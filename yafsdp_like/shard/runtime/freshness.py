"""Whether a unit's compute shard holds what its main shard does.

Owns the count of writes to main shards, and what of it the compute shard was made from. It copies nothing itself, and
everything that writes either shard says so here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from yafsdp_like.shard.runtime.param import ShardedParam

Version = tuple[int, ...]  # of main shards: equal versions are equal values
Writes = tuple[int, list[int]]  # how often main shards were moved, and since then each parameter was written


class Freshness:
    """The versions of one unit's main shards, and the version that its compute shard was made from.

    PyTorch counts a write in place through a DTensor or its local tensor. It misses writes through ``.data``, those of
    whole lists (``torch._foreach_mul_``) and those of an optimizer's own kernels. So counters are believed only from an
    update that has written both shards until the end of the next forward: at other times every forward casts again.
    """

    def __init__(self, params: Sequence[ShardedParam]) -> None:
        self._params = params
        self._num_moves = self._num_uncounted = 0
        self._is_trusted = False
        self._num_steps = [0] * len(params)
        self._computed: Writes = (0, [])  # of the main shards that the compute shard was made from
        self.compute_version: Version = ()  # of the same; (): there is no compute shard

    @property
    def num_moves(self) -> int:
        """How often a main shard was put somewhere else."""
        return self._num_moves

    def main_version(self) -> Version:
        """Return the version of the main shards as they are now; counters only grow, so that their sum says as much."""
        num_counted = sum([p.sharded._version + p.local._version for p in self._params])
        return (self._num_moves, self._num_uncounted, num_counted)

    def gathered(self) -> Writes:
        """Return how often what an all-gather brings now was written: main shards, where those are not cast before."""
        is_read = [p.compute is p.main or p.on_host for p in self._params]
        if not any(is_read):
            return self._computed
        moves, written = self._writes()
        if moves != self._computed[0]:
            return moves, written
        pairs = zip(is_read, written, self._computed[1], strict=True)
        return moves, [now if reads_main else before for reads_main, now, before in pairs]

    def _writes(self) -> Writes:
        pairs = zip(self._params, self._num_steps, strict=True)
        return self._num_moves, [p.sharded._version + p.local._version + steps for p, steps in pairs]

    def is_current(self) -> bool:
        """Return whether the compute shard need not be written before the next forward."""
        return self._is_trusted and self.compute_version == self.main_version()

    def main_shard_moved(self) -> None:
        """Note that one parameter's main shard lies somewhere else, perhaps with other values."""
        self._num_moves += 1

    def main_shards_written(self) -> None:
        """Note a write that PyTorch may not have counted, by an optimizer's kernels say."""
        self._num_uncounted += 1

    def stepped(self, params: Collection[ShardedParam]) -> None:
        """Note that an optimizer has written the main shards of ``params``, which PyTorch may not have counted."""
        for k, p in enumerate(self._params):
            self._num_steps[k] += p in params

    def compute_shard_written(self) -> None:
        """Note that the compute shard holds what main shards do."""
        self.compute_version, self._is_trusted = self.main_version(), False
        self._computed = self._writes()

    def updated(self, params: Collection[ShardedParam]) -> None:
        """Note that one kernel has just written both shards of ``params``: all, or the rest is to be cast."""
        if len(params) == len(self._params):
            self.compute_shard_written()
            self._is_trusted = True
            return
        self.main_shards_written()
        moves, before = self._computed
        if before:
            pairs = zip(self._params, self._writes()[1], before, strict=True)
            self._computed = moves, [now if p in params else then for p, now, then in pairs]

    def compute_shard_lost(self) -> None:
        """Note that the compute shard has no place any more."""
        self.compute_version = ()

    def forward_ended(self) -> None:
        """Trust counters no longer: whatever writes main shards from here on may do so uncounted."""
        self._is_trusted = False
