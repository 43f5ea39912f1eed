"""Law 7, ranks agree or say so: ranks that build different models get one clear error at the first forward, no hang.

In every test rank 1 is the odd one: `build(odd)` is what a rank does, `odd` whether it is rank 1.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.ranks import RankError, run_ranks
from tests.zoo import FEATURES, Block, Chain, blocks, ours, world_mesh

ODD_RANK = 1
SECONDS = 5.0  # an error takes milliseconds; the machine may be busy
PATIENCE = 15.0  # before a job counts as hung
Build = Callable[[bool], Any]
world_sizes = pytest.mark.parametrize("world_size", [2, 3])


@dataclass(frozen=True)
class Outcome:
    """What one rank's forward and backward ended with; no error is ("", "")."""

    error: str
    message: str
    seconds: float


def train(model: nn.Module) -> Outcome:
    begin = time.perf_counter()
    error, message = "", ""
    try:
        model(torch.ones(2, FEATURES)).sum().backward()
    except Exception as e:
        error, message = type(e).__name__, str(e)
    return Outcome(error, message, time.perf_counter() - begin)


def outcomes(build: Build, num_steps: int) -> list[Outcome]:
    model = build(dist.get_rank() == ODD_RANK)
    return [train(model) for _ in range(num_steps)]


def run(build: Build, world_size: int = 2, num_steps: int = 1, timeout: float = PATIENCE) -> list[Outcome]:
    """Every rank's outcome of the last step; a hang raises RankError."""
    answers = run_ranks(outcomes, build, num_steps, world_size=world_size, timeout=timeout)
    return [answer[-1] for answer in answers]


def others(world_size: int) -> str:
    """The ranks that are not odd, as an error lists them."""
    return ", ".join(str(rank) for rank in range(world_size) if rank != ODD_RANK)


# --- models ---


def sharded(model: Chain, units: Sequence[nn.Module] | None = None, **options: Any) -> Chain:
    """The root last; `units` are its layers unless said otherwise."""
    for unit in (*(model.layers if units is None else units), model):
        ours.fully_shard(unit, mesh=world_mesh(), **options)
    return model


def the_same(odd: bool) -> Chain:
    return sharded(Chain(blocks(2)))


def siblings_in_another_order(odd: bool) -> Chain:
    model = Chain(blocks(2))
    return sharded(model, list(model.layers)[:: -1 if odd else 1])


def another_shape(odd: bool) -> Chain:
    return sharded(Chain([Block(), Block(hidden=12 if odd else 10)]))


def one_layer_more(odd: bool) -> Chain:
    return sharded(Chain(blocks(3 if odd else 2)))


def one_unit_less(odd: bool) -> Chain:
    model = Chain(blocks(2))
    return sharded(model, model.layers[1:] if odd else model.layers)


def parent_before_child(odd: bool) -> Chain:
    model = Chain(blocks(2))
    if odd:
        ours.fully_shard(model.layers[1], mesh=world_mesh())
        ours.fully_shard(model, mesh=world_mesh())
        ours.fully_shard(model.layers[0], mesh=world_mesh())
        return model
    return sharded(model)


def frozen(odd: bool) -> Chain:
    model = Chain(blocks(2))
    model.layers[1].requires_grad_(not odd)
    return sharded(model)


def another_precision(odd: bool) -> Chain:
    return sharded(Chain(blocks(2)), mp_policy=ours.MixedPrecisionPolicy(param_dtype=torch.bfloat16 if odd else None))


def another_dtype(odd: bool) -> Chain:
    model = Chain(blocks(2))
    return sharded(model.double() if odd else model)


def on_meta(odd: bool) -> Chain:
    with torch.device("meta" if odd else "cpu"):
        return sharded(Chain(blocks(2)))


def replaced(odd: bool) -> Chain:
    model = sharded(Chain(blocks(2)))
    if odd:
        model.layers[1].rise.weight = nn.Parameter(torch.zeros(3, 3))
    return model


def resharded(odd: bool) -> Chain:
    return sharded(Chain(blocks(2)), reshard_after_forward=not odd)


