# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)
"""A run whose moments are in host memory: the same losses, resumed from and by runs with moments on the device."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch import build, config, memory_check
from launch.memory_check import Allocation, MemoryDemand
from launch.recipe import recipe_of
from tests.launch.test_going_on import said
from tests.launch.test_moments import STEADY, forget_after, kept_in
from tests.launch.test_train import file, losses, text, train, world_here
from tests.ranks import run_ranks
from yafsdp_like.hardware import H200
from yafsdp_like.optim.offload import CHUNK_NBYTES, NUM_BUFFERS

OFFLOADED = "--optimizer.offload_moments=true"
BOTH = ("--precision.split_master=true", "--optimizer.offload_moments=and_remainder")
GIB = 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("moments", [pytest.param("bf16", marks=pytest.mark.slow), "int8"])
def test_losses_are_those_of_moments_on_the_device_also_after_changing_places(file: Path, moments: str) -> None:
    whole = losses(train(file, *STEADY, kept_in(moments)))
    assert losses(train(file, *STEADY, kept_in(moments), OFFLOADED, output="other")) == whole
    forget_after(file.parent / "run", 4)
    words = said(file, *STEADY, kept_in(moments), OFFLOADED, "--resume=auto")
    assert re.search(r"optimizer\.offload_moments +false -> true", words), words
    assert losses(train(file, *STEADY, kept_in(moments), OFFLOADED, "--resume=auto")) == whole
    forget_after(file.parent / "run", 2)
    assert losses(train(file, *STEADY, kept_in(moments), "--resume=auto")) == whole


def test_resuming_is_exact_in_fp32_too(file: Path) -> None:
    whole = train(file, *STEADY, OFFLOADED, world_size=1)
    forget_after(file.parent / "run", 4)
    again = train(file, *STEADY, OFFLOADED, "--resume=auto", world_size=1)
    assert losses(again) == losses(whole) and len(whole) == 8


@pytest.mark.slow
def test_remainders_on_the_host_change_no_loss_and_go_back_to_the_device(file: Path) -> None:
    on_device = BOTH[0], OFFLOADED
    whole = losses(train(file, *STEADY, *on_device, output="other"))
    assert losses(train(file, *STEADY, *BOTH)) == whole and len(whole) == 8
    for arguments, step in ((BOTH, 4), (on_device, 2)):
        forget_after(file.parent / "run", step)
        assert losses(train(file, *STEADY, *arguments, "--resume=auto")) == whole


def test_remainders_are_those_of_split_masters() -> None:
    for value, expected in (("true", True), ("false", False), ("and_remainder", "and_remainder")):
        assert config.load([BOTH[0], f"--optimizer.offload_moments={value}"]).optimizer.offload_moments == expected
    with pytest.raises(ValueError, match=r"and_remainder keeps .* precision\.split_master makes: set that to true"):
        config.load([BOTH[1]])
    with pytest.raises(
        ValueError, match=r"offload_moments in the command line: expected bool\|and_remainder, found yes"
    ):
        config.load(["--optimizer.offload_moments=yes"])


def test_the_first_words_say_what_an_update_copies(file: Path) -> None:
    words = said(file, OFFLOADED, "--num_steps=1", world_size=1)
    assert re.search(r"AdamW's moments, [\d.]+ \w+, are in host memory; each update copies them in and back, ", words)
    assert re.search(r"buffers for them, [\d.]+ \w+, and activations come on top", words)


# --- what is counted ---


def demands(arguments: list[str]) -> tuple[dict[str, int], str]:
    """What this rank would allocate, by name, and the words about it on a machine of known rates."""
    options, world = config.load(arguments), world_here()
    model: Any = build.build_model(recipe_of(options.model, options.seed), options, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.Hardware, "of", lambda device: H200)
        words = build.describe_plan(model, world, options.optimizer)
    [demand] = memory_check._demands(model, options, world)
    return {part.name: part.nbytes for part in demand.parts}, words


def test_buffers_are_counted_beside_moments(tmp_path: Path) -> None:
    steps = ["--model.preset=0.6b", f"--output_dir={tmp_path / 'run'}", "--checkpoint.every=0"]
    names, words = run_ranks(demands, [*steps, OFFLOADED], world_size=1)[0]
    assert names[memory_check.BUFFERS] == NUM_BUFFERS * CHUNK_NBYTES
    assert names[memory_check.MOMENTS] == run_ranks(demands, steps, world_size=1)[0][0][memory_check.MOMENTS]
    seconds = names[memory_check.MOMENTS] / H200.rates.host_nbytes
    assert f"at least {seconds * 1e3:.0f} ms at 52.7 GB/s" in words and "192.00 MiB" in words


def test_remainders_are_counted_on_the_host_and_not_on_the_device(tmp_path: Path) -> None:
    steps = ["--model.preset=0.6b", f"--output_dir={tmp_path / 'run'}", "--checkpoint.every=0"]
    (there, words), (here, _) = (
        run_ranks(demands, [*steps, BOTH[0], offload], world_size=1)[0] for offload in (BOTH[1], OFFLOADED)
    )
    nbytes = there[memory_check.REMAINDERS]
    assert here["memory plan"] - there["memory plan"] == nbytes and memory_check.REMAINDERS not in here
    seconds = (there[memory_check.MOMENTS] + nbytes) / H200.rates.host_nbytes
    assert f"back, with the remainders, at least {seconds * 1e3:.0f} ms at 52.7 GB/s" in words


@pytest.mark.parametrize("free", [30 * GIB, 40 * GIB])
def test_a_gpu_that_moments_do_not_fit_on_is_told_of_the_host(free: int) -> None:
    parts = Allocation("memory plan", 30 * GIB), Allocation(memory_check.MOMENTS, 30 * GIB, 30 * GIB)
    world: Any = SimpleNamespace(device=torch.device("cuda"), size=2)
    options = config.load(["--model.factory=x:y"])
    remedies = memory_check._remedies(MemoryDemand("GPU", free, parts), 1, options, world)
    assert ("--optimizer.offload_moments=true" in remedies) == (free == 40 * GIB)
