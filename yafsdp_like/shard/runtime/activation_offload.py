"""Activations in host memory, from the forward of a block to its backward.

Owns what autograd saves inside of blocks, the host's memory for it, and the order of copies around it. Knows units only
to leave their parameters alone.

[Note: offloaded activations]
What autograd saves in a block goes through a pair of hooks (``torch.autograd.graph.saved_tensors_hooks``). Storages of
at least ``min_nbytes`` are copied to the host when the block's forward ends, each once, however many tensors and blocks
save views of it. Compute waits for a block's copies at the end of the next block's forward, and the device's memory
goes back to PyTorch's allocator then, in the order of compute: at most two blocks' activations are there. Those of the
last block still are when backward comes to it. When backward asks for the first tensor of a block, all of the block's
are copied back, and those of the block before it, which so arrive while this one computes; compute waits for the copies
before it reads. Autograd drops each as its node is done.

    compute         forward 0 | forward 1 | forward 2 |        | backward 2 | backward 1 | backward 0
    device to host            | 0         | 1         | 2
    host to device                                             | 1          | 0

Left where they are: parameters and buffers, slots' among them; inputs of a block that need no gradient (masks, rotary
tables), which stay alive anyway; and all that is saved inside of other hooks. So activation checkpointing of a whole
block decides for itself; around such a block (``CheckpointWrapper``), or inside, its inputs are offloaded.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from yafsdp_like.memory.allocator import tensor_on, transient_storage
from yafsdp_like.memory.pinned import pin
from yafsdp_like.memory.streams import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE, InOrder, Streams, Timer, streams_of
from yafsdp_like.shard.runtime.nested import map_tensors
from yafsdp_like.shard.runtime.running import backward_task
from yafsdp_like.shard.runtime.unit_state import units_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from yafsdp_like.memory.streams import Event

_OFFLOADED = "_yafsdp_activations"  # attribute of a block
MIN_NBYTES = 1 << 20  # smaller ones cost the CPU more than they save


def offload_activations(
    blocks: nn.Module | Iterable[nn.Module], *, min_nbytes: int = MIN_NBYTES
) -> OffloadedActivations:
    """Keep what autograd saves in the forward of each of ``blocks`` in host memory until its backward.

    ``blocks`` are run one after the other, as a decoder's layers, sharded or not, and the numbers stay the same. Each
    forward copies tensors of at least ``min_nbytes`` to the host and each backward copies them back, beside compute;
    where the link takes longer than that, compute waits. Host memory, pinned for a GPU, is allocated in the first step
    and used again. See [Note: offloaded activations].

    Raises ``ValueError`` for no blocks, or one that is offloaded already, and ``TypeError`` for what is no module; in a
    forward, ``RuntimeError`` where a saved tensor was changed in place, as autograd would in backward, where a step is
    recorded (``GraphedStep``), and where another thread is in a forward of the same blocks.
    """
    is_one = isinstance(blocks, nn.Module) and not isinstance(blocks, nn.ModuleList)
    found: list[nn.Module] = [blocks] if is_one else list(blocks)  # type: ignore[arg-type, list-item]
    if not found:
        raise ValueError("offload_activations expects at least one block, found none")
    for block in found:
        if not isinstance(block, nn.Module):
            raise TypeError(f"offload_activations expects modules, found a {type(block).__name__}")
        if _OFFLOADED in vars(block):
            raise ValueError(f"offload_activations was called before for a {type(block).__name__}: call it once")
    offloaded = OffloadedActivations(min_nbytes)
    for block in dict.fromkeys(found):
        vars(block)[_OFFLOADED] = offloaded
        block.register_forward_pre_hook(partial(_before_forward, offloaded), with_kwargs=True)
        block.register_forward_hook(partial(_after_forward, offloaded), always_call=True)
    return offloaded


def activations_of(model: nn.Module) -> OffloadedActivations | None:
    """Return what the last call of ``offload_activations`` for a block below ``model`` has returned, if there was."""
    found = [vars(module)[_OFFLOADED] for module in model.modules() if _OFFLOADED in vars(module)]
    return found[-1] if found else None


@torch.compiler.disable
def _before_forward(offloaded: OffloadedActivations, block: nn.Module, args: Any, kwargs: Any) -> None:
    offloaded.begin(block, (args, kwargs))


@torch.compiler.disable
def _after_forward(offloaded: OffloadedActivations, block: nn.Module, args: Any, output: Any) -> None:
    offloaded.end(block)


class HostBuffer:
    """Host memory for one storage, which is pinned for as long as this lives."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        storage = transient_storage(nbytes, torch.device("cpu"))
        if device.type == "cuda":
            pin(storage, self, device)
        self.nbytes = nbytes
        self.bytes = tensor_on(storage, torch.uint8, (nbytes,))


