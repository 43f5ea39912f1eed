"""One rank says what is wrong, once: the one that knows most."""

# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)

import contextlib
import io
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from launch import errors as launch_errors
from tests.launch.test_train import FACTORY, command, errors_in, file, finished, text
from tests.ranks import run_ranks
from yafsdp_like.comm.consistency import AgreedError

LOST = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")


def said_here(errors: list[Exception]) -> tuple[float, str]:
    """When this rank has said what its error makes it say, and what."""
    if dist.get_rank() == 0:
        _get_default_store().delete_key("ranks that reported an error")
    dist.barrier()
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_errors, "GRACE_SECONDS", 0.6)
        patch.setattr(launch_errors, "LOST_SECONDS", 0.4)
        launch_errors.report(errors[dist.get_rank()], dist.get_rank())
    return time.monotonic(), said.getvalue()


@pytest.mark.parametrize(
    ("errors", "speaks", "words"),
    [
        ([LOST, ValueError("no such token")], 1, "error: no such token (rank 1)\n"),
        ([ValueError("no such token"), LOST], 0, "error: no such token\n"),
        ([AgreedError("KeyError: 'x' (rank 1)"), KeyError("x")], 1, "KeyError: 'x'\n"),
        ([OSError("disk full"), LOST], 0, "error: disk full (rank 0)\n"),
        (
            [LOST, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")],
            1,
            "error: CUDA out of memory. Tried to allocate 2.00 GiB. (rank 1); lower micro_batch_size or seq_len, or "
            "shard over more ranks\n",
        ),
    ],
)
def test_the_rank_that_knows_most_speaks_first(errors: list[Exception], speaks: int, words: str) -> None:
    """A launcher then ends the others, before they speak."""
    told = run_ranks(said_here, errors)
    assert told[speaks][1] == words or (told[speaks][1].endswith(words) and words.startswith("KeyError"))
    assert told[1 - speaks][0] - told[speaks][0] > 0.05


def test_of_ranks_that_know_as_much_one_speaks_first() -> None:
    told = run_ranks(said_here, [AgreedError("no text in x")] * 2)
    assert {words for _, words in told} == {"error: no text in x\n"}
    assert abs(told[0][0] - told[1][0]) > 0.1


class Mistaken(nn.Module):
    """A bigram model with a mistake in its third forward, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(300, 300)
        self.num_forwards = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        return self.logits(tokens) if self.num_forwards < 3 else {}["a mistake"]


class MistakenOnce(Mistaken):
    """The same, on the second rank only."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) if dist.get_rank() == 1 else self.logits(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mistaken", "MistakenOnce"])
def test_a_mistake_under_torchrun_has_one_traceback(file: Path, name: str) -> None:
    result = finished(command(file, *FACTORY, f"--model.factory=tests.launch.test_errors:{name}", num_ranks=2))
    ours = result.stderr.split("torch/distributed/elastic")[0]
    assert result.returncode != 0 and ours.count("Traceback") == 1 and ours.count("KeyError: 'a mistake'") == 1
    assert not errors_in(result.stderr)
