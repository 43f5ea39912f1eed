"""AdamW over many parameters in one launch: state, parameter and its copy in the compute dtype in one pass.

Decoupled weight decay (Loshchilov and Hutter, 2019), in float32 whatever the tensors' dtypes:

    g = (grad * clip_factor, rounded to grad's dtype) * gradient_scale
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g**2
    main = main * (1 - lr * weight_decay) - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
    compute = main, rounded

Moments may be stored in fewer bytes, as ``formats.py`` has it: rounded after the update, which uses what was computed.
This file knows tensors and numbers, no parameter groups. The kernel rounds every operation correctly and contracts
none, as [Note: the same bits] in ``reduce.py`` has it, so that states have the reference's bits everywhere. Parameters
have them where torch's square root is correctly rounded, which on a CPU it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from yafsdp_like.kernels.blocks import (
    VECTOR_NBYTES,
    BlockTable,
    block_range,
    jit,
    launching_on,
    load,
    pointer,
    rounded,
    runs_on,
    store,
    tl,
    triton_dtype,
    upload,
)
from yafsdp_like.kernels.formats import (
    RandomKey,
    blocks_nbytes,
    from_blocks,
    load_moment,
    random_bits,
    random_words,
    store_moment,
    to_bfloat16,
    to_blocks,
)
from yafsdp_like.kernels.split import join, load_joined, split, store_split

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 1024  # elements of one program
TAIL = 256  # of one step where elements are not moved many at once: a whole block's addresses take twice the registers
NUM_WARPS = 4


class AdamWTensors(NamedTuple):
    """One parameter on this rank: contiguous tensors of as many elements each, of any shape.

    Moments of dtype uint8 are 8 bit by blocks of ``formats.py``, and flat. With a ``remainder``, ``main`` is the upper
    half of float32 values, in bfloat16, and that the lower one, in int16 (``split.py``).
    """

    main: torch.Tensor  # what is updated
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor  # in the dtype of exp_avg
    compute: torch.Tensor | None  # gets the new values of main in its own dtype
    rate_index: int  # row of the rates
    number: int = 0  # of the parameter, and
    start: int = 0  # the index of its first element here in the whole parameter: what random bits depend on
    remainder: torch.Tensor | None = None

    def with_states(
        self,
        elements: slice | None,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        remainder: torch.Tensor | None = None,
    ) -> AdamWTensors:
        """Return the same with other moments, of some elements of the flat parameter, or of all for None.

        And with another ``remainder`` of these elements, if one is given.
        """
        if elements is None:
            kept = self.remainder if remainder is None else remainder
            return self._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, remainder=kept)
        main, grad, compute, kept = (
            None if tensor is None else tensor.view(-1)[elements]
            for tensor in (self.main, self.grad, self.compute, self.remainder)
        )
        remainder = kept if remainder is None else remainder
        assert main is not None and grad is not None
        start = self.start + elements.start
        return AdamWTensors(main, grad, exp_avg, exp_avg_sq, compute, self.rate_index, self.number, start, remainder)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are there, without the compute copy and the remainder if there is none."""
        return [tensor for tensor in (*self[:5], self.remainder) if tensor is not None]

    @property
    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """Of main, grad, exp_avg, compute and remainder; None for what is not there."""
        tensors = (self.main, self.grad, self.exp_avg, self.compute, self.remainder)
        return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


@dataclass(frozen=True)
class AdamWStep:
    """What all parameters of a launch have in common in one step; ``step`` counts from 1."""

    step: int
    beta1: float
    beta2: float
    eps: float
    gradient_scale: float = 1.0
    seed: int | None = None  # of the bits that round moments in bfloat16 and 8 bit; None: to nearest, plain floats only

    @property
    def corrections(self) -> tuple[float, float]:
        """What m and sqrt(v) are multiplied by, because they started at zero."""
        return 1 / (1 - self.beta1**self.step), (1 - self.beta2**self.step) ** -0.5

    @property
    def random_key(self) -> RandomKey:
        """The key of the step's random bits; without a seed any."""
        return RandomKey() if self.seed is None else RandomKey.of(self.seed, self.step)


