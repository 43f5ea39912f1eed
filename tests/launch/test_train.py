"""The main job on tiny models: it learns, goes on where it stopped, and says in one line what is wrong."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh

from launch import config, metrics
from launch.sample import draw
from launch.train import main
from launch.training import run
from launch.world import CUBLAS_WORKSPACE, World, deterministic
from tests.ranks import run_ranks
from yafsdp_like.checkpoint import steps
from yafsdp_like.comm.consistency import AgreedError
from yafsdp_like.models import Decoder
from yafsdp_like.models.hf import load_hf_config, load_hf_weights
from yafsdp_like.optim.schedule import WarmupCosine

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "2"))  # how often a run is killed in one slow test
OPTIONS: dict[str, Any] = {
    "num_steps": 6,
    "seq_len": 16,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "model": {"preset": "tiny", "overrides": {"num_layers": 1, "dim": 32, "ffn_dim": 48, "vocab_size": 300}},
    "data": {"vocab_size": 300},
    "optimizer": {"lr": 0.01, "num_warmup_steps": 2},
    "precision": {"param_dtype": "float32"},
    "checkpoint": {"every": 2, "keep": 3, "export": False},
    "evaluation": {"every": 3, "num_batches": 2},
    "log": {"every": 2, "tensorboard": False},
    "sample": {"num_tokens": 3, "prompt": "the"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundreds of sentences out of a few words, and a cache beside them that all tests share."""
    words = ["the", "a", "whale", "ship", "sea", "saw", "sailed", "over", "under", "great", "white", "old", "captain"]
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(words, k=8)) + ".\n" for _ in range(800)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("<|endoftext|>\n".join("".join(sentences[i : i + 40]) for i in range(0, 800, 40)))
    return path


@pytest.fixture
def file(text: Path, tmp_path: Path) -> Path:
    """A configuration file of the smallest run, whose output goes to `run` beside it."""
    return written_to(tmp_path, text)


