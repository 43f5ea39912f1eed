"""launch.serve as a process: its command line, its port, its connections, and its end when the engine is stuck."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from launch import options, serve, server
from tests.inference.engine.test_adapters import write_adapter
from tests.inference.http.servers import SECONDS, make_decoder
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.models.hf import load_hf_config, save_hf

ROOT = Path(__file__).parents[2]
SMALL = ["--device=cpu", "--kv-memory=1MiB", "--max-batch-size=4", "--max-batch-tokens=64", "--port=0"]
HURRIED = """
import sys, threading
from launch import serve
from yafsdp_like.inference.http import connections
from yafsdp_like.inference.engine import engine
from yafsdp_like.inference.http import service
connections.HEADERS_S, service.SLOW_STEP_S, service.LAST_STEP_S = 2.0, 0.5, 1.0
"""
HANGING = """
step, steps = engine.Engine.step, iter(range(5))
engine.Engine.step = lambda it: step(it) if next(steps, None) is not None else threading.Event().wait()
"""
MAIN = "sys.exit(serve.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs") / "base"
    made.mkdir()
    save_hf(make_decoder(Codec.load(write_tokenizer(made))), made)
    return made


@dataclass
class Process:
    """A server that listens."""

    process: subprocess.Popen[str]
    url: str
    said: str

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def end(self) -> tuple[int, str]:
        """Exit status, and what it has said last, after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(2 * SECONDS)
        assert self.process.stdout is not None
        return status, self.process.stdout.read()


@contextlib.contextmanager
def command(program: str, *arguments: object) -> Iterator[Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments), *SMALL],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            if line.startswith("serving on "):
                yield Process(process, line.removeprefix("serving on ").strip(), said)
                break
            said += line
        else:
            raise AssertionError(said)
    finally:
        process.kill()
        process.communicate()


# --- the command line ---

MISTAKES = {
    "no model": ([], 2, "no arguments; usage: "),
    "an unknown option": (["base", "--prot=1"], 2, "unknown option --prot; did you mean 'port'?"),
    "a port that is none": (["base", "--port=70000"], 2, "port must be from 0 to 65535, found 70000"),
    "a port in words": (["base", "--port=http"], 2, "port in the command line: expected int, found http"),
    "bytes that are none": (["base", "--kv-memory=lots"], 2, "expected a number of bytes such as 40GiB"),
    "no time": (["base", "--grace=-1"], 2, "grace_s must be a number of seconds, not negative, found -1"),
    "an unknown mode": (
        ["base", "--mode=fast"],
        2,
        "load.mode in the command line: expected auto|resident|gathered|streamed|",
    ),
    "nobody may wait": (["base", "--max-waiting=0"], 2, "max_waiting must be at least 1, found 0"),
    "no directory": (["/nowhere/base", "--port=0"], 1, "found '/nowhere/base': there is no such directory"),
    "no host": (["base", "--host=256.0.0.1"], 1, "cannot listen on 256.0.0.1:8000"),
}
WITHOUT_TORCH = """
import contextlib, io, json, sys
from launch import serve
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = serve.main(arguments)
        except SystemExit as end:
            status = end.code
    found.append((status, out.getvalue(), err.getvalue()))
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps(found))
"""


def test_mistakes_are_one_line_and_help_is_complete_before_torch_is_imported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = ["base", f"--port={taken.getsockname()[1]}"]
        asked = [["--help"], busy, *(arguments for arguments, _, _ in MISTAKES.values())]
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, json.dumps(asked)],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    (status, help_, _), (busy_status, _, busy_words), *found = json.loads(run.stdout)
    assert status == 0
    for words in ("default: 8000", "default: 32", "default: 127.0.0.1", "default: 30.0", "--timeout=seconds"):
        assert words in help_
    assert (busy_status, busy_words) == (
        1,
        f"error: cannot listen on 127.0.0.1:{busy[1][7:]}: Address already in use\n",
    )
    for (_, expected, words), (status, out, err) in zip(MISTAKES.values(), found, strict=True):
        assert (status, out) == (expected, "")
        assert err.startswith("error: ")
        assert words in err
        assert err.count("\n") == 1


