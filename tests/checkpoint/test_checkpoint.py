"""Checkpoints of steps: complete or not there, on any number of ranks, whatever kills the writer."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import RankError, on_ranks, run_ranks
from yafsdp_like.checkpoint import steps
from yafsdp_like.comm.consistency import AgreedError, all_gather_object, raise_on_all_ranks

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "2"))  # how often a writer is killed in one test
SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from yafsdp_like.checkpoint import steps
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
directory, log, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def export(path):
    x = torch.zeros(1000, 100)
    steps.load_whole(path, {"x": x})
    (path / "exported").write_text("".join(f"{value}\\n" for value in x[:, 0].tolist()))
checkpoints = steps.StepCheckpoints(directory, keep=2, asynchronous=mode == "asynchronous")
latest = steps.find_latest(directory)
step = 0 if latest is None else steps.step_of(latest)
while True:
    step += 1
    checkpoints.save(step, {"x": torch.full((1000, 100), float(step))}, {"step": step}, export)
    log.write_text(str(step))
"""


def state_of(step: int) -> dict[str, Any]:
    """A sharded matrix (7, 3) whose elements say the step, one of a single row, and a value of each rank's own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.arange(21.0).view(7, 3) + 100 * step
    own = {str(dist.get_rank()): torch.tensor(dist.get_rank())}
    row = distribute_tensor(rows[:1], mesh, [Shard(0)])
    return {"x": distribute_tensor(rows, mesh, [Shard(0)]), "row": row, "rank": own}


def save_steps(directory: Path, numbers: list[int], keep: int = 10, asynchronous: bool = False) -> None:
    checkpoints = steps.StepCheckpoints(directory, keep, asynchronous)
    for step in numbers:
        checkpoints.save(step, state_of(step), {"step": step})
    checkpoints.wait()
    checkpoints.close()


def loaded(path: Path) -> torch.Tensor:
    """The matrix at `path`, whole, read into whatever ranks there are."""
    state = state_of(0)
    del state["rank"], state["row"]
    steps.load_into(path, state)
    return state["x"].full_tensor()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_two_ranks_saved_one_rank_loads(asynchronous: bool, tmp_path: Path) -> None:
    run_ranks(save_steps, tmp_path, [3, 12], asynchronous=asynchronous)
    latest = steps.find_latest(tmp_path)
    assert latest == tmp_path / "step-12" and steps.read_run_metadata(latest) == {"step": 12}
    for world_size in (1, 2):
        for result in run_ranks(loaded, latest, world_size=world_size):
            assert torch.equal(result, torch.arange(21.0).view(7, 3) + 1200)


class Touch:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def save_trap(directory: Path, trace: Path) -> None:
    checkpoints = steps.StepCheckpoints(directory, 1, asynchronous=False)
    checkpoints.save(1, state_of(1) | {"lr": 0.5, "trap": Touch(trace)}, {})
    checkpoints.close()


def load_value(path: Path, name: str) -> Any:
    state = {name: None}
    steps.load_into(path, state)
    return state[name]


def test_a_checkpoint_of_somebody_else_runs_nothing_on_any_rank(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    run_ranks(save_trap, tmp_path, trace)
    assert run_ranks(load_value, tmp_path / "step-1", "lr") == [0.5, 0.5]
    with pytest.raises(RankError, match=r"step-1 cannot be read: .*Weights only load failed"):
        run_ranks(load_value, tmp_path / "step-1", "trap")
    (tmp_path / "step-1" / steps.SHARDS / ".metadata").write_bytes(pickle.dumps(Touch(trace)))
    with pytest.raises(RankError, match=r"\.metadata is not the metadata .*names posix\.system"):
        run_ranks(loaded, tmp_path / "step-1")
    assert not trace.exists()


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
    (tmp_path / "step-2" / steps.METADATA).unlink()  # a copy that broke off
    for name in (".step-3.partial", ".step-1.old", "step-x", "step-9"):
        (tmp_path / name).mkdir()
    assert steps.find_latest(tmp_path) == tmp_path / "step-1"
    with pytest.raises(ValueError, match=r"step-2 is not a complete checkpoint"):
        steps.read_run_metadata(tmp_path / "step-2")
    run_ranks(save_steps, tmp_path, [])
    assert names(tmp_path) == ["step-1", "step-2", "step-9", "step-x"]
    assert steps.find_latest(tmp_path / "nothing") is None


def write_sum(path: Path) -> None:
    """An export: what the shards of the matrix hold, in another dtype."""
    whole = torch.zeros(7, 3, dtype=torch.bfloat16)
    steps.load_whole(path, {"x": whole})
    (path / "sum").write_text(f"rank {dist.get_rank()}: {whole.sum().item()}")


def save_with_export(directory: Path, asynchronous: bool) -> None:
    checkpoints = steps.StepCheckpoints(directory, keep=1, asynchronous=asynchronous)
    checkpoints.save(0, state_of(0), {}, write_sum)
    checkpoints.wait()
    checkpoints.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_first_rank_alone_exports_from_the_shards_of_all(asynchronous: bool, tmp_path: Path) -> None:
    run_ranks(save_with_export, tmp_path, asynchronous)
    assert (tmp_path / "step-0" / "sum").read_text() == "rank 0: 210.0"


def hold_the_export(directory: Path, asynchronous: bool) -> list[list[str]]:
    """Complete checkpoints when `save` has returned, while its export is held, and once it is let go."""
    released = threading.Event()
    checkpoints = steps.StepCheckpoints(directory, keep=1, asynchronous=True)
    if not asynchronous:
        released.set()
    checkpoints.save(1, state_of(1), {}, lambda path: released.wait(30) or None, asynchronous)
    found = [[path.name for path in steps.complete_checkpoints(directory)]]
    released.set()
    checkpoints.wait()
    checkpoints.close()
    return [*found, [path.name for path in steps.complete_checkpoints(directory)]]


def test_training_goes_on_while_the_export_is_written_and_it_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(hold_the_export, tmp_path / "a", True, world_size=1) == [[[], ["step-1"]]]
    assert run_ranks(hold_the_export, tmp_path / "b", False, world_size=1) == [[["step-1"], ["step-1"]]]


@on_ranks()
def test_host_copies_are_equal_and_lie_where_the_last_one_lay() -> None:
    host_copy, state = steps.HostCopy(), state_of(3) | {"plain": [1.5, "word"]}
    addresses = []
    for _ in range(2):
        state["x"].to_local().add_(1)
        copy = host_copy.take(state)
        assert copy["plain"] == [1.5, "word"] and copy["x"].placements == (Shard(0),)
        for name in ("x", "row"):
            assert torch.equal(copy[name].full_tensor(), state[name].full_tensor())
        addresses.append(copy["x"].to_local().data_ptr())
    assert addresses[0] == addresses[1] != state["x"].to_local().data_ptr()
    assert torch.equal(host_copy.take({"more": torch.ones(2), **state})["more"], torch.ones(2))
    host_copy.close()


class BlockedWriter(FileSystemWriter):
    """A folder stands where the second rank's file should be."""

    def __init__(self, path: Path) -> None:
        (path / "__1_0.distcp").mkdir(parents=True, exist_ok=True)
        super().__init__(path)


