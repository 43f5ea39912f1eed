"""Vision towers and projectors of Llava directories: the same numbers as transformers', and clear words for others."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.llava import NUM_ROWS, VOCAB_SIZE, pixels_of, save_llava
from yafsdp_like.checkpoint.safetensors import stored_tensors
from yafsdp_like.models.hf import load_hf_config
from yafsdp_like.models.hf_clip import config_from_llava, vision_tensors
from yafsdp_like.models.hf_config import config_to_hf
from yafsdp_like.models.vision import PROJECTOR, TOWER, encode, project

pytest.importorskip("transformers")


def rename(directory: Path, renamed: dict[str, str]) -> None:
    """Write the weights of a directory anew, under other names: parts of names by what is there instead."""
    stored = {}
    for name, tensor in stored_tensors(directory).items():
        values = tensor.read_rows(0, tensor.spec.shape[0])
        old = next((old for old in renamed if name.startswith(old)), "")
        stored[renamed.get(old, "") + name.removeprefix(old)] = values
    save_file(stored, directory / "model.safetensors")


OLDER = {"vision_tower.": "vision_tower.vision_model."}
NEWER = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@pytest.mark.parametrize(
    ("kind", "renamed"),
    [("clip", {}), ("siglip", {}), ("clip", OLDER), ("clip", NEWER)],
    ids=["clip", "siglip", "older names", "newer names"],
)
def test_features_of_an_image_are_those_of_transformers(kind: str, renamed: dict[str, str], tmp_path: Path) -> None:
    model = save_llava(tmp_path, kind)
    rename(tmp_path, renamed)
    config, pixels = load_hf_config(tmp_path), pixels_of(1)
    assert config.vision is not None
    stored = vision_tensors(tmp_path, config)
    values = {name: tensor.read_rows(0, tensor.spec.shape[0]) for name, tensor in stored.items()}
    tower, projector = (
        {name.removeprefix(f"{part}."): value for name, value in values.items() if name.startswith(f"{part}.")}
        for part in (TOWER, PROJECTOR)
    )
    with torch.no_grad():
        (expected,) = model.get_image_features(
            pixels[None], model.config.vision_feature_layer, model.config.vision_feature_select_strategy
        ).pooler_output
        found = project(config.vision, projector, encode(config.vision, tower, pixels))
    assert found.shape == (config.vision.num_rows, config.dim) == (NUM_ROWS, 64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"vision_config": {"model_type": "pixtral"}},
            "one of clip_vision_model, siglip_vision_model, found",
        ),
        ({"vision_feature_layer": [-2, -5]}, "must be one layer, from -25 to 24, found"),
        ({"vision_feature_select_strategy": "cls"}, "must be full, or default"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "must be full, or default"),
        ({"vision_config": {"patch_size": "14"}}, "vision_config.patch_size must be a whole number"),
        ({"vision_config": {"hidden_act": "mish"}}, "activations of a vision tower are one of"),
        ({"image_token_index": 40_000}, "outside of 32000 tokens"),
        ({"text_config": {"model_type": "opt"}}, "model_type 'opt' is not one of"),
    ],
)
def test_a_vision_model_that_is_not_computed_here_is_refused(raw: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_from_llava({"model_type": "llava", "image_token_index": 31_999, **raw})


def test_what_a_configuration_leaves_out_is_llava_15s(tmp_path: Path) -> None:
    """Its published configuration names few sizes."""
    raw = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_hf_config(tmp_path)
    assert (config.dim, config.num_layers, config.num_kv_heads, config.ffn_dim) == (4096, 32, 32, 11008)
    assert config.vision is not None
    assert (config.vision.dim, config.vision.num_layers, config.vision.num_rows) == (1024, 23, 576)


@pytest.mark.parametrize("place", ["top", "text_config"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", r"re:.*language_model\.model\."])
def test_quantized_weights_of_a_decoder_behind_a_tower_are_known(place: str, prefix: str) -> None:
    """Where transformers says so, and by the names that modules have in the whole model."""
    kept = [f"{prefix}layers.0.mlp.down_proj", "vision_tower", "multi_modal_projector"]
    said = {"quantization_config": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": kept}}
    raw = {"model_type": "llava", "image_token_index": 31_999}
    found = config_from_llava(raw | said if place == "top" else {**raw, "text_config": said}).quantization
    assert found is not None and found.layout == "fp8"
    modules = [f"layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("up_proj", "down_proj")]
    assert [found.covers(module) for module in modules] == [True, False, True, True]


def test_a_directory_without_all_of_the_tower_is_refused(tmp_path: Path) -> None:
    save_llava(tmp_path)
    rename(tmp_path, {"vision_tower.encoder.layers.0.mlp.fc1.": "vision_tower.lost."})
    with pytest.raises(ValueError, match=r"the vision tower; missing: vision_tower.encoder.layers.0.mlp.fc1"):
        vision_tensors(tmp_path, load_hf_config(tmp_path))


def test_a_decoder_with_a_tower_is_not_written_as_if_it_had_none(tmp_path: Path) -> None:
    save_llava(tmp_path)
    config = load_hf_config(tmp_path)
    with pytest.raises(ValueError, match="only read"):
        config_to_hf(config)
    assert config_to_hf(dataclasses.replace(config, vision=None))["vocab_size"] == VOCAB_SIZE
