"""Kernels for serving against their plain torch references, and the references against torch and numbers by hand.

As in `test_kernels.py`, kernels run natively where there is a GPU, and elsewhere in a process of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.test_kernels import DEVICE, needs_kernels, run_python
from yafsdp_like.kernels import activation, attention, prefill_hopper, sampling
from yafsdp_like.kernels.activation import swiglu, swiglu_reference
from yafsdp_like.kernels.attention import (
    AttentionBatch,
    KVPages,
    attention_reference,
    choose_num_splits,
    decode_attention,
    prefill_attention,
    workspace_numel,
)
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.norm import rms_norm, rms_norm_reference
from yafsdp_like.kernels.rotary import HeadNorms, rotate_and_store, rotate_and_store_reference
from yafsdp_like.kernels.sampling import (
    SamplingRows,
    gumbel_noise,
    remember,
    sample,
    sample_reference,
)
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models.decoder import attend, window_mask
from yafsdp_like.models.rope import Rope, apply_rope

F32, BF16, F16, F8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
TOLERANCES = {F32: 1e-5, BF16: 2**-7, F16: 2**-9}  # of what is rounded to the dtype on the way, too
ROUNDED_ONCE = {F32: 2e-6, BF16: 2**-8, F16: 2**-11}


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.slow
def test_kernels_equal_their_references_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_python("-m", "pytest", "-q", "tests/kernels/test_inference_kernels.py", TRITON_INTERPRET="1")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def int32(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_near(found: Tensor, expected: Tensor, tolerances: dict[torch.dtype, float]) -> None:
    tolerance = tolerances[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- attention ---


@dataclass(frozen=True)
class Shape:
    """Of one launch; `num_new[b]` queries end a sequence of `seq_lens[b]` tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    seq_lens: tuple[int, ...]
    num_new: tuple[int, ...]
    window: int | None = None
    dtype: torch.dtype = F32
    page_dtype: torch.dtype = F32
    heads_first: bool = False  # in a page's memory: (K, page_size, H)


