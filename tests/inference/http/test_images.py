"""Images over HTTP: what transformers draws for them, however they come, and one clear error for what is none."""

import base64
import contextlib
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.inference import load_images
from tests.inference.http.servers import CHATS, MODEL, Running, serving_app
from tests.llava import NUM_ROWS, SIDE, greedy_of, save_chatting_llava
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.content_parts import image_bytes
from yafsdp_like.inference.http.options import HttpOptions
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.http.server import create_catalog_app
from yafsdp_like.inference.http.service import Service
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.image_reader import ImageReader
from yafsdp_like.inference.weights.loading import open_model

pytest.importorskip("transformers")
Picture = pytest.importorskip("PIL.Image")

MAX_SEQ_LEN = 128


def picture(seed: int, width: int = 24, height: int = 20, kind: str = "PNG") -> bytes:
    """An image of random colours, encoded."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    written = io.BytesIO()
    Picture.fromarray(pixels.numpy()).save(written, kind)
    return written.getvalue()


def url(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def part(address: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


def chat(*content: Any, **more: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
    message = {"role": "user", "content": parts}
    return {"model": MODEL, "messages": [message], "temperature": 0, "max_tokens": 8, "return_token_ids": True, **more}


class Chatting:
    """A server of a small Llava, and the same model of transformers."""

    def __init__(self, directory: Path) -> None:
        self.theirs, self.directory = save_chatting_llava(directory), directory
        self.model, self.codec = open_model(str(directory)), Codec.load(directory)
        assert self.model.config.vision is not None
        self.reader = ImageReader.load(directory, self.model.config.vision, max_pixels=10_000)
        self.running: Running

    def serving(self, **options: Any) -> Any:
        limits = EngineOptions(kv_nbytes=1 << 20, max_batch_size=4, max_batch_tokens=64, max_seq_len=MAX_SEQ_LEN)
        engine = Engine.load(self.model, limits)
        told = ServerOptions(
            model_name=MODEL,
            vocab_size=self.model.config.vocab_size,
            max_seq_len=MAX_SEQ_LEN,
            takes_images=True,
            max_images=3,
            max_image_nbytes=100_000,
            **options,
        )
        service = Service(engine)
        catalog = Catalog([RequestParser(self.codec, told, self.reader)])
        return serving_app(service, engine, create_catalog_app(service, catalog))

    def expected(self, text: str, *pictures: bytes) -> list[int]:
        """What transformers' processor and model make of them, up to what ends a text."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(self.directory, backend="pil")
        opened = [Picture.open(io.BytesIO(raw)).convert("RGB") for raw in pictures]
        pixels = list(processor(opened, return_tensors="pt")["pixel_values"]) if opened else []
        tokens: list[int] = []
        for token in self.codec.encode(text):
            is_image = token == self.theirs.config.image_token_id
            tokens += [token] * (NUM_ROWS if is_image else 1)
        found = greedy_of(self.theirs, tokens, pixels, 8)
        return found[: next((at for at, token in enumerate(found, 1) if token in self.codec.stop_tokens), len(found))]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatting]:
    found = Chatting(tmp_path_factory.mktemp("llava"))
    with found.serving() as found.running:
        yield found
        found.running.check_idle()


def ids(chatting: Chatting, body: dict[str, Any], running: Running | None = None) -> list[int]:
    answer = (running or chatting.running).post(CHATS, body)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def error(chatting: Chatting, body: dict[str, Any]) -> dict[str, Any]:
    answer = chatting.running.post(CHATS, body)
    assert answer.status_code == 400, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return found


def test_an_image_is_answered_as_transformers_does(chatting: Chatting) -> None:
    raw = picture(1)
    expected = chatting.expected("user: <image>What is it? assistant:", raw)
    assert ids(chatting, chat("What is it?", part(url(raw)))) == expected
    jpeg = picture(1, kind="JPEG")
    expected = chatting.expected("user: <image>What is it? assistant:", jpeg)
    assert ids(chatting, chat("What is it?", part(url(jpeg, "jpeg")))) == expected


