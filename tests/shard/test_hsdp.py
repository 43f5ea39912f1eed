"""HSDP: models sharded inside each replica have stock FSDP2's bits, and ranks raise where replicas differ.

Four gloo ranks are two replicas of two ranks, unless a test says otherwise.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as stock
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.ranks import on_ranks, run_ranks
from tests.training import (
    IMPLEMENTATIONS,
    Recipe,
    Run,
    assert_close,
    assert_same_bits,
    assert_tensors_equal,
    full_parameters,
    train,
    train_unsharded,
)
from tests.twins import Twins
from tests.zoo import SPECIMENS
from yafsdp_like import fully_shard
from yafsdp_like.comm import choice, peer
from yafsdp_like.comm.choice import transport_of, transport_over
from yafsdp_like.comm.transport import Averaged, Reduction
from yafsdp_like.memory.arena import MemoryBlock

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
CPU = torch.device("cpu")
BF16 = {"param_dtype": torch.bfloat16}
MIXED = BF16 | {"reduce_dtype": torch.float32}
HALF = {"reduce_dtype": torch.float16}
SLOW = pytest.mark.slow
PRECISIONS = [
    pytest.param({}, id="fp32", marks=SLOW),
    pytest.param(MIXED, id="mixed"),
    pytest.param(BF16, id="bf16", marks=SLOW),
]
QUICK = ("frozen",)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


@cache  # a mesh's groups have threads of their own, and live as long as the process
def mesh_of(num_replicas: int, device: str = "cpu") -> DeviceMesh:
    shape = (num_replicas, dist.get_world_size() // num_replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def replicas(num: int = 2) -> Iterator[None]:
    """Inside, what the zoo shards over all ranks is sharded in this many replicas."""
    with mock.patch("tests.training.world_mesh", lambda device="cpu": mesh_of(num, device)):
        yield


def sharded(name: str, mesh: DeviceMesh | None = None, **options: Any) -> Any:
    specimen = SPECIMENS[name]
    return specimen.wrap(specimen.fresh(), fully_shard, mesh=mesh or mesh_of(2), **options)


# --- the same bits as stock's ---


def train_both(name: str, recipes: Sequence[Recipe]) -> list[tuple[Run, Run]]:
    with replicas():
        return [(train(name, "ours", recipe), train(name, "stock", recipe)) for recipe in recipes]


def assert_equals_stock(name: str, *recipes: Recipe) -> None:
    for pairs in run_ranks(train_both, name, recipes, world_size=4):
        for ours, theirs in pairs:
            assert_same_bits(ours, theirs)


@pytest.mark.slow(unless=lambda name: name in QUICK)
@pytest.mark.parametrize("name", SPECIMENS)
def test_training_equals_stock_bit_for_bit_in_every_precision(name: str) -> None:
    precisions = [{}] if name == "convnet" else [{}, MIXED, BF16]  # its buffers stay fp32
    assert_equals_stock(name, *(Recipe(steps=4, precision=precision) for precision in precisions))


@SLOW
@pytest.mark.parametrize("sync_each", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_accumulation_equals_stock(precision: dict[str, torch.dtype], sync_each: bool) -> None:
    recipe = Recipe(steps=3, micro_batches=3, sync_each=sync_each, precision=precision)
    assert_equals_stock("nested", recipe, dataclasses.replace(recipe, set_to_none=False))


@pytest.mark.slow(unless=lambda reshard_after_forward: not reshard_after_forward)
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_resharding_after_forward_or_not_equals_stock(reshard_after_forward: bool) -> None:
    assert_equals_stock("decoder", Recipe(steps=3, reshard_after_forward=reshard_after_forward))


def test_a_divide_factor_with_forced_sums_and_fp16_equal_stock() -> None:
    """The division comes after both sums, and in fp16 in part before them."""
    factors = [Recipe(steps=3, divide_factor=factor) for factor in (1.0, 3.0)]
    assert_equals_stock("decoder", *factors, Recipe(steps=3, precision=HALF))


@pytest.mark.parametrize("norm_type", [pytest.param(1.0, marks=SLOW), 2.0, pytest.param(float("inf"), marks=SLOW)])
def test_clipping_equals_stock(norm_type: float) -> None:
    """Prevents: a norm that counts replicas."""
    assert_equals_stock("decoder", Recipe(steps=3, max_norm=0.01, norm_type=norm_type))


# --- any shape of mesh, and any transport inside ---


@SLOW
@pytest.mark.parametrize(("num_replicas", "world_size"), [(4, 4), (1, 4), (3, 3), (2, 6)])
@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_any_mesh_follows_the_unsharded_model(transport: str, num_replicas: int, world_size: int) -> None:
    run_ranks(train_twins, num_replicas, transport, world_size=world_size)


def train_twins(num_replicas: int, transport: str) -> None:
    with replicas(num_replicas):
        for name in ("odd", "nested"):
            twins = Twins(SPECIMENS[name], transport=transport)
            twins.train(0, 1, 2)
            twins.compare_parameters()


def train_by_both(name: str, recipe: Recipe) -> tuple[Run, Run]:
    with replicas():
        over_peers = train(name, "ours", dataclasses.replace(recipe, transport="peer"))
        return over_peers, train(name, "ours", dataclasses.replace(recipe, transport="process_group"))


@pytest.mark.slow(unless=lambda name: name in QUICK)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["odd", "decoder", "tied", "nested", "frozen", "reused"])
def test_peers_inside_replicas_give_the_same_bits(name: str, precision: dict[str, torch.dtype]) -> None:
    for over_peers, over_groups in run_ranks(train_by_both, name, Recipe(steps=4, precision=precision), world_size=4):
        assert_same_bits(over_peers, over_groups)


@SLOW
@pytest.mark.parametrize("precision", PRECISIONS)
def test_peers_inside_replicas_accumulate_alike(precision: dict[str, torch.dtype]) -> None:
    """Where gradients have fewer bits than their sums, what is averaged is the sum over backwards: another rounding."""
    recipe = Recipe(steps=3, micro_batches=3, precision=precision)
    for over_peers, over_groups in run_ranks(train_by_both, "nested", recipe, world_size=4):
        if precision == MIXED:
            assert_close(over_peers, over_groups, tolerance=2e-3)
        else:
            assert_same_bits(over_peers, over_groups)


def test_training_follows_the_unsharded_model() -> None:
    """Prevents: an error that ours and stock's share, or no mean over replicas at all."""
    for ours, _ in run_ranks(train_by_both, "decoder", Recipe(steps=4), world_size=4)[:1]:
        assert_close(ours, train_unsharded("decoder", Recipe(steps=4), 4))


