"""Bodies that cost more than they may: refused before the work is done, one at a time, while others are answered."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import pytest

from launch.server import serving_switches
from tests.inference.http.servers import (
    CHATS,
    COMPLETIONS,
    GREEDY,
    JSON,
    MODEL,
    SECONDS,
    Running,
    Slow,
    make_engine,
    serving,
)
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.http import body_limits, body_pool, server
from yafsdp_like.inference.http.body_limits import BodyLimits
from yafsdp_like.inference.http.body_pool import BodyReaderPool, ReaderBusyError
from yafsdp_like.inference.http.errors import ApiError
from yafsdp_like.inference.text import chat as chat_of
from yafsdp_like.inference.text import codec as codec_of
from yafsdp_like.inference.text.codec import Codec

MIB = 2**20


@pytest.fixture(scope="module")
def running(codec: Codec) -> Iterator[Running]:
    with serving(make_engine(codec), codec) as running:
        yield running
        running.check_idle()


# --- what is refused ---


def text(length: int) -> str:
    return "a b " * (length // 4)


def chat(messages: Any) -> dict[str, Any]:
    return {"messages": messages}


def said(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


COSTLY: dict[str, tuple[str, Callable[[], dict[str, Any]], str | None]] = {
    "a long prompt": (COMPLETIONS, lambda: {"prompt": text(900_000)}, "prompt"),
    "one long prompt of some": (COMPLETIONS, lambda: {"prompt": ["x", text(900_000)]}, "prompt"),
    "no spaces": (COMPLETIONS, lambda: {"prompt": "a" * 900_000}, "prompt"),
    "many ids": (COMPLETIONS, lambda: {"prompt": [1] * 60_000}, "prompt"),
    "many lists of ids": (COMPLETIONS, lambda: {"prompt": [[1] * 300] * 100}, "prompt"),
    "many prompts": (COMPLETIONS, lambda: {"prompt": ["x"] * 60_000}, "n"),
    "a long message": (CHATS, lambda: chat([said(text(900_000))]), "messages"),
    "long messages": (CHATS, lambda: chat([said(text(9_000))] * 100), "messages"),
    "many messages": (CHATS, lambda: chat([said("x")] * 10_000), "messages"),
    "more messages than tokens fit": (CHATS, lambda: chat([said("x")] * 1_500), "messages"),
    "many parts": (CHATS, lambda: chat([said([{"type": "text", "text": "x"}] * 10_000)]), "messages"),
    "a long part": (CHATS, lambda: chat([said([{"type": "text", "text": text(900_000)}])]), "messages"),
    "a very long prompt": (COMPLETIONS, lambda: {"prompt": text(6_000_000)}, None),
    "millions of ids": (COMPLETIONS, lambda: {"prompt": [1] * 4_000_000}, None),
    "100,000 messages": (CHATS, lambda: chat([said("x")] * 100_000), None),
    "100,000 numbers": (COMPLETIONS, lambda: {"prompt": "x", "metadata": [1] * 120_000}, ""),
    "100,000 lists": (COMPLETIONS, lambda: {"prompt": [[]] * 100_000}, ""),
    "thousands of fields": (COMPLETIONS, lambda: {f"f{number}": 1 for number in range(30_000)}, ""),
    "biases": (COMPLETIONS, lambda: {"prompt": "x", "logit_bias": {str(n): 1 for n in range(30_000)}}, "logit_bias"),
    "stops": (COMPLETIONS, lambda: {"prompt": "x", "stop": ["a"] * 60_000}, "stop"),
    "a long stop": (COMPLETIONS, lambda: {"prompt": "x", "stop": "a" * 900_000}, "stop"),
    "a long name": (COMPLETIONS, lambda: {"prompt": "x", "model": "\u2603" * 100_000}, "model"),
    "a long field": (COMPLETIONS, lambda: {"prompt": "x", "suffix": [["y"] * 100] * 500}, "suffix"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_could_never_be_served_is_refused_before_the_work(
    running: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is cut into tokens or rendered; the words are short."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("it has been cut into tokens")

    for method in ("encode", "encode_chat", "decode"):
        monkeypatch.setattr(Codec, method, never)
    path, fields, param = COSTLY[name]
    answer = running.post(path, content=json.dumps({"model": MODEL, **fields()}), headers=JSON)
    error = answer.json()["error"]
    status = 413 if param is None else 404 if name == "a long name" else 400
    assert (answer.status_code, error["param"]) == (status, param or None)
    assert len(error["message"]) < 300


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
@pytest.mark.parametrize(("unit", "most"), [("The quick brown fox. ", 0), ("a,1;", 40_000)])
def test_a_long_text_is_refused_before_all_of_it_is_cut_into_tokens(
    running: Running, path: str, unit: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tokenizer whose longest token says little about how much fits: words are counted, and parts are cut."""
    lengths, encode = list[int](), codec_of.tokenize

    def counting(model: Any, text: str, *more: Any, **named: Any) -> list[int]:
        lengths.append(len(text))
        return encode(model, text, *more, **named)

    monkeypatch.setattr(BodyLimits, "_check_length", lambda *_: None)
    monkeypatch.setattr(codec_of, "tokenize", counting)
    monkeypatch.setattr(chat_of, "tokenize", counting)
    hostile = unit * (800_000 // len(unit))
    asked = {"prompt": hostile} if path == COMPLETIONS else chat([said(hostile[:4_000])] * 200)
    answer = running.post(path, {"model": MODEL, **asked})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert sum(lengths) <= most


@pytest.mark.parametrize("text", ["a b  c\nd e", " a", "", "x y" * 100, "1 2 3", "\u0120a b"])
def test_a_text_has_at_least_as_many_tokens_as_words_behind_spaces(codec: Codec, text: str) -> None:
    assert codec._parts_words
    assert codec.min_tokens(text) <= len(codec.encode(text, add_special_tokens=False))


def test_words_of_a_tokenizer_whose_tokens_span_two_are_not_counted(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "of course"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = Codec.load(tmp_path)
    assert len(found.encode("of course", add_special_tokens=False)) == 1
    assert found.min_tokens("of course of course") == 0


def test_as_much_as_fits_is_served_however_it_is_written(running: Running, codec: Codec) -> None:
    ids = [5] * 255
    longest = max((codec.decode([token]) for token in range(codec.vocab_size)), key=len)
    for path, fields in (
        (COMPLETIONS, {"prompt": ids}),
        (COMPLETIONS, {"prompt": [[5] * 200] * 64}),
        (COMPLETIONS, {"prompt": longest * 100}),
        (COMPLETIONS, {"prompt": "," * 30 + '["{' * 30 + "\\" * 30}),
        (CHATS, chat([said("x"), {"role": "assistant", "content": "y"}] * 8 + [said("x")])),
    ):
        answer = running.post(path, {**GREEDY, "max_tokens": 1, **fields})
        assert answer.status_code == 200, answer.text


def test_an_echo_is_bounded_with_all_of_its_choices(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yafsdp_like.inference.http.protocol.MAX_ECHOED_CHARACTERS", 100)
    body = {**GREEDY, "max_tokens": 1, "prompt": "The quick brown fox", "echo": True}
    assert running.post(COMPLETIONS, {**body, "n": 5}).status_code == 200
    assert running.post(COMPLETIONS, {**body, "n": 6}).json()["error"]["param"] == "echo"


@pytest.mark.parametrize(
    ("raw", "is_refused"),
    [
        (b'{"a": [%s1]}' % (b"1," * 99), False),
        (b'{"a": [%s1]}' % (b"1," * 101), True),
        (b'{"a": "%s"}' % (b"1," * 5000), False),  # in a string
        (b'{"a": "\\"%s"}' % (b"1," * 5000), False),  # after a quote in a string
        (b'{"a": "\\\\", "b": [%s1]}' % (b"1," * 101), True),  # after a string that ends with a backslash
        (b'{"a": "\\\\\\"", "b": "%s"}' % (b"1," * 101), False),
        (b'{"a": "[{%s"}' % (b"[" * 5000), False),
        (b'{"a": [%s]}' % b",".join([b'"x"'] * 102), True),
        (b'{"a": [%s]}' % b",".join([b'"x,y"'] * 60), False),
    ],
    ids=range(9),
)
def test_values_are_counted_outside_of_strings(raw: bytes, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "MAX_VALUES", 100)
    monkeypatch.setattr(body_limits, "MIN_VALUES", 0)
    monkeypatch.setattr(body_limits, "MAX_CONTAINERS", 20)
    limits = BodyLimits(max_seq_len=10, max_choices=20, max_characters=100)
    if is_refused:
        with pytest.raises(ApiError, match="the body: at most"):
            limits.parse(raw)
    else:
        assert limits.parse(raw) == json.loads(raw)


def test_what_bodies_look_like_is_told(running: Running) -> None:
    told = running.get("/openapi.json").json()
    body = told["paths"][COMPLETIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].split("/")[-1] in told["components"]["schemas"]


# --- who waits for whom ---


def test_long_bodies_wait_for_each_other_and_short_ones_for_none(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only so many of them wait."""
    monkeypatch.setattr(body_pool, "MAX_LONG_BODIES", 2)
    may_end, encode = threading.Event(), codec.encode

    def encode_slowly(text: str) -> tuple[int, ...]:
        assert text == "x" or may_end.wait(SECONDS)
        return encode(text)

    monkeypatch.setattr(codec, "encode", encode_slowly)
    long = {**GREEDY, "prompt": "long", "max_tokens": 1, "metadata": "m" * 2 * body_pool.SHORT_COST}
    short = {**GREEDY, "prompt": "x", "max_tokens": 1}
    with serving(make_engine(codec), codec) as running, ThreadPoolExecutor(4) as pool:
        try:
            asked = [pool.submit(running.post, COMPLETIONS, long) for _ in range(3)]
            refused = next(future for future in iter_done(asked))
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"] == "1"
            assert running.post(COMPLETIONS, short).status_code == 200
            assert running.get("/health", timeout=5).status_code == 200
        finally:
            may_end.set()
        assert sorted(future.result(SECONDS).status_code for future in asked) == [200, 200, 429]


def test_who_leaves_does_not_keep_others_waiting(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long body that is not read yet is not read for nobody."""
    may_end, read, encode = threading.Event(), list[str](), codec.encode

    def encode_slowly(text: str) -> tuple[int, ...]:
        read.append(text)
        assert may_end.wait(SECONDS)
        return encode(text)

    monkeypatch.setattr(codec, "encode", encode_slowly)
    long = {**GREEDY, "max_tokens": 1, "metadata": "m" * 2 * body_pool.SHORT_COST}
    with serving(make_engine(codec), codec) as running, ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(running.post, COMPLETIONS, {**long, "prompt": "first"})
            while not read:
                time.sleep(0.01)
            with pytest.raises(httpx.ReadTimeout):
                running.post(COMPLETIONS, {**long, "prompt": "second"}, timeout=0.5)
            while running.numbers()["yafsdp_like_http_responses_total,/v1/completions,499"] < 1:
                time.sleep(0.01)
            third = pool.submit(running.post, COMPLETIONS, {**long, "prompt": "third"})
        finally:
            may_end.set()
        assert (first.result(SECONDS).status_code, third.result(SECONDS).status_code) == (200, 200)
        assert read == ["first", "third"]


def iter_done(futures: list[Any]) -> Iterator[Any]:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        yield from (future.result() for future in futures if future.done())
        time.sleep(0.01)


def test_bytes_of_long_bodies_are_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_pool, "MAX_RESERVED_NBYTES", 100)
    at_work = BodyReaderPool()
    with at_work.reserve() as first, at_work.reserve() as second:
        first.add(body_pool.SHORT_COST)
        first.add(60)
        second.add(body_pool.SHORT_COST + 40)
        with at_work.reserve() as third:
            third.add(body_pool.SHORT_COST)
            with pytest.raises(ReaderBusyError):
                third.add(1)
        assert at_work.num_reserved_nbytes == 100
    assert at_work.num_reserved_nbytes == 0
    at_work.close()


def test_bodies_with_images_keep_no_text_waiting_nor_hosts_those_that_show_theirs() -> None:
    """Prevents: two requests with a host that does not answer, and no other completion is read."""
    may_end = threading.Event()
    shown = b'{"type": "image_url", "url": "data:' + b"x" * 2 * body_pool.SHORT_COST

    async def main() -> None:
        at_work = BodyReaderPool(takes_images=True)
        fetched = [b'{"type": "image_url"}', b'{"type": "\\u0069mage\\u005Furl"}'] * 10
        waiting = [asyncio.create_task(at_work.read(raw, lambda: may_end.wait(SECONDS))) for raw in fetched]
        try:
            async with asyncio.timeout(SECONDS):
                await asyncio.sleep(0)
                assert await at_work.read(b'{"prompt": "an \\"image_url\\""}', lambda: "short") == "short"
                many = [at_work.read(shown, lambda: "shown") for _ in range(2 * body_pool.MAX_LONG_BODIES)]
                assert set(await asyncio.gather(*many)) == {"shown"}
        finally:
            may_end.set()
        assert all(await asyncio.gather(*waiting))
        at_work.close()

    asyncio.run(main())


def test_a_lane_for_long_bodies_rests_as_long_as_it_works() -> None:
    async def main() -> None:
        at_work, raw = BodyReaderPool(), b" " * 2 * body_pool.SHORT_COST
        began = time.monotonic()
        for _ in range(2):
            await at_work.read(raw, lambda: time.sleep(0.1))
        assert time.monotonic() - began >= 0.3
        with pytest.raises(ZeroDivisionError):
            await at_work.read(raw, lambda: 1 / 0)
        assert at_work._long._num_waiting == 0
        at_work.close()

    asyncio.run(main())


def test_a_lane_for_long_bodies_rests_longer_after_one_that_is_refused() -> None:
    def refuse() -> None:
        time.sleep(0.05)
        raise ApiError(400, "too long")

    async def main() -> None:
        at_work, raw = BodyReaderPool(), b" " * 2 * body_pool.SHORT_COST
        with pytest.raises(ApiError, match="too long"):
            await at_work.read(raw, refuse)
        refused = time.monotonic()
        await at_work.read(b"{}", lambda: None)
        assert time.monotonic() - refused < 0.4  # short ones do not wait
        await at_work.read(raw, lambda: None)
        assert time.monotonic() - refused >= 0.4
        at_work.close()

    asyncio.run(main())


def test_a_body_that_does_not_come_to_its_end_is_not_waited_for(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_S", 0.2)
    with serving(make_engine(codec), codec) as running:
        address = running.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=SECONDS) as slow:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            slow.sendall(f'{head}content-length: 100\r\n\r\n{{"model":'.encode())
            answer = b""
            while part := slow.recv(4096):  # to the end of the connection
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body has not come within" in answer


# --- other people's tokens ---


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_the_interpreter_is_free_while_a_text_is_cut_into_tokens(codec: Codec, path: str) -> None:
    """Prevents: a thread of its own that nobody else can run beside."""
    long, ends = text(800_000), list[float]()

    def cut() -> None:
        if path == COMPLETIONS:
            codec.encode(long)
        else:
            codec.encode_chat([said(long)])
        ends.append(time.monotonic())

    thread = threading.Thread(target=cut)
    began = last = time.monotonic()
    longest = 0.0
    thread.start()
    while not ends:
        time.sleep(0.002)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    thread.join()
    assert longest < 0.5 * (ends[0] - began)


ATTACK = """
import http.client, json, os, sys
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
host, path = sys.argv[1], sys.argv[2]
said = {"role": "user", "content": "x"}
bodies = [
    (path + "completions", {"prompt": "a b " * 1_500_000}),
    (path + "completions", {"prompt": "a b " * 200_000}),
    (path + "chat/completions", {"messages": [said] * 100_000}),
    (path + "chat/completions", {"messages": [said] * 1_500}),
    (path + "completions", {"prompt": [1] * 300_000}),
]
sent = [(path, json.dumps({"model": "tiny", **body})) for path, body in bodies]
print("ready", flush=True)
while True:
    for path, body in sent:
        connection = http.client.HTTPConnection(host, timeout=30)
        try:
            connection.request("POST", path, body, {"content-type": "application/json"})
            assert connection.getresponse().status in (400, 413, 429)
            print("refused", flush=True)
        except ConnectionError:
            pass  # it has been closed
        finally:
            connection.close()
"""


@contextlib.contextmanager
def attackers_of(running: Running, count: int, least: int) -> Iterator[Callable[[signal.Signals], None]]:
    """Processes that ask for what could never be served, again and again, while the signal they got last is SIGCONT.

    ``least``: bodies of each that must have been refused at the end.
    """
    command = [sys.executable, "-c", ATTACK, running.url.removeprefix("http://"), "/v1/"]
    attackers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]

    def tell(what: signal.Signals) -> None:
        for attacker in attackers:
            attacker.send_signal(what)
        time.sleep(0.3)  # what has been sent is refused meanwhile

    try:
        for attacker in attackers:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == b"ready\n"
        yield tell
        assert [attacker.poll() for attacker in attackers] == [None] * count  # each answer was a refusal
    finally:
        for attacker in attackers:
            attacker.kill()
        refused = [attacker.communicate()[0].count(b"refused") for attacker in attackers]
    assert min(refused) >= least


@contextlib.contextmanager
def before_all_others() -> Iterator[None]:
    """This thread, and those that it starts, get a core whenever they want one; skips where that is not allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        pytest.skip("needs root, or `ulimit -r 1`: else the attackers' own use of the cores would be measured")
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def gaps(running: Running) -> list[float]:
    """Seconds between tokens of somebody else."""
    times = []
    body = {**GREEDY, "prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with running.http.stream("POST", COMPLETIONS, json=body) as answer:
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
    return [after - before for before, after in pairwise(times[1:])]


def test_an_ordinary_request_does_not_wait_for_what_is_never_served(codec: Codec) -> None:
    """Prevents: 52 seconds, of eight prompts of 6 MB."""
    body = json.dumps({"model": MODEL, "prompt": text(6_000_000)})
    with serving(make_engine(codec), codec) as running, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(running.post, COMPLETIONS, content=body, headers=JSON) for _ in range(8)]
        began = time.monotonic()
        assert running.post(COMPLETIONS, {**GREEDY, "prompt": "x", "max_tokens": 2}).status_code == 200
        assert running.get("/health").status_code == 200
        assert time.monotonic() - began < 10
        assert {future.result(SECONDS).status_code for future in asked} <= {400, 413, 429}


@pytest.mark.slow
def test_time_between_tokens_of_others_stays_what_it_was(codec: Codec) -> None:
    """At most 1.2 times as long, for the median token and the mean: the median of pairs of streams, without and with.

    Counted, on the client's clock: all that the server does about the attackers' bodies, on any thread, with the turns
    of threads that launch.serve sets. Not counted: the cores that the attackers themselves use, nor anybody else on the
    machine, which the server goes before; with its client, it would not get them where it shares them.
    """
    medians, means = list[float](), list[float]()
    with before_all_others(), serving_switches(), serving(Slow(make_engine(codec)), codec) as running:
        gaps(running)
        with attackers_of(running, count=2, least=50) as tell:
            for _ in range(5):
                tell(signal.SIGSTOP)
                alone = gaps(running)
                tell(signal.SIGCONT)
                attacked = gaps(running)
                medians.append(median(attacked) / median(alone))
                means.append(mean(attacked) / mean(alone))
    assert median(medians) <= 1.2, medians
    assert median(means) <= 1.2, means
