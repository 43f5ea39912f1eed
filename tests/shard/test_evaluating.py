"""A model that only evaluates has no memory for gradients; one that trains gets it then, with the same numbers."""

from typing import Any

import pytest
import torch

from tests.ranks import on_ranks
from tests.shard.test_optimizer_step import TRANSPORTS
from tests.training import ours, world_mesh
from tests.twins import Twins
from tests.zoo import SPECIMENS

transports = pytest.mark.parametrize("transport", TRANSPORTS)
GRADIENTS = {"grad_shard", "gradient slots"}


def nbytes_of_gradients(model: Any) -> int:
    plan = model.memory_plan()
    assert plan.nbytes == model.memory_report().arena_nbytes
    return sum(region.nbytes for region in plan.regions if region.kind in GRADIENTS)


@transports
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@on_ranks()
def test_a_model_that_only_evaluates_has_no_room_for_gradients(mode: Any, transport: Any) -> None:
    twins = Twins(SPECIMENS["nested"], transport=transport)
    planned = twins.sharded.memory_plan()
    assert sum(region.nbytes for region in planned.regions if region.kind in GRADIENTS) > 0
    for step in range(2):
        with mode():
            twins.losses(step)
        assert nbytes_of_gradients(twins.sharded) == 0
    assert twins.sharded.memory_plan().nbytes < planned.nbytes
    twins.train(2, 3)
    assert twins.sharded.memory_plan() == planned
    with mode():
        twins.losses(4)
    assert nbytes_of_gradients(twins.sharded) > 0
    twins.train(5)
    twins.compare_parameters()


@transports
@on_ranks()
def test_a_backward_inside_an_evaluation_has_room_in_the_next_one(transport: Any) -> None:
    """Prevents: gradients of a forward that turned grad mode on by itself being lost without a word."""
    twins = Twins(SPECIMENS["nested"], transport=transport)
    with torch.no_grad():
        twins.losses(0)
        twins.sharded.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None)
        twins.plain.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None)
        with pytest.raises(RuntimeError, match="began without grad mode"):
            twins.backward(1)
    with torch.no_grad():
        for parameter in twins.parameters[1].values():
            parameter.grad = None
        twins.backward(2)
    twins.step()


@transports
@on_ranks()
def test_a_model_trains_after_one_of_its_units_was_evaluated_alone(transport: Any) -> None:
    """Prevents: a root that takes over a unit without room for gradients, and does not know."""
    twins = Twins(SPECIMENS["decoder"], transport=transport)
    with torch.no_grad():
        twins.sharded.layers[0](torch.zeros(1, 2, 12))
    twins.train(0, 1)
    assert nbytes_of_gradients(twins.sharded) > 0


@transports
@on_ranks()
def test_a_model_may_be_sharded_and_cast_in_inference_mode_and_trained_after_it(transport: Any) -> None:
    """Prevents: parameters that count no writes, which stops the first forward, and which nothing can train."""
    twins = Twins(SPECIMENS["nested"], transport=transport)
    with torch.inference_mode():
        specimen = SPECIMENS["nested"]
        twins.sharded = specimen.wrap(specimen.fresh(), ours.fully_shard, mesh=world_mesh(), transport=transport)
        twins.losses(0)
        twins.sharded.double().float()
        twins.losses(1)
    twins.parameters[0] = dict(twins.sharded.named_parameters())
    twins.optimizers[0] = torch.optim.SGD(twins.parameters[0].values(), lr=0.1, momentum=0.9)
    twins.train(2, 3)
    twins.compare_parameters()