def rate_row(lr: float, weight_decay: float) -> tuple[float, float]:
    """One row of the rates that updates read: the learning rate, and what is left of a parameter after its decay."""
    return lr, 1 - lr * weight_decay


def adamw_reference(
    params: Sequence[AdamWTensors], rates: torch.Tensor, step: AdamWStep, clip_factor: torch.Tensor | None = None
) -> None:
    """What ``AdamWTable.update`` does, in plain torch, one operation and one rounding at a time."""
    correction1, correction2 = step.corrections
    for p in params:
        lr, kept = rates[p.rate_index]
        grad = p.grad if clip_factor is None else (p.grad * clip_factor).to(p.grad.dtype)
        grad = grad.float() * step.gradient_scale
        exp_avg, exp_avg_sq = (_read(p, signed) for signed in (True, False))
        exp_avg = exp_avg + (grad - exp_avg) * (1 - step.beta1)
        exp_avg_sq = exp_avg_sq * step.beta2 + grad * (1 - step.beta2) * grad
        denominator = exp_avg_sq.sqrt() * correction2 + step.eps
        main = p.main.float() if p.remainder is None else join(p.main, p.remainder)
        main = main * kept - exp_avg * (lr * correction1) / denominator
        if p.remainder is None:
            p.main.copy_(main)
        else:
            for half, values in zip((p.main, p.remainder), split(main), strict=True):
                half.copy_(values)
        _write(p, exp_avg, exp_avg_sq, step)
        if p.compute is not None:
            p.compute.copy_(p.main.view(p.compute.shape))


def _read(p: AdamWTensors, signed: bool) -> torch.Tensor:
    """The first moment, which is signed, or the second, in float32 and in the shape of the parameter."""
    stored = p.exp_avg if signed else p.exp_avg_sq
    return from_blocks(stored, signed).view(p.main.shape) if stored.dtype == torch.uint8 else stored.float()


def _write(p: AdamWTensors, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: AdamWStep) -> None:
    in_blocks = p.exp_avg.dtype == torch.uint8
    if not in_blocks and not _is_stochastic(p.exp_avg.dtype, step):
        p.exp_avg.copy_(exp_avg)
        p.exp_avg_sq.copy_(exp_avg_sq)
        return
    bits = random_bits(step.random_key, p.number, p.start, exp_avg.numel(), exp_avg.device)
    for stored, values, noise in ((p.exp_avg, exp_avg, bits & 0xFFFF), (p.exp_avg_sq, exp_avg_sq, bits >> 16 & 0xFFFF)):
        if in_blocks:
            stored.copy_(to_blocks(values.view(-1), noise, stored is p.exp_avg))
        else:
            stored.copy_(to_bfloat16(values, noise.view(values.shape)))


def _is_stochastic(dtype: torch.dtype | None, step: AdamWStep) -> bool:
    return dtype == torch.bfloat16 and step.seed is not None


class AdamWTable:
    """Where the tensors of one launch were when it was last made. Holds no tensor of the caller's."""

    def __init__(self) -> None:
        self._places: list[tuple[int, ...]] = []  # per parameter: a row of the kernel's table
        self._numels: list[int] = []
        self._blocks: BlockTable | None = None  # of self._numels; None before the first update
        self._rows: torch.Tensor | None = None  # self._places on the device

    def update(
        self,
        params: Sequence[AdamWTensors],
        rates: torch.Tensor,
        step: AdamWStep,
        clip_factor: torch.Tensor | None = None,
    ) -> None:
        """One AdamW step of ``params``, in place, on the current stream.

        Args:
            params: at least one; all on one device and of the same ``dtypes``.
            rates: ``(num_rates, 2)`` float32 on that device, rows as ``rate_row`` makes them.
            step: the step's number, the betas, eps, and what gradients are multiplied by.
            clip_factor: ``()``, what ``Tensor.mul_`` would multiply gradients by before; None multiplies nothing.

        Raises ``ValueError`` when tensors of a parameter differ in size, are not contiguous, or are neither float32
        nor bfloat16 nor float16, nor moments in uint8.
        """
        device = params[0].main.device
        if clip_factor is not None:
            clip_factor = clip_factor.to(device)
        if not runs_on(device):
            _check(params)
            adamw_reference(params, rates, step, clip_factor)
            return
        blocks, rows = self._tables(params, device)
        if blocks.num_blocks:
            with launching_on(device):
                _launch(blocks, rows, params[0].dtypes, rates, step, clip_factor)

    def _tables(self, params: Sequence[AdamWTensors], device: torch.device) -> tuple[BlockTable, torch.Tensor]:
        """The tables on the device, made again where addresses or sizes are not those of the last update."""
        places = [_place(p) for p in params]
        numels = [p.main.numel() for p in params]
        if self._blocks is None or numels != self._numels:
            _check(params)
            self._blocks, self._numels = BlockTable.of(numels, BLOCK, device), numels
        if self._rows is None or places != self._places:
            _check(params)
            self._rows, self._places = upload(places, torch.int64, device), places
        return self._blocks, self._rows


