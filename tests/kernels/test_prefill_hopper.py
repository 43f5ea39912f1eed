"""Prefill attention on Hopper: what it takes, what it computes, what it compiles to."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import gluon_on_threads
from tests.kernels.inference import (
    BF16,
    F8,
    F16,
    F32,
    TOLERANCES,
    Shape,
    assert_near,
    expected_attention,
    int32,
    paged,
    prefilled,
    queries,
    tiles_of,
)
from tests.kernels.test_kernels import DEVICE
from yafsdp_like.kernels import prefill_attention as prefill_attention_module
from yafsdp_like.kernels import prefill_hopper
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.paged_attention import AttentionBatch, KVPages, Tile, attention_reference
from yafsdp_like.kernels.prefill_attention import prefill_attention

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
    monkeypatch.delattr(prefill_attention_module, "_launch")


@needs_hopper
@pytest.mark.usefixtures("only_hopper")
@pytest.mark.parametrize("shape", HOPPER_PREFILLS)
def test_prefill_on_hopper_is_the_attention_of_its_reference(shape: Shape) -> None:
    assert_near(prefilled(shape), expected_attention(shape), TOLERANCES)


@needs_hopper
@pytest.mark.usefixtures("only_hopper")
@pytest.mark.parametrize("num_before", [1, 300])
@pytest.mark.parametrize("shape", HOPPER_PREFILLS[:2])
def test_on_hopper_rows_of_no_tile_are_not_written(shape: Shape, num_before: int) -> None:
    (pages, batch), (q, _) = paged(shape), queries(shape)
    behind = replace(batch, tiles=tiles_of(shape, num_before))
    rows = torch.cat([torch.full_like(q[:1].expand(num_before, -1, -1), torch.nan), q, q[:40]])
    out = torch.full_like(rows, 7.0)
    prefill_attention(rows, pages, behind, out, shape.window)
    assert_near(out[num_before : num_before + len(q)], expected_attention(shape), TOLERANCES)
    assert (out[:num_before] == 7).all() and (out[num_before + len(q) :] == 7).all()


@needs_hopper
@pytest.mark.usefixtures("only_hopper")
def test_a_chunk_on_hopper_has_the_same_bits_alone_and_cut_in_two() -> None:
    pages, batch = paged(HOPPER_PREFILLS[1])
    q, together = queries(HOPPER_PREFILLS[1])
    apart = torch.full_like(together, 7.0)
    table = batch.page_table[2:3]
    for first, last in ((78, 211), (211, 378)):  # the third sequence's 300 rows
        cut = replace(HOPPER_PREFILLS[1], seq_lens=(813 - 378 + last,), num_new=(last - first,))
        where = AttentionBatch(table, int32(cut.seq_lens), tiles_of(cut))
        prefill_attention(q[first:last], pages, where, apart[first:last], 200)
    prefill_attention(q, pages, batch, together, 200)
    assert torch.equal(together[78:378], apart[78:378])


@needs_hopper
@pytest.mark.usefixtures("only_hopper")
def test_a_recorded_launch_on_hopper_allocates_nothing_and_serves_other_lengths() -> None:
    shape = replace(HOPPER_PREFILLS[0], seq_lens=(200, 813), num_new=(40, 130))
    (pages, batch), (q, out) = paged(shape), queries(shape)
    assert batch.tiles is not None
    prefill_attention(q, pages, batch, out)  # compiles
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    prefill_attention(q, pages, batch, out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill_attention(q, pages, batch, out)
    later = tiles_of(replace(shape, seq_lens=(150, 700), num_new=(100, 50)))
    batch.tiles[: len(later)].copy_(later)
    out.fill_(7.0)
    expected = out.clone()
    attention_reference(q, pages, batch, expected)
    graph.replay()
    assert_near(out, expected, TOLERANCES)
    assert (out[150:] == 7).all()  # rows of no tile


SMALL_PREFILLS = [
    Shape(2, 2, 128, 16, (200, 77, 213, 0, 20), (1, 77, 170, 0, 20), dtype=BF16, page_dtype=BF16),
    Shape(8, 2, 128, 16, (300, 77), (99, 77), window=130, dtype=BF16, page_dtype=BF16, heads_first=True),
    Shape(14, 2, 64, 64, (140, 40), (23, 40), dtype=BF16, page_dtype=BF16),  # two rows of a tile are nobody's
    Shape(8, 2, 64, 256, (300,), (50,), dtype=F16, page_dtype=F16),  # two blocks a page
]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there the kernel itself runs")
@pytest.mark.parametrize("num_programs", [1, 3, 40])
@pytest.mark.parametrize("shape", SMALL_PREFILLS)
def test_the_warps_of_hopper_wait_for_each_other_and_compute_every_tile(shape: Shape, num_programs: int) -> None:
    """On threads: a missing wait reads what is not there yet, and one too many never ends."""
    (pages, batch), (q, out) = paged(shape), queries(shape)
    gluon_on_threads.launch(gluon_on_threads.kernel(), (q, pages, batch, out), shape.window, num_programs)
    assert_near(out, expected_attention(shape), TOLERANCES)


def hopper_launch(**change: Any) -> tuple[Tensor, KVPages]:
    """A launch that Hopper's kernel takes, but for one change."""
    sizes = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, "gap": 0, "offset": 0} | change
    dtype, page_dtype = change.get("dtype", BF16), change.get("page_dtype", change.get("dtype", BF16))
    row = sizes["head_dim"] + sizes["gap"]
    dims = (2, sizes["page_size"], sizes["num_kv_heads"], row)
    flat = torch.zeros(math.prod(dims) + sizes["offset"], dtype=page_dtype)[sizes["offset"] :]
    pages = flat.view(dims)[..., : sizes["head_dim"]]
    q = torch.zeros(3, sizes["num_heads"], sizes["head_dim"], dtype=dtype)
    return q, KVPages(pages, pages)


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
    ],
)
def test_hopper_takes_what_its_copies_can_bring(change: dict[str, Any], taken: bool) -> None:
    q, pages = hopper_launch(**change)
    assert prefill_hopper.fits(q, pages, (9, 0)) == taken


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_keep_the_other_kernel(capability: tuple[int, int]) -> None:
    assert not prefill_hopper.fits(*hopper_launch(), capability)


def test_two_programs_of_the_other_kernel_share_a_hopper_multiprocessor() -> None:
    q, pages = hopper_launch(page_dtype=F8)
    assert prefill_attention_module._choose_tile(q, pages, (9, 0)) == Tile(128, 64, 8, 3, max_registers=128)
    assert prefill_attention_module._choose_tile(q, pages, (8, 0)) == Tile(128, 64, 8, 3)
    q, pages = hopper_launch(dtype=F32)
    assert prefill_attention_module._choose_tile(q, pages, (9, 0)) == Tile(64, 32, 4, 3)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_the_compiled_prefill_of_hopper_copies_boxes_and_needs_no_memory_of_its_own() -> None:
    """Compiles without a GPU."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, constants = prefill_hopper._prefill_kernel, prefill_hopper.constants(4, 0, 16, 64)
    boxes = f"tensordesc<bf16[1, 16, 1, 64],{gl.NVMMASharedLayout(128, 16, rank=4)!r}>"
    types = {"out": "*bf16", "q": "*bf16", "key_boxes": boxes, "value_boxes": boxes}
    types |= dict.fromkeys(("page_table", "query_tiles"), "*i32")
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
