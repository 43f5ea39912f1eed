"""Parity: the same numbers as stock FSDP2, bit for bit, and as a model that is not sharded, closely."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.distributed._composable.checkpoint_activation import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from tests.ranks import run_ranks
from tests.training import Prepare, Recipe, Run, assert_close, assert_same_bits, train, train_unsharded
from tests.twins import Twins
from tests.zoo import FEATURES, SPECIMENS, Chain, Specimen, blocks, layers_of, vectors

# Stock warns of views among a unit's outputs, which an LSTM returns.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
BF16 = {"param_dtype": torch.bfloat16}


def train_both(name: str, recipe: Recipe, prepare: Prepare | None = None) -> tuple[Run, Run]:
    return train(name, "ours", recipe, prepare), train(name, "stock", recipe, prepare)


def assert_equals_stock(name: str, recipe: Recipe, prepare: Prepare | None = None) -> Run:
    """On two ranks; returns the first one's run."""
    runs = run_ranks(train_both, name, recipe, prepare)
    for ours, stock in runs:
        assert_same_bits(ours, stock)
    return runs[0][0]


def assert_equals_stock_and_follows_unsharded(name: str, recipe: Recipe) -> None:
    assert_close(assert_equals_stock(name, recipe), train_unsharded(name, recipe, 2))


# --- every specimen ---


@pytest.mark.slow(unless=lambda name: name in ("odd", "decoder", "nested", "skipped"))
@pytest.mark.parametrize("name", SPECIMENS)
def test_twenty_steps_equal_stock_bit_for_bit(name: str) -> None:
    assert_equals_stock(name, Recipe(steps=20))


@pytest.mark.slow(unless=lambda name, world_size: world_size == 2 or (name == "nested" and world_size == 1))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SPECIMENS)
def test_any_world_size_follows_the_unsharded_model(name: str, world_size: int) -> None:
    run_ranks(train_twins, name, world_size=world_size)


def train_twins(name: str) -> None:
    twins = Twins(SPECIMENS[name])
    twins.train(0, 1, 2)
    twins.compare_parameters()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
@pytest.mark.parametrize("name", SPECIMENS)
def test_on_gpus_too_twenty_steps_equal_stock_bit_for_bit(name: str) -> None:
    """All but norms, whose kernel sums aligned addresses, like ours, in another order: nothing is clipped."""
    recipe = Recipe(steps=20, max_norm=1e9, device="cuda")
    for ours, stock in run_ranks(train_both, name, recipe, device="cuda"):
        assert ours.norms == pytest.approx(stock.norms, rel=1e-5)
        assert_same_bits(dataclasses.replace(ours, norms=stock.norms), stock)


# --- slots that change hands ---


def train_long() -> tuple[Run, Run]:
    long = Specimen(lambda: Chain(blocks(6)), vectors(FEATURES), layers_of)
    return train(long, "ours", Recipe(steps=5)), train(long, "stock", Recipe(steps=5))


def test_a_chain_longer_than_its_slots_equals_stock_bit_for_bit() -> None:
    """Prevents: bytes that change hands while somebody still reads them."""
    for ours, stock in run_ranks(train_long):
        assert_same_bits(ours, stock)


# --- mixed precision ---


@pytest.mark.slow(
    unless=lambda name, reduce_dtype: (
        name == "decoder" or (name in ("odd", "tied", "frozen", "group") and reduce_dtype == torch.float32)
    )
)
@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("name", ["odd", "decoder", "tied", "nested", "reused", "skipped", "frozen", "group", "lstm"])
def test_bf16_compute_equals_stock_bit_for_bit(name: str, reduce_dtype: torch.dtype | None) -> None:
    assert_equals_stock(name, Recipe(steps=5, precision=BF16 | {"reduce_dtype": reduce_dtype}))


@pytest.mark.slow(unless=lambda sync_each, reduce_dtype: sync_each == (reduce_dtype == torch.bfloat16))
@pytest.mark.parametrize("sync_each", [True, False])
@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
def test_bf16_compute_accumulates_as_stock_does(reduce_dtype: torch.dtype, sync_each: bool) -> None:
    precision = BF16 | {"reduce_dtype": reduce_dtype, "output_dtype": torch.float32}
    assert_equals_stock("nested", Recipe(steps=2, precision=precision, micro_batches=3, sync_each=sync_each))


