"""Moments in bfloat16 and 8 bit: on any number of ranks the same bits, and from any checkpoint to any format.

Runs natively where there is a GPU. The kernel's bits in Triton's interpreter are compared in `test_formats.py`.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as stock_fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.kernels.test_kernels import DEVICE
from tests.optim.test_optim import on_two_ranks, pickled, whole
from yafsdp_like import fully_shard
from yafsdp_like.optim import AdamW
from yafsdp_like.optim.moments import FORMATS, MOMENTS, moments_nbytes

NARROW = ["bf16", "int8"]
CPU = torch.device("cpu")


def model(device: torch.device = DEVICE) -> nn.Module:
    """Rows of whole blocks of 8 bit, but for biases, and 7 of them for two ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 7), nn.Linear(64, 1), nn.Linear(33, 5)).to(device)


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two of them, as `pickled` wants them."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in module.parameters() if p.dim() <= 1]}]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(4)) -> None:
    """Steps with random gradients, which are those of the whole parameters wherever their rows are."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in module.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.device)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def saved_moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Both moments of each parameter, as a state dict has them, in the order of the groups."""
    states = optimizer.state_dict()["state"]
    return [whole(states[key][name]) for key in sorted(states) for name in MOMENTS]


def same(ours: nn.Module, optimizer: AdamW, theirs: nn.Module, other: AdamW) -> bool:
    found = [*map(whole, ours.parameters()), *saved_moments(optimizer)]
    expected = [*map(whole, theirs.parameters()), *saved_moments(other)]
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))  # some may be offloaded


# --- what is kept ---


@pytest.mark.parametrize("moments", FORMATS)
def test_states_have_the_bytes_that_are_planned(moments: str) -> None:
    module = model()
    optimizer = AdamW(groups(module), moments=moments)
    train(module, optimizer, range(1))
    kept = [state[name] for state in optimizer.state.values() for name in MOMENTS]
    assert sum(t.nbytes for t in kept) == sum(moments_nbytes(p.shape, p.dtype, moments) for p in module.parameters())
    saved = sum(moments_nbytes(p.shape, p.dtype, moments, saved=True) for p in module.parameters())
    assert sum(t.nbytes for t in saved_moments(optimizer)) == saved
    assert {t.dtype for t in kept} == {
        "fp32": {torch.float32},
        "bf16": {torch.bfloat16},
        "int8": {torch.float32, torch.uint8},
    }[moments]


def test_other_formats_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="expected moments to be one of 'fp32', 'bf16', 'int8', found 'fp8'"):
        AdamW(model().parameters(), moments="fp8")


@pytest.mark.parametrize("moments", NARROW)
def test_the_seed_decides_how_moments_are_rounded(moments: str) -> None:
    trained = []
    for seed in (0, 0, 1):
        module = model()
        optimizer = AdamW(groups(module), moments=moments, seed=seed)
        train(module, optimizer)
        trained.append((module, optimizer))
    assert same(*trained[0], *trained[1]) and not same(*trained[0], *trained[2])


@pytest.mark.parametrize("moments", NARROW)
def test_narrow_moments_follow_those_of_fp32(moments: str) -> None:
    """Over 50 steps of 1e-3 parameters stay within a few of where fp32 takes them."""
    modules = model(), model()
    optimizers = [AdamW(groups(m), lr=1e-3, moments=kind) for m, kind in zip(modules, ("fp32", moments), strict=True)]
    for module, optimizer in zip(modules, optimizers, strict=True):
        train(module, optimizer, range(50))
    for p, q in zip(*(m.parameters() for m in modules), strict=True):
        assert (p - q).abs().max() < (5e-4 if moments == "bf16" else 4e-3)


def test_a_small_average_is_not_stuck() -> None:
    """Prevents: a second moment that never decays, since each step takes less than half a unit from it."""
    param = nn.Parameter(torch.ones(8, 64, device=DEVICE))
    for moments in NARROW:
        optimizer = AdamW([param], betas=(0.9, 0.999), moments=moments)
        param.grad = torch.ones_like(param)
        optimizer.step()
        param.grad[:, ::2] = 0  # the block's largest stays, and these decay beside it
        for _ in range(300):
            optimizer.step()
        decayed = saved_moments(optimizer)[1][:, ::2].float().mean().item()
        assert decayed == pytest.approx(1e-3 * 0.999**300, rel=0.1)


