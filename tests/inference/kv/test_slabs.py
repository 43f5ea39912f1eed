"""Shapes of pages and slabs: where bytes are, and how slabs are lent to shapes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.kv.test_kv_cache import LLAMA, SMALL
from yafsdp_like.inference.kv.layer_groups import LayerGroup
from yafsdp_like.inference.kv.slabs import PageShape, SlabGrid, SlabPool

SMOLLM = PageShape(num_layers=30, num_kv_heads=3, head_dim=64, page_size=16)

SHAPES = st.builds(
    PageShape,
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 32, 80]),
    page_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
)


@given(shape=SHAPES)
@settings(max_examples=25, deadline=None)
def test_heads_of_pages_tile_without_overlap_where_strides_say(shape: PageShape) -> None:
    """Prevents: a stride in bytes where it should be in elements, or planes that overlap where they are padded."""
    page_stride, layer_stride, kv_stride, head_stride, token_stride, _ = shape.strides
    end = 0
    for page, layer, kv, head in itertools.product(
        range(2), range(shape.num_layers), range(2), range(shape.num_kv_heads)
    ):
        by_stride = page * page_stride + layer * layer_stride + kv * kv_stride + head * head_stride
        start = shape.offset_nbytes(page, layer, kv) + head * shape.head_nbytes
        assert by_stride * shape.itemsize == start >= end
        assert shape.offset_nbytes(page, layer, kv) % 256 == 0
        end = start + shape.page_size * token_stride * shape.itemsize
    assert end <= 2 * shape.nbytes


@given(shape=SHAPES, pages=st.integers(2, 5), extra=st.integers(0, 3), num_slabs=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_pages_lie_inside_their_slab_and_say_which_it_is(
    shape: PageShape, pages: int, extra: int, num_slabs: int
) -> None:
    slab_nbytes = pages * shape.nbytes + extra * 256
    grid = SlabGrid(num_slabs * slab_nbytes + 100, slab_nbytes)
    grid.check_shape(shape)
    for slab in range(num_slabs):
        segment, found = grid.segment(slab), grid.pages(slab, shape)
        assert len(found) >= grid.pages_per_slab(shape) >= 1
        for page in found:
            assert segment.offset_nbytes <= page * shape.nbytes and (page + 1) * shape.nbytes <= segment.end_nbytes
            assert grid.slab_of(page, shape) == slab
        assert segment.nbytes - len(found) * shape.nbytes < 2 * shape.nbytes


def test_one_tensor_over_the_region_addresses_every_page_by_number() -> None:
    import torch

    shape = PageShape(num_layers=3, num_kv_heads=2, head_dim=40, page_size=4, dtype="float32")
    region = torch.arange(5 * shape.nbytes // 4, dtype=torch.float32)
    dims = (5, shape.num_layers, 2, shape.num_kv_heads, shape.page_size, shape.head_dim)
    view = region.as_strided(dims, shape.strides)
    for page, layer, kv in itertools.product(range(5), range(3), range(2)):
        assert int(view[page, layer, kv, 0, 0, 0]) == shape.offset_nbytes(page, layer, kv) // 4


def test_sizes_of_real_models_are_what_arithmetic_says() -> None:
    assert LLAMA.nbytes == 32 * 2 * 16 * 8 * 128 * 2 == 2 << 20
    assert LLAMA.offset_nbytes(1, 1, 1) == (2 << 20) + 3 * (32 << 10)
    assert SMOLLM.nbytes == 30 * 2 * 16 * 3 * 64 * 2


def test_a_fitting_slab_is_filled_by_whole_pages_of_both_groups_of_a_hybrid_model() -> None:
    groups = LayerGroup.of_windows([512] * 5 + [None] + [512] * 5 + [None], 4, 256, 16)
    assert [group.layers for group in groups] == [(0, 1, 2, 3, 4, 6, 7, 8, 9, 10), (5, 11)]
    grid = SlabGrid.fitting(1 << 30, [group.shape for group in groups])
    for group in groups:
        assert grid.slab_nbytes % group.shape.nbytes == 0
    assert 32 << 20 <= grid.slab_nbytes <= 128 << 20


def test_what_cannot_be_cut_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="at least two"):
        SlabGrid(1 << 20, SMALL.nbytes + 256).check_shape(SMALL)
    with pytest.raises(ValueError, match="holds no slab"):
        SlabGrid(1 << 10, 1 << 20)
    with pytest.raises(ValueError, match="multiple of 256"):
        SlabGrid(1 << 20, 1000)
    with pytest.raises(ValueError, match="found 'int3'"):
        PageShape(1, 1, 1, 1, "int3")
    with pytest.raises(ValueError, match="found 0"):
        PageShape(1, 0, 1, 1)


def test_a_slab_returns_with_its_last_page_and_goes_to_another_shape() -> None:
    wide = PageShape(num_layers=3, num_kv_heads=1, head_dim=32, page_size=4)
    slabs = SlabPool(SlabGrid(2 * 6 * 512, 6 * 512))
    slabs.admit(SMALL)
    slabs.admit(wide)
    assert sorted(slabs.take_all(SMALL, 13)) == list(range(12))
    assert slabs.take_all(SMALL, 1) == slabs.take_all(wide, 1) == []
    for page in range(6, 12):
        assert slabs.take_all(wide, 1) == []
        slabs.put_all(SMALL, [page])
    assert slabs.take_all(wide, 1) == [2]  # 2 * 1536 bytes: where page 6 of the small shape was
    slabs.check_integrity({SMALL: set(range(6)), wide: {2}})
    with pytest.raises(RuntimeError, match="are lent"):
        slabs.check_integrity({SMALL: set(range(5)), wide: {2}})


def test_pages_come_last_from_slabs_that_are_lent_late_and_never_from_claimed_ones() -> None:
    """So that weights find their slabs free, and a page is never where weights lie."""
    slabs = SlabPool(SlabGrid(4 * 1024, 1024), lend_late={0: 2, 1: 1})  # of two pages each
    slabs.admit(SMALL)
    slabs.claim(2)
    assert slabs.take_all(SMALL, 7) == [6, 7, 2, 3, 0, 1]
    slabs.check_integrity({SMALL: {7, 6, 3, 2, 1, 0}})
    slabs.put_all(SMALL, [7, 2])
    slabs.returned(2)
    assert slabs.take_all(SMALL, 4) == [7, 2, 4, 5]
    assert slabs.num_written == [1, 1, 2, 1]
