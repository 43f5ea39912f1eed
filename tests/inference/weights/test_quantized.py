"""Quantized weights of published layouts are served as they are stored: tokens of the values they stand for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.inference.engine.test_engine import GREEDY, OPTIONS, check_idle, check_logprobs, prompts
from tests.models.published import CONFIG, FORMATS, FP8, GPTQ, compressed, publish
from tests.ranks import run_ranks
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.plan.quantized_fields import stored_units
from yafsdp_like.inference.plan.serving_plan import plan_serving
from yafsdp_like.inference.plan.step_sizes import StepSize
from yafsdp_like.inference.weights.loading import load, open_model, world_transport
from yafsdp_like.models import Decoder
from yafsdp_like.models.hf import load_hf_config
from yafsdp_like.models.quantization import Quantization
from yafsdp_like.models.tensor_parallel import cuts_of

MIB = 1 << 20


@torch.no_grad()
def scores_of(model: Decoder, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens]))[0, -1].log_softmax(-1)


def check_tokens(engine: Engine, model: Decoder, count: int = 3) -> None:
    """Greedy tokens and log-probabilities are the decoder's."""
    asked = [Request(str(i), text, GREEDY, max_tokens=8, num_logprobs=3) for i, text in enumerate(prompts(count))]
    done = engine.generate(asked)
    for request in asked:
        tokens = list(request.prompt)
        for token in done[request.id].tokens:
            scores = scores_of(model, tokens)
            assert token.id == int(scores.argmax())
            check_logprobs(token, scores, 3)
            assert [value for _, value in token.top] == pytest.approx(scores.topk(3).values.tolist(), rel=1e-6, abs=0)
            tokens.append(token.id)
    check_idle(engine)


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_the_dequantized_weights(name: str, tmp_path: Path) -> None:
    model = publish(name, tmp_path)
    check_tokens(Engine.load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32), model)


@pytest.mark.parametrize("name", ["fp8, blocks", "gptq, act-order"])
def test_quantized_units_are_moved_as_they_are_stored(name: str, tmp_path: Path) -> None:
    model = publish(name, tmp_path)
    weights = load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32, mode="streamed")
    check_tokens(Engine(weights), model)


def serve_on_ranks(directory: Path, mode: Any) -> list[list[int]]:
    transport = world_transport("cpu", "process_group")
    options = replace(OPTIONS, kv_nbytes=None, memory_limit_nbytes=4 * MIB, host_kv_nbytes=None)
    weights = load(str(directory), options, device="cpu", dtype=torch.float32, mode=mode, transport=transport)
    engine = Engine(weights)
    found: dict[str, list[int]] = {}
    for i, text in enumerate(prompts(2)):
        engine.add(Request(str(i), text, GREEDY, max_tokens=5))
    while engine.has_work:  # all ranks step equally often, since they have the same requests
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
    return [found["0"], found["1"]]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("awq", "gathered"),
        ("fp8, a scale a tensor", "tensor_parallel"),
        ("fp8, blocks", "tensor_parallel"),
        ("awq", "tensor_parallel"),
    ],
)
def test_ranks_share_quantized_weights(name: str, mode: str, tmp_path: Path) -> None:
    """Of which some read parts of what is packed, and tensor parallel ones columns in whole groups."""
    model = publish(name, tmp_path, replace(CONFIG, num_kv_heads=4, ffn_dim=128))
    wanted = []
    for text in prompts(2):
        tokens = list(text)
        for _ in range(5):
            tokens.append(int(scores_of(model, tokens).argmax()))
        wanted.append(tokens[len(text) :])
    assert run_ranks(serve_on_ranks, tmp_path, mode) == [wanted, wanted]


def test_ranks_that_would_cut_groups_are_refused(tmp_path: Path) -> None:
    publish("fp8, blocks", tmp_path)
    config = load_hf_config(tmp_path)
    with pytest.raises(ValueError, match=r"2 ranks would cut groups of 32 rows or 32 columns of .*k_proj\.weight"):
        stored_units(config, torch.bfloat16, cuts_of(config, 2))


