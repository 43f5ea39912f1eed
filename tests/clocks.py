"""A race detector for streams: vector clocks in their place, and a check that events order all accesses to memory.

`VectorClocks` replaces the engine's streams and keeps, per stream, up to which operation of each other stream it has
waited; a peer's streams are among them, where ranks read each other's memory. `RaceDetector` sees every operation,
notes which bytes of the watched storages it reads and writes on which stream, and reports a race where it touches bytes
that another stream may still be writing (or writes bytes that another may still be reading). Everything runs in program
order on the CPU, so numbers are right even where a race is found: a GPU might have run the operations in another order.

One rank stands for all, since ranks do the same: a peer's stream has waited for mine as far as mine has for the peer's,
and where this rank reads a peer's memory, the peer reads this rank's.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from yafsdp_like.memory.streams import COMPUTE, SIDE_STREAMS
from yafsdp_like.ops.split_master import SplitTensor

Clock = dict[str, int]
PEER = "peer's "
CPU = "cpu"  # whose own accesses to host memory no event orders, but only its waiting
STREAMS = [f"{whose}{stream}" for whose in ("", PEER) for stream in (COMPUTE, *SIDE_STREAMS, CPU)]
Omission = tuple[str, str, int]  # in which work; "wait" or "stream_barrier"; the how manieth of these in it


def mirrored(stream: str) -> str:
    """The same stream on the other side: the peer's for this rank's, and the other way round."""
    return stream.removeprefix(PEER) if stream.startswith(PEER) else PEER + stream


@dataclass(frozen=True)
class Stamp:
    """An event: its stream, and that stream's clock when it was recorded."""

    stream: str
    clock: Clock


class VectorClocks:
    """The engine's streams.

    `forgets` lists pairs (waiting stream, stream of the event) whose waits are left out; `omits` is one wait or barrier
    that is left out wherever its work is done.
    """

    def __init__(self, forgets: Sequence[tuple[str, str]] = (), omits: Omission | None = None) -> None:
        self.clocks: dict[str, Clock] = {s: dict.fromkeys(STREAMS, 0) for s in (COMPUTE, *SIDE_STREAMS, CPU)}
        self.current = COMPUTE
        self.forgets = set(forgets)
        self.omits = omits
        self.waits: dict[tuple[str, str], int] = {}
        self._work, self._done = "", Counter[str]()

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        outer, self.current = self.current, stream
        yield
        self.current = outer

    @contextlib.contextmanager
    def work(self, name: str) -> Iterator[None]:
        """Name what runs inside, for `omits`."""
        outer = self._work, self._done
        self._work, self._done = name, Counter()
        yield
        self._work, self._done = outer

    def record(self, stream: str) -> Stamp:
        return Stamp(stream, dict(self.clocks[stream]))

    def wait(self, stream: str, event: Stamp) -> None:
        pair = (stream, event.stream)
        self.waits[pair] = self.waits.get(pair, 0) + 1
        if pair not in self.forgets and not self._is_omitted("wait"):
            self._learn(stream, event.clock)

    def synchronize(self, event: Stamp) -> None:
        """The CPU waits, and everything that it issues later comes after it."""
        for stream in self.clocks:
            self._learn(stream, event.clock)

    def is_complete(self, event: Stamp) -> bool:
        """Never known: what must be waited for is."""
        return False

    def stream_barrier(self, stream: str) -> None:
        """The stream waits for the same one of the peer, which has come as far and waits likewise."""
        if not self._is_omitted("stream_barrier"):
            self._learn(stream, {mirrored(other): time for other, time in self.clocks[stream].items()})

    def _is_omitted(self, kind: str) -> bool:
        self._done[kind] += 1
        return (self._work, kind, self._done[kind]) == self.omits

    def _learn(self, stream: str, clock: Clock) -> None:
        mine = self.clocks[stream]
        for other, time in clock.items():
            mine[other] = max(mine[other], time)

    def tick(self, stream: str | None = None) -> tuple[str, int]:
        """Count an operation of a stream, the current one by default; return its name and the operation's time."""
        stream = stream or self.current
        self._learn(stream, self.clocks[CPU])  # which has issued it after its own
        self.clocks[stream][stream] += 1
        return stream, self.clocks[stream][stream]

    def has_seen(self, stream: str, other: str, time: int) -> bool:
        """Whether what `stream` does now is ordered after what `other` did at `time`."""
        if stream.startswith(PEER):
            stream, other = mirrored(stream), mirrored(other)
        return self.clocks[stream][other] >= time


@dataclass(frozen=True)
class Access:
    """One operation's touch of bytes `[start, end)` of the machine's memory."""

    start: int
    end: int
    writes: bool
    stream: str
    time: int
    operation: str


