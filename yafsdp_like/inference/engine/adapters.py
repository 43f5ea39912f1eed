"""LoRA adapters of one engine: their images on the host, slots on the device, and which requests use these.

Owns which adapter is in which slot. How products are computed is ``kernels/lora.py``'s, where bytes lie
``adapter_layout.py``'s, what a directory says ``adapter_files.py``'s.

[Note: who has a slot]
A running request keeps its adapter in a slot. One that is to run takes the slot that its adapter has, or a free one, or
the one that has been unused for longest: its adapter loses it, and nothing is copied, since the image stays on the
host. Where running requests need all slots, it waits, and only requests without adapters pass it (``scheduler.py``).

[Note: adapters on their way]
An adapter is copied into a slot on a stream of copies, behind the last step that may read the slot, and so beside later
ones. The next step with adapters waits for it on the device. It reads slots by number, so it may be a recording.

Loading has three parts, so that an engine may go on meanwhile: ``reserve``, ``fill`` (of which any thread may do one),
``publish``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from yafsdp_like.checkpoint.safetensors import hold_files
from yafsdp_like.inference.plan.adapter_layout import DEFAULT_RANK, PRODUCTS, AdapterLayout
from yafsdp_like.inference.weights.adapter_files import Adapter, AdapterSource, open_adapter
from yafsdp_like.inference.weights.loading import fill
from yafsdp_like.inference.weights.store import Store
from yafsdp_like.kernels.lora import LowRank
from yafsdp_like.memory.streams import COMPUTE, HOST_TO_DEVICE, Event, InOrder, Streams, streams_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path

    from torch import Tensor

    from yafsdp_like.inference.options import EngineOptions
    from yafsdp_like.inference.weights.store import Weights
    from yafsdp_like.models.decoder import DecoderConfig

MAX_SLOTS_BY_DEFAULT = 8


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter with an image; changed by ``Adapters`` and ``Scheduler`` only."""

    name: str
    number: int  # of all that were ever loaded, so that prefixes of one are never taken for another's
    image: int
    slot: int | None = None
    num_requests: int = 0  # that have not ended
    num_running: int = 0  # of these, which keep it in its slot
    last_use: int = 0  # in order of the ends of uses
    arrived: Event | None = None  # of its last copy


@dataclass(eq=False)
class _Slot:
    values: Tensor  # (n,) all of its bytes
    last_step: Event  # behind which it may be written
    holder: LoadedAdapter | None = None