@pytest.fixture(scope="module")
def finished_file(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of a run that has been made, which tests may copy and must leave as it is."""
    file = written_to(tmp_path_factory.mktemp("finished"), text)
    train(file)
    return file


def written_to(directory: Path, text: Path) -> Path:
    path = directory / "config.yaml"
    data = {**OPTIONS["data"], "paths": [str(text)], "cache": str(text.parent / "cache")}
    path.write_text(yaml.safe_dump({**OPTIONS, "output_dir": str(directory / "run"), "data": data}))
    return path


def world_here() -> World:
    """This worker and the others, in the process group that they are in already."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return World(dist.get_rank(), torch.device("cpu"), mesh)


def run_here(arguments: list[str]) -> None:
    """The whole run on this worker, as one of its ranks."""
    run(config.load(arguments), world_here())


def train(file: Path, *overrides: str, world_size: int = 2, output: str = "run") -> list[metrics.Record]:
    """Train in workers that are there already; what metrics.jsonl then says."""
    directory = file.parent / output
    run_ranks(run_here, [str(file), f"--output_dir={directory}", *overrides], world_size=world_size)
    return metrics.read_records(directory)


def losses(records: list[metrics.Record]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records}


def stop_at(finished_file: Path, step: int, output: Path) -> None:
    """Make `output` what a finished run, had it been killed right after its save of `step`, would have left."""
    shutil.copytree(finished_file.parent / "run", output)
    for path in steps.complete_checkpoints(output):
        if steps.step_of(path) > step:
            shutil.rmtree(path)


# --- what a run does ---


def test_a_run_learns_and_leaves_its_files(file: Path) -> None:
    logs = ["--log.tensorboard=true", "--log.profile_step=4"]
    records = train(file, "--num_steps=40", "--checkpoint.every=20", *logs)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[0]["loss"] == pytest.approx(math.log(300), abs=0.2)
    assert records[-1]["loss"] < records[0]["loss"] - 1.5
    assert [record["step"] for record in records if "held_out_loss" in record] == [*range(3, 40, 3), 40]
    last = records[-1]
    assert last["tokens"] == 40 * 8 * 16 and last["lr"] == pytest.approx(0.001)
    assert last["mfu"] is None and last["tokens_per_s_per_device"] > 0 and last["tflops_per_device"] > 0
    assert sum(last["shares"].values()) == pytest.approx(1)
    output = file.parent / "run"
    names = {
        "config.yaml",
        "environment.json",
        "report.html",
        "tensorboard",
        "trace-rank0.json.gz",
        "trace-rank1.json.gz",
    }
    assert {path.name for path in output.iterdir()} >= names
    assert [path.name for path in steps.complete_checkpoints(output)] == ["step-20", "step-40"]
    assert read_events(output / "tensorboard", "loss") == pytest.approx(losses(records))
    assert config.load([str(output / "config.yaml")]).num_steps == 40
    assert json.loads((output / "environment.json").read_text())["ranks"] == 2


def read_events(directory: Path, tag: str) -> dict[int, float]:
    """What TensorBoard shows under a name, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_tensorboard_shows_a_step_that_was_trained_again_as_it_was_then(file: Path, finished_file: Path) -> None:
    stop_at(finished_file, 4, file.parent / "run")
    again = train(file, "--resume=auto", "--log.tensorboard=true")
    assert [record["step"] for record in again] == [1, 2, 3, 4, 5, 6]
    first = metrics.EventFile(file.parent / "events", 1)
    first.write([{"step": step, "loss": 1.0} for step in range(1, 7)])
    metrics.EventFile(file.parent / "events", 5).write([{"step": step, "loss": 2.0} for step in (5, 6)])
    assert read_events(file.parent / "events", "loss") == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0}


def test_resuming_equals_not_stopping_bit_for_bit(file: Path, finished_file: Path) -> None:
    whole = metrics.read_records(finished_file.parent / "run")
    stop_at(finished_file, 4, file.parent / "run")
    resumed = train(file, "--resume=auto")
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5, 6]
    assert losses(resumed) == losses(whole)
    assert [r["grad_norm"] for r in resumed] == [r["grad_norm"] for r in whole]
    assert resumed[-1]["held_out_loss"] == whole[-1]["held_out_loss"]


@pytest.mark.slow
def test_another_number_of_ranks_sees_the_same_text_and_stays_close(file: Path, finished_file: Path) -> None:
    stop_at(finished_file, 2, file.parent / "run")
    for world_size, last in ((1, 4), (4, 6)):  # 2 -> 1 -> 4 ranks
        overrides = [f"--num_steps={last}", "--resume=auto"]
        resumed = train(file, *overrides, *_same_rates(), world_size=world_size)
    reference = train(file, *_same_rates(), output="reference")
    assert losses(resumed) == pytest.approx(losses(reference), rel=1e-5)
    assert losses(metrics.read_records(finished_file.parent / "run"))[1] == losses(reference)[1]


def _same_rates() -> list[str]:
    """A rate that does not depend on where the run ends."""
    return ["--optimizer.final_lr_ratio=1.0"]


def test_a_finished_run_resumed_shows_its_end_again(file: Path, finished_file: Path) -> None:
    stop_at(finished_file, 6, file.parent / "run")
    assert train(file, "--resume=auto") == metrics.read_records(finished_file.parent / "run")


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_weights_of_a_checkpoint_load_in_transformers_and_here_with_equal_logits(file: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = train(file, "--checkpoint.export=true", f"--model.overrides.tie_embeddings={tied}".lower())
    directory = file.parent / "run" / "step-6" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.tensor([tokenizer("the old whale saw a ship.")["input_ids"]])
    (logits,) = run_ranks(logits_of, directory, tokens, world_size=1)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    source = ["--model.preset=null", "--model.overrides={}", f"--model.hf_dir={directory}"]
    again = train(file, *source, f"--data.tokenizer={directory}", "--num_steps=1", "--optimizer.lr=0", output="again")
    assert again[0]["held_out_loss"] == pytest.approx(records[-1]["held_out_loss"], rel=1e-5)


def logits_of(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = Decoder(load_hf_config(directory))
    load_hf_weights(model, directory)
    with torch.no_grad():
        return model(tokens)


def llama() -> torch.nn.Module:
    """A model of transformers, small and random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))


def test_a_model_of_transformers_trains_resumes_and_is_written(file: Path) -> None:
    foreign = ["--model.preset=null", "--model.overrides={}", "--model.factory=tests.launch.test_train:llama"]
    foreign += ["--model.blocks=model.layers", "--checkpoint.export=true"]
    records = train(file, "--num_steps=4", *foreign)
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert load_hf_config(file.parent / "run" / "step-4" / "hf").num_layers == 2
    resumed = train(file, "--num_steps=5", "--resume=auto", *foreign)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5]
    assert resumed[-1]["loss"] < records[-1]["loss"]


class Checked(torch.nn.Module):
    """A bigram model that trains only where every kernel must be deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(300, 300)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert torch.are_deterministic_algorithms_enabled()
        return self.logits(tokens)


FACTORY = ["--model.preset=null", "--model.overrides={}", "--checkpoint.export=false"]


def main_here(arguments: list[str]) -> int:
    """The command's exit status on this worker, which is in a process group already."""
    with mock.patch("launch.world.join", lambda device: world_here()), mock.patch("launch.world.leave"):
        return main(arguments)


