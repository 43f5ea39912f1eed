"""The transport of one shard dimension over several hosts: peers inside each host, a process group between hosts.

Rank ``h * L + l`` is the ``l``-th of host ``h``; its column is what the ranks of its number have on all hosts, ``H``
chunks of each parameter. An all-gather copies every column to one rank of each host, whose peers then pull it: each
byte crosses to a host once, and not once for each of its ranks. A reduce-scatter goes the other way: peers add up their
gradients of each column inside the host, and only the sums cross. Both parts are transports of their own
(``PeerTransport``, ``ProcessGroupTransport``); this file owns the order of the two, and the columns between them.

Sums inside a host are in fp32 and in order of rank, rounded once to the dtype in which they cross. Between hosts the
collective adds them in that dtype.

[Note: columns]
A gathered column lies in scratch memory that peers map, the same for all units. So the ranks of a host issue two
barriers to the stream of every all-gather: one before a column is written, behind which every peer has pulled the
columns of the all-gather before it; and one before columns are pulled, behind which every peer has written its own.
Compute shards, which nobody else on the host reads, need no barrier. The columns of sums are this rank's alone: its one
reduction stream writes them, and then reads them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from yafsdp_like.comm import peer
from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.comm.process_group import ProcessGroupTransport
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.streams import GATHER

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Reduction, Transport


class HierarchicalTransport:
    """``inside`` between the ranks of this host, ``across`` between those of this rank's number on every host."""

    def __init__(self, group: dist.ProcessGroup, inside: Transport, across: Transport) -> None:
        self.rank, self.world_size = group.rank(), group.size()
        self.num_hosts = across.world_size
        self.description = f"{self.num_hosts} hosts; in each, {inside.description}; between them, {across.description}"
        self.everybody = group
        self._inside, self._across = inside, across
        assert inside.mapped is not None, "the ranks of a host must map each other's memory"
        self.mapped = inside.mapped.over_hosts(self.num_hosts)

    def all_gather(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        in_place: Collection[int] = (),
        scratch: torch.Tensor | None = None,
    ) -> AllGather:
        """See ``Transport``, and [Note: columns] for the barriers."""
        assert scratch is not None, "a column must lie where peers of this host read it"
        assert not in_place, "a slot aliases no shard here: a column comes between"
        columns = self._columns(inputs, [i.dtype for i in inputs], scratch)
        to_column = self._across.all_gather(columns, inputs)
        to_slot = self._inside.all_gather(self._by_host(outputs), self._by_host(columns))

        def run() -> None:
            self.mapped.stream_barrier(GATHER)
            to_column()
            self.mapped.stream_barrier(GATHER)
            to_slot()

        return run

    def reduce_scatter(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        dtypes: Sequence[torch.dtype],
        scratch: torch.Tensor,
    ) -> ReduceScatter:
        """See ``Transport``; the end of ``scratch`` holds the column of sums, the rest is for what is pulled."""
        nbytes = self.mapped.column_nbytes([o.numel() * d.itemsize for o, d in zip(outputs, dtypes, strict=True)])
        pulled, summed = scratch[: scratch.numel() - nbytes], scratch[scratch.numel() - nbytes :]
        columns = self._columns(outputs, dtypes, summed)
        to_column = self._inside.reduce_scatter(
            self._by_host(columns), self._by_host(inputs), [d for d in dtypes for _ in range(self.num_hosts)], pulled
        )
        to_shard = self._across.reduce_scatter(outputs, columns, dtypes, summed)

        def run(reduction: Reduction, accumulate: bool) -> None:
            to_column(replace(reduction, post_divisor=1.0), False)
            to_shard(replace(reduction, pre_divisor=1.0), accumulate)

        return run

    def _columns(
        self, chunks: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], scratch: torch.Tensor
    ) -> list[torch.Tensor]:
        """Cut from ``scratch``, for each chunk, ``(n,)``, a column of its dtype, ``(num_hosts * n,)``."""
        columns, offset = [], 0
        for chunk, dtype in zip(chunks, dtypes, strict=True):
            nbytes = self.num_hosts * chunk.numel() * dtype.itemsize
            assert offset + nbytes <= scratch.numel(), f"{scratch.numel()} bytes of scratch do not hold the column"
            columns.append(scratch[offset : offset + nbytes].view(dtype))
            offset += aligned(nbytes)
        return columns

    def _by_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Cut each tensor into its parts, of one host after the other."""
        return [part for tensor in tensors for part in tensor.view(self.num_hosts, tensor.numel() // self.num_hosts)]


def over_hosts(group: dist.ProcessGroup, device: torch.device, reason: str) -> HierarchicalTransport | str:
    """Return the transport for ``group``, or why it is not possible; called by all ranks together."""
    hosts = all_gather_object(peer._host(), group)
    per_host = hosts.count(hosts[0])
    if (irregular := _irregular(hosts)) is not None:
        return irregular
    ranks, (host, place) = dist.get_process_group_ranks(group), divmod(group.rank(), per_host)
    inside = _group_of(ranks[host * per_host : (host + 1) * per_host], "yafsdp_inside_host")
    across = _group_of(ranks[place::per_host], "yafsdp_across_hosts")
    obstacles = [o for o in all_gather_object(peer.obstacle(inside, device), group) if o is not None]
    if obstacles:
        return f"on a host, {obstacles[0]}"
    return HierarchicalTransport(
        group,
        peer.PeerTransport(inside, device, f"{per_host} ranks"),
        ProcessGroupTransport(across, reason),
    )


def _irregular(hosts: Sequence[str]) -> str | None:
    """Say what is wrong with the ranks' hosts; None if there are several, each of as many consecutive ranks."""
    num_hosts, per_host = len(set(hosts)), hosts.count(hosts[0])
    if num_hosts == 1:
        return "all ranks are on one host"
    if per_host == 1 and num_hosts == len(hosts):
        return "every rank is on a host of its own"
    if list(hosts) != [hosts[r - r % per_host] for r in range(len(hosts))] or num_hosts * per_host != len(hosts):
        return f"hosts do not have the same number of consecutive ranks: {_runs(hosts)}"
    return None


def _runs(hosts: Sequence[str]) -> str:
    """Say how many consecutive ranks are on which host; hosts are numbered in order of appearance."""
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return ", ".join(f"{len(list(run))} on host {numbers[host]}" for host, run in groupby(hosts))


def _group_of(ranks: Sequence[int], description: str) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=description)
    assert group is not None
    return group
