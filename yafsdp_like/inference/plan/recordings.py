"""What CUDA graphs of steps take of a GPU's memory. No arena holds it: the driver keeps every kernel's launch there.

A recording allocates next to nothing itself, since all that a step writes is planned; what PyTorch's allocator holds
for all of them is cuBLAS's workspace of their stream, and what choosing the most probable tokens of many rows takes.
Code that a step is the first to call is loaded while it is recorded, and a sum over ranks keeps buffers of NCCL's.
The driver says nothing of its own bytes before it has taken them. They are planned by what was measured, and recording
ends once `SLACK` beyond that is taken, so that a recording larger than the others may exceed it (`RecordingBudget`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.inference.plan.step_sizes import StepBuckets

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.inference.options import EngineOptions
    from yafsdp_like.inference.plan.placement import Mode
    from yafsdp_like.models.decoder import DecoderConfig

MAX_RECORDED_TOKENS = 2048  # of a step; larger ones take a GPU longer than issuing them takes the CPU

# Measured on an H200, torch 2.11: recordings of the 8B shape took 180 MiB in all (154 of them, 32 layers), of the 0.6B
# shape 154 (146, 28 layers), of two layers 54 (124).
_STEP_NBYTES, _LAYER_NBYTES = 125 << 10, 30 << 10  # of one recording, and more of it for each layer
_MOVED_LAYER_NBYTES = 16 << 10  # more of it where layers are brought: not measured
_SUMMED_LAYER_NBYTES = 2 * 160 << 10  # more of it where ranks sum over NCCL, twice
# More of it in steps with adapters, which are recorded beside the others: not measured.
_ADAPTED_LAYER_NBYTES = 22 << 10
_WORKSPACE_NBYTES = 32 << 20  # of cuBLAS
_CODE_NBYTES = 10 << 20  # at most, which processes that had called less before took
_MANY_ROWS, _MANY_ROWS_NBYTES = 128, 20 << 20  # above which, choosing the most probable tokens takes so much
_GRANULE_NBYTES = 2 << 20  # in which the driver and the allocator take memory
SLACK = 0.05


def recordings_nbytes(config: DecoderConfig, options: EngineOptions, mode: Mode = "resident") -> int:
    """Return the bytes that an engine's recordings take beside its arena; ``config`` is what one rank computes."""
    if not options.graphs:
        return 0
    buckets = StepBuckets.of(options)
    num_steps = len(buckets.decode) + sum(size.num_tokens <= MAX_RECORDED_TOKENS for size in buckets.mixed)
    many_rows = _MANY_ROWS_NBYTES if options.max_decode_rows > _MANY_ROWS else 0
    layer_nbytes = _LAYER_NBYTES
    if mode == "tensor_parallel":
        layer_nbytes += _SUMMED_LAYER_NBYTES
    elif mode != "resident":
        layer_nbytes += _MOVED_LAYER_NBYTES
    driver_nbytes = num_steps * (_STEP_NBYTES + config.num_layers * layer_nbytes)
    if options.adapter_slots is not None:
        driver_nbytes += num_steps * (_STEP_NBYTES + config.num_layers * (layer_nbytes + _ADAPTED_LAYER_NBYTES))
    return _WORKSPACE_NBYTES + _CODE_NBYTES + many_rows + (driver_nbytes // _GRANULE_NBYTES + 1) * _GRANULE_NBYTES


class RecordingBudget:
    """Counts what recordings take of the free memory, and ends them once the plan and the slack are taken."""

    def __init__(self, planned_nbytes: int, free_nbytes: Callable[[], int]) -> None:
        """``free_nbytes`` tells the device's free memory, of which nobody else takes any meanwhile."""
        self._most_nbytes, self._free_nbytes = int((1 + SLACK) * planned_nbytes), free_nbytes
        self._first_nbytes, self._increments = free_nbytes(), list[int]()
        self.taken_nbytes = 0

    def record(self, work: Callable[[], object]) -> bool:
        """Call ``work``, which records, and return True; or False where too little is left for another.

        Another is expected to take what the least one took: some have brought the workspace, or code, as well.
        """
        if self.taken_nbytes + min(self._increments, default=0) + _GRANULE_NBYTES > self._most_nbytes:
            return False
        before = self.taken_nbytes
        work()
        self.taken_nbytes = self._first_nbytes - self._free_nbytes()
        self._increments.append(self.taken_nbytes - before)
        return True
