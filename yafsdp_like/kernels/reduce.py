"""The sum of every rank's chunk of each gradient, in one launch for many parameters.

For each parameter: ``out = [out +] round((sum over ranks j, in order, of float32(in_j)) * scale)``, where ``round``
is to the dtype that a collective would have sent. This file knows addresses; where a rank's chunk lies (its own memory,
or a copy of it here) and when it may be read is the caller's affair.

[Note: the same bits]
The kernel is compiled without contraction (``enable_fp_fusion=False``): were ``out + sum * scale`` one fused
multiply-add, the product would not be rounded. Sums run in rank order and start at rank 0's value, not at zero. So
kernel and reference give the same bits, and so do all ranks and all runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
)

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 2048  # elements that a program takes at a time
NUM_WARPS = 4


def reduce_reference(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[Sequence[torch.Tensor]],
    scale: float,
    wire_dtype: torch.dtype,
    accumulate: bool,
) -> None:
    """What ``ReduceTable.reduce`` does, in plain torch; the arguments are those of both."""
    for output, chunks in zip(outputs, zip(*inputs, strict=True), strict=True):
        total = chunks[0].float()
        for chunk in chunks[1:]:
            total = total + chunk.float()
        total = (total * scale).to(wire_dtype).float()
        output.copy_(output.float() + total if accumulate else total)


class ReduceTable:
    """The addresses of one unit's gradient chunks on every rank, and of its gradient shards.

    Args:
        outputs: for each parameter its gradient shard, ``(>= start + numel,)``, all of one dtype. They may be given
            other memory between calls (``Tensor.set_``, ``UntypedStorage.resize_``).
        inputs: for each rank in order, for each parameter that rank's values of the same elements, ``(numel,)``, all
            of one dtype. Other ranks' are mapped memory of this device.
        starts: for each parameter the element of its output with which the inputs begin; the first by default.

    Raises ``ValueError`` when tensors differ in what must be alike, are not flat and contiguous, or are neither
    float32 nor bfloat16 nor float16.
    """

    def __init__(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[Sequence[torch.Tensor]],
        starts: Sequence[int] | None = None,
    ) -> None:
        self._starts = [0] * len(outputs) if starts is None else list(starts)
        self._outputs, self._inputs = list(outputs), inputs
        _check(self._parts(), inputs)
        self._device = outputs[0].device
        # [parameter][input of each rank]; there when this returns, for every stream
        addresses = [[tensor.data_ptr() for tensor in row] for row in zip(*inputs, strict=True)]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=self._device)
        self._output_places: list[int] | None = []  # as last noted; None: unknown
        self._output_addresses = torch.zeros(len(outputs), dtype=torch.int64, device=self._device)
        self.find_outputs()
        self._blocks = BlockTable.of([chunk.numel() for chunk in inputs[0]], BLOCK, self._device)
        self._grid = (self._blocks.num_blocks,)
        self._vector = VECTOR_NBYTES // min(outputs[0].itemsize, inputs[0][0].itemsize)
        self._dtypes = {"OUTPUT": triton_dtype(outputs[0].dtype), "INPUT": triton_dtype(inputs[0][0].dtype)}

    def _parts(self) -> list[torch.Tensor]:
        chunks = self._inputs[0] if self._inputs else []
        return [o[start : start + c.numel()] for o, start, c in zip(self._outputs, self._starts, chunks, strict=False)]

    def find_outputs(self) -> None:
        """Note where the outputs are now, on the current stream; before ``reduce``, which may be a recording's.

        While a CUDA graph is recorded, each address becomes a constant of it, which every replay writes again.
        """
        places = [o.data_ptr() + start * o.itemsize for o, start in zip(self._outputs, self._starts, strict=True)]
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._output_places = None  # what is there is up to replays from now on
            for output, place in zip(self._output_addresses, places, strict=True):
                output.fill_(place)
        elif places != self._output_places and runs_on(self._device):
            if self._output_places is not None:
                self._output_places = places
            there = torch.tensor(places, dtype=torch.int64, pin_memory=self._device.type == "cuda")
            self._output_addresses.copy_(there, non_blocking=True)

    def reduce(self, scale: float, wire_dtype: torch.dtype, accumulate: bool) -> None:
        """Write the outputs, or add to them, on the current stream, where ``find_outputs`` has found them.

        Args:
            scale: what the sums are multiplied by, in float32.
            wire_dtype: what the product is rounded to before it is written or added, as if a collective had sent it.
            accumulate: whether the outputs are added to. They are rounded once more, to their own dtype.
        """
        if not runs_on(self._device):
            reduce_reference(self._parts(), self._inputs, scale, wire_dtype, accumulate)
        elif self._grid[0]:
            with launching_on(self._device):
                _reduce_kernel[self._grid](
                    self._blocks.blocks,
                    self._blocks.numels,
                    self._output_addresses,
                    self._addresses,
                    float(scale),
                    **self._dtypes,
                    WIRE=triton_dtype(wire_dtype),
                    WORLD_SIZE=len(self._inputs),
                    ACCUMULATE=accumulate,
                    BLOCK=self._blocks.block,
                    VECTOR=self._vector,
                    num_warps=NUM_WARPS,
                    enable_fp_fusion=False,  # see [Note: the same bits]
                )


def _check(outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]]) -> None:
    if not outputs or not inputs:
        raise ValueError(f"expected parameters and ranks, found {len(outputs)} outputs and {len(inputs)} ranks")
    expected = [output.numel() for output in outputs]
    for name, tensors in [("outputs", outputs), *((f"inputs of rank {j}", chunks) for j, chunks in enumerate(inputs))]:
        dtype = outputs[0].dtype if tensors is outputs else inputs[0][0].dtype
        triton_dtype(dtype)
        if [tensor.numel() for tensor in tensors] != expected:
            raise ValueError(f"{name}: expected {expected} elements, found {[tensor.numel() for tensor in tensors]}")
        for k, tensor in enumerate(tensors):
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(f"{name}, parameter {k}: expected a flat contiguous tensor, found {tensor.shape}")
            if tensor.dtype != dtype or tensor.device != outputs[0].device:
                raise ValueError(
                    f"{name}, parameter {k}: expected {dtype} on {outputs[0].device}, "
                    f"found {tensor.dtype} on {tensor.device}"
                )


@jit()
def _reduce_kernel(
    blocks: tl.tensor,  # (num_blocks, 2) int32
    numels: tl.tensor,  # (num_segments,) int64
    outputs: tl.tensor,  # (num_segments,) int64: addresses
    addresses: tl.tensor,  # (num_segments, WORLD_SIZE) int64: of each rank's input
    scale: tl.tensor,
    OUTPUT: tl.constexpr,
    INPUT: tl.constexpr,
    WIRE: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    # One short program per block, not a loop on every multiprocessor: matrix products that run beside it are given
    # theirs as soon as one program ends.
    segment, start, count = block_range(blocks, numels, tl.program_id(0), BLOCK)
    output, row = outputs + segment, addresses + segment * WORLD_SIZE
    bits = tl.load(output)
    for j in tl.static_range(WORLD_SIZE):
        bits |= tl.load(row + j)
    if (count == BLOCK) & (bits % 16 == 0):
        _reduce_block(output, row, start, count, scale, OUTPUT, INPUT, WIRE, WORLD_SIZE, ACCUMULATE, BLOCK, VECTOR)
    else:
        _reduce_block(output, row, start, count, scale, OUTPUT, INPUT, WIRE, WORLD_SIZE, ACCUMULATE, BLOCK, 0)


@jit()
def _reduce_block(
    output_row: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    OUTPUT: tl.constexpr,
    INPUT: tl.constexpr,
    WIRE: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    numbers = tl.arange(0, BLOCK)
    offsets, mask = start + numbers, numbers < count
    output = pointer(output_row, 0, OUTPUT)
    values: tl.tuple = ()
    for j in tl.static_range(WORLD_SIZE):  # every rank's load is under way before the first is waited for
        values += (load(pointer(row, j, INPUT), offsets, mask, VECTOR),)
    total = values[0]
    for j in tl.static_range(1, WORLD_SIZE):
        total = total + values[j]
    total = rounded(total * scale, WIRE).to(tl.float32)
    if ACCUMULATE:
        total = load(output, offsets, mask, VECTOR) + total
    store(output, offsets, total, mask, VECTOR)
