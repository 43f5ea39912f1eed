"""The harness itself: a suite that hides failures or hangs proves nothing."""

import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import CrashWarning, RankError, run_ranks


def sum_of_ranks(start: float) -> float:
    total = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(total)
    return total.item()


def fail_on(failing: list[int]) -> None:
    if dist.get_rank() in failing:
        raise ValueError(f"rank {dist.get_rank()} is unhappy")


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def sleep_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)


def leave() -> None:
    os._exit(3)


def crash_once(noted: Path) -> str:
    """Crash on rank 1, unless a file says that it has crashed before."""
    if dist.get_rank() == 1 and not noted.exists():
        noted.touch()
        os.kill(os.getpid(), signal.SIGABRT)
    return "survived"


def warn() -> None:
    warnings.warn("look out", UserWarning, stacklevel=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_rank_by_rank(world_size: int) -> None:
    expected = float(sum(1 + rank for rank in range(world_size)))
    assert run_ranks(sum_of_ranks, 1.0, world_size=world_size) == [expected] * world_size


@pytest.mark.slow
def test_a_job_starts_no_process() -> None:
    run_ranks(sum_of_ranks, 0.0)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        run_ranks(sum_of_ranks, 0.0)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1.0  # beside other tests; a new process takes longer to import torch alone


def test_errors_of_every_rank_are_collected_and_the_next_job_runs() -> None:
    with pytest.raises(RankError, match="rank 0 is unhappy") as caught:
        run_ranks(fail_on, [0, 1])
    assert caught.value.errors == {rank: ("ValueError", f"rank {rank} is unhappy") for rank in (0, 1)}
    assert run_ranks(sum_of_ranks, 0.0) == [1.0, 1.0]


def test_an_error_on_one_rank_names_only_that_rank() -> None:
    with pytest.raises(RankError, match="1 of 2 ranks") as caught:
        run_ranks(fail_on, [1])
    assert list(caught.value.errors) == [1]


def test_a_hang_is_killed_and_shows_where_it_hung() -> None:
    with pytest.raises(RankError, match="sleep_on_rank_one") as caught:
        run_ranks(sleep_on_rank_one, timeout=1)
    assert caught.value.errors[1][0] == "TimeoutError"
    assert "test_ranks.py" in str(caught.value)
    assert run_ranks(sum_of_ranks, 0.0) == [1.0, 1.0]


def test_a_dead_worker_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="exit code 3"):
        run_ranks(leave)


def test_after_one_crash_a_function_is_run_again_and_after_another_it_fails(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.warns(CrashWarning, match="crash_once"):
        patch.setattr(ranks, "_crashes", [])
        assert run_ranks(crash_once, tmp_path / "first") == ["survived", "survived"]
        with pytest.raises(RankError, match=f"exit code -{signal.SIGABRT:d}"):
            run_ranks(crash_once, tmp_path / "second")


def test_warnings_are_errors_in_workers_where_they_are_errors_here() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RankError, match="look out"):
            run_ranks(warn)
        warnings.simplefilter("ignore")
        run_ranks(warn)
