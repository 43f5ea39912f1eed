"""Tokens that are written straight to a connection: the same answers as through ASGI, and the same care for clients."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Request, Response
from starlette.middleware.base import RequestResponseEndpoint

from tests.inference.http.servers import (
    CHATS,
    COMPLETIONS,
    GREEDY,
    MAX_SEQ_LEN,
    MODEL,
    PROMPT,
    Running,
    Slow,
    make_engine,
    serving,
    serving_app,
)
from yafsdp_like.inference.engine.request import FinishReason, RequestOutput, Token
from yafsdp_like.inference.http.direct import ChunkWriter
from yafsdp_like.inference.http.protocol import ServerOptions
from yafsdp_like.inference.http.server import create_app
from yafsdp_like.inference.http.service import Service
from yafsdp_like.inference.http.stream import Stream
from yafsdp_like.inference.text.codec import Codec, Transcript, Wording

CHAT = [{"role": "user", "content": PROMPT}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {"prompt": PROMPT}),
    "two choices with usage": (COMPLETIONS, {"prompt": PROMPT, "n": 2, "stream_options": {"include_usage": True}}),
    "echo": (COMPLETIONS, {"prompt": PROMPT, "echo": True}),
    "chat": (CHATS, {"messages": CHAT}),
    "stop string": (COMPLETIONS, {"prompt": PROMPT, "stop": ["never to be said"]}),
    "log-probabilities": (COMPLETIONS, {"prompt": PROMPT, "logprobs": 1}),
    "ids": (CHATS, {"messages": CHAT, "return_token_ids": True}),
}
LONG_WAY = {"stop string", "log-probabilities", "ids"}


@pytest.fixture(scope="module")
def running(codec: Codec) -> Iterator[Running]:
    with serving(Slow(make_engine(codec)), codec) as running:
        yield running


def answer(running: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a stream, less what no two answers share, those of a choice together."""
    response = running.post(path, {**GREEDY, "max_tokens": 12, "ignore_eos": True, "stream": True, **body})
    *lines, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len({(event.pop("id"), event.pop("created")) for event in events}) == 1
    return sorted(events, key=lambda event: event["choices"][0]["index"] if event["choices"] else 9)


