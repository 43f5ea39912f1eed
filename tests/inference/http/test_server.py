"""The HTTP interface as OpenAI's own client and others see it, and the thread behind it."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import openai
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tests.inference.text.test_codec import needs_smollm2, smollm2_in, write_tokenizer
from yafsdp_like.comm.transport import Transport
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Event, FinishReason, QueueFull, Request
from yafsdp_like.inference.http.protocol import MAX_STOP_STRINGS, ServerOptions
from yafsdp_like.inference.http.server import create_app
from yafsdp_like.inference.http.service import Service, ServiceState, Unavailable
from yafsdp_like.inference.http.stream import Stream
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.weights.loading import load, model_of
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models import Decoder, DecoderConfig

if TYPE_CHECKING:
    from yafsdp_like.inference.options import AnyMode

T = TypeVar("T")

MODEL = "tiny"
MAX_SEQ_LEN = 256
PROMPT = "The quick brown fox"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24}
SECONDS = 30.0  # that nothing here should take, on the slowest machine


# --- engines and servers ---


def make_decoder(codec: Codec) -> Decoder:
    """A small one of the codec's vocabulary with random weights, the same each time."""
    decoder = Decoder(DecoderConfig(32, 2, 4, 2, 64, vocab_size=codec.vocab_size, max_seq_len=MAX_SEQ_LEN))
    decoder.init_weights(0)
    with torch.no_grad():
        decoder.lm_head.weight.mul_(8)  # opinions, so that a greedy answer is no accident of rounding
    return decoder


def make_engine(codec: Codec, transport: Transport | None = None, **options: Any) -> Engine:
    """Of the small decoder; with a transport, this rank's of all that compute together."""
    limits: dict[str, Any] = {"kv_nbytes": 1 << 20, "max_batch_size": 8, "max_batch_tokens": 64, "max_waiting": 64}
    engine_options = EngineOptions(max_seq_len=MAX_SEQ_LEN, **{**limits, **options})
    mode: AnyMode = "auto" if transport is None else "tensor_parallel"
    weights = load(model_of(make_decoder(codec)), engine_options, mode=mode, transport=transport)
    return Engine(weights, engine_options)


class Wrapped:
    """An engine whose steps are disturbed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Turnstile(Wrapped):
    """An engine that takes requests and does nothing about them until it is let."""

    is_open = False
    error: Exception | None = None  # of its first step

    @property
    def has_work(self) -> bool:
        return self.is_open and self.engine.has_work

    def step(self) -> list[Event]:
        if self.error is not None:
            raise self.error
        return self.engine.step()


def let(engine: Turnstile) -> None:
    """To be called in the engine's thread, which looks for work afterwards."""
    engine.is_open = True


class Slow(Wrapped):
    """An engine whose steps take at least some milliseconds, so that requests can be met while they run."""

    def step(self) -> list[Event]:
        time.sleep(0.02)
        return self.engine.step()


