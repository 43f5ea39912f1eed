"""What may stand in a `config.json`: values that mean nothing are refused by their names when it is read."""

from typing import Any

import pytest

from yafsdp_like.models.hf_config import config_from_hf

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def refusal(**change: Any) -> str:
    with pytest.raises((ValueError, KeyError)) as caught:
        config_from_hf({"model_type": "llama", **SHAPE, **change})
    return str(caught.value)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 0}, "factor must be a number of at least 1, found 0"),
        ({"rope_type": "dynamic", "factor": 0.5}, "factor must be a number of at least 1, found 0.5"),
        ({"rope_type": "linear", "factor": True}, "factor must be a number of at least 1, found True"),
        ({"rope_type": "linear", "factor": float("inf")}, "factor must be a number of at least 1, found inf"),
        ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}, "of at least 1, found 0"),
        ({"rope_type": "yarn", "factor": 2, "beta_slow": 0}, "beta_slow must be a number above 0, found 0"),
        (
            {"rope_type": "yarn", "factor": 2, "beta_fast": float("nan")},
            "beta_fast must be a number above 0, found nan",
        ),
        ({"rope_type": "yarn", "factor": 2, "attention_factor": -1}, "attention_factor must be a number above 0"),
        (
            {"rope_type": "yarn", "factor": 2, "mscale": -1, "mscale_all_dim": 1},
            "mscale must be a number of at least 0",
        ),
        ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor must be a number above 0, found 0"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0, found 0"),
    ],
)
def test_positions_that_no_rotation_has_are_refused_by_name(key: str, rope: dict[str, Any], message: str) -> None:
    found = refusal(**{key: rope})
    assert found.startswith(f"{key}.") and message in found


def test_a_rotation_without_turns_is_refused() -> None:
    assert refusal(rope_theta=0) == "rope_theta must be a number above 0, found 0"


FP8 = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "zzz"}, "dtype must be a type that torch has, such as bfloat16, found 'zzz'"),
        ({"torch_dtype": "nn"}, "torch_dtype must be a type that torch has"),
        ({"layer_types": ["x", "x"]}, "layer_types must be a list of full_attention or sliding_attention, found ['x'"),
        ({"layer_types": [["x"]]}, "layer_types must be a list of"),
        ({"layer_types": ["full_attention"]}, "layer_types must name num_hidden_layers 2 layers, found 1"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token below vocab_size 64, or several, found 'x'"),
        ({"eos_token_id": [1, 10**9]}, "eos_token_id must be a token below vocab_size 64"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [5]}, "mlp_only_layers must be a list of layers from 0 to 1"),
        ({"quantization_config": []}, "quantization_config must be an object, found []"),
        ({"quantization_config": {}}, "quantized weights are served with quant_method fp8, "),
        ({"quantization_config": {**FP8, "weight_block_size": [10**30] * 2}}, "weight_block_size is served as [rows"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32 * 10**30}},
            "group_size is served",
        ),
    ],
)
def test_a_value_that_fits_no_model_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    assert message in refusal(**change)


def test_stop_tokens_types_and_layers_that_are_common_are_taken() -> None:
    kinds = ["full_attention", "sliding_attention"]
    more = {"dtype": "float16", "eos_token_id": [0, 63], "layer_types": kinds, "quantization_config": None}
    assert config_from_hf({"model_type": "llama", **SHAPE, **more}).num_layers == 2


def test_an_error_says_the_names_that_stand_in_the_file() -> None:
    assert refusal(head_dim=7).startswith("head_dim must be even")
    assert refusal(num_attention_heads=3, head_dim=8) == (
        "num_attention_heads must be a multiple of num_key_value_heads, got 3 and 2"
    )
    assert refusal(hidden_size=30).startswith("hidden_size must be a multiple of 2 * num_attention_heads")
    experts = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9}
    assert refusal(**experts) == "num_experts_per_tok must be between 1 and num_local_experts 8, got 9"
    assert refusal(rope_scaling={**LLAMA3, "low_freq_factor": 5}).startswith("expected 0 < low_freq_factor < high_freq")
    yarn = {"rope_type": "yarn", "factor": 2, "beta_slow": 40}
    assert refusal(rope_scaling=yarn) == "expected 0 < beta_slow < beta_fast, got 40 and 32.0"
    assert refusal(model_type=None).startswith("model_type None is not one of llama")
    with pytest.raises(ValueError, match="expected an object in JSON, found null"):
        config_from_hf(None)  # type: ignore[arg-type]
