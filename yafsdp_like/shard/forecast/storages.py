"""Every tensor's memory from birth to death while something runs: a timeline of bytes, and what operations do.

Owns the mode that watches operations. It works on tensors with memory and without, and knows nothing of modules.

[Note: how storages are followed]
Each result of an operation is asked for its storage. One that was not seen before is born there, and dies when nothing
refers to it any more, which a weak reference tells: Python keeps one object for a storage as long as C++ has it. Sizes
are rounded up as PyTorch's allocator on a GPU rounds blocks, so that sums are comparable with its counters. What an
operation takes and gives back inside itself is not seen.

[Note: sums of gradients]
Where two gradients meet, autograd adds the second to the first in place, if nobody else holds it; under any mode it
adds out of place instead. So a sum that autograd itself makes, and whose first operand dies before anything else is
born, is counted as that operand.
"""

from __future__ import annotations

import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from yafsdp_like.memory.layout import aligned
from yafsdp_like.shard.forecast.known_values import KnownValues

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.shard.forecast.quantities import Phase, WorkKind

BLOCK_NBYTES = 512  # PyTorch's CUDA allocator hands out multiples of this (kMinBlockSize)
_ADD = torch.ops.aten.add.Tensor
# Products of groups of rows with a matrix each, as experts have them: how many such products one operation is.
_GROUPED = {"_grouped_mm": 1, "grouped_mm_fallback": 1, "grouped_mm_fallback_backward": 2}  # transformers' own


@dataclass(frozen=True)
class StepPlace:
    """Where in a step something happens."""

    unit: str = ""
    phase: Phase = "forward"
    category: str = "activations"  # of the memory that is taken there


@dataclass
class OperationCounts:
    """Sums over operations of one kind; see ``ModuleCost``."""

    flops: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    num_kernels: int = 0


@dataclass(frozen=True)
class BornStorage:
    """A storage: how large it is, and where it was made."""

    nbytes: int
    place: StepPlace


