"""From settings that may be changed to a forecast of them: a model is cut and traced again only where that changes it.

Owns what is kept between forecasts. Knows how settings are applied to units, optimizer and batch; not how they are
chosen (``fit.py``), nor where a model comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.fsdp import CPUOffloadPolicy

from yafsdp_like.shard.forecast.activations import ExampleBatch, trace_step
from yafsdp_like.shard.forecast.traced_units import cut
from yafsdp_like.shard.forecast.training_forecast import (
    ForecastOptions,
    OptimizerMemory,
    forecast_training,
    least_nbytes,
)
from yafsdp_like.shard.runtime.activation_offload import offload_activations

if TYPE_CHECKING:
    from torch import nn

    from yafsdp_like.shard.forecast.activations import Trace
    from yafsdp_like.shard.forecast.fit import Settings
    from yafsdp_like.shard.forecast.quantities import TrainingForecast
    from yafsdp_like.shard.forecast.traced_units import Cluster, PlannedModel
    from yafsdp_like.shard.spec.unit_spec import UnitPolicy

Made = Callable[[], "tuple[nn.Module, list[nn.Module]]"]


@dataclass(frozen=True)
class SettingsForecaster:
    """Forecasts of one model under any ``Settings``; call it with them.

    A trace is kept by all that changes it: moments, where they are, residency and the number of ranks do not.
    """

    make: Made  # returns the model and its blocks, anew, best without memory
    batch: Callable[[int, int], ExampleBatch]  # of so many sequences and tokens
    policy: UnitPolicy
    cluster: Cluster
    options: ForecastOptions = field(default_factory=ForecastOptions)  # of which settings replace the optimizer's
    _models: dict[tuple[bool, bool], tuple[nn.Module, list[nn.Module]]] = field(default_factory=dict, repr=False)
    _planned: dict[Any, PlannedModel] = field(default_factory=dict, repr=False)
    _traces: dict[Any, Trace] = field(default_factory=dict, repr=False)

    def __call__(self, settings: Settings) -> TrainingForecast:
        """Return the forecast."""
        model, _ = self._model(settings)
        planned, options = self._plan(settings), self._options(settings)
        batch = self.batch(settings.micro_batch_size, settings.seq_len)
        dtypes = [
            (unit.early, *((p.compute_dtype, p.gradient_dtype, p.grad_dtype) for p in unit.params))
            for unit in planned.units
        ]
        key = (
            *(settings.micro_batch_size, settings.seq_len, settings.checkpointing, settings.offload_activations),
            *(settings.offload_parameters, options.step, tuple(dtypes)),
        )
        if key not in self._traces:
            self._traces[key] = trace_step(model, planned.units, batch, options.step)
        return forecast_training(model, planned, batch, options, self._traces[key].resharded(planned.units))

    def least_nbytes(self, settings: Settings) -> int:
        """Return bytes on the device that these settings take at least, whatever the batch. Nothing is traced."""
        model, _ = self._model(settings)
        return least_nbytes(model, self._plan(settings), self._options(settings))

    def _options(self, settings: Settings) -> ForecastOptions:
        moments = OptimizerMemory(settings.moments, bool(settings.offload_moments), settings.update_in_backward)
        return replace(self.options, optimizer=moments, accumulates=settings.num_accumulated > 1)

    def _model(self, settings: Settings) -> tuple[nn.Module, list[nn.Module]]:
        key = settings.checkpointing, settings.offload_activations
        if key not in self._models:
            model, blocks = self.make()
            for block in blocks if settings.checkpointing else ():
                checkpoint(block)
            if settings.offload_activations:
                offload_activations(blocks)
            self._models[key] = model, blocks
        return self._models[key]

    def _plan(self, settings: Settings) -> PlannedModel:
        key = plan_key(settings)
        if key not in self._planned:
            model, blocks = self._model(settings)
            policy = replace(
                self.policy,
                reshard_after_forward=settings.reshard_after_forward,
                split_master=settings.split_master,
                offload=CPUOffloadPolicy() if settings.offload_parameters else None,
                offload_remainder=settings.offload_moments == "and_remainder",
            )
            cluster = replace(self.cluster, num_ranks=settings.num_ranks)
            self._planned[key] = cut(model, blocks, policy, cluster)
        return self._planned[key]


def plan_key(settings: Settings) -> tuple[Any, ...]:
    """Return what a plan depends on."""
    return (
        settings.checkpointing,
        settings.offload_activations,
        settings.num_ranks,
        settings.reshard_after_forward,
        settings.split_master,
        settings.offload_parameters,
        settings.offload_moments == "and_remainder",
    )


def token_batch(micro_batch_size: int, seq_len: int) -> ExampleBatch:
    """Return tokens and targets, (B, T) each, for a model that returns its mean loss."""
    tokens = torch.empty(micro_batch_size, seq_len, dtype=torch.int64, device="meta")
    return ExampleBatch((tokens, tokens))
