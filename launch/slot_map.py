"""Draw a memory plan's slot map, as one HTML file that needs no network or as a PNG, from the same rectangles.

    from launch.slot_map import draw
    draw(model.memory_plan(), "map.html")

Owns how rectangles look. What they are is ``yafsdp_like/memory/slot_map.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from launch.page import COLORS, key, page, table
from yafsdp_like.memory.plan import KINDS, MemoryPlan, readable
from yafsdp_like.memory.slot_map import Panel, Rectangle, slot_map

SUFFIXES = ".html", ".png"
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 86, 70, 8, 34  # of a panel in pixels, and of its margins
LEAST_WIDTH, TICK_WIDTH = 1100, 14  # of a panel, and of a tick where there are many
LETTER_WIDTH, LETTER_HEIGHT = 6.4, 12
NUM_MARKS = 4  # on the axis of addresses
STYLE = """
rect { stroke: var(--card); stroke-width: .6; } rect.odd { fill-opacity: var(--odd); }
rect.on { stroke: var(--ink); stroke-width: 2; }
#detail { position: sticky; top: 0; z-index: 1; padding: .4rem .7rem; margin: .5rem 0; white-space: pre-wrap;
  min-height: 3em; background: var(--card); color: var(--ink); border: 1px solid var(--line); border-radius: 6px; }
"""
SCRIPT = """<script>
const detail = document.getElementById("detail"), hint = detail.textContent;
document.addEventListener("pointerover", event => {
  for (const old of document.querySelectorAll("rect.on")) old.classList.remove("on");
  const rect = event.target.closest("rect[data-u]");
  detail.textContent = rect ? rect.firstChild.textContent : hint;
  if (rect) for (const same of document.querySelectorAll(`rect[data-u="${rect.dataset.u}"]`)) same.classList.add("on");
});
</script>"""


def check_path(path: Path) -> None:
    """Raise ValueError for a file that is neither HTML nor PNG, or whose directory does not exist."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a slot map is drawn as {' or '.join(SUFFIXES)}, found {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"cannot draw {path}: there is no directory {path.parent}")


def draw(plan: MemoryPlan, path: str | Path, title: str = "Slot map") -> None:
    """Write the slot map of ``plan`` to ``path``, whose suffix says whether as .html or as .png.

    Raises ValueError for any other suffix; a PNG needs matplotlib.
    """
    path = Path(path)
    check_path(path)
    if path.suffix == ".html":
        path.write_text(as_html(plan, title), encoding="utf-8")
    else:
        _figure(plan, title).savefig(path, dpi=110)


def color_of(kind: str) -> str:
    """Return the colour of a kind of regions."""
    return COLORS[list(KINDS).index(kind) % len(COLORS)]


def described(rectangle: Rectangle, panel: Panel) -> str:
    """Say what a rectangle is: name, kind, bytes, address and ticks, in lines."""
    segment = rectangle.segment
    return (
        f"{rectangle.name} · {rectangle.kind}\n{readable(segment.nbytes)} ({segment.nbytes:,} bytes) at "
        f"{segment.offset_nbytes:,} · {_when(rectangle, panel)}"
    )


def _when(rectangle: Rectangle, panel: Panel) -> str:
    """Name the phases in which a rectangle begins and ends, and its ticks."""
    if (rectangle.first, rectangle.last) == (0, panel.num_ticks - 1):
        return "all the time"
    first, last = (
        next(phase.name for phase in panel.phases if phase.first <= tick <= phase.last)
        for tick in (rectangle.first, rectangle.last)
    )
    names = first if first == last else f"{first} to {last}"
    ticks = (
        f"tick {rectangle.first}"
        if rectangle.first == rectangle.last
        else f"ticks {rectangle.first} to {rectangle.last}"
    )
    return f"{names}, {ticks} of {panel.num_ticks}"


# --- HTML ---


def as_html(plan: MemoryPlan, title: str = "Slot map") -> str:
    """Return the slot map as one HTML document."""
    panels = slot_map(plan)
    units = {
        name: index for index, name in enumerate(dict.fromkeys(r.name for panel in panels for r in panel.rectangles))
    }
    rows = [
        (key(color_of(kind), kind), readable(plan.nbytes_of(kind)), f"{plan.nbytes_of(kind):,}", escape(KINDS[kind]))
        for kind in KINDS
        if plan.nbytes_of(kind)
    ]
    summary = str(plan).partition("\n")[0]
    drawn = "".join(
        f'<h2>{escape(panel.title)}, {readable(panel.nbytes)}</h2><div class="scroll">{_svg(panel, units)}</div>'
        for panel in panels
    )
    body = (
        f"<p>{escape(summary)}. Time runs to the right, in the ticks of a step; addresses run upwards.</p>"
        f'<div id="detail">Point at a rectangle: what it is, its bytes, and when it is live.</div>{drawn}'
        f"<h2>Kinds</h2>{table(('kind', '', 'bytes', 'what it is'), rows, (1, 2))}{SCRIPT}"
    )
    return page(title, body, STYLE)