def test_two_images_and_none_are_answered_as_transformers_does(chatting: Chatting) -> None:
    pictures = [picture(2, 30, 17), picture(3)]
    expected = chatting.expected("user: <image><image>Which? assistant:", *pictures)
    assert ids(chatting, chat(*(part(url(raw)) for raw in pictures), "Which?")) == expected
    text = chatting.expected("user: Hello there assistant:")
    assert ids(chatting, chat("Hello there")) == text == ids(chatting, {**chat(), **as_string("Hello there")})


def as_string(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def test_an_image_that_is_sent_again_is_encoded_once_and_its_tokens_are_counted(chatting: Chatting) -> None:
    before = chatting.running.numbers()["yafsdp_like_engine_num_images_encoded"]
    body = chat("Again?", part(url(picture(4))))
    for more in ({}, {"n": 2}, {"max_tokens": 3}):
        answer = chatting.running.post(CHATS, {**body, **more}).json()
        assert answer["usage"]["prompt_tokens"] == len(answer["choices"][0]["prompt_token_ids"]) > NUM_ROWS
    assert chatting.running.numbers()["yafsdp_like_engine_num_images_encoded"] == before + 1


def test_a_text_that_names_the_image_token_is_a_text(chatting: Chatting) -> None:
    answer = chatting.running.post(CHATS, chat("An <image> here"))
    assert answer.status_code == 200
    image_token = chatting.theirs.config.image_token_id
    assert image_token not in answer.json()["choices"][0]["prompt_token_ids"]


def bomb(width: int, height: int) -> bytes:
    """A few bytes that say that they are a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64)))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1/a.png", "found the host '127.0.0.1'"),
        ("https://example.com/a.png", "images are taken out of data: URLs only"),
        ("file:///etc/passwd", "expected a data: URL"),
        ("x", "expected a data: URL"),
        ("data:image/png,plain", "must be data:image/png;base64"),
        ("data:image/png;base64,====", "no base64"),
        ("data:image/png;base64,é", "no base64"),
        (url(b"nothing"), "expected a PNG or JPEG"),
        (url(b""), "expected a PNG or JPEG"),
        (url(picture(1)[:200]), "expected a PNG or JPEG"),
        (url(picture(1, kind="GIF")), "expected a PNG or JPEG"),
        (url(bomb(6_000, 6_000)), "an image may have 10000 pixels at most, and"),
        (url(bomb(60_000, 60_000)), "DecompressionBombError"),
        (url(picture(1, 101, 100)), "an image may have 10000 pixels at most"),
        (url(picture(1, 300, 1)), "one side 100 times as long"),
        (url(bytes(100_001)), "an image may have 100000 bytes at most"),
    ],
    ids=range(16),
)
def test_what_is_no_image_is_one_clear_error(chatting: Chatting, address: str, words: str) -> None:
    found = error(chatting, chat("What?", part(url(picture(5))), part(address)))
    assert found["param"] == "messages"
    assert found["message"].startswith("messages: image 2: ") and words in found["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (chat({"type": "image_url"}), "a part with an image must be"),
        (chat({"type": "input_audio"}), "only parts of type 'text' and 'image_url' are understood"),
        (chat(*[part(url(b""))] * 4), "at most 3 images in all, found 4"),
        (chat(part(url(b"")), truncate_prompt_tokens=5), "could cut an image"),
        (chat("long " * 60, *[part(url(b""))] * 3), "are more than the 128 that fit"),
    ],
)
def test_what_is_not_served_of_images_is_said_before_any_is_decoded(
    chatting: Chatting, body: dict[str, Any], words: str
) -> None:
    assert words in error(chatting, body)["message"]


class Images(BaseHTTPRequestHandler):
    """A host of one image, and of things that are not as they should be."""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/image.png")
            self.end_headers()
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        self.wfile.write(bytes(200_000) if self.path == "/large" else picture(6))

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


@pytest.fixture
def host() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Images) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_images_of_a_host_that_is_named_are_fetched_without_redirects_and_within_limits(
    host: str, chatting: Chatting
) -> None:
    assert image_bytes(f"http://{host}/image.png", 100_000, (host,)) == picture(6)
    for path, words in (("moved", "302"), ("missing", "404"), ("large", "100000 bytes at most")):
        with pytest.raises(ValueError, match=words):
            image_bytes(f"http://{host}/{path}", 100_000, (host,))
    for other in (f"http://{host.replace('127.0.0.1', 'localhost')}/image.png", f"http://x@{host}/image.png"):
        with pytest.raises(ValueError, match="found the host"):
            image_bytes(other, 100_000, (host,))
    with chatting.serving(image_hosts=(host,)) as running:
        expected = chatting.expected("user: <image>What? assistant:", picture(6))
        assert ids(chatting, chat("What?", part(f"http://{host}/image.png")), running) == expected
        running.check_idle()


@pytest.mark.parametrize(
    ("scheme", "head"),
    [("http", b"HTTP/1.1 200 OK\r\nx: "), ("http", b"HTTP/1.1 200 OK\r\n\r\n"), ("https", b"\x16\x03\x03\x40\x00")],
    ids=["headers", "image", "handshake"],
)
def test_a_host_that_sends_a_byte_now_and_then_is_left_at_the_deadline(scheme: str, head: bytes) -> None:
    """Prevents: a thread that reads headers, each byte of which comes in time, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host = f"127.0.0.1:{listening.getsockname()[1]}"

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(head)
                for _ in range(1_000):  # of which 10 are enough
                    connection.sendall(b"a")
                    time.sleep(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(ValueError, match="has not come in time"):
            image_bytes(f"{scheme}://{host}/a.png", 100_000, (host,), until=time.monotonic() + 0.2)
        with pytest.raises(ValueError, match="has not come in time"):
            image_bytes(f"{scheme}://{host}/b.png", 100_000, (host,), until=time.monotonic() - 1)
        thread.join()


def test_images_whose_values_would_be_cut_off_are_refused_by_name(chatting: Chatting) -> None:
    """Prevents: an answer about a white image, of a grey one with 16 bits."""
    written = io.BytesIO()
    Picture.new("I;16", (20, 20), 30_000).save(written, "PNG")
    with pytest.raises(ValueError, match="must have 8 bits a channel, found pillow's mode 'I"):
        chatting.reader.read(written.getvalue())
    grey = io.BytesIO()
    Picture.new("L", (20, 20), 30).save(grey, "PNG")
    coloured = io.BytesIO()
    Picture.new("RGB", (20, 20), (30, 30, 30)).save(coloured, "PNG")
    assert chatting.reader.read(grey.getvalue()).digest == chatting.reader.read(coloured.getvalue()).digest


def test_images_that_several_threads_read_are_those_that_one_reads(chatting: Chatting) -> None:
    pictures = [picture(seed, 20 + seed % 7, 30) for seed in range(16)]
    expected = [chatting.reader.read(raw).digest for raw in pictures]
    with ThreadPoolExecutor(4) as threads:
        assert [image.digest for image in threads.map(chatting.reader.read, pictures * 2)] == expected * 2
    assert len(set(expected)) == 16


def test_tensor_parallel_ranks_and_texts_read_no_image(chatting: Chatting) -> None:
    """Prevents: images fetched, decoded and sent to all ranks, and refused then."""
    said: list[str] = []
    assert load_images(chatting.model, HttpOptions(), said.append, is_shared=True) is None
    assert said == ["warning: images are refused: tensor parallel ranks take none"]
    assert load_images(chatting.model, HttpOptions(), said.append) is not None and len(said) == 1


def test_the_largest_image_fits_into_the_largest_body() -> None:
    options = HttpOptions()
    assert len(url(bytes(options.max_image_nbytes))) + 2**16 < options.max_body_nbytes


def test_a_processor_that_makes_something_else_is_refused(tmp_path: Path) -> None:
    save_chatting_llava(tmp_path)
    vision = open_model(str(tmp_path)).config.vision
    assert vision is not None
    written = tmp_path / "preprocessor_config.json"
    written.write_text(written.read_text().replace(f'"height": {SIDE}', '"height": 8'))
    with pytest.raises(ValueError, match="expected pixels"):
        ImageReader.load(tmp_path, vision)
    written.unlink()
    with pytest.raises(ValueError, match="cannot read its image processor"):
        ImageReader.load(tmp_path, vision)
