"""The benchmark runs on two processes without a GPU, and what it prints can be read back."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bench_train
from bench import train, zero3
from bench.implementations import IMPLEMENTATIONS, build_unsharded
from bench.losses import dealt
from bench.options import NUM_PATCHES, Options, parse_options
from bench.profile import Work, describe, gaps_of, works_of
from bench.subjects import OF_TRANSFORMERS, TransformersModel, TransformersSubject
from bench.trainee import Implementation, Trainee
from launch.world import World
from tests.ranks import run_ranks
from tests.training import world_mesh
from yafsdp_like.models import PRESETS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench_train.py"
TINY = ["--device", "cpu", "--model", "tiny"]
TIMES = ["--seq-len", "32,16", "--warmup", "2", "--steps", "1"]


def run_bench(arguments: list[str], out: Path) -> tuple[list[str], dict[str, Any]]:
    """The lines that the command prints, and the report that it writes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(SCRIPT), *TINY, *arguments, "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.splitlines(), json.loads(out.read_text())


def bench_here(arguments: list[str], out: Path) -> str:
    """What the command prints on this worker, which is one of its ranks, in a process group already."""
    with (
        mock.patch("bench.train.ranks.join", lambda device: world_here()),
        mock.patch("bench.train.ranks.leave"),
        redirect_stdout(io.StringIO()) as printed,
    ):
        arguments = [*TINY, *arguments, "--out", str(out)]
        train.run(parse_options(arguments, IMPLEMENTATIONS), arguments)
    return printed.getvalue()


def world_here() -> World:
    return World(dist.get_rank(), torch.device("cpu"), world_mesh())


def subjects(report: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    return [(row["impl"], row["checkpointing"], row["batch_size"], row["seq_len"]) for row in report["rows"]]


@pytest.mark.slow
def test_implementations_are_compared_on_the_same_model_and_data(tmp_path: Path) -> None:
    out = tmp_path / "results" / "tiny.json"
    names = ["unsharded", "ours", "fsdp2"]
    effort = [*TIMES, "--rounds", "2", "--profile", str(tmp_path)]
    lines, report = run_bench(["--impl", ",".join(names), *effort], out)
    assert report["hardware"]["ranks"] == 2
    assert report["command"].startswith("torchrun --nproc-per-node 2 scripts/bench_train.py --device cpu")
    rows = {(row["impl"], row["seq_len"]): row for row in report["rows"]}
    assert subjects(report) == [(name, "none", 1, seq_len) for name in names for seq_len in (16, 32)]
    for (name, seq_len), row in rows.items():
        assert row["status"] == "ok"
        time = row["forward_backward_ms"]
        assert 0 < time["min"] <= time["median"] <= time["max"]
        assert row["ratio_to_floor"] == pytest.approx(
            time["median"] / rows["unsharded", seq_len]["forward_backward_ms"]["median"]
        )
        phases = {row[field] is None for field in ("clip_ms", "optimizer_ms", "step_ms", "ratio_to_copy")}
        assert phases == {name == "unsharded"}
        assert row["peak_allocated_gib"] is row["device_allocs"] is row["mfu"] is None  # not of a CPU
        # All start from the same bits; a few steps at a learning rate of 1e-5 hardly move the loss.
        assert row["loss"] == pytest.approx(rows["unsharded", seq_len]["loss"], abs=0.05)
        assert (tmp_path / f"{name}-none-B1T{seq_len}.json.gz").exists()
    heading = next(index for index, line in enumerate(lines) if line.split()[:1] == ["impl"])
    assert [line.split()[:4] for line in lines[heading + 1 :]] == [
        [name, "none", "1", seq_len] for seq_len in ("16", "32") for name in names
    ]


@pytest.mark.slow
def test_every_way_of_checkpointing_and_batch_size_is_a_row(tmp_path: Path) -> None:
    names = ["ours-segments:transport=process_group+eps=1e-8", "fsdp2"]
    cases = ["--checkpointing", "none,block", "--batch-size", "2,1", "--peak-tflops", "1e-3"]
    run_ranks(bench_here, ["--impl", ",".join(names), *cases, *TIMES, "--rounds", "1"], tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    by_tokens = [(1, 16), (2, 16), (1, 32), (2, 32)]
    assert subjects(report) == [
        (name, way, *shape) for way in ("none", "block") for name in names for shape in by_tokens
    ]
    losses = {(row["impl"], row["loss"]) for row in report["rows"] if row["batch_size"] == 1 and row["seq_len"] == 16}
    assert len(losses) == len(names)  # activations computed twice are the same
    for row in report["rows"]:
        flops = PRESETS["tiny"].train_flops(row["batch_size"], row["seq_len"])
        assert row["mfu"] == pytest.approx(flops / (row["step_ms"]["median"] / 1e3) / 1e9)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def bench_small(name: str, arguments: list[str], out: Path) -> str:
    subject = OF_TRANSFORMERS[name]
    fields = SMALL if subject.sees_pictures else {**SMALL, "vocab_size": 64, "num_key_value_heads": 2}
    with mock.patch.dict(OF_TRANSFORMERS, {name: TransformersSubject(subject.kind, fields)}):
        return bench_here(["--model", name, *arguments], out)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OF_TRANSFORMERS))
