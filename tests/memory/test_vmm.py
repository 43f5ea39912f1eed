"""Windows: ranges of addresses that show pages of several places, of this process and of others."""

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
from yafsdp_like.comm.descriptors import pages_of_all_ranks, windows_of_all_ranks
from yafsdp_like.memory import vmm as windows
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import FlatLayout, Segment
from yafsdp_like.memory.plan import MemoryPlan, Region
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.unit_state import Unit

CPU = torch.device("cpu")
PAGE = mmap.PAGESIZE


def arena_of(**num_pages: int) -> Arena:
    arena = Arena(CPU)
    arena.reserve([Region(name, "spill", n * PAGE, page_nbytes=PAGE) for name, n in num_pages.items()])
    return arena


def test_a_window_shows_the_same_bytes_as_the_places_it_was_made_of() -> None:
    arena = arena_of(slots=4, shard=2)
    slots, shard = arena.place("slots"), arena.place("shard")
    window = arena.show(
        "window", [slots.part(Segment(2 * PAGE, PAGE)), shard.part(Segment(PAGE, PAGE)), slots.part(Segment(0, PAGE))]
    )
    shown = window.tensor(torch.uint8, (3 * PAGE,))
    shown.view(3, PAGE).copy_(torch.tensor([[7], [8], [9]], dtype=torch.uint8).expand(3, PAGE))
    assert slots.tensor(torch.uint8, (4 * PAGE,)).view(4, PAGE)[:, 5].tolist() == [9, 0, 7, 0]
    assert shard.tensor(torch.uint8, (2 * PAGE,)).view(2, PAGE)[:, 5].tolist() == [0, 8]


def test_a_window_is_no_memory_of_the_plan() -> None:
    arena = arena_of(slots=2)
    arena.show("window", [arena.place("slots"), arena.place("slots")])
    assert arena.nbytes == 2 * PAGE


def test_a_tensor_keeps_its_window_after_the_arena_is_gone() -> None:
    """Prevents: backward reading addresses that nothing is mapped at, after a plan was remade."""
    arena = arena_of(slots=1)
    shown = arena.show("window", [arena.place("slots")]).tensor(torch.uint8, (PAGE,))
    shown.fill_(3)
    del arena
    assert shown.sum() == 3 * PAGE


def mapped_files() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:yafsdp_like" in line for line in maps)


def test_addresses_and_files_are_given_back_with_the_last_tensor() -> None:
    before, descriptors = mapped_files(), len(os.listdir("/proc/self/fd"))
    arena = arena_of(slots=3)
    shown = arena.show("window", [arena.place("slots")]).tensor(torch.uint8, (PAGE,))
    assert mapped_files() > before
    del arena, shown
    assert mapped_files() == before and len(os.listdir("/proc/self/fd")) == descriptors


