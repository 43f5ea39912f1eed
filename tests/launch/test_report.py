"""The report of a run and the memory that it shows: samples at borders of phases, charts, one file on its own."""

# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from launch import memory_timeline, trainer
from launch.charts import Line, line_chart, stacked_bars
from launch.config import load
from launch.forecast import memory_report
from launch.memory_timeline import MemoryTimeline, parts_of
from launch.metrics import GIB, EventFile
from launch.report import REPORT_FILE
from launch.world import World
from tests.launch.test_going_on import said
from tests.launch.test_slot_map import FROM_ELSEWHERE, Parsed
from tests.launch.test_train import file, read_events, run_here, text, train
from tests.ranks import run_ranks
from yafsdp_like.memory.plan import MemoryPlan, Region
from yafsdp_like.shard.memory_report import GRADIENTS, STATES, MemoryReport

# --- charts ---


def test_a_line_is_drawn_to_scale_and_broken_where_there_is_no_number() -> None:
    chart = line_chart([Line("loss", [(0, 4.0), (1, 2.0), (2, None), (3, 1.0), (4, 0.0)])], "losses")
    lines = re.findall(r'<polyline points="([^"]*)"', chart)
    assert lines == ["70.0,10.0 285.0,140.0", "715.0,205.0 930.0,270.0"]
    assert line_chart([Line("loss", [(1, None)]), Line("none", [])], "losses") == ""


def test_a_line_of_many_steps_is_thinned_to_means() -> None:
    points = [(float(i), 1.0 + 2 * (i % 2)) for i in range(100_000)]
    (drawn,) = re.findall(r'<polyline points="([^"]*)"', line_chart([Line("loss", points)], "losses"))
    assert len(drawn.split()) <= 1500
    heights = {point.split(",")[1] for point in drawn.split()}
    assert all(60 <= float(height) <= 64 for height in heights)  # 2 of 2.5, between 1 and 3


def test_the_parts_of_a_bar_lie_one_above_the_other() -> None:
    bars = [("step 1", "forward", {"shards": 1.0, "slots": 3.0}), ("step 1", "backward", {"shards": 1.0, "<b>": 1.0})]
    chart = stacked_bars(bars, "memory")
    found = re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="#\w+"><title>([^<]*)</title>', chart)
    assert [(float(y), float(high)) for y, high, _ in found] == [(205, 65), (10, 195), (205, 65), (140, 65)]
    assert found[0][2] == "step 1, forward: shards 1 GiB of 4" and found[3][2].startswith("step 1, backward: &lt;b&gt;")
    assert stacked_bars([], "memory") == ""


# --- what is sampled ---


def test_on_a_gpu_samples_have_peaks_and_reset_them_but_the_run_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's peak of each phase, and of the whole run though every border resets it."""
    device, now, calls = torch.device("cuda", 0), {"peak": 0}, []
    monkeypatch.setattr(memory_timeline, "holders_of", lambda *_: {"main shards": GIB, "activations and the rest": GIB})
    figures: dict[str, Any] = {
        "max_memory_allocated": lambda _: now["peak"] * GIB,
        "max_memory_reserved": lambda _: (now["peak"] + 1) * GIB,
        "memory_reserved": lambda _: 5 * GIB,
        "mem_get_info": lambda _: (3 * GIB, 10 * GIB),
        "reset_peak_memory_stats": lambda _: calls.append(now["peak"]),
    }
    for name, function in figures.items():
        monkeypatch.setattr(torch.cuda, name, function)
    timeline = MemoryTimeline(None, mock.Mock(), device)
    for phase, peak in (("backward", 8), ("update", 4), ("forward", 6)):
        now["peak"] = peak
        timeline.end(phase)
    assert calls == [8, 4, 6]
    samples = timeline.take()
    assert list(samples) == ["forward", "backward", "update"]
    assert [sample["allocator's peak"] for sample in samples.values()] == [6, 8, 4]
    assert samples["forward"]["device"] == 7 and samples["forward"]["reserved"] == 5
    assert parts_of(samples["forward"]) == {"main shards": 1, "activations and the rest": 1}
    now["peak"] = 2
    assert timeline.peaks_gib() == {"allocated_gib": 8, "reserved_gib": 9}


