"""A sharded model and its unsharded twin, which do the same things and are compared; and what their tests share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

import yafsdp_like as ours
from tests import training
from tests.training import full
from tests.zoo import FEATURES, Chain, Specimen, blocks, layers_of, vectors

Mode = Callable[[], AbstractContextManager[Any]]
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
spilling = pytest.mark.filterwarnings("ignore::yafsdp_like.SpillWarning")  # two slots at once were not planned
keeping = pytest.mark.parametrize(  # None reshards what True does, but for the root
    "reshard_after_forward", [pytest.param(True, marks=pytest.mark.slow), False, None]
)
chain = Specimen(lambda: Chain(blocks(3)), vectors(FEATURES), layers_of)


def rows(seed: int = 0) -> torch.Tensor:
    """A batch of this rank."""
    return torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(10 * seed + dist.get_rank()))


def registered(model: nn.Module) -> dict[str, bool]:
    """For each parameter, whether what the module holds now is the sharded one."""
    return {name: isinstance(parameter, DTensor) for name, parameter in model.named_parameters()}


class Twins:
    """On one rank, a sharded model and its unsharded twin, doing the same things; for workers.

    `step` makes the twin's gradients those of all ranks, compares, and updates both. The sharded parameters
    are those that an optimizer would hold, whatever the modules hold meanwhile.
    """

    def __init__(self, specimen: Specimen, **options: Any) -> None:
        self.specimen = specimen
        self.plain: Any = specimen.fresh()
        self.sharded: Any = specimen.wrap(specimen.fresh(), ours.fully_shard, mesh=training.world_mesh(), **options)
        self.parameters = [dict(model.named_parameters()) for model in self]
        self.optimizers = [torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9) for parameters in self.parameters]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sharded, self.plain))

    def losses(self, step: int) -> list[torch.Tensor]:
        """Both losses on this rank's batch of a step, which must agree."""
        sharded, plain = (self.specimen.loss_of(model, step, dist.get_rank()) for model in self)
        torch.testing.assert_close(sharded, plain)
        return [sharded, plain]

    def backward(self, step: int) -> None:
        """Forward and backward of both."""
        for loss in self.losses(step):
            loss.backward()

    def step(self) -> None:
        """Compare gradients, then let the optimizers step and zero them."""
        self.compare_gradients()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def train(self, *steps: int) -> None:
        """Whole training steps."""
        for step in steps:
            self.backward(step)
            self.step()

    def compare_gradients(self) -> None:
        """Average the twin's gradients over ranks; the sharded ones must equal them. None counts as zero."""
        sharded, plain = self.parameters
        for name, parameter in plain.items():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(expected)
            expected.div_(dist.get_world_size())
            found = sharded[name].grad
            actual = torch.zeros_like(parameter) if found is None else full(found)
            torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")

    def compare_parameters(self) -> None:
        """Both hold the same numbers."""
        sharded, plain = self.parameters
        for name, parameter in plain.items():
            torch.testing.assert_close(full(sharded[name]), parameter.detach())
