"""Models are read beside the steps of others; a load that fails, or that nobody wants, leaves host memory as it was."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.clocks import VectorClocks
from tests.inference.engine.test_engine import GREEDY, decoder, expected, prompts, requests
from tests.inference.pool.test_model_pool import (
    CONFIGS,
    SMALL,
    alone,
    buffers_nbytes,
    check_idle,
    pooled,
    tokens,
)
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.pool import loads as loads_module
from yafsdp_like.inference.pool import pool as pool_module
from yafsdp_like.inference.pool.host_weights import HostFullError, ModelUnavailableError
from yafsdp_like.inference.pool.member import ModelState
from yafsdp_like.inference.pool.plan import plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import model_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from yafsdp_like.inference.engine.request import RequestOutput
    from yafsdp_like.inference.weights.loading import Model, Source

SECONDS = 60.0  # that nothing here should take, on the slowest machine


@dataclass
class Disk:
    """Where a model's values come from once the test lets them, from a parameter in the middle on."""

    error: Exception | None = None  # instead of what follows
    has_come: threading.Event = field(default_factory=threading.Event)  # to the middle
    may_go_on: threading.Event = field(default_factory=threading.Event)
    num_read: int = 0

    def model(self, name: str) -> Model:
        model = model_of(decoder(CONFIGS[name]))

        def source(device: torch.device) -> Source:
            inner, disk = model.source(device), self

            class Slow:
                def read_into(self, name: str, start: int, out: Tensor) -> None:
                    if disk.num_read == 5:
                        disk.has_come.set()
                        assert disk.may_go_on.wait(SECONDS)
                        if disk.error is not None:
                            raise disk.error
                    inner.read_into(name, start, out)
                    disk.num_read += 1

            return Slow()

        return replace(model, source=source)

    def let(self) -> None:
        self.may_go_on.set()


def slow_pool(disk: Disk, **options: Any) -> ModelPool:
    """All models, of which ``windows`` is on a slow disk."""
    models = {name: model_of(decoder(config)) for name, config in CONFIGS.items()} | {"windows": disk.model("windows")}
    return ModelPool(plan_pool(pooled(), PoolOptions(buffers_nbytes() + SMALL, **options)), models)


def held(pool: ModelPool) -> list[str]:
    return [image.name for image in pool._loads._host_weights._images]


def step_until(pool: ModelPool, name: str, state: ModelState) -> list[tuple[str, RequestOutput]]:
    outputs = []
    for _ in range(int(SECONDS / 0.01)):
        if pool.states()[name] is state:
            return outputs
        outputs += pool.step()
        threading.Event().wait(0.001)
    raise AssertionError(f"{name} does not get to be {state.value}, it is {pool.states()[name].value}")


def test_another_model_draws_tokens_between_the_beginning_and_the_end_of_a_load() -> None:
    disk, text = Disk(), prompts(1)[0]
    pool = slow_pool(disk)
    pool.load("plain")
    pool.start_loading("windows")
    assert disk.has_come.wait(SECONDS)
    assert pool.states()["windows"] is ModelState.LOADING
    figures = pool.figures()["windows"]
    assert 0 < figures.loaded_nbytes < figures.weights_nbytes == pool.plan.models["windows"].image_nbytes
    pool.add("windows", Request("late", text, GREEDY, max_tokens=12))
    assert tokens_of(pool, "plain", text) == expected(CONFIGS["plain"], text)
    assert pool.states()["windows"] is ModelState.LOADING and pool.has_work
    pool.check_integrity()
    disk.let()
    drawn = [token.id for _, output in drain(pool) for token in output.tokens]
    assert drawn == expected(CONFIGS["windows"], text)
    assert pool.figures()["windows"].loaded_nbytes == figures.weights_nbytes
    check_idle(pool)