def test_models_of_transformers_are_compared_too(name: str, tmp_path: Path) -> None:
    ways = ["--impl", "ours:split_master=True,fsdp2", "--optimizer", "fused", "--checkpointing", "none,block"]
    effort = ["--rounds", "1", "--warmup", "2", "--steps", "1", "--reduce-dtype", "bf16"]
    run_ranks(bench_small, name, [*ways, *effort, "--seq-len", str(NUM_PATCHES)], tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(row["mfu"] is None and row["step_ms"]["median"] > 0 for row in rows)
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)


@pytest.mark.slow
def test_varying_lengths_are_a_row_each_cycle(tmp_path: Path) -> None:
    arguments = ["--impl", "ours,fsdp2", "--seq-len", "8,24", "--varying", "5", "--cycle", "2"]
    printed, _ = run_ranks(bench_here, arguments, tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["impl"], row["cycle"]) for row in rows] == [(name, i) for name in ("ours", "fsdp2") for i in range(3)]
    ours, theirs = ([row["loss"] for row in rows if row["impl"] == name] for name in ("ours", "fsdp2"))
    assert ours == pytest.approx(theirs, abs=1e-3) and len(set(ours)) == 3  # the same lengths, each another
    assert printed.splitlines()[-7].split()[:3] == ["impl", "ckpt", "cycle"]


class Hungry(Trainee):
    """Runs out of memory on one rank alone, at longer sequences."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if tokens.shape[1] in (32, 1536, 2048, 2560) and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("planted")
        return super().forward(tokens, targets)


def build_hungry(options: Options, world: World) -> Trainee:
    return Hungry(build_unsharded(options, world).model, None)


def obstacle_on_rank_1(world: World) -> str | None:
    return "nowhere to be found" if world.rank == 1 else None


def bench_with_hungry(arguments: list[str], out: Path) -> str:
    planted = {"hungry": Implementation(build_hungry), "missing": Implementation(build_hungry, obstacle_on_rank_1)}
    with mock.patch.dict(IMPLEMENTATIONS, planted):
        return bench_here(arguments, out)


def test_running_out_of_memory_or_missing_on_one_rank_is_so_on_all(tmp_path: Path) -> None:
    """A rank that went on alone would wait for ever in its next collective."""
    arguments = ["--impl", "hungry,missing,unsharded", *TIMES, "--rounds", "1"]
    printed, by_the_other = run_ranks(bench_with_hungry, arguments, tmp_path / "out.json")
    assert by_the_other == ""
    lines, report = printed.splitlines(), json.loads((tmp_path / "out.json").read_text())
    status = {(row["impl"], row["seq_len"]): row["status"] for row in report["rows"]}
    assert status == {
        ("hungry", 16): "ok",
        ("hungry", 32): "OOM",
        ("unsharded", 16): "ok",
        ("unsharded", 32): "ok",
    }
    assert any(line.split() == ["hungry", "none", "1", "32", "OOM"] for line in lines)
    assert "missing is left out: nowhere to be found" in lines


@pytest.mark.slow
def test_the_longest_sequence_is_found_by_bisection_and_models_built_anew(tmp_path: Path) -> None:
    arguments = ["--impl", "hungry,unsharded", "--seq-len", "2560", "--limit-gib", "1"]
    printed, _ = run_ranks(bench_with_hungry, arguments, tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["impl"], row["largest_seq_len"]) for row in rows] == [("hungry", 1024), ("unsharded", 2560)]
    tried = [line for line in printed.splitlines() if line.startswith("hungry T")]
    assert tried == ["hungry T 1536: does not fit", "hungry T 512: fits", "hungry T 1024: fits"]


LOSSES = ["--seq-len", "32", "--batch-size", "2", "--lr", "1e-3", "--losses", "5"]


def test_losses_on_text_are_within_what_the_order_of_sums_is_worth(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    names = ["ours", "ours-nccl", "fsdp2"]
    run_ranks(bench_here, ["--impl", ",".join(names), *LOSSES], tmp_path / "out.json")
    assert_losses_are_close(names, json.loads((tmp_path / "out.json").read_text()))


@pytest.mark.slow
def test_losses_of_deepspeed_are_so_too(tmp_path: Path) -> None:
    """It clipped gradients by default until this was compared."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("deepspeed")
    names = ["fsdp2", "deepspeed"]
    _, report = run_bench(["--impl", ",".join(names), *LOSSES], tmp_path / "out.json")
    assert_losses_are_close(names, report)