# --- one reduction ---

NUMEL = 40  # of one rank's chunk


@SLOW
@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("averaged", ["new", "all", "nothing"])
@pytest.mark.parametrize(
    ("dtype", "wire_dtype", "shard_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("reduction", "divisor"),
    [(Reduction(), 4.0), (Reduction(mean=False, post_divisor=8.0), 8.0), (Reduction(False, 2.0, 1.0), 2.0)],
    ids=["mean", "divisor", "divided before"],
)
@on_ranks(4)
def test_a_reduction_is_the_mean_over_both_dimensions_of_the_mesh(
    reduction: Reduction,
    divisor: float,
    dtype: torch.dtype,
    wire_dtype: torch.dtype,
    shard_dtype: torch.dtype,
    averaged: Averaged,
    transport: Any,
) -> None:
    """Small integers, whose sums every dtype holds: any order and any rounding give the same, any slip another."""
    if transport == "process_group" and dtype != wire_dtype:
        return  # a collective sums in the dtype that it sends
    mesh, rank = mesh_of(2), dist.get_rank()
    over = transport_over(mesh, CPU, transport)
    everybody = torch.randint(-3, 4, (2, 2, 2 * NUMEL), generator=torch.Generator().manual_seed(1)) * 8
    block = MemoryBlock.allocate(2 * NUMEL * dtype.itemsize, CPU)
    if over.mapped is not None:
        over.mapped.connect([block])
    gradients, shard = block.bytes.view(dtype), torch.full((NUMEL,), 7.0, dtype=shard_dtype)
    reduce = over.reduce_scatter([shard], [gradients], [wire_dtype], torch.empty(1 << 14, dtype=torch.uint8))

    replica, place = divmod(rank, 2)
    chunks = everybody[:, :, place * NUMEL : (place + 1) * NUMEL]
    within = chunks[replica].sum(0) * 2 / divisor  # makes the mean over replicas the whole sum over the divisor
    expected = within if averaged == "nothing" else chunks.sum((0, 1)) / divisor
    for accumulate in (False, True, True):
        gradients.copy_(everybody[replica, place])
        before = shard.clone()
        reduce(dataclasses.replace(reduction, averaged=averaged), accumulate)
        assert torch.equal(shard, (expected + before if accumulate else expected).to(shard_dtype))
    if averaged != "nothing":
        assert_replicas_equal([shard], mesh)


def assert_replicas_equal(tensors: Sequence[torch.Tensor], mesh: DeviceMesh) -> None:
    """The same bits on every rank that holds this shard."""
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(mesh.size(0))]
        dist.all_gather(others, tensor.contiguous(), group=mesh.get_group(0))
        assert all(torch.equal(other, tensor) for other in others)


