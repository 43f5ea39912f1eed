"""The benchmark of a pool runs without a GPU, and its last line can be read back."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import bench_pool
from bench import pool_targets
from bench.help import report_file

ROOT = Path(__file__).parents[2]
SIZES = ["--prompt-tokens", "6", "--new-tokens", "8", "--max-seq-len", "16", "--batch", "2", "--max-batch-tokens", "8"]
ARGUMENTS = ["--models", "tiny,tiny,tiny", *SIZES, "--rounds", "1", "--device", "cpu", "--dtype", "fp32"]


def reported(*arguments: str) -> dict[str, object]:
    out = io.StringIO()
    with redirect_stdout(out):
        bench_pool.main([*ARGUMENTS, *arguments])
    found = json.loads(out.getvalue().splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_switches_first_tokens_prefetching_and_steps_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    apart = reported("--limit-gib", "0.0016", "--measure", "switch,cold", "--out", str(path))
    assert json.loads(path.read_text()) == apart
    switches, cold = apart["switch"], apart["cold"]
    assert isinstance(switches, list) and isinstance(cold, list)
    names = {"tiny.0", "tiny.1", "tiny.2"}
    assert {(row["from"], row["to"]) for row in switches} <= {(a, b) for a in names for b in names if a != b}
    assert {row["model"] for row in cold} == names
    for row in [*switches, *cold]:
        assert row.get("gib", row.get("gib_moved")) * 2**30 == 632_064
    beside = reported("--limit-gib", "0.01", "--measure", "prefetch,awake")
    prefetched, awake = beside["prefetch"], beside["awake"]
    assert isinstance(prefetched, list) and isinstance(awake, list)
    assert [row["gib"] * 2**30 for row in prefetched] == [632_064] * 2 and len(awake) == 3


def test_many_switches_are_compared_with_the_first_tokens() -> None:
    many = reported("--limit-gib", "0.0016", "--measure", "many", "--switches", "20")["many"]
    assert isinstance(many, dict)
    assert many["switches"] >= 20 and many["gib_moved"] > 0
    assert many["requests_equal"] == many["requests_compared"] > 6


def test_what_cannot_be_measured_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents: switches that are counted for ever where no model displaces another, and a name that is ignored."""
    with pytest.raises(
        SystemExit, match=r"^error: many: in --limit-gib 0\.01 all models are awake at once; give less$"
    ):
        bench_pool.main([*ARGUMENTS, "--limit-gib", "0.01", "--measure", "many"])
    with pytest.raises(SystemExit):
        bench_pool.main([*ARGUMENTS, "--limit-gib", "0.01", "--measure", "swich,cold"])
    assert "--measure: expected some of switch,cold,prefetch,awake,many,popular,targets, found swich" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read: No such file"), ("{", "is not JSON"), ("[]", "a list")]
)
def test_a_report_that_is_none_is_one_error(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        report_file(str(tmp_path / "a.json"))


def test_the_rates_within_targets_are_found_and_predicted() -> None:
    effort = ["--seconds", "0.5", "--most-s", "5", "--overload", "3", "--overload-s", "0.5", "--workers", "threads"]
    rates = ["--measure", "targets", "--rates", "20,40", "--apart-rates", "20", "--zipf", "0", *effort]
    rows = reported("--limit-gib", "0.0024", *rates)["targets"]
    assert isinstance(rows, list)
    times, *played, within = rows
    assert times["way"] == "times" and times["link"] > 0
    assert all(times[f"tiny.{index}"]["decode_base_s"] > 0 for index in range(3))
    ways = [row["way"] for row in played]
    assert ways[:2] == ["pool", "simulated"] and ways[-2:] == ["overload", "apart"]
    for row in played:
        assert row["num_requests"] > 0
        if row["way"] in ("pool", "apart"):  # none is left
            assert row["ended"] + row["num_refused_in_all"] == row["requests"]
    assert set(within) == {"way", "pool", "apart", "simulated"}


def test_a_rate_within_targets_lies_between_rates_that_were_played() -> None:
    rows = [{"way": "pool", "rate": rate, "share_of_time": share} for rate, share in ((1, 1.0), (2, 0.95), (4, 0.85))]
    assert pool_targets.rate_within(rows, "pool") == pytest.approx(3.0)
    assert pool_targets.rate_within(rows[:2], "pool") is None
    assert pool_targets.rate_within(rows, "apart") is None


POPULAR = ["--measure", "popular", "--requests", "12", "--rate", "100", "--workers", "threads"]


def popular(*arguments: str) -> dict[str, dict[str, Any]]:
    """Rows for all requests, by way, after what all rows have in common was checked."""
    rows = reported(*POPULAR, *arguments)["popular"]
    assert isinstance(rows, list)
    for way in {row["way"] for row in rows}:
        everything, *models = [row for row in rows if row["way"] == way]
        assert everything["model"] == "all" and [row["model"] for row in models] == ["tiny.0", "tiny.1", "tiny.2"]
        assert sum(row["requests"] for row in models) == everything["requests"] == len(everything["first_tokens_s"])
        assert sum(row["ended"] for row in models) == everything["ended"] <= everything["requests"]
    return {row["way"]: row for row in rows if row["model"] == "all"}


def test_a_pool_and_one_process_per_model_serve_the_same_requests_within_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model has a process all the time, two take turns; where none has, all three do. Plots show all of it."""
    files, out = tmp_path / "files", tmp_path / "popular.json"
    files.mkdir()
    rows = popular("--limit-gib", "0.0016", "--directory", str(files), "--out", str(out))
    assert [*rows] == ["pool", "apart", "disk"] and {row["ended"] for row in rows.values()} == {12}
    assert rows["pool"]["starts"] == 0 and rows["apart"]["starts"] >= 2 and rows["disk"]["starts"] >= 3
    assert [*files.iterdir()] == []
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib")
    import plot_pool

    switches = json.loads((ROOT / "scripts/results/2026-11-29-h200-pool.json").read_text())
    (tmp_path / "switches.json").write_text(json.dumps(switches))
    plot_pool.main([str(tmp_path / "switches.json"), str(out), str(tmp_path / "all.png")])
    plot_pool.main([str(out), str(tmp_path / "popular.png")])
    sizes = [(tmp_path / name).stat().st_size for name in ("all.png", "popular.png")]
    assert sizes[0] > sizes[1] > 10_000, "the first picture shows switches, too"


def test_models_that_all_fit_have_processes_of_their_own(tmp_path: Path) -> None:
    rows = popular("--limit-gib", "0.0025", "--directory", str(tmp_path), "--ways", "apart")
    assert rows["apart"]["starts"] == 0 and rows["apart"]["ended"] == 12


@pytest.mark.slow
def test_processes_are_started_and_ended_for_models_on_demand(tmp_path: Path) -> None:
    """The last ``--workers`` of a command line counts."""
    rows = popular("--limit-gib", "0.0016", "--directory", str(tmp_path), "--workers", "processes", "--ways", "apart")
    assert rows["apart"]["ended"] == 12 and rows["apart"]["starts"] >= 2


def test_what_is_not_served_in_time_is_given_up_and_has_waited_as_long(tmp_path: Path) -> None:
    rows = popular("--limit-gib", "0.0016", "--directory", str(tmp_path), "--ways", "disk", "--most-s", "0")
    assert rows["disk"]["ended"] == 0 and rows["disk"]["first_tokens_s"] == [0.0] * 12


@pytest.mark.slow
def test_two_ranks_switch_together_and_the_share_is_of_both_links(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += ["scripts/bench_pool.py", *ARGUMENTS, "--limit-gib", "0.0011", "--out", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    subprocess.run([*words, "--measure", "switch,cold,prefetch,awake"], cwd=ROOT, env=environment, check=True)
    found = json.loads(path.read_text())
    assert "memory plan of one rank of 2" in "\n".join(found["plan"])
    assert found["switch"] and len(found["cold"]) == len(found["awake"]) == 3
    for row in found["switch"]:
        assert 0 < row["gib"] * 2**30 < 632_064
        assert row["share_of_link"] / 2 < row["share_of_links"] < row["share_of_link"], "all have all of the vocabulary"
