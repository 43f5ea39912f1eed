"""Train a decoder on text, sharded over the ranks that are there.

    torchrun --nproc-per-node 2 -m launch.train configs/tiny.yaml
    python -m launch.train configs/tiny.yaml --num_steps=50 --resume=auto

Owns the order of things: what is built when, what a step is, when to log, evaluate and save. Each thing itself is
elsewhere. Errors are one line and exit status 1 on all ranks, except mistakes of ours, which keep their traceback.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch import build, config, curve, metrics, sample
from launch.config import Config
from launch.console import Console
from launch.profiling import Profiling
from launch.recipe import recipe_of
from launch.state import RunState, find_start, prepare_directory
from launch.world import World, join, leave, rank_from_environment
from yafsdp_like.comm.agreement import AgreedError, together
from yafsdp_like.data import Batches, PackedText, prepare, unigram_entropy
from yafsdp_like.optim.schedule import WarmupCosine

LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed? ?out|remote process exited")
GRACE_SECONDS = 5.0  # a launcher ends all ranks when one has ended; the first rank is to say why before


@dataclass
class Log:
    """Where numbers go: the clock, the files and the console; and steps whose numbers are still on the device."""

    timeline: metrics.Timeline
    recorder: metrics.Recorder | None  # the first rank's
    console: Console
    peak_tflops: float | None
    flops_per_step: int | None
    start: float = field(default_factory=time.perf_counter)
    pending: list[tuple[int, Tensor, Tensor, float]] = field(default_factory=list)  # step, loss, norm, rate


class Trainer:
    """One run on one rank."""

    def __init__(self, options: Config, world: World, corpus: PackedText, model: Any) -> None:
        self.options, self.world, self.corpus, self.model = options, world, corpus, model
        self.train_batches = corpus.train_batches(options.seq_len, options.seed)
        self.held_out_batches = corpus.heldout_batches(options.seq_len)
        self.num_accumulated = options.num_accumulated(world.size)
        self.optimizer = build.build_optimizer(model, options, world)
        num_warmup_steps = min(options.optimizer.num_warmup_steps, options.num_steps)
        self.rate = WarmupCosine(
            options.optimizer.lr, num_warmup_steps, options.num_steps, options.optimizer.final_lr_ratio
        )
        self.step = 0  # optimizer steps done
        self.position = 0  # sequences of the training text seen by all ranks together

    def train_step(self, log: Log) -> None:
        """One optimizer step over one global batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        batch = self._batch(self.train_batches, self.position)
        log.timeline.end("data")
        loss = self._forward_backward(*batch)
        log.timeline.end("forward_backward")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        log.timeline.end("optimizer")
        log.pending.append((self.step + 1, loss, norm, self.rate(self.step)))
        self.step += 1
        self.position += self.options.global_batch_size

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the first `num_batches` global batches of the held-out text."""
        self.model.eval()
        total = torch.zeros((), device=self.world.device)
        num_batches = self.options.evaluation.num_batches
        for batch_index in range(num_batches):
            tokens, targets = self._batch(self.held_out_batches, batch_index * self.options.global_batch_size)
            for micro in zip(*self._split(tokens, targets), strict=True):
                total += self.model(*micro) / self.num_accumulated / num_batches
        self.model.train()
        return self.world.mean(total).item()

    def _forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Gradients of this rank's rows (B, T), reduced over ranks; the rows' mean loss."""
        total = torch.zeros((), device=self.world.device)
        for micro in zip(*self._split(tokens, targets), strict=True):
            loss = self.model(*micro) / self.num_accumulated
            loss.backward()
            total += loss.detach()
        return total

    def _split(self, *rows: Tensor) -> list[tuple[Tensor, ...]]:
        return [tensor.split(self.options.micro_batch_size) for tensor in rows]

    def _batch(self, batches: Batches, position: int) -> list[Tensor]:
        """Tokens and targets (B, T): this rank's rows of the global batch at `position`."""
        world = self.world
        pair = batches.batch(position, self.options.global_batch_size, world.rank, world.size)
        if world.device.type == "cuda":
            return [rows.pin_memory().to(world.device, non_blocking=True) for rows in pair]
        return list(pair)


