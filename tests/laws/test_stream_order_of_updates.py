"""Law 3, stream order, of updates: in backward and after it, with offloaded moments, and of split masters."""

import re
from typing import Any

import pytest

from tests.clocks import Omission
from tests.laws.test_stream_order import ALL_WAITS, MODELS, train
from tests.ranks import run_ranks
from yafsdp_like import RemainderOffloadPolicy
from yafsdp_like.memory.streams import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE

pytestmark = pytest.mark.slow

OFFLOAD_WAITS = {(HOST_TO_DEVICE, DEVICE_TO_HOST), (COMPUTE, HOST_TO_DEVICE), (DEVICE_TO_HOST, COMPUTE)}


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_copies_of_offloaded_moments_are_ordered_beside_everything_else(transport: str, updates: int) -> None:
    options = {"own_optimizer": True, "offload_moments": True, "transport": transport, "updates": updates}
    for found in run_ranks(train, "decoder", **options):
        assert found.races == []
        assert set(found.waits) == ALL_WAITS | OFFLOAD_WAITS


@pytest.mark.parametrize("forgotten", sorted(OFFLOAD_WAITS))
def test_each_wait_of_an_offloaded_update_is_needed(forgotten: tuple[str, str]) -> None:
    assert run_ranks(train, "decoder", [forgotten], own_optimizer=True, offload_moments=True)[0].races


@pytest.mark.parametrize("updates", [1, 2])
def test_copies_of_offloaded_remainders_are_ordered_beside_everything_else(updates: int) -> None:
    """Also of values that users wrote, which the CPU settles; over peers it does so on a stream that is not watched."""
    options = {"split_master": True, "offload_policy": RemainderOffloadPolicy(), "transport": "process_group"}
    for found in run_ranks(train, "nested", own_optimizer=True, offload_moments=True, updates=updates, **options):
        assert found.races == []
        assert set(found.waits) >= OFFLOAD_WAITS


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_updates_that_gather_ahead_are_ordered(transport: str, bf16: bool, updates: int) -> None:
    for found in run_ranks(train, "nested", bf16=bf16, own_optimizer=True, updates=updates, transport=transport):
        assert found.races == []


@pytest.mark.parametrize("own_optimizer", [True, False])
@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_writes_to_a_split_master_are_ordered(transport: str, own_optimizer: bool) -> None:
    """Prevents: an update, or values that the user wrote, in a compute shard that a gather still reads."""
    for found in run_ranks(train, "nested", own_optimizer=own_optimizer, transport=transport, split_master=True):
        assert found.races == []


@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("writes", ["before backward", "behind unshard"])
def test_writes_to_a_split_master_are_ordered_wherever_they_come(
    writes: str, in_backward: bool, transport: str
) -> None:
    options = {"own_optimizer": True, "in_backward": in_backward, "transport": transport, "split_master": True}
    for found in run_ranks(train, "nested", writes=writes, **options):
        assert found.races == []


@pytest.mark.parametrize(
    ("omission", "options", "race"),
    [
        (("_settle", "wait", 1), {"writes": "behind unshard"}, "copy_.* on compute does not wait for .* on gather"),
        (("publish", "wait", 2), {"transport": "peer"}, "a new owner on compute does not wait for .* on gather"),
        (
            ("_update", "wait", 1),
            {"writes": "before backward", "in_backward": True},
            "a new owner on compute does not wait for .* on reduce",
        ),
    ],
)
def test_leaving_out_a_wait_around_the_settling_of_a_split_master_is_found(
    omission: Omission, options: dict[str, Any], race: str
) -> None:
    """What an all-gather still reads would be overwritten, and what was written given to others before it is read."""
    for found in run_ranks(train, "nested", omits=omission, own_optimizer=True, split_master=True, **options):
        assert any(re.search(race, line) for line in found.races), sorted(set(found.races))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["decoder", "read after its gradient"])
def test_updating_in_backward_what_was_reduced_early_is_ordered(name: str, world_size: int) -> None:
    """On one rank the slot is the shard, which the update writes."""
    options = {"plant": "reduce_everything_early", "in_backward": True, "world_size": world_size}
    for found in run_ranks(train, name, transport="auto" if world_size == 1 else "peer", **options):
        assert found.races == []


def test_leaving_out_the_wait_for_a_unit_that_was_reduced_early_is_found() -> None:
    options = {"plant": "reduce_everything_early", "in_backward": True, "world_size": 1}
    (found,) = run_ranks(train, "read after its gradient", omits=("_update", "wait", 1), **options)
    assert any(re.search("adamw on reduce does not wait for .* on compute", line) for line in found.races)


@pytest.mark.parametrize(
    ("omission", "race"),
    [
        (("before_update", "wait", 1), "on compute does not wait for .* on gather"),
        (("before_update", "stream_barrier", 1), "on compute does not wait for gather on peer's gather"),
        (("after_update", "wait", 1), "gather on gather does not wait for .* on compute"),
        (("after_update", "stream_barrier", 1), "gather on peer's gather does not wait for .* on compute"),
    ],
)
def test_leaving_out_a_wait_or_a_stream_barrier_of_an_update_is_found(omission: Omission, race: str) -> None:
    """The second of two updates in a row writes what the first has just let be gathered."""
    for found in run_ranks(train, "decoder", omits=omission, transport="peer", own_optimizer=True, updates=2):
        assert any(re.search(race, line) for line in found.races), sorted(set(found.races))


@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("name", [*MODELS, "long"])
def test_updates_in_backward_are_ordered(name: str, transport: str) -> None:
    for found in run_ranks(train, name, in_backward=True, transport=transport):
        assert found.races == []
        assert found.num_accesses > 20, "the detector saw nothing"


@pytest.mark.parametrize("plant", ["update_beside_the_reduction", "forget_reductions"])
def test_an_update_in_backward_that_does_not_wait_for_the_reduction_or_is_not_waited_for_is_found(plant: str) -> None:
    for found in run_ranks(train, "decoder", in_backward=True, plant=plant):
        assert found.races


@pytest.mark.parametrize(
    ("left_out", "race"),
    [
        ({"plant": "forget_barriers_of_reductions"}, "adamw on reduce does not wait for gather on peer's gather"),
        ({"omits": ("_free_updated", "wait", 1)}, "a new owner on compute does not wait for adamw on reduce"),
    ],
)
def test_leaving_out_what_an_update_in_backward_relies_on_is_found(left_out: dict[str, Any], race: str) -> None:
    """A rank would write what peers still gather, and compute would write gradients that the update still reads."""
    for found in run_ranks(train, "long", in_backward=True, transport="peer", **left_out):
        assert race in found.races, sorted(set(found.races))
