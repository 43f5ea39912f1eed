"""A pool simulated with its models' homes does what the real one was measured to do, on the same requests.

The measured file does not hold that run's step times. Here they follow from what other runs of these shapes were
measured to take: prompts of 512 tokens by model, steps of 8B that decode 1 and 32 rows, and for other models as much as
8B's beyond reading weights, for each layer.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.pool_popular import names_of
from bench.pool_targets import simulated_pool
from bench.sim_device import HomeWeights, SimHardware, SimModel
from bench.sim_run import Scenario, Simulation
from bench.sim_traces import popularity, trace
from yafsdp_like.hardware import H200, H200_RATES
from yafsdp_like.inference import EngineOptions, PooledModel, PoolOptions, plan_pool
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.fleet.schedule import ScheduleOptions
from yafsdp_like.inference.fleet.times import StepLines
from yafsdp_like.inference.pool.plan import PoolPlan
from yafsdp_like.models import PRESETS, DecoderConfig

GIB = 1 << 30
RESULTS = Path(__file__).parents[2] / "scripts/results"
MODELS = ("8b", "3b", "1b", "8b", "3b", "1b")
MEMORY = H200_RATES.memory_nbytes
LINES = StepLines(0.01)


def measured(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def lines_of(plan: PoolPlan) -> tuple[dict[DecoderConfig, StepLines], float]:
    """Step times of each shape, and the link's bytes a second."""
    pool = measured("2026-11-29-h200-pool.json")
    prompt_s = {row["model"]: row["awake_ms"] / 1e3 for row in pool["cold"]}
    steps = {row["batch"]: row for row in measured("2026-11-30-h200-8b-decode.json")["results"]["decode"]}
    low_s, high_s = (steps[batch]["step_ms"]["median"] / 1e3 for batch in (1, 32))
    of_8b = plan.models["8b.0"]
    key_s = of_8b.token_nbytes / MEMORY
    row_s = (high_s - low_s) / 31 - steps[32]["context"] * key_s
    layer_s = (low_s - row_s - steps[1]["context"] * key_s - of_8b.image_nbytes / MEMORY) / 32
    lines = {}
    for name, model in plan.models.items():
        num_layers = model.serving.config.num_layers
        lines[model.serving.config] = StepLines(
            num_layers * layer_s + model.image_nbytes / MEMORY,
            row_s * num_layers / 32,
            model.token_nbytes / MEMORY,
            prefill_row_s=prompt_s[name.partition(".")[0]] / 512,
        )
    return lines, pool["link"]["gb_per_s"] * 1e9


def simulated(rate: float) -> dict[str, Any]:
    """12 s of that run's requests. Its pool did not refuse by memory yet, so neither does this one."""
    own = EngineOptions(max_batch_size=64, max_batch_tokens=2048, max_seq_len=1024)
    names = names_of(MODELS)
    pooled = {n: PooledModel(PRESETS[p], torch.bfloat16, own) for n, p in zip(names, MODELS, strict=True)}
    plan = plan_pool(pooled, PoolOptions(38 * GIB, kv_nbytes=10 * GIB), H200)
    lines, link = lines_of(plan)
    models, hardware = simulated_pool(plan, lines, link, 512)
    rates = {name: rate * share for name, share in zip(names, popularity(len(names), 1.0), strict=True)}
    asked = trace(rates, 12.0, lambda source: (512, 128), seed=0)
    scenario = Scenario(models, hardware, Targets(4.0, 0.05), options=ScheduleOptions(), max_tokens=128)
    return Simulation(scenario, asked).run().figures()


@pytest.mark.parametrize("rate", [24.0, 32.0, 40.0])
def test_the_readers_time_within_targets_is_what_was_measured(rate: float) -> None:
    (row,) = (
        r for r in measured("2026-11-30-h200-pool-targets.json")["targets"] if r["way"] == "pool" and r["rate"] == rate
    )
    found = simulated(rate)
    assert found["num_requests"] == row["num_requests"]  # the same requests arrive
    assert found["share_of_time"] == pytest.approx(row["share_of_time"], rel=0.15), found
    assert found["first_token_s"]["p99"] == pytest.approx(row["first_token_s"]["p99"], rel=0.2), found


def test_a_model_gives_way_to_those_whose_homes_meet_its_own_alone() -> None:
    homes = {"a": range(4), "b": range(2, 6), "c": range(6, 8)}
    models = {name: SimModel(8, 1, LINES, home) for name, home in homes.items()}
    weights = HomeWeights(SimHardware(8, 8, link=4.0), models)
    assert [weights.wake(name, 0.0) for name in ("a", "c", "a")] == [2.0, 2.0, 0.0]
    assert weights.prefetch("b", "c", 10.0) == 10.0 and weights.missing_s("b") == 2.0, "its home is taken"
    assert weights.wake("b", 10.0) == 2.0 and not weights.is_awake("a") and weights.is_awake("c")


def test_what_is_prefetched_takes_what_is_left_of_its_copy() -> None:
    models = {"a": SimModel(8, 1, LINES, range(4)), "b": SimModel(8, 1, LINES, range(4, 8))}
    weights = HomeWeights(SimHardware(8, 8, link=4.0), models)
    weights.wake("a", 0.0)
    assert weights.prefetch("b", "a", 1.0) == 3.0 == weights.prefetch("b", "a", 1.5)
    assert weights.missing_s("b") == 0.0 and weights.wake("b", 2.5) == 0.5
