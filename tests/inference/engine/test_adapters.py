"""Requests with LoRA adapters against decoders with the same matrices merged into their weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.clocks import RaceDetector, VectorClocks
from tests.inference.engine.test_engine import ARCHITECTURES, GREEDY, OPTIONS, TINY, check_idle, decoder
from tests.inference.engine.test_engine import prompts as random_prompts
from tests.ranks import run_ranks
from yafsdp_like.inference.engine import adapters as adapters_module
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.weights.loading import model_of, world_transport
from yafsdp_like.memory.streams import COMPUTE, HOST_TO_DEVICE
from yafsdp_like.models.hf import save_hf

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from yafsdp_like.inference.engine.request import Completion
    from yafsdp_like.models.decoder import Decoder, DecoderConfig

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj")
# Rank, alpha, targets, rsLoRA.
KINDS: dict[str, tuple[int, float, tuple[str, ...], bool]] = {
    "wide": (8, 16, ALL, False),
    "attention": (3, 7, ATTENTION, False),
    "stabilized": (4, 4, ALL, True),
    "down": (2, 6, ("down_proj",), False),
}


@cache
def matrices(config: DecoderConfig, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (r, K) and B (N, r) by module, the same each time."""
    rank, _, targets, _ = KINDS[name]
    generator = torch.Generator().manual_seed(len(name))
    found = {}
    for full, weight in decoder(config).named_parameters():
        module = full.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            a = torch.randn(rank, weight.shape[1], generator=generator) / 4
            b = torch.randn(weight.shape[0], rank, generator=generator) / 4
            found[module] = a, b
    return found


def write_adapter(directory: Path, config: DecoderConfig, name: str, **changed: Any) -> Path:
    """As peft saves it, but for fields that are changed."""
    rank, alpha, targets, is_stabilized = KINDS[name]
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [*targets], "bias": "none"}
    said |= {"use_rslora": is_stabilized, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "rank_pattern": {}}
    tensors = {}
    for module, (a, b) in matrices(config, name).items():
        tensors[f"base_model.model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.model.{module}.lora_B.weight"] = b
    path = directory / name
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(said | changed))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@cache
def merged(config: DecoderConfig, name: str | None) -> Decoder:
    """The decoder with W + scale B A in place of each W that the adapter is for."""
    if name is None:
        return decoder(config)
    model = copy.deepcopy(decoder(config))
    rank, alpha, _, is_stabilized = KINDS[name]
    scale = alpha / (rank**0.5 if is_stabilized else rank)
    for module, (a, b) in matrices(config, name).items():
        model.get_submodule(module).weight.data += scale * b @ a
    return model


def transformers_model(directory: Path, config: DecoderConfig, name: str | None) -> Callable[[torch.Tensor], Any]:
    """The merged decoder as transformers computes it: from tokens to logits."""
    transformers = pytest.importorskip("transformers")
    save_hf(merged(config, name), directory / f"merged-{name}")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / f"merged-{name}", dtype=torch.float32).eval()
    return lambda tokens: model(tokens).logits


@torch.no_grad()
def check_completion(
    config: DecoderConfig, request: Request, found: Completion, model: Callable[[torch.Tensor], Any] | None = None
) -> None:
    """Greedy tokens, and their log-probabilities, are those of the merged decoder."""
    text = [*request.prompt, *found.ids]
    model = model or merged(config, request.adapter)
    logits = model(torch.tensor([text]))[0, len(request.prompt) - 1 : -1]
    assert found.ids == logits.argmax(1).tolist()
    expected = logits.log_softmax(1).max(1).values
    torch.testing.assert_close(torch.tensor([token.logprob for token in found.tokens]), expected, rtol=0, atol=1e-4)


def engine(config: DecoderConfig, directories: Mapping[str, Path], **more: Any) -> Engine:
    options = replace(OPTIONS, **{"kv_nbytes": 1 << 20, **more})
    return Engine.load(model_of(decoder(config)), options, dtype=torch.float32, adapters=directories)


def requests(names: list[str | None], seed: int = 0, **more: Any) -> list[Request]:
    texts = random_prompts(len(names), seed=seed)
    fields: dict[str, Any] = {"max_tokens": 6, "num_logprobs": 0, **more}
    return [
        Request(str(i), text, GREEDY, adapter=name, **fields)
        for i, (text, name) in enumerate(zip(texts, names, strict=True))
    ]


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    return {name: write_adapter(tmp_path, TINY, name) for name in KINDS}


