"""Mixtures of experts with quantized weights, of published layouts: tokens of the values that they stand for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.inference.engine.test_engine import GREEDY, OPTIONS, prompts
from tests.inference.weights.test_quantized import check_tokens, scores_of, serve_on_ranks
from tests.models.published import FORMATS, FP8, MIXTRAL, QWEN3_MOE, publish
from tests.ranks import run_ranks
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.plan.quantized_fields import stored_units
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import load, open_model
from yafsdp_like.models.hf import load_hf_config
from yafsdp_like.models.hf_config import config_from_hf
from yafsdp_like.models.tensor_parallel import cuts_of

FAMILIES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}
QUICK = [
    ("mixtral", "fp8, a scale a tensor"),
    ("mixtral", "awq"),
    ("qwen3_moe", "fp8, blocks"),
    ("qwen3_moe", "gptq, act-order"),
]
OTHERS = [(family, name) for family in FAMILIES for name in FORMATS if (family, name) not in QUICK]


@pytest.mark.parametrize(
    ("family", "name"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_tokens_are_those_of_the_dequantized_experts(family: str, name: str, tmp_path: Path) -> None:
    model = publish(name, tmp_path, FAMILIES[family])
    check_tokens(Engine.load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32), model, 2)


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "gptq"), ("mixtral", "fp8, a scale a row")])
def test_layers_with_quantized_experts_are_streamed_as_they_are_stored(family: str, name: str, tmp_path: Path) -> None:
    model = publish(name, tmp_path, FAMILIES[family])
    weights = load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32, mode="streamed")
    check_tokens(Engine(weights), model, 1)


def test_a_pool_serves_models_with_quantized_experts_beside_each_other(tmp_path: Path) -> None:
    directories = {"awq": tmp_path / "a", "fp8, blocks": tmp_path / "b"}
    decoders = {}
    for name, directory in directories.items():
        directory.mkdir()
        decoders[name] = publish(name, directory, MIXTRAL)
    models = {name: open_model(str(directory)) for name, directory in directories.items()}
    own = replace(OPTIONS, kv_nbytes=None, host_kv_nbytes=0)
    pooled = {name: PooledModel(model.config, torch.float32, own) for name, model in models.items()}
    pool = ModelPool(plan_pool(pooled, PoolOptions(memory_limit_nbytes=1 << 23)), models)
    text = prompts(1)[0]
    done = pool.generate({name: [Request("0", text, GREEDY, max_tokens=4)] for name in models})
    for name, decoder in decoders.items():
        tokens = list(text)
        for token in done[name]["0"].ids:
            assert token == int(scores_of(decoder, tokens).argmax())
            tokens.append(token)
        assert len(tokens) == len(text) + 4


@pytest.mark.parametrize(
    ("family", "name", "mode"),
    [
        ("mixtral", "awq", "tensor_parallel"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("mixtral", "gptq, act-order", "gathered"),
                ("qwen3_moe", "fp8, blocks", "gathered"),
                ("qwen3_moe", "fp8, blocks", "tensor_parallel"),
                ("mixtral", "fp8, a scale a tensor", "tensor_parallel"),
            )
        ),
    ],
)
def test_ranks_share_quantized_experts(family: str, name: str, mode: str, tmp_path: Path) -> None:
    """Tensor parallel ones have rows of every expert's gate and up, and columns of its down in whole groups."""
    config = replace(FAMILIES[family], num_kv_heads=4, ffn_dim=128)
    if config.dense_layers:
        config = replace(config, dense_ffn_dim=256)
    model = publish(name, tmp_path, config)
    wanted = []
    for text in prompts(2):
        tokens = list(text)
        for _ in range(5):
            tokens.append(int(scores_of(model, tokens).argmax()))
        wanted.append(tokens[len(text) :])
    assert run_ranks(serve_on_ranks, tmp_path, mode) == [wanted, wanted]


def test_tensor_parallel_ranks_that_would_cut_an_experts_order_of_columns_are_refused(tmp_path: Path) -> None:
    publish("gptq, act-order", tmp_path, replace(MIXTRAL, num_kv_heads=4, ffn_dim=128))
    config = load_hf_config(tmp_path)
    with pytest.raises(ValueError, match=r"2 ranks would cut groups of .*o_proj\.weight that share a scale, or their"):
        stored_units(config, torch.bfloat16, cuts_of(config, 2))


def test_experts_that_a_checkpoint_keeps_are_multiplied_in_full_precision(tmp_path: Path) -> None:
    """Of Mixtral's, by the names that they have in files: w2 is the one that goes down."""
    model = publish("awq", tmp_path, MIXTRAL, kept="w2")
    engine = Engine.load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32)
    check_tokens(engine, model, 1)


def test_experts_of_which_only_some_are_quantized_are_refused_by_name(tmp_path: Path) -> None:
    publish("awq", tmp_path, MIXTRAL, kept="experts.2.w1")
    told = r"experts\.0\.w1, which is quantized, and .*experts\.2\.w1, which is not, are one product"
    with pytest.raises(ValueError, match=told):
        open_model(str(tmp_path))


def test_the_plan_counts_what_is_stored_of_qwen3_30b_a3b() -> None:
    """Blocks of 128 by 128, and a router that is kept, as published."""
    routers = [f"model.layers.{i}.mlp.gate" for i in range(48)]
    said = FP8 | {"fmt": "e4m3", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", *routers]}
    config = config_from_hf(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "hidden_act": "silu",
            "quantization_config": said,
        }
    )
    (layer, *_) = (unit for unit in stored_units(config, torch.bfloat16) if unit.name == "layers.47")
    fields = {field.name: (field.shape, field.dtype) for field in layer.fields}
    assert fields["router"] == ((128, 2048), torch.bfloat16)
    assert fields["gate_up"] == ((256, 768, 2048), torch.float8_e4m3fn)
    assert fields["gate_up_scales"] == ((256, 6, 16), torch.float32)
    assert fields["down"] == ((128, 2048, 768), torch.float8_e4m3fn)
    assert fields["down_scales"] == ((128, 16, 6), torch.float32)
