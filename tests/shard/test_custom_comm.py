"""Collectives of the user's own, hooks on reductions, and how many reductions may be in flight: FSDP2's bits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as stock
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import yafsdp_like as ours
from tests.ranks import on_ranks, run_ranks
from tests.training import full, world_mesh
from tests.twins import rows
from tests.zoo import FEATURES, Chain, blocks

POLICIES = {
    "fp32": {},
    "mixed": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    "half": {"reduce_dtype": torch.float16},
}
Prepare = Callable[[Any], object]


class Counting:
    """What FSDP2's own collectives do, which notes the sizes of its buffers."""

    def __init__(self) -> None:
        self.allocated: list[int] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.allocated.append(size[0])
        return torch.full(size, torch.nan, dtype=dtype, device=device)


class Gather(Counting):
    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


class Reduce(Counting):
    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)


def trained(names: Any, prepare: Prepare, mesh: Any = None, num_steps: int = 2, **precision: Any) -> list[torch.Tensor]:
    """Gradients of every backward, two of which add up in a step, and parameters, of three blocks below a root."""
    torch.manual_seed(0)
    model: Any = Chain(blocks(3))
    for module in (*model.layers, model):
        names.fully_shard(module, mesh=mesh or world_mesh(), mp_policy=names.MixedPrecisionPolicy(**precision))
        prepare(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(num_steps):
        for half in range(2):
            model(rows(2 * step + half)).square().mean().backward()
            found += [full(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return found + [full(p) for p in model.parameters()]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*(all_gather_into_tensor|reduce_scatter_tensor)")
@pytest.mark.parametrize("precision", POLICIES)
def test_custom_collectives_move_what_the_default_ones_do(precision: str) -> None:
    """Prevents: chunks in another order in the flat buffers, sums of means, and a division that is left out."""
    run_ranks(compare_custom_collectives, precision)


def compare_custom_collectives(precision: str) -> None:
    gather, reduce = Gather(), Reduce()

    def customize(module: Any) -> None:
        module.set_custom_all_gather(gather)
        module.set_custom_reduce_scatter(reduce)

    mine = trained(ours, customize, **POLICIES[precision])
    assert_same(mine, trained(stock, customize, **POLICIES[precision]))
    half = len(gather.allocated) // 2  # of stock as many, but for blocks whose slots still have their values
    numel = sum(p.numel() for p in blocks(1)[0].parameters())
    assert gather.allocated[:2] == [numel // 2, numel] and half > 0
    assert reduce.allocated[:2] == [numel, numel // 2]


@pytest.mark.parametrize("precision", POLICIES)
def test_a_hook_on_reductions_sees_each_sum_before_it_is_added(precision: str) -> None:
    """Prevents: hooks on what had been added up, on rounded sums, or behind the division."""
    run_ranks(compare_hooks, precision)


def triple(reduced: torch.Tensor) -> None:
    reduced.mul_(3.0).add_(0.5)


def compare_hooks(precision: str) -> None:
    def hook(module: Any) -> None:
        module.set_all_reduce_hook(triple)

    assert_same(trained(ours, hook, **POLICIES[precision]), trained(stock, hook, **POLICIES[precision]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2), (1, 4)])
def test_a_hook_on_a_mesh_of_replicas_runs_behind_their_mean(shape: tuple[int, int]) -> None:
    run_ranks(compare_replicas, shape, world_size=4)


def compare_replicas(shape: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))

    def hook(module: Any) -> None:
        module.set_all_reduce_hook(triple)

    model: Any = ours.fully_shard(nn.Linear(4, 4), mesh=mesh)
    with pytest.raises(ValueError, match="stream cannot be set when using native HSDP"):
        model.set_all_reduce_hook(triple, stream=torch.Stream("cpu"))
    mine, theirs = (trained(names, hook, mesh) for names in (ours, stock))
    for actual, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


@on_ranks(1)
def test_one_rank_alone_calls_the_hook_too() -> None:
    """Prevents: replicas of one rank each, which are averaged by hooks, drifting apart."""
    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    mine, theirs = (trained(names, lambda m: m.set_all_reduce_hook(triple), **precision) for names in (ours, stock))
    assert_same(mine, theirs)


@on_ranks()
def test_how_bytes_move_is_fixed_from_the_first_forward_on_and_custom_buffers_are_the_users() -> None:
    model: Any = ours.fully_shard(nn.Linear(4, 4), mesh=world_mesh(), transport="peer")
    model.set_allocate_memory_from_process_group_for_comm(False)
    model.set_custom_all_gather(Gather())
    for call in (model.set_allocate_memory_from_process_group_for_comm, model.set_symm_mem_for_comm):
        with pytest.raises(AssertionError, match=r"cannot call .* when a collective is custom: Gather"):
            call(*([True] if "allocate" in call.__name__ else []))
    fresh: Any = ours.fully_shard(nn.Linear(4, 4), mesh=world_mesh())
    fresh(torch.ones(1, 4))
    for change in (fresh.set_custom_all_gather, fresh.set_custom_reduce_scatter, fresh.set_all_reduce_hook):
        with pytest.raises(RuntimeError, match="between fully_shard and the first forward"):
            change(Gather())


@on_ranks()
def test_more_reductions_in_flight_widen_the_plan_and_change_no_number() -> None:
    """Prevents: a number that is accepted and does nothing."""
    plans = []

    def let(number: int) -> Prepare:
        return lambda module: plans.append(module) or module.set_reduce_scatter_max_input_buffers(number)

    two, one, theirs = (trained(ours, let(2)), trained(ours, let(1)), trained(stock, lambda m: None))
    assert_same(two, one)
    assert_same(two, theirs)
    nbytes = [module.memory_plan().nbytes_of("gradient slots") for module in (plans[3], plans[7])]
    assert nbytes[0] * 2 == nbytes[1] * 3  # three blocks' slots, and two


@on_ranks()
def test_backwards_that_the_user_finalizes_have_the_same_gradients() -> None:
    """Prevents: gradients that are read before they are there, and others left in their slots."""
    model: Any = Chain(blocks(3))
    plain: Any = Chain(blocks(3))
    plain.load_state_dict(model.state_dict())
    for module in (*model.layers, model):
        ours.fully_shard(module, mesh=world_mesh())
    model.set_keep_unsharded_storage(True)
    model.set_manual_backward_finalization(True)
    for step in range(2):
        model.set_requires_gradient_sync(False)
        for half in range(2):
            for m in (model, plain):
                m(rows(2 * step + half)).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        assert model.finalize_backward() is None  # without synchronization, nothing
        assert all(p.grad is None for p in model.parameters())
        model.set_requires_gradient_sync(True)
        model.finalize_backward(async_op=True).wait()
        for sharded, whole in zip(model.parameters(), plain.parameters(), strict=True):
            dist.all_reduce(whole.grad)
            torch.testing.assert_close(full(sharded.grad), whole.grad / 2)
            sharded.grad = whole.grad = None
    x = torch.ones(1, FEATURES, requires_grad=True)
    y = model(x)
    y.register_hook(lambda grad: model.finalize_backward())
    with pytest.raises(RuntimeError, match=r"once backward\(\) has returned"):
        y.sum().backward()