@dataclass(eq=False)
class Adapters:
    """The adapters that an engine's requests may name; without a layout there are none."""

    config: DecoderConfig | None = None
    layout: AdapterLayout | None = None
    streams: Streams = field(default_factory=InOrder)
    slots: list[_Slot] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    rank: int = 0  # of this process, among those that compute together
    num_woken: int = 0  # copies into slots, since the start

    def __post_init__(self) -> None:
        self._loaded: dict[str, LoadedAdapter] = {}
        self._loading: dict[str, LoadedAdapter] = {}
        self._numbers, self._uses = itertools.count(1), itertools.count(1)
        self._arriving: list[Event] = []

    @classmethod
    def of(cls, weights: Weights, slots: Tensor | None, images: Tensor | None) -> Adapters:
        """Make the adapters of an engine whose slots and images are these bytes, (nbytes,) uint8 each."""
        layout, streams = weights.plan.adapters, streams_of(weights.device)
        if layout is None:
            return cls()
        assert slots is not None and images is not None, "a plan with adapters has places for them"
        issued, dtype = streams.record(COMPUTE), layout.dtype
        whole = [_Slot(each, issued) for each in slots.view(dtype).split(layout.slot_nbytes // dtype.itemsize)]
        filled = list(images.view(dtype).split(len(whole[0].values)))
        return cls(weights.config, layout, streams, whole, filled, weights.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """Return what requests may ask for, in the order in which they were loaded."""
        return tuple(self._loaded)

    def find(self, name: str) -> LoadedAdapter:
        """Return an adapter that is loaded. Raises ValueError for one that is not."""
        if name not in self._loaded:
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise ValueError(f"there is no adapter {name!r}; loaded are: {known}")
        return self._loaded[name]

    def salt_of(self, name: str | None, salt: Hashable) -> Hashable:
        """Return under what prefixes are cached that are computed with an adapter, or without.

        Raises ValueError for an adapter that is not loaded.
        """
        return salt if name is None else (self.find(name).number, salt)

    def by_layer(self) -> list[dict[str, LowRank]]:
        """Return the matrices of all slots, by layer and product."""
        if self.layout is None:
            return []
        first, numel = self.slots[0].values, len(self.slots[0].values)
        slots = first.as_strided((len(self.slots), numel), (numel, 1))
        return [self._matrices(slots, self.layout, layer) for layer in range(len(self.layout.layers))]

    def _matrices(self, slots: Tensor, layout: AdapterLayout, layer: int) -> dict[str, LowRank]:
        unit, begin, itemsize = layout.layers[layer], layout.segments[layer].offset_nbytes, layout.dtype.itemsize
        views = {}
        for part in unit.fields:
            start = (begin + unit.segments()[part.name].offset_nbytes) // itemsize
            views[part.name] = slots[:, start : start + part.numel].unflatten(1, part.shape)
        return {
            name: LowRank(views[f"{name}_a"], views[f"{name}_b"], layout.sizes[name])
            for name in PRODUCTS
            if f"{name}_a" in views
        }

    # --- loading ---

    def load(self, name: str, adapter: Adapter | Path | str) -> None:
        """Read an adapter into host memory, a directory or one that is opened, for requests that name it.

        Raises ValueError for a name that is taken, what ``open_adapter`` refuses, a rank above that of slots, and where
        host memory holds as many adapters as were planned; nothing is changed then.
        """
        opened = adapter if isinstance(adapter, Adapter) else self.open(adapter)
        reserved = self.reserve(name, opened)
        try:
            self.fill(reserved, opened)
        except BaseException:
            self.abandon(reserved)
            raise
        self.publish(reserved)

    def open(self, directory: Path | str) -> Adapter:
        """Read what a directory says of its adapter; any thread may. Raises ValueError as ``open_adapter`` does."""
        if self.config is None:
            raise ValueError("this engine has no slots for adapters: make it with adapter_slots")
        return open_adapter(directory, self.config)

    def reserve(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Take a name and an image for an adapter that was opened here. Raises ValueError as ``load`` does."""
        assert self.layout is not None, "see `open`"
        if not name or name in self._loaded or name in self._loading:
            raise ValueError(f"expected a new name for an adapter, found {name!r}, which is taken")
        check_rank(name, adapter, self.layout.rank)
        taken = {other.image for other in (*self._loaded.values(), *self._loading.values())}
        image = next((image for image in range(len(self.images)) if image not in taken), None)
        if image is None:
            raise ValueError(
                f"adapter {name!r}: host memory holds {len(self.images)} adapters, as planned: unload one, or raise "
                "host_adapters"
            )
        self._loading[name] = LoadedAdapter(name, next(self._numbers), image)
        return self._loading[name]

    @hold_files()
    def fill(self, reserved: LoadedAdapter, adapter: Adapter) -> None:
        """Read values into the image that was reserved; any thread may do this. Raises what reading does."""
        assert self.layout is not None
        source, image = AdapterSource(adapter, self.layout.rank), self.images[reserved.image].view(torch.uint8)
        for unit, segment in zip(self.layout.layers, self.layout.segments, strict=True):
            fill(Store(unit, 0, image[segment.offset_nbytes : segment.end_nbytes], self.rank), source)

    def publish(self, reserved: LoadedAdapter) -> None:
        """Have requests find an adapter whose image is filled."""
        self._loaded[reserved.name] = self._loading.pop(reserved.name)

    def abandon(self, reserved: LoadedAdapter) -> None:
        """Give up what was reserved, and could not be filled."""
        del self._loading[reserved.name]

    def unload(self, name: str) -> None:
        """Forget an adapter; its image may be another's then.

        Raises ValueError where there is none, or while it has requests. Blocks the CPU while it is being copied.
        """
        adapter = self.find(name)
        if adapter.num_requests:
            raise ValueError(
                f"adapter {name!r} has {adapter.num_requests} requests: cancel them, or wait for their end, before it "
                "is unloaded"
            )
        if adapter.arrived is not None:
            self.streams.synchronize(adapter.arrived)
        if adapter.slot is not None:
            self.slots[adapter.slot].holder = None
        del self._loaded[name]

    # --- slots ---

    def may_run(self, adapter: LoadedAdapter) -> bool:
        """Return whether the adapter has a slot, or may take one."""
        return adapter.slot is not None or self._spare() is not None

    def pin(self, adapter: LoadedAdapter) -> int:
        """Return the number of the adapter's slot as rows have it, from 1 on; it stays there until ``unpin``."""
        if adapter.slot is None:
            self._wake(adapter)
        assert adapter.slot is not None
        adapter.num_running += 1
        return adapter.slot + 1

    def unpin(self, adapter: LoadedAdapter) -> None:
        """End one running request's use of its adapter."""
        adapter.num_running -= 1
        adapter.last_use = next(self._uses)

    def _spare(self) -> int | None:
        """Return a free slot, or the one that was unused for longest; None where running requests use all."""

        def last_use(slot: int) -> int:
            holder = self.slots[slot].holder
            return 0 if holder is None else holder.last_use

        unused = [i for i, slot in enumerate(self.slots) if slot.holder is None or not slot.holder.num_running]
        return min(unused, key=last_use, default=None)

    def _wake(self, adapter: LoadedAdapter) -> None:
        """Issue the copy of an adapter, see [Note: adapters on their way]."""
        found = self._spare()
        assert found is not None, "see `may_run`"
        slot = self.slots[found]
        if slot.holder is not None:
            slot.holder.slot = None
        slot.holder, adapter.slot = adapter, found
        self.streams.wait(HOST_TO_DEVICE, slot.last_step)
        with self.streams.on(HOST_TO_DEVICE):
            slot.values.copy_(self.images[adapter.image], non_blocking=True)
        adapter.arrived = self.streams.record(HOST_TO_DEVICE)
        self._arriving.append(adapter.arrived)
        self.num_woken += 1

    def lose_slots(self) -> None:
        """Rely on no byte of slots, which others have written, or will: before work that is issued from now on.

        No request may be running.
        """
        issued = self.streams.record(COMPUTE) if self.slots else None
        for slot in self.slots:
            if slot.holder is not None:
                assert not slot.holder.num_running, f"adapter {slot.holder.name!r} has requests that run"
                slot.holder.slot, slot.holder = None, None
            slot.last_step = issued

    # --- steps ---

    def await_copies(self) -> None:
        """Have the step that is issued next wait on the device for all adapters that are on their way."""
        for event in self._arriving:
            self.streams.wait(COMPUTE, event)
        self._arriving.clear()

    def launched(self, slots: set[int]) -> None:
        """Note that the step which was just issued reads ``slots``, by their numbers to rows."""
        done = self.streams.record(COMPUTE)
        for number in slots:
            self.slots[number - 1].last_step = done

    def check_integrity(self, running: Mapping[LoadedAdapter, int]) -> None:
        """Raise RuntimeError unless slots and adapters agree, and ``running`` is who uses them."""
        held = {slot.holder: i for i, slot in enumerate(self.slots) if slot.holder is not None}
        said = {adapter: adapter.slot for adapter in self._loaded.values() if adapter.slot is not None}
        used = {adapter: adapter.num_running for adapter in self._loaded.values() if adapter.num_running}
        if held != said or used != dict(running) or not used.keys() <= held.keys():
            raise RuntimeError(f"slots hold {held}, adapters say {said}; running {dict(running)}, counted {used}")


def check_rank(name: str, adapter: Adapter, most: int) -> None:
    """Raise ValueError for an adapter of a rank above that of slots."""
    if adapter.rank > most:
        raise ValueError(f"adapter {name!r} has rank {adapter.rank}, slots have {most}: raise adapter_rank")


def with_adapters(options: EngineOptions, adapters: Mapping[str, Adapter]) -> EngineOptions:
    """Say how many slots and images there are, of which rank, where the options leave it to the adapters given.

    Raises ValueError for more adapters, or a larger rank, than the options have room for.
    """
    if not adapters:
        return options
    slots = options.adapter_slots or min(len(adapters), MAX_SLOTS_BY_DEFAULT)
    rank = options.adapter_rank or max(DEFAULT_RANK, *(adapter.rank for adapter in adapters.values()))
    images = options.host_adapters or max(slots, len(adapters))
    for name, adapter in adapters.items():
        check_rank(name, adapter, rank)
    if len(adapters) > images:
        raise ValueError(f"{len(adapters)} adapters are given, host_adapters are {images}: raise it, or give fewer")
    return replace(options, adapter_slots=slots, adapter_rank=rank, host_adapters=images)