def prefetched(odd: bool) -> Chain:
    model: Any = sharded(Chain(blocks(3)))
    if odd:
        model.layers[0].set_modules_to_forward_prefetch([model.layers[2]])
    return model


def divided(odd: bool) -> Chain:
    model: Any = sharded(Chain(blocks(2)))
    if odd:
        model.layers[0].set_gradient_divide_factor(3.0)
    return model


# --- different models ---


@world_sizes
@pytest.mark.parametrize("build", [the_same, siblings_in_another_order])
def test_ranks_that_agree_just_run(build: Build, world_size: int) -> None:
    """Units run in the order of the tree, so that the order of calls on siblings makes no difference."""
    assert [outcome.error for outcome in run(build, world_size)] == [""] * world_size


DIFFERENCES = {  # what the others have where they first differ, and what the odd rank has there
    another_shape: (r"layers\.1\.rise\.weight \[10, 6\] of unit 'layers\.1'", r"layers\.1\.rise\.weight \[12, 6\]"),
    one_layer_more: (r"unit .root. with reshard", r"layers\.2\.norm\.weight \[6\] of unit 'layers\.2'"),
    one_unit_less: (r"layers\.0\.norm\.weight \[6\] of unit 'layers\.0'", r"layers\.0\.norm\.weight .* 'root'"),
    parent_before_child: (r"layers\.0\.norm\.weight \[6\] of unit 'layers\.0'", r"layers\.0\.norm\.weight .* 'root"),
    frozen: (r"layers\.1\.norm\.weight .* trainable", r"layers\.1\.norm\.weight .* frozen"),
    another_precision: (r"layers\.0\.norm\.weight .* computed in torch\.float32", r".* computed in torch\.bfloat16"),
    another_dtype: (r"layers\.0\.norm\.weight .* torch\.float32", r"layers\.0\.norm\.weight .* torch\.float64"),
}


@world_sizes
@pytest.mark.parametrize("build", DIFFERENCES)
def test_ranks_that_differ_are_all_told_the_first_difference(build: Build, world_size: int) -> None:
    """Prevents: a hang, or shards of one parameter taken for another's."""
    theirs, odd_ones = DIFFERENCES[build]
    found = run(build, world_size)
    assert [outcome.error for outcome in found] == ["RuntimeError"] * world_size
    assert len({outcome.message for outcome in found}) == 1
    assert max(outcome.seconds for outcome in found) < SECONDS
    message = found[0].message
    assert re.match(r"ranks shard different models; the first difference is entry \d+: ", message)
    assert re.search(rf": rank {others(world_size)}: {theirs}.*; rank {ODD_RANK}: {odd_ones}", message), message
    assert "call fully_shard on them in the same order with the same arguments, on every rank" in message


# --- an error on one rank ---


def no_room(odd: bool) -> AbstractContextManager[Any]:
    """An arena that cannot be allocated."""
    error = torch.OutOfMemoryError("no room for 7 bytes")
    return mock.patch("yafsdp_like.shard.building.build", side_effect=error) if odd else nullcontext()


def first_forward_without_room() -> Outcome:
    odd = dist.get_rank() == ODD_RANK
    model = the_same(odd)
    with no_room(odd):
        return train(model)


def first_forward_of_ranks_that_fail_each_in_its_own_way() -> Outcome:
    return train([the_same, on_meta, replaced][dist.get_rank()](True))


def assert_one_rank_failed(found: Sequence[Outcome], error: str, message: str) -> None:
    """The odd rank raises its own error, the others one that names it and repeats what it said."""
    for rank, outcome in enumerate(found):
        if rank == ODD_RANK:
            assert (outcome.error, outcome.message[: len(message)]) == (error, message)
        else:
            told = f"rank {ODD_RANK} failed to shard the model: {error}: {message}"
            assert (outcome.error, outcome.message[: len(told)]) == ("RuntimeError", told)
        assert outcome.seconds < SECONDS


@world_sizes
def test_a_rank_left_on_meta_is_named_with_its_parameters(world_size: int) -> None:
    """Prevents (FSDP2): other ranks waiting in their first all-gather for a rank that has raised."""
    message = (
        "FSDP parameters should be materialized from meta device before training, but the following were still on meta "
        "device: ['layers.0.norm.weight', 'layers.0.norm.bias', "
    )
    assert_one_rank_failed(run(on_meta, world_size), "RuntimeError", message)


