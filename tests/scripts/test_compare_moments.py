"""What is said of runs whose moments are in several formats: ends, the spread of fp32, and distances by seed."""

import json
from pathlib import Path

import pytest

import compare_moments
from launch import metrics


def records(last: float, held_out: float, num_steps: int = 30) -> list[metrics.Record]:
    """Losses fall to `last`, in which the last steps end."""
    found = [{"step": step, "loss": last + max(0, 10 - step)} for step in range(1, num_steps + 1)]
    found[9] |= {"held_out_loss": 9.0}
    found[-1] |= {"held_out_loss": held_out}
    return found


def test_runs_are_compared_with_fp32_of_their_seed_beside_its_spread() -> None:
    ends = {("fp32", 0): (4.0, 4.4), ("fp32", 1): (4.1, 4.4), ("bf16", 0): (3.96, 4.4), ("int8", 1): (4.1, 4.51)}
    rows = [compare_moments.summary(run, records(*end)) for run, end in ends.items()]
    assert (
        rows[0]["last_loss"] == 4.0 and len(rows[0]["losses"]) == 30 and rows[0]["held_out_loss"] == {10: 9.0, 30: 4.4}
    )
    found = compare_moments.compared(rows)
    assert found["fp32_spread_of_last_loss"] == pytest.approx(0.025) and found["fp32_spread_of_held_out_loss"] == 0.0
    bf16, int8 = found["from_fp32_of_the_seed"]
    assert (bf16["moments"], bf16["last_loss"]) == ("bf16", pytest.approx(-0.01))
    assert (int8["last_loss"], int8["held_out_loss"]) == (0.0, pytest.approx(0.025))


def test_runs_are_named_by_format_and_seed() -> None:
    assert compare_moments.runs_of("fp32:0,int8:12") == [("fp32", 0), ("int8", 12)]
    with pytest.raises(ValueError, match="found 'fp8'"):
        compare_moments.runs_of("fp8:0")


@pytest.mark.slow
def test_runs_are_trained_once_and_written(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = [f"--out={out}", "--runs=fp32:0,int8:0", f"--directory={tmp_path / 'runs'}", "--num-threads=1", "--"]
    arguments += ["--device=cpu", "--num_steps=3", "--seq_len=16", "--global_batch_size=2", "--data.vocab_size=512"]
    arguments += [f"--data.cache={tmp_path / 'cache'}", "--evaluation.num_batches=1"]
    for _ in range(2):
        compare_moments.main(arguments)
        report = json.loads(out.read_text())
        assert [len(run["losses"]) for run in report["runs"]] == [3, 3]
        assert (
            report["fp32_spread_of_last_loss"] is None and abs(report["from_fp32_of_the_seed"][0]["last_loss"]) < 0.01
        )
    assert len((tmp_path / "runs" / "int8-0" / "metrics.jsonl").read_text().splitlines()) == 3
