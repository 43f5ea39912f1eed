"""Law 7, ranks agree or say so, in a run that went well: what happens when one rank then does something else.

In every program rank 1 is the odd one, after a first step. Each rank ends by itself with an error that names the first
difference and where the ranks are, however they differ: at once where both come to something that all do together, and
within the time limit where one does not come.
"""

import io
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.laws.hanging import Ending, endings
from tests.ranks import run_ranks
from tests.training import ours, world_mesh
from tests.zoo import FEATURES, Chain, blocks
from yafsdp_like.comm import hang_letter
from yafsdp_like.comm.hang_letter import HangLetter, limit_of
from yafsdp_like.optim import AdamW

ODD_RANK = 1
PATIENCE = 20.0
LIMIT_S = 1.0
BUSY_S = 6.0  # what a busy machine may add to the limit
transports = pytest.mark.parametrize("transport", ["process_group", "peer"])
world_sizes = pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])


class Skipping(Chain):
    """Blocks, of which one can be left out."""

    skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x if self.skips and number == 1 else layer(x)
        return x


class Run:
    """A model, an optimizer, and a step that went well."""

    def __init__(self, transport: str, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        self.model: Any = Skipping(blocks(3))
        for unit in (*self.model.layers, self.model):
            ours.fully_shard(unit, mesh=world_mesh(), transport=transport)
        self.optimizer = make(self.model.parameters(), lr=1e-3)
        self.step()

    def forward(self) -> torch.Tensor:
        out: torch.Tensor = self.model(torch.ones(2, FEATURES))
        return out

    def step(self, updates: bool = True) -> None:
        self.forward().sum().backward()
        if updates:
            self.optimizer.step()
        self.optimizer.zero_grad()


# --- what the odd rank does ---


def freezes_a_parameter(run: Run) -> None:
    run.model.layers[1].fall.weight.requires_grad_(False)


def skips_a_block(run: Run) -> None:
    run.model.skips = True


def runs_one_forward_more(run: Run) -> None:
    run.forward()


def evaluates_while_the_other_trains(run: Run) -> None:
    with torch.no_grad():
        for _ in range(3):
            run.forward()


def catches_an_error_in_the_middle_of_a_forward(run: Run) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such token")

    handle = run.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="no such token"):
        run.forward()
    handle.remove()


def leaves_an_update_out(run: Run) -> None:
    run.step(updates=False)


