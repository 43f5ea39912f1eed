"""Clients that are too many, too late, gone, or answered while the engine fails or drains."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.inference.http.servers import (
    COMPLETIONS,
    GREEDY,
    MODEL,
    PROMPT,
    SECONDS,
    Slow,
    Turnstile,
    let,
    make_engine,
    serving,
)
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.http.service import ServiceState
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.kernels.sampling_params import SamplingParams

# --- too long, too many, too late, gone ---


def test_others_are_answered_while_a_text_is_cut_into_tokens(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end, encode = threading.Event(), threading.Event(), codec.encode

    def encode_slowly(text: str) -> tuple[int, ...]:
        began.set()
        assert may_end.wait(SECONDS)
        return encode(text)

    monkeypatch.setattr(codec, "encode", encode_slowly)
    with serving(make_engine(codec), codec) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, COMPLETIONS, {**GREEDY, "prompt": PROMPT})
        try:
            assert began.wait(SECONDS)
            assert running.get("/health", timeout=5).status_code == 200
        finally:
            may_end.set()
        assert asked.result(SECONDS).status_code == 200


def test_who_comes_when_too_many_wait_is_told_to_come_again(codec: Codec) -> None:
    engine = Turnstile(make_engine(codec, max_waiting=1))
    with serving(engine, codec) as running, contextlib.ExitStack() as stack:
        client = running.client()
        waiting = stack.enter_context(
            client.completions.create(model=MODEL, prompt="x", max_tokens=2, stream=True)  # which answers at once
        )
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=MODEL, prompt="y")
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "1")
        running.call(let)
        assert list(waiting)[-1].choices[0].finish_reason in ("length", "stop")
        running.check_idle()
        assert client.completions.create(model=MODEL, prompt="y", max_tokens=2).choices
        with pytest.raises(openai.BadRequestError, match="at most 1 choices in all"):  # to come again would not help
            client.completions.create(model=MODEL, prompt="y", n=2)
        running.check_idle()


def test_the_client_tries_again_by_itself(codec: Codec) -> None:
    engine = Turnstile(make_engine(codec, max_waiting=1))
    with serving(engine, codec) as running:
        client = running.client(max_retries=5)
        with client.completions.create(model=MODEL, prompt="x", max_tokens=2, stream=True) as first:
            opening = threading.Timer(0.5, running.call, [let])
            opening.start()
            assert client.completions.create(model=MODEL, prompt="y", max_tokens=2).choices
            assert list(first)
            opening.join()


def test_who_leaves_in_the_middle_of_a_stream_frees_what_was_held(codec: Codec) -> None:
    with serving(Slow(make_engine(codec)), codec) as running:
        body = {**GREEDY, "prompt": PROMPT, "max_tokens": 200, "stream": True, "n": 2, "ignore_eos": True}
        with running.http.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert running.service.num_requests == 2
        running.check_idle()
        assert running.call(lambda engine: engine.metrics().num_tokens_drawn) < 300  # of 400
        assert running.numbers()["yafsdp_like_finished_total,abandoned"] == 2


def test_who_no_longer_waits_for_a_whole_answer_frees_what_was_held(codec: Codec) -> None:
    with serving(Slow(make_engine(codec)), codec) as running:
        body = {**GREEDY, "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            running.post(COMPLETIONS, body, timeout=0.3)
        running.check_idle()
        assert running.call(lambda engine: engine.metrics().num_tokens_drawn) < 150


def test_who_leaves_while_all_wait_never_runs(codec: Codec) -> None:
    engine = Turnstile(make_engine(codec))
    with serving(engine, codec) as running:
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                body = {**GREEDY, "prompt": PROMPT, "stream": stream}
                running.post(COMPLETIONS, body, timeout=0.2)
        while running.numbers()["yafsdp_like_finished_total,abandoned"] < 2:
            time.sleep(0.01)
        running.call(let)
        running.check_idle()
        assert running.call(lambda engine: engine.metrics().num_tokens_drawn) == 0


def test_a_request_that_takes_too_long_ends_with_an_error(codec: Codec) -> None:
    with serving(Slow(make_engine(codec)), codec, timeout_s=0.5) as running:
        client, body = running.client(), {**GREEDY, "prompt": PROMPT, "max_tokens": 200}
        body["extra_body"] = {"ignore_eos": True}
        with pytest.raises(openai.InternalServerError, match="time that a request may take") as caught:
            client.completions.create(**body)
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
        chunks = []
        with pytest.raises(openai.APIError, match="time that a request may take"):
            for chunk in client.completions.create(stream=True, **body):
                chunks.append(chunk)
        assert chunks
        running.check_idle()


def test_an_engine_that_fails_fails_its_requests_and_says_so(codec: Codec) -> None:
    engine = Turnstile(make_engine(codec))
    with serving(engine, codec) as running:
        client = running.client()
        with client.completions.create(model=MODEL, prompt="x", stream=True) as stream:
            engine.error = ZeroDivisionError("a bug")
            running.call(let)
            with pytest.raises(openai.APIError, match="the engine has failed: ZeroDivisionError: a bug"):
                list(stream)
        with pytest.raises(openai.InternalServerError, match="a bug") as caught:
            client.completions.create(model=MODEL, prompt="x")
        assert caught.value.status_code == 503
        assert (running.get("/health").status_code, running.get("/metrics").status_code) == (503, 503)


@pytest.mark.parametrize("stream", [False, True])
def test_a_service_that_drains_cancels_what_takes_longer_than_its_grace(codec: Codec, stream: bool) -> None:
    with serving(Slow(make_engine(codec)), codec) as running:
        errors: list[openai.APIError] = []

        def ask() -> None:
            body = {**GREEDY, "prompt": PROMPT, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
            try:
                answer = running.client().completions.create(stream=stream, **body)
                if isinstance(answer, openai.Stream):
                    list(answer)
            except openai.APIError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not running.service.num_requests:
            time.sleep(0.005)
        drained = asyncio.run_coroutine_threadsafe(running.service.drain(0.2), running.loop)
        while running.service.state is not ServiceState.DRAINING:
            time.sleep(0.005)
        with pytest.raises(openai.InternalServerError, match="draining"):
            running.client().completions.create(model=MODEL, prompt="x")
        assert running.get("/health").json() == {"status": "draining"}
        drained.result(SECONDS)
        thread.join(SECONDS)
        (error,) = errors
        assert "the request was cancelled because the service is shutting down" in error.message
        running.check_idle()


def test_many_clients_at_once_get_what_each_gets_alone(codec: Codec) -> None:
    """With few pages, so that they are preempted; a third of them leaves early."""
    engine, reference = make_engine(codec, kv_nbytes=1 << 17), make_engine(codec)
    prompts = [codec.encode(PROMPT)[: 3 + number] for number in range(24)]
    told = {"sampling": SamplingParams(temperature=0), "max_tokens": 40}
    requests = [Request(str(number), prompt, **told) for number, prompt in enumerate(prompts)]
    expected = {id_: answer.ids for id_, answer in reference.generate(requests).items()}

    async def ask(client: openai.AsyncOpenAI, number: int) -> None:
        body = {**GREEDY, "prompt": list(prompts[number]), "max_tokens": 40, "extra_body": {"ignore_eos": True}}
        text = ""
        async with await client.completions.create(stream=True, **body) as stream:
            async for chunk in stream:
                text += chunk.choices[0].text
                if number % 3 == 0 and text:
                    return
        before = codec.decode(prompts[number])
        assert text == codec.decode([*prompts[number], *expected[str(number)]])[len(before) :]

    async def ask_all(url: str) -> None:
        told: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": SECONDS}
        http = httpx.AsyncClient(verify=False)
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", http_client=http, **told) as client:
            await asyncio.gather(*(ask(client, number) for number in range(len(prompts))))

    with serving(engine, codec) as running:
        asyncio.run(ask_all(running.url))
        running.check_idle()
