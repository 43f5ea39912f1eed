"""From what was measured to a printed table and the report's head, whose fields `results/README.md` explains."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence

from bench.report import Row, hardware, versions
from bench.serve_engine import Bench
from bench.serve_floors import MeasuredRates
from bench.serve_options import ServeBenchOptions
from yafsdp_like.models.decoder import DecoderConfig

WAITS = {
    "device_waiting_share": ("device waits", ".1%"),
    "mixed_cpu_ms": ("CPU of mixed steps p50/99 ms", ".2f"),
    "decode_cpu_ms": ("of others", ".2f"),
}
COLUMNS = {  # of the printed tables: measurement -> field -> heading and format
    "decode": {
        "batch": ("batch", "d"),
        "context": ("context", ".0f"),
        "step_ms": ("step ms", ".3f"),
        "device_ms": ("device ms", ".3f"),
        "floor_ms": ("floor ms", ".3f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "share_of_floor": ("of floor", ".1%"),
        "device_share_of_floor": ("device's", ".1%"),
    },
    "prefill": {
        "num_tokens": ("prompt", "d"),
        "chunk": ("chunk", "d"),
        "seconds": ("s", ".4f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "tflops": ("TFLOP/s", ".1f"),
        "share_of_floor": ("of floor", ".1%"),
    },
    "poisson": {
        "way": ("way", ""),
        "chunk": ("chunk", "d"),
        "tpot_ms": ("target ms", "g"),
        "rate": ("req/s", ".1f"),
        "num_requests": ("requests", "d"),
        "first_token_ms": ("first p50/95/99 ms", ".1f"),
        "their_first_token_ms": ("theirs", ".1f"),
        "between_tokens_ms": ("between p50/95/99 ms", ".2f"),
        "their_between_tokens_ms": ("theirs ", ".2f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "requests_per_second": ("done/s", ".2f"),
        **WAITS,
    },
    "connections": {
        "way": ("way", ""),
        "connections": ("connections", "d"),
        "num_requests": ("requests", "d"),
        "tokens_per_second": ("tok/s", ".0f"),
        "of_in_process": ("of in process", ".1%"),
        "first_token_ms": ("first p50/95/99 ms", ".1f"),
        "between_tokens_ms": ("between p50/95/99 ms", ".2f"),
        **WAITS,
    },
    "mixed": {
        "num_requests": ("requests", "d"),
        "num_prompt_tokens": ("of prompts", "d"),
        "num_tokens": ("drawn", "d"),
        "seconds": ("s", ".2f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "num_steps": ("steps", "d"),
        "num_preempted": ("preempted", "d"),
        **WAITS,
    },
    "offline": {
        "impl": ("impl", ""),
        "num_requests": ("requests", "d"),
        "seconds": ("s", ".3f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "share_of_floor": ("of floor", ".1%"),
        "ours_over_it": ("ours x", ".2f"),
        "status": ("status", ""),
        **WAITS,
    },
    "speculation": {
        "speculate": ("drafts", ""),
        "text": ("text", ""),
        "batch": ("batch", "d"),
        "same_tokens": ("same tokens", ""),
        "tokens_per_step": ("a step", ".2f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "tokens_per_second_without": ("without", ".0f"),
        "of_without": ("x", ".2f"),
    },
    "limits": {
        "answers": ("answers", ""),
        "batch": ("batch", "d"),
        "step_ms": ("step ms", ".3f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "of_free": ("of free", ".1%"),
    },
    "adapters": {
        "slots": ("slots", "d"),
        "adapters": ("adapters", "d"),
        "batch": ("batch", "d"),
        "step_ms": ("step ms", ".3f"),
        "device_ms": ("device ms", ".3f"),
        "tokens_per_second": ("tok/s", ".0f"),
        "of_no_slots": ("of no slots", ".1%"),
    },
    "modes": {
        "work": ("work", ""),
        "batch": ("batch", "d"),
        "context": ("context", ".0f"),
        "step_ms": ("step ms", ".3f"),
        "compute_floor_ms": ("compute floor", ".3f"),
        "gather_floor_ms": ("gather floor", ".3f"),
        "gather_alone_ms": ("gather alone", ".3f"),
        "ratio_to_floor": ("x floor", ".3f"),
        "tokens_per_second": ("tok/s", ".0f"),
    },
}


def describe_run(bench: Bench, rates: MeasuredRates, arguments: Sequence[str]) -> Row:
    """Everything in a report but what was measured."""
    options, world, plan = bench.options, bench.world, bench.served.plan
    command = "python" if world.size == 1 else f"torchrun --nproc-per-node {world.size}"
    found = {
        **versions(world),
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "transformers": getattr(sys.modules.get("transformers"), "__version__", None),  # None where it did not run
    }
    del found["deepspeed"]
    return {
        "command": f"{command} scripts/bench_serve.py {shlex.join(arguments)}".rstrip(),
        "hardware": hardware(world),
        "versions": found,
        "model": {**in_json(plan.config), "num_params": plan.config.num_params},
        "mode": plan.mode,
        "options": in_json(options),
        "rates": dataclasses.asdict(rates),
    }


def in_json(options: ServeBenchOptions | DecoderConfig) -> Row:
    """Return their fields, with text for what JSON has no value for: paths and dtypes."""
    found: Row = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return found


def describe(name: str, result: Row | list[Row]) -> str:
    """What is printed of one measurement: a table of rows, or one line per field."""
    if isinstance(result, list):
        return f"{name}\n{table(name, result)}"
    return "\n".join(
        [
            name,
            *(
                f"  {field} {value:,}" if isinstance(value, int) else f"  {field} {value}"
                for field, value in result.items()
            ),
        ]
    )


def table(name: str, rows: list[Row]) -> str:
    """Columns aligned, medians of times, blanks where there is no figure."""
    columns = COLUMNS[name]
    lines = [[heading for heading, _ in columns.values()]]
    lines += [[cell(row.get(field), spec) for field, (_, spec) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def cell(value: object, spec: str) -> str:
    """A number, a spread's median, or percentiles."""
    if value is None:
        return ""
    if isinstance(value, dict):
        values = [value["median"]] if "median" in value else list(value.values())
        return "/".join(format(one, spec) for one in values)
    return format(value, spec)
