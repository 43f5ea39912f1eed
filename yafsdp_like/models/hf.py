"""Decoders from Hugging Face directories, and back: configurations by key, weights by name.

Owns what each key of `config.json` and each name of a weight means. It must not know the bytes of a file
(`checkpoint/safetensors.py` does), nor how a model is sharded beyond which rows of a DTensor are this rank's.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from yafsdp_like.checkpoint.safetensors import StoredTensor, TensorSpec, TensorWriter, stored_tensors
from yafsdp_like.models.decoder import Decoder, DecoderConfig
from yafsdp_like.models.moe import ExpertsConfig
from yafsdp_like.models.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

CONFIG_NAME = "config.json"
MAX_FILE_NBYTES = 5_000_000_000

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_MIXTRAL_NAMES = {
    ".mlp.": ".block_sparse_moe.",
    ".experts.gate_proj": ".experts.w1",
    ".experts.up_proj": ".experts.w3",
    ".experts.down_proj": ".experts.w2",
}
_NAMES_IN_AN_ERROR = 8


# --- whole directories ---


def load_hf_config(directory: Path) -> DecoderConfig:
    """The configuration in `directory`; raises ValueError for one that `Decoder` is no equal of."""
    path = directory / CONFIG_NAME
    try:
        raw = json.loads(path.read_text())
        return config_from_hf(raw)
    except FileNotFoundError:
        raise ValueError(f"expected a Hugging Face directory, but {directory} has no {CONFIG_NAME}") from None
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_hf_weights(model: Decoder, directory: Path) -> None:
    """Fill every parameter of `model`, sharded or not, from the safetensors files in `directory`.

    Each rank reads the headers and the bytes of its own rows, one parameter at a time; values are cast to the
    parameters' dtypes. Raises ValueError that names what is missing, unexpected or of another shape, before anything
    is read, and RuntimeError while a parameter is on the meta device.
    """
    model.tie_head()
    weights = _weights(model)
    stored = stored_tensors(directory)
    _check_fit(directory, weights, stored, tied=model.config.tie_embeddings)
    for weight in weights:
        if weight.param.is_meta:
            raise RuntimeError(
                f"'{weight.names[0]}' is on the meta device: call to_empty(device=...) before load_hf_weights()"
            )
        weight.read_from(stored)


def stored_weights(model: Decoder, directory: Path) -> dict[str, StoredTensor]:
    """By the names of `model`'s parameters, without experts, where each lies in the safetensors files in `directory`.

    Only headers are read, and `model` may be on the meta device. Raises ValueError as `load_hf_weights` does.
    """
    weights, stored = _weights(model), stored_tensors(directory)
    _check_fit(directory, weights, stored, tied=model.config.tie_embeddings)
    return {name.removeprefix("model."): stored[name] for weight in weights for name in weight.names}


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
    """A parameter of the model, detached, sharded or plain, and the one name that it has in a checkpoint.

    Experts' weights, which are `stacked` here, have one name for each expert there.
    """

    param: Tensor
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
    stored_name = name if name.startswith("lm_head.") else f"model.{name}"
    if config.experts is None:
        return Weight(param, (stored_name,), stacked=False)
    if _model_type(config) == "mixtral":
        for ours, theirs in _MIXTRAL_NAMES.items():
            stored_name = stored_name.replace(ours, theirs)
    block, is_expert, matrix = stored_name.partition(".experts.")
    if not is_expert:
        return Weight(param, (stored_name,), stacked=False)
    names = tuple(f"{block}.experts.{index}.{matrix}.weight" for index in range(config.experts.num_experts))
    return Weight(param, names, stacked=True)


def _check_fit(directory: Path, weights: list[Weight], stored: Mapping[str, StoredTensor], *, tied: bool) -> None:
    """Buffers of old checkpoints and the second copy of a tied weight may be there; nothing else may differ."""
    shapes = {name: weight.shape for weight in weights for name in weight.names}
    may_be_there = re.compile(r".*\.rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tied else ""))
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
    }
    told = [f"{what}: {_some(names)}" for what, names in findings.items() if names]
    if told:
        raise ValueError(f"the weights in {directory} do not fit the model; {'; '.join(told)}")


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


# --- configurations ---


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that computes what transformers does for `raw`, the content of a `config.json`.

    Raises KeyError for a size that is left out (but the number of kv heads in Llama), and ValueError for what `Decoder`
    does not compute; other keys that are left out have the defaults of transformers.
    """
    _check_supported(raw)
    num_heads = raw["num_attention_heads"]
    num_kv_heads = raw.get("num_key_value_heads") if raw["model_type"] == "llama" else raw["num_key_value_heads"]
    head_dim = raw.get("head_dim") or (128 if raw["model_type"] == "qwen3" else None)
    window, windowed_layers = _window(raw)
    theta, scaling = _rope(raw)
    return DecoderConfig(
        dim=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        ffn_dim=raw["moe_intermediate_size" if raw["model_type"] == "qwen3_moe" else "intermediate_size"],
        vocab_size=raw["vocab_size"],
        custom_head_dim=None if head_dim == raw["hidden_size"] / num_heads else head_dim,
        qkv_bias=raw["model_type"] == "qwen2",
        qk_norm=raw["model_type"] in ("qwen3", "qwen3_moe"),
        sliding_window=window,
        windowed_layers=windowed_layers,
        max_seq_len=raw["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings", False),
        experts=_experts(raw),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The content of a `config.json` for which transformers computes what `Decoder(config)` does.

    Raises ValueError for a combination that none of the families has.
    """
    model_type = _model_type(config)
    rope = _rope_to_hf(config)
    return {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "bos_token_id": None,
        "eos_token_id": None,
        **_window_to_hf(config, model_type),
        **_experts_to_hf(config, model_type),
    }


def _experts(raw: Mapping[str, Any]) -> ExpertsConfig | None:
    if raw["model_type"] == "mixtral":
        return ExpertsConfig(raw["num_local_experts"], raw["num_experts_per_tok"])
    if raw["model_type"] != "qwen3_moe":
        return None
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise ValueError("mlp_only_layers and decoder_sparse_step are not supported: every layer has experts")
    num_experts = raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]
    return ExpertsConfig(num_experts, raw["num_experts_per_tok"], raw.get("norm_topk_prob", False))


def _experts_to_hf(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    if config.experts is None:
        return {}
    count = {"num_experts_per_tok": config.experts.experts_per_token}
    if model_type == "mixtral":
        return {**count, "num_local_experts": config.experts.num_experts}
    return {
        **count,
        "num_experts": config.experts.num_experts,
        "moe_intermediate_size": config.ffn_dim,
        "norm_topk_prob": config.experts.normalize,
    }


def _check_supported(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise ValueError(f"model_type '{model_type}' is not one of {', '.join(_ARCHITECTURES)}")
    expected = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0, "quantization_config": None}
    if model_type != "qwen2":  # whose bias is not a matter of configuration
        expected["attention_bias"] = False
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise ValueError(f"expected {key} {value!r}, found {raw[key]!r}, which the decoder does not compute")


def _window(raw: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...] | None]:
    """The sliding window and the layers that have it; None: all layers."""
    if raw["model_type"] in ("mistral", "mixtral"):
        return raw.get("sliding_window", 4096 if raw["model_type"] == "mistral" else None), None
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    if window is None:
        return None, None
    if raw["model_type"] == "qwen3_moe":
        return window, None
    num_layers = raw["num_hidden_layers"]
    kinds = raw.get("layer_types")
    if kinds is None:
        layers = tuple(range(raw.get("max_window_layers", 28), num_layers))
    else:
        layers = tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")
    if not layers:
        return None, None
    return window, None if len(layers) == num_layers else layers


def _window_to_hf(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    if model_type == "llama":
        return {}
    if model_type in ("mistral", "mixtral"):
        return {"sliding_window": config.sliding_window}
    if model_type == "qwen3_moe":
        return {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    windows = [config.window_of(index) for index in range(config.num_layers)]
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": next((i for i, window in enumerate(windows) if window), config.num_layers),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _model_type(config: DecoderConfig) -> str:
    """The family of transformers that has all that `config` has."""
    some_windowed = config.sliding_window is not None and config.windowed_layers is not None
    if config.qkv_bias and (config.qk_norm or config.experts):
        raise ValueError("no family of transformers has qkv_bias (with none in o_proj) beside qk_norm or experts")
    if some_windowed and (config.experts or not (config.qkv_bias or config.qk_norm)):
        raise ValueError("no family of transformers has windowed_layers without qkv_bias or qk_norm, or with experts")
    if config.experts and not (config.qk_norm or config.experts.normalize):
        raise ValueError("no family of transformers has experts that are not normalized, and no qk_norm")
    if config.experts:
        return "qwen3_moe" if config.qk_norm else "mixtral"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters`, or from the two keys that were there before it."""
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or (1e6 if raw["model_type"] == "mixtral" else 1e4)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rotary positions for a part of each head are not supported, found {rope}")
    if kind == "default":
        return theta, None
    max_seq_len = raw["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or max_seq_len
    if kind == "linear":
        return theta, LinearScaling(rope["factor"])
    if kind == "llama3":
        return theta, Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    if kind == "yarn" and rope.get("truncate", True):
        factor = rope.get("factor") or max_seq_len / original
        slow, fast = rope.get("beta_slow") or 1.0, rope.get("beta_fast") or 32.0
        return theta, YarnScaling(factor, original, slow, fast, _yarn_attention_factor(rope, factor))
    raise ValueError(f"rotary positions are supported unscaled or scaled by linear, llama3 or yarn, found {rope}")


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """None: as the paper has it. With `mscale` and `mscale_all_dim` it is (0.1 a ln f + 1) / (0.1 b ln f + 1)."""
    given: float | None = rope.get("attention_factor")
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if given is None and above and below:
        return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return given


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    raw = {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_seq_len}
    if isinstance(scaling, Llama3Scaling):
        turns = {"low_freq_factor": scaling.slow_turns, "high_freq_factor": scaling.fast_turns}
        return {"rope_type": "llama3", **raw, **turns}
    turns = {"beta_slow": scaling.slow_turns, "beta_fast": scaling.fast_turns}
    return {"rope_type": "yarn", **raw, **turns, "attention_factor": scaling.attention_factor}
