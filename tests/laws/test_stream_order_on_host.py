"""Law 3 for shards in host memory: copies are ordered by events, and the CPU waits for what it reads and writes."""

import pytest

from tests.laws.test_stream_order import train
from tests.ranks import run_ranks
from yafsdp_like import CPUOffloadPolicy
from yafsdp_like.memory.streams import GATHER, REDUCE

pytestmark = pytest.mark.slow

OFFLOADED = CPUOffloadPolicy(pin_memory=False)


@pytest.mark.parametrize("own_optimizer", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", ["decoder", "nested", "early exit"])
def test_copies_of_shards_from_and_to_host_memory_are_ordered(name: str, bf16: bool, own_optimizer: bool) -> None:
    """The optimizer and clipping run on the CPU, which no event orders."""
    for found in run_ranks(train, name, bf16=bf16, own_optimizer=own_optimizer, offload_policy=OFFLOADED):
        assert found.races == []


def test_the_cpu_must_wait_for_what_it_reads_and_writes_of_offloaded_shards() -> None:
    for found in run_ranks(train, "decoder", plant="let_the_cpu_run_ahead", offload_policy=OFFLOADED):
        for other in (GATHER, REDUCE):
            assert any(" on cpu " in race and race.endswith(f" on {other}") for race in found.races), other
