# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)
"""A run whose activations wait in host memory: the same losses, and words about what that costs."""

import re
from pathlib import Path

import pytest

from launch import config
from tests.launch.test_going_on import said
from tests.launch.test_train import file, losses, text, train

OFFLOADED = "--model.offload_activations=true"
LONG = ("--seq_len=512", "--global_batch_size=32", "--num_steps=2", "--micro_batch_size=16")  # more than a MiB each


@pytest.mark.slow
def test_losses_are_those_of_activations_on_the_device_and_the_cost_is_said(file: Path) -> None:
    whole = losses(train(file, *LONG))
    assert losses(train(file, *LONG, OFFLOADED, output="other")) == whole
    words = said(
        file, *LONG, "--global_batch_size=16", OFFLOADED, "--output_dir=" + str(file.parent / "third"), world_size=1
    )
    found = re.search(
        r"activations take ([\d.]+) MiB of host memory; each step copies ([\d.]+) MiB there.* waited \d", words
    )
    assert found and float(found[1]) == float(found[2]) > 1, words


def test_recorded_steps_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"model\.graph .*model\.offload_activations"):
        config.load([OFFLOADED, "--model.graph=true"])


def test_a_factory_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.offload_activations .*name the factory's by model\.blocks"):
        config.load([OFFLOADED, "--model.preset=null", "--model.factory=a:b"])
