"""The transport between ranks of one host that can map each other's memory: copies, and one kernel that adds.

An all-gather pulls every peer's shard with the copy engine, which takes no multiprocessor. A reduce-scatter pulls every
peer's chunk of the gradients likewise, and one kernel adds them up in fp32 in order of rank and writes the gradient
shard. Nothing else crosses the link, and multicast is never used.

[Note: who waits for whom]
Shards change only at an update, so all-gathers have no barrier of their own: there are two before the first one of a
forward (nobody reads the old shards any more; all have written the new ones), and two around an update that writes
shards. Gradients change all the time: there is a barrier before a reduction pulls (all have written theirs) and one
after that (all have pulled, so that the slot may be written again). Streams wait (``signals.py``); the CPU does not.

On CPUs the same transport runs over files in memory, with the group's own barriers.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.comm.mapped_memory import MappedMemory, copy_all
from yafsdp_like.kernels.reduce import ReduceTable
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, aligned
from yafsdp_like.memory.streams import REDUCE, Recording
from yafsdp_like.memory.vmm import obstacle as mapping_obstacle

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Reduction


class Obstacle(StrEnum):
    """Why ranks cannot map each other's memory; the value is what is printed."""

    SEVERAL_HOSTS = "the ranks are on several hosts"
    SHARED_GPU = "several ranks share one GPU"
    NO_PEER_ACCESS = "the GPUs cannot read each other's memory, or do not see each other"


