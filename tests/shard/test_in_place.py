"""Gradients of linear layers are written where they will be reduced, and not copied there.

Whatever is more than one plain use falls back to autograd's own sums. Either way the bits are stock FSDP2's.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from tests.laws.test_memory import units_of
from tests.ranks import on_ranks, run_ranks
from tests.training import Recipe, Run, assert_same_bits, train, world_mesh
from tests.zoo import FEATURES, SPECIMENS, Block, Chain, DecoderBlock, Reuser, Specimen, layers_of, vectors
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.shard.runtime import gradients as gradients_module
from yafsdp_like.shard.runtime.slots import GradientSlot

pytestmark = pytest.mark.slow

BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
ALL_BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16}


# --- models ---


class Thrice(Block):
    """Uses one weight three times in one forward of the unit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = super().forward(x)
        return x


class Shared(nn.Module):
    """Two linear layers with one weight, which run three times in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.first(F.gelu(self.second(F.gelu(self.first(x)))))


class Bare(Block):
    """Uses a layer's weight once more by itself, as a product that knows of no slot."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(x, self.rise.weight).mean()


class Recomputing(Chain):
    """Recomputes every layer in backward, in a backward of its own or not."""

    def __init__(self, layers: Sequence[nn.Module], use_reentrant: bool) -> None:
        super().__init__(layers)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()  # a reentrant checkpoint wants an input that needs a gradient
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def blocks_of(kind: type[nn.Module], num: int = 2) -> list[nn.Module]:
    return [kind() for _ in range(num)]


MODELS = {
    "chain": Specimen(lambda: Chain(blocks_of(Block, 3)), vectors(FEATURES), layers_of),
    "reused": Specimen(lambda: Reuser(blocks_of(Block, 3)), vectors(FEATURES), layers_of),
    "thrice": Specimen(lambda: Chain(blocks_of(Thrice)), vectors(FEATURES), layers_of),
    "shared": Specimen(lambda: Chain(blocks_of(Shared)), vectors(FEATURES), layers_of),
    "bare": Specimen(lambda: Chain(blocks_of(Bare)), vectors(FEATURES), layers_of),
    "recomputed": Specimen(lambda: Recomputing(blocks_of(Block), False), vectors(FEATURES), layers_of),
    "recomputed reentrantly": Specimen(lambda: Recomputing(blocks_of(Block), True), vectors(FEATURES), layers_of),
    "recomputed thrice": Specimen(lambda: Recomputing(blocks_of(Thrice), False), vectors(FEATURES), layers_of),
    "tied": SPECIMENS["tied"],
    "frozen": SPECIMENS["frozen"],
}


# --- nothing is copied ---


