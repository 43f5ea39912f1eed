"""How a run ends before its time, and how it goes on: signals, numbers that are none, damaged checkpoints, changes."""

# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

from launch import config, metrics
from launch.stop_signals import STOPPED, Stopping
from tests.launch.test_train import (
    ENVIRONMENT,
    FACTORY,
    ROOT,
    command,
    file,
    finished_file,
    losses,
    main_here,
    refusal,
    run_here,
    started,
    stop_at,
    text,
    train,
    wait_for,
)
from tests.ranks import run_ranks
from yafsdp_like.checkpoint import steps


def said_here(arguments: list[str]) -> str:
    """What the whole run says on this worker."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run_here(arguments)
    return said.getvalue()


def said(file: Path, *overrides: str, world_size: int = 2) -> str:
    """What the first rank says, of a run whose output is `run`."""
    arguments = [str(file), f"--output_dir={file.parent / 'run'}", *overrides]
    return run_ranks(said_here, arguments, world_size=world_size)[0]


# --- signals ---


class Bigrams(nn.Module):
    """A model of one matrix, to which something happens in its n-th forward of training."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(300, 300)
        self.scale = nn.Parameter(torch.ones(1))  # one rank has no row of it
        self.num_forwards = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num_forwards += self.training
        return self.logits(tokens) * self.scale


class Signalled(Bigrams):
    """The second rank is told to stop in the fourth step (of two forwards), the first rank is not."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)
        if self.training and self.num_forwards == 7 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # a thread hears it
        return logits


STEADY = [*FACTORY, "--checkpoint.every=0", "--evaluation.every=0", "--num_steps=6"]


def test_a_signal_to_one_rank_stops_all_at_one_step_and_resume_goes_on_bit_for_bit(file: Path) -> None:
    model = "--model.factory=tests.launch.test_going_on:Signalled"
    assert run_ranks(main_here, [str(file), *STEADY, model]) == [STOPPED, STOPPED]
    assert [path.name for path in steps.complete_checkpoints(file.parent / "run")] in (
        ["step-4"],
        ["step-5"],
    )  # it may be heard a forward later
    resumed = train(file, *STEADY, model, "--resume=auto")
    whole = train(file, *STEADY, "--model.factory=tests.launch.test_going_on:Bigrams", output="whole")
    assert losses(resumed) == losses(whole) and len(resumed) == 6


class PartlyUsed(Bigrams):
    """One parameter is never used, and another from the fifth step (of two forwards) on, whose moments begin then."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 5)
        self.register_buffer("num_steps", torch.zeros(()))  # goes on with the run
        self.late = nn.Parameter(torch.ones(300))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num_steps += self.training
        logits = super().forward(tokens)
        return logits * self.late if self.num_steps > 8 else logits


def test_a_run_goes_on_where_parameters_had_no_gradient_yet(file: Path) -> None:
    """Prevents: a checkpoint that no run can load, since a new optimizer expects states of all parameters."""
    rates = ["--optimizer.final_lr_ratio=1", "--optimizer.num_warmup_steps=0"]
    model = ["--model.factory=tests.launch.test_going_on:PartlyUsed", *rates]
    train(file, *STEADY[:-1], *model, "--num_steps=3")
    resumed = train(file, *STEADY, *model, "--resume=auto")
    whole = train(file, *STEADY, *model, output="whole")
    assert losses(resumed) == losses(whole) and len(resumed) == 6


