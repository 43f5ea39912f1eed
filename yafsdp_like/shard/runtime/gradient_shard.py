"""One parameter's reduced gradient on this rank: its memory, from the reduction to the update, and who still holds it.

[Note: memory of gradients]
Gradients are dead from the update, when ``zero_grad`` drops them, to the next backward; and a forward's activations,
which peak at its end, are dead when the last gradient is written. So gradients are not in the arena: each takes memory
of PyTorch's allocator when it is first reduced, as a rule where activations have just been, and the next forward gives
back those that are no longer anybody's ``.grad``. A recorded step does the same in the memory pool of recordings: each
recording has a place of its own for every gradient, which is shown when it is replayed (``recorded``, ``show``). Where
recorded steps add to gradients, those must outlive other recordings' activations: then each keeps its memory, outside
the pool (``pin``).

[Note: gradients that are still held]
``.grad`` is a DTensor, and the next backward writes its memory again. A user may hold it until then, or anything that
shares its bytes: ``.detach()``, ``.view(-1)``, ``to_local()``, which without grad mode is the DTensor's own local
tensor. Uses of each are counted, and where there is one, the gradient takes other memory, and the holder keeps this.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory.allocator import tensor_on, transient_storage
from yafsdp_like.memory.guards import fill_guard

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.tensor import DTensor

    from yafsdp_like.memory.arena import Place

_REFERENCES = 2  # to an attribute's value, as ``sys.getrefcount`` counts them: the attribute's own and the call's


@cache
def _storage_references() -> int:
    """Return how many references ``sys.getrefcount`` counts to a storage that tensors and one attribute have.

    C++ may hold one while tensors share the storage, which is up to PyTorch.
    """
    held = [transient_storage(1, torch.device("cpu"))]
    tensor = tensor_on(held[0], torch.uint8, (1,))
    found = sys.getrefcount(held[0])
    del tensor
    return found


class GradientMemory:
    """Bytes of a gradient, and the DTensor that users see on them."""

    __slots__ = ("dtensor", "is_shown", "num_uses", "storage")

    def __init__(self, storage: torch.UntypedStorage, dtensor: DTensor) -> None:
        self.storage, self.dtensor = storage, dtensor
        self.is_shown = False  # whether reductions write here; then the shard holds the DTensor too
        self.num_uses = torch._C._storage_Use_Count(storage._cdata)  # by this object; Python's are not among them

    @property
    def is_shared(self) -> bool:
        """Whether a tensor beside the DTensor's own shares the bytes, or somebody holds that one or their storage."""
        uses = torch._C._storage_Use_Count(self.storage._cdata)
        if uses > self.num_uses + self.is_shown or sys.getrefcount(self.storage) > _storage_references():
            return True
        return sys.getrefcount(self.dtensor._local_tensor) > _REFERENCES or self.dtensor._local_tensor._use_count() > 1  # type: ignore[attr-defined]

    @property
    def is_held(self) -> bool:
        """Whether somebody else holds the DTensor: in Python, as ``.grad``, or in an autograd graph."""
        return sys.getrefcount(self.dtensor) > _REFERENCES + self.is_shown or self.dtensor._use_count() > 1  # type: ignore[attr-defined]

    @property
    def is_free(self) -> bool:
        """Whether nobody else holds anything of it. Asked of each parameter twice a step."""
        return not self.is_held and not self.is_shared


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
        guard_nbytes: bytes behind memory of the allocator that nobody may write, in debug mode.
    """

    def __init__(
        self,
        numel: int,
        dtype: torch.dtype,
        local_shape: tuple[int, ...],
        device: torch.device,
        as_dtensor: Callable[[torch.Tensor], DTensor],
        place: Place | None = None,
        guard_nbytes: int = 0,
    ) -> None:
        self._numel, self._dtype, self._shape, self._as_dtensor = numel, dtype, local_shape, as_dtensor
        self._data_nbytes = numel * dtype.to_real().itemsize
        self._guard_nbytes = guard_nbytes
        self.nbytes = self._data_nbytes + guard_nbytes
        self.is_pinned = place is not None
        self.flat = tensor_on(transient_storage(0, device), dtype.to_real(), (numel,))
        self._place = place
        self.memory = self._own = self._fresh()  # what is shown, and what is no recording's
        self._point_to(self._own)
        self.release()

    def _fresh(self) -> GradientMemory:
        place, self._place = self._place, None
        if place is None:
            storage = transient_storage(self.nbytes, self.flat.device)
            if self._guard_nbytes:
                self._guard(storage)
            return self._memory_on(storage)
        return self._memory_on(place.tensor(self._dtype.to_real(), (self._numel,)).untyped_storage())

    def _renew(self) -> None:
        """Use other memory from now on, and leave what there was to its holders."""
        self._own = self._fresh()
        self.show(self._own)

    def _memory_on(self, storage: torch.UntypedStorage) -> GradientMemory:
        # A DTensor can be copied and saved only if its local tensor starts where its storage does.
        return GradientMemory(storage, self._as_dtensor(tensor_on(storage, self._dtype, self._shape)))

    def show(self, memory: GradientMemory) -> None:
        """Have reductions write to ``memory``, which is this gradient's own or was ``recorded``, and users see it."""
        if not memory.is_shown:
            self.release()
            self._point_to(memory)

    def _point_to(self, memory: GradientMemory, has_elements: bool = True) -> None:
        with torch.no_grad():
            self.flat.set_(memory.storage, 0, (self._numel if has_elements else 0,), (1,))
        self._has_elements = has_elements
        self.memory.is_shown = False
        self._set_memory(memory)

    def _set_memory(self, memory: GradientMemory) -> None:
        self.memory, self.dtensor, memory.is_shown = memory, memory.dtensor, True

    def fits(self, numel: int, dtype: torch.dtype, device: torch.device, guard_nbytes: int = 0) -> bool:
        """Whether it is for a chunk of this size, dtype and device, with a guard of this size."""
        found = (self._numel, self._dtype, self.flat.device, self._guard_nbytes)
        return (numel, dtype, device, guard_nbytes) == found

    @property
    def guard(self) -> torch.Tensor | None:
        """The bytes behind it, ``(nbytes,)`` uint8; None without debug mode, or without memory."""
        if not self._guard_nbytes or self._own.storage.nbytes() != self.nbytes:
            return None
        return tensor_on(self._own.storage, torch.uint8, (self._guard_nbytes,), offset=self._data_nbytes)

    def _guard(self, storage: torch.UntypedStorage) -> None:
        fill_guard(tensor_on(storage, torch.uint8, (self._guard_nbytes,), offset=self._data_nbytes))

    @property
    def has_memory(self) -> bool:
        """Whether there is anything to read."""
        return self.memory.storage.nbytes() == self.nbytes

    def take(self) -> None:
        """Get memory for the next gradient, which is other memory where the last one is still held."""
        if not self._fill():  # else nobody held it when it was released, and nobody can have got hold of it since
            self.show(self._own)
            if not self._own.is_free:
                self.is_pinned = False
                self._renew()

    def _fill(self) -> bool:
        """Show its own memory, which it gets if it has none; return whether it had none."""
        if self._own.storage.nbytes() == self.nbytes:
            return False
        self._own.storage.resize_(self.nbytes)
        if self._guard_nbytes:
            self._guard(self._own.storage)
        if self.memory is not self._own or not self._has_elements:
            self._point_to(self._own)
        return True

    def release(self) -> None:
        """Give the memory back to the allocator, or leave a recording's, unless somebody holds it or it is kept."""
        memory = self.memory
        if memory.storage.nbytes() != self.nbytes or not memory.is_free:
            return
        if memory is not self._own:
            self._point_to(self._own, has_elements=False)
        elif not self.is_pinned:
            memory.storage.resize_(0)

    # --- for recordings of steps ---

    def let_go(self, memory: GradientMemory) -> bool:
        """Give who holds the DTensor on ``memory`` a copy; return False where others share the bytes."""
        if memory.is_shared:
            return False
        if memory.is_held:
            kept = memory.dtensor
            memory.dtensor = self._as_dtensor(kept._local_tensor)
            kept._local_tensor = kept._local_tensor.clone()
            if memory.is_shown:
                self._set_memory(memory)
        return True

    def pin(self, adds: bool) -> bool:
        """Keep the memory for recordings, which add to what is there, or replace it.

        Returns False where they would replace what somebody holds a view of; who holds the DTensor gets a copy.
        """
        if not adds:
            if self.has_memory and not self.let_go(self.memory):
                return False
            if not self._fill():
                self.show(self._own)
        elif self.memory is not self._own:
            self.move()
        self.is_pinned = True
        return True

    def move(self) -> None:
        """Take other memory for the same DTensor with the same values; nobody has a view of it."""
        before, dtensor, local = self.memory, self.dtensor, self.dtensor._local_tensor
        self._renew()
        fresh = self.dtensor
        dtensor._local_tensor, fresh._local_tensor = fresh._local_tensor.copy_(local), local
        self.memory.dtensor, before.dtensor = dtensor, fresh
        self._set_memory(self.memory)

    @property
    def pinned_address(self) -> int:
        """Where recordings find the memory that is kept for them; 0 if none is."""
        return self._own.storage.data_ptr() if self.is_pinned else 0

    def recorded(self, keep: Callable[[torch.UntypedStorage], torch.UntypedStorage]) -> GradientMemory:
        """Give the memory that a recording has taken back to its pool; return what to show after a replay.

        ``keep`` gives a storage on the same bytes that the allocator knows nothing of.
        """
        assert self.memory is self._own and self.has_memory, "a recording that has reduced the gradient"
        if self.is_pinned or not self.nbytes:
            return self._own
        memory = self._memory_on(keep(self._own.storage))
        if not self._own.is_free:  # the recorded function has kept it
            self._renew()
        self.release()
        return memory
