"""The transport between ranks that map each other's memory, on CPUs.

The same bits as the process group's, the memory that it takes, and its errors where it is not possible.
"""

import dataclasses
import gc
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from tests.laws.test_memory import DELEGATING, storage_nbytes, units_of
from tests.laws.test_parity import recompute_inside
from tests.ranks import on_ranks, run_ranks
from tests.training import Prepare, Recipe, Run, assert_close, assert_same_bits, train, world_mesh
from tests.twins import Twins
from tests.zoo import BATCH, FEATURES, SPECIMENS, Specimen
from yafsdp_like import MixedPrecisionPolicy, SpillWarning, fully_shard
from yafsdp_like.comm.choice import transport_of
from yafsdp_like.comm.transport import Reduction
from yafsdp_like.memory.arena import MemoryBlock
from yafsdp_like.shard.runtime import allocated_memory as allocated_memory_module
from yafsdp_like.shard.spec import memory_layout
from yafsdp_like.shard.spec.unit_spec import UnitLayout

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
CPU = torch.device("cpu")
BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
ALL_BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16}


# --- the same bits ---


def train_by_both(name: str, recipes: Sequence[Recipe], prepare: Prepare | None = None) -> list[tuple[Run, Run]]:
    """Each recipe over peer memory, and over the process group."""

    def by(transport: str, recipe: Recipe) -> Run:
        return train(name, "ours", dataclasses.replace(recipe, transport=transport), prepare)

    return [(by("peer", recipe), by("process_group", recipe)) for recipe in recipes]


def assert_transports_agree(name: str, *recipes: Recipe, prepare: Prepare | None = None) -> None:
    for pairs in run_ranks(train_by_both, name, recipes, prepare):
        for over_peers, over_the_group in pairs:
            assert_same_bits(over_peers, over_the_group)


@pytest.mark.slow(unless=lambda name: name in ("decoder", "frozen", "nested", "odd", "reused", "tied"))
@pytest.mark.parametrize("name", SPECIMENS)
def test_both_transports_give_the_same_bits_in_every_precision(name: str) -> None:
    precisions = [{}] if name == "convnet" else [{}, BF16, ALL_BF16]  # its buffers stay fp32
    assert_transports_agree(name, *(Recipe(steps=4, precision=precision) for precision in precisions))


@pytest.mark.parametrize("sync_each", [True, False])
def test_both_transports_accumulate_to_the_same_bits(sync_each: bool) -> None:
    recipes = [
        Recipe(steps=4, micro_batches=3, sync_each=sync_each, precision=precision, set_to_none=set_to_none)
        for precision, set_to_none in [({}, True), (BF16, False), (ALL_BF16, True)]
    ]
    assert_transports_agree("nested", *recipes)


@pytest.mark.parametrize(
    "name", ["decoder", *(pytest.param(n, marks=pytest.mark.slow) for n in ("recomputed", "tied", "frozen", "reused"))]
)
def test_evaluations_in_between_change_no_bit(name: str) -> None:
    assert_transports_agree(name, *(Recipe(steps=4, evaluates=True, precision=precision) for precision in ({}, BF16)))


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_recomputation_and_resharding_change_no_bit(reshard_after_forward: bool) -> None:
    recipe = Recipe(steps=4, precision=BF16, reshard_after_forward=reshard_after_forward)
    assert_transports_agree("decoder", recipe, prepare=recompute_inside)


def test_a_divisor_that_is_a_power_of_two_gives_the_same_bits_and_another_nearly() -> None:
    """The kernel multiplies by the inverse, which is rounded where a collective divides."""
    for even, odd in run_ranks(train_by_both, "decoder", [Recipe(steps=4, divide_factor=f) for f in (4.0, 3.0)]):
        assert_same_bits(*even)
        assert_close(*odd)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("name", ["odd", "nested"])
def test_other_world_sizes_follow_the_unsharded_model(name: str, world_size: int) -> None:
    """Some ranks have no rows of some parameters of the first; one rank has no peers to map."""
    run_ranks(train_twins, name, world_size=world_size)


def train_twins(name: str) -> None:
    twins = Twins(SPECIMENS[name], transport="peer")
    twins.train(0, 1, 2)
    twins.compare_parameters()


