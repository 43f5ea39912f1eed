"""DESIGN's pictures as text, drawn from what the code does: the operations of a step, and the layout of a slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory.layout import FlatLayout, RowShards
from yafsdp_like.models import PRESETS, Block

if TYPE_CHECKING:
    from collections.abc import Sequence

Operation = tuple[str, str, str]  # operation, unit, phase: as `tests/laws/recording.py` records them
GATHERS, REDUCTIONS = ("gather", "all_gather"), ("reduce", "reduce_scatter")
WIDTH = 6


def streams_over_time(steps: Sequence[Operation], slots: Sequence[Sequence[str]]) -> str:
    """Draw a step: a column for each unit that starts, a row for each stream, and one for the bytes of each slot.

    A reduce-scatter is issued when its unit's backward ends, and so runs beside the next unit. A slot's row names the
    unit whose values are in its bytes when the column ends; ``slots`` has the units that share bytes.
    """
    names = ["all-gather", "compute", "reduce-scatter", *(f"slot {'+'.join(slot)}" for slot in slots)]
    columns: list[dict[str, str]] = [{}]
    reduced: list[str] = []
    for operation, unit, _ in steps:
        if operation == "unshard":
            columns.append({**{n: v for n, v in columns[-1].items() if n.startswith("slot")}, "compute": unit})
            columns[-1]["reduce-scatter"], reduced = " ".join(reduced), []
        elif operation in GATHERS:
            columns[-1]["all-gather"] = f"{columns[-1].get('all-gather', '')} {unit}".strip()
            columns[-1] |= {f"slot {'+'.join(slot)}": unit for slot in slots if unit in slot}
        elif operation in REDUCTIONS:
            reduced.append(unit)
    columns.append({"reduce-scatter": " ".join(reduced)})
    return "\n".join(_row(name, [column.get(name, "") for column in columns]) for name in names)


def _row(name: str, cells: Sequence[str]) -> str:
    return (f"{name:<16}" + "".join(f"|{cell:<{WIDTH}}" for cell in cells)).rstrip()


def address_map(world_size: int = 2, dtype: torch.dtype = torch.bfloat16) -> str:
    """Draw the slot of a block of Llama-3-8B: where each parameter, and each rank's chunk of it, begins."""
    with torch.device("meta"):
        named = list(Block(PRESETS["8b"]).named_parameters())
    shards = [RowShards(tuple(parameter.shape), world_size) for _, parameter in named]
    layout = FlatLayout.pack([shard.padded_numel * dtype.itemsize for shard in shards])
    lines = [f"{'offset':>11}  {'parameter':<46}{'chunks of rows':<28}"]
    for (name, parameter), shard, segment in zip(named, shards, layout.segments, strict=True):
        chunks = "  ".join(f"r{r} [{a}, {b})" for r in range(world_size) for a, b in [shard.row_range(r)])
        lines.append(f"{segment.offset_nbytes:>11,}  {f'{name} {tuple(parameter.shape)}':<46}{chunks}")
    return "\n".join(line.rstrip() for line in [*lines, f"{layout.nbytes:>11,}  end"])