def test_a_deterministic_run_says_so_and_has_only_such_kernels(file: Path) -> None:
    checked = [*FACTORY, "--model.factory=tests.launch.test_train:Checked", "--num_steps=2"]
    assert run_ranks(main_here, [str(file), *checked], world_size=1) == [1]  # the model refuses
    shutil.rmtree(file.parent / "run")
    assert run_ranks(main_here, [str(file), *checked, "--deterministic=true"], world_size=1) == [0]
    assert config.load([str(file.parent / "run" / "config.yaml")]).deterministic


def test_determinism_is_asked_for_before_cuda_starts_and_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[bool, str | None]:
        return torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS_WORKSPACE)

    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    with deterministic(False):
        assert state() == (False, None)
    with pytest.raises(KeyError), deterministic(True):
        assert state() == (True, ":4096:8")
        raise KeyError
    assert state() == (False, None)
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":16:8")
    with deterministic(True):
        assert state() == (True, ":4096:8")
    assert state() == (False, ":16:8")


# --- the command line ---


def test_overrides_win_and_the_global_batch_is_the_users_number(file: Path) -> None:
    options = config.load([str(file), "--optimizer.lr", "1e-4", "--model.overrides.num_layers=3", "--log.every=7"])
    assert options.optimizer.lr == 1e-4 and options.model.overrides["num_layers"] == 3 and options.log.every == 7
    assert [options.num_accumulated(world_size) for world_size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ValueError, match=r"global_batch_size 8 is not a multiple of micro_batch_size 2 × 3 ranks = 6"):
        options.num_accumulated(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lrr=1"], r"unknown key 'optimizer\.lrr' in the command line; did you mean 'optimizer\.lr'\?"),
        (["--lr=1"], r"unknown key 'lr' .*did you mean 'optimizer\.lr'"),
        (["--num_steps=many"], r"num_steps.*int.*many"),
        (["--optimizer.lr=fast"], r"optimizer\.lr.*float.*fast"),
        (["--num_steps=0"], r"num_steps must be at least 1, got 0"),
        (["--precision.param_dtype=float8"], r"param_dtype.*float8"),
        (["--model.preset=null"], r"exactly one of model\.preset, model\.hf_dir"),
        (["extra"], r"unexpected argument 'extra'"),
    ],
)
def test_a_mistyped_command_line_is_one_clear_line(file: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config.load([str(file), *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("output_dir: x\noptimiser:\n  lr: 1\n", r"unknown key 'optimiser' .*did you mean 'optimizer'\?"),
        ("output_dir: x\noptimizer:\n  lear: 1\n", r"unknown key 'optimizer\.lear' .*did you mean 'optimizer\."),
        ("output_dir: x\noptimizer: [\n", r"is not YAML"),
        ("- a\n", r"must hold keys and values, found list"),
    ],
)
def test_a_mistyped_file_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        config.load([str(tmp_path / "config.yaml")])


def test_without_a_file_the_usage_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="usage"):
        config.load([])
    with pytest.raises(ValueError, match="cannot read the configuration"):
        config.load([str(tmp_path / "nothing.yaml")])


# --- what cannot be trained ---


def refused_here(arguments: list[str]) -> str:
    """The words that the whole run fails with on this worker."""
    with pytest.raises(AgreedError) as caught:
        run_here(arguments)
    return str(caught.value)


def refusal(file: Path, *overrides: str, output: str = "run") -> str:
    """The words that all ranks fail with."""
    arguments = [str(file), f"--output_dir={file.parent / output}", *overrides]
    (words,) = set(run_ranks(refused_here, arguments))
    return words


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.paths=['/nowhere.txt']"], r"/nowhere\.txt does not exist"),
        (["--model.overrides.vocab_size=280"], r"the tokenizer has 300 tokens, the model's vocabulary only 280"),
        (["--model.overrides.layers=2"], r"unknown key 'model\.overrides\.layers'; did you mean 'num_layers'\?"),
        (["--model.overrides.num_layers=two"], r"model\.overrides\.num_layers is like 1, got 'two'|is like 2"),
        (["--model.preset=tinny"], r"unknown model\.preset 'tinny'; did you mean 'tiny'\?"),
        (["--seq_len=1000000"], r"lower seq_len"),
        (["--micro_batch_size=3"], r"is not a multiple of micro_batch_size 3 × 2 ranks = 6"),
        (["--resume=nowhere"], r"nowhere is not a complete checkpoint"),
    ],
)
def test_what_cannot_be_trained_is_refused_on_every_rank(file: Path, overrides: list[str], message: str) -> None:
    assert re.search(message, refusal(file, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*FACTORY, "--model.factory=tests.launch.test_train:Checked"], "Checked has no save_pretrained"),
        (["--model.overrides.qkv_bias=true", "--model.overrides.qk_norm=true"], "no family of transformers has qkv_b"),
    ],
)
def test_what_could_not_be_written_for_others_is_refused_before_it_is_trained(
    file: Path, overrides: list[str], message: str
) -> None:
    assert message in refusal(file, *overrides, "--checkpoint.export=true")
    assert not (file.parent / "run").exists()