@dataclass
class StorageTimeline:
    """Births and deaths of storages in order. An event is a storage's number ``k`` when born and ``~k`` when dead."""

    born: list[BornStorage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    places: list[StepPlace] = field(default_factory=list)  # where each event happens
    sums: list[tuple[int, int]] = field(default_factory=list)  # numbers of autograd's sums, and of their first operands

    def birth(self, nbytes: int, place: StepPlace) -> int:
        """Note a storage of so many bytes, and return its number."""
        self.born.append(BornStorage(nbytes, place))
        self.events.append(len(self.born) - 1)
        self.places.append(place)
        return len(self.born) - 1

    def death(self, number: int, place: StepPlace) -> None:
        """Note that a storage is gone."""
        self.events.append(~number)
        self.places.append(place)

    def in_place(self) -> StorageTimeline:
        """Return the same with autograd's sums in place where a GPU's would be: see [Note: sums of gradients]."""
        position = {event: index for index, event in enumerate(self.events)}
        same: dict[int, int] = {}  # the number of a sum -> the storage that it is in
        dropped: set[int] = set()
        for total, first in self.sums:
            death = position.get(~first, -1)
            between = self.events[position[total] + 1 : death]
            if death < 0 or self.born[total].nbytes != self.born[first].nbytes or any(e >= 0 for e in between):
                continue
            same[total] = same.get(first, first)
            dropped |= {position[total], death}
        result = StorageTimeline(self.born)
        for index, event in enumerate(self.events):
            if index not in dropped:
                result.events.append(~same.get(~event, ~event) if event < 0 else event)
                result.places.append(self.places[index])
        return result

    def levels(self) -> Iterator[tuple[StepPlace, dict[str, int]]]:
        """Yield, after each event, where it happened and the live bytes by category. The dictionary is the same one."""
        live: dict[str, int] = {}
        for event, place in zip(self.events, self.places, strict=True):
            born = self.born[event if event >= 0 else ~event]
            category = born.place.category
            live[category] = live.get(category, 0) + (born.nbytes if event >= 0 else -born.nbytes)
            yield place, live


class StorageMode(TorchDispatchMode):
    """While it is entered, notes each storage that operations make, and counts what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.timeline = StorageTimeline()
        self.work: dict[tuple[str, Phase, WorkKind], OperationCounts] = {}
        self.place = StepPlace()  # of what runs now
        self.values = KnownValues()
        self._is_open = self._is_seen = True
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}  # by the storage's address: a reference, its number

    def close(self) -> None:
        """Note nothing from here on: what dies now was alive at the end."""
        self._is_open = False

    def ignore(self, tensor: Tensor) -> None:
        """Leave this tensor's storage out: it is in somebody's plan."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _: self._known.pop(key, None)), -1

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Leave out operations inside, and what they make."""
        was_seen, self._is_seen = self._is_seen, False
        try:
            yield
        finally:
            self._is_seen = was_seen

    def notice(self, tensor: Tensor) -> None:
        """Count a tensor that no operation made: an input."""
        self._note(tensor)

    def take(self, nbytes: int, category: str) -> int:
        """Note memory that something takes here without an operation; return its number."""
        place = StepPlace(self.place.unit, self.place.phase, category)
        return self.timeline.birth(aligned(nbytes, BLOCK_NBYTES), place)

    def give_back(self, number: int) -> None:
        """Note that memory which ``take`` noted is free again."""
        self.timeline.death(number, self.place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it makes and does."""
        kwargs = kwargs or {}
        out = self.values.run(func, args, kwargs)
        results = _tensors(out) if self._is_open and self._is_seen else []
        for result in results:
            number = self._note(result)
            if func is _ADD and number is not None and _is_autograds():
                first = self._known.get(args[0].untyped_storage()._cdata, (None, -1))[1]
                if first >= 0:
                    self.timeline.sums.append((number, first))
        if results and not _is_view(func):
            self._count(func, args, kwargs, out, results)
        return out

    def _note(self, tensor: Tensor) -> int | None:
        """Return the number of a storage that is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return None
        nbytes = storage.nbytes()
        number = self.timeline.birth(aligned(nbytes, BLOCK_NBYTES), self.place)

        def died(_: Any) -> None:
            self._known.pop(key, None)
            if self._is_open:
                self.timeline.death(number, self.place)

        self._known[key] = weakref.ref(storage, died), number
        return number

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        flops, kind = 0, "other"
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            kind = "attention" if "attention" in func._overloadpacket.__name__ else "matrix products"
            flops = formula(*args, **kwargs, out_val=out)
        elif num_products := _GROUPED.get(func._overloadpacket.__name__.split("::")[-1], 0):
            rows, weights = args[:2]  # (T, K) by (E, K, N), or by (T, N) for the gradient of weights
            kind, flops = "matrix products", 2 * num_products * rows.numel() * weights.shape[-1]
        operands = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        self.add_work(kind, flops, sum(map(_nbytes, operands)), sum(map(_nbytes, results)))  # type: ignore[arg-type]

    def add_work(self, kind: WorkKind, flops: int, read_nbytes: int, written_nbytes: int, num_kernels: int = 1) -> None:
        """Count operations that run here."""
        work = self.work.setdefault((self.place.unit, self.place.phase, kind), OperationCounts())
        work.flops += flops
        work.read_nbytes += read_nbytes
        work.written_nbytes += written_nbytes
        work.num_kernels += num_kernels


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in what an operation takes or gives: itself, or in tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes that an operation touches of a tensor: elements that share memory count once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


_views: dict[Any, bool] = {}


def _is_view(func: Any) -> bool:
    """Whether an operation's results are its inputs' memory, not written."""
    if func not in _views:
        schema = func._schema
        aliases = [r.alias_info for r in schema.returns if r.alias_info is not None]
        _views[func] = bool(aliases) and not any(alias.is_write for alias in aliases)
    return _views[func]


def _is_autograds() -> bool:
    """Whether the running operation was called by autograd's engine, not by Python."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py")):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"
