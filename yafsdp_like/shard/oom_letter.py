"""What a rank says and writes when its device has no room left: where that was, who holds what, and what to change.

Owns the words and the file. Costs nothing until an error comes, and allocates nothing on the device then. Knows nothing
of how a model is trained; the launcher passes changes that it has found to fit.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from yafsdp_like.memory.plan import readable
from yafsdp_like.shard.memory_report import ACTIVATIONS, GRADIENTS, STATES, device_of, engine_below, holders_of
from yafsdp_like.shard.runtime.unit_state import unit_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import FrameType, TracebackType


NUM_BLOCKS = 6  # sizes of allocations that a letter lists
NUM_CHANGES = 3


@dataclass(frozen=True)
class Letter:
    """One rank's: each part as the text has it."""

    rank: int
    error: str  # the first line of PyTorch's own message
    module: str  # the innermost module that ran, by its full name; "" where none did
    phase: str  # "forward", "backward" or "update"
    planned: str
    holders: Mapping[str, int]  # bytes by category, the largest first
    blocks: Sequence[tuple[int, int]]  # sizes of the allocator's live blocks, and how many of each
    changes: Sequence[str]

    @property
    def line(self) -> str:
        """What the error's message has beside PyTorch's own."""
        where = f"in {self.module} ({self.phase})" if self.module else f"in the {self.phase}"
        largest = ", ".join(f"{name} {readable(nbytes)}" for name, nbytes in list(self.holders.items())[:3])
        return f"rank {self.rank} ran out of memory {where}; most is held by {largest}"

    def __str__(self) -> str:
        lines = [self.line, f"  {self.error}", "", "planned", *(f"  {line}" for line in self.planned.splitlines())]
        lines += ["", "held now"]
        lines += [f"  {name:<36} {readable(nbytes):>12}" for name, nbytes in self.holders.items()]
        if self.blocks:
            lines += ["", "largest allocations"]
            lines += [f"  {readable(size):>12} x {count}" for size, count in self.blocks]
        lines += ["", "the cheapest changes", *(f"  {i}. {words}" for i, words in enumerate(self.changes, 1))]
        return "\n".join(lines)


@contextmanager
def explain_out_of_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    directory: str | os.PathLike[str] = ".",
    changes: Callable[[], Sequence[str]] | None = None,
) -> Iterator[None]:
    """Write a letter where training inside runs out of memory, and raise the same error with the letter's path in it.

    The file is ``oom-rankN.txt`` in ``directory``, one a rank that has run out. It says which module and phase it was,
    what the plan and what the device hold, by category, and the three cheapest changes. Other ranks are not told: they
    are in collectives, and end with the process, or with the group's timeout.

    Args:
        model: sharded by ``fully_shard``, wholly or in parts.
        directory: where the letter is written; it is made where it is missing.
        optimizer: whose states are counted; without it they stand among activations.
        changes: returns what would fit, the cheapest first, in words; where these are fewer than three, what the sizes
            of the parts suggest follows.

    Raises:
        torch.OutOfMemoryError: the one that came, with notes.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        letter = letter_of(error, model, optimizer, changes)
        path = Path(directory) / f"oom-rank{letter.rank}.txt"
        error.add_note(letter.line)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{letter}\n", encoding="utf-8")
            error.add_note(f"{path} says who holds what, and what to change")
        except OSError as why:
            error.add_note(f"{letter}\n({path} could not be written: {why})")
        raise


def letter_of(
    error: torch.OutOfMemoryError,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    changes: Callable[[], Sequence[str]] | None = None,
) -> Letter:
    """Return the letter on an error that has been raised while ``model`` was trained."""
    module, phase = _where(error.__traceback__, model)
    found = holders_of(model, optimizer)
    advice: list[str] = []
    try:
        advice += changes() if changes is not None else ()
    except Exception as why:  # the error that came is the one to raise
        advice.append(f"(no changes could be worked out: {type(why).__name__}: {why})")
    if len(advice) < NUM_CHANGES:
        advice += cheap_changes(found, optimizer)
    return Letter(
        dist.get_rank() if dist.is_initialized() else 0,
        (str(error) or type(error).__name__).splitlines()[0],
        module,
        phase,
        _planned(model),
        found,
        _largest_blocks(model),
        advice[:NUM_CHANGES],
    )


# --- where ---


def _where(traceback: TracebackType | None, model: nn.Module) -> tuple[str, str]:
    """Return the innermost module of ``model`` in a traceback, and the phase of the step."""
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    module, phase = "", "forward"
    for frame in _frames(traceback):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.optim.Optimizer):
            phase = "update"
        elif frame.f_code.co_name == "_engine_run_backward":
            phase, module = "backward", ""
        if isinstance(owner, nn.Module) and owner in names:
            module = names[owner]
    if phase == "backward" and not module:
        module = _last_reached(model)
    return module, phase


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _last_reached(model: nn.Module) -> str:
    """Return the unit that the running backward has entered last: autograd's own operations are in no traceback."""
    engine = engine_below(model)
    reached = [] if engine is None else [u.name for uses in engine.running.backwards.values() for u, _ in uses]
    return reached[-1] if reached else ""


