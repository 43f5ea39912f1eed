"""Law 6, order is a hint: units with inputs, outputs and parameters of many kinds train as the unsharded model does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn as nn

from tests.ranks import on_ranks
from tests.training import ours, world_mesh
from tests.twins import Twins, keeping, rows
from tests.zoo import FEATURES, Batch, Block, Specimen, layers_of, square_loss, vectors

# --- what goes in and comes out ---


@dataclass
class Record:
    """A dataclass of a tensor and something else."""

    x: torch.Tensor
    name: str = "record"


class Pair(NamedTuple):
    """A named tuple of tensors."""

    left: torch.Tensor
    right: torch.Tensor


class RecordBlock(Block):
    """Takes and returns a dataclass."""

    def forward(self, record: Record) -> Record:  # type: ignore[override]
        return Record(super().forward(record.x), record.name)


class PairBlock(Block):
    """Takes and returns a named tuple."""

    def forward(self, pair: Pair) -> Pair:  # type: ignore[override]
        return Pair(super().forward(pair.left), pair.right)


class StatesBlock(Block):
    """Takes and returns a dict of lists."""

    def forward(self, states: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:  # type: ignore[override]
        return {key: [super(StatesBlock, self).forward(x) for x in values] for key, values in states.items()}


def record_of(x: torch.Tensor) -> Record:
    return Record(x)


def pair_of(x: torch.Tensor) -> Pair:
    return Pair(x, x + 1)


def states_of(x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    return {"states": [x, 2 * x]}


class Bare(nn.Sequential):
    """Layers one after the other; a class of its own because it is wrapped as a whole."""


def packed_loss(output: Any) -> torch.Tensor:
    """A loss for what the blocks above return."""
    return square_loss(list(vars(output).values()) if isinstance(output, Record) else output)


@pytest.mark.parametrize(("block", "pack"), [(RecordBlock, record_of), (PairBlock, pair_of), (StatesBlock, states_of)])
@keeping
@on_ranks()
def test_tensors_inside_containers_take_part_in_backward(
    block: type[Block], pack: Callable[[torch.Tensor], Any], reshard_after_forward: bool | None
) -> None:
    """Prevents: hooks that miss tensors inside containers, so that units are not gathered for backward."""
    specimen = Specimen(
        lambda: Bare(block(), block()),
        lambda generator, step: Batch((pack(torch.randn(3, FEATURES, generator=generator)),)),
        list,
        packed_loss,
    )
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


class Table(nn.Module):
    """Takes nothing and returns a function of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3))

    def forward(self) -> torch.Tensor:
        return self.weight.tanh()


class Lookup(nn.Module):
    """A unit with no inputs, one with integer inputs and one called by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.embedding = nn.Embedding(7, 3)
        self.layers = nn.ModuleList([self.table, self.embedding])

    def forward(self, *, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input=ids) @ self.table().t()


def ids_batch(generator: torch.Generator, step: int) -> Batch:
    return Batch((), {"ids": torch.randint(0, 7, (4,), generator=generator)})


@keeping
@on_ranks()
def test_units_without_inputs_that_need_gradients_are_reduced_all_the_same(
    reshard_after_forward: bool | None,
) -> None:
    """Prevents: relying on the gradient of an input to know that a unit's backward is over."""
    Twins(Specimen(Lookup, ids_batch, layers_of), reshard_after_forward=reshard_after_forward).train(0, 1, 2)


@on_ranks()
def test_an_embedding_that_backward_does_not_read_need_not_be_gathered_for_it() -> None:
    """Prevents: `set_unshard_in_backward(False)` losing the gradient together with the gather."""
    specimen = Specimen(Lookup, ids_batch, layers_of)
    twins = Twins(specimen)
    twins.sharded.embedding.set_unshard_in_backward(False)
    twins.train(0, 1, 2)


class Caster(Block):
    """Notes the dtypes of its inputs and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.dtypes = [x.dtype, scale.dtype, self.rise.weight.dtype]
        return super().forward(x.to(self.rise.weight.dtype)) * scale


@pytest.mark.parametrize("cast_forward_inputs", [True, False])
@on_ranks()
def test_mixed_precision_casts_what_its_policy_says(cast_forward_inputs: bool) -> None:
    """Prevents: casts at the wrong border, and optimizers that update low-precision parameters."""
    policy = ours.MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, output_dtype=torch.float64, cast_forward_inputs=cast_forward_inputs
    )
    model = ours.fully_shard(Caster(), mesh=world_mesh(), mp_policy=policy)
    output = model(rows(), scale=torch.ones(1))
    met = torch.bfloat16 if cast_forward_inputs else torch.float32
    assert model.dtypes == [met, met, torch.bfloat16]
    assert output.dtype == torch.float64
    output.sum().backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


class Adapted(nn.Module):
    """A frozen layer in bf16 with a trainable fp32 correction."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(FEATURES, FEATURES, dtype=torch.bfloat16).requires_grad_(False)
        self.down = nn.Linear(FEATURES, 2)
        self.up = nn.Linear(2, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x.bfloat16()).float() + self.up(self.down(x))


@on_ranks(3)
def test_frozen_parameters_of_another_dtype_may_share_a_unit() -> None:
    """Prevents: a unit that is one flat tensor of one dtype."""
    Twins(Specimen(lambda: Bare(Adapted(), Adapted()), vectors(FEATURES), list)).train(0, 1, 2)


class Mixed(nn.Module):
    """Trainable parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(FEATURES, 5, dtype=torch.float64)
        self.coarse = nn.Linear(5, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coarse(self.fine(x.double()).float())


@on_ranks()
def test_trainable_parameters_of_two_dtypes_may_share_a_unit() -> None:
    """Prevents: an error that a user can only answer by regrouping the model."""
    Twins(Specimen(lambda: Bare(Mixed(), Mixed()), vectors(FEATURES), list)).train(0, 1, 2)
