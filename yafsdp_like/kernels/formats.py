"""How AdamW's moments are stored in fewer bytes: bfloat16 and 8 bit by blocks, both rounded stochastically.

Owns the bits of a stored value, the random bits that round it, and their plain torch references; knows nothing of
optimizers. A format is one function that loads and one that stores; values between them are float32.

[Note: rounded stochastically]
An average that moves by less than half a unit in the last place never moves if it is rounded to nearest. So a value
between two that can be stored becomes the upper one with the probability of its distance from the lower: the
expectation is exact, and a value that can be stored keeps its bits. The random bits are a function of (seed, step,
parameter's number, index of the element in the whole parameter) and of nothing else: neither the number of ranks, nor
how rows are sharded, nor the device changes a bit.

[Note: 8 bit by blocks]
``BLOCK_NUMEL`` consecutive elements of a row share an exponent, and each has a code of 8 bits: a float with 4 bits of
exponent, and a sign and 3 bits of mantissa (the first moment) or 4 bits of mantissa (the second, which is never
negative). Blocks as Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), have them, with the shared
power of two of the OCP Microscaling Formats specification (2023) for a scale: all arithmetic is exact or in integers,
so every device gives the same bits. The exponent is that of the block's largest magnitude, rounded up to the mantissa,
so that nothing saturates. A second moment above 0 is never stored as 0, by whose root one would divide.

What is stored is one tensor of bytes, ``(numel + numel // BLOCK_NUMEL,)``: all codes, then all exponents. Blocks with
nothing above 2**-100 are zeros; one with an element that is not finite is not finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from yafsdp_like.kernels.blocks import jit, load, store, tl, write

BLOCK_NUMEL = 32  # elements that share an exponent
TO_NEAREST = 0x8000  # noise that rounds to nearest
WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # the golden ratio's bits: what separates numbers that differ in few of theirs
_FACTORS = (0x85EBCA6B, 0xC2B2AE35)  # of the finalizer of MurmurHash3 (Appleby, public domain)
_TOP = 15  # exponent field of a value that has the block's exponent
_LEAST_EXPONENT = 27  # of a block that is not zeros, biased by 127: every code is then a normal float32 and bfloat16
_INFINITY = 0x7F800000
if tl is not None:
    _BLOCK_NUMEL, _TOP_FIELD, _LEAST, _INF = (tl.constexpr(x) for x in (BLOCK_NUMEL, _TOP, _LEAST_EXPONENT, _INFINITY))
    _STEP, _FACTOR0, _FACTOR1 = (tl.constexpr(x) for x in (_GOLDEN, *_FACTORS))


class RandomKey(NamedTuple):
    """What all random bits of one step depend on: two words of 32 bits, as signed integers."""

    first: int = 0
    second: int = 0

    @classmethod
    def of(cls, seed: int, step: int) -> RandomKey:
        """Return the key of a step; ``seed`` may have 64 bits, of either sign."""
        word = 0
        for part in (seed, seed >> 32, step):
            word = _mixed_int((word ^ part & WORD) + _GOLDEN & WORD)
        return cls(_signed(word), _signed(_mixed_int(word + _GOLDEN & WORD)))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _mixed_int(x: int) -> int:
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        x = (x ^ x >> shift) * factor & WORD
    return x ^ x >> 16


def random_bits(key: RandomKey, number: int, start: int, numel: int, device: torch.device) -> torch.Tensor:
    """Return ``(numel,)`` int32 words for the elements of parameter ``number`` from index ``start`` on."""
    index = torch.arange(start, start + numel, device=device)
    folded = _folded((index ^ key.first & WORD ^ _mixed_int(number + _GOLDEN & WORD)) * _FACTORS[0])
    return _folded((folded ^ key.second & WORD) * _FACTORS[1]).to(torch.int32)


def _folded(product: torch.Tensor) -> torch.Tensor:
    """Both halves of 64 bits in one: the low bits of a product depend on few of its factors', its high ones on all."""
    return (product ^ product >> 32) & WORD


