"""Where one parameter's reduced gradient lies, and whether the user still holds what lies there.

[Note: gradients that are still held]
``.grad`` is a DTensor on planned memory, and the next backward writes there again. A user may hold it until then, or
anything that shares its bytes: ``.detach()``, ``.view(-1)``, ``to_local()``. Each shard has a storage object of its
own, whose uses are counted. If only the DTensor is held, it gets a copy. Tensors that cannot be found cannot be moved:
then they keep the shard, and the gradient takes another one of the same size, beyond the plan, until the first is free
again. A program that holds k gradients a step thus allocates k shards once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory.arena import Arena, Place
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.plan import Region

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.tensor import DTensor

_REFERENCES = 3  # to a shard's DTensor: the shard's own, the variable's and the call's


class GradientShard:
    """A place for a gradient: ``flat``, ``(chunk_numel,)``, padding included, and the DTensor that users see on it."""

    def __init__(
        self,
        place: Place,
        dtype: torch.dtype,
        chunk_numel: int,
        local_shape: tuple[int, ...],
        as_dtensor: Callable[[torch.Tensor], DTensor],
    ) -> None:
        self.flat = place.flat(dtype, chunk_numel)
        self._as_dtensor = as_dtensor
        local = place.tensor(dtype, local_shape)  # see [Note: a storage of its own]
        self.dtensor = as_dtensor(local)
        self._storage = local.untyped_storage()
        del local
        self._address = self._storage._cdata
        self._num_uses = torch._C._storage_Use_Count(self._address)  # by this object
        self._num_references = sys.getrefcount(self._storage)  # from Python, which C++ does not count

    @property
    def is_free(self) -> bool:
        """Whether nobody else holds anything of it. Asked of each parameter in each step."""
        dtensor = self.dtensor
        uses = torch._C._storage_Use_Count(self._address)
        return (
            sys.getrefcount(dtensor) <= _REFERENCES
            and bool(uses <= self._num_uses)
            and sys.getrefcount(self._storage) <= self._num_references
        )

    @property
    def is_shared(self) -> bool:
        """Whether a tensor beside the DTensor's own shares the bytes, or somebody holds their storage."""
        uses = torch._C._storage_Use_Count(self._address)
        return uses > self._num_uses or sys.getrefcount(self._storage) > self._num_references

    @property
    def is_held(self) -> bool:
        """Whether somebody else holds the DTensor."""
        dtensor = self.dtensor
        return sys.getrefcount(dtensor) > _REFERENCES

    def copy_for_holders(self) -> None:
        """Leave the DTensor to those who hold it, with its values in other memory."""
        kept, local = self.dtensor, self.dtensor._local_tensor
        self.dtensor = self._as_dtensor(local)
        kept._local_tensor = local.clone()


class GradientShards:
    """The places of one parameter's gradient: first the planned one."""

    def __init__(self, make: Callable[[Place], GradientShard], place: Place) -> None:
        self._make, self._region = make, Region("grad_shard", "grad_shard", aligned(place.segment.nbytes))
        self._device = place.arena.device
        self._shards = [make(place)]
        self.index, self.current = 0, self._shards[0]

    @property
    def added_nbytes(self) -> int:
        """The bytes beyond the plan."""
        return (len(self._shards) - 1) * self._region.nbytes

    def make_room(self) -> bool:
        """Let what is still held keep its values when the current shard is written next.

        Returns whether that is another shard than before.
        """
        before = self.index
        if not before and self.current.is_free:
            return False
        if before or self.current.is_shared:
            self.index = next((i for i, shard in enumerate(self._shards) if not shard.is_shared), len(self._shards))
            if self.index == len(self._shards):
                arena = Arena(self._device)
                arena.reserve([self._region])
                self._shards.append(self._make(arena.place(self._region.name)))
            self.current = self._shards[self.index]
        if self.current.is_held:
            self.current.copy_for_holders()
        return self.index != before
