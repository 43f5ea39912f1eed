"""When steps are due, by clocks and a device that the tests make up."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.inference.engine.test_engine import engine, prompts, requests
from yafsdp_like.inference.engine import engine as engine_module
from yafsdp_like.inference.engine import launch_clock
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.launch_clock import LaunchClock
from yafsdp_like.inference.plan.step_sizes import StepSize
from yafsdp_like.memory.streams import Timer

if TYPE_CHECKING:
    from yafsdp_like.inference.engine.batch import Batch
    from yafsdp_like.inference.engine.request import Request

DECODE, MIXED = StepSize.decode(32), StepSize(512, num_single=32, num_chunks=8, num_drawing=40)
RESERVE_S = launch_clock._FIRST_RESERVE_S
SHARE = launch_clock._WAITED_SHARE


def clock() -> LaunchClock:
    """One that has seen steps of 10 ms that decode, and of 20 ms that mix."""
    it = LaunchClock()
    for size, seconds in ((DECODE, 0.01), (MIXED, 0.02)):
        it.launched(size, 0.0)
        it.read(0.0, 0.0, (seconds, 0.0))
    return it


def due_step(it: LaunchClock, device_waited_s: float, size: StepSize = DECODE, early_s: float = 0.0) -> None:
    """Have a step of 10 ms, at time 0, followed by one that is launched when it is due; read both."""
    it.launched(DECODE, 0.0)
    due_at = it.rest_s(0.0, size.num_chunks > 0)
    it.launched(size, due_at)
    it.read(0.01, early_s, (0.01, 0.0))
    it.read(0.03, 0.01, (0.01, device_waited_s))


# --- the clock alone ---


def test_a_step_is_due_a_reserve_before_the_one_under_way_ends() -> None:
    it = clock()
    it.launched(DECODE, called_at=5.0)
    assert it.rest_s(5.0, is_mixed=False) == pytest.approx(0.01 - RESERVE_S)
    assert it.rest_s(5.004, is_mixed=True) == pytest.approx(0.006 - RESERVE_S)
    assert it.rest_s(5.0 + 0.01 - RESERVE_S + 1e-9, is_mixed=False) == 0.0


def test_a_step_behind_another_ends_its_time_after_that_one_was_read() -> None:
    it = clock()
    it.launched(DECODE, called_at=5.0)
    it.launched(MIXED, called_at=5.001)
    assert it.rest_s(5.001, is_mixed=False) == 0.0  # two are launched
    it.read(now=5.01, waited_s=0.009, device_s=(0.01, 0.0))
    assert it.rest_s(5.01, is_mixed=False) == pytest.approx(0.02 - RESERVE_S)


def test_a_step_behind_one_that_was_done_may_have_begun_with_its_launch() -> None:
    it = clock()
    it.launched(DECODE, called_at=5.0)
    it.launched(MIXED, called_at=5.015)
    it.read(now=5.018, waited_s=1e-6, device_s=(0.01, 0.0))
    assert it.rest_s(5.018, is_mixed=False) == pytest.approx(0.017 - RESERVE_S)


def test_nothing_rests_behind_nothing_or_behind_what_was_never_timed() -> None:
    it = clock()
    assert it.rest_s(0.0, is_mixed=False) == 0.0
    it.launched(StepSize.decode(64), called_at=0.0)
    assert it.rest_s(0.0, is_mixed=False) == 0.0


def test_a_shorter_step_is_believed_at_once_and_a_longer_one_slowly() -> None:
    it = clock()
    for busy_s, expected_s in ((0.008, 0.008), (0.018, 0.009), (0.005, 0.005)):
        it.launched(DECODE, 0.0)
        it.read(0.0, 0.0, (busy_s, 0.0))
        assert it._step_s[32, False] == pytest.approx(expected_s)


def test_the_reserve_grows_by_what_the_device_waited_and_shrinks_slowly() -> None:
    it = clock()
    due_step(it, device_waited_s=0.0)
    shrunk_s = RESERVE_S - SHARE * 0.01
    assert it._reserve_s == pytest.approx({False: shrunk_s, True: RESERVE_S})
    due_step(it, device_waited_s=0.0007, early_s=0.0002)  # it had been launched before the device was free
    assert it._reserve_s[False] == pytest.approx(shrunk_s + 0.0005 - SHARE * 0.01)
    due_step(it, device_waited_s=1.0, size=MIXED)
    assert it._reserve_s[True] == pytest.approx(RESERVE_S + launch_clock._MOST_GROWTH_S - SHARE * 0.01)


def test_the_reserve_does_not_grow_by_what_the_device_waited_for_another_reason() -> None:
    it = clock()
    it.launched(DECODE, 0.0)
    it.launched(DECODE, 0.02)  # nobody asked whether it was due
    it.read(0.02, 0.0, (0.01, 0.0))
    it.read(0.03, 0.01, (0.01, 0.01))
    assert it._reserve_s == {False: RESERVE_S, True: RESERVE_S}
    it._reserve_s[False] = 0.0
    it.launched(DECODE, 0.0)
    assert it.rest_s(0.0, is_mixed=False) > 0.0
    assert it.rest_s(0.009, is_mixed=True) == 0.0  # a prompt came when a step with it was over-due
    it.launched(MIXED, 0.009)
    it.read(0.012, 0.0, (0.01, 0.0))
    it.read(0.03, 0.01, (0.01, 0.002))
    assert it._reserve_s[True] == pytest.approx(RESERVE_S - SHARE * 0.01)


@pytest.mark.parametrize("cpu_s", [0.0005, 0.002, 0.006])
def test_the_device_waits_for_a_small_share_of_the_time_whatever_the_cpu_needs(cpu_s: float) -> None:
    """One step in ten needs half as long again."""
    it, now, free_at, device_waited_s, waited_s, rested_s = clock(), 0.0, 0.0, 0.0, 0.0, 0.0
    for number in range(4000):
        rest_s = it.rest_s(now, is_mixed=False)
        called_at = now = now + rest_s
        now += cpu_s * (1.5 if number % 10 == 0 else 1.0)
        done, began = free_at, max(now, free_at)
        free_at = began + 0.01
        it.launched(DECODE, called_at)
        if number:
            early_s = max(0.0, done - now)
            now = max(now, done)
            it.read(now, early_s, (0.01, device_waited_s))
            rested_s += rest_s
        device_waited_s = began - done if number else 0.0
        waited_s += device_waited_s
    assert waited_s / free_at < 0.01
    assert rested_s / free_at > 0.9 * (1 - 1.5 * cpu_s / 0.01)


# --- an engine, whose device takes 10 ms for a step ---


class Device:
    """Time that passes while the CPU waits or launches, and the marks of a timer on what it launches."""

    LAUNCH_S, STEP_S = 0.001, 0.01

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.now = self.free_at = 0.0
        self._has_begun = False

    def mark(self) -> float:
        """The beginning of a step and its end, in turn."""
        self._has_begun = not self._has_begun
        self.free_at = max(self.now, self.free_at) if self._has_begun else self.free_at + self.STEP_S
        return self.free_at

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def is_complete(self, event: float) -> bool:
        return event <= self.now


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    it = Device()
    times = SimpleNamespace(perf_counter=lambda: it.now, monotonic=time.monotonic)
    monkeypatch.setattr(engine_module, "time", times)
    return it


def on(device: Device, **options: Any) -> Engine:
    it = engine(**options)
    runner, launch = it._runner, it._runner.launch

    def launched(batch: Batch) -> Any:
        device.now += device.LAUNCH_S
        return launch(batch)

    def wait(launched: Any) -> None:
        device.now = max(device.now, launched.done)

    runner.launch, runner.wait = launched, wait  # type: ignore[method-assign]
    runner.timer = it.step_log._timer = device  # type: ignore[assignment]
    return it


def served(it: Engine, device: Device, arrivals: list[tuple[float, Request]], rests: bool) -> dict[str, list[Any]]:
    """Each request's tokens, and the seconds from its arrival to the first."""
    coming, found = arrivals[::-1], {request.id: [at] for at, request in arrivals}
    while coming or it.has_work:
        while coming and coming[-1][0] <= device.now:
            it.add(coming.pop()[1])
        until = coming[-1][0] if coming else float("inf")
        if not it.has_work:
            device.now = until
        elif rests and (rest_s := it.rest_s):
            device.now = min(until, device.now + rest_s + 1e-9)
        else:
            for output in it.step():
                so_far = found[output.request_id]
                if len(so_far) == 1:
                    so_far[0] = device.now - so_far[0]
                so_far += [token.id for token in output.tokens]
    return found


