"""The serving benchmark runs without a GPU, its floors can be had by hand, and what it prints can be read back."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import bench_serve
from bench import serve_memory, serve_peers
from bench.serve_engine import Bench, Decoding, Requests, Served, engine_options
from bench.serve_floors import (
    MeasuredRates,
    Rate,
    decode_floor_s,
    forward_flops,
    gather_floor_s,
    offline_floor_s,
)
from bench.serve_offline import check_count
from bench.serve_options import ServeBenchOptions, parse_options
from bench.serve_poisson import Arrival, ServedRequest, arrivals_at, percentiles, play, row_of
from bench.serve_report import table
from launch.world import World
from tests.ranks import run_ranks
from tests.training import world_mesh
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request, RequestOutput, Token
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.serving_plan import ServingPlan, Site, plan_serving
from yafsdp_like.models import PRESETS

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TINY = PRESETS["tiny"]
SIZES = ["--context", "40", "--steps", "3", "--warmup", "1", "--max-batch-tokens", "32", "--prefill-tokens", "70"]
LOAD = ["--rounds", "3", "--prompt-tokens", "20", "--new-tokens", "6", "--num-requests", "2,6", "--rate", "50"]
EFFORT = ["--seconds", "0.2", "--random-requests", "20", "--matmul-seconds", "0.05", "--device", "cpu"]
EFFORT += ["--connections", "2", "--mixed-requests", "1"]
ARGUMENTS = ["--model", "preset:tiny", *SIZES, *LOAD, *EFFORT]
RATES = MeasuredRates(Rate(1e9, "given"), Rate(1e12, "given"))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun would say is not said."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run_bench(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The lines that are printed before the last, and the JSON object of the last."""
    with redirect_stdout(io.StringIO()) as printed:
        bench_serve.main([*ARGUMENTS, *arguments])
    *lines, last = printed.getvalue().splitlines()
    return lines, json.loads(last)


def options_of(*arguments: str, num_ranks: int = 1) -> ServeBenchOptions:
    return parse_options([*ARGUMENTS, *arguments], num_ranks)


# --- whole runs ---


def test_one_run_measures_all_that_one_rank_can(tmp_path: Path) -> None:
    out = tmp_path / "results" / "tiny.json"
    arguments = ["--batch", "3,1", "--no-peers", "--out", str(out)]
    lines, report = run_bench(arguments)
    assert not dist.is_initialized()
    assert json.loads(out.read_text()) == report
    assert report["command"].startswith("python scripts/bench_serve.py --model preset:tiny")
    assert report["mode"] == "resident" and report["model"]["num_params"] == TINY.num_params
    assert {"rates", "engine", *report["results"]} == set(report["wall_seconds"])
    results = report["results"]
    assert list(results) == ["memory", "decode", "prefill", "poisson", "connections", "mixed", "offline"]
    assert_memory(results["memory"])
    assert_decode(results["decode"], report["rates"])
    assert results["prefill"][0]["num_tokens"] == 70 and len(results["prefill"][0]["chunk_ms"]) == 3
    poisson, over_http = results["poisson"]
    assert [row["way"] for row in (poisson, over_http)] == ["in process", "HTTP"]
    assert poisson["num_requests"] == over_http["num_requests"] == 10
    assert 0 < poisson["first_token_ms"]["p50"] <= poisson["first_token_ms"]["p99"]
    assert poisson["tokens_per_second"] == pytest.approx(10 * 6 / poisson["seconds"])
    assert [(row["impl"], row["num_requests"], row["num_tokens"]) for row in results["offline"]] == [
        ("ours", 2, 12),
        ("ours", 6, 36),
    ]
    assert [row["num_requests"] for row in results["connections"]] == [6, 6]
    assert results["mixed"][0]["num_tokens"] == results["mixed"][0]["num_steps"] - results["mixed"][0]["num_chunks"]
    assert [line for line in lines if line in results] == list(results)  # each one's heading


def assert_memory(memory: dict[str, Any]) -> None:
    assert memory["planned_nbytes"] == sum(memory["planned_kinds"].values()) == memory["arena_nbytes"]
    assert memory["allocated_nbytes"] is memory["random"]["unchanged"] is None  # a CPU has no such allocator
    assert memory["random"]["num_requests"] == 20 and memory["random"]["num_tokens"] >= 20 - 3


