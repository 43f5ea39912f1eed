"""What is set up badly, of all that `surroundings.py` and the probes found, each with its fix.

Every check is a function of plain values. A problem costs speed or breaks runs, and makes the doctor end with status 1;
a note is worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from launch.surroundings import Surroundings
from yafsdp_like.hardware import MachineRates, published_rates
from yafsdp_like.memory.allocator import SETTINGS
from yafsdp_like.memory.plan import readable

MIN_SHM_NBYTES = 512 << 20
MAX_FOREIGN_NBYTES = 4 << 30  # of a GPU's memory: contexts of all ranks of the host, and their communicators
SLOW = 0.7  # of what a device is known to do
NCCL_LEFT_BEHIND = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_MAX_NCHANNELS", "NCCL_MIN_NCHANNELS", "NCCL_BUFFSIZE")
SAME_VERSIONS = ("python", "torch", "cuda", "nccl", "triton", "driver", "yafsdp_like")


@dataclass(frozen=True)
class Finding:
    """Something to change, or to know: what was found, and what to do about it."""

    level: Literal["problem", "note"]
    words: str
    fix: str

    def __str__(self) -> str:
        return f"{self.level}: {self.words}; fix: {self.fix}"


def problem(words: str, fix: str) -> Finding:
    """Return what costs speed or breaks runs."""
    return Finding("problem", words, fix)


def note(words: str, fix: str) -> Finding:
    """Return what is worth knowing."""
    return Finding("note", words, fix)


def findings_of(everyone: Sequence[Surroundings], rates: MachineRates, obstacle: str | None) -> list[Finding]:
    """Return all findings over all ranks, each once, problems first.

    `obstacle`: why ranks of one host do not read each other's memory; None where they do, or where that is no wish.
    """
    found = [f for here in everyone for check in CHECKS for f in check(here)]
    found += [*differences(everyone), *slow_rates(rates)]
    if obstacle is not None:
        found.append(problem(f"transport 'auto' takes collectives between these GPUs: {obstacle}", OBSTACLE_FIX))
    return sorted(dict.fromkeys(found), key=lambda f: f.level != "problem")


OBSTACLE_FIX = (
    "let every rank see all GPUs of the host (no CUDA_VISIBLE_DEVICES per rank), start one rank a GPU, and install "
    "cuda-bindings; between GPUs without peer access there is nothing to mend"
)


def allocator(here: Surroundings) -> Iterator[Finding]:
    """Settings of PyTorch's allocator."""
    given = {name: here.variables[name] for name in SETTINGS if here.variables.get(name)}
    if len(set(given.values())) > 1:
        yield problem(
            f"{' and '.join(f'{name}={value}' for name, value in given.items())} contradict each other",
            "set PYTORCH_ALLOC_CONF only, or neither",
        )
    for name, value in given.items():
        if "cudaMallocAsync" in value:
            yield problem(
                f"{name} chooses the backend cudaMallocAsync, which has no expandable segments and no snapshots",
                f"unset {name}",
            )
        elif "expandable_segments:True" not in value:
            yield note(
                f"{name}={value} leaves expandable segments off, which fully_shard would turn on: activations of "
                "varying lengths fragment",
                f"add expandable_segments:True to {name}, or unset it",
            )
        elif "max_split_size_mb" in value:
            yield note(f"{name}={value}: expandable segments are not split by size", "leave max_split_size_mb out")
    if here.variables.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "0") != "0":
        yield problem("PYTORCH_NO_CUDA_MEMORY_CACHING asks the driver for every tensor", "unset it")