class RaceDetector(TorchDispatchMode):
    """While entered, checks every operation's accesses to storages that `watches` names."""

    def __init__(self, streams: VectorClocks) -> None:
        super().__init__()
        self.streams = streams
        self.watched: list[tuple[int, int]] = []
        self.on_host: list[tuple[int, int]] = []  # of those, what the CPU accesses itself where compute seems to
        self.pages: list[tuple[int, int, int]] = []  # see _mapped_pages
        self.accesses: dict[tuple[int, int, bool, str], Access] = {}
        self.races: list[str] = []
        self.read_by_peer: list[torch.Tensor] = []  # after the next barrier, on the stream of that
        self._freed: list[torch.Tensor] = []  # and not yet taken by compute, whose next operation may write it
        self._kept: list[torch.Tensor] = []  # that were freed: their addresses are to stand for nothing else

    def watch(self, tensor: torch.Tensor, on_host: bool = False) -> None:
        storage = tensor.untyped_storage()
        self.watched.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        self.on_host += self.watched[-1:] if on_host else []
        self.pages = _mapped_pages()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_view(func):
            written = [
                a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
            ]
            written += [
                kwargs[s.name]
                for s in func._schema.arguments
                if s.name in kwargs and s.alias_info and s.alias_info.is_write
            ]
            self.note([t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)], False, str(func))
            self.note([t for t in tree_iter(written) if isinstance(t, torch.Tensor)], True, str(func))
        return func(*args, **kwargs)

    def note(self, tensors: Sequence[torch.Tensor], writes: bool, operation: str, by_peer: bool = False) -> None:
        """The current stream, or the peer's, reads or writes `tensors` in one operation."""
        if self._freed and self.streams.current == COMPUTE:
            taken, self._freed = self._freed, []
            self._kept += taken
            self.note(taken, True, "a new owner")
        stream, time = self.streams.tick()
        stream = mirrored(stream) if by_peer else stream
        wholes = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        for local in (part for whole in wholes for part in _parts(whole, writes)):
            extent = _extent(local)
            if extent is None or not _within(extent, self.watched):
                continue
            if stream == COMPUTE and _within(extent, self.on_host):
                self._check(Access(*extent, writes, *self.streams.tick(CPU), operation))
                continue
            for start, end in self._physical(*extent):
                self._check(Access(start, end, writes, stream, time, operation))

    def _physical(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the physical ranges of addresses, equal for all virtual addresses that map the same bytes."""
        is_mapped = False
        for low, high, moved in self.pages:
            if low < end and start < high:
                is_mapped = True
                yield max(start, low) + moved, min(end, high) + moved
        if not is_mapped:
            yield start, end

    def note_read_by_peer(self) -> None:
        """A barrier has said that the peer may read what waits to be read by it."""
        if self.read_by_peer:
            self.note(self.read_by_peer, False, "reduce", by_peer=True)
            self.read_by_peer = []

    def watch_new(self, tensor: torch.Tensor) -> None:
        """Watch what compute has just allocated, where the host may have had other streams' temporaries before."""
        self.watch(tensor)
        self._forget(*self.watched[-1])

    def watch_no_more(self, tensor: torch.Tensor) -> None:
        """Compute frees this memory, which the host may give to other streams' temporaries, as no device does."""
        self.note([tensor], True, "a new owner")
        start = tensor.untyped_storage().data_ptr()
        extent = start, start + tensor.untyped_storage().nbytes()
        self.watched = [one for one in self.watched if one != extent]
        self._forget(*extent)

    def _forget(self, start: int, end: int) -> None:
        self.accesses = {key: old for key, old in self.accesses.items() if old.end <= start or end <= old.start}

    def note_free(self, tensor: torch.Tensor) -> None:
        """Memory that compute has allocated goes back to the allocator, which gives it to compute again."""
        self._freed.append(tensor)

    def _check(self, new: Access) -> None:
        for old in self.accesses.values():
            conflicts = (old.writes or new.writes) and old.start < new.end and new.start < old.end
            if conflicts and old.stream != new.stream and not self.streams.has_seen(new.stream, old.stream, old.time):
                self.races.append(f"{new.operation} on {new.stream} does not wait for {old.operation} on {old.stream}")
        self.accesses[new.start, new.end, new.writes, new.stream] = new


def _within(extent: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> bool:
    return any(low <= extent[0] and extent[1] <= high for low, high in ranges)


def _mapped_pages() -> list[tuple[int, int, int]]:
    """Return ranges of addresses that map shared pages, each with its offset to the physical address."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:yafsdp_like" in line:
            span, _, offset, _, inode, *_ = line.split()
            low, high = (int(address, 16) for address in span.split("-"))
            found.append((low, high, (int(inode) << 64) + int(offset, 16) - low))
    return found


def _is_view(func: Any) -> bool:
    """Whether an operation only makes another tensor on the same bytes, or another tensor's shape."""
    returns_alias = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    return returns_alias or func._schema.name in ("aten::set_", "aten::detach", "aten::lift_fresh")


def _parts(tensor: torch.Tensor, writes: bool) -> list[torch.Tensor]:
    """Return the tensor; of a split one the halves, which are read, and not written before they are settled.

    One that is offloaded is read within the operation, once the CPU has waited.
    """
    if not isinstance(tensor, SplitTensor):
        return [tensor]
    values = tensor.split_values
    return [] if writes else [values.high] if values.is_offloaded else [values.high, values.low]


def _extent(tensor: torch.Tensor) -> tuple[int, int] | None:
    if tensor.is_meta or tensor.numel() == 0:
        return None
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.itemsize
    return start, start + reach * tensor.itemsize
