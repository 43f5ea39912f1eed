"""Vision-language models of Hugging Face's Llava kind: what `config.json` means, and what names weights have.

Owns the keys beside those of the decoder, the several names that versions of transformers have given weights, and which
stored weights the decoder, its CLIP or SigLIP tower and the projector are made of.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yafsdp_like.checkpoint.safetensors import StoredTensor, stored_tensors
from yafsdp_like.models.decoder import DecoderConfig
from yafsdp_like.models.hf_config import config_from_hf
from yafsdp_like.models.vision import PROJECTOR, TOWER, VisionConfig

MODEL_TYPE = "llava"
_TOWERS = {  # what transformers takes where a configuration says nothing; Llava's own CLIP is the large one
    "clip_vision_model": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_RENAMED = (  # the first that fits, to the names of a decoder alone, of `TOWER` and of `PROJECTOR`
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), f"{TOWER}."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), f"{PROJECTOR}."),
)
_NAMES_IN_AN_ERROR = 8
_QUANTIZED = "quantization_config", "compression_config"  # at the top, where transformers writes it, or of the text


def config_from_llava(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a `config.json`, with its vision tower.

    Raises what `config_from_hf` does of the decoder, and ValueError for a tower that is not computed here.
    """
    text = raw.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config must be an object, found {text!r}")
    text = {"model_type": "llama", **text}
    if text["model_type"] == "llama":
        text = {**_LLAMA, **text}
    is_tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    said = next((of[key] for of in (text, raw) for key in _QUANTIZED if of.get(key)), None)
    config = config_from_hf({**text, "tie_word_embeddings": is_tied, "quantization_config": said})
    vision = _vision(raw)
    if vision.image_token >= config.vocab_size:
        raise ValueError(f"image_token_index {vision.image_token} is outside of {config.vocab_size} tokens")
    return dataclasses.replace(config, vision=vision)


def _vision(raw: Mapping[str, Any]) -> VisionConfig:
    given = raw.get("vision_config") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"vision_config must be an object, found {given!r}")
    kind = given.get("model_type", "clip_vision_model")
    if kind not in _TOWERS:
        raise ValueError(f"a vision tower is one of {', '.join(_TOWERS)}, found {kind!r}")
    tower = {**_TOWERS[kind], **given}
    strategy = raw.get("vision_feature_select_strategy", "default")
    has_class = kind == "clip_vision_model"
    if strategy not in ("default", "full") or (strategy == "default" and not has_class):
        raise ValueError(
            f"vision_feature_select_strategy must be full, or default (without the class) for CLIP, found {strategy!r}"
        )
    if tower.get("num_channels", 3) != 3:
        raise ValueError(f"images have 3 channels, found num_channels {tower['num_channels']!r}")
    counts = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    for name in (*counts, "patch_size"):
        if type(tower[name]) is not int or not 0 < tower[name] < 1 << 20:
            raise ValueError(f"vision_config.{name} must be a whole number above 0, found {tower[name]!r}")
    return VisionConfig(
        dim=tower["hidden_size"],
        num_layers=_num_layers(raw.get("vision_feature_layer", -2), tower["num_hidden_layers"]),
        num_heads=tower["num_attention_heads"],
        ffn_dim=tower["intermediate_size"],
        image_size=tower["image_size"],
        patch_size=tower["patch_size"],
        image_token=raw.get("image_token_id", raw.get("image_token_index", 32000)),
        has_class=has_class,
        keeps_class=has_class and strategy == "full",
        activation=tower["hidden_act"],
        norm_eps=tower["layer_norm_eps"],
        projector_activation=raw.get("projector_hidden_act", "gelu"),
        projector_bias=raw.get("multimodal_projector_bias", True),
    )


def _num_layers(feature_layer: object, num_layers: int) -> int:
    """Layers that run: features are what the last of them gives, or, for 0, what they begin with."""
    if type(feature_layer) is not int or not -num_layers - 1 <= feature_layer <= num_layers:
        raise ValueError(
            f"vision_feature_layer must be one layer, from {-num_layers - 1} to {num_layers}, found {feature_layer!r}"
        )
    return feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer


def decoder_tensors(directory: Path) -> dict[str, StoredTensor]:
    """What a directory stores of a decoder, under the names that a decoder alone has.

    Raises ValueError as `stored_tensors` does.
    """
    found = _renamed(directory)
    return {name: tensor for name, tensor in found.items() if not name.startswith((f"{TOWER}.", f"{PROJECTOR}."))}


def vision_tensors(directory: Path, config: DecoderConfig) -> dict[str, StoredTensor]:
    """What a directory stores of the vision tower and its projector, below `TOWER` and `PROJECTOR`.

    What the tower has beyond the layers that run is left out. Raises ValueError that names what is missing or of
    another shape.
    """
    assert config.vision is not None, "a decoder without a vision tower"
    stored = _renamed(directory)
    shapes = {f"{TOWER}.{name}": shape for name, shape in config.vision.tower_shapes().items()}
    shapes |= {f"{PROJECTOR}.{name}": shape for name, shape in config.vision.projector_shapes(config.dim).items()}
    other = [
        f"{name} (expected {shape}, found {stored[name].spec.shape})"
        for name, shape in shapes.items()
        if name in stored and (stored[name].spec.shape != shape or not stored[name].spec.dtype.is_floating_point)
    ]
    findings = {"missing": [name for name in shapes if name not in stored], "of another shape or kind": other}
    problems = [f"{what}: {', '.join(names[:_NAMES_IN_AN_ERROR])}" for what, names in findings.items() if names]
    if problems:
        raise ValueError(f"the weights in {directory} do not fit the vision tower; {'; '.join(problems)}")
    return {name: stored[name] for name in shapes}


def _renamed(directory: Path) -> dict[str, StoredTensor]:
    return {_canonical(name): tensor for name, tensor in stored_tensors(directory).items()}


def _canonical(name: str) -> str:
    for pattern, ours in _RENAMED:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return name