# --- the same as merged weights ---


@pytest.mark.parametrize("name", ["grouped queries", "biases", "norms of heads"])
def test_a_mixed_batch_computes_what_transformers_does_with_merged_weights(name: str, tmp_path: Path) -> None:
    config = ARCHITECTURES[name]
    it = engine(config, {kind: write_adapter(tmp_path, config, kind) for kind in KINDS})
    asked = requests([None, *KINDS, None, *KINDS])
    done = it.generate(asked)
    models = {kind: transformers_model(tmp_path, config, kind) for kind in (None, *KINDS)}
    for request in asked:
        check_completion(config, request, done[request.id], models[request.adapter])
    assert len({tuple(completion.ids) for completion in done.values()}) > len(KINDS), "adapters change tokens"
    check_idle(it)


@pytest.mark.parametrize("lookahead", [True, False])
def test_more_adapters_than_slots_take_turns(written: dict[str, Path], lookahead: bool) -> None:
    it = engine(TINY, written, adapter_slots=2, lookahead=lookahead)
    asked = requests([*KINDS, *KINDS, None, *KINDS])
    done = it.generate(asked)
    for request in asked:
        check_completion(TINY, request, done[request.id])
    assert it.adapters.num_woken > len(KINDS)
    check_idle(it)


def test_sequences_that_are_preempted_find_their_adapters_again(written: dict[str, Path]) -> None:
    it = engine(TINY, written, adapter_slots=2, kv_nbytes=18 << 10)
    asked = requests([*KINDS, *KINDS], max_tokens=20)
    done = it.generate(asked)
    for request in asked:
        check_completion(TINY, request, done[request.id])
    assert it.metrics().num_preempted > 0
    check_idle(it)


def test_one_that_waits_for_a_slot_is_passed_by_those_without_adapters_only(written: dict[str, Path]) -> None:
    it = engine(TINY, written, adapter_slots=1)
    first, second, third, plain = requests(["wide", "down", "wide", None], max_tokens=20)
    for request in (first, second, third, plain):
        it.add(request)
    finished = []
    while it.has_work:
        finished += [output.request_id for output in it.step() if output.finish is not None]
        running = {sequence.request.id for sequence in it._scheduler.running}
        it.check_integrity()
        assert not running >= {first.id, third.id}, "the third goes behind the second"
    assert finished.index(plain.id) < finished.index(second.id) < finished.index(third.id)


def test_a_prefix_is_found_again_under_its_own_adapter_only(written: dict[str, Path]) -> None:
    it, text = engine(TINY, written), random_prompts(1, seed=5)[0] * 8
    names = ["wide", None, "attention", "wide", None]
    found = []
    for i, name in enumerate(names):
        request = Request(str(i), text[:40], GREEDY, 4, num_logprobs=0, adapter=name)
        done = it.generate([request])[request.id]
        check_completion(TINY, request, done)
        found.append(done.num_cached_tokens > 0)
    assert found == [False, False, False, True, True]


def test_what_is_loaded_under_a_name_again_finds_no_prefix_of_the_one_before(written: dict[str, Path]) -> None:
    it, text = engine(TINY, {"x": written["wide"]}), random_prompts(1, seed=5)[0] * 8
    it.generate([Request("a", text[:40], GREEDY, 4, adapter="x")])
    it.adapters.unload("x")
    it.adapters.load("x", written["attention"])
    done = it.generate([Request("b", text[:40], GREEDY, 4, num_logprobs=0, adapter="x")])["b"]
    assert done.num_cached_tokens == 0
    check_completion(TINY, Request("b", text[:40], adapter="attention"), done)


# --- without adapters ---


def test_an_engine_without_adapters_has_the_plan_and_the_bits_of_before(written: dict[str, Path]) -> None:
    """Rows without adapters have the same bits beside others too, of which they take nothing."""
    plain, mixed = engine(TINY, {}), engine(TINY, written)
    asked = requests([None, None])
    alone = plain.generate(asked)
    beside = mixed.generate([asked[0], replace(asked[1], adapter="wide")])
    assert beside["0"].tokens == alone["0"].tokens
    kinds = {region.kind for region in plain.plan.regions} | {
        region.kind for region in plain._weights.plan.host.regions
    }
    assert not kinds & {"adapter slots", "adapter images"}
    assert plain._runner._buffers.activations.adapted.numel() == plain._runner._buffers.inputs.adapter_rows.numel() == 0