def assert_decode(rows: list[dict[str, Any]], rates: dict[str, Any]) -> None:
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["context"] == pytest.approx(40, abs=6)
        assert row["device_ms"] is None
        median = row["step_ms"]["median"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / median)
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / median)
        least_nbytes = 4 * (TINY.num_params - TINY.vocab_size * TINY.dim)  # all but the embedding, in fp32
        assert row["floor_ms"] >= 1e3 * least_nbytes / rates["hbm"]["value"]


@pytest.mark.slow
def test_transformers_does_the_same_where_it_is_installed_and_its_failure_is_told() -> None:
    pytest.importorskip("transformers")
    _, report = run_bench(["--batch", "2", "--measure", "offline"])
    ours, _, theirs, batched = report["results"]["offline"]
    assert (theirs["impl"], theirs["num_requests"], theirs["num_tokens"]) == ("transformers generate", 2, 12)
    assert theirs["ours_over_it"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    assert batched["status"] == "left out: it is for GPUs" and "ours_over_it" not in batched
    assert report["versions"]["transformers"]
    broken = serve_peers.attempt("theirs", 2, mock.Mock(side_effect=ZeroDivisionError("planted\nby a test")))
    assert broken == {"impl": "theirs", "num_requests": 2, "status": "failed: ZeroDivisionError: planted"}


def test_without_transformers_ours_is_measured_alone() -> None:
    with mock.patch("bench.serve_peers.importlib.import_module", side_effect=ImportError("planted")):
        lines, report = run_bench(["--batch", "2", "--measure", "offline"])
    assert "transformers is left out: package transformers cannot be imported (planted)" in lines
    assert {row["impl"] for row in report["results"]["offline"]} == {"ours"}


def bench_modes(arguments: Sequence[str]) -> str:
    """On a worker, which is in a process group already, over which weights are gathered."""
    world = World(dist.get_rank(), torch.device("cpu"), world_mesh())
    with (
        mock.patch("bench.serve_run.ranks.join", lambda device: world),
        mock.patch("bench.serve_run.ranks.leave"),
        mock.patch("bench_serve.ranks_there", lambda: 2),
        redirect_stdout(io.StringIO()) as printed,
    ):
        bench_serve.main([*ARGUMENTS, "--model", "preset:small", *arguments])
    return printed.getvalue()


def test_two_ranks_measure_gathered_weights_together() -> None:
    printed, by_the_other = run_ranks(bench_modes, ["--batch", "2"])
    assert by_the_other == ""
    report = json.loads(printed.splitlines()[-1])
    assert report["mode"] == "gathered" and report["hardware"]["ranks"] == 2
    decode, prefill = report["results"]["modes"]
    assert (decode["work"], decode["batch"], prefill["work"]) == ("decode", 2, "prefill")
    for row in (decode, prefill):
        floor = max(row["compute_floor_ms"], row["gather_floor_ms"])
        assert row["ratio_to_floor"] == pytest.approx(row["step_ms"] / floor)
        assert row["peer_rate_is"] == "measured: gathering alone"
        assert row["gather_floor_ms"] == pytest.approx(row["gather_alone_ms"])  # which the rate is from
    assert decode["tokens_per_second"] == pytest.approx(2 * 2 / decode["step_ms"] * 1e3)


def test_two_ranks_measure_steps_that_they_compute_together() -> None:
    printed, by_the_other = run_ranks(bench_modes, ["--batch", "2", "--mode", "tensor_parallel", "--num-layers", "3"])
    assert by_the_other == ""
    report = json.loads(printed.splitlines()[-1])
    assert report["mode"] == "tensor_parallel" and report["model"]["num_layers"] == 3
    decode, _ = report["results"]["modes"]
    assert decode["ratio_to_floor"] == pytest.approx(decode["step_ms"] / decode["compute_floor_ms"])
    assert decode["tokens_per_second"] == pytest.approx(2 / decode["step_ms"] * 1e3), "of one batch, not of two"


# --- memory ---


def bench_of(engine: Engine, options: ServeBenchOptions) -> Bench:
    served = SimpleNamespace(engine=engine, device=torch.device("cpu"))
    return Bench(options, cast("World", None), cast("Served", served), Requests(TINY.vocab_size))


def test_random_requests_are_all_served_or_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_memory, "CANCELLED_SHARE", 0.4)
    options = options_of("--batch", "3", "--random-requests", "60")
    engine = tiny_engine(options)
    monkeypatch.setattr(serve_memory, "memory_reading", lambda world: {})
    row = serve_memory.serve_random(bench_of(engine, options))
    assert 5 < row["num_cancelled"] < 40 and row["num_tokens"] > 100
    metrics = engine.metrics()
    assert metrics.num_tokens_drawn == row["num_tokens"] and metrics.kv_nbytes_used == 0
    assert row["changed"] is row["unchanged"] is None


