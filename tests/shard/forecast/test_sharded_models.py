"""Forecasts of models that are sharded already, and of plans that are drawn without ranks."""

from typing import Any

import torch
from torch import nn

from tests.ranks import run_ranks
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.shard.forecast.activations import ExampleBatch
from yafsdp_like.shard.forecast.traced_units import Cluster, cut
from yafsdp_like.shard.forecast.training_forecast import ForecastOptions
from yafsdp_like.shard.spec.unit_spec import UnitPolicy

POLICY = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
TOKENS = torch.zeros(2, 32, dtype=torch.int64)


def sharded(model: nn.Module) -> Any:
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=POLICY)
    return model


def compare() -> tuple[Any, ...]:
    """On each rank: the plan drawn without ranks and the engine's own, before and after training; gradients."""
    plain = Decoder(PRESETS["tiny"])
    drawn = cut(plain, list(plain.layers), UnitPolicy(POLICY, None), Cluster(2, transport="process_group"))
    model = sharded(plain)
    batch, options = ExampleBatch((TOKENS, TOKENS)), ForecastOptions(on_gpu=False)
    before = model.memory_plan(batch, options)
    model(TOKENS, TOKENS).backward()
    grads = [p.grad.to_local().clone() for p in model.parameters()]
    after = model.memory_plan((TOKENS, TOKENS), options)  # a tuple is what the forward is called with
    same = all(torch.equal(p.grad.to_local(), grad) for p, grad in zip(model.parameters(), grads, strict=True))
    model(TOKENS, TOKENS).backward()  # the trace has left nothing behind
    report, plan = model.memory_report(), model.memory_plan()
    assert report.arena_nbytes == plan.nbytes
    own = (plan.regions, plan.slots)
    return own == (drawn.layout.plan.regions, drawn.layout.plan.slots), before == after, same, len(report.spills)


def test_a_plan_drawn_without_ranks_is_what_two_ranks_reserve() -> None:
    for found in run_ranks(compare):
        assert found == (True, True, True, 0)
