"""What the engine does in a training step, in order: literal lists of `(operation, unit, phase)`.

Owns the recorder, which wraps the engine's operations for the length of a `with` block, and the count of collectives
that reach torch meanwhile. Autograd itself says what is forward and what is backward.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import ndiff
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.ranks import on_ranks
from tests.zoo import FEATURES, Block, ours, world_mesh
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.depth import Depth
from yafsdp_like.shard.engine import Engine, backward_task
from yafsdp_like.shard.slots import GatherSlot, SlotState
from yafsdp_like.shard.unit import Unit

Event = tuple[str, str, str]  # operation, unit, phase
OPERATIONS = ("gather", "unshard", "release", "rest", "keep", "reduce")
COLLECTIVES = {"allgather_into_tensor_coalesced_": "all-gather", "reduce_scatter_tensor_coalesced_": "reduce-scatter"}


# --- recording ---


def recorded(operation: str, events: list[Event]) -> Callable[..., None]:
    """The engine's operation, which notes itself when done: a gather that `unshard` must issue comes before it.

    The release of a slot that nobody uses and the reduction of an empty gradient slot do nothing, and are not noted;
    nor is the release that is part of `rest`.
    """
    original = getattr(Engine, operation)

    def perform(engine: Engine, subject: GatherSlot | Unit, *args: Any, **kwargs: Any) -> None:
        unit = subject.unit if isinstance(subject, GatherSlot) else subject
        slot = subject if isinstance(subject, GatherSlot) else subject.gradient_slot
        does_nothing = operation in ("release", "reduce") and slot.state in (SlotState.EMPTY, SlotState.IDLE)
        original(engine, subject, *args, **kwargs)
        if operation == "rest":
            assert events.pop()[0] == "release"
        if not does_nothing:
            events.append((operation, unit.name, "forward" if backward_task() is None else "backward"))

    return perform


@contextlib.contextmanager
def recording() -> Iterator[list[Event]]:
    """The events of what runs inside."""
    events: list[Event] = []
    with mock.patch.multiple(Engine, **{operation: recorded(operation, events) for operation in OPERATIONS}):
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
    with Collectives() as collectives:
        run(*args)
    assert collectives.counts == expected, f"expected {expected}, found {dict(collectives.counts)}"


# --- one training step ---

# a and c share their bytes. At the turn from forward to backward c and b are still where forward left them, since
# nobody took their bytes; c's gather has overwritten a, which alone is gathered again.
CHAIN_FORWARD = [
    *forward("gather root", "unshard root", "gather a"),
    *forward("unshard a", "gather b", "rest a"),
    *forward("unshard b", "gather c", "rest b"),
    *forward("unshard c", "rest c"),
    *forward("keep root"),
]
CHAIN_BACKWARD = [
    *backward("unshard root"),
    *backward("unshard c", "release c", "reduce c"),
    *backward("unshard b", "gather a", "release b", "reduce b"),
    *backward("unshard a", "release a", "reduce a"),
    *backward("release root", "reduce root"),
]
CHAIN_STEP = CHAIN_FORWARD + CHAIN_BACKWARD
# What a forward does after another one that nothing was updated since: root, b and c rest where it left them.
CHAIN_FORWARD_AGAIN = CHAIN_FORWARD[1:]  # while the root is kept: all but its gather


@on_ranks()
def test_a_chain_gathers_one_unit_ahead_and_reduces_behind() -> None:
    """The root is kept from forward to backward. Every step is like the first one that was recorded."""
    model = chain()
    assert_order(events_of(train, model), CHAIN_STEP)
    assert_order(events_of(train, model), CHAIN_STEP)


@on_ranks()
def test_the_first_step_is_like_the_others() -> None:
    """Prevents: an order that is recorded in the first step and followed later."""
    assert_order(events_of(chain), CHAIN_STEP)


@on_ranks()
def test_resharding_the_root_too_costs_no_gather_while_nobody_takes_its_bytes() -> None:
    """Its backward comes next, and finds it where forward left it."""
    assert_order(
        events_of(train, chain(reshard_after_forward=True)),
        [*CHAIN_FORWARD[:-1], *forward("rest root"), *CHAIN_BACKWARD],
    )


@on_ranks()
def test_without_resharding_nothing_is_gathered_in_backward() -> None:
    assert_order(
        events_of(train, chain(reshard_after_forward=False)),
        [
            *forward("gather root", "unshard root", "gather a"),
            *forward("unshard a", "gather b", "keep a"),
            *forward("unshard b", "gather c", "keep b"),
            *forward("unshard c", "keep c"),
            *forward("keep root"),
            *backward("unshard root"),
            *backward("unshard c", "release c", "reduce c"),
            *backward("unshard b", "release b", "reduce b"),
            *backward("unshard a", "release a", "reduce a"),
            *backward("release root", "reduce root"),
        ],
    )


@on_ranks()
def test_nested_parents_start_before_their_children_and_end_after() -> None:
    """B takes the bytes of a.a, the only one that backward gathers again."""
    assert_order(
        events_of(train, sharded(Parent(Parent(Block(), Block()), Block()))),
        [
            *forward("gather root", "unshard root", "gather a"),
            *forward("unshard a", "gather a.a"),
            *forward("unshard a.a", "gather a.b", "rest a.a"),
            *forward("unshard a.b", "gather b", "rest a.b"),
            *forward("rest a"),
            *forward("unshard b", "rest b"),
            *forward("keep root"),
            *backward("unshard root"),
            *backward("unshard b", "release b", "reduce b"),
            *backward("unshard a"),
            *backward("unshard a.b", "gather a.a", "release a.b", "reduce a.b"),
            *backward("unshard a.a", "release a.a", "reduce a.a"),
            *backward("release a", "reduce a"),
            *backward("release root", "reduce root"),
        ],
    )


@on_ranks()
def test_explicit_prefetch_lists_gather_two_ahead() -> None:
    """Set before the first forward, so that the plan has room for them: for all three at once, so that backward finds
    every one where forward left it.
    """
    model: Any = Parent(Block(), Block(), Block())
    for module in (model.a, model.b, model.c, model):
        ours.fully_shard(module, mesh=world_mesh())
    model.set_modules_to_forward_prefetch([model.a, model.b])
    model.a.set_modules_to_forward_prefetch([model.c])
    model.set_modules_to_backward_prefetch([model.c, model.b])
    model.c.set_modules_to_backward_prefetch([model.a])
    assert_order(
        events_of(train, model),
        [
            *forward("gather root", "unshard root", "gather a", "gather b"),
            *forward("unshard a", "gather c", "rest a"),
            *forward("unshard b", "rest b"),
            *forward("unshard c", "rest c"),
            *forward("keep root"),
            *backward("unshard root"),
            *backward("unshard c", "release c", "reduce c"),
            *backward("unshard b", "release b", "reduce b"),
            *backward("unshard a", "release a", "reduce a"),
            *backward("release root", "reduce root"),
        ],
    )


# --- of another depth ---


def deep_chain(depth: Depth, **options: Any) -> nn.Module:
    """Blocks a to e below a root with parameters; the plan has room for `depth`."""
    model: Any = Parent(*(Block() for _ in range(5)))
    for module in (*model.children(), model):
        ours.fully_shard(module, mesh=world_mesh(), **options)
    model._engine().depth = depth
    return model


# Three slots: a and d share one, and b and e. At the turn c, d and e are still where forward left them.
DEEP_FORWARD = [
    *forward("gather root", "unshard root", "gather a", "gather b"),
    *forward("unshard a", "gather c", "rest a"),
    *forward("unshard b", "gather d", "rest b"),
    *forward("unshard c", "gather e", "rest c"),
    *forward("unshard d", "rest d"),
    *forward("unshard e", "rest e"),
    *forward("keep root"),
]
DEEP_STEP = [
    *DEEP_FORWARD,
    *backward("unshard root"),
    *backward("unshard e", "release e", "reduce e"),
    *backward("unshard d", "gather b", "release d", "reduce d"),
    *backward("unshard c", "gather a", "release c", "reduce c"),
    *backward("unshard b", "release b", "reduce b"),
    *backward("unshard a", "release a", "reduce a"),
    *backward("release root", "reduce root"),
]


@pytest.mark.parametrize("num_gradients", [2, 3])
@on_ranks()
def test_a_depth_of_two_gathers_two_units_ahead(num_gradients: int) -> None:
    """In the first step too; how many gradient slots there are changes no order that the CPU sees."""
    model: Any = deep_chain(Depth(2, num_gradients))
    assert_order(events_of(train, model), DEEP_STEP)
    assert_order(events_of(train, model), DEEP_STEP)
    report = model.memory_report()
    assert report.wasted_prefetches == report.evictions == 0
    assert report.spills == ()


@on_ranks()
def test_slots_take_turns_as_the_depth_says() -> None:
    """A gather slot for each unit ahead and one for that which runs; gradient slots as told. The root has its own."""
    model: Any = deep_chain(Depth(2, 3))
    train(model)
    units = model._engine().units
    for kind, num_slots in (("gather", 3), ("gradient", 3)):
        slots = [getattr(unit, f"{kind}_slot") for unit in units]
        shared = {slot.unit.name: sorted(other.unit.name for other in slot.neighbours) for slot in slots}
        assert shared["root"] == []
        assert len({slot.extent.segment for slot in slots}) == num_slots + 1, f"{kind}: {shared}"


@on_ranks()
def test_a_depth_of_three_gathers_only_what_has_no_room_at_the_turn() -> None:
    """Four slots for five blocks: e takes the bytes of a, the only one that backward gathers again, behind e's."""
    events = events_of(train, deep_chain(Depth(3, 3)))
    assert [e for e in events if e[0] == "gather"] == [
        *forward("gather root", "gather a", "gather b", "gather c", "gather d", "gather e"),
        *backward("gather a"),
    ]
    assert events.index(("gather", "a", "backward")) == events.index(("unshard", "d", "backward")) + 1


