"""What the engine does in a training step, in order: literal lists of `(operation, unit, phase)`."""

from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from tests.laws.recording import (
    CHAIN_BACKWARD,
    CHAIN_FORWARD,
    CHAIN_FORWARD_AGAIN,
    CHAIN_STEP,
    Event,
    Parent,
    assert_collectives,
    assert_order,
    backward,
    chain,
    evaluate,
    events_of,
    forward,
    recording,
    rows,
    sharded,
    step_of_adamw,
    train,
)
from tests.ranks import on_ranks
from tests.training import ours, world_mesh
from tests.zoo import Block

# --- one training step ---


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
        [*CHAIN_FORWARD[:-1], *forward("release_but_keep root"), *CHAIN_BACKWARD],
    )


@on_ranks()
def test_without_resharding_nothing_is_gathered_in_backward() -> None:
    assert_order(
        events_of(train, chain(reshard_after_forward=False)),
        [
            *forward("all_gather root", "unshard root", "all_gather a"),
            *forward("unshard a", "all_gather b", "keep a"),
            *forward("unshard b", "all_gather c", "keep b"),
            *forward("unshard c", "keep c"),
            *forward("keep root"),
            *backward("unshard root"),
            *backward("unshard c", "release c", "reduce_scatter c"),
            *backward("unshard b", "release b", "reduce_scatter b"),
            *backward("unshard a", "release a", "reduce_scatter a"),
            *backward("release root", "reduce_scatter root"),
        ],
    )


@on_ranks()
def test_nested_parents_start_before_their_children_and_end_after() -> None:
    """B takes the bytes of a.a, the only one that backward gathers again."""
    assert_order(
        events_of(train, sharded(Parent(Parent(Block(), Block()), Block()))),
        [
            *forward("all_gather root", "unshard root", "all_gather a"),
            *forward("unshard a", "all_gather a.a"),
            *forward("unshard a.a", "all_gather a.b", "release_but_keep a.a"),
            *forward("unshard a.b", "all_gather b", "release_but_keep a.b"),
            *forward("release_but_keep a"),
            *forward("unshard b", "release_but_keep b"),
            *forward("keep root"),
            *backward("unshard root"),
            *backward("unshard b", "release b", "reduce_scatter b"),
            *backward("unshard a"),
            *backward("unshard a.b", "all_gather a.a", "release a.b", "reduce_scatter a.b"),
            *backward("unshard a.a", "release a.a", "reduce_scatter a.a"),
            *backward("release a", "reduce_scatter a"),
            *backward("release root", "reduce_scatter root"),
        ],
    )


@on_ranks()
def test_explicit_prefetch_lists_gather_two_ahead() -> None:
    """Set before the first forward, lists widen the plan: for all three units, so that backward gathers none again."""
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
            *forward("all_gather root", "unshard root", "all_gather a", "all_gather b"),
            *forward("unshard a", "all_gather c", "release_but_keep a"),
            *forward("unshard b", "release_but_keep b"),
            *forward("unshard c", "release_but_keep c"),
            *forward("keep root"),
            *backward("unshard root"),
            *backward("unshard c", "release c", "reduce_scatter c"),
            *backward("unshard b", "release b", "reduce_scatter b"),
            *backward("unshard a", "release a", "reduce_scatter a"),
            *backward("release root", "reduce_scatter root"),
        ],
    )


@on_ranks()
def test_frozen_units_are_gathered_but_not_reduced() -> None:
    model: Any = Parent(Block(), Block(), Block())
    model.b.requires_grad_(False)
    assert_order(events_of(train, sharded(model)), [e for e in CHAIN_STEP if e != ("reduce_scatter", "b", "backward")])


@on_ranks()
def test_unsynchronised_backwards_reduce_nothing_until_one_that_does() -> None:
    model: Any = chain()
    model.set_requires_gradient_sync(False)
    train(model)  # gives each unit a gradient slot of its own
    without = [e for e in CHAIN_STEP if e[0] != "reduce_scatter"]
    assert_order(events_of(train, model), without)
    model.set_requires_gradient_sync(True)
    assert_order(events_of(train, model), CHAIN_STEP)


@on_ranks(1)
def test_one_rank_does_the_same_as_two_that_never_share_bytes() -> None:
    """Prevents: another code path for one rank. A slot is the shard, so that not even a is gathered again."""
    assert_order(events_of(train, chain()), [e for e in CHAIN_STEP if e != ("all_gather", "a", "backward")])


