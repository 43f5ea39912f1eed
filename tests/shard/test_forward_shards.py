"""`reshard_after_forward` as a number: groups of so many ranks keep parameters together from forward to backward."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.ranks import on_ranks, run_ranks
from tests.training import Recipe, Run, assert_close, assert_same_bits, full_parameters, train, world_mesh
from tests.twins import Twins, chain
from tests.zoo import FEATURES, Chain, blocks
from yafsdp_like import fully_shard
from yafsdp_like.comm.process_group import ProcessGroupTransport

both_transports = pytest.mark.parametrize("transport", [pytest.param("process_group", marks=pytest.mark.slow), "peer"])


@contextmanager
def all_gathers() -> Iterator[list[int]]:
    """The numbers of ranks of the all-gathers inside, in order."""
    found: list[int] = []
    run = ProcessGroupTransport._all_gather

    def note(self: ProcessGroupTransport, pieces: Any) -> None:
        found.extend([self.world_size] * bool(pieces))
        run(self, pieces)

    with mock.patch.object(ProcessGroupTransport, "_all_gather", note):
        yield found


@both_transports
@pytest.mark.parametrize("name", ["nested", pytest.param("decoder", marks=pytest.mark.slow)])
def test_training_with_a_number_has_the_bits_of_training_with_true(name: str, transport: str) -> None:
    """Prevents: a backward on parts in the wrong order, or on those of another step."""
    for few, every in run_ranks(train_both, name, transport, world_size=4):
        assert_same_bits(few, every)


def train_both(name: str, transport: str) -> list[Run]:
    recipe = Recipe(steps=2, micro_batches=2, transport=transport)
    return [train(name, "ours", replace(recipe, reshard_after_forward=n)) for n in (2, True)]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_training_with_a_number_agrees_with_stock(num_ranks: int) -> None:
    """Close, since sums of four ranks depend on how gradients lie together."""
    for ours, theirs in run_ranks(train_stock_too, num_ranks, world_size=4):
        assert_close(ours, theirs)


def train_stock_too(num_ranks: int) -> list[Run]:
    recipe = Recipe(steps=4, reshard_after_forward=num_ranks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="reshard_after_forward=1 keeps full parameters")
        return [train("nested", implementation, recipe) for implementation in ("ours", "stock")]


@on_ranks(4)
def test_only_few_ranks_all_gather_for_backward_and_the_plan_counts_what_they_keep() -> None:
    """Prevents: a number that is taken for True, and bytes that no plan has."""
    model: Any = Chain(blocks(3))
    layers = list(model.layers)
    for layer in layers:
        fully_shard(layer, mesh=world_mesh(), reshard_after_forward=2)
    fully_shard(model, mesh=world_mesh())
    numel = sum(-(-p.shape[0] // 4) * 2 * p[0].numel() for layer in layers for p in full_parameters(layer).values())
    aligned_nbytes = model.memory_plan().nbytes_of("forward shards")
    assert numel * 4 <= aligned_nbytes < numel * 4 + 256 * 4 * len(layers)
    with all_gathers() as found:
        loss = model(torch.ones(2, FEATURES)).sum()
        assert found == [4, 4, 4]
        assert all(isinstance(p, DTensor) for p in model.parameters())
        loss.backward()
        assert found == [4, 4, 4, 2]  # two slots still have their values
        with torch.no_grad():
            model(torch.ones(2, FEATURES))
        assert found[4:] == [4, 4, 4]
        model.set_reshard_after_forward(True)
        model(torch.ones(2, FEATURES)).sum().backward()
        assert found[7:] == [4, 4, 4, 4]


@on_ranks(4)
def test_weights_changed_between_forwards_are_not_taken_from_what_was_kept() -> None:
    """Prevents: the backward of a step on what the forward of an earlier one left, and a debug mode that refuses."""
    twins = Twins(chain, reshard_after_forward=2, debug=True)
    for step in range(3):
        twins.losses(step)  # of a graph that no backward follows
        twins.train(step)
    twins.compare_parameters()


@on_ranks(2)
def test_numbers_that_do_not_divide_the_ranks_are_errors_and_all_and_one_are_true_and_false() -> None:
    for wrong in (0, 3, -2):
        with pytest.raises(ValueError, match=f"should be a factor of 2, not {wrong}"):
            fully_shard(nn.Linear(2, 2), mesh=world_mesh(), reshard_after_forward=wrong)
    with pytest.raises(ValueError, match=r"should be a bool or an int .* not 2.5"):
        fully_shard(nn.Linear(2, 2), mesh=world_mesh(), reshard_after_forward=2.5)  # type: ignore[call-overload]
    with pytest.warns(UserWarning, match="keeps full parameters, as False does"):
        kept = fully_shard(nn.Linear(2, 2), mesh=world_mesh(), reshard_after_forward=1)
    resharded = fully_shard(nn.Linear(2, 2), mesh=world_mesh(), reshard_after_forward=2)
    for model, is_sharded in ((kept, False), (resharded, True)):
        model(torch.ones(2, 2))
        assert isinstance(model.weight, DTensor) == is_sharded
        assert model.memory_plan().nbytes_of("forward shards") == 0
