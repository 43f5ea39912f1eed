"""What of a training configuration to change so that it fits a GPU: keys and values of ``launch.train``.

Owns which keys may change, and how a configuration is read as ``Settings`` and they as keys. The search is in
``shard/forecast/fit.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from launch.config import Config
from launch.forecast import TrainingStepShape, choices_of, model_without_memory, policy_of
from launch.recipe import recipe_of
from yafsdp_like.hardware import MachineRates, machine_rates
from yafsdp_like.models import DecoderConfig
from yafsdp_like.shard.forecast import fit
from yafsdp_like.shard.forecast.fit import FitReport, Search, Settings
from yafsdp_like.shard.forecast.quantities import TrainingForecast
from yafsdp_like.shard.forecast.settings import SettingsForecaster, token_batch
from yafsdp_like.shard.forecast.step_time import StepKind, StepTime, step_time
from yafsdp_like.shard.forecast.traced_units import Cluster

KEYS = {  # of settings that have one; a step's sequences go by the ranks
    "micro_batch_size": "--micro_batch_size={}",
    "seq_len": "--seq_len={}",
    "num_ranks": "{} ranks",
    "split_master": "--precision.split_master={}",
    "moments": "--optimizer.moments={}",
    "update_in_backward": "--optimizer.update_in_backward={} --optimizer.max_grad_norm=null",
    "checkpointing": "--model.checkpoint_activations={}",
    "offload_activations": "--model.offload_activations={}",
    "offload_moments": "--optimizer.offload_moments={}",
}


def in_words(name: str, value: Any) -> str:
    """Return a change as it is written on the command line."""
    return KEYS[name].format(str(value).lower() if isinstance(value, bool) else value)


def settings_of(options: Config, num_ranks: int) -> Settings:
    """Return what of a configuration may change; ValueError unless its global batch divides evenly."""
    shape = TrainingStepShape.of(options, num_ranks)
    return Settings(
        options.global_batch_size,
        shape.seq_len,
        shape.micro_batch_size,
        num_ranks,
        split_master=options.precision.split_master,
        moments=options.optimizer.moments,
        update_in_backward=options.optimizer.update_in_backward,
        checkpointing=options.model.checkpoint_activations,
        offload_activations=options.model.offload_activations,
        offload_moments=options.optimizer.offload_moments,
    )


def may_change(options: Config) -> list[str]:
    """Return the names of settings that a run of this configuration may have otherwise."""
    model = options.model
    has_no_blocks = model.factory is not None and not model.blocks
    excluded = {
        "split_master": options.precision.param_dtype != "bfloat16",
        "checkpointing": model.compile or model.offload_activations or has_no_blocks,
        "offload_activations": model.graph or model.checkpoint_activations or has_no_blocks,
        "update_in_backward": model.graph or options.optimizer.nonfinite == "skip",
    }
    return [name for name in fit.CHANGES if name in KEYS and not excluded.get(name, False)]


def search_of(options: Config, cluster: Cluster, device_nbytes: int, rates: MachineRates) -> Search:
    """Return the search over what may change, on GPUs of this size and speed."""
    recipe = recipe_of(options.model, options.seed)
    choices = choices_of(options, TrainingStepShape.of(options, cluster.num_ranks))
    forecaster = SettingsForecaster(
        partial(model_without_memory, recipe), token_batch, policy_of(options), cluster, choices
    )
    config = getattr(recipe, "config", None)
    return Search(
        forecaster,
        device_nbytes,
        rates,
        may_change(options),
        clips=options.optimizer.max_grad_norm is not None,
        is_graph=options.model.graph,
        least_nbytes=forecaster.least_nbytes,
        max_seq_len=config.max_seq_len if isinstance(config, DecoderConfig) else 1 << 21,
    )


def report(options: Config, forecast: TrainingForecast, cluster: Cluster, device_nbytes: int) -> FitReport:
    """Search what fits GPUs of this size; see ``shard/forecast/fit.py``. ``forecast`` is of the options as they are."""
    rates = machine_rates(num_ranks=cluster.num_ranks)
    search = search_of(options, cluster, device_nbytes, rates)
    base = settings_of(options, cluster.num_ranks)
    search.know(base, forecast)
    found = fit.report(search, base, in_words)
    return replace(found, text=f"{found.text}\ntimes are predicted from {rates.source}")


def as_data(found: FitReport) -> dict[str, Any]:
    """Return the numbers as JSON holds them."""
    rows = [
        {"changes": [in_words(*change) for change in one.changes.items()], "seconds": one.seconds, "nbytes": one.nbytes}
        for one in found.found
    ]
    return {"fits": found.fits, "settings": rows}


def predicted_time(options: Config, forecast: TrainingForecast) -> StepTime:
    """Return the time of a step of a forecast, on this machine or, without a GPU, on an H200."""
    num_ranks = forecast.plan.world_size
    number = TrainingStepShape.of(options, num_ranks).num_accumulated
    kind = StepKind(options.optimizer.max_grad_norm is not None, options.model.graph, number)
    return step_time(forecast, machine_rates(num_ranks=num_ranks), kind)


def changes_that_fit(options: Config, num_ranks: int, device: torch.device) -> list[str]:
    """Return the smallest changes, each as keys and what it costs, with which a rank that has run out has room.

    Where the forecast had room, what was free was less than expected: then what takes a tenth less than the forecast.
    """
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 62
    rates = machine_rates(num_ranks=num_ranks)
    search = search_of(options, Cluster(num_ranks), total, rates)
    base = settings_of(options, num_ranks)
    if search.fits(base):
        limit = int(0.9 * search.forecast_of(base).peak.total_nbytes)
        search = search_of(options, Cluster(num_ranks), limit, rates)
    seconds = search.seconds(base)
    return [fit.describe(one, in_words, seconds).strip() for one in fit.smallest_changes(search, base)]
