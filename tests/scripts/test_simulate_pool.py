"""The simulator of a pool: the same to the byte, right where figures are known, and what policies differ by."""

from __future__ import annotations

import io
import itertools
import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import simulate_pool
from bench.sim_baselines import POLICIES
from bench.sim_device import SimHardware, SimModel, SimWeights
from bench.sim_run import Scenario, Simulation
from bench.sim_tables import LENGTHS, OUTPUTS, PROMPTS
from bench.sim_traces import TraceRequest, popularity, trace
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.fleet.schedule import ScheduleOptions
from yafsdp_like.inference.fleet.times import StepLines

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
MODEL = SimModel(GIB, 1024, StepLines(0.01, 0.001, 0.0, 0.02, 1e-4))
SLOW_LINK = SimHardware(2 * GIB, GIB, float(GIB))  # a second for each model, of which two fit


def printed(*arguments: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        simulate_pool.main(arguments)
    return out.getvalue()


def row_of(*arguments: str) -> dict[str, Any]:
    return json.loads(printed(*arguments).splitlines()[-1])["rows"][0]


def simulate(asked: list[TraceRequest], num_models: int = 3, **more: Any) -> Simulation:
    models = {f"m{index}": MODEL for index in range(num_models)}
    options = ScheduleOptions(admission_load=None)
    return Simulation(Scenario(models, SLOW_LINK, Targets(10.0, 0.1), options=options, **more), asked).run()


def test_the_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    arguments = ["--models", "2,4", "--policy", "all", "--seconds", "20", "--gpus", "2", "--zipf", "1", "--cv", "3"]
    paths = [tmp_path / "one", tmp_path / "other"]
    outputs = [printed(*arguments, "--out", str(path)).splitlines()[:-1] for path in paths]
    assert outputs[0] == outputs[1]
    one, other = (json.loads(path.read_text()) for path in paths)
    assert one.pop("command") != other.pop("command") and one == other and len(one["rows"]) == 8
    assert one["rows"] != json.loads(printed(*arguments, "--seed", "1").splitlines()[-1])["rows"]


def test_one_request_takes_its_copy_its_prompt_and_its_steps() -> None:
    simulation = simulate([TraceRequest(1.0, "m0", 100, 11)])
    reader = simulation._outcomes[0].reader
    assert reader is not None and reader.first_at == pytest.approx(1.0 + 1.0 + 0.03)
    assert reader.last_at == pytest.approx(2.03 + 10 * 0.011) and reader.num_tokens == 11
    counts = simulation.devices[0].counts
    assert (counts.num_switches, counts.num_decoded) == (1, 11)
    assert (counts.switching_s, counts.prefill_s, counts.decode_s) == pytest.approx((1.0, 0.03, 0.11))


def test_a_request_of_a_model_that_decodes_joins_after_a_step() -> None:
    simulation = simulate([TraceRequest(0.0, "m0", 100, 100), TraceRequest(1.5, "m0", 100, 2)])
    reader = simulation._outcomes[1].reader
    steps = math.ceil((1.5 - 1.03) / 0.011)
    assert reader is not None and reader.first_at == pytest.approx(1.03 + steps * 0.011 + 0.03)


def test_mixed_steps_decode_while_prompts_are_computed_in_parts() -> None:
    """As an engine: 100 tokens in steps of 40, beside one that decodes."""
    models = {"m0": MODEL}
    options = ScheduleOptions(admission_load=None)
    hardware = replace(SLOW_LINK, mixed_tokens=40)
    asked = [TraceRequest(0.0, "m0", 40, 101), TraceRequest(1.5, "m0", 100, 1)]
    simulation = Simulation(Scenario(models, hardware, Targets(10.0, 0.1), options=options), asked).run()
    prompt_s, step_s = 0.02 + 40 * 1e-4, 0.01 + 0.001
    counts = simulation.devices[0].counts
    assert counts.num_decoded == 102
    assert counts.prefill_s == pytest.approx(prompt_s + 2 * (prompt_s + 0.001) + 0.02 + 20 * 1e-4 + 0.001)
    assert counts.decode_s == pytest.approx((100 - 3) * step_s)


def test_a_prefetched_model_is_there_sooner_and_the_third_evicts_what_was_used_longest_ago() -> None:
    models = dict.fromkeys(("a", "b", "c"), MODEL)
    weights = SimWeights(SLOW_LINK, models)
    assert weights.wake("a", 0.0) == 1.0
    assert weights.prefetch("b", "a", 1.0) == 2.0
    assert weights.wake("b", 1.75) == 0.25
    assert weights.wake("a", 3.0) == 0.0 and weights.wake("c", 3.0) == 1.0
    assert [weights.missing_s(name) for name in models] == [0.0, 1.0, 0.0]
    assert weights.wake("b", 5.0) == 1.0
    weights = SimWeights(SimHardware(2 * GIB, GIB, float(GIB), keeps_weights=False), models)
    assert [weights.wake("a", 0.0), weights.prefetch("b", "a", 1.0), weights.wake("b", 9.0)] == [1.0, 1.0, 1.0]


def test_all_policies_serve_every_request_and_draw_as_many_tokens() -> None:
    asked = trace({f"m{index}": 0.2 for index in range(3)}, 60.0, LENGTHS["512/128"], 3)
    for policy in POLICIES:
        simulation = simulate(asked, policy=policy)
        readers = [outcome.reader for outcome in simulation._outcomes]
        assert [reader.num_tokens for reader in readers if reader is not None] == [128] * len(asked)
        assert simulation.figures()["longest_wait_for_a_turn_s"] < 40


def test_traces_have_the_rates_lengths_and_bursts_that_are_said() -> None:
    rates = {f"m{index}": 2.0 * share for index, share in enumerate(popularity(4, 1.0))}
    asked = trace(rates, 1000.0, LENGTHS["published"], 0)
    assert len(asked) == pytest.approx(2000, rel=0.06)
    counts = [sum(each.model == name for each in asked) for name in rates]
    assert counts == sorted(counts, reverse=True) and counts[0] / counts[1] == pytest.approx(2.0, rel=0.15)
    assert sum(each.num_prompt_tokens for each in asked) / len(asked) == pytest.approx(667, rel=0.05)
    assert sum(each.num_tokens for each in asked) / len(asked) == pytest.approx(300, rel=0.05)
    assert all(1 <= each.num_prompt_tokens <= PROMPTS[-1] and 16 <= each.num_tokens <= OUTPUTS[-1] for each in asked)
    for cv in (1.0, 4.0):
        times = [each.at for each in trace({"m": 1.0}, 8_000.0, LENGTHS["512/128"], 0, cv)]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean == pytest.approx(cv, rel=0.15)


def test_slack_serves_more_models_in_time_than_turns_that_know_none() -> None:
    """Ten models at the published rate, step times and lengths, in a short trace."""
    shares = {
        policy: row_of("--models", "10", "--policy", policy, "--seconds", "150")["share_of_time"] for policy in POLICIES
    }
    assert shares["ours"] > 0.98 and shares["ours"] > 0.05 + max(shares[name] for name in POLICIES if name != "ours")


def test_overload_refuses_some_and_serves_all_others_in_time() -> None:
    """Thirty models, three times what one device serves."""
    row = row_of("--models", "30", "--admission", "1.0", "--seconds", "100")
    assert 0.5 < row["num_refused"] / row["num_requests"] < 0.9
    assert row["share_of_requests_admitted"] == 1.0
    assert row["retry_after_s"]["p50"] >= 1.0 and row["longest_wait_for_a_turn_s"] < 40
    again = row_of("--models", "30", "--admission", "1.0", "--seconds", "30", "--retries", "1000")
    assert again["num_refused"] == 0 and again["share_of_requests_admitted"] == 1.0, "who comes again is served"


def test_requests_of_one_model_go_to_one_device_while_it_has_time() -> None:
    simulation = simulate(trace({f"m{i}": 0.3 for i in range(3)}, 60.0, LENGTHS["512/128"], 0), num_devices=3)
    switches = [device.counts.num_switches for device in simulation.devices]
    assert sum(switches) < 40 and all(device.counts.num_decoded for device in simulation.devices)
    assert simulation.figures()["share_of_requests"] == 1.0


def test_a_plot_is_drawn_of_what_was_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib")
    import plot_simulation

    path, out = tmp_path / "report.json", tmp_path / "report.png"
    printed(
        "--models",
        "2,3",
        "--policy",
        "ours,round robin",
        "--seconds",
        "10",
        "--rate",
        "1",
        "--seeds",
        "2",
        "--out",
        str(path),
    )
    plot_simulation.main([str(path), str(path), str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")


def test_options_that_nobody_knows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        printed("--policy", "magic")
    assert "expected some of ours, first come" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seconds", "0.1"), "expected requests in the middle of the trace"),
        (("--ttft-ms", "0"), "ttft_s must be above 0"),
        (("--admission", "-1"), "admission_load must be above 0"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        printed(*arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_twelve_models_of_the_published_workload_are_in_time_for_nine_tenths_of_it() -> None:
    report = json.loads(printed("--models", "7,12", "--seeds", "3").splitlines()[-1])
    seven, twelve = report["rows"]
    assert seven["share_of_time"] > 0.999 and twelve["share_of_time"] >= 0.9
    assert report["models_per_gpu_at_90_percent"] == {"ours, measured link": 12.0}


@pytest.mark.slow
def test_hundreds_of_models_on_many_devices_take_seconds() -> None:
    row = row_of("--models", "200", "--gpus", "20", "--seconds", "120", "--admission", "1.0")
    assert row["share_of_requests_admitted"] > 0.99 and row["num_refused"] < 0.2 * row["num_requests"]