@SLOW
@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_replicas", [3, 4])
def test_replicas_stay_equal_to_the_bit(precision: dict[str, torch.dtype], num_replicas: int, transport: str) -> None:
    """Three of them too, by which no mean is exact, and with gradients added up in the shard."""
    recipe = Recipe(steps=4, micro_batches=2, precision=precision, transport=transport)
    run_ranks(train_and_compare_replicas, num_replicas, recipe, world_size=num_replicas)


def train_and_compare_replicas(num_replicas: int, recipe: Recipe) -> None:
    with replicas(num_replicas):
        run = train("nested", "ours", recipe)
    assert_replicas_equal(list(run.parameters.values()), mesh_of(num_replicas))


# --- gradients that are not averaged yet ---


def train_with_one_all_reduce(impl: str, precision: dict[str, Any], transport: str) -> list[torch.Tensor]:
    """Steps of three backwards, of which only the last averages over replicas; all gradients of all steps."""
    names, specimen = IMPLEMENTATIONS[impl], SPECIMENS["nested"]
    policy = names.MixedPrecisionPolicy(**precision)
    only_ours = {"transport": transport} if impl == "ours" else {}
    model = specimen.wrap(specimen.fresh(), names.fully_shard, mesh=mesh_of(2), mp_policy=policy, **only_ours)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for step in range(3):
        for number in range(3):
            model.set_requires_all_reduce(number == 2)
            specimen.loss_of(model, 3 * step + number, dist.get_rank()).backward()
        gradients += [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    assert_replicas_equal(gradients, mesh_of(2))
    return gradients


@SLOW
@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("precision", PRECISIONS)
@on_ranks(4)
def test_one_all_reduce_for_several_backwards_gives_stocks_gradients(precision: dict[str, Any], transport: str) -> None:
    """To the bit where ``.grad`` has the dtype that stock adds up in."""
    ours, theirs = (train_with_one_all_reduce(impl, precision, transport) for impl in ("ours", "stock"))
    assert len(ours) == len(theirs) > 0
    exact = precision != BF16
    torch.testing.assert_close(ours, theirs, rtol=0.0 if exact else 2e-2, atol=0.0 if exact else 2e-2)


@on_ranks(4)
def test_gradients_that_were_not_averaged_differ_between_replicas_until_one_backward_averages_them() -> None:
    mesh, specimen = mesh_of(2), SPECIMENS["nested"]
    twins = [sharded("nested", mesh) for _ in range(2)]
    twins[0].set_requires_all_reduce(False)
    for model in twins:
        specimen.loss_of(model, 0, dist.get_rank()).backward()
    with pytest.raises(AssertionError):
        assert_replicas_equal(local_gradients(twins[0]), mesh)
    twins[0].set_requires_gradient_sync(True)  # as in FSDP2, the all-reduce with it
    for model in twins:
        specimen.loss_of(model, 1, dist.get_rank()).backward()
    assert_replicas_equal(local_gradients(twins[0]), mesh)
    torch.testing.assert_close(*map(local_gradients, twins))


@on_ranks(2)
def test_without_replicas_there_is_nothing_to_leave_out() -> None:
    twins = Twins(SPECIMENS["odd"])
    twins.sharded.set_requires_all_reduce(False)
    twins.train(0, 1)


def local_gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.to_local() for p in model.parameters() if p.grad is not None]


