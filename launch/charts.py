"""Charts as inline SVG: lines over steps, and stacked bars. Numbers in, text out; nothing is loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from launch.page import COLORS, key

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 260, 70, 20, 10, 30  # of a plot and its margins, in pixels
MAX_POINTS = 1500  # of a line; more are averaged
NUM_MARKS = 4  # on each axis
Point = tuple[float, float | None]  # x, and y, None where there is no number


@dataclass(frozen=True)
class Line:
    """Values over steps."""

    label: str
    points: Sequence[Point]
    is_dashed: bool = False


def line_chart(lines: Sequence[Line], what: str) -> str:
    """Return lines over steps, from 0 on, with a legend; "" where no line has a number."""
    thin = [(line, _thinned(line.points)) for line in lines]
    values = [(x, y) for _, points in thin for x, y in points if y is not None]
    if not values:
        return ""
    first, last = min(x for x, _ in values), max(x for x, _ in values)
    top = _round_up(max(y for _, y in values))

    def place(x: float, y: float) -> str:
        return f"{LEFT + WIDTH * (x - first) / max(last - first, 1):.1f},{TOP + HEIGHT * (1 - y / top):.1f}"

    parts = [*_grid(top), *_step_marks(first, last)]
    for index, (line, points) in enumerate(thin):
        dashes = ' stroke-dasharray="5 4"' if line.is_dashed else ""
        for run in _runs(points):
            shape = f'<polyline points="{" ".join(place(x, y) for x, y in run)}"'
            dot = f'<circle r="2.5" cx="{place(*run[0]).split(",")[0]}" cy="{place(*run[0]).split(",")[1]}"'
            parts.append(
                f'{shape} fill="none" stroke="{COLORS[index]}" stroke-width="1.6"{dashes}/>'
                if len(run) > 1
                else f'{dot} fill="{COLORS[index]}"/>'
            )
    return _framed(parts, what, {line.label: COLORS[index] for index, line in enumerate(lines)})


def stacked_bars(bars: Sequence[tuple[str, str, Mapping[str, float]]], what: str) -> str:
    """Return a bar for each (group, label, value by part), its parts one above the other; groups are named below.

    "" where there are no bars. Values are GiB.
    """
    names = list(dict.fromkeys(name for _, _, parts in bars for name in parts))
    if not bars:
        return ""
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    top, wide = _round_up(max(sum(parts.values()) for _, _, parts in bars)), WIDTH / len(bars)
    drawn, last_group = list(_grid(top)), None
    for index, (group, label, values) in enumerate(bars):
        x, y = LEFT + index * wide, float(TOP + HEIGHT)
        for name in names:
            high = HEIGHT * values.get(name, 0.0) / top
            y -= high
            if high > 0:
                said = escape(f"{group}, {label}: {name} {values[name]:.4g} GiB of {sum(values.values()):.4g}")
                drawn.append(
                    f'<rect x="{x + 1:.1f}" y="{y:.2f}" width="{max(wide - 2, 1):.1f}" height="{high:.2f}" '
                    f'fill="{colors[name]}"><title>{said}</title></rect>'
                )
        if group != last_group and x - LEFT >= 0:
            drawn.append(
                f'<text x="{x + 2:.1f}" y="{TOP + HEIGHT + 18}">{escape(group)}</text>' if _is_due(index, bars) else ""
            )
            last_group = group
    return _framed(drawn, what, colors)


def _is_due(index: int, bars: Sequence[tuple[str, str, Mapping[str, float]]]) -> bool:
    """Whether the group that starts at this bar is named: about ten of all are."""
    groups = list(dict.fromkeys(group for group, _, _ in bars))
    return groups.index(bars[index][0]) % max(1, math.ceil(len(groups) / 10)) == 0


def _framed(parts: Sequence[str], what: str, legend: Mapping[str, str]) -> str:
    size = f'width="{LEFT + WIDTH + RIGHT}" height="{TOP + HEIGHT + BOTTOM}"'
    keys = " &nbsp; ".join(key(color, label) for label, color in legend.items())
    svg = f'<svg {size} role="img" aria-label="{escape(what)}">{"".join(parts)}</svg>'
    return f'<p>{keys}</p><div class="scroll">{svg}</div>'


def _grid(top: float) -> Iterator[str]:
    """Yield horizontal lines and their values."""
    for mark in range(NUM_MARKS + 1):
        y = TOP + HEIGHT * (1 - mark / NUM_MARKS)
        yield f'<line class="axis" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text text-anchor="end" x="{LEFT - 7}" y="{y + 4:.1f}">{top * mark / NUM_MARKS:,.4g}</text>'


def _step_marks(first: float, last: float) -> Iterator[str]:
    for mark in range(NUM_MARKS + 1):
        x, step = LEFT + WIDTH * mark / NUM_MARKS, first + (last - first) * mark / NUM_MARKS
        yield f'<text text-anchor="middle" x="{x:.1f}" y="{TOP + HEIGHT + 18}">{round(step):,}</text>'


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 2.5, 4, 5, 8 and 10 times a power of ten."""
    if not value > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 2.5, 4, 5, 8, 10, 20) if unit * step >= value)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return means of as many points as it takes to have few."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), _mean([y for _, y in group if y is not None])) for group in groups]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _runs(points: Sequence[Point]) -> Iterator[list[tuple[float, float]]]:
    """Yield what lies between points without a number."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None:
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run