def to_bfloat16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round float32 ``values`` to bfloat16 by ``noise``, int32 in [0, 2**16) of the same shape."""
    bits = values.view(torch.int32)
    magnitude = torch.minimum(bits & 0x7FFFFFFF, 0x7FFFFFFF - noise) + noise  # a NaN of arithmetic stays one
    return ((magnitude | bits & -(1 << 31)) & ~0xFFFF).view(torch.float32).bfloat16()


def fits_blocks(shape: torch.Size) -> bool:
    """Whether rows of parameters of this shape are whole blocks, wherever they are cut between ranks."""
    return len(shape) > 1 and shape[1:].numel() % BLOCK_NUMEL == 0


def blocks_nbytes(numel: int) -> int:
    """Return the bytes of ``numel`` elements: codes, and exponents."""
    return numel + numel // BLOCK_NUMEL


def to_blocks(values: torch.Tensor, noise: torch.Tensor | int, signed: bool) -> torch.Tensor:
    """Encode float32 ``values``, ``(numel,)``, see [Note: 8 bit by blocks]; ``noise`` is that of ``to_bfloat16``."""
    mantissa = 3 if signed else 4
    bits = values.view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF).clamp(max=_INFINITY)
    largest = magnitude.view(-1, BLOCK_NUMEL).amax(1) if len(values) else magnitude
    exponents = (largest + ((1 << 23 - mantissa) - 1)) >> 23
    exponents = torch.where(exponents < _LEAST_EXPONENT, 0, exponents)
    shared = exponents.repeat_interleave(BLOCK_NUMEL)

    field = (magnitude >> 23) - shared + _TOP
    significand = torch.where(magnitude >= 1 << 23, magnitude & 0x7FFFFF | 1 << 23, 0)
    fixed = (field.clamp(min=1) - 1 << 23) + (significand >> (1 - field).clamp(0, 24))
    codes = fixed + (noise << 7 - mantissa) >> 23 - mantissa
    codes = codes | (bits >> 24 & 0x80) if signed else torch.where(significand > 0, codes.clamp(min=1), codes)
    codes = torch.where(shared > 0, codes, 0)
    return torch.cat((codes, exponents)).to(torch.uint8)


def from_blocks(stored: torch.Tensor, signed: bool) -> torch.Tensor:
    """Decode what ``to_blocks`` has made, ``(numel,)`` float32; bfloat16 holds every value exactly."""
    mantissa = 3 if signed else 4
    numel = len(stored) * BLOCK_NUMEL // (BLOCK_NUMEL + 1)
    codes, exponents = stored.to(torch.int32).split([numel, len(stored) - numel])
    magnitude = codes & 0x7F if signed else codes
    field = magnitude >> mantissa
    significand = torch.where(field > 0, magnitude & (1 << mantissa) - 1 | 1 << mantissa, magnitude)
    fixed = significand << field.clamp(min=1) - 1
    scale = (exponents << 23).view(torch.float32).repeat_interleave(BLOCK_NUMEL)
    values = fixed.float() * 2.0 ** (1 - _TOP - mantissa) * scale
    return torch.where(codes > 0x7F, -values, values) if signed else values


@jit()
def folded(product: tl.tensor) -> tl.tensor:
    """``_folded`` of uint64."""
    return (product ^ (product >> 32)) & 0xFFFFFFFF


@jit()
def random_words(first: tl.tensor, second: tl.tensor, number: tl.tensor, index: tl.tensor) -> tl.tensor:
    """``random_bits`` of the elements ``index``, as uint32."""
    x = number.to(tl.uint32) + _STEP
    x = (x ^ (x >> 16)) * _FACTOR0
    x = (x ^ (x >> 13)) * _FACTOR1
    key = (first.to(tl.uint32) ^ x ^ (x >> 16)).to(tl.uint64)
    words = folded((index.to(tl.uint64) ^ key) * _FACTOR0)
    return folded((words ^ second.to(tl.uint32)) * _FACTOR1).to(tl.uint32)


@jit()
def store_stochastic(
    base: tl.tensor, offsets: tl.tensor, values: tl.tensor, mask: tl.tensor, noise: tl.tensor, VECTOR: tl.constexpr
) -> None:
    """Write ``values`` as bfloat16, as ``to_bfloat16`` rounds them; ``noise`` is uint32."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum((bits & 0x7FFFFFFF) + noise, 0x7FFFFFFF)
    bits = (magnitude | (bits & 0x80000000)) >> 16
    write(base, offsets, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask, VECTOR)