@dataclass
class Running:
    """A server in a thread of its own, and its address."""

    engine: Any
    service: Service[Any]
    server: uvicorn.Server
    loop: asyncio.AbstractEventLoop
    url: str
    http: httpx.Client  # one for all, since each reads the world's certificates first

    def client(self, **options: Any) -> openai.OpenAI:
        told = {"api_key": "none", "max_retries": 0, "timeout": SECONDS, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", http_client=self.http, **told)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        sent = {"json": body} if "content" not in options else {}
        return self.http.post(path, **sent, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def call(self, function: Callable[[Any], T]) -> T:
        """In the engine's thread."""
        return asyncio.run_coroutine_threadsafe(self.service.call(function), self.loop).result(SECONDS)

    def check_idle(self) -> None:
        """Everything ends by itself, and no page is held or lost."""
        until = time.monotonic() + SECONDS
        while self.service.num_requests or self.call(lambda engine: engine.has_work):
            assert time.monotonic() < until, "requests do not end"
            time.sleep(0.01)
        metrics = self.call(lambda engine: engine.metrics())
        assert (metrics.num_running, metrics.num_waiting, metrics.kv_nbytes_used) == (0, 0, 0)
        self.call(lambda engine: engine.check_integrity())

    def numbers(self) -> dict[str, float]:
        """/metrics, by name and labels."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {
            ",".join([sample.name, *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
        }


@contextlib.contextmanager
def serving(engine: Any, codec: Codec, poll_interval_s: float | None = None, **options: Any) -> Iterator[Running]:
    """A server on a free port, which is down and has freed everything at the end."""
    service = Service(engine, poll_interval_s=poll_interval_s)
    told = ServerOptions(model_name=MODEL, vocab_size=engine.config.vocab_size, max_seq_len=MAX_SEQ_LEN, **options)
    config = uvicorn.Config(create_app(service, codec, told), port=0, log_level="error", ws="none")
    server, started = uvicorn.Server(config), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(SECONDS)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=SECONDS, verify=False) as http:
            yield Running(engine, service, server, loops[0], url, http)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert service.state in (ServiceState.CLOSED, ServiceState.FAILED)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@dataclass
class Served:
    """A server, its tokenizer, and an engine of the same weights that is asked directly."""

    running: Running
    codec: Codec
    reference: Engine
    num_asked: int = 0
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.running.client()

    def ask(self, prompt: tuple[int, ...], **fields: Any) -> tuple[list[int], str]:
        """Ids and text of what follows, less the token that stops; greedy unless sampling is said."""
        self.num_asked += 1
        told = {"sampling": SamplingParams(temperature=0), "max_tokens": 24, "stop_tokens": self.codec.stop_tokens}
        request = Request(str(self.num_asked), prompt, **{**told, **fields})
        completion = self.reference.generate([request])[request.id]
        ids = completion.ids[:-1] if completion.finish is FinishReason.STOP else completion.ids
        before = self.codec.decode(prompt)
        return ids, self.codec.decode([*prompt, *ids])[len(before) :]


@contextlib.contextmanager
def served_with(codec: Codec) -> Iterator[Served]:
    with serving(make_engine(codec), codec) as running:
        yield Served(running, codec, make_engine(codec))
        running.check_idle()


@pytest.fixture(scope="module")
def small(codec: Codec) -> Iterator[Served]:
    """With a small vocabulary, for what does not depend on it."""
    with served_with(codec) as served:
        yield served


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with(Codec.load(smollm2_in(tmp_path_factory))) as served:
        yield served


@pytest.fixture(params=["small", pytest.param("smollm2", marks=needs_smollm2)])
def served(request: pytest.FixtureRequest) -> Served:
    """With a small vocabulary and with SmolLM2's."""
    found: Served = request.getfixturevalue(request.param)
    return found


# --- completions ---


def test_a_completion_is_what_the_engine_says(served: Served) -> None:
    prompt = served.codec.encode(PROMPT)
    ids, text = served.ask(prompt)
    answer = served.client.completions.create(prompt=PROMPT, **GREEDY)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.model) == (text, "length", MODEL)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(ids))
    assert answer.usage.total_tokens == len(prompt) + len(ids)


def test_a_prompt_may_be_text_or_ids_one_or_many(small: Served) -> None:
    other = "A lazy dog"
    ids, other_ids = list(small.codec.encode(PROMPT)), list(small.codec.encode(other))
    texts = [small.ask(tuple(prompt))[1] for prompt in (ids, other_ids)]
    for prompt, expected in (
        ([PROMPT], texts[:1]),
        (ids, texts[:1]),
        ([PROMPT, other], texts),
        ([ids, other_ids], texts),
    ):
        answer = small.client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))


