"""AdamW's moments in host memory, copied to the device and back, chunk by chunk, beside the updates that use them.

Owns the host's memory of moments, buffers on the device, and the order of copies and updates. Knows tensors and formats
of moments, nothing of gradients, rates or units.

[Note: offloaded moments]
Each batch of parameters has one block of host memory, pinned for a GPU, with both moments of each parameter behind each
other, on which the optimizer's states lie. A batch is updated in chunks of at most ``CHUNK_NBYTES``, for which larger
parameters are cut. Chunk ``k`` is in buffer ``k % NUM_BUFFERS`` of the device, while it is updated:

    host to device   in 0 | in 1     | in 2   | in 3, when back 0 is done
    compute                 update 0 |          update 1 | ...
    device to host                   | back 0 |          | back 1 | ...

So both directions of the link are busy all the time, the third buffer covering the update between, and memory on the
device does not grow with the model. Events order the three streams, and the CPU waits for none of them in a step. It
waits before it reads or writes a block, in ``wait``. Chunks and buffers are those of the last step, and nothing is
allocated, as long as batches have the same parameters.

An update may end in the middle, by an interrupt say. The chunk on the device is copied back then, too: what was
launched has written parameters, and moments and remainders must not stay those of before.

Remainders of split masters that are in host memory ([Note: remainders on the host], ``ops/split_master.py``) are copied
with the moments of their elements, from where they lie and back there. Other optimizers of the same parameters do so on
the same streams; whoever else reads or writes values has the CPU wait for these copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from yafsdp_like.kernels.formats import BLOCK_NUMEL
from yafsdp_like.memory.arena import refuse_what_the_host_cannot_hold
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.pinned import pin
from yafsdp_like.memory.streams import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE, InOrder, Streams, streams_of
from yafsdp_like.ops.split_master import SplitTensor, SplitValues
from yafsdp_like.optim.moments import MOMENTS, MomentsFormat, local, moments_dtype, moments_nbytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, MutableMapping, Sequence

    from torch import nn

CHUNK_NBYTES = 64 << 20  # long enough for the link's full rate: 1.3 ms at 50 GB/s
NUM_BUFFERS = 3


def buffer_nbytes(
    shapes: Iterable[tuple[torch.Size, torch.dtype]], kept_as: MomentsFormat, remainders_nbytes: int = 0
) -> int:
    """Return the bytes of each buffer for parameters of which a rank has rows of these shapes, in these dtypes.

    ``remainders_nbytes`` are those of their remainders in host memory, each aligned.
    """
    moments = sum(2 * aligned(moments_nbytes(*rows, kept_as) // 2) for rows in shapes)
    return min(CHUNK_NBYTES, moments + remainders_nbytes)


class LoadedMoments(NamedTuple):
    """Some or all elements of a parameter, whose moments are on the device while a chunk is."""

    param: nn.Parameter
    elements: slice | None  # of this rank's, flat; None: all
    exp_avg: torch.Tensor  # of the shape of the parameter's rows here, or flat where elements are named or in 8 bit
    exp_avg_sq: torch.Tensor
    remainder: torch.Tensor | None = None  # if it is offloaded; of the parameter's shape, or flat where elements are


@dataclass(frozen=True, eq=False)
class _Part:
    """Some or all elements of a parameter, and where their moments lie in a block."""

    param: nn.Parameter
    dtype: torch.dtype
    offsets_nbytes: tuple[int, int]  # where each moment of the whole parameter begins
    ranges: tuple[tuple[int, int], ...]  # of bytes of a whole moment, which lie behind each other on the device
    elements: slice | None = None
    remainder: torch.Tensor | None = None  # of these elements, flat int16 in host memory, if it is offloaded

    @property
    def nbytes(self) -> int:
        """Bytes of each moment of these elements."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that these elements take in a buffer."""
        return 2 * aligned(self.nbytes) + (0 if self.remainder is None else aligned(self.remainder.nbytes))


