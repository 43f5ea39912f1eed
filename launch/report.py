"""The report of a run: one HTML file of losses, speed, memory by category, what was planned, and where it ran.

Owns what is said of a run at its end, read from the files that the run has left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from launch.charts import Line, line_chart, stacked_bars
from launch.memory_timeline import parts_of
from launch.metrics import ENVIRONMENT_FILE, GIB, Record, read_records
from launch.page import page, table
from yafsdp_like.memory.plan import readable
from yafsdp_like.shard.forecast.quantities import CATEGORIES
from yafsdp_like.shard.memory_report import ComparedMemory, MemoryReport

REPORT_FILE = "report.html"
MAX_SAMPLES = 40  # steps whose memory is drawn
ASK = "Memory by category was not recorded: --log.memory=true does, at the borders of each step's phases."


def write_report(directory: Path, found: MemoryReport, unigram_entropy: float) -> Path:
    """Write report.html into a run's directory, of the files that are there and of what was planned and measured."""
    records = read_records(directory)
    environment = json.loads((directory / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    body = "".join(
        f"<h2>{title}</h2>{content}"
        for title, content in (
            ("Loss", losses(records, unigram_entropy)),
            ("Speed", speed(records)),
            ("Memory", memory(records)),
            ("Planned and measured", planned_and_measured(found, records)),
            ("Where it ran", table(("", ""), list(_flat(environment)))),
        )
    )
    path = directory / REPORT_FILE
    path.write_text(page(f"Run {directory.absolute().name}", f"<p>{_summary(records)}</p>{body}"), encoding="utf-8")
    return path


def _summary(records: Sequence[Record]) -> str:
    if not records:
        return "No step was logged."
    last = records[-1]
    words = [f"step {last['step']:,}", f"{last['tokens']:,} tokens"]
    words += [
        f"{name} {last[key]:.4f}" for name, key in (("loss", "loss"), ("held out", "held_out_loss")) if last.get(key)
    ]
    return escape(", ".join(words))


def losses(records: Sequence[Record], unigram_entropy: float) -> str:
    """Return training and held-out loss over steps, with the entropy of single tokens as the line to beat."""
    held_out = [record for record in records if "held_out_loss" in record]
    lines = [
        Line("training, nats per token", [(r["step"], r["loss"]) for r in records]),
        Line("held out", [(r["step"], r["held_out_loss"]) for r in held_out]),
    ]
    if records:
        ends = [(records[i]["step"], unigram_entropy) for i in (0, -1)]
        lines.append(Line(f"unigram entropy, {unigram_entropy:.3f}", ends, is_dashed=True))
    return line_chart(lines, "loss over steps")


def speed(records: Sequence[Record]) -> str:
    """Return tokens per second of a device over steps, and in which phases the time of the last steps went."""
    timed = [record for record in records if record.get("tokens_per_s_per_device") is not None]
    if not timed:
        return ""
    last = timed[-1]
    rows = [(escape(phase), f"{share:.1%}") for phase, share in last["shares"].items()]
    rows += [("TFLOP/s of a device", f"{last['tflops_per_device']:.4g}")] if last["tflops_per_device"] else []
    rows += [("MFU", f"{last['mfu']:.1%}")] if last["mfu"] else []
    line = Line("tokens/s per device", [(r["step"], r["tokens_per_s_per_device"]) for r in timed])
    return line_chart([line], "tokens per second") + table(("of the last steps", ""), rows, (1,))


def memory(records: Sequence[Record]) -> str:
    """Return a bar for each phase of some steps, of what held the device's memory then, in GiB."""
    sampled = [record for record in records if "memory_gib" in record]
    if not sampled:
        return f"<p>{ASK}</p>"
    every = -(-len(sampled) // MAX_SAMPLES)
    bars = [
        (f"step {record['step']}", phase, parts_of(sample))
        for record in sampled[::-1][::every][::-1]
        for phase, sample in record["memory_gib"].items()
    ]
    return "<p>GiB at the end of forward, backward and update.</p>" + stacked_bars(bars, "memory over steps")


def planned_and_measured(found: MemoryReport, records: Sequence[Record]) -> str:
    """Return, by category, what was planned and the most that was held, and what did not go by the plan."""
    samples = [sample for record in records for sample in record.get("memory_gib", {}).values()]
    most = {name: round(GIB * max(sample.get(name, 0.0) for sample in samples)) for name in _names(samples)}
    rows = [
        replace(row, measured_nbytes=max(most.pop(row.name), row.measured_nbytes or 0)) if row.name in most else row
        for row in found.rows
    ]
    rows += [ComparedMemory(name, None, nbytes) for name, nbytes in most.items()]
    cells = [
        (escape(row.name), _exact(row.planned_nbytes), _exact(row.measured_nbytes) or "not known", row.off)
        for row in rows
    ]
    words = f"<p>{len(found.spills)} slots beyond the plan, {found.evictions} evictions.</p>"
    return table(("", "planned", "measured, at most", "off by"), cells, (1, 2, 3)) + words


def _names(samples: Sequence[Record]) -> list[str]:
    """Categories of samples, in the order of ``CATEGORIES``, the rest behind them."""
    found = dict.fromkeys(name for sample in samples for name in sample)
    return [*(name for name in CATEGORIES if name in found), *(name for name in found if name not in CATEGORIES)]


def _exact(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{readable(nbytes)} ({nbytes:,})"


def _flat(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the rows of nested values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield escape(f"{prefix}{name}"), escape(str(value))
