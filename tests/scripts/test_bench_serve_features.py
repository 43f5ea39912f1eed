"""Speculation, limits and adapters are measured without a GPU, on a model and with files that are what they claim."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import bench_serve
from bench import serve_adapters
from bench.serve_engine import Requests
from bench.serve_floors import MeasuredRates, Rate, decode_floor_s, forward_flops, products_of
from bench.serve_limits import opening
from bench.serve_options import MEASURES, ON_REQUEST, parse_options
from bench.serve_quantized import LAYOUTS, STD, quantized_model
from bench.serve_speculation import EMBEDDING, HEAD, PERIOD, before, known_model
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.serving_plan import Site, plan_serving
from yafsdp_like.inference.weights.adapter_files import AdapterSource, open_adapter
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models import PRESETS
from yafsdp_like.models.moe import ExpertsConfig
from yafsdp_like.models.quantization import Quantization

if TYPE_CHECKING:
    from pathlib import Path

TINY = PRESETS["tiny"]
SLOW, FAST = (1.0, "given"), (1e18, "given")
ARGUMENTS = ["--model", "preset:tiny", "--device", "cpu", "--context", "40", "--steps", "3", "--warmup", "1"]
ARGUMENTS += ["--max-batch-tokens", "32", "--prefill-tokens", "70", "--prompt-tokens", "80", "--new-tokens", "12"]
ARGUMENTS += ["--matmul-seconds", "0.05", "--batch", "2", "--draft", "preset:tiny"]


def rows_of(measure: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    """Run the command on the CPU; the rows of its report."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with redirect_stdout(io.StringIO()) as printed:
        bench_serve.main([*ARGUMENTS, "--measure", measure, *more])
    (rows,) = json.loads(printed.getvalue().splitlines()[-1])["results"].values()
    assert isinstance(rows, list)
    return rows


def test_what_makes_further_engines_is_measured_only_where_it_is_named() -> None:
    assert set(ON_REQUEST) < set(MEASURES)
    assert not set(ON_REQUEST) & set(parse_options(ARGUMENTS, 1).measures)
    assert parse_options([*ARGUMENTS, "--measure", "adapters,limits"], 1).measures == ("limits", "adapters")


def test_each_token_follows_one_and_a_circle_or_the_whole_upper_half_comes_back_to_it() -> None:
    tokens = torch.arange(500)
    found = before(tokens, 500)
    assert sorted(found.tolist()) == tokens.tolist()
    half = 500 // 2 // PERIOD * PERIOD
    for token, length in ((5, PERIOD), (half - 1, PERIOD), (half, 500 - half), (499, 500 - half)):
        at, steps = int(found[token]), 1
        while at != token:
            at, steps = int(found[at]), steps + 1
        assert steps == length


@pytest.mark.parametrize("is_draft", [False, True])
def test_any_part_of_a_known_head_is_the_embedding_of_tokens_before(is_draft: bool) -> None:
    source = known_model("known", TINY, is_draft).source(torch.device("cpu"))
    embedding, part = torch.empty(TINY.vocab_size, TINY.dim), torch.empty(3 * TINY.dim)
    source.read_into(EMBEDDING, 0, embedding.view(-1))
    source.read_into(HEAD, 9 * TINY.dim, part)
    expected = embedding[[8, 9, 10]]
    expected[1] *= -1 if is_draft else 1  # token 10
    assert torch.equal(part.view(3, -1), expected)


def test_a_written_adapter_is_one_of_the_model_and_changes_it(tmp_path: Path) -> None:
    serve_adapters.write_adapter(tmp_path, TINY, 4)
    adapter = open_adapter(tmp_path, TINY)
    assert (adapter.rank, adapter.scale) == (4, 1.0)
    assert len(adapter.stored) == 2 * 7 * TINY.num_layers
    values = torch.zeros(TINY.dim * 4)
    AdapterSource(adapter, 4).read_into("layers.1.mlp.down_proj.lora_B", 0, values)
    assert values.std() == pytest.approx(0.5, rel=0.2)


def test_requests_name_adapters_in_turn() -> None:
    assert [request.adapter for request in Requests(9, adapters=("a", "b")).many(3, 1, 1)] == ["b", "a", "b"]
    assert Requests(9).one(1, 1).adapter is None


def test_an_opening_ends_within_a_document() -> None:
    assert list(opening(["abc", "def", "ghi"], 5)) == ["abc", "de"]
    assert list(opening(["abc", "def"], 3)) == ["abc"]


def test_the_floor_of_decoding_a_mixture_reads_the_experts_that_tokens_visit() -> None:
    config = replace(TINY, experts=ExpertsConfig(8, 2))
    plan = plan_serving(config, EngineOptions(kv_nbytes=1 << 24), Site(torch.float32))
    experts = 3 * 8 * config.ffn_dim * config.dim * config.num_layers
    others = config.num_params - experts - config.vocab_size * config.dim - 5 * config.dim  # nor norms
    reading, computing = (MeasuredRates(Rate(*a), Rate(*b)) for a, b in ((SLOW, FAST), (FAST, SLOW)))
    for batch, share in ((1, 1 / 4), (2, 7 / 16)):
        assert decode_floor_s(plan, batch, 0, reading) == pytest.approx(4 * (others + share * experts))
    assert decode_floor_s(plan, 2, 0, computing) == pytest.approx(2 * forward_flops(config, 0, 1, 1))


