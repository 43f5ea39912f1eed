"""From the options of a model that is served to an engine that can be asked, on the command line and over HTTP.

Owns where it runs, what stands where an option says nothing, and the order in which things are opened and closed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from launch.options import GenerateOptions, ServeOptions
from launch.world import join, leave
from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.comm.tp_group import TPGroup
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import PLAIN
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.serving_plan import plan_serving
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.directory import sampling_defaults
from yafsdp_like.inference.weights.loading import Model, load_planned, open_model, site_of, world_transport
from yafsdp_like.inference.weights.store import PlacedWeights
from yafsdp_like.kernels.sampling_params import SamplingParams

LIBRARIES_NBYTES = 2**30  # of a GPU, what CUDA's libraries and graphs may take beside the plan
CPU_KV_NBYTES = 2**30  # where nothing is said


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be asked."""

    model: Model
    codec: Codec
    engine: Engine
    device: torch.device
    max_seq_len: int
    lockstep: bool  # ranks must step together
    tp_group: TPGroup | None  # and these also compute together
    sampling: SamplingParams = PLAIN  # where a request says nothing


@contextlib.contextmanager
def load_model(options: GenerateOptions | ServeOptions, say: Callable[[str], None]) -> Iterator[LoadedModel]:
    """The model that was asked for, on this rank; `say` is told the plan before anything is allocated.

    Raises ValueError for what cannot be, and ImportError where a package is missing.
    """
    model, load = open_model(options.model), options.load
    codec = load_codec(model, load.tokenizer)
    sampling = sampling_defaults(model.directory if load.generation_config == "model" else None)
    device = _join(load.device)
    try:
        transport = world_transport(device)
        engine_options = with_memory_limit(options.engine, device)
        site = site_of(device, load.dtype and getattr(torch, load.dtype), transport)
        plan = plan_serving(model.config, engine_options, site, load.mode)
        say(str(plan))
        weights = load_planned(model, plan, device, transport)
        with _closing(weights):
            yield _ready(model, codec, weights, engine_options, sampling)
    finally:
        leave()


@contextlib.contextmanager
def _closing(weights: PlacedWeights) -> Iterator[None]:
    """Closes them in the end, where ranks meet; but not after an error that has left others in the middle of a step."""
    try:
        yield
    except BaseException:
        if not weights.lockstep:
            weights.close()
        raise
    weights.close()


def _ready(
    model: Model, codec: Codec, weights: PlacedWeights, options: EngineOptions, sampling: SamplingParams
) -> LoadedModel:
    engine, longest = Engine(weights, options), weights.plan.max_seq_len
    return LoadedModel(model, codec, engine, weights.device, longest, weights.lockstep, weights.tp_group, sampling)


def _join(device_type: str) -> torch.device:
    """This rank's device; with torchrun, after joining the others."""
    if "RANK" in os.environ:
        return join(device_type).device
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU here; say --device=cpu")
    return torch.device("cuda" if device_type != "cpu" and torch.cuda.is_available() else "cpu")


def load_codec(model: Model, directory: str | None = None) -> Codec:
    """The tokenizer in `directory`, or the model's own; the model's directory says, too, what ends a text.

    Raises ValueError where it is not one of this model's.
    """
    place = model.directory if directory is None else Path(directory)
    if place is None:
        raise ValueError(f"{model.name} has no tokenizer: name a directory that has, by --tokenizer")
    codec = Codec.load(place, model.directory)
    if codec.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {place} has {codec.vocab_size} tokens, the model's vocabulary only "
            f"{model.config.vocab_size}: it is not this model's"
        )
    return codec


def with_memory_limit(options: EngineOptions, device: torch.device) -> EngineOptions:
    """Limit memory, where nothing is given, to free GPU memory less `LIBRARIES_NBYTES`, or to `CPU_KV_NBYTES`."""
    if options.memory_limit_nbytes is None and device.type == "cuda":
        limit = max(1, torch.cuda.mem_get_info(device)[0] - LIBRARIES_NBYTES)
        limit = min(all_gather_object(limit)) if dist.is_initialized() else limit  # ranks plan alike
        return replace(options, memory_limit_nbytes=limit)
    if options.memory_limit_nbytes is None and options.kv_nbytes is None:
        return replace(options, kv_nbytes=CPU_KV_NBYTES)
    return options
