"""``CPUOffloadPolicy``: parameters and gradients in host memory, the same bits, and a plan that says where bytes are.

On CPUs every copy between host and device is a plain copy, in the order and between the regions that a GPU has.
"""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as stock
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

import yafsdp_like as ours
from tests.ranks import on_ranks, run_ranks
from tests.shard.test_hsdp import mesh_of
from tests.training import IMPLEMENTATIONS, assert_tensors_equal, full, full_parameters, world_mesh
from tests.twins import Twins, chain, rows
from tests.zoo import SPECIMENS
from yafsdp_like import CPUOffloadPolicy, GraphedStep, fully_shard, optim, update_in_backward
from yafsdp_like.memory.layout import aligned
from yafsdp_like.shard.runtime import gradients
from yafsdp_like.shard.spec import memory_layout

OFFLOADED = CPUOffloadPolicy(pin_memory=False)
MIXED = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
PRECISIONS = [{}, {"param_dtype": torch.bfloat16}, MIXED]


def sharded(name: str, policy: Any = OFFLOADED, impl: str = "ours", precision: Any = MIXED, **options: Any) -> Any:
    specimen, names = SPECIMENS[name], IMPLEMENTATIONS[impl]
    options = {"mesh": world_mesh()} | options
    mp_policy = names.MixedPrecisionPolicy(**precision)
    return specimen.wrap(specimen.fresh(), names.fully_shard, mp_policy=mp_policy, offload_policy=policy, **options)


Result = tuple[list[float], dict[str, torch.Tensor]]


def train(name: str, model: Any, syncs: tuple[bool, ...], make: Any = torch.optim.AdamW, **options: Any) -> Result:
    """Three steps, of a backward for each of `syncs`, with clipping; the losses, norms and parameters."""
    optimizer, numbers = make(model.parameters(), lr=0.02, **options), []
    for step in range(3):
        for index, sync in enumerate(syncs):
            model.set_requires_gradient_sync(sync)
            model.set_is_last_backward(index == len(syncs) - 1)
            loss = SPECIMENS[name].loss_of(model, step * len(syncs) + index, dist.get_rank())
            loss.backward()
            numbers.append(loss.item())
        numbers.append(full(clip_grad_norm_(model.parameters(), 0.5)).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=step != 0)
    return numbers, full_parameters(model)


def assert_equal(found: Result, expected: Result) -> None:
    assert found[0] == expected[0]
    assert_tensors_equal(found[1], expected[1])


SYNCS = [(True,), (True, True), (False, True)]


@pytest.mark.slow(unless=lambda world_size, precision: world_size == 2 and precision is PRECISIONS[1])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_has_the_bits_of_fsdp2_and_of_shards_on_the_device(
    precision: Mapping[str, Any], world_size: int
) -> None:
    run_ranks(compare_with_others, precision, world_size=world_size)


def compare_with_others(precision: Mapping[str, Any]) -> None:
    for syncs in SYNCS:
        found = train("decoder", sharded("decoder", precision=precision), syncs)
        assert_equal(found, train("decoder", sharded("decoder", OFFLOADED, "stock", precision), syncs))
        assert_equal(found, train("decoder", sharded("decoder", None, precision=precision), syncs))


@pytest.mark.slow(unless=lambda name: name == "group")
@pytest.mark.parametrize("name", ["tied", "frozen", "nested", "group", "recomputed", "odd", "convnet", "waster"])
def test_other_models_train_with_the_bits_of_shards_on_the_device(name: str) -> None:
    run_ranks(compare_with_device, name)


def compare_with_device(name: str) -> None:
    precision = {} if name == "convnet" else MIXED
    for options in ({}, {"reshard_after_forward": False}):
        on_device = sharded(name, stock.OffloadPolicy(), precision=precision, **options)
        found = train(name, sharded(name, precision=precision, **options), (True, True))
        assert_equal(found, train(name, on_device, (True, True)))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_some_units_may_be_offloaded_and_others_not(world_size: int) -> None:
    run_ranks(train_mixed, world_size=world_size)


