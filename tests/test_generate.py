"""The two commands for a trained model: text on a terminal, and a server's life from its plan to its last answer."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch

from launch import generate, options, serve
from tests.test_text import write_tokenizer
from yafsdp_like.inference.engine import Engine, EngineOptions
from yafsdp_like.inference.loading import load
from yafsdp_like.inference.request import FinishReason, Request
from yafsdp_like.inference.text import Codec
from yafsdp_like.kernels.sampling import SamplingParams
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.models.hf import save_hf

ROOT = Path(__file__).parent.parent
PROMPT = "The quick brown fox"
SECONDS = 60.0
SMALL = ["--device=cpu", "--kv-memory=1MiB", "--max-batch-size=4", "--max-batch-tokens=64"]


@dataclass(frozen=True)
class Saved:
    """A Hugging Face directory, and an engine that is asked directly."""

    directory: Path
    codec: Codec
    reference: Engine

    def ask(self, prompt: tuple[int, ...], **fields: object) -> str:
        told = {"sampling": SamplingParams(temperature=0), "max_tokens": 16, "stop_tokens": self.codec.stop_tokens}
        completion = self.reference.generate([Request("x", prompt, **{**told, **fields})])["x"]
        ids = completion.ids[:-1] if completion.finish is FinishReason.STOP else completion.ids
        return self.codec.decode([*prompt, *ids])[len(self.codec.decode(prompt)) :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    directory = tmp_path_factory.mktemp("saved")
    codec = Codec.load(write_tokenizer(directory))
    decoder = Decoder(DecoderConfig(32, 2, 4, 2, 64, vocab_size=codec.vocab_size, max_seq_len=256))
    decoder.init_weights(0)
    with torch.no_grad():
        decoder.lm_head.weight.mul_(8)
    save_hf(decoder, directory)
    options = EngineOptions(kv_nbytes=1 << 20, max_batch_size=1, max_batch_tokens=512)
    return Saved(directory, codec, Engine(load(str(directory), options), options))


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of launch.generate."""
    status = generate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- generate ---