def test_requests_begin_sooner_and_have_the_same_tokens_when_steps_are_launched_late(device: Device) -> None:
    arrivals = [(0.0317 * number, request) for number, request in enumerate(requests(prompts(12, longest=9)))]
    found, waiting = list[dict[str, list[Any]]](), list[float]()
    for rests in (False, True):
        device.restart()
        it = on(device, max_batch_size=8)
        found.append(served(it, device, arrivals, rests))
        waiting.append(it.metrics().device_waiting_seconds)
    early, late = found
    assert {name: said[1:] for name, said in early.items()} == {name: said[1:] for name, said in late.items()}
    assert sum(said[0] for said in late.values()) < sum(said[0] for said in early.values()) - 12 * 0.003
    assert waiting[1] <= waiting[0] + 1e-6


def test_a_request_that_comes_while_the_next_step_rests_is_in_it(device: Device) -> None:
    it = on(device)
    first, second = requests(prompts(2, longest=5))
    it.add(first)
    while not it.rest_s:
        it.step()
    device.now += it.rest_s / 2
    it.add(second)
    assert it.rest_s > 0.0
    it.step()
    assert it.metrics().num_running == 2
    device.now += 1.0
    assert it.rest_s == 0.0


def test_the_device_waits_little_for_a_step_that_took_much_longer_the_last_time(device: Device) -> None:
    """As one with an image, or a long context. Prevents: a rest as long as that, beside a device without work."""
    it = on(device)
    device.STEP_S = 1.0
    it.generate(requests(prompts(1, longest=5)))
    device.STEP_S = Device.STEP_S
    waited_s = it.metrics().device_waiting_seconds
    served(it, device, [(device.now, request) for request in requests(prompts(1, longest=5))], rests=True)
    assert it.metrics().device_waiting_seconds - waited_s < 2 * engine_module._LONGEST_REST_S


