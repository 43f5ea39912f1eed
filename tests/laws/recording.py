"""Records what a sharded model does in a step, in order, as literal lists of `(operation, unit, phase)`.

Owns the recorder, which wraps the engine's operations for the length of a `with` block, the count of collectives
that reach torch meanwhile, and the models whose steps are recorded. Autograd itself says what is forward and what is
backward.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import ndiff
from typing import Any
from unittest import mock

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.training import ours, world_mesh
from tests.zoo import FEATURES, Block
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.runtime.gradients import GradientLifecycle
from yafsdp_like.shard.runtime.params import ParamLifecycle
from yafsdp_like.shard.runtime.running import backward_task
from yafsdp_like.shard.runtime.slots import GatherSlot, SlotState

Event = tuple[str, str, str]  # operation, unit, phase
OPERATIONS: dict[str, type] = {  # and who does them
    **dict.fromkeys(("all_gather", "unshard", "release", "release_but_keep"), ParamLifecycle),
    "keep": GatherSlot,
    "reduce_scatter": GradientLifecycle,
}
COLLECTIVES = {"_allgather_base_": "all-gather", "reduce_scatter_tensor_coalesced_": "reduce-scatter"}
NUM_PIECES = {"root": 2, "block": 5}  # parameters, which gloo gathers one by one


# --- recording ---


def recorded(operation: str, events: list[Event]) -> Callable[..., None]:
    """The engine's operation, which notes itself when done: a gather that `unshard` must issue comes before it.

    The release of a slot that nobody uses and the reduction of an empty gradient slot do nothing, and are not noted;
    nor is the release that is part of `release_but_keep`.
    """
    original = getattr(OPERATIONS[operation], operation)

    def perform(owner: Any, *args: Any, **kwargs: Any) -> None:
        subject = (owner, *args)[operation != "keep"]  # a slot, or a unit
        unit = subject.unit if isinstance(subject, GatherSlot) else subject
        slot = subject if isinstance(subject, GatherSlot) else subject.gradient_slot
        does_nothing = operation in ("release", "reduce_scatter") and slot.state in (SlotState.EMPTY, SlotState.STALE)
        original(owner, *args, **kwargs)
        if operation == "release_but_keep":
            assert events.pop()[0] == "release"
        if not does_nothing:
            events.append((operation, unit.name, "forward" if backward_task() is None else "backward"))

    return perform


@contextlib.contextmanager
def recording() -> Iterator[list[Event]]:
    """The events of what runs inside."""
    events: list[Event] = []
    with contextlib.ExitStack() as patches:
        for operation, owner in OPERATIONS.items():
            patches.enter_context(mock.patch.object(owner, operation, recorded(operation, events)))
        yield events


def forward(*steps: str) -> list[Event]:
    return [event(step, "forward") for step in steps]


def backward(*steps: str) -> list[Event]:
    return [event(step, "backward") for step in steps]


def event(step: str, phase: str) -> Event:
    operation, unit = step.split()
    return operation, unit, phase


class Collectives(TorchDispatchMode):
    """Counts what torch's distributed library is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__
            self.counts[COLLECTIVES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


# --- models ---


class Parent(nn.Module):
    """Children a, b and so on between two parameters of its own; some may be skipped, or all recomputed in backward."""

    def __init__(self, *children: nn.Module, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.scale = nn.Parameter(torch.ones(FEATURES))
        for name, child in zip("abcde", children, strict=False):
            self.add_module(name, child)
        self.bias = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: torch.Tensor, skip: str = "") -> torch.Tensor:
        x = x * self.scale
        for name, child in self.named_children():
            if name not in skip:
                x = checkpoint(child, x, use_reentrant=False) if self.recompute else child(x)
        return x + self.bias


def rows() -> torch.Tensor:
    """`(2, FEATURES)`; nothing here depends on the numbers."""
    return torch.ones(2, FEATURES)


def train(model: nn.Module, skip: str = "") -> None:
    model(rows(), skip).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Every block and every parent is a unit. One step is behind it: parameters are placed and ranks have agreed."""
    for module in [m for m in model.modules() if isinstance(m, (Block, Parent))][::-1]:
        ours.fully_shard(module, mesh=world_mesh(), **options)
    train(model)
    return model


def chain(recompute: bool = False, **options: Any) -> nn.Module:
    """Blocks a, b, c below a root with parameters."""
    return sharded(Parent(Block(), Block(), Block(), recompute=recompute), **options)


def events_of(run: Callable[..., Any], *args: Any) -> list[Event]:
    with recording() as events:
        run(*args)
    return events


def assert_order(actual: list[Event], expected: list[Event]) -> None:
    """With a message, since pytest does not explain assertions in workers."""
    assert actual == expected, "\n".join(["expected (-), found (+):", *ndiff(lines(expected), lines(actual))])


def lines(events: list[Event]) -> list[str]:
    return [" ".join(event) for event in events]


def assert_collectives(expected: dict[str, int], run: Callable[..., Any], *args: Any) -> None:
    """`expected` says how many units are gathered, the root once and blocks, and how many are reduced."""
    with Collectives() as collectives:
        run(*args)
    if gathers := expected.get("all-gather"):
        expected = expected | {"all-gather": NUM_PIECES["root"] + (gathers - 1) * NUM_PIECES["block"]}
    assert collectives.counts == expected, f"expected {expected}, found {dict(collectives.counts)}"


@torch.no_grad()
def evaluate(model: nn.Module) -> None:
    model(rows())


def step_of_adamw(model: nn.Module) -> Callable[[], None]:
    """This package's optimizer with every gradient there, so that its step updates every unit whole."""
    optimizer = AdamW(model.parameters())
    model(rows()).sum().backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- the step of the chain ---

# a and c share their bytes. At the turn from forward to backward c and b are still where forward left them, since
# nobody took their bytes; c's gather has overwritten a, which alone is gathered again.
CHAIN_FORWARD = [
    *forward("all_gather root", "unshard root", "all_gather a"),
    *forward("unshard a", "all_gather b", "release_but_keep a"),
    *forward("unshard b", "all_gather c", "release_but_keep b"),
    *forward("unshard c", "release_but_keep c"),
    *forward("keep root"),
]
CHAIN_BACKWARD = [
    *backward("unshard root"),
    *backward("unshard c", "release c", "reduce_scatter c"),
    *backward("unshard b", "all_gather a", "release b", "reduce_scatter b"),
    *backward("unshard a", "release a", "reduce_scatter a"),
    *backward("release root", "reduce_scatter root"),
]
CHAIN_STEP = CHAIN_FORWARD + CHAIN_BACKWARD
# What a forward does after another one that nothing was updated since: root, b and c are still where it left them.
CHAIN_FORWARD_AGAIN = CHAIN_FORWARD[1:]  # while the root is kept: all but its gather