@on_ranks()
def test_prefetch_lists_of_the_user_win_over_the_depth() -> None:
    """In forward the root names b only; in backward d names nothing but a. All others gather two ahead."""
    model: Any = deep_chain(Depth(2, 2))
    model.set_modules_to_forward_prefetch([model.b])
    model.d.set_modules_to_backward_prefetch([model.a])
    events = events_of(train, model)
    assert_order(events[:6], forward("gather root", "unshard root", "gather b", "gather a", "unshard a", "gather c"))
    following = events[events.index(("unshard", "d", "backward")) + 1 :]
    assert_order(following[:1], backward("gather a"))


@on_ranks()
def test_a_block_skipped_at_a_depth_of_two_costs_its_gather_and_nothing_else() -> None:
    """Prevents: a deeper chain that gathers for a backward which does not come."""
    model = deep_chain(Depth(2, 2))
    train(model)
    events = events_of(train, model, "c")
    assert ("gather", "c", "backward") not in events
    assert_order([e for e in events if e[1] == "c"], [*forward("gather c", "release c")])
    assert_order(events_of(train, model), DEEP_STEP)


@on_ranks()
def test_over_peers_our_update_gathers_as_many_units_ahead_as_there_are_slots() -> None:
    model, ahead = deep_chain(Depth(2, 2), transport="peer"), forward("gather root", "gather a", "gather b", "gather c")
    train(model)
    assert_order(events_of(step_of_adamw(model)), ahead)
    assert_order(events_of(train, model), [e for e in DEEP_STEP if e not in ahead])