def test_a_seed_gives_each_of_n_choices_again_and_alone(small: Served) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "top_p": 0.95}
    answers = [small.client.completions.create(n=3, seed=7, **body) for _ in range(2)]
    first, second = ([choice.text for choice in answer.choices] for answer in answers)
    assert first == second
    assert len(set(first)) == 3
    alone = small.client.completions.create(seed=8, **body).choices[0].text
    assert alone == first[1]
    assert answers[0].usage is not None
    assert answers[0].usage.prompt_tokens == len(small.codec.encode(PROMPT))
    unseeded = {small.client.completions.create(**body).choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


def test_pieces_of_a_stream_are_the_text_and_usage_comes_last_if_asked_for(served: Served) -> None:
    _, text = served.ask(served.codec.encode(PROMPT))
    chunks = list(
        served.client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in pieces)
    plain = list(served.client.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_choices_of_a_stream_are_told_apart_by_index(small: Served) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "A lazy dog"], "n": 2, "seed": 3, "max_tokens": 6}
    whole = small.client.completions.create(**body)
    texts = dict.fromkeys(range(4), "")
    for chunk in small.client.completions.create(stream=True, **body):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in whole.choices}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_says_the_prompt_first(served: Served, stream: bool) -> None:
    ids = list(served.codec.encode(PROMPT))
    expected = PROMPT + served.ask(tuple(ids))[1]
    for prompt in (PROMPT, ids):
        answer = served.client.completions.create(prompt=prompt, echo=True, stream=stream, **GREEDY)
        if isinstance(answer, openai.Stream):
            assert "".join(chunk.choices[0].text for chunk in answer) == expected
        else:
            assert answer.choices[0].text == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_its_request(served: Served, stream: bool) -> None:
    """Also one that begins in one token and ends in another; the engine computes no further."""
    _, text = served.ask(served.codec.encode(PROMPT), max_tokens=200)
    stop = text[8:12]
    expected = text[: text.index(stop)]
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 200, "stop": ["\u2603 no such thing", stop]}
    answer = served.client.completions.create(stream=stream, **body)
    if isinstance(answer, openai.Stream):
        chunks = list(answer)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        assert answer.usage is not None
        assert answer.usage.completion_tokens < 50
    served.running.check_idle()


def test_a_choice_that_a_stop_string_has_ended_is_not_computed_while_others_go_on(codec: Codec) -> None:
    with serving(make_engine(codec), codec) as running:
        body = {**GREEDY, "prompt": [PROMPT, "A lazy dog"], "max_tokens": 120, "ignore_eos": True}
        first, second = (choice["text"] for choice in running.post("/v1/completions", body).json()["choices"])
        before = running.call(lambda engine: engine.metrics().num_tokens_drawn)
        stop = next(first[at : at + 6] for at in range(3, 40) if first[at : at + 6] not in second)
        choices = running.post("/v1/completions", {**body, "stop": stop}).json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
        running.check_idle()
        assert running.call(lambda engine: engine.metrics().num_tokens_drawn) - before < 200  # of 240


def test_log_probabilities_are_the_engines_and_stand_at_their_text(served: Served) -> None:
    prompt = served.codec.encode(PROMPT)
    request = Request("logprobs", prompt, SamplingParams(temperature=0), max_tokens=6, num_logprobs=3)
    tokens = served.reference.generate([request])["logprobs"].tokens
    answer = served.client.completions.create(prompt=PROMPT, logprobs=3, **{**GREEDY, "max_tokens": 6})
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == [served.codec.name_of(token.id) for token in tokens]
    assert found.token_logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-4)
    assert found.top_logprobs is not None
    for top, token in zip(found.top_logprobs, tokens, strict=True):
        assert top == pytest.approx({served.codec.name_of(id_): value for id_, value in token.top}, abs=1e-4)
        assert len(top) == 3
    assert found.text_offset is not None
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    for offset, name in zip(found.text_offset, found.tokens, strict=True):
        if not name.startswith("bytes:"):
            assert answer.choices[0].text[offset:].startswith(name)


def test_log_probabilities_of_a_stream_are_those_of_the_whole(served: Served) -> None:
    body = {**GREEDY, "prompt": PROMPT, "logprobs": 0}
    whole = served.client.completions.create(**body).choices[0].logprobs
    assert whole is not None
    assert whole.top_logprobs is None
    parts = [chunk.choices[0].logprobs for chunk in served.client.completions.create(stream=True, **body)]
    assert [name for part in parts if part is not None for name in part.tokens or ()] == whole.tokens
    assert [at for part in parts if part is not None for at in part.text_offset or ()] == whole.text_offset


def test_penalties_and_cuts_reach_the_engine(small: Served) -> None:
    prompt = small.codec.encode(PROMPT)
    fields = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.3}
    sampling = SamplingParams(0.7, top_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5, seed=11, **fields)
    _, text = small.ask(prompt, sampling=sampling)
    answer = small.client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=24,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=11,
        extra_body=fields,
    )
    assert answer.choices[0].text == text


def test_a_prompt_that_came_before_is_cached_but_not_for_another_salt(small: Served) -> None:
    prompt = "never said before " * 10

    def cached(**extra: str) -> int:
        answer = small.client.completions.create(prompt=prompt, extra_body=extra, **GREEDY)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() >= 16
    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") >= 16


