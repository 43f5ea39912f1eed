"""One shard dimension over several hosts, on gloo ranks each of which is given a host.

The same numbers as the process group's, the order of sums, memory, and the errors where hosts are not alike.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tests.laws.test_memory import storage_nbytes, units_of
from tests.ranks import on_ranks, run_ranks
from tests.training import Recipe, Run, assert_close, assert_same_bits, train
from tests.twins import Twins
from tests.zoo import SPECIMENS
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.comm import choice, peer
from yafsdp_like.comm.choice import transport_of, transport_over
from yafsdp_like.comm.hierarchical import HierarchicalTransport
from yafsdp_like.comm.peer import Obstacle
from yafsdp_like.comm.transport import AllGather, Reduction, Transport
from yafsdp_like.memory.arena import MemoryBlock
from yafsdp_like.shard.spec import memory_layout
from yafsdp_like.shard.spec.unit_spec import UnitLayout

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
CPU = torch.device("cpu")
BF16 = {"param_dtype": torch.bfloat16}
MIXED = BF16 | {"reduce_dtype": torch.float32}


@cache
def world_of(num_hosts: int) -> dist.ProcessGroup:
    """All ranks, in a group whose transports find this many hosts; one per process, as transports are."""
    group = dist.new_group(backend="gloo")
    per_host = dist.get_world_size() // num_hosts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "_host", lambda: f"host {dist.get_rank() // per_host}")
        found = transport_of(group, CPU, "hierarchical")
    assert isinstance(found, HierarchicalTransport) and found.num_hosts == num_hosts
    return group


def mesh_over(num_hosts: int) -> DeviceMesh:
    return DeviceMesh.from_group(world_of(num_hosts), "cpu")


def over_hosts(patch: pytest.MonkeyPatch, num_hosts: int) -> None:
    """From now on, the zoo's mesh is that of several hosts."""
    patch.setattr("tests.training.world_mesh", lambda device="cpu": mesh_over(num_hosts))


# --- training ---


def train_by_both(name: str, num_hosts: int, recipes: Sequence[Recipe]) -> list[tuple[Run, Run]]:
    """Each recipe over hosts, and over one process group."""

    def by(transport: str, recipe: Recipe) -> Run:
        return train(name, "ours", dataclasses.replace(recipe, transport=transport))

    with pytest.MonkeyPatch.context() as patch:
        over_hosts(patch, num_hosts)
        return [(by("hierarchical", recipe), by("process_group", recipe)) for recipe in recipes]


@pytest.mark.parametrize(
    "name",
    ["odd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tied", "decoder", "nested", "frozen", "reused"))],
)
def test_training_over_hosts_follows_the_process_group(name: str) -> None:
    """Sums of four numbers in two orders differ in their last bit."""
    recipes = [Recipe(steps=4, precision=precision, evaluates=True) for precision in ({}, MIXED)]
    fp32, mixed = run_ranks(train_by_both, name, 2, recipes, world_size=4)[0]
    assert_close(*fp32, tolerance=1e-4)
    assert_close(*mixed, tolerance=1e-2)


@pytest.mark.parametrize("sync_each", [pytest.param(True, marks=pytest.mark.slow), False])
def test_accumulation_over_hosts_follows_the_process_group(sync_each: bool) -> None:
    recipe = Recipe(steps=3, micro_batches=3, sync_each=sync_each)
    for runs in run_ranks(train_by_both, "nested", 2, [recipe], world_size=4):
        assert_close(*runs[0], tolerance=1e-4)


@pytest.mark.slow(unless=lambda num_hosts: num_hosts == 3)
@pytest.mark.parametrize(("num_hosts", "world_size"), [(2, 4), (2, 6), (3, 6)])
def test_any_number_of_hosts_follows_the_unsharded_model(num_hosts: int, world_size: int) -> None:
    """Some ranks have no rows of some parameters of the first specimen."""
    run_ranks(train_twins, num_hosts, world_size=world_size)


