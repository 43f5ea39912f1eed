"""The configurations of Hugging Face's models: what each key of `config.json` means to a decoder, and back.

Owns the keys, what may stand in them, and the families that `Decoder` is an equal of. Knows nothing of weights.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from yafsdp_like.models.decoder import DecoderConfig
from yafsdp_like.models.moe import ExpertsConfig
from yafsdp_like.models.quantization import kv_scales_problem, quantization_of
from yafsdp_like.models.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_MAX_MODULES, _MAX_SIZE = 10_000, 1 << 31
_MODULES = ("num_hidden_layers", "num_local_experts", "num_experts", "num_experts_per_tok", "decoder_sparse_step")
_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
    "sliding_window",
)
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")  # null is as good as nothing
_SWITCHES = ("tie_word_embeddings", "use_sliding_window", "norm_topk_prob", "attention_bias", "mlp_bias")
_KEYS = {  # of a decoder's fields that refuse values
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "custom_head_dim": "head_dim",
    "experts_per_token": "num_experts_per_tok",
    "original_seq_len": "original_max_position_embeddings",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_BIASED = "llama", "qwen3", "qwen3_moe"  # families in which attention_bias means something


_ROPE_AT_LEAST = {"factor": 1, "original_max_position_embeddings": 1, "mscale": 0, "mscale_all_dim": 0}
_ROPE_ABOVE_0 = ("rope_theta", "attention_factor", "beta_slow", "beta_fast", "low_freq_factor", "high_freq_factor")
_TINY = math.ulp(0.0)  # the least number above 0


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that computes what transformers does for `raw`, the content of a `config.json`.

    Raises KeyError for a size that is left out (but the number of kv heads in Llama), and ValueError for what is no
    configuration, or what `Decoder` does not compute; other keys that are left out have the defaults of transformers.
    """
    _check_kinds(raw)
    _check_supported(raw)
    try:
        return _decoder_of(raw)
    except ValueError as error:
        raise ValueError(_in_keys(str(error), raw)) from error


def _in_keys(words: str, raw: Mapping[str, Any]) -> str:
    """What a decoder says of its fields, with the names that they have in `raw`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    is_llama3, has_local = "low_freq_factor" in rope, "num_experts" not in raw
    names = _KEYS | {
        "slow_turns": "low_freq_factor" if is_llama3 else "beta_slow",
        "fast_turns": "high_freq_factor" if is_llama3 else "beta_fast",
        "num_experts": "num_local_experts" if has_local else "num_experts",
    }
    return re.sub(r"\b\w+\b", lambda found: names.get(found[0], found[0]), words)


def _decoder_of(raw: Mapping[str, Any]) -> DecoderConfig:
    num_heads = raw["num_attention_heads"]
    num_kv_heads = raw.get("num_key_value_heads") if raw["model_type"] == "llama" else raw["num_key_value_heads"]
    head_dim = raw.get("head_dim") or (128 if raw["model_type"] == "qwen3" else None)
    window, windowed_layers = _window(raw)
    theta, scaling = _rope(raw)
    experts, dense_layers = _experts(raw)
    ffn_dim = raw["intermediate_size" if raw["model_type"] != "qwen3_moe" or not experts else "moe_intermediate_size"]
    return DecoderConfig(
        dim=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        ffn_dim=ffn_dim,
        vocab_size=raw["vocab_size"],
        custom_head_dim=None if head_dim == raw["hidden_size"] / num_heads else head_dim,
        qkv_bias=raw["model_type"] == "qwen2" or raw.get("attention_bias", False),
        o_bias=raw["model_type"] != "qwen2" and raw.get("attention_bias", False),
        ffn_bias=raw.get("mlp_bias", False),
        qk_norm=raw["model_type"] in ("qwen3", "qwen3_moe"),
        sliding_window=window,
        windowed_layers=windowed_layers,
        max_seq_len=raw["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings", False),
        experts=experts,
        dense_layers=dense_layers,
        dense_ffn_dim=raw["intermediate_size"] if dense_layers else None,
        quantization=quantization_of(raw),
        kv_scales_problem=kv_scales_problem(raw),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The content of a `config.json` for which transformers computes what `Decoder(config)` does.

    Raises ValueError for a combination that none of the families has.
    """
    if config.vision is not None:
        raise ValueError("a decoder with a vision tower is only read: replace its vision by None to write it alone")
    model_type = model_type_of(config)
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
        "mlp_bias": config.ffn_bias,
        "bos_token_id": None,
        "eos_token_id": None,
        **_window_to_hf(config, model_type),
        **_experts_to_hf(config, model_type),
    }


