"""Plot results of bench_serve.py: decode against its floor, latencies against rate, and requests that do not wait.

    python scripts/plot_serve.py scripts/results/A.json [B.json ...] OUT.png

Several files are parts of one: a measurement is taken from the last that has it. What none has leaves its place empty.
Needs matplotlib (extra `bench`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from bench.help import report_file

NAMES = {"ours": "yafsdp_like"}
COLORS = {"ours": "#1b7f5c", "transformers generate": "#8aa4d6", "transformers generate_batch": "#3b5fa8"}
FLOOR_COLOR = "#777777"
LATENCIES = {"first_token_ms": ("first token", "#c2571a"), "between_tokens_ms": ("between tokens", "#1b7f5c")}
LINES = {"p50": "-", "p99": ":"}

Report = dict[str, Any]
Row = dict[str, Any]


def draw(report: Report, out: Path) -> None:
    """Draw the three plots of a report into one picture."""
    figure, (decode_axes, latency_axes, offline_axes) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    results = report["results"]
    draw_decode(decode_axes, results.get("decode", []))
    draw_latencies(latency_axes, results.get("poisson", []))
    draw_offline(offline_axes, [row for row in results.get("offline", []) if row["status"] == "ok"])
    figure.suptitle(title_of(report))
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_decode(axes: Axes, rows: Sequence[Row]) -> None:
    """Tokens a second against batch, and those of the floor."""
    axes.set(title="decode, tokens/s", xlabel="sequences")
    if not rows:
        return
    batches = [row["batch"] for row in rows]
    axes.plot(batches, [row["floor_tokens_per_second"] for row in rows], "--", color=FLOOR_COLOR, label="floor")
    axes.plot(batches, [row["tokens_per_second"] for row in rows], "o-", color=COLORS["ours"], label=NAMES["ours"])
    logarithmic(axes, batches)


def draw_latencies(axes: Axes, rows: Sequence[Row]) -> None:
    """Median and 99th percentile of the time to the first token and of that between tokens, against rate."""
    axes.set(title="latency, ms", xlabel="requests/s that arrive")
    if not rows:
        return
    ways = [tuple(row.get(field) for field in ("way", "chunk", "tpot_ms")) for row in rows]
    rows = [row for row, way in zip(rows, ways, strict=True) if way == ways[0]]
    rates = [row["rate"] for row in rows]
    for field, (name, color) in LATENCIES.items():
        for percentile, line in LINES.items():
            values = [row[field] and row[field][percentile] for row in rows]
            axes.plot(rates, values, f"o{line}", color=color, markersize=4, label=f"{name}, {percentile}")
    logarithmic(axes, rates)


def draw_offline(axes: Axes, rows: Sequence[Row]) -> None:
    """Tokens a second as bars, a group for each number of requests."""
    axes.set(title="requests that are all there, tokens/s", xlabel="requests")
    counts = sorted({row["num_requests"] for row in rows})
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    width = 0.8 / max(1, len(impls))
    for place, impl in enumerate(impls):
        found = [row for row in rows if row["impl"] == impl]
        at = [counts.index(row["num_requests"]) + place * width for row in found]
        bars = axes.bar(
            at,
            [row["tokens_per_second"] for row in found],
            width,
            color=COLORS.get(impl, "#000000"),
            label=NAMES.get(impl, impl),
        )
        axes.bar_label(bars, fmt="%.0f", fontsize="small")
    axes.set_xticks([index + width * (len(impls) - 1) / 2 for index in range(len(counts))], [str(n) for n in counts])
    if impls:
        axes.legend(frameon=False, fontsize="small")


def logarithmic(axes: Axes, ticks: Sequence[float]) -> None:
    """Set logarithmic axes with ticks at the given values, a grid and a legend."""
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize="small")


def title_of(report: Report) -> str:
    """Return the line above the plots: model, dtype, hardware and version of torch."""
    hardware, model = report["hardware"], report["model"]
    return (
        f"{model['num_params'] / 1e9:.1f}B parameters in {report['options']['dtype']}, "
        f"{hardware['ranks']} × {hardware['device']}, torch {report['versions']['torch']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Plot the reports that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=report_file, help="of bench_serve.py")
    parser.add_argument("out", type=Path, help="the picture")
    options = parser.parse_args(arguments)
    results = {name: rows for report in options.reports for name, rows in report["results"].items()}
    draw({**options.reports[0], "results": results}, options.out)


if __name__ == "__main__":
    main()
