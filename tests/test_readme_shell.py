"""README's shell commands: each is run as it is printed, or says here what is checked instead.

Blocks run in bash, word for word, in a directory that looks like a checkout: `python` and `torchrun` there are a script
that makes runs small (fewer steps and layers, less text, any free port) and then runs the real ones. What the fast
tests only parse, the slow ones run.
"""

import json
import lzma
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import run as torchrun

from launch import config, metrics
from yafsdp_like.data import text

pytestmark = pytest.mark.timeout(
    400
)  # the first test to need it trains three small models, each in processes of its own

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHIM = """#!{python}
import json, os, re, sys
words = [re.sub(r"^(--num_steps=\\d+)00$", r"\\1", word) for word in sys.argv[1:]]
if "launch.train" in words and "--help" not in words:
    at = 2 + words.index("launch.train")  # behind the file, so that what the README says wins
    words[at:at] = json.loads(os.environ["SMALLER"])
words += json.loads(os.environ["MORE"]).get(words[words.index("-m", 0 if words[0] == "-m" else 1) + 1], [])
launcher = ["-m", "torch.distributed.run", "--standalone"] if os.path.basename(sys.argv[0]) == "torchrun" else []
os.execv("{python}", ["{python}", *launcher, *words])
"""
SMALLER = ["--num_steps=2", "--seq_len=32", "--evaluation.num_batches=1", "--sample.num_tokens=2"]
SMALLER += ["--log.tensorboard=false"]
SMALL_MODEL = [f"--model.overrides.{size}" for size in ("num_layers=1", "dim=32", "ffn_dim=48")]
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
ASK = "Why is the sky blue?"


# --- what the README says ---


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of a block without their comments, one space between words."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(words) for line in lines if (words := shlex.split(line, comments=True))]


def block_of(command: str) -> str:
    """The one block that has this command."""
    (found,) = [block for block in blocks() if command in commands(block)]
    return found


TINY = "torchrun --nproc-per-node 2 -m launch.train configs/tiny.yaml"
MINE = f"{TINY} --output_dir=runs/mine --num_steps=200 --optimizer.lr=3e-3"
GO_ON = f"{TINY} --output_dir=runs/mine --num_steps=300 --optimizer.lr=3e-3 --resume=auto"
ALONE = "python -m launch.train configs/tiny.yaml --output_dir=runs/alone"
BOOK = f"{TINY} --data.paths=book.txt --output_dir=runs/book --num_steps=200"
SMOLLM2 = "torchrun --nproc-per-node 2 -m launch.train configs/smollm2.yaml"
BENCH = (
    "make bench BENCH_ARGS=--model 8b --seq-len 1024,2048,4096,8192 "
    "--impl unsharded,ours,ours-graph,ours-nccl,fsdp2 --optimizer fused"
)
CONTINUE = "python -m launch.generate runs/tiny/step-500 It was --max-tokens 50"
ANSWER = f"python -m launch.generate runs/smollm2/base --chat {ASK} --max-tokens 100 --temperature 0 --plan"
SERVE = "python -m launch.serve runs/smollm2/base --port 8000"
CURL = (
    "curl localhost:8000/v1/chat/completions -H Content-Type: application/json -d "
    f'{{"model": "base", "messages": [{{"role": "user", "content": "{ASK}"}}], "stream": true, '
    '"max_tokens": 100}'
)
CHECKED = {  # how
    "make train": "recipe",
    "make test": "recipe",
    "make test-fast": "recipe",
    "make test-all": "recipe",
    "make test-gpu": "recipe",
    BENCH: "recipe",
    "source .venv/bin/activate": "run",
    MINE: "run",
    GO_ON: "run",
    ALONE: "run",
    "cat README.md DESIGN.md > book.txt": "run",
    BOOK: "configuration; the slow test runs it",
    "python -m launch.train --help": "run",
    SMOLLM2: "configuration; the slow test runs it",
    "pip install torch==2.13.0": "arguments",
    "pip install -e .": "arguments",
    CONTINUE: "run",
    ANSWER: "run on a small model; the slow test takes the real one",
    SERVE: "run on a small model; the slow test takes the real one",
    CURL: "run",
}


def test_every_command_of_the_readme_is_checked_and_says_how() -> None:
    """A new one belongs into `CHECKED`, and into the test that checks it."""
    assert sorted(command for block in blocks() for command in commands(block)) == sorted(CHECKED)


# --- a checkout to run them in ---