def test_slots_and_images_are_planned_to_the_byte(written: dict[str, Path]) -> None:
    it = engine(TINY, written, adapter_slots=3, host_adapters=6)
    plan, weights = it._weights.plan, it._weights
    assert plan.adapters is not None
    assert (weights.arena.nbytes, weights.host.nbytes) == (plan.memory.nbytes, plan.host.nbytes)
    # Matrices A have K columns, B have N rows of rank 16; each field ends at a multiple of 256 bytes.
    dim, heads, kv, ffn = 32, 32, 16, 64
    columns = 3 * dim + heads + 2 * kv + heads + dim + 2 * dim + 2 * ffn + ffn + dim
    assert plan.adapters.slot_nbytes == TINY.num_layers * 16 * 4 * columns
    assert plan.memory.nbytes_of("adapter slots") == 3 * plan.adapters.slot_nbytes
    assert plan.host.nbytes_of("adapter images") == 6 * plan.adapters.slot_nbytes


def test_slots_are_taken_from_pages_where_memory_is_limited(written: dict[str, Path]) -> None:
    limited: dict[str, Any] = {"kv_nbytes": None, "memory_limit_nbytes": 4 << 20, "host_kv_nbytes": 0}
    plain, it = engine(TINY, {}, **limited), engine(TINY, written, **limited)
    assert plain.plan.nbytes <= 4 << 20
    assert it.plan.nbytes <= 4 << 20
    assert it.plan.nbytes_of("kv slabs") < plain.plan.nbytes_of("kv slabs")


# --- the order of copies ---


