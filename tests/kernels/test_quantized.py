"""Products with quantized matrices: natively where there is a GPU, else in the interpreter (`test_kernels.py`)."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.inference import BF16, F8, F32, random
from tests.kernels.test_kernels import DEVICE, RUNS, needs_kernels
from yafsdp_like.kernels import quantized, quantized_few
from yafsdp_like.kernels.dequantize import dequantize
from yafsdp_like.kernels.quantized import multiply_quantized, workspace_nbytes
from yafsdp_like.kernels.quantized_matrix import QuantizedMatrix, packed_codes, run_of, unpacked_codes

NOTHING = torch.empty(0, dtype=torch.uint8, device=DEVICE)


@dataclass(frozen=True)
class Shape:
    """Of a matrix, and how its codes are grouped."""

    num_rows: int
    num_columns: int
    group_rows: int = 1
    group_columns: int | None = None
    bits: int = 8
    zeros: bool = False
    ordered: bool = False

    def matrix(self, seed: int = 7) -> QuantizedMatrix:
        columns = self.group_columns or self.num_columns
        groups = -(-self.num_rows // self.group_rows), -(-self.num_columns // columns)
        generator = torch.Generator().manual_seed(seed)

        def below(most: int, *shape: int) -> Tensor:
            return torch.randint(0, most, shape, generator=generator, dtype=torch.uint8)

        codes = random(self.num_rows, self.num_columns, seed=seed).cpu().to(F8)
        if self.bits == 4:
            codes = packed_codes(below(16, self.num_rows, self.num_columns), run_of(columns))
        return QuantizedMatrix(
            codes.to(DEVICE),
            random(*groups, seed=seed + 1),
            self.group_rows,
            columns,
            below(17, *groups).to(DEVICE) if self.zeros else None,
            torch.randperm(self.num_columns, generator=generator).int().to(DEVICE) if self.ordered else None,
        )

    def stack(self, count: int) -> QuantizedMatrix:
        matrices = [self.matrix(seed) for seed in range(count)]

        def stacked(name: str) -> Tensor | None:
            found = [getattr(matrix, name) for matrix in matrices]
            return None if found[0] is None else torch.stack(found)

        codes, scales, zeros, order = (stacked(name) for name in ("codes", "scales", "zeros", "order"))
        assert codes is not None and scales is not None
        return QuantizedMatrix(codes, scales, self.group_rows, matrices[0].group_columns, zeros, order)


SHAPES = {
    "a scale a row": Shape(40, 136),
    "a scale a row, whole tiles": Shape(32, 256),
    "a scale a row, pieces": Shape(80, 1000),
    "blocks": Shape(256, 256, 128, 128),
    "blocks that end early": Shape(72, 200, 32, 128),
    "4 bits": Shape(48, 256, 1, 128, 4),
    "4 bits, zeros": Shape(40, 192, 1, 64, 4, zeros=True),
    "4 bits, small groups, another order": Shape(33, 96, 1, 32, 4, zeros=True, ordered=True),
    "4 bits, a scale a row": Shape(16, 160, 1, None, 4),
}


def workspace_of(rows: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """Of just the size that is asked for, full of what must not be read: NaN as float32 and as bfloat16."""
    nbytes = workspace_nbytes(len(rows), matrix.shape, rows.itemsize)
    return torch.full((nbytes,), 255, dtype=torch.uint8, device=rows.device)


def by_hand(matrix: QuantizedMatrix, shape: Shape) -> Tensor:
    """Element by element, in double."""
    codes = matrix.codes.double() if shape.bits == 8 else unpacked_codes(matrix.codes, run_of(matrix.group_columns))
    values = torch.empty(shape.num_rows, shape.num_columns, dtype=torch.float64)
    for n in range(shape.num_rows):
        for k in range(shape.num_columns):
            group = n // matrix.group_rows, k // matrix.group_columns
            zero = 0 if shape.bits == 8 else 8 if matrix.zeros is None else int(matrix.zeros[group])
            column = k if matrix.order is None else int(matrix.order[k])
            values[n, column] = (float(codes[n, k]) - zero) * float(matrix.scales[group])
    return values


@pytest.mark.parametrize("name", [name for name in SHAPES if "whole" not in name])
def test_a_value_is_its_code_less_the_groups_zero_times_the_groups_scale(name: str) -> None:
    shape = SHAPES[name]
    if shape.num_rows * shape.num_columns > 10_000:
        shape = Shape(20, 24, 8, 16)  # as many groups, fewer elements
    matrix = shape.matrix()
    torch.testing.assert_close(matrix.dequantized().cpu().double(), by_hand(matrix, shape), rtol=1e-6, atol=1e-6)


def test_codes_of_four_bits_lie_in_pairs_that_are_a_run_apart() -> None:
    codes = torch.arange(64).view(1, 64) % 16
    packed = packed_codes(codes, 16)
    assert packed.shape == (1, 32)
    assert packed[0, 3] == codes[0, 3] | codes[0, 16 + 3] << 4
    assert packed[0, 16 + 5] == codes[0, 32 + 5] | codes[0, 48 + 5] << 4
    assert torch.equal(unpacked_codes(packed, 16), codes.to(torch.uint8))


@pytest.mark.parametrize(("group", "run"), [(128, 64), (64, 32), (32, 16), (4096, 64), (160, 16)])
def test_groups_are_whole_runs(group: int, run: int) -> None:
    assert run_of(group) == run
    assert group % (2 * run) == 0


@pytest.mark.parametrize("group", [16, 24, 72])
def test_groups_that_no_runs_make_up_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"a multiple of 32 columns, found {group}"):
        run_of(group)


@pytest.mark.parametrize(
    ("name", "num_rows", "dtype"),
    [
        *((name, 19, F32) for name in SHAPES),
        ("a scale a row, whole tiles", 1, BF16),
        ("blocks", 33, BF16),
        ("4 bits, zeros", 1, BF16),
        ("4 bits, zeros", 50, BF16),
        ("4 bits, small groups, another order", 9, BF16),
        ("4 bits, small groups, another order", 130, BF16),
        ("a scale a row", 130, BF16),
        ("blocks that end early", 130, F32),
    ],
)
def test_products_are_those_with_the_dequantized_matrix(name: str, num_rows: int, dtype: torch.dtype) -> None:
    """Of rows that lie apart, into columns of something larger, whose rest is left alone.

    Of few rows, in pieces of K, and with a matrix that is dequantized before.
    """
    shape = SHAPES[name]
    matrix = shape.matrix()
    rows = random(num_rows, shape.num_columns + 8, seed=5, dtype=dtype)[:, : shape.num_columns]
    out = torch.full((num_rows, shape.num_rows + 1), 7.0, dtype=dtype, device=DEVICE)
    multiply_quantized(rows, matrix, out[:, : shape.num_rows], workspace_of(rows, matrix))
    values = matrix.dequantized()
    if num_rows > 128 and RUNS:
        values = values.to(dtype)
    expected = rows.double() @ values.double().T
    tolerance = {F32: 1e-4, BF16: torch.finfo(BF16).eps}[dtype]  # of sums of more than a hundred products
    torch.testing.assert_close(out[:, : shape.num_rows].double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.all(out[:, shape.num_rows] == 7), "written past the end"


@needs_kernels
@pytest.mark.parametrize("name", ["blocks that end early", "4 bits, small groups, another order"])
def test_rows_of_a_matrix_are_dequantized(name: str) -> None:
    matrix = SHAPES[name].matrix()
    for first, num_rows in ((0, len(matrix)), (5, 20)):
        out = torch.empty(num_rows, matrix.shape[1], dtype=BF16, device=DEVICE)
        dequantize(matrix, first, out)
        assert torch.equal(out, matrix.dequantized()[first : first + num_rows].to(BF16))


@needs_kernels
def test_more_rows_of_a_matrix_than_are_dequantized_at_once_are_multiplied_one_part_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized, "_MAX_NUMEL", 128 * 200)
    shape = Shape(300, 200)
    rows, matrix, out = random(130, 200), shape.matrix(), torch.empty(130, 300, device=DEVICE)
    multiply_quantized(rows, matrix, out, workspace_of(rows, matrix))
    torch.testing.assert_close(out.double(), rows.double() @ matrix.dequantized().double().T, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_rows_launch_what_is_fastest_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[str, int]] = []
    for module, name in ((quantized_few, "launch"), (quantized, "_launch"), (quantized, "_multiply_dequantized")):
        note = lambda rows, *_, name=name: launched.append((name, len(rows)))  # noqa: E731
        monkeypatch.setattr(module, name, note)
    matrix = SHAPES["4 bits, zeros"].matrix()
    for num_rows in (0, 1, 16, 17, 128, 129):
        rows = random(num_rows, 192)
        multiply_quantized(rows, matrix, torch.empty(num_rows, 40, device=DEVICE), workspace_of(rows, matrix))
    few, direct, many = "launch", "_launch", "_multiply_dequantized"
    assert launched == [(few, 1), (few, 16), (direct, 17), (direct, 128), (many, 129)]


def test_a_workspace_is_as_large_as_what_any_number_of_rows_up_to_so_many_needs() -> None:
    assert workspace_nbytes(16, (4096, 4096), 2) == 0
    assert workspace_nbytes(32, (4096, 14336), 2) == 8 * 32 * 4096 * 4, "8 pieces"
    assert workspace_nbytes(128, (4096, 14336), 2) == 4 * 128 * 4096 * 4, "4 pieces"
    assert workspace_nbytes(128, (16384, 4096), 2) == 2 * 32 * 16384 * 4, "only few rows are in pieces"
    assert workspace_nbytes(128, (28672, 4096), 2) == workspace_nbytes(32, (40, 64), 2) == 0
    assert workspace_nbytes(129, (28672, 4096), 2) == 4096 * 4096 * 2, "rows that are dequantized at once"
    assert workspace_nbytes(129, (4096, 14336), 2) == 2048 * 14336 * 2


def test_shapes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"rows \(2, 8\) and a matrix \(40, 136\) cannot be multiplied into"):
        multiply_quantized(random(2, 8), SHAPES["a scale a row"].matrix(), torch.empty(2, 40, device=DEVICE), NOTHING)
    rows, matrix = random(130, 136), SHAPES["a scale a row"].matrix()
    with pytest.raises(RuntimeError, match="expected a workspace of 40960 bytes, found 0"):
        multiply_quantized(rows, matrix, torch.empty(130, 40, device=DEVICE), NOTHING)
