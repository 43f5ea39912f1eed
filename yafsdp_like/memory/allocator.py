"""PyTorch's allocator, which holds what is not planned: activations, gradients until the update, optimizer states.

[Note: expandable segments]
The allocator's usual segments have fixed ends: blocks of one do not join those of another, so that activations of
varying lengths, and gradients that take their place, leave holes that nothing fits. An expandable segment is one range
of addresses a stream, with memory mapped where it is used: blocks that are free side by side are one.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from yafsdp_like.memory.layout import contiguous_stride

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # environment variables with which users configure it


@cache
def use_expandable_segments() -> bool:
    """Let PyTorch's allocator take memory in expandable segments from now on; return whether this has set it so.

    Called by ``fully_shard`` on a GPU; later calls do nothing. Cached memory is given back first, so that old segments
    stay only where something lives in them. Leaves the allocator alone without a GPU, and where an environment variable
    of ``SETTINGS`` configures it: ``PYTORCH_ALLOC_CONF=expandable_segments:False`` keeps the usual segments.
    """
    if not torch.cuda.is_available() or any(os.environ.get(name) for name in SETTINGS):
        return False
    torch.cuda.empty_cache()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return True


def transient_storage(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """Return memory for work of the current stream; ``resize_(0)`` gives it back to that stream's later allocations."""
    return torch.UntypedStorage(nbytes, device=device)


def tensor_on(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    offset: int | torch.SymInt = 0,
) -> torch.Tensor:
    """Return a tensor on ``storage`` with a version counter of its own: contiguous and at its start, by default.

    It stays a tensor of ``shape`` while the storage has no memory; it must not be read then.
    """
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(0, dtype=dtype, device=storage.device).set_(
            storage, offset, shape, stride or contiguous_stride(shape)
        )
