"""The thread behind a server when things go wrong: ids used again, steps that hang, threads that die, lost news."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.inference.http.servers import (
    COMPLETIONS,
    GREEDY,
    SECONDS,
    Wrapped,
    drawn,
    make_engine,
    requests,
    run,
    serving,
)
from yafsdp_like.inference.engine.request import FinishReason, QueueFullError, RequestOutput, Token
from yafsdp_like.inference.http import server, service
from yafsdp_like.inference.http.service import Service, ServiceState, StuckEngineError, UnavailableError
from yafsdp_like.inference.http.stream import Stream
from yafsdp_like.inference.text.codec import Codec, Transcript

BODY = {**GREEDY, "prompt": "x", "max_tokens": 200, "ignore_eos": True}


class Hanging(Wrapped):
    """An engine whose step number `at` does not return until it is let, or raises."""

    def __init__(self, engine: Any, at: int = 2, error: BaseException | None = None) -> None:
        super().__init__(engine)
        self._at, self._error = at, error
        self.hangs, self.may_go_on = threading.Event(), threading.Event()

    def step(self) -> list[RequestOutput]:
        self._at -= 1
        if self._at == 0:
            self.hangs.set()
            if self._error is not None:
                raise self._error
            self.may_go_on.wait(2 * SECONDS)
        return self.engine.step()  # type: ignore[no-any-return]


@contextlib.contextmanager
def hanging(codec: Codec, at: int = 2) -> Iterator[Hanging]:
    """Whatever happens, it goes on in the end."""
    engine = Hanging(make_engine(codec), at)
    try:
        yield engine
    finally:
        engine.may_go_on.set()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has patience."""
    monkeypatch.setattr(service, "SLOW_STEP_S", 0.2)
    monkeypatch.setattr(service, "LAST_STEP_S", 0.3)
    monkeypatch.setattr(server, "METRICS_S", 0.3)


def soon(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


# --- ids ---


def test_ids_that_were_refused_can_be_used_again_at_once(codec: Codec) -> None:
    """Prevents: the last words of the refused ones are taken for news of those that follow, which then lack tokens."""

    async def main(service: Service[Any]) -> None:
        for _ in range(40):
            with pytest.raises(QueueFullError):
                await service.open(requests(5))
            assert await drawn(await service.open(requests(4))) == dict.fromkeys(("r0", "r1", "r2", "r3"), 3)
        await service.call(lambda engine: engine.check_integrity())

    run(make_engine(codec, max_waiting=4), main)


def test_ids_that_were_given_up_can_be_used_again_at_once(codec: Codec) -> None:
    async def main(service: Service[Any]) -> None:
        for _ in range(15):
            with contextlib.closing(await service.open(requests(2, max_tokens=100))):
                pass
            assert await drawn(await service.open(requests(2))) == {"r0": 3, "r1": 3}

    run(make_engine(codec), main)


def test_readers_of_one_id_get_their_own_tokens(codec: Codec) -> None:
    async def main(service: Service[Any]) -> None:
        streams = [await service.open(requests(1, max_tokens=count)) for count in (5, 9, 7)]
        assert [await drawn(stream) for stream in streams] == [{"r0": 5}, {"r0": 9}, {"r0": 7}]

    run(make_engine(codec), main)


# --- steps that hang ---


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_late_is_answered_while_a_step_hangs(codec: Codec, hurried: None, stream: bool) -> None:
    with hanging(codec) as engine, serving(engine, codec, timeout_s=0.5) as running:
        answer = running.post(COMPLETIONS, {**BODY, "stream": stream})
        assert answer.status_code == (200 if stream else 504)
        assert "the time that a request may take is over" in answer.text
        assert not engine.may_go_on.is_set()
        again = running.post(COMPLETIONS, BODY)  # the engine does not even hear of this one
        assert (again.status_code, again.json()["error"]["code"]) == (504, "deadline_exceeded")
        engine.may_go_on.set()
        running.check_idle()


def test_health_and_metrics_say_that_a_step_hangs_and_that_it_has_come_back(codec: Codec, hurried: None) -> None:
    with hanging(codec) as engine, serving(engine, codec) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, COMPLETIONS, BODY)
        assert engine.hangs.wait(SECONDS)
        assert soon(lambda: running.get("/health").status_code == 503)
        health = running.get("/health").json()
        assert health["status"] == "stuck"
        assert "the engine has been in one step for" in health["message"]
        assert "the engine is busy" in running.get("/metrics").json()["error"]["message"]
        engine.may_go_on.set()
        assert asked.result(SECONDS).status_code == 200
        assert (running.get("/health").status_code, running.get("/metrics").status_code) == (200, 200)