class PeerTransport:
    """Ranks that read each other's memory. ``mapped.connect`` must have been given all inputs' blocks."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, reason: str) -> None:
        self.rank, self.world_size = group.rank(), group.size()
        self.description = f"peer: {reason}"
        self.everybody = group
        self.mapped = MappedMemory(group, device)
        self._device = device

    def all_gather(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        in_place: Collection[int] = (),
        scratch: torch.Tensor | None = None,
    ) -> AllGather:
        """See ``Transport``.

        Each rank pulls from the next rank first, so that all links are busy and no rank is read by all at once. What is
        on this rank already, and not in place, is copied beside that, by another copy engine.
        """
        pieces = [
            (out.view(self.world_size, -1), self.mapped.of_all_ranks(inp), index in in_place)
            for index, (out, inp) in enumerate(zip(outputs, inputs, strict=True))
            if out.numel()
        ]
        others = [(self.rank + step) % self.world_size for step in range(1, self.world_size)]
        pulls = [(chunks[rank], by_rank[rank]) for rank in others for chunks, by_rank, _ in pieces]
        own = [(chunks[self.rank], by_rank[self.rank]) for chunks, by_rank, is_there in pieces if not is_there]
        branches = [partial(copy_all, copies) for copies in (pulls, own) if copies]
        return Recording(self._device, branches) if branches else lambda: None

    def reduce_scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        scratch: torch.Tensor,
    ) -> ReduceScatter:
        """See ``Transport``.

        Peers' chunks are pulled into ``scratch`` by the copy engine, as many at a time as fit, and added up there: a
        kernel that reads them over the link would hold its multiprocessors several times as long.
        """
        rounds = self._rounds(outputs, inputs, dtypes, scratch)
        runs: dict[tuple[float, bool], Callable[[], None]] = {}

        def run(reduction: Reduction, accumulate: bool) -> None:
            divisor = reduction.pre_divisor * reduction.post_divisor * (self.world_size if reduction.mean else 1)
            key = (1.0 / divisor, accumulate)
            if key not in runs:
                runs[key] = Recording(self._device, [partial(self._run_rounds, rounds, *key)])
            for r in rounds:
                r.find_outputs()
            runs[key]()

        return run

    def _run_rounds(self, rounds: Sequence[_Round], scale: float, accumulate: bool) -> None:
        self.mapped.stream_barrier(REDUCE)
        for number, r in enumerate(rounds, 1):
            copy_all(r.pulls)
            if number == len(rounds):
                self.mapped.stream_barrier(REDUCE)
            for dtype, table in r.tables:
                table.reduce(scale, dtype, accumulate)

    def _rounds(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        scratch: torch.Tensor,
    ) -> list[_Round]:
        """Divide chunks into rounds that fit ``scratch``: pieces of chunks, in order, each as large as still fits."""
        rounds: list[list[_Piece]] = [[]]
        free_nbytes = scratch.numel()
        for out, inp, dtype in zip(outputs, inputs, dtypes, strict=True):
            by_rank = self.mapped.of_all_ranks(inp.view(self.world_size, -1)[self.rank])
            start = 0
            while start < out.numel():
                most = free_nbytes // (self.world_size - 1) // ALIGNMENT_NBYTES * ALIGNMENT_NBYTES // inp.itemsize
                stop = min(out.numel(), start + most)
                if stop == start:
                    assert rounds[-1], f"{scratch.numel()} bytes of scratch hold not even the start of one chunk"
                    rounds.append([])
                    free_nbytes = scratch.numel()
                    continue
                rounds[-1].append(_Piece(out, start, [chunk[start:stop] for chunk in by_rank], dtype))
                free_nbytes -= (self.world_size - 1) * aligned((stop - start) * inp.itemsize)
                start = stop
        return [_Round.of(pieces, self.rank, scratch) for pieces in rounds if pieces]


@dataclass(frozen=True)
class _Piece:
    """Some elements of one parameter's chunk: where their sum goes, every rank's own, and what it is rounded to."""

    output: torch.Tensor  # (>= start + n,): wherever that is when the sum is made
    start: int
    by_rank: list[torch.Tensor]  # (n,) each
    dtype: torch.dtype


@dataclass(frozen=True)
class _Round:
    """Pieces that fit the scratch memory together: copies into it, and then one kernel per combination of dtypes."""

    pulls: list[tuple[torch.Tensor, torch.Tensor]]
    tables: list[tuple[torch.dtype, ReduceTable]]

    @classmethod
    def of(cls, pieces: Sequence[_Piece], rank: int, scratch: torch.Tensor) -> _Round:
        """Give each piece its place in ``scratch``."""
        pulls, offset = [], 0
        by_dtypes: dict[tuple[torch.dtype, ...], list[tuple[_Piece, list[torch.Tensor]]]] = {}
        for piece in pieces:
            here = list(piece.by_rank)
            for peer, theirs in enumerate(piece.by_rank):
                if peer != rank:
                    nbytes = theirs.numel() * theirs.itemsize
                    here[peer] = scratch[offset : offset + nbytes].view(theirs.dtype)
                    pulls.append((here[peer], theirs))
                    offset += aligned(nbytes)
            key = (piece.output.dtype, here[0].dtype, piece.dtype)
            by_dtypes.setdefault(key, []).append((piece, here))
        tables = []
        for (_, _, dtype), found in by_dtypes.items():
            inputs = list(map(list, zip(*(here for _, here in found), strict=True)))
            table = ReduceTable([piece.output for piece, _ in found], inputs, [piece.start for piece, _ in found])
            tables.append((dtype, table))
        return cls(pulls, tables)

    def find_outputs(self) -> None:
        """Note where gradient shards are now."""
        for _, table in self.tables:
            table.find_outputs()


def obstacle(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Say why the ranks of ``group`` cannot map each other's memory; None if they can. Called by all ranks together."""
    identities = all_gather_object((_host(), _gpu(device)), group)
    if len({host for host, _ in identities}) > 1:
        return Obstacle.SEVERAL_HOSTS
    why = next(filter(None, all_gather_object(mapping_obstacle(device), group)), None)
    if why is not None or device.type == "cpu":
        return why
    if len(set(identities)) < len(identities):
        return Obstacle.SHARED_GPU
    reachable = all_gather_object(_reaches_all(device, [gpu for _, gpu in identities]), group)
    return None if all(reachable) else Obstacle.NO_PEER_ACCESS


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _reaches_all(device: torch.device, gpus: Sequence[str]) -> bool:
    """Return whether this process sees the GPUs with these identities, and its own can map the memory of each."""
    visible = {_gpu(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    mine = visible[_gpu(device)]
    return all(
        gpu in visible and (visible[gpu] == mine or torch.cuda.can_device_access_peer(mine, visible[gpu]))
        for gpu in gpus
    )
