"""Our AdamW beside torch's: the same training, the same states, the same checkpoints, on plain and sharded models.

Runs in Triton's interpreter too, where `test_kernels.py` starts it.
"""

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.kernels.test_kernels import DEVICE
from tests.ranks import on_ranks
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.optim import AdamW, Passes

on_two_ranks = on_ranks(world_size=2)
in_workers = pytest.mark.skipif(INTERPRETED, reason="worker processes are started once, without the interpreter")

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # torch rounds bfloat16 after every operation, we once


def model(dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1)).to(device, dtype)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in module.parameters() if p.dim() > 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in module.parameters() if p.dim() <= 1], "lr": 3e-3, "betas": (0.8, 0.9)},
    ]


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 3, frozen: Sequence[nn.Parameter] = ()
) -> None:
    """Steps on fixed data, with a learning rate that falls; `frozen` get no gradient."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    first = next(module.parameters())
    inputs = inputs.to(first.device, first.dtype)
    for _ in range(num_steps):
        module(inputs).square().mean().backward()
        for param in frozen:
            param.grad = None
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def assert_same_training(
    ours: nn.Module, ours_optimizer: AdamW, theirs: nn.Module, theirs_optimizer: torch.optim.Optimizer
) -> None:
    """Parameters and states, full where sharded."""
    tolerance = TOLERANCES[next(ours.parameters()).dtype]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=tolerance, atol=tolerance)
        state, expected = ours_optimizer.state[p], theirs_optimizer.state[q]
        assert list(state) == list(expected)
        for name in state:
            assert type(state[name]) is type(expected[name])
            assert state[name].dtype == expected[name].dtype
            found, wanted = (
                whole(state[name]),
                whole(expected[name]).to(state[name].device),
            )  # torch's fused has steps there
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_training_is_that_of_torch(dtype: torch.dtype) -> None:
    ours, theirs = model(dtype), model(dtype)
    optimizers = AdamW(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    train(ours, optimizers[0])
    train(theirs, optimizers[1])
    assert_same_training(ours, optimizers[0], theirs, optimizers[1])


def test_parameters_without_gradient_are_skipped_and_do_not_age() -> None:
    """Prevents: one step count for all, which would correct the moments of a late parameter too little."""
    ours, theirs = model(), model()
    optimizers = AdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for module, optimizer in ((ours, optimizers[0]), (theirs, optimizers[1])):
        train(module, optimizer, num_steps=2, frozen=[module[0].weight])
        assert module[0].weight not in optimizer.state
        train(module, optimizer, num_steps=1)
    assert [int(optimizers[0].state[p]["step"]) for p in ours.parameters()] == [1, 3, 3, 3]
    assert_same_training(ours, optimizers[0], theirs, optimizers[1])


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))

    def closure() -> torch.Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    assert AdamW([param], lr=0.5, weight_decay=0.0).step(closure).item() == 3.0
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.5, device=DEVICE))


def test_an_update_is_known_to_autograd() -> None:
    """Prevents: a kernel's write that leaves a stale saved tensor unnoticed, or a gathered copy of old values."""
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = param.square().sum()
    param.grad = torch.ones(3, device=DEVICE)
    version = param._version
    AdamW([param]).step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_read_scaled() -> None:
    ours, theirs = model(), model()
    optimizers = AdamW(ours.parameters()), AdamW(theirs.parameters())
    optimizers[0].gradient_scale = 0.25
    for module, factor in ((ours, 1.0), (theirs, 0.25)):
        for p in module.parameters():
            p.grad = factor * torch.arange(float(p.numel()), device=DEVICE).view_as(p)
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"])


def test_a_step_without_any_gradient_does_nothing() -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = AdamW([param])
    optimizer.step()
    assert not optimizer.state and param.tolist() == [1.0] * 3


# --- passes ---


def test_batches_are_updated_in_the_order_given_and_the_rest_last() -> None:
    """After each batch its parameters have moved, and those of later ones have not."""
    module = model()
    first, second, *rest = reversed(list(module.parameters()))
    before = [p.detach().clone() for p in (first, second, *rest)]
    seen: list[tuple[int, list[bool]]] = []

    def after_batch(index: int) -> None:
        moved = [not torch.equal(p, old) for p, old in zip((first, second, *rest), before, strict=True)]
        seen.append((index, moved))

    optimizer = AdamW(groups(module))
    optimizer.passes = Passes([[first], [second]], after_batch=after_batch)
    train(module, optimizer, num_steps=1)
    assert seen == [(0, [True, False, False, False]), (1, [True, True, False, False]), (2, [True] * 4)]


def test_batches_change_nothing_but_the_order() -> None:
    ours, theirs = model(), model()
    optimizers = AdamW(groups(ours)), AdamW(groups(theirs))
    optimizers[0].passes = Passes([[p] for p in reversed(list(ours.parameters()))])
    train(ours, optimizers[0])
    train(theirs, optimizers[1])
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_compute_copies_get_the_new_values() -> None:
    module = model()
    copies = {
        p: torch.zeros(p.numel(), dtype=torch.bfloat16, device=DEVICE) for p in module.parameters() if p.dim() > 1
    }
    optimizer = AdamW(groups(module))
    optimizer.passes = Passes(compute_of=copies.get)
    train(module, optimizer)
    for p, compute in copies.items():
        assert compute._version > 0
        assert torch.equal(compute.view_as(p), p.detach().bfloat16())


def test_a_parameter_in_two_batches_is_refused() -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="1 repeated"):
        Passes([[param], [param]])


