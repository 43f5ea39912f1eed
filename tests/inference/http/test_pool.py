"""A pool of models over HTTP: which one answers, what is said of its state, who may move it, and what fails alone."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.inference.http.servers import (
    COMPLETIONS,
    MAX_SEQ_LEN,
    PROMPT,
    SECONDS,
    Slow,
    Wrapped,
    make_decoder,
    serving_app,
)
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request, RequestOutput
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.http.server import create_catalog_app
from yafsdp_like.inference.http.service import Service
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.plan import PooledModel, PoolPlan, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import load, model_of
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.inference.http.servers import Running
    from yafsdp_like.inference.text.codec import Codec
    from yafsdp_like.inference.weights.loading import Model, Source

OPTIONS = EngineOptions(max_batch_size=4, max_batch_tokens=64, max_waiting=64, max_seq_len=MAX_SEQ_LEN)
NAMES = "plain", "deep"
BODY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
KEY, ADMIN_KEY = {"authorization": "Bearer users"}, {"authorization": "Bearer admins"}


def decoder_of(codec: Codec, name: str) -> Decoder:
    """Of the name's shape, with random weights that are the same each time."""
    plain = make_decoder(codec)
    if name == "plain":
        return plain
    made = Decoder(replace(plain.config, dim=48, num_layers=5, custom_head_dim=12))
    made.init_weights(1)
    with torch.no_grad():
        made.lm_head.weight.mul_(8)
    return made


def plan_of(codec: Codec, **options: Any) -> PoolPlan:
    """Of memory in which one model fits at a time."""
    models = {name: PooledModel(decoder_of(codec, name).config, torch.float32, OPTIONS) for name in NAMES}
    large = plan_pool(models, PoolOptions(1 << 30))
    image_nbytes = max(plan.image_nbytes for plan in large.models.values())
    limit = large.memory.nbytes - large.grid.region_nbytes + image_nbytes + (362 << 10)  # for pages of a sequence
    plan = plan_pool(models, PoolOptions(limit, **{"max_turn_steps": 4, **options}))
    assert plan.models["plain"].meets(plan.models["deep"])
    return plan


def unreadable(model: Model) -> Model:
    def source(_: torch.device) -> Source:
        raise OSError("the disk is gone")

    return replace(model, source=source)


def gated(model: Model, gate: threading.Event) -> Model:
    """What can be read while the gate is open."""

    def source(device: torch.device) -> Source:
        assert gate.wait(SECONDS)
        return model.source(device)

    return replace(model, source=source)


@contextlib.contextmanager
def serving_pool(
    codec: Codec,
    ttls: dict[str, float] | None = None,
    failing: str = "",
    gate: threading.Event | None = None,
    errors: dict[str, str] | None = None,
    wrap: Callable[[PoolDriver], Any] = lambda driver: driver,
    admin_key: str | None = "admins",
    api_key: str | None = None,
    targets: Targets | None = None,
    **pool_options: Any,
) -> Iterator[Running]:
    models = {name: model_of(decoder_of(codec, name)) for name in NAMES}
    models |= {name: unreadable(models[name]) for name in [failing] if name}
    models["deep"] = models["deep"] if gate is None else gated(models["deep"], gate)
    plan = plan_of(codec, **pool_options)
    driver = PoolDriver(ModelPool(plan, models, targets=targets and dict.fromkeys(NAMES, targets)), ttls)
    if gate is None:
        driver.load_all()
    parsers = [
        RequestParser(
            codec,
            ServerOptions(
                model_name=name,
                aliases=(f"org/{name}",),
                vocab_size=codec.vocab_size,
                max_seq_len=MAX_SEQ_LEN,
                api_key=api_key,
                admin_key=admin_key,
            ),
        )
        for name in NAMES
    ]
    engine = wrap(driver)
    service = Service(engine, poll_interval_s=0.05 if ttls else None)
    app = create_catalog_app(service, Catalog(parsers, errors, is_pool=True))
    with serving_app(service, engine, app) as running:
        yield running
        running.check_idle()


def alone(codec: Codec, name: str, prompt: str) -> str:
    """What a model says that nobody shares a device with."""
    decoder = decoder_of(codec, name)
    engine = Engine(load(model_of(decoder), replace(OPTIONS, kv_nbytes=1 << 20)))
    ids = codec.encode(prompt)
    done = engine.generate([Request("a", ids, SamplingParams(temperature=0), max_tokens=12)])["a"]
    return codec.decode([*ids, *done.ids])[len(codec.decode(ids)) :]


