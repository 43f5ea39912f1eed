"""The state of slots, without a model: what a writer of shared bytes waits for, and what is left in them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import FlatLayout, Segment
from yafsdp_like.memory.plan import Region
from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot, SlotState, find_neighbours


def unit(**fields: Any) -> Any:
    return SimpleNamespace(
        params=[], trainable=[], freshness=SimpleNamespace(compute_version=(7,), gathered=lambda: (0, [])), **fields
    )


def slots_on_one_region(*parts: Segment) -> list[GatherSlot]:
    arena = Arena(torch.device("cpu"))
    arena.reserve([Region("slots", "gather slots", 1024)])
    slots = [GatherSlot(unit(), [], arena.place("slots").part(part)) for part in parts]
    find_neighbours(slots)
    return slots


def test_slots_that_share_bytes_are_neighbours_and_others_are_not() -> None:
    first, second, apart = slots_on_one_region(Segment(0, 512), Segment(256, 512), Segment(768, 256))
    assert first.neighbours == [second] and second.neighbours == [first] and apart.neighbours == []
    first.forget_neighbours()
    assert first.neighbours == []


def test_a_writer_waits_once_for_the_last_access_to_its_bytes() -> None:
    first, second, apart = slots_on_one_region(Segment(0, 512), Segment(256, 512), Segment(768, 256))
    for slot, event in ((first, "first"), (second, "second"), (apart, "apart")):
        slot.hold()
        slot.release(event)
    assert second.last_accesses() == ["second", "first"]
    assert first.last_accesses() == [] and apart.last_accesses() == ["apart"]
    first.release("again")
    first.forget_events()
    assert second.last_accesses() == []


def test_a_gathered_slot_has_the_version_of_the_compute_shards_it_was_gathered_from() -> None:
    (slot,) = slots_on_one_region(Segment(0, 512))
    slot.fill("arrived", kept=False)
    assert (slot.state, slot.ready, slot.version) == (SlotState.FILLED, "arrived", (7,))
    slot.rewind(is_filled=False)
    assert slot.state is SlotState.EMPTY


@pytest.mark.parametrize("left", [set(), {1}])
def test_a_gradient_slot_is_free_once_all_that_it_holds_is_reduced(left: set[int]) -> None:
    slot = GradientSlot(unit(), None, FlatLayout.pack([]))
    slot.hold()
    slot.holds.update({0, *left})
    slot.arrive(0, task=3)
    slot.reduced([0])
    slot.release("done")
    assert slot.state is (SlotState.HELD if left else SlotState.EMPTY)
    assert (slot.holds, slot.arrived, slot.last_accesses()) == (left, {}, ["done"])
    slot.drop()
    assert slot.state is SlotState.EMPTY and not slot.holds
