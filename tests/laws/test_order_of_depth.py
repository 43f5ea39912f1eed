"""What the engine does in a training step, in order, when it gathers more than one unit ahead."""

from typing import Any

import pytest
import torch.nn as nn

from tests.laws.recording import (
    Parent,
    assert_order,
    backward,
    events_of,
    forward,
    step_of_adamw,
    train,
)
from tests.ranks import on_ranks
from tests.training import ours, world_mesh
from tests.zoo import Block
from yafsdp_like.shard.depth import Depth


def deep_chain(depth: Depth, **options: Any) -> nn.Module:
    """Blocks a to e below a root with parameters; the plan has room for `depth`."""
    model: Any = Parent(*(Block() for _ in range(5)))
    for module in (*model.children(), model):
        ours.fully_shard(module, mesh=world_mesh(), **options)
    model._engine().depth = depth
    return model


# Three slots: a and d share one, and b and e. At the turn c, d and e are still where forward left them.
DEEP_FORWARD = [
    *forward("all_gather root", "unshard root", "all_gather a", "all_gather b"),
    *forward("unshard a", "all_gather c", "release_but_keep a"),
    *forward("unshard b", "all_gather d", "release_but_keep b"),
    *forward("unshard c", "all_gather e", "release_but_keep c"),
    *forward("unshard d", "release_but_keep d"),
    *forward("unshard e", "release_but_keep e"),
    *forward("keep root"),
]
DEEP_STEP = [
    *DEEP_FORWARD,
    *backward("unshard root"),
    *backward("unshard e", "release e", "reduce_scatter e"),
    *backward("unshard d", "all_gather b", "release d", "reduce_scatter d"),
    *backward("unshard c", "all_gather a", "release c", "reduce_scatter c"),
    *backward("unshard b", "release b", "reduce_scatter b"),
    *backward("unshard a", "release a", "reduce_scatter a"),
    *backward("release root", "reduce_scatter root"),
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
    """A gather slot for each unit ahead and one for that which runs; gradient slots by the depth; the root has its."""
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
    assert [e for e in events if e[0] == "all_gather"] == [
        *forward("all_gather root", "all_gather a", "all_gather b", "all_gather c", "all_gather d", "all_gather e"),
        *backward("all_gather a"),
    ]
    assert events.index(("all_gather", "a", "backward")) == events.index(("unshard", "d", "backward")) + 1


@on_ranks()
def test_prefetch_lists_of_the_user_win_over_the_depth() -> None:
    """In forward the root names b only; in backward d names nothing but a. All others gather two ahead."""
    model: Any = deep_chain(Depth(2, 2))
    model.set_modules_to_forward_prefetch([model.b])
    model.d.set_modules_to_backward_prefetch([model.a])
    events = events_of(train, model)
    assert_order(
        events[:6],
        forward("all_gather root", "unshard root", "all_gather b", "all_gather a", "unshard a", "all_gather c"),
    )
    following = events[events.index(("unshard", "d", "backward")) + 1 :]
    assert_order(following[:1], backward("all_gather a"))


@on_ranks()
def test_a_block_skipped_at_a_depth_of_two_costs_its_gather_and_nothing_else() -> None:
    """Prevents: a deeper chain that gathers for a backward which does not come."""
    model = deep_chain(Depth(2, 2))
    train(model)
    events = events_of(train, model, "c")
    assert ("all_gather", "c", "backward") not in events
    assert_order([e for e in events if e[1] == "c"], [*forward("all_gather c", "release c")])
    assert_order(events_of(train, model), DEEP_STEP)


@on_ranks()
def test_over_peers_our_update_gathers_as_many_units_ahead_as_there_are_slots() -> None:
    model, ahead = (
        deep_chain(Depth(2, 2), transport="peer"),
        forward("all_gather root", "all_gather a", "all_gather b", "all_gather c"),
    )
    train(model)
    assert_order(events_of(step_of_adamw(model)), ahead)
    assert_order(events_of(train, model), [e for e in DEEP_STEP if e not in ahead])
