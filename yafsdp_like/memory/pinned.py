"""Pins host memory, so that copies between it and a GPU run beside the CPU, at the link's full rate."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from yafsdp_like.memory.arena import Arena

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def pin(storage: torch.UntypedStorage, owner: object, device: torch.device) -> None:
    """Pin host memory for copies from and to ``device``, a GPU, for as long as ``owner`` lives.

    PyTorch's own pinned allocator would round sizes up to powers of two, and a plan of the host's memory would not be
    true. Raises ``RuntimeError`` where the system refuses.
    """
    if not storage.nbytes():
        return
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(storage.data_ptr(), storage.nbytes(), _PORTABLE))
    if error:
        raise RuntimeError(
            f"{storage.nbytes():,} bytes of host memory could not be pinned (CUDA error {error}): allow this process "
            "to lock more (ulimit -l, or the container's limit), or keep fewer bytes on the host"
        )
    weakref.finalize(owner, _unpin, storage, device).atexit = False  # the process gives it back by itself


def pin_arena(arena: Arena, device: torch.device) -> None:
    """Pin all that an arena of host memory holds now, for as long as it lives: see ``pin``."""
    for storage in {storage.data_ptr(): storage for storage, _ in map(arena.storage, arena.regions)}.values():
        pin(storage, arena, device)


def _unpin(storage: torch.UntypedStorage, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies from and to it may be under way
    torch.cuda.cudart().cudaHostUnregister(storage.data_ptr())
