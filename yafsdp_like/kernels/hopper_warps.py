"""The warps of prefill attention on Hopper GPUs: a producer that issues copies, and consumers that compute.

Gluon functions that the kernel in `prefill_hopper.py` calls. Shapes and formulas are those of `paged_attention.py`.
That some warps only issue copies, and that the softmax of some warps runs beside products of others, is from Shah et
al., "FlashAttention-3", 2024.

[Note: the warps of a program]
There are no more programs than multiprocessors, and each computes one tile after the other, in turns. A tile has 128
rows (a row: one head's query), and a program goes through its keys in blocks of BLOCK_N. One warp, the producer, issues
copies of keys and values from pages into shared memory. Two consumers, of four warps each, have 64 rows each and read
the same keys and values. Shared memory has STAGES slots for blocks of keys and as many for blocks of values; block j,
counted through all of a program's tiles, is in slot j % STAGES. So the producer brings the first keys of a tile while
the consumers compute the end of the one before. Each slot has two barriers:

    full    completed by the copies' bytes          a consumer waits for it before it reads
    empty   completed by both consumers, which have read          the producer waits for it before it issues

A barrier is completed once for each block that its slot has held, and who waits names the parity of a completion. Block
j is number j // STAGES in its slot: consumers wait for `full` of that parity. The producer waits for `empty` of the
block before, hence of the other parity, which a new barrier counts as completed: the first copies wait for nothing.

A consumer issues two products back to back: its queries with the keys of block j, and its weights of block j - 1 with
the values of that block. When the first is done it computes the softmax of block j, while the tensor cores do the
second and what the other consumer has issued. The state from block to block is that of [Note: online softmax] in
`paged_attention.py`, except that scores are not scaled yet: scaling and subtracting the highest is one operation.

[Note: boxes of pages]
One copy moves a box: 64 elements of one head (128 bytes, the longest row of the layout that products read) of as many
tokens as a page and a block have in common. The boxes of a block are contiguous, those of a head's elements 0 to 63
first; together they are the tile (BLOCK_N, H) that products read.

Pages that no query of the tile sees are not read: in their place the page is -1, which lies outside of the tensor, and
copies write zeros for what lies outside. What is left is the end of a sequence's last page, where anything may be. For
keys that does not matter, since masked scores are replaced. But values are multiplied by weights of 0, and 0 * NaN is
NaN: for such a block the producer itself waits for the values (at `landed`), clears what follows the last token, and
completes `full` in the copies' place.
"""

from __future__ import annotations

from typing import Any

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.language.nvidia.hopper.mbarrier import MBarrierLayout, arrive, expect, init, wait

    _copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9, or 3.6
    _seen_as = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
except (ImportError, AttributeError):  # an older Triton, or none
    gluon = gl = None


__all__ = ["allocate_barriers", "allocate_blocks", "consume", "gl", "gluon", "jit", "produce"]


def jit(*do_not_specialize: str) -> Any:
    """Return `gluon.jit`; without Gluon, functions stay as they are, and nothing calls them."""
    return gluon.jit(do_not_specialize=list(do_not_specialize)) if gluon else lambda fn: fn


@jit()
def _num_turns(tiles: gl.tensor, num_kv_heads: gl.tensor) -> gl.tensor:
    """How many tiles of one head each program has, at most."""
    return gl.cdiv(gl.load(tiles) * num_kv_heads, gl.num_programs(0))


