"""What this process finds around it: versions, GPUs, links, limits of the system, and variables that change speed.

Reads only. What cannot be read is None, and never an error: a machine without GPUs, nvidia-smi or Triton has less to
say. Knows nothing of what is wrong with it: see `findings.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch

Value = TypeVar("Value")

PACKAGES = ("torch", "triton", "numpy", "deepspeed", "transformers", "yafsdp_like")
VARIABLES = ("PYTORCH_", "TORCH_", "NCCL_", "CUDA_", "OMP_", "MKL_", "GLOO_", "YAFSDP_")  # how those we show start
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # parts of names whose values are not shown
SMI_SECONDS = 8.0
SMI_FIELDS = {  # of nvidia-smi, by our names
    "driver": "driver_version",
    "clock_mhz": "clocks.sm",
    "max_clock_mhz": "clocks.max.sm",
    "ecc": "ecc.mode.current",
    "ecc_errors": "ecc.errors.uncorrected.volatile.total",
    "persistence": "persistence_mode",
    "link_width": "pcie.link.width.current",
    "max_link_width": "pcie.link.width.max",
    "bus": "pci.bus_id",
}
PROC, SYS, SHM = Path("/proc"), Path("/sys"), "/dev/shm"


@dataclass(frozen=True)
class Gpu:
    """One GPU as this process sees it; what nvidia-smi does not say is None."""

    name: str
    total_nbytes: int
    free_nbytes: int
    reads: tuple[int, ...]  # other visible GPUs whose memory it can read
    driver: str | None = None
    clock_mhz: str | None = None
    max_clock_mhz: str | None = None
    ecc: str | None = None
    ecc_errors: str | None = None
    persistence: str | None = None
    link_width: str | None = None
    max_link_width: str | None = None
    bus: str | None = None
    numa_node: int | None = None
    links: str | None = None  # to the other GPUs of the host, as `nvidia-smi topo -m` names them


@dataclass(frozen=True)
class Surroundings:
    """One rank's."""

    host: str
    rank: int
    num_ranks_here: int  # that torchrun started on this host
    versions: dict[str, str | None]
    variables: dict[str, str]
    gpus: tuple[Gpu, ...]
    has_driver: bool  # nvidia-smi is there, or the driver's files
    num_cores: int  # this process may use, control groups included
    num_threads: int  # of torch
    memlock_nbytes: int | None  # None: no limit
    shm_free_nbytes: int | None
    hugepages: str | None  # transparent ones: always, madvise or never
    governor: str | None  # of the first core
    numa_nodes: int  # that this process may run on


