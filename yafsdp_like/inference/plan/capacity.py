"""How many tokens of context a number of bytes holds, in pages on slabs. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.inference.kv.slabs import PageShape, SlabGrid, ceil_div
from yafsdp_like.memory.layout import aligned

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.inference.kv.layer_groups import LayerGroup
    from yafsdp_like.inference.options import EngineOptions

_SLAB_NBYTES = 32 << 20  # at most, about
_MIN_SLABS = 64  # where slabs of that size would be fewer


@dataclass(frozen=True)
class Capacity:
    """The pages of a model's keys and values, and how many tokens a number of bytes holds."""

    groups: tuple[LayerGroup, ...]
    chunk: int  # tokens that are written at a time, at most
    beside: tuple[PageShape, ...] = ()  # of pages of images, which must lie in the same slabs

    @property
    def shapes(self) -> list[PageShape]:
        """The shape of each group's pages."""
        return [group.shape for group in self.groups]

    def grid(self, nbytes: int) -> SlabGrid | None:
        """Cut at most ``nbytes`` into slabs, without a rest; None where they hold none."""
        most = max(shape.nbytes for shape in self.shapes)
        about = min(_SLAB_NBYTES, max(nbytes // _MIN_SLABS, 2 * most))
        about = max(about, *(2 * shape.nbytes for shape in self.beside)) if self.beside else about
        try:
            grid = SlabGrid.fitting(nbytes, self.shapes, about)
        except ValueError:
            return None
        return SlabGrid(grid.num_slabs * grid.slab_nbytes, grid.slab_nbytes)

    def longest(self, grid: SlabGrid | None, most: int) -> int:
        """Return the tokens of the longest context that fits alone, up to ``most``."""
        return 0 if grid is None else last_that_holds(lambda n: self.fits(grid, n), most)

    def longest_asked(self, options: EngineOptions, most: int) -> int:
        """Return the tokens of the longest sequence: what is asked for, or a bound on what can fit, up to ``most``.

        Raises ValueError where what is asked for is more than that, or than the bytes that ``options`` say hold.
        """
        asked, nbytes = options.max_seq_len, options.kv_nbytes or options.memory_limit_nbytes
        assert nbytes is not None
        if asked is not None and asked > most:
            raise ValueError(f"max_seq_len must be at most {most}, the model's, found {asked}")
        longest = self.longest(self.grid(nbytes), asked or most)
        if not longest or (options.kv_nbytes and asked and longest < asked):
            which = "kv_nbytes" if options.kv_nbytes else "memory_limit_nbytes"
            wanted = asked or 1
            raise ValueError(
                f"{which}={nbytes} hold a context of {longest} tokens, and {wanted} must fit; that takes "
                f"{self.nbytes_for(wanted, wanted):,} bytes for keys and values alone"
            )
        return asked or (longest if options.kv_nbytes else most)

    def fits(self, grid: SlabGrid, num_tokens: int) -> bool:
        """Return whether one sequence of ``num_tokens`` tokens fits ``grid`` alone.

        False where only slabs that hold a page more than the least would make room.
        """
        return self.num_slabs(grid, num_tokens) <= grid.num_slabs

    def num_tokens(self, grid: SlabGrid | None, max_seq_len: int) -> int:
        """Return the tokens of all contexts that fit together, each of ``max_seq_len`` tokens but one."""
        if grid is None:
            return 0
        usable = min(grid.num_slabs * grid.pages_per_slab(shape) * shape.nbytes for shape in self.shapes)
        contexts, left = divmod(usable, self.nbytes_of(max_seq_len))
        return contexts * max_seq_len + last_that_holds(lambda n: self.nbytes_of(n) <= left, max_seq_len)

    def nbytes_for(self, num_tokens: int, max_seq_len: int) -> int:
        """Return bytes in which ``num_tokens`` fit, close to the fewest."""
        contexts, rest = divmod(num_tokens, max_seq_len)
        nbytes = contexts * self.nbytes_of(max_seq_len) + (self.nbytes_of(rest) if rest else 0)
        while not self.holds(nbytes, num_tokens, max_seq_len):
            nbytes += max(nbytes // 64, min(shape.nbytes for shape in self.shapes))
        return aligned(nbytes)

    def holds(self, nbytes: int, num_tokens: int, max_seq_len: int) -> bool:
        """Return whether ``num_tokens`` fit ``nbytes`` in sequences of at most ``max_seq_len``."""
        grid = self.grid(nbytes)
        enough = self.num_tokens(grid, max_seq_len) >= num_tokens
        return enough and self.longest(grid, max_seq_len) >= min(num_tokens, max_seq_len)

    def nbytes_of(self, num_tokens: int) -> int:
        """Return the bytes of the pages of one sequence of so many tokens."""
        return sum(group.max_live_pages(num_tokens, self.chunk) * group.shape.nbytes for group in self.groups)

    def num_slabs(self, grid: SlabGrid, num_tokens: int) -> int:
        """Return the slabs of ``grid`` that one sequence of ``num_tokens`` tokens needs at most, alone."""
        return sum(
            ceil_div(group.max_live_pages(num_tokens, self.chunk), grid.pages_per_slab(group.shape))
            for group in self.groups
        )


def last_that_holds(holds: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` for which ``holds`` is true, as it is for 0 and all between."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