@on_ranks()
def test_frozen_units_are_gathered_but_not_reduced() -> None:
    model: Any = Parent(Block(), Block(), Block())
    model.b.requires_grad_(False)
    assert_order(events_of(train, sharded(model)), [e for e in CHAIN_STEP if e != ("reduce", "b", "backward")])


@on_ranks()
def test_unsynchronised_backwards_reduce_nothing_until_one_that_does() -> None:
    model: Any = chain()
    model.set_requires_gradient_sync(False)
    train(model)  # gives each unit a gradient slot of its own
    without = [e for e in CHAIN_STEP if e[0] != "reduce"]
    assert_order(events_of(train, model), without)
    model.set_requires_gradient_sync(True)
    assert_order(events_of(train, model), CHAIN_STEP)


@on_ranks(1)
def test_one_rank_does_the_same_as_two_that_never_share_bytes() -> None:
    """One class serves one rank and many: communication degenerates. A slot is the shard, which no other unit takes,
    so that not even a is gathered again.
    """
    assert_order(events_of(train, chain()), [e for e in CHAIN_STEP if e != ("gather", "a", "backward")])


# --- programs that leave the order ---


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        (
            "a",  # gathered for nothing; c, which shares its bytes, takes them over
            [
                *forward("gather root", "unshard root", "gather a"),
                *forward("gather b", "unshard b", "gather c", "rest b"),
                *forward("unshard c", "rest c"),
                *forward("keep root"),
                *backward("unshard root"),
                *backward("unshard c", "release c", "reduce c"),
                *backward("unshard b", "release b", "reduce b"),
                *backward("release root", "reduce root"),
            ],
        ),
        (
            "b",  # gathered for nothing; in backward a follows c, but must wait for the bytes that they share
            [
                *forward("gather root", "unshard root", "gather a"),
                *forward("unshard a", "gather b", "rest a"),
                *forward("gather c", "unshard c", "rest c"),
                *forward("keep root", "release b"),
                *backward("unshard root"),
                *backward("unshard c", "release c", "reduce c"),
                *backward("gather a", "unshard a", "release a", "reduce a"),
                *backward("release root", "reduce root"),
            ],
        ),
        (
            "c",  # gathered for nothing, over a, which backward needs again; dropped at the end of forward
            [
                *forward("gather root", "unshard root", "gather a"),
                *forward("unshard a", "gather b", "rest a"),
                *forward("unshard b", "gather c", "rest b"),
                *forward("keep root", "release c"),
                *backward("unshard root"),
                *backward("unshard b", "gather a", "release b", "reduce b"),
                *backward("unshard a", "release a", "reduce a"),
                *backward("release root", "reduce root"),
            ],
        ),
    ],
)
@on_ranks()
def test_a_block_skipped_in_forward_is_not_gathered_in_backward(skipped: str, expected: list[Event]) -> None:
    model = chain()
    assert_order(events_of(train, model, skipped), expected)
    assert_order(events_of(train, model), CHAIN_STEP)


