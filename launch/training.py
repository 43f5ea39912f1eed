"""The order of a training run: what is built when, and when to log, evaluate and save.

What each part does is in its own file; `train.py` is the command.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from launch import build, fit, memory_check, report, sample
from launch.config import Config
from launch.console import Console
from launch.corpus import describe_text, open_text
from launch.forecast import memory_report
from launch.gradients import NotFiniteError
from launch.log import Log
from launch.profiling import Profiling
from launch.recipe import Recipe, exporter_of, recipe_of
from launch.run_state import RunState, find_starts, prepare_directory
from launch.stop_signals import STOPPED, Stopping
from launch.trainer import Trainer
from launch.world import World
from yafsdp_like import explain_out_of_memory
from yafsdp_like.comm import hang_letter
from yafsdp_like.comm.consistency import AgreedError, all_gather_object, raise_on_all_ranks
from yafsdp_like.data import unigram_entropy


def run(options: Config, world: World, stopping: Stopping | None = None) -> int:
    """Everything between joining the process group and leaving it; the exit status: 0, or STOPPED."""
    if stopping is not None:
        host_and_process = all_gather_object((platform.node(), os.getpid()))
        stopping.peers = [process for host, process in host_and_process if host == platform.node()]
    with raise_on_all_ranks():
        options.num_accumulated(world.size)
        recipe = recipe_of(options.model, options.seed)
        model_vocab_size = recipe.vocab_size
        exporter, unexported = exporter_of(recipe, options.checkpoint.export)
        if world.is_first:
            prepare_directory(options, world)
    starts = find_starts(options, world)
    model = planned_model(recipe, options, world)
    with raise_on_all_ranks():
        corpus = open_text(options, model_vocab_size, world.is_first)
    console = Console(world.is_first, options.num_steps, starts[0].step)
    console.say("\n".join(words for words in (describe_text(corpus, options), unexported) if words))
    console.say(build.describe_plan(model, world, options.optimizer))
    with raise_on_all_ranks():
        recipe.fill(model, world.device, from_checkpoint=starts[0].path is not None)
    with raise_on_all_ranks():
        trainer = Trainer(options, world, corpus, model, stopping)
    state = RunState(trainer, recipe, exporter)
    state.restore(starts, console.say)
    log = Log(options, world, console, build.flops_per_step(model, options), trainer.step, trainer.memory)
    os.environ.setdefault(hang_letter.FOLDER, options.output_dir)
    profiling = Profiling(options.log, world, Path(options.output_dir))
    log.say(opening_words(trainer, log.peak_tflops))
    changes = partial(fit.changes_that_fit, options, world.size, world.device)
    letters = explain_out_of_memory(model, trainer.optimizer, directory=options.output_dir, changes=changes)
    try:
        with phase(stopping), letters:
            train(trainer, state, log, profiling)
        if trainer.stops:
            report_on(trainer, log)
            log.say(stopped_words(trainer, state))
            return STOPPED
        finish(trainer, state, log)
    finally:
        trainer.close()
        profiling.close()
        console.close()
    return 0


def planned_model(recipe: Recipe, options: Config, world: World) -> Any:
    """The sharded model, for which nothing is allocated yet and all that it needs is free. Fails on all ranks else."""
    with raise_on_all_ranks():
        model = build.build_model(recipe, options, world)
    try:
        memory_check.check_memory(model, options, world)
    except AgreedError:
        if world.is_first:
            print(build.describe_plan(model, world, options.optimizer), flush=True)
        raise
    return model


@contextmanager
def phase(stopping: Stopping | None) -> Iterator[None]:
    """While this lasts, a signal is a wish that a checkpoint be saved."""
    if stopping is None:
        yield
        return
    stopping.phase = "training"
    yield
    stopping.phase = "ending"


def train(trainer: Trainer, state: RunState, log: Log, profiling: Profiling) -> None:
    """All steps that are left, or those until a signal stops a rank; the last one is logged, evaluated and saved.

    Raises NotFiniteError, on all ranks and once a save under way is done, where training has left the numbers.
    """
    first_step = trainer.step + 1
    log.timeline.take()
    try:
        while trainer.step < trainer.options.num_steps and not trainer.stops:
            profiling.before(trainer.step + 1)
            trainer.train_step(log)
            profiling.after(trainer.step)
            if words := build.describe_activations(trainer.model, trainer.step + 1 - first_step, trainer.world):
                log.say(words)
            after_step(trainer, state, log, trainer.step == first_step)
    except NotFiniteError:
        log.write(None)
        state.close()
        raise
    state.close()


def after_step(trainer: Trainer, state: RunState, log: Log, is_first: bool) -> None:
    """What is due: numbers (after the first step in any case), an evaluation, a checkpoint."""
    options = trainer.options
    is_last = trainer.step == options.num_steps
    evaluates = is_last or _is_due(trainer.step, options.evaluation.every)
    saves = is_last or _is_due(trainer.step, options.checkpoint.every)
    if not (saves or evaluates or is_first or trainer.stops or _is_due(trainer.step, options.log.every)):
        return
    trainer.settle()
    held_out_loss = None
    if evaluates and not trainer.stops:
        held_out_loss = trainer.evaluate()
        log.timeline.end("evaluation")
    bad_step = log.write(held_out_loss)
    if bad_step is not None and options.optimizer.nonfinite == "stop":
        though = "" if options.optimizer.update_in_backward else ", though its gradient is"
        raise NotFiniteError(f"step {bad_step}: the loss is not finite{though}; nothing is saved of it")
    state.check()
    if saves or trainer.stops:
        state.save(asynchronous=not is_last and not trainer.stops)
        log.timeline.end("checkpoint")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def finish(trainer: Trainer, state: RunState, log: Log) -> None:
    """What is shown at the end: a sample, the report, and where everything lies."""
    options, corpus = trainer.options, trainer.corpus
    if not sample.is_possible(trainer.model):
        log.say("no sample: the module of model.factory takes no tokens without targets")
    elif options.sample.num_tokens:
        prompt = corpus.tokenizer.encode(options.sample.prompt)
        tokens = sample.generate(trainer.model, prompt, options.sample, options.seq_len, trainer.world)
        log.say(f"sample: {corpus.tokenizer.decode(tokens)}")
    log.say(f"step {trainer.step} after {log.totals()}")
    report_on(trainer, log)
    log.say(f"last checkpoint: {state.latest()}")


def report_on(trainer: Trainer, log: Log) -> None:
    """Say what was planned and measured, and write the run's report, on the first rank."""
    directory = Path(trainer.options.output_dir)
    with raise_on_all_ranks():
        if trainer.world.is_first:
            found, note = memory_report(trainer.model, trainer.optimizer, trainer.options, trainer.world, log.peaks())
            log.say("\n".join(["memory of one rank", str(found), *note]))
            report.write_report(directory, found, unigram_entropy(trainer.corpus.train))
    log.say(f"report: {directory / report.REPORT_FILE}")


def stopped_words(trainer: Trainer, state: RunState) -> str:
    """Return what is printed when a signal has stopped the run."""
    asked = None if trainer.stopping is None else trainer.stopping.asked
    by = "a signal to another rank" if asked is None else asked.name
    return (
        f"stopped at step {trainer.step} of {trainer.options.num_steps} by {by}: {state.latest()} is saved; resume "
        f"with the same command and --resume=auto (exit status {STOPPED})"
    )


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
        f"{': none is left; to go on, raise num_steps' if trainer.step >= options.num_steps else ''}"
    )
