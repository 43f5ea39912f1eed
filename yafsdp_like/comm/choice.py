"""Which transport the ranks of a mesh dimension use, and why. Asked once per group, by all of its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
import torch.distributed as dist

from yafsdp_like.comm import TransportName
from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.comm.hierarchical import HierarchicalTransport, over_hosts
from yafsdp_like.comm.peer import PeerTransport, obstacle
from yafsdp_like.comm.process_group import ProcessGroupTransport
from yafsdp_like.comm.replicated import ReplicatedTransport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from yafsdp_like.comm.transport import Transport

# Keyed by the group object, so that groups that were destroyed are never found again.
_chosen: dict[tuple[dist.ProcessGroup, str], Transport] = {}
_replicated: dict[tuple[dist.ProcessGroup, dist.ProcessGroup, str], Transport] = {}


def transport_over(mesh: DeviceMesh, device: torch.device, asked: TransportName) -> Transport:
    """Return the transport for units sharded over the last dimension of ``mesh``, and replicated over a first of two.

    See ``transport_of``. If replicas would choose different transports inside, all take the process group.
    """
    if mesh.ndim == 1 or mesh.size(0) == 1:
        return transport_of(mesh.get_group(mesh.ndim - 1), device, asked)
    groups = mesh.get_group(0), mesh.get_group(1)
    if (*groups, asked) not in _replicated:
        # Comparisons between ranks block the CPU, so they go through host memory, over no communicator of the GPUs.
        ranks = mesh.mesh.flatten().tolist()
        everybody = dist.new_group(ranks, backend="gloo", use_local_synchronization=True, group_desc="yafsdp_replicas")
        assert everybody is not None
        shards = _same_in_all_replicas(*groups, device, asked)
        _replicated[*groups, asked] = ReplicatedTransport(shards, groups[0], everybody)
    return _replicated[*groups, asked]


def _same_in_all_replicas(
    replicas: dist.ProcessGroup, group: dist.ProcessGroup, device: torch.device, asked: TransportName
) -> Transport:
    """Return the transport inside this replica, of the same kind in all of them.

    What replicas hold, and when they average it, depends on the kind.
    """
    found: Transport | None = None
    error: str | None = None
    try:
        found = transport_of(group, device, asked)
    except ValueError as e:
        error = str(e)
    kinds = all_gather_object((type(found).__name__, error), replicas)
    errors = [e for _, e in kinds if e is not None]
    if found is None or errors:
        raise ValueError(errors[0])
    if len(set(kinds)) > 1:
        return ProcessGroupTransport(group, "the ranks of another replica have only this")
    return found


def transport_of(group: dist.ProcessGroup, device: torch.device, asked: TransportName) -> Transport:
    """Return the transport for ``group``, whose ranks keep their shards on ``device``'s type of device.

    "auto" takes "peer" between GPUs of one host that can map each other's memory, and the process group otherwise, also
    over several hosts: "hierarchical" has not run on real hosts, so it must be asked for by name. Raises
    ``ValueError`` for an unknown name, and on every rank when a transport was asked for and is not possible.
    """
    if asked not in get_args(TransportName):
        raise ValueError(f"transport must be one of {list(get_args(TransportName))}, got {asked!r}")
    if (group, asked) not in _chosen:
        _chosen[group, asked] = _choose(group, device, asked)
    return _chosen[group, asked]


def transport_within(group: dist.ProcessGroup, num_ranks: int) -> Transport:
    """Return the transport among the ``num_ranks`` of ``group`` that this rank is one of, which follow each other.

    To be called by all ranks of ``group``, which ``num_ranks`` divides.
    """
    name = f"{num_ranks} ranks"
    if (group, name) not in _chosen:
        ranks, first = dist.get_process_group_ranks(group), group.rank() // num_ranks * num_ranks
        within = dist.new_group(
            ranks[first : first + num_ranks], use_local_synchronization=True, group_desc="yafsdp_forward"
        )
        _chosen[group, name] = ProcessGroupTransport(within, "between forward and backward")
    return _chosen[group, name]


def _choose(group: dist.ProcessGroup, device: torch.device, asked: str) -> Transport:
    if group.size() == 1:
        return ProcessGroupTransport(group, "one rank")
    if asked == "process_group":
        return ProcessGroupTransport(group, "asked for")
    if asked == "auto" and device.type != "cuda":
        return ProcessGroupTransport(group, f"on {device.type}, peer memory is used only when asked for")
    why_not = obstacle(group, device)
    if why_not is None and asked != "hierarchical":
        return PeerTransport(group, device, "asked for" if asked == "peer" else f"{group.size()} GPUs of one host")
    if asked == "hierarchical":
        found = over_hosts(group, device, "asked for")
        if isinstance(found, HierarchicalTransport):
            return found
        why_not = found
    assert why_not is not None
    if asked != "auto":
        raise ValueError(f"transport={asked!r} is not possible: {why_not}; use transport='auto'")
    return ProcessGroupTransport(group, why_not)