class Checkout:
    """A directory with the repository's contents, its own `runs`, less of the carried text, and small runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("README.md", "DESIGN.md", "configs", "launch", "yafsdp_like", "scripts"):
            (directory / name).symlink_to(ROOT / name)
        (directory / "data").mkdir()
        some = lzma.decompress(text.CARRIED_TEXT.read_bytes())[:200_000].decode(errors="ignore")
        (directory / "data" / "english.txt.xz").write_bytes(lzma.compress(some.encode(), preset=1))
        binaries = directory / ".venv" / "bin"
        binaries.mkdir(parents=True)
        (binaries / "activate").write_text(f"export PATH={binaries}:$PATH\n")
        for name in ("python", "torchrun"):
            (binaries / name).write_text(SHIM.replace("{python}", sys.executable))
            (binaries / name).chmod(0o755)

    def environment(self, more: dict[str, Sequence[str]] | None = None, smaller: Sequence[str] = ()) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
        words = {"SMALLER": json.dumps([*SMALLER, *smaller]), "MORE": json.dumps(more or {}), "OMP_NUM_THREADS": "1"}
        return {**kept, **words}

    def run(self, block: str, more: dict[str, Sequence[str]] | None = None, smaller: Sequence[str] = ()) -> str:
        """Everything that the commands say; AssertionError with it if one fails."""
        script = f"set -euo pipefail\nsource .venv/bin/activate\n{block}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.directory,
            env=self.environment(more, smaller),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def trained(checkout: Checkout) -> str:
    """What the commands of the first ten minutes say."""
    return checkout.run(block_of(MINE), smaller=SMALL_MODEL)


@pytest.fixture(scope="module")
def models(checkout: Checkout, trained: str) -> Path:
    """The models that are generated from and served, small: a checkpoint of ours, and what it is for others."""
    (checkout.directory / "runs" / "tiny").mkdir()
    made = checkout.directory / "runs" / "tiny" / "step-500"
    made.symlink_to(checkout.directory / "runs" / "mine" / "step-3")
    base = checkout.directory / "runs" / "smollm2" / "base"
    base.mkdir(parents=True)
    for file in (made / "hf").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return base


# --- training ---


def test_the_commands_of_the_first_ten_minutes_train_go_on_and_need_no_torchrun(
    checkout: Checkout, trained: str
) -> None:
    steps = {name: [r["step"] for r in metrics.read_records(checkout.directory / "runs" / name)] for name in RUNS}
    assert steps == {"mine": [1, 2, 3], "alone": [1, 2]}
    for words in (
        "memory plan of one rank of 2",
        "memory plan of one rank of 1",
        "starting at step 2 of 3",
        "sample: ",
    ):
        assert words in trained
    assert "Traceback" not in trained and "rror: " not in trained


RUNS = ("mine", "alone")


def test_the_commands_for_a_text_of_ones_own_are_understood(checkout: Checkout) -> None:
    said = checkout.run(block_of(BOOK), more={"launch.train": ["--print_config"]}, smaller=SMALL_MODEL)
    assert (checkout.directory / "book.txt").read_text().startswith("# yafsdp_like")
    assert re.search(r"^  paths:\n  - book\.txt$", said, re.MULTILINE)
    assert "--optimizer.lr=float" in checkout.run("python -m launch.train --help")


def test_the_command_that_fine_tunes_is_understood(checkout: Checkout) -> None:
    said = checkout.run(block_of(SMOLLM2), more={"launch.train": ["--print_config"]})
    assert "hf_dir: runs/smollm2/base" in said


@pytest.mark.slow
def test_a_text_of_ones_own_is_trained_on(checkout: Checkout) -> None:
    said = checkout.run(block_of(BOOK), smaller=SMALL_MODEL)
    assert "text: " in said and "in 1 document, " in said
    assert [r["step"] for r in metrics.read_records(checkout.directory / "runs" / "book")] == [1, 2]


@pytest.mark.slow
def test_real_weights_are_tuned(tmp_path: Path, base: Path) -> None:
    checkout = Checkout(tmp_path)
    (tmp_path / "runs" / "smollm2").mkdir(parents=True)
    (tmp_path / "runs" / "smollm2" / "base").symlink_to(base)
    smaller = ["--global_batch_size=2", "--micro_batch_size=1", "--checkpoint.export=false"]
    checkout.run(block_of(SMOLLM2), smaller=smaller)
    records = metrics.read_records(tmp_path / "runs" / "smollm2" / "tuned")
    assert len(records) == 2 and 2 < records[0]["loss"] < 7  # of random weights 10.8


# --- recipes and packages ---


def recipe(command: str) -> list[list[str]]:
    """What `make` would run, as words; its own environment apart."""
    words = shlex.split(next(line for line in README.splitlines() if line.startswith(command)), comments=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("NPROC", "VENV", "MAKEFLAGS")}
    done = subprocess.run(
        [*words, "-n", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [
        shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines() if line.startswith(".venv/bin/")
    ]


def launched(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number of ranks that a torchrun command starts, and what it gives each of them."""
    assert words[:3] == [".venv/bin/python", "-m", "torch.distributed.run"]
    parsed = torchrun.parse_args(list(words[3:]))
    return int(parsed.nproc_per_node), [parsed.training_script, *parsed.training_script_args]


def test_make_train_trains_the_small_model_on_two_ranks() -> None:
    num_ranks, words = launched(recipe("make train")[-1])
    assert (num_ranks, words[0]) == (2, "launch.train")
    options = config.load([str(ROOT / words[1]), *words[2:]])
    assert (options.output_dir, options.num_steps, options.resume) == ("runs/tiny", 500, "auto")