def test_nothing_rests_on_a_cpu_which_has_computed_a_step_when_it_is_launched(device: Device) -> None:
    it = on(device)
    it.add(requests(prompts(1, longest=5))[0])
    while not it.rest_s:
        it.step()
    it._runner.timer = Timer(torch.device("cpu"))
    assert it.rest_s == 0.0


def test_the_next_step_is_due_at_once_where_it_has_no_room(device: Device) -> None:
    it = on(device, max_batch_size=2, max_batch_tokens=8)
    short, other, long = requests([(1, 2), (3, 4), tuple(range(30))])
    it.add(short)
    while not it.rest_s:
        it.step()
    it.add(long)
    assert it.rest_s == 0.0  # of tokens
    it.cancel(long.id)
    it.step()
    it.step()
    assert it.rest_s > 0.0
    it.add(other)
    assert it.rest_s == 0.0  # of rows


def test_a_request_is_not_refused_since_others_wait_for_a_step_that_has_room_for_them(device: Device) -> None:
    it = on(device, max_waiting=1)
    first, second, third = requests(prompts(3, longest=5))
    it.add(first)
    while not it.rest_s:
        it.step()
    it.add(second)
    assert it.rest_s == 0.0
    it.step()
    it.add(third)


@pytest.mark.parametrize("options", [{"lookahead": False}, {"speculate": "prompt-lookup"}])
def test_an_engine_that_does_not_launch_ahead_has_no_rest(device: Device, options: dict[str, Any]) -> None:
    it = on(device, **options)
    it.add(requests(prompts(1, longest=5))[0])
    while it.has_work:
        it.step()
        assert it.rest_s == 0.0


def test_an_engine_whose_launches_bring_weights_has_no_rest(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a link that stands still at the end of each step."""
    monkeypatch.setattr(Engine, "load", partial(Engine.load, mode="streamed"))
    it = on(device)
    it.add(requests(prompts(1, longest=5))[0])
    while it.has_work:
        it.step()
        assert it._weights.plan.mode == "streamed" and it.rest_s == 0.0


def test_an_engine_without_work_has_no_rest(device: Device) -> None:
    it = on(device)
    assert it.rest_s == 0.0
    it.generate(requests(prompts(3)))
    assert it.rest_s == 0.0