def test_a_counter_that_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that the device lost are told, too, and are no counter: kernels are loaded when they are first used."""
    options = options_of("--batch", "2", "--random-requests", "3")
    bench = bench_of(tiny_engine(options), options)
    first = dict.fromkeys(serve_memory.COUNTERS, 5) | {"device_nbytes": 100}
    for last, unchanged in (({**first, "device_nbytes": 130}, True), ({**first, "device_allocs": 6}, False)):
        monkeypatch.setattr(serve_memory, "memory_reading", mock.Mock(side_effect=[first, last]))
        row = serve_memory.serve_random(bench)
        assert row["unchanged"] is unchanged
        assert row["changed"]["device_allocs"] == last["device_allocs"] - 5
        assert row["device_nbytes_changed"] == last["device_nbytes"] - 100


def test_bytes_beside_the_plan_are_what_the_device_lost_more() -> None:
    before, ready = {"allocated_nbytes": 10, "device_nbytes": 50}, {"allocated_nbytes": 110, "device_nbytes": 250}
    assert serve_memory.taken(before, ready, planned_nbytes=90) == {
        "allocated_nbytes": 100,
        "device_nbytes": 200,
        "beside_the_plan_nbytes": 110,
    }


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "num_ranks", "message"),
    [
        (["--measure", "decode,speed"], 1, "['speed'] cannot be measured on 1 ranks"),
        (["--mode", "gathered"], 1, "--mode: gathered is not for 1 ranks, expected one of ('resident', 'streamed')"),
        (["--num-layers", "0"], 1, "--num-layers must be at least 1, found 0"),
        (["--measure", "modes"], 1, "['modes'] cannot be measured on 1 ranks"),
        (["--measure", "decode"], 2, "['decode'] cannot be measured on 2 ranks"),
        (["--batch", "8,32"], 1, "--max-batch-tokens must be more than the largest of --batch"),
        (["--steps", "0"], 1, "must be at least 1"),
        (["--rate", "0"], 1, "--rate, --seconds and --tpot-ms must be above 0"),
        (["--rate", "5,0%"], 1, "--rate, --seconds and --tpot-ms must be above 0"),
        (["--chunk", "1"], 1, "--chunk must be from the largest of --batch to --max-batch-tokens, 2 to 32, found (1,)"),
        (["--chunk", "8,33"], 1, "found (8, 33)"),
        (["--connections", "0"], 1, "--connections and --mixed-requests must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], num_ranks: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options_of("--batch", "2", *arguments, num_ranks=num_ranks)
    assert message in capsys.readouterr().err


def test_measurements_are_made_in_one_order_whatever_was_asked() -> None:
    assert options_of("--batch", "2", "--measure", "offline,memory").measures == ("memory", "offline")


# --- floors ---


def plan_of(model: str, mode: Any = "resident", **site: Any) -> ServingPlan:
    return plan_serving(PRESETS[model], EngineOptions(kv_nbytes=1 << 30), Site(**site), mode)


def test_the_floor_of_decoding_an_8b_model_is_what_it_reads() -> None:
    """The head is read, the embedding is not; keys and values are 2 x 32 layers x 8 heads x 128 x 2 bytes a token."""
    plan, config = plan_of("8b"), PRESETS["8b"]
    weights = 2 * (config.num_params - config.vocab_size * config.dim)
    rates = MeasuredRates(Rate(4.25e12, "given"), Rate(600e12, "given"))
    nbytes = weights + 32 * 1024 * 131_072
    assert decode_floor_s(plan, 32, 1024, rates) == pytest.approx(nbytes / 4.25e12, rel=1e-4)  # without norms
    assert 32 / decode_floor_s(plan, 32, 1024, rates) == pytest.approx(7049, rel=1e-3)
    many = weights * 512 / 600e12 + 512 * 1024 * 131_072 / 4.25e12  # products compute, and attention reads after them
    assert decode_floor_s(plan, 512, 1024, rates) == pytest.approx(many, rel=1e-3)
    slow = MeasuredRates(Rate(4.25e12, "given"), Rate(1e12, "given"))  # where arithmetic takes longer than reading
    assert decode_floor_s(plan, 32, 1023, slow) == pytest.approx(32 * forward_flops(config, 1023, 1, 1) / 1e12)


def test_ranks_that_compute_together_each_read_their_part() -> None:
    rates = MeasuredRates(Rate(4.25e12, "given"), Rate(600e12, "given"))
    alone, together = plan_of("8b"), plan_of("8b", "tensor_parallel", num_ranks=2)
    for batch in (1, 512):
        whole = decode_floor_s(alone, batch, 1024, rates)
        assert decode_floor_s(together, batch, 1024, rates) == pytest.approx(whole / 2)


def test_a_tied_head_is_read_and_a_window_bounds_what_a_query_sees() -> None:
    tied = PRESETS["small"]
    plan = plan_of("small", dtype=torch.float32)
    reading = MeasuredRates(Rate(1e9, "given"), Rate(1e18, "given"))
    assert decode_floor_s(plan, 1, 0, reading) == pytest.approx(4 * tied.num_params / 1e9, rel=1e-3)
    windowed = replace(TINY, sliding_window=10)
    short = plan_serving(windowed, EngineOptions(kv_nbytes=1 << 24), Site(torch.float32))
    per_token = 2 * 2 * 2 * 16 * 4  # both of two layers, two heads of 16, fp32
    of_context = decode_floor_s(short, 3, 100, reading) - decode_floor_s(short, 3, 0, reading)
    assert of_context == pytest.approx(3 * 10 * per_token / 1e9)


def test_operations_of_a_forward_are_those_of_its_tokens_and_of_the_pairs_that_they_see() -> None:
    """Chunks of a prompt add up, and a third of a training step's is one forward but for the diagonal of attention."""
    num_tokens = 64
    whole = forward_flops(TINY, 0, num_tokens, num_tokens)
    diagonal = TINY.num_layers * 4 * TINY.num_heads * TINY.head_dim * num_tokens / 2
    assert whole == TINY.train_flops(1, num_tokens) / 3 + diagonal
    assert forward_flops(TINY, 0, 40, 0) + forward_flops(TINY, 40, 24, 1) == forward_flops(TINY, 0, 64, 1)
    windowed = replace(TINY, sliding_window=10)
    pairs = sum(min(position + 1, 10) for position in range(5, 30))
    without = replace(TINY, sliding_window=1)  # each query sees itself
    difference = forward_flops(windowed, 5, 25, 1) - forward_flops(without, 5, 25, 1)
    assert difference == TINY.num_layers * 4 * TINY.num_heads * TINY.head_dim * (pairs - 25)