def test_make_bench_measures_what_the_readme_names() -> None:
    from bench.implementations import IMPLEMENTATIONS
    from bench.options import parse_options

    num_ranks, words = launched(recipe("make bench")[-1])
    assert num_ranks == 2 and (ROOT / words[0]).is_file()
    options = parse_options(words[1:], IMPLEMENTATIONS)
    assert options.seq_lens == (1024, 2048, 4096, 8192) and options.optimizer == "fused"
    assert options.impls == ("unsharded", "ours", "ours-graph", "ours-nccl", "fsdp2")


@pytest.mark.parametrize(
    ("command", "markers"),
    [
        ("make test ", ["not gpu and not slow"]),
        ("make test-all", ["not gpu"]),
        ("make test-gpu", ["gpu", "not gpu and not slow"]),  # the latter of kernels alone
    ],
)
def test_make_test_runs_the_tests_that_the_readme_says(command: str, markers: list[str]) -> None:
    lines = recipe(command)
    tests = [words for words in lines if words[:3] == [".venv/bin/python", "-m", "pytest"]]
    assert [words[words.index("-m", 2) + 1] for words in tests] == markers
    lints = [words[:2] for words in lines if words[0] in (".venv/bin/ruff", ".venv/bin/mypy")]
    checks = [[".venv/bin/ruff", "check"], [".venv/bin/mypy"], [".venv/bin/mypy", "tests"]]
    assert lints == (checks if command == "make test " else [])


def test_make_test_fast_runs_tests_that_exist() -> None:
    (tests,) = [words for words in recipe("make test-fast") if words[:3] == [".venv/bin/python", "-m", "pytest"]]
    chosen = [word for word in tests if word.startswith("tests/")]
    assert len(chosen) > 10
    for path, _, name in (word.partition("::") for word in chosen):
        assert (ROOT / path).exists(), f"{path} is not there"
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_what_pip_is_told_exists() -> None:
    setup, makefile = (ROOT / "setup.py").read_text(), (ROOT / "Makefile").read_text()
    block = block_of("pip install -e .")
    assert [command.split()[:2] for command in commands(block)] == [["pip", "install"]] * 2
    (pinned,) = re.findall(r"torch==[\d.]+", block)
    assert f"echo {pinned}" in makefile
    assert torch.__version__.split("+")[0] >= re.findall(r"torch>=([\d.]+)", setup)[0]
    extras = re.findall(r"pip install -e '\.\[(\w+)\]'", README)
    assert set(extras) == {"train", "serve"}
    for extra in extras:
        assert f'"{extra}": {extra.upper()},' in setup


# --- generating and serving ---


def test_the_commands_that_generate_say_something(checkout: Checkout, models: Path) -> None:
    lines = [line for line in block_of(CONTINUE).splitlines() if "launch.generate" in line]
    assert [command for line in lines for command in commands(line)] == [CONTINUE, ANSWER]
    continued, answered = (checkout.run(line, more={"launch.generate": ["--max-tokens", "3"]}) for line in lines)
    assert continued.strip()
    assert "kv slabs" in answered  # of the plan


@contextmanager
def serving(checkout: Checkout) -> Iterator[str]:
    """The address of README's server, on a port that is free."""
    (line,) = [line for line in block_of(SERVE).splitlines() if commands(line) == [SERVE]]
    script = f"source .venv/bin/activate; exec {line}"
    environment = checkout.environment(more={"launch.serve": ["--port", "0", "--max-seq-len", "128"]})
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=checkout.directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said: list[str] = []
            for line in process.stdout or ():
                said.append(line)
                if found := re.search(r"serving on http://(\S+)", line):
                    yield found[1]
                    break
            else:
                raise AssertionError("".join(said))
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def answer_of(checkout: Checkout, address: str) -> tuple[str, dict[str, Any]]:
    """What README's curl gets: the text of the stream, and its last object."""
    said = checkout.run(
        'curl() { command curl -sS --max-time 100 "$@"; }\n' + block_of(CURL).replace("localhost:8000", address)
    )
    assert said.rstrip().endswith("data: [DONE]"), said
    pieces = [json.loads(line.removeprefix("data: ")) for line in said.split("\n") if line.startswith("data: {")]
    return "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces), pieces[-1]


def test_curl_gets_an_answer_from_the_server_that_the_readme_starts(checkout: Checkout, models: Path) -> None:
    with serving(checkout) as address:
        words, last = answer_of(checkout, address)
    assert words and last["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_real_weights_answer_a_prompt_and_curl(tmp_path: Path, base: Path) -> None:
    checkout = Checkout(tmp_path)
    (tmp_path / "runs" / "smollm2").mkdir(parents=True)
    (tmp_path / "runs" / "smollm2" / "base").symlink_to(base)
    (line,) = [line for line in block_of(ANSWER).splitlines() if commands(line) == [ANSWER]]
    assert "sky" in checkout.run(line)
    with serving(checkout) as address:
        words, last = answer_of(checkout, address)
    assert any(word in words for word in ("sky", "blue", "light", "color", "hue")), words  # another answer each time
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