class SignalledLate(Bigrams):
    """The second rank is told to stop in an evaluation, which would take minutes."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.training and dist.get_rank() == 1 and self.num_forwards:
            self.num_forwards = 0
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return super().forward(tokens)


def test_an_evaluation_is_left_where_a_rank_is_told_to_stop(file: Path) -> None:
    late = [*FACTORY, "--model.factory=tests.launch.test_going_on:SignalledLate", "--checkpoint.every=0"]
    late += ["--evaluation.every=1", "--evaluation.num_batches=100000"]
    assert run_ranks(main_here, [str(file), *late], timeout=50.0) == [STOPPED, STOPPED]
    assert [path.name for path in steps.complete_checkpoints(file.parent / "run")] == ["step-1"]
    assert "held_out_loss" not in metrics.read_records(file.parent / "run")[0]


def told(stopping: Stopping, *numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        until(lambda: stopping.asked is not None)
        time.sleep(0.05)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a process would have ended with."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_one_signal_is_a_wish_and_a_second_one_the_end(number: signal.Signals, statuses: list[int]) -> None:
    before = signal.getsignal(number)
    with Stopping(25.0, end=statuses.append) as stopping:
        stopping.phase = "training"
        told(stopping, number)
        assert stopping.asked == number and statuses == []
        told(stopping, signal.SIGTERM)
        until(lambda: statuses == [128 + signal.SIGTERM])
    assert signal.getsignal(number) == before


def test_before_the_first_step_and_after_the_last_one_a_signal_is_the_end(statuses: list[int]) -> None:
    with Stopping(25.0, end=statuses.append) as stopping:
        told(stopping, signal.SIGTERM)
        until(lambda: statuses == [STOPPED])
    with Stopping(25.0, end=statuses.append) as stopping:
        stopping.phase = "ending"
        told(stopping, signal.SIGINT)
        until(lambda: statuses == [STOPPED, STOPPED])


def test_a_rank_that_cannot_save_ends_when_its_time_is_over_or_another_rank_has_gone(
    statuses: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with Stopping(0.1, end=statuses.append) as stopping:
        stopping.phase = "training"
        told(stopping, signal.SIGTERM)
        until(lambda: 128 + signal.SIGTERM in statuses)
    assert "no checkpoint within 0.1 s after SIGTERM (checkpoint.grace_seconds)" in capsys.readouterr().err
    statuses.clear()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    with Stopping(25.0, end=statuses.append) as stopping:
        stopping.phase, stopping.peers = "training", [os.getpid(), gone.pid]
        told(stopping, signal.SIGUSR1)
        until(lambda: 1 in statuses)
    gone.wait()


def test_torchrun_and_the_sender_of_a_signal_are_not_two(statuses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Stopping(25.0, end=statuses.append) as stopping:
        stopping.phase = "training"
        told(stopping, signal.SIGINT, signal.SIGINT, signal.SIGTERM)
        assert stopping.is_bounded and statuses == []


ENDLESS = ["--num_steps=1000000", "--checkpoint.every=0", "--evaluation.every=0", "--log.every=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "number"),
    [
        (0, signal.SIGTERM),
        pytest.param(0, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_told_to_stop_saves_says_so_and_has_a_status_of_its_own(
    file: Path,
    num_ranks: int,
    number: signal.Signals,
) -> None:
    with started(command(file, *ENDLESS, num_ranks=num_ranks)) as process:
        wait_for(lambda: len(metrics.read_records(file.parent / "run")) > 1, process)
        process.send_signal(number)
        words = process.communicate(timeout=120)[0]
    (stopped,) = re.findall(
        rf"^stopped at step (\d+) of 1000000 by {number.name}: \S+ is saved; resume with", words, re.M
    )
    latest = steps.find_latest(file.parent / "run")
    assert latest is not None and latest.name == f"step-{stopped}"
    assert metrics.read_records(file.parent / "run")[-1]["step"] == int(stopped)
    if not num_ranks:
        assert process.returncode == STOPPED and "Traceback" not in words


# --- numbers that are none ---


class Exploding(Bigrams):
    """The gradient of one of two layers is not finite in the fourth step, on the second rank only."""

    bad = float("nan")

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(300, 300, bias=False)
        self.layers = nn.ModuleDict({"first": nn.Linear(300, 300), "second": nn.Linear(300, 300)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.good(super().forward(tokens))
        if self.num_forwards == 8 and dist.get_rank() == dist.get_world_size() - 1:
            assert hidden.requires_grad
            hidden = hidden + 0 * Spoiled.apply(self.layers["second"](hidden.detach()), self.bad)
        return self.layers["second"](self.layers["first"](hidden))


class Spoiled(torch.autograd.Function):
    """What is given; its gradient is `bad` everywhere."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, bad: float) -> torch.Tensor:
        ctx.bad = bad
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.full_like(grad, ctx.bad), None


class Overflowing(Exploding):
    bad = float("inf")


EXPLODING = [*FACTORY, "--checkpoint.every=1", "--evaluation.every=0", "--log.every=3"]


