"""How long idle models stay: on the device for one time, in host memory for another, by a clock that stands still."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from launch.options import PoolModelOptions
from tests.inference.engine.test_engine import GREEDY, decoder, expected, prompts
from tests.inference.pool.test_model_pool import CONFIGS, LARGE, buffers_nbytes, pooled
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.kv.eviction import Tenant
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.plan import plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import model_of

if TYPE_CHECKING:
    import torch

    from yafsdp_like.inference.weights.loading import Model, Source

SECONDS = 60.0  # that nothing here should take, on the slowest machine


class Driven:
    """A pool behind a driver, and its clock."""

    def __init__(self, ttls: dict[str, float], host_ttls: dict[str, float]) -> None:
        self.now = 100.0
        self.gate = threading.Event()  # of the disk
        self.gate.set()
        floors = (Tenant("plain", floor_nbytes=32 << 10),)
        plan = plan_pool(pooled(), PoolOptions(buffers_nbytes() + LARGE, tenants=floors))
        self.pool = ModelPool(plan, {name: self.model(name) for name in CONFIGS})
        self.driver = PoolDriver(self.pool, ttls, host_ttls, lambda: self.now)
        self.num_asked = 0

    def model(self, name: str) -> Model:
        model = model_of(decoder(CONFIGS[name]))

        def source(device: torch.device) -> Source:
            assert self.gate.wait(SECONDS)
            return model.source(device)

        return replace(model, source=source)

    def ask(self, name: str, text: tuple[int, ...]) -> tuple[list[int], int]:
        """Tokens of an answer, and tokens of its prompt that were cached."""
        self.num_asked += 1
        key = str(self.num_asked)
        self.driver.add(Request(key, text, GREEDY, max_tokens=12, model=name))
        drawn: list[int] = []
        while True:
            for output in self.driver.step():
                assert output.request_id == key
                drawn += [token.id for token in output.tokens]
                if output.finish is not None:
                    assert output.finish is FinishReason.LENGTH
                    self.settle()
                    return drawn, output.num_cached_tokens

    def settle(self) -> None:
        """Do all that there is to do now."""
        while self.driver.has_work:
            self.driver.step()

    def states(self) -> list[str]:
        """After all that there is to do now."""
        self.settle()
        return [status.state.value for status in self.driver.models().values()]

    def cached_nbytes(self) -> int:
        return self.driver.metrics().kv_nbytes_cached


def test_an_idle_model_leaves_the_device_then_the_host_and_is_loaded_for_its_next_request() -> None:
    driven, text = Driven({"plain": 10}, {"plain": 60}), (*prompts(1)[0], *range(20))
    first, _ = driven.ask("plain", text)
    assert first == expected(CONFIGS["plain"], text)
    assert driven.states() == ["awake", "absent", "absent"]
    driven.now += 9.5
    assert driven.states() == ["awake", "absent", "absent"]
    driven.now += 1
    assert driven.driver.has_work, "to have it sleep"
    assert driven.states() == ["asleep", "absent", "absent"]
    driven.now += 40
    again, num_cached = driven.ask("plain", text)
    assert again == first and num_cached > 0
    driven.now += 59.5
    assert driven.states() == ["asleep", "absent", "absent"], "its last request was later"
    driven.now += 1
    assert driven.states() == ["absent", "absent", "absent"]
    assert driven.ask("plain", text) == (first, 0)
    driven.driver.check_integrity()


def test_a_model_that_leaves_the_host_frees_its_pages_floor_or_not_and_those_of_others_stay() -> None:
    driven, text = Driven({}, {"plain": 60}), (*prompts(1)[0], *range(20))
    driven.ask("windows", text)
    others_nbytes = driven.cached_nbytes()
    driven.ask("plain", text)
    assert driven.cached_nbytes() > others_nbytes > 0
    driven.now += 61
    assert driven.states() == ["absent", "awake", "absent"]
    assert driven.cached_nbytes() == others_nbytes
    assert driven.ask("windows", text)[1] > 0
    driven.driver.check_integrity()


def test_neither_a_load_nor_a_request_is_idleness() -> None:
    driven, text = Driven({}, {"plain": 60}), prompts(1)[0]
    driven.gate.clear()
    driven.driver.load("plain")
    driven.now += 1000
    assert driven.states()[0] == "loading"
    driven.gate.set()
    for _ in range(int(SECONDS / 0.01)):
        if driven.states()[0] != "loading":
            break
        threading.Event().wait(0.01)
    assert driven.states()[0] == "asleep"
    driven.now += 59
    assert driven.states()[0] == "asleep"
    driven.driver.add(Request("a", text, GREEDY, max_tokens=12, model="plain"))
    driven.driver.step()
    driven.now += 1000
    driven.driver.step()
    assert driven.pool.is_awake("plain"), "it has a request"
    driven.driver.cancel("a")
    driven.driver.step()
    assert driven.states()[0] == "awake"
    driven.now += 61
    assert driven.states()[0] == "absent"


def test_a_time_in_host_memory_that_is_shorter_than_that_on_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="host_ttl_s=5 must be at least ttl_s=10"):
        PoolModelOptions("a", ttl_s=10, host_ttl_s=5)
    assert PoolModelOptions("a", ttl_s=None, host_ttl_s=5).host_ttl_s == 5


def test_a_pool_says_how_it_stands_whether_it_has_targets_or_not() -> None:
    for targets in (None, dict.fromkeys(CONFIGS, Targets(10.0, 1.0))):
        plan = plan_pool(pooled(), PoolOptions(buffers_nbytes() + LARGE))
        pool = ModelPool(plan, {name: model_of(decoder(CONFIGS[name])) for name in CONFIGS}, targets=targets)
        driver = PoolDriver(pool)
        absent = driver.standing()
        driver.load_all()
        asleep = driver.standing()
        assert (absent.number, asleep.number, asleep.load, {*asleep.models}) == (1, 2, 0.0, {*CONFIGS})
        driver.add(Request("a", (1, 2, 3), GREEDY, max_tokens=4, model="plain"))
        driver.step()
        standing = driver.standing()
        found, other = standing.models["plain"], standing.models["windows"]
        assert (found.num_requests, found.wake_s, other.num_requests) == (1, 0.0, 0) and other.wake_s > 0.0
        assert 0.0 < standing.load < 1.0 and min(found.request_load, found.prompt_token_s) > 0.0
        assert absent.models["windows"].wake_s > asleep.models["windows"].wake_s, "it is read before it wakes"
        while driver.has_work:
            driver.step()
        assert driver.standing().load == 0.0
        driver.close()
