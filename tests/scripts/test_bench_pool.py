"""The benchmark of a pool runs without a GPU, and its last line can be read back."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from bench import pool_run

if TYPE_CHECKING:
    from pathlib import Path

SIZES = ["--prompt-tokens", "6", "--new-tokens", "8", "--max-seq-len", "16", "--batch", "2", "--max-batch-tokens", "8"]
ARGUMENTS = ["--models", "tiny,tiny,tiny", *SIZES, "--rounds", "1", "--device", "cpu", "--dtype", "fp32"]


def reported(*arguments: str) -> dict[str, object]:
    out = io.StringIO()
    with redirect_stdout(out):
        pool_run.main([*ARGUMENTS, *arguments])
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