def paged(shape: Shape) -> tuple[KVPages, AttentionBatch]:
    """Random pages in random order, with space between them. Page 0 is poison: tables lead there where nobody looks. So
    is what lies behind the last token of a sequence.
    """
    counts = [-(-length // shape.page_size) for length in shape.seq_lens]
    num_pages = 1 + sum(counts)
    region = random(num_pages, 2, shape.page_size, shape.num_kv_heads, shape.head_dim)
    region[0] = math.nan
    order = iter((1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(1))).tolist())
    table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    for b, (count, length, num_new) in enumerate(zip(counts, shape.seq_lens, shape.num_new, strict=True)):
        behind = 0 if shape.window is None else max(length - num_new - shape.window + 1, 0) // shape.page_size
        for i in range(count):
            page = next(order)
            table[b, i] = page * (i >= behind)
            region[page, :, length - i * shape.page_size :] = math.nan
    region = region.to(shape.page_dtype)
    if shape.heads_first:
        region = region.transpose(2, 3).contiguous().transpose(2, 3)
    cu_seqlens_q = int32([sum(shape.num_new[:b]) for b in range(len(counts) + 1)])
    pages = KVPages(region[:, 0], region[:, 1], key_scale=0.75, value_scale=1.5)
    return pages, AttentionBatch(table.to(DEVICE), int32(shape.seq_lens), cu_seqlens_q)


def queries(shape: Shape) -> tuple[Tensor, Tensor]:
    """Queries that are part of wider rows, and room for the output, with wider rows too."""
    num_rows, num_heads, head_dim = sum(shape.num_new), shape.num_heads, shape.head_dim
    q = random(num_rows, num_heads + 3, head_dim, seed=2, dtype=shape.dtype)[:, 1 : num_heads + 1]
    return q, torch.full((num_rows, num_heads + 1, head_dim), 7.0, dtype=shape.dtype, device=DEVICE)[:, :num_heads]


def expected_attention(shape: Shape) -> Tensor:
    (pages, batch), (q, out) = paged(shape), queries(shape)
    attention_reference(q, pages, batch, out, shape.window)
    return out


def decoded(shape: Shape, num_splits: int) -> Tensor:
    (pages, batch), (q, out) = paged(shape), queries(shape)
    numel = workspace_numel(len(q), shape.num_heads, shape.head_dim, num_splits)
    workspace = torch.full((numel,), math.nan, device=DEVICE)
    decode_attention(
        q, pages, AttentionBatch(batch.page_table, batch.seq_lens), out, workspace, num_splits, shape.window
    )
    return out


def prefilled(shape: Shape) -> Tensor:
    (pages, batch), (q, out) = paged(shape), queries(shape)
    prefill_attention(q, pages, batch, out, shape.window)
    return out


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
def test_prefill_without_starts_has_equally_many_queries_of_each() -> None:
    shape = Shape(6, 2, 32, 16, (90, 60), (50, 50))
    (pages, batch), (q, out) = paged(shape), queries(shape)
    prefill_attention(q, pages, AttentionBatch(batch.page_table, batch.seq_lens), out)
    assert_near(out, expected_attention(shape), TOLERANCES)


@needs_kernels
def test_many_short_chunks_find_their_sequences() -> None:
    """Prevents: a search that stops beside an empty sequence, or blocks that do not suffice."""
    num_new = (1, 0, 0, 43, 1, 42, 0, 1, 85)
    shape = Shape(3, 1, 32, 16, tuple(n + 5 for n in num_new), num_new)
    assert_near(prefilled(shape), expected_attention(shape), TOLERANCES)


@needs_kernels
def test_rows_past_the_last_start_are_not_written() -> None:
    shape = Shape(2, 1, 32, 16, (30,), (30,))
    (pages, batch), (q, out) = paged(shape), queries(shape)
    fewer = AttentionBatch(batch.page_table, int32([10]), int32([0, 10]))
    prefill_attention(q, pages, fewer, out)
    assert out[:10].isfinite().all() and (out[10:] == 7).all()


# --- prefill on Hopper ---

RAGGED = (
    (200, 77, 813, 0, 1029, 40, 300),
    (1, 77, 300, 0, 129, 40, 0),
)  # seq_lens, new ones: in the middle, whole, none
HOPPER_PREFILLS = [
    Shape(2, 2, 128, 16, *RAGGED, dtype=BF16, page_dtype=BF16),
    Shape(8, 2, 128, 16, *RAGGED, window=200, dtype=BF16, page_dtype=BF16, heads_first=True),
    Shape(14, 2, 64, 16, *RAGGED, dtype=BF16, page_dtype=BF16, heads_first=True),  # two rows of a tile are nobody's
    Shape(7, 1, 128, 64, *RAGGED, window=77, dtype=F16, page_dtype=F16),
    Shape(4, 4, 64, 64, *RAGGED, window=1, dtype=BF16, page_dtype=BF16),
    Shape(8, 2, 64, 256, *RAGGED, window=500, dtype=BF16, page_dtype=BF16),  # two blocks a page
    Shape(128, 1, 64, 128, (150, 33), (5, 33), dtype=F16, page_dtype=F16),  # a token a tile
]


def on_hopper() -> bool:
    return prefill_hopper.AVAILABLE and DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9


needs_hopper = pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")


@pytest.fixture
def only_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not go to Hopper's kernel fails."""
    monkeypatch.delattr(attention, "_launch_prefill")


@needs_hopper
@pytest.mark.usefixtures("only_hopper")
@pytest.mark.parametrize("shape", HOPPER_PREFILLS)
def test_prefill_on_hopper_is_the_attention_of_its_reference(shape: Shape) -> None:
    assert_near(prefilled(shape), expected_attention(shape), TOLERANCES)


@needs_hopper
@pytest.mark.usefixtures("only_hopper")
def test_a_chunk_on_hopper_has_the_same_bits_alone_and_cut_in_two() -> None:
    pages, batch = paged(HOPPER_PREFILLS[1])
    q, together = queries(HOPPER_PREFILLS[1])
    apart = torch.full_like(together, 7.0)
    table = batch.page_table[2:3]
    for first, last in ((78, 211), (211, 378)):  # the third sequence's 300 rows
        where = AttentionBatch(table, int32([813 - 378 + last]), int32([0, last - first]))
        prefill_attention(q[first:last], pages, where, apart[first:last], 200)
    prefill_attention(q, pages, batch, together, 200)
    assert torch.equal(together[78:378], apart[78:378])


@needs_hopper
@pytest.mark.usefixtures("only_hopper")
def test_a_recorded_launch_on_hopper_allocates_nothing_and_serves_other_lengths() -> None:
    shape = replace(HOPPER_PREFILLS[0], seq_lens=(200, 813), num_new=(40, 130))
    (pages, batch), (q, out) = paged(shape), queries(shape)
    assert batch.cu_seqlens_q is not None
    prefill_attention(q, pages, batch, out)  # compiles
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    prefill_attention(q, pages, batch, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill_attention(q, pages, batch, out)
    batch.seq_lens.copy_(int32([150, 700]))
    batch.cu_seqlens_q.copy_(int32([0, 100, 150]))
    out.fill_(7.0)
    expected = out.clone()
    attention_reference(q, pages, batch, expected)
    graph.replay()
    assert_near(out, expected, TOLERANCES)
    assert (out[150:] == 7).all()  # rows past the last start


def hopper_launch(**change: Any) -> tuple[Tensor, KVPages, AttentionBatch]:
    """A launch that Hopper's kernel takes, but for one change."""
    sizes = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, "gap": 0, "offset": 0} | change
    dtype, page_dtype = change.get("dtype", BF16), change.get("page_dtype", change.get("dtype", BF16))
    row = sizes["head_dim"] + sizes["gap"]
    dims = (2, sizes["page_size"], sizes["num_kv_heads"], row)
    flat = torch.zeros(math.prod(dims) + sizes["offset"], dtype=page_dtype)[sizes["offset"] :]
    pages = flat.view(dims)[..., : sizes["head_dim"]]
    q = torch.zeros(3, sizes["num_heads"], sizes["head_dim"], dtype=dtype)
    cu_seqlens_q = torch.tensor([0, 3]).int() if change.get("cu_seqlens_q", True) else None
    return q, KVPages(pages, pages), AttentionBatch(torch.zeros(1, 1).int(), torch.ones(1).int(), cu_seqlens_q)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": F16}, True),
        ({"dtype": F32}, False),
        ({"page_dtype": F8}, False),
        ({"page_dtype": F16}, False),
        ({"head_dim": 64}, True),
        ({"head_dim": 80}, False),
        ({"head_dim": 256}, False),
        ({"num_heads": 56}, True),  # groups of seven
        ({"num_heads": 128, "num_kv_heads": 1}, True),
        ({"num_heads": 129, "num_kv_heads": 1}, False),
        ({"page_size": 8}, False),
        ({"page_size": 24}, False),
        ({"page_size": 32}, True),
        ({"page_size": 192}, False),
        ({"page_size": 384}, True),
        ({"gap": 8}, True),
        ({"gap": 4}, False),  # strides of 264 bytes
        ({"offset": 8}, True),
        ({"offset": 4}, False),  # an address between two multiples of 16 bytes
        ({"cu_seqlens_q": False}, False),
    ],
)
def test_hopper_takes_what_its_copies_can_bring(change: dict[str, Any], taken: bool) -> None:
    q, pages, batch = hopper_launch(**change)
    assert prefill_hopper.fits(q, pages, batch, (9, 0)) == taken


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_keep_the_other_kernel(capability: tuple[int, int]) -> None:
    assert not prefill_hopper.fits(*hopper_launch(), capability)