def test_the_floor_of_offline_requests_counts_prompts_and_full_batches() -> None:
    plan = plan_of("tiny", dtype=torch.float32)
    prompts = 6 * forward_flops(TINY, 0, 20, 1) / 1e12
    steps = sum(decode_floor_s(plan, 3, 20 + drawn, RATES) for drawn in range(1, 8))
    assert offline_floor_s(plan, 6, 3, 20, 8, RATES) == pytest.approx(prompts + 2 * steps)


def test_the_floor_of_gathering_is_the_others_part_of_layers_that_share_slots() -> None:
    plan = plan_of("8b", "gathered", num_ranks=2, maps_memory=True)
    layers = 32 * plan.placement.packed_units[1].nbytes
    assert gather_floor_s(plan, 390e9) == pytest.approx(layers / 2 / 390e9)
    two_layers = plan_of("tiny", "gathered", num_ranks=2, maps_memory=True)  # a slot each: gathered once and for all
    assert gather_floor_s(two_layers, 390e9) == 0


def test_streamed_weights_are_measured_against_the_hosts_link() -> None:
    _, report = run_bench(["--batch", "2", "--mode", "streamed", "--num-layers", "4", "--measure", "decode,prefill"])
    assert report["mode"] == "streamed"
    (decode,), (prefill,) = report["results"]["decode"], report["results"]["prefill"]
    config, per_second = PRESETS["tiny"], report["rates"]["host"]["value"]
    layers_nbytes = 4 * 4 * config.block_num_active_weights  # of float32, without norms
    assert decode["floor_ms"] >= 1e3 * layers_nbytes / per_second
    num_chunks = len(prefill["chunk_ms"])
    assert num_chunks == 3 and prefill["floor_seconds"] >= num_chunks * layers_nbytes / per_second