# --- who holds what ---


def _planned(model: nn.Module) -> str:
    sharded = next((module for module in model.modules() if unit_of(module) is not None), None)
    return "nothing: no part of this model is sharded" if sharded is None else str(sharded.memory_plan())  # type: ignore[operator]


def _largest_blocks(model: nn.Module) -> list[tuple[int, int]]:
    """Return the sizes of the allocator's live blocks that hold most together, and how many there are of each."""
    device = device_of(model)
    if device.type != "cuda":
        return []
    counts: dict[int, int] = {}
    for segment in torch.cuda.memory_snapshot(include_traces=False):
        if segment["device"] == (device.index or 0):
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    counts[block["size"]] = counts.get(block["size"], 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[0] * pair[1])[:NUM_BLOCKS]


# --- what to change ---


def cheap_changes(holders: Mapping[str, int], optimizer: torch.optim.Optimizer | None) -> list[str]:
    """Return changes by what they cost a step, the cheapest first, each with about how many bytes it frees.

    Rules of thumb, for models of which nobody has drawn a forecast.
    """
    found = []
    main, compute = holders.get("main shards", 0), holders.get("compute shards", 0)
    if 0 < compute < main:
        found.append((compute, "fully_shard(..., split_master=True): the same numbers"))
    if wide := min(_fp32_moments_nbytes(optimizer), holders.get(STATES, 0)):  # buffers, where moments are on the host
        found.append((wide // 2, 'AdamW(moments="bf16"): stochastically rounded moments'))
    if activations := holders.get(ACTIVATIONS, 0):
        found.append((activations // 2, "half the sequences of a forward, and twice the forwards of a step"))
        found.append((activations * 3 // 4, "activation checkpointing of every block: a third more compute"))
    if gradients := holders.get(GRADIENTS, 0):
        found.append((gradients, "update_in_backward(optimizer): each unit's gradients die in backward; no clipping"))
    states = holders.get(STATES, 0)
    if states and not getattr(optimizer, "offload_moments", False):
        found.append((states, "AdamW(offload_moments=True): moments in host memory, copied beside every update"))
    shards = main + compute + states + holders.get(GRADIENTS, 0)
    found.append((shards // 2, "twice the ranks"))
    return [f"{words}; frees about {readable(nbytes)}" for nbytes, words in found]


def _fp32_moments_nbytes(optimizer: torch.optim.Optimizer | None) -> int:
    leaves = [] if optimizer is None else pytree.tree_leaves(list(optimizer.state.values()))
    return sum(
        t.numel() * t.itemsize for t in leaves if isinstance(t, Tensor) and t.dtype is torch.float32 and t.dim() > 0
    )