def test_two_programs_of_the_other_kernel_share_a_hopper_multiprocessor() -> None:
    q, pages, _ = hopper_launch(page_dtype=F8)
    assert attention._prefill_tile(q, pages, (9, 0)) == attention._Tile(128, 64, 8, 3, max_registers=128)
    assert attention._prefill_tile(q, pages, (8, 0)) == attention._Tile(128, 64, 8, 3)
    q, pages, _ = hopper_launch(dtype=F32)
    assert attention._prefill_tile(q, pages, (9, 0)) == attention._Tile(64, 32, 4, 3)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_compiled_prefill_of_hopper_copies_boxes_and_needs_no_memory_of_its_own() -> None:
    """Compiles without a GPU."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, constants = prefill_hopper._kernel, prefill_hopper.constants(4, 0, 16, 64)
    boxes = f"tensordesc<bf16[1, 16, 1, 64],{gl.NVMMASharedLayout(128, 16, rank=4)!r}>"
    types = {"out": "*bf16", "q": "*bf16", "key_boxes": boxes, "value_boxes": boxes}
    types |= dict.fromkeys(("page_table", "seq_lens", "cu_seqlens_q"), "*i32")
    types |= dict.fromkeys(("score_scale", "value_scale"), "fp32")
    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "enable_fp_fusion": True})
    lines = compiled.asm["ptx"].splitlines()
    assert (
        sum("cp.async.bulk.tensor.4d" in line for line in lines) == 3 * 128 // 16
    )  # keys; values, to be cleared or not
    products = 64 // 16 + 128 // 16  # of 16 columns of the left side: of queries, and of weights
    parts = 3  # the first scores and the last values, and two loops
    assert sum("wgmma.mma_async" in line for line in lines) == 2 * parts * products
    assert compiled.metadata.global_scratch_size == 0


# --- decoding: splits, and what is refused ---


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

    kernel = attention._decode_kernel
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


# --- rotary positions and the way into pages ---

STORES = [  # dtype, page dtype, normed
    (F32, F32, False),
    (F32, F8, False),
    (BF16, BF16, True),
    (F16, F8, True),
]


@dataclass(frozen=True)
class NewTokens:
    """Heads that are parts of one row, as a fused product leaves them."""

    row: Tensor  # (T, N + 2 K, H)
    tables: tuple[Tensor, Tensor]
    pages: KVPages
    slot_mapping: Tensor
    norms: HeadNorms | None

    def store(self, reference: bool) -> tuple[Tensor, Tensor]:
        """The row, and all of the pages' memory, after a run with copies of both."""
        row, region = self.row.clone(), torch.stack((self.pages.keys, self.pages.values), 1)
        pages = KVPages(region[:, 0], region[:, 1], self.pages.key_scale, self.pages.value_scale)
        num_kv_heads = pages.num_kv_heads
        q, k, v = row.split([row.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        run = rotate_and_store_reference if reference else rotate_and_store
        run(q, k, v, self.tables, pages, self.slot_mapping, self.norms)
        return row, region


def new_tokens(dtype: torch.dtype, page_dtype: torch.dtype, normed: bool, head_dim: int = 48) -> NewTokens:
    slot_mapping = torch.tensor([5, -1, 17, 0, 18], device=DEVICE)
    row = random(5, 6 + 2 * 2, head_dim, dtype=dtype)
    row[0, 6, 3] = row[2, 9, 5] = 5000.0  # more than float8 can hold
    pages = KVPages(*torch.full((2, 3, 8, 2, head_dim), 7.0, device=DEVICE).to(page_dtype), 0.5, 2.0)
    tables = Rope(head_dim, 10_000.0).tables(torch.tensor([3, 1000, 0, 77, 5], device=DEVICE), dtype)
    weights = (1 + random(head_dim, seed=seed, dtype=dtype) / 4 for seed in (1, 2))
    return NewTokens(row, tables, pages, slot_mapping, HeadNorms(*weights, 1e-6) if normed else None)


@pytest.mark.parametrize("normed", [False, True])
def test_the_reference_turns_heads_as_the_model_does(normed: bool) -> None:
    tokens = new_tokens(F32, F32, normed)
    row, region = tokens.store(reference=True)
    heads = tokens.row.transpose(0, 1)  # (heads, T, H)
    q, k, v = heads[:6], heads[6:8], heads[8:]
    if tokens.norms is not None:
        q = F.rms_norm(q, (48,), tokens.norms.q_weight, 1e-6)
        k = F.rms_norm(k, (48,), tokens.norms.k_weight, 1e-6)
    assert_near(row[:, :6], apply_rope(q, *tokens.tables).transpose(0, 1), TOLERANCES)
    k = apply_rope(k, *tokens.tables) / 0.5
    for token, page, offset in ((0, 0, 5), (2, 2, 1), (3, 0, 0), (4, 2, 2)):
        assert_near(region[page, 0, offset], k[:, token], TOLERANCES)
        assert_near(region[page, 1, offset], v[:, token] / 2.0, TOLERANCES)


@needs_kernels
@pytest.mark.parametrize(("dtype", "page_dtype", "normed"), STORES)
def test_heads_are_turned_and_stored_as_by_the_reference(
    dtype: torch.dtype, page_dtype: torch.dtype, normed: bool
) -> None:
    tokens = new_tokens(dtype, page_dtype, normed)
    (row, region), (expected_row, expected_region) = tokens.store(reference=False), tokens.store(reference=True)
    assert_near(row, expected_row, ROUNDED_ONCE)
    assert torch.equal(row[:, 6:], tokens.row[:, 6:])  # keys and values keep theirs
    if page_dtype == F8:  # a bit of 3 after the first, where float32 differs in its last bit
        torch.testing.assert_close(region.float(), expected_region.float(), rtol=2**-3, atol=2**-9)
        assert (region.float() != expected_region.float()).float().mean() < 0.01
    else:
        assert_near(region, expected_region, ROUNDED_ONCE)


@needs_kernels
def test_float8_pages_hold_values_to_nearest_even_and_clamped() -> None:
    """In every bit: values are stored as they come, halfway cases and those below the normal range included."""
    exact = torch.arange(127, dtype=torch.uint8).view(F8).float()
    middles = (exact[1:] + exact[:-1]) / 2
    values = torch.cat((exact, middles, -middles, torch.tensor([1e-9, -600.0, 470.0, 464.0])))
    head_dim = len(values) + len(values) % 2
    row = torch.zeros(1, 3, head_dim, device=DEVICE)
    row[0, 2, : len(values)] = values.to(DEVICE)
    pages = KVPages(*torch.zeros(2, 1, 1, 1, head_dim, device=DEVICE).to(F8))
    tables = torch.ones(1, head_dim, device=DEVICE), torch.zeros(1, head_dim, device=DEVICE)
    rotate_and_store(row[:, :1], row[:, 1:2], row[:, 2:], tables, pages, torch.zeros(1).int().to(DEVICE))
    expected = values.clamp(-448, 448).to(F8).float()
    assert torch.equal(pages.values.float().flatten()[: len(values)].cpu(), expected)


def test_heads_that_do_not_fit_their_pages_are_refused() -> None:
    tokens = new_tokens(F32, F32, False)
    q, k, v = tokens.row.split([6, 2, 2], dim=1)
    with pytest.raises(ValueError, match=r"k: expected shape \(5, 2, 48\)"):
        rotate_and_store(q, v[:, :1], v, tokens.tables, tokens.pages, tokens.slot_mapping)
    with pytest.raises(ValueError, match=r"q: expected shape \(5, 4, 48\)"):
        rotate_and_store(q[:, :5], k, v, tokens.tables, tokens.pages, tokens.slot_mapping)
    with pytest.raises(ValueError, match=r"slot_mapping: expected shape \(5,\)"):
        rotate_and_store(q, k, v, tokens.tables, tokens.pages, tokens.slot_mapping[:4])


# --- norms and activations ---


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_norm_of_the_reference_is_torchs(dtype: torch.dtype) -> None:
    x, weight, residual = (random(*shape, seed=s, dtype=dtype) for s, shape in enumerate([(3, 40), (40,), (3, 40)]))
    out, total = torch.empty_like(x), x + residual
    rms_norm_reference(x, weight, 1e-5, out)
    assert_near(out, F.rms_norm(x, (40,), weight, 1e-5), ROUNDED_ONCE)
    rms_norm_reference(x, weight, 1e-5, out, residual)
    assert torch.equal(residual, total)
    assert_near(out, F.rms_norm(total, (40,), weight, 1e-5), ROUNDED_ONCE)


@needs_kernels
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [1, 576, 1024])
def test_rows_are_normed_as_by_the_reference(dim: int, dtype: torch.dtype, added: bool) -> None:
    x, weight = random(3, dim + 5, dtype=dtype)[:, :dim], random(dim, seed=1, dtype=dtype)
    residual = random(3, dim, seed=2, dtype=dtype) if added else None
    expected_residual = None if residual is None else residual.clone()
    region = torch.full((3, dim + 1), 7.0, dtype=dtype, device=DEVICE)
    out, expected = region[:, :dim], torch.empty_like(x)
    rms_norm_reference(x, weight, 1e-5, expected, expected_residual)
    rms_norm(x, weight, 1e-5, out, residual)
    assert_near(out, expected, ROUNDED_ONCE)
    assert (region[:, dim] == 7).all()
    if residual is not None and expected_residual is not None:
        assert torch.equal(residual, expected_residual)


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("num_cols", [3, activation.BLOCK + 8])
def test_swiglu_is_that_of_its_reference_and_may_overwrite_its_gate(num_cols: int, dtype: torch.dtype) -> None:
    row = random(3, 2 * num_cols, dtype=dtype) * 4
    gate, up = row.chunk(2, dim=1)
    expected, before = torch.empty_like(gate), up.clone()
    swiglu_reference(gate, up, expected)
    assert_near(expected, F.silu(gate) * up, TOLERANCES)
    swiglu(gate, up, gate)
    assert_near(gate, expected, ROUNDED_ONCE)
    assert torch.equal(up, before)


def test_rows_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"out: expected dense rows \(3, 4\)"):
        rms_norm(x, torch.ones(4), 1e-5, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"weight \(3,\)"):
        rms_norm(x, torch.ones(3), 1e-5, x)
    with pytest.raises(ValueError, match="up: expected dense rows"):
        swiglu(x, torch.zeros(4, 3).T, x)