def what_is_told(
    does: Callable[[Run], None], transport: str, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> str:
    run = Run(transport, make)
    try:
        if dist.get_rank() == ODD_RANK:
            does(run)
        for _ in range(3):
            run.step()
    except RuntimeError as error:
        return str(error)
    return ""


@transports
@world_sizes
@pytest.mark.parametrize(
    ("does", "odd"),
    [
        (freezes_a_parameter, "plans the memory of the model"),
        (skips_a_block, "reduce-scatters gradients of unit 'layers.0'"),
        (runs_one_forward_more, "(all-gathers|begins a forward)"),
        (evaluates_while_the_other_trains, "(all-gathers|begins a forward)"),
        (catches_an_error_in_the_middle_of_a_forward, "(all-gathers|begins a forward)"),
        (leaves_an_update_out, "(all-gathers|begins a forward)"),
    ],
)
def test_a_rank_that_does_something_else_after_a_step_is_named_with_all_places(
    does: Callable[[Run], None], odd: str, transport: str, world_size: int
) -> None:
    """Prevents: a hang, or a sum of what does not belong together."""
    found = run_ranks(what_is_told, does, transport, world_size=world_size, timeout=PATIENCE)
    assert len(set(found)) == 1
    rest = "0" if world_size == 2 else "0, 2"
    assert re.search(rf"the first difference is rank {rest}: .*; rank 1: {odd}", found[0]), found[0]
    for rank in range(world_size):
        assert re.search(rf"rank {rank} at \S*test_hanging\.py:\d+ in \w+", found[0]), found[0]


@transports
@pytest.mark.parametrize("make", [torch.optim.SGD, AdamW])
def test_a_rank_that_leaves_an_update_out_is_named_whoever_updates(
    make: Callable[..., torch.optim.Optimizer], transport: str
) -> None:
    """Prevents: a parameter of which some rows are updated and others are not."""
    first, second = run_ranks(what_is_told, leaves_an_update_out, transport, make, timeout=PATIENCE)
    assert first == second and re.search(r"rank 0: begins an optimizer's step.*; rank 1: ", first), first


# --- a rank that does not come ---


def sleeps_too_long(run: Run) -> None:
    time.sleep(2 * LIMIT_S)


def is_killed(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def calls_a_collective_of_its_own(run: Run) -> None:
    dist.all_reduce(torch.ones(2))


def fails(run: Run) -> None:
    raise ValueError("no such token")


def differ(does: Callable[[Run], None] | None, transport: str) -> None:
    run = Run(transport)
    if dist.get_rank() == ODD_RANK:
        if does is None:
            return
        does(run)
    run.step()


def ended(does: Callable[[Run], None] | None, transport: str, folder: Path, world_size: int) -> list[Ending]:
    found = endings(differ, does, transport, folder=folder, world_size=world_size, timeout_s=LIMIT_S)
    for rank, ending in enumerate(found):
        if rank != ODD_RANK:
            assert (ending.exitcode, ending.error) == (0, "RuntimeError"), ending
            assert ending.seconds < LIMIT_S + BUSY_S, ending
            # Of itself, since another may have left its wait, or not have come to answer, by then.
            place = rf"rank {rank} wait(s|ed) for \S+ s at \S*test_hanging\.py:\d+ in forward, in forward, where it "
            assert re.search(rf"hang letter of rank {rank}, [\s\S]*{place}", ending.message), ending.message
            assert f"hang letter of rank {rank}" in ending.stderr
            assert re.search(r"the first difference: number \d+: rank 0.*: .*; rank 1: \(nothing\)", ending.message)
    return found


some_cases = pytest.mark.parametrize(
    ("transport", "world_size"),
    [
        ("process_group", 2),
        pytest.param("peer", 2, marks=pytest.mark.slow),
        pytest.param("process_group", 3, marks=pytest.mark.slow),
        pytest.param("peer", 3, marks=pytest.mark.slow),
    ],
)
LAST = "the last thing it did with the others: begins an optimizer's step"


@some_cases
def test_a_rank_that_sleeps_is_named_and_hears_of_it(transport: str, world_size: int, tmp_path: Path) -> None:
    found = ended(sleeps_too_long, transport, tmp_path, world_size)
    told = rf"rank 1 does something else for \S+ s at \S*test_hanging\.py:\d+ in sleeps_too_long; {LAST}"
    for ending in found:
        assert ending.error == "RuntimeError" and re.search(told, ending.stderr), ending


@some_cases
def test_a_rank_that_calls_a_collective_of_its_own_is_named(transport: str, world_size: int, tmp_path: Path) -> None:
    found = ended(calls_a_collective_of_its_own, transport, tmp_path, world_size)
    told = r"rank 1 waits in torch.distributed's all_reduce for \S+ s at \S*:\d+ in calls_a_collective_of_its_own"
    for ending in found:  # of the odd one's error gloo has the words
        assert re.search(told, ending.stderr), ending


@some_cases
def test_a_rank_that_is_killed_is_named(transport: str, world_size: int, tmp_path: Path) -> None:
    found = ended(is_killed, transport, tmp_path, world_size)
    assert found[ODD_RANK].exitcode == -signal.SIGKILL
    assert re.search("rank 1 (does not answer|has left no word)", found[0].message), found[0].message


@some_cases
def test_a_rank_that_ends_early_is_named(transport: str, world_size: int, tmp_path: Path) -> None:
    found = ended(None, transport, tmp_path, world_size)
    assert (found[ODD_RANK].exitcode, found[ODD_RANK].error) == (0, "")
    assert f"rank 1 has ended; {LAST}" in found[0].message, found[0].message


@some_cases
def test_a_rank_that_fails_is_named_with_its_error(transport: str, world_size: int, tmp_path: Path) -> None:
    found = ended(fails, transport, tmp_path, world_size)
    assert found[ODD_RANK].error == "ValueError"
    assert f"rank 1 has ended with ValueError: no such token; {LAST}" in found[0].message, found[0].message


# --- a device that waits, while its CPU has run ahead ---


class Never:
    """An event that is not reached."""

    def query(self) -> bool:
        return False


def device_waits(folder: str) -> tuple[str, str]:
    group = dist.new_group()  # others' letters are of other groups
    assert group is not None
    done = ["all-gathers unit 'a'", "all-gathers unit 'b'" if dist.get_rank() == ODD_RANK else "all-gathers unit 'c'"]
    with mock.patch.dict(os.environ, {hang_letter.FOLDER: folder}), redirect_stderr(io.StringIO()) as printed:
        letter = HangLetter(group, timedelta(seconds=LIMIT_S), lambda most: (0, done))
        letter.watch(Never())
        deadline = time.monotonic() + LIMIT_S + BUSY_S
        path = Path(folder, f"hang-rank{dist.get_rank()}.txt")
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        return printed.getvalue(), path.read_text()


def test_a_device_that_waits_leaves_a_letter_on_every_rank_before_the_limit(tmp_path: Path) -> None:
    """Prevents: a process that NCCL or the watchdog ends without a word of what the ranks did."""
    told = "the first difference: number 2: rank 0: all-gathers unit 'c'; rank 1: all-gathers unit 'b'"
    for printed, kept in run_ranks(device_waits, str(tmp_path), timeout=PATIENCE):
        assert printed == kept and told in kept, (printed, kept)


def test_a_limit_of_its_own_can_be_shorter_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_of(timedelta(seconds=600)) == 600.0
    monkeypatch.setenv(hang_letter.LIMIT_SECONDS, "30")
    assert (limit_of(timedelta(seconds=600)), limit_of(timedelta(seconds=5))) == (30.0, 5.0)
