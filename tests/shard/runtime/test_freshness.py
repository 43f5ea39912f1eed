"""When a compute shard has to be cast: after every write to main shards, whether PyTorch counted it or not."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from yafsdp_like.shard.runtime.freshness import Freshness


@dataclass
class Main:
    """One parameter's tensors, as `Freshness` sees them."""

    sharded: torch.Tensor
    local: torch.Tensor


def two() -> tuple[Freshness, list[Main]]:
    params = [Main(torch.zeros(2), torch.zeros(2)) for _ in range(2)]
    return Freshness(params), params


def test_only_an_update_makes_a_compute_shard_current_and_only_until_the_forward_ends() -> None:
    freshness, params = two()
    assert not freshness.is_current()
    freshness.compute_shard_written()
    assert not freshness.is_current(), "cast by a forward, and written uncounted since, for all we know"
    freshness.updated(params)
    assert freshness.is_current()
    freshness.forward_ended()
    assert not freshness.is_current()


@pytest.mark.parametrize(
    "write",
    [
        lambda freshness, params: freshness.main_shard_moved(),
        lambda freshness, params: freshness.main_shards_written(),
        lambda freshness, params: params[1].sharded.add_(1),
        lambda freshness, params: params[0].local.add_(1),
        lambda freshness, params: freshness.compute_shard_lost(),
    ],
)
def test_any_write_after_an_update_asks_for_a_cast(write: Callable[[Freshness, list[Main]], object]) -> None:
    freshness, params = two()
    freshness.updated(params)
    gathered = freshness.compute_version
    assert gathered == freshness.main_version()
    write(freshness, params)
    assert not freshness.is_current()
    assert freshness.compute_version != freshness.main_version()
    freshness.updated(params)
    assert freshness.is_current()