@torch.no_grad()
def evaluate(model: nn.Module) -> None:
    model(rows())


@on_ranks()
def test_an_evaluation_releases_the_root_too() -> None:
    """Its backward will not come, and modules are to show the sharded parameters again. The next forward gathers all
    anew: weights may have been written in between by ways that nothing counts.
    """
    model = chain()
    assert CHAIN_FORWARD[-1:] == forward("keep root")
    assert_order(events_of(evaluate, model), [*CHAIN_FORWARD[:-1], *forward("rest root")])
    assert_order(events_of(evaluate, model), [*CHAIN_FORWARD[:-1], *forward("rest root")])
    assert_order(events_of(train, model), CHAIN_STEP)
    assert_order(events_of(train, model), CHAIN_STEP)


@on_ranks()
def test_after_an_update_the_next_forward_gathers_again_what_rested() -> None:
    """Prevents: a forward on the weights of the step before."""
    model: Any = chain()
    evaluate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_order(events_of(train, model), CHAIN_STEP)


def step_of_adamw(model: nn.Module) -> Callable[[], None]:
    """This package's optimizer with every gradient there, so that its step updates every unit whole."""
    optimizer = AdamW(model.parameters())
    model(rows()).sum().backward()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


@on_ranks()
def test_over_peers_our_update_gathers_the_first_units_of_the_next_forward() -> None:
    """As many as have bytes of their own: c would take those of a. Prevents: gathering them again in the forward."""
    model, ahead = chain(transport="peer"), forward("gather root", "gather a", "gather b")
    for _ in range(2):
        assert_order(events_of(step_of_adamw(model)), ahead)
        assert_order(events_of(train, model), [e for e in CHAIN_STEP if e not in ahead])
    assert_order(events_of(train, model), CHAIN_STEP)


@on_ranks()
def test_over_a_process_group_our_update_gathers_nothing() -> None:
    """Prevents: a collective in the optimizer's step, where ranks need not be in step with one another."""
    model = chain(transport="process_group")
    assert_order(events_of(step_of_adamw(model)), [])
    assert_order(events_of(train, model), CHAIN_STEP)


@on_ranks()
def test_after_an_update_the_next_forward_gathers_what_was_kept_again() -> None:
    model: Any = chain(reshard_after_forward=False)
    bias = model.bias  # the sharded one; the root's modules see the full one while it is kept
    evaluate(model)
    with torch.no_grad():
        bias.add_(1)
    assert_order(events_of(evaluate, model)[:2], forward("release root", "gather root"))


@on_ranks()
def test_evaluations_without_resharding_gather_once() -> None:
    model = chain(reshard_after_forward=False)
    evaluate(model)
    assert_order(
        events_of(evaluate, model),
        [
            *forward("unshard root", "unshard a", "keep a", "unshard b", "keep b", "unshard c", "keep c", "keep root"),
        ],
    )


@on_ranks()
def test_a_unit_recomputed_in_its_own_backward_is_not_gathered_again() -> None:
    assert_order(events_of(train, chain(recompute=True)), CHAIN_STEP)


