"""Models that are built unusually: children that blocks share, parameters without elements, norms with statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import yafsdp_like as ours
from tests.ranks import run_ranks
from tests.training import full, world_mesh
from tests.twins import Twins
from tests.zoo import FEATURES, Chain, Specimen, layers_of, vectors

both_transports = pytest.mark.parametrize("transport", ["process_group", "peer"])


def follow(build: Callable[[], nn.Module], units: Callable[[Any], list[Any]], transport: str) -> None:
    """Three steps beside the unsharded model, and an evaluation between them; no spills, which would warn."""
    twins = Twins(Specimen(build, vectors(FEATURES), units), transport=transport)
    twins.train(0, 1)
    with torch.no_grad():
        twins.losses(2)
    twins.train(3)
    twins.compare_parameters()
    assert list(twins.sharded.state_dict()) == list(twins.plain.state_dict())


# --- children that blocks share ---


class Sharer(nn.Module):
    """A block with a child that other blocks may have too."""

    def __init__(self, shared: nn.Module, owns: bool = True) -> None:
        super().__init__()
        self.own = nn.Linear(FEATURES, FEATURES) if owns else nn.Identity()
        self.nest = nn.ModuleDict({"shared": shared})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.nest["shared"](self.own(x)))


class Aliasing(Chain):
    """Its root runs the blocks' child itself."""

    def __init__(self, layers: list[nn.Module], shared: nn.Module) -> None:
        super().__init__(layers)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(super().forward(x))


def child() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES))


def sharing_twice() -> nn.Module:
    shared = child()
    return Chain([Sharer(shared), Sharer(shared)])


def sharing_with_others_between() -> nn.Module:
    shared = child()
    return Chain([Sharer(shared), Sharer(child()), Sharer(shared, owns=False), Sharer(child()), Sharer(shared)])


def sharing_with_the_root() -> nn.Module:
    shared = child()
    return Aliasing([Sharer(shared), Sharer(child()), Sharer(shared)], shared)


def shared_units_of(model: Any) -> list[nn.Module | list[nn.Module]]:
    """The shared child first, as a unit of its own."""
    return [model.layers[0].nest["shared"], *model.layers]


@pytest.mark.slow(unless=lambda build, transport: transport == "peer" and build is not sharing_twice)
@both_transports
@pytest.mark.parametrize("units", [layers_of, shared_units_of])
@pytest.mark.parametrize("build", [sharing_twice, sharing_with_others_between, sharing_with_the_root])
def test_blocks_may_share_a_child(build: Callable[[], nn.Module], units: Any, transport: str) -> None:
    """Prevents: a crash in the second block, whose child's parameters the first block's unit has."""
    run_ranks(follow, build, units, transport)


# --- parameters without elements ---


class Empty(nn.Module):
    """A block with parameters that hold nothing, and perhaps others."""

    def __init__(self, owns: bool) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(3, 0))
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)
        self.own = nn.Linear(FEATURES, FEATURES) if owns else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.own(x)) + self.rows.sum() + self.columns.sum() + self.nothing.sum()


def empties_only() -> nn.Module:
    return Chain([nn.Linear(FEATURES, FEATURES), Empty(False), nn.Linear(FEATURES, FEATURES)])


def empties_and_others() -> nn.Module:
    return Chain([Empty(True), Empty(False), Empty(True)])


@pytest.mark.slow(unless=lambda world_size: world_size == 2)
@both_transports
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("build", [empties_only, empties_and_others])
def test_parameters_may_have_no_elements(build: Callable[[], nn.Module], world_size: int, transport: str) -> None:
    """Prevents: an assertion without words where a unit's gradients take no bytes."""
    run_ranks(follow, build, layers_of, transport, world_size=world_size)
    run_ranks(expect_empty_gradients, build, transport, world_size=world_size)


def expect_empty_gradients(build: Callable[[], nn.Module], transport: str) -> None:
    twins = Twins(Specimen(build, vectors(FEATURES), layers_of), transport=transport)
    twins.sharded.set_requires_gradient_sync(False)  # slots of their own
    twins.backward(0)
    twins.sharded.set_requires_gradient_sync(True)
    twins.backward(1)
    twins.compare_gradients()
    for plain, sharded in zip(twins.plain.parameters(), twins.sharded.parameters(), strict=True):
        assert (sharded.grad is None) == (plain.grad is None)
        assert sharded.grad is None or full(sharded.grad).shape == plain.shape


# --- norms with running statistics ---


def normed() -> nn.Module:
    """Its first layer gives ones, whatever it is given."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    return model


@both_transports
def test_batch_norms_of_a_bf16_model_keep_their_statistics_in_fp32(transport: str) -> None:
    """Prevents: parameters in bf16 beside statistics in fp32, which no kernel takes."""
    run_ranks(norm_in_bf16, transport)


def norm_in_bf16(transport: str) -> None:
    policy = ours.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    own = ours.MixedPrecisionPolicy(torch.float32, torch.float32, output_dtype=torch.bfloat16)
    for unit_policy in (None, own, policy):
        model = normed()
        if unit_policy is not None:
            ours.fully_shard(model[1], mesh=world_mesh(), mp_policy=unit_policy, transport=transport)
        ours.fully_shard(model, mesh=world_mesh(), mp_policy=policy, transport=transport)
        seen: list[torch.dtype] = []
        model[1].register_forward_hook(
            lambda module, args, output, seen=seen: seen.extend((args[0].dtype, module.weight.dtype, output.dtype))
        )
        output = model(torch.randn(4, 3, 5, 5))
        output.float().square().mean().backward()
        assert output.dtype is torch.bfloat16
        assert seen[1:] == [torch.float32, torch.bfloat16] and model[1].running_mean.dtype is torch.float32
        torch.testing.assert_close(model[1].running_mean, torch.full((4,), 0.1))
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


def norm_all_in_bf16(transport: str) -> None:
    """Statistics in bf16 need parameters in bf16."""
    model = normed()
    model[1].running_mean, model[1].running_var = model[1].running_mean.bfloat16(), model[1].running_var.bfloat16()
    policy = ours.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    ours.fully_shard(model, mesh=world_mesh(), mp_policy=policy, transport=transport)
    model(torch.randn(4, 3, 5, 5)).float().square().mean().backward()
    assert model[1].running_mean.dtype is torch.bfloat16
    torch.testing.assert_close(model[1].running_mean, torch.full((4,), 0.1, dtype=torch.bfloat16))


@both_transports
def test_batch_norms_whose_statistics_were_cast_follow_them(transport: str) -> None:
    """Prevents: parameters in fp32 beside statistics that the user has cast, as other runtimes ask for."""
    run_ranks(norm_all_in_bf16, transport)