def surroundings(rank: int) -> Surroundings:
    """Look around. Raises nothing for what is missing or broken."""
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Surroundings(
        host=platform.node(),
        rank=rank,
        num_ranks_here=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        versions=versions(),
        variables=variables(),
        gpus=gpus(),
        has_driver=shutil.which("nvidia-smi") is not None or (PROC / "driver" / "nvidia").exists(),
        num_cores=num_cores(),
        num_threads=torch.get_num_threads(),
        memlock_nbytes=None if memlock == resource.RLIM_INFINITY else memlock,
        shm_free_nbytes=or_none(lambda: shutil.disk_usage(SHM).free),
        hugepages=chosen(SYS / "kernel" / "mm" / "transparent_hugepage" / "enabled"),
        governor=text_of(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        numa_nodes=num_numa_nodes(),
    )


def or_none(read: Callable[[], Value]) -> Value | None:
    """Return what `read` does, or None where it fails."""
    try:
        return read()
    except Exception:
        return None


def versions() -> dict[str, str | None]:
    """Of Python, of packages, and of what torch was built with."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: or_none(functools.partial(metadata.version, name)) for name in PACKAGES}
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    found["nccl"] = or_none(lambda: ".".join(map(str, torch.cuda.nccl.version())))
    found["driver"] = (smi_rows() or ({},))[0].get("driver")
    return found


def variables() -> dict[str, str]:
    """Environment variables that torch, NCCL, CUDA and this package read; secrets are not shown."""
    return {
        name: "(not shown)" if any(part in name for part in SECRETS) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES)
    }


# --- GPUs ---


def gpus() -> tuple[Gpu, ...]:
    """Return all visible GPUs; none where CUDA does not start."""
    count = or_none(torch.cuda.device_count) or 0
    return tuple(gpu for gpu in (or_none(functools.partial(_gpu, index, count)) for index in range(count)) if gpu)


def _gpu(index: int, count: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    reads = tuple(i for i in range(count) if i != index and torch.cuda.can_device_access_peer(index, i))
    row = next((row for row in smi_rows() if row.get("uuid", "").endswith(str(found.uuid))), {})
    named = {name: row.get(name) for name in SMI_FIELDS}
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(found.name, total, free, reads, **named, numa_node=_numa_node(row.get("bus")), links=_links(row))


@functools.cache
def smi_rows() -> tuple[dict[str, str], ...]:
    """Return what nvidia-smi says of every GPU of the host; nothing without it, or where it does not answer."""
    fields = ["uuid", "index", *SMI_FIELDS]
    asked = ",".join(["uuid", "index", *SMI_FIELDS.values()])
    lines = _smi(f"--query-gpu={asked}", "--format=csv,noheader,nounits").splitlines()
    values = ([part.strip() for part in line.split(",")] for line in lines)
    return tuple(dict(zip(fields, row, strict=True)) for row in values if len(row) == len(fields))


@functools.cache
def topology() -> dict[str, str]:
    """Return, by GPU (GPU0, ...), how it reaches the others, such as `NV18`; empty without nvidia-smi."""
    rows = [line.split("\t") for line in _smi("topo", "-m").splitlines()]
    table = [[cell.strip() for cell in row] for row in rows if row and row[0].strip().startswith("GPU")]
    count = len(table)
    return {row[0]: " ".join(cell for cell in row[1 : count + 1] if cell and cell != "X") for row in table}


def _links(row: dict[str, str]) -> str | None:
    return topology().get(f"GPU{row['index']}") or None if "index" in row else None


def _smi(*arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout if ran.returncode == 0 else ""


def _numa_node(bus: str | None) -> int | None:
    if bus is None:
        return None
    domain, _, rest = bus.lower().partition(":")
    text = text_of(SYS / "bus" / "pci" / "devices" / f"{domain[-4:]}:{rest}" / "numa_node")
    return int(text) if text is not None and text.lstrip("-").isdigit() and int(text) >= 0 else None


# --- the system ---


def num_cores() -> int:
    """Return how many cores this process may keep busy, by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (text_of(SYS / "fs" / "cgroup" / "cpu.max") or "max").partition(" ")
    return cores if quota == "max" or not period else max(1, min(cores, round(int(quota) / int(period))))


def num_numa_nodes() -> int:
    """Return how many nodes of memory have cores that this process may run on; 1 where that is not known."""
    allowed = or_none(lambda: os.sched_getaffinity(0)) or set()
    lists = [text_of(path) or "" for path in (SYS / "devices" / "system" / "node").glob("node[0-9]*/cpulist")]
    return max(1, sum(bool(cores_of(text) & allowed) for text in lists))


def cores_of(text: str) -> set[int]:
    """Read the kernel's lists of cores, such as `0-3,8`."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def text_of(path: Path) -> str | None:
    """Return a file's text; None where it cannot be read."""
    text = or_none(lambda: path.read_text(encoding="utf-8").strip())
    return text or None


def chosen(path: Path) -> str | None:
    """Return the choice in brackets of a file of the kernel's, such as `always [madvise] never`."""
    text = text_of(path) or ""
    return text.partition("[")[2].partition("]")[0] or None


def as_json(found: Surroundings) -> dict[str, object]:
    """Return plain values."""
    return dataclasses.asdict(found)