def test_a_prompt_is_continued_as_the_engine_does(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    text = saved.ask(saved.codec.encode(PROMPT))
    assert said(capsys, saved.directory, PROMPT, "--max-tokens=16", *SMALL) == (0, text + "\n", "")


def test_without_a_prompt_standard_input_is_read(
    saved: Saved, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    text = saved.ask(saved.codec.encode(PROMPT))
    assert said(capsys, saved.directory, "--max-tokens=16", *SMALL)[1] == text + "\n"


def test_a_chat_goes_through_the_models_template(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    user = {"role": "user", "content": "Hi"}
    for more, messages in (
        ([], [user]),
        (["--system", "Be kind."], [{"role": "system", "content": "Be kind."}, user]),
    ):
        text = saved.ask(saved.codec.encode_chat(messages))
        assert said(capsys, saved.directory, "Hi", "--chat", "--max-tokens=16", *more, *SMALL)[1] == text + "\n"


def test_a_stop_text_ends_what_is_said(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    text = saved.ask(saved.codec.encode(PROMPT), max_tokens=100)
    stop = text[6:9]
    arguments = (saved.directory, PROMPT, "--stop", stop, "--stop", "\u2603", "--max-tokens=100", *SMALL)
    assert said(capsys, *arguments) == (0, text[: text.index(stop)] + "\n", "")


def test_a_seed_draws_the_same_again_and_without_one_draws_differ(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (saved.directory, PROMPT, "--temperature=1", "--top-p=0.9", "--max-tokens=16", *SMALL)
    seeded = [said(capsys, *arguments, "--seed=5")[1] for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len({said(capsys, *arguments)[1] for _ in range(3)}) == 3
    expected = saved.ask(saved.codec.encode(PROMPT), sampling=SamplingParams(1.0, top_p=0.9, seed=5))
    assert seeded[0] == expected + "\n"


def test_the_plan_goes_to_standard_error(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = said(capsys, saved.directory, PROMPT, "--max-tokens=1", "--plan", *SMALL)
    assert "memory plan" in err
    assert "kv slabs" in err
    assert "memory plan" not in out


def test_more_tokens_than_fit_are_cut_to_what_fits(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = saved.codec.encode(PROMPT)
    text = saved.ask(prompt, max_tokens=32 - len(prompt))
    arguments = (saved.directory, PROMPT, "--max-tokens=1000", "--max-seq-len=32", *SMALL)
    assert said(capsys, *arguments) == (0, text + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", ""], "the prompt is empty"),
        (["MODEL", "x", "--system=y"], "--system is only for --chat"),
        (["MODEL", "x " * 200, "--max-seq-len=32"], "32 fit with what is to follow"),
        (["MODEL", "x", "--temperature=-1"], "temperature must be at least 0"),
        (["MODEL", "x", "--max-tokens=0"], "max_tokens must be at least 1"),
        (["MODEL", "x", "--stop="], "a stop string must have at least one character"),
        (["MODEL", "x", "--memory-limit=10KiB"], "bytes"),
        (["MODEL", "x", "--tokenizer=/nowhere"], "no tokenizer in /nowhere"),
        (["/nowhere", "x"], "/nowhere"),
        (["preset:tiny", "x"], "has no tokenizer: name a directory that has, by --tokenizer"),
        (["preset:huge", "x"], "huge"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line_and_status_1(
    saved: Saved, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    told = [str(saved.directory) if argument == "MODEL" else argument for argument in arguments]
    status, out, err = said(capsys, *told, "--device=cpu")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1 or "--memory-limit=10KiB" in arguments  # which lists what would fit


def test_another_models_tokenizer_is_refused(saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    decoder = Decoder(DecoderConfig(32, 1, 2, 2, 64, vocab_size=100))
    decoder.init_weights(0)
    save_hf(decoder, tmp_path)
    status, _, err = said(capsys, tmp_path, "x", "--tokenizer", saved.directory, *SMALL)
    assert status == 1
    assert "the model's vocabulary only 100" in err


def test_a_preset_takes_a_tokenizer_of_at_most_its_vocabulary(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("preset:tiny", PROMPT, "--tokenizer", saved.directory, "--max-tokens=4", "--max-seq-len=64")
    assert said(capsys, *arguments, *SMALL)[0] == 0


@pytest.mark.slow
def test_two_ranks_that_share_the_weights_say_what_one_says(saved: Saved) -> None:
    """Over gloo they step together, and only the first one speaks."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words += ["launch.generate", str(saved.directory), PROMPT, "--mode=gathered", "--max-tokens=16", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=150, check=True)
    assert done.stdout == saved.ask(saved.codec.encode(PROMPT)) + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("40GiB", 40 << 30), ("1.5 GB", 1_500_000_000), ("512MiB", 512 << 20), ("7B", 7)],
)
def test_bytes_are_read_with_their_units(text: str, expected: int) -> None:
    assert options.nbytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 gb", "1e9", "0x10", "90%"])
def test_what_is_no_number_of_bytes_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="a number of bytes such as 40GiB"):
        options.nbytes(text)


# --- serve ---


@dataclass
class Command:
    """launch.serve in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]  # before it listened

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0, timeout=SECONDS)


@contextlib.contextmanager
def command(*arguments: object) -> Iterator[Command]:
    words = [sys.executable, "-m", "launch.serve", *map(str, arguments), "--port=0", "--api-key=key", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            if line.startswith("serving on "):
                yield Command(process, line.removeprefix("serving on ").strip(), lines)
                break
            lines.append(line)
        else:
            raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.communicate()


def test_a_server_says_its_plan_first_and_ends_what_runs_when_told_to_end(saved: Saved) -> None:
    with command(saved.directory, "--name=tiny", "--grace=30") as running, running.client() as client:
        assert "memory plan" in "".join(running.said)
        assert [model.id for model in client.models.list()] == ["tiny"]
        body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 200}
        with client.completions.create(stream=True, extra_body={"ignore_eos": True}, **body) as stream:
            first = next(stream)
            running.process.send_signal(signal.SIGTERM)
            rest = list(stream)
        text = "".join(chunk.choices[0].text for chunk in [first, *rest])
        assert text == saved.ask(saved.codec.encode(PROMPT), max_tokens=200, stop_tokens=frozenset())
        assert running.process.wait(SECONDS) == 0


def test_a_server_without_grace_cancels_what_runs_and_says_so(saved: Saved) -> None:
    with command(saved.directory, "--grace=0") as running, running.client() as client:
        body = {"model": str(saved.directory), "prompt": [PROMPT] * 8, "max_tokens": 240}
        stream = client.completions.create(stream=True, extra_body={"ignore_eos": True}, **body)
        next(stream)
        running.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert running.process.wait(SECONDS) == 0


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["/nowhere", f"--port={port}"]) == 1
    assert capsys.readouterr().err == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_server_of_no_model_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["/nowhere", "--port=0"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
