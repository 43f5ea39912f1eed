"""What is reported of an estimate on paper: a row per topology and length, and how near two GPUs came to it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Row, write
from bench.scale import (
    EASY,
    HARD,
    Assumptions,
    Estimator,
    Memory,
    ModelShape,
    StepEstimate,
    Topology,
    memory_of,
    num_copies,
    plan_for,
    topologies,
)
from launch.metrics import GIB
from yafsdp_like.models import DecoderConfig

if TYPE_CHECKING:
    from yafsdp_like.memory.plan import MemoryPlan

FLOOR, MEASURED = "unsharded", "ours-graph"
GOALS = {1024: 1.12, 4096: 1.04}  # forward and backward over unsharded, on 8 GPUs of one host
COLUMNS = (
    "GPUs",
    "T",
    "floor ms",
    "easy",
    "hard",
    "from measured",
    "goal",
    "longest, easy",
    "longest, hard",
    "plan GiB",
)
KIND = "an estimate on paper, not a measurement"


class Measurements:
    """Rows of reports on two ranks, by implementation and sequence length; the later report's where two hold one."""

    def __init__(self, reports: Sequence[dict[str, Any]]) -> None:
        models = [{k: v for k, v in report["model"].items() if k != "num_params"} for report in reports]
        if any(report["hardware"]["ranks"] != 2 for report in reports) or any(m != models[0] for m in models):
            raise ValueError("expected reports of one model on 2 ranks")
        self.config = DecoderConfig(**models[0])
        self.rows: dict[tuple[str, int], Row] = {
            (row["impl"], row["seq_len"]): row for report in reports for row in report["rows"] if row["status"] == "ok"
        }

    @property
    def seq_lens(self) -> list[int]:
        """Lengths at which both the floor and the graphed step were measured."""
        return sorted(seq_len for impl, seq_len in self.rows if impl == FLOOR and (MEASURED, seq_len) in self.rows)

    def floor(self, seq_len: int) -> float:
        """Seconds of the eager unsharded step."""
        return float(self.rows[FLOOR, seq_len]["forward_backward_ms"]["median"] / 1e3)

    def ratio(self, seq_len: int) -> float:
        """Return the measured step as one CUDA graph over the floor."""
        return float(self.rows[MEASURED, seq_len]["ratio_to_floor"])


class Estimates:
    """Of every topology and length, in both cases."""

    def __init__(self, measured: Measurements, by: Assumptions) -> None:
        self.measured, self.by = measured, by
        self.topologies = topologies(by)
        self.plans: dict[Topology, MemoryPlan] = {on: plan_for(measured.config, on) for on in self.topologies}

    def rows(self) -> list[Row]:
        """Return a row per topology and length."""
        return [self._row(on, seq_len) for on in self.topologies for seq_len in self.measured.seq_lens]

    def checks(self) -> list[Row]:
        """Compare the estimate for two GPUs with what they measured.

        The step as a graph, and memory without one, since a graph's pool is not estimated.
        """
        return [self._check(self.topologies[0], seq_len) for seq_len in self.measured.seq_lens]

    def _estimators(self, seq_len: int) -> list[Estimator]:
        floor = self.measured.floor(seq_len)
        return [Estimator(self.measured.config, seq_len, floor, case, self.by) for case in (EASY, HARD)]

    def _row(self, on: Topology, seq_len: int) -> Row:
        estimators = self._estimators(seq_len)
        memory = self._memory(on, seq_len)
        measured = self.measured.ratio(seq_len)
        anchored = [measured + e.ratio(on) - e.ratio(self.topologies[0]) for e in estimators]
        return {
            "gpus": on.name,
            "world_size": on.world_size,
            "seq_len": seq_len,
            "floor_ms": self.measured.floor(seq_len) * 1e3,
            **{e.case.name: described(e.step(on), e.floor) for e in estimators},
            "ratio_from_measured": sorted(anchored),
            "goal": GOALS.get(seq_len) if (on.per_host, on.world_size) == (8, 8) else None,
            "copies_per_gather": num_copies(ModelShape.of(self.measured.config, seq_len).block, on),
            "plan_gib": memory.plan / GIB,
            "device_gib": memory.device / GIB,
        }

    def _check(self, on: Topology, seq_len: int) -> Row:
        easy, hard = (e.ratio(on) for e in self._estimators(seq_len))
        ratio = self.measured.ratio(seq_len)
        device = self.measured.rows["ours", seq_len]["device_used_gib"]
        estimated = self._memory(on, seq_len).device / GIB
        return {
            "seq_len": seq_len,
            "measured_ratio": ratio,
            "easy_ratio": easy,
            "hard_ratio": hard,
            "easy_error": easy / ratio - 1,
            "hard_error": hard / ratio - 1,
            "measured_device_gib": device,
            "device_gib": estimated,
            "device_error": estimated / device - 1,
        }

    def _memory(self, on: Topology, seq_len: int) -> Memory:
        used = self.measured.rows[FLOOR, seq_len]["device_used_gib"]
        return memory_of(self.measured.config, self.plans[on], used)