class SavedStorage:
    """One storage that autograd has saved: on the device, in host memory, or in both while it is copied."""

    def __init__(self, tensor: torch.Tensor, call: _Call, owner: OffloadedActivations) -> None:
        self.call, self._owner = call, owner
        self.tensor: torch.Tensor | None = tensor.detach()  # until its memory on the device is given back
        self.version = tensor._version
        self.storage: torch.UntypedStorage | None = tensor.untyped_storage()
        self.nbytes = self.storage.nbytes()
        self.buffer: HostBuffer | None = None
        self.copies: _Copies | None = None  # the last, from or to the device's memory

    def check(self) -> None:
        """Raise ``RuntimeError`` if the tensor was changed since it was saved."""
        if self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)}, which {self.call.name} has saved for its backward, was "
                "changed in place since: change a copy, or leave this block out of offload_activations"
            )

    def wait(self) -> None:
        """Have compute wait for the last copy, before it reads the device's memory, or gives it back."""
        if self.copies is not None:
            self._owner.wait_for(self.copies)

    def leave(self) -> None:
        """Give the device's memory back."""
        self.wait()
        self.tensor = self.storage = None
        self.call.is_fetched = False  # a backward through a graph that was kept may have come before

    def __del__(self) -> None:
        """Give all memory back: the graph that has saved it is gone."""
        if not sys.is_finalizing():
            self.wait()
            if self.buffer is not None:
                self._owner.give_back(self.buffer)


@dataclass(eq=False)
class _Copies:
    """The copies of one block in one direction."""

    done: Event
    is_awaited: bool = False  # by all that compute is given from here on


@dataclass(frozen=True, eq=False)
class SavedView:
    """What autograd keeps instead of a tensor."""

    saved: SavedStorage
    call: _Call  # the forward that has saved this view
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@dataclass(eq=False)
class _Call:
    """One forward of a block, and the storages that it was the first to save."""

    name: str
    kept: set[int]  # addresses of storages that are left where they are
    before: weakref.ref[_Call] | None  # the block's that ran before it
    saved: list[weakref.ref[SavedStorage]] = field(default_factory=list)
    by_address: WeakValueDictionary[int, SavedStorage] = field(default_factory=WeakValueDictionary)
    is_fetched: bool = False

    def alive(self) -> Iterator[SavedStorage]:
        """Yield the storages that some graph still refers to."""
        return (saved for ref in self.saved if (saved := ref()) is not None)


