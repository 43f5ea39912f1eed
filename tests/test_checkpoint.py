"""Checkpoints of steps: complete or not there, on any number of ranks, whatever kills the writer."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import RankError, on_ranks, run_ranks
from yafsdp_like.checkpoint import steps
from yafsdp_like.comm.agreement import AgreedError, share, together

ROOT = Path(__file__).parent.parent
SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from yafsdp_like.checkpoint.steps import StepCheckpoints, find_latest, step_of
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
directory = Path(sys.argv[1])
checkpoints = StepCheckpoints(directory, keep=2, asynchronous=sys.argv[2] == "asynchronous")
latest = find_latest(directory)
step = 0 if latest is None else step_of(latest)
while True:
    step += 1
    checkpoints.save(step, {"x": torch.full((1000, 100), float(step))}, {"step": step})
"""


def state_of(step: int) -> dict[str, Any]:
    """A sharded matrix (7, 3) whose elements say the step, and a value of each rank's own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.arange(21.0).view(7, 3) + 100 * step
    own = {str(dist.get_rank()): torch.tensor(dist.get_rank())}
    return {"x": distribute_tensor(rows, mesh, [Shard(0)]), "rank": own}


def save_steps(directory: Path, numbers: list[int], keep: int = 10, asynchronous: bool = False) -> None:
    checkpoints = steps.StepCheckpoints(directory, keep, asynchronous)
    for step in numbers:
        checkpoints.save(step, state_of(step), {"step": step})
    checkpoints.wait()
    checkpoints.close()


def loaded(path: Path) -> torch.Tensor:
    """The matrix at `path`, whole, read into whatever ranks there are."""
    state = state_of(0)
    del state["rank"]
    steps.load_into(path, state)
    return state["x"].full_tensor()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_two_ranks_saved_one_rank_loads(asynchronous: bool, tmp_path: Path) -> None:
    run_ranks(save_steps, tmp_path, [3, 12], asynchronous=asynchronous)
    latest = steps.find_latest(tmp_path)
    assert latest == tmp_path / "step-12" and steps.read_facts(latest) == {"step": 12}
    for world_size in (1, 2):
        for result in run_ranks(loaded, latest, world_size=world_size):
            assert torch.equal(result, torch.arange(21.0).view(7, 3) + 1200)


def change_after_save(directory: Path) -> None:
    checkpoints = steps.StepCheckpoints(directory, keep=1, asynchronous=True)
    state = state_of(1)
    checkpoints.save(1, state, {})
    state["x"].to_local().zero_()
    checkpoints.wait()
    checkpoints.close()


def test_an_asynchronous_save_holds_the_values_at_the_call(tmp_path: Path) -> None:
    run_ranks(change_after_save, tmp_path)
    assert torch.equal(run_ranks(loaded, tmp_path / "step-1")[0], torch.arange(21.0).view(7, 3) + 100)


def test_the_last_k_are_kept_in_the_order_of_numbers_not_of_letters(tmp_path: Path) -> None:
    run_ranks(save_steps, tmp_path, [8, 9, 10, 11], keep=2)
    assert names(tmp_path) == ["step-10", "step-11"]


def test_what_is_not_complete_is_not_found_and_leftovers_go(tmp_path: Path) -> None:
    run_ranks(save_steps, tmp_path, [1, 2])
    (tmp_path / "step-2" / steps.FACTS).unlink()  # a copy that broke off
    for name in (".step-3.partial", ".step-1.old", "step-x", "step-9"):
        (tmp_path / name).mkdir()
    assert steps.find_latest(tmp_path) == tmp_path / "step-1"
    with pytest.raises(ValueError, match=r"step-2 is not a complete checkpoint"):
        steps.read_facts(tmp_path / "step-2")
    run_ranks(save_steps, tmp_path, [])
    assert names(tmp_path) == ["step-1", "step-2", "step-9", "step-x"]
    assert steps.find_latest(tmp_path / "nothing") is None


def fail_in_thread(directory: Path) -> str:
    """The words of the error that every rank gets when the directory goes away under an asynchronous save."""
    checkpoints = steps.StepCheckpoints(directory, keep=1, asynchronous=True)
    checkpoints._publish = fail  # type: ignore[method-assign]
    checkpoints.save(1, state_of(1), {})
    try:
        checkpoints.wait()
    except AgreedError as error:
        return str(error)
    finally:
        checkpoints.close()
    return "no error"


def fail(partial: Path, facts: steps.Facts) -> None:
    if dist.get_rank() == 0:
        raise OSError(28, "No space left on device", str(partial))


def test_a_save_that_fails_behind_training_fails_on_every_rank(tmp_path: Path) -> None:
    words = run_ranks(fail_in_thread, tmp_path)
    assert words[0] == words[1] and "No space left on device" in words[0] and "(rank 0)" in words[0]
    assert steps.find_latest(tmp_path) is None


def block_rank_1(partial: Path) -> None:
    (partial / steps.SHARDS / "__1_0.distcp").mkdir(parents=True, exist_ok=True)


def fail_in_torch(directory: Path, asynchronous: bool) -> str:
    """What every rank is told when torch cannot write one rank's file: a folder stands where it should be."""
    checkpoints = steps.StepCheckpoints(directory, keep=1, asynchronous=asynchronous)
    try:
        checkpoints.save(1, state_of(1), {}, block_rank_1)
        checkpoints.wait()
    except AgreedError as error:
        return str(error)
    finally:
        checkpoints.close()
    return "no error"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_cannot_be_written_is_one_line_that_says_where(asynchronous: bool, tmp_path: Path) -> None:
    words = run_ranks(fail_in_torch, tmp_path, asynchronous)
    assert words[0] == words[1] and "\n" not in words[0]
    assert ".step-1.partial could not be written, with " in words[0] and "(rank 1)" in words[0]


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_kill_9_at_any_moment_leaves_the_last_complete_one(mode: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    last = 0
    for seed in range(2):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), mode], env=environment)
        try:
            wait_for_step(tmp_path, last + 3, process)
            time.sleep(random.Random(seed).random() * 0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        latest = steps.find_latest(tmp_path)
        assert latest is not None and steps.step_of(latest) >= last + 3
        last = steps.step_of(latest)
        assert json.loads((latest / steps.FACTS).read_text()) == {"step": last}
        (value,) = run_ranks(load_plain, latest, world_size=1)
        assert value == last


def wait_for_step(directory: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 100
    while (latest := steps.find_latest(directory)) is None or steps.step_of(latest) < step:
        assert process.poll() is None and time.monotonic() < deadline, f"no step {step} in {names(directory)}"
        time.sleep(0.01)


def load_plain(path: Path) -> float:
    state = {"x": torch.zeros(1000, 100)}
    steps.load_into(path, state)
    assert (state["x"] == state["x"][0, 0]).all()
    return float(state["x"][0, 0])


# --- ranks that fail together ---


@on_ranks()
def test_an_error_about_input_on_one_rank_is_raised_on_all_and_nobody_is_left_waiting() -> None:
    with pytest.raises(AgreedError, match=r"no such text \(rank 1\)"), together():
        if dist.get_rank() == 1:
            raise ValueError("no such text")
    with pytest.raises(AgreedError, match=r"^the same on both$"), together():
        raise ValueError("the same on both")
    with together():
        pass
    assert share(dist.get_rank()) == [0, 1]


def raise_on_rank_1() -> None:
    with together():
        if dist.get_rank() == 1:
            raise KeyError("a mistake")


def test_a_mistake_of_ours_keeps_its_type_where_it_happened() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(raise_on_rank_1)
    assert caught.value.errors[1] == ("KeyError", "'a mistake'")
    assert caught.value.errors[0] == ("AgreedError", "KeyError: 'a mistake' (rank 1)")
