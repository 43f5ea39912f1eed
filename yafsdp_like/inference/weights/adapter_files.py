"""LoRA adapters in directories as peft writes them: what they say is checked first, values are read once, later.

Owns what each field of ``adapter_config.json`` means, and each name in ``adapter_model.safetensors``. What is not
served is refused by name when a directory is opened. Nothing of a directory is ever run.

Shapes: R rank of a slot, r of the adapter; K columns and N rows of the weight that it is for.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from yafsdp_like.checkpoint.safetensors import stored_in
from yafsdp_like.inference.plan.adapter_layout import A, B, adapted_fields
from yafsdp_like.inference.plan.packed_weights import pack_units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from yafsdp_like.checkpoint.safetensors import StoredTensor
    from yafsdp_like.models.decoder import DecoderConfig

CONFIG_NAME, FILE_NAME = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."  # of names in files
_ALL_LINEAR = "all-linear"
_HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform", "layers_pattern"}
# Say nothing about what an adapter that is trained computes.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other ways to begin change the weights of the model that the adapter is for, which is not served then.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter of a decoder: its shape is known, its values have not been read."""

    directory: Path
    rank: int
    scale: float  # of B A
    stored: Mapping[str, StoredTensor]  # by the names of a slot's parameters, such as layers.0.self_attn.q_proj.lora_A


@dataclass(frozen=True)
class AdapterSource:
    """A ``loading.Source`` of an adapter's values as a slot of ``rank`` holds them, scale and all."""

    adapter: Adapter
    rank: int

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read whole rows of one matrix into ``out`` (n,); zeros for ranks that the adapter lacks, and other modules.

        The scale is multiplied to B in float32, before values are cast.
        """
        out.zero_()
        stored, own = self.adapter.stored.get(name), self.adapter.rank
        if stored is None:
            return
        if name.endswith(A):
            assert start == 0, "matrices A are read whole"
            values = stored.read_rows(0, own)
            out[: values.numel()].copy_(values.flatten())
        else:
            rows = out.view(-1, self.rank)
            first = start // self.rank
            rows[:, :own].copy_(stored.read_rows(first, first + len(rows)).float() * self.adapter.scale)


def open_adapter(directory: Path | str, config: DecoderConfig) -> Adapter:
    """Read what an adapter of the decoder ``config`` says of itself; no value is read.

    Raises ValueError for what is no adapter, cannot be served, or is not one of this decoder's, by name.
    """
    directory = Path(directory).expanduser()
    said = _said(directory / CONFIG_NAME)
    _check_fields(directory, said)
    rank, scale = _rank_and_scale(directory, said)
    shapes = _weight_shapes(config)
    wanted = set(_targets(directory, said, shapes))
    if not (directory / FILE_NAME).is_file():
        raise ValueError(f"expected {FILE_NAME} in {directory}, found none: save the adapter as safetensors")
    try:
        listed = stored_in(directory / FILE_NAME)
    except OSError as error:
        raise ValueError(f"{directory / FILE_NAME} cannot be read: {error}") from error
    stored = {_parameter_of(directory, name): tensor for name, tensor in listed.items()}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if module not in wanted:
            raise ValueError(f"{directory}: {name} is of a module that {CONFIG_NAME} does not target")
        rows, columns = shapes[module]
        expected = (rank, columns) if kind == A else (rows, rank)
        if tensor.spec.shape != expected or not tensor.spec.dtype.is_floating_point:
            found = f"{tensor.spec.shape} in {tensor.spec.dtype}"
            raise ValueError(f"{directory}: {name} must have the shape {expected}, of r {rank}, found {found}")
    missing = [f"{module}.{kind}" for module in sorted(wanted) for kind in (A, B) if f"{module}.{kind}" not in stored]
    if missing:
        raise ValueError(
            f"{directory}: {FILE_NAME} lacks {len(missing)} matrices that it should have: {missing[0]} ..."
        )
    return Adapter(directory, rank, scale, stored)


def _said(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"expected a directory of a LoRA adapter: there is no {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path}: expected an object, found {type(said).__name__}")
    return said


def _check_fields(directory: Path, said: Mapping[str, Any]) -> None:
    """Refuse by name what is not served; fields that nobody knows must say nothing."""
    if said.get("peft_type") != "LORA":
        raise ValueError(f"{directory}: only peft_type LORA is served, found {said.get('peft_type')!r}")
    for name, value in said.items():
        if name in _HONOURED or name in _HARMLESS or value in _NEUTRAL.get(name, ()):
            continue
        if name in _NEUTRAL or value not in (None, False, [], {}):
            raise ValueError(f"{directory}: {name} {value!r} of a LoRA adapter is not served")


def _rank_and_scale(directory: Path, said: Mapping[str, Any]) -> tuple[int, float]:
    """Return r, and what B A is multiplied by: alpha / r, or alpha / sqrt(r) if it is stabilized (rsLoRA)."""
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{directory}: r must be a number from 1 on, found {rank!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{directory}: lora_alpha must be a number, found {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return the shape of each weight that an adapter may add to, by the name of its module."""
    return {
        parameter.name.removesuffix(".weight"): (parameter.shape[0], parameter.shape[1])
        for unit in pack_units(config, torch.float32)
        for field in adapted_fields(unit)
        for parameter in field.parameters
    }


def _targets(directory: Path, said: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield the modules that an adapter must have matrices for.

    Raises ValueError for a target that is none of a layer's projections.
    """
    targets, layers = said.get("target_modules"), said.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        for target in targets:
            if not any(_ends_with(module, target) for module in shapes):
                names = sorted({module.rpartition(".")[2] for module in shapes})
                raise ValueError(f"{directory}: target {target!r} is not served, only {', '.join(names)}")
        found = [module for module in shapes if any(_ends_with(module, target) for target in targets)]
    elif isinstance(targets, str) and targets:
        found = [module for module in shapes if targets == _ALL_LINEAR or _matches(directory, targets, module)]
    else:
        raise ValueError(f"{directory}: target_modules must be a list of names or a pattern, found {targets!r}")
    if layers:
        found = [module for module in found if int(module.split(".")[1]) in layers]
    if not found:
        raise ValueError(f"{directory}: target_modules {targets!r} name no module of this model")
    yield from found


def _ends_with(module: str, target: str) -> bool:
    return f"model.{module}" == target or f"model.{module}".endswith(f".{target}")


def _matches(directory: Path, pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, f"model.{module}") is not None
    except re.error as error:
        raise ValueError(f"{directory}: target_modules {pattern!r} is no pattern: {error}") from error


def _parameter_of(directory: Path, name: str) -> str:
    """Return a slot's name of a matrix in a file. Raises ValueError for what is no matrix of a layer's projection."""
    found = re.fullmatch(rf"{re.escape(_PREFIX)}model\.(layers\.\d+\..+\.(?:{A}|{B}))\.weight", name)
    if found is None:
        raise ValueError(f"{directory}: {name!r} is not served: only {A} and {B} of layers' projections are")
    return found[1]
