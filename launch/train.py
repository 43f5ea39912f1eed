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
from pathlib import Path

from launch import config, usage

if __name__ == "__main__" and (status := usage.answered(sys.argv[1:])) is not None:
    sys.exit(status)  # before torch is imported, which takes seconds

from launch import build, curve, metrics, sample
from launch.config import Config
from launch.console import Console
from launch.corpus import described, open_text
from launch.log import Log
from launch.profiling import Profiling
from launch.recipe import recipe_of
from launch.state import RunState, find_start, prepare_directory
from launch.trainer import Trainer
from launch.world import World, deterministic, join, leave, rank_from_environment
from yafsdp_like.comm.agreement import AgreedError, together
from yafsdp_like.data import unigram_entropy

LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed? ?out|remote process exited")


def run(options: Config, world: World) -> None:
    """Everything between joining the process group and leaving it."""
    with together():
        options.num_accumulated(world.size)
        recipe = recipe_of(options.model, options.seed)
        model_vocab_size = recipe.vocab_size
        exporter = recipe.exporter() if options.checkpoint.export else None
        start = find_start(options)
        if world.is_first:
            prepare_directory(options, world)
    with together():
        corpus = open_text(options, model_vocab_size, world.is_first)
    with together():
        model = build.build_model(recipe, options, world)
    console = Console(world.is_first, options.num_steps, start.step)
    console.say(described(corpus, options))
    console.say(build.describe_plan(model, world))
    with together():
        recipe.fill(model, world.device, from_checkpoint=start.path is not None)
    with together():
        trainer = Trainer(options, world, corpus, model)
    state = RunState(trainer, exporter)
    state.restore(start)
    log = Log(options, world, console, build.flops_per_step(model, options), trainer.step)
    profiling = Profiling(options.log, world, Path(options.output_dir))
    log.say(opening_words(trainer, log.peak_tflops))
    try:
        train(trainer, state, log, profiling)
        finish(trainer, state, log)
    finally:
        profiling.close()
        console.close()


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
            log.write(held_out_loss)
            state.check()
        if saves:
            state.save(behind=not is_last)
            log.timeline.end("checkpoint")
    state.close()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def finish(trainer: Trainer, state: RunState, log: Log) -> None:
    """What is shown at the end: a sample, the curve, and where everything lies."""
    options, corpus = trainer.options, trainer.corpus
    if options.sample.num_tokens:
        prompt = corpus.tokenizer.encode(options.sample.prompt)
        tokens = sample.generate(trainer.model, prompt, options.sample, options.seq_len, trainer.world)
        log.say(f"sample: {corpus.tokenizer.decode(tokens)}")
    output = Path(options.output_dir)
    with together():
        if trainer.world.is_first:
            curve.draw(metrics.read_records(output), unigram_entropy(corpus.train), output / "loss.png")
    log.say(f"step {trainer.step} after {log.totals()}")
    log.say(f"loss curve: {output / 'loss.png'}\nlast checkpoint: {state.latest()}")


def opening_words(trainer: Trainer, peak_tflops: float | None) -> str:
    """The sizes of this run, and what its loss and MFU are to be compared with."""
    options, world = trainer.options, trainer.world
    micro_batch_size = options.global_batch_size // (world.size * trainer.num_accumulated)
    num_params = sum(param.numel() for param in trainer.model.parameters())
    mfu = f"MFU is of {peak_tflops} TFLOP/s" if peak_tflops else "no MFU: no peak is known"
    return (
        f"{num_params:,} parameters on {world.size} × {world.device.type}; a global batch of "
        f"{options.global_batch_size} sequences of {options.seq_len} tokens is {micro_batch_size} × "
        f"{world.size} ranks × {trainer.num_accumulated} accumulated; unigram entropy of the text "
        f"{unigram_entropy(trainer.corpus.train):.3f} nats; {mfu}; "
        f"starting at step {trainer.step} of {options.num_steps}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    rank = rank_from_environment()
    arguments = sys.argv[1:] if arguments is None else arguments
    if (status := usage.answered(arguments)) is not None:
        return status
    try:
        options = config.load(arguments)
        with deterministic(options.deterministic):
            run(options, join(options.device))
    except (ValueError, AgreedError) as error:  # the same on all ranks, so that a launcher ends the others unheard
        if rank > 0:
            time.sleep(usage.GRACE_SECONDS)
        complain(str(error) if rank == 0 else f"{error} (rank {rank})")
        return 1
    except OSError as error:
        complain(f"{error} (rank {rank})")
        return 1
    except Exception as error:
        if not isinstance(error, RuntimeError) or not LOST_PEER.search(str(error)):
            traceback.print_exc()
            return 1
        time.sleep(usage.GRACE_SECONDS / 2)  # the rank that failed may have something better to say
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
