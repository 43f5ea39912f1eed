"""Plot results of simulate_pool.py: the share of time within targets against models per GPU, by policy.

    python scripts/plot_simulation.py scripts/results/A.json [B.json ...] OUT.png

A panel for each report. Needs matplotlib (extra `bench`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.help import report_file

COLORS = {"ours": "#1b7f5c", "round robin": "#3b5fa8", "published quotas": "#c2571a", "first come": "#8aa4d6"}
GOAL = 0.9


def draw(reports: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw a panel for each report into one picture."""
    figure, panels = plt.subplots(1, len(reports), figsize=(6 * len(reports), 4.4), layout="constrained", squeeze=False)
    for axes, report in zip(panels[0], reports, strict=True):
        draw_shares(axes, report)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_shares(axes: Axes, report: dict[str, Any]) -> None:
    """Share of time of each policy, with the spread over seeds."""
    options, rows = report["options"], report["rows"]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        found = [row for row in rows if row["policy"] == policy]
        models = [row["models_per_gpu"] for row in found]
        low, high = zip(*(row["share_of_time_spread"] for row in found), strict=True)
        color = COLORS.get(policy, "#000000")
        axes.plot(models, [row["share_of_time"] for row in found], "o-", color=color, label=policy, markersize=4)
        axes.fill_between(models, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(GOAL, color="#777777", linestyle="--", linewidth=1)
    switches = ", ".join(options["switches"])
    axes.set(
        title=f"{options['platform']}, {options['rate']:g} requests/s a model, switches: {switches}",
        xlabel="models per GPU",
        ylabel="share of time within targets",
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Plot the reports that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=report_file, help="of simulate_pool.py")
    parser.add_argument("out", type=Path, help="the picture")
    options = parser.parse_args(arguments)
    draw(options.reports, options.out)


if __name__ == "__main__":
    main()