# --- programs that leave the order ---


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        (
            "a",  # gathered for nothing; c, which shares its bytes, takes them over
            [
                *forward("all_gather root", "unshard root", "all_gather a"),
                *forward("all_gather b", "unshard b", "all_gather c", "release_but_keep b"),
                *forward("unshard c", "release_but_keep c"),
                *forward("keep root"),
                *backward("unshard root"),
                *backward("unshard c", "release c", "reduce_scatter c"),
                *backward("unshard b", "release b", "reduce_scatter b"),
                *backward("release root", "reduce_scatter root"),
            ],
        ),
        (
            "b",  # gathered for nothing; in backward a follows c, but must wait for the bytes that they share
            [
                *forward("all_gather root", "unshard root", "all_gather a"),
                *forward("unshard a", "all_gather b", "release_but_keep a"),
                *forward("all_gather c", "unshard c", "release_but_keep c"),
                *forward("keep root", "release b"),
                *backward("unshard root"),
                *backward("unshard c", "release c", "reduce_scatter c"),
                *backward("all_gather a", "unshard a", "release a", "reduce_scatter a"),
                *backward("release root", "reduce_scatter root"),
            ],
        ),
        (
            "c",  # gathered for nothing, over a, which backward needs again; dropped at the end of forward
            [
                *forward("all_gather root", "unshard root", "all_gather a"),
                *forward("unshard a", "all_gather b", "release_but_keep a"),
                *forward("unshard b", "all_gather c", "release_but_keep b"),
                *forward("keep root", "release c"),
                *backward("unshard root"),
                *backward("unshard b", "all_gather a", "release b", "reduce_scatter b"),
                *backward("unshard a", "release a", "reduce_scatter a"),
                *backward("release root", "reduce_scatter root"),
            ],
        ),
    ],
)
@on_ranks()
def test_a_block_skipped_in_forward_is_not_gathered_in_backward(skipped: str, expected: list[Event]) -> None:
    model = chain()
    assert_order(events_of(train, model, skipped), expected)
    assert_order(events_of(train, model), CHAIN_STEP)


@on_ranks()
def test_an_evaluation_releases_the_root_too() -> None:
    """No backward follows, so modules register the sharded parameters again.

    The next forward gathers all anew: weights may have been written in between in ways that nothing counts.
    """
    model = chain()
    assert CHAIN_FORWARD[-1:] == forward("keep root")
    assert_order(events_of(evaluate, model), [*CHAIN_FORWARD[:-1], *forward("release_but_keep root")])
    assert_order(events_of(evaluate, model), [*CHAIN_FORWARD[:-1], *forward("release_but_keep root")])
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


@on_ranks()
def test_over_peers_our_update_gathers_the_first_units_of_the_next_forward() -> None:
    """As many as have bytes of their own: c would take those of a. Prevents: gathering them again in the forward."""
    model, ahead = chain(transport="peer"), forward("all_gather root", "all_gather a", "all_gather b")
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
    assert_order(events_of(evaluate, model)[:2], forward("release root", "all_gather root"))


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
            *forward("all_gather root", "unshard root", "all_gather a"),
            *forward("unshard a", "all_gather b", "release_but_keep a"),
            *forward("unshard b", "all_gather c", "release_but_keep b"),
            *forward("unshard c", "release_but_keep c"),
            *forward("release_but_keep root"),
            *backward("unshard c"),
            *backward("unshard root"),
            *backward("release c", "reduce_scatter c"),
            *backward("unshard b", "all_gather a"),
            *backward("unshard a", "keep a"),  # recomputed
            *backward("release b", "reduce_scatter b"),
            *backward("unshard a"),
            *backward("release root", "release a", "reduce_scatter a"),
        ],
    )


@on_ranks()
def test_several_forwards_before_one_backward_reduce_once() -> None:
    """A unit's gradients are reduced after its last use.

    Each use is gathered for its own backward, unless the values of a use before are still there.
    """
    model = chain()
    assert_order(
        events_of(lambda: (model(rows()) + model(rows())).sum().backward()),
        [
            *CHAIN_FORWARD,
            *CHAIN_FORWARD_AGAIN,
            *backward("unshard root"),
            *backward("unshard c", "release c"),
            *backward("unshard b", "all_gather a", "release b"),
            *backward("unshard a", "release a"),
            *backward("unshard root", "all_gather c"),
            *backward("unshard c", "all_gather b", "release c", "reduce_scatter c"),
            *backward("unshard b", "all_gather a", "release b", "reduce_scatter b"),
            *backward("unshard a", "release a", "reduce_scatter a"),
            *backward("release root", "reduce_scatter root"),
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
            *backward("all_gather root", "unshard root", "all_gather c"),
            *backward("unshard c", "all_gather b", "release c", "reduce_scatter c"),
            *backward("unshard b", "all_gather a", "release b", "reduce_scatter b"),
            *backward("unshard a", "release a", "reduce_scatter a"),
            *backward("release root", "reduce_scatter root"),
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
            *forward("all_gather root", "unshard root", "all_gather a"),
            *forward("unshard a", "all_gather b", "release_but_keep a"),
            *forward("unshard b", "all_gather c", "release_but_keep b"),
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
    """Prevents: a reduction per parameter, or a collective for what ranks could know without asking."""
    model = chain(recompute, reshard_after_forward=reshard_after_forward)
    assert_collectives({"all-gather": all_gathers, "reduce-scatter": 4}, train, model)


@on_ranks()
def test_no_mode_that_counts_collectives_sees_ranks_compare_their_plans() -> None:
    """Prevents: more collectives than units in the first step, for who counts them by CommDebugMode."""
    assert_collectives({"all-gather": 4 + 1, "reduce-scatter": 4}, chain)


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
