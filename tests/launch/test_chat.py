"""launch.chat in a terminal: what is typed is sent, what comes is shown, and Ctrl-C stops only an answer."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launch import chat
from launch.chat_models import LoadedChatModel, ServedModel
from launch.options import CHAT, ChatOptions
from tests.inference.http.servers import MODEL, make_decoder, make_engine, served_with
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.models.hf import save_hf

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("rich")
ROOT = Path(__file__).parents[2]
SECONDS = 120.0  # that nothing here should take, on the slowest machine
# The first terminal that the leader of a session opens is its own, from which Ctrl-C comes.
PROGRAM = (
    "import os, sys; os.open(os.ttyname(0), os.O_RDWR); from launch import chat; sys.exit(chat.main(sys.argv[1:]))"
)
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


# --- a server that says what it is told, and a terminal ---


@dataclass
class Scripted:
    """What a server is asked, and what it says."""

    pieces: list[str] = field(default_factory=lambda: ["First ", "answer."])
    goes_on: bool = False  # the answer has no end, until the client leaves
    refusal: tuple[int, str] | None = None
    bodies: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)  # of whoever asks for models
    has_left: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def stream(self, write: Any) -> None:
        for piece in self.pieces:
            write({"choices": [{"delta": {"content": piece}}]})
        try:
            while self.goes_on:
                write({"choices": [{"delta": {"content": ""}}]})
                time.sleep(0.01)
        except OSError:
            self.has_left.set()

    @property
    def said(self) -> list[tuple[str, str]]:
        """Roles and contents of the last body."""
        return [(message["role"], message["content"]) for message in self.bodies[-1]["messages"]]


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _begin(self, status: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()

        def do_GET(self) -> None:
            script.keys.append(self.headers["authorization"])
            self._begin(200, "application/json")
            self.wfile.write(json.dumps({"data": [{"id": "one"}, {"id": "other"}]}).encode())

        def do_POST(self) -> None:
            script.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if script.refusal is not None:
                status, words = script.refusal
                self._begin(status, "application/json")
                self.wfile.write(json.dumps({"error": {"message": words}}).encode())
                return
            self._begin(200, "text/event-stream")
            script.stream(lambda event: self.wfile.write(f"data: {json.dumps(event)}\n\n".encode()))
            with contextlib.suppress(OSError):
                self.wfile.write(b"data: [DONE]\n\n")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        script.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield script
        finally:
            script.goes_on = False
            server.shutdown()
            thread.join(SECONDS)


@dataclass
class Terminal:
    """A program in a terminal of its own, and all that it has written there."""

    process: subprocess.Popen[bytes]
    master: int
    written: str = ""
    num_read: int = 0

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str) -> None:
        """Wait for a text behind the one that was expected last."""
        until = time.monotonic() + SECONDS
        while (at := self.written.find(text, self.num_read)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(0.0, until - time.monotonic()))
            try:
                raw = os.read(self.master, 4096) if ready else b""
            except OSError:  # the program has ended
                raw = b""
            assert raw, f"expected {text!r}, found {self.written[self.num_read :]!r}"
            self.written += raw.decode("utf-8", "replace")
        self.num_read = at + len(text)


@contextlib.contextmanager
def terminal(*arguments: object) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    hidden = {name for name in os.environ if name.lower().endswith("_proxy") or name in ("COLUMNS", "LINES")}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=ROOT,
        env={**environment, "TERM": "xterm", "INPUTRC": os.devnull, "OMP_NUM_THREADS": "1"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        found = Terminal(process, master)
        found.expect("/help lists commands")
        found.expect("> ")
        yield found
        found.type(CTRL_D)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


# --- in a terminal ---


def test_what_is_typed_is_sent_and_commands_do_what_they_say(scripted: Scripted, tmp_path: Path) -> None:
    with terminal(scripted.url, "--temperature=0", "--max-tokens=7") as there:
        there.type("hello\r")
        there.expect("First answer.")
        there.expect("> ")
        assert scripted.said == [("user", "hello")]
        assert (scripted.bodies[0]["model"], scripted.bodies[0]["temperature"]) == ("one", 0)
        assert scripted.bodies[0]["max_tokens"] == 7
        there.type(UP + "\r")
        there.expect("First answer.")
        there.expect("> ")
        assert scripted.said == [("user", "hello"), ("assistant", "First answer."), ("user", "hello")]
        there.type("/reset\r")
        there.expect("the conversation is empty")
        there.type("/system Be brief\r")
        there.expect("system: Be brief")
        there.type('"""one\r')
        there.expect(". ")
        there.type('  two"""\r')
        there.expect("First answer.")
        there.expect("> ")
        assert scripted.said == [("system", "Be brief"), ("user", "one\n  two")]
        there.type("/model\r")
        there.expect("* one")
        there.expect("  other")
        there.type("/model none\r")
        there.expect("there is no model none, only one, other")
        there.type("/model other\r")
        there.expect("model: other")
        there.type("/reset\ra\\\r//b\r")
        there.expect("First answer.")
        there.expect("> ")
        assert (scripted.said[1:], scripted.bodies[-1]["model"]) == ([("user", "a\n//b")], "other")
        file = tmp_path / "saved.json"
        there.type(f"/save {file}\r")
        there.expect("saved 3 messages in ")
        said = {"role": "assistant", "content": "First answer."}
        saved = json.loads(file.read_text(encoding="utf-8"))
        assert saved == {"model": "other", "messages": [*scripted.bodies[-1]["messages"], said]}
        there.type(f"/save {file}\r")
        there.expect("File exists")
        there.type("/what\r")
        there.expect("there is no command /what")
        there.expect("> ")


