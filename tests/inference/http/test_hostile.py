"""Hostile clients slow nobody's stream: what they cause runs neither in the engine's thread nor on the event loop.

How long others wait is measured by a slow test of test_bodies.py; here no clock decides.
"""

from __future__ import annotations

import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import BufferingHandler
from typing import TYPE_CHECKING, Any

import pytest

from tests.inference.http.servers import CHATS, COMPLETIONS, GREEDY, MODEL, SECONDS, make_engine, serving
from yafsdp_like.inference.http import body_pool
from yafsdp_like.inference.text import chat as chat_of
from yafsdp_like.inference.text import codec as codec_of
from yafsdp_like.inference.text.grammar import Grammars

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.inference.http.servers import Running
    from yafsdp_like.inference.text.codec import Codec

SAID = [{"role": "user", "content": "Hi"}]
LONG: dict[str, Any] = {"prompt": "x", "metadata": "x" * 2 * body_pool.SHORT_COST}  # goes the way of long bodies
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "a prompt": (COMPLETIONS, {"prompt": "x"}),
    "a long body": (COMPLETIONS, LONG),
    "a chat": (CHATS, {"messages": SAID}),
    "bad words": (COMPLETIONS, {"prompt": [1], "bad_words": ["x"] * 200}),
    "a schema": (COMPLETIONS, {"prompt": [1], "guided_json": {"type": "integer"}}),
    "a regular expression": (COMPLETIONS, {"prompt": [1], "guided_regex": "a"}),
    "what is to be embedded": ("/v1/embeddings", {"input": "x"}),
    "tokens": ("/tokenize", {"prompt": "x"}),
}


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[], None]) -> None:
    """Have something called in each thread that cuts a text into tokens, or makes a grammar of one."""

    def seen(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            see()
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(codec_of, "tokenize", seen(codec_of.tokenize))
    monkeypatch.setattr(chat_of, "tokenize", seen(chat_of.tokenize))
    monkeypatch.setattr(Grammars, "_make", seen(Grammars._make))


@pytest.fixture(scope="module")
def running(codec: Codec) -> Iterator[Running]:
    with serving(make_engine(codec), codec) as running:
        yield running


@pytest.mark.parametrize("name", ATTACKS)
def test_a_stream_goes_on_to_its_end_while_what_another_sent_is_being_read(
    running: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a stream that stands still until somebody else's text is cut into tokens."""
    if name in ("a schema", "a regular expression"):
        pytest.importorskip("llguidance")
    began, may_end, threads = threading.Event(), threading.Event(), set[int]()

    def see() -> None:
        threads.add(threading.get_ident())
        began.set()
        assert may_end.wait(SECONDS)

    path, fields = ATTACKS[name]
    with ThreadPoolExecutor(1) as attacker:
        watch(monkeypatch, see)
        asked = attacker.submit(running.post, path, {"model": MODEL, **fields})
        try:
            assert began.wait(SECONDS)
            body = {**GREEDY, "prompt": [1, 2, 3], "stream": True, "ignore_eos": True}
            with running.http.stream("POST", COMPLETIONS, json=body, timeout=SECONDS) as answer:
                assert list(answer.iter_lines())[-2] == "data: [DONE]"
            assert not asked.done()
        finally:
            may_end.set()
        assert asked.result(SECONDS).status_code == 200
        running.check_idle()
        others = {running.call(lambda _: threading.get_ident()), threading.get_ident()}
        assert threads and not threads & others


def test_as_many_long_bodies_as_may_wait_keep_no_short_one_waiting(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: attackers that fill the only queue."""
    began, may_end = threading.Event(), threading.Event()

    def see() -> None:
        if threading.current_thread().name.startswith("long bodies"):
            began.set()
            assert may_end.wait(SECONDS)

    with ThreadPoolExecutor(20) as attackers:
        watch(monkeypatch, see)
        asked = [attackers.submit(running.post, COMPLETIONS, {"model": MODEL, **LONG}) for _ in range(20)]
        try:
            assert began.wait(SECONDS)
            assert running.post(COMPLETIONS, {**GREEDY, "prompt": "x"}).status_code == 200
            assert running.get("/health").status_code == 200
        finally:
            may_end.set()
        assert {each.result(SECONDS).status_code for each in asked} <= {200, 429}
        running.check_idle()


def test_a_body_that_breaks_http_is_refused_without_a_traceback_in_the_log(running: Running) -> None:
    """Prevents: a hundred lines in the log for each such request, since the route's answer comes after uvicorn's."""
    host, port = running.url.removeprefix("http://").split(":")
    records = BufferingHandler(capacity=100)
    log = logging.getLogger("uvicorn.error")
    log.addHandler(records)
    try:
        with socket.create_connection((host, int(port)), timeout=SECONDS) as client:
            client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
            with client.makefile("rb") as answer:
                assert answer.read().startswith(b"HTTP/1.1 400 ")
        assert running.get("/health").status_code == 200
    finally:
        log.removeHandler(records)
    assert not [record for record in records.buffer if record.exc_info]