def train_twins(num_hosts: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        over_hosts(patch, num_hosts)
        for name in ("odd", "nested"):
            twins = Twins(SPECIMENS[name], transport="hierarchical")
            twins.train(0, 1, 2)
            twins.compare_parameters()


def train_twice(num_hosts: int, narrow_nbytes: int) -> tuple[Run, Run]:
    """With staging memory for whole units, and for pieces of them."""
    recipe = Recipe(steps=3, precision=MIXED, transport="hierarchical")
    with pytest.MonkeyPatch.context() as patch:
        over_hosts(patch, num_hosts)
        wide = train("nested", "ours", recipe)
        patch.setattr(memory_layout, "MAX_STAGING_NBYTES", narrow_nbytes)
        return wide, train("nested", "ours", recipe)


def test_two_runs_and_any_size_of_staging_memory_give_the_same_bits() -> None:
    for wide, narrow in run_ranks(train_twice, 2, 1024, world_size=4):
        assert_same_bits(wide, narrow)


# --- one gather, one reduction ---

NUMEL = 100  # of one rank's chunk; the second parameter's is half as large


class Buffers:
    """Two parameters' shards, slots and gradients on this rank of a group, connected."""

    def __init__(self, transport: HierarchicalTransport, dtype: torch.dtype, wire_dtype: torch.dtype) -> None:
        sizes, width = (NUMEL, NUMEL // 2), transport.world_size
        column = transport.mapped.column_nbytes([n * dtype.itemsize for n in sizes])
        gradients = [MemoryBlock.allocate(width * n * dtype.itemsize, CPU) for n in sizes]
        staging = MemoryBlock.allocate(column, CPU)
        transport.mapped.connect([*gradients, staging])
        self.shards = [torch.zeros(n, dtype=dtype) for n in sizes]
        self.slots = [torch.zeros(width * n, dtype=dtype) for n in sizes]
        self.gradients = [block.bytes.view(dtype) for block in gradients]
        self.sums = [torch.zeros(n) for n in sizes]
        self.gather = transport.all_gather(self.slots, self.shards, scratch=staging.bytes)
        sums_column = transport.mapped.column_nbytes([n * wire_dtype.itemsize for n in sizes])
        scratch = torch.empty(1024 + sums_column, dtype=torch.uint8)
        self.reduce = transport.reduce_scatter(self.sums, self.gradients, [wire_dtype] * 2, scratch)
        self.blocks = [*gradients, staging]


def transport_over_hosts(num_hosts: int) -> HierarchicalTransport:
    found = transport_of(world_of(num_hosts), CPU, "hierarchical")
    assert isinstance(found, HierarchicalTransport)
    return found


class Late:
    """A transport whose gathers start late on this rank, if it is `late`."""

    def __init__(self, transport: Transport, late: bool) -> None:
        self._transport, self._late = transport, late

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def all_gather(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> AllGather:
        gather: AllGather = self._transport.all_gather(outputs, inputs)

        def run() -> None:
            if self._late:
                time.sleep(0.03)
            gather()

        return run


def values(rank: int, number: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Of magnitudes whose sum depends on the order."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    magnitudes = 10.0 ** torch.randint(-3, 4, (numel,), generator=generator)
    return (torch.randn(numel, generator=generator) * magnitudes).to(dtype)


@pytest.mark.parametrize("num_hosts", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_ranks(6)
def test_a_gather_brings_every_chunk_in_order_of_rank_again_and_again(dtype: torch.dtype, num_hosts: int) -> None:
    """Prevents: a column that is written again before the last peer has pulled it, or pulled before it is written."""
    transport, rank = transport_over_hosts(num_hosts), dist.get_rank()
    inside, across = Late(transport._inside, rank == 1), Late(transport._across, rank == 0)
    buffers = Buffers(HierarchicalTransport(world_of(num_hosts), inside, across), dtype, dtype)
    for number in range(4):
        for shard in buffers.shards:
            shard.copy_(values(rank, number, shard.numel(), dtype))
        buffers.gather()
        for shard, slot in zip(buffers.shards, buffers.slots, strict=True):
            expected = [values(other, number, shard.numel(), dtype) for other in range(6)]
            assert torch.equal(slot, torch.cat(expected))


@pytest.mark.parametrize(
    ("reduction", "divisor"),
    [
        (Reduction(), 4.0),
        (Reduction(mean=False, post_divisor=8.0), 8.0),
        (Reduction(mean=False), 1.0),
        (Reduction(mean=False, pre_divisor=2.0, post_divisor=2.0), 4.0),
    ],
    ids=["mean", "divisor", "sum", "divided before and after"],
)
@pytest.mark.parametrize(
    ("dtype", "wire_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@on_ranks(4)
def test_hosts_add_up_what_their_ranks_have_added_up(
    dtype: torch.dtype, wire_dtype: torch.dtype, reduction: Reduction, divisor: float
) -> None:
    """In fp32 in order of rank inside a host, rounded to what crosses, and once more between two hosts."""
    transport, rank = transport_over_hosts(2), dist.get_rank()
    buffers = Buffers(transport, dtype, wire_dtype)
    for accumulate in (False, True):
        for number, (gradients, shard) in enumerate(zip(buffers.gradients, buffers.sums, strict=True)):
            gradients.copy_(values(rank, number, gradients.numel(), dtype))
            shard.fill_(7.0)
        buffers.reduce(reduction, accumulate)
        for number, shard in enumerate(buffers.sums):
            part = slice(rank * shard.numel(), (rank + 1) * shard.numel())
            chunks = [values(other, number, 4 * shard.numel(), dtype)[part].float() for other in range(4)]
            hosts = [(a + b).div(2.0).to(wire_dtype) for a, b in (chunks[:2], chunks[2:])]
            expected = (hosts[0] + hosts[1]).mul(2.0 / divisor).to(wire_dtype).float() + 7.0 * accumulate
            assert torch.equal(shard, expected)
            truth = sum(chunk.double() for chunk in chunks) / divisor + 7.0 * accumulate
            largest = sum(chunk.abs() for chunk in chunks) / divisor
            error = (shard - truth).abs() / (largest + 7.0 * accumulate)
            assert error.max() < 4 * torch.finfo(wire_dtype).eps


# --- memory ---


@pytest.mark.parametrize("name", ["odd", "nested", "tied", "frozen"])
@on_ranks(4)
def test_the_plan_is_what_is_held_columns_included(name: str) -> None:
    specimen = SPECIMENS[name]
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(**MIXED)):
        wrapped = {"mesh": mesh_over(2), "transport": "hierarchical", "mp_policy": policy}
        model: Any = specimen.wrap(specimen.fresh(), fully_shard, **wrapped)
        plan = model.memory_plan()
        (column,) = [r for r in plan.regions if r.name == "gather staging"]
        halves = [UnitLayout.of(unit.param_specs()).gather_slot.nbytes / 2 for unit in units_of(model)]
        assert column.mapped and max(halves) <= column.nbytes <= max(halves) + 256 * 16
        for number in range(2):
            specimen.loss_of(model, number, dist.get_rank()).backward()
            assert model.memory_report().arena_nbytes == model.memory_plan().nbytes == plan.nbytes
        assert storage_nbytes(model) == plan.nbytes


# --- the choice ---

SECONDS = 15.0  # before a job counts as hung


def told(hosts: Sequence[int], asked: Any) -> str:
    """What the transport of a new group says of itself, or the error, with ranks on the hosts of these numbers."""
    group = dist.new_group(backend="gloo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "_host", lambda: f"host {hosts[dist.get_rank()]}")
        try:
            return transport_of(group, CPU, asked).description
        except ValueError as error:
            return str(error)


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ((0, 0, 0, 0), "all ranks are on one host"),
        ((0, 1, 2, 3), "every rank is on a host of its own"),
        (
            (0, 1, 0, 1),
            "hosts do not have the same number of consecutive ranks: 1 on host 0, 1 on host 1, 1 on host 0",
        ),
        ((0, 0, 0, 1), "hosts do not have the same number of consecutive ranks: 3 on host 0, 1 on host 1;"),
        (
            (0, 0, 1, 2),
            "hosts do not have the same number of consecutive ranks: 2 on host 0, 1 on host 1, 1 on host 2;",
        ),
    ],
)
def test_hosts_that_are_not_alike_are_refused_on_all_ranks(hosts: tuple[int, ...], reason: str) -> None:
    found = run_ranks(told, hosts, "hierarchical", world_size=4, timeout=SECONDS)
    assert len(set(found)) == 1
    assert found[0].startswith(f"transport='hierarchical' is not possible: {reason}")
    assert found[0].endswith("use transport='auto'")


def test_several_hosts_are_refused_to_peers_and_described_to_the_user() -> None:
    refused = f"transport='peer' is not possible: {Obstacle.SEVERAL_HOSTS}; use transport='auto'"
    assert set(run_ranks(told, (0, 0, 1, 1), "peer", world_size=4, timeout=SECONDS)) == {refused}
    described = "2 hosts; in each, peer: 2 ranks; between them, process group: asked for"
    assert set(run_ranks(told, (0, 0, 1, 1), "hierarchical", world_size=4, timeout=SECONDS)) == {described}


@on_ranks(4)
def test_replicas_may_span_hosts() -> None:
    """Two replicas, each on two hosts of one rank, have nothing to gain; each on one host maps memory there."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "_host", lambda: f"host {dist.get_rank()}")
        with pytest.raises(ValueError, match="every rank is on a host of its own"):
            transport_over(mesh, CPU, "hierarchical")


def train_replicas_over_hosts() -> None:
    mesh = DeviceMesh("cpu", [[0, 1, 2, 3], [4, 5, 6, 7]], mesh_dim_names=("replicate", "shard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "_host", lambda: f"host {dist.get_rank() // 2}")
        patch.setattr("tests.training.world_mesh", lambda: mesh)
        twins = Twins(SPECIMENS["nested"], transport="hierarchical")
        assert fully_shard.state(twins.sharded).unit.transport.description.startswith("2 replicas")  # type: ignore[attr-defined]
        twins.train(0, 1)
        twins.compare_parameters()


def test_two_replicas_of_two_hosts_each_follow_the_unsharded_model() -> None:
    run_ranks(train_replicas_over_hosts, world_size=8, timeout=120)


class FourRanks:
    """A group, as far as the choice of its transport looks at it."""

    def size(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("obstacle", "expected"),
    [
        (None, "PeerTransport: 4 GPUs of one host"),
        (Obstacle.SHARED_GPU, "ProcessGroupTransport: several ranks share one GPU"),
        (Obstacle.SEVERAL_HOSTS, "ProcessGroupTransport: the ranks are on several hosts"),
    ],
    ids=["one host", "one host of one GPU", "several hosts"],
)
def test_on_gpus_the_best_that_is_possible_is_taken_by_itself(
    obstacle: Obstacle | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is possible is given, since this machine's processes have no GPUs on several hosts to ask."""
    monkeypatch.setattr(choice, "obstacle", lambda *_: obstacle)
    monkeypatch.setattr(choice, "over_hosts", lambda *_: pytest.fail("hierarchical must be asked for by name"))
    for name in ("PeerTransport", "ProcessGroupTransport"):
        monkeypatch.setattr(choice, name, lambda *args, name=name: f"{name}: {args[-1]}")
    found: Any = transport_of(FourRanks(), torch.device("cuda", 0), "auto")  # type: ignore[arg-type]
    assert found == expected
