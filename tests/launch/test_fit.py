"""What ``--fit`` says is written as keys of a run, which then fits; and an OOM letter names what would."""

# ruff: noqa: F401 (fixtures of another file, which are arguments here)

from pathlib import Path

import pytest
import torch

from launch import fit as launch_fit
from launch import plan
from launch.config import load
from tests.launch.test_train import FACTORY, file, text
from yafsdp_like.shard.forecast.traced_units import Cluster

TINY = ["--model.preset=small", "--seq_len=1024", "--global_batch_size=16", "--micro_batch_size=8"]
GIB = 1 << 30


def changes_in(line: str) -> list[str]:
    return [word for word in line.replace(",", " ").split() if word.startswith("--")]


def planned(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = plan.main(["preset:small", "--world-size=2", *arguments])
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_changes_that_are_promised_make_the_plan_fit(capsys: pytest.CaptureFixture[str]) -> None:
    base = [*TINY[1:], "--gpu-memory=2GiB"]
    assert planned(base, capsys)[0] == plan.DOES_NOT_FIT
    status, words = planned([*TINY[1:], "--fit=2GiB"], capsys)
    assert status == 0 and "the fastest first" in words and "times are predicted from" in words, words
    line = next(line for line in words.splitlines() if "--" in line)
    kept = [w for w in TINY[1:] if not any(c.startswith(w.split("=")[0]) for c in changes_in(line))]
    assert planned([*kept, *changes_in(line), "--gpu-memory=2GiB"], capsys)[0] == 0


@pytest.mark.slow
def test_nothing_that_fits_is_a_refusal_with_the_smallest_changes(capsys: pytest.CaptureFixture[str]) -> None:
    status, words = planned([*TINY[1:], "--fit=1GiB"], capsys)
    assert status == plan.DOES_NOT_FIT and ("smallest changes" in words or "nothing fits" in words)


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        (["--precision.param_dtype=float32"], "split_master"),
        (["--model.compile=true"], "checkpointing"),
        (["--model.graph=true"], "update_in_backward"),
        (["--model.graph=true"], "offload_activations"),
        ([], "offload_parameters"),
    ],
)
def test_what_a_run_cannot_have_is_not_tried(overrides: list[str], left_out: str) -> None:
    options = load([*TINY, *overrides])
    assert left_out not in launch_fit.may_change(options)
    for name in launch_fit.may_change(options):
        assert "{" not in launch_fit.in_words(name, True) and launch_fit.in_words(name, True).startswith("--")


@pytest.mark.slow
def test_a_rank_that_has_run_out_is_told_changes_that_take_less() -> None:
    options = load(TINY)
    words = launch_fit.changes_that_fit(options, 2, torch.device("cpu"))
    assert words and len(words) <= 3 and all(("ms a step" in w and "--" in w) or "ranks" in w for w in words)


def test_the_time_of_a_plan_is_that_of_the_search() -> None:
    options = load(TINY)
    search = launch_fit.search_of(options, Cluster(2), GIB, launch_fit.machine_rates(num_ranks=2))
    base = launch_fit.settings_of(options, 2)
    found = launch_fit.predicted_time(options, search.forecast_of(base))
    assert found.seconds == pytest.approx(search.seconds(base), rel=0.05)  # but for the root's tail
