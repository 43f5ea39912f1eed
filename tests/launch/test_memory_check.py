"""What is free is known before anything is allocated, and what does not fit is refused in one line."""

# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import build, config, memory_check
from launch.memory_check import Allocation, MemoryDemand
from launch.recipe import recipe_of
from launch.world import World
from tests.launch.test_train import file, refused_here, text, train, world_here, written_to
from tests.ranks import on_ranks, run_ranks
from yafsdp_like.checkpoint.steps import HostCopy
from yafsdp_like.comm.consistency import AgreedError
from yafsdp_like.memory import arena
from yafsdp_like.memory import room as memory_room
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.plan import Region
from yafsdp_like.memory.room import free_nbytes

ROOT = Path(__file__).parents[2]
CPU, GIB = torch.device("cpu"), 1 << 30


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 20 GiB available and no control groups."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {20 * GIB // 1024} kB\n")
    monkeypatch.setattr(memory_room, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory_room, "CGROUPS", tmp_path / "cgroup")
    return tmp_path


def limit(directory: Path, names: tuple[str, str], most: object, used: int, files: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{most}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 0\n")


V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_a_host_without_control_groups_has_what_is_available(host: Path) -> None:
    assert free_nbytes(CPU) == 20 * GIB


def test_the_smallest_limit_of_a_control_group_and_those_above_it_counts(host: Path) -> None:
    (host / "proc" / "self" / "cgroup").write_text("0::/slurm/job_7\n")
    limit(host / "cgroup" / "slurm" / "job_7", V2, "max", 1 * GIB)
    limit(host / "cgroup" / "slurm", V2, 8 * GIB, 3 * GIB, files=GIB)
    assert free_nbytes(CPU) == 6 * GIB
    limit(host / "cgroup" / "slurm" / "job_7", V2, 4 * GIB, 3 * GIB)
    assert free_nbytes(CPU) == 1 * GIB
    limit(host / "cgroup" / "slurm" / "job_7", V2, 4 * GIB, 5 * GIB)
    assert free_nbytes(CPU) == 0


def test_inside_a_container_its_own_group_is_the_root(host: Path) -> None:
    (host / "proc" / "self" / "cgroup").write_text("0::/\n")
    limit(host / "cgroup", V2, 2 * GIB, GIB)
    assert free_nbytes(CPU) == GIB


def test_older_control_groups_count_too(host: Path) -> None:
    (host / "proc" / "self" / "cgroup").write_text("7:cpu:/a\n3:memory:/docker/x\n0::/\n")
    limit(host / "cgroup" / "memory", V1, 9223372036854771712, GIB)
    assert free_nbytes(CPU) == 20 * GIB
    limit(host / "cgroup" / "memory" / "docker" / "x", V1, 3 * GIB, GIB)
    assert free_nbytes(CPU) == 2 * GIB


def test_where_the_system_says_nothing_nothing_is_refused(host: Path) -> None:
    (host / "proc" / "meminfo").unlink()
    assert free_nbytes(CPU) is None
    arena.refuse_what_the_host_cannot_hold(1 << 50)


def test_an_arena_that_the_host_cannot_hold_is_refused_for_all_ranks_of_this_host(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RuntimeError, match=r"21\.00 GiB on each of 1 ranks .* and 20\.00 GiB are free; shard over more"
    ):
        Arena(CPU).reserve([Region("a", "main_shard", 21 * GIB)])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"6\.00 GiB on each of 4 ranks of this host"):
        Arena(CPU).reserve([Region("a", "main_shard", 6 * GIB)])


# --- a run ---


def with_free(free: dict[int, int], arguments: list[str]) -> str:
    """The words that a run fails with where this rank finds so much memory free."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_check, "free_nbytes", lambda device: free[dist.get_rank()])
        return refused_here(arguments)


def test_the_8b_configuration_is_refused_before_anything_is_allocated_and_told_what_fits(tmp_path: Path) -> None:
    arguments = [str(ROOT / "configs" / "8b.yaml"), "--device=cpu", f"--output_dir={tmp_path / 'run'}"]
    words, others = run_ranks(with_free, {0: 25 * GIB, 1: 24 * GIB}, arguments)
    assert words == others and "\n" not in words
    assert re.search(
        r"^training needs 68\.14 GiB a rank \(memory plan 23\.27 GiB, gradients 14\.96 GiB, "
        r"AdamW's moments 29\.92 GiB\) × 2 ranks on \S+ = 136\.28 GiB, and 24\.00 GiB are free: "
        r"take \d+ such hosts, of 2 ranks each or --model\.preset=1b$",
        words,
    )
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_checkpoint_s_copy_counts_too_and_can_be_left_out(file: Path) -> None:
    mib = 1 << 20
    words = run_ranks(with_free, {0: 7 * mib // 2, 1: 7 * mib // 2}, [str(file), "--model.overrides.dim=96"])[0]
    assert "a checkpoint's copy on its way to the disk" in words and "--checkpoint.asynchronous=false" in words


def copied_and_counted(arguments: list[str]) -> tuple[int, int]:
    """Bytes of a copy of what a checkpoint has after a step, and as they were counted before anything was allocated."""
    options, world = config.load(arguments), world_here()
    model: Any = build.build_model(recipe_of(options.model, options.seed), options, world)
    [demand] = memory_check._demands(model, options, world)
    model.to_empty(device=world.device)
    model.init_weights()
    optimizer = build.build_optimizer(model, options, world)
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    copy = HostCopy()
    copy.take((model.state_dict(), [[state["exp_avg"], state["exp_avg_sq"]] for state in optimizer.state.values()]))
    return sum(t.nbytes for t in copy._copies), {part.name: part.nbytes for part in demand.parts}[memory_check.COPY]


@pytest.mark.parametrize("split", ["true", "false"])
def test_a_checkpoint_s_copy_has_the_values_however_they_are_kept(file: Path, split: str) -> None:
    arguments = [str(file), "--precision.param_dtype=bfloat16", f"--precision.split_master={split}"]
    [(copied, counted)] = run_ranks(copied_and_counted, arguments, world_size=1)
    assert 0 < copied == counted


@on_ranks()
def test_gpus_are_counted_one_by_one_and_ranks_of_a_host_together() -> None:
    world, rank = world_here(), dist.get_rank()
    parts = (Allocation("memory plan", 6 * GIB, 4 * GIB),)
    memory_check._check([MemoryDemand(f"GPU {rank}", 8 * GIB, parts)], world, lambda demand, count: [])
    with pytest.raises(AgreedError, match=r"6\.00 GiB a rank .* × 2 ranks on host = 12\.00 GiB, and 8\.00 GiB"):
        memory_check._check([MemoryDemand("host", 8 * GIB, parts)], world, lambda demand, count: [])


def test_what_fits_is_trained(file: Path) -> None:
    assert len(train(file, "--num_steps=1")) == 1
