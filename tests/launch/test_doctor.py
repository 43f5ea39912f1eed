"""The doctor measures what is there, says what is not, and names what is set up badly with its fix."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import doctor, doctor_words, findings, host_cost, probes, surroundings
from launch.doctor import FINE, INTERRUPTED, PROBLEM, UNMEASURED
from launch.surroundings import Gpu, Surroundings
from launch.world import World
from tests.ranks import run_ranks
from tests.training import world_mesh
from yafsdp_like import hardware
from yafsdp_like.hardware import H200_MACHINE, MACHINE_VARIABLE, MachineRates

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
HERE = Surroundings(
    host="one",
    rank=0,
    num_ranks_here=2,
    versions={"python": "3.12", "torch": "2.11", "cuda": "13.0", "nccl": "2.28", "triton": "3.6", "driver": "580"},
    variables={},
    gpus=(),
    has_driver=False,
    num_cores=16,
    num_threads=4,
    memlock_nbytes=None,
    shm_free_nbytes=8 * GIB,
    hugepages="madvise",
    governor=None,
    numa_nodes=1,
)
GPU = Gpu("NVIDIA H200", 140 * GIB, 139 * GIB, (1,))


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this probe is broken")


def report_here(*broken_on_the_last_rank: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_cost, "STEPS", 1)
        for name in broken_on_the_last_rank if dist.get_rank() == dist.get_world_size() - 1 else ():
            patch.setattr(probes, name, broken)
        patch.setattr(surroundings, "_smi", lambda *_: "not, what\nnvidia-smi, says")
        surroundings.smi_rows.cache_clear()
        report = doctor.report_of(World(dist.get_rank(), torch.device("cpu"), world_mesh()))
    return {**report, "text": doctor_words.as_text(report, 1.0), "json": json.dumps(doctor.as_json(report))}


def test_two_ranks_agree_on_all_and_a_broken_probe_is_a_line_that_names_its_rank() -> None:
    first, second = run_ranks(report_here, "kernel_seconds", "attention_rate")
    assert first["rates"] == second["rates"] and first["status"] == second["status"] != UNMEASURED
    names = [rate.name for rate in first["rates"].collectives]
    assert names == ["all_gather"] * 3 + ["reduce_scatter"] * 3
    values = [first["rates"].memory_nbytes, first["rates"].product_flops, first["rates"].unit_s]
    assert all(value > 0 for value in values)
    assert "all_gather of 4.00 MiB" in first["text"] and "only when asked for" in first["text"]
    assert json.loads(first["json"])["rates"]["num_ranks"] == 2
    assert first["not_measured"]["kernel_s"] == "RuntimeError: this probe is broken (rank 1)"
    assert first["text"].count("this probe is broken") == second["text"].count("this probe is broken") == 2
    assert first["rates"].kernel_s is not None  # rank 0's


def test_a_machine_whose_memory_cannot_be_measured_has_a_status_of_its_own() -> None:
    (report,) = run_ranks(report_here, "copy_rate", world_size=1)
    assert report["status"] == UNMEASURED


def test_no_probe_begins_after_its_time() -> None:
    found = doctor.Probed(begin=-doctor.SECONDS)
    found.probe("late", lambda: 1)
    assert found.values == {} and "left out" in found.failures["late"]


@pytest.mark.slow
def test_the_command_measures_prints_and_stores_rates_without_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MACHINE_VARIABLE, str(tmp_path / "deep" / "rates.json"))
    command = [sys.executable, "-m", "launch.doctor", f"--json={tmp_path / 'all.json'}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    report = json.loads((tmp_path / "all.json").read_text())
    assert ran.returncode == report["status"] and report["status"] in (FINE, PROBLEM), ran.stderr
    stored = MachineRates.load(tmp_path / "deep" / "rates.json")
    assert stored.memory_nbytes == report["rates"]["memory_nbytes"]
    assert hardware.machine_rates("a machine").memory_nbytes == stored.memory_nbytes
    assert "rates are in" in ran.stdout and "status" in ran.stdout


def test_what_stops_the_doctor_altogether_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.world.join", broken)
    assert doctor.main([]) == UNMEASURED
    assert capsys.readouterr().err == "error: nothing could be measured: RuntimeError: this probe is broken\n"


def test_an_interrupt_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any) -> World:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.world.join", interrupt)
    assert doctor.main([]) == INTERRUPTED
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variables": {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "b:1"}}, "contradict each other"),
        ({"variables": {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}}, "cudaMallocAsync"),
        ({"variables": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}, "asks the driver"),
        ({"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}, "CUDA_LAUNCH_BLOCKING"),
        ({"variables": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}, "none overlap"),
        ({"variables": {"TORCH_NCCL_BLOCKING_WAIT": "1"}}, "every collective"),
        ({"variables": {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}}, "DETAIL"),
        ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "NCCL_P2P_DISABLE=1"),
        ({"variables": {"NCCL_P2P_LEVEL": "LOC"}}, "through host memory"),
        ({"num_threads": 16}, "2 ranks of 16 threads on 16 cores"),
        ({"num_cores": 1, "num_threads": 1}, "share 1 cores"),
        ({"shm_free_nbytes": 64 << 20}, "/dev/shm has 64.00 MiB free"),
        ({"has_driver": True}, "sees no GPU"),
        ({"gpus": (GPU,), "versions": {**HERE.versions, "triton": None}}, "Triton is missing"),
        ({"gpus": (dataclasses.replace(GPU, ecc_errors="3"),)}, "3 uncorrected memory errors"),
        ({"gpus": (dataclasses.replace(GPU, link_width="8", max_link_width="16"),)}, "8 of 16 PCIe lanes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_problem_is_found_with_its_fix(changes: dict[str, Any], words: str) -> None:
    rates = MachineRates("x86_64", "measured")
    assert findings.findings_of([HERE], rates, None) == []
    found = findings.findings_of([dataclasses.replace(HERE, **changes)], rates, None)
    assert [f.level for f in found if words in f.words] == ["problem"], found
    assert all(f.fix for f in found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variables": {"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"}}, "leaves expandable segments off"),
        ({"variables": {"NCCL_ALGO": "Ring"}}, "NCCL_ALGO=Ring"),
        ({"variables": {"NCCL_DEBUG": "INFO"}}, "prints"),
        ({"num_threads": 1}, "one thread a rank"),
        ({"governor": "powersave"}, "powersave"),
        ({"gpus": (GPU,), "hugepages": "never"}, "huge pages are off"),
        ({"gpus": (GPU,), "memlock_nbytes": 8 << 20}, "8.00 MiB of memory may be locked"),
        ({"gpus": (GPU,), "numa_nodes": 2}, "2 memory nodes"),
        ({"gpus": (dataclasses.replace(GPU, free_nbytes=100 * GIB),)}, "40.00 GiB of GPU 0 are used"),
        ({"gpus": (dataclasses.replace(GPU, persistence="Disabled"),)}, "persistence"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_worth_knowing_is_a_note_and_no_problem(changes: dict[str, Any], words: str) -> None:
    found = findings.findings_of([dataclasses.replace(HERE, **changes)], MachineRates("x86_64", "measured"), None)
    assert [f.level for f in found if words in f.words] == ["note"] and {f.level for f in found} == {"note"}, found


def test_ranks_with_different_versions_are_named() -> None:
    other = dataclasses.replace(HERE, rank=1, versions={**HERE.versions, "torch": "2.12"})
    (found,) = findings.findings_of([HERE, other], MachineRates("x86_64", "measured"), None)
    assert found.words == "ranks have different versions of torch: 2.11 on rank 0; 2.12 on rank 1"


def test_an_obstacle_between_gpus_is_a_problem_and_so_is_a_slow_link() -> None:
    slow = dataclasses.replace(H200_MACHINE, to_host_nbytes=20e9)
    found = findings.findings_of([HERE], slow, "several ranks share one GPU")
    assert [f.words for f in found] == [
        "copies to pinned host memory reach 20 of 52 G/s",
        "transport 'auto' takes collectives between these GPUs: several ranks share one GPU",
    ]


def test_gpus_are_described_from_what_nvidia_smi_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "--query-gpu": "GPU-1-2, 0, 580.95, 1980, 1980, Enabled, 0, Enabled, 16, 16, 00000000:0B:00.0\n",
        "topo": "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n\nLegend:\n",
    }
    monkeypatch.setattr(surroundings, "_smi", lambda first, *_: answers[first.partition("=")[0]])
    surroundings.smi_rows.cache_clear()
    surroundings.topology.cache_clear()
    try:
        (row,) = surroundings.smi_rows()
        assert row["driver"] == "580.95" and row["uuid"] == "GPU-1-2" and row["bus"] == "00000000:0B:00.0"
        assert surroundings.topology() == {"GPU0": "NV18", "GPU1": "NV18"}
    finally:
        surroundings.smi_rows.cache_clear()
        surroundings.topology.cache_clear()


def test_cores_are_read_as_the_kernel_lists_them() -> None:
    assert surroundings.cores_of("0-2,8,10-11") == {0, 1, 2, 8, 10, 11}


def test_secrets_in_variables_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YAFSDP_LIKE_API_KEY", "hush")
    assert "hush" not in surroundings.variables().values()
