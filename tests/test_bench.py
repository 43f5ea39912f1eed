"""The benchmark runs on two processes without a GPU, and what it prints can be read back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_train

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["--device", "cpu", "--model", "tiny", "--seq-len", "32,16", "--warmup", "2", "--steps", "2"]

# Registers an implementation that runs out of memory on one rank alone, at the longer sequence.
HUNGRY = """
import bench_train
import torch

class Hungry(bench_train.Trainee):
    def forward_backward(self, tokens, targets):
        if tokens.shape[1] == 32 and torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("planted")
        return super().forward_backward(tokens, targets)

@bench_train.implementation("hungry")
def build_hungry(options, world):
    return Hungry(bench_train.build_unsharded(options, world).model, None)

bench_train.main()
"""


def run_bench(script: Path, arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The lines printed before the last, and the JSON object of the last."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), *ARGUMENTS, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


def test_implementations_are_compared_on_the_same_model_and_data(tmp_path: Path) -> None:
    out = tmp_path / "results" / "tiny.json"
    arguments = [
        "--impl",
        "unsharded,ours,fsdp2",
        "--rounds",
        "2",
        "--out",
        str(out),
        "--profile",
        str(tmp_path),
    ]
    lines, report = run_bench(ROOT / "scripts" / "bench_train.py", arguments)
    assert json.loads(out.read_text()) == report
    assert report["hardware"]["ranks"] == 2
    assert report["command"].startswith("torchrun --nproc-per-node 2 scripts/bench_train.py --device cpu")
    rows = {(row["impl"], row["seq_len"]): row for row in report["rows"]}
    assert list(rows) == [(name, seq_len) for name in ("unsharded", "ours", "fsdp2") for seq_len in (16, 32)]
    for (name, seq_len), row in rows.items():
        assert row["status"] == "ok"
        time = row["forward_backward_ms"]
        assert 0 < time["min"] <= time["median"] <= time["max"]
        assert row["ratio_to_floor"] == pytest.approx(
            time["median"] / rows["unsharded", seq_len]["forward_backward_ms"]["median"]
        )
        assert (row["step_ms"] is None) == (row["optimizer_ms"] is None) == (name == "unsharded")
        assert row["peak_allocated_gib"] is row["device_allocs"] is None  # a CPU has no such allocator
        # Both start from the same bits; four steps at a learning rate of 1e-5 hardly move the loss.
        assert row["loss"] == pytest.approx(rows["unsharded", seq_len]["loss"], abs=0.05)
        assert (tmp_path / f"{name}-T{seq_len}.json.gz").exists()
    heading = next(index for index, line in enumerate(lines) if line.split()[:2] == ["impl", "T"])
    assert [line.split()[:2] for line in lines[heading + 1 :]] == [
        [name, seq_len] for seq_len in ("16", "32") for name in ("unsharded", "ours", "fsdp2")
    ]


def test_running_out_of_memory_on_one_rank_is_a_row_on_all(tmp_path: Path) -> None:
    """A rank that went on alone would wait for ever in its next collective."""
    script = tmp_path / "hungry.py"
    script.write_text(HUNGRY)
    lines, report = run_bench(script, ["--impl", "hungry,unsharded", "--rounds", "1"])
    status = {(row["impl"], row["seq_len"]): row["status"] for row in report["rows"]}
    assert status == {
        ("hungry", 16): "ok",
        ("hungry", 32): "OOM",
        ("unsharded", 16): "ok",
        ("unsharded", 32): "ok",
    }
    assert any(line.split() == ["hungry", "32", "OOM"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--impl", "fsdp3"], "unknown ['fsdp3']"), (["--warmup", "1"], "--warmup must be at least 2")],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_train.main(arguments)
    assert message in capsys.readouterr().err


def test_a_profile_tells_the_compute_stream_from_one_that_spins() -> None:
    """A collective's kernel that waits for its peer is the longest of all, and computes nothing."""

    def event(name: str, stream: int, begin_us: float, duration_us: float) -> dict[str, Any]:
        return {
            "cat": "kernel",
            "name": name,
            "ts": begin_us,
            "dur": duration_us,
            "args": {"stream": stream},
        }

    trace = {
        "traceEvents": [
            event("gemm", 7, 4000, 1000),
            event("ncclDevKernel_AllGather", 20, 0, 9000),
            event("gemm", 7, 1000, 2000),
            event("softmax", 7, 5000, 500),
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 5},
            {"ph": "M", "name": "process_name"},
        ]
    }
    text = bench_train.describe_kernels(bench_train.kernels_of(trace)).splitlines()
    assert text[0] == "stream 7 busy 3.50 ms, idle 1.00 ms of 4.50 ms"
    assert text[1].split() == ["idle", "1.000", "ms", "at", "2.000", "ms:", "gemm", "->", "gemm"]
    assert [line.split()[-1] for line in text[3:]] == ["ncclDevKernel_AllGather", "gemm", "softmax"]
