"""Clipping in the update: the bits of `clip_grad_norm_` before a step, on any mesh, without writing gradients.

Runs in Triton's interpreter too, where `test_kernels.py` starts it.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.kernels.test_kernels import DEVICE
from tests.optim.test_moments import groups, model, same, train
from tests.optim.test_optim import in_workers, on_two_ranks, whole
from tests.ranks import on_ranks, run_ranks
from tests.training import assert_tensors_equal, full, full_parameters, world_mesh
from tests.zoo import SPECIMENS
from yafsdp_like import MixedPrecisionPolicy, fully_shard, update_in_backward
from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.optim import AdamW, Passes
from yafsdp_like.optim.clipping import total_norm
from yafsdp_like.optim.moments import FORMATS

NUM_STEPS = 2 if INTERPRETED else 20
MAX_NORM = 0.5
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)


class ClipsBefore(AdamW):
    """The truth: what a training loop does, with the norm where it is looked for."""

    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        self.grad_norm = nn.utils.clip_grad_norm_(params, MAX_NORM)
        return super().step(closure)


def both(module: nn.Module, other: nn.Module, **options: Any) -> tuple[AdamW, AdamW]:
    """The optimizers under comparison, of two groups."""
    return (
        AdamW(groups(module), lr=1e-2, seed=3, max_norm=MAX_NORM, **options),
        ClipsBefore(groups(other), lr=1e-2, seed=3, **options),
    )


def same_norm(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    assert found is not None and expected is not None and found.shape == ()
    return torch.equal(found.cpu(), full(expected)) or bool(found.isnan() and full(expected).isnan())


# --- one rank ---


@pytest.mark.parametrize("offload_moments", [False, True])
@pytest.mark.parametrize("moments", FORMATS)
def test_the_bits_are_those_of_clipping_before_the_step(moments: str, offload_moments: bool) -> None:
    ours, theirs = model(), model()
    optimizers = both(ours, theirs, moments=moments, offload_moments=offload_moments)
    optimizers[0].passes = Passes(batches=[list(ours[0].parameters())])
    for step in range(NUM_STEPS):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            train(module, optimizer, range(step, step + 1))
        assert same_norm(optimizers[0].grad_norm, optimizers[1].grad_norm)
    assert optimizers[0].grad_norm is not None and optimizers[0].grad_norm > 2 * MAX_NORM
    assert same(ours, optimizers[0], theirs, optimizers[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter
@pytest.mark.parametrize("scale", [1e-4, math.inf, math.nan])
def test_small_gradients_and_those_that_are_not_finite_are_as_clipping_leaves_them(scale: float) -> None:
    modules = model(), model()
    optimizers = both(*modules)
    for module, optimizer in zip(modules, optimizers, strict=True):
        for p in module.parameters():
            p.grad = torch.linspace(-1.0, 1.0, p.numel(), device=DEVICE).view_as(p)
        module[0].bias.grad.mul_(scale)
        optimizer.step()
    assert same_norm(*(optimizer.grad_norm for optimizer in optimizers))
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(p.isnan(), q.isnan()) and torch.equal(p.nan_to_num(), q.nan_to_num())


def test_gradients_are_not_written_and_parameters_without_one_are_left_out() -> None:
    module = model()
    optimizer, _ = both(module, module)
    grads = {p: torch.full_like(p, 3.0) for p in module[0].parameters()}
    for p, grad in grads.items():
        p.grad = grad.clone()
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in grads.items())
    expected = math.sqrt(9.0 * sum(p.numel() for p in grads))
    assert optimizer.grad_norm is not None and optimizer.grad_norm.item() == pytest.approx(expected)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0


def test_gradients_in_bf16_are_rounded_where_clipping_rounds_them() -> None:
    modules = [model().bfloat16() for _ in range(2)]
    optimizers = both(*modules)
    for module, optimizer in zip(modules, optimizers, strict=True):
        for _ in range(NUM_STEPS):
            for p in module.parameters():
                p.grad = torch.linspace(-1.0, 0.7, p.numel(), device=DEVICE).view_as(p).bfloat16()
            optimizer.step()
    assert same(modules[0], optimizers[0], modules[1], optimizers[1])


def test_a_factor_may_be_given_instead() -> None:
    """As a caller does who has measured the norm itself."""
    ours, theirs = model(), model()
    optimizers = AdamW(groups(ours)), AdamW(groups(theirs))
    factor = torch.tensor(0.1, device=DEVICE)
    optimizers[0].clip_factor = factor
    for module, optimizer in zip((ours, theirs), optimizers, strict=True):
        for p in module.parameters():
            p.grad = torch.linspace(-1.0, 1.0, p.numel(), device=DEVICE).view_as(p)
            if module is theirs:
                p.grad.mul_(factor)
        optimizer.step()
    assert optimizers[0].grad_norm is None
    assert same(ours, optimizers[0], theirs, optimizers[1])


def test_copies_clip_too_and_checkpoints_do_not_know() -> None:
    optimizers = both(model(), model())
    assert copy.deepcopy(optimizers[0]).max_norm == MAX_NORM
    assert optimizers[0].state_dict() == optimizers[1].state_dict()
    fresh = AdamW(groups(model()), max_norm=1.0)
    fresh.load_state_dict(optimizers[0].state_dict())
    assert fresh.max_norm == 1.0


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_that_is_not_above_zero_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="expected max_norm above 0, or None for no clipping, found"):
        AdamW(model().parameters(), max_norm=max_norm)
    optimizer = AdamW(model().parameters())
    optimizer.max_norm = max_norm
    with pytest.raises(ValueError, match="expected max_norm above 0, or None for no clipping, found"):
        optimizer.step()


def test_steps_after_clipping_is_turned_off_do_not_clip() -> None:
    """Prevents: the last factor multiplies the gradients of later steps."""
    ours, theirs = model(), model()
    optimizers = AdamW(groups(ours), max_norm=MAX_NORM), ClipsBefore(groups(theirs))
    for module, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(module, optimizer, range(2))
    optimizers[0].max_norm = None
    unclipped = AdamW(groups(theirs))
    unclipped.load_state_dict(optimizers[1].state_dict())
    for module, optimizer in ((ours, optimizers[0]), (theirs, unclipped)):
        train(module, optimizer, range(2, 4))
    assert optimizers[0].clip_factor is None
    assert same(ours, optimizers[0], theirs, unclipped)


# --- sharded ---

OPTIONS: list[dict[str, Any]] = [
    {},
    {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32), "split_master": True},
    {"mp_policy": BF16, "grad_dtype": torch.bfloat16},
]


def trained(kind: type[AdamW], mesh: Any, moments: str, options: dict[str, Any]) -> tuple[list[float], Any]:
    """Norms and full parameters of training the decoder; the first block's bias has a gradient in some steps only."""
    specimen = SPECIMENS["decoder"]
    net = specimen.wrap(specimen.fresh(), fully_shard, mesh=mesh, **options)
    own = {"max_norm": MAX_NORM} if kind is AdamW else {}
    optimizer = kind(net.parameters(), lr=0.02, moments=moments, **own)
    norms = []
    for step in range(NUM_STEPS):
        specimen.loss_of(net, step, dist.get_rank()).backward()
        if step % 3 == 1:
            next(net.parameters()).grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.grad_norm is not None
        norms.append(full(optimizer.grad_norm).item())
    return norms, full_parameters(net)