@jit()
def _tile(
    tiles: gl.tensor,  # (1 + n, 4) int32: see `query_tiles.py`
    turn: gl.tensor,
    num_kv_heads: gl.tensor,
    WINDOW: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
) -> gl.tensor:
    """Find what this program's tile is in this turn: three tuples, of the sequence, its queries and its keys.

    (row of the page table, its length, kv head), (row of the tile's first query, queries from there to the chunk's end,
    position of the first), (first key that any of them sees, start of that key's block, end of what they see, number of
    blocks). There are no blocks where no tile is left. Each partition of warps computes this for itself.

    Every other turn goes through the programs from the last to the first: tiles become shorter and shorter, and who had
    the longest of one turn has the shortest of the next.
    """
    last = gl.num_programs(0) - 1
    item = turn * (last + 1) + gl.where(turn % 2 == 0, gl.program_id(0), last - gl.program_id(0))
    inside = item < gl.load(tiles) * num_kv_heads
    tile = tiles + 4 * (1 + item // num_kv_heads)
    begin = gl.load(tile, mask=inside, other=0)
    num_left = gl.load(tile + 1, mask=inside, other=0)
    lowest = gl.load(tile + 2, mask=inside, other=0)
    b = gl.load(tile + 3, mask=inside, other=0)
    end = gl.minimum(lowest + BLOCK_Q, lowest + num_left)
    low = gl.maximum(lowest - WINDOW + 1, 0) if WINDOW > 0 else lowest * 0
    first = low // BLOCK_N * BLOCK_N
    num_blocks = gl.where(inside, gl.cdiv(end - first, BLOCK_N), 0)
    return (b, lowest + num_left, item % num_kv_heads), (begin, num_left, lowest), (low, first, end, num_blocks)


@jit()
def _page_ids(
    table: gl.tensor,  # this sequence's row
    start: gl.tensor,  # of the block
    low: gl.tensor,
    end: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    NUM_BOXES: gl.constexpr,
) -> gl.tensor:
    """The pages of a block's boxes, -1 for those that no query sees, whose entries may be anything."""
    ids = ()
    for i in gl.static_range(NUM_BOXES):
        at = start + i * BOX
        page = gl.load(table + at // PAGE_SIZE, mask=(at < end) & (at + BOX > low), other=-1)
        ids = ids + (page,)  # type: ignore[assignment]  # noqa: RUF005
    return ids


@jit()
def _issue_copies(
    boxes: gl.tensor,  # a tensor map
    slots: gl.tensor,  # (STAGES * H / 64 * NUM_BOXES, 1, BOX, 1, 64) shared
    slot: gl.tensor,
    full: gl.tensor,  # the barrier at which the bytes are counted
    ids: gl.tensor,  # NUM_BOXES pages
    token: gl.tensor,  # where boxes begin within pages
    kv_head: gl.tensor,
    H: gl.constexpr,
    BOX: gl.constexpr,
    NUM_BOXES: gl.constexpr,
) -> None:
    """Issue the copies of one block of keys or of values."""
    CHUNKS: gl.constexpr = H // 64
    expect(full, NUM_BOXES * BOX * H * 2)  # bytes
    for i in gl.static_range(NUM_BOXES):
        for c in gl.static_range(CHUNKS):
            place = slots.index((slot * CHUNKS + c) * NUM_BOXES + i)
            _copy(boxes, [ids[i], token, kv_head, c * 64], full, place)


@jit()
def _clear_end(
    slots: gl.tensor,  # of values
    slot: gl.tensor,
    box: gl.tensor,
    num_kept: gl.tensor,
    H: gl.constexpr,
    BOX: gl.constexpr,
    NUM_BOXES: gl.constexpr,
) -> None:
    """Write zeros after the first `num_kept` tokens of a box, 16 tokens at a time: the producer has few registers.

    See [Note: boxes of pages].
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 4, 1, 8], [1, 1, 1, 1], [3, 2, 1, 0])
    tokens: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(0, layout)))
    for i in gl.static_range(BOX // 16):
        kept = i * 16 + gl.arange(0, 16, tokens) < num_kept
        kept = gl.expand_dims(gl.expand_dims(gl.expand_dims(kept, 1), 2), 0)
        for c in gl.static_range(H // 64):
            place = slots.index((slot * (H // 64) + c) * NUM_BOXES + box).slice(i * 16, 16, dim=1)
            values = place.load(layout)
            place.store(gl.where(kept, values, gl.zeros_like(values)))
    fence_async_shared()  # products read what this warp wrote


@jit()
def produce(
    boxes: gl.tensor,  # tensor maps of keys and of values
    slots: gl.tensor,  # of keys and of values: see `_issue_copies`
    barriers: gl.tensor,  # k_full, k_empty, v_full, v_empty: one a slot
    landed: gl.tensor,
    pages: gl.tensor,  # (B, max_pages) int32, and its stride
    work: gl.tensor,  # tiles (1 + n, 4) int32, number of kv heads
    WINDOW: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    H: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOX: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Run the producer. See [Note: the warps of a program]."""
    NUM_BOXES: gl.constexpr = BLOCK_N // BOX
    key_boxes, value_boxes = boxes
    k_slots, v_slots = slots
    k_full, k_empty, v_full, v_empty = barriers
    tiles, num_kv_heads = work
    page_table, table_row = pages
    num_turns = _num_turns(tiles, num_kv_heads)
    done, num_cleared = num_turns * 0, num_turns * 0  # blocks of earlier tiles, and those whose ends were cleared
    for turn in range(num_turns):
        sequence, _, keys = _tile(tiles, turn, num_kv_heads, WINDOW, BLOCK_Q, BLOCK_N)
        b, length, kv_head = sequence
        low, first, end, num_blocks = keys
        table = page_table + b.to(gl.int64) * table_row
        ids = _page_ids(table, first, low, gl.where(num_blocks > 0, end, 0), PAGE_SIZE, BOX, NUM_BOXES)
        is_cleared = gl.cdiv(end, BOX) * BOX > length
        for j in range(num_blocks):
            start = first + j * BLOCK_N
            later = _page_ids(
                table, start + BLOCK_N, low, end, PAGE_SIZE, BOX, NUM_BOXES
            )  # while this one is waited for
            slot, parity = (done + j) % STAGES, ((done + j) // STAGES) & 1
            token = start % PAGE_SIZE if PAGE_SIZE > BOX else start * 0
            wait(k_empty.index(slot), parity ^ 1)
            _issue_copies(key_boxes, k_slots, slot, k_full.index(slot), ids, token, kv_head, H, BOX, NUM_BOXES)
            wait(v_empty.index(slot), parity ^ 1)
            if (j == num_blocks - 1) & is_cleared:
                _issue_copies(value_boxes, v_slots, slot, landed, ids, token, kv_head, H, BOX, NUM_BOXES)
                wait(landed, num_cleared & 1)
                _clear_end(v_slots, slot, (end - start) // BOX, end % BOX, H, BOX, NUM_BOXES)
                arrive(v_full.index(slot))
            else:
                _issue_copies(value_boxes, v_slots, slot, v_full.index(slot), ids, token, kv_head, H, BOX, NUM_BOXES)
            ids = later
        done += num_blocks
        num_cleared += gl.where((num_blocks > 0) & is_cleared, 1, 0)


@jit()
def _weigh(
    scores: gl.tensor,  # (64, BLOCK_N) float32: products, before their scale
    highest: gl.tensor,  # (64,) of them so far
    total: gl.tensor,  # (64,) of weights so far
    positions: gl.tensor,  # (64,) of the queries
    start: gl.tensor,  # first key of the block
    scale: gl.tensor,
    WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MASKED: gl.constexpr,
) -> gl.tensor:
    """The block's weights, what the values' sum so far is to be multiplied by, and the new `highest` and `total`."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    if MASKED:
        cols = gl.expand_dims(start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout)), 0)
        rows = gl.expand_dims(positions, 1)
        seen = cols <= rows
        if WINDOW > 0:
            seen = seen & (cols > rows - WINDOW)
        scores = gl.where(seen, scores, float("-inf"))
    higher = gl.maximum(highest, gl.max(scores, 1))
    base = higher * scale
    if MASKED:
        base = gl.where(higher == float("-inf"), 0.0, base)  # of a row that has seen nothing yet
    weights = gl.exp2(scores * scale - gl.expand_dims(base, 1))
    factor = gl.exp2(highest * scale - base)
    return weights, factor, higher, total * factor + gl.sum(weights, 1)


@jit()
def _scores(q_tile: gl.tensor, k_tile: gl.tensor, BLOCK_N: gl.constexpr) -> gl.tensor:
    """Issue the product (64, BLOCK_N) of queries with a block of keys; wait for it by `warpgroup_mma_wait`."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@jit()
def _per_row(numbers: gl.tensor, H: gl.constexpr) -> gl.tensor:
    """(64,) as a column beside (64, H)."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    return gl.expand_dims(gl.convert_layout(numbers, gl.SliceLayout(1, layout)), 1)


@jit()
def _left_side(weights: gl.tensor, DTYPE: gl.constexpr, H: gl.constexpr) -> gl.tensor:
    """Weights in `DTYPE`, in the registers where the product with values (BLOCK_N, H) reads its left side."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    return gl.convert_layout(weights.to(DTYPE), gl.DotOperandLayout(0, layout, 2))


@jit()
def _step(
    state: gl.tensor,  # weights of block j - 1, sum of weighted values before it, highest score, sum of weights
    j: gl.tensor,  # counted through all tiles
    start: gl.tensor,  # first key of block j
    q_tile: gl.tensor,  # (64, H) shared
    tiles: gl.tensor,  # keys and values (STAGES, BLOCK_N, H) shared
    barriers: gl.tensor,
    positions: gl.tensor,
    scale: gl.tensor,
    WINDOW: gl.constexpr,
    H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,  # whether some query does not see some key of the block
) -> gl.tensor:
    """The weights of block j, and the weighted values of the one before."""
    weights, weighted, highest, total = state
    k_tiles, v_tiles = tiles
    k_full, k_empty, v_full, v_empty = barriers
    slot, before = j % STAGES, (j - 1) % STAGES
    wait(k_full.index(slot), (j // STAGES) & 1)
    scores = _scores(q_tile, k_tiles.index(slot), BLOCK_N)
    wait(v_full.index(before), ((j - 1) // STAGES) & 1)
    weighted = warpgroup_mma(weights, v_tiles.index(before), weighted, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    arrive(k_empty.index(slot))
    new, factor, highest, total = _weigh(scores, highest, total, positions, start, scale, WINDOW, BLOCK_N, MASKED)
    new = _left_side(new, weights.dtype, H)
    # The new weights are named, so that they are computed before this waits. The old ones are read until then.
    weighted, weights, new, factor, total = warpgroup_mma_wait(0, deps=[weighted, weights, new, factor, total])
    arrive(v_empty.index(before))
    return new, weighted * _per_row(factor, H), highest, total


@jit()
def _attend(
    q_tile: gl.tensor,
    tiles: gl.tensor,
    barriers: gl.tensor,
    positions: gl.tensor,
    keys: gl.tensor,  # first key; numbers of the first block that all queries see, and of the next that some see
    num_blocks: gl.tensor,  # at least 1
    done: gl.tensor,  # blocks of earlier tiles
    scale: gl.tensor,
    DTYPE: gl.constexpr,
    WINDOW: gl.constexpr,
    H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tensor:
    """(64, H) sums of weighted values, and (64,) sums of weights."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    k_tiles, v_tiles = tiles
    k_full, k_empty, v_full, v_empty = barriers
    first, bottom, top = keys
    highest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))

    slot = done % STAGES
    wait(k_full.index(slot), (done // STAGES) & 1)
    scores = warpgroup_mma_wait(0, deps=[_scores(q_tile, k_tiles.index(slot), BLOCK_N)])
    arrive(k_empty.index(slot))
    weights, _, highest, total = _weigh(scores, highest, total, positions, first, scale, WINDOW, BLOCK_N, True)
    state = (_left_side(weights, DTYPE, H), gl.zeros([64, H], gl.float32, o_layout), highest, total)

    ends = (1, bottom, top, num_blocks)
    for part in gl.static_range(0 if WINDOW > 0 else 1, 3):
        for j in range(ends[part], ends[part + 1]):
            start = first + j * BLOCK_N
            state = _step(
                state, done + j, start, q_tile, tiles, barriers, positions, scale, WINDOW, H, BLOCK_N, STAGES, part != 1
            )

    weights, weighted, _, total = state
    last = done + num_blocks - 1
    wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    weighted = warpgroup_mma(weights, v_tiles.index(last % STAGES), weighted)
    arrive(v_empty.index(last % STAGES))
    return weighted, total


@jit()
def consume(
    FIRST_ROW: gl.constexpr,  # of the tile's, that this consumer has
    operands: gl.tensor,  # q and out, their strides of row and head, scales of scores and of values
    q_tiles: gl.tensor,  # (2, 64, H) shared, one a consumer
    tiles: gl.tensor,
    barriers: gl.tensor,
    work: gl.tensor,
    GROUP: gl.constexpr,
    WINDOW: gl.constexpr,
    H: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """Run a consumer. See [Note: the warps of a program]."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])  # 16 bytes a thread
    q, out, q_row, q_head, out_row, out_head, score_scale, value_scale = operands
    tiles_of_queries, num_kv_heads = work
    q_tile = q_tiles.index(FIRST_ROW // 64)
    rows = FIRST_ROW + gl.arange(0, 64, gl.SliceLayout(1, layout))
    dims = gl.expand_dims(gl.arange(0, H, gl.SliceLayout(0, layout)), 0)
    num_turns = _num_turns(tiles_of_queries, num_kv_heads)
    done = num_turns * 0
    for turn in range(num_turns):
        sequence, queries, keys = _tile(tiles_of_queries, turn, num_kv_heads, WINDOW, BLOCK_Q, BLOCK_N)
        begin, num_left, lowest = queries
        _, first, end, num_blocks = keys
        if num_blocks > 0:
            inside = gl.expand_dims((rows < BLOCK_Q * GROUP) & (rows // GROUP < num_left), 1)
            row, head = (begin + rows // GROUP).to(gl.int64), sequence[2] * GROUP + rows % GROUP
            q_tile.store(gl.load(q + gl.expand_dims(row * q_row + head * q_head, 1) + dims, mask=inside, other=0.0))
            fence_async_shared()  # products read what these warps wrote

            # Of the blocks, those before `bottom` and from `top` on have keys that some queries do not see.
            bottom = gl.maximum((gl.cdiv(gl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N - first) // BLOCK_N, 1)
            bottom = gl.minimum(bottom, num_blocks) if WINDOW > 0 else num_blocks * 0 + 1
            top = gl.maximum((lowest + 1) // BLOCK_N - first // BLOCK_N, bottom)
            weighted, total = _attend(
                q_tile,
                tiles,
                barriers,
                lowest + (FIRST_ROW + gl.arange(0, 64, gl.SliceLayout(1, s_layout))) // GROUP,
                (first, bottom, top),
                num_blocks,
                done,
                score_scale,
                q.dtype.element_ty,
                WINDOW,
                H,
                BLOCK_N,
                STAGES,
            )
            result = weighted * _per_row(value_scale / gl.where(total == 0.0, 1.0, total), H)
            result = gl.convert_layout(result.to(out.dtype.element_ty), layout)
            gl.store(out + gl.expand_dims(row * out_row + head * out_head, 1) + dims, result, mask=inside)
        done += num_blocks


@jit()
def allocate_blocks(
    DTYPE: gl.constexpr, H: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
) -> gl.tensor:
    """Allocate shared memory for STAGES blocks of keys or values: as boxes, which copies write, and as tiles."""
    box_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    slots = gl.allocate_shared_memory(DTYPE, [STAGES * (H // 64) * (BLOCK_N // BOX), 1, BOX, 1, 64], box_layout)
    return slots, _seen_as(slots, DTYPE, [STAGES, BLOCK_N, H], tile_layout)


@jit()
def allocate_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr) -> gl.tensor:
    """Allocate one barrier a slot, each completed by COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], MBarrierLayout())
    for i in gl.static_range(STAGES):
        init(barriers.index(i), COUNT)
    return barriers
