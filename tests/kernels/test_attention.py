"""Decode and prefill attention over pages against their reference, and the reference against torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.inference import (
    BF16,
    F8,
    F16,
    TOLERANCES,
    Shape,
    assert_near,
    decoded,
    expected_attention,
    paged,
    prefilled,
    queries,
    tiles_of,
)
from tests.kernels.test_kernels import DEVICE, needs_kernels, run_python
from yafsdp_like.kernels import decode_attention as decode_attention_module
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.decode_attention import choose_num_splits, decode_attention, workspace_numel
from yafsdp_like.kernels.paged_attention import AttentionBatch, KVPages, attention_reference
from yafsdp_like.kernels.prefill_attention import prefill_attention
from yafsdp_like.kernels.query_tiles import TILE_COLS, max_num_tiles, write_tiles
from yafsdp_like.models.decoder import attend, window_mask

INTERPRETED_FILES = [f"tests/kernels/test_{name}.py" for name in ("attention", "norm", "rotary", "sampling")]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.slow
def test_kernels_equal_their_references_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python("-m", "pytest", "-q", *INTERPRETED_FILES, TRITON_INTERPRET="1")


@pytest.mark.parametrize("window", [None, 5])
def test_the_reference_is_the_attention_of_the_model(window: int | None) -> None:
    shape = Shape(6, 2, 32, 4, (13, 9), (13, 9), window)
    pages, batch = paged(shape)
    q, out = queries(shape)
    attention_reference(q, pages, batch, out, window)
    for b, rows in ((0, slice(0, 13)), (1, slice(13, 22))):
        length = shape.seq_lens[b]
        flat = [pages.keys[batch.page_table[b].long()], pages.values[batch.page_table[b].long()]]
        k, v = (cached.flatten(0, 1)[:length].transpose(0, 1)[None] for cached in flat)  # (1, K, L, H)
        mask = None if window is None else window_mask(torch.arange(length, device=DEVICE), window)
        dense = attend(q[rows].transpose(0, 1)[None], k * pages.key_scale, v * pages.value_scale, mask)
        assert_near(out[rows], dense[0].transpose(0, 1), TOLERANCES)


DECODES = [  # shape, splits
    (Shape(4, 4, 32, 16, (1, 70, 33), (1, 1, 1)), 2),  # multi-head
    (Shape(6, 2, 64, 64, (130, 64, 5), (1, 1, 1)), 3),  # groups of three, a page a block
    (Shape(8, 1, 80, 32, (100, 31), (1, 1), dtype=BF16, page_dtype=BF16), 1),  # multi-query, not a power of two
    (Shape(2, 1, 256, 16, (37,), (1,), dtype=F16, page_dtype=F16), 2),
    (Shape(4, 2, 128, 128, (200, 129), (1, 1), dtype=BF16, page_dtype=F8), 4),
    (Shape(4, 2, 32, 16, (150, 40, 8), (1, 1, 1), window=20), 2),
    (Shape(4, 2, 32, 64, (200, 70), (1, 1), window=66), 3),
    (Shape(6, 2, 32, 16, (90, 17, 3), (3, 3, 3)), 2),  # a few queries each, as of guesses to be checked
    (Shape(6, 2, 32, 8, (90, 17), (3, 3), window=10), 1),
    (Shape(2, 2, 32, 24, (60,), (1,)), 2),  # a page that no block fits
]


@needs_kernels
@pytest.mark.parametrize(("shape", "num_splits"), DECODES)
def test_decoding_is_the_attention_of_its_reference(shape: Shape, num_splits: int) -> None:
    assert_near(decoded(shape, num_splits), expected_attention(shape), TOLERANCES)


@needs_kernels
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_sequence_of_length_zero_is_padding_and_becomes_zeros(num_splits: int) -> None:
    shape = Shape(2, 1, 32, 16, (0, 20, 0), (1, 1, 1))
    out = decoded(shape, num_splits)
    assert not out[0].any() and not out[2].any()
    assert_near(out[1:2], expected_attention(shape)[1:2], TOLERANCES)


@needs_kernels
@pytest.mark.parametrize("num_splits", [1, 20])
def test_more_splits_than_the_keys_have_blocks_change_nothing(num_splits: int) -> None:
    shape = Shape(2, 1, 32, 16, (3, 70), (1, 1))
    assert_near(decoded(shape, num_splits), expected_attention(shape), TOLERANCES)


@needs_kernels
def test_a_sequence_decodes_to_the_same_bits_in_any_batch() -> None:
    shape = Shape(4, 2, 32, 16, (150, 40, 8), (1, 1, 1), dtype=BF16, page_dtype=BF16)
    pages, batch = paged(shape)
    q, together = queries(shape)
    alone, workspace = torch.empty_like(together), torch.empty(workspace_numel(3, 4, 32, 3), device=DEVICE)
    decode_attention(q, pages, AttentionBatch(batch.page_table, batch.seq_lens), together, workspace, 3)
    for b in range(3):
        one = AttentionBatch(batch.page_table[b : b + 1], batch.seq_lens[b : b + 1])
        decode_attention(q[b : b + 1], pages, one, alone[b : b + 1], workspace, 3)
    assert torch.equal(together, alone)


PREFILLS = [
    Shape(4, 4, 32, 16, (20, 150, 7), (20, 130, 0)),  # whole, after a prefix, and none of it
    Shape(6, 2, 64, 64, (200, 1, 65), (70, 1, 2)),
    Shape(8, 1, 80, 32, (100, 31), (45, 31), dtype=BF16, page_dtype=BF16),
    Shape(2, 1, 256, 16, (70,), (66,), dtype=F16, page_dtype=F16),
    Shape(4, 2, 128, 128, (150,), (90,), dtype=BF16, page_dtype=F8),
    Shape(4, 2, 32, 16, (150, 40), (80, 40), window=20),
    Shape(2, 2, 32, 64, (300,), (140,), window=130),  # some blocks are seen by all queries of a tile
    Shape(2, 2, 32, 24, (0, 60), (0, 50)),
]


@needs_kernels
@pytest.mark.parametrize("shape", PREFILLS)
def test_prefill_is_the_attention_of_its_reference(shape: Shape) -> None:
    assert_near(prefilled(shape), expected_attention(shape), TOLERANCES)


@needs_kernels
def test_many_short_chunks_find_their_sequences() -> None:
    """Prevents: tiles of empty sequences, or places for tiles that do not suffice."""
    num_new = (1, 0, 0, 43, 1, 42, 0, 1, 85)
    shape = Shape(3, 1, 32, 16, tuple(n + 5 for n in num_new), num_new)
    assert_near(prefilled(shape), expected_attention(shape), TOLERANCES)


@needs_kernels
def test_rows_of_no_tile_are_not_written() -> None:
    shape = Shape(2, 1, 32, 16, (30,), (30,))
    (pages, batch), (q, out) = paged(shape), queries(shape)
    fewer = replace(batch, tiles=tiles_of(replace(shape, seq_lens=(10,), num_new=(10,))))
    prefill_attention(q, pages, fewer, out)
    assert out[:10].isfinite().all() and (out[10:] == 7).all()


@needs_kernels
@pytest.mark.parametrize("window", [None, 20])
def test_rows_before_the_first_tile_are_not_written(window: int | None) -> None:
    """Prevents: tiles that compute rows of nobody."""
    num_new = (37, 0, 21, 3)
    shape = Shape(2, 1, 32, 16, (90, 10, 50, 3), num_new, window)
    (pages, batch), (q, _) = paged(shape), queries(shape)
    for num_before in (1, 130):
        behind = replace(batch, tiles=tiles_of(shape, num_before))
        rows = torch.cat([torch.full_like(q[:1].expand(num_before, -1, -1), torch.nan), q, q[:40]])
        out = torch.full_like(rows, 7.0)
        prefill_attention(rows, pages, behind, out, window)
        assert_near(out[num_before : num_before + len(q)], expected_attention(shape), TOLERANCES)
        assert (out[:num_before] == 7).all() and (out[num_before + len(q) :] == 7).all()


def test_a_work_list_has_all_queries_once_and_those_that_see_most_keys_first() -> None:
    tiles = np.full((1 + max_num_tiles(52, 4, 16), TILE_COLS), -1)
    chunks = [(5, 33, 0, 0), (0, 0, 9, 1), (38, 2, 100, 2), (40, 17, 15, 3)]
    assert write_tiles(tiles, np.array(chunks), 16) == 6
    assert tiles.tolist() == [
        [6, 0, 0, 0],
        [38, 2, 100, 2],
        [37, 1, 32, 0],
        [56, 1, 31, 3],
        [21, 17, 16, 0],
        [40, 17, 15, 3],
        [5, 33, 0, 0],
        [-1, -1, -1, -1],
    ]


@pytest.mark.parametrize("counts", [(16,) * 5, (1,) * 7, (17, 31, 32), (80,), (15, 2)])
def test_no_work_list_needs_more_places_than_are_planned(counts: tuple[int, ...]) -> None:
    most = max_num_tiles(sum(counts), len(counts), 16)
    chunks = np.array([(sum(counts[:b]), count, 0, b) for b, count in enumerate(counts)])
    assert write_tiles(np.zeros((1 + most, TILE_COLS), dtype=np.int32), chunks, 16) <= most


def test_prefill_without_a_work_list_is_refused() -> None:
    pages, batch = paged(PREFILLS[0])
    q, out = queries(PREFILLS[0])
    with pytest.raises(ValueError, match="expected a batch with tiles"):
        prefill_attention(q, pages, AttentionBatch(batch.page_table, batch.seq_lens), out)


def test_splits_fill_the_multiprocessors_and_no_more() -> None:
    assert choose_num_splits(1, 8, 100_000, 132) == 49
    assert choose_num_splits(1, 8, 1024, 132) == 8  # of 128 keys each
    assert choose_num_splits(128, 8, 100_000, 132) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 32)}, "N a multiple of 2"),
        ({"q": torch.zeros(2, 4, 64)[..., ::2]}, "with dense heads"),
        ({"out": torch.zeros(2, 4, 32).half()}, "expected out"),
        ({"batch": AttentionBatch(torch.zeros(2, 1).long(), torch.ones(2).int())}, "int32 tables"),
        ({"batch": AttentionBatch(torch.zeros(3, 1).int(), torch.ones(3).int())}, "equally many queries"),
        ({"workspace": torch.zeros(3)}, "workspace of 528 elements, found 3"),
    ],
)
def test_attention_of_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 4, 32),
        "pages": KVPages(torch.zeros(1, 16, 2, 32), torch.zeros(1, 16, 2, 32)),
        "batch": AttentionBatch(torch.zeros(2, 1).int(), torch.ones(2).int()),
        "out": torch.zeros(2, 4, 32),
        "workspace": torch.zeros(528),
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**(arguments | change), num_splits=2)  # type: ignore[arg-type]


def test_keys_and_values_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="expected keys and values alike"):
        KVPages(torch.zeros(1, 16, 2, 32), torch.zeros(1, 16, 2, 32).half())
    with pytest.raises(ValueError, match="values: expected pages"):
        KVPages(torch.zeros(1, 16, 2, 32), torch.zeros(16, 2, 32))


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_compiled_decoding_reads_pages_sixteen_bytes_at_a_time() -> None:
    """Prevents: strides or tables that hide from the compiler that a head is contiguous. Compiles without a GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = decode_attention_module._decode_kernel
    constants = {"GROUP": 4, "QUERIES": 1, "WINDOW": 0, "WHOLE": False, "PAGE_SIZE": 16, "H": 128, "BLOCK_H": 128}
    constants |= {"BLOCK_M": 16, "BLOCK_N": 64}
    types = {"partial": "*fp32", "sums": "*fp32", "page_table": "*i32", "seq_lens": "*i32"}
    types |= dict.fromkeys(("out", "q", "keys", "values"), "*bf16") | dict.fromkeys(
        ("score_scale", "value_scale"), "fp32"
    )
    names = kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name) != "fp32"}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={key: value for key, value in aligned.items() if names[key[0]] not in constants},
    )
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    copies = [line for line in ptx.splitlines() if "cp.async.c" in line]
    wide = [line for line in copies if ", 0x10," in line or ", 16," in line]
    assert len(wide) >= 2 * 64 * 128 * 2 // 16 // 128  # a block of keys and one of values by 128 threads