def races(directories: Mapping[str, Path], forgets: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Of steps and of copies into their slots, where there are fewer of these than adapters."""
    clocks = VectorClocks(forgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters_module, "streams_of", lambda device: clocks)
        it = engine(TINY, directories, adapter_slots=2)
    detector = RaceDetector(clocks)
    assert it._places.adapter_slots is not None
    detector.watch(it._places.adapter_slots)
    with detector:
        it.generate(requests([*KINDS, None, *KINDS], max_tokens=3))
    assert it.adapters.num_woken > len(KINDS)
    return detector.races


def test_slots_are_written_behind_their_last_step_and_read_behind_their_copy(written: dict[str, Path]) -> None:
    assert races(written) == []


@pytest.mark.parametrize("forgotten", [(COMPUTE, HOST_TO_DEVICE), (HOST_TO_DEVICE, COMPUTE)])
def test_a_wait_that_is_left_out_is_found(forgotten: tuple[str, str], written: dict[str, Path]) -> None:
    assert races(written, [forgotten])


# --- elsewhere ---


@pytest.mark.parametrize("mode", ["streamed", "debug"])
def test_adapters_are_served_where_weights_are_streamed_and_in_debug_mode(mode: str, written: dict[str, Path]) -> None:
    more: dict[str, Any] = {"mode": "streamed"} if mode == "streamed" else {}
    options = replace(OPTIONS, kv_nbytes=1 << 20, debug=mode == "debug", adapter_slots=2)
    with Engine.load(model_of(decoder(TINY)), options, dtype=torch.float32, adapters=written, **more) as it:
        asked = requests([None, *KINDS], max_tokens=3)
        done = it.generate(asked)
        for request in asked:
            check_completion(TINY, request, done[request.id])
        assert it._weights.plan.mode == ("streamed" if more else "resident")


def on_every_rank(directories: Mapping[str, Path]) -> None:
    options = replace(OPTIONS, kv_nbytes=1 << 20, adapter_slots=2)
    transport = world_transport("cpu")
    it = Engine.load(
        model_of(decoder(TINY)), options, mode="tensor_parallel", transport=transport, adapters=directories
    )
    asked = requests([None, *KINDS], max_tokens=3)
    done = it.generate(asked)
    for request in asked:
        check_completion(TINY, request, done[request.id])


@pytest.mark.slow
def test_tensor_parallel_ranks_have_their_parts_of_adapters(written: dict[str, Path]) -> None:
    run_ranks(on_every_rank, written)


# --- what is refused ---


def refused(tmp_path: Path, words: str, **changed: Any) -> None:
    with pytest.raises(ValueError, match=words):
        engine(TINY, {"x": write_adapter(tmp_path, TINY, "attention", **changed)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"peft_type": "IA3"}, "only peft_type LORA is served, found 'IA3'"),
        ({"use_dora": True}, "use_dora True of a LoRA adapter is not served"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"a_new_field": 1}, "a_new_field 1"),
        ({"r": 0}, "r must be a number from 1 on, found 0"),
        ({"lora_alpha": "big"}, "lora_alpha must be a number, found 'big'"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target 'lm_head' is not served, only down_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks 4 matrices .*o_proj.lora_A"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_. is of a module that adapter_config.json does not target"),
        ({"target_modules": "("}, "is no pattern"),
        ({"r": 4}, r"must have the shape \(.*\), of r 4, found"),
        ({"layers_to_transform": [0]}, "does not target"),
    ],
)
def test_what_an_adapter_says_and_is_not_served_is_refused_by_name(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    refused(tmp_path, words, **changed)


@pytest.mark.parametrize("init", [False, "eva", "orthogonal"])
def test_ways_to_begin_that_leave_the_model_as_it_is_are_served(init: Any, tmp_path: Path) -> None:
    said = {"init_lora_weights": init, "eva_config": {"rho": 2.0} if init == "eva" else None}
    assert engine(TINY, {"x": write_adapter(tmp_path, TINY, "attention", **said)}).adapters.names == ("x",)


@pytest.mark.parametrize("target", [r".*\.self_attn\.(q|v)_proj", ["self_attn.q_proj", "v_proj"]])
def test_targets_are_patterns_or_ends_of_names(target: Any, tmp_path: Path) -> None:
    it = engine(TINY, {"x": write_adapter(tmp_path, TINY, "attention", target_modules=target)})
    assert it.adapters.names == ("x",)


def test_files_that_are_no_adapters_of_this_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*adapter_config.json"):
        engine(TINY, {"x": tmp_path})
    wider = write_adapter(tmp_path, replace(TINY, ffn_dim=96), "down")
    with pytest.raises(ValueError, match=r"down_proj.lora_A must have the shape \(2, 64\), of r 2, found \(2, 96\)"):
        engine(TINY, {"x": wider})
    path = write_adapter(tmp_path, TINY, "attention")
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"'base_model.model.lm_head.lora_A.weight' is not served"):
        engine(TINY, {"x": path})
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected adapter_model.safetensors"):
        engine(TINY, {"x": path})


def test_what_has_no_room_is_refused_and_changes_nothing(written: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="adapter 'wide' has rank 8, slots have 4"):
        engine(TINY, written, adapter_rank=4)
    with pytest.raises(ValueError, match="4 adapters are given, host_adapters are 3"):
        engine(TINY, written, host_adapters=3)
    it = engine(TINY, {"a": written["down"]}, adapter_rank=4, host_adapters=1)
    with pytest.raises(ValueError, match="rank 8, slots have 4"):
        it.adapters.load("b", written["wide"])
    with pytest.raises(ValueError, match="a new name for an adapter, found 'a'"):
        it.adapters.load("a", written["down"])
    with pytest.raises(ValueError, match="host memory holds 1 adapters"):
        it.adapters.load("b", written["down"])
    with pytest.raises(ValueError, match="no adapter 'b'; loaded are: 'a'"):
        it.adapters.unload("b")
    with pytest.raises(ValueError, match="no adapter 'b'; loaded are: 'a'"):
        it.generate(requests(["a", "b"]))
    check_idle(it)
    it.add(requests(["a"])[0])
    with pytest.raises(ValueError, match="adapter 'a' has 1 requests"):
        it.adapters.unload("a")
    while it.has_work:
        it.step()
    it.adapters.unload("a")
    it.adapters.load("b", written["attention"])
    assert it.adapters.names == ("b",)
    check_idle(it)


def test_an_engine_without_slots_refuses_adapters(written: dict[str, Path]) -> None:
    it = engine(TINY, {})
    with pytest.raises(ValueError, match="make it with adapter_slots"):
        it.adapters.load("a", written["down"])
    with pytest.raises(ValueError, match="no adapter 'a'; loaded are: none"):
        it.add(requests(["a"])[0])
