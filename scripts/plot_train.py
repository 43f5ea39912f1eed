"""Plot a results file of bench_train.py: forward and backward relative to the floor, and memory, against length.

    python scripts/plot_train.py scripts/results/FILE.json OUT.png

Needs matplotlib (extra `bench`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

NAMES = {"ours": "yafsdp_like", "fsdp2": "FSDP2 (stock)", "unsharded": "unsharded, the floor"}
COLORS = {"ours": "#1b7f5c", "fsdp2": "#c2571a", "unsharded": "#777777"}


def rows_of(report: dict[str, Any], impl: str) -> list[dict[str, Any]]:
    """One implementation's rows that ran, by sequence length."""
    rows = [row for row in report["rows"] if row["impl"] == impl and row["status"] == "ok"]
    return sorted(rows, key=lambda row: row["seq_len"])


def plot(report: dict[str, Any], out: Path) -> None:
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for impl in dict.fromkeys(row["impl"] for row in report["rows"]):
        rows = rows_of(report, impl)
        lengths = [str(row["seq_len"]) for row in rows]
        style = {"color": COLORS.get(impl), "label": NAMES.get(impl, impl), "marker": "o"}
        time_axes.plot(lengths, [row["ratio_to_floor"] for row in rows], **style)
        if impl != "unsharded":  # no optimizer, no sharding: its memory compares with nothing
            memory_axes.plot(lengths, [row["peak_reserved_gib"] for row in rows], **style)
            memory_axes.plot(lengths, [row["peak_allocated_gib"] for row in rows], **style | {"label": None}, ls=":")
    time_axes.set(title="forward + backward, relative to unsharded", xlabel="tokens per GPU", ylim=(0.95, None))
    memory_axes.set(title="peak GiB: reserved (line), allocated (dots)", xlabel="tokens per GPU", ylim=(0, None))
    for axes in (time_axes, memory_axes):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    hardware, options = report["hardware"], report["options"]
    figure.suptitle(
        f"Llama-3-8B shape, {hardware['ranks']} × {hardware['device']}, "
        f"gradients reduced in {options['reduce_dtype']}, torch {report['versions']['torch']}"
    )
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    plot(json.loads(arguments.report.read_text()), arguments.out)


if __name__ == "__main__":
    main()