@pytest.mark.parametrize(("name", "norm"), [("Exploding", "nan"), ("Overflowing", "(nan|inf)")])
def test_a_gradient_that_is_not_finite_stops_all_ranks_with_its_step_and_module_and_no_checkpoint_of_it(
    file: Path,
    name: str,
    norm: str,
) -> None:
    words = refusal(file, *EXPLODING, f"--model.factory=tests.launch.test_going_on:{name}")
    assert re.search(
        rf"^step 4: the gradient is not finite \(norm {norm}\), the first is that of \S*layers\.second", words
    )
    assert [path.name for path in steps.complete_checkpoints(file.parent / "run")] == ["step-1", "step-2", "step-3"]
    assert [record["step"] for record in metrics.read_records(file.parent / "run")] == [1, 2, 3]


def test_by_choice_such_a_step_is_left_out_and_training_goes_on(file: Path) -> None:
    skip = [*EXPLODING, "--optimizer.nonfinite=skip"]
    words = said(file, *skip, "--model.factory=tests.launch.test_going_on:Exploding")
    assert "step 4: the gradient is not finite (norm nan)" in words and "skipped" in words
    records = metrics.read_records(file.parent / "run")
    assert [record["step"] for record in records if record["grad_norm"] is None] == [4]
    assert all(record["loss"] is not None for record in records) and len(records) == 6
    assert records[-1]["loss"] < records[0]["loss"]


class Hopeless(Bigrams):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * (1.0 if self.num_forwards < 3 else float("nan"))


def test_skipping_ends_where_every_step_is_skipped(file: Path) -> None:
    skip = [*EXPLODING, "--optimizer.nonfinite=skip", "--num_steps=1000"]
    words = refusal(file, *skip, "--model.factory=tests.launch.test_going_on:Hopeless")
    assert words.startswith("step 12: ") and words.endswith("after 10 steps that were skipped for it")


class Silent(Bigrams):
    """Its own loss is none in the third step, of which its gradient knows nothing."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(super().forward(tokens).flatten(0, 1), targets.flatten())
        return loss + (float("nan") if 5 <= self.num_forwards <= 6 else 0.0)


def test_a_loss_that_is_not_finite_is_noticed_before_anything_is_saved(file: Path) -> None:
    file_of = "tests.launch.test_going_on"
    silent = [*FACTORY, f"--model.factory={file_of}:Silent", "--evaluation.every=0", "--sample.num_tokens=0"]
    words = refusal(file, *silent, "--checkpoint.every=2", "--log.every=1000")
    assert words.startswith("step 3: the loss is not finite, though its gradient is")
    assert [path.name for path in steps.complete_checkpoints(file.parent / "run")] == ["step-2"]


def test_weights_that_are_not_finite_are_not_saved(file: Path) -> None:
    huge = ["--optimizer.lr=1e19", "--optimizer.num_warmup_steps=0", "--optimizer.weight_decay=1e19"]
    words = refusal(file, *FACTORY, "--model.factory=tests.launch.test_going_on:Bigrams", "--checkpoint.every=1", *huge)
    assert re.search(r"^step 1: the weights are not finite, the first are those of module\.logits \(weight\)", words)
    assert steps.find_latest(file.parent / "run") is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_grad_norm=-1", r"optimizer\.max_grad_norm must be above 0, or null for no clipping, got -1\.0"),
        ("max_grad_norm=0", r"max_grad_norm must be above 0, or null"),
        ("max_grad_norm=.nan", r"max_grad_norm must be above 0, or null"),
        ("max_grad_norm=.inf", r"max_grad_norm must be above 0, or null"),
        ("lr=.nan", r"optimizer\.lr must be at least 0, got nan"),
        ("lr=-1e-3", r"optimizer\.lr must be at least 0"),
        ("betas=[0.9, 1.0]", r"optimizer\.betas must be at least 0 and below 1, got 1\.0"),
        ("weight_decay=-0.1", r"optimizer\.weight_decay must be at least 0"),
        ("nonfinite=ignore", r"nonfinite"),
    ],
)
def test_a_number_that_cannot_train_is_refused(file: Path, option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load([str(file), f"--optimizer.{option}"])


def test_null_turns_clipping_off_and_the_norm_is_still_known(file: Path) -> None:
    short = ["--num_steps=2", "--checkpoint.every=0"]
    unclipped = train(file, *short, "--optimizer.max_grad_norm=null")
    clipped = train(file, *short, "--optimizer.max_grad_norm=1000.0", output="clipped")
    assert losses(unclipped) == losses(clipped)
    assert [r["grad_norm"] for r in unclipped] == [r["grad_norm"] for r in clipped]
    assert losses(train(file, *short, "--optimizer.max_grad_norm=0.01", output="small")) != losses(clipped)


# --- what a resumed run is told ---


def groups_here(arguments: list[str]) -> list[dict[str, Any]]:
    """The optimizer's groups at the end of a run on this worker, without their parameters."""
    from unittest import mock

    from launch import trainer

    seen: list[Any] = []
    build = trainer.build_optimizer

    def watched(*given: Any) -> Any:
        seen.append(build(*given))
        return seen[0]

    with mock.patch.object(trainer, "build_optimizer", watched):
        run_here(arguments)
    return [{key: value for key, value in group.items() if key != "params"} for group in seen[0].param_groups]


