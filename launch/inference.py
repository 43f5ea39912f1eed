"""From the options of a model that is served to an engine that can be asked, on the command line and over HTTP.

Owns where it runs, what stands where an option says nothing, and the order in which things are opened and closed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.options import GenerateOptions, ServeOptions
from launch.world import join, leave
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import PLAIN
from yafsdp_like.inference.http.options import HttpOptions
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.directory import sampling_defaults
from yafsdp_like.inference.text.image_reader import ImageReader
from yafsdp_like.inference.weights.loading import Model, open_model, world_transport
from yafsdp_like.kernels.sampling_params import SamplingParams


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be asked."""

    model: Model
    codec: Codec
    engine: Engine
    sampling: SamplingParams = PLAIN  # where a request says nothing
    images: ImageReader | None = None  # of a model that sees images; None: it takes none


@contextlib.contextmanager
def load_model(options: GenerateOptions | ServeOptions, say: Callable[[str], None]) -> Iterator[LoadedModel]:
    """The model that was asked for, on this rank; `say` is called with the plan before anything is allocated.

    Raises ValueError for what cannot be, and ImportError where a package is missing.
    """
    model, load = open_model(options.model), options.load
    codec = load_codec(model, load.tokenizer)
    sampling = sampling_defaults(model.directory if load.generation_config == "model" else None)
    device = join_device(load.device)
    dtype = load.dtype and getattr(torch, load.dtype)
    try:
        transport = world_transport(device)
        with Engine.load(
            model,
            options.engine,
            device=device,
            dtype=dtype,
            mode=load.mode,
            transport=transport,
            on_plan=lambda plan: say(str(plan)),
            adapters=options.adapters if isinstance(options, ServeOptions) else None,
        ) as engine:
            images = None
            if isinstance(options, ServeOptions):
                images = load_images(model, options.http, say, is_shared=engine.tp_group is not None)
            yield LoadedModel(model, codec, engine, sampling, images)
    finally:
        leave()


def join_device(device_type: str) -> torch.device:
    """This rank's device; with torchrun, after joining the others."""
    if "RANK" in os.environ:
        return join(device_type).device
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU here; say --device=cpu")
    return torch.device("cuda" if device_type != "cpu" and torch.cuda.is_available() else "cpu")


def load_images(
    model: Model, options: HttpOptions, say: Callable[[str], None], is_shared: bool = False
) -> ImageReader | None:
    """What reads a model's images; None where it sees none, or, after a warning, where they cannot be read.

    ``is_shared``: tensor parallel ranks share the model, and take no images.
    """
    if model.config.vision is None or model.directory is None:
        return None
    if is_shared:
        say("warning: images are refused: tensor parallel ranks take none")
        return None
    try:
        return ImageReader.load(model.directory, model.config.vision, options.max_image_pixels)
    except (ImportError, ValueError) as error:
        say(f"warning: images are refused: {error}")
        return None


def load_codec(model: Model, directory: str | None = None) -> Codec:
    """The tokenizer in `directory`, or the model's own; the model's directory says, too, what ends a text.

    Raises ValueError where it is not one of this model's.
    """
    place = model.directory if directory is None else Path(directory)
    if place is None:
        raise ValueError(
            f"{model.name} has no tokenizer: name a directory that has, by --tokenizer (in a pool's file: tokenizer)"
        )
    codec = Codec.load(place, model.directory)
    if codec.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {place} has {codec.vocab_size} tokens, the model's vocabulary only "
            f"{model.config.vocab_size}: it is not this model's"
        )
    return codec
