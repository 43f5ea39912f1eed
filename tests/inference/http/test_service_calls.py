"""The service alone, without HTTP: opening, cancelling, draining and closing."""

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from tests.inference.http.servers import SECONDS, Turnstile, Wrapped, drawn, let, make_engine, requests, run
from yafsdp_like.inference.engine.request import QueueFullError, RequestOutput
from yafsdp_like.inference.http import service as service_module
from yafsdp_like.inference.http.service import Service, ServiceState, UnavailableError
from yafsdp_like.inference.text.codec import Codec


def test_a_stream_tells_of_all_of_its_requests_to_their_ends(codec: Codec) -> None:
    async def main(service: Service[Any]) -> None:
        stream = await service.open(requests(3))
        assert await drawn(stream) == {"r0": 3, "r1": 3, "r2": 3}
        assert service.num_requests == 0

    run(make_engine(codec), main)


def test_requests_are_opened_all_or_none(codec: Codec) -> None:
    async def main(service: Service[Any]) -> None:
        with pytest.raises(ValueError, match="the id is in use"):
            await service.open([*requests(2), *requests(1)])
        assert service.num_requests == 0
        with pytest.raises(QueueFullError):
            await service.open(requests(5))
        assert service.num_requests == 0
        assert await drawn(await service.open(requests(4))) == dict.fromkeys(("r0", "r1", "r2", "r3"), 3)
        await service.call(lambda engine: engine.check_integrity())

    run(make_engine(codec, max_waiting=4), main)


def test_who_is_cancelled_while_opening_leaves_nothing_behind(codec: Codec) -> None:
    engine = Turnstile(make_engine(codec))

    async def main(service: Service[Any]) -> None:
        await service.open(requests(1))
        long = requests(6, max_tokens=200)
        for others in (long[1:4], [*long[4:], long[0]]):  # taken; refused, as the last id is in use
            held = threading.Event()
            holding = asyncio.create_task(service.call(lambda _, held=held: held.wait(SECONDS)))
            await asyncio.sleep(0.05)
            opening = asyncio.create_task(service.open(others))
            await asyncio.sleep(0.05)
            opening.cancel()
            held.set()
            with pytest.raises(asyncio.CancelledError):
                await opening
            assert await holding
        await service.call(let)
        while service.num_requests:
            await asyncio.sleep(0.005)
        assert await service.call(lambda engine: engine.metrics().num_tokens_drawn) < 10
        await service.call(lambda engine: engine.check_integrity())

    run(engine, main)


def test_a_closed_stream_ends_for_its_reader_at_once(codec: Codec) -> None:
    engine = Turnstile(make_engine(codec))

    async def main(service: Service[Any]) -> None:
        with contextlib.closing(await service.open(requests(2))) as stream:
            reading = asyncio.create_task(drawn(stream))
            await asyncio.sleep(0.01)
        assert await reading == {}
        await service.call(let)

    run(engine, main)


def test_a_drained_service_lets_run_what_runs_and_begins_nothing(codec: Codec) -> None:
    async def main(service: Service[Any]) -> None:
        stream = await service.open(requests(2, max_tokens=20))
        await service.drain(SECONDS)
        assert await drawn(stream) == {"r0": 20, "r1": 20}
        with pytest.raises(UnavailableError, match="draining"):
            await service.open(requests(1))

    run(make_engine(codec), main)


class Resting(Wrapped):
    """An engine whose next step is due when somebody says so."""

    rest_s = 60.0

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.num_requests = list[int]()  # of each step

    def step(self) -> list[RequestOutput]:
        metrics = self.engine.metrics()
        self.num_requests.append(metrics.num_running + metrics.num_waiting)
        return self.engine.step()


def test_requests_that_come_before_a_step_is_due_are_in_it(codec: Codec) -> None:
    engine = Resting(make_engine(codec))

    async def main(service: Service[Any]) -> None:
        first, second = [await service.open(requests(count)) for count in (1, 2)]
        assert await service.call(lambda _: engine.num_requests) == [] and service.busy_s == 0.0
        await service.call(lambda _: setattr(engine, "rest_s", 0.0))
        assert await drawn(first) == {"r0": 3} and await drawn(second) == {"r0": 3, "r1": 3}
        assert engine.num_requests[0] == 3

    run(engine, main)


def test_a_step_is_made_once_it_is_due_though_nobody_calls(codec: Codec) -> None:
    engine = Resting(make_engine(codec))
    engine.rest_s = 0.01

    def due(_: Any) -> None:
        threading.Timer(0.02, setattr, (engine, "rest_s", 0.0)).start()

    async def main(service: Service[Any]) -> None:
        stream = await service.open(requests(1))
        await service.call(due)
        assert await drawn(stream) == {"r0": 3}

    run(engine, main)


def test_a_service_ends_while_no_step_is_due(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "LAST_STEP_S", 0.1)

    async def main() -> None:
        service = Service(Resting(make_engine(codec)))
        await service.start()
        await service.open(requests(1))
        await service.close()
        assert not service._thread.is_alive()

    asyncio.run(main())


def test_a_closed_service_answers_that_it_is_closed(codec: Codec) -> None:
    async def main() -> None:
        service = Service(make_engine(codec))
        await service.start()
        await service.close()
        await service.close()
        assert service.state is ServiceState.CLOSED
        with pytest.raises(UnavailableError, match="closed"):
            await service.open(requests(1))
        with pytest.raises(UnavailableError):
            await service.call(lambda engine: engine.metrics())

    asyncio.run(main())


def test_a_call_gives_what_the_function_raises_and_the_service_goes_on(codec: Codec) -> None:
    async def main(service: Service[Any]) -> None:
        with pytest.raises(ZeroDivisionError):
            await service.call(lambda engine: 1 / 0)
        assert await drawn(await service.open(requests(1))) == {"r0": 3}

    run(make_engine(codec), main)