def test_what_a_resumed_run_is_told_otherwise_is_applied_and_said(file: Path, finished_file: Path) -> None:
    stop_at(finished_file, 4, file.parent / "run")
    changes = ["--optimizer.weight_decay=0.3", "--optimizer.betas=[0.8, 0.9]", "--optimizer.eps=1e-6"]
    changes += ["--optimizer.lr=0.02", "--num_steps=7", "--optimizer.final_lr_ratio=1.0"]
    arguments = [str(file), f"--output_dir={file.parent / 'run'}", "--resume=auto", *changes]
    matrices, others = run_ranks(groups_here, arguments)[0]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(tuple(group["betas"]) == (0.8, 0.9) and group["eps"] == 1e-6 for group in (matrices, others))
    assert metrics.read_records(file.parent / "run")[-1]["lr"] == pytest.approx(0.02)
    output = file.parent / "run"
    assert yaml.safe_load((output / "config.yaml").read_text())["optimizer"]["weight_decay"] == 0.3
    assert yaml.safe_load((output / "config-until-step-4.yaml").read_text())["optimizer"]["weight_decay"] == 0.1


def test_the_differences_are_printed_and_none_where_there_are_none(file: Path, finished_file: Path) -> None:
    stop_at(finished_file, 4, file.parent / "run")
    words = said(file, "--resume=auto", "--optimizer.weight_decay=0.3", "--optimizer.lr=0.02", "--num_steps=5")
    assert "from step 5 on, other than when step-4 was saved:" in words
    assert "  optimizer.weight_decay  0.1 -> 0.3\n" in words and "  optimizer.lr  0.01 -> 0.02\n" in words
    assert "  num_steps  6 -> 5 (also the length of the rate's schedule)\n" in words
    assert words.count(" -> ") == 3
    latest = file.parent / "run" / "step-5"
    metadata = json.loads((latest / steps.METADATA).read_text())
    del metadata["config"]  # an older one, of which config.yaml tells
    (latest / steps.METADATA).write_text(json.dumps(metadata))
    again = said(file, "--resume=auto", "--optimizer.weight_decay=0.3", "--optimizer.lr=0.02", "--num_steps=5")
    assert " -> " not in again
    assert "starting at step 5 of 5: none is left; to go on, raise num_steps" in again
    assert sorted(path.name for path in (file.parent / "run").glob("config*")) == [
        "config-until-step-4.yaml",
        "config.yaml",
    ]


EIGHT_HEADS = ["--model.overrides.num_heads=8", "--model.overrides.num_kv_heads=4"]  # all shapes stay


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (EIGHT_HEADS, r"is a checkpoint of another model: num_heads is 4 there and 8 here"),
        (["--seq_len=8"], r"in another order: seq_len is 16 there and 8 here"),
        (["--data.vocab_size=290"], r"on other data .*\(data\.vocab_size 300 -> 290\)"),
    ],
)
def test_what_cannot_be_applied_is_refused_and_the_old_configuration_stays(
    file: Path,
    finished_file: Path,
    overrides: list[str],
    message: str,
) -> None:
    stop_at(finished_file, 4, file.parent / "run")
    before = (file.parent / "run" / "config.yaml").read_text()
    assert re.search(message, refusal(file, "--resume=auto", *overrides))
    assert (file.parent / "run" / "config.yaml").read_text() == before