def _experts(raw: Mapping[str, Any]) -> tuple[ExpertsConfig | None, tuple[int, ...]]:
    """The experts, and the layers of a model with experts that have none."""
    if raw["model_type"] == "mixtral":
        return ExpertsConfig(raw["num_local_experts"], raw["num_experts_per_tok"]), ()
    if raw["model_type"] != "qwen3_moe":
        return None, ()
    num_layers, step = raw["num_hidden_layers"], raw.get("decoder_sparse_step", 1)
    only_dense = set(raw.get("mlp_only_layers") or ())
    dense = tuple(index for index in range(num_layers) if index in only_dense or (index + 1) % step)
    if len(dense) == num_layers:
        return None, ()
    num_experts = raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]
    return ExpertsConfig(num_experts, raw["num_experts_per_tok"], raw.get("norm_topk_prob", False)), dense


def _experts_to_hf(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    if config.experts is None:
        return {}
    count = {"num_experts_per_tok": config.experts.experts_per_token}
    if model_type == "mixtral":
        return {**count, "num_local_experts": config.experts.num_experts}
    return {
        **count,
        "num_experts": config.experts.num_experts,
        "intermediate_size": config.dense_ffn_dim or config.ffn_dim,
        "moe_intermediate_size": config.ffn_dim,
        "norm_topk_prob": config.experts.normalize,
        "mlp_only_layers": list(config.dense_layers),
    }


def _check_kinds(raw: Mapping[str, Any]) -> None:
    """Raises ValueError where a key has a value of the wrong kind."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"expected an object in JSON, found {'null' if raw is None else type(raw).__name__}")
    for name in _COUNTS:
        value, most = raw.get(name), _MAX_MODULES if name in _MODULES else _MAX_SIZE
        if name in raw and not (value is None and name in _OPTIONAL) and not _is_number(value, 1, most, int):
            raise ValueError(f"{name} must be a whole number from 1 to {most}, found {value!r}")
    for name in ("rms_norm_eps", "rope_theta"):
        if raw.get(name) is not None and not _is_number(raw[name], _TINY):
            raise ValueError(f"{name} must be a number above 0, found {raw[name]!r}")
    for name in _SWITCHES:
        if not isinstance(raw.get(name, False), bool):
            raise ValueError(f"{name} must be true or false, found {raw[name]!r}")
    _check_layers(raw)
    for name in ("dtype", "torch_dtype"):
        dtype = raw.get(name)
        if dtype is not None and not (isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)):
            raise ValueError(f"{name} must be a type that torch has, such as bfloat16, found {dtype!r}")
    stops, vocab_size = raw.get("eos_token_id"), raw.get("vocab_size", _MAX_SIZE)
    if stops is not None and not _are_indices(stops if isinstance(stops, list) else [stops], vocab_size):
        raise ValueError(f"eos_token_id must be a token below vocab_size {vocab_size}, or several, found {stops!r}")
    if not _is_number(raw.get("max_window_layers", 0), 0, _MAX_MODULES, int):
        raise ValueError(f"max_window_layers must be a number of layers, found {raw['max_window_layers']!r}")
    for name in ("rope_scaling", "rope_parameters"):
        _check_rope(name, raw.get(name))
    older, newer = raw.get("rope_scaling"), raw.get("rope_parameters")
    if older and newer and {**newer, **older} != dict(newer):  # of which versions of transformers take the one or other
        raise ValueError(f"rope_scaling and rope_parameters differ, remove one: found {older!r} and {newer!r}")


def _check_layers(raw: Mapping[str, Any]) -> None:
    kinds, dense = raw.get("layer_types"), raw.get("mlp_only_layers")
    num_layers = raw.get("num_hidden_layers", len(kinds) if isinstance(kinds, list) else _MAX_MODULES)
    if kinds is not None:
        if not isinstance(kinds, list) or any(kind not in _LAYER_TYPES for kind in kinds):
            raise ValueError(f"layer_types must be a list of {' or '.join(_LAYER_TYPES)}, found {kinds!r}")
        if len(kinds) != num_layers:
            raise ValueError(f"layer_types must name num_hidden_layers {num_layers} layers, found {len(kinds)}")
    if dense is not None and not _are_indices(dense, num_layers):
        raise ValueError(f"mlp_only_layers must be a list of layers from 0 to {num_layers - 1}, found {dense!r}")


def _are_indices(value: object, most: int) -> bool:
    return isinstance(value, list) and all(_is_number(index, 0, most - 1, int) for index in value)


def _check_rope(name: str, rope: object) -> None:
    if rope is not None and not isinstance(rope, Mapping):
        raise ValueError(f"{name} must be an object, found {rope!r}")
    for key, value in (rope or {}).items():
        if value is None:
            continue
        if key in ("rope_type", "type"):
            expected, fits = "a name", isinstance(value, str)
        elif key in _ROPE_ABOVE_0:
            expected, fits = "a number above 0", _is_number(value, _TINY)
        elif key in _ROPE_AT_LEAST:
            expected, fits = f"a number of at least {_ROPE_AT_LEAST[key]}", _is_number(value, _ROPE_AT_LEAST[key])
        else:
            expected, fits = "a number", isinstance(value, bool) or _is_number(value)
        if not fits:
            raise ValueError(f"{name}.{key} must be {expected}, found {value!r}")


def _is_number(value: object, least: float = -math.inf, most: float = math.inf, kind: type = float) -> bool:
    """Not a truth value, and finite."""
    is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return is_number and least <= value <= most and abs(value) < math.inf  # type: ignore[operator, arg-type]


def _check_supported(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(_ARCHITECTURES)}")
    expected: dict[str, Any] = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
    if model_type not in (*_BIASED, "qwen2"):
        expected["attention_bias"] = False
    if model_type != "llama":
        expected["mlp_bias"] = False
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


def model_type_of(config: DecoderConfig) -> str:
    """The family of transformers that has all that `config` has."""
    some_windowed = config.sliding_window is not None and config.windowed_layers is not None
    if config.qkv_bias and not config.o_bias and (config.qk_norm or config.experts):
        raise ValueError("no family of transformers has qkv_bias (with none in o_proj) beside qk_norm or experts")
    if config.o_bias and not (config.qkv_bias and (config.qk_norm or not (config.experts or config.sliding_window))):
        raise ValueError("no family of transformers has o_bias without qkv_bias, or beside experts or windows alone")
    is_plain = not (config.qk_norm or config.experts or config.sliding_window or config.qkv_bias != config.o_bias)
    if config.ffn_bias and not is_plain:
        raise ValueError("no family of transformers has ffn_bias beside qk_norm, experts, windows, or qkv_bias alone")
    if some_windowed and (config.experts or not (config.qkv_bias or config.qk_norm)):
        raise ValueError("no family of transformers has windowed_layers without qkv_bias or qk_norm, or with experts")
    if config.experts and not (config.qk_norm or config.experts.normalize):
        raise ValueError("no family of transformers has experts that are not normalized, and no qk_norm")
    if config.dense_layers and not config.qk_norm:
        raise ValueError("no family of transformers has dense_layers without qk_norm")
    if config.experts:
        return "qwen3_moe" if config.qk_norm else "mixtral"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.o_bias:
        return "qwen2"
    return "llama" if config.sliding_window is None else "mistral"


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters`, or from the two keys that were there before it."""
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta")}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or (1e6 if raw["model_type"] == "mixtral" else 1e4)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rotary positions for a part of each head are not supported, found {rope}")
    if kind in ("default", "dynamic"):  # which stretches texts beyond max_position_embeddings, and none of those within
        return theta, None
    max_seq_len = raw["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or max_seq_len
    if kind == "linear":
        return theta, LinearScaling(rope["factor"])
    if kind == "llama3":
        return theta, Llama3Scaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    if kind == "yarn":
        factor = rope.get("factor") or max_seq_len / original
        slow, fast = rope.get("beta_slow") or 1.0, rope.get("beta_fast") or 32.0
        truncate = rope.get("truncate", True)
        return theta, YarnScaling(factor, original, slow, fast, _yarn_attention_factor(rope, factor), truncate)
    raise ValueError(f"rotary positions are supported unscaled, or by linear, dynamic, llama3 or yarn, found {rope}")


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
    more = {"attention_factor": scaling.attention_factor, "truncate": scaling.truncate}
    return {"rope_type": "yarn", **raw, **turns, **more}
