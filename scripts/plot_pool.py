"""Plot results of bench_pool.py: switches and cold first tokens against the link, and waits of several ways to serve.

    python scripts/plot_pool.py scripts/results/A.json [B.json ...] OUT.png

Several files are parts of one: a measurement is taken from the last that has it. What none has leaves its place empty.
Needs matplotlib (extra `bench`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.help import report_file

WAYS = {  # name, color
    "pool": ("yafsdp_like's pool", "#1b7f5c"),
    "apart": ("a process per model, as many as fit", "#3b5fa8"),
    "disk": ("each from disk on demand", "#c2571a"),
}
FLOOR_COLOR = "#777777"

Report = dict[str, Any]
Row = dict[str, Any]


def draw(report: Report, out: Path) -> None:
    """Draw the four plots of a report into one picture."""
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.4), layout="constrained")
    draw_switches(axes[0], report.get("switch", []))
    draw_cold(axes[1], report.get("cold", []))
    popular = report.get("popular", [])
    draw_waits(axes[2], [row for row in popular if row["model"] == "all"])
    draw_models(axes[3], [row for row in popular if row["model"] != "all"])
    figure.suptitle(f"{report['hardware']['device']}, torch {report['versions']['torch']}")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_switches(axes: Axes, rows: Sequence[Row]) -> None:
    """Rates of switches, as shares of the link's."""
    axes.set(title="switch, share of the link's rate", ylim=(0, 1.15))
    names = [f"{row['from']} to {row['to']}" for row in rows]
    bars = axes.bar(names, [row["share_of_link"] for row in rows], color=WAYS["pool"][1])
    axes.bar_label(bars, labels=[f"{row['ms']:.0f} ms" for row in rows], fontsize="small")
    axes.axhline(1, linestyle="--", color=FLOOR_COLOR)
    axes.tick_params(axis="x", rotation=30)


def draw_cold(axes: Axes, rows: Sequence[Row]) -> None:
    """Times to the first token of a model that slept, beside the time that its bytes take on the link."""
    axes.set(title="first token of a model that slept, ms")
    places = range(len(rows))
    axes.bar(places, [row["cold_ms"] for row in rows], 0.6, color=WAYS["pool"][1], label="measured")
    axes.hlines(
        [row["link_ms"] for row in rows],
        [place - 0.4 for place in places],
        [place + 0.4 for place in places],
        linestyles="--",
        color=FLOOR_COLOR,
        label="weights / link",
    )
    axes.set_xticks(places, [row["model"] for row in rows])
    if rows:
        axes.legend(frameon=False, fontsize="small")


def draw_waits(axes: Axes, rows: Sequence[Row]) -> None:
    """How many requests have their first token within so many seconds."""
    axes.set(title="requests with a first token, of all", xlabel="s from arrival", ylim=(0, 1.02))
    for row in rows:
        waits, (name, color) = row["first_tokens_s"], WAYS[row["way"]]
        shares = [(index + 1) / len(waits) for index in range(len(waits))]
        label = f"{name}: {row['tokens_per_second']:.0f} tokens/s, {row['ended']} of {row['requests']} ended"
        axes.step(waits, shares, where="post", color=color, label=label)
    if rows:
        axes.set_xscale("log")
        axes.grid(alpha=0.3, which="both")
        put_legend(axes)


def draw_models(axes: Axes, rows: Sequence[Row]) -> None:
    """The 95th percentile of first tokens of each model, the most popular first, a bar for each way."""
    axes.set(title="first token, 95th percentile, s")
    asked = [row for row in rows if row["requests"]]
    models, ways = (list(dict.fromkeys(row[field] for row in asked)) for field in ("model", "way"))
    width = 0.8 / max(1, len(ways))
    for place, way in enumerate(ways):
        found = [row for row in asked if row["way"] == way]
        at = [models.index(row["model"]) + place * width for row in found]
        axes.bar(at, [row["first_token_p95_s"] for row in found], width, color=WAYS[way][1], label=WAYS[way][0])
    counts = {row["model"]: row["requests"] for row in asked}
    names = [f"{model}\n{counts[model]} requests" for model in models]
    axes.set_xticks([index + width * (len(ways) - 1) / 2 for index in range(len(models))], names)
    if ways:
        axes.set_yscale("log")
        put_legend(axes)


def put_legend(axes: Axes) -> None:
    """Put the legend below what it would hide."""
    axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14))


def main(arguments: Sequence[str] | None = None) -> None:
    """Plot the reports that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=report_file, help="of bench_pool.py")
    parser.add_argument("out", type=Path, help="the picture")
    options = parser.parse_args(arguments)
    merged: Report = {}
    for report in options.reports:
        merged |= report
    draw(merged, options.out)


if __name__ == "__main__":
    main()
