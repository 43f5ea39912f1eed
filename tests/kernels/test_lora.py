"""What adapters add, against merged matrices: natively on a GPU, else in the interpreter (`test_kernels.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.kernels.inference import BF16, F32, TOLERANCES, random
from tests.kernels.test_kernels import DEVICE, RUNS
from yafsdp_like.kernels import lora
from yafsdp_like.kernels.lora import (
    AdapterRows,
    LowRank,
    add_low_rank,
    max_num_tiles,
    num_lines,
    tiles_of,
    workspace_numel,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SLOTS = 3


def made(
    num_rows: int, sizes: tuple[int, ...], rank: int, num_cols: int, dtype: torch.dtype
) -> tuple[torch.Tensor, LowRank, NDArray[np.int32], torch.Tensor]:
    """Rows, matrices whose slots lie apart, slots of rows, and what the rows are added to."""
    a_numel, b_numel = len(sizes) * rank * num_cols, sum(sizes) * rank
    images = random(NUM_SLOTS, a_numel + b_numel + 8, seed=1, dtype=dtype) / 4
    a = images[:, :a_numel].unflatten(1, (-1, num_cols))
    b = images[:, a_numel : a_numel + b_numel].unflatten(1, (-1, rank))
    slots = np.array([(5 * row + row // 7) % (NUM_SLOTS + 1) for row in range(num_rows)], np.int32)
    out = random(num_rows, sum(sizes), seed=3, dtype=dtype)
    return random(num_rows, num_cols, seed=2, dtype=dtype), LowRank(a, b, sizes), slots, out


def workspace_of(rows: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Of just the size that is asked for, full of what must not be read."""
    numel = workspace_numel(len(rows), low_rank.a.shape[1])
    return torch.full((numel,), float("nan"), device=rows.device)


def adapted_by(slots: NDArray[np.int32]) -> AdapterRows:
    """The tables of rows' slots, on the device."""
    return AdapterRows(*(torch.from_numpy(table).to(DEVICE) for table in tiles_of(slots, NUM_SLOTS)))


def merged(rows: torch.Tensor, low_rank: LowRank, slots: NDArray[np.int32], out: torch.Tensor) -> torch.Tensor:
    """Each row by the product of its two matrices, in float64."""
    rank, expected = low_rank.rank, out.double()
    for row, slot in enumerate(slots.tolist()):
        if slot:
            a = low_rank.a[slot - 1].double().unflatten(0, (-1, rank))
            b = low_rank.b[slot - 1].double().split(low_rank.sizes)
            delta = torch.cat([rows_of_b @ a[number] for number, rows_of_b in enumerate(b)])
            expected[row] += delta @ rows[row].double()
    return expected


CASES = [
    (1, (40,), 4, 24, F32),
    (5, (130, 20, 20), 8, 1100, BF16),  # pieces along K
    (2, (12,), 4, 2560, F32),  # 8 pieces, of which 5 have columns
    (300, (9, 5), 20, 40, F32),  # tiles of 64 rows
    (3, (16,), 70, 50, F32),
]


@pytest.mark.parametrize(("num_rows", "sizes", "rank", "num_cols", "dtype"), CASES)
def test_rows_get_what_their_own_adapter_adds(
    num_rows: int,
    sizes: tuple[int, ...],
    rank: int,
    num_cols: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = []
    launch = lora._launch
    monkeypatch.setattr(lora, "_launch", lambda *args: (launched.append(1), launch(*args)))
    rows, low_rank, slots, out = made(num_rows, sizes, rank, num_cols, dtype)
    expected, before = merged(rows, low_rank, slots, out), out.clone()
    slots_are_0 = torch.from_numpy(slots == 0).to(DEVICE)
    add_low_rank(rows, low_rank, adapted_by(slots), workspace_of(rows, low_rank), out)
    tolerance = 4 * TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    assert torch.equal(out[slots_are_0], before[slots_are_0]), "rows without an adapter keep their bits"
    assert len(launched) == RUNS


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
def test_an_adapter_of_nans_spoils_only_its_own_rows() -> None:
    """Prevents: a product with zeros in place of rows of others, which is NaN where the matrix is."""
    rows, low_rank, slots, out = made(16, (24,), 4, 32, F32)
    expected = merged(rows, low_rank, slots, out)
    low_rank.a[0] = float("nan")
    low_rank.b[0] = float("inf")
    add_low_rank(rows, low_rank, adapted_by(slots), workspace_of(rows, low_rank), out)
    others = torch.from_numpy(slots != 1).to(DEVICE)
    torch.testing.assert_close(out[others].double(), expected[others], rtol=1e-4, atol=1e-4)
    assert out[~others].isnan().all()


def test_rows_without_adapters_write_nothing() -> None:
    rows, low_rank, slots, out = made(5, (24,), 4, 32, F32)
    before = out.clone()
    add_low_rank(rows, low_rank, adapted_by(np.zeros_like(slots)), workspace_of(rows, low_rank), out)
    assert torch.equal(out, before)


def test_shapes_that_do_not_fit_are_refused() -> None:
    rows, low_rank, slots, out = made(5, (24,), 4, 32, F32)
    workspace, adapted = workspace_of(rows, low_rank), adapted_by(slots)
    with pytest.raises(ValueError, match="expected A"):
        add_low_rank(rows[:, 1:], low_rank, adapted, workspace, out)
    with pytest.raises(ValueError, match=r"order and tiles \(\(5,\), \(4, 3\)\) of 5 rows and 3 slots"):
        add_low_rank(rows, low_rank, AdapterRows(adapted.order[1:], adapted.tiles), workspace, out)
    with pytest.raises(ValueError, match="projections of 24 columns"):
        add_low_rank(rows, LowRank(low_rank.a, low_rank.b, (23,)), adapted, workspace, out)
    with pytest.raises(ValueError, match="workspace of"):
        add_low_rank(rows, low_rank, adapted, workspace[1:], out)


def test_rows_are_sorted_by_their_slots_and_cut_into_tiles_of_one_adapter() -> None:
    slots = np.array([2, 0, 1, *[2] * 17, 0], np.int32)
    order, tiles = tiles_of(slots, 4)
    assert order.tolist() == [1, 20, 2, 0, *range(3, 20)]
    assert tiles.tolist() == [[1, 2, 3], [2, 3, 19], [2, 19, 21], *[[0, 0, 0]] * 3]
    assert tiles_of(np.zeros(1, np.int32), 4)[1].tolist() == [[0, 0, 0]]


def test_every_mixture_of_adapters_fits_the_table() -> None:
    draw = np.random.default_rng(0)
    for num_rows in (1, 3, 16, 17, 130, 256, 257, 700):
        for num_slots in (1, 4, 40):
            _, tiles = tiles_of(draw.integers(0, num_slots + 1, num_rows).astype(np.int32), num_slots)
            assert len(tiles) == num_lines(num_rows, num_slots) <= max_num_tiles(max(num_rows, 260), num_slots)


def test_a_row_is_computed_alike_whatever_others_there_are() -> None:
    rows, low_rank, slots, out = made(20, (24,), 4, 600, BF16)
    alone, mine = out.clone(), slots[8]
    assert mine, "has an adapter"
    add_low_rank(rows, low_rank, adapted_by(slots), workspace_of(rows, low_rank), out)
    others = np.where(np.arange(20) == 8, mine, (slots + 1) % (NUM_SLOTS + 1)).astype(np.int32)
    shifted = rows.roll(1, 0)
    shifted[8] = rows[8]
    add_low_rank(shifted, low_rank, adapted_by(others), workspace_of(rows, low_rank), alone)
    assert torch.equal(out[8], alone[8])