@jit()
def by_element(of_blocks: tl.tensor) -> tl.tensor:
    """What each element's block has, from what each block has."""
    wide = tl.broadcast_to(of_blocks[:, None], (of_blocks.shape[0], _BLOCK_NUMEL))
    return tl.reshape(wide, (of_blocks.shape[0] * _BLOCK_NUMEL,))


@jit()
def exponent_places(base: tl.tensor, numel: tl.tensor, start: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """(pointers, mask) of the exponents of ``COUNT`` elements from ``start`` on, of ``numel`` in all."""
    blocks = start // _BLOCK_NUMEL + tl.arange(0, COUNT // _BLOCK_NUMEL)
    return base + numel + blocks, blocks < numel // _BLOCK_NUMEL


@jit()
def load_blocks(
    base: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    SIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """``from_blocks`` of the elements ``offsets``, which are those from ``start`` on, as many as a program has."""
    places, known = exponent_places(base, numel, start, offsets.shape[0])
    scale = by_element(tl.load(places, mask=known, other=0).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    codes = load(base, offsets, mask, VECTOR).to(tl.int32)
    # As float32 a code has another bias of the exponent, and is subnormal where its own exponent is 0.
    bits = ((codes & 0x7F) << 20) | ((codes & 0x80) << 24) if SIGNED else codes << 19
    values = bits.to(tl.float32, bitcast=True) * (2.0 ** (127 - _TOP_FIELD)) * scale
    return values


@jit()
def store_blocks(
    base: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    offsets: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    noise: tl.tensor,
    SIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Write ``to_blocks`` of ``values``, the elements that ``load_blocks`` reads; ``noise`` is uint32."""
    MANTISSA: tl.constexpr = 3 if SIGNED else 4
    COUNT: tl.constexpr = offsets.shape[0]
    bits = values.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, _INF)
    largest = tl.max(tl.reshape(magnitude, (COUNT // _BLOCK_NUMEL, _BLOCK_NUMEL)), axis=1)
    exponents = (largest + ((1 << (23 - MANTISSA)) - 1)) >> 23
    exponents = tl.where(exponents < _LEAST, 0, exponents)
    places, known = exponent_places(base, numel, start, COUNT)
    tl.store(places, exponents.to(tl.uint8), mask=known)

    shared = by_element(exponents)
    field = (magnitude >> 23) - shared + _TOP_FIELD
    significand = tl.where(magnitude >= 0x800000, (magnitude & 0x7FFFFF) | 0x800000, 0)
    fixed = ((tl.maximum(field, 1) - 1) << 23) + (significand >> tl.minimum(tl.maximum(1 - field, 0), 24))
    codes = (fixed + (noise.to(tl.int32) << (7 - MANTISSA))) >> (23 - MANTISSA)
    codes = codes | ((bits >> 24) & 0x80) if SIGNED else tl.where(significand > 0, tl.maximum(codes, 1), codes)
    codes = tl.where(shared > 0, codes, 0)
    write(base, offsets, codes.to(tl.uint8), mask, VECTOR)


@jit()
def load_moment(
    base: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    SIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
) -> tl.tensor:
    """Elements as float32, in whatever format they are stored."""
    if base.dtype.element_ty == tl.uint8:
        values = load_blocks(base, numel, start, offsets, mask, SIGNED, VECTOR)
    else:
        values = load(base, offsets, mask, VECTOR)
    return values


@jit()
def store_moment(
    base: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    offsets: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    noise: tl.tensor,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Write float32 ``values`` in the format of ``base``; plain floats are rounded to nearest, not by ``noise``."""
    if base.dtype.element_ty == tl.uint8:
        store_blocks(base, numel, start, offsets, values, mask, noise, SIGNED, VECTOR)
    elif STOCHASTIC:
        store_stochastic(base, offsets, values, mask, noise, VECTOR)
    else:
        store(base, offsets, values, mask, VECTOR)
