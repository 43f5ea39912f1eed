"""The memory that ranks map of each other: one object, also for a transport over several hosts."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import on_ranks
from yafsdp_like.comm.mapped_memory import MappedMemory
from yafsdp_like.memory.arena import MemoryBlock

CPU = torch.device("cpu")


@on_ranks(2)
def test_a_tensor_in_a_connected_block_is_found_in_every_ranks_memory() -> None:
    """Also through the object of a transport over hosts, whose maps are the same."""
    rank = dist.get_rank()
    mapped = MappedMemory(dist.group.WORLD, CPU)
    block = MemoryBlock.allocate(1024, CPU)
    mapped.over_hosts(3).connect([block])
    mine = block.bytes[256:512].view(torch.float32).view(2, 32)
    mine.fill_(rank + 1)
    mapped.stream_barrier("gather")
    found = mapped.of_all_ranks(mine)
    assert [tensor.unique().tolist() for tensor in found] == [[1.0], [2.0]]
    assert found[rank] is mine and found[1 - rank].shape == (2, 32)
    mapped.stream_barrier("gather")
    mapped.connect([block])  # of another model: what was found stays where it is
    assert [tensor.data_ptr() for tensor in mapped.of_all_ranks(mine)] == [tensor.data_ptr() for tensor in found]
    with pytest.raises(AssertionError, match="outside the memory that peers map"):
        mapped.of_all_ranks(torch.zeros(4))


@on_ranks(2)
def test_columns_are_needed_over_several_hosts_only() -> None:
    """Prevents: scratch for columns in the plan of one host, or shards aliased where columns are read."""
    one = MappedMemory(dist.group.WORLD, CPU)
    several = one.over_hosts(3)
    assert one.reads_shards and not several.reads_shards
    assert one.column_nbytes([100, 256]) == 0
    assert several.column_nbytes([100, 256]) == 512 + 768  # each column is aligned