def test_the_plan_counts_bytes_of_codes_scales_zeros_and_orders(tmp_path: Path) -> None:
    """Of a layer with matrices of 64 x (64 + 32 + 32), 64 x 64, 64 x 192 and 96 x 64."""
    publish("gptq, act-order", tmp_path)
    config = load_hf_config(tmp_path)
    units = stored_units(config, torch.bfloat16)
    fields = {field.name: sum(p.nbytes for p in field.parameters) for field in units[1].fields}
    assert fields == {
        "input_norm": 128,
        "qkv": 64 * 128 // 2,
        "qkv_scales": 2 * 64 * 128 // 32,
        "qkv_order": 4 * 64,
        "o": 64 * 64 // 2,
        "o_scales": 2 * 64 * 64 // 32,
        "o_order": 4 * 64,
        "post_norm": 128,
        "gate_up": 64 * 192 // 2,
        "gate_up_scales": 2 * 64 * 192 // 32,
        "gate_up_order": 4 * 64,
        "down": 96 * 64 // 2,
        "down_scales": 2 * 96 * 64 // 32,
        "down_order": 4 * 96,
    }
    plan = plan_serving(config, OPTIONS)
    assert plan.memory.nbytes_of("weights") == sum(unit.nbytes for unit in units)
    assert f"all {sum(unit.nbytes for unit in units):,} bytes of weights stay" in str(plan)


@pytest.mark.parametrize("name", ["fp8, a scale a row", "awq"])
def test_modules_that_are_kept_are_multiplied_in_full_precision(name: str, tmp_path: Path) -> None:
    model = publish(name, tmp_path, kept="down_proj")
    engine = Engine.load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32)
    check_tokens(engine, model, 1)


def test_a_layer_of_each_kind_is_warmed_up_where_whole_layers_are_kept(tmp_path: Path) -> None:
    """Else the quantized product would be compiled when the first step of it comes, in a recording."""
    publish("fp8, a scale a row", tmp_path, replace(CONFIG, num_layers=3), kept="layers.0")
    engine = Engine.load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32)
    forward, size = engine._runner._forward, StepSize.decode(2)
    engine._runner._staging.stage_idle(size)
    with patch.object(forward, "_layer", wraps=forward._layer) as issued, torch.inference_mode():
        forward.warm_up([size])
    assert [call.args[0] for call in issued.call_args_list] == [0, 1]


def test_projections_that_are_one_product_and_only_partly_quantized_are_refused(tmp_path: Path) -> None:
    publish("awq", tmp_path, kept="k_proj")
    with pytest.raises(ValueError, match="are one product: all of them must be quantized, or none"):
        load(str(tmp_path), OPTIONS)


def test_a_quantized_model_is_not_trained(tmp_path: Path) -> None:
    publish("awq", tmp_path)
    with pytest.raises(ValueError, match="quantized weights are served, not trained"):
        Decoder(load_hf_config(tmp_path))


def test_biases_of_zeros_that_gptqs_tools_write_may_be_there(tmp_path: Path) -> None:
    publish("gptq", tmp_path)
    before = open_model(str(tmp_path))
    biases = {f"{module}.bias": torch.zeros(64).half() for module in (Q, Q.replace("q_proj", "o_proj"))}
    changed(tmp_path, lambda tensors: tensors.update(biases))
    assert open_model(str(tmp_path)).config == before.config


@pytest.mark.parametrize(
    ("kept", "module", "is_quantized"),
    [
        ("lm_head", "layers.0.self_attn.q_proj", True),
        ("self_attn", "layers.0.self_attn.q_proj", False),
        ("attn", "layers.0.self_attn.q_proj", True),
        ("model.layers.1", "layers.1.mlp.up_proj", False),
        ("model.layers.1", "layers.11.mlp.up_proj", True),
        ("layers.1.mlp.up_proj", "layers.1.mlp.up_proj", False),
        ("re:.*down_proj", "layers.0.mlp.down_proj", False),
        ("re:down_proj", "layers.0.mlp.down_proj", True),
    ],
)
def test_modules_are_kept_by_names_parts_of_names_and_patterns(kept: str, module: str, is_quantized: bool) -> None:
    assert Quantization("fp8", 8, kept=(kept,)).covers(module) == is_quantized


# --- what is refused, by its name ---