def test_tensorboard_has_a_scalar_for_every_category_and_phase(tmp_path: Path) -> None:
    EventFile(tmp_path, 1).write([{"step": 3, "memory_gib": {"forward": {"main shards": 1.5}}, "mfu": None}])
    assert read_events(tmp_path, "memory_gib/forward/main shards") == {3: 1.5}


# --- a run ---


def test_a_run_reports_its_memory_by_category_as_it_was_planned(file: Path) -> None:
    records = train(file, "--log.memory=true", "--log.tensorboard=true", "--num_steps=4", world_size=1)
    logged = [record for record in records if "memory_gib" in record]
    assert [record["step"] for record in logged] == [1, 2, 3, 4]
    last = logged[-1]["memory_gib"]
    assert list(last) == ["forward", "backward", "update"]
    assert GRADIENTS not in logged[0]["memory_gib"]["forward"] or last["backward"][GRADIENTS] > 0
    assert STATES not in logged[0]["memory_gib"]["backward"] and last["forward"][STATES] == last["update"][STATES] > 0
    text = (file.parent / "run" / REPORT_FILE).read_text()
    Parsed(text)
    assert FROM_ELSEWHERE.findall(text) == []
    assert text.count("<svg") == 3 and "step 4, update: main shards" in text
    rows = re.findall(r'<tr><td>([^<]*)</td>(?:<td class="n">[^<]*</td>){2}<td class="n">(.*?)<', text)
    off = {name: by for name, by in rows if by}
    assert {"arenas of the plan", "main shards", GRADIENTS, STATES} <= set(off)
    assert off["arenas of the plan"] == off["main shards"] == "+0.00%"
    assert all(abs(float(by.rstrip("%"))) < 3 for by in off.values())
    assert re.search(r"<td>activations, logits and gradients, at most</td><td[^>]*>[\d.]+ KiB .*?>not known<", text)
    assert json.loads((file.parent / "run" / "environment.json").read_text())["device"] in text
    events = read_events(file.parent / "run" / "tensorboard", "memory_gib/update/main shards")
    assert set(events) == {1, 2, 3, 4}


def test_a_run_ends_with_what_was_planned_and_measured(file: Path) -> None:
    words = said(file, "--num_steps=2", world_size=1)
    table = words.partition("memory of one rank\n")[2].partition(" slots beyond the plan")[0].splitlines()[1:-1]
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in table)
    for name in ("arenas of the plan", "main shards", "gradient slots", "optimizer states"):
        assert rows[name].endswith("+0.00%") or abs(float(rows[name].split()[-1].rstrip("%"))) < 3
    assert re.fullmatch(r"[\d.]+ KiB +not known", rows["activations, logits and gradients, at most"])
    assert rows["gradient shards"].endswith("not known")  # their memory was given back


class Unforeseen(torch.nn.Module):
    """A model whose step cannot be forecast."""

    def memory_report(self) -> MemoryReport:
        return MemoryReport(0, (), 0, 0, 0)

    def memory_plan(self, *batch: Any) -> MemoryPlan:
        if batch:
            raise ValueError("the forward reads values")
        return MemoryPlan(1, (Region("root.main_shard", "main_shard", 512),))


def test_a_run_whose_step_cannot_be_forecast_still_compares_the_plan_and_says_why() -> None:
    model, options = Unforeseen(), load(["configs/tiny.yaml"])
    world = World(0, torch.device("cpu"), mock.Mock(size=lambda: 1))
    found, note = memory_report(model, mock.Mock(state={}, moment_buffers=[]), options, world, None)
    assert note == ["activations are not forecast: ValueError: the forward reads values"]
    assert [row.name for row in found.rows] == ["arenas of the plan", "main shards"]


def run_without_samples(arguments: list[str]) -> None:
    with mock.patch.object(trainer, "MemoryTimeline", side_effect=AssertionError("made though it is off")):
        run_here(arguments)


def test_nothing_is_sampled_where_nobody_asks(file: Path) -> None:
    run_ranks(run_without_samples, [str(file), "--num_steps=2"], world_size=1)
    text = (file.parent / "run" / REPORT_FILE).read_text()
    assert "--log.memory=true" in text and "arenas of the plan" in text and text.count("<svg") == 2
