"""The two commands for a trained model: text on a terminal, and a server's life from its plan to its last answer."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import shlex
import shutil
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

from launch import generate, serve
from launch.command_line import nbytes
from launch.options import GENERATE
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.inference.http.bodies import CompletionBody
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.directory import sampling_defaults
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.models.hf import save_hf

ROOT = Path(__file__).parents[2]
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
    return Saved(directory, codec, Engine.load(str(directory), options))


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of launch.generate, which draws the likeliest unless told else."""
    words = [str(argument) for argument in arguments]
    words += [] if any(word.startswith("--temperature") for word in words) else ["--temperature=0"]
    status = generate.main(words)
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


def test_the_readmes_command_is_one(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """It was refused: an option before the prompt and one behind it."""
    readme = (ROOT / "README.md").read_text()
    commands = [line.split("#")[0] for line in readme.splitlines() if line.startswith("python -m launch.generate ")]
    assert commands
    for command in commands:
        words = shlex.split(command)[3:]
        words[0] = str(saved.directory)
        status, out, err = said(capsys, *words, *SMALL)
        assert status == 0 and out.strip(), err


def test_options_and_the_prompt_come_in_any_order() -> None:
    parts = [["MODEL"], ["--chat"], ["--max-tokens", "5"], ["What is -5 + 3?"], ["--stop", "x"]]
    for order in itertools.permutations(parts):
        if order.index(["MODEL"]) < order.index(["What is -5 + 3?"]):
            found = GENERATE.load([word for part in order for word in part])
            assert (found.model, found.prompt, found.chat, found.max_tokens) == ("MODEL", "What is -5 + 3?", True, 5)
    assert GENERATE.load(["--chat", "MODEL"]).prompt is None
    for words in (
        ["MODEL", "--", "--chat"],
        ["--seed=1", "--", "MODEL", "--chat"],
        ["MODEL", "--seed=1", "--", "--chat"],
    ):
        found = GENERATE.load(words)
        assert (found.model, found.prompt, found.chat) == ("MODEL", "--chat", False)


def test_a_request_that_says_nothing_is_drawn_as_a_command_that_says_nothing() -> None:
    nothing = generate.sampling_of(GENERATE.load(["MODEL", "--seed=0"]), SamplingParams())
    assert nothing == Request("x", (1,)).sampling == SamplingParams(temperature=1.0, seed=0)


def test_the_models_own_way_to_sample_is_taken_unless_something_else_is_said(
    saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = shutil.copytree(saved.directory, tmp_path / "model")
    (directory / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 3, "do_sample": true}')
    likeliest = saved.ask(saved.codec.encode(PROMPT)) + "\n"
    words = [str(directory), PROMPT, "--max-tokens=16", *SMALL]
    for more, is_likeliest in (([], True), (["--temperature=0.0"], True), (["--temperature=1"], False),
                               (["--generation-config=none"], False)):  # fmt: skip
        outs = []
        for seed in (1, 2):
            assert generate.main([*words, f"--seed={seed}", *more]) == 0
            outs.append(capsys.readouterr().out)
        assert (outs == [likeliest] * 2) is is_likeliest, more


def test_over_http_the_models_way_to_sample_is_taken_where_a_body_says_nothing() -> None:
    defaults = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    body = CompletionBody(model="m", prompt="x", top_p=0.5, seed=3)
    assert body.sampling(0, defaults) == dataclasses.replace(defaults, top_p=0.5, seed=3)
    assert CompletionBody(model="m", prompt="x", seed=3).sampling(0, SamplingParams()) == SamplingParams(seed=3)


def test_a_generation_config_says_how_to_sample_and_nothing_else_of_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert sampling_defaults(tmp_path) == sampling_defaults(None) == SamplingParams()
    for content, expected in (
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "max_new_tokens": 7},
            (0.6, 20, 0.95, 1.0),
        ),
        ({"temperature": 1, "top_k": -1, "repetition_penalty": 1.05, "typical_p": 0.2}, (1.0, 0, 1.0, 1.05)),
        ({"temperature": None, "top_k": 40.0, "seed": 5}, (1.0, 40, 1.0, 1.0)),
    ):
        path.write_text(json.dumps(content))
        found = sampling_defaults(tmp_path)
        assert (found.temperature, found.top_k, found.top_p, found.repetition_penalty) == expected
        assert found.seed == 0 and isinstance(found.top_k, int) and isinstance(found.temperature, float)