class Segments(nn.Module):
    """Blocks a and b recomputed together, then c."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(), Block(), Block()

    def forward(self, x: torch.Tensor, skip: str = "") -> torch.Tensor:
        return self.c(checkpoint(lambda x: self.b(self.a(x)), x, use_reentrant=False))


@on_ranks()
def test_a_segment_recomputed_over_several_units_is_gathered_once_for_its_backward() -> None:
    """B's backward recomputes a, which stays gathered for its own. The root, without parameters, costs no collective.

    The root's output is c's own, so that c's backward starts first; no input of a needs a gradient, so that a and the
    root end with the whole backward.
    """
    model = Segments()
    for module in (*model.children(), model):
        ours.fully_shard(module, mesh=world_mesh(), reshard_after_forward=True)
    train(model)
    assert_order(
        events_of(train, model),
        [
            *forward("gather root", "unshard root", "gather a"),
            *forward("unshard a", "gather b", "rest a"),
            *forward("unshard b", "gather c", "rest b"),
            *forward("unshard c", "rest c"),
            *forward("rest root"),
            *backward("unshard c"),
            *backward("unshard root"),
            *backward("release c", "reduce c"),
            *backward("unshard b", "gather a"),
            *backward("unshard a", "keep a"),  # recomputed
            *backward("release b", "reduce b"),
            *backward("unshard a"),
            *backward("release root", "release a", "reduce a"),
        ],
    )


@on_ranks()
def test_several_forwards_before_one_backward_reduce_once() -> None:
    """Each use is gathered for its own backward, unless what a use before left is still there; a unit's gradients are
    reduced after its last use.
    """
    model = chain()
    assert_order(
        events_of(lambda: (model(rows()) + model(rows())).sum().backward()),
        [
            *CHAIN_FORWARD,
            *CHAIN_FORWARD_AGAIN,
            *backward("unshard root"),
            *backward("unshard c", "release c"),
            *backward("unshard b", "gather a", "release b"),
            *backward("unshard a", "release a"),
            *backward("unshard root", "gather c"),
            *backward("unshard c", "gather b", "release c", "reduce c"),
            *backward("unshard b", "gather a", "release b", "reduce b"),
            *backward("unshard a", "release a", "reduce a"),
            *backward("release root", "reduce root"),
        ],
    )


@on_ranks()
def test_several_forwards_before_as_many_backwards_reduce_in_each() -> None:
    """The first backward releases every unit, so that the second gathers all again."""
    model = chain()

    def train_twice() -> None:
        for output in (model(rows()), model(rows())):
            output.sum().backward()

    assert_order(
        events_of(train_twice),
        [
            *CHAIN_FORWARD,
            *CHAIN_FORWARD_AGAIN,
            *CHAIN_BACKWARD,
            *backward("gather root", "unshard root", "gather c"),
            *backward("unshard c", "gather b", "release c", "reduce c"),
            *backward("unshard b", "gather a", "release b", "reduce b"),
            *backward("unshard a", "release a", "reduce a"),
            *backward("release root", "reduce root"),
        ],
    )


class Faulty(Block):
    """Fails on demand."""

    fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise ArithmeticError("asked for")
        return super().forward(x)


@on_ranks()
def test_an_exception_in_forward_releases_everything() -> None:
    """B fails while c has been gathered ahead."""
    model: Any = sharded(Parent(Block(), Faulty(), Block()))
    model.b.fails = True
    with recording() as events, pytest.raises(ArithmeticError, match="asked for"):
        train(model)
    assert_order(
        events,
        [
            *forward("gather root", "unshard root", "gather a"),
            *forward("unshard a", "gather b", "rest a"),
            *forward("unshard b", "gather c", "rest b"),
            *forward("keep root", "release root", "release c"),
        ],
    )
    model.b.fails = False
    assert_order(events_of(train, model), CHAIN_STEP)


# --- collectives ---


@pytest.mark.parametrize(
    ("reshard_after_forward", "all_gathers"),
    [
        (None, 4 + 1),  # a forward gathers the root and three blocks; backward the one whose bytes were taken
        (True, 4 + 1),
        (False, 4),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
@on_ranks()
def test_a_step_costs_one_collective_for_each_gather_and_each_reduction(
    recompute: bool, reshard_after_forward: bool | None, all_gathers: int
) -> None:
    """Prevents: a collective per parameter, or one for what ranks could know without asking."""
    model = chain(recompute, reshard_after_forward=reshard_after_forward)
    assert_collectives({"all-gather": all_gathers, "reduce-scatter": 4}, train, model)


@pytest.mark.parametrize(("reshard_after_forward", "all_gathers"), [(True, 5), (False, 4)])
@on_ranks()
def test_a_skipped_block_costs_the_gather_that_was_ahead_and_no_more(
    reshard_after_forward: bool, all_gathers: int
) -> None:
    model = chain(reshard_after_forward=reshard_after_forward)
    assert_collectives({"all-gather": all_gathers, "reduce-scatter": 3}, train, model, "b")


@on_ranks()
def test_an_evaluation_costs_one_collective_a_unit() -> None:
    model = chain(reshard_after_forward=True)
    assert_collectives({"all-gather": 4}, evaluate, model)
    assert_collectives({"all-gather": 4}, evaluate, model)


@on_ranks(1)
def test_one_rank_needs_no_collective() -> None:
    model = chain()
    assert_collectives({}, train, model)
    assert_collectives({}, evaluate, model)