def tokens_of(pool: ModelPool, name: str, text: tuple[int, ...]) -> list[int]:
    """Of a request that is served to its end by steps, whatever else waits."""
    pool.add(name, Request("now", text, GREEDY, max_tokens=12))
    drawn: list[int] = []
    while True:
        for found, output in pool.step():
            assert found == name
            drawn += [token.id for token in output.tokens]
            if output.finish is not None:
                return drawn


def drain(pool: ModelPool) -> list[tuple[str, RequestOutput]]:
    outputs = []
    while pool.has_work:
        outputs += pool.step()
    return outputs


def test_a_load_that_fails_ends_its_requests_with_the_reason_and_frees_its_bytes_until_it_is_tried_again() -> None:
    disk, texts = Disk(OSError("the disk is gone")), prompts(2)
    pool = slow_pool(disk)
    pool.add("windows", Request("a", texts[0], GREEDY, max_tokens=3))
    pool.add("plain", Request("b", texts[1], GREEDY, max_tokens=3))
    assert disk.has_come.wait(SECONDS) and set(held(pool)) == {"windows", "plain"}
    disk.let()
    outputs = {output.request_id: output for _, output in drain(pool) if output.finish is not None}
    words = "model 'windows' could not be loaded: OSError: the disk is gone"
    assert (outputs["a"].finish, outputs["a"].error) == (FinishReason.FAILED, words)
    assert outputs["b"].finish is FinishReason.LENGTH
    assert pool.states()["windows"] is ModelState.FAILED and pool.failures() == {"windows": words}
    assert held(pool) == ["plain"] and pool.figures()["windows"].loaded_nbytes == 0
    with pytest.raises(ModelUnavailableError, match="the disk is gone"):
        pool.add("windows", Request("c", texts[0]))
    disk.error = None
    pool.start_loading("windows")
    step_until(pool, "windows", ModelState.ASLEEP)
    assert tokens(pool.generate({"windows": requests(texts)})) == {"windows": alone("windows", texts)}
    check_idle(pool)


def test_a_model_that_is_unloaded_while_it_is_read_frees_its_bytes_once_nobody_writes_them() -> None:
    disk, texts = Disk(), prompts(2)
    image_nbytes = {name: plan.image_nbytes for name, plan in slow_pool(Disk()).plan.models.items()}
    pool = slow_pool(disk, host_weights_nbytes=max(image_nbytes.values()))
    pool.start_loading("windows")
    assert disk.has_come.wait(SECONDS)
    pool.unload("windows")
    assert pool.states()["windows"] is ModelState.ABSENT
    for name in ("plain", "windows"):
        with pytest.raises(
            HostFullError, match=rf"'windows' {image_nbytes['windows']:,} until its cancelled load ends"
        ):
            pool.start_loading(name)
    disk.let()
    pool.load("plain")  # waits for the cancelled one
    assert held(pool) == ["plain"] and disk.num_read == 6, "the parameter that was being read was the last one"
    pool.unload("plain")
    assert tokens(pool.generate({"windows": requests(texts)})) == {"windows": alone("windows", texts)}
    check_idle(pool)


def leave(pool: ModelPool, key: str) -> None:
    pool.cancel("windows", key)
    assert [output.finish for _, output in pool.step()] == [FinishReason.CANCELLED]


def test_a_load_goes_on_to_its_end_where_the_request_that_began_it_has_left() -> None:
    disk, text = Disk(), prompts(1)[0]
    pool = slow_pool(disk)
    pool.add("windows", Request("a", text, GREEDY, max_tokens=12))
    assert disk.has_come.wait(SECONDS)
    leave(pool, "a")
    assert pool.states()["windows"] is ModelState.LOADING and not pool.has_work
    with pytest.raises(ValueError, match="are more than max_seq_len"):
        pool.add("windows", Request("b", (1, 2), max_tokens=10_000))
    assert pool.states()["windows"] is ModelState.LOADING, "another one's refusal has ended it"
    disk.let()
    step_until(pool, "windows", ModelState.ASLEEP)
    num_read = disk.num_read
    pool.add("windows", Request("c", text, GREEDY, max_tokens=12))
    assert [token.id for _, output in drain(pool) for token in output.tokens] == expected(CONFIGS["windows"], text)
    assert disk.num_read == num_read
    check_idle(pool)


