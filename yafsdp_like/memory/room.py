"""How much memory is free: on a GPU, and on this host, whose ranks share it. Reads counters; allocates nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # what older cgroups say where there is no limit is about 2^63


def free_nbytes(device: torch.device) -> int | None:
    """Return the bytes that a GPU has free, or that this host can still give; None where the system does not say.

    On a host: what processes may still take before the kernel ends one of them, which is what is available, within the
    limits of this process's control groups.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_host_rooms(), default=None)


def ranks_of_this_host() -> int:
    """Return how many ranks torchrun has started on this host; each allocates when the others do."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _host_rooms() -> Iterator[int]:
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
    for directory, names in _groups():
        room = _group_room(directory, *names)
        if room is not None:
            yield room


def _groups() -> Iterator[tuple[Path, tuple[str, str]]]:
    """This process's control groups that count memory, and all above them, with the names of limit and use."""
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.rstrip("\n").split(":", 2)
        if not controllers:
            root, names = CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = root / path.lstrip("/")
        for directory in (here, *here.parents):
            if directory.is_relative_to(root):
                yield directory, names


def _group_room(directory: Path, limit_name: str, use_name: str) -> int | None:
    """Bytes up to a group's limit, files that it may drop from memory counted as free; None without a limit."""
    limit, use = (next(iter(_lines(directory / name)), "max").strip() for name in (limit_name, use_name))
    if limit == "max" or use == "max" or int(limit) >= UNLIMITED:
        return None
    dropped = {"inactive_file", "active_file"}
    counts = (line.split() for line in _lines(directory / "memory.stat"))
    files = sum(int(count[1]) for count in counts if count[0] in dropped)
    return max(0, int(limit) - int(use) + files)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
