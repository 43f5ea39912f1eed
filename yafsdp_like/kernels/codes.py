"""Codes of quantized matrices as numbers of 16 bits, within kernels, by few instructions for each.

A number is exact. Conversions between integers and floats run at an eighth of the rate of other instructions and would
take longer than reading the codes, so there are none: see the two functions.
"""

from __future__ import annotations

from yafsdp_like.kernels.blocks import INTERPRETED, jit, tl

SYMMETRIC_ZERO = 8  # the code of 0 where a matrix of 4 bits has no zeros of its own
if tl is not None:
    _INTERPRETED = tl.constexpr(INTERPRETED)

    def _halves_asm(dtype: str, base: str, one: str) -> tl.constexpr:
        """Return the instructions of four bytes: both halves spread over words, each beside the bits of ``base``."""
        return tl.constexpr(f"""{{
            .reg .b32 low, high, base, one;
            mov.b32 base, {base};
            mov.b32 one, {one};
            and.b32 low, $4, 0x0f0f0f0f;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0f0f0f0f;
            prmt.b32 $0, low, base, 0x4140;
            prmt.b32 $1, low, base, 0x4342;
            prmt.b32 $2, high, base, 0x4140;
            prmt.b32 $3, high, base, 0x4342;
            fma.rn.{dtype} $0, $0, one, $5;
            fma.rn.{dtype} $1, $1, one, $6;
            fma.rn.{dtype} $2, $2, one, $5;
            fma.rn.{dtype} $3, $3, one, $6;
        }}""")

    _BF16_HALVES = _halves_asm("bf16x2", "0x43434343", "0x3f803f80")
    _F16_HALVES = _halves_asm("f16x2", "0x64646464", "0x3c003c00")


@jit()
def numbers_of_eight_bits(codes: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes of float8 as numbers of ``DTYPE``; as float32 in the interpreter, which multiplies those.

    By way of float16 and float32, which pairs of numbers take in one instruction each.
    """
    if _INTERPRETED or tl.float32 == DTYPE:
        return codes.to(tl.float32)
    return codes.to(tl.float16).to(tl.float32).to(DTYPE)


@jit()
def numbers_of_four_bits(codes: tl.tensor, zero: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Both halves of bytes less ``zero``, a uint8 for each: low and high, as ``numbers_of_eight_bits`` returns numbers.

    A code under the bits of a power of two is that power and the code: 128 in bfloat16 and 1024 in float16, whose last
    bit is worth one. So what is left is to subtract both, two numbers at a time.
    """
    if _INTERPRETED or tl.float32 == DTYPE:
        zero = zero.to(tl.int16)
        low, high = (codes & 15).to(tl.int16) - zero, (codes >> 4).to(tl.int16) - zero
        return low.to(tl.float32), high.to(tl.float32)
    elif tl.bfloat16 == DTYPE:
        base = (zero.to(tl.uint16) + 0xC300).to(tl.uint16).to(tl.bfloat16, bitcast=True)  # - 128 - zero
        codes, base = tl.broadcast(codes, base)
        return tl.inline_asm_elementwise(
            _BF16_HALVES, "=&r,=&r,=&r,=&r,r,r,r", [codes, base], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        base = (zero.to(tl.uint16) + 0xE400).to(tl.uint16).to(tl.float16, bitcast=True)  # - 1024 - zero
        codes, base = tl.broadcast(codes, base)
        return tl.inline_asm_elementwise(
            _F16_HALVES, "=&r,=&r,=&r,=&r,r,r,r", [codes, base], (tl.float16, tl.float16), is_pure=True, pack=4
        )