REFUSED: dict[str, tuple[Any, str]] = {
    "another method": ({"quant_method": "bitsandbytes"}, "quant_method fp8, .*, found 'bitsandbytes'"),
    "no method": ({"bits": 4}, "found None"),
    "no object": ("awq", "must be an object, found 'awq'"),
    "mixed bits": (GPTQ | {"dynamic": {"-:.*gate": {}, "+:.*": {"bits": 8}}}, "quantization_config.dynamic"),
    "no pattern of what is left out": (GPTQ | {"dynamic": {"-:(": {}}}, r"'re:\(' is no pattern"),
    "8 bits": (GPTQ | {"bits": 8}, "quantization_config.bits 8 is not served"),
    "another format of GPTQ": (
        GPTQ | {"checkpoint_format": "marlin"},
        "quantization_config.checkpoint_format 'marlin'",
    ),
    "some modules": (GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj"]]}, "modules_in_block_to_quantize"),
    "a quantized head": (GPTQ | {"lm_head": True}, "quantization_config.lm_head True is not served"),
    "small groups": (GPTQ | {"group_size": 16}, "group_size is served as -1 or a multiple of 32, found 16"),
    "no switch": (GPTQ | {"desc_act": "yes"}, "quantization_config.desc_act must be true or false"),
    "GEMV": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "quantization_config.version 'gemv'"),
    "no zeros": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "quantization_config.zero_point False"),
    "other floats": (FP8 | {"fmt": "e5m2"}, "quantization_config.fmt 'e5m2'"),
    "narrow blocks": (FP8 | {"weight_block_size": [128, 8]}, r"weight_block_size is served as .*, found \[128, 8\]"),
    "two groups": (compressed({}, "float-quantized") | {"config_groups": {"a": {}, "b": {}}}, "with one group"),
    "int8": (
        compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized"),
        "format 'int-quantized'",
    ),
    "no pattern": (FP8 | {"ignored_layers": ["re:("]}, r"'re:\(' is no pattern"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name_when_the_configuration_is_read(name: str, tmp_path: Path) -> None:
    publish("gptq", tmp_path)
    raw, (said, told) = json.loads((tmp_path / "config.json").read_text()), REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": said}))
    with pytest.raises(ValueError, match=told):
        load_hf_config(tmp_path)


def changed(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


Q, K = (f"model.layers.0.self_attn.{x}_proj" for x in "qk")
DAMAGED: dict[str, tuple[str, Any, str]] = {
    "a missing scale": ("awq", lambda t: t.pop(f"{Q}.scales"), f"missing {Q}.scales"),
    "missing codes": ("gptq", lambda t: t.pop(f"{Q}.qweight"), f"missing {Q}.qweight"),
    "scales of another shape": ("awq", lambda t: t.update({f"{Q}.scales": torch.ones(3, 64).half()}), r"of \(3, 64\)"),
    "scales of two dtypes": ("awq", lambda t: t.update({f"{Q}.scales": torch.ones(2, 64)}), "float32, expected"),
    "a bias of a projection": ("awq", lambda t: t.update({f"{Q}.bias": torch.ones(64)}), f"unexpected: {Q}.bias"),
    "a bias of GPTQ's that is not 0": (
        "gptq",
        lambda t: t.update({f"{Q}.bias": torch.eye(64)[0], f"{K}.bias": torch.zeros(32)}),
        f"unexpected: {Q}.bias$",
    ),
    "two orders": (
        "gptq, act-order",
        lambda t: t.update({f"{K}.g_idx": t[f"{K}.g_idx"].flip(0)}),
        "are one matrix, and group columns in two orders",
    ),
    "groups of two sizes": (
        "gptq, act-order",
        lambda t: t.update({f"{Q}.g_idx": torch.zeros(64, dtype=torch.int32)}),
        "has groups of other sizes than 32",
    ),
    "an order that is not announced": (
        "gptq",
        lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].flip(0)}),
        "g_idx reorders columns, though",
    ),
    "zeros that are not announced": (
        "gptq",
        lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"] + 1}),
        "qzeros are not 8, though",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_tensors_that_are_not_as_the_layout_has_them_are_refused_before_anything_is_allocated(
    name: str, tmp_path: Path
) -> None:
    layout, change, told = DAMAGED[name]
    publish(layout, tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=told):
        open_model(str(tmp_path))
