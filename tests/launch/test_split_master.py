# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)
"""A run whose fp32 masters are kept in two halves: it learns as much, resumes exactly, and goes on with whole ones."""

from pathlib import Path

import pytest

from tests.launch.test_moments import STEADY, forget_after
from tests.launch.test_train import file, losses, text, train

SPLIT = "--precision.split_master=true"


def test_resuming_is_exact(file: Path) -> None:
    whole = train(file, *STEADY, SPLIT)
    forget_after(file.parent / "run", 4)
    again = train(file, *STEADY, SPLIT, "--resume=auto")
    assert losses(again) == losses(whole)
    assert len(whole) == 8


@pytest.mark.slow
def test_a_run_goes_on_in_halves_and_back_on_another_number_of_ranks(file: Path) -> None:
    whole = train(file, *STEADY)
    for arguments, world_size, step in (((SPLIT,), 1, 2), ((), 2, 4)):
        forget_after(file.parent / "run", step)
        train(file, *STEADY, *arguments, "--resume=auto", world_size=world_size)
    assert losses(train(file, *STEADY, "--resume=auto")) == pytest.approx(losses(whole), rel=1e-2)
