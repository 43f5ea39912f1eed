"""Which transport the ranks of a mesh dimension use, and why. Asked once per group, by all of its ranks."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist

from yafsdp_like.comm.peer import PeerTransport, obstacle
from yafsdp_like.comm.process_group import ProcessGroupTransport
from yafsdp_like.comm.transport import Transport

TransportName = Literal["auto", "peer", "process_group"]

# Keyed by the group object, so that groups of a process's former life are never met again.
_chosen: dict[tuple[dist.ProcessGroup, str], Transport] = {}


def transport_of(group: dist.ProcessGroup, device: torch.device, asked: TransportName) -> Transport:
    """The transport for ``group``, on whose ranks the shards are on ``device``'s type of device.

    "auto" takes peer memory between GPUs that can map each other's, and the process group otherwise. Raises
    ``ValueError`` for an unknown name, and on every rank when "peer" was asked for and is not possible.
    """
    if asked not in get_args(TransportName):
        raise ValueError(f"transport must be one of {list(get_args(TransportName))}, got {asked!r}")
    if (group, asked) not in _chosen:
        _chosen[group, asked] = _choose(group, device, asked)
    return _chosen[group, asked]


def _choose(group: dist.ProcessGroup, device: torch.device, asked: str) -> Transport:
    if group.size() == 1:
        return ProcessGroupTransport(group, "one rank")
    if asked == "process_group":
        return ProcessGroupTransport(group, "asked for")
    if asked == "auto" and device.type != "cuda":
        return ProcessGroupTransport(group, f"on {device.type}, peer memory is used only when asked for")
    why_not = obstacle(group, device)
    if why_not is None:
        return PeerTransport(group, device, "asked for" if asked == "peer" else f"{group.size()} GPUs of one host")
    if asked == "peer":
        raise ValueError(f"transport='peer' is not possible: {why_not}; use transport='auto'")
    return ProcessGroupTransport(group, why_not)