def export_to_a_full_disk(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path / "hf"))


def words_of_failure(directory: Path, asynchronous: bool, writer: type, export: Callable[[Path], None] | None) -> str:
    """What this rank is told by a save that fails."""
    checkpoints = steps.StepCheckpoints(directory, keep=1, asynchronous=asynchronous)
    try:
        with mock.patch.object(steps, "FileSystemWriter", writer):
            checkpoints.save(1, state_of(1), {}, export)
            checkpoints.wait()
    except AgreedError as error:
        return str(error)
    finally:
        checkpoints.close()
    return "no error"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("writer", "export", "message"),
    [
        (BlockedWriter, None, r"__1_0\.distcp' \(rank 1\)$"),
        (FileSystemWriter, export_to_a_full_disk, r"No space left on device: '.*hf' \(rank 0\)$"),
    ],
)
def test_a_save_that_fails_is_one_line_that_says_where_on_every_rank(
    asynchronous: bool, writer: type, export: Callable[[Path], None] | None, message: str, tmp_path: Path
) -> None:
    words = run_ranks(words_of_failure, tmp_path, asynchronous, writer, export)
    assert words[0] == words[1] and "\n" not in words[0]
    assert ".step-1.partial could not be written, with " in words[0] and re.search(message, words[0])
    assert names(tmp_path) == [], "what was written takes room on a full disk"


@pytest.mark.slow(unless=lambda mode: mode == "asynchronous")
@pytest.mark.timeout(60 + 30 * KILLS)
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_kill_9_at_any_moment_leaves_the_last_complete_one(mode: str, tmp_path: Path) -> None:
    """With KILLS=10 in the environment: ten times each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    directory, log = tmp_path / "run", tmp_path / "log"
    log.write_text("0")
    last = 0
    for seed in range(KILLS):
        arguments = [sys.executable, "-c", SAVE_FOR_EVER, str(directory), str(log), mode]
        process = subprocess.Popen(arguments, env=environment)
        try:
            wait_for_step(directory, last + 3, process)
            time.sleep(random.Random(seed).random() * 0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        latest = steps.find_latest(directory)
        assert latest is not None and steps.step_of(latest) >= last + 3
        last = steps.step_of(latest)
        returned = int(log.read_text() or last)  # the last step whose save has returned
        assert last >= returned - (mode == "asynchronous")
        assert json.loads((latest / steps.METADATA).read_text()) == {"step": last}
        assert (latest / "exported").read_text() == f"{float(last)}\n" * 1000
        (value,) = run_ranks(load_plain, latest, world_size=1)
        assert value == last
        print(f"kill {seed + 1}: step {returned} had returned, step {last} is complete; there: {names(directory)}")


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
    with pytest.raises(AgreedError, match=r"no such text \(rank 1\)"), raise_on_all_ranks():
        if dist.get_rank() == 1:
            raise ValueError("no such text")
    with pytest.raises(AgreedError, match=r"^the same on both$"), raise_on_all_ranks():
        raise ValueError("the same on both")
    with raise_on_all_ranks():
        pass
    assert all_gather_object(dist.get_rank()) == [0, 1]


def raise_on_rank_1() -> None:
    with raise_on_all_ranks():
        if dist.get_rank() == 1:
            raise KeyError("a mistake")


def test_a_mistake_of_ours_keeps_its_type_where_it_happened() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(raise_on_rank_1)
    assert caught.value.errors[1] == ("KeyError", "'a mistake'")
    assert caught.value.errors[0] == ("AgreedError", "KeyError: 'a mistake' (rank 1)")
