"""What the kernels share: the table of blocks that makes one launch of many segments, and Triton, if it is there.

A segment is one parameter's flat range of elements, at an address of its own. It is cut into blocks of ``block``
elements, the last one shorter; a program of a kernel looks its block up. Tables are made once and stay on the device.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = None

__all__ = [
    "VECTOR_NBYTES",
    "BlockTable",
    "block_range",
    "dot",
    "jit",
    "launching_on",
    "load",
    "pointer",
    "rounded",
    "runs_on",
    "store",
    "tl",
    "triton_dtype",
    "upload",
    "write",
]

VECTOR_NBYTES = 16  # what one thread moves at most at a time
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_DTYPES = {
    torch.float32: tl and tl.float32,
    torch.bfloat16: tl and tl.bfloat16,
    torch.float16: tl and tl.float16,
}
_INTERPRETED = tl.constexpr(INTERPRETED) if triton else None


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run there; elsewhere their references do their work."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tables are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def jit(*do_not_specialize: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``; without Triton the function as it is, which nothing calls.

    Named integers get one kernel whatever their value, where Triton would compile others for 1 and multiples of 16.
    """

    def decorate(fn: Callable[..., Any]) -> Any:
        return triton.jit(fn, do_not_specialize=list(do_not_specialize)) if triton else fn

    return decorate


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton type of a floating-point dtype that kernels read and write.

    Raises ``ValueError`` for any other than float32, bfloat16 and float16.
    """
    if dtype not in _TRITON_DTYPES:
        raise ValueError(f"expected float32, bfloat16 or float16, found {dtype}")
    return _TRITON_DTYPES[dtype]


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of ``values`` on ``device``, for the current stream, without waiting for the device."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass(frozen=True)
class BlockTable:
    """Where each block is: row ``b`` of ``blocks`` is its segment and its number within that segment."""

    blocks: torch.Tensor  # (num_blocks, 2) int32
    numels: torch.Tensor  # (num_segments,) int64
    block: int  # elements of every block but a segment's last

    @classmethod
    def of(cls, numels: Sequence[int], block: int, device: torch.device) -> BlockTable:
        """The table of segments with ``numels`` elements, in order; an empty segment has no block.

        It is there when this returns, for every stream.
        """
        counts = torch.tensor([-(-numel // block) for numel in numels], dtype=torch.int64)
        segments = torch.arange(len(numels)).repeat_interleave(counts)
        numbers = torch.arange(len(segments)) - (counts.cumsum(0) - counts)[segments]
        blocks = torch.stack((segments, numbers), dim=1).to(torch.int32)
        return cls(blocks.to(device), torch.tensor(numels, dtype=torch.int64, device=device), block)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all segments."""
        return len(self.blocks)


@jit()
def block_range(blocks: tl.tensor, numels: tl.tensor, b: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """(segment, first element, number of valid elements) of block ``b``."""
    segment = tl.load(blocks + 2 * b)
    start = tl.load(blocks + 2 * b + 1).to(tl.int64) * BLOCK
    return segment, start, tl.minimum(tl.load(numels + segment) - start, BLOCK)


@jit()
def pointer(addresses: tl.tensor, index: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Address number ``index`` of a table, as a pointer to ``DTYPE``."""
    return tl.load(addresses + index).to(tl.pointer_type(DTYPE))


@jit()
def place(base: tl.tensor, offsets: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """Pointers to the elements ``offsets`` from ``base`` on.

    ``VECTOR`` promises that the first is aligned to 16 bytes, and that as many elements may be moved at once; 0
    promises nothing.
    """
    pointers = base + offsets
    if VECTOR > 0:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), VECTOR)
    return pointers


@jit()
def load(base: tl.tensor, offsets: tl.tensor, mask: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """Elements as float32; no mask is needed where ``VECTOR`` is promised."""
    pointers = place(base, offsets, VECTOR)
    values = tl.load(pointers) if VECTOR > 0 else tl.load(pointers, mask=mask, other=0.0)
    return values.to(tl.float32)


@jit()
def store(base: tl.tensor, offsets: tl.tensor, values: tl.tensor, mask: tl.tensor, VECTOR: tl.constexpr) -> None:
    """Writes ``values`` in the dtype of ``base``, rounded to nearest even; no mask is needed, as in ``load``."""
    write(base, offsets, rounded(values, base.dtype.element_ty), mask, VECTOR)


@jit()
def write(base: tl.tensor, offsets: tl.tensor, values: tl.tensor, mask: tl.tensor, VECTOR: tl.constexpr) -> None:
    """Writes ``values``, which have the dtype of ``base``; no mask is needed, as in ``load``."""
    pointers = place(base, offsets, VECTOR)
    if VECTOR > 0:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=mask)


@jit()
def rounded(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Round float32 ``values`` to nearest even in ``DTYPE``.

    Triton's interpreter truncates to bfloat16, so there the 16 bits that it will cut are rounded away in integers.
    """
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@jit()
def dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The product of two matrices, summed in float32; of float32 with nearly all its bits."""
    if _INTERPRETED:  # where bfloat16 would be multiplied as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")
