"""What the launcher says: sizes in units that people read, and commands that explain themselves."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import estimate_scale
import plot_serve
import plot_simulation
import plot_train
import simulate_pool
from bench.options import parse_options
from bench.serve_options import parse_options as parse_serve_options
from launch.build import describe_plan
from launch.config import OptimizerOptions
from launch.world import World


class Plan:
    """A stand-in for a memory plan without remainders in host memory."""

    def __str__(self) -> str:
        return "the plan"

    def nbytes_of(self, kind: str) -> int:
        return 0


class Planned(torch.nn.Module):
    """A stand-in for a sharded model of so many parameters, which has a plan already."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_params, device="meta"))

    def memory_plan(self) -> Plan:
        return Plan()


class Mesh:
    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("num_params", "moments"), [(100, "400 B"), (870_208, "3.32 MiB"), (16_060_522_496, "59.83 GiB")]
)
def test_moments_are_told_in_units_that_people_read(num_params: int, moments: str) -> None:
    mesh: Any = Mesh()
    words = describe_plan(Planned(num_params), World(0, torch.device("cpu"), mesh), OptimizerOptions())
    assert words == f"the plan\n  AdamW's moments, {moments}, and activations come on top"


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "bench_train": lambda arguments: parse_options(arguments, ("ours", "fsdp2")),
    "bench_serve": lambda arguments: parse_serve_options(arguments, 1),
    "estimate_scale": estimate_scale.main,
    "plot_train": plot_train.main,
    "plot_serve": plot_serve.main,
    "plot_simulation": plot_simulation.main,
    "simulate_pool": simulate_pool.main,
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "bench_train",
            {"--batch-size": "default: 1", "--lr": "(float); default: 1e-05", "--rounds": "default: 2"},
        ),
        ("bench_serve", {"--context": "(int); default: 1024", "--seconds": "(float); default: 6.0"}),
        ("estimate_scale", {"--reports": "of bench_train.py on two GPUs"}),
        ("plot_train", {}),
        ("plot_serve", {}),
        ("plot_simulation", {}),
        (
            "simulate_pool",
            {"--models": "numbers of models", "--rate": "(float); default: 0.1", "--seeds": "default: 1"},
        ),
    ],
)
def test_a_script_explains_every_option(name: str, said: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](["--help"])
    assert ended.value.code == 0
    words = capsys.readouterr().out
    options = dict(re.findall(r"^  (--[\w-]+)(.*(?:\n {10,}.*)*)", words, re.MULTILINE))
    assert said.keys() <= options.keys()
    for option, text in options.items():
        explained = " ".join(text.split())
        assert re.search(r"[a-z]{2}", re.sub(r"^\{.*?\}", "", explained)), f"{option} is not explained: {explained}"
        assert said.get(option, "") in explained
