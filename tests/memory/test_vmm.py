"""Ranges of addresses that map memory of several places, of this process and of others."""

import mmap
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.laws.test_memory import storage_nbytes, units_of
from tests.laws.test_stream_order import Found, train
from tests.ranks import run_ranks
from tests.training import world_mesh
from tests.zoo import WIDE
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.comm.descriptors import exchange_memory, map_all_ranks
from yafsdp_like.memory import vmm
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import FlatLayout, Segment
from yafsdp_like.memory.plan import MemoryPlan, Region
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.runtime.unit_state import Unit

CPU = torch.device("cpu")
GRANULE = mmap.PAGESIZE


def arena_of(**num_granules: int) -> Arena:
    arena = Arena(CPU)
    arena.reserve([Region(name, "spill", n * GRANULE, granule_nbytes=GRANULE) for name, n in num_granules.items()])
    return arena


def test_an_alias_holds_the_same_bytes_as_the_places_it_was_made_of() -> None:
    arena = arena_of(slots=4, shard=2)
    slots, shard = arena.place("slots"), arena.place("shard")
    alias = arena.alias(
        "alias",
        [
            slots.part(Segment(2 * GRANULE, GRANULE)),
            shard.part(Segment(GRANULE, GRANULE)),
            slots.part(Segment(0, GRANULE)),
        ],
    )
    aliased = alias.tensor(torch.uint8, (3 * GRANULE,))
    aliased.view(3, GRANULE).copy_(torch.tensor([[7], [8], [9]], dtype=torch.uint8).expand(3, GRANULE))
    assert slots.tensor(torch.uint8, (4 * GRANULE,)).view(4, GRANULE)[:, 5].tolist() == [9, 0, 7, 0]
    assert shard.tensor(torch.uint8, (2 * GRANULE,)).view(2, GRANULE)[:, 5].tolist() == [0, 8]


def test_an_alias_is_no_memory_of_the_plan() -> None:
    arena = arena_of(slots=2)
    arena.alias("alias", [arena.place("slots"), arena.place("slots")])
    assert arena.nbytes == 2 * GRANULE


def test_a_tensor_keeps_its_mapping_after_the_arena_is_gone() -> None:
    """Prevents: backward reading addresses that nothing is mapped at, after a plan was remade."""
    arena = arena_of(slots=1)
    aliased = arena.alias("alias", [arena.place("slots")]).tensor(torch.uint8, (GRANULE,))
    aliased.fill_(3)
    del arena
    assert aliased.sum() == 3 * GRANULE


def mapped_files() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:yafsdp_like" in line for line in maps)


def test_addresses_and_files_are_given_back_with_the_last_tensor() -> None:
    before, descriptors = mapped_files(), len(os.listdir("/proc/self/fd"))
    arena = arena_of(slots=3)
    aliased = arena.alias("alias", [arena.place("slots")]).tensor(torch.uint8, (GRANULE,))
    assert mapped_files() > before
    del arena, aliased
    assert mapped_files() == before and len(os.listdir("/proc/self/fd")) == descriptors