def test_a_batch_of_strangers_is_refused() -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = AdamW([nn.Parameter(torch.ones(3, device=DEVICE))])
    optimizer.passes = Passes([[param]])
    with pytest.raises(RuntimeError, match="name 1 parameters that are in none of its groups"):
        optimizer.step()


# --- what is not supported ---


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_unsupported_options_are_refused_wherever_they_come_from(option: str) -> None:
    param = nn.Parameter(torch.ones(3, device=DEVICE))
    refused = pytest.raises(ValueError, match=f"AdamW does not support {option}=True")
    with refused:
        AdamW([param], **{option: True})
    with refused:
        AdamW([{"params": [param], option: True}])
    state = torch.optim.AdamW([param], **{option: True}).state_dict()
    with refused:
        AdamW([param]).load_state_dict(state)


@pytest.mark.parametrize(
    ("param", "grad", "message"),
    [
        (torch.ones(3).double(), torch.ones(3).double(), "found torch.float64"),
        (torch.ones(2, 3).t(), torch.ones(3, 2), "expected contiguous tensors"),
    ],
)
def test_tensors_that_no_kernel_takes_are_refused(param: torch.Tensor, grad: torch.Tensor, message: str) -> None:
    param = nn.Parameter(param.to(DEVICE))
    param.grad = grad.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        AdamW([param]).step()


# --- checkpoints and copies ---


def reloaded(optimizer: AdamW, module: nn.Module) -> AdamW:
    fresh = AdamW(groups(module), lr=1.0)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh


def pickled(optimizer: AdamW, module: nn.Module) -> AdamW:
    file = io.BytesIO()
    torch.save((optimizer, module), file)
    file.seek(0)
    optimizer, loaded = torch.load(file, weights_only=False)
    for p, q in zip(module.parameters(), loaded.parameters(), strict=True):
        optimizer.state[p] = optimizer.state.pop(q)
    for group, names in zip(optimizer.param_groups, groups(module), strict=True):
        group["params"] = names["params"]
    return optimizer


@pytest.mark.parametrize("save_and_load", [reloaded, pickled])
def test_training_goes_on_as_if_it_had_not_stopped(save_and_load: Callable[[AdamW, nn.Module], AdamW]) -> None:
    ours, theirs = model(), model()
    optimizers = AdamW(groups(ours)), AdamW(groups(theirs))
    train(ours, optimizers[0], num_steps=2)
    train(theirs, optimizers[1], num_steps=2)
    train(theirs, save_and_load(optimizers[1], theirs), num_steps=2)
    train(ours, optimizers[0], num_steps=2)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_states_of_torch_are_loaded_and_the_other_way_round() -> None:
    ours, theirs = model(), model()
    optimizers = AdamW(groups(ours)), torch.optim.AdamW(groups(theirs), fused=True)
    train(theirs, optimizers[1], num_steps=2)
    ours.load_state_dict(theirs.state_dict())
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    train(ours, optimizers[0], num_steps=1)
    train(theirs, optimizers[1], num_steps=1)
    assert_same_training(ours, optimizers[0], theirs, optimizers[1])
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    train(ours, optimizers[0], num_steps=1)
    train(theirs, optimizers[1], num_steps=1)
    assert_same_training(ours, optimizers[0], theirs, optimizers[1])


# --- sharded ---


def sharded_model() -> nn.Module:
    """Its last layer has one row, of which the second rank has none."""
    module, mesh = model(device=torch.device("cpu")), init_device_mesh("cpu", (2,))
    fully_shard(module[0], mesh=mesh)
    return fully_shard(module, mesh=mesh)


@in_workers
@on_two_ranks
def test_a_sharded_model_trains_as_under_torch() -> None:
    ours, theirs = sharded_model(), sharded_model()
    optimizers = AdamW(groups(ours), lr=1e-2, fused=True), torch.optim.AdamW(groups(theirs), lr=1e-2)
    train(ours, optimizers[0])
    train(theirs, optimizers[1])
    assert_same_training(ours, optimizers[0], theirs, optimizers[1])
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizers[0].state.values())


@in_workers
@on_two_ranks
def test_distributed_checkpoints_take_and_give_the_states() -> None:
    """A fresh optimizer is stepped once with zero gradients by torch, to make its states."""
    ours, again = sharded_model(), sharded_model()
    optimizers = AdamW(groups(ours)), AdamW(groups(again))
    train(ours, optimizers[0])
    before = [whole(p).clone() for p in again.parameters()]
    state = copy.deepcopy(get_optimizer_state_dict(ours, optimizers[0]))  # torch hands out the tensors themselves
    set_optimizer_state_dict(again, optimizers[1], state)
    assert all(torch.equal(whole(p), old) for p, old in zip(again.parameters(), before, strict=True))
    again.load_state_dict(ours.state_dict())
    train(ours, optimizers[0])
    train(again, optimizers[1])
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(ours.parameters(), again.parameters(), strict=True))


@in_workers
@on_two_ranks
def test_a_gradient_placed_otherwise_than_its_parameter_is_refused() -> None:
    module = sharded_model()
    optimizer = AdamW(groups(module))
    F.mse_loss(module(torch.ones(2, 5)), torch.zeros(2, 1)).backward()
    weight = module[0].weight
    weight.grad = weight.grad.redistribute(placements=[torch.distributed.tensor.Replicate()])
    with pytest.raises(ValueError, match="expected its parameter's placements"):
        optimizer.step()