@pytest.mark.parametrize("name", BODIES)
def test_events_are_those_of_the_long_way(running: Running, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, body = BODIES[name]
    written = list[bytes]()

    def write(writer: ChunkWriter, data: bytes, write: Any = ChunkWriter.write) -> None:
        written.append(data)
        write(writer, data)

    monkeypatch.setattr(ChunkWriter, "write", write)
    direct = answer(running, path, body)
    assert bool(written) == (name not in LONG_WAY)
    monkeypatch.setattr(ChunkWriter, "of", lambda *_: None)
    num_written = len(written)
    # A busy machine may read two tokens at once the long way, in one event: not every time.
    assert any(answer(running, path, body) == direct for _ in range(4))
    assert len(written) == num_written


def test_middleware_of_others_gets_every_line(running: Running, monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    """Prevents: tokens that are on the wire before the status, which such a layer still keeps."""

    def text(running: Running) -> str:  # in as many pieces as there may be
        return "".join(event["choices"][0]["text"] for event in answer(running, *BODIES["completion"]))

    wanted = text(running)
    monkeypatch.setattr(ChunkWriter, "write", lambda *_: pytest.fail("a line has gone past the middleware"))
    engine = Slow(make_engine(codec))
    service: Service[Any] = Service(engine)
    options = ServerOptions(model_name=MODEL, vocab_size=engine.config.vocab_size, max_seq_len=MAX_SEQ_LEN)
    app = create_app(service, codec, options)

    @app.middleware("http")
    async def keep_for_a_while(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        await asyncio.sleep(0.1)  # five steps
        return response

    with serving_app(service, engine, app) as other:
        assert text(other) == wanted
        other.check_idle()


class Transport:
    """Of a client that may leave."""

    def __init__(self) -> None:
        self.written, self.has_left = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.has_left


class Cycle:
    """What uvicorn's ``send`` is a method of."""

    def __init__(self) -> None:
        self.transport, self.flow = Transport(), self
        self.write_paused = False

    async def send(self, message: Any) -> None:
        raise NotImplementedError


def test_chunks_are_written_while_a_client_is_there_and_takes_them() -> None:
    cycle, scope = Cycle(), {"http_version": "1.1", "method": "POST"}
    writer = ChunkWriter.of(scope, cycle.send)
    assert writer is not None
    assert writer.is_ready
    writer.write(b"x" * 17)
    assert cycle.transport.written == b"11\r\n" + b"x" * 17 + b"\r\n"
    cycle.write_paused = True
    assert not writer.is_ready
    cycle.write_paused, cycle.transport.has_left = False, True
    assert not writer.is_ready


@pytest.mark.parametrize("scope", [{"http_version": "1.0"}, {"method": "HEAD"}])
def test_bodies_without_chunks_go_the_long_way(scope: dict[str, str]) -> None:
    scope = {"http_version": "1.1", "method": "POST", **scope}
    assert ChunkWriter.of(scope, Cycle().send) is None


async def foreign_send(message: Any) -> None:
    raise NotImplementedError


def test_servers_that_are_not_known_are_sent_all_through_asgi() -> None:
    assert ChunkWriter.of({"http_version": "1.1", "method": "POST"}, foreign_send) is None


def test_only_a_reader_that_waits_is_passed_by() -> None:
    """Prevents: a token that overtakes those which its reader has not written yet."""

    async def main() -> None:
        taken = list[int]()

        def take(request_id: str, output: RequestOutput) -> bool:
            taken.extend(token.id for token in output.tokens)
            return output.finish is None

        def tell(token: int, finish: FinishReason | None = None) -> None:
            output = RequestOutput("a", (Token(token),), finish)
            if not stream.pass_on("a", output):
                stream.put(output)

        stream = Stream({"a": "0:a"}, lambda name: None)
        stream.sink = take
        tell(1)
        assert [token.id for token in (await anext(stream)).tokens] == [1]
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        tell(2)
        tell(3)
        assert not reading.done()
        tell(4, FinishReason.LENGTH)
        tell(5)  # the reader is awake now, though it has not had its turn
        assert [token.id for token in (await reading).tokens] == [4, 5]
        assert taken == [2, 3, 4]

    asyncio.run(main())


def test_what_a_sink_raises_the_reader_raises_and_reads_nothing_of_what_comes_after_it() -> None:
    """Prevents: an answer that lacks a token, of a step that was over before the reader had its turn."""

    async def main() -> None:
        def take(request_id: str, output: RequestOutput) -> bool:
            raise ZeroDivisionError("planted")

        stream = Stream({"a": "0:a"}, lambda name: None)
        stream.sink = take
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        assert stream.pass_on("a", RequestOutput("a", (Token(1),)))
        stream.put(RequestOutput("a", (Token(2),)))
        with pytest.raises(ZeroDivisionError, match="planted"):
            await reading

    asyncio.run(main())


def test_text_without_pieces_is_the_same_and_pieces_may_follow(codec: Codec) -> None:
    ids = [*codec.encode("Zwölf 🦊🦊 jagen  \n den 猫, mit\t\u200d Mühe."), 0, *codec.encode(" Ende")]
    for split in range(len(ids)):
        whole, plain = (Transcript(codec, (), Wording()) for _ in range(2))
        text = "".join(whole.push(RequestOutput("a", (Token(token),))).text for token in ids)
        said = plain.push_text([Token(token) for token in ids[:split]])
        said += "".join(plain.push(RequestOutput("a", (Token(token),))).text for token in ids[split:])
        end = RequestOutput("a", (), FinishReason.LENGTH)
        assert said + plain.push(end).text == text + whole.push(end).text
        assert plain.num_tokens == whole.num_tokens == len(ids)
    assert not Transcript(codec, (), Wording(stop_strings=("x",))).is_plain