def test_an_empty_text_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "no text in" in refusal(file, f"--data.paths=['{tmp_path / 'empty.txt'}']")


def test_an_output_directory_that_is_a_file_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "cannot write to output_dir" in refusal(file, output="taken")


def test_a_checkpoint_of_another_model_or_order_is_refused_and_an_earlier_run_not_overwritten(file: Path) -> None:
    train(file, "--num_steps=2")
    words = refusal(file, "--resume=auto", "--model.overrides.ffn_dim=64")
    assert re.search(r"is a checkpoint of another model: layers\.0\.mlp\.\w+\.weight is \[48, 32\] there", words)
    assert "in another order: seed is 0 there and 1 here" in refusal(file, "--resume=auto", "--seed=1")
    assert "holds step-2 of an earlier run; say --resume=auto" in refusal(file)


# --- processes ---


def command(file: Path, *overrides: str, num_ranks: int = 0) -> list[str]:
    """With torchrun, or without (0)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks else []
    return [sys.executable, *launcher, "-m", "launch.train", str(file), *overrides]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(arguments: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A command in a process group of its own, of which nothing is left afterwards."""
    with subprocess.Popen(
        arguments, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def finished(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """A command that ends by itself."""
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=170, check=False)


def errors_in(words: str) -> list[str]:
    return [line for line in words.splitlines() if line.startswith("error: ")]


def test_one_process_without_torchrun_trains_and_says_what_it_does(file: Path) -> None:
    result = finished(command(file))
    assert result.returncode == 0, result.stderr
    for words in ("memory plan of one rank of 1", "step 6/6  loss", "sample: the", "report.html", "step-6"):
        assert words in result.stdout


@pytest.mark.timeout(120 + 30 * KILLS)
@pytest.mark.slow
@pytest.mark.parametrize(("asynchronous", "kills"), [(True, 1), (False, KILLS), (True, KILLS)])
def test_kill_9_during_saves_then_resume_loses_only_steps_since_the_last_save(
    file: Path, asynchronous: bool, kills: int
) -> None:
    """With KILLS=10 in the environment: ten times each. In the end the losses are those of a run never killed."""
    steady = ["--checkpoint.every=1", "--log.every=1", "--evaluation.every=0", "--checkpoint.export=true"]
    steady += ["--optimizer.final_lr_ratio=1.0", f"--checkpoint.asynchronous={asynchronous}".lower()]
    last = 0
    for seed in range(kills):
        with started(command(file, *steady, "--num_steps=2000", "--resume=auto")) as process:
            wait_for(lambda last=last: _latest_step(file) >= last + 2, process)
            time.sleep(random.Random(seed).random() * 0.05)
            os.killpg(process.pid, signal.SIGKILL)
        logged = [record["step"] for record in metrics.read_records(file.parent / "run")]
        last = _latest_step(file)
        assert logged == list(range(1, len(logged) + 1))
        assert last >= logged[-1] - 2  # its own save may not have begun; asynchronously, the one before be under way
        print(f"kill {seed + 1}: step {logged[-1]} was logged, step {last} is complete")
    overrides = [*steady, f"--num_steps={last + 2}"]
    resumed = train(file, *overrides, "--resume=auto", world_size=1)
    assert losses(resumed) == losses(train(file, *overrides, world_size=1, output="whole"))


def _latest_step(file: Path) -> int:
    latest = steps.find_latest(file.parent / "run")
    return 0 if latest is None else steps.step_of(latest)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Dying(torch.nn.Module):
    """A bigram model whose second rank is killed in its third forward: within a step, perhaps while one is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(300, 300)
        self.num_forwards = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        if self.num_forwards == 3 and dist.get_rank() == 1:
            print(f"killed at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.logits(tokens)


DYING = [*FACTORY, "--model.factory=tests.launch.test_train:Dying", "--checkpoint.every=1"]


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_a_step_ends_the_run_within_seconds(file: Path) -> None:
    with started(command(file, *DYING, num_ranks=2)) as process:
        words = process.communicate(timeout=120)[0]
    killed = re.search(r"killed at ([\d.]+)", words)
    assert killed is not None and time.time() - float(killed[1]) < 15 and process.returncode != 0
    assert "Signal 9 (SIGKILL)" in words and "Traceback (most recent call last)" not in words.split("failed (exit")[0]


@pytest.mark.slow
def test_a_rank_killed_on_another_host_ends_this_one_too(file: Path) -> None:
    """The survivor says that it lost a rank, unless its launcher ends it first."""
    with two_hosts(file, *DYING) as hosts:
        said = "".join(host.communicate(timeout=120)[0] for host in hosts)
        assert all(host.returncode != 0 for host in hosts)
    killed = re.search(r"killed at ([\d.]+)", said)
    assert killed is not None and time.time() - float(killed[1]) < 40
    assert all("lost another rank" in error for error in errors_in(said))


@pytest.mark.slow(unless=lambda override: "nowhere" in override)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--data.paths=['/nowhere.txt']", "/nowhere.txt does not exist"),
        ("--optimizer.lrr=1", "did you mean 'optimizer.lr'?"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit_under_torchrun(file: Path, override: str, message: str) -> None:
    result = finished(command(file, override, num_ranks=2))
    assert result.returncode != 0
    (error,) = errors_in(result.stderr)
    assert message in error and "Traceback" not in result.stderr.split("error: ")[0]


@pytest.mark.slow(unless=lambda num_ranks, limit_kib: num_ranks == 0 and limit_kib == 64)
@pytest.mark.parametrize("num_ranks", [0, 2])
@pytest.mark.parametrize(
    ("overrides", "limit_kib", "message"),
    [
        (["--log.every=1", "--checkpoint.every=0", "--log.tensorboard=true"], 8, r"cannot write metrics to \S+run: "),
        ([], 64, r"the checkpoint \S+\.step-2\.partial could not be written, with"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_line_and_a_non_zero_exit(
    file: Path, overrides: list[str], limit_kib: int, message: str, num_ranks: int
) -> None:
    """A limit on the size of files stands for the disk: writing fails in the same places, without a mount."""
    train(file, "--num_steps=1", output="cached", world_size=1)  # so that text and tokenizer are there
    limited = ["bash", "-c", f'ulimit -f {limit_kib} && exec "$@"', "bash"]
    begin = time.monotonic()
    result = finished([*limited, *command(file, "--num_steps=100000", *overrides, num_ranks=num_ranks)])
    assert result.returncode != 0 and time.monotonic() - begin < 90
    (error,) = errors_in(result.stderr)
    assert re.search(message, error) and "Traceback" not in result.stderr.split("error: ")[0]
    assert steps.find_latest(file.parent / "run") is None


@contextmanager
def two_hosts(file: Path, *overrides: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Two launchers of one rank each, which meet as two hosts would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "1", "-m", "launch.train"]
    arguments = [*launcher, str(file), *overrides]
    with started(arguments) as first, started(arguments) as second:
        yield [first, second]


@pytest.mark.slow
def test_two_launchers_meet_as_two_hosts_would(file: Path) -> None:
    with two_hosts(file) as hosts:
        said = [host.communicate(timeout=170)[0] for host in hosts]
        assert [host.returncode for host in hosts] == [0, 0], said
    assert sorted("step 6/6  loss" in words for words in said) == [False, True]  # the first rank speaks
    assert "memory plan of one rank of 2" in "".join(said)


# --- parts ---


def test_the_rate_warms_up_linearly_and_ends_at_its_floor() -> None:
    rate = WarmupCosine(peak=1.0, num_warmup_steps=4, num_steps=11, final_ratio=0.1)
    assert [rate(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rate(7) == pytest.approx(0.55) and rate(10) == pytest.approx(0.1)
    assert all(rate(step) >= rate(step + 1) for step in range(4, 10))
    with pytest.raises(ValueError, match="between 0 and all of the 3 steps, got 4"):
        WarmupCosine(1.0, 4, 3)


def test_top_1_is_greedy_and_top_k_never_leaves_the_k_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    generator = torch.Generator().manual_seed(0)
    assert draw(logits, config.SampleOptions(top_k=1), generator).tolist() == [1]
    drawn = {int(draw(logits, config.SampleOptions(top_k=2), generator)) for _ in range(50)}
    assert drawn == {1, 3}
