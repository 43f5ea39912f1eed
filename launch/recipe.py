"""Which model is trained: our decoder by preset or Hugging Face directory, or any module that a function returns.

Owns what differs between them: how they are made, filled and written for others. Knows nothing of sharding or training.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.config import ModelOptions
from yafsdp_like.models import PRESETS, Decoder, DecoderConfig
from yafsdp_like.models.hf import config_to_hf, load_hf_config, load_hf_weights, save_hf

# Writes whole weights, by name, as a directory that transformers loads; the ids of tokens go into its config.json.
Exporter = Callable[[dict[str, Tensor], Path, Mapping[str, int | None]], None]


class Recipe(Protocol):
    """A model that can be made on every rank."""

    @property
    def vocab_size(self) -> int: ...

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
        return FactoryRecipe(options.factory, options.blocks, seed)
    return DecoderRecipe(decoder_config(options), options.hf_dir, seed)


# --- our decoder ---


@dataclasses.dataclass(frozen=True)
class DecoderRecipe:
    """Made on the meta device; filled from a Hugging Face directory, each rank reading its own rows, or from a seed."""

    config: DecoderConfig
    hf_dir: str | None
    seed: int

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        experts = None if self.config.experts is None else dataclasses.asdict(self.config.experts)
        names = ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "qk_norm", "tie_embeddings")
        return {**{name: getattr(self.config, name) for name in names}, "experts": experts}

    def make(self) -> tuple[nn.Module, list[nn.Module]]:
        with torch.device("meta"):
            model = Decoder(self.config)
        return model, list(model.layers)

    def fill(self, model: Any, device: torch.device, from_checkpoint: bool) -> None:
        model.to_empty(device=device)
        if self.hf_dir is None or from_checkpoint:
            model.init_weights(self.seed)
        else:
            load_hf_weights(model, Path(self.hf_dir))

    def exporter(self) -> Exporter:
        config_to_hf(self.config)
        with torch.device("meta"):  # now: this context is not one thread's own, and a checkpoint has one
            blank = Decoder(self.config)

        def write(weights: dict[str, Tensor], directory: Path, token_ids: Mapping[str, int | None]) -> None:
            model = copy.deepcopy(blank)
            model.load_state_dict(weights, assign=True)
            save_hf(model, directory, extra=token_ids)

        return write


def decoder_config(options: ModelOptions) -> DecoderConfig:
    """The decoder's shape; ValueError for a preset, a directory or a field that does not exist."""
    if options.hf_dir is not None:
        config = load_hf_config(Path(options.hf_dir))
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
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


# --- any other module ---


@dataclasses.dataclass(frozen=True)
class FactoryRecipe:
    """`factory` is "package.module:function"; what it returns is made whole on every rank, on the CPU, and then cut.

    The module takes tokens (B, T) and gives logits (B, T, V), or an object that has them as `logits`, as transformers'.
    """

    factory: str
    blocks: str  # dotted name of the container of its blocks; "": the whole module is one unit
    seed: int

    @property
    def vocab_size(self) -> int:
        with torch.device("meta"):
            module = self._module()
        sizes = [child.num_embeddings for child in module.modules() if isinstance(child, nn.Embedding)]
        if not sizes:
            raise ValueError(f"the module of model.factory '{self.factory}' has no nn.Embedding to put tokens into")
        return max(sizes)

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def make(self) -> tuple[nn.Module, list[nn.Module]]:
        torch.manual_seed(self.seed)
        module = self._module()
        try:
            blocks = list(module.get_submodule(self.blocks).children()) if self.blocks else []
        except AttributeError as error:
            raise ValueError(f"model.blocks '{self.blocks}' is not in the module of model.factory: {error}") from error
        return WithLoss(module), blocks

    def fill(self, model: Any, device: torch.device, from_checkpoint: bool) -> None:
        model.to(device)

    def exporter(self) -> Exporter:
        """For modules of transformers, which have a configuration of their own: token ids are not changed."""
        with torch.device("meta"):
            blank: Any = self._module()
        if not hasattr(blank, "save_pretrained"):
            raise ValueError(f"{type(blank).__name__} has no save_pretrained; set --checkpoint.export=false")

        def write(weights: dict[str, Tensor], directory: Path, token_ids: Mapping[str, int | None]) -> None:
            inner = {name.removeprefix("module."): value for name, value in weights.items()}  # of WithLoss
            blank.save_pretrained(directory, state_dict=inner)

        return write

    def _module(self) -> nn.Module:
        module_name, _, name = self.factory.partition(":")
        try:
            module = getattr(importlib.import_module(module_name), name)()
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"model.factory '{self.factory}' is not a package.module:function: {error}") from error
        if not isinstance(module, nn.Module):
            raise ValueError(f"model.factory '{self.factory}' returned {type(module).__name__}, expected an nn.Module")
        return module


class WithLoss(nn.Module):
    """A language model, and the loss beside its logits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), the mean loss instead, an fp32 scalar."""
        output: Any = self.module(tokens)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