def test_half_a_page_cannot_be_shown() -> None:
    arena = arena_of(slots=2)
    with pytest.raises(AssertionError, match="not made of whole pages"):
        arena.show("window", [arena.place("slots").part(Segment(PAGE // 2, PAGE))])


def test_segments_in_pages_start_at_pages_and_the_others_fit_between() -> None:
    layout = FlatLayout.pack([100, PAGE, 100, 2 * PAGE], in_pages=(1, 3), page_nbytes=PAGE)
    assert [s.offset_nbytes for s in layout.segments] == [0, PAGE, 2 * PAGE, 3 * PAGE]
    assert layout.nbytes == 5 * PAGE


def exchange(num_pages: int) -> list[int]:
    """What this rank reads of each rank's first and last page, after all have written theirs."""
    group = dist.group.WORLD
    assert group is not None
    pages = windows.allocate(num_pages * PAGE, PAGE, CPU)
    mine = windows.window([(pages, Segment(0, pages.nbytes))]).bytes
    mine[0], mine[-1] = dist.get_rank() + 1, dist.get_rank() + 101
    found = windows_of_all_ranks(pages, group)
    dist.barrier()
    read = [int(window.bytes[index]) for window in found for index in (0, -1)]
    dist.barrier()
    return read


def test_every_rank_sees_the_pages_of_every_rank() -> None:
    assert run_ranks(exchange, 5, world_size=3) == [[1, 101, 2, 102, 3, 103]] * 3


class PagesOfMany(windows.HostPages):
    """Host pages that need as many descriptors as a GPU's, one each."""

    @property
    def num_descriptors(self) -> int:  # type: ignore[override]
        return self.nbytes // self.page_nbytes

    def adopt(self, descriptors: Any) -> None:
        self.adopted = getattr(self, "adopted", 0) + len(descriptors)
        if self._file < 0:
            super().adopt(descriptors[:1])

    def of_peer(self) -> "PagesOfMany":
        return PagesOfMany(self.nbytes, self.page_nbytes)


def exchange_many() -> tuple[list[int], int]:
    """Descriptors that came from each other rank, and how many more this process has open after than before."""
    group = dist.group.WORLD
    assert group is not None
    pages = PagesOfMany.of(150 * PAGE, PAGE)
    before = len(os.listdir("/proc/self/fd"))
    found = pages_of_all_ranks(pages, group)
    dist.barrier()
    after = len(os.listdir("/proc/self/fd"))
    return [page.adopted for page in found if isinstance(page, PagesOfMany) and page is not pages], after - before


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


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("own_optimizer", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_slots_show_shards_and_numbers_are_those_of_a_process_group(
    mixed: bool, own_optimizer: bool, world_size: int
) -> None:
    over_peers = run_ranks(wide, "peer", mixed, own_optimizer, world_size=world_size)
    over_group = run_ranks(wide, "process_group", mixed, own_optimizer, world_size=world_size)
    for (losses, shown), (expected, not_shown) in zip(over_peers, over_group, strict=True):
        tolerance = 0.0 if world_size == 2 else 1e-2 if mixed else 1e-5  # gloo adds three numbers in another order
        assert losses == pytest.approx(expected, rel=tolerance, abs=0.0)
        assert any(any(unit) for unit in shown) and not all(all(unit) for unit in shown)
        assert not any(any(unit) for unit in not_shown)


class Copies(TorchDispatchMode):
    """Counts copies while it is entered."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def copies_of_gathers() -> list[tuple[int, int]]:
    """Of each unit with parameters: copies that its gather makes, and parameters whose own chunk is shown."""
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


def test_what_a_slot_shows_is_not_copied_by_a_gather() -> None:
    """Of five parameters each is pulled from the other rank, and the three that are not shown are copied as well."""
    for found in run_ranks(copies_of_gathers):
        assert found == [(5 + 3, 2)] * 3


def plan_of_wide(transport: str) -> tuple[MemoryPlan, int]:
    """The plan, and the bytes of one block's matrices in all."""
    model: Any = WIDE.wrap(WIDE.fresh(), fully_shard, mesh=world_mesh(), transport=transport)
    WIDE.loss_of(model, 0, 0).backward()
    assert storage_nbytes(model) == model.memory_plan().nbytes
    return model.memory_plan(), 2 * 128 * 96 * 4


def test_what_a_slot_shows_is_not_planned_twice() -> None:
    """Two slots of a block each, and the root's: its own half of the matrices is in the shard."""
    (plan, matrices), _ = run_ranks(plan_of_wide, "peer")
    slots = [slot.segment.nbytes for slot in plan.slots if slot.kind == "gather slots" and slot.segment.nbytes]
    vectors_nbytes = 2 * 2 * PAGE  # norm and bias, before and between matrices of 3 times 2 pages a rank
    assert slots == [matrices // 2 + vectors_nbytes] * 3
    assert plan.nbytes_of("gather slots") == 2 * slots[0]


def race_in(plant: str | None) -> Found:
    return train("wide", plant=plant, own_optimizer=True, transport="peer")


def test_no_access_through_a_window_races_with_one_to_the_pages_behind_it() -> None:
    for found in run_ranks(race_in, None):
        assert found.races == [] and found.num_accesses > 100


def test_a_race_between_two_views_of_the_same_pages_is_found() -> None:
    for found in run_ranks(race_in, "forget_readers"):
        assert found.races
