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

from tests.ranks import run_ranks
from tests.training import ours, world_mesh
from tests.zoo import FEATURES, Block, Chain, blocks

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
def test_ranks_with_the_same_model_just_run(build: Build, world_size: int) -> None:
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
def test_ranks_that_differ_all_raise_the_first_difference(build: Build, world_size: int) -> None:
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
    return mock.patch("yafsdp_like.shard.runtime.allocated_memory.build", side_effect=error) if odd else nullcontext()


def first_forward_without_room() -> Outcome:
    odd = dist.get_rank() == ODD_RANK
    model = the_same(odd)
    with no_room(odd):
        return train(model)


def first_forward_of_two_ranks_that_fail() -> Outcome:
    return train([the_same, on_meta, on_meta][dist.get_rank()](True))


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
def test_a_rank_without_room_for_its_arena_is_named(world_size: int) -> None:
    found = run_ranks(first_forward_without_room, world_size=world_size, timeout=PATIENCE)
    assert_one_rank_failed(found, "OutOfMemoryError", "no room for 7 bytes")


def test_several_ranks_that_fail_are_all_named() -> None:
    fine, meta, other = run_ranks(first_forward_of_two_ranks_that_fail, world_size=3, timeout=PATIENCE)
    assert (fine.error, meta.error, other.error) == ("RuntimeError", "RuntimeError", "RuntimeError")
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


def test_ranks_that_reshard_differently_raise_an_error() -> None:
    """Prevents: ranks waiting for all-gathers in backward that others do not need."""
    assert [outcome.error for outcome in run(resharded, timeout=3)] == ["RuntimeError"] * 2


def test_ranks_that_prefetch_differently_raise_an_error() -> None:
    """Prevents: one rank's layer 2 arriving as another's layer 1, which no error and no hang would show."""
    assert [outcome.error for outcome in run(prefetched)] == ["RuntimeError"] * 2


def test_ranks_that_divide_gradients_differently_raise_an_error() -> None:
    """Prevents: rows of one parameter that learn at different rates."""
    assert [outcome.error for outcome in run(divided)] == ["RuntimeError"] * 2


def freeze_after_the_first_step() -> list[Outcome]:
    model = the_same(False)
    first = train(model)
    model.layers[1].requires_grad_(dist.get_rank() != ODD_RANK)
    return [first, train(model)]


def test_a_rank_that_changes_its_model_later_is_named() -> None:
    """Prevents: the collective that compares models being matched with another rank's all-gather."""
    found = run_ranks(freeze_after_the_first_step, timeout=PATIENCE)
    assert [[outcome.error for outcome in steps] for steps in found] == [["", "RuntimeError"]] * 2
    assert "rank 1: plans the memory of the model" in found[0][1].message == found[1][1].message


# --- different things done by the same model ---


class Fork(nn.Module):
    """Two parameters, of which a rank may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))

    def forward(self, x: torch.Tensor, use: str) -> torch.Tensor:
        return sum(weight * (getattr(self, name) * x).sum() for name, weight in USES[use])


USES = {"both": [("a", 100.0), ("b", 100.0)], "a": [("a", 1.0)], "b": [("b", 1.0)]}


class Routed(nn.Module):
    """Four experts, each a unit; the weights of expert ``i`` are ``i + 1``."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, width, bias=False) for width in widths)
        for number, expert in enumerate(self.experts, 1):
            nn.init.constant_(expert.weight, float(number))

    def forward(self, x: torch.Tensor, *route: int) -> torch.Tensor:
        return torch.stack([self.experts[i](x).mean() for i in route]).sum()


def shards(model: nn.Module, *units: nn.Module, transport: str) -> Any:
    for unit in (*units, model):
        ours.fully_shard(unit, mesh=world_mesh(), transport=transport)
    return model


def first_gradients(model: nn.Module) -> list[float | None]:
    """One element of each parameter's, on any rank's own rows."""
    return [None if p.grad is None else p.grad.to_local().flatten()[0].item() for p in model.parameters()]


transports = pytest.mark.parametrize("transport", ["process_group", "peer"])


def forked(transport: str, fills: bool, unsynced: bool) -> tuple[str, list[float | None]]:
    model = shards(Fork(), transport=transport)
    rank = dist.get_rank()
    x = torch.full((4, 3), float(rank + 1))
    model.set_reduce_scatter_unused_params(fills)
    try:
        model(x, "both").backward()
        model.zero_grad()
        if unsynced:
            model.set_requires_gradient_sync(False)
            model(x, "ab"[rank]).backward()
            model.set_requires_gradient_sync(True)
        model(x, "ab"[rank]).backward()
    except RuntimeError as e:
        return str(e), []
    return "", first_gradients(model)


