"""What runs of one unit: calls of its modules, and uses of its parameters whose backward may come.

``hooks.py`` alone writes it; others read.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from yafsdp_like.shard.runtime.watching import NOTHING, Watched

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from torch import nn

    from yafsdp_like.shard.runtime.slots import GatherSlot


def backward_task() -> int | None:
    """Return autograd's number of the backward that runs on this thread, or None outside of backward."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


@dataclass(eq=False, slots=True, weakref_slot=True)
class ForwardUse:
    """One forward call of a unit whose backward may come: which slot its saved tensors point to.

    Held by the autograd graph only, so that it dies with a graph that is never run backward.
    """

    slot: GatherSlot
    task: int | None = None  # the running backward that has reached it, by autograd's number


@dataclass(eq=False, slots=True)
class Call:
    """One running forward of one module of a unit."""

    module: nn.Module
    outer_error: BaseException | None  # what the caller was handling already when the forward began
    recomputes: bool = False  # a checkpointed forward runs again inside the unit's own backward
    starts_iteration: bool = False
    has_nan_inputs: bool = False  # known in debug mode only
    use: ForwardUse | None = None  # None without grad mode, and when it recomputes
    frame: FrameType | None = None  # that runs a method as a forward, which may run the module's own forward
    watched: Watched = NOTHING


class RunningUnit:
    """The calls and uses of one unit."""

    def __init__(self) -> None:
        self.calls: list[Call] = []  # the innermost last
        self.to_run: list[nn.Module] = []  # of several modules: those that have not run in this forward pass
        self.pending: weakref.WeakSet[ForwardUse] = weakref.WeakSet()  # uses whose backward has not ended
        self.reached: set[int] = set()  # running backwards, by autograd's number, that have entered it by an output

    def begin_pass(self, modules: Sequence[nn.Module]) -> None:
        """Expect all ``modules`` to run, unless a forward pass through some of them has begun."""
        self.to_run = self.to_run or list(modules)

    def end_module(self, module: nn.Module) -> bool:
        """Note that ``module`` has run, and return whether the forward pass is over."""
        if module in self.to_run:
            self.to_run.remove(module)
        return not self.to_run

    def begin_backward(self, use: ForwardUse, task: int) -> None:
        """Note that the backward ``task`` has entered the unit by an output of ``use``."""
        use.task = task
        self.reached.add(task)
        self.pending.add(use)

    def abandon(self) -> None:
        """Forget calls and backwards that failed."""
        self.calls.clear()
        self.reached.clear()
        self.to_run.clear()
        for use in self.pending:
            use.task = None
            use.slot.abandon_backwards()
        self.pending.clear()
