"""Images of models in host memory: none is refused while enough bytes are free, and none overlaps another."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import pytest
import torch

from tests.inference.engine.test_engine import prompts, requests
from tests.inference.pool.test_model_pool import SMALL, alone, buffers_nbytes, model_pool, pooled, tokens
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.pool.host_weights import HostFullError, HostImage, HostWeights
from yafsdp_like.inference.pool.plan import plan_pool
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES
from yafsdp_like.memory.plan import Region

if TYPE_CHECKING:
    from collections.abc import Sequence


def host_weights(num_units: int) -> HostWeights:
    arena = Arena(torch.device("cpu"))
    arena.reserve([Region("a", "a", num_units * ALIGNMENT_NBYTES)])
    return HostWeights(arena.place("a"))


def check(images: Sequence[HostImage], region_nbytes: int) -> None:
    """They are disjoint, in the region, and have no piece that is empty or not aligned."""
    segments = sorted((place.segment for image in images for place in image.places), key=lambda s: s.offset_nbytes)
    end = 0
    for segment in segments:
        assert segment.offset_nbytes >= end and segment.nbytes > 0
        assert segment.offset_nbytes % ALIGNMENT_NBYTES == segment.nbytes % ALIGNMENT_NBYTES == 0
        end = segment.end_nbytes
    assert end <= region_nbytes


@pytest.mark.parametrize("seed", range(10))
def test_an_image_is_refused_exactly_where_fewer_bytes_are_free_than_it_has(seed: int) -> None:
    draw, num_units = random.Random(seed), 64
    host, images, num_refused, num_cut = host_weights(num_units), [], 0, 0
    for number in range(200):
        if images and draw.random() < 0.4:
            host.drop(images.pop(draw.randrange(len(images))))
            continue
        nbytes = draw.randint(1, 24) * ALIGNMENT_NBYTES
        free = num_units * ALIGNMENT_NBYTES - sum(image.nbytes for image in images)
        if nbytes <= free:
            images.append(host.put(str(number), nbytes))
            assert images[-1].nbytes == nbytes
            num_cut += len(images[-1].places) > 1
        else:
            words = (
                f"'{number}' needs {nbytes:,} bytes.*{free:,} are free.*raise host_weights_nbytes by {nbytes - free:,}"
            )
            with pytest.raises(HostFullError, match=words):
                host.put(str(number), nbytes)
            num_refused += 1
        check(images, num_units * ALIGNMENT_NBYTES)
    assert num_refused and num_cut


def test_an_image_lies_in_a_row_in_the_smallest_gap_that_has_room() -> None:
    host = host_weights(20)
    images = [host.put(str(i), size * ALIGNMENT_NBYTES) for i, size in enumerate((6, 1, 4, 1))]
    host.drop(images[0])
    host.drop(images[2])
    (place,) = host.put("new", 3 * ALIGNMENT_NBYTES).places  # gaps of 6, 4 and 8
    assert place.segment.offset_nbytes == 7 * ALIGNMENT_NBYTES


def test_a_model_that_lies_in_pieces_of_host_memory_says_what_it_says_alone() -> None:
    sizes = {name: plan.image_nbytes for name, plan in model_pool(SMALL).plan.models.items()}
    small, middle, large = sorted(sizes, key=lambda name: sizes[name])
    pool = model_pool(SMALL, host_weights_nbytes=sizes[middle] + sizes[large])
    pool.load(small)
    pool.load(middle)
    pool.unload(small)
    pool.load(large)
    (image,) = [image for image in pool._loads._host_weights._images if image.name == large]
    assert len(image.places) == 2 and sizes[small] < sizes[large]
    pieces = pool._members[large].weights._image
    assert sum(len(unit) for unit in pieces) == len(pieces) + 1, "one unit is cut"
    texts = prompts(3)
    asked = {name: requests(texts) for name in (large, middle)}
    assert tokens(pool.generate(asked)) == {name: alone(name, texts) for name in (large, middle)}
    pool.check_integrity()


def test_the_plan_says_whether_all_models_have_room_and_refuses_one_that_never_has() -> None:
    sizes = [plan.image_nbytes for plan in model_pool(SMALL).plan.models.values()]

    def planned(host_weights_nbytes: int | None) -> str:
        return str(plan_pool(pooled(), PoolOptions(buffers_nbytes() + SMALL, host_weights_nbytes=host_weights_nbytes)))

    assert "in host memory, room for the weights of all models: " in planned(None)
    assert "in host memory, room for the weights of all models: " in planned(sum(sizes))
    few = re.search(r"in host memory, (\S+ \S+) too few for all weights: ", planned(sum(sizes) - 100 * 1024))
    assert few is not None and few[1] == "100.00 KiB"
    unaligned = PoolOptions(buffers_nbytes() + SMALL, host_weights_nbytes=max(sizes) + 100)
    assert plan_pool(pooled(), unaligned).host_weights_nbytes == max(sizes), "a limit is a limit"
    with pytest.raises(
        ValueError, match=rf"can never be loaded: its weights are {max(sizes):,} bytes.*at least {max(sizes)}"
    ):
        planned(max(sizes) - 1)