def _place(p: AdamWTensors) -> tuple[int, ...]:
    compute = 0 if p.compute is None else p.compute.data_ptr()
    return (
        p.rate_index,
        p.main.data_ptr(),
        p.grad.data_ptr(),
        p.exp_avg.data_ptr(),
        p.exp_avg_sq.data_ptr(),
        compute,
        p.number,
        p.start,
        0 if p.remainder is None else p.remainder.data_ptr(),
    )


def _check(params: Sequence[AdamWTensors]) -> None:
    for k, p in enumerate(params):
        for tensor in p.tensors:
            numel = p.main.numel()
            if tensor.dtype == torch.uint8 and (tensor is p.exp_avg or tensor is p.exp_avg_sq):
                numel = blocks_nbytes(numel)
            elif tensor is not p.remainder:
                triton_dtype(tensor.dtype)
            if tensor.numel() != numel or not tensor.is_contiguous():
                raise ValueError(
                    f"parameter {k} of shape {tuple(p.main.shape)}: expected contiguous tensors of "
                    f"{numel} elements, found shape {tuple(tensor.shape)}, strides {tensor.stride()}"
                )
        if p.dtypes != params[0].dtypes or p.exp_avg_sq.dtype != p.exp_avg.dtype:
            raise ValueError(
                f"parameter {k}: expected dtypes {params[0].dtypes}, found {p.dtypes} and {p.exp_avg_sq.dtype}"
            )