class Mixed(nn.Module):
    """Two layers, to be sharded over different transports."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, 8), nn.Linear(8, FEATURES)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).relu())


@on_ranks()
def test_units_of_one_model_may_use_different_transports() -> None:
    torch.manual_seed(7)
    mixed: Any = Mixed()
    torch.manual_seed(7)
    plain = Mixed()
    for layer, transport in zip(mixed.layers, ("peer", "process_group"), strict=True):
        fully_shard(layer, mesh=world_mesh(), transport=transport)
    fully_shard(mixed, mesh=world_mesh())
    x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(0))
    for model in (mixed, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(mixed(x), plain(x))


# --- memory ---


def sharded(specimen: Specimen, **options: Any) -> Any:
    return specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), transport="peer", **options)


def step(model: Any, specimen: Specimen, number: int = 0) -> None:
    specimen.loss_of(model, number, dist.get_rank()).backward()


@pytest.mark.parametrize("name", SPECIMENS)
def test_the_plan_is_what_is_held_staging_included(name: str) -> None:
    run_ranks(compare_plan_with_memory, name)


def compare_plan_with_memory(name: str) -> None:
    specimen = SPECIMENS[name]
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(**BF16)):
        if name == "convnet" and policy.param_dtype:  # its buffers stay fp32
            continue
        model = sharded(specimen, mp_policy=policy)
        plan = model.memory_plan()
        largest = max(UnitLayout.of(unit.param_specs(), mapped=True).gradient_slot.nbytes for unit in units_of(model))
        assert plan.nbytes_of("staging") == largest > 0
        assert plan.nbytes_of("compute_shard") > 0, "peers read it in place, in fp32 too"
        for number in range(2):
            step(model, specimen, number)
            assert model.memory_report().arena_nbytes == model.memory_plan().nbytes == plan.nbytes
        assert storage_nbytes(model) == plan.nbytes


@pytest.mark.parametrize("nbytes", [256, 768])
def test_units_larger_than_the_staging_memory_go_through_it_in_rounds(nbytes: int) -> None:
    for wide, narrow in run_ranks(train_with_little_staging, nbytes):
        assert_same_bits(narrow, wide)


def train_with_little_staging(nbytes: int) -> tuple[Run, Run]:
    recipe = Recipe(steps=4, precision=BF16, transport="peer")
    wide = train("nested", "ours", recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_layout, "MAX_STAGING_NBYTES", nbytes)
        model = sharded(SPECIMENS["nested"], mp_policy=MixedPrecisionPolicy(**BF16))
        assert model.memory_plan().nbytes_of("staging") == nbytes
        return wide, train("nested", "ours", recipe)


@contextmanager
def allocations() -> Iterator[list[MemoryBlock]]:
    """The blocks that are allocated inside, which stay alive as long as the list."""
    blocks: list[MemoryBlock] = []
    allocate = MemoryBlock.allocate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryBlock, "allocate", lambda *args: blocks.append(allocate(*args)) or blocks[-1])
        yield blocks


@on_ranks()
def test_memory_that_ranks_share_has_no_name() -> None:
    """Prevents: shared memory that outlives a process that was killed."""
    named = set(Path("/dev/shm").glob("yafsdp_*"))
    model = sharded(SPECIMENS["nested"])
    step(model, SPECIMENS["nested"])
    assert num_maps()
    assert set(Path("/dev/shm").glob("yafsdp_*")) == named


@on_ranks()
def test_no_descriptor_stays_open_when_a_rank_fails_to_build() -> None:
    model = sharded(SPECIMENS["odd"])
    build, opened = allocated_memory_module.build, []

    def fail(*args: Any) -> Any:
        arena = build(*args)
        opened.append(num_descriptors())
        if dist.get_rank() == 1:
            raise MemoryError("no room")
        return arena

    before = num_descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocated_memory_module, "build", fail)
        with pytest.raises((MemoryError, RuntimeError), match="no room"):
            step(model, SPECIMENS["odd"])
    gc.collect()
    assert opened[0] > before == num_descriptors()
    step(model, SPECIMENS["odd"])  # and the model is not broken by it


def num_maps() -> int:
    """Files of ours that this process maps, those of other ranks among them."""
    return sum("yafsdp_" in line for line in Path("/proc/self/maps").read_text().splitlines())


def num_descriptors() -> int:
    """Descriptors of files of ours that are open."""
    return sum("yafsdp_" in os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


@on_ranks()
def test_a_deleted_model_frees_its_own_memory_and_its_maps_of_others() -> None:
    def life() -> int:
        twins = Twins(SPECIMENS["nested"], transport="peer")
        twins.train(0, 1)
        return num_maps()

    life()  # what the transport itself keeps is there now
    gc.collect()
    before = num_maps()
    assert life() > before
    gc.collect()
    assert num_maps() == before


@on_ranks()
def test_two_models_on_one_group_do_not_disturb_each_other() -> None:
    first, second = (Twins(SPECIMENS[name], transport="peer") for name in ("odd", "nested"))
    for number in range(3):
        first.backward(number)
        second.backward(number)
        first.step()
        second.step()
    first.compare_parameters()
    second.compare_parameters()


@on_ranks()
def test_freezing_a_parameter_maps_new_memory() -> None:
    """The plan is another one then, and all ranks map it anew."""
    twins = Twins(SPECIMENS["decoder"], transport="peer")
    twins.train(0)
    for model in twins:
        model.layers[1].requires_grad_(False)
    with allocations() as blocks:
        twins.train(1, 2)
    assert len(blocks) == 1
    for model in twins:
        model.layers[1].requires_grad_(True)
    twins.train(3)


@on_ranks()
def test_slots_beyond_the_plan_are_mapped_too() -> None:
    """Prevents: a reduction that reads a peer's slot where the peer no longer has it."""
    twins = Twins(DELEGATING, transport="peer")
    with pytest.warns(SpillWarning):
        twins.backward(0)
    twins.step()
    spills = {region.name for region in twins.sharded.memory_plan().regions if region.kind == "spill" and region.mapped}
    assert spills == {"layers.3.gradient_slot"}
    twins.train(1, 2, 3)


