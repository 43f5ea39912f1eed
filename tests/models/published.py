"""Directories with quantized weights, as published checkpoints have them, and the decoder of the values they stand for.

Codes are packed here word by word, as the format's own tools do, and by no code of the package.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.models.hf import save_hf, stored_names
from yafsdp_like.models.moe import ExpertsConfig

CONFIG = DecoderConfig(64, 2, 4, 2, 96, vocab_size=97, max_seq_len=128, rope_theta=1e4)
MIXTRAL = replace(CONFIG, experts=ExpertsConfig(4, 2))
QWEN3_MOE = replace(  # whose first layer has no experts
    CONFIG,
    qk_norm=True,
    experts=ExpertsConfig(5, 3, normalize=False),
    dense_layers=(0,),
    dense_ffn_dim=160,
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of the codes in a word, from the low bits on
Stored = tuple[dict[str, Tensor], Tensor]  # tensors by the ends of their names, and the matrix (N, K) they stand for


def words(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Codes below 16, eight of ``dim`` in one int32."""
    packed = sum(
        codes.long().unflatten(dim, (-1, 8)).select(dim + 1, column) << 4 * i for i, column in enumerate(order)
    )
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def fp8(rows: int, columns: int, draw: torch.Generator, scales: Callable[[Tensor], Tensor], name: str) -> Stored:
    """``scales`` makes what is stored of scales (N, K), and says by its shape who shares one."""
    codes = (torch.randn(rows, columns, generator=draw) * 50).to(torch.float8_e4m3fn)
    stored = scales(0.001 + 0.004 * torch.rand(rows, columns, generator=draw))
    blocks = stored.reshape(-1, 1) if stored.dim() < 2 else stored
    wide = blocks.float()
    for dim, size in ((0, rows), (1, columns)):
        block = {1: size, size: 1}.get(wide.shape[dim], 32)
        wide = wide.repeat_interleave(block, dim).narrow(dim, 0, size)
    return {"weight": codes, name: stored, "input_scale": torch.ones(1)}, codes.float() * wide


def four_bits(rows: int, columns: int, draw: torch.Generator, group: int, zeros: bool) -> tuple[Tensor, ...]:
    """Codes (N, K), zeros (N, G) and scales (N, G)."""
    codes = torch.randint(0, 16, (rows, columns), generator=draw)
    shape = rows, columns // group
    zero = torch.randint(1, 16, shape, generator=draw) if zeros else torch.full(shape, 8)
    return codes, zero, 0.01 + 0.04 * torch.rand(shape, generator=draw)


def values(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return (codes - zeros[:, groups]) * scales.float()[:, groups]


def awq(rows: int, columns: int, draw: torch.Generator) -> Stored:
    codes, zeros, scales = four_bits(rows, columns, draw, 32, zeros=True)
    scales = scales.half()
    tensors = {"qweight": words(codes.T, 1, AWQ_ORDER), "qzeros": words(zeros.T, 1, AWQ_ORDER), "scales": scales.T}
    return tensors, values(codes, zeros, scales, torch.arange(columns) // 32)


def gptq(
    rows: int,
    columns: int,
    draw: torch.Generator,
    *,
    group: int = 32,
    sym: bool = True,
    act: bool = False,
    less: int = 1,
) -> Stored:
    group = columns if group == -1 else group
    codes, zeros, scales = four_bits(rows, columns, draw, group, not sym)
    scales = scales.bfloat16()
    order = torch.Generator().manual_seed(columns)  # one for all projections of the same inputs
    groups = torch.arange(columns) // group
    groups = groups[torch.randperm(columns, generator=order)] if act else groups
    tensors = {"qweight": words(codes.T, 0), "qzeros": words(zeros.T - less, 1)}
    return {**tensors, "scales": scales.T, "g_idx": groups.int()}, values(codes, zeros, scales, groups)


def packed(rows: int, columns: int, draw: torch.Generator, *, zeros: bool) -> Stored:
    codes, zero, scales = four_bits(rows, columns, draw, 32, zeros)
    tensors = {"weight_packed": words(codes, 1), "weight_scale": scales, "weight_shape": torch.tensor([rows, columns])}
    zero_words = {"weight_zero_point": words(zero, 0)} if zeros else {}
    return {**tensors, **zero_words}, values(codes, zero, scales, torch.arange(columns) // 32)


def compressed(weights: dict[str, Any], file_format: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    said = {"quant_method": "compressed-tensors", "format": file_format, "quantization_status": "compressed"}
    return {**said, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def _fp8(scales: Callable[[Tensor], Tensor], name: str = "weight_scale") -> Callable[..., Stored]:
    return lambda *shape: fp8(*shape, scales, name)


def _gptq(**how: Any) -> Callable[..., Stored]:
    return lambda *shape: gptq(*shape, **how)


def _packed(zeros: bool) -> Callable[..., Stored]:
    return lambda *shape: packed(*shape, zeros=zeros)


FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FLOAT: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
FORMATS: dict[str, tuple[dict[str, Any], Callable[..., Stored]]] = {
    "fp8, a scale a tensor": (FP8 | {"ignored_layers": ["lm_head"]}, _fp8(lambda s: s[0, 0])),
    "fp8, a scale a row": (compressed(FLOAT | {"strategy": "channel"}, "float-quantized"), _fp8(lambda s: s[:, :1])),
    "fp8, blocks": (FP8 | {"weight_block_size": [32, 32]}, _fp8(lambda s: s[::32, ::32], "weight_scale_inv")),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, awq),
    "gptq": (GPTQ, _gptq()),
    "gptq, a group a row": (GPTQ | {"group_size": -1, "desc_act": True}, _gptq(group=-1)),
    "gptq, zeros": (GPTQ | {"sym": False}, _gptq(sym=False)),
    "gptq_v2, zeros": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, _gptq(sym=False, less=0)),
    "gptq, act-order": (GPTQ | {"desc_act": True}, _gptq(act=True)),
    "gptq, a router left out": (GPTQ | {"dynamic": {r"-:.*\.mlp\.gate$": {}}}, _gptq()),
    "int4": (compressed(INT4 | {"symmetric": True}, "pack-quantized"), _packed(zeros=False)),
    "int4, zeros": (compressed(INT4 | {"symmetric": False}, "pack-quantized"), _packed(zeros=True)),
}


def publish(name: str, directory: Path, config: DecoderConfig = CONFIG, kept: str = "lm_head") -> Decoder:
    """Write a directory with random weights in that format, but of modules named ``kept``; return its decoder."""
    said, quantize = FORMATS[name]
    draw = torch.Generator().manual_seed(len(name))
    model = Decoder(replace(config, quantization=None))
    save_hf(model, directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if not parameter.endswith(("_proj.weight", "_proj")):
                continue
            names = stored_names(parameter, config)
            for name, matrix in zip(names, weight if len(names) > 1 else [weight], strict=True):
                if kept not in name:
                    stored, dense = quantize(*matrix.shape, draw)
                    matrix.copy_(dense)
                    del tensors[name]
                    module = name.removesuffix(".weight")
                    tensors |= {f"{module}.{end}": tensor.contiguous() for end, tensor in stored.items()}
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    raw = json.loads((directory / "config.json").read_text())
    keys = {"compressed-tensors": "ignore", "awq": "modules_to_not_convert", "fp8": "modules_to_not_convert"}
    key = keys.get(said["quant_method"])
    said = said if key is None else said | {key: [*said.get(key, ()), kept]}
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": said}))
    return model.eval()