@pytest.mark.parametrize("is_named", [False, True], ids=["requests alone", "an admin, too"])
def test_a_load_that_nobody_wants_for_too_long_is_given_up(is_named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    pool = slow_pool(disk)
    monkeypatch.setattr(loads_module, "UNWANTED_LOAD_S", 0.0)
    for key in ("a", "b"):
        pool.add("windows", Request(key, (1, 2), GREEDY, max_tokens=2))
    assert disk.has_come.wait(SECONDS)
    leave(pool, "a")
    assert pool.states()["windows"] is ModelState.LOADING
    if is_named:
        pool.start_loading("windows")
    leave(pool, "b")
    assert pool.states()["windows"] is (ModelState.LOADING if is_named else ModelState.ABSENT) and not pool.has_work
    disk.let()
    pool._loads.wait_for_cancelled()
    if is_named:
        step_until(pool, "windows", ModelState.ASLEEP)
    assert held(pool) == (["windows"] if is_named else [])
    check_idle(pool)


def test_a_load_that_nobody_wants_makes_room_for_one_that_somebody_does() -> None:
    disk, text = Disk(), prompts(1)[0]
    image_nbytes = max(plan.image_nbytes for plan in slow_pool(Disk()).plan.models.values())
    pool = slow_pool(disk, host_weights_nbytes=image_nbytes)
    pool.add("windows", Request("a", (1, 2), GREEDY, max_tokens=2))
    assert disk.has_come.wait(SECONDS)
    with pytest.raises(HostFullError):
        pool.add("plain", Request("b", text, GREEDY, max_tokens=12))
    assert pool.states()["windows"] is ModelState.LOADING
    leave(pool, "a")
    with pytest.raises(HostFullError, match="until its cancelled load ends"):
        pool.add("plain", Request("b", text, GREEDY, max_tokens=12))
    assert pool.states()["windows"] is ModelState.ABSENT
    disk.let()
    pool._loads.wait_for_cancelled()
    assert tokens_of(pool, "plain", text) == expected(CONFIGS["plain"], text)
    check_idle(pool)


def test_a_request_that_is_refused_has_no_model_loaded() -> None:
    disk = Disk()
    pool = slow_pool(disk)
    with pytest.raises(ValueError, match="are more than max_seq_len"):
        pool.add("windows", Request("a", (1, 2), max_tokens=10_000))
    assert pool.states()["windows"] is ModelState.ABSENT and not pool.has_work
    disk.let()
    pool._loads.wait_for_cancelled()
    assert held(pool) == []


def test_whoever_is_interrupted_while_a_model_is_read_leaves_nothing_of_it() -> None:
    disk = Disk()
    pool = slow_pool(disk)

    def interrupt(figures: object) -> None:
        assert disk.has_come.wait(SECONDS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.load("windows", interrupt)
    disk.let()
    pool._loads.wait_for_cancelled()
    assert pool.states()["windows"] is ModelState.ABSENT and held(pool) == []


def test_requests_still_get_a_model_whose_load_somebody_else_was_interrupted_in() -> None:
    disk, text = Disk(), prompts(1)[0]
    pool = slow_pool(disk)
    pool.add("windows", Request("a", text, GREEDY, max_tokens=12))
    pool.add("windows", Request("b", text, GREEDY, max_tokens=12))

    def interrupt(figures: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.load("windows", interrupt)
    assert pool.states()["windows"] is ModelState.LOADING
    pool.cancel("windows", "b")
    disk.let()
    drawn = [token.id for _, output in drain(pool) for token in output.tokens]
    assert drawn == expected(CONFIGS["windows"], text)
    check_idle(pool)


def test_a_disk_that_stands_still_holds_up_no_load_of_another() -> None:
    disk, texts = Disk(), prompts(2)
    pool = slow_pool(disk)
    pool.start_loading("windows")
    assert disk.has_come.wait(SECONDS)
    assert tokens(pool.generate({"plain": requests(texts)})) == {"plain": alone("plain", texts)}
    assert pool.states()["windows"] is ModelState.LOADING and set(held(pool)) == {"windows", "plain"}
    pool.unload("windows")  # while its parameter is still being read
    pool.unload("plain")
    pool.load("plain")
    assert set(held(pool)) == {"windows", "plain"} and not disk.may_go_on.is_set()
    disk.let()
    pool._loads.wait_for_cancelled()
    assert held(pool) == ["plain"]


CALLS: dict[str, tuple[Any, ...]] = {
    "add": ("plain", Request("a", (1,))),
    "cancel": ("plain", "a"),
    "check_integrity": (),
    "engine": ("plain",),
    "failures": (),
    "figures": (),
    "generate": ({"plain": []},),
    "has_news": (),
    "has_work": (),
    "is_awake": ("plain",),
    "is_loaded": ("plain",),
    "load": ("plain",),
    "load_all": (),
    "occupancy": (),
    "prefetch": ("plain",),
    "sleep": ("plain",),
    "start_loading": ("plain",),
    "states": (),
    "step": (),
    "unload": ("plain",),
    "wake_up": ("plain",),
}


def test_after_close_every_call_says_that_the_pool_is_closed_and_close_itself_is_harmless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of a pool that was reading a model, from a disk that stands still: the model is read no further."""
    monkeypatch.setattr(loads_module, "LAST_READ_S", 0.0)
    disk = Disk()
    with slow_pool(disk) as pool:
        pool.generate({"plain": requests(prompts(1))})
        pool.add("windows", Request("a", (1, 2), GREEDY, max_tokens=2))
        assert disk.has_come.wait(SECONDS)
        loading = pool._members["windows"].loading
    assert loading is not None and not loading.is_over
    disk.let()
    assert loading.wait(SECONDS) and disk.num_read == 6
    assert CALLS.keys() == {name for name in vars(ModelPool) if not name.startswith("_")} - {"close"}
    for name, arguments in CALLS.items():
        with pytest.raises(RuntimeError, match=r"this pool of models is closed, .*: make another ModelPool"):
            found = getattr(pool, name)
            found(*arguments)
    pool.close()


def test_a_model_goes_through_its_states_as_they_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no copy is known to have arrived until a forward has waited for it."""
    monkeypatch.setattr(pool_module, "streams_of", lambda device: VectorClocks())
    disk = Disk(OSError("the disk is gone"))
    pool, seen = slow_pool(disk), []

    def see(act: Callable[[str], object]) -> None:
        act("windows")
        seen.append(pool.states()["windows"].value)

    def read(name: str) -> None:
        disk.let()
        with contextlib.suppress(OSError):
            pool.load(name)

    def begin(name: str) -> None:
        disk.may_go_on.clear()
        disk.num_read = 0
        pool.start_loading(name)

    def serve(name: str) -> None:
        pool.generate({name: requests(prompts(1))})

    see(lambda name: None)
    see(begin)
    see(read)
    see(pool.unload)
    see(begin)
    see(read)
    disk.error = None
    for act in (begin, read, pool.unload, begin, pool.unload, read):
        see(act)
    for act in (pool.wake_up, pool.sleep, pool.wake_up, serve, pool.sleep, pool.wake_up, pool.unload, read):
        see(act)
    assert seen == [
        "absent", "loading", "failed", "absent", "loading", "failed",
        "loading", "asleep", "absent", "loading", "absent", "asleep",
        "waking", "asleep", "awake", "awake", "asleep", "awake", "absent", "asleep",
    ]  # fmt: skip
