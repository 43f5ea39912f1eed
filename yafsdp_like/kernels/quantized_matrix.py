"""What a quantized matrix consists of: codes of 8 or 4 bits an element, and scales; and its value in plain torch.

A value is ``(code - zero) * scale`` in float32.

[Note: two codes a byte]
Codes of 4 bits lie in pairs that are a run of columns apart: of each 2 R columns, byte ``j`` of R holds column ``j`` in
its low half and column ``R + j`` in its high half. So both halves of a tile of bytes are tiles of columns side by side,
and meet their columns of the rows without being shuffled. A group of columns is whole runs.

Shapes: N rows, K columns, R columns of a run, E matrices of a stack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from yafsdp_like.kernels.codes import SYMMETRIC_ZERO

MAX_COLUMNS = 128  # of a tile
_LEAST_RUN = 16  # columns that a product of tiles takes at least


def run_of(group_columns: int) -> int:
    """Return R for groups of so many columns, see [Note: two codes a byte].

    Raises ValueError for groups that no runs of 16 columns or more make up.
    """
    run = math.gcd(MAX_COLUMNS, group_columns) // 2
    if run < _LEAST_RUN:
        raise ValueError(f"groups of 4 bits have a multiple of {2 * _LEAST_RUN} columns, found {group_columns}")
    return run


def packed_codes(codes: Tensor, run: int) -> Tensor:
    """Return codes below 16 of any integers, (N, K), as (N, K / 2) uint8, see [Note: two codes a byte]."""
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2, run)).unbind(2)  # (N, K / 2 R, R) each
    return (low | high << 4).flatten(1)


def unpacked_codes(packed: Tensor, run: int) -> Tensor:
    """Return what ``packed_codes`` was given, as (N, K) uint8."""
    halves = packed.unflatten(1, (-1, run))  # (N, K / 2 R, R)
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (N, K) of codes, with a scale for each group of ``group_rows`` by ``group_columns`` of them.

    Or a stack of E such matrices: all tensors, and ``shape``, have E before the sizes that are named here.
    """

    codes: Tensor  # (N, K) float8_e4m3fn, or (N, K / 2) uint8
    scales: Tensor  # (ceil(N / group_rows), ceil(K / group_columns)) of any floating point
    group_rows: int
    group_columns: int
    zeros: Tensor | None = None  # as many uint8: the codes of 0; of 4 bits only
    order: Tensor | None = None  # (K,) int32: the column of rows that each column is multiplied with

    def __post_init__(self) -> None:
        *stacked, num_rows, num_columns = self.shape
        groups = (*stacked, -(-num_rows // self.group_rows), -(-num_columns // self.group_columns))
        assert self.scales.shape == groups, f"scales {tuple(self.scales.shape)}, expected {groups}"
        assert self.zeros is None or self.zeros.shape == groups, f"zeros {self.zeros}, expected {groups}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """N and K."""
        return *self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits

    def __len__(self) -> int:
        """Return N, or E of a stack."""
        return len(self.codes)

    def __getitem__(self, index: int) -> QuantizedMatrix:
        """Return one matrix of a stack."""
        tensors = (None if tensor is None else tensor[index] for tensor in (self.zeros, self.order))
        return QuantizedMatrix(self.codes[index], self.scales[index], self.group_rows, self.group_columns, *tensors)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zeros and order, as kernels take them: scales stand for those that there are not."""
        return (
            self.codes,
            self.scales,
            self.scales if self.zeros is None else self.zeros,
            self.scales if self.order is None else self.order,
        )

    @property
    def format(self) -> tuple[int, int, int, int, bool, bool]:
        """What every kernel that multiplies it is compiled with: groups of a row, their sizes, bits, zeros, order."""
        num_groups, has_zeros, is_ordered = self.scales.shape[-1], self.zeros is not None, self.order is not None
        return num_groups, self.group_rows, self.group_columns, self.bits, has_zeros, is_ordered

    @property
    def tile_columns(self) -> int:
        """Columns of a tile, which are of one group, so that each row has one scale; if rows have one, any number."""
        if self.bits == 8 and self.scales.shape[-1] == 1:
            return MAX_COLUMNS
        return math.gcd(MAX_COLUMNS, self.group_columns)

    def dequantized(self) -> Tensor:
        """Return one matrix (N, K) in float32, columns in the order of those that they are multiplied with."""
        num_rows, num_columns = self.shape
        rows, columns = (
            torch.arange(size, device=self.codes.device) // group
            for size, group in ((num_rows, self.group_rows), (num_columns, self.group_columns))
        )
        values = self.codes if self.bits == 8 else unpacked_codes(self.codes, run_of(self.group_columns))
        values = values.float()
        if self.bits == 4:
            values -= SYMMETRIC_ZERO if self.zeros is None else self.zeros.float()[rows][:, columns]
        values *= self.scales.float()[rows][:, columns]
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order.long(), values)


Matrix = Tensor | QuantizedMatrix  # or a stack of such