# --- sampling ---


def rows_of(
    params: Sequence[SamplingParams], positions: Sequence[int] | None = None, history: Tensor | None = None
) -> SamplingRows:
    """Row b has row b of the history, if there is one and it needs it."""
    positions = range(10, 10 + len(params)) if positions is None else positions
    indices = [b if history is not None and p.needs_history else -1 for b, p in enumerate(params)]
    integers = [p.ints(*pair) for p, *pair in zip(params, positions, indices, strict=True)]
    numbers = [p.floats() for p in params]
    return SamplingRows(torch.tensor(numbers, device=DEVICE), torch.tensor(integers, device=DEVICE), history)


def drawn(logits: Tensor, rows: SamplingRows, reference: bool = False) -> list[int]:
    out = torch.full((len(logits),), -1, device=DEVICE)
    (sample_reference if reference else sample)(logits, rows, out)
    return out.tolist()


def survivors(logits: Sequence[float], **params: float) -> list[int]:
    """Tokens that are drawn at some of many positions."""
    many = [SamplingParams(**params)] * 100  # type: ignore[arg-type]
    repeated = torch.tensor([list(logits)] * 100, device=DEVICE)
    return sorted(set(drawn(repeated, rows_of(many), reference=True)))


def test_noise_is_made_of_the_published_philox() -> None:
    """The first of the known answers that come with Random123."""
    assert [int(word) for word in sampling._philox(0, 0, 1, DEVICE)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_has_the_mean_and_variance_of_gumbel() -> None:
    noise = gumbel_noise(5, 3, 100_000, DEVICE)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - math.pi**2 / 6) < 0.04
    assert noise.unique().numel() > 99_000


