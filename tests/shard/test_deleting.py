"""A model that is deleted frees its memory at once, and not when garbage is collected."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import yafsdp_like as ours
from tests.ranks import run_ranks
from tests.training import world_mesh
from tests.zoo import FEATURES, Block, Chain
from yafsdp_like import optim
from yafsdp_like.memory.arena import Arena
from yafsdp_like.shard.runtime.unit_state import unit_of

both_transports = pytest.mark.parametrize("transport", ["process_group", "peer"])


def sharded(model: nn.Module, transport: str) -> Any:
    policy = ours.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.layers:  # type: ignore[union-attr]
        ours.fully_shard(layer, mesh=world_mesh(), transport=transport, mp_policy=policy)
    return ours.fully_shard(model, mesh=world_mesh(), transport=transport, mp_policy=policy)


def arenas_of(model: Any) -> list[weakref.ref[Arena]]:
    units = [unit for module in model.modules() if (unit := unit_of(module)) is not None]
    found = [unit.arena for unit in units]
    found += [unit.engine.memory.arena for unit in units if unit.engine is not None]
    return [weakref.ref(arena) for arena in found if arena is not None]


RUNS = [("shard", 0), ("plan", 0), ("train", 3), ("evaluate", 2), ("leave a graph", 2)]


@both_transports
@pytest.mark.parametrize(("mode", "steps"), RUNS)
def test_a_deleted_model_frees_its_arenas_by_counting_references(transport: str, mode: str, steps: int) -> None:
    """Prevents: two models in memory where one was deleted before the other was made."""
    run_ranks(delete, transport, steps, mode)


def delete(transport: str, steps: int, mode: str) -> None:
    gc.collect()
    gc.disable()
    try:
        model = sharded(Chain([Block() for _ in range(4)]), transport)
        optimizer: Any = optim.AdamW(model.parameters(), lr=0.1)
        loss: Any = model.memory_plan() if mode == "plan" else None
        for _ in range(steps):
            loss = None  # and its graph
            with torch.set_grad_enabled(mode != "evaluate"):
                loss = model(torch.ones(2, FEATURES)).float().sum()
            if mode == "train":
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        arenas = arenas_of(model)
        assert len(arenas) == (10 if steps else 5)
        del model, optimizer
        del loss  # last, as where a function ends: its graph has kept what it needs
        assert not any(arena() for arena in arenas)
    finally:
        gc.enable()


@both_transports
def test_a_block_that_is_kept_runs_and_learns_after_its_model_is_deleted(transport: str) -> None:
    """Prevents: what belonged to the model being gone for the block too."""
    run_ranks(keep_a_block, transport)


def keep_a_block(transport: str) -> None:
    model = sharded(Chain([Block() for _ in range(3)]), transport)
    model(torch.ones(2, FEATURES)).float().sum().backward()
    block, before = model.layers[1], [p.grad.to_local().clone() for p in model.layers[1].parameters()]
    del model
    for p, grad in zip(block.parameters(), before, strict=True):
        assert torch.equal(p.grad.to_local(), grad)
    values = {name: p.full_tensor() for name, p in block.named_parameters()}
    plain = Block().bfloat16()
    plain.load_state_dict(values)
    inputs = torch.ones(2, FEATURES)
    for _ in range(2):
        block.zero_grad()
        ours_out, theirs = block(inputs), plain(inputs.bfloat16())
        assert torch.equal(ours_out, theirs)
        ours_out.float().sum().backward()
    plain(inputs.bfloat16()).float().sum().backward()
    for ours_p, their_p in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad.full_tensor(), their_p.grad.float(), rtol=0.02, atol=0.02)


@both_transports
def test_a_graph_that_outlives_its_model_runs_backward_as_often_as_asked(transport: str) -> None:
    """Prevents: a backward on memory that went with the model."""
    run_ranks(outlive, transport)


def outlive(transport: str) -> None:
    gc.collect()
    gc.disable()
    try:
        model = sharded(Chain([Block() for _ in range(3)]), transport)
        model(torch.ones(2, FEATURES)).float().sum().backward()
        params = list(model.parameters())
        expected = [p.grad.to_local().clone() for p in params]
        loss: Any = model(torch.ones(2, FEATURES)).float().sum()
        arenas = arenas_of(model)
        del model
        for keeps in (True, False):
            for p in params:
                p.grad = None
            loss.backward(retain_graph=keeps)
            for p, grad in zip(params, expected, strict=True):
                assert torch.equal(p.grad.to_local(), grad)
        del loss, params, p
        assert not any(arena() for arena in arenas)
    finally:
        gc.enable()


@both_transports
def test_layers_that_were_sharded_and_then_replaced_do_not_disturb_the_rest(transport: str) -> None:
    """Prevents: a unit of modules that are gone stopping the plan."""
    run_ranks(replace, transport)


def replace(transport: str) -> None:
    model = sharded(Chain([Block() for _ in range(3)]), transport)
    model(torch.ones(2, FEATURES)).float().sum().backward()
    model.layers[2] = nn.Identity()
    for p in model.layers[0].parameters():
        p.requires_grad_(False)  # asks for another plan
    out = model(torch.ones(2, FEATURES, requires_grad=True))
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.layers[1].parameters())
