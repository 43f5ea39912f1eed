"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from launch.metrics import Record


def draw(records: list[Record], unigram_entropy: float, path: Path) -> None:
    """Training and held-out loss against steps, with the entropy of single tokens as the line to beat."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    held_out = [record for record in records if "held_out_loss" in record]
    for name, marker, label, rows in (("loss", "", "training", records), ("held_out_loss", "o", "held out", held_out)):
        values = [math.nan if row[name] is None else row[name] for row in rows]
        axes.plot([row["step"] for row in rows], values, label=label, marker=marker, markersize=3, linewidth=0.9)
    axes.axhline(unigram_entropy, color="gray", linestyle="--", linewidth=0.9, label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss, nats per token", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