def states(running: Running) -> dict[str, str]:
    return {model["id"]: model["state"] for model in running.get("/v1/models", headers=KEY).json()["data"]}


def soon(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + SECONDS
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def test_models_asked_at_once_answer_as_they_do_alone_and_say_what_their_switches_took(codec: Codec) -> None:
    asked = [(name, f"{PROMPT} {number}") for number in range(3) for name in (*NAMES, "org/deep")]
    with serving_pool(codec) as running, ThreadPoolExecutor(len(asked)) as threads:

        def ask(model: str, prompt: str) -> tuple[str, str]:
            answer = running.post(COMPLETIONS, {**BODY, "model": model, "prompt": prompt}).json()
            return answer["model"], answer["choices"][0]["text"]

        found = list(threads.map(lambda pair: ask(*pair), asked))
        expected = {prompt: {name: alone(codec, name, prompt) for name in NAMES} for _, prompt in asked}
        names = [name.removeprefix("org/") for name, _ in asked]
        assert found == [(name, expected[prompt][name]) for name, (_, prompt) in zip(names, asked, strict=True)]
        assert all(texts["plain"] != texts["deep"] for texts in expected.values())
        assert sorted(states(running).values()) == ["asleep", "awake"]
        numbers = running.numbers()
        for name in NAMES:
            assert numbers[f"yafsdp_like_model_num_wakes,{name}"] >= 1
            assert numbers[f"yafsdp_like_model_wake_seconds,{name}"] > 0
            assert numbers[f"yafsdp_like_model_nbytes_copied,{name}"] > 0
            assert numbers[f"yafsdp_like_model_num_tokens_drawn,{name}"] > 0
        assert sum(numbers[f"yafsdp_like_model_state,{name},awake"] for name in NAMES) == 1
        assert numbers["yafsdp_like_engine_num_tokens_drawn"] == 12 * len(asked)


def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(codec: Codec) -> None:
    with serving_pool(codec, admin_key=None) as running:
        answer = running.post(COMPLETIONS, {**BODY, "model": "gpt-9"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "there is no 'gpt-9' here, only 'plain', 'deep'" in answer.text
        assert running.get("/v1/models/gpt-9").status_code == 404
        assert running.get("/v1/models/org/deep").json()["id"] == "deep"
        assert running.post(COMPLETIONS, {"prompt": "x"}).status_code == 400
        assert running.post("/admin/models/plain/sleep").status_code == 404  # without a key nobody is admin


def test_admins_move_models_and_users_do_not(codec: Codec) -> None:
    with serving_pool(codec, api_key="users") as running:

        def admin(name: str, action: str, headers: dict[str, str] = ADMIN_KEY) -> tuple[int, str]:
            answer = running.post(f"/admin/models/{name}/{action}", headers=headers)
            return answer.status_code, answer.json().get("state", "")

        assert [admin("plain", "unload", headers)[0] for headers in ({}, KEY)] == [401, 401]
        assert running.get("/v1/models", headers=ADMIN_KEY).status_code == 401
        assert states(running) == {"plain": "asleep", "deep": "asleep"}
        assert admin("plain", "wake_up") == (200, "awake")
        assert admin("deep", "wake_up") == (200, "awake")
        assert states(running) == {"plain": "asleep", "deep": "awake"}
        assert admin("deep", "sleep") == (200, "asleep")
        assert admin("deep", "unload") == (200, "absent")
        assert admin("deep", "load") == (200, "asleep")
        assert admin("gpt-9", "load")[0] == 404
        refused = running.post("/admin/models/deep/explode", headers=ADMIN_KEY)
        assert refused.status_code == 404
        assert refused.json()["error"]["message"] == (
            "action: expected one of load, unload, sleep, wake_up, found 'explode'"
        )


def test_a_model_with_requests_is_not_unloaded(codec: Codec) -> None:
    with serving_pool(codec, wrap=Slow) as running, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(running.post, COMPLETIONS, {**BODY, "model": "plain", "max_tokens": 120})
        assert soon(lambda: states(running)["plain"] == "awake")
        refusal = running.post("/admin/models/plain/unload", headers=ADMIN_KEY)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "model_busy")
        assert answer.result(SECONDS).json()["usage"]["completion_tokens"] == 120


def test_an_idle_model_sleeps_once_its_time_is_over_and_wakes_for_its_next_request(codec: Codec) -> None:
    with serving_pool(codec, ttls={"plain": 0.2}) as running:
        text = running.post(COMPLETIONS, {**BODY, "model": "plain"}).json()["choices"][0]["text"]
        assert soon(lambda: states(running)["plain"] == "asleep")
        assert running.post(COMPLETIONS, {**BODY, "model": "plain"}).json()["choices"][0]["text"] == text
        assert running.post(COMPLETIONS, {**BODY, "model": "deep"}).status_code == 200
        time.sleep(0.4)
        assert states(running) == {"plain": "asleep", "deep": "awake"}  # which has no such time


def test_a_client_that_leaves_while_its_model_waits_to_wake_leaves_nothing_behind(codec: Codec) -> None:
    """The turn of the model that is awake is longer than the client waits."""
    with serving_pool(codec, wrap=Slow, max_turn_steps=10_000) as running, ThreadPoolExecutor(1) as threads:
        busy = threads.submit(running.post, COMPLETIONS, {**BODY, "model": "plain", "max_tokens": 150})
        assert soon(lambda: states(running)["plain"] == "awake")
        with contextlib.suppress(Exception):
            running.http.post(COMPLETIONS, json={**BODY, "model": "deep"}, timeout=0.3)
        assert soon(lambda: running.service.num_requests == 1)  # the other goes on, and this one has ended
        assert not busy.done()
        assert states(running)["deep"] == "asleep"
        assert busy.result(SECONDS).json()["usage"]["completion_tokens"] == 150
        assert running.numbers()["yafsdp_like_model_num_wakes,deep"] == 0


def test_a_request_that_would_miss_targets_is_told_when_to_come_again(codec: Codec) -> None:
    """No second model is admitted beside one that works, whose twelve tokens are to be read in 10 s each."""
    gate = threading.Event()

    class Held(Wrapped):
        """Makes no step while the gate is closed."""

        def step(self) -> list[RequestOutput]:
            return self.engine.step() if gate.wait(0.01) else []

    options = {"targets": Targets(1000.0, 10.0), "admission_load": 1e-9}
    with serving_pool(codec, wrap=Held, **options) as running, ThreadPoolExecutor(1) as threads:
        busy = threads.submit(running.post, COMPLETIONS, {**BODY, "model": "plain"})
        assert soon(lambda: running.numbers()["yafsdp_like_model_num_waiting,plain"] == 1)
        refused = running.post(COMPLETIONS, {**BODY, "model": "deep"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "targets of model 'deep' or others would be missed" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "120"
        gate.set()
        assert busy.result(SECONDS).json()["choices"][0]["text"] == alone(codec, "plain", PROMPT)
        assert running.post(COMPLETIONS, {**BODY, "model": "deep"}).status_code == 200


def test_a_model_is_read_beside_the_answers_of_another_and_says_how_far_it_is(codec: Codec) -> None:
    gate = threading.Event()
    with serving_pool(codec, gate=gate) as running, ThreadPoolExecutor(2) as threads:
        assert states(running) == {"plain": "absent", "deep": "absent"}
        waiting = threads.submit(running.post, COMPLETIONS, {**BODY, "model": "deep"})
        admin = threads.submit(running.post, "/admin/models/deep/wake_up", headers=ADMIN_KEY)
        assert soon(lambda: states(running)["deep"] == "loading")
        assert running.post(COMPLETIONS, {**BODY, "model": "plain"}).status_code == 200
        assert not waiting.done() and not admin.done() and states(running)["deep"] == "loading"
        deep = running.get("/v1/models/deep").json()
        assert deep["loaded_nbytes"] == 0 < deep["weights_nbytes"]
        assert running.numbers()["yafsdp_like_model_state,deep,loading"] == 1
        gate.set()
        assert waiting.result(SECONDS).json()["choices"][0]["text"] == alone(codec, "deep", PROMPT)
        assert admin.result(SECONDS).json()["state"] in ("awake", "waking")
        assert running.numbers()["yafsdp_like_model_loaded_nbytes,deep"] == deep["weights_nbytes"]


def test_a_load_goes_on_when_its_only_client_leaves_and_ends_when_an_admin_unloads_the_model(codec: Codec) -> None:
    gate = threading.Event()
    with serving_pool(codec, gate=gate) as running, ThreadPoolExecutor(1) as threads:
        with running.http.stream("POST", COMPLETIONS, json={**BODY, "model": "deep", "stream": True}):
            assert soon(lambda: states(running)["deep"] == "loading")
        assert soon(lambda: running.service.num_requests == 0)
        assert states(running)["deep"] == "loading"
        assert running.post("/admin/models/deep/unload", headers=ADMIN_KEY).json()["state"] == "absent"
        refused = running.post("/admin/models/deep/load", headers=ADMIN_KEY)
        assert refused.status_code == 503 and "until its cancelled load ends" in refused.text
        gate.set()
        assert soon(lambda: running.post("/admin/models/deep/load", headers=ADMIN_KEY).status_code == 200)
        assert running.post("/admin/models/deep/unload", headers=ADMIN_KEY).json()["state"] == "absent"
        gate.clear()
        admin = threads.submit(running.post, "/admin/models/deep/load", headers=ADMIN_KEY)
        assert soon(lambda: states(running)["deep"] == "loading")
        assert running.post("/admin/models/deep/unload", headers=ADMIN_KEY).json()["state"] == "absent"
        answer = admin.result(SECONDS)
        gate.set()
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_busy")


def test_who_waits_for_a_load_has_no_engine_s_pages_counted_meanwhile(codec: Codec) -> None:
    gate = threading.Event()

    class Watched(Wrapped):
        num_counted = num_looks = 0

        def models(self) -> Any:
            self.num_counted += 1
            return self.engine.models()

        def state_of(self, name: str) -> Any:
            self.num_looks += 1
            if self.num_looks == 3:
                gate.set()
            return self.engine.state_of(name)

    with serving_pool(codec, gate=gate, wrap=Watched) as running:
        answer = running.post("/admin/models/deep/load", headers=ADMIN_KEY)
        assert (answer.status_code, answer.json()["state"]) == (200, "asleep")
        assert running.engine.num_counted == 2  # at its beginning, and for the answer


def test_a_request_whose_model_fails_while_it_waits_is_refused_with_the_reason(codec: Codec) -> None:
    gate = threading.Event()
    with serving_pool(codec, failing="deep", gate=gate) as running, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(running.post, COMPLETIONS, {**BODY, "model": "deep"})
        assert soon(lambda: states(running)["deep"] == "loading")
        gate.set()
        answer = waiting.result(SECONDS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert "OSError: the disk is gone" in answer.text and "retry-after" in answer.headers
        assert "x-not-begun" not in answer.headers, "it was taken"
        assert states(running)["deep"] == "failed"


def test_a_model_that_fails_is_reported_and_refused_and_others_serve(codec: Codec) -> None:
    errors = {"lost": "model 'lost' could not be opened: there is no such directory"}
    with serving_pool(codec, failing="deep", errors=errors) as running:
        listed = {model["id"]: model for model in running.get("/v1/models").json()["data"]}
        assert (listed["deep"]["state"], listed["lost"]["state"]) == ("failed", "failed")
        assert "the disk is gone" in listed["deep"]["error"] and listed["lost"]["error"] == errors["lost"]
        for name, words in (("deep", "OSError: the disk is gone"), ("lost", "no such directory")):
            answer = running.post(COMPLETIONS, {**BODY, "model": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
            assert words in answer.text and "retry-after" in answer.headers and "x-not-begun" in answer.headers
            again = running.post(f"/admin/models/{name}/load", headers=ADMIN_KEY)
            assert again.status_code == 503 and words in again.text
        assert running.post(COMPLETIONS, {**BODY, "model": "plain"}).status_code == 200
        assert running.numbers()["yafsdp_like_model_state,deep,failed"] == 1


def test_a_model_without_room_in_host_memory_is_refused_with_the_numbers_until_another_is_unloaded(
    codec: Codec,
) -> None:
    nbytes = {name: plan.image_nbytes for name, plan in plan_of(codec).models.items()}
    with serving_pool(codec, host_weights_nbytes=max(nbytes.values())) as running:
        assert states(running) == {"plain": "asleep", "deep": "absent"}
        answer = running.post(COMPLETIONS, {**BODY, "model": "deep"})
        assert answer.status_code == 503 and f"needs {nbytes['deep']:,} bytes of host memory" in answer.text
        assert running.post("/admin/models/plain/unload", headers=ADMIN_KEY).status_code == 200
        assert running.post(COMPLETIONS, {**BODY, "model": "deep"}).status_code == 200


def test_a_key_for_admins_that_every_user_has_is_refused() -> None:
    with pytest.raises(ValueError, match="the admin key is the users' key"):
        ServerOptions(model_name="a", vocab_size=1, max_seq_len=1, api_key="same", admin_key="same")
