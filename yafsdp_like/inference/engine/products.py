"""How many rows of a large matrix product are computed by one call: all, or pieces, by measurement.

cuBLAS is slower for some numbers of rows than for the same rows in several calls: on an H200, 28,672 columns out of
4,096 in bf16 took 482 us for 1,408 rows and 428 for 384 and 1,024; for 2,048 rows 646 and 610. What is faster is
measured when an engine starts, once in a process for each shape, so that engines with and without graphs, and those
that follow, compute the same bits.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from yafsdp_like.kernels.gemv import matmul
from yafsdp_like.kernels.quantized import multiply_quantized
from yafsdp_like.kernels.quantized_matrix import QuantizedMatrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PIECE = 1024  # rows; of up to so many a call is not cut
_LEAST_GAIN = 0.03  # of the time, below which a difference is noise
_MAX_MEASURED = 8192  # rows; products of more are not cut, so that measuring takes a second at most
_NUM_TIMED = 3

_Shape = tuple[torch.device, torch.dtype, int, int, int]
_in_pieces: dict[_Shape, bool] = {}  # of this process, as measured


def multiply(rows: Tensor, weight: Tensor | QuantizedMatrix, out: Tensor, workspace: Tensor) -> None:
    """Write `rows @ weight.T` into `out` as `matmul` does, in pieces where `choose_pieces` found these to be faster.

    A quantized weight needs a workspace, see `multiply_quantized`.
    """
    if isinstance(weight, QuantizedMatrix):
        multiply_quantized(rows, weight, out, workspace)
    elif len(rows) > PIECE and _in_pieces.get(_shape(rows, weight), False):
        _multiply_pieces(rows, weight, out)
    else:
        matmul(rows, weight, out)


def choose_pieces(
    rows: Tensor,
    weight: Tensor | QuantizedMatrix,
    out: Tensor,
    seconds: Callable[[Callable[[], None]], float] | None = None,
) -> None:
    """Measure whether pieces are faster for products of this shape, unless this process has; `out` is overwritten.

    `seconds` of a call, which are measured on the device of `rows` unless it is given.
    """
    if isinstance(weight, QuantizedMatrix):
        return
    shape = _shape(rows, weight)
    if not PIECE < len(rows) <= _MAX_MEASURED or shape in _in_pieces:
        return
    measure = seconds or (lambda work: _seconds(work, rows.device, max(2, _MAX_MEASURED // len(rows))))
    whole = measure(lambda: matmul(rows, weight, out))
    pieces = measure(lambda: _multiply_pieces(rows, weight, out))
    _in_pieces[shape] = pieces < (1 - _LEAST_GAIN) * whole


def _multiply_pieces(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    for first in range(0, len(rows), PIECE):
        piece = slice(first, first + PIECE)
        matmul(rows[piece], weight, out[piece])


def _shape(rows: Tensor, weight: Tensor) -> _Shape:
    return rows.device, rows.dtype, len(rows), *weight.shape


def _seconds(work: Callable[[], None], device: torch.device, num_calls: int) -> float:
    """Return the seconds of a call on the device, of so many in a row, the least of several."""
    found = []
    for _ in range(_NUM_TIMED):
        work()
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(num_calls):
            work()
        torch.cuda.synchronize(device)
        found.append((time.perf_counter() - begin) / num_calls)
    return min(found)