def test_reducing_in_bf16_alone_equals_stock() -> None:
    assert_equals_stock("odd", Recipe(steps=8, precision={"reduce_dtype": torch.bfloat16}))


# --- accumulation and resharding ---


@pytest.mark.slow(
    unless=lambda name, sync_each, reshard_after_backward: (
        name == "nested" or (not sync_each and reshard_after_backward)
    )
)
@pytest.mark.parametrize("reshard_after_backward", [True, False])
@pytest.mark.parametrize("sync_each", [True, False])
@pytest.mark.parametrize("name", ["nested", "frozen", "skipped", "tied"])
def test_accumulation_equals_stock_and_follows_the_unsharded_model(
    name: str, sync_each: bool, reshard_after_backward: bool
) -> None:
    recipe = Recipe(steps=2, micro_batches=3, sync_each=sync_each, reshard_after_backward=reshard_after_backward)
    assert_equals_stock_and_follows_unsharded(name, recipe)


@pytest.mark.slow(unless=lambda name, reshard_after_forward: name == "nested" or reshard_after_forward is False)
@pytest.mark.parametrize("reshard_after_forward", [True, False, None])
@pytest.mark.parametrize("name", ["decoder", "nested", "group", "reused"])
def test_resharding_after_forward_or_not_gives_the_same_bits(name: str, reshard_after_forward: bool | None) -> None:
    assert_equals_stock(name, Recipe(steps=4, reshard_after_forward=reshard_after_forward))


# --- optimizers and clipping ---


@pytest.mark.slow(unless=lambda optimizer, foreach: optimizer == "AdamW" or foreach)
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_every_optimizer_equals_stock(optimizer: str, foreach: bool) -> None:
    assert_equals_stock("odd", Recipe(steps=5, optimizer=optimizer, foreach=foreach))


@pytest.mark.slow(unless=lambda name, norm_type: (name, norm_type) in (("decoder", 2.0), ("frozen", float("inf"))))
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("name", ["decoder", "frozen"])  # no empty shard, which has no inf norm in torch
def test_every_clipping_norm_equals_stock_and_the_unsharded_model(name: str, norm_type: float) -> None:
    recipe = Recipe(steps=4, max_norm=0.01, norm_type=norm_type)
    assert_equals_stock(name, recipe)
    run = run_ranks(train, name, "ours", recipe, world_size=3)[0]
    assert_close(run, train_unsharded(name, recipe, 3))


@pytest.mark.slow(unless=lambda name: name == "waster")
@pytest.mark.parametrize("name", ["odd", "skipped", "waster"])
def test_gradients_zeroed_in_place_equal_stock(name: str) -> None:
    assert_equals_stock(name, Recipe(steps=5, set_to_none=False))


@pytest.mark.parametrize("divide_factor", [1.0, 3.0])
def test_a_divide_factor_with_forced_sums_equals_stock(divide_factor: float) -> None:
    assert_equals_stock_and_follows_unsharded("decoder", Recipe(steps=4, divide_factor=divide_factor))


# --- activation checkpointing ---


def recompute_inside(model: nn.Module) -> None:
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def recompute_composably(model: nn.Module) -> None:
    for layer in model.layers:
        composable_checkpoint(layer)


def recompute_in_wrappers(model: nn.Module) -> None:
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer)


@pytest.mark.slow(unless=lambda prepare, precision: (prepare is recompute_inside) == (not precision))
@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prepare", [recompute_inside, recompute_composably, recompute_in_wrappers])
def test_recomputation_inside_a_unit_equals_stock(prepare: Prepare, precision: dict[str, torch.dtype]) -> None:
    assert_equals_stock("decoder", Recipe(steps=5, precision=precision), prepare)


def train_recomputed_and_not(recipe: Recipe) -> tuple[Run, Run]:
    return train("recomputed", "ours", recipe), train("decoder", "ours", recipe)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_recomputing_whole_units_changes_no_bit(reshard_after_forward: bool) -> None:
    recipe = Recipe(steps=5, reshard_after_forward=reshard_after_forward)
    for recomputed, plain in run_ranks(train_recomputed_and_not, recipe):
        assert_same_bits(recomputed, plain)
