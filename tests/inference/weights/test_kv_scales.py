"""Published scales of keys and values: pages of float8 hold keys and values over them, other pages the plain ones."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inference.engine.test_engine import GREEDY, OPTIONS, check_idle, prompts
from tests.inference.weights.test_quantized import changed, scores_of
from tests.models.published import CONFIG, FP8, compressed, publish
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.plan.serving_plan import Site, least_nbytes, plan_serving
from yafsdp_like.inference.weights.loading import open_model
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.models.decoder import Attention
from yafsdp_like.models.hf import load_hf_config, save_hf

SCALES = ((0.0125, 0.5), (0.0005, 0.0375))  # of keys and values of two layers
ON_PAGES = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_ONLY = compressed({}, "dense") | {"config_groups": {}, "kv_cache_scheme": ON_PAGES}
F8 = torch.float8_e4m3fn


def with_scales(directory: Path, keys: str = "k_scale", values: str = "v_scale", *shape: int) -> None:
    """Store `SCALES` beside the weights, under these names."""

    def add(tensors: dict[str, Tensor]) -> None:
        for layer, pair in enumerate(SCALES):
            for name, scale in zip((keys, values), pair, strict=True):
                tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.full(shape, scale)

    changed(directory, add)


def save_with(said: dict[str, Any], directory: Path, config: DecoderConfig = CONFIG) -> Decoder:
    """Save a decoder in full precision, and what its configuration says of quantization."""
    torch.manual_seed(3)
    model = Decoder(config).eval()
    save_hf(model, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    return model


def rounded(x: Tensor, scale: float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(F8).float() * scale


@pytest.mark.parametrize("window", [None, 9])
def test_pages_of_float8_give_what_rounding_over_the_scales_gives(
    window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are clamped, and values, in decoding and in chunks of prompts, in layers of one group or of two."""
    windows = {} if window is None else {"sliding_window": window, "windowed_layers": (1,), "qk_norm": True}
    model = save_with(KV_ONLY, tmp_path, replace(CONFIG, **windows))
    with_scales(tmp_path)
    options = replace(OPTIONS, kv_dtype="float8_e4m3fn")
    engine = Engine.load(str(tmp_path), options, device="cpu", dtype=torch.float32)
    texts = prompts(4, longest=30)
    done = engine.generate([Request(str(i), t, GREEDY, max_tokens=6, num_logprobs=1) for i, t in enumerate(texts)])
    check_idle(engine)
    layers = {layer.self_attn: scales for layer, scales in zip(model.layers, SCALES, strict=True)}
    plain, clamped = Attention.qkv, list[bool]()

    def over_scales(self: Attention, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = plain(self, *args)
        clamped.append(bool((k.abs() > 448 * layers[self][0]).any()))
        return q, rounded(k, layers[self][0]), rounded(v, layers[self][1])

    exact = [scores_of(model, texts[0])]
    monkeypatch.setattr(Attention, "qkv", over_scales)
    assert not torch.allclose(scores_of(model, texts[0]), exact[0], atol=1e-3)
    for i, text in enumerate(texts):
        tokens = list(text)
        for token in done[str(i)].tokens:
            scores = scores_of(model, tokens)
            assert token.id == int(scores.argmax())
            assert token.logprob == pytest.approx(float(scores[token.id]), abs=2e-5)
            tokens.append(token.id)
    assert any(clamped)


def test_other_pages_hold_keys_and_values_as_they_are(tmp_path: Path) -> None:
    model = publish("fp8, a scale a row", tmp_path)
    with_scales(tmp_path)
    engine = Engine.load(str(tmp_path), OPTIONS, device="cpu", dtype=torch.float32)
    text = prompts(1)[0]
    (token,) = engine.generate([Request("0", text, GREEDY, max_tokens=1, num_logprobs=1)])["0"].tokens
    assert token.logprob == pytest.approx(float(scores_of(model, text).max()), abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "values", "shape"),
    [
        ("k_scale", "v_scale", (1,)),
        ("attn.k_scale", "attn.v_scale", ()),
        ("k_proj.k_scale", "v_proj.v_scale", ()),
        ("qkv_proj.k_scale", "qkv_proj.v_scale", ()),
        ("k_proj.output_scale", "v_proj.output_scale", (1, 1)),
    ],
)
def test_scales_are_read_under_the_names_that_tools_have_given_them(
    keys: str, values: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Beside those of queries and probabilities, which have no use here."""
    publish("fp8, a scale a tensor", tmp_path)
    with_scales(tmp_path, keys, values, *shape)
    more = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("q_scale", "prob_scale")}
    changed(tmp_path, lambda tensors: tensors.update(more))
    found = open_model(str(tmp_path)).config.kv_scales
    assert found is not None
    assert torch.equal(torch.tensor(found), torch.tensor(SCALES))


def test_one_scale_of_a_layer_is_that_of_its_keys_and_of_its_values(tmp_path: Path) -> None:
    publish("fp8, a scale a tensor", tmp_path)
    both = {f"model.layers.{i}.self_attn.kv_scale": torch.tensor(0.5 + i) for i in range(2)}
    changed(tmp_path, lambda tensors: tensors.update(both))
    assert open_model(str(tmp_path)).config.kv_scales == ((0.5, 0.5), (1.5, 1.5))


def test_without_scales_there_are_none(tmp_path: Path) -> None:
    save_with(KV_ONLY, tmp_path)
    assert load_hf_config(tmp_path).kv_scales is None


def check_refused_for_float8(directory: Path, told: str) -> None:
    """Other pages have no scale, so the model is served in these; the error says where the scales are."""
    config = load_hf_config(directory)
    assert config.kv_scales is None
    least_nbytes(config, OPTIONS, Site())
    for plan in (plan_serving, least_nbytes):
        with pytest.raises(ValueError, match=f"kv_dtype float8_e4m3fn: {re.escape(str(directory))}.*{told}"):
            plan(config, replace(OPTIONS, kv_dtype="float8_e4m3fn"), Site())


K0 = "model.layers.0.self_attn.k_scale"
WRONG: dict[str, tuple[Any, str]] = {
    "a layer without": (lambda t: t.pop(K0), f"missing {K0}, while other scales"),
    "a scale a head": (lambda t: t.update({K0: torch.ones(2)}), rf"{K0} of \(2,\) torch.float32 is not served"),
    "not above 0": (lambda t: t.update({K0: torch.tensor(0.0)}), f"{K0} must be above 0, found 0.0"),
    "not finite": (lambda t: t.update({K0: torch.tensor(float("nan"))}), f"{K0} must be above 0, found nan"),
    "integers": (lambda t: t.update({K0: torch.ones(1, dtype=torch.int8)}), "torch.int8 is not served"),
}


@pytest.mark.parametrize("name", WRONG)
def test_scales_that_pages_of_float8_cannot_have_are_refused_for_these_alone(name: str, tmp_path: Path) -> None:
    change, told = WRONG[name]
    publish("awq", tmp_path)
    with_scales(tmp_path)
    changed(tmp_path, change)
    check_refused_for_float8(tmp_path, told)


@pytest.mark.parametrize(
    "scheme", [ON_PAGES | {"num_bits": 4}, ON_PAGES | {"type": "int"}, ON_PAGES | {"strategy": "attn_head"}, "int8"]
)
def test_other_schemes_of_keys_and_values_are_refused_for_pages_of_float8_alone(scheme: object, tmp_path: Path) -> None:
    save_with(FP8 | {"kv_cache_scheme": scheme}, tmp_path)
    check_refused_for_float8(tmp_path, r"quantization_config\.kv_cache_scheme .* is not served")
