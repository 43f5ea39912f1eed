"""This process's place among the ranks: joining and leaving the process group, with torchrun and without.

Owns the process group and the choice of device. Knows nothing of models or files.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = datetime.timedelta(minutes=10)  # of one collective; the first step compiles, rank 0 may tokenize
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and the mesh of all ranks."""

    rank: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return self.mesh.size()

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of `values`, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of `values`, in place."""
        return self.sum(values).div_(self.size)


def rank_from_environment() -> int:
    """This process's rank before there is a process group; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """If `wanted`, torch has only kernels that give the same bits each time, or RuntimeError, until this is left.

    To be entered before CUDA starts. cuBLAS picks a workspace per call, and the order of its sums goes by what it got;
    with workspaces of one size only (eight of 4 MiB), it has no choice. That is set in the environment, which it reads
    once.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS_WORKSPACE)
    os.environ[CUBLAS_WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        if before[1] is None:
            del os.environ[CUBLAS_WORKSPACE]
        else:
            os.environ[CUBLAS_WORKSPACE] = before[1]


def join(device_type: str, timeout: datetime.timedelta = TIMEOUT) -> World:
    """Start the process group that torchrun (or SLURM through it) describes, or one of this process alone.

    "auto" takes GPUs where the host has one for each of its ranks. Host memory travels over gloo in any case.
    `timeout` is that of one collective.
    """
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_devices = torch.cuda.device_count()
    if device_type == "auto":
        device_type = "cuda" if num_devices >= local_size else "cpu"
    if device_type == "cuda" and local_size > num_devices:
        raise ValueError(
            f"device cuda: this host starts {local_size} ranks and has {num_devices} GPUs; start fewer ranks, or say "
            "--device=cpu"
        )
    device, backend = torch.device("cpu"), "gloo"
    if device_type == "cuda":
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    return World(dist.get_rank(), device, mesh)


def leave() -> None:
    """End the process group; harmless where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