def assert_losses_are_close(names: list[str], report: dict[str, Any]) -> None:
    losses, apart = report["losses"]["per_step"], report["losses"]["largest_difference"]
    orders = [f"fsdp2 reordered {seed}" for seed in (1, 2, 3)]
    assert list(losses) == [*names, *orders]
    assert losses["fsdp2"][-1] < losses["fsdp2"][0] - 0.2  # they trained
    assert 0 < max(apart[order] for order in orders) <= report["losses"]["spread"] < 1e-2
    assert all(apart[name] <= report["losses"]["spread"] for name in names)


def test_rows_are_dealt_anew_at_every_step_and_none_is_lost() -> None:
    deal = dealt(1, num_rows=8)
    first, second = deal(0), deal(1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(8))
    assert not torch.equal(first, second) and torch.equal(first, deal(0))
    assert dealt(0, num_rows=3)(5).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "fsdp3"], "unknown ['fsdp3']"),
        (["--impl", "fsdp2:lr=1"], "fsdp2:lr=1 is not NAME:KEY=VALUE"),
        (["--warmup", "1"], "--warmup must be at least 2"),
        (["--optimizer", "fused", "--impl", "fsdp2"], "--optimizer fused is ours alone"),
        (["--losses", "3"], "--losses needs --batch-size of at least 2"),
        (["--losses", "3", "--impl", "ours"], "--losses compares with fsdp2"),
        (["--zero3", "reduce_bucket_size"], "--zero3 takes KEY=VALUE"),
        (["--checkpointing", "all"], "--checkpointing: unknown ['all']"),
        (["--varying", "3", "--limit-gib", "80"], "are runs of their own: name one"),
        (["--model", "vit-l"], "a picture is a sequence of 197"),
        (["--model", "moe-7b", "--impl", "deepspeed"], "deepspeed trains this package's decoders alone"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_train.main(arguments)
    assert message in capsys.readouterr().err


def test_settings_of_deepspeed_follow_the_command_line() -> None:
    arguments = ["--batch-size", "3", "--reduce-dtype", "bf16", "--zero3", "reduce_bucket_size=7", "--clip", "0.5"]
    settings = zero3.engine_settings(parse_options(arguments, IMPLEMENTATIONS))
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["communication_data_type"] == "bf16"
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {"stage": 3, **zero3.TUNING, "reduce_bucket_size": "7"}


def test_a_partition_of_zero3_is_padded_at_the_end() -> None:
    values = torch.arange(5.0).view(1, 5)
    assert [zero3.partition(values, 3, rank).tolist() for rank in (0, 1)] == [[0, 1, 2], [3, 4, 0]]
    assert zero3.partition(values, 3, 2).tolist() == [0, 0, 0]


# --- profiles ---

MAIN, BACKWARD = 1, 2  # threads


def kernel(name: str, stream: int, begin_us: float, duration_us: float, correlation: int) -> dict[str, Any]:
    args = {"stream": stream, "correlation": correlation}
    category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
    return {"cat": category, "name": name, "ts": begin_us, "dur": duration_us, "tid": stream, "args": args}


def launch(begin_us: float, correlation: int, thread: int) -> dict[str, Any]:
    args = {"correlation": correlation}
    return {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": begin_us, "dur": 5, "tid": thread, "args": args}


def a_step() -> list[Work]:
    """Forward waits 1 ms for a copy, backward 0.5 ms for the CPU; a collective's kernel spins all the while."""
    events = [
        kernel("gemm", 7, 4000, 1000, 2),
        kernel("ncclDevKernel_AllGather", 20, 0, 9000, 5),
        kernel("gemm", 7, 1000, 2000, 1),
        kernel("Memcpy PtoP", 24, 2500, 1250, 6),
        kernel("grad", 7, 5500, 500, 3),
        kernel("adamw", 7, 6000, 500, 4),
        launch(0, 5, MAIN),
        launch(100, 1, MAIN),
        launch(200, 6, MAIN),
        launch(1000, 2, MAIN),
        launch(5490, 3, BACKWARD),
        launch(5500, 4, MAIN),
        {"ph": "M", "name": "process_name"},
    ]
    return works_of({"traceEvents": events})


def test_a_profile_tells_the_compute_stream_from_one_that_spins() -> None:
    """A collective's kernel that waits for its peer is the longest of all, and computes nothing."""
    text = describe(a_step()).splitlines()
    assert text[0] == "stream 7 busy 4.00 ms, idle 1.50 ms of 5.50 ms"
    assert [line.split()[-1] for line in text[-5:]] == ["ncclDevKernel_AllGather", "gemm", "PtoP", "grad", "adamw"]


def test_a_gap_names_what_ran_beside_it_and_whether_the_cpu_was_late() -> None:
    for_copy, for_cpu = gaps_of(a_step(), stream=7)
    assert for_copy.ms == pytest.approx(1.0)
    assert for_copy.causes() == pytest.approx(
        {"CPU late": 0, "stream 20 ncclDevKernel_AllGather": 1.0, "stream 24 Memcpy PtoP": 0.75, "nothing ran": 0}
    )
    assert for_cpu.late_ms == pytest.approx(0.49)
    quiet = [work for work in a_step() if work.stream != 20]
    alone = [gap.alone_ms for gap in gaps_of(quiet, stream=7)]
    assert alone == pytest.approx([0.25, 0.5])


def test_a_profile_splits_the_step_by_the_thread_that_launched() -> None:
    lines = [line.split() for line in describe(a_step()).splitlines()[1:4]]
    assert [line[0] for line in lines] == ["forward", "backward", "update"]
    assert [(float(line[2]), float(line[5])) for line in lines] == [(3.0, 1.0), (0.5, 0.5), (0.5, 0.0)]
    ahead = [line[line.index("by") + 1] for line in lines]
    assert [float(ms) for ms in ahead] == [1.95, 0.01, 0.5]


# --- plots ---


def report_with(impls: dict[str, float], compiled: bool) -> dict[str, Any]:
    rows = [
        {
            "impl": impl,
            "seq_len": seq_len,
            "status": "ok",
            "forward_backward_ms": {"median": ms * seq_len},
            "step_ms": None if impl == "unsharded" else {"median": ms * seq_len + 1},
            "ratio_to_floor": 1.5,
            "device_used_gib": None,
        }
        for impl, ms in impls.items()
        for seq_len in (64, 32)
    ]
    rows.append({"impl": "ours", "seq_len": 128, "status": "OOM"})
    return {
        "rows": rows,
        "model": {"num_params": 1000},
        "hardware": {"ranks": 2, "device": "x86_64"},
        "versions": {"torch": "2.13"},
        "options": {"compile": compiled, "reduce_dtype": "bf16"},
    }


def test_the_blocks_of_a_model_are_its_outermost_list_of_modules() -> None:
    """Prevents: a block's list of experts, which is longer than the list of blocks, taken for the model's blocks."""
    blocks = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(8)) for _ in range(4))
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "layers": blocks})
    assert TransformersModel(model).layers is blocks


def test_a_plot_merges_files_and_tells_compiled_from_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib")
    import plot_train

    reports = [
        report_with({"unsharded": 1, "ours": 2}, compiled=False),
        report_with({"ours": 3}, compiled=True),
        report_with({"ours": 4, "deepspeed": 5}, compiled=False),
    ]
    reports[2]["rows"] += [{**row, "checkpointing": "block", "batch_size": 2} for row in reports[2]["rows"][:1]]
    series = plot_train.merged(reports)
    assert [key.label(several_dtypes=False) for key in series] == [
        "unsharded, the floor",
        "yafsdp_like",
        "yafsdp_like, compiled",
        "DeepSpeed ZeRO-3",
        "yafsdp_like, batch 2, blocks recomputed",
    ]
    again = series[plot_train.Series("ours", False, "bf16")]
    assert [(row["seq_len"], row["forward_backward_ms"]["median"]) for row in again] == [(32, 128), (64, 256)]
    paths = [tmp_path / f"{index}.json" for index in range(3)]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(json.dumps(report))
    plot_train.main([*map(str, paths), str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="one plot is of one model"):
        plot_train.merged([reports[0], {**reports[1], "model": {"num_params": 2000}}])