# --- checkpoints and copies ---


def reloaded(optimizer: AdamW, module: nn.Module) -> AdamW:
    fresh = AdamW(groups(module), lr=1.0, moments=optimizer.moments, seed=optimizer.seed)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


@pytest.mark.parametrize("moments", NARROW)
@pytest.mark.parametrize("save_and_load", [reloaded, pickled])
def test_training_goes_on_bit_for_bit(save_and_load: Callable[[AdamW, nn.Module], AdamW], moments: str) -> None:
    ours, theirs = model(), model()
    optimizers = [AdamW(groups(m), moments=moments, seed=3) for m in (ours, theirs)]
    train(ours, optimizers[0], range(6))
    train(theirs, optimizers[1], range(3))
    again = save_and_load(optimizers[1], theirs)
    assert (again.moments, again.seed) == (moments, 3)
    train(theirs, again, range(3, 6))
    assert same(ours, optimizers[0], theirs, again)


@pytest.mark.parametrize(
    ("before", "after"), [*itertools.permutations(FORMATS, 2), ("torch", "bf16"), ("int8", "torch")]
)
def test_states_go_from_any_format_to_any_other(before: str, after: str) -> None:
    def made(module: nn.Module, name: str) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups(module)) if name == "torch" else AdamW(groups(module), moments=name)

    module = model()
    optimizer, other = made(module, before), made(module, after)
    train(module, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(copy.deepcopy(state))
    for found, expected in zip(saved_moments(other), saved_moments(optimizer), strict=True):
        rtol = 2**-4 if after == "int8" else 2**-8 if after == "bf16" else 0
        torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=rtol * 2**-14)
    fresh = made(module, after)
    train(module, fresh, range(1))
    for p in module.parameters():
        assert {name: t.dtype for name, t in other.state[p].items()} == {
            name: t.dtype for name, t in fresh.state[p].items()
        }
    train(module, other)


def test_a_moment_of_another_shape_is_refused() -> None:
    module, other = model(), nn.Linear(64, 7)
    optimizer = AdamW(module[0].parameters(), moments="int8")
    theirs = AdamW(other.parameters())
    train(other, theirs)
    with pytest.raises(ValueError, match=r"of shape \(7, 96\), \(7, 96\) here: expected the same, found \(7, 64\)"):
        optimizer.load_state_dict(theirs.state_dict())


# --- sharded ---


def sharded(fully_shard: Callable[..., Any], mesh_shape: tuple[int, ...] = (2,)) -> nn.Module:
    module = model(CPU)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    fully_shard(module[0], mesh=mesh)
    return fully_shard(module, mesh=mesh)


@on_two_ranks
def test_two_ranks_give_the_bits_of_one() -> None:
    """Sharded by either runtime, and as two replicas."""
    ways = ((fully_shard, (2,)), (stock_fully_shard, (2,)), (fully_shard, (2, 1)))
    for moments, (shard, mesh_shape) in itertools.product(NARROW, ways):
        ours, theirs = sharded(shard, mesh_shape), model(CPU)
        optimizers = [AdamW(groups(m), moments=moments, seed=5) for m in (ours, theirs)]
        train(ours, optimizers[0])
        train(theirs, optimizers[1])
        assert same(ours, optimizers[0], theirs, optimizers[1]), (moments, shard, mesh_shape)


@on_two_ranks
def test_distributed_checkpoints_take_and_give_any_format() -> None:
    for before, after in itertools.product(FORMATS, FORMATS):
        ours, again = sharded(fully_shard), sharded(fully_shard)
        optimizers = AdamW(groups(ours), moments=before), AdamW(groups(again), moments=after)
        train(ours, optimizers[0])
        again.load_state_dict(ours.state_dict())
        state = copy.deepcopy(get_optimizer_state_dict(ours, optimizers[0]))
        set_optimizer_state_dict(again, optimizers[1], state)
        assert optimizers[1].moments == after
        train(ours, optimizers[0], range(4, 6))
        train(again, optimizers[1], range(4, 6))
        if before == after:
            assert same(ours, optimizers[0], again, optimizers[1])


@on_two_ranks
def test_parameters_sharded_by_columns_are_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 64), mesh, [Shard(1)]))
    param.grad = distribute_tensor(torch.ones(4, 64), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"sharded by consecutive rows, found one of shape \(4, 64\)"):
        AdamW([param], moments="bf16").step()
