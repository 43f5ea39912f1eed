"""FSDP2's function is this package's inside `in_place_of_fsdp2`, for whoever has imported it, and torch's after it."""

import sys
import types

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

import yafsdp_like
from tests.ranks import on_ranks
from yafsdp_like import in_place_of_fsdp2


def names(module: nn.Module) -> list[str]:
    return [f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__]


OURS = "yafsdp_like.shard.fsdp_module.FSDPModule"


@on_ranks(2)
def test_a_library_that_calls_fsdp2_gets_this_runtime_and_its_numbers() -> None:
    stock = torch.distributed.fsdp.fully_shard
    library = types.ModuleType("a library")  # as transformers does: bound when it was imported
    library.fully_shard = stock  # type: ignore[attr-defined]
    sys.modules[library.__name__] = library
    weights = []
    try:
        for options in (None, {"transport": "process_group"}):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            if options is None:
                library.fully_shard(model)
            else:
                with in_place_of_fsdp2(**options):
                    library.fully_shard(model[0])
                    torch.distributed.fsdp.fully_shard(model)
                    late = __import__("torch.distributed.fsdp", fromlist=["fully_shard"]).fully_shard
                    library.found_late = late  # type: ignore[attr-defined]
            assert (OURS in names(model)) is (options is not None)
            assert stock.state(model) is not None
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                model(torch.full((3, 4), float(step + torch.distributed.get_rank()))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            weights.append([value.full_tensor() for value in model.parameters()])
            assert torch.distributed.fsdp.fully_shard is stock and library.fully_shard is stock
    finally:
        del sys.modules[library.__name__]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@on_ranks(1)
def test_options_of_the_context_go_before_those_of_the_caller() -> None:
    with in_place_of_fsdp2(mp_policy=yafsdp_like.MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        model = torch.distributed.fsdp.fully_shard(nn.Linear(4, 4), mp_policy=yafsdp_like.MixedPrecisionPolicy())
    assert model(torch.ones(1, 4)).dtype == torch.bfloat16


def test_it_is_left_with_an_error_and_entered_once() -> None:
    stock = torch.distributed.fsdp.fully_shard
    with pytest.raises(RuntimeError, match="enter in_place_of_fsdp2 once"), in_place_of_fsdp2():
        assert torch.distributed.fsdp.fully_shard is not stock
        with in_place_of_fsdp2():
            pass
    assert torch.distributed.fsdp.fully_shard is stock