# --- the sum ---

NUMEL = 300  # of one rank's chunk: more than one round of the smallest staging memory
WORLD_SIZE = 4


def chunks_of_all_ranks(dtype: torch.dtype) -> torch.Tensor:
    """`(WORLD_SIZE, WORLD_SIZE * NUMEL)`: each rank's gradients, of magnitudes whose sum depends on the order."""
    generator = torch.Generator().manual_seed(3)
    shape = (WORLD_SIZE, WORLD_SIZE * NUMEL)
    magnitudes = 10.0 ** torch.randint(-3, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * magnitudes).to(dtype)


def summed(chunks: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    total = chunks[order[0]].float()
    for rank in order[1:]:
        total = total + chunks[rank].float()
    return total


@pytest.mark.parametrize("staging_nbytes", [3 * 256, 1 << 16])
@pytest.mark.parametrize(
    ("reduction", "divisor"),
    [
        (Reduction(), 4.0),
        (Reduction(mean=False, post_divisor=3.0), 3.0),
        (Reduction(mean=False), 1.0),
        (Reduction(mean=False, pre_divisor=2.0, post_divisor=2.0), 4.0),
    ],
    ids=["mean", "divisor", "sum", "divided before and after"],
)
@pytest.mark.parametrize(
    ("dtype", "wire_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@on_ranks(WORLD_SIZE)
def test_four_ranks_add_in_order_of_rank(
    dtype: torch.dtype, wire_dtype: torch.dtype, reduction: Reduction, divisor: float, staging_nbytes: int
) -> None:
    """In fp32, whatever the gradients' dtype; rounded once to what a collective would have sent."""
    rank, everybody = dist.get_rank(), chunks_of_all_ranks(dtype)
    transport = transport_of(dist.group.WORLD, CPU, "peer")
    block = MemoryBlock.allocate(everybody[rank].numel() * dtype.itemsize, CPU)
    if transport.mapped is not None:
        transport.mapped.connect([block])
    gradients = block.bytes.view(dtype)
    gradients.copy_(everybody[rank])
    shard = torch.full((NUMEL,), 7.0)
    staging = torch.empty(staging_nbytes, dtype=torch.uint8)
    reduce = transport.reduce_scatter([shard], [gradients], [wire_dtype], staging)

    chunks = everybody[:, rank * NUMEL : (rank + 1) * NUMEL]
    scale = torch.tensor(1.0 / divisor)
    expected = (summed(chunks, range(WORLD_SIZE)) * scale).to(wire_dtype).float()
    reduce(reduction, False)
    assert torch.equal(shard, expected)
    reduce(reduction, True)
    assert torch.equal(shard, expected + expected)
    if wire_dtype == torch.float32:
        backwards = summed(chunks, range(WORLD_SIZE)[::-1]) * scale
        assert not torch.equal(backwards, expected), "the numbers do not tell one order from another"


# --- when it is not possible ---


def new_mesh() -> DeviceMesh:
    """Over a group that no transport was chosen for yet."""
    return DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu")


@on_ranks()
def test_ranks_on_several_hosts_are_refused_on_all_of_them() -> None:
    mesh = new_mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: f"host {dist.get_rank()}")
        with pytest.raises(ValueError, match="transport='peer' is not possible: the ranks are on several hosts"):
            fully_shard(nn.Linear(3, 3), mesh=mesh, transport="peer")


@on_ranks()
def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transport must be one of .*'peer'.*, got 'pear'"):
        fully_shard(nn.Linear(3, 3), mesh=world_mesh(), transport="pear")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("auto", "process group: on cpu, peer memory is used only when asked for"),
        ("process_group", "process group: asked for"),
        ("peer", "peer: asked for"),
    ],
)
@on_ranks()
def test_the_plan_says_which_transport_and_why(asked: Any, reason: str) -> None:
    model: Any = fully_shard(nn.Linear(3, 3), mesh=world_mesh(), transport=asked)
    assert reason in str(model.memory_plan())


class Collectives(TorchDispatchMode):
    """Which operations of torch.distributed move tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "barrier" not in func._overloadpacket.__name__:
            self.operations.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@on_ranks()
def test_over_peer_memory_a_step_has_no_collective_but_barriers() -> None:
    model = sharded(SPECIMENS["nested"])
    step(model, SPECIMENS["nested"])
    with Collectives() as collectives:
        step(model, SPECIMENS["nested"], 1)
    assert collectives.operations == []