class OffloadedActivations:
    """What autograd has saved in some blocks, and host memory for it. See [Note: offloaded activations].

    ``copied_nbytes`` counts what was copied to the host since it was made.
    """

    def __init__(self, min_nbytes: int) -> None:
        self.streams: Streams = InOrder()  # until the first saved tensor says of which device
        self.copied_nbytes = self.host_nbytes = 0
        self.min_nbytes = min_nbytes
        self._device: torch.device | None = None
        self._running: list[tuple[nn.Module, _Call | None, saved_tensors_hooks | None]] = []
        self._thread = 0  # in which they run
        self._last: weakref.ref[_Call] | None = None  # of the calls that have begun
        self._leaving: _Call | None = None  # whose storages are still on the device, as far as they are alive
        self._timer: Timer | None = None  # while it is measured
        self._waits: list[tuple[Event, Event]] = []  # of compute: begin and end
        self._free: dict[int, list[HostBuffer]] = {}  # by their bytes

    def __reduce__(self) -> Any:
        """Copy and pickle no host memory: a copied model has its own."""
        return type(self), (self.min_nbytes,)

    # --- forward ---

    def begin(self, block: nn.Module, inputs: Any) -> None:
        """Begin a forward of ``block``; what autograd saves from now on is this object's, unless others have hooks."""
        self._check_thread(block)
        autograd: Any = torch._C._autograd
        top = autograd._top_saved_tensors_default_hooks(True)
        if top is not None and top[0] == self._pack and any(running is block for running, *_ in self._running):
            self._leave_interrupted()
            top = autograd._top_saved_tensors_default_hooks(True)
        taken = top is not None or backward_task() is not None
        if taken or not torch.is_grad_enabled() or not autograd._saved_tensors_hooks_is_enabled():  # not by torch.func
            self._running.append((block, None, None))
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"activations of {type(block).__name__} cannot be offloaded in a step that is recorded: leave "
                "offload_activations out, or GraphedStep"
            )
        call = _Call(type(block).__name__, self._kept(block, inputs), self._last)
        self._last = weakref.ref(call)
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._running.append((block, call, hooks))

    def _check_thread(self, block: nn.Module) -> None:
        """Raise ``RuntimeError`` in another thread than the running forward's; backward has threads of its own."""
        here = threading.get_ident()
        if here == self._thread or backward_task() is not None:
            return
        if self._running and any(thread.ident == self._thread for thread in threading.enumerate()):
            raise RuntimeError(
                f"a {type(block).__name__} was called in a second thread while a {type(self._running[0][0]).__name__} "
                "runs, and the activations of both are offloaded together: run one forward after the other (under a "
                "lock), or call offload_activations for each thread's own blocks"
            )
        self._running.clear()  # of a thread that has ended in a forward
        self._thread = here

    def _leave_interrupted(self) -> None:
        """Remove the hooks of a forward that never ended: PyTorch calls no hook after a ``KeyboardInterrupt``."""
        for _, _, hooks in self._running:
            if hooks is not None:
                hooks.__exit__()
        self._running.clear()

    def end(self, block: nn.Module) -> None:
        """End the forward of ``block``, also one that failed: copy what it has saved, and release the block before."""
        is_elsewhere = threading.get_ident() != self._thread and backward_task() is None
        if is_elsewhere or not self._running or self._running[-1][0] is not block:
            return  # it failed before it began here
        _, call, hooks = self._running.pop()
        if call is None or hooks is None:
            return
        hooks.__exit__()
        leaving, self._leaving = self._leaving, call
        for saved in leaving.alive() if leaving is not None else ():
            saved.check()
            saved.leave()
        self._copy_to_host(call)

    @torch.compiler.disable  # called by what runs between compiled graphs too
    def _pack(self, tensor: torch.Tensor) -> Any:
        call = next(call for _, call, _ in reversed(self._running) if call is not None)  # blocks inside have none
        if not self._is_offloaded(tensor, call):
            return tensor if tensor.grad_fn is None else tensor.detach()  # which no node's circle goes through
        address = self._address(tensor)
        saved = call.by_address.get(address)
        if saved is None and self._leaving is not None:
            saved = self._leaving.by_address.get(address)
        if saved is None or saved.storage is None or saved.version != tensor._version:  # its copy may be an older one
            saved = call.by_address[address] = SavedStorage(tensor, call, self)
            call.saved.append(weakref.ref(saved))
        return SavedView(saved, call, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _is_offloaded(self, tensor: torch.Tensor, call: _Call) -> bool:
        """Whether a tensor is offloaded, of those that are saved: plain and large ones of the GPU, if there is one."""
        if isinstance(tensor, DTensor) or tensor.nbytes < self.min_nbytes or tensor.layout is not torch.strided:
            return False
        return not (tensor.is_conj() or tensor.is_neg() or self._address(tensor) in call.kept) and self._is_here(tensor)

    def _address(self, tensor: torch.Tensor) -> int:
        """Return what tells a tensor's storage from others that are alive."""
        return tensor.untyped_storage().data_ptr()

    def _is_here(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a plain one of the device that is offloaded, which the first one of the GPU chooses."""
        if type(tensor) is not torch.Tensor:
            return False
        if self._device is None and (tensor.is_cuda or not torch.cuda.is_available()):
            self._device, self.streams = tensor.device, streams_of(tensor.device)
        return tensor.device == self._device

    def _copy_to_host(self, call: _Call) -> None:
        """Issue the copies of what a forward has saved, which has just been issued."""
        leaving = list(call.alive())
        if not leaving:
            return
        for saved in leaving:
            saved.check()
            saved.buffer = self._take(saved.nbytes)
        self.copied_nbytes += sum(saved.nbytes for saved in leaving)
        self._copy_out(leaving)

    def _copy_out(self, leaving: Sequence[SavedStorage]) -> None:
        self.streams.wait(DEVICE_TO_HOST, self.streams.record(COMPUTE))  # which has waited for all copies of buffers
        with self.streams.on(DEVICE_TO_HOST), torch.no_grad():
            for saved in leaving:
                host, device = _bytes(saved)
                host.copy_(device, non_blocking=True)
        copies = _Copies(self.streams.record(DEVICE_TO_HOST))
        for saved in leaving:
            saved.copies = copies

    # --- backward ---

    @torch.compiler.disable
    def _unpack(self, packed: torch.Tensor | SavedView) -> torch.Tensor:
        if not isinstance(packed, SavedView):
            return packed
        saved = packed.saved
        self._fetch(packed.call)
        before = packed.call.before() if packed.call.before is not None else None
        if before is not None:
            self._fetch(before)
        if saved.storage is None:
            self._fetch(saved.call)
        if saved.tensor is None:
            saved.wait()
        saved.check()
        return self._view(saved, packed)

    def _view(self, saved: SavedStorage, packed: SavedView) -> torch.Tensor:
        assert saved.storage is not None
        return tensor_on(saved.storage, packed.dtype, packed.shape, packed.stride, packed.offset)

    def _fetch(self, call: _Call) -> None:
        """Issue copies to the device of what a forward has saved, as far as it is not there."""
        if call.is_fetched:
            return
        call.is_fetched = True
        away = [saved for saved in call.alive() if saved.storage is None]
        if away:
            self._copy_in(away)

    def _copy_in(self, away: Sequence[SavedStorage]) -> None:
        assert self._device is not None
        for saved in away:
            saved.storage = transient_storage(saved.nbytes, self._device)
        self.streams.wait(HOST_TO_DEVICE, self.streams.record(COMPUTE))  # which has used the memory before
        with self.streams.on(HOST_TO_DEVICE), torch.no_grad():
            for saved in away:
                host, device = _bytes(saved)
                device.copy_(host, non_blocking=True)
        copies = _Copies(self.streams.record(HOST_TO_DEVICE))
        for saved in away:
            saved.copies = copies

    def wait_for(self, copies: _Copies) -> None:
        """Have compute wait for copies, once."""
        if copies.is_awaited:
            return
        copies.is_awaited = True
        begin = None if self._timer is None else self._timer.mark()
        self.streams.wait(COMPUTE, copies.done)
        if self._timer is not None:
            self._waits.append((begin, self._timer.mark()))

    # --- what it costs ---

    def measure(self) -> None:
        """Measure how long compute waits for copies, from here to ``exposed_seconds``."""
        if self._device is not None:
            self._timer = Timer(self._device)

    def exposed_seconds(self) -> float:
        """Return how long compute has waited for copies since ``measure``, which the CPU waits for, and end that."""
        timer, self._timer = self._timer, None
        waits, self._waits = self._waits, []
        self.streams.synchronize(self.streams.record(COMPUTE))
        return sum(timer.seconds(*wait) for wait in waits) if timer is not None else 0.0

    # --- host memory ---

    def _take(self, nbytes: int) -> HostBuffer:
        """Return the smallest free buffer that is large enough; else a new one, in place of the largest free one."""
        sizes = [size for size, buffers in self._free.items() if buffers]
        fitting = min((size for size in sizes if size >= nbytes), default=None)
        if fitting is not None:
            return self._free[fitting].pop()
        if sizes:
            self._free[max(sizes)].pop()
            self.host_nbytes -= max(sizes)
        self.host_nbytes += nbytes
        return self._new_buffer(nbytes)

    def _new_buffer(self, nbytes: int) -> HostBuffer:
        assert self._device is not None
        return HostBuffer(nbytes, self._device)

    def give_back(self, buffer: HostBuffer) -> None:
        """Let another storage have the buffer."""
        self._free.setdefault(buffer.nbytes, []).append(buffer)

    def _kept(self, block: nn.Module, inputs: Any) -> set[int]:
        """Return addresses of storages that are left where they are: parameters, buffers, inputs without a gradient."""
        kept: list[torch.Tensor] = [*block.parameters(), *block.buffers()]
        for module in block.modules():
            for unit in units_of(module):
                kept += [param for slot in unit.slots for param in slot.params]

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                kept.append(tensor)
            return tensor

        map_tensors(keep, inputs)
        return {self._address(t) for t in kept if not isinstance(t, DTensor)}


def _bytes(saved: SavedStorage) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a storage's bytes on the host and on the device, ``(nbytes,)`` uint8 each."""
    assert saved.buffer is not None and saved.storage is not None
    return saved.buffer.bytes[: saved.nbytes], tensor_on(saved.storage, torch.uint8, (saved.nbytes,))
