"""The map of who has which bytes: nothing is left out, and pages are those that the figures count."""

from math import isclose
from typing import Any

from tests.inference.engine.test_engine import ARCHITECTURES, engine, prompts, requests
from yafsdp_like.inference.engine.engine import Engine


def shares(it: Engine) -> tuple[float, float]:
    """Bytes of pages that sequences hold, and that are only kept, by the map."""
    stretches = it.occupancy()
    return sum(s.held * s.nbytes for s in stretches), sum(s.cached * s.nbytes for s in stretches)


def test_the_map_of_an_engine_has_every_planned_byte_and_the_pages_that_its_figures_count() -> None:
    it = engine(ARCHITECTURES["grouped queries"])
    whole = it.plan.nbytes
    seen: list[Any] = [it.occupancy()]
    for request in requests(prompts(3)):
        it.add(request)
    for _ in range(3):
        it.step()
    seen.append(it.occupancy())
    used = it.metrics()
    assert used.kv_nbytes_used > 0 and isclose(shares(it)[0], used.kv_nbytes_used)
    while it.has_work:
        it.step()
    seen.append(it.occupancy())
    kept = it.metrics()
    assert kept.kv_nbytes_cached > 0 and shares(it)[0] == 0 and isclose(shares(it)[1], kept.kv_nbytes_cached)
    assert [sum(stretch.nbytes for stretch in stretches) for stretches in seen] == [whole] * 3
    assert {stretch.use for stretch in seen[1]} >= {"weights", "pages", "free", "workspace", "logits"}