def test_half_a_granule_cannot_be_mapped() -> None:
    arena = arena_of(slots=2)
    with pytest.raises(AssertionError, match="not made of whole granules"):
        arena.alias("alias", [arena.place("slots").part(Segment(GRANULE // 2, GRANULE))])


def test_segments_in_granules_start_at_granules_and_the_others_fit_between() -> None:
    layout = FlatLayout.pack([100, GRANULE, 100, 2 * GRANULE], in_granules=(1, 3), granule_nbytes=GRANULE)
    assert [s.offset_nbytes for s in layout.segments] == [0, GRANULE, 2 * GRANULE, 3 * GRANULE]
    assert layout.nbytes == 5 * GRANULE


def exchange(num_granules: int) -> list[int]:
    """What this rank reads of each rank's first and last page, after all have written theirs."""
    group = dist.group.WORLD
    assert group is not None
    memory = vmm.allocate(num_granules * GRANULE, GRANULE, CPU)
    mine = vmm.map_range([(memory, Segment(0, memory.nbytes))]).bytes
    mine[0], mine[-1] = dist.get_rank() + 1, dist.get_rank() + 101
    found = map_all_ranks(memory, group)
    dist.barrier()
    read = [int(mapped.bytes[index]) for mapped in found for index in (0, -1)]
    dist.barrier()
    return read


def test_every_rank_maps_the_memory_of_every_rank() -> None:
    assert run_ranks(exchange, 5, world_size=3) == [[1, 101, 2, 102, 3, 103]] * 3


class MemoryOfMany(vmm.HostMemory):
    """Host memory that needs as many descriptors as a GPU's, one each."""

    @property
    def num_descriptors(self) -> int:  # type: ignore[override]
        return self.nbytes // self.granule_nbytes

    def import_descriptors(self, descriptors: Any) -> None:
        self.adopted = getattr(self, "adopted", 0) + len(descriptors)
        if self._file < 0:
            super().import_descriptors(descriptors[:1])

    def of_peer(self) -> "MemoryOfMany":
        return MemoryOfMany(self.nbytes, self.granule_nbytes)


def exchange_many() -> tuple[list[int], int]:
    """Descriptors that came from each other rank, and how many more this process has open after than before."""
    group = dist.group.WORLD
    assert group is not None
    memory = MemoryOfMany.of(150 * GRANULE, GRANULE)
    before = len(os.listdir("/proc/self/fd"))
    found = exchange_memory(memory, group)
    dist.barrier()
    after = len(os.listdir("/proc/self/fd"))
    return [other.adopted for other in found if isinstance(other, MemoryOfMany) and other is not memory], after - before


def test_more_descriptors_than_one_message_holds_all_arrive_and_none_stays_open() -> None:
    for adopted, num_opened in run_ranks(exchange_many, world_size=3):
        assert adopted == [150, 150] and num_opened == 2  # one file of each peer


def wide(transport: str, mixed: bool, own_optimizer: bool) -> tuple[list[float], list[list[bool]]]:
    """Losses of some steps with evaluations between, and per unit which slots of parameters show their shard."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    model: Any = WIDE.wrap(WIDE.fresh(), fully_shard, mesh=world_mesh(), mp_policy=policy, transport=transport)
    optimizer = (AdamW if own_optimizer else torch.optim.AdamW)(model.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        loss = WIDE.loss_of(model, step, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses += [loss.item(), WIDE.loss_of(model, step, 0).item()]
    dist.barrier()  # nobody gathers any more
    return losses, [_aliased(unit) for unit in units_of(model)]


def _aliased(unit: Unit) -> list[bool]:
    """For each parameter, whether what is written to its shard is read in its slot."""
    found = []
    for p, output in zip(unit.params, unit.gather_slot.outputs, strict=True):
        with torch.no_grad():
            p.compute.fill_(0.5)
            output.fill_(0.25)
        found.append(bool((p.compute == 0.25).all()))
    assert found == [k in unit.gather_slot.aliased for k in range(len(found))]
    return found


@pytest.mark.slow(unless=lambda world_size, own_optimizer: world_size == 2 or own_optimizer)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("own_optimizer", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_slots_show_shards_and_numbers_are_those_of_a_process_group(
    mixed: bool, own_optimizer: bool, world_size: int
) -> None:
    over_peers = run_ranks(wide, "peer", mixed, own_optimizer, world_size=world_size)
    over_group = run_ranks(wide, "process_group", mixed, own_optimizer, world_size=world_size)
    for (losses, aliased), (expected, not_aliased) in zip(over_peers, over_group, strict=True):
        tolerance = 0.0 if world_size == 2 else 1e-2 if mixed else 1e-5  # gloo adds three numbers in another order
        assert losses == pytest.approx(expected, rel=tolerance, abs=0.0)
        assert any(any(unit) for unit in aliased) and not all(all(unit) for unit in aliased)
        assert not any(any(unit) for unit in not_aliased)


class Copies(TorchDispatchMode):
    """Counts copies while it is entered."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def copies_of_gathers() -> list[tuple[int, int]]:
    """Of each unit with parameters: copies that its gather makes, and parameters whose own chunk is aliased."""
    model: Any = WIDE.wrap(WIDE.fresh(), fully_shard, mesh=world_mesh(), transport="peer")
    WIDE.loss_of(model, 0, 0).backward()
    found = []
    for unit in units_of(model):
        if unit.params:
            with Copies() as copies:
                unit.gather_slot.all_gather()
            found.append((copies.count, len(unit.gather_slot.aliased)))
    dist.barrier()  # nobody's memory goes while another still reads it
    return found


def test_what_a_slot_aliases_is_not_copied_by_an_all_gather() -> None:
    """Of five parameters each is pulled from the other rank, and the three that are not aliased are copied as well."""
    for found in run_ranks(copies_of_gathers):
        assert found == [(5 + 3, 2)] * 3


def plan_of_wide(transport: str) -> tuple[MemoryPlan, int]:
    """The plan, and the bytes of one block's matrices in all."""
    model: Any = WIDE.wrap(WIDE.fresh(), fully_shard, mesh=world_mesh(), transport=transport)
    WIDE.loss_of(model, 0, 0).backward()
    assert storage_nbytes(model) == model.memory_plan().nbytes
    return model.memory_plan(), 2 * 128 * 96 * 4


def test_what_a_slot_aliases_is_not_planned_twice() -> None:
    """Two slots of a block each, and the root's: its own half of the matrices is in the shard."""
    (plan, matrices), _ = run_ranks(plan_of_wide, "peer")
    slots = [slot.segment.nbytes for slot in plan.slots if slot.kind == "gather slots" and slot.segment.nbytes]
    vectors_nbytes = 2 * 2 * GRANULE  # norm and bias, before and between matrices of 3 times 2 granules a rank
    assert slots == [matrices // 2 + vectors_nbytes] * 3
    assert plan.nbytes_of("gather slots") == 2 * slots[0]


def race_in(plant: str | None) -> Found:
    return train("wide", plant=plant, own_optimizer=True, transport="peer")


def test_no_access_through_an_alias_races_with_one_to_the_memory_behind_it() -> None:
    for found in run_ranks(race_in, None):
        assert found.races == [] and found.num_accesses > 100


def test_a_race_between_two_aliases_of_the_same_memory_is_found() -> None:
    for found in run_ranks(race_in, "forget_readers"):
        assert found.races
