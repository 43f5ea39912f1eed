"""An fp32 value as two halves: its bfloat16 rounding, and the 16 bits that are left.

    high = bits of value, rounded to the nearest multiple of 2**16, ties away from zero, / 2**16
    low  = the low 16 bits of value, as a signed integer
    bits of value = high * 2**16 + low

The sum is exact for every value but a NaN, of which only its being one is kept. Ties go away from zero and not to even,
as a cast has them: with ties to even, two values half a step above and below an even ``high`` would have the same
halves. A cast differs in one value of 2**17.
"""

from __future__ import annotations

import torch

from yafsdp_like.kernels.blocks import jit, place, pointer, tl, write

NAN_BITS = 0x7FC00000  # a NaN whose high half is one too


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the halves of float32 ``values``: bfloat16 and int16, of the same shape."""
    bits = values.contiguous().view(torch.int32)
    bits = torch.where(values.isnan(), NAN_BITS, bits)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of which ``high``, bfloat16, and ``low``, int16 of the same shape, are the halves."""
    bits = high.contiguous().view(torch.int16).to(torch.int32) << 16
    return (bits + low).view(torch.float32)


@jit()
def load_joined(
    row: tl.tensor, high: tl.constexpr, low: tl.constexpr, offsets: tl.tensor, mask: tl.tensor, VECTOR: tl.constexpr
) -> tl.tensor:
    """Elements as float32, of the halves whose addresses are numbers ``high`` and ``low`` of a row."""
    high_places = place(pointer(row, high, tl.int16), offsets, VECTOR)
    low_places = place(pointer(row, low, tl.int16), offsets, VECTOR)
    if VECTOR > 0:
        high_bits, low_bits = tl.load(high_places), tl.load(low_places)
    else:
        high_bits, low_bits = tl.load(high_places, mask=mask, other=0), tl.load(low_places, mask=mask, other=0)
    return ((high_bits.to(tl.int32) << 16) + low_bits.to(tl.int32)).to(tl.float32, bitcast=True)


@jit()
def store_split(
    row: tl.tensor,
    high: tl.constexpr,
    low: tl.constexpr,
    offsets: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    VECTOR: tl.constexpr,
) -> None:
    """Write float32 ``values`` to their halves, as ``load_joined`` finds them."""
    bits = tl.where(values != values, 0x7FC00000, values.to(tl.int32, bitcast=True))
    write(pointer(row, high, tl.int16), offsets, ((bits + 0x8000) >> 16).to(tl.int16), mask, VECTOR)
    write(pointer(row, low, tl.int16), offsets, bits.to(tl.int16), mask, VECTOR)