@dataclass(frozen=True, eq=False)
class _Block:
    """Moments of a batch on the host, which are pinned for as long as this lives."""

    bytes: torch.Tensor  # (nbytes,) uint8

    def tensor(self, offset_nbytes: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a flat tensor on some of the bytes, with a storage of its own.

        So ``torch.save`` and copies take it as any other tensor, and see no other moment behind it.
        """
        return torch.from_numpy(self.bytes.numpy()[offset_nbytes : offset_nbytes + nbytes]).view(dtype)


class _Chunk:
    """Parts that are copied and updated together: whole parameters behind each other in a block, or one that is cut."""

    def __init__(self, block: torch.Tensor, parts: Sequence[_Part]) -> None:
        self._parts = parts
        self._pieces: dict[int, list[LoadedMoments]] = {}  # by the buffer that they are in
        self._places: list[list[int]] = []  # of both moments of each part, in a buffer, and of its remainder
        spans: list[tuple[int, int, int]] = []  # first and last byte in the block, first byte in a buffer
        end = 0
        for part in parts:
            self._places.append([])
            for offset in part.offsets_nbytes:
                self._places[-1].append(end)
                place, end = end, end + aligned(part.nbytes)
                for start, stop in part.ranges:
                    spans.append((offset + start, offset + stop, place))
                    place += stop - start
        self.spans = [(block[start:stop], place) for start, stop, place in _joined(spans)]
        for part, places in zip(parts, self._places, strict=True):
            if part.remainder is not None:
                self.spans.append((part.remainder.view(torch.uint8), end))
                places.append(end)
                end += aligned(part.remainder.nbytes)
        self.params = [part.param for part in parts]

    def pieces(self, index: int, buffer: torch.Tensor) -> list[LoadedMoments]:
        """Return what lies in buffer number ``index``."""
        if index not in self._pieces:
            found = []
            for part, places in zip(self._parts, self._places, strict=True):
                flat = [buffer[place : place + part.nbytes].view(part.dtype) for place in places[:2]]
                if part.remainder is not None:
                    flat.append(buffer[places[2] : places[2] + part.remainder.nbytes].view(torch.int16))
                views = [_shaped(state, part.param) for state in flat] if part.elements is None else flat
                found.append(LoadedMoments(part.param, part.elements, *views))
            self._pieces[index] = found
        return self._pieces[index]


class OffloadedMoments:
    """The moments of one optimizer. See [Note: offloaded moments].

    Raises ``ValueError`` in ``begin`` for parameters on several devices, and for states of another size than theirs;
    ``RuntimeError`` where the host has too little memory. ``buffers`` are on the device, from the first step on.
    """

    def __init__(self, kept_as: MomentsFormat) -> None:
        self._kept_as = kept_as
        self._streams: Streams = InOrder()  # until the first step says of which device
        self._layout: list[list[tuple[Any, ...]]] = []  # of each batch's parameters: their ids, and where they are
        self._chunks: list[list[_Chunk]] = []  # of each batch
        self._blocks: list[_Block] = []
        self._places: dict[nn.Parameter, dict[str, torch.Tensor]] = {}  # each one's moments in its block
        self._unused: set[nn.Parameter] = set()  # whose places are still zeros
        self.buffers: list[torch.Tensor] = []
        self._freed: list[Any] = []  # by buffer: when its chunk was copied back
        self._loaded: list[Any] = [None] * NUM_BUFFERS  # by buffer: when its chunk was copied in
        self._due: list[_Chunk] = []  # of this step
        self._position = 0  # of the next to be updated

    def wait(self) -> None:
        """Have the CPU wait until the moments of the last step are on the host."""
        for event in self._freed:
            self._streams.synchronize(event)

    def begin(self, batches: Sequence[Sequence[nn.Parameter]], states: MutableMapping[torch.Tensor, Any]) -> None:
        """Begin a step over the parameters with a gradient; states of others, and loaded ones, are taken to the host.

        States are made for parameters that have none. The first chunk is on its way when this returns.
        """
        kept = [[p for p in batch if p.requires_grad or p in states] for batch in batches]
        layout = [[_whereabouts(p) for p in batch] for batch in kept]
        if layout != self._layout:
            self._lay_out(kept)
            self._layout = layout
        for param in chain.from_iterable(kept):
            if param.grad is not None or param in states:
                self._keep(param, states[param])
        self._due = [c for chunks in self._chunks for c in chunks if _has_gradient(c)]
        self._position = 0
        # A chunk may still be copied back from another buffer, and remainders from those of another optimizer.
        self._streams.wait(HOST_TO_DEVICE, self._streams.record(DEVICE_TO_HOST))
        if self._due:
            self._copy_in(0)

    def pieces(self, batch_index: int) -> Generator[list[LoadedMoments]]:
        """Yield a batch's chunks, with their moments on the device for the work that is issued until the next is taken.

        A chunk may hold parameters that have no gradient; chunks of those alone are left out. To be closed if the work
        raises, which copies its chunk back all the same.
        """
        for chunk in filter(_has_gradient, self._chunks[batch_index]):
            k = self._position
            assert self._due[k] is chunk, "batches are updated in the order of the step"
            if k + 1 < len(self._due):
                self._copy_in(k + 1)
            self._streams.wait(COMPUTE, self._loaded[k % NUM_BUFFERS])
            try:
                yield chunk.pieces(k % NUM_BUFFERS, self.buffers[k % NUM_BUFFERS])
            finally:
                self._copy_back(k)
            self._position += 1

    def _copy_in(self, k: int) -> None:
        index = k % NUM_BUFFERS
        self._streams.wait(HOST_TO_DEVICE, self._freed[index])
        with self._streams.on(HOST_TO_DEVICE):
            for host, device in self._spans(k):
                device.copy_(host, non_blocking=True)
        self._loaded[index] = self._streams.record(HOST_TO_DEVICE)

    def _copy_back(self, k: int) -> None:
        self._streams.wait(DEVICE_TO_HOST, self._streams.record(COMPUTE))
        with self._streams.on(DEVICE_TO_HOST):
            for host, device in self._spans(k):
                host.copy_(device, non_blocking=True)
        self._freed[k % NUM_BUFFERS] = self._streams.record(DEVICE_TO_HOST)

    def _spans(self, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ranges of a block with their places in the chunk's buffer."""
        for host, place in self._due[k].spans:
            yield host, self.buffers[k % NUM_BUFFERS][place : place + host.numel()]

    # --- where moments are ---

    def _lay_out(self, batches: Sequence[Sequence[nn.Parameter]]) -> None:
        """Allocate blocks and buffers for other batches than the last step's; their states are taken over later."""
        self.wait()
        params = list(chain.from_iterable(batches))
        devices = {local(p).device for p in params}
        if len(devices) > 1:
            raise ValueError(
                f"AdamW with offloaded moments: expected parameters on one device, found {sorted(map(str, devices))}: "
                "make an optimizer for each"
            )
        self._chunks, self._blocks, self._places = [[] for _ in batches], [], {}
        self._unused = set(params)
        for device in devices:
            self._streams = streams_of(device)
            shapes = [(local(p).shape, p.dtype) for p in params]
            refuse_what_the_host_cannot_hold(sum(moments_nbytes(*rows, self._kept_as) for rows in shapes))
            remainders = [values.low for values in map(_offloaded_values, params) if values is not None]
            nbytes = buffer_nbytes(shapes, self._kept_as, sum(aligned(low.nbytes) for low in remainders))
            with self._streams.on(DEVICE_TO_HOST):  # the last to use them: the allocator may give them to it alone
                self.buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
            self._freed = [self._streams.record(DEVICE_TO_HOST)] * NUM_BUFFERS
            self._chunks = [self._lay_out_batch(batch, device) for batch in batches]

    def _lay_out_batch(self, params: Sequence[nn.Parameter], device: torch.device) -> list[_Chunk]:
        """Allocate a batch's block, and cut it into chunks."""
        parts, nbytes = [], 0
        for param in params:
            shape = local(param).shape
            each = moments_nbytes(shape, param.dtype, self._kept_as) // 2
            offsets = nbytes, nbytes + aligned(each)
            dtype, values = moments_dtype(shape, param.dtype, self._kept_as), _offloaded_values(param)
            remainder = None if values is None else values.low
            parts.append(_Part(param, dtype, offsets, ((0, each),), remainder=remainder))
            nbytes += 2 * aligned(each)
        block = _Block(torch.zeros(nbytes, dtype=torch.uint8))
        if device.type == "cuda":
            pin(block.bytes.untyped_storage(), block, device)
        self._blocks.append(block)
        for part in parts:
            self._places[part.param] = {
                name: _moment(part.param, block.tensor(offset, part.nbytes, part.dtype))
                for name, offset in zip(MOMENTS, part.offsets_nbytes, strict=True)
            }
        return [_Chunk(block.bytes, chunk) for chunk in _chunks_of([part for part in parts if part.nbytes])]

    def _keep(self, param: nn.Parameter, state: dict[str, Any]) -> None:
        """Have a state's moments be the block's: with zeros if it is new, else with what they are."""
        places = self._places[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for name, place in places.items():
            found = state.get(name)
            if found is place:
                continue
            self.wait()
            if found is None:
                if param not in self._unused:
                    local(place).zero_()
            elif local(found).numel() == local(place).numel() and found.dtype == place.dtype:
                local(place).copy_(local(found).view(local(place).shape))
            else:
                raise ValueError(
                    f"{name} of a parameter of shape {tuple(param.shape)}: expected {local(place).numel()} elements of "
                    f"{place.dtype} on this rank, found {local(found).numel()} of {found.dtype}: load a state that was "
                    "saved for this model, through load_state_dict"
                )
            state[name] = place
        self._unused.discard(param)


def _offloaded_values(param: nn.Parameter) -> SplitValues | None:
    """Return the values of a split master whose remainder is in host memory; None for any other parameter."""
    rows = local(param)
    return rows.split_values if isinstance(rows, SplitTensor) and rows.split_values.is_offloaded else None


def _whereabouts(param: nn.Parameter) -> tuple[Any, ...]:
    """Return what a layout depends on, after settling what was written to an offloaded remainder's values."""
    values = _offloaded_values(param)
    if values is not None:
        values.settle()
    return id(param), local(param).device, None if values is None else values.low.data_ptr()


def _has_gradient(chunk: _Chunk) -> bool:
    return any(param.grad is not None for param in chunk.params)


def _moment(param: nn.Parameter, flat: torch.Tensor) -> torch.Tensor:
    """Return a moment on the host as states have it: distributed as ``param``, or this rank's blocks alone.

    A DTensor on the mesh of GPUs whose local tensor is on the host, as FSDP2's parameters are under its offload policy.
    """
    rows = _shaped(flat, param)
    if rows.dtype == torch.uint8 or not isinstance(param, DTensor):
        return rows
    return DTensor(rows, param._spec, requires_grad=False)


def _shaped(flat: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
    return flat if flat.dtype == torch.uint8 else flat.view(local(param).shape)


def _joined(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return the same with one for spans that lie behind each other at both ends, padding between them included."""
    found: list[tuple[int, int, int]] = []
    for start, stop, place in spans:
        if found and start == aligned(found[-1][1]) and start - found[-1][0] == place - found[-1][2]:
            start, _, place = found.pop()
        found.append((start, stop, place))
    return found


def _chunks_of(whole: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Yield consecutive parameters of at most ``CHUNK_NBYTES`` together, and larger ones cut."""
    chunk: list[_Part] = []
    nbytes = 0
    for part in whole:
        size = part.buffer_nbytes
        if chunk and nbytes + size > CHUNK_NBYTES:
            yield chunk
            chunk, nbytes = [], 0
        if size > CHUNK_NBYTES:
            yield from ([cut] for cut in _cut(part))
        else:
            chunk.append(part)
            nbytes += size
    if chunk:
        yield chunk


def _cut(part: _Part) -> Iterator[_Part]:
    """Yield a parameter's elements in parts of one chunk each; 8 bit by blocks keeps codes apart from exponents."""
    numel, in_blocks = local(part.param).numel(), part.dtype == torch.uint8
    most = _most_elements(part.dtype, part.remainder is not None)
    for start in range(0, numel, most):
        elements = slice(start, min(start + most, numel))
        if in_blocks:
            first, last = (numel + element // BLOCK_NUMEL for element in (elements.start, elements.stop))
            ranges: tuple[tuple[int, int], ...] = (elements.start, elements.stop), (first, last)
        else:
            ranges = ((elements.start * part.dtype.itemsize, elements.stop * part.dtype.itemsize),)
        remainder = None if part.remainder is None else part.remainder[elements]
        yield replace(part, ranges=ranges, elements=elements, remainder=remainder)


def _most_elements(dtype: torch.dtype, has_remainder: bool) -> int:
    """Return how many elements, in whole blocks, fit into one chunk."""

    def nbytes(numel: int) -> int:
        moment = numel + numel // BLOCK_NUMEL if dtype == torch.uint8 else numel * dtype.itemsize
        return 2 * aligned(moment) + has_remainder * aligned(numel * torch.int16.itemsize)

    per_block = 2 * (BLOCK_NUMEL + 1 if dtype == torch.uint8 else BLOCK_NUMEL * dtype.itemsize)
    most = CHUNK_NBYTES // (per_block + has_remainder * BLOCK_NUMEL * torch.int16.itemsize) * BLOCK_NUMEL
    while nbytes(most) > CHUNK_NBYTES:  # for alignment, by a few blocks
        most -= BLOCK_NUMEL
    return most