def test_noise_is_the_requests_and_the_positions_own() -> None:
    noise = gumbel_noise(1, 0, 64, DEVICE)
    for other in (
        gumbel_noise(2, 0, 64, DEVICE),
        gumbel_noise(1 << 32 | 1, 0, 64, DEVICE),
        gumbel_noise(1, 1, 64, DEVICE),
    ):
        assert not (noise == other).any()
    assert torch.equal(noise[:61], gumbel_noise(1, 0, 61, DEVICE))


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -math.inf], device=DEVICE)
    params = [SamplingParams(temperature=2.0, seed=7)] * 2000
    counts = torch.tensor(drawn(logits.expand(2000, -1), rows_of(params), reference=True)).bincount(minlength=5)
    expected = (logits / 2).softmax(0).cpu() * 2000
    assert counts[4] == 0
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected / 2000)).sqrt()).all()


def test_candidates_are_those_of_the_formulas() -> None:
    logits = [math.log(p) for p in (0.4, 0.1, 0.3, 0.1, 0.1)]
    assert survivors(logits) == [0, 1, 2, 3, 4]
    assert survivors(logits, top_k=2) == [0, 2]
    assert survivors(logits, top_k=3) == [0, 1, 2, 3, 4]  # equals stay together
    assert survivors(logits, top_p=0.39) == [0]
    assert survivors(logits, top_p=0.41) == [0, 2]
    assert survivors(logits, top_p=0.71) == [0, 1, 2, 3, 4]
    assert survivors(logits, top_k=2, top_p=0.56) == [0]  # of the two, the first has 4 / 7
    assert survivors(logits, min_p=0.5) == [0, 2]
    assert survivors(logits, top_p=1e-6) == [0]