def test_a_token_that_ends_texts_ends_the_answer_unless_ignored(codec: Codec) -> None:
    """With a small vocabulary, of which it is drawn now and then."""
    prompt, reference = codec.encode(PROMPT), make_engine(codec)
    for seed in range(200):
        request = Request("x", prompt, SamplingParams(1.5, seed=seed), max_tokens=40, stop_tokens=codec.stop_tokens)
        expected = reference.generate([request])["x"]
        if expected.finish is FinishReason.STOP:
            break
    text = codec.decode([*prompt, *expected.ids])[len(PROMPT) :]
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 1.5, "seed": seed, "max_tokens": 40}
    with serving(make_engine(codec), codec) as running:
        client = running.client()
        answer = client.completions.create(**body)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(expected.ids)
        (choice,) = client.completions.create(extra_body={"ignore_eos": True}, **body).choices
        assert choice.finish_reason == "length"
        assert choice.text.startswith(text)


# --- chats ---


def test_a_chat_completes_what_its_template_makes(served: Served) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    prompt = served.codec.encode_chat(messages)
    _, text = served.ask(prompt)
    answer = served.client.chat.completions.create(messages=messages, **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (text, "assistant", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_developer_is_the_system_and_parts_of_text_are_text(small: Served) -> None:
    plain: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nthere"}]
    parts: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
    ]
    first, second = (
        small.client.chat.completions.create(messages=messages, **GREEDY).choices[0].message.content
        for messages in (plain, parts)
    )
    assert first == second


def test_an_answer_sent_back_as_the_client_gives_it_is_understood(small: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    body = {**GREEDY, "max_tokens": 4}
    answer = small.client.chat.completions.create(messages=messages, **body)
    messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    assert small.client.chat.completions.create(messages=messages, **body).choices[0].finish_reason == "length"


def test_a_streamed_chat_names_its_role_and_says_the_same(served: Served) -> None:
    body = {**GREEDY, "messages": [{"role": "user", "content": "Hi"}], "n": 2}
    whole = served.client.chat.completions.create(**body)
    texts, roles, finishes = ["", ""], [], []
    for chunk in served.client.chat.completions.create(stream=True, **body):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.delta.role] if choice.delta.role else []
        finishes += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert (roles, finishes) == (["assistant"] * 2, ["length"] * 2)


def test_bytes_of_a_chats_log_probabilities_are_its_text(served: Served) -> None:
    body = {**GREEDY, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
    choice = served.client.chat.completions.create(**body).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    raw = b"".join(bytes(token.bytes or []) for token in content)
    assert raw.decode(errors="replace") == choice.message.content
    assert [len(token.top_logprobs) for token in content] == [2] * 24
    assert [token.top_logprobs[0].token for token in content] == [token.token for token in content]  # greedy


def test_a_chat_without_max_tokens_goes_on_to_what_fits(small: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    answer = small.client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (MAX_SEQ_LEN, "length")
    short = small.client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=3)
    assert short.usage is not None
    assert short.usage.completion_tokens <= 3


# --- what is refused ---

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
WITH_IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}


@pytest.fixture(scope="module")
def plain(codec: Codec) -> Iterator[Running]:
    with serving(make_engine(codec), codec, max_body_nbytes=100_000, max_choices=16) as running:
        yield running
        running.check_idle()


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "words"),
    [
        (COMPLETIONS, {}, 400, "prompt", "Field required"),
        (COMPLETIONS, {"prompt": "x", "model": None}, 400, "model", "valid string"),
        (COMPLETIONS, {"prompt": "x", "model": "gpt-9"}, 404, "model", "there is no 'gpt-9' here, only 'tiny'"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "at least one token"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": ["x", 1]}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [0, 99_999]}, 400, "prompt", "token ids must be from 0 to"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "token ids must be from 0 to"),
        (COMPLETIONS, {"prompt": [10**400]}, 400, "prompt", "0...0"),  # of which not all is said again
        (COMPLETIONS, {"prompt": "\ud83d"}, 400, "prompt", "surrogate"),
        (COMPLETIONS, {"prompt": "fox " * 300}, 400, "prompt", "are more than the 256 that fit"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 256}, 400, "prompt", "and 256 to generate"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1; found 0"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "9"}, 400, "max_tokens", "valid integer; found '9'"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n", "greater than or equal to 1"),
        (COMPLETIONS, {"prompt": ["x"] * 9, "n": 2}, 400, "n", "at most 16 choices in all, found 18"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p", "greater than 0"),
        (COMPLETIONS, {"prompt": "x", "seed": 2**63}, 400, "seed", "less than"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 1, "echo": True}, 400, "echo", "not both"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a"] * (MAX_STOP_STRINGS + 1)}, 400, "stop", "at most 16 strings"),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, 400, "stop", "of 1 to 256 characters"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix", "only continues a prompt"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, 400, "best_of", "not ranked"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, 400, "stream_options", "only for stream"),
        (COMPLETIONS, {"prompt": "x", "temprature": 1}, 400, "temprature", "no such field"),
        (CHATS, {}, 400, "messages", "Field required"),
        (CHATS, {"messages": []}, 400, "messages", "at least 1 item"),
        (CHATS, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "Field required"),
        (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "'system', 'developer'"),
        (CHATS, WITH_IMAGE, 400, "messages[0].content", "only parts of type 'text' are understood, not 'image_url'"),
        (CHATS, {**HELLO, "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        (CHATS, {**HELLO, "tool_choice": "required"}, 400, "tool_choice", "not supported"),
        (CHATS, {**HELLO, "response_format": {"type": "json_object"}}, 400, "response_format", "only {'type': 'text'}"),
        (CHATS, {**HELLO, "modalities": ["audio"]}, 400, "modalities", "only text"),
        (CHATS, {**HELLO, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs: true"),
        (CHATS, {**HELLO, "max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "differs from"),
        (CHATS, {**HELLO, "max_completion_tokens": 256}, 400, "messages", "and 256 to generate"),
        (CHATS, {"messages": [*HELLO["messages"], {"role": "system", "content": "x"}]}, 400, "messages", "come first"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    plain: Running, path: str, fields: dict[str, Any], status: int, param: str, words: str
) -> None:
    answer = plain.post(path, content=json.dumps({"model": MODEL, **fields}), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"{", JSON, 400, "the body is no JSON"),
        (b"", JSON, 400, "must be a JSON object"),
        (b"[1]", JSON, 400, "must be a JSON object"),
        (b'"x"', JSON, 400, "must be a JSON object"),
        (b"\xff\xfe", JSON, 400, ""),
        (b"[" * 50_000, JSON, 400, ""),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", JSON, 400, ""),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', JSON, 400, "finite number"),
        (b'{"model": "tiny", "prompt": "x", "\\ud83d": 1}', JSON, 400, "a field's name is no Unicode"),
        (b'{"model": "tiny", "prompt": "x"}', {"content-type": "text/plain"}, 400, "must be a JSON object"),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}', JSON, 413, "100000 bytes at most"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_body_that_is_no_request_is_an_error_and_no_failure(
    plain: Running, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    answer = plain.post(COMPLETIONS, content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert words in answer.json()["error"]["message"]


def test_a_body_that_does_not_say_how_long_it_is_is_cut_short_too(plain: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    assert plain.post(COMPLETIONS, content=endless(), headers=JSON).status_code == 413


def test_errors_are_those_that_the_client_knows(plain: Running) -> None:
    client = plain.client()
    with pytest.raises(openai.BadRequestError, match="only continues") as caught:
        client.completions.create(model=MODEL, prompt="x", suffix="y")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="fit") as caught:
        client.completions.create(model=MODEL, prompt="fox " * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="other", prompt="x")
    assert not_found.value.code == "model_not_found"


def test_an_unknown_path_and_a_wrong_method_are_errors_in_the_same_form(plain: Running) -> None:
    assert (plain.post("/v1/embeddings", {}).status_code, plain.get(COMPLETIONS).status_code) == (404, 405)
    assert plain.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("path", "allowed"), [("/health", "GET, HEAD, OPTIONS"), (COMPLETIONS, "OPTIONS, POST")])
def test_what_may_be_done_at_a_path_is_told(plain: Running, path: str, allowed: str) -> None:
    answer = plain.http.options(path)
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, allowed, b"")
    wrong = plain.http.delete(path)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, allowed)


def test_head_is_get_without_a_body(plain: Running) -> None:
    for path, status in (("/health", 200), ("/metrics", 200), ("/v1/models", 200), ("/nowhere", 404), (CHATS, 405)):
        answer = plain.http.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
    assert plain.http.options("/nowhere").status_code == 404


def test_a_model_answers_to_all_of_its_names(codec: Codec) -> None:
    with serving(make_engine(codec), codec, aliases=("runs/tiny",)) as running:
        for name in (MODEL, "runs/tiny"):
            answer = running.post(COMPLETIONS, {**GREEDY, "model": name, "prompt": "x"}).json()
            assert answer["model"] == MODEL
            assert running.get(f"/v1/models/{name}").json()["id"] == MODEL
        assert running.get("/v1/models/runs").status_code == 404


def test_fields_that_say_nothing_of_the_text_are_taken(plain: Running) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": {}}
    for_chats = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert plain.post(COMPLETIONS, {**GREEDY, **harmless, "prompt": "x", "best_of": 1}).status_code == 200
    assert plain.post(CHATS, {**GREEDY, **harmless, **for_chats, **HELLO}).status_code == 200
    nulls = dict.fromkeys(("n", "stop", "seed", "top_p", "stream", "logprobs", "echo", "suffix", "stream_options"))
    assert plain.post(COMPLETIONS, {**GREEDY, **nulls, "prompt": "x"}).status_code == 200


# --- models, health, metrics, keys ---


def test_the_one_model_is_listed_and_found(plain: Running) -> None:
    client = plain.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "yafsdp_like"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health_says_that_it_serves(plain: Running) -> None:
    assert (plain.get("/health").status_code, plain.get("/health").json()) == (200, {"status": "serving"})


def test_metrics_count_what_was_done(codec: Codec) -> None:
    with serving(make_engine(codec), codec) as running:
        body = {**GREEDY, "prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}
        assert running.post(COMPLETIONS, {**body, "n": 2}).status_code == 200
        assert running.post(COMPLETIONS, {**body, "n": 0}).status_code == 400
        assert running.get("/secret").status_code == 404
        numbers = running.numbers()
        assert numbers["yafsdp_like_http_responses_total,/v1/completions,200"] == 1
        assert numbers["yafsdp_like_http_responses_total,/v1/completions,400"] == 1
        assert numbers["yafsdp_like_http_responses_total,none,404"] == 1  # never a path that a client made up
        assert numbers["yafsdp_like_generated_tokens_total"] == 10
        assert numbers["yafsdp_like_prompt_tokens_total"] == len(codec.encode(PROMPT))
        assert numbers["yafsdp_like_finished_total,length"] == 2
        assert numbers["yafsdp_like_time_to_first_token_seconds_count"] == 2
        assert numbers["yafsdp_like_time_between_tokens_seconds_count"] == 8
        assert numbers["yafsdp_like_request_seconds_count"] == 2
        assert numbers["yafsdp_like_engine_num_running"] == 0
        assert numbers["yafsdp_like_engine_num_tokens_drawn"] >= 10


def test_two_servers_of_one_process_count_for_themselves(plain: Running, codec: Codec) -> None:
    """Prevents the default registry of the process, which has room for one."""
    with serving(make_engine(codec), codec) as running:
        assert "yafsdp_like_http_responses_total,/v1/models,200" not in running.numbers()


def test_a_key_is_asked_for_where_there_is_one(codec: Codec) -> None:
    with serving(make_engine(codec), codec, api_key="sésame") as running:
        for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic none"}):
            answer = running.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        known = {"authorization": "Bearer sésame".encode()}
        assert running.get("/v1/models", headers=known).status_code == 200
        assert (running.get("/health").status_code, running.get("/metrics").status_code) == (200, 200)
        with pytest.raises(openai.AuthenticationError):
            running.client().models.list()


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


# --- whatever comes ---

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 1e308, 0.5, -1.5, "", "x", "fox \U0001f642", "\ud83d", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "role", "x"]), inner),
    max_leaves=6,
)
FIELDS = {
    "model": st.sampled_from([MODEL, "other"]),
    "n": st.integers(-1, 4),
    "max_tokens": st.integers(-1, 12),
    "stop": st.sampled_from(["a", ["e", "th"], [], "\n"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "seed": st.integers(-(2**63), 2**63),
    "temperature": st.floats(-0.5, 2.5),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 400),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-3, 3),
    "ignore_eos": st.booleans(),
    "cache_salt": st.text(max_size=3),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "top_logprobs": st.integers(-1, 21),
    "echo": st.booleans(),
    "prompt": st.text(max_size=30)
    | st.lists(st.text(min_size=1, max_size=5), max_size=3)
    | st.lists(st.integers(0, 320), max_size=40),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=9)}
        ),
        max_size=3,
    ),
}
LIKELY = {"model": st.just(MODEL), "n": st.integers(1, 3), "max_tokens": st.integers(1, 8)}