@transports
@pytest.mark.parametrize("unsynced", [False, True], ids=["one backward", "accumulated"])
def test_ranks_that_use_different_parameters_raise_or_reduce_zeros(transport: str, unsynced: bool) -> None:
    """Prevents: 1.5 for 0.5, where different parameters' gradients are added up, or 100.5, from a stale slot."""
    factor = 2.0 if unsynced else 1.0
    assert run_ranks(forked, transport, True, unsynced, timeout=PATIENCE) == [("", [0.5 * factor, 1.0 * factor])] * 2
    (first, _), (second, _) = run_ranks(forked, transport, False, unsynced, timeout=PATIENCE)
    told = (
        "rank 0: reduce-scatters gradients of unit 'root': a .*; rank 1: reduce-scatters gradients of unit 'root': b "
    )
    assert first == second and re.search(told, first) and "set_reduce_scatter_unused_params(True)" in first


def routed(transport: str, fills: bool, widths: Sequence[int], routes: Sequence[Sequence[int]]) -> tuple[str, Any]:
    model = Routed(widths)
    model = shards(model, *model.experts, transport=transport)
    model.set_reduce_scatter_unused_params(fills)
    try:
        out = model(torch.ones(2, 3, requires_grad=True), *routes[dist.get_rank()])
        out.backward()
    except RuntimeError as e:
        return str(e), None
    return "", (out.item(), first_gradients(model))


ROUTES = [([0], [3]), ([3], [0]), ([1, 2], [0, 3]), ([0, 2], [1])]


@pytest.mark.parametrize("widths", [(4, 4, 4, 4), (4, 6, 8, 10)], ids=["one shape", "other shapes"])
@pytest.mark.parametrize("routes", ROUTES)
def test_experts_that_are_units_may_differ_by_rank_over_peers(routes: Any, widths: Sequence[int]) -> None:
    """Prevents: one expert's gradient in another's, or a hang; and a reduction in another order on each rank."""
    found = run_ranks(routed, "peer", True, widths, routes, timeout=PATIENCE)
    gradients = [sum(1.0 / widths[i] for route in routes if i in route) / 2 for i in range(4)]
    for (error, (out, actual)), route in zip(found, routes, strict=True):
        assert error == "" and out == sum(3.0 * (i + 1) for i in route)
        torch.testing.assert_close(actual, gradients)


@pytest.mark.parametrize("widths", [(4, 4, 4, 4), (4, 6, 8, 10)], ids=["one shape", "other shapes"])
@pytest.mark.parametrize(
    ("transport", "fills", "told"),
    [
        ("process_group", False, ["all-gathers the parameters of unit 'experts.1'", "all-gathers .* unit 'experts.3'"]),
        ("process_group", True, ["all-gathers the parameters of unit 'experts.1'", "all-gathers .* unit 'experts.3'"]),
        (
            "peer",
            False,
            ["reduce-scatters gradients of unit 'experts.0': experts.0.weight", "reduce-scatters .* unit 'experts.3'"],
        ),
    ],
)
def test_ranks_that_run_different_units_raise_the_first_difference(
    transport: str, fills: bool, told: list[str], widths: Sequence[int]
) -> None:
    """Prevents: outputs of another rank's expert, whose bytes arrived where they were not expected."""
    (first, _), (second, _) = run_ranks(routed, transport, fills, widths, ROUTES[0], timeout=PATIENCE)
    assert first == second and re.search(rf"rank 0: {told[0]}.*; rank 1: {told[1]}", first), first


def synchronized_on_one_rank(transport: str) -> list[Outcome]:
    model: Any = sharded(Chain(blocks(2)), transport=transport)
    first = train(model)
    model.set_requires_gradient_sync(False)
    second = train(model)
    model.set_requires_gradient_sync(dist.get_rank() == ODD_RANK)
    return [first, second, train(model), train(the_same(False))]


@transports
def test_ranks_that_synchronize_different_backwards_raise_an_error(transport: str) -> None:
    """Prevents: a rank that waits in a reduction until its group's timeout."""
    found = run_ranks(synchronized_on_one_rank, transport, timeout=PATIENCE)
    assert [[outcome.error for outcome in steps] for steps in found] == [["", "", "RuntimeError", ""]] * 2
    assert re.search("rank 0: .*; rank 1: reduce-scatters gradients of unit 'layers.1'", found[0][2].message), found[0][
        2
    ]


def forward_on_one_rank_more(transport: str) -> str:
    model: Any = sharded(Chain(blocks(2)), transport=transport)
    train(model)
    try:
        if dist.get_rank() == ODD_RANK:
            with torch.no_grad():
                model(torch.ones(2, FEATURES))
        train_loudly(model)
        train_loudly(model)
    except RuntimeError as e:
        return str(e)
    return ""


def train_loudly(model: nn.Module) -> None:
    model(torch.ones(2, FEATURES)).sum().backward()


@transports
def test_a_rank_that_evaluates_alone_is_named(transport: str) -> None:
    first, second = run_ranks(forward_on_one_rank_more, transport, timeout=PATIENCE)
    assert first == second and re.search("ranks do different things; .* rank 0: .*; rank 1: ", first), first
