"""Law 6, order is a hint: after an exception, and where forwards are recomputed, numbers are the unsharded model's."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from tests.ranks import on_ranks
from tests.twins import Twins, keeping, spilling
from tests.zoo import FEATURES, Block, Chain, Specimen, blocks, layers_of, vectors

# --- recomputation ---


class Segments(Chain):
    """Recomputes several layers at a time."""

    def __init__(self, layers: list[nn.Module], use_reentrant: bool) -> None:
        super().__init__(layers)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        for segment in (self.layers[1:4], self.layers[4:]):
            x = checkpoint(nn.Sequential(*segment), x, use_reentrant=self.use_reentrant)
        return x


@spilling
@pytest.mark.slow(unless=lambda use_reentrant, reshard_after_forward: use_reentrant is not reshard_after_forward)
@pytest.mark.parametrize("use_reentrant", [False, True])
@keeping
@on_ranks()
def test_segments_of_several_units_may_be_recomputed(use_reentrant: bool, reshard_after_forward: bool | None) -> None:
    """Prevents: a forward inside backward being taken for a new iteration, or taking the slot in use there."""
    specimen = Specimen(lambda: Segments(blocks(7), use_reentrant), vectors(FEATURES), layers_of)
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


class Recomputer(Chain):
    """Recomputes inside what is recomputed, and each use of a layer used again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.layers

        def inner(x: torch.Tensor) -> torch.Tensor:
            return second(checkpoint(first, x, use_reentrant=False))

        x = checkpoint(inner, x, use_reentrant=False)
        return checkpoint(first, third(x), use_reentrant=False)


@spilling
@keeping
@on_ranks()
def test_recomputation_may_be_nested_and_repeated(reshard_after_forward: bool | None) -> None:
    """Prevents: matching recomputations to forwards by their number."""
    specimen = Specimen(lambda: Recomputer(blocks(3)), vectors(FEATURES), layers_of)
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


# --- exceptions ---


class FaultError(Exception):
    """Raised on purpose, on every rank."""


class FailingBackward(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise FaultError("backward")


class Fragile(Chain):
    """Raises where `fault` says: before, inside or after a layer, or in the backward there."""

    fault: tuple[str, int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if self.fault == ("before", index):
                raise FaultError("forward")
            layer.fault = self.fault == ("inside", index)
            x = layer(x)
            if self.fault == ("backward", index):
                x = FailingBackward.apply(x)
        if self.fault == ("after", index):
            raise FaultError("forward")
        return x


class FragileBlock(Block):
    """Raises where `fault` is set."""

    fault = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fault:
            raise FaultError("inside")
        return super().forward(x)


fragile = Specimen(lambda: Fragile([FragileBlock() for _ in range(4)]), vectors(FEATURES), layers_of)
faults = pytest.mark.parametrize(
    "fault",
    [
        ("before", 0),
        ("inside", 0),
        ("before", 2),
        ("inside", 3),
        ("after", 3),
        ("backward", 0),
        ("backward", 2),
    ],
    ids=lambda fault: f"{fault[0]}-{fault[1]}",
)


def fail(twins: Twins, fault: tuple[str, int]) -> None:
    """One step of the sharded model that raises."""
    twins.sharded.fault = fault
    twins.sharded.fault = fault
    with pytest.raises(FaultError):
        twins.specimen.loss_of(twins.sharded, 77, dist.get_rank()).backward()
    twins.sharded.fault = None
    for parameter in twins.sharded.parameters():
        parameter.grad = None  # what the failed backward had reduced before it failed


@pytest.mark.slow(
    unless=lambda fault, asked, reshard_after_forward: (
        (reshard_after_forward is None and not asked) or fault in (("inside", 3), ("backward", 2))
    )
)
@faults
@pytest.mark.parametrize("asked", [False, True], ids=["unasked", "reset_iter_state"])
@keeping
@on_ranks()
def test_after_an_exception_the_next_step_is_right(
    fault: tuple[str, int], asked: bool, reshard_after_forward: bool | None
) -> None:
    """Prevents: slots that stay acquired, or a half-finished backward's gradients, after an exception."""
    twins = Twins(fragile, reshard_after_forward=reshard_after_forward)
    for step in range(2):
        fail(twins, fault)  # first before anything has run, then between steps
        if asked:
            twins.sharded.reset_iter_state()
        twins.train(2 * step, 2 * step + 1)


@pytest.mark.slow(unless=lambda fault: fault in (("inside", 3), ("backward", 0), ("backward", 2)))
@faults
@on_ranks()
def test_an_exception_while_accumulating_drops_what_was_not_reduced(fault: tuple[str, int]) -> None:
    """Prevents: half a micro-batch in the next step's sum. FSDP2's `reset_iter_state` asks for it."""
    twins = Twins(fragile)
    for step in range(2):
        twins.sharded.set_requires_gradient_sync(False)
        fail(twins, fault)
        twins.sharded.reset_iter_state()
        twins.backward(2 * step)
        twins.sharded.set_requires_gradient_sync(True)
        twins.backward(2 * step + 1)
        twins.step()


@on_ranks()
def test_after_an_exception_in_evaluation_the_next_step_is_right() -> None:
    """Prevents: relying on backward to clean up."""
    twins = Twins(fragile)
    for step in range(3):
        with torch.no_grad():
            fail(twins, ("inside", 2))
        twins.train(step)


@on_ranks()
def test_an_exception_between_a_forward_and_its_backward_spoils_neither() -> None:
    """Prevents: cleaning up after a failed forward also dropping what a waiting backward needs."""
    twins = Twins(fragile)
    for step in range(3):
        losses = twins.losses(step)
        with torch.no_grad():
            fail(twins, ("inside", 2))
        for loss in losses:
            loss.backward()
        twins.step()