def described(step: StepEstimate, floor: float) -> Row:
    """Times in ms."""
    parts = {f"{part}_ms": getattr(step, part) * 1e3 for part in ("start", "forward", "backward", "end")}
    bounds = {"forward_bound": step.forward_bound, "backward_bound": step.backward_bound}
    return {"ratio": step.seconds / floor, "forward_backward_ms": step.seconds * 1e3, **parts, **bounds}


def format_rows(rows: Sequence[Row]) -> str:
    """Ratios are to the eager unsharded step; what lasts longest is said of forward and of backward."""
    return aligned_lines([COLUMNS, *(cells(row) for row in rows)])


def cells(row: Row) -> tuple[str, ...]:
    """Format one row of the table."""
    easy, hard = row["easy"], row["hard"]
    low, high = row["ratio_from_measured"]
    goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
    bounds = (f"{case['forward_bound']}; {case['backward_bound']}" for case in (easy, hard))
    ratios = f"{easy['ratio']:.3f}", f"{hard['ratio']:.3f}", f"{low:.3f} to {high:.3f}"
    return (
        row["gpus"],
        str(row["seq_len"]),
        f"{row['floor_ms']:.1f}",
        *ratios,
        goal,
        *bounds,
        f"{row['plan_gib']:.2f}",
    )


def format_checks(checks: Sequence[Row]) -> str:
    """Format the comparison of estimates for two GPUs with measurements."""
    head = ("T", "measured", "easy", "off by", "hard", "off by", "device GiB", "estimate", "off by")
    lines = [
        (
            str(c["seq_len"]),
            f"{c['measured_ratio']:.3f}",
            *(f"{c['easy_ratio']:.3f}", f"{c['easy_error']:+.1%}", f"{c['hard_ratio']:.3f}", f"{c['hard_error']:+.1%}"),
            *(f"{c['measured_device_gib']:.2f}", f"{c['device_gib']:.2f}", f"{c['device_error']:+.1%}"),
        )
        for c in checks
    ]
    return aligned_lines([head, *lines])


def aligned_lines(lines: Sequence[Sequence[str]]) -> str:
    """Join cells into lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(width) for c, width in zip(line, widths, strict=True)) for line in lines)


def report_on(measured: Measurements, by: Assumptions, arguments: Sequence[str], names: Sequence[str]) -> Row:
    """The JSON object."""
    estimates = Estimates(measured, by)
    return {
        "kind": KIND,
        "command": f"python scripts/estimate_scale.py {shlex.join(arguments)}".rstrip(),
        "measured_in": list(names),
        "model": {**asdict(measured.config), "num_params": measured.config.num_params},
        "assumptions": asdict(by),
        "checks": estimates.checks(),
        "rows": estimates.rows(),
    }


def run(reports: Sequence[Path], out: Path | None, arguments: Sequence[str]) -> None:
    """Estimate from reports, print the tables, and print and write the JSON object."""
    measured = Measurements([json.loads(path.read_text()) for path in reports])
    report = report_on(measured, Assumptions(), arguments, [path.name for path in reports])
    print(f"{KIND}: forward and backward over eager unsharded\n\n{format_rows(report['rows'])}\n")
    print(f"two GPUs, estimated and measured ({MEASURED}; memory: ours)\n\n{format_checks(report['checks'])}\n")
    if out is not None:
        write(report, out)
    print(json.dumps(report))