def train_mixed() -> None:
    found = []
    for policies in ((None, None), (OFFLOADED, None), (None, OFFLOADED)):
        model = SPECIMENS["decoder"].fresh()
        for index, layer in enumerate(model.layers):
            fully_shard(layer, mesh=world_mesh(), offload_policy=policies[index % 2])
        fully_shard(model, mesh=world_mesh(), offload_policy=policies[1])
        found.append(train("decoder", model, (True, True)))
        plan, report = model.memory_plan(), model.memory_report()
        assert (plan.nbytes, plan.host_nbytes) == (report.arena_nbytes, report.host_nbytes)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@on_ranks()
def test_rows_that_are_cast_in_parts_and_gradients_that_are_reduced_early_have_the_same_bits() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_layout, "MAX_UPLOAD_NBYTES", 256)
        patch.setattr(gradients, "EARLY_NUMEL", 1)
        model = sharded("decoder")
        found = train("decoder", model, (True, True))
        assert model.memory_plan().nbytes_of("host staging") == 256 + max(grad_nbytes(unit) for unit in units(model))
    assert_equal(found, train("decoder", sharded("decoder", None), (True, True)))


@on_ranks(4)
def test_replicas_average_gradients_before_they_go_to_the_host() -> None:
    found = [train_replicated(sharded("decoder", policy, mesh=mesh_of(2))) for policy in (OFFLOADED, None)]
    assert_equal(*found)


def train_replicated(model: Any) -> Result:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        model.set_requires_all_reduce(step % 2 == 1)
        SPECIMENS["decoder"].loss_of(model, step, dist.get_rank()).backward()
        if step % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    return [], full_parameters(model)


@pytest.mark.parametrize("options", [{"max_norm": 0.4}, {"moments": "bf16"}, {"offload_moments": True}])
@on_ranks()
def test_our_adamw_updates_shards_on_the_host(options: dict[str, Any]) -> None:
    found = train("decoder", sharded("decoder"), (True,), optim.AdamW, **options)
    assert_equal(found, train("decoder", sharded("decoder", None), (True,), optim.AdamW, **options))


# --- where bytes are ---