def test_ctrl_c_stops_the_answer_and_not_the_program_and_errors_are_words(scripted: Scripted) -> None:
    scripted.pieces, scripted.goes_on = ["half \x1b]0;title\x07[red]an\n\n<b>", "answer"], True
    with terminal(scripted.url, "--api-key=secret") as there:
        there.type("go on\r")
        there.expect("[red]an")
        there.expect("<b>answer")  # is being written
        there.type(CTRL_C)
        there.expect("[stopped]")
        there.expect("> ")
        assert scripted.has_left.wait(SECONDS), "the server was not told"
        assert "\x1b]0;" not in there.written
        scripted.goes_on = False
        there.type("and?\r")
        there.expect("<b>answer")
        there.expect("> ")
        assert scripted.said[1] == ("assistant", "".join(scripted.pieces))
        there.type("half a line" + CTRL_C)
        there.type("\r")  # readline may look for the signal at a line's end only
        there.expect("Ctrl-D or /quit leaves")
        there.expect("> ")
        scripted.refusal = 400, "messages: are too long"
        there.type("more\r")
        there.expect("the server says 400: messages: are too long")
        there.expect("> ")
        scripted.refusal = None
        there.type("less\r")
        there.expect("<b>answer")
        there.expect("> ")
        assert scripted.said[-1] == ("user", "less") and ("user", "more") not in scripted.said


@pytest.mark.slow
def test_a_model_that_is_loaded_here_answers_in_a_terminal(tmp_path: Path) -> None:
    codec = Codec.load(write_tokenizer(tmp_path))
    save_hf(make_decoder(codec), tmp_path)
    small = ("--device=cpu", "--kv-memory=1MiB", "--max-batch-tokens=64", "--temperature=0", "--no-markdown")
    with terminal(tmp_path, *small) as there:
        there.type("Hi\r")
        there.expect("\n> ")
        there.type("/save /dev/stdout\r")
        there.expect("File exists")
        there.type("x" * 200 + " " + "yz" * 200 + "\r")
        there.expect("tokens, and 256 fit")


# --- who answers ---


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("choices", [["x"], {"a": 1}, [{"delta": "x"}], 1], ids=str)
def test_an_event_of_another_protocol_is_an_error_in_words(scripted: Scripted, choices: Any) -> None:
    scripted.stream = lambda write: write({"choices": choices})  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"the server says \{'choices'"):
        "".join(ServedModel(ChatOptions(scripted.url)).answer(MESSAGES))


def test_what_speaks_no_http_is_an_error_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(OSError, match=r"there is no HTTP server at .*BadStatusLine"):
            ServedModel(ChatOptions(f"http://127.0.0.1:{server.getsockname()[1]}"))
        thread.join(SECONDS)
    with pytest.raises(OSError, match="InvalidURL"):
        ServedModel(ChatOptions("http://localhost:80 80"))


