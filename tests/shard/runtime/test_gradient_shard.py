"""A gradient that a program still holds, in whatever way, keeps its values when the next backward writes its own."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.dlpack import to_dlpack

from tests.ranks import on_ranks, run_ranks
from tests.training import ours, world_mesh
from yafsdp_like.shard.runtime.unit_state import unit_of

WAYS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda g: g,
    "detach": lambda g: g.detach(),
    "data": lambda g: g.data,
    "view": lambda g: g.view(-1),
    "rows": lambda g: g[:],
    "view_as": lambda g: g.view_as(g),
    "transpose": lambda g: g.t(),
    "to_local": lambda g: g.to_local(),
    "to_local without grad mode": torch.no_grad()(lambda g: g.to_local()),
    "the local tensor": lambda g: g._local_tensor,
    "redistribute": lambda g: g.redistribute(placements=g.placements),
    "copy": copy.copy,
    "dlpack": torch.no_grad()(lambda g: torch.from_dlpack(to_dlpack(g.to_local()))),
    "a row of to_local": lambda g: g.to_local()[0],
    "storage": lambda g: [g.to_local().storage_offset(), g.to_local().untyped_storage()],
    "full_tensor": lambda g: g.full_tensor(),
    "both": lambda g: (g, g.detach()),
}
setups = pytest.mark.parametrize(
    ("transport", "dtype"), [("process_group", None), ("peer", None), ("process_group", torch.bfloat16)]
)


def first_element(held: Any) -> float:
    if isinstance(held, tuple):
        first, second = map(first_element, held)
        assert first == second
        return first
    if isinstance(held, list):
        offset, storage = held
        held = torch.empty(0).set_(storage, offset, (1,))
    return (held.to_local() if hasattr(held, "to_local") else held).flatten()[0].item()


def sharded_layer(transport: str, dtype: torch.dtype | None = None) -> Any:
    policy = ours.MixedPrecisionPolicy(param_dtype=dtype)
    return ours.fully_shard(nn.Linear(3, 4, bias=False), mesh=world_mesh(), transport=transport, mp_policy=policy)


def gradient_of(model: Any, factor: float) -> Any:
    """Whose elements are ``factor`` times the mean of all ranks' numbers, counted from 1."""
    model.zero_grad()
    (factor * model(torch.full((1, 3), dist.get_rank() + 1.0)).sum()).backward()
    return model.weight.grad


@setups
@pytest.mark.parametrize("world_size", [1, 2])
def test_whatever_is_held_of_a_gradient_keeps_its_values(
    world_size: int, transport: str, dtype: torch.dtype | None
) -> None:
    """Prevents: 15 for 1.5, in programs that keep one task's gradient while they compute another's."""
    run_ranks(hold_in_every_way, transport, dtype, world_size=world_size)


def hold_in_every_way(transport: str, dtype: torch.dtype | None) -> None:
    mean = 1.5 if dist.get_world_size() == 2 else 1.0
    model = sharded_layer(transport, dtype)
    for way in WAYS.values():
        for _ in range(2):
            held = [way(gradient_of(model, factor)) for factor in (1.0, 10.0, 100.0)]
            assert first_element(gradient_of(model, 4.0)) == 4 * mean
            assert [first_element(h) for h in held] == [mean, 10 * mean, 100 * mean]
            del held


@on_ranks()
def test_a_gradient_has_memory_from_backward_until_the_forward_after_it_was_dropped() -> None:
    """Prevents: bytes that activations could use, held by nobody."""
    model = sharded_layer("process_group")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        gradient_of(model, 1.0)
        shard = unit_of(model).params[0].grad_shard  # type: ignore[union-attr]
        assert shard.has_memory
        model(torch.ones(1, 3))
        assert shard.has_memory, "it is .grad still"
        optimizer.zero_grad(set_to_none=False)
        model(torch.ones(1, 3))
        assert shard.has_memory, "it is .grad still"
        optimizer.zero_grad()
        model(torch.ones(1, 3))
        assert not shard.has_memory
    assert model.memory_report().arena_nbytes == model.memory_plan().nbytes


@on_ranks()
def test_what_is_held_keeps_its_memory_and_nothing_else() -> None:
    """Prevents: memory that grows by every step that holds a gradient."""
    model = sharded_layer("process_group")
    held = gradient_of(model, 1.0).to_local()
    shard = unit_of(model).params[0].grad_shard  # type: ignore[union-attr]
    addresses = [gradient_of(model, factor).to_local().data_ptr() for factor in (2.0, 3.0, 4.0)]
    assert held.data_ptr() not in addresses
    storage = weakref.ref(held.untyped_storage())
    del held
    gradient_of(model, 4.0)
    assert storage() is None
    assert shard.has_memory


@on_ranks()
def test_accumulated_gradients_add_up_under_a_held_view_as_they_would_unsharded() -> None:
    model = sharded_layer("process_group")
    view = gradient_of(model, 1.0).to_local()
    model(torch.full((1, 3), dist.get_rank() + 1.0)).sum().backward()
    assert view[0, 0].item() == model.weight.grad.to_local()[0, 0].item() == 3.0


@on_ranks()
def test_a_parameter_that_is_frozen_after_its_forward_gets_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    for layer in model:
        ours.fully_shard(layer, mesh=world_mesh())
    ours.fully_shard(model, mesh=world_mesh())
    for _ in range(2):
        loss = model(torch.ones(2, 3)).sum()
        model[1].weight.requires_grad_(False)
        loss.backward()
        assert model[1].weight.grad is None
        assert model[0].weight.grad is not None
        model.zero_grad()
        model[1].weight.requires_grad_(True)


@on_ranks()
def test_steps_after_a_backward_that_raised_begin_and_end_as_any_others() -> None:
    """Prevents: a forward that never ends, behind which no update is seen and the root gets no gradient."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    for module in (model[0], model):
        ours.fully_shard(module, mesh=world_mesh())
    first, last = model[0].weight, model[1].weight
    for _ in range(3):
        hook = first.register_post_accumulate_grad_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.ones(1, 3, requires_grad=True)).sum().backward()
        hook.remove()
        first.grad = last.grad = None
        model(torch.ones(1, 3)).sum().backward()
        assert first.grad is not None
        assert last.grad is not None
        first.grad = last.grad = None


@on_ranks()
def test_a_hook_that_raises_where_a_backward_ends_leaves_nothing_to_the_next() -> None:
    """Prevents: gradients of a backward that failed, added to those of the next. One unit is reduced at the end."""
    model = sharded_layer("process_group")
    weight = model.weight
    for _ in range(2):
        hook = weight.register_post_accumulate_grad_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gradient_of(model, 7.0)
        hook.remove()
        weight.grad = None
        assert first_element(gradient_of(model, 1.0)) == 1.5
        weight.grad = None