def test_penalties_are_those_of_the_formulas() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]], device=DEVICE)
    history = torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
    remember(history[0], torch.tensor([0, 1], device=DEVICE), torch.tensor([1, 2, 2], device=DEVICE))
    assert history.tolist() == [[1, 3, 4, 0]]
    found = sampling._penalized(logits[0], history[0], 4.0, 0.25, 0.5, 1.0)
    assert found.tolist() == [0.5, -8.0 - 1.5, 0.25 - 2.5, 0.5]


@pytest.mark.parametrize("reference", [True, pytest.param(False, marks=needs_kernels)])
def test_greedy_draws_the_lowest_of_equals_and_counts_it(reference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 16)
    logits = torch.zeros(3, 70, device=DEVICE)
    logits[0, [33, 37, 65]] = 1.0
    logits[1, 69] = 2.0
    logits[2, [1, 2]] = 1.0
    history = torch.zeros(3, 70, dtype=torch.int32, device=DEVICE)
    history[2, 1] = 2
    greedy = SamplingParams(temperature=0.0)
    params = [greedy, greedy, SamplingParams(temperature=1e-4, presence_penalty=0.5)]  # as cold as 0
    rows = rows_of(params, history=history)
    assert drawn(logits, rows, reference) == [33, 69, 2]
    assert drawn(logits, rows, reference) == [33, 69, 1]  # 2 has been said as well by now
    assert history.sum().item() == 2 * 3


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=40, seed=-5),
    SamplingParams(temperature=1.3, top_p=0.8, seed=2**62 + 1),
    SamplingParams(temperature=0.5, top_k=17, top_p=0.6, min_p=0.01, seed=3),
    SamplingParams(temperature=2.0, min_p=0.2, seed=4),
    SamplingParams(temperature=0.9, top_k=1, seed=5),
    SamplingParams(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=-0.4, seed=6),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.4),
    SamplingParams(top_k=100_000, top_p=1e-7, seed=7),
]


