"""From the options of a model that is served to an engine that can be asked, on the command line and over HTTP.

Owns where it runs, what stands where an option says nothing, and the order in which things are opened and closed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launch.options import NO_DEFAULTS
from launch.world import join, leave
from yafsdp_like.comm.consistency import share
from yafsdp_like.comm.tp_group import Team
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
class Opened:
    """A model that is ready to be asked."""

    model: Model
    codec: Codec
    engine: Engine
    device: torch.device
    max_seq_len: int
    lockstep: bool  # ranks must step together
    team: Team | None  # and these also compute together
    sampling: SamplingParams = PLAIN  # where a request says nothing


@contextlib.contextmanager
def opened(arguments: argparse.Namespace, max_waiting: int, say: Callable[[str], None]) -> Iterator[Opened]:
    """The model that was asked for, on this rank; `say` is told the plan before anything is allocated.

    Raises ValueError for what cannot be, and ImportError where a package is missing.
    """
    model = open_model(arguments.model)
    codec = codec_of(model, arguments.tokenizer)
    takes_defaults = arguments.generation_config != NO_DEFAULTS
    sampling = sampling_defaults(model.directory if takes_defaults else None)
    device = _join(arguments.device)
    try:
        transport = world_transport(device)
        options = engine_options(arguments, device, max_waiting)
        site = site_of(device, arguments.dtype and getattr(torch, arguments.dtype), transport)
        plan = plan_serving(model.config, options, site, arguments.mode)
        say(str(plan))
        weights = load_planned(model, plan, device, transport)
        with _closing(weights):
            yield _ready(model, codec, weights, options, sampling)
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
) -> Opened:
    engine, longest = Engine(weights, options), weights.plan.max_seq_len
    return Opened(model, codec, engine, weights.device, longest, weights.lockstep, weights.team, sampling)


def _join(device_type: str) -> torch.device:
    """This rank's device; with torchrun, after joining the others."""
    if "RANK" in os.environ:
        return join(device_type).device
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU here; say --device=cpu")
    return torch.device("cuda" if device_type != "cpu" and torch.cuda.is_available() else "cpu")


def codec_of(model: Model, directory: str | None = None) -> Codec:
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


def engine_options(arguments: argparse.Namespace, device: torch.device, max_waiting: int) -> EngineOptions:
    """What the arguments of `add_model_arguments` say, and what is there where they say nothing."""
    limit, kv = arguments.memory_limit, arguments.kv_memory
    if limit is None and device.type == "cuda":
        limit = max(1, torch.cuda.mem_get_info(device)[0] - LIBRARIES_NBYTES)
        limit = min(share(limit)) if dist.is_initialized() else limit  # ranks plan alike
    elif limit is None and kv is None:
        kv = CPU_KV_NBYTES
    return EngineOptions(
        memory_limit_nbytes=limit,
        kv_nbytes=kv,
        host_kv_nbytes=arguments.host_kv,
        max_batch_size=arguments.max_batch_size,
        max_batch_tokens=arguments.max_batch_tokens,
        max_seq_len=arguments.max_seq_len,
        kv_dtype=arguments.kv_dtype,
        max_waiting=max_waiting,
        graphs=not arguments.no_graphs,
    )
