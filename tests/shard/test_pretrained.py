"""`save_pretrained` of a sharded model has its class's arguments; transformers' own is in tests/models/test_hf.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from yafsdp_like import fully_shard

if TYPE_CHECKING:
    from pathlib import Path


class Adapted(torch.nn.Linear):
    """As peft's models: weights are one of the other arguments, and the second one is something else."""

    def save_pretrained(self, directory: Path, safe: bool = True, chosen: Any = None, **others: Any) -> Any:
        return directory, safe, chosen, others


def saved_by_another_signature() -> None:
    model: Any = fully_shard(Adapted(2, 2))
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    assert model.save_pretrained("here", False, state_dict=whole) == ("here", False, None, {"state_dict": whole})
    assert model.save_pretrained("here", chosen=["a"], state_dict=whole, push=1)[2:] == (
        ["a"],
        {"state_dict": whole, "push": 1},
    )
    with pytest.raises(RuntimeError, match="got no state_dict"):
        model.save_pretrained("here", chosen=["a"])


class Third(torch.nn.Linear):
    """As transformers' models: weights are the third argument."""

    def save_pretrained(self, directory: str, is_main: bool = True, state_dict: Any = None, push: int = 0) -> Any:
        return directory, is_main, sorted(state_dict), push


class Stateless(torch.nn.Linear):
    """Saves what it has itself."""

    def save_pretrained(self, directory: str) -> None:
        raise AssertionError("what it has are parts")


def saved_alone_by_position() -> None:
    model: Any = fully_shard(Third(2, 2))
    expected = ("here", False, ["bias", "weight"], 0)
    assert model.save_pretrained("here", False) == expected
    assert model.save_pretrained("here", False, None) == expected
    assert model.save_pretrained("here", False, None, 1) == (*expected[:3], 1)
    assert model.save_pretrained(push=1, directory="here") == ("here", True, ["bias", "weight"], 1)
    other: Any = fully_shard(Adapted(2, 2))
    assert sorted(other.save_pretrained("here", False, ["a"], push=1)[3]) == ["push", "state_dict"]
    stateless: Any = fully_shard(Stateless(2, 2))
    with pytest.raises(RuntimeError, match="takes no state_dict"):
        stateless.save_pretrained("here")


def test_a_model_of_peft_is_saved_by_its_own_signature() -> None:
    """Prevents: weights that arrived as its third argument, the names of adapters to save."""
    run_ranks(saved_by_another_signature)
    run_ranks(saved_alone_by_position, world_size=1)


def test_a_module_that_has_no_save_pretrained_gets_none() -> None:
    (has,) = run_ranks(has_save_pretrained, world_size=1)
    assert not has


def has_save_pretrained() -> bool:
    return hasattr(fully_shard(nn.Linear(4, 4)), "save_pretrained")
