"""Where threads are: whose line runs, in which phase of training, and what waits for other ranks.

[Note: frames are looked at seldom]
Whoever holds a frame keeps its local variables alive, and with them tensors and autograd graphs that the thread itself
has let go of by then. So frames become text at once, and who watches a thread that trains looks only where it seems to
stand still. (``faulthandler`` needs no frames, but may crash where a thread of C++ enters Python meanwhile.)
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

_OURS, _TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
_OPTIMIZERS = (str(Path(_TORCH, "optim")), str(Path(_OURS, "optim")))
_PYTHONS = sysconfig.get_path("stdlib")
_JOURNAL = str(Path(__file__).with_name("journal.py"))
_WAITS_IN = (str(Path(__file__).parent), str(Path(torch.__file__).parent / "distributed"))
_MODULE = str(Path("nn", "modules", "module.py"))


class StackLine(NamedTuple):
    """One line of a stack."""

    file: str
    number: int
    function: str


class Spot(NamedTuple):
    """What a thread does."""

    line: str = ""  # of the user's code
    phase: str = ""  # forward, backward, an optimizer's step
    waits: str = ""  # the function that waits for other ranks; nothing if it does something else
    innermost: StackLine | None = None  # of anybody's code


def stacks() -> dict[int, list[StackLine]]:
    """Return the lines of each thread, the innermost first; see [Note: frames are looked at seldom]."""
    return {thread: list(_lines(frame)) for thread, frame in sys._current_frames().items()}


def _lines(frame: FrameType | None) -> Iterator[StackLine]:
    while frame is not None:
        yield StackLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back


def spot_of(thread_id: int) -> Spot:
    """Return what a thread does, or, if it waits in autograd for a backward, what runs that backward."""
    found = stacks()
    lines = found.get(thread_id, [])
    if lines and lines[0].function == "_engine_run_backward":
        lines = next((other for other in found.values() if other and other[0].file == _JOURNAL), lines)
    return _spot(lines)


def own_spot() -> Spot:
    """Return where the calling thread is."""
    return _spot(list(_lines(sys._getframe())))


def _spot(lines: Sequence[StackLine]) -> Spot:
    if not lines:
        return Spot()
    line = next((f"{one.file}:{one.number} in {one.function}" for one in lines if _is_users(one)), "")
    phase = next(filter(None, map(_phase, lines)), "")
    waits = ""
    if lines[0].file.startswith(_WAITS_IN[0]):
        waits = "its entry"
    elif lines[0].file.startswith(_WAITS_IN[1]):
        waits = f"torch.distributed's {lines[0].function}"
    return Spot(line, phase, waits, lines[0])


def _is_users(line: StackLine) -> bool:
    return not line.file.startswith((_OURS, _TORCH, _PYTHONS, "<"))


def _phase(line: StackLine) -> str:
    if line.function == "_engine_run_backward":
        return "backward"
    if line.file.startswith(_OPTIMIZERS):
        return "an optimizer's step"
    if line.file.endswith(_MODULE) and line.function == "_call_impl":
        return "forward"
    return ""
