"""Regions of one arena that another finds too: the same bytes under both, counted by both."""

import pytest
import torch

from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.plan import Region

CPU = torch.device("cpu")


def reserved(*regions: Region) -> Arena:
    arena = Arena(CPU)
    arena.reserve(regions)
    return arena


def test_included_regions_are_the_same_memory_beside_an_arenas_own() -> None:
    slots = reserved(Region("slots", "gather slots", 512))
    models = [Arena(CPU), Arena(CPU)]
    for arena in models:
        arena.include(slots)
        arena.reserve([Region("shard", "compute_shard", 256)])
        assert arena.nbytes == 768
    first, second = (arena.place("slots") for arena in models)
    first.tensor(torch.float32, (4,)).fill_(3.0)
    assert second.tensor(torch.float32, (4,)).tolist() == [3.0] * 4
    assert first.overlaps(second)
    assert not first.part(Segment(0, 256)).overlaps(second.part(Segment(256, 256)))
    assert not models[0].place("shard").overlaps(models[1].place("shard"))
    del slots, models
    assert first.tensor(torch.float32, (1,)).item() == 3.0  # it keeps the memory


def test_a_name_is_included_once() -> None:
    arena = reserved(Region("slots", "gather slots", 256))
    with pytest.raises(AssertionError, match="reserved already"):
        arena.include(reserved(Region("slots", "gather slots", 256)))