# --- parameters and state dicts ---


@on_ranks(4)
def test_parameters_are_replicated_over_one_dimension_and_sharded_over_the_other() -> None:
    mesh = mesh_of(2)
    model: Any = sharded("decoder", mesh)
    theirs = SPECIMENS["decoder"].wrap(SPECIMENS["decoder"].fresh(), stock.fully_shard, mesh=mesh)
    SPECIMENS["decoder"].loss_of(model, 0, dist.get_rank()).backward()
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        for shard in (ours, ours.grad):
            assert (shard.device_mesh, shard.placements) == (mesh, (Replicate(), Shard(0))) == (mesh, other.placements)
            assert (shard.shape, shard.stride()) == (other.shape, other.stride())
            assert shard.to_local().shape == other.to_local().shape
        assert torch.equal(ours.full_tensor(), other.full_tensor())


@on_ranks(4)
def test_the_memory_of_a_rank_is_that_of_its_shard_whatever_the_replicas() -> None:
    replicated = sharded("nested", mesh_of(2)).memory_plan()
    alone = sharded("nested", mesh_of(2)["shard"]).memory_plan()
    assert (replicated.nbytes, replicated.regions) == (alone.nbytes, alone.regions)


@on_ranks(4)
def test_parameters_of_replicas_are_not_made_equal() -> None:
    """As in FSDP2, whose replicas keep what each was built with: seeds are the user's affair."""
    values = []
    for implementation in IMPLEMENTATIONS.values():
        torch.manual_seed(dist.get_rank() // 2)
        model = implementation.fully_shard(nn.Linear(4, 4), mesh=mesh_of(2))
        values.append(model.weight.full_tensor())
    assert torch.equal(*values)
    with pytest.raises(AssertionError):
        assert_replicas_equal(values, mesh_of(2))


def train_on(name: str, model: Any, optimizer: torch.optim.Optimizer, *steps: int) -> list[float]:
    losses = []
    for step in steps:
        loss = SPECIMENS[name].loss_of(model, step, dist.get_rank())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def scrambled(name: str, mesh: DeviceMesh | None = None) -> Any:
    model = sharded(name, mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


@SLOW
@pytest.mark.parametrize("name", ["decoder", "odd", "tied"])
@on_ranks(4)
def test_training_goes_on_bit_for_bit_from_full_states(name: str) -> None:
    model, other = sharded(name), scrambled(name)
    optimizer, other_optimizer = adam(model), adam(other)
    train_on(name, model, optimizer, 0, 1)
    model_state = get_model_state_dict(model, options=FULL)
    optimizer_state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    set_model_state_dict(other, model_state, options=BROADCAST)
    set_optimizer_state_dict(other, other_optimizer, optimizer_state, options=BROADCAST)
    assert train_on(name, other, other_optimizer, 2, 3) == train_on(name, model, optimizer, 2, 3)
    assert_tensors_equal(full_parameters(other), full_parameters(model))


def mesh_for(num_replicas: int | None) -> DeviceMesh:
    """1-D over all ranks for None."""
    return mesh_of(num_replicas) if num_replicas else init_device_mesh("cpu", (dist.get_world_size(),))


def save(name: str, num_replicas: int | None, directory: Path) -> dict[str, torch.Tensor]:
    model = sharded(name, mesh_for(num_replicas))
    optimizer = adam(model)
    train_on(name, model, optimizer, 0, 1)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=directory)
    return full_parameters(model) | moments(optimizer)


def load(name: str, num_replicas: int | None, directory: Path) -> dict[str, torch.Tensor]:
    model = scrambled(name, mesh_for(num_replicas))
    optimizer = adam(model)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return full_parameters(model) | moments(optimizer)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's first moments, whole, by number."""
    found = [state["exp_avg"] for state in optimizer.state.values()]
    return {str(k): m.full_tensor() if isinstance(m, DTensor) else m for k, m in enumerate(found)}


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint's own calls
@pytest.mark.parametrize(("before", "after"), [((4, 2), (4, 2)), ((4, 2), (3, None)), ((2, None), (4, 2))])
def test_checkpoints_load_on_other_meshes(
    before: tuple[int, int | None], after: tuple[int, int | None], tmp_path: Path
) -> None:
    saved = run_ranks(save, "odd", before[1], tmp_path, world_size=before[0])[0]
    for loaded in run_ranks(load, "odd", after[1], tmp_path, world_size=after[0]):
        assert_tensors_equal(loaded, saved)


# --- replicas that differ ---

SECONDS = 15.0  # before a job counts as hung


def errors_of_first_forwards(odd_ranks: Sequence[int], mend: bool) -> list[str]:
    """The errors that two forwards raise on each rank; `odd_ranks` build a wider model, or leave theirs on meta."""
    odd = dist.get_rank() in odd_ranks
    with torch.device("meta" if mend and odd else "cpu"):
        model: Any = nn.Linear(4, 6 if odd and not mend else 4)
    fully_shard(model, mesh=mesh_of(2))
    messages = []
    for _ in range(2):
        try:
            model(torch.ones(2, 4)).sum().backward()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
        if mend and odd:
            model.to_empty(device="cpu")
    return messages


@pytest.mark.parametrize("odd_ranks", [(2, 3), (1,), (0, 1, 2)])
def test_a_replica_that_builds_another_model_raises_and_so_do_the_others(odd_ranks: tuple[int, ...]) -> None:
    """Prevents: replicas that each agree inside, and hang or average the wrong numbers in the first all-reduce."""
    found = run_ranks(errors_of_first_forwards, odd_ranks, False, world_size=4, timeout=SECONDS)
    assert len({message for messages in found for message in messages}) == 1
    others = ", ".join(str(rank) for rank in range(4) if rank not in odd_ranks)
    odd = ", ".join(map(str, odd_ranks))
    message = found[0][0]
    assert message.startswith("ranks shard different models; the first difference is entry 0: ")
    assert f"rank {others}: weight [4, 4]" in message
    assert f"rank {odd}: weight [6, 4]" in message


def test_an_error_in_one_replica_reaches_the_others_and_can_be_mended() -> None:
    found = run_ranks(errors_of_first_forwards, [3], True, world_size=4, timeout=SECONDS)
    for rank, (first, second) in enumerate(found):
        assert first.startswith("FSDP parameters should be" if rank == 3 else "rank 3 failed to shard the model")
        assert second == ""


# --- the choice inside replicas ---


def chosen(asked: Any, hosts: Sequence[int]) -> tuple[str, str]:
    """The transport of this rank, each of which is on the host of this number, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "_host", lambda: f"host {hosts[dist.get_rank()]}")
        mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
        try:
            return type(transport_over(mesh, CPU, asked).shards).__name__, transport_over(mesh, CPU, asked).description  # type: ignore[attr-defined]
        except ValueError as error:
            return "", str(error)


def test_peer_memory_in_one_replica_only_is_refused_on_all_ranks() -> None:
    """Prevents: ranks of the other replica that wait for those that have raised."""
    found = run_ranks(chosen, "peer", (0, 0, 0, 1), world_size=4, timeout=SECONDS)
    assert len(set(found)) == 1
    assert found[0] == ("", "transport='peer' is not possible: the ranks are on several hosts; use transport='auto'")


def test_each_replica_on_a_host_of_its_own_maps_memory_inside() -> None:
    found = run_ranks(chosen, "peer", (0, 0, 1, 1), world_size=4, timeout=SECONDS)
    assert set(found) == {("PeerTransport", "2 replicas over their process group; in each, peer: asked for")}


@on_ranks(4)
def test_replicas_that_could_be_joined_in_different_ways_all_take_the_process_group() -> None:
    """Prevents: one replica that averages new gradients, and another that averages what it has added up."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    asked: Any = "peer" if dist.get_rank() < 2 else "process_group"
    with mock.patch.object(choice, "transport_of", lambda group, device, _: transport_of(group, device, asked)):
        found = transport_over(mesh, CPU, "auto")
    reason = "process group: the ranks of another replica have only this"
    assert found.description == f"2 replicas over their process group; in each, {reason}"


@on_ranks(4)
def test_a_model_says_which_transport_moves_its_bytes() -> None:
    unit = fully_shard.state(fully_shard(nn.Linear(3, 3), mesh=mesh_of(2))).unit
    assert unit.transport.description == (
        "2 replicas over their process group; in each, process group: on cpu, peer memory is used only when asked for"
    )