def test_what_ends_a_text_may_stand_in_the_models_configuration_alone(
    saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = shutil.copytree(saved.directory, tmp_path / "model")
    prompt = saved.codec.encode(PROMPT)
    request = Request("x", prompt, SamplingParams(temperature=0), max_tokens=16)
    ids = saved.reference.generate([request])["x"].ids
    stop = next(token for token in ids[2:] if token not in ids[:2])
    raw = json.loads((directory / "config.json").read_text())
    expected = saved.codec.decode([*prompt, *ids[: ids.index(stop)]])[len(saved.codec.decode(prompt)) :]
    for eos in (stop, [stop, 0]):
        (directory / "config.json").write_text(json.dumps(raw | {"eos_token_id": eos}))
        assert said(capsys, directory, PROMPT, "--max-tokens=16", *SMALL) == (0, expected + "\n", "")
        elsewhere = ["--tokenizer", saved.directory]  # whose directory does not know
        assert said(capsys, directory, PROMPT, "--max-tokens=16", *SMALL, *elsewhere) == (0, expected + "\n", "")


BROKEN = [
    ("config.json", "[1]", "config.json: expected an object in JSON, found list"),
    ("config.json", "{", "config.json: "),
    ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "hidden_size must be a whole number"),
    ("model.safetensors", "", "model.safetensors is no whole safetensors file"),
    ("model.safetensors.index.json", "[]", "is no index of safetensors files"),
    ("generation_config.json", '{"temperature": "hot"}', "generation_config.json: temperature must be a number"),
    (
        "generation_config.json",
        '{"top_k": Infinity}',
        "top_k must be a whole number, found inf",
    ),
    ("generation_config.json", '{"top_k": NaN}', "generation_config.json: top_k must be a whole number, found nan"),
    ("generation_config.json", '{"top_p": 1%s}' % ("0" * 400), "generation_config.json: top_p must be a number, found"),
    ("generation_config.json", '{"top_p": 7}', "generation_config.json: top_p must be above 0 and at most 1"),
    ("generation_config.json", '{"eos_token_id": [[1]]}', "eos_token_id must be an id or a list of ids"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: expected an object in JSON, found list"),
    ("tokenizer.json", "{}", "transformers cannot read its tokenizer"),
    ("chat_template.jinja", "{% for", "the model's chat template refuses these messages"),
    ("chat_template.jinja", "{{ 1 // 0 }}", "the model's chat template refuses these messages"),
]


@pytest.mark.parametrize(("name", "content", "told"), BROKEN, ids=lambda value: value[:20])
def test_a_broken_file_is_one_line_that_names_it(
    name: str, content: str, told: str, saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = shutil.copytree(saved.directory, tmp_path / "model")
    (directory / name).write_text(content)
    status, out, err = said(capsys, directory, "x", "--chat", *SMALL)
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ") and told in err


def test_the_command_line_is_read_before_torch_is_imported() -> None:
    program = "import sys\nfrom launch import generate\n{}\nassert not {'torch', 'transformers'} & set(sys.modules)"
    for words, status in ((["--help"], 0), (["MODEL", "--top-p=2"], 2), (["/nowhere", "x"], 1)):
        call = f"assert generate.main({words!r}) == {status}"
        done = subprocess.run(
            [sys.executable, "-c", program.replace("{}", call)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert words != ["--help"] or ("--temperature" in done.stdout and "default: 256" in done.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", ""], "the prompt is empty"),
        (["MODEL", "x", "--temperature=-1"], "temperature must be at least 0"),
        (["MODEL", "x", "--temperature=nan"], "expected float|null, found nan"),
        (["MODEL", "x", "--top-p=0"], "top_p must be above 0 and at most 1"),
        (["MODEL", "x", "--max-tokens=0"], "must be at least 1"),
        (["MODEL", "x", "--stop="], "a stop string must have at least one character"),
        (["MODEL", "x", "--system=y"], "--system is only for --chat"),
        (["MODEL", "x", "y"], "unexpected argument 'y'"),
        (["MODEL", "x", "--nothing"], "unknown option --nothing"),
        ([], "no model given; usage: "),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_is_wrong_on_the_command_line_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status, out, err = said(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL", "x " * 200, "--max-seq-len=32"], "32 fit with what is to follow"),
        (["MODEL", "x", "--memory-limit=10KiB"], "bytes"),
        (["MODEL", "x", "--tokenizer=/nowhere"], "no tokenizer in /nowhere"),
        (["/nowhere", "x"], "/nowhere"),
        (["preset:tiny", "x"], "that has, by --tokenizer (in a pool's file: tokenizer)"),
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


def test_a_model_that_memory_cannot_hold_is_one_line(
    saved: Saved, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yafsdp_like.memory.arena.WORTH_ASKING_NBYTES", 0)
    monkeypatch.setattr("yafsdp_like.memory.arena.free_nbytes", lambda device: 1024)
    status, out, err = said(capsys, str(saved.directory), "x", "--device=cpu")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: not enough memory: ") and "1.00 KiB are free" in err and "--kv-memory" in err


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
    words += [
        "launch.generate",
        str(saved.directory),
        PROMPT,
        "--mode=gathered",
        "--max-tokens=16",
        "--temperature=0",
        *SMALL,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=150, check=True)
    assert done.stdout == saved.ask(saved.codec.encode(PROMPT)) + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("40GiB", 40 << 30), ("1.5 GB", 1_500_000_000), ("512MiB", 512 << 20), ("7B", 7)],
)
def test_bytes_are_read_with_their_units(text: str, expected: int) -> None:
    assert nbytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 gb", "1e9", "0x10", "90%"])
def test_what_is_no_number_of_bytes_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="a number of bytes such as 40GiB"):
        nbytes(text)


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


@pytest.mark.slow
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


@pytest.mark.slow
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