def test_layers_without_experts_compute_with_their_own_feed_forward() -> None:
    mixture = replace(TINY, experts=ExpertsConfig(8, 2))
    first_dense = replace(mixture, dense_layers=(0,), dense_ffn_dim=100)
    fewer = 3 * TINY.dim * (2 * TINY.ffn_dim - 100) + 8 * TINY.dim  # two experts, and a router
    assert forward_flops(mixture, 0, 5, 1) - forward_flops(first_dense, 0, 5, 1) == 2 * 5 * fewer


def test_a_quantized_matrix_is_read_as_codes_with_scales_and_zeros_and_computed_with_all_weights() -> None:
    """4 bits a weight, and a scale of 16 and a zero of 8 bits for each 32 of a row."""
    quantization = Quantization("awq", 4, group_columns=32, has_zeros=True, scale_dtype=torch.float16)
    config = replace(TINY, ffn_dim=192)
    options, site = EngineOptions(kv_nbytes=1 << 24), Site(torch.float32)
    plain, found = (plan_serving(c, options, site) for c in (config, replace(config, quantization=quantization)))
    *matrices, head = products_of(found)
    assert [product.numel for product in (*matrices, head)] == [product.numel for product in products_of(plain)]
    assert [product.nbytes for product in matrices] == [m.numel // 2 + m.numel // 32 * 3 for m in matrices]
    assert head.nbytes == 4 * config.vocab_size * config.dim


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_codes_stand_for_values_of_about_the_same_deviation(layout: str) -> None:
    source = quantized_model("m", TINY, layout).source(torch.device("cpu"))
    bits = LAYOUTS[layout].bits
    codes = torch.empty(10_000, dtype=torch.uint8 if bits == 4 else torch.float8_e4m3fn)
    scales = torch.empty(1)
    source.read_into("layers.0.self_attn.q_proj.weight", 0, codes)
    source.read_into("layers.0.self_attn.q_proj.scales", 0, scales)
    values = torch.cat([codes & 15, codes >> 4]).float() if bits == 4 else codes.float()
    assert (values * scales).std() == pytest.approx(STD, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fp8-block", "awq"])
def test_a_quantized_mixture_is_measured_beside_its_floor(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of which groups of 128 columns are a part."""
    sizes = {"dim": 128, "ffn_dim": 128, "num_heads": 4, "num_kv_heads": 2, "custom_head_dim": 32}
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, **sizes, experts=ExpertsConfig(4, 2)))
    (row,) = rows_of("decode", monkeypatch, "--quantize", layout)
    assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"]["median"])


@pytest.mark.slow
def test_a_known_model_draws_the_tokens_that_follow() -> None:
    known = known_model("known", TINY)
    with Engine.load(known, EngineOptions(kv_nbytes=1 << 20, max_batch_size=2, max_batch_tokens=32)) as engine:
        for name, token in (("circle", 3 * PERIOD + 30), ("new", 300)):
            engine.add(Request(name, (token - 1, token), SamplingParams(temperature=0.0), max_tokens=4))
        drawn: dict[str, list[int]] = {"circle": [], "new": []}
        while engine.has_work:
            for output in engine.step():
                drawn[output.request_id] += [token.id for token in output.tokens]
    assert drawn == {"circle": [127, 96, 97, 98], "new": [301, 302, 303, 304]}


@pytest.mark.slow
def test_speculation_draws_the_same_tokens_and_a_draft_model_more_of_them_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_of("speculation", monkeypatch)
    assert [(row["speculate"], row["text"]) for row in rows] == [
        (how, text) for how in ("prompt-lookup", "draft:known-draft") for text in ("repetitive", "new")
    ]
    for row in rows:
        assert row["same_tokens"] and row["tokens_per_step"] >= 0.9
        assert row["of_without"] == pytest.approx(row["tokens_per_second"] / row["tokens_per_second_without"])


@pytest.mark.slow
def test_answers_of_a_schema_are_measured_beside_free_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    pytest.importorskip("transformers")
    rows = rows_of("limits", monkeypatch)
    assert [row["answers"] for row in rows] == ["free", "bias", "json_schema", "free again"]
    assert rows[0]["of_free"] == 1.0 and rows[0]["tokenizer_tokens"] == TINY.vocab_size
    for row in rows:
        assert row["of_free"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])


@pytest.mark.slow
def test_adapters_are_measured_beside_an_engine_without_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("adapters", monkeypatch)
    assert [(row["slots"], row["adapters"], row["batch"]) for row in rows] == [
        (0, 0, 2),
        (8, 0, 2),
        (8, 1, 2),
        (8, 2, 2),
    ]
    for row in rows:
        assert row["of_no_slots"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
