"""Offloaded activations in a trace: the runtime's own bookkeeping, on tensors without memory, with no copy made.

Owns what stands for copies and for memory. What is offloaded, when it leaves the device and when it comes back is
``shard/runtime/activation_offload.py``'s.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from yafsdp_like.shard.runtime.activation_offload import OffloadedActivations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from yafsdp_like.shard.forecast.storages import StorageMode
    from yafsdp_like.shard.runtime.activation_offload import HostBuffer, SavedStorage, SavedView


class _Room:
    """Host memory that is counted and not there."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class TracedOffload(OffloadedActivations):
    """What ``offload_activations`` keeps of blocks, as a trace has it. ``copied`` has bytes by unit and direction."""

    def __init__(self, min_nbytes: int, mode: StorageMode, bytes_of: Callable[[int], Tensor]) -> None:
        """``bytes_of`` makes so many bytes without memory."""
        super().__init__(min_nbytes)
        self.copied: dict[tuple[str, str], int] = {}
        self._mode, self._bytes_of = mode, bytes_of
        self._bases: WeakKeyDictionary[SavedStorage, Tensor] = WeakKeyDictionary()  # of what has come back

    def _address(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _is_here(self, tensor: Tensor) -> bool:
        return True

    def _new_buffer(self, nbytes: int) -> HostBuffer:
        return _Room(nbytes)  # type: ignore[return-value]

    def _copy_out(self, leaving: Sequence[SavedStorage]) -> None:
        self._count("out", leaving)

    def _copy_in(self, away: Sequence[SavedStorage]) -> None:
        for saved in away:
            with self._mode.unseen():
                base = self._bytes_of(saved.nbytes)
            self._mode.notice(base)
            self._bases[saved], saved.storage = base, base.untyped_storage()
        self._count("in", away)

    def _count(self, way: str, all_saved: Iterable[SavedStorage]) -> None:
        key = self._mode.place.unit, way
        self.copied[key] = self.copied.get(key, 0) + sum(saved.nbytes for saved in all_saved)

    def _view(self, saved: SavedStorage, packed: SavedView) -> Tensor:
        base = self._bases[saved] if saved.tensor is None else saved.tensor
        with torch.no_grad():
            flat = base.as_strided((saved.nbytes // base.itemsize,), (1,), 0)
            flat = flat if packed.dtype is flat.dtype else flat.view(packed.dtype)
            return flat.as_strided(packed.shape, packed.stride, packed.offset)


def stand_in(
    modules: Iterable[nn.Module], mode: StorageMode, bytes_of: Callable[[int], Tensor]
) -> dict[OffloadedActivations, TracedOffload]:
    """Put a traced one in the place of each that hooks of ``modules`` have; whoever calls this restores the hooks."""
    made: dict[OffloadedActivations, TracedOffload] = {}
    for module in modules:
        hooks: Any
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                owner = hook.args[0] if isinstance(hook, partial) and hook.args else None
                if isinstance(owner, OffloadedActivations):
                    if owner not in made:
                        made[owner] = TracedOffload(owner.min_nbytes, mode, bytes_of)
                    hooks[key] = partial(hook.func, made[owner])
    return made