def test_a_package_that_is_missing_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("uvicorn", "prometheus_client"):
        monkeypatch.setitem(sys.modules, name, None)
    assert serve.main(["/nowhere", "--port=0"]) == 1
    words = "serving needs packages that are not here: pip install 'yafsdp_like[serve]' (no uvicorn, prometheus_client)"
    assert capsys.readouterr().err == f"error: {words}\n"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("runs/smollm2/base", ("base", "runs/smollm2/base")),
        ("runs/smollm2/base/", ("base", "runs/smollm2/base/", "runs/smollm2/base")),
        ("/models/Llama-3", ("Llama-3", "/models/Llama-3")),
        ("base", ("base",)),
        ("preset:tiny", ("preset:tiny",)),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_path_or_by_all_of_it(given: str, names: tuple[str, ...]) -> None:
    assert options.model_names(given) == names


def test_the_directory_one_is_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert options.model_names(".") == (tmp_path.name, ".")


# --- the port and its connections ---


def test_two_cannot_have_one_port_even_before_they_listen(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents: both load their models, and one fails then."""
    with serve.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert serve.main(["/nowhere", f"--port={port}"]) == 1
    assert capsys.readouterr().err == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    serve.bind("127.0.0.1", port).close()  # and it can be had again at once


def read_to_the_end(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(4096):
            answer += part
    return answer


@pytest.mark.slow
def test_a_server_knows_all_names_and_has_patience_with_nobody(directory: Path) -> None:
    """In one process, since each takes seconds to start: names, methods, slow headers, many connections, the end."""
    adapter = f"--adapters.tuned={write_adapter(directory.parent, load_hf_config(directory), 'attention')}"
    with (
        command(HURRIED + MAIN, directory, adapter, "--max-connections=4", "--grace=1") as running,
        httpx.Client(base_url=running.url, timeout=SECONDS, verify=False) as http,
    ):
        assert "requests call the model 'base'" in running.said
        body = {"prompt": "x", "max_tokens": 2, "temperature": 0}
        for name in ("base", str(directory), "tuned"):
            assert http.post("/v1/completions", json={**body, "model": name}).status_code == 200
            assert http.get(f"/v1/models/{name}").json()["id"] == ("tuned" if name == "tuned" else "base")
        assert http.post("/v1/completions", json={**body, "model": "other"}).status_code == 404
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["base", "tuned"]
        head = http.head("/health")
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "20")
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(running.address, SECONDS)) for _ in range(3)]
            began = time.monotonic()
            slow[0].sendall(b"GET /health HTTP/1.1\r\nx: ")
            slow[1].sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n")
            with socket.create_connection(running.address, SECONDS) as one_too_many:
                assert read_to_the_end(one_too_many).startswith(b"HTTP/1.1 503 ")
            while time.monotonic() - began < 1.5:  # bytes now and then do not help
                with contextlib.suppress(ConnectionError):  # the machine may be busy
                    slow[0].sendall(b"y")
                time.sleep(0.1)
            assert [read_to_the_end(connection) for connection in slow] == [b""] * 3
            assert time.monotonic() - began < SECONDS / 2
        assert http.get("/health").status_code == 200
        status, said = running.end()
        assert (status, said) == (0, "")


# --- the end ---


@pytest.mark.slow
def test_a_stuck_server_answers_says_so_and_ends_when_told_to(directory: Path) -> None:
    """Prevents: a step that hangs, behind a health of 200, in a process that only SIGKILL ends."""
    with (
        command(HURRIED + HANGING + MAIN, directory, "--timeout=1", "--grace=0.5") as running,
        httpx.Client(base_url=running.url, timeout=SECONDS, verify=False) as http,
    ):
        body = {"model": "base", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        until = time.monotonic() + SECONDS
        while (health := http.get("/health")).status_code == 200:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert health.json()["status"] == "stuck"
        status, said = running.end()
        assert status == 3
        assert said.splitlines()[-1].startswith("error: the engine (it has been in one step for ")


@pytest.mark.slow
def test_a_stuck_server_ends_by_itself_after_a_while(directory: Path) -> None:
    with command(HURRIED + HANGING + MAIN, directory, "--stuck-after=1") as running:
        body = {"model": "base", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=SECONDS, verify=False)
        assert answer.status_code == 503
        assert "the engine has failed: StuckEngineError" in answer.json()["error"]["message"]
        assert running.process.wait(SECONDS) == 3


def test_while_serving_threads_switch_often_and_afterwards_all_is_as_before() -> None:
    """What somebody else has frozen stays so."""
    switch_s, num_frozen = sys.getswitchinterval(), gc.get_freeze_count()
    with server.serving_switches():
        assert sys.getswitchinterval() == pytest.approx(server.SWITCH_S) and gc.get_freeze_count() > 1000
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (switch_s, num_frozen)
    gc.freeze()
    try:
        with server.serving_switches():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
