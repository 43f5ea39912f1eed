"""Norms of gradients of which some rank has no rows: right, or the same error, on every rank."""

import math
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.ranks import on_ranks, run_ranks
from tests.training import full, ours, world_mesh


def pair() -> list[Any]:
    """A sharded and an unsharded model of parameters of 1, 4 and 5 rows, with gradients."""
    models = []
    for sharded in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 5), nn.Linear(5, 4))
        if sharded:
            ours.fully_shard(model[0], mesh=world_mesh())
            ours.fully_shard(model, mesh=world_mesh())
        model(torch.ones(2, 3)).square().sum().backward()
        models.append(model)
    return models


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_norm_is_that_of_all_rows(world_size: int) -> None:
    """Prevents: the largest norm of no rows, an error of one rank, for which the others wait."""
    run_ranks(compare_norms, world_size=world_size)


def compare_norms() -> None:
    for norm_type in (math.inf, -math.inf, 1.0, 2.0):
        for foreach in (None, False):
            models = pair()
            norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type, foreach=foreach) for model in models]
            torch.testing.assert_close(full(norms[0]), norms[1])
            for sharded, plain in zip(*(model.parameters() for model in models), strict=True):
                torch.testing.assert_close(full(sharded.grad), plain.grad)


@pytest.mark.parametrize("norm_type", [math.inf, 2.0])
@on_ranks()
def test_a_norm_that_is_not_finite_is_an_error_on_every_rank(norm_type: float) -> None:
    """Prevents: an error of the rank alone that has the bad row."""
    model = pair()[0]
    with torch.no_grad():
        model[0].weight.grad.mul_(math.inf)  # one row, that of rank 0
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type, error_if_nonfinite=True)
