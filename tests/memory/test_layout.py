"""Where parameters lie: rows split as `torch.chunk` splits them, segments aligned, in order and disjoint."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, FlatLayout, RowShards, Segment, aligned

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
world_sizes = st.integers(1, 12)
sizes_nbytes = st.lists(st.integers(0, 4 * ALIGNMENT_NBYTES), max_size=12)
segments = st.builds(Segment, st.integers(0, 12), st.integers(1, 8))
properties = settings(deadline=None, max_examples=60)  # no deadline: the machine may be busy


def chunks_of(full: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """What `torch.chunk` gives every rank; it leaves out the last ranks when rows run short."""
    chunks = list(full.chunk(world_size))
    return chunks + [full[:0]] * (world_size - len(chunks))


# --- rows ---


@properties
@given(shapes, world_sizes)
def test_every_rank_holds_the_rows_that_torch_chunk_gives_it(shape: tuple[int, ...], world_size: int) -> None:
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = RowShards(shape, world_size)
    for rank, chunk in enumerate(chunks_of(full, world_size)):
        start, stop = shards.row_range(rank)
        assert torch.equal(full[start:stop], chunk)
        assert shards.local_shape(rank) == tuple(chunk.shape)


@properties
@given(shapes, world_sizes)
def test_chunks_one_after_the_other_begin_with_the_parameter(shape: tuple[int, ...], world_size: int) -> None:
    """The zero-copy layout: what ranks send, end to end, is the full parameter followed by padding only."""
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = RowShards(shape, world_size)
    slot = torch.full((shards.padded_numel,), -1)
    for rank, chunk in enumerate(chunks_of(full, world_size)):
        slot[rank * shards.chunk_numel :][: chunk.numel()] = chunk.flatten()
    assert torch.equal(slot[: full.numel()], full.flatten())
    assert (slot[full.numel() :] == -1).all()


@properties
@given(shapes, world_sizes)
def test_padding_is_less_than_one_row_a_rank(shape: tuple[int, ...], world_size: int) -> None:
    shards = RowShards(shape, world_size)
    rows, row_numel = shape[0], shards.row_numel
    assert shards.chunk_numel == shards.rows_per_rank * row_numel
    assert shards.padded_numel == world_size * shards.chunk_numel
    assert rows <= shards.rows_per_rank * world_size < rows + world_size
    assert shards.padded_numel - rows * row_numel == (-rows % world_size) * row_numel


@pytest.mark.parametrize(
    ("rows", "world_size", "ranges"),
    [
        (8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),
        (2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
        (0, 2, [(0, 0), (0, 0)]),
        (3, 1, [(0, 3)]),
    ],
)
def test_row_ranges_of_known_cases(rows: int, world_size: int, ranges: list[tuple[int, int]]) -> None:
    """Prevents: ranges below zero or past the end where ranks outnumber rows."""
    assert [RowShards((rows, 3), world_size).row_range(rank) for rank in range(world_size)] == ranges


def test_a_scalar_cannot_be_split_by_rows() -> None:
    with pytest.raises(ValueError, match=r"at least one dimension to be split by rows, found shape \(\)"):
        RowShards((), 2)


def test_a_world_has_at_least_one_rank() -> None:
    with pytest.raises(ValueError, match="world size must be at least 1, found 0"):
        RowShards((3,), 0)


# --- bytes ---


@properties
@given(st.integers(0, 10**12), st.integers(1, 4096))
def test_aligned_is_the_next_multiple(nbytes: int, alignment_nbytes: int) -> None:
    assert aligned(nbytes, alignment_nbytes) % alignment_nbytes == 0
    assert nbytes <= aligned(nbytes, alignment_nbytes) < nbytes + alignment_nbytes


@properties
@given(segments, segments)
def test_segments_overlap_where_they_share_a_byte(one: Segment, other: Segment) -> None:
    shared = bytes_of(one) & bytes_of(other)
    assert one.overlaps(other) == other.overlaps(one) == bool(shared)


def test_an_empty_segment_overlaps_nothing() -> None:
    """Prevents: a unit without bytes becoming the neighbour of those around it."""
    assert not Segment(0, 2).overlaps(Segment(1, 0))
    assert not Segment(1, 0).overlaps(Segment(0, 2))


def bytes_of(segment: Segment) -> set[int]:
    return set(range(segment.offset_nbytes, segment.end_nbytes))


@properties
@given(sizes_nbytes)
def test_packed_segments_are_aligned_in_order_and_tight(sizes: list[int]) -> None:
    """Each segment starts at the first aligned byte after the one before it: disjoint, no gap wider than needed."""
    layout = FlatLayout.pack(sizes)
    end = 0
    for segment, nbytes in zip(layout.segments, sizes, strict=True):
        assert segment == Segment(aligned(end), nbytes)
        end = segment.end_nbytes
    assert layout.nbytes == aligned(end)


@properties
@given(sizes_nbytes)
def test_packed_bytes_are_the_sum_of_aligned_sizes(sizes: list[int]) -> None:
    assert FlatLayout.pack(sizes).nbytes == sum(aligned(nbytes) for nbytes in sizes)


@pytest.mark.parametrize(
    ("places", "nbytes", "complaint"),
    [
        ([(8, 16)], 256, "misaligned"),
        ([(0, 300), (256, 10)], 512, "overlaps what ends at 300"),
        ([(256, 10), (0, 10)], 512, "overlaps what ends at 266"),
        ([(0, 300)], 256, "segments end at 300, the region at 256"),
        ([(0, 10)], 512, "segments end at 10, the region at 512"),
    ],
)
def test_a_layout_that_is_wrong_is_refused(places: list[tuple[int, int]], nbytes: int, complaint: str) -> None:
    """Prevents: a layout made by hand, or by a later packer, that nobody checks."""
    with pytest.raises(AssertionError, match=complaint):
        FlatLayout(tuple(Segment(*place) for place in places), nbytes)
