"""A run that is out of memory ends on all ranks, with a letter of each that had no room."""

# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launch import errors
from tests.launch.test_train import FACTORY, command, errors_in, file, finished, main_here, text
from tests.ranks import run_ranks


class Crowded(nn.Module):
    """A bigram model without room in its second forward, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(300, 300)
        self.num_forwards = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        if self.num_forwards == 2 and self.is_full():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has none.\nMore.")
        return self.logits(tokens)

    def is_full(self) -> bool:
        return True


class CrowdedOnce(Crowded):
    """The same, on the second rank only."""

    def is_full(self) -> bool:
        return dist.get_rank() == 1


def status_here(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "GRACE_SECONDS", 0.1)
        return main_here(arguments)


def test_every_rank_without_room_writes_a_letter_and_ends(file: Path) -> None:
    arguments = [str(file), *FACTORY, "--model.factory=tests.launch.test_oom:Crowded"]
    assert run_ranks(status_here, arguments) == [1, 1]
    for rank in (0, 1):
        letter = (file.parent / "run" / f"oom-rank{rank}.txt").read_text()
        assert letter.startswith(f"rank {rank} ran out of memory in module (forward)")
        assert "memory plan of one rank of 2" in letter and "  1. " in letter


@pytest.mark.slow
def test_one_rank_without_room_ends_the_run_within_seconds_and_is_named(file: Path) -> None:
    begin = time.monotonic()
    overrides = [*FACTORY, "--model.factory=tests.launch.test_oom:CrowdedOnce"]
    result = finished(command(file, *overrides, num_ranks=2))
    assert result.returncode == 1 and time.monotonic() - begin < 60
    first, *_ = errors_in(result.stderr)
    assert first.startswith("error: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has none. (rank 1); rank 1")
    assert str(file.parent / "run" / "oom-rank1.txt") in first
    assert not (file.parent / "run" / "oom-rank0.txt").exists()
