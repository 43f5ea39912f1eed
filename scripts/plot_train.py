"""Plot results of bench_train.py against sequence length: whole steps, time over the floor, and memory.

    python scripts/plot_train.py scripts/results/A.json scripts/results/B.json ... OUT.png

Files of one model on one machine are drawn together, those with compiled blocks dashed, those that recompute them
dotted; where two hold the same measurement, the later one's is drawn. Ratios are of each file's own floor. Needs
matplotlib (extra `bench`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from bench.help import report_file

FLOOR = "unsharded"
NAMES = {
    "ours": "yafsdp_like",
    "ours-graph": "yafsdp_like, one CUDA graph",
    "ours-nccl": "yafsdp_like over NCCL",
    "ours-segments": "yafsdp_like, usual segments",
    "fsdp2": "FSDP2",
    "fsdp2-expandable": "FSDP2, expandable segments",
    "deepspeed": "DeepSpeed ZeRO-3",
    "deepspeed-blocks": "DeepSpeed ZeRO-3, whole blocks",
    "unsharded-graph": "unsharded, one CUDA graph",
    FLOOR: "unsharded, the floor",
}
COLORS = {
    "ours": "#1b7f5c",
    "ours-graph": "#0b3d2c",
    "ours-nccl": "#7fc4a8",
    "ours-segments": "#4da98a",
    "fsdp2": "#c2571a",
    "fsdp2-expandable": "#e3a27e",
    "deepspeed": "#3b5fa8",
    "deepspeed-blocks": "#8aa4d6",
    "unsharded-graph": "#bbbbbb",
    FLOOR: "#777777",
}

Report = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One line of the plot."""

    impl: str
    compiled: bool
    reduce_dtype: str | None  # None for the floor, which reduces nothing
    recomputed: bool = False
    batch_size: int = 1

    def label(self, several_dtypes: bool) -> str:
        """Return its entry in the legend."""
        parts = [NAMES.get(self.impl, self.impl)]
        if several_dtypes and self.reduce_dtype is not None:
            parts.append(f"{self.reduce_dtype} reduce")
        parts += [f"batch {self.batch_size}"] if self.batch_size > 1 else []
        parts += ["blocks recomputed"] if self.recomputed else []
        return ", ".join([*parts, "compiled"] if self.compiled else parts)

    def style(self, several_dtypes: bool) -> dict[str, Any]:
        """Return matplotlib's keywords of its line."""
        return {
            "color": COLORS.get(self.impl, "#000000"),
            "linestyle": ":" if self.recomputed else "--" if self.compiled else "-",
            "marker": "s" if several_dtypes and self.reduce_dtype == "fp32" else "o",
            "markersize": 4,
            "label": self.label(several_dtypes),
        }


def merged(reports: Sequence[Report]) -> dict[Series, list[Row]]:
    """Rows that ran, by series and ascending length. Raises ValueError where models or machines differ."""
    series: dict[Series, dict[int, Row]] = {}
    for report in reports:
        for field in ("model", "hardware"):
            if report[field] != reports[0][field]:
                raise ValueError(f"one plot is of one {field}, found {reports[0][field]} and {report[field]}")
        options = report["options"]
        for row in report["rows"]:
            if row["status"] == "ok":
                dtype = None if row["impl"] == FLOOR else options["reduce_dtype"]
                recomputed, batch_size = row.get("checkpointing") == "block", row.get("batch_size", 1)
                key = Series(row["impl"], options["compile"], dtype, recomputed, batch_size)
                series.setdefault(key, {})[row["seq_len"]] = row
    return {key: [rows[seq_len] for seq_len in sorted(rows)] for key, rows in series.items()}


def draw_line(axes: Axes, rows: list[Row], values: list[float | None], style: dict[str, Any]) -> None:
    """Values against length, without those that were not measured."""
    points = [(row["seq_len"], value) for row, value in zip(rows, values, strict=True) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def draw(series: dict[Series, list[Row]], title: str, out: Path) -> None:
    """Draw whole steps, forward and backward over the floor, and memory against length into one picture."""
    figure, (time_axes, ratio_axes, memory_axes) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    several_dtypes = len({key.reduce_dtype for key in series} - {None}) > 1
    for key, rows in series.items():
        style = key.style(several_dtypes)
        draw_line(time_axes, rows, [row["step_ms"] and row["step_ms"]["median"] for row in rows], style)
        draw_line(ratio_axes, rows, [row["ratio_to_floor"] for row in rows], style)
        if key.impl != FLOOR:  # no optimizer, no sharding: its memory compares with nothing
            draw_line(memory_axes, rows, [row["device_used_gib"] for row in rows], style)
    time_axes.set(title="whole step, ms", yscale="log")
    ratio_axes.set(title="forward + backward, relative to unsharded", yscale="log")
    memory_axes.set(title="memory taken from the device, GiB", ylim=(0, None))
    lengths = sorted({row["seq_len"] for rows in series.values() for row in rows})
    for axes in (time_axes, ratio_axes, memory_axes):
        axes.set(xlabel="tokens per sequence", xscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3, which="both")
    for axes in (time_axes, ratio_axes):
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    max(ratio_axes, time_axes, key=lambda axes: len(axes.lines)).legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def title_of(reports: Sequence[Report]) -> str:
    """Return the line above the plots: model, hardware, gradients' dtypes and version of torch."""
    hardware, model = reports[0]["hardware"], reports[0]["model"]
    dtypes = sorted({report["options"]["reduce_dtype"] for report in reports})
    versions = sorted({report["versions"]["torch"] for report in reports})
    return (
        f"{model['num_params'] / 1e9:.1f}B parameters, {hardware['ranks']} × {hardware['device']}, "
        f"gradients reduced in {' and '.join(dtypes)}, torch {', '.join(versions)}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Plot the reports that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=report_file, nargs="+", metavar="REPORT", help="of bench_train.py")
    parser.add_argument("out", type=Path, help="the picture")
    options = parser.parse_args(arguments)
    draw(merged(options.reports), title_of(options.reports), options.out)


if __name__ == "__main__":
    main()