def sampled_logits(vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Some tokens are out of the question, and in bfloat16 many are equal."""
    logits = 3 * random(len(SAMPLINGS), vocab_size, dtype=dtype)
    logits[:, 5:30:7] = -math.inf
    return logits


@needs_kernels
@pytest.mark.parametrize(("vocab_size", "dtype"), [(1003, F32), (1003, BF16), (3, F32), (1, F16), (256, F16)])
def test_tokens_are_those_of_the_reference(
    vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 256)
    logits = sampled_logits(vocab_size, dtype)
    histories = [(random(len(SAMPLINGS), vocab_size, seed=1) * 2).int().clamp(min=0) for _ in range(2)]
    for start in (0, 1000):
        positions = [start + b for b in range(len(SAMPLINGS))]
        found, expected = (
            drawn(logits, rows_of(SAMPLINGS, positions, history), reference)
            for history, reference in zip(histories, (False, True), strict=True)
        )
        assert found == expected
    assert torch.equal(*histories)


@needs_kernels
def test_a_request_draws_the_same_tokens_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 256)
    logits, positions = sampled_logits(300, F32), range(len(SAMPLINGS))
    together = drawn(logits, rows_of(SAMPLINGS, positions))
    order = [3, 4, 0]
    apart = drawn(logits[order], rows_of([SAMPLINGS[b] for b in order], order))
    assert apart == [together[b] for b in order]


@needs_kernels
def test_a_row_without_a_possible_token_draws_one_of_the_vocabulary() -> None:
    """Prevents: an index past the vocabulary, which would be read from the embedding."""
    logits = torch.full((2, 5), -math.inf, device=DEVICE)
    assert drawn(logits, rows_of([SamplingParams(temperature=0.0), SamplingParams(top_k=2, top_p=0.5)])) == [0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"seed": 2**63},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SamplingParams(**change)  # type: ignore[arg-type]


def test_rows_for_other_logits_are_refused() -> None:
    rows = rows_of([SamplingParams()] * 2)
    with pytest.raises(ValueError, match=r"floats: expected \(3, 7\)"):
        sample(torch.zeros(3, 5, device=DEVICE), rows, torch.zeros(3, device=DEVICE).long())
    with pytest.raises(ValueError, match=r"out: expected \(2,\) in torch.int64"):
        sample(torch.zeros(2, 5, device=DEVICE), rows, torch.zeros(2, device=DEVICE))
