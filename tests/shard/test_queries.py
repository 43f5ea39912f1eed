"""What must have no effect: queries of a sharded model, and importing the package."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import yafsdp_like as ours
from tests.ranks import on_ranks
from tests.training import world_mesh
from tests.zoo import FEATURES, Block
from yafsdp_like.shard.runtime.unit_state import unit_of

QUERIES = ["memory_plan", "memory_report"]


class NoDispatch(TorchDispatchMode):
    """Fails for every operation on tensors, collectives included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def contents(values: dict[str, Any]) -> dict[str, Any]:
    """Containers by the identity of what is in them, everything else by its own, or by its value if it is plain."""

    def content(value: Any) -> Any:
        if isinstance(value, dict):
            return [(id(key), content(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple, set)):
            return [content(item) for item in value]
        return value if isinstance(value, (str, int, float, torch.dtype, type(None))) else id(value)

    return {name: content(value) for name, value in values.items()}


def state_of(model: nn.Module) -> Iterator[Any]:
    """Everything that a query might change: modules' attributes, hooks and parameters, units, and their engine's."""
    for module in model.modules():
        yield type(module), contents(vars(module))
        unit = unit_of(module)
        if unit is None:
            continue
        yield contents(vars(unit)), contents(vars(unit.policy)), unit.signature
        yield contents(vars(unit.freshness)), [contents(vars(p)) for p in unit.params]
        if unit.engine is not None:
            engine = unit.engine
            for owner in (engine, engine.memory, engine.params, engine.gradients, engine.running):
                yield contents(vars(owner))


def sharded(transport: str, device: str = "cpu") -> Any:
    policy = ours.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.device(device):
        model = nn.Sequential(Block(), nn.Sequential(Block(), nn.Linear(FEATURES, FEATURES)))
    for module in (model[0], model[1][0], model[1], model):
        ours.fully_shard(module, mesh=world_mesh(), transport=transport, mp_policy=policy)
    return model


def assert_queries_change_nothing(model: Any) -> None:
    before, process_groups = list(state_of(model)), dict(dist.distributed_c10d._world.pg_map)
    for module in (model, model[1], model[1][0]):
        with NoDispatch():
            answers = [str(getattr(module, query)()) for query in QUERIES]
        assert answers == [str(getattr(module, query)()) for query in QUERIES]
        assert list(state_of(model)) == before
    assert dict(dist.distributed_c10d._world.pg_map) == process_groups


@pytest.mark.parametrize("transport", ["process_group", "peer"])
@on_ranks()
def test_a_query_changes_nothing_before_between_and_after_steps(transport: str) -> None:
    """Prevents: a printed plan that makes a root, names units, installs forwards, or changes what is about to run."""
    model = sharded(transport)
    assert_queries_change_nothing(model)
    assert model._unit().engine is None
    loss = model(torch.ones(2, FEATURES)).float().sum()
    assert_queries_change_nothing(model)
    model.set_requires_gradient_sync(False)  # the plan is another from the next forward on
    assert_queries_change_nothing(model)
    model.set_requires_gradient_sync(True)
    loss.backward()
    assert_queries_change_nothing(model)
    model(torch.ones(2, FEATURES)).float().sum().backward()
    assert_queries_change_nothing(model)


@on_ranks()
def test_a_query_on_meta_allocates_nothing() -> None:
    model = sharded("process_group", device="meta")
    assert_queries_change_nothing(model)
    assert all(parameter.is_meta for parameter in model.parameters())


@on_ranks()
def test_the_plan_before_the_first_forward_is_the_one_that_is_built() -> None:
    """Prevents: a query that answers for another root or other names than the first forward."""
    model = sharded("process_group")
    plan = model.memory_plan()
    model(torch.ones(2, FEATURES))
    assert model.memory_plan() == plan


UNTOUCHED = """
import torch, torch.distributed as dist
from torch.nn.modules import module
from torch.nn.utils import clip_grad
from torch.optim import optimizer

def watched():
    yield from (vars(clip_grad).items())
    for owner in (module, optimizer):
        for name, value in vars(owner).items():
            if name.startswith("_global"):
                yield name, tuple(value) if hasattr(value, "__len__") else value
    for cls in (torch.nn.Module, torch.nn.Linear, torch.optim.Optimizer, torch.autograd.Function, torch.Tensor):
        yield from ((cls, name, value) for name, value in vars(cls).items() if callable(value))
    yield "group", dist.is_initialized()
    yield "threads", torch.get_num_threads()
    yield "cuda", torch.cuda.is_initialized()

torch.nn.Linear, torch.optim.AdamW
before = list(watched())
import yafsdp_like
import yafsdp_like.shard.api
for name in yafsdp_like.__all__:
    getattr(yafsdp_like, name)
assert list(watched()) == before, [(a, b) for a, b in zip(watched(), before) if a != b]
model = torch.nn.Linear(2, 2)
yafsdp_like.fully_shard(model)
changed = {str(name[0]) for name, was in zip(watched(), before) if name != was}
print(sorted(changed))
"""


@pytest.mark.slow
def test_importing_the_package_hooks_nothing_before_the_first_fully_shard() -> None:
    """Prevents: other models' optimizers, clipping and modules being slower or different for an import."""
    run = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(
        sorted(
            [
                "_clip_grads_with_norm_",
                "_get_total_norm",
                "_global_optimizer_post_hooks",
                "_global_optimizer_pre_hooks",
                "_global_parameter_registration_hooks",
                "group",
            ]
        )
    )
