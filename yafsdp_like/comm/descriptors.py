"""Memory that the processes of one host map of each other: its file descriptors, sent over sockets.

Owns nothing that lives longer than the exchange, which blocks the CPU, once per block of memory.
"""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.vmm import MappedRange, PhysicalMemory, map_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch.distributed as dist

_AT_ONCE = 64  # descriptors of a message; a process may have few open
_TIMEOUT_SECONDS = 120.0  # a rank that failed sends nothing more


def exchange_memory(mine: PhysicalMemory, group: dist.ProcessGroup) -> list[PhysicalMemory]:
    """Import the memory of every rank, by rank; this rank's is ``mine``.

    Called by all ranks together, with memory of the same size and granule. Raises ``OSError`` on a rank that another
    does not answer.
    """
    found = [mine if rank == group.rank() else mine.of_peer() for rank in range(group.size())]
    with _connections(group) as connections:
        for step in range(1, group.size()):
            to = connections[(group.rank() + step) % group.size()]
            source = (group.rank() - step) % group.size()
            _exchange(mine, to, found[source], connections[source])
    return found


def map_all_ranks(mine: PhysicalMemory, group: dist.ProcessGroup) -> list[MappedRange]:
    """Map the whole memory of every rank into this process, by rank; see ``exchange_memory``."""
    return [map_range([(memory, Segment(0, memory.nbytes))]) for memory in exchange_memory(mine, group)]


def _exchange(mine: PhysicalMemory, to: socket.socket, theirs: PhysicalMemory, source: socket.socket) -> None:
    """Send and receive one message at a time, so that few descriptors are open."""
    for start in range(0, mine.num_descriptors, _AT_ONCE):
        sent = mine.export_descriptors(start, min(start + _AT_ONCE, mine.num_descriptors))
        with _closing(sent):
            socket.send_fds(to, [b"."], sent)
        _, received, _, _ = socket.recv_fds(source, 1, _AT_ONCE)
        with _closing(received):
            if len(received) != len(sent):
                raise OSError(f"expected {len(sent)} file descriptors from another rank, received {len(received)}")
            theirs.import_descriptors(received)


@contextmanager
def _closing(descriptors: Sequence[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def _connections(group: dist.ProcessGroup) -> Iterator[dict[int, socket.socket]]:
    """Connect a socket to each other rank, for both directions: the lower of two ranks listens, the higher connects."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="yafsdp_")))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "socket"))
        listener.listen(group.size())
        listener.settimeout(_TIMEOUT_SECONDS)
        addresses: list[str] = all_gather_object(str(folder / "socket"), group)
        found: dict[int, socket.socket] = {}
        for rank in range(group.rank()):
            found[rank] = stack.enter_context(socket.socket(socket.AF_UNIX))
            found[rank].settimeout(_TIMEOUT_SECONDS)
            found[rank].connect(addresses[rank])
            found[rank].sendall(group.rank().to_bytes(4))
        for _ in range(group.rank() + 1, group.size()):
            caller, _ = listener.accept()
            stack.enter_context(caller)
            caller.settimeout(_TIMEOUT_SECONDS)
            found[int.from_bytes(caller.recv(4, socket.MSG_WAITALL))] = caller
        yield found
