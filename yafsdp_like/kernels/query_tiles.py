"""The work list of prefill attention: which queries of which sequences each program computes.

The host writes it once a step, and all layers read it. A launch has room for the most tiles that its rows can have; how
many there are is in the list alone, so that a captured graph serves all later batches, and programs beyond that number
end at once. Tiles that see most keys come first: programs take them in order, and short ones fill the end.

The list is (1 + n, 4) int32. Row 0 begins with the number of tiles; each of those behind it is one tile: its first row
of queries, how many queries there are from there to the end of the chunk, the position of the first, and the row of the
page table. A tile has `queries_per_tile` of them, the last of a chunk perhaps fewer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from yafsdp_like.kernels.paged_attention import power_of_2

TILE_COLS = 4

_TILE_NBYTES = 32_768  # of queries, at most, unless a token's heads are more
_MAX_TILE_ROWS = 128


def tile_rows(num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Return the rows of a tile, one for each head of a query that shares a kv head: 32 KiB, or one token's."""
    rows = min(_MAX_TILE_ROWS, _TILE_NBYTES // (power_of_2(head_dim) * itemsize))
    return max(rows, power_of_2(num_heads // num_kv_heads))


def queries_per_tile(num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Return how many queries a tile has; ``itemsize`` is the bytes of one element of a query."""
    return tile_rows(num_heads, num_kv_heads, head_dim, itemsize) // (num_heads // num_kv_heads)


def max_num_tiles(num_queries: int, num_chunks: int, per_tile: int) -> int:
    """Return the most tiles that ``num_queries`` of ``num_chunks`` can have."""
    return num_queries // per_tile + num_chunks


def write_tiles(tiles: npt.NDArray[Any], chunks: npt.NDArray[Any], per_tile: int) -> int:
    """Write the list of ``chunks`` and return the number of its tiles.

    Args:
        tiles: `(1 + n, 4)` int32, n at least that of `max_num_tiles`; what the list does not need stays as it is.
        chunks: `(C, 4)` integers: like a tile's, of whole chunks. Those without queries have no tile.
        per_tile: queries of a tile.
    """
    counts = -(-chunks[:, 1] // per_tile)
    found = np.repeat(chunks, counts, axis=0)
    done = per_tile * (np.arange(len(found)) - np.repeat(np.cumsum(counts) - counts, counts))
    found += done[:, None] * np.array([1, -1, 1, 0])
    tiles[0] = len(found), 0, 0, 0
    tiles[1 : 1 + len(found)] = found[np.argsort(-found[:, 2], kind="stable")]
    return len(found)
