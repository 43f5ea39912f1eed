"""The one loop that trains the zoo's specimens, and comparisons of what it leaves.

Owns the `Recipe` of a training run and what a run returns. An implementation of `fully_shard` is a module with FSDP2's
names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as stock
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import yafsdp_like as ours
from tests.zoo import SPECIMENS, Specimen
from yafsdp_like import optim as our_optim

IMPLEMENTATIONS: dict[str, ModuleType] = {"ours": ours, "stock": stock}


@dataclass(frozen=True)
class Recipe:
    """How a specimen is trained."""

    steps: int = 20
    optimizer: str = "AdamW"  # of torch.optim, or "our AdamW"
    foreach: bool | None = None
    fused: bool | None = None
    max_norm: float = 0.5
    norm_type: float = 2.0
    set_to_none: bool = True
    micro_batches: int = 1
    sync_each: bool = True  # reduce after every micro-batch, or after the last only
    evaluates: bool = False  # before every step and after every update
    reshard_after_forward: bool | None = None
    reshard_after_backward: bool = True
    divide_factor: float | None = None
    precision: Mapping[str, Any] = field(default_factory=dict)  # fields of MixedPrecisionPolicy
    transport: str = "auto"  # of ours; stock has one
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """What a training run leaves, in order of steps."""

    losses: list[float]  # of this rank, evaluations' among them
    norms: list[float]
    parameters: dict[str, torch.Tensor]  # full
    buffers: dict[str, torch.Tensor]  # of this rank


Prepare = Callable[[nn.Module], None]


def world_mesh(device: str = "cpu") -> DeviceMesh:
    """A 1-D mesh over all ranks."""
    return init_device_mesh(device, (dist.get_world_size(),))


def shard(specimen: Specimen, model: nn.Module, impl: str, recipe: Recipe) -> nn.Module:
    """Cut the model into its specimen's units with the implementation called `impl`."""
    names = IMPLEMENTATIONS[impl]
    only_ours = {"transport": recipe.transport} if names is ours else {}
    specimen.wrap(
        model,
        names.fully_shard,
        mesh=world_mesh(recipe.device),
        reshard_after_forward=recipe.reshard_after_forward,
        mp_policy=names.MixedPrecisionPolicy(**recipe.precision),
        **only_ours,
    )
    for module in model.modules():
        if recipe.divide_factor is not None and isinstance(module, names.FSDPModule):
            module.set_gradient_divide_factor(recipe.divide_factor)
            module.set_force_sum_reduction_for_comms(True)
    return model


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters as they are now."""
    module, name = (our_optim, "AdamW") if recipe.optimizer == "our AdamW" else (torch.optim, recipe.optimizer)
    return getattr(module, name)(model.parameters(), lr=0.02, foreach=recipe.foreach, fused=recipe.fused)


def train(named: str | Specimen, impl: str, recipe: Recipe, prepare: Prepare | None = None) -> Run:
    """Train a sharded specimen; `prepare` changes the model before it is sharded. For workers."""
    specimen = SPECIMENS[named] if isinstance(named, str) else named
    model = specimen.fresh().to(recipe.device)
    if prepare:
        prepare(model)
    shard(specimen, model, impl, recipe)
    optimizer = make_optimizer(recipe, model)
    losses, norms = [], []
    for step in range(recipe.steps):
        losses += evaluate(specimen, model, step, recipe)
        losses.append(accumulate(specimen, model, step, recipe))
        norms.append(clip(model, recipe))
        optimizer.step()
        losses += evaluate(specimen, model, step, recipe)
        optimizer.zero_grad(set_to_none=recipe.set_to_none)
    return Run(losses, norms, full_parameters(model), buffers(model))


@torch.no_grad()
def evaluate(specimen: Specimen, model: nn.Module, step: int, recipe: Recipe) -> list[float]:
    """The loss in evaluation, if the recipe asks for it."""
    if not recipe.evaluates:
        return []
    model.eval()
    loss = specimen.loss_of(model, 500 + step, dist.get_rank(), recipe.device)
    model.train()
    return [loss.item()]


def accumulate(specimen: Specimen, model: nn.Module, step: int, recipe: Recipe) -> float:
    """Forward and backward of one step's micro-batches; the loss is their sum."""
    total = 0.0
    for index in range(recipe.micro_batches):
        last = index == recipe.micro_batches - 1
        model.set_requires_gradient_sync(recipe.sync_each or last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(recipe.reshard_after_backward or last)
        loss = specimen.loss_of(model, step * recipe.micro_batches + index, dist.get_rank(), recipe.device)
        loss.backward()
        total += loss.item()
    return total


def clip(model: nn.Module, recipe: Recipe) -> float:
    """Clip by the recipe's norm and return what it was before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm, recipe.norm_type, foreach=recipe.foreach)
    return full(norm).item()


def train_unsharded(name: str, recipe: Recipe, world_size: int) -> Run:
    """The truth: one process, the whole model, gradients averaged over what `world_size` ranks would see.

    `losses` holds rank 0's; `buffers` is left empty, since each rank has its own.
    """
    specimen = SPECIMENS[name]
    model = specimen.fresh()
    optimizer = make_optimizer(recipe, model)
    losses, norms = [], []
    divisor = recipe.divide_factor or world_size
    for step in range(recipe.steps):
        total = 0.0
        for index in range(recipe.micro_batches):
            for rank in range(world_size):
                loss = specimen.loss_of(model, step * recipe.micro_batches + index, rank)
                (loss / divisor).backward()
                total += loss.item() if rank == 0 else 0.0
        losses.append(total)
        norms.append(clip(model, recipe))
        optimizer.step()
        optimizer.zero_grad(set_to_none=recipe.set_to_none)
    return Run(losses, norms, full_parameters(model), {})


# --- comparing ---


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, detached and on the CPU; a collective where it is sharded."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone()


def full_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, whole."""
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every buffer of this rank."""
    return {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}


def assert_same_bits(actual: Run, expected: Run) -> None:
    """Losses, norms, parameters and buffers are equal, bit for bit."""
    assert actual.losses == expected.losses
    assert actual.norms == expected.norms
    assert_tensors_equal(actual.parameters, expected.parameters)
    assert_tensors_equal(actual.buffers, expected.buffers)


def assert_close(actual: Run, expected: Run, tolerance: float = 2e-5) -> None:
    """Losses, norms and parameters agree within a tolerance; buffers are not compared."""
    torch.testing.assert_close(actual.losses, expected.losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.norms, expected.norms, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.parameters, expected.parameters, rtol=tolerance, atol=tolerance)


def assert_tensors_equal(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Same names in the same order, same dtypes, same bits; None equals None."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        if tensor is None or actual[name] is None:
            assert actual[name] is tensor, name
        else:
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name
