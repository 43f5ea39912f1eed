"""Law 6, order is a hint: prefetch lists, hooks, parametrizations and autocast change no numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.utils.parametrizations import weight_norm

from tests.ranks import on_ranks
from tests.twins import Twins, chain
from tests.zoo import FEATURES, SPECIMENS, Chain, Specimen, blocks, layers_of, vectors

# --- prefetching and other hints ---


def losses_with_hints(give: Callable[[Any], None]) -> list[float]:
    model = Twins(SPECIMENS["decoder"]).sharded
    give(model)
    losses = []
    for step in range(3):
        loss = SPECIMENS["decoder"].loss_of(model, step, dist.get_rank())
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
    return losses


def no_hints(model: Any) -> None:
    pass


def two_ahead(model: Any) -> None:
    layers = list(model.layers)
    model.set_modules_to_forward_prefetch(layers[:2])
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 3])
        layer.set_modules_to_backward_prefetch(layers[max(0, index - 2) : index][::-1])


def empty_lists(model: Any) -> None:
    for layer in model.layers:
        layer.set_modules_to_forward_prefetch([])
        layer.set_modules_to_backward_prefetch([])


def useless_lists(model: Any) -> None:
    layers = list(model.layers)
    for layer in layers:
        layer.set_modules_to_forward_prefetch([layer, *layers[::-1]])
        layer.set_modules_to_backward_prefetch([layers[-1], model, layer])


def not_in_backward(model: Any) -> None:
    for layer in model.layers:
        layer.set_modules_to_backward_prefetch([])
    model.set_unshard_in_backward(True)


@pytest.mark.parametrize("hints", [two_ahead, empty_lists, useless_lists, not_in_backward])
@on_ranks()
def test_prefetch_lists_change_no_bit(hints: Callable[[Any], None]) -> None:
    """Prevents: a unit gathered too early, or for nothing, taking the slot of one in use."""
    assert losses_with_hints(hints) == losses_with_hints(no_hints)


class Hooked(Chain):
    """Carries hooks of its own from before it was sharded; they read parameters."""

    def __init__(self) -> None:
        super().__init__(blocks(3))
        layer = self.layers[1]
        layer.register_forward_pre_hook(lambda module, args: (args[0] * module.rise.weight.mean(),))
        layer.register_forward_hook(lambda module, args, output: output * 2 + module.rise.bias.sum())
        layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)


@on_ranks()
def test_hooks_of_the_user_run_where_parameters_are_whole() -> None:
    """Prevents: gathering after the user's hooks, or releasing before them."""
    twins = Twins(Specimen(Hooked, vectors(FEATURES), layers_of))
    twins.train(0)
    for model in twins:
        model.layers[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    twins.train(1, 2)


class Normed(nn.Module):
    """A linear layer whose weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = weight_norm(nn.Linear(FEATURES, 7))
        self.fall = nn.Linear(7, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fall(self.rise(x).tanh())


@on_ranks()
def test_parametrized_layers_may_be_sharded() -> None:
    """Prevents: assuming that a module's class is the one it was written as."""
    Twins(Specimen(lambda: Chain([Normed(), Normed()]), vectors(FEATURES), layers_of)).train(0, 1, 2)


@on_ranks()
def test_autocast_may_cast_what_units_compute_on() -> None:
    """Prevents: a copy that autocast caches outliving the slot it was made from."""
    twins = Twins(chain)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = twins.losses(step)
        for loss in losses:
            loss.backward()
        twins.step()