# --- checkpoints that are damaged ---


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shards/__1_0.distcp", cut, r"shards/__1_0\.distcp has [\d,]+ bytes of [\d,]+"),
        ("shards/__0_0.distcp", Path.unlink, r"shards/__0_0\.distcp is missing"),
        ("shards/__1_0.distcp", zero, r"\(rank [01]\)"),
        ("shards/.metadata", cut, r"shards/\.metadata is not the metadata of a"),
        ("shards/.metadata", Path.unlink, r"it has no shards/\.metadata"),
        ("metadata.json", cut, r"metadata\.json: expected an object in JSON"),
        ("metadata.json", Path.unlink, r"it has no metadata\.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    file: Path,
    finished_file: Path,
    name: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    stop_at(finished_file, 6, file.parent / "run")
    damage(file.parent / "run" / "step-6" / name)
    words = said(file, "--resume=auto")
    assert re.search(rf"run/step-6 is broken: .*{message}.*; going on from step-4", words)
    records = metrics.read_records(file.parent / "run")
    assert losses(records) == losses(metrics.read_records(finished_file.parent / "run"))
    assert (file.parent / "run" / "step-6.broken").is_dir()
    assert steps.damage(file.parent / "run" / "step-6") is None


def test_where_no_checkpoint_can_be_read_nothing_is_trained(file: Path, finished_file: Path) -> None:
    stop_at(finished_file, 2, file.parent / "run")
    cut(file.parent / "run" / "step-2" / "shards" / "__0_0.distcp")
    words = refusal(file, "--resume=auto")
    assert re.search(r"^no checkpoint can be read: \S+step-2 is broken: .*; to start anew, move them away", words)
    assert re.search(
        r"step-2 is not a complete checkpoint", refusal(file, f"--resume={file.parent / 'run' / 'step-2'}")
    )


# --- what is said ---


def test_the_first_step_is_printed_and_bytes_are_readable(file: Path) -> None:
    words = said(file, "--num_steps=4", "--log.every=1000", "--checkpoint.every=0", "--evaluation.every=0")
    assert re.findall(r"^step (\d+)/4  loss", words, re.MULTILINE) == ["1", "4"]
    assert re.search(r"peak on one rank: [\d.]+ [MG]iB of host memory", words)
    assert json.loads((file.parent / "run" / "environment.json").read_text())["ranks"] == 2
    shutil.rmtree(file.parent / "run")


# --- under SLURM ---

SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "scontrol $*"\n'


def batch_job(directory: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """configs/slurm.sh as SLURM would run it on one host with one device: the command and its environment."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (directory / name).write_text(script)
        (directory / name).chmod(0o755)
    (directory / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    python = directory / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    slurm = {"JOB_NODELIST": "h", "JOB_ID": str(free_port() - 20000), "JOB_NUM_NODES": "1", "GPUS_ON_NODE": "1"}
    environment = {**ENVIRONMENT, **{f"SLURM_{key}": value for key, value in slurm.items()}, "SLURM_CPUS_PER_TASK": "1"}
    return ["bash", str(ROOT / "configs" / "slurm.sh"), *arguments], {
        **environment,
        "PATH": f"{directory}:{os.environ['PATH']}",
    }


def free_port() -> int:
    """One of those that the script takes."""
    for port in random.Random(os.getpid()).sample(range(20000, 40000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.timeout(400)  # four processes that import torch, where others do too
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_whose_time_is_over_saves_is_requeued_and_goes_on(
    file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """One that is preempted is requeued by SLURM itself."""
    command, environment = batch_job(tmp_path, str(file), *ENDLESS[1:])
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [*command, "--num_steps=1000000"], env=environment, cwd=tmp_path, stdout=output, stderr=output
        )
        try:
            until(lambda: len(metrics.read_records(file.parent / "run")) > 1 or job.poll() is not None, 150)
            job.send_signal(number)
            assert job.wait(100) != 0
        finally:
            job.kill()
    words = log.read_text()
    (stopped,) = re.findall(r"^stopped at step (\d+) of 1000000 by SIGUSR1", words, re.MULTILINE)
    assert bool(re.search(r"^scontrol requeue \d+$", words, re.MULTILINE)) == (number == signal.SIGUSR1), words
    more = f"--num_steps={int(stopped) + 1}"
    if number == signal.SIGUSR1:  # the same words again; the process itself with the other signal
        (tmp_path / "srun").write_text('#!/bin/bash\necho "$@"\n')
    again = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 150}
    done = subprocess.run([*command, more], check=False, **again)
    assert done.returncode == 0, done.stderr
    assert "requeue" not in done.stdout
    if number == signal.SIGUSR1:
        assert done.stdout.endswith(f"{more} --resume=auto\n")
        assert train(file, *ENDLESS[1:], more, "--resume=auto", world_size=1)[-1]["step"] == int(stopped) + 1
    else:
        assert f"starting at step {stopped} of {int(stopped) + 1}" in done.stdout
