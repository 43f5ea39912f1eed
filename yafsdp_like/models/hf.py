"""Decoders from Hugging Face directories, and back: weights by name.

Owns what each name of a weight means; what the keys of `config.json` mean is hf_config.py's. It must not know the bytes
of a file (`checkpoint/safetensors.py` does), nor how a model is sharded beyond which rows of a DTensor are this rank's.

[Note: tied in name only]
A configuration may say that the head is the embedding, while the files hold a head of its own with other values. What
is stored counts, as in transformers (since 5): such a model is not tied.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from yafsdp_like.checkpoint.safetensors import StoredTensor, TensorSpec, TensorWriter, hold_files
from yafsdp_like.models.decoder import Decoder, DecoderConfig
from yafsdp_like.models.hf_clip import MODEL_TYPE, config_from_llava, decoder_tensors
from yafsdp_like.models.hf_config import config_from_hf, config_to_hf, model_type_of
from yafsdp_like.models.hf_kv_scales import kv_scales_of, without_kv_scales
from yafsdp_like.models.hf_quantized import StoredMatrix, names_of, scale_dtype_of, stored_matrices, zero_biases
from yafsdp_like.models.quantization import Quantization

CONFIG_NAME, GENERATION_CONFIG_NAME = "config.json", "generation_config.json"
MAX_FILE_NBYTES = 5_000_000_000

_MIXTRAL_NAMES = {
    ".mlp.": ".block_sparse_moe.",
    ".experts.gate_proj": ".experts.w1",
    ".experts.up_proj": ".experts.w3",
    ".experts.down_proj": ".experts.w2",
}
_PROJECTIONS = "_proj.weight", "_proj"  # ends of names of what may be quantized; the latter of experts'
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_NUMEL = 1 << 22  # elements of each at a time
_NAMES_IN_AN_ERROR = 8


# --- whole directories ---


@hold_files()
def load_hf_config(directory: Path) -> DecoderConfig:
    """The configuration in `directory`, with the scales of keys and values that are stored beside weights.

    Scales that pages of float8 cannot have are no error, since other pages have none: `kv_scales_problem` says why.

    Raises ValueError for one that `Decoder` is no equal of. A head that is tied there, and stored with other values
    than the embedding's, is not: [Note: tied in name only].
    """
    path = directory / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        is_llava = isinstance(raw, dict) and raw.get("model_type") == MODEL_TYPE
        config = config_from_llava(raw) if is_llava else config_from_hf(raw)
    except FileNotFoundError:
        lack = f"has no {CONFIG_NAME}" if directory.is_dir() else "does not exist"
        raise ValueError(f"expected a Hugging Face directory, but {directory} {lack}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if config.kv_scales_problem:
        config = dataclasses.replace(config, kv_scales_problem=f"{path}: {config.kv_scales_problem}")
    try:
        stored = decoder_tensors(directory)
    except ValueError:  # which is said when weights are loaded, if they are
        return config
    if config.tie_embeddings and not _is_head_tied(stored):
        config = dataclasses.replace(config, tie_embeddings=False)
    if config.quantization:
        scale_dtype = scale_dtype_of(config.quantization, stored)
        quantization = dataclasses.replace(config.quantization, scale_dtype=scale_dtype)
        config = dataclasses.replace(config, quantization=quantization)
    if config.kv_scales_problem:
        return config
    try:
        return dataclasses.replace(config, kv_scales=kv_scales_of(stored, config.num_layers))
    except ValueError as error:
        return dataclasses.replace(config, kv_scales_problem=f"{directory}: {error}")


@hold_files()
def load_hf_weights(model: Decoder, directory: Path) -> None:
    """Fill every parameter of `model`, sharded or not, from the safetensors files in `directory`.

    Each rank reads the headers and the bytes of its own rows, one parameter at a time; values are cast to the
    parameters' dtypes. Raises ValueError that names what is missing, unexpected or of another shape, before anything
    is read, and RuntimeError while a parameter is on the meta device.
    """
    model.tie_head()
    weights = _weights(model)
    stored = decoder_tensors(directory)
    _check_fit(directory, weights, stored, tied=model.config.tie_embeddings)
    for weight in weights:
        if weight.param.is_meta:
            raise RuntimeError(
                f"'{weight.names[0]}' is on the meta device: call to_empty(device=...) before load_hf_weights()"
            )
        weight.read_from(stored)


@hold_files()
def stored_weights(
    model: Decoder, directory: Path, quantization: Quantization | None = None
) -> tuple[dict[str, tuple[StoredTensor, ...]], dict[str, tuple[StoredMatrix, ...]]]:
    """Where each of `model`'s parameters lies in the safetensors files in `directory`, and each quantized matrix.

    Parameters go by their names, each one tensor there, or one for each expert, in order; quantized matrices likewise
    by the names of parameters without `.weight`. Headers are read, and small tensors of quantized matrices; `model` may
    be on the meta device. Raises ValueError as `load_hf_weights` does, and where some experts of a layer are quantized.
    """
    weights, stored = _weights(model), without_kv_scales(decoder_tensors(directory))
    matrices: dict[str, tuple[StoredMatrix, ...]] = {}
    if quantization is not None:
        projections = [weight for weight in weights if weight.own_name.endswith(_PROJECTIONS)]
        quantized = [weight for weight in projections if quantization.covers_all(modules_of(weight.names))]
        shapes = {name.removesuffix(".weight"): weight.shape for weight in quantized for name in weight.names}
        found = stored_matrices(directory, shapes, quantization, stored)
        biases = {name for weight in weights for name in weight.names if name.endswith(".bias")}
        taken = names_of(found.values()) | (zero_biases(found.values(), stored) - biases)
        for weight in quantized:
            own = tuple(found[name.removesuffix(".weight")] for name in weight.names)
            matrices[weight.own_name.removesuffix(".weight")] = own
        weights = [weight for weight in weights if weight.own_name.removesuffix(".weight") not in matrices]
        stored = {name: tensor for name, tensor in stored.items() if name not in taken}
    _check_fit(directory, weights, stored, tied=model.config.tie_embeddings)
    return {weight.own_name: tuple(stored[name] for name in weight.names) for weight in weights}, matrices


def save_hf(
    model: Decoder,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] | None = None,
    max_file_nbytes: int = MAX_FILE_NBYTES,
) -> None:
    """Write `model`, sharded or not, as a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    To be called on all ranks: sharded parameters are gathered one at a time, in `dtype` (theirs by default), and
    rank 0 writes each before the next. `extra` are further keys of `config.json`, `eos_token_id` for one.

    Raises ValueError, on all ranks, for a model without an equal in transformers. FileExistsError for a directory that
    holds weights, and whatever else goes wrong with files, is raised on rank 0 alone, after the last gather, so that
    no rank waits in one.
    """
    weights = _weights(model)
    specs = {name: TensorSpec(dtype or weight.param.dtype, weight.shape) for weight in weights for name in weight.names}
    raw = config_to_hf(model.config) | {"torch_dtype": str(dtype or weights[0].param.dtype).removeprefix("torch.")}
    gathered = ((weight, _full(weight.param, dtype)) for weight in weights)
    if dist.is_initialized() and dist.get_rank() > 0:
        _exhaust(gathered)
        return
    try:
        with TensorWriter(directory, specs, max_file_nbytes) as writer:
            for weight, full in gathered:
                for name, tensor in weight.by_name(full):
                    writer.write(name, tensor)
        (directory / CONFIG_NAME).write_text(json.dumps(raw | dict(extra or {}), indent=2) + "\n")
    finally:
        _exhaust(gathered)  # after an error: the other ranks gather the rest


# --- weights ---


@dataclass(frozen=True)
class Weight:
    """A parameter of the model, detached, sharded or plain, its name there, and the one that it has in a checkpoint.

    Experts' weights, which are `stacked` here, have one name for each expert there.
    """

    param: Tensor
    own_name: str
    names: tuple[str, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor under each of the names."""
        return tuple(self.param.shape[1:] if self.stacked else self.param.shape)

    def by_name(self, full: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What goes under each name, of the whole parameter."""
        return zip(self.names, full if self.stacked else [full], strict=True)

    def read_from(self, stored: Mapping[str, StoredTensor]) -> None:
        """Fill this rank's rows, and read no others."""
        local, start = _local_rows(self.param)
        if not self.stacked:
            local.copy_(stored[self.names[0]].read_rows(start, start + len(local)))
            return
        for row, name in zip(local, self.names[start : start + len(local)], strict=True):
            row.copy_(stored[name].read_rows(0, len(row)))


def _weights(model: Decoder) -> list[Weight]:
    """All of the model's; a tied head has none."""
    state: dict[str, Tensor] = model.state_dict()
    if model.config.tie_embeddings:
        state.pop("lm_head.weight")
    return [_weight(name, param, model.config) for name, param in state.items()]


def _weight(name: str, param: Tensor, config: DecoderConfig) -> Weight:
    return Weight(param, name, stored_names(name, config), stacked=".experts." in name)


def stored_names(name: str, config: DecoderConfig) -> tuple[str, ...]:
    """What a parameter of the decoder is called in files: one name, or one for each expert, in order."""
    stored_name = name if name.startswith("lm_head.") else f"model.{name}"
    if config.experts is None:
        return (stored_name,)
    if model_type_of(config) == "mixtral":
        for ours, theirs in _MIXTRAL_NAMES.items():
            stored_name = stored_name.replace(ours, theirs)
    block, is_expert, matrix = stored_name.partition(".experts.")
    if not is_expert:
        return (stored_name,)
    return tuple(f"{block}.experts.{index}.{matrix}.weight" for index in range(config.experts.num_experts))


def modules_of(names: Sequence[str]) -> list[str]:
    """What the modules of weights with these `stored_names` are called where a configuration says what is quantized."""
    return [name.removeprefix("model.").removesuffix(".weight") for name in names]


def _check_fit(directory: Path, weights: list[Weight], stored: Mapping[str, StoredTensor], *, tied: bool) -> None:
    """Buffers of old checkpoints and the second copy of a tied weight may be there; nothing else may differ."""
    shapes = {name: weight.shape for weight in weights for name in weight.names}
    may_be_there = re.compile(r".*\.rotary_emb\.inv_freq" + (f"|{re.escape(_HEAD)}" if tied else ""))
    specs = {name: stored[name].spec for name in shapes if name in stored}
    findings = {
        "missing": [name for name in shapes if name not in stored],
        "unexpected": [name for name in stored if name not in shapes and not may_be_there.fullmatch(name)],
        "of another shape": [
            f"{name} (expected {shapes[name]}, found {spec.shape})"
            for name, spec in specs.items()
            if spec.shape != shapes[name]
        ],
        "not of floating point": [name for name, spec in specs.items() if not spec.dtype.is_floating_point],
        "of one-byte floats, which mean nothing without scales (store them in bfloat16)": [
            name for name, spec in specs.items() if spec.dtype.is_floating_point and spec.dtype.itemsize == 1
        ],
    }
    problems = [f"{what}: {_some(names)}" for what, names in findings.items() if names]
    if problems:
        raise ValueError(f"the weights in {directory} do not fit the model; {'; '.join(problems)}")
    if tied and not _is_head_tied(stored):
        raise ValueError(
            f"the model's head is tied to its embedding, and {directory} stores {_HEAD} with other values than "
            f"{_EMBEDDING}: make the model with tie_embeddings=False, as load_hf_config does"
        )


def _is_head_tied(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether no head is stored beside the embedding, or the same one."""
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    if head is None or embedding is None:
        return True
    if head.spec.shape != embedding.spec.shape:
        return False
    num_rows, *row_shape = head.spec.shape
    rows_at_once = max(_COMPARED_NUMEL // max(math.prod(row_shape), 1), 1)
    return all(
        torch.equal(*(tensor.read_rows(row, min(row + rows_at_once, num_rows)).float() for tensor in (head, embedding)))
        for row in range(0, num_rows, rows_at_once)
    )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_IN_AN_ERROR
    return ", ".join(names[:_NAMES_IN_AN_ERROR]) + (f" and {more} more" if more > 0 else "")


def _local_rows(param: Tensor) -> tuple[Tensor, int]:
    """The rows of `param` in this rank's memory, and the number of the first."""
    if not isinstance(param, DTensor):
        return param, 0
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if shape[1:] != tuple(param.shape[1:]):
        raise NotImplementedError(f"expected parameters sharded by rows, found placements {param.placements}")
    return param.to_local(), offset[0]


def _full(param: Tensor, dtype: torch.dtype | None) -> Tensor:
    """All of `param` on every rank that it is sharded over."""
    cast = param if dtype is None else param.to(dtype)
    return cast.full_tensor() if isinstance(cast, DTensor) else cast


def _exhaust(gathered: Iterator[Any]) -> None:
    for _ in gathered:
        pass
