# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)
"""A run whose moments are kept in fewer bytes: it learns, resumes exactly, and goes on in any other format."""

import re
import shutil
from pathlib import Path

import pytest

from launch import config, metrics
from tests.launch.test_going_on import said
from tests.launch.test_train import ROOT, file, losses, run_here, text, train
from tests.ranks import run_ranks
from yafsdp_like.checkpoint import steps

NARROW = ["bf16", "int8"]
STEADY = ["--num_steps=8", "--checkpoint.every=2", "--checkpoint.keep=9", "--evaluation.every=0"]


def kept_in(moments: str) -> str:
    return f"--optimizer.moments={moments}"


def forget_after(run: Path, step: int) -> None:
    """As if the run had been killed right after its save of `step`."""
    for path in steps.complete_checkpoints(run):
        if steps.step_of(path) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("moments", NARROW)
def test_resuming_is_exact(file: Path, moments: str) -> None:
    whole = train(file, *STEADY, kept_in(moments), world_size=1)
    forget_after(file.parent / "run", 4)
    again = train(file, *STEADY, kept_in(moments), "--resume=auto", world_size=1)
    assert losses(again) == losses(whole) and len(whole) == 8


@pytest.mark.slow(unless=lambda moments: moments == "int8")
@pytest.mark.parametrize("moments", NARROW)
def test_a_run_in_fp32_goes_on_in_fewer_bytes_on_another_number_of_ranks_and_back(file: Path, moments: str) -> None:
    whole = train(file, *STEADY)
    for before, after, world_size, step in (("fp32", moments, 1, 2), (moments, "fp32", 2, 4)):
        forget_after(file.parent / "run", step)
        words = said(file, *STEADY, kept_in(after), "--resume=auto", world_size=world_size)
        assert re.search(rf"optimizer\.moments +{before} -> {after}", words)
    assert losses(train(file, *STEADY, "--resume=auto")) == pytest.approx(losses(whole), rel=1e-2)


def test_the_first_words_say_how_many_bytes_moments_take(file: Path) -> None:
    sizes = []
    for moments in ("fp32", *NARROW):
        words = said(file, kept_in(moments), "--num_steps=1", "--resume=auto", world_size=1)
        found = re.search(r"AdamW's moments, ([\d.]+) KiB", words)
        assert found is not None, words
        sizes.append(float(found[1]))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=1e-2) and sizes[2] < 0.4 * sizes[0]


def test_another_format_is_refused_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^optimizer\.moments in the command line: expected fp32\|bf16\|int8, found fp8$"
    ):
        config.load([kept_in("fp8")])


def last_losses(file: Path, *options: str, num_steps: int) -> dict[str, float]:
    """The mean loss of the last ten steps, by the format of moments."""
    steady = [f"--num_steps={num_steps}", "--checkpoint.every=0", "--evaluation.every=0", *options]
    means = {}
    for moments in ("fp32", *NARROW):
        arguments = [str(file), *steady, kept_in(moments), f"--output_dir={file.parent / moments}"]
        run_ranks(run_here, arguments, world_size=1, timeout=600)
        found = losses(metrics.read_records(file.parent / moments))
        means[moments] = sum(found[step] for step in range(num_steps - 9, num_steps + 1)) / 10
    return means


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smallest_model_learns_as_much_as_with_moments_in_fp32(file: Path) -> None:
    means = last_losses(file, num_steps=120)
    assert means["fp32"] < 4 and means == pytest.approx(dict.fromkeys(means, means["fp32"]), rel=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_configuration_learns_as_much_as_with_moments_in_fp32(tmp_path: Path) -> None:
    """At a rate at which runs do not depend on how numbers are rounded, as they do at its own in so few steps."""
    file = tmp_path / "tiny.yaml"
    shutil.copy(ROOT / "configs" / "tiny.yaml", file)
    options = [f"--data.cache={tmp_path / 'cache'}", "--optimizer.lr=1e-3", "--sample.num_tokens=0"]
    means = last_losses(file, *options, num_steps=100)
    assert means == pytest.approx(dict.fromkeys(means, means["fp32"]), rel=1e-2)


def test_a_run_with_gradients_in_bf16_has_the_losses_of_one_that_reduces_in_bf16(file: Path) -> None:
    """Where a step is one backward, and nothing is clipped, which rounds them once more."""
    reduced = [
        *STEADY,
        "--precision.reduce_dtype=bfloat16",
        "--optimizer.max_grad_norm=null",
        "--micro_batch_size=null",
    ]
    wide = losses(train(file, *reduced))
    shutil.rmtree(file.parent / "run")
    assert losses(train(file, *reduced, "--precision.grad_dtype=bfloat16")) == pytest.approx(wide, rel=1e-6)
    with pytest.raises(ValueError, match=r"precision\.grad_dtype bfloat16 keeps .* precision\.reduce_dtype is float32"):
        config.load([str(file), "--precision.grad_dtype=bfloat16"])
