"""Debug mode of serving: pages that are written or read after they were freed, wrong books and writes past a region."""

from typing import Any

import pytest
import torch

from tests.inference.engine.test_engine import (
    ARCHITECTURES,
    OPTIONS,
    RECOMPUTING,
    engine,
    expected,
    pages_nbytes,
    prompts,
    requests,
)
from yafsdp_like.inference.engine import debug
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.kv.kv_cache import Tier
from yafsdp_like.inference.options import EngineOptions


def debugged(name: str = "grouped queries", **more: Any) -> Engine:
    return engine(ARCHITECTURES[name], debug=True, **{"prefix_cache": False, **more})


@pytest.mark.parametrize("name", ["grouped queries", "windows"])
@pytest.mark.parametrize("costs", [OPTIONS.costs, RECOMPUTING], ids=["swapping", "recomputing"])
def test_tokens_are_those_of_a_plain_loop_and_the_plan_is_what_the_arena_holds(name: str, costs: Any) -> None:
    """Prevents: false alarms where pages are swapped, recomputed, cached and freed; and NaN of a page's unused end."""
    config, texts = ARCHITECTURES[name], prompts(8)
    small = {"kv_nbytes": pages_nbytes(config, 20), "max_batch_size": 3}
    it = debugged(name, costs=costs, prefix_cache=costs is RECOMPUTING, **small)
    assert it._weights.arena.nbytes == it.plan.nbytes and it.plan.debug_nbytes > 0
    done = it.generate(requests(texts))
    assert [done[str(i)].ids for i in range(8)] == [expected(config, text) for text in texts]
    assert it.metrics().num_preempted > 0 or name == "windows"
    it.close()


def freed(it: Engine) -> int:
    """A page of a request that has ended, and that nobody has taken since."""
    it.generate(requests(prompts(3)))
    it.cache.pools[Tier.DEVICE].clear()
    it.generate(requests([(1, 2)], max_tokens=2))
    return free_page(it)


def free_page(it: Engine, *tables: list[int]) -> int:
    """A poisoned page that none of the page tables has, and that will be given to nobody soon."""
    pages = {page for _, page in debug._freed[it.cache.pools[Tier.DEVICE]]._poisoned}
    return max(pages.difference(*tables))


def of_page(it: Engine, page: int) -> torch.Tensor:
    region, nbytes = it._places.regions[Tier.DEVICE], it.cache.groups[0].shape.nbytes
    return region[page * nbytes : (page + 1) * nbytes]


def serve(it: Engine, name: str = "next") -> None:
    for request in requests(prompts(2, seed=1)):
        it.add(request)
    while it.has_work:
        it.step()


def test_a_write_to_a_page_that_was_freed_names_the_page_and_who_had_it() -> None:
    it = debugged()
    page = freed(it)
    of_page(it, page)[3] = 0
    told = rf"debug mode: page {page} of .* was freed by request '\d', was written on the device after that"
    with pytest.raises(RuntimeError, match=told):
        serve(it)


def test_a_page_that_is_read_after_it_was_freed_makes_an_error_that_names_the_request() -> None:
    it = debugged()
    freed(it)
    (request,) = requests([tuple(range(1, 21))])
    it.add(request)
    it.step()
    kv = it._sequences["0"].kv
    assert kv is not None
    kv.tables[0][1] = free_page(it, *kv.tables)
    it._sequences["0"].num_admitted += 1  # as if it had been given other pages
    with pytest.raises(RuntimeError, match="the logits of request '0' hold NaN"):
        for _ in range(6):
            it.step()


def test_a_page_that_is_freed_while_a_request_has_it_is_noticed_in_the_same_step() -> None:
    it = debugged()
    (request,) = requests([tuple(range(1, 21))])
    it.add(request)
    it.step()
    kv = it._sequences["0"].kv
    assert kv is not None
    it.cache.pools[Tier.DEVICE].drop(it.cache.groups[0].shape, kv.tables[0][0])
    with pytest.raises(RuntimeError, match="the books of pages are wrong"):
        it.step()


def test_a_write_past_the_end_of_a_region_names_it() -> None:
    it = debugged()
    it.generate(requests(prompts(1)))
    storage, start = it._weights.arena.storage("kv slabs")
    behind = start + it._places.regions[Tier.DEVICE].numel()
    torch.empty(0, dtype=torch.uint8).set_(storage, behind, (4,), (1,)).zero_()
    with pytest.raises(RuntimeError, match="a write past the end of region 'kv slabs'"):
        serve(it)


def test_the_environment_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(kv_nbytes=1 << 20)
    assert not options.is_debugged
    monkeypatch.setenv("YAFSDP_DEBUG", "1")
    assert options.is_debugged


def test_a_memory_limit_has_room_for_the_guards() -> None:
    limit = engine(kv_nbytes=1 << 20).plan.nbytes + (1 << 20)
    plan = engine(debug=True, kv_nbytes=None, memory_limit_nbytes=limit).plan
    assert plan.debug_nbytes > 0 and plan.nbytes <= limit