def _launch(
    blocks: BlockTable,
    rows: torch.Tensor,
    dtypes: Sequence[torch.dtype | None],
    rates: torch.Tensor,
    step: AdamWStep,
    clip_factor: torch.Tensor | None,
) -> None:
    in_blocks, is_split = dtypes[2] == torch.uint8, dtypes[4] is not None
    main, grad, state, compute = (
        tl.uint8 if dtype == torch.uint8 else triton_dtype(dtype) if dtype else None for dtype in dtypes[:4]
    )
    _adamw_kernel[(blocks.num_blocks,)](
        blocks.blocks,
        blocks.numels,
        rows,
        rates,
        rates if clip_factor is None else clip_factor,
        float(step.gradient_scale),
        1 - step.beta1,
        step.beta2,
        1 - step.beta2,
        step.eps,
        *step.corrections,
        *step.random_key,
        MAIN=main,
        GRAD=grad,
        STATE=state,
        COMPUTE=compute,
        CLIP=clip_factor is not None,
        STOCHASTIC=in_blocks or _is_stochastic(dtypes[2], step),
        SPLIT=is_split,
        BLOCK=blocks.block,
        TAIL=TAIL,
        VECTOR=VECTOR_NBYTES // max(dtype.itemsize for dtype in dtypes if dtype),  # narrow tensors follow the widest
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


@jit("first_key", "second_key")
def _adamw_kernel(
    blocks: tl.tensor,  # (num_blocks, 2) int32
    numels: tl.tensor,  # (num_segments,) int64
    rows: tl.tensor,  # (num_segments, 9) int64, as `_place` makes them
    rates: tl.tensor,  # (num_rates, 2) float32
    clip_factor: tl.tensor,  # (); read if CLIP
    gradient_scale: tl.tensor,
    grad_weight: tl.tensor,  # 1 - beta1
    beta2: tl.tensor,
    square_weight: tl.tensor,  # 1 - beta2
    eps: tl.tensor,
    correction1: tl.tensor,
    correction2: tl.tensor,
    first_key: tl.tensor,
    second_key: tl.tensor,
    MAIN: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CLIP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    segment, start, count = block_range(blocks, numels, tl.program_id(0), BLOCK)
    row = rows + segment * 9
    rate = rates + tl.load(row) * 2
    step_size, kept = tl.load(rate) * correction1, tl.load(rate + 1)
    clip_factor = rounded(tl.load(clip_factor).to(tl.float32), GRAD).to(tl.float32)  # as Tensor.mul_ does on GPUs
    scalars = (clip_factor, gradient_scale, grad_weight, beta2, square_weight, eps, correction2, step_size, kept)
    keys = (first_key, second_key)
    numel = tl.load(numels + segment)
    bits = tl.load(row + 1) | tl.load(row + 8)
    for k in tl.static_range(2, 6):
        bits |= tl.load(row + k)
    if (count == BLOCK) & (bits % 16 == 0):
        _adamw_block(
            row, numel, start, count, scalars, keys, MAIN, GRAD, STATE, COMPUTE, CLIP, STOCHASTIC, SPLIT, BLOCK, VECTOR
        )
    else:
        for part in range(tl.cdiv(count, TAIL)):
            first, left = start + part * TAIL, count - part * TAIL
            _adamw_block(
                row, numel, first, left, scalars, keys, MAIN, GRAD, STATE, COMPUTE, CLIP, STOCHASTIC, SPLIT, TAIL, 0
            )


@jit()
def _adamw_block(
    row: tl.tensor,
    numel: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    scalars: tl.tensor,
    keys: tl.tensor,
    MAIN: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    CLIP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    clip_factor, gradient_scale, grad_weight, beta2, square_weight, eps, correction2, step_size, kept = scalars
    numbers = tl.arange(0, BLOCK)
    offsets, mask = start + numbers, numbers < count
    main_pointer, grad_pointer = pointer(row, 1, MAIN), pointer(row, 2, GRAD)
    exp_avg_pointer, exp_avg_sq_pointer = pointer(row, 3, STATE), pointer(row, 4, STATE)

    main = load_joined(row, 1, 8, offsets, mask, VECTOR) if SPLIT else load(main_pointer, offsets, mask, VECTOR)
    grad = load(grad_pointer, offsets, mask, VECTOR)
    exp_avg = load_moment(exp_avg_pointer, numel, start, offsets, mask, True, VECTOR)
    exp_avg_sq = load_moment(exp_avg_sq_pointer, numel, start, offsets, mask, False, VECTOR)

    if CLIP:
        grad = rounded(grad * clip_factor, GRAD).to(tl.float32)
    grad = grad * gradient_scale
    exp_avg = exp_avg + (grad - exp_avg) * grad_weight
    exp_avg_sq = exp_avg_sq * beta2 + grad * square_weight * grad
    denominator = tl.sqrt_rn(exp_avg_sq) * correction2 + eps
    main = main * kept - tl.div_rn(exp_avg * step_size, denominator)

    if SPLIT:
        store_split(row, 1, 8, offsets, main, mask, VECTOR)
    else:
        main = rounded(main, MAIN).to(tl.float32)
        store(main_pointer, offsets, main, mask, VECTOR)
    index = tl.load(row + 7) + offsets if STOCHASTIC else offsets
    words = random_words(keys[0], keys[1], tl.load(row + 6), index) if STOCHASTIC else index  # which nothing reads
    store_moment(exp_avg_pointer, numel, start, offsets, exp_avg, mask, words & 0xFFFF, True, STOCHASTIC, VECTOR)
    store_moment(exp_avg_sq_pointer, numel, start, offsets, exp_avg_sq, mask, words >> 16, False, STOCHASTIC, VECTOR)
    if COMPUTE is not None:
        store(pointer(row, 5, COMPUTE), offsets, main, mask, VECTOR)