# --- what is asked of the engine ---


def tiny_engine(options: ServeBenchOptions) -> Engine:
    limits = engine_options(options, TINY)
    return Engine.load("preset:tiny", limits)


@pytest.mark.parametrize(("batch", "budget"), [("1", "2"), ("3", "4"), ("12", "32")])
def test_a_batch_fits_is_filled_and_is_not_preempted(batch: str, budget: str) -> None:
    """The engine has no more room than the options say is needed, even where prompts trickle in a token at a time."""
    options = options_of("--batch", batch, "--max-batch-tokens", budget, "--prefill-tokens", "8")
    engine, size = tiny_engine(options), int(batch)
    room = options.decode_length(size) - options.decode_prompt
    decoding = Decoding(engine, Requests(TINY.vocab_size).many(size, options.decode_prompt, room))
    decoding.fill()
    for _ in range(options.warmup + options.steps + 8):
        assert len(decoding.step()) == size
    assert decoding.context > options.decode_prompt + options.steps
    decoding.stop()
    assert engine.metrics().num_preempted == 0 and not engine.has_work
    engine.check_integrity()


def test_a_request_that_ends_while_it_is_measured_is_an_error() -> None:
    engine = tiny_engine(options_of("--batch", "2"))
    decoding = Decoding(engine, Requests(TINY.vocab_size).many(2, 4, num_new=3))
    with pytest.raises(RuntimeError, match="ended while it was measured"):
        for _ in range(10):
            decoding.step()


def test_requests_are_other_ones_each_time_and_the_same_in_every_run() -> None:
    first, again = Requests(512), Requests(512)
    made = first.many(3, 16, 4)
    assert len({request.prompt for request in made}) == len({request.id for request in made}) == 3
    assert again.many(3, 16, 4) == made


def test_a_rate_of_fewer_tokens_than_asked_for_is_an_error() -> None:
    bench = cast("Bench", SimpleNamespace(options=options_of("--batch", "2")))
    check_count(2 * 6, 2, bench)
    with pytest.raises(RuntimeError, match="2 requests were to draw 12 tokens in all, and drew 11"):
        check_count(11, 2, bench)


# --- arrivals ---


