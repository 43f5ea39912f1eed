"""What `launch.plan` says of a run: the launcher's own plan, a table, data, and whether it fits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launch import plan
from launch.build import build_model
from launch.config import load
from launch.forecast import forecast_of
from launch.recipe import recipe_of
from launch.world import join, leave
from yafsdp_like.shard.forecast.traced_units import Cluster

TINY = "configs/tiny.yaml"
ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = plan.main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_a_configuration_is_planned_as_it_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, TINY, "--world-size=1", "--json=-")
    world = join("cpu")
    try:
        options = load([TINY])
        built = build_model(recipe_of(options.model, options.seed), options, world).memory_plan()
    finally:
        leave()
    forecast = forecast_of(options, Cluster(1))
    assert status == 0
    assert (forecast.plan.regions, forecast.plan.slots) == (built.regions, built.slots)
    data = json.loads(out)
    assert data.pop("step_time")["forward"] > 0
    assert data == {**json.loads(json.dumps(forecast.as_dict())), "fits": True, "gpu_memory_nbytes": None}
    assert [phase["phase"] for phase in data["phases"]] == ["start", "forward", "backward", "update", "checkpoint"]


def test_the_exit_status_says_whether_it_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["preset:8b", "--world-size=2", "--seq-len=4096", "--precision.split_master=true"]
    status, out, _ = run(capsys, *arguments, "--gpu-memory=80GiB", f"--json={tmp_path / 'plan.json'}")
    assert status == 0 and "fits into 80.00 GiB" in out and "in forward, at root" in out
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["peak"]["phase"] == "forward" and data["fits"]
    status, out, _ = run(capsys, *arguments, "--gpu-memory=60GiB")
    assert status == 1 and "does not fit into 60.00 GiB" in out
    status, out, _ = run(capsys, *arguments, "--gpu-memory=65GiB", "--optimizer.moments=bf16")
    assert status == 0


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["preset:9b"], "unknown model.preset '9b'"),
        (["nowhere"], "'nowhere' is no file"),
        ([TINY, "--seq-lan=3"], "did you mean 'seq_len'?"),
        ([TINY, "--world-size=7"], "× 7 ranks = 56"),
        (["preset:tiny", "--world-size=16", "--model.transport=peer"], "use 'auto', or 'hierarchical'"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "") and words in err and err.count("\n") == 1


class Reads(nn.Module):
    """Its control flow depends on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(tokens))
        return logits * 2 if logits.mean() > 0 else logits


def plain() -> nn.Module:
    return nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 64))


def blind() -> nn.Module:
    return nn.Linear(8, 8)  # which takes no tokens


def broken() -> nn.Module:
    raise RuntimeError("the author's own trouble")


@pytest.mark.parametrize("function", ["blind", "broken"])
def test_a_model_that_fails_is_no_model_that_does_not_fit(capsys: pytest.CaptureFixture[str], function: str) -> None:
    status, out, err = run(capsys, f"{__name__}:{function}", "--world-size=1", "--seq-len=4")
    assert status == 2 and not out and "RuntimeError" in err.splitlines()[-1]


def mistaken() -> nn.Module:
    raise ValueError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"{__name__}:mistaken"], f"model.factory '{__name__}:mistaken' raised ValueError ("),
        ([":mistaken"], "model.factory ':mistaken' is not a package.module:function"),
        ([TINY, "--world-size=-1"], "--world-size must be at least 1, found -1"),
        ([TINY, "--micro-batch=0"], "--micro-batch must be at least 1, found 0"),
        (["preset:tiny", "--micro-batch=-1"], "--micro-batch must be at least 1, found -1"),
        ([TINY, "--seq-len=-8"], "--seq-len must be at least 1, found -8"),
    ],
)
def test_a_number_below_one_and_a_function_without_words_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2 and not out and err.startswith(f"error: {words}") and err.count("\n") == 1


def test_nonsense_is_refused_with_what_is_expected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for option, words in (
        ("--gpu-memory=80 bananas", "expected a number of bytes such as 40GiB"),
        ("--fit=-5GiB", "expected a number of bytes such as 40GiB"),
        ("--world-size=0", "--world-size must be at least 1, found 0"),
        (f"--json={tmp_path / 'nowhere' / 'plan.json'}", "there is no directory"),
    ):
        status, out, err = run(capsys, TINY, option)
        assert status == 2 and not out and words in err.splitlines()[-1]


def test_any_function_that_returns_a_module_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, f"{__name__}:plain", "--seq-len=32", "--micro-batch=2", "--world-size=2")
    assert status == 0 and "2 × 32 tokens a forward, 1 forward a step\n" in out and "logits" not in out
    status, _, err = run(capsys, f"{__name__}:Reads", "--seq-len=32")
    assert status == 2 and "control flow depends on what it computes" in err and "test_plan.py" in err


def test_a_plan_with_offloaded_activations_has_them_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    long = (TINY, "--world-size=1", "--seq-len=4096", "--micro-batch=8")
    plain, offloaded = (
        json.loads(run(capsys, *long, *more, "--json=-")[1]) for more in ([], ["--model.offload_activations=true"])
    )
    forward = offloaded["phases"][1]
    assert forward["nbytes"]["activations"] < plain["phases"][1]["nbytes"]["activations"]
    assert forward["host_nbytes"]["activations"] > 0 and "host" in offloaded["link_nbytes"]
    assert "host" not in plain["link_nbytes"] and offloaded["notes"] == plain["notes"] == []


@pytest.mark.slow
def test_seventy_billion_parameters_on_1024_ranks_take_seconds() -> None:
    arguments = ["preset:70b", "--world-size=1024", "--seq-len=8192", "--json=-"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.plan", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    data: dict[str, Any] = json.loads(done.stdout)
    assert data["world_size"] == 1024 and data["flops"] > 6 * 70e9 * 8192
    assert data["link_nbytes"]["network"] > data["link_nbytes"]["peers"] / 8


def test_no_process_group_is_needed_or_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert not dist.is_initialized()
    run(capsys, "preset:tiny", "--world-size=64")
    assert not dist.is_initialized()