def units(model: Any) -> list[list[torch.Tensor]]:
    """Each unit's parameters."""
    owned: dict[Any, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        owned.setdefault(parameter._yafsdp_ownership.unit, []).append(parameter)
    return list(owned.values())


def grad_nbytes(parameters: list[torch.Tensor]) -> int:
    return sum(aligned(4 * -(-p.shape[0] // dist.get_world_size()) * p[0].numel()) for p in parameters)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_device_holds_slots_and_staging_alone(world_size: int) -> None:
    run_ranks(check_plan, world_size=world_size)


def check_plan() -> None:
    model = sharded("decoder")
    assert model.memory_report().host_nbytes == sum(map(grad_nbytes, units(model))), "main shards, before a forward"
    train("decoder", model, (True,))
    plan, report = model.memory_plan(), model.memory_report()
    kinds = ("gather slots", "gradient slots", "host staging")
    assert plan.nbytes == report.arena_nbytes == sum(map(plan.nbytes_of, kinds))
    assert plan.host_nbytes == report.host_nbytes == 2 * sum(map(grad_nbytes, units(model)))
    assert plan.transient_nbytes == plan.nbytes_of("compute_shard") == 0
    assert all(plan.nbytes_of(kind) for kind in kinds)
    assert "in host memory" in str(plan).splitlines()[0]


@on_ranks()
def test_gradients_keep_their_place_and_one_that_is_held_keeps_its_values() -> None:
    model = sharded("decoder", precision={})
    weight = next(model.parameters())

    def grad_of(step: int) -> torch.Tensor:
        model.zero_grad()
        SPECIMENS["decoder"].loss_of(model, step, dist.get_rank()).backward()
        assert isinstance(weight.grad, DTensor)
        return weight.grad._local_tensor

    place = grad_of(0).data_ptr()
    held = grad_of(1)
    assert held.data_ptr() == place
    values = held.clone()
    assert grad_of(2).data_ptr() != place
    assert torch.equal(held, values)


# --- what users do ---


@on_ranks()
def test_what_the_optimizer_the_user_and_hooks_see_is_on_the_host() -> None:
    model = sharded("decoder", precision={})
    seen: list[str] = []
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        assert isinstance(parameter.grad, DTensor)
        seen.append(parameter.grad.to_local().device.type)
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    before = full_parameters(model)
    SPECIMENS["decoder"].loss_of(model, 0, dist.get_rank()).backward()
    assert seen == ["cpu"] * len(before)
    after = full_parameters(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)


@on_ranks()
def test_evaluations_writes_and_unsharded_values_follow_the_host() -> None:
    twins = Twins(chain, offload_policy=OFFLOADED)
    twins.train(0)
    for parameters in twins.parameters:
        with torch.no_grad():
            torch._foreach_mul_(list(parameters.values()), 0.5)
    with torch.no_grad():
        torch.testing.assert_close(*(model(rows()) for model in twins))
    twins.train(1, 2)
    twins.sharded.unshard()
    for name, parameter in twins.plain.named_parameters():
        if not name.startswith("layers"):
            torch.testing.assert_close(twins.sharded.get_parameter(name).detach(), parameter.detach())
    twins.sharded.reshard()
    twins.train(3)
    twins.compare_parameters()


@on_ranks()
def test_state_dicts_load_and_save_as_without() -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, other = sharded("decoder"), sharded("decoder", None)
    optimizer = torch.optim.AdamW(model.parameters())
    SPECIMENS["decoder"].loss_of(model, 0, dist.get_rank()).backward()
    optimizer.step()
    whole = get_model_state_dict(model, options=options)
    expected = full_parameters(model)
    set_model_state_dict(other, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert_tensors_equal(full_parameters(other), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = sharded("decoder")
    fresh.load_state_dict(torch.load(file, weights_only=False))
    assert_tensors_equal(full_parameters(fresh), expected)
    states = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))["state"]
    assert set(states) == set(expected)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
@on_ranks()
def test_a_model_on_the_meta_device_is_materialized_on_the_host() -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    for module in (*model, model):
        fully_shard(module, mesh=world_mesh(), offload_policy=OFFLOADED)
    assert "in host memory" in str(model.memory_plan())
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    model(torch.ones(2, 6)).sum().backward()
    assert all(p.grad is not None and p.device.type == "cpu" for p in model.parameters())


@on_ranks(1)
def test_policies_that_do_not_go_together_are_refused_by_name() -> None:
    def layer() -> nn.Module:
        return nn.Linear(4, 4)

    options: dict[str, Any] = {"mesh": world_mesh(), "offload_policy": OFFLOADED}
    with pytest.raises(NotImplementedError, match=r"split_master.*CPUOffloadPolicy"):
        fully_shard(layer(), split_master=True, **options)
    with pytest.raises(NotImplementedError, match=r"transport='peer'.*CPUOffloadPolicy"):
        fully_shard(layer(), transport="peer", **options)
    with pytest.raises(TypeError, match="offload_policy"):
        fully_shard(layer(), mesh=world_mesh(), offload_policy=True)  # type: ignore[arg-type]
    model: Any = fully_shard(layer(), **dict(options, offload_policy=CPUOffloadPolicy()))  # nothing to pin for a CPU
    with pytest.raises(ValueError, match="CPUOffloadPolicy"):
        update_in_backward(optim.AdamW(model.parameters()))
    with pytest.raises(RuntimeError, match=r"GraphedStep.*offload_policy"):
        GraphedStep(model, model)(torch.ones(2, 4))
    assert dataclasses.is_dataclass(ours.CPUOffloadPolicy)