class Writes(TorchDispatchMode):
    """Counts what writes to gradient slots, by operation and parameter; alike for all blocks, which share addresses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.names = {
            view.data_ptr(): ".".join(unit.params[k].name.split(".")[-2:])
            for unit in units_of(model)
            for k, view in unit.gradient_slot.views.items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, arguments = kwargs or {}, func._schema.arguments
        passed = [*zip(arguments, args, strict=False), *((s, kwargs[s.name]) for s in arguments if s.name in kwargs)]
        for schema, value in passed:
            for tensor in tree_iter(value) if schema.alias_info and schema.alias_info.is_write else ():
                if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.data_ptr() in self.names:
                    self.counts[func._overloadpacket.__name__, self.names[tensor.data_ptr()]] += 1
        return func(*args, **kwargs)


def writes_of_a_step(precision: dict[str, Any], transport: str) -> Counter[tuple[str, str]]:
    """In a step of the chain after the first, which makes the slots."""
    specimen = MODELS["chain"]
    policy = MixedPrecisionPolicy(**precision)
    model = specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), mp_policy=policy, transport=transport)
    specimen.loss_of(model, 0, 0).backward()
    model.zero_grad()
    with Writes(model) as writes:
        specimen.loss_of(model, 1, 0).backward()
    return writes.counts


COPIED = {("copy_", "norm.weight"): 3, ("copy_", "norm.bias"): 3, ("copy_", "rise.bias"): 3}


@pytest.mark.parametrize(
    ("precision", "transport"),
    [({}, "process_group"), ({}, "peer"), (BF16, "peer")],
    ids=["fp32", "fp32 over peers", "bf16 over peers"],
)
def test_no_weight_gradient_of_a_linear_layer_is_copied(precision: dict[str, Any], transport: str) -> None:
    """The product writes it once. Everything else is moved as autograd completes it."""
    for counts in run_ranks(writes_of_a_step, precision, transport):
        assert counts == {("mm", "rise.weight"): 3, ("mm", "fall.weight"): 3, **COPIED}


def test_gradients_that_wait_in_another_dtype_are_copied_once() -> None:
    """A collective sums in the dtype that it sends, which is not the one that they are computed in."""
    for counts in run_ranks(writes_of_a_step, BF16, "process_group"):
        assert counts == {("copy_", "rise.weight"): 3, ("copy_", "fall.weight"): 3, **COPIED}


# --- the same bits ---


def train_beside_stock(name: str, recipes: Sequence[Recipe]) -> list[tuple[Run, Run]]:
    return [(train(MODELS[name], "ours", recipe), train(MODELS[name], "stock", recipe)) for recipe in recipes]


def assert_equals_stock(name: str, *recipes: Recipe) -> None:
    for pairs in run_ranks(train_beside_stock, name, recipes):
        for ours, stock in pairs:
            assert_same_bits(ours, stock)


@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("name", MODELS)
def test_whatever_uses_a_weight_more_than_once_equals_stock(name: str, transport: str) -> None:
    """Prevents: a sum of several gradients in another order than autograd's."""
    precisions: list[dict[str, Any]] = [{}, BF16, ALL_BF16]
    assert_equals_stock(name, *(Recipe(steps=3, precision=p, transport=transport) for p in precisions))


@pytest.mark.parametrize("sync_each", [True, False])
@pytest.mark.parametrize("name", ["chain", "shared", "tied"])
def test_accumulation_over_backwards_equals_stock(name: str, sync_each: bool) -> None:
    recipes = [Recipe(steps=2, micro_batches=3, sync_each=sync_each, precision=p) for p in ({}, BF16)]
    assert_equals_stock(name, *recipes)


# --- large parameters of outer units ---


def reductions_of_a_step(model: nn.Module, specimen: Specimen) -> list[tuple[str, ...]]:
    """The parameters that were reduced together, in order, in a second step."""
    found: list[tuple[str, ...]] = []
    reduce = GradientSlot.reduce_scatter

    def noted(slot: GradientSlot, which: Sequence[int]) -> Any:
        found.append(tuple(slot.unit.params[k].name for k in which))
        return reduce(slot, which)

    specimen.loss_of(model, 0, 0).backward()
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientSlot, "reduce_scatter", noted)
        specimen.loss_of(model, 1, 0).backward()
    return found


def layer_names(index: int) -> tuple[str, ...]:
    return tuple(f"layers.{index}.{name}" for name, _ in DecoderBlock(width=12, heads=3, hidden=20).named_parameters())


@pytest.mark.parametrize("transport", ["process_group", "peer"])
@on_ranks()
def test_a_large_head_is_reduced_before_the_blocks(transport: str) -> None:
    """Prevents: the largest reduction of a model starting when nothing is left to hide it behind."""
    specimen = SPECIMENS["decoder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients_module, "EARLY_NUMEL", 200)  # head and embedding have 19 x 12, the norm 12
        model = specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), transport=transport)
        found = reductions_of_a_step(model, specimen)
    blocks = [layer_names(index) for index in (2, 1, 0)]
    assert found == [("head.weight",), *blocks, ("embedding.weight", "norm.weight", "norm.bias")]
    model = specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), transport=transport)
    root = ("embedding.weight", "norm.weight", "norm.bias", "head.weight")
    assert reductions_of_a_step(model, specimen) == [*blocks, root]


@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("name", ["decoder", "nested", "tied", "waster"])
def test_reducing_early_changes_no_bit(name: str, transport: str) -> None:
    for early, stock in run_ranks(train_early, name, transport):
        assert_same_bits(early, stock)


def train_early(name: str, transport: str) -> tuple[Run, Run]:
    recipe = Recipe(steps=3, micro_batches=2, precision=BF16, transport=transport)
    stock = train(name, "stock", recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients_module, "EARLY_NUMEL", 1)
        return train(name, "ours", recipe), stock
