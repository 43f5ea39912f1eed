"""One parameter's reduced gradient on this rank: its memory, from the reduction to the update, and who still holds it.

[Note: memory of gradients]
Gradients are dead from the update, when ``zero_grad`` drops them, to the next backward; and a forward's activations,
which peak at its end, are dead when the last gradient is written. So gradients are not in the arena: each takes memory
of PyTorch's allocator when it is first reduced, as a rule where activations have just been, and the next forward gives
back those that are no longer anybody's ``.grad``. A recorded step writes where it wrote when it was recorded: from
then on a gradient keeps its memory (``pin``).

[Note: gradients that are still held]
``.grad`` is a DTensor, and the next backward writes its memory again. A user may hold it until then, or anything that
shares its bytes: ``.detach()``, ``.view(-1)``, ``to_local()``, which without grad mode is the DTensor's own local
tensor. Uses of each are counted, and where there is one, the gradient takes other memory, and the holder keeps this.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory.allocator import tensor_on, transient_storage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.tensor import DTensor

    from yafsdp_like.memory.arena import Place

_REFERENCES = 2  # to an attribute's value, as ``sys.getrefcount`` counts them: the attribute's own and the call's


class GradientShard:
    """The place of one parameter's reduced gradient, which may have memory or none.

    ``flat``, ``(chunk_numel,)`` with padding, is what reductions write; it is the same object for good, on other memory
    at times. ``dtensor`` is what users see on its first elements.

    Args:
        numel: elements of the chunk, padding included; complex ones count twice.
        dtype: of ``.grad``; ``flat`` has pairs of real numbers for complex ones.
        local_shape: of this rank's rows.
        device: where.
        as_dtensor: makes the DTensor of this rank's rows.
        place: memory that it has for good, unless somebody still holds a gradient there when the next comes.
    """

    dtensor: DTensor

    def __init__(
        self,
        numel: int,
        dtype: torch.dtype,
        local_shape: tuple[int, ...],
        device: torch.device,
        as_dtensor: Callable[[torch.Tensor], DTensor],
        place: Place | None = None,
    ) -> None:
        self._numel, self._dtype, self._shape, self._as_dtensor = numel, dtype, local_shape, as_dtensor
        self.nbytes = numel * dtype.to_real().itemsize
        self.is_pinned = place is not None
        self.flat = tensor_on(transient_storage(0, device), dtype.to_real(), (numel,))
        self._place = place
        self._renew()
        self.release()

    def _renew(self) -> None:
        """Use other memory from now on, and leave what there was to its holders."""
        if (place := self._place) is None:
            self._storage = transient_storage(self.nbytes, self.flat.device)
        else:
            self._storage = place.tensor(self._dtype.to_real(), (self._numel,)).untyped_storage()
            self._place = None
        with torch.no_grad():
            self.flat.set_(self._storage, 0, (self._numel,), (1,))
        # A DTensor can be copied and saved only if its local tensor starts where its storage does.
        self.dtensor = self._as_dtensor(tensor_on(self._storage, self._dtype, self._shape))
        self._num_uses = torch._C._storage_Use_Count(self._storage._cdata)  # by this object
        self._num_references = sys.getrefcount(self._storage)  # from Python, which C++ does not count

    def fits(self, numel: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is for a chunk of this size, dtype and device."""
        return (numel, dtype, device) == (self._numel, self._dtype, self.flat.device)

    @property
    def has_memory(self) -> bool:
        """Whether there is anything to read."""
        return self._storage.nbytes() == self.nbytes

    @property
    def _is_shared(self) -> bool:
        """Whether a tensor beside the DTensor's own shares the bytes, or somebody holds that one or their storage."""
        uses = torch._C._storage_Use_Count(self._storage._cdata)
        if uses > self._num_uses or sys.getrefcount(self._storage) > self._num_references:
            return True
        return sys.getrefcount(self.dtensor._local_tensor) > _REFERENCES or self.dtensor._local_tensor._use_count() > 1  # type: ignore[attr-defined]

    @property
    def _is_held(self) -> bool:
        """Whether somebody else holds the DTensor: in Python, as ``.grad``, or in an autograd graph."""
        return sys.getrefcount(self.dtensor) > _REFERENCES or self.dtensor._use_count() > 1  # type: ignore[attr-defined]

    @property
    def is_free(self) -> bool:
        """Whether nobody else holds anything of it. Asked of each parameter twice a step."""
        return not self._is_held and not self._is_shared

    def take(self) -> None:
        """Get memory for the next gradient, which is other memory where the last one is still held."""
        if not self.has_memory:  # nobody held it when it was released, and nobody can have got hold of it since
            self._storage.resize_(self.nbytes)
        elif not self.is_free:
            self.is_pinned = False
            self._renew()

    def release(self) -> None:
        """Give the memory back to the allocator, unless somebody holds it or a recording writes there."""
        if not self.is_pinned and self.has_memory and self.is_free:
            self._storage.resize_(0)

    def pin(self, adds: bool) -> bool:
        """Keep the memory for recordings, which add to what is there, or replace it.

        Returns False where they would replace what somebody holds a view of; who holds the DTensor gets a copy.
        """
        if not adds and self._is_shared:
            return False
        if not self.has_memory:
            self._storage.resize_(self.nbytes)
        elif not adds and self._is_held:
            kept = self.dtensor
            self.dtensor = self._as_dtensor(kept._local_tensor)
            kept._local_tensor = kept._local_tensor.clone()
        self.is_pinned = True
        return True