def test_an_engine_that_hangs_for_too_long_has_failed(codec: Codec, hurried: None) -> None:
    """For those who wait, who come, and who ask; and the service can be closed."""

    async def main(engine: Hanging) -> None:
        service = Service(engine, stuck_after_s=0.5)
        await service.start()
        stream = await service.open(requests(1))
        with pytest.raises(UnavailableError, match="failed: StuckEngineError: it has been in one step for"):
            await asyncio.wait_for(drawn(stream), SECONDS)
        for asked in (service.open(requests(1)), service.call(lambda engine: engine.metrics())):
            with pytest.raises(UnavailableError, match="StuckEngineError"):
                await asyncio.wait_for(asked, SECONDS)
        assert (service.state, service.is_stuck) == (ServiceState.FAILED, True)
        await asyncio.wait_for(service.close(), SECONDS)
        assert service.is_stuck

    with hanging(codec) as engine:
        asyncio.run(main(engine))


def test_an_end_is_not_waited_for_longer_than_its_bound(codec: Codec, hurried: None) -> None:
    async def main(engine: Hanging) -> None:
        service = Service(engine)
        await service.start()
        stream = await service.open(requests(1, max_tokens=100))
        assert await asyncio.to_thread(engine.hangs.wait, SECONDS)
        began = time.monotonic()
        await asyncio.wait_for(service.drain(0.2), SECONDS)
        await asyncio.wait_for(service.close(), SECONDS)
        assert time.monotonic() - began < 10
        assert isinstance(service.error, StuckEngineError)
        with pytest.raises(UnavailableError, match="ends nothing that is cancelled"):
            await asyncio.wait_for(drawn(stream), SECONDS)

    with hanging(codec) as engine:
        asyncio.run(main(engine))


# --- threads that die, news that is lost ---


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration("x")])
def test_whatever_ends_the_engines_thread_is_a_failure_that_is_told(codec: Codec, error: BaseException) -> None:
    with serving(Hanging(make_engine(codec), error=error), codec) as running:
        answer = running.post(COMPLETIONS, BODY)
        assert answer.status_code == 503 and "x-not-begun" not in answer.headers
        assert "x-not-begun" in running.post(COMPLETIONS, BODY).headers
        assert f"the engine has failed: {type(error).__name__}" in answer.json()["error"]["message"]
        health = running.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert type(error).__name__ in health.json()["message"]


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration("x"), ZeroDivisionError("x")])
def test_a_call_that_raises_leaves_no_other_call_waiting(codec: Codec, error: BaseException) -> None:
    """Also one that was taken together with it."""

    def fail(engine: Any) -> None:
        raise error

    async def main(service: Service[Any]) -> None:
        held = threading.Event()
        holding = asyncio.create_task(service.call(lambda _: held.wait(SECONDS)))
        await asyncio.sleep(0.05)
        asked = [asyncio.create_task(service.call(call)) for call in (fail, lambda engine: engine.metrics())]
        await asyncio.sleep(0.05)
        held.set()
        assert await holding
        first, second = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), SECONDS)
        assert isinstance(first, Exception)
        assert isinstance(second, UnavailableError) == isinstance(error, SystemExit)

    run(make_engine(codec), main)


