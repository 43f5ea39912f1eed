"""A request's way through a fleet, with doubles of what Ray carries: refusals, deaths, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

pytestmark = pytest.mark.filterwarnings("ignore")  # of what Ray imports
Script = list[Any]  # a status, then bytes and errors
STREAM = [(b"content-type", b"text/event-stream")]


class Parts:
    """What a replica gives back."""

    def __init__(self, replica: str, script: Script, headers: list[tuple[bytes, bytes]]) -> None:
        self._replica, self._script, self._headers, self.was_cancelled = replica, [*script], headers, False
        self._given = self._give()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._given

    async def _give(self) -> AsyncIterator[Any]:
        from launch.ray_fleet import AnswerHead

        for each in self._script:
            if isinstance(each, Exception):
                raise each
            if callable(each):
                await each()
                continue
            yield AnswerHead(self._replica, each, self._headers) if isinstance(each, int) else each

    def cancel(self) -> None:
        self.was_cancelled = True


class Pool:
    """A handle of replicas that answer by scripts, and what they were passed."""

    def __init__(self, *scripts: Script, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.answers = [Parts(f"r{index}", script, [*headers]) for index, script in enumerate(scripts)]
        self.passed: list[Any] = []

    def options(self, **_: Any) -> Pool:
        return self

    def remote(self, passed: Any) -> Parts:
        self.passed.append(passed)
        return self.answers[len(self.passed) - 1]


class NamedPool(Pool):
    """Replicas that are asked by name; one of those that are ``gone`` is still known, but the first answers for it."""

    def __init__(self, *scripts: Script, gone: Collection[str] = ()) -> None:
        super().__init__(*scripts)
        self._scripts, self._gone = scripts, gone

    def remote(self, passed: Any) -> Parts:
        self.passed.append(passed)
        names = [f"r{index}" for index in range(len(self._scripts))]
        if passed.there is not None:
            passed.there[:] = names
        index = 0 if passed.replica is None or passed.replica in self._gone else names.index(passed.replica)
        return Parts(names[index], self._scripts[index], [])


def ask(
    pool: Pool,
    body: bytes = b'{"model": "one", "prompt": "x"}',
    path: str = "/v1/completions",
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """Ask an ingress."""
    pytest.importorskip("ray")
    from starlette.requests import Request

    from launch.ray_fleet import Ingress

    ingress = Ingress(pool, 1000)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await (await ingress(Request(scope, receive)))(scope, receive, send)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://fleet") as http:
            return await http.post(path, content=body, headers=headers)

    return asyncio.run(post())


def a_replica(application: Any = None) -> Any:
    """Make a replica of nothing but an application, which has nothing to end."""
    from launch.ray_fleet import PoolReplica

    cls = type("Bare", (PoolReplica,), {"__del__": lambda self: None})
    replica: Any = cls.__new__(cls)
    replica._app, replica._name, replica._num_refused = application, "r", 0
    replica._arrived, replica._answering = {}, {}
    return replica


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


REFUSED = [(b"x-not-begun", b"true")]


def test_who_refuses_is_not_asked_again_and_the_last_refusal_is_passed_on() -> None:
    pool = Pool([429], [503], [200, b"ab", b"c"], headers=REFUSED)
    answer = ask(pool)
    assert (answer.status_code, answer.content, answer.headers["x-replica"]) == (200, b"abc", "r2")
    assert [passed.tried for passed in pool.passed] == [(), ("r0",), ("r0", "r1")]
    assert {(passed.model, passed.body) for passed in pool.passed} == {("one", b'{"model": "one", "prompt": "x"}')}
    assert [passed.number for passed in pool.passed] == [1, 2, 3] and len({each.ingress for each in pool.passed}) == 1
    assert [(passed.was_full, passed.is_last) for passed in pool.passed] == [
        (False, False),
        (True, False),
        (True, True),
    ]
    assert ask(Pool([429], [429], [429, b"later"])).content == b"later"


def test_a_request_that_may_have_stopped_an_engine_is_given_to_no_other() -> None:
    """What was begun ends with a 503, too, without the header of a refusal."""
    pool = Pool([503, b"the engine has failed"], [200])
    answer = ask(pool)
    assert (answer.status_code, answer.content, len(pool.passed)) == (503, b"the engine has failed", 1)


def test_a_replica_that_is_offered_a_request_again_leaves_the_refusal_as_it_was() -> None:
    pool = Pool([429, b"full"], [0])
    answer = ask(pool)
    assert (answer.status_code, answer.content, answer.headers["x-replica"]) == (429, b"full", "r0")


@pytest.mark.filterwarnings("ignore")
def test_a_refusal_counts_when_all_have_refused_and_costs_no_work_the_second_time() -> None:
    pytest.importorskip("ray")
    from launch.ray_fleet import AnswerHead, PassedRequest

    async def full(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": []})

    def num_counted(**passed: Any) -> tuple[int, int]:
        """How the replica answers, and how many refusals it has counted."""

        async def first() -> int:
            async for head in replica.answer(PassedRequest({}, b"", "one", (), **passed)):
                assert isinstance(head, AnswerHead)
                return head.status
            raise AssertionError

        replica = a_replica(full)
        return asyncio.run(first()), replica._num_refused

    assert num_counted() == (429, 0), "the next one may have time"
    assert num_counted(tried=("x", "y"), was_full=True) == (429, 1)
    assert num_counted(tried=("r",), was_full=True) == (0, 1) and num_counted(tried=("r",)) == (0, 0)


@pytest.mark.parametrize("script", [[], [200], [200, b"half"]], ids=str)
def test_a_replica_that_dies_before_its_answer_is_whole_is_503_and_no_other_is_asked(script: Script) -> None:
    pytest.importorskip("ray")
    pool = Pool([*script, died()])
    answer = ask(pool)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost" and len(pool.passed) == 1


def test_a_replica_that_dies_in_a_stream_ends_it_with_an_error() -> None:
    pytest.importorskip("ray")
    pool = Pool([200, b"data: 1\n\n", died()], headers=STREAM)
    answer = ask(pool)
    first, lost, done = answer.text.strip().split("\n\n")
    assert (answer.status_code, first, done) == (200, "data: 1", "data: [DONE]")
    assert json.loads(lost.removeprefix("data: "))["error"]["code"] == "replica_lost" and pool.answers[0].was_cancelled


METRICS = b"""# HELP x_total Answers
# TYPE x_total counter
x_total{route="a"} %d.0
"""


def ups(text: str) -> dict[str, float]:
    """By replica."""
    (up,) = (each for each in text_string_to_metric_families(text) if each.name == "yafsdp_like_replica_up")
    return {each.labels["replica"]: each.value for each in up.samples}


def test_metrics_of_a_fleet_are_those_of_all_replicas_by_name_and_say_which_have_none() -> None:
    pytest.importorskip("ray")
    pool = NamedPool([200, METRICS % 1], [503, b"stuck"], [200, METRICS % 2], [died()], [200, b"half", died()])
    answer = ask(pool, b"", "/metrics")
    assert [passed.replica for passed in pool.passed] == [None, "r1", "r2", "r3", "r4"]
    assert answer.headers["content-type"].startswith("text/plain") and "x-replica" not in answer.headers
    assert ups(answer.text) == {"r0": 1.0, "r1": 0.0, "r2": 1.0, "r3": 0.0, "r4": 0.0}
    up, x = text_string_to_metric_families(answer.text)
    assert [each.name for each in (up, x)] == ["yafsdp_like_replica_up", "x"] and x.type == "counter"
    assert {(each.labels["replica"], each.labels["route"], each.value) for each in x.samples} == {
        ("r0", "a", 1.0),
        ("r2", "a", 2.0),
    }


def test_metrics_go_on_where_the_first_that_is_asked_dies_and_where_another_answers_for_one_that_is_gone() -> None:
    pytest.importorskip("ray")
    answer = ask(NamedPool([died()], [200, METRICS % 1]), b"", "/metrics")
    assert answer.status_code == 200 and ups(answer.text) == {"r0": 0.0, "r1": 1.0}
    answer = ask(NamedPool([200, METRICS % 1], [200, METRICS % 2], gone={"r1"}), b"", "/metrics")
    assert ups(answer.text) == {"r0": 1.0, "r1": 0.0}
    nobody = ask(Pool([died()]), b"", "/metrics")
    assert nobody.status_code == 503 and nobody.json()["error"]["code"] == "replica_lost"


def test_replicas_are_asked_together_and_one_that_does_not_answer_counts_as_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    from launch import ray_fleet

    monkeypatch.setattr(ray_fleet, "FIGURES_S", 0.3)
    meet = asyncio.Barrier(2)  # of which none passes alone
    stuck = asyncio.Event()
    both = [meet.wait, 200, METRICS % 1]
    answer = ask(NamedPool([200, METRICS % 1], both, [stuck.wait], both), b"", "/metrics")
    assert ups(answer.text) == {"r0": 1.0, "r1": 1.0, "r2": 0.0, "r3": 1.0}


def test_answers_are_merged_beside_the_thread_that_passes_streams_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from launch import ray_fleet

    merge = (lambda _: str(threading.get_ident()).encode(), "text/plain")
    monkeypatch.setitem(ray_fleet.OF_ALL, "/metrics", merge)
    assert int(ask(NamedPool([200, b""]), b"", "/metrics").text) != threading.get_ident()


def test_the_status_of_a_fleet_is_that_of_all_replicas_by_name_unless_one_is_asked() -> None:
    pytest.importorskip("ray")
    answer = ask(NamedPool([200, b'{"state": "serving"}'], [503, b"stuck"], [died()]), b"", "/status.json")
    lost = {"problem": "status 503: the replica is lost, or takes too long to answer"}
    stuck = {"problem": "status 503: stuck"}
    assert answer.json() == {"replicas": {"r0": {"state": "serving"}, "r1": stuck, "r2": lost}}
    pool = Pool([200, b"its own"])
    assert ask(pool, b"", "/status.json", {"x-replica": "r0"}).content == b"its own" and pool.passed[0].replica == "r0"


def test_the_router_says_who_is_there_to_who_asks_for_it() -> None:
    pytest.importorskip("ray")
    from ray.serve._private.common import DeploymentID
    from ray.serve.request_router import ReplicaID

    from launch.ray_fleet import PassedRequest, PoolRequestRouter

    cls = type("Bare", (PoolRequestRouter,), {"__init__": lambda self: None})
    router: Any = cls()
    router.initialize_state()
    ids = [ReplicaID(name, DeploymentID("Pool")) for name in "ab"]
    candidates = [SimpleNamespace(replica_id=each, routing_stats={}) for each in ids]
    asked = PassedRequest({}, b"", "", (), tried=("a",), there=[])
    ranked = asyncio.run(router.choose_replicas(candidates, SimpleNamespace(args=[asked])))
    assert asked.there == ["a", "b"] and ranked == [[candidates[1]]]


def test_what_no_replica_may_be_asked_is_refused_and_what_is_no_json_is_theirs_to_refuse() -> None:
    assert ask(Pool(), path="/admin/models/one/sleep").status_code == 501
    assert ask(Pool(), body=b"x" * 1001).status_code == 413
    pool = Pool([400, b"no"])
    assert ask(pool, body=b"{").status_code == 400 and pool.passed[0].model == ""


@pytest.mark.filterwarnings("ignore")
def test_who_has_no_key_or_says_that_a_body_is_too_large_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    from starlette.requests import Request

    from launch.options import KEY_VARIABLE
    from launch.ray_fleet import Ingress

    async def receive() -> Any:
        raise AssertionError("the body is read")

    def status(path: str = "/v1/completions", key: str | None = "own", **headers: str) -> int:
        sent = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": sent}
        return asyncio.run(Ingress(Pool(), 1000, key)(Request(scope, receive))).status_code

    monkeypatch.setenv(KEY_VARIABLE, "of the environment")
    for wrong in ("", "Bearer of the environment", "Bearer \xfcber"):
        assert status(authorization=wrong) == status("/tokenize", authorization=wrong) == 401
    assert status(key=None, authorization="Bearer own") == 401
    too_large = {"content_length": "1001"}
    assert status(authorization="Bearer own", **too_large) == status("/health", **too_large) == 413
    assert status(key=None, authorization="Bearer of the environment", **too_large) == 413
    assert status("/health", content_length="9" * 5000) == 413
    with pytest.raises(AssertionError, match="the body is read"):
        status(authorization="Bearer own", content_length="1000")


@pytest.mark.filterwarnings("ignore")
def test_a_replica_whose_engine_has_failed_tells_ray_that_it_is_not_well() -> None:
    pytest.importorskip("ray")
    from yafsdp_like.inference.http.service import ServiceState

    replica = a_replica()
    replica._failed = ServiceState.FAILED
    for state in ServiceState:
        replica._service = SimpleNamespace(state=state, unhealthy_reason="the engine has failed: ValueError")
        with (
            pytest.raises(RuntimeError, match="the engine has failed")
            if state is ServiceState.FAILED
            else nullcontext()
        ):
            replica.check_health()


def test_a_report_counts_a_request_from_its_arrival_on_and_says_so() -> None:
    """Before the pool has it, too: its prompt may be read yet."""
    pytest.importorskip("ray")
    from launch.ray_fleet import PassedRequest
    from yafsdp_like.inference.fleet.standing import ModelStanding, Standing

    class Service:
        """Of a pool that has no request."""

        async def call(self, _: Any) -> Standing:
            return Standing(0.0, {"one": ModelStanding(0, 0.5, 1e-3, 0.25)}, number=1)

    async def application(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await receive()
        await receive()

    replica = a_replica(application)
    replica._service = Service()
    parsers = {name: SimpleNamespace(options=SimpleNamespace(adapter_of=of)) for name, of in (("tuned", "one"),)}
    replica._pool = SimpleNamespace(catalog=SimpleNamespace(parsers=parsers))

    async def report() -> Standing:
        stats = await replica.record_routing_stats()
        found = pickle.loads(stats["standing"])
        assert isinstance(found, Standing) and stats["number"] == found.number
        return found

    async def ask() -> None:
        assert (await report()).arrived == {}
        answer = replica.answer(PassedRequest({}, b"", "tuned", (), "me", 7))
        await anext(answer)
        found = await report()
        assert found.arrived == {"me": 7} and found.load == 0.25 and found.models["one"].num_requests == 1
        late = replica.answer(PassedRequest({}, b"", "one", (), "me", 6))
        await anext(late)
        assert (await report()).arrived == {"me": 7} and (await report()).models["one"].num_requests == 2
        for each in (answer, late):
            await each.aclose()
        await asyncio.gather(*replica._answering)
        found = await report()
        assert found.arrived == {"me": 7} and found.load == 0.0 and found.models["one"].num_requests == 0

    asyncio.run(ask())


def test_a_client_that_leaves_disconnects_the_replica_s_application() -> None:
    pytest.importorskip("ray")
    from launch.ray_fleet import AnswerHead, PassedRequest

    seen: list[Any] = []

    async def application(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        seen.append(await receive())

    replica = a_replica(application)

    async def leave() -> None:
        answer = replica.answer(PassedRequest({}, b"body", "one", ()))
        assert await anext(answer) == AnswerHead("r", 200, STREAM)
        assert await anext(answer) == b"ab", "what has come meanwhile goes as one"
        assert len(seen) == 1
        await answer.aclose()
        await asyncio.gather(*replica._answering)
        assert not replica._answering

    asyncio.run(leave())
    assert [each["type"] for each in seen] == ["http.request", "http.disconnect"] and seen[0]["body"] == b"body"