def compare(num_replicas: int) -> None:
    mesh = world_mesh()
    if num_replicas > 1:
        mesh = init_device_mesh("cpu", (num_replicas, dist.get_world_size() // num_replicas), mesh_dim_names=("r", "s"))
    for options, moments in zip(OPTIONS, FORMATS, strict=True):
        found, expected = (trained(kind, mesh, moments, options) for kind in (AdamW, ClipsBefore))
        assert found[0] == expected[0] and min(found[0]) > MAX_NORM / 4
        assert_tensors_equal(found[1], expected[1])


@in_workers
@pytest.mark.parametrize(
    ("world_size", "num_replicas"),
    [(1, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((2, 1), (2, 2), (4, 2)))],
)
def test_sharded_training_has_the_bits_of_clipping_before_the_step(world_size: int, num_replicas: int) -> None:
    run_ranks(compare, num_replicas, world_size=world_size)


@in_workers
@on_two_ranks
def test_a_rank_without_rows_agrees() -> None:
    """Prevents: a rank that leaves an empty gradient out, and others who wait for its part of the norm."""
    norms = []
    for sharded in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 5))
        if sharded:
            fully_shard(module, mesh=world_mesh())
        module(torch.ones(2, 3)).square().sum().backward()
        optimizer = AdamW(module.parameters(), max_norm=0.1)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    torch.testing.assert_close(norms[0], norms[1])


def kinds() -> Iterator[torch.Tensor]:
    """Gradients on two meshes, and one of this rank alone."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    for part in (mesh["a"], mesh["b"]):
        module = fully_shard(nn.Linear(3, 4), mesh=part)
        module(torch.ones(2, 3)).sum().backward()
        yield from (p.grad for p in module.parameters() if p.grad is not None)
    yield torch.arange(3.0)


@in_workers
@on_two_ranks
def test_a_norm_over_several_meshes_is_that_of_all_elements() -> None:
    grads = list(kinds())
    expected = torch.linalg.vector_norm(torch.cat([whole(grad).flatten() for grad in grads]))
    torch.testing.assert_close(total_norm(grads), expected)


@in_workers
@on_ranks()
def test_there_is_nothing_to_clip_where_a_backward_updates() -> None:
    specimen = SPECIMENS["decoder"]
    net = specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh())
    optimizer = AdamW(net.parameters(), max_norm=1.0)
    with pytest.raises(ValueError, match=r"expects .*AdamW .* without max_norm, found .* with max_norm=1\.0"):
        update_in_backward(optimizer)
    optimizer.max_norm = None
    update_in_backward(optimizer)
    optimizer.max_norm = 1.0
    specimen.loss_of(net, 0, dist.get_rank()).backward()
    with pytest.raises(RuntimeError, match="nothing is left to clip"):
        optimizer.step()