def run(options: Config, world: World) -> None:
    """Everything between joining the process group and leaving it."""
    with together():
        options.num_accumulated(world.size)
        recipe = recipe_of(options.model, options.seed)
        model_vocab_size = recipe.vocab_size
        start = find_start(options)
        if world.is_first:
            prepare_directory(options, world)
    with together():
        corpus = open_text(options, model_vocab_size)
    with together():
        model = build.build_model(recipe, options, world)
    console = Console(world.is_first, options.num_steps, start.step)
    console.say(build.describe_plan(model, world))
    with together():
        recipe.fill(model, world.device, from_checkpoint=start.path is not None)
    with together():
        trainer = Trainer(options, world, corpus, model)
    state = RunState(trainer, recipe)
    state.restore(start)
    log = open_log(options, world, trainer, console)
    profiling = Profiling(options.log, world, Path(options.output_dir))
    console.say(opening_words(trainer))
    try:
        train(trainer, state, log, profiling)
        finish(trainer, state, log)
    finally:
        console.close()
        profiling.close()
        if log.recorder is not None:
            log.recorder.close()


def train(trainer: Trainer, state: RunState, log: Log, profiling: Profiling) -> None:
    """All steps that are left; the last one is logged, evaluated and saved."""
    options = trainer.options
    log.timeline.take()
    while trainer.step < options.num_steps:
        profiling.before(trainer.step + 1)
        trainer.train_step(log)
        profiling.after(trainer.step)
        is_last = trainer.step == options.num_steps
        evaluates = is_last or _is_due(trainer.step, options.evaluation.every)
        saves = is_last or _is_due(trainer.step, options.checkpoint.every)
        held_out_loss = None
        if evaluates:
            held_out_loss = trainer.evaluate()
            log.timeline.end("evaluation")
        if saves or evaluates or _is_due(trainer.step, options.log.every):
            write_log(trainer, log, held_out_loss)
            state.check()
        if saves:
            state.save()
            log.timeline.end("checkpoint")
    state.close()


def write_log(trainer: Trainer, log: Log, held_out_loss: float | None) -> None:
    """Bring the numbers of all steps since the last call to the host, average them over ranks, write them."""
    world, options = trainer.world, trainer.options
    losses = world.mean(torch.stack([loss for _, loss, _, _ in log.pending])).tolist()
    norms = [float(build.whole(norm)) for _, _, norm, _ in log.pending]
    tokens_per_step = options.global_batch_size * options.seq_len
    records = [
        {"step": step, "tokens": step * tokens_per_step, "loss": loss, "grad_norm": norm, "lr": rate}
        for (step, _, _, rate), loss, norm in zip(log.pending, losses, norms, strict=True)
    ]
    num_steps = len(log.pending)
    log.pending.clear()
    flops = None if log.flops_per_step is None else num_steps * log.flops_per_step
    records[-1] |= metrics.speed(
        log.timeline.take(), num_steps * tokens_per_step, flops, world, log.peak_tflops
    ) | metrics.memory(world.device)
    if held_out_loss is not None:
        records[-1]["held_out_loss"] = held_out_loss
    with together():
        if log.recorder is not None:
            log.recorder.write(records)
    log.console.show(records[-1])