class Clock:
    """Time that passes when somebody sleeps, and in steps of the engine."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Metronome:
    """An engine that serves one request at a time, a token in each step of a second."""

    rest_s = 0.0

    def __init__(self, clock: Clock) -> None:
        self._clock, self._left = clock, dict[str, int]()

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add(self, request: Request) -> None:
        self._left[request.id] = request.max_tokens

    def step(self) -> list[RequestOutput]:
        self._clock.now += 1.0
        request_id = next(iter(self._left))
        self._left[request_id] -= 1
        if not self._left[request_id]:
            del self._left[request_id]
        return [RequestOutput(request_id, (Token(0),))]


class Resting(Metronome):
    """One whose first step is due at the second 3."""

    @property
    def rest_s(self) -> float:  # type: ignore[override]
        return max(0.0, 3.0 - self._clock.now)


def test_requests_are_taken_when_they_come_while_a_step_is_not_due() -> None:
    clock, taken = Clock(), list[float]()
    engine = Resting(clock)

    def add(request: Request) -> None:
        taken.append(clock.now)
        Metronome.add(engine, request)

    arrivals = [Arrival(at, Request(f"{at}", (1,), max_tokens=1)) for at in (0.5, 1.5)]
    with (
        mock.patch("bench.serve_poisson.time.perf_counter", lambda: clock.now),
        mock.patch("bench.serve_poisson.time.sleep", clock.sleep),
        mock.patch.object(engine, "add", add),
    ):
        served = play(engine, arrivals)
    assert taken == [0.5, 1.5] and [one.tokens_at for one in served] == [[4.0], [5.0]]


def test_latencies_count_from_arrivals_not_from_when_the_engine_took_notice() -> None:
    clock = Clock()
    arrivals = [Arrival(at, Request(f"{at}", (1,), max_tokens=2)) for at in (0.5, 1.0, 10.0)]
    with (
        mock.patch("bench.serve_poisson.time.perf_counter", lambda: clock.now),
        mock.patch("bench.serve_poisson.time.sleep", clock.sleep),
    ):
        served = play(Metronome(clock), arrivals)
    assert [one.tokens_at for one in served] == [[1.5, 2.5], [3.5, 4.5], [11.0, 12.0]]
    row = row_of(0.3, served)
    assert row["first_token_ms"] == {"p50": 1000.0, "p95": 2500.0, "p99": 2500.0}
    assert row["between_tokens_ms"] == {"p50": 1000.0, "p95": 1000.0, "p99": 1000.0}
    assert row["seconds"] == 11.5 and row["tokens_per_second"] == 6 / 11.5


def test_arrivals_come_at_the_rate_that_was_asked_for() -> None:
    options = options_of("--batch", "2", "--seconds", "50", "--prompt-tokens", "1")
    arrivals = arrivals_at(20.0, options, Requests(512))
    assert len(arrivals) == 1000
    assert arrivals[-1].at == pytest.approx(50, rel=0.15)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    gaps = [after - before for before, after in pairwise(times)]
    assert sum(gap > 0.05 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)  # 1/e are above the mean


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentiles([float(n) for n in range(1, 201)]) == {"p50": 100.0, "p95": 190.0, "p99": 198.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([]) is None
    alone = ServedRequest(Arrival(0.0, Request("a", (1,))), [0.25])
    assert row_of(1.0, [alone])["between_tokens_ms"] is None  # of one token


# --- what is printed ---


def test_a_table_shows_medians_percentiles_and_blanks() -> None:
    rows = [
        {"rate": 4.0, "num_requests": 8, "first_token_ms": {"p50": 1.0, "p99": 2.0}, "between_tokens_ms": None},
        {"rate": 16.0, "num_requests": 16, "tokens_per_second": 99.6},
    ]
    lines = table("poisson", rows).splitlines()
    assert lines[1].split() == ["4.0", "8", "1.0/2.0"]
    assert lines[2].split() == ["16.0", "16", "100"]
    offline = [{"impl": "ours", "num_requests": 1, "seconds": {"median": 2.0, "min": 1.0}, "status": "ok"}]
    assert table("offline", offline).splitlines()[1].split() == ["ours", "1", "2.000", "ok"]


def test_a_plot_is_drawn_of_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib")
    import plot_serve

    head = {
        "model": {"num_params": 1000},
        "hardware": {"ranks": 1, "device": "x86_64"},
        "versions": {"torch": "2.13"},
        "options": {"dtype": "fp32"},
    }
    ms = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    offline = {"num_requests": 1, "tokens_per_second": 5.0, "status": "ok"}
    results = {
        "decode": [{"batch": n, "tokens_per_second": 5.0 * n, "floor_tokens_per_second": 9.0 * n} for n in (1, 4)],
        "poisson": [{"rate": 4.0, "first_token_ms": ms, "between_tokens_ms": None}],
        "offline": [{"impl": "ours", **offline}, {"impl": "theirs", "num_requests": 1, "status": "failed: planted"}],
    }
    for number, measured in enumerate((results, {"decode": results["decode"]})):
        path, out = tmp_path / f"{number}.json", tmp_path / f"{number}.png"
        path.write_text(json.dumps({**head, "results": measured}))
        plot_serve.main([str(path), str(out)])
        assert out.read_bytes().startswith(b"\x89PNG")


def test_spans_of_transformers_requests_leave_out_what_the_call_does_around_them() -> None:
    outputs = [SimpleNamespace(lifespan=(5.0, 9.0)), SimpleNamespace(lifespan=(4.0, 7.0))]
    assert serve_peers.serving_s(outputs) == 5.0
    assert serve_peers.serving_s([*outputs, SimpleNamespace()]) is None
    ours = {"tokens_per_second": 40.0, "seconds": {"median": 2.0}}
    theirs = {"status": "ok", "tokens_per_second": 5.0, "serving_seconds": 10.0}
    assert serve_peers.ratios(ours, theirs) == {"ours_over_it": 8.0, "ours_over_its_serving": 5.0}