def launching(here: Surroundings) -> Iterator[Finding]:
    """Variables that make the CPU wait, or the device do one thing at a time."""
    found = here.variables
    if found.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        yield problem("CUDA_LAUNCH_BLOCKING makes the CPU wait for every kernel", "unset it")
    if found.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        yield problem(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 queues copies and collectives behind compute kernels, so that none overlap",
            "unset it (it is for tensor parallelism of other frameworks)",
        )
    if found.get("TORCH_NCCL_BLOCKING_WAIT", "0") != "0":
        yield problem("TORCH_NCCL_BLOCKING_WAIT makes the CPU wait for every collective", "unset it")
    if found.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper() == "DETAIL":
        yield problem("TORCH_DISTRIBUTED_DEBUG=DETAIL checks every collective over gloo first", "unset it")


def nccl(here: Surroundings) -> Iterator[Finding]:
    """Variables of NCCL that are left over from looking for a fault elsewhere."""
    found = here.variables
    for name, what in (
        ("NCCL_P2P_DISABLE", "sends between GPUs of one host through host memory"),
        ("NCCL_SHM_DISABLE", "sends between processes of one host through sockets where GPUs cannot read each other"),
        ("NCCL_IB_DISABLE", "leaves InfiniBand and RoCE unused between hosts"),
    ):
        if found.get(name, "0") != "0":
            yield problem(f"{name}={found[name]} {what}", f"unset {name}")
    if found.get("NCCL_P2P_LEVEL") == "LOC":
        yield problem("NCCL_P2P_LEVEL=LOC sends between GPUs of one host through host memory", "unset NCCL_P2P_LEVEL")
    if found.get("NCCL_SOCKET_IFNAME") == "lo" and found.get("NCCL_IB_DISABLE", "0") == "0":
        yield note("NCCL_SOCKET_IFNAME=lo reaches this host only", "name the interface to the other hosts")
    if found.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        yield note(f"NCCL_DEBUG={found['NCCL_DEBUG']} prints at every communicator", "NCCL_DEBUG=WARN, or unset it")
    for name in NCCL_LEFT_BEHIND:
        if name in found:
            yield note(
                f"{name}={found[name]} takes a choice from NCCL that it makes by size and links", f"unset {name}"
            )


def processor(here: Surroundings) -> Iterator[Finding]:
    """Threads, cores and clocks of the host."""
    threads = here.num_threads * here.num_ranks_here
    if threads > here.num_cores:
        yield problem(
            f"{here.num_ranks_here} ranks of {here.num_threads} threads on {here.num_cores} cores",
            f"OMP_NUM_THREADS={max(1, here.num_cores // here.num_ranks_here)}",
        )
    elif threads * 4 <= here.num_cores and here.num_threads == 1:
        yield note(
            f"one thread a rank, and {here.num_cores} cores for {here.num_ranks_here} ranks: what is offloaded to the "
            "host is updated by one of them",
            f"OMP_NUM_THREADS={max(1, here.num_cores // here.num_ranks_here // 2)} where an optimizer runs on the host",
        )
    if here.num_cores < here.num_ranks_here:
        yield problem(
            f"{here.num_ranks_here} ranks share {here.num_cores} cores, and each launches its own kernels",
            "give the job a core a rank at least",
        )
    if here.governor == "powersave":
        yield note("the processor's governor is powersave", "cpupower frequency-set -g performance")
    if here.gpus and here.numa_nodes > 1 and here.num_ranks_here > 1:
        yield note(
            f"ranks may run on any of {here.numa_nodes} memory nodes; copies from the far one are slower",
            "start each rank with numactl --cpunodebind --membind of its GPU's node",
        )


def system(here: Surroundings) -> Iterator[Finding]:
    """Limits of the system and of containers."""
    if here.memlock_nbytes is not None and here.memlock_nbytes < 1 << 30 and here.gpus:
        yield note(
            f"at most {readable(here.memlock_nbytes)} of memory may be locked: InfiniBand needs more, and some drivers "
            "for pinned host memory",
            "ulimit -l unlimited (docker: --ulimit memlock=-1)",
        )
    if here.shm_free_nbytes is not None and here.shm_free_nbytes < MIN_SHM_NBYTES and here.num_ranks_here > 1:
        yield problem(
            f"/dev/shm has {readable(here.shm_free_nbytes)} free, which NCCL and data loaders of several ranks share",
            "docker: --shm-size=8g, or --ipc=host",
        )
    if here.hugepages == "never" and here.gpus:
        yield note(
            "transparent huge pages are off, and pinning takes longer in small pages",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )


def devices(here: Surroundings) -> Iterator[Finding]:
    """GPUs that are not seen, not alone, or not well."""
    if here.has_driver and not here.gpus:
        build = here.versions.get("cuda")
        yield problem(
            f"there is a driver, and torch {here.versions.get('torch')} sees no GPU",
            "install a build of torch with CUDA" if build is None else "check CUDA_VISIBLE_DEVICES and the driver",
        )
    if here.gpus and here.versions.get("triton") is None:
        yield problem("Triton is missing: updates and reductions run as many small kernels", "pip install triton")
    for index, gpu in enumerate(here.gpus):
        used = gpu.total_nbytes - gpu.free_nbytes
        if used > MAX_FOREIGN_NBYTES:
            yield note(
                f"{readable(used)} of GPU {index} are used by other processes", "nvidia-smi names them; end them"
            )
        if (gpu.ecc_errors or "").isdigit() and int(gpu.ecc_errors or 0):
            yield problem(f"GPU {index} has {gpu.ecc_errors} uncorrected memory errors", "reset or replace it")
        if gpu.link_width and gpu.max_link_width and gpu.link_width != gpu.max_link_width:
            yield problem(
                f"GPU {index} uses {gpu.link_width} of {gpu.max_link_width} PCIe lanes",
                "reseat it, or try another slot",
            )
        if gpu.persistence == "Disabled":
            yield note(f"GPU {index} has no persistence mode: contexts take longer to make", "nvidia-smi -pm 1")


CHECKS: tuple[Callable[[Surroundings], Iterator[Finding]], ...] = (
    allocator,
    launching,
    nccl,
    processor,
    system,
    devices,
)


def differences(everyone: Sequence[Surroundings]) -> Iterator[Finding]:
    """Versions, and GPUs, that are not the same on all ranks."""
    for name in SAME_VERSIONS:
        yield from _difference(name, {here.rank: here.versions.get(name) for here in everyone})
    kinds = {here.rank: ", ".join(sorted({gpu.name for gpu in here.gpus})) or "none" for here in everyone}
    yield from _difference("GPU", kinds)


def _difference(name: str, by_rank: Mapping[int, str | None]) -> Iterator[Finding]:
    ranks: dict[str | None, list[int]] = {}
    for rank, value in by_rank.items():
        ranks.setdefault(value, []).append(rank)
    if len(ranks) > 1:
        lines = "; ".join(f"{value or 'none'} on rank {', '.join(map(str, r))}" for value, r in ranks.items())
        yield problem(f"ranks have different versions of {name}: {lines}", "install the same everywhere")


def slow_rates(rates: MachineRates) -> Iterator[Finding]:
    """Measured rates far below what this device is known to do."""
    known = published_rates(rates.device)
    if known.device != rates.device:
        return
    for name, words, fix in (
        ("product_flops", "matrix products", "look for power or thermal limits: nvidia-smi -q -d PERFORMANCE"),
        ("memory_nbytes", "copies inside the device", "look for other processes on the GPU"),
        ("to_device_nbytes", "copies from pinned host memory", "check the PCIe link, and bind ranks to the GPU's node"),
        ("to_host_nbytes", "copies to pinned host memory", "check the PCIe link, and bind ranks to the GPU's node"),
        ("peer_nbytes", "copies from another GPU", "check NVLink: nvidia-smi nvlink -s"),
    ):
        found, expected = getattr(rates, name), getattr(known, name)
        if found is not None and expected is not None and found < SLOW * expected:
            yield problem(f"{words} reach {found / 1e9:,.0f} of {expected / 1e9:,.0f} G/s", fix)