def finish(trainer: Trainer, state: RunState, log: Log) -> None:
    """What is shown at the end: a sample, the curve, and where everything lies."""
    options, corpus = trainer.options, trainer.corpus
    if options.sample.num_tokens:
        prompt = corpus.tokenizer.encode(options.sample.prompt)
        tokens = sample.generate(trainer.model, prompt, options.sample, options.seq_len, trainer.world)
        log.console.say(f"sample: {corpus.tokenizer.decode(tokens)}")
    output = Path(options.output_dir)
    with together():
        if log.recorder is not None:
            curve.draw(metrics.read_records(output), unigram_entropy(corpus.train), output / "loss.png")
    log.console.say(closing_words(trainer, log))
    log.console.say(f"loss curve: {output / 'loss.png'}\nlast checkpoint: {state.latest()}")


def open_log(options: Config, world: World, trainer: Trainer, console: Console) -> Log:
    """The clock and the files of this run, cut back to where it starts."""
    recorder = None
    with together():
        if world.is_first:
            recorder = metrics.Recorder(Path(options.output_dir), options.log.tensorboard, trainer.step + 1)
    return Log(
        metrics.Timeline(world.device),
        recorder,
        console,
        metrics.peak_tflops(world, options.log.peak_tflops),
        build.flops_per_step(trainer.model, options),
    )


def opening_words(trainer: Trainer) -> str:
    options, world = trainer.options, trainer.world
    peak = metrics.peak_tflops(world, options.log.peak_tflops)
    num_params = sum(param.numel() for param in trainer.model.parameters())
    mfu = f"MFU is of {peak} TFLOP/s" if peak else "no MFU: no peak is known"
    return (
        f"{num_params:,} parameters on {world.size} × {world.device.type}; a global batch of "
        f"{options.global_batch_size} sequences of {options.seq_len} tokens is {options.micro_batch_size} × "
        f"{world.size} ranks × {trainer.num_accumulated} accumulated; unigram entropy of the text "
        f"{unigram_entropy(trainer.corpus.train):.3f} nats; {mfu}; "
        f"starting at step {trainer.step} of {options.num_steps}"
    )


def closing_words(trainer: Trainer, log: Log) -> str:
    """Time and memory of the whole run, on the first rank."""
    peaks = metrics.memory(trainer.world.device)
    held = (
        f"{peaks['host_gib']:.2f} GiB of host memory"
        if peaks["allocated_gib"] is None
        else f"{peaks['allocated_gib']:.2f} GiB allocated, {peaks['reserved_gib']:.2f} GiB reserved"
    )
    return f"{time.perf_counter() - log.start:.0f} s to step {trainer.step}; peak on one rank: {held}"


def open_text(options: Config, model_vocab_size: int) -> PackedText:
    """The packed text; ValueError if it cannot be made, or has tokens that the model does not know."""
    try:
        corpus = prepare(options.data)
    except RuntimeError as error:  # the cache cannot be written
        raise ValueError(str(error)) from error
    if corpus.tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {corpus.tokenizer.vocab_size} tokens, the model's vocabulary only {model_vocab_size}: "
            "set model.overrides.vocab_size, data.vocab_size, or data.tokenizer to the model's own"
        )
    return corpus


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    rank = rank_from_environment()
    try:
        options = config.load(sys.argv[1:] if arguments is None else arguments)
        run(options, join(options.device))
    except (ValueError, AgreedError) as error:  # the same on all ranks, so that a launcher ends the others unheard
        if rank > 0:
            time.sleep(GRACE_SECONDS)
        complain(str(error) if rank == 0 else f"{error} (rank {rank})")
        return 1
    except OSError as error:
        complain(f"{error} (rank {rank})")
        return 1
    except Exception as error:
        if not isinstance(error, RuntimeError) or not LOST_PEER.search(str(error)):
            traceback.print_exc()
            return 1
        time.sleep(GRACE_SECONDS / 2)  # the rank that failed may have something better to say
        complain(f"rank {rank} lost another rank, which has ended or cannot be reached: {str(error).splitlines()[0]}")
        return 1
    leave()
    return 0


def complain(words: str) -> None:
    print(f"error: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if status:
        os._exit(status)  # a checkpoint's thread may be waiting for ranks that are gone
