"""Which model is trained: our decoder by preset or Hugging Face directory, or any module that a function returns.

Owns what differs between them: how they are made, filled and written for others. Knows nothing of sharding or training.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from launch.config import ModelOptions
from launch.factory import Exporter, FactoryRecipe
from yafsdp_like.models import PRESETS, Decoder, DecoderConfig
from yafsdp_like.models.hf import GENERATION_CONFIG_NAME, load_hf_config, load_hf_weights, save_hf
from yafsdp_like.models.hf_config import config_to_hf


# Writes whole weights, by name, as a directory that transformers loads; the ids of tokens go into its config.json.
class Recipe(Protocol):
    """A model that can be made on every rank."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model takes."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint's weights mean nothing without, beside their shapes: plain values, as JSON holds them."""

    def make(self) -> tuple[nn.Module, list[nn.Module]]:
        """The model, unsharded and the same on all ranks, and the blocks to shard one by one.

        Called with tokens (B, T) it gives logits (B, T, V); with targets (B, T) too, the mean loss.
        """

    def fill(self, model: Any, device: torch.device, from_checkpoint: bool) -> None:
        """Give the sharded model its first values on `device`; a checkpoint may overwrite them."""

    def exporter(self) -> Exporter:
        """What writes such a model, without the model itself; ValueError where transformers has no equal."""


def recipe_of(options: ModelOptions, seed: int) -> Recipe:
    """What the options ask for; ValueError if there is no such thing."""
    if options.factory is not None:
        return FactoryRecipe(options.factory, options.factory_args, options.blocks, seed)
    return DecoderRecipe(decoder_config(options), options.hf_dir, seed)


def exporter_of(recipe: Recipe, wanted: bool | None) -> tuple[Exporter | None, str]:
    """What writes such a model for others, and where nothing does that was not declined, the words for it.

    Raises ValueError where it is asked for and cannot be.
    """
    if wanted is False:
        return None, ""
    try:
        return recipe.exporter(), ""
    except ValueError as error:
        if wanted:
            raise
        return None, f"checkpoints have no directory for transformers: {error}"


# --- our decoder ---


@dataclasses.dataclass(frozen=True)
class DecoderRecipe:
    """Made on the meta device; filled from a Hugging Face directory, each rank reading its own rows, or from a seed."""

    config: DecoderConfig
    hf_dir: str | None
    seed: int

    @property
    def vocab_size(self) -> int:
        """Return the decoder's vocabulary size."""
        return self.config.vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        """Return the fields that change what weights of the same shapes mean."""
        experts = None if self.config.experts is None else dataclasses.asdict(self.config.experts)
        names = ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "qk_norm", "tie_embeddings")
        return {**{name: getattr(self.config, name) for name in names}, "experts": experts}

    def make(self) -> tuple[nn.Module, list[nn.Module]]:
        """Return the decoder on the meta device, and its layers."""
        with torch.device("meta"):
            model = Decoder(self.config)
        return model, list(model.layers)

    def fill(self, model: Any, device: torch.device, from_checkpoint: bool) -> None:
        """Allocate the shards, and fill them from the directory or from the seed."""
        model.to_empty(device=device)
        if self.hf_dir is None or from_checkpoint:
            model.init_weights(self.seed)
        else:
            load_hf_weights(model, Path(self.hf_dir))

    def exporter(self) -> Exporter:
        """Return what writes a Hugging Face directory; ValueError where transformers has no such model."""
        config_to_hf(self.config)
        with torch.device("meta"):  # now: this context is not one thread's own, and a checkpoint has one
            blank = Decoder(self.config)
        generation = None if self.hf_dir is None else Path(self.hf_dir) / GENERATION_CONFIG_NAME
        carried = generation.read_bytes() if generation is not None and generation.is_file() else None

        def write(weights: dict[str, Tensor], directory: Path, token_ids: Mapping[str, int | None]) -> None:
            model = copy.deepcopy(blank)
            model.load_state_dict(weights, assign=True)
            save_hf(model, directory, extra=token_ids)
            if carried is not None:  # how to sample, and what ends a text
                (directory / GENERATION_CONFIG_NAME).write_bytes(carried)

        return write


def decoder_config(options: ModelOptions) -> DecoderConfig:
    """The decoder's shape; ValueError for a preset, a directory or a field that does not exist."""
    if options.hf_dir is not None:
        config = load_hf_config(Path(options.hf_dir))
        if config.vision is not None:
            raise ValueError(f"{options.hf_dir} sees images, and is only served: train a decoder alone")
    elif options.preset in PRESETS:
        config = PRESETS[options.preset]
    else:
        raise ValueError(f"unknown model.preset '{options.preset}'; {_nearest(str(options.preset), PRESETS)}")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    for name, value in options.overrides.items():
        if name not in fields:
            raise ValueError(f"unknown key 'model.overrides.{name}'; {_nearest(name, fields)}")
        like = fields[name]
        if like is not None and type(value) is not type(like) and (type(like), type(value)) != (float, int):
            raise ValueError(f"model.overrides.{name} is like {like!r}, got {value!r}")
    try:
        return dataclasses.replace(config, **options.overrides)
    except TypeError as error:
        raise ValueError(f"model.overrides {options.overrides} do not fit: {error}") from error


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, 1) or difflib.get_close_matches(word.lower(), known, 1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
