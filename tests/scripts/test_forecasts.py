"""The committed table of planned beside measured: it says what the reports say, and deviations are within bounds.

The forecasts themselves take minutes: `scripts/check_forecasts.py` draws them anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.forecasts import FITTED, runs_of

RESULTS = Path(__file__).parents[2] / "scripts/results"
ROWS: list[dict[str, Any]] = json.loads((RESULTS / "2026-11-30-forecasts.json").read_text())["rows"]
# More than the plan by what no forecast knows yet: see the log.
DEVICE_EXCEPT = ("vit-l", "in_backward", "offload_moments")
STEP_EXCEPT = ("vit-l",)


def ratios(figure: str, *names_left_out: str) -> dict[str, float]:
    """Planned over measured, by run."""
    found = {}
    for row in ROWS:
        name = f"{row['report']} {row['impl']} {row['checkpointing']} {row['seq_len']}"
        if figure in row and not any(each in name for each in names_left_out):
            found[name] = row[figure]["planned"] / row[figure]["measured"]
    return found


@pytest.mark.parametrize(
    ("figure", "bound", "left_out", "number"),
    [
        ("engine", 0.001, (), 37),
        ("allocated", 0.01, ("offload_moments", "vit-l"), 32),
        ("device", 0.02, DEVICE_EXCEPT, 37),
        ("step", 0.1, STEP_EXCEPT, 33),
        ("update", 0.1, STEP_EXCEPT, 33),
    ],
)
def test_what_was_planned_is_what_was_measured(
    figure: str, bound: float, left_out: tuple[str, ...], number: int
) -> None:
    found = ratios(figure, *left_out)
    assert len(found) >= number
    assert {name: ratio for name, ratio in found.items() if abs(ratio - 1) > bound} == {}


def test_times_that_rates_were_fitted_to_are_not_nearer_than_the_others() -> None:
    """Prevents: rates that know a few runs, and no machine."""
    off: dict[bool, list[float]] = {True: [], False: []}
    for row in ROWS:
        if "step" in row and "vit-l" not in row["report"]:
            off[row["fitted"]].append(abs(row["step"]["planned"] / row["step"]["measured"] - 1))
    means = {fitted: sum(values) / len(values) for fitted, values in off.items()}
    assert len(off[False]) > len(off[True]) > 5
    assert means[False] < 0.03 and means[False] < means[True] + 0.01


def test_the_table_holds_what_the_reports_hold() -> None:
    by_report = {row["report"]: json.loads((RESULTS / f"{row['report']}.json").read_text()) for row in ROWS}
    runs = [run for name, report in by_report.items() for run in runs_of(name, report)]
    assert len(runs) == len(ROWS)
    for run, row in zip(runs, ROWS, strict=True):
        own = (run.report, run.row["impl"], run.settings.seq_len, run.is_fitted)
        assert own == (row["report"], row["impl"], row["seq_len"], row["fitted"])
        if "device" in row:
            assert row["device"]["measured"] == round(run.row["device_used_gib"], 3)
        if "forward_backward" in row:
            assert row["forward_backward"]["measured"] == round(run.row["forward_backward_ms"]["median"], 3)
        assert not row.keys() & run.older.keys()
    assert all(any(run.is_of(key) for run in runs) for key in FITTED)