def test_a_key_goes_to_the_server_that_is_named_and_not_where_that_one_points(scripted: Scripted) -> None:
    keys: list[str | None] = []

    class Redirecting(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            keys.append(self.headers["authorization"])
            self.send_response(302)
            self.send_header("location", scripted.url + self.path)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert ServedModel(ChatOptions(f"http://127.0.0.1:{server.server_port}", api_key="secret")).name == "one"
        thread.join(SECONDS)
    assert keys == ["Bearer secret"] and scripted.keys == [None]


def test_a_server_of_ours_answers_as_its_engine_does(codec: Codec) -> None:
    with served_with(codec) as served:
        model = ServedModel(CHAT.load([served.running.url + "/v1/", "--max-tokens=12", "--temperature=0"]))
        assert (model.name, model.names()) == (MODEL, [MODEL])
        assert "".join(model.answer(MESSAGES)) == served.ask(codec.encode_chat(MESSAGES), max_tokens=12)[1]
        with pytest.raises(OSError, match=r"the server says 400: messages\[0\]"):
            "".join(model.answer([{"role": "nobody", "content": "Hi"}]))
        with pytest.raises(ValueError, match=f"has no model 'x', only {MODEL}"):
            ServedModel(ChatOptions(served.running.url, name="x"))
    with pytest.raises(OSError, match="there is no server at"):
        model.names()


def test_an_interrupt_ends_a_loaded_models_answer_between_two_steps_and_leaves_the_engine_empty(codec: Codec) -> None:
    from launch.inference import LoadedModel

    @dataclass
    class Named:
        name: str = "here"

    engine = make_engine(codec)
    options = ChatOptions("here", sampling=CHAT.load(["x", "--temperature=0"]).sampling, max_tokens=100)
    model = LoadedChatModel(LoadedModel(Named(), codec, engine), options.local)
    whole = "".join(model.answer(MESSAGES))
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        for piece in model.answer(MESSAGES):
            said.append(piece)
            if len(said) == 3:
                os.kill(os.getpid(), signal.SIGINT)
    assert whole.startswith("".join(said)) and len(said) < 100
    assert not engine.has_work and signal.getsignal(signal.SIGINT) is before
    engine.check_integrity()
    assert "".join(model.answer(MESSAGES)) == whole


# --- without a terminal ---


def test_lines_of_a_pipe_are_answered_in_plain_text(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n/nothing\n/help\n/system Be brief\ntwo"))
    scripted.pieces = ["*a*"]
    assert chat.main([scripted.url]) == 0
    captured = capsys.readouterr()
    assert captured.out == "*a*\n*a*\n"
    refused = "error: there is no command /nothing; /help lists them\n"
    assert captured.err == f"{refused}{chat.HELP}\nsystem: Be brief\n"
    assert [content for _, content in scripted.said] == ["Be brief", "one", "*a*", "two"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["/nowhere/at/all"], 1, "there is no such directory"),
        (["localhost:8000"], 1, "a server's address begins with http://"),
        (["http://127.0.0.1:9", "--name=x"], 1, "there is no server at http://127.0.0.1:9"),
        (["x", "--max-tokens=0"], 2, "max_tokens must be at least 1"),
    ],
    ids=["no directory", "no scheme", "no server", "no tokens"],
)
def test_a_mistake_is_one_line(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat.main(arguments) == status
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("inner", ["~~~", "```", "````python"])
def test_code_is_ended_by_the_fence_that_began_it(inner: str) -> None:
    from launch.chat_screen import end_of_blocks

    begun = f"````text\nuse\n{inner}\n\n"
    assert end_of_blocks(begun, 0) == 0
    assert end_of_blocks(begun + "````\n\n", 0) == len(begun) + 6
    assert end_of_blocks("```not` a fence\n\n", 0) == 17


def test_blocks_are_printed_once_nothing_can_change_them_and_all_of_a_text_is_shown() -> None:
    from launch.chat_screen import end_of_blocks, markdown

    text = "one\n\n```python\na = 1\n\nb = 2\n```\n\nlast"
    ends = sorted({end_of_blocks(text[:length], 0) for length in range(len(text) + 1)})
    assert [text[:end] for end in ends] == ["", "one\n\n", text.removesuffix("last")]
    from rich.console import Console

    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(markdown("<think>a</think>\nb\nc [x](http://y) [bold]\n| p | q |\n|---|---|\n| 1 | 2 |"))
    shown = console.file.getvalue()
    for part in ("<think>a</think>", "http://y", "[bold]"):
        assert part in shown
    assert [line.strip() for line in shown.splitlines()][1] == "b"