def _svg(panel: Panel, units: dict[str, int]) -> str:
    width = max(LEAST_WIDTH, panel.num_ticks * TICK_WIDTH)
    x_scale, y_scale = width / panel.num_ticks, HEIGHT / panel.nbytes
    parts = []
    for r in panel.rectangles:
        x, wide = LEFT + r.first * x_scale, (r.last + 1 - r.first) * x_scale
        y, high = TOP + HEIGHT - r.segment.end_nbytes * y_scale, r.segment.nbytes * y_scale
        odd = ' class="odd"' if units[r.name] % 2 else ""
        parts.append(
            f'<rect{odd} data-u="{units[r.name]}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.2f}" '
            f'fill="{color_of(r.kind)}"><title>{escape(described(r, panel))}</title></rect>'
        )
        if label := _label(r.name, wide, high):
            parts.append(
                f'<text class="in" x="{x + 3:.1f}" y="{y + min(high - 3, LETTER_HEIGHT):.1f}">{escape(label)}</text>'
            )
    parts += _axes(panel, width, x_scale)
    size = f'width="{LEFT + width + RIGHT:.0f}" height="{TOP + HEIGHT + BOTTOM}"'
    return f'<svg {size} role="img" aria-label="{escape(panel.title)}">{"".join(parts)}</svg>'


def _label(name: str, wide: float, high: float, letter: tuple[float, float] = (LETTER_WIDTH, LETTER_HEIGHT)) -> str:
    """Return as much of a name as fits into a rectangle: all of it, its last part, or nothing."""
    if high < letter[1]:
        return ""
    return next((text for text in (name, name.rpartition(".")[2]) if len(text) * letter[0] + 5 <= wide), "")


def _axes(panel: Panel, width: float, x_scale: float) -> Iterator[str]:
    """Yield bytes on the left, and the phases below."""
    for mark in range(NUM_MARKS + 1):
        y = TOP + HEIGHT - HEIGHT * mark / NUM_MARKS
        yield f'<line class="axis" x1="{LEFT - 4}" x2="{LEFT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        nbytes = readable(panel.nbytes * mark // NUM_MARKS)
        yield f'<text text-anchor="end" x="{LEFT - 7}" y="{y + 4:.1f}">{nbytes}</text>'
    yield f'<rect class="axis" x="{LEFT}" y="{TOP}" width="{width:.1f}" height="{HEIGHT}" style="fill:none"/>'
    for phase in panel.phases:
        x, wide = LEFT + phase.first * x_scale, (phase.last + 1 - phase.first) * x_scale
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HEIGHT + BOTTOM - 6}"/>'
        if phase is panel.phases[-1] or _label(phase.name, wide, BOTTOM) == phase.name:
            yield f'<text x="{x + 4:.1f}" y="{TOP + HEIGHT + 18}">{escape(phase.name)}</text>'


# --- PNG ---


def _figure(plan: MemoryPlan, title: str) -> Any:
    """Return the same panels, one above the other, as a figure of matplotlib's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
    from matplotlib.figure import Figure

    panels = slot_map(plan)
    figure = Figure(figsize=(12, 0.6 + 3.1 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    names = {
        name: index for index, name in enumerate(dict.fromkeys(r.name for panel in panels for r in panel.rectangles))
    }
    for row, panel in enumerate(panels):
        _plot(figure.add_subplot(len(panels), 1, row + 1), panel, names)
    return figure


def _plot(axes: Any, panel: Panel, names: dict[str, int]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.patches import Rectangle as Drawn

    inches, points = 10.5 * 72 / panel.num_ticks, 2.3 * 72 / panel.nbytes  # of a tick, and of a byte, in points
    for r in panel.rectangles:
        corner, wide = (r.first, r.segment.offset_nbytes), r.last + 1 - r.first
        look: dict[str, Any] = {"facecolor": color_of(r.kind), "edgecolor": "white", "linewidth": 0.3}
        axes.add_patch(Drawn(corner, wide, r.segment.nbytes, alpha=0.72 if names[r.name] % 2 else 1, **look))
        if label := _label(r.name, wide * inches, r.segment.nbytes * points, (3.7, 7)):
            axes.text(
                r.first + wide / 2,
                r.segment.offset_nbytes + r.segment.nbytes / 2,
                label,
                size=6,
                ha="center",
                va="center",
            )
    axes.set(xlim=(0, panel.num_ticks), ylim=(0, panel.nbytes), title=f"{panel.title}, {readable(panel.nbytes)}")
    marks = [panel.nbytes * mark // NUM_MARKS for mark in range(NUM_MARKS + 1)]
    axes.set_yticks(marks, [readable(mark) for mark in marks], size=7)
    axes.set_xticks([phase.first for phase in panel.phases], [phase.name for phase in panel.phases], size=7, ha="left")
    axes.title.set_size(9)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = dict.fromkeys(r.kind for r in panel.rectangles)
    if len(kinds) > 1:
        patches = [Patch(color=color_of(kind), label=kind) for kind in kinds]
        axes.legend(handles=patches, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