@world_sizes
def test_a_rank_whose_parameter_was_replaced_is_named(world_size: int) -> None:
    message = "layers.1.rise.weight: expected a parameter of shape (10, 6) in its place, found (3, 3)"
    assert_one_rank_failed(run(replaced, world_size), "ValueError", message)


@world_sizes
def test_a_rank_without_room_for_its_arena_is_named(world_size: int) -> None:
    found = run_ranks(first_forward_without_room, world_size=world_size, timeout=PATIENCE)
    assert_one_rank_failed(found, "OutOfMemoryError", "no room for 7 bytes")


def test_several_ranks_that_fail_are_all_named() -> None:
    fine, meta, other = run_ranks(first_forward_of_ranks_that_fail_each_in_its_own_way, world_size=3, timeout=PATIENCE)
    assert (fine.error, meta.error, other.error) == ("RuntimeError", "RuntimeError", "ValueError")
    assert fine.message == "\n".join(
        f"rank {rank} failed to shard the model: {outcome.error}: {outcome.message}"
        for rank, outcome in ((1, meta), (2, other))
    )


# --- after the error ---


def train_another_model_after(build: Build) -> list[str]:
    return [outcome.error for outcome in (*outcomes(build, 1), *outcomes(the_same, 1))]


@pytest.mark.parametrize(("build", "error"), [(another_shape, "RuntimeError"), (on_meta, "RuntimeError")])
def test_ranks_can_go_on_together_with_another_model(build: Build, error: str) -> None:
    """Prevents: a rank that is left one collective ahead of the others."""
    assert run_ranks(train_another_model_after, build, timeout=PATIENCE) == [[error, ""]] * 2


@pytest.mark.parametrize("build", [another_shape, on_meta])
def test_the_next_forward_says_the_same_again(build: Build) -> None:
    """Prevents: an error that is caught once, and a hang after it."""
    first, second = run(build), run(build, num_steps=2)
    assert [(outcome.error, outcome.message) for outcome in first] == [(o.error, o.message) for o in second]


def materialize_after_the_error() -> list[str]:
    model = on_meta(dist.get_rank() == ODD_RANK)
    errors = [train(model).error]
    if dist.get_rank() == ODD_RANK:
        model.to_empty(device="cpu")
    return [*errors, train(model).error]


def test_a_rank_that_mends_its_model_can_go_on() -> None:
    assert run_ranks(materialize_after_the_error, timeout=SECONDS) == [["RuntimeError", ""]] * 2


# --- different policies ---


def test_ranks_that_reshard_differently_are_told_so() -> None:
    """Prevents: ranks waiting for all-gathers in backward that others do not need."""
    assert [outcome.error for outcome in run(resharded, timeout=3)] == ["RuntimeError"] * 2


def test_ranks_that_prefetch_differently_are_told_so() -> None:
    """Prevents: one rank's layer 2 arriving as another's layer 1, which no error and no hang would show."""
    assert [outcome.error for outcome in run(prefetched)] == ["RuntimeError"] * 2


def test_ranks_that_divide_gradients_differently_are_told_so() -> None:
    """Prevents: rows of one parameter that learn at different rates."""
    assert [outcome.error for outcome in run(divided)] == ["RuntimeError"] * 2


def freeze_after_the_first_step() -> list[Outcome]:
    model = the_same(False)
    first = train(model)
    model.layers[1].requires_grad_(dist.get_rank() != ODD_RANK)
    return [first, train(model)]


@pytest.mark.xfail(
    reason="a rank whose own model changed after the first step asks the others, which do not expect it",
    raises=RankError,
    strict=True,
)
def test_a_rank_that_changes_its_model_later_is_named() -> None:
    """Prevents: a collective of the agreement meeting another rank's all-gather."""
    found = run_ranks(freeze_after_the_first_step, timeout=SECONDS)
    assert [[outcome.error for outcome in steps] for steps in found] == [["", "RuntimeError"]] * 2
