"""What a unit does to its inputs, and what becomes of its outputs, in place: gradients are the unsharded model's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad

from tests.ranks import on_ranks
from tests.training import full, ours, world_mesh
from tests.zoo import FEATURES

Change = Callable[[nn.Linear, torch.Tensor, torch.Tensor], Any]
transports = pytest.mark.parametrize("transport", ["process_group", "peer"])


class Changing(nn.Module):
    """A layer that does ``change`` to what it is given."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(FEATURES, FEATURES), change

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:
        return self.change(self.layer, x, other)


class Stack(nn.Module):
    """Three such units; ``join`` calls one, and makes the next one's input of what it gave and of what it was given."""

    def __init__(self, change: Change, join: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.units = nn.ModuleList(Changing(change) for _ in range(3))
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.first(x)
        x = other * 1.5
        for unit in self.units:
            x = self.join(unit, x, other)
        return (x * other).square().sum()


def relu(layer: nn.Linear, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return layer(F.leaky_relu(x, inplace=True))


def residual(layer: nn.Linear, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    x += layer(x * 0.5)
    return x


def first_row(layer: nn.Linear, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    x[0].mul_(layer(other)[1])
    return x.view(-1, FEATURES)


def nothing_returned(layer: nn.Linear, x: torch.Tensor, other: torch.Tensor) -> None:
    x.addcmul_(layer(other * 2), other)


def view_of_output(layer: nn.Linear, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return layer(x).unsqueeze(0).squeeze(0)


def two_views(layer: nn.Linear, x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = layer(x)
    return y[:1], y[1:]


def returned(unit: nn.Module, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return unit(x, other)


def changed_after(unit: nn.Module, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    y = unit(x, other=other)
    y += x
    return y * 1.0


def given(unit: nn.Module, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    unit(x, other=other)
    return x


def view_given(unit: nn.Module, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    x = x * 1.0
    unit(x[1:2], other[1:2])
    return x


def joined(unit: nn.Module, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    first, second = unit(x, other)
    first.add_(second * 2)
    return torch.cat([first, second])


IN_PLACE = [
    (relu, returned),
    (residual, returned),
    (residual, given),
    (first_row, returned),
    (first_row, given),
    (nothing_returned, given),
    (nothing_returned, view_given),
    (view_of_output, changed_after),
    (two_views, joined),
]


def twins(change: Change, join: Any, **options: Any) -> tuple[Stack, Stack]:
    """A sharded stack, and the same unsharded."""
    torch.manual_seed(0)
    plain = Stack(change, join)
    sharded = Stack(change, join)
    sharded.load_state_dict(plain.state_dict())
    for unit in (*sharded.units, sharded):
        ours.fully_shard(unit, mesh=world_mesh(), **options)
    return sharded, plain


def rows() -> torch.Tensor:
    return torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(dist.get_rank()))


@transports
@on_ranks()
def test_in_place_work_at_the_border_of_a_unit_gives_the_unsharded_gradients(transport: str) -> None:
    """Prevents: torch's words about a class of ours, and a caller whose tensor has another history than its values."""
    for change, join in IN_PLACE:
        sharded, plain = twins(change, join, transport=transport)
        for _ in range(2):
            losses = [model(rows()) for model in (sharded, plain)]
            for loss in losses:
                loss.backward()
        assert torch.equal(*losses)
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert q.grad is not None and p.grad is not None
            dist.all_reduce(q.grad)
            torch.testing.assert_close(full(p.grad), q.grad / dist.get_world_size(), rtol=2e-6, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(sharded(rows()), plain(rows()))


@on_ranks()
def test_an_input_that_is_returned_is_the_tensor_that_was_given() -> None:
    sharded, _ = twins(residual, returned)
    unit = sharded.units[0]
    x, other = (rows() * 1).requires_grad_() * 1, rows()
    assert unit(x, other) is x
    other = other.requires_grad_() * 1
    unit.change = lambda layer, x, other: (layer(x), other)
    assert unit(x, other)[1] is other


@on_ranks()
def test_two_views_of_one_tensor_changed_in_a_unit_are_refused() -> None:
    """Prevents: two aliases that do not know of each other's changes, and so wrong gradients."""

    def both(layer: nn.Linear, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return layer(x.mul_(2)) * other

    sharded, _ = twins(both, returned)
    x = rows().requires_grad_() * 1
    with pytest.raises(RuntimeError, match="'root' changed an input in place that it was given a second time"):
        sharded.units[0](x, x[:1])


@on_ranks()
def test_a_tensor_given_twice_is_one_tensor_inside() -> None:
    sharded, plain = twins(lambda layer, x, other: layer(x.mul_(2)) * other, returned)
    grads = []
    for model in (sharded, plain):
        leaf = torch.ones(2, FEATURES, requires_grad=True)
        x = leaf * 3
        model.units[0](x, x).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


# --- torch.func ---


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) for _ in range(4)])


def sharded_layers(transport: str) -> Any:
    model: Any = layers()
    for layer in (*model, model):
        ours.fully_shard(layer, mesh=world_mesh(), transport=transport)
    return model


def vector_jacobian(model: nn.Module, x: torch.Tensor) -> Any:
    y, pull = torch.func.vjp(model, x)
    y.square().mean().backward()  # the parameters' gradients, of the graph below the transform's
    return y, pull(torch.ones_like(y)), pull(y)


def tangent(model: nn.Module, x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def mapped(model: nn.Module, x: torch.Tensor) -> Any:
    y = torch.func.vmap(model)(x.expand(3, *x.shape))
    y.square().mean().backward()
    return y


def summed(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: model(x).square().sum()


TRANSFORMS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    "vjp": vector_jacobian,
    "grad": lambda model, x: torch.func.grad(summed(model))(x),
    "vmap": mapped,
    "vmap of grad": lambda model, x: torch.func.vmap(torch.func.grad(summed(model)))(x),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x),
    "hessian": lambda model, x: torch.func.hessian(summed(model))(x),
    "forward AD": tangent,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use
@transports
@pytest.mark.parametrize("is_first", [True, False], ids=["first forward", "warm"])
@on_ranks()
def test_transforms_of_torch_func_give_the_unsharded_values(is_first: bool, transport: str) -> None:
    """Prevents: agreements and nodes of ours under a transform, and layers whose backward gathers nothing."""
    for transform in TRANSFORMS.values():
        models = sharded_layers(transport), layers()
        if not is_first:
            models[0](rows()).sum().backward()
            models[0].zero_grad()
        torch.testing.assert_close(*[transform(model, rows()) for model in models], rtol=1e-5, atol=1e-6)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                dist.all_reduce(q.grad)
                torch.testing.assert_close(full(p.grad), q.grad / dist.get_world_size(), rtol=1e-5, atol=1e-6)


@on_ranks()
def test_gradients_of_a_transforms_gradients_are_refused_by_the_units_name() -> None:
    """Prevents: numbers of parameters that are not gathered any more."""
    model = sharded_layers("process_group")
    with pytest.raises(RuntimeError, match=r"gradients of gradients of sharded parameters are not supported.*'root'"):
        torch.func.grad(summed(model))(rows()).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients of gradients of sharded parameters are not supported.*'root'"):
        torch.func.jacrev(torch.func.jacrev(summed(model)))(rows())
    model(rows()).sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use
@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
@on_ranks()
def test_tracing_a_forward_is_refused(trains: bool) -> None:
    """Prevents: a graph that takes a unit's bytes for its weights; of a frozen model it ran, on another unit's."""
    model = sharded_layers("process_group").requires_grad_(trains)
    x, ones = rows().detach(), torch.ones_like(rows())
    with pytest.raises(RuntimeError, match=r"a forward of FSDPSequential is traced .*rank [01].*trace the model"):
        torch.func.linearize(model, x)
    expected = torch.func.jvp(layers(), (x,), (ones,))
    torch.testing.assert_close(torch.func.jvp(model, (x,), (ones,)), expected, rtol=1e-5, atol=1e-6)