def bodies(needed: str, unlikely: str) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly such as could be sent by someone, with a field or two that could not."""
    optional = {name: values for name, values in FIELDS.items() if name not in (needed, unlikely, *LIKELY)}
    sound = st.fixed_dictionaries({**LIKELY, needed: FIELDS[needed]}, optional=optional)
    odd = st.dictionaries(st.sampled_from([*FIELDS, "suffix", "tools", "logit_bias", "zzz"]), VALUES, max_size=1)
    return st.builds(lambda body, more: {**body, **more}, sound, odd)


STATUSES = {200, 400, 404}


# The same few in every run; many others for `make test-all`.
FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=400, derandomize=False)


@FEW
@given(body=bodies("prompt", "messages") | VALUES)
def test_no_body_of_a_completion_breaks_the_server(plain: Running, body: Any) -> None:
    check_answer(plain, COMPLETIONS, body)


@FEW
@given(body=bodies("messages", "prompt") | VALUES)
def test_no_body_of_a_chat_breaks_the_server(plain: Running, body: Any) -> None:
    check_answer(plain, CHATS, body)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("path", "fields"), [(COMPLETIONS, ("prompt", "messages")), (CHATS, ("messages", "prompt"))])
def test_many_bodies_do_not_either(plain: Running, path: str, fields: tuple[str, str]) -> None:
    MANY(given(body=bodies(*fields) | VALUES)(lambda body: check_answer(plain, path, body)))()


def check_answer(running: Running, path: str, body: Any) -> None:
    """An answer or an error that says which field; never a failure, and nothing is left behind."""
    answer = running.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code in STATUSES, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif body.get("stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        assert all("error" not in json.loads(line) for line in lines[:-1])
    else:
        prompts = body.get("prompt", "")
        num_prompts = len(prompts) if isinstance(prompts, list) and isinstance(prompts[0], str) else 1
        assert len(answer.json()["choices"]) == num_prompts * (body["n"] or 1)
    running.check_idle()


# --- the service alone ---


def requests(count: int, **fields: Any) -> list[Request]:
    told = {"max_tokens": 3, "sampling": SamplingParams(temperature=0), **fields}
    return [Request(f"r{number}", (1, 2, 3 + number), **told) for number in range(count)]


async def drawn(stream: Stream) -> dict[str, int]:
    """Tokens by request."""
    counts: dict[str, int] = {}
    async for event in stream:
        counts[event.request_id] = counts.get(event.request_id, 0) + len(event.tokens)
    return counts


def run(engine: Any, main: Callable[[Service[Any]], Any]) -> None:
    """`main` with a started service, which is closed and empty after it."""

    async def whole() -> None:
        service = Service(engine)
        await service.start()
        try:
            await asyncio.wait_for(main(service), SECONDS)
        finally:
            await service.close()
        assert service.num_requests == 0

    asyncio.run(whole())


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
        with pytest.raises(QueueFull):
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
        with pytest.raises(Unavailable, match="draining"):
            await service.open(requests(1))

    run(make_engine(codec), main)


def test_a_closed_service_answers_that_it_is_closed(codec: Codec) -> None:
    async def main() -> None:
        service = Service(make_engine(codec))
        await service.start()
        await service.close()
        await service.close()
        assert service.state is ServiceState.CLOSED
        with pytest.raises(Unavailable, match="closed"):
            await service.open(requests(1))
        with pytest.raises(Unavailable):
            await service.call(lambda engine: engine.metrics())

    asyncio.run(main())


def test_a_call_gives_what_the_function_raises_and_the_service_goes_on(codec: Codec) -> None:
    async def main(service: Service[Any]) -> None:
        with pytest.raises(ZeroDivisionError):
            await service.call(lambda engine: 1 / 0)
        assert await drawn(await service.open(requests(1))) == {"r0": 3}

    run(make_engine(codec), main)
