"""From a training configuration to its forecast: the model without memory, cut for ranks that need not be there.

Owns which of a run's options a forecast depends on. Prints nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from launch.build import checkpoint_blocks
from launch.config import Config
from launch.recipe import Recipe, recipe_of
from launch.world import World
from yafsdp_like import MixedPrecisionPolicy, offload_activations
from yafsdp_like.shard.forecast.activations import ExampleBatch
from yafsdp_like.shard.forecast.quantities import TrainingForecast
from yafsdp_like.shard.forecast.traced_units import Cluster, PlannedModel, cut
from yafsdp_like.shard.forecast.training_forecast import ForecastOptions, OptimizerMemory, forecast_training
from yafsdp_like.shard.memory_report import AllocatorPeaks, MemoryReport, compared
from yafsdp_like.shard.spec.unit_spec import UnitPolicy


@dataclasses.dataclass(frozen=True)
class TrainingStepShape:
    """Sequences of one forward on one rank, tokens of each, and forwards per optimizer step."""

    micro_batch_size: int
    seq_len: int
    num_accumulated: int

    @classmethod
    def of(cls, options: Config, num_ranks: int) -> TrainingStepShape:
        """Return a configuration's; ValueError unless its global batch divides evenly."""
        count = options.num_accumulated(num_ranks)
        return cls(options.global_batch_size // num_ranks // count, options.seq_len, count)


def forecast_of(options: Config, cluster: Cluster) -> TrainingForecast:
    """Forecast one rank's memory, operations and transfers of a run on ``cluster``. Needs no GPU and no ranks.

    Raises ValueError for options that no run can have, and for a model whose forward reads values that are not known.
    """
    shape = TrainingStepShape.of(options, cluster.num_ranks)
    model, blocks = model_without_memory(recipe_of(options.model, options.seed))
    checkpoint_blocks(blocks, options.model)
    if options.model.offload_activations:
        offload_activations(blocks)
    return forecast_training(
        model, planned(model, blocks, options, cluster), batch_of(shape), choices_of(options, shape)
    )


def model_without_memory(recipe: Recipe) -> tuple[nn.Module, list[nn.Module]]:
    """Return the model on the meta device if what makes it can do that, and the blocks to shard one by one."""
    try:
        with torch.device("meta"):
            return recipe.make()
    except (NotImplementedError, RuntimeError):  # it computes values from its parameters, or reads files
        return recipe.make()


def planned(model: nn.Module, blocks: list[nn.Module], options: Config, cluster: Cluster) -> PlannedModel:
    """Return the units that a run makes of the model, and their plan."""
    transport: Any = options.model.transport
    return cut(model, list(blocks), policy_of(options), dataclasses.replace(cluster, transport=transport))


def policy_of(options: Config) -> UnitPolicy:
    """Return what a run asks of every unit."""
    precision = options.precision
    mixed = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision.param_dtype), reduce_dtype=getattr(torch, precision.reduce_dtype)
    )
    grad_dtype = None if precision.grad_dtype == "float32" else torch.bfloat16
    on_host = options.optimizer.offload_moments == "and_remainder"
    return UnitPolicy(mixed, None, precision.split_master, grad_dtype, offload_remainder=on_host)


def batch_of(shape: TrainingStepShape) -> ExampleBatch:
    """Return tokens and targets of one forward, without memory."""
    tokens = torch.empty(shape.micro_batch_size, shape.seq_len, dtype=torch.int64, device="meta")
    return ExampleBatch((tokens, tokens))


def choices_of(options: Config, shape: TrainingStepShape) -> ForecastOptions:
    """Return what else of a run its memory depends on."""
    of_optimizer, of_checkpoint = options.optimizer, options.checkpoint
    on_host = bool(of_optimizer.offload_moments)
    optimizer = OptimizerMemory(of_optimizer.moments, on_host, of_optimizer.update_in_backward)
    copies = of_checkpoint.asynchronous and 0 < of_checkpoint.every < options.num_steps
    return ForecastOptions(optimizer, shape.num_accumulated > 1, copies, is_recorded=options.model.graph)


def memory_report(
    model: Any, optimizer: torch.optim.Optimizer, options: Config, world: World, peaks: AllocatorPeaks | None
) -> tuple[MemoryReport, list[str]]:
    """Return what a run's step was to take beside what it took; and why not, where it cannot be forecast.

    ``peaks`` are the allocator's of the whole run. A trace of the model that has run says what was to come.
    """
    shape, found = TrainingStepShape.of(options, world.size), model.memory_report()
    forecast, note = None, []
    try:
        choices = dataclasses.replace(choices_of(options, shape), on_gpu=world.device.type == "cuda")
        forecast = model.memory_plan(batch_of(shape), choices)
    except Exception as why:  # of the user's module, or of what it reads: the run itself is done
        note = [f"activations are not forecast: {type(why).__name__}: {' '.join(str(why).split())}"]
    plan = model.memory_plan() if forecast is None else forecast.plan
    return dataclasses.replace(found, rows=compared(model, plan, forecast, optimizer, peaks)), note