def test_news_that_cannot_be_told_once_loses_its_own_request_only(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, troubles = Stream.put, iter([ZeroDivisionError("planted")])

    def failing_put(stream: Stream, output: RequestOutput) -> None:
        if output.request_id == "r0" and (unhealthy_reason := next(troubles, None)) is not None:
            raise unhealthy_reason
        put(stream, output)

    async def main(service: Service[Any]) -> None:
        lost = await service.open(requests(1))
        others = [await service.open([request]) for request in requests(4)[1:]]
        with pytest.raises(UnavailableError, match="the request is lost: ZeroDivisionError: planted"):
            await asyncio.wait_for(drawn(lost), SECONDS)
        lost.close()
        for number, stream in enumerate(others):
            assert await asyncio.wait_for(drawn(stream), SECONDS) == {f"r{number + 1}": 3}
        assert (service.state, service.unhealthy_reason) == (ServiceState.SERVING, None)
        assert await drawn(await service.open(requests(1))) == {"r0": 3}

    monkeypatch.setattr(Stream, "put", failing_put)
    run(make_engine(codec), main)


def test_a_cancellation_that_raises_once_loses_its_own_request_only(codec: Codec) -> None:
    class Stubborn(Wrapped):
        troubles = iter([ZeroDivisionError("planted")])

        def cancel(self, request_id: str) -> None:
            if (unhealthy_reason := next(self.troubles, None)) is not None:
                raise unhealthy_reason
            self.engine.cancel(request_id)

    async def main(service: Service[Any]) -> None:
        first, second = [await service.open([request]) for request in requests(2, max_tokens=50)]
        first.cancel("r0")
        with pytest.raises(UnavailableError, match="planted"):
            await asyncio.wait_for(drawn(first), SECONDS)
        assert await asyncio.wait_for(drawn(second), SECONDS) == {"r1": 50}
        assert service.state is ServiceState.SERVING

    run(Stubborn(make_engine(codec)), main)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_in_an_answer_is_an_error_and_the_end_of_its_request_only(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    troubles = iter([ZeroDivisionError("planted")])

    def failing(push: Callable[..., Any]) -> Callable[..., Any]:
        def failing_push(*arguments: Any) -> Any:
            if (unhealthy_reason := next(troubles, None)) is not None:
                raise unhealthy_reason
            return push(*arguments)

        return failing_push

    for name in ("push", "push_text"):
        monkeypatch.setattr(Transcript, name, failing(getattr(Transcript, name)))
    with serving(make_engine(codec), codec) as running:
        answer = running.post(COMPLETIONS, {**BODY, "stream": stream})
        assert answer.status_code == (200 if stream else 500)
        error = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))["error"]
        assert (error["message"], error["type"]) == ("the answer has failed: ZeroDivisionError", "server_error")
        assert running.post(COMPLETIONS, BODY).status_code == 200
        running.check_idle()


# --- more than may ever wait ---


def test_an_engine_that_takes_nothing_is_not_offered_more_and_more(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(engine: Hanging, service: Service[Any]) -> None:
        first = await service.open(requests(1))
        assert await asyncio.to_thread(engine.hangs.wait, SECONDS)
        opening = [asyncio.create_task(service.open(requests(1))) for _ in range(40)]
        await asyncio.sleep(0.05)
        refused = [task.exception() for task in opening if task.done()]
        assert len(refused) == 30
        assert all(isinstance(error, QueueFullError) for error in refused)
        engine.may_go_on.set()
        assert await drawn(first) == {"r0": 3}
        for task in opening:
            with contextlib.suppress(QueueFullError):
                (await task).close()

    monkeypatch.setattr(service, "MAX_OPEN_REQUESTS", 11)
    engine = Hanging(make_engine(codec, max_waiting=4))
    run(engine, lambda service: main(engine, service))


def test_more_choices_than_may_ever_wait_are_a_mistake_and_as_many_are_none(codec: Codec) -> None:
    with serving(make_engine(codec, max_waiting=3), codec) as running:
        for fields in ({"n": 4}, {"prompt": ["x"] * 4}, {"prompt": ["x", "y"], "n": 2}):
            answer = running.post(COMPLETIONS, {**BODY, "max_tokens": 2, **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
            assert "at most 3 choices in all, found 4" in answer.json()["error"]["message"]
        assert len(running.post(COMPLETIONS, {**BODY, "max_tokens": 2, "n": 3}).json()["choices"]) == 3


def test_a_reader_that_takes_nothing_is_gone_after_a_while(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SEND_S", 0.05)

    async def main() -> None:
        closed = []
        stream = Stream({"r0": "0:r0"}, closed.append)

        async def lines() -> Any:
            yield b"x"

        async def receive() -> Any:
            await asyncio.sleep(SECONDS)

        async def send(message: Any) -> None:
            await asyncio.sleep(SECONDS)

        scope = {"type": "http", "method": "POST", "path": "/"}
        with pytest.raises(TimeoutError):
            await server.EventStreamResponse(lines(), stream)(scope, receive, send)
        assert closed == ["0:r0"]

    asyncio.run(main())


def test_a_reader_that_lags_gets_the_tokens_of_a_request_together_and_its_end_apart() -> None:
    """Prevents: an event loop that falls behind for good, with a line to send for every token."""

    async def main() -> None:
        stream = Stream({"a": "0:a", "b": "0:b"}, lambda name: None)
        for name, token in (("a", 1), ("a", 2), ("b", 3), ("a", 4)):
            stream.put(RequestOutput(name, (Token(token),)))
        stream.put(RequestOutput("a", (Token(5),), FinishReason.STOP))
        stream.put(RequestOutput("b", (), FinishReason.DEADLINE))
        read = [(output.request_id, [token.id for token in output.tokens], output.finish) async for output in stream]
        assert read == [
            ("a", [1, 2], None),
            ("b", [3], None),
            ("a", [4, 5], FinishReason.STOP),
            ("b", [], FinishReason.DEADLINE),
        ]

    asyncio.run(main())
