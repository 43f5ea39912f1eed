"""The text of a run: whose tokenizer cuts it, how far that has come, how much it is and how often it will be seen."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.config import Config
from launch.console import is_terminal
from yafsdp_like.data import DEFAULT_VOCAB, DataConfig, PackedText, Progress, prepare
from yafsdp_like.data.tokenizer import MODEL_FILE
from yafsdp_like.memory.plan import readable

BETWEEN_LINES_S = 5.0  # where there is no terminal


def open_text(options: Config, model_vocab_size: int, speaks: bool) -> PackedText:
    """The packed text; ValueError if it cannot be made, or has tokens that the model does not know.

    Where `speaks`, its making is shown.
    """
    data = text_of(options, model_vocab_size)
    try:
        with show_progress(speaks) as say:
            corpus = prepare(data, say)
    except RuntimeError as error:  # the cache cannot be written
        raise ValueError(str(error)) from error
    if corpus.tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer has {corpus.tokenizer.vocab_size} tokens, the model's vocabulary only {model_vocab_size}: "
            "set model.overrides.vocab_size, data.vocab_size, or data.tokenizer to the model's own"
        )
    return corpus


def text_of(options: Config, model_vocab_size: int) -> DataConfig:
    """What is said of the text, and what follows from the model where nothing is said.

    Weights from a directory mean nothing to another tokenizer than theirs. A vocabulary that is trained is one that the
    model has room for.
    """
    data, hf_dir = options.data, options.model.hf_dir
    if data.tokenizer is not None or data.vocab_size is not None:
        return data
    if hf_dir is None:
        return dataclasses.replace(data, vocab_size=min(DEFAULT_VOCAB, model_vocab_size))
    if not (Path(hf_dir).expanduser() / MODEL_FILE).is_file():
        raise ValueError(
            f"model.hf_dir {hf_dir} has no {MODEL_FILE}: set data.tokenizer to the directory of the model's own, or "
            "data.vocab_size to train another on the text"
        )
    return dataclasses.replace(data, tokenizer=hf_dir)


def describe_text(corpus: PackedText, options: Config) -> str:
    """How much text there is, and how often all steps go through it."""
    header = corpus.header
    num_seen = options.num_steps * options.global_batch_size * options.seq_len
    documents = "1 document" if header.num_documents == 1 else f"{header.num_documents:,} documents"
    return (
        f"text: {readable(header.num_text_nbytes)} in {documents}, {header.num_train:,} tokens to train on and "
        f"{header.num_heldout:,} held out ({header.split}), of a vocabulary of {header.vocab_size:,}; "
        f"{options.num_steps:,} steps see {num_seen:,} tokens, {_passes(num_seen / header.num_train)} the text"
    )


def _passes(passes: float) -> str:
    return f"{passes:.1%} of" if passes < 1 else f"{passes:,.1f} passes over"


@contextmanager
def show_progress(speaks: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows progress meanwhile: a bar on a terminal, a line now and then elsewhere, nothing on other ranks."""
    if not speaks:
        yield lambda progress: None
    elif is_terminal():
        with _Bar() as bar:
            yield bar.show
    else:
        yield _Lines().show


class _Bar:
    """Gone when it is full: what is worth keeping is said afterwards."""

    def __enter__(self) -> _Bar:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
        self._bar: Any = Progress(*columns, transient=True)
        self._task: Any = None
        self._bar.start()
        return self

    def show(self, progress: Progress) -> None:
        if self._task is None:
            self._task = self._bar.add_task("", total=None)
        words, done, total = progress.what, progress.done_nbytes, progress.total_nbytes
        self._bar.update(self._task, description=words, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class _Lines:
    """One as each thing begins, then one every few seconds."""

    def __init__(self) -> None:
        self._what, self._next = "", 0.0

    def show(self, progress: Progress) -> None:
        if progress.what == self._what and time.monotonic() < self._next:
            return
        share = progress.done_nbytes / max(1, progress.total_nbytes)
        is_new = progress.what != self._what
        print(f"{progress.what}: {readable(progress.total_nbytes) if is_new else f'{share:.0%}'}", flush=True)
        self._what, self._next = progress.what, time.monotonic() + BETWEEN_LINES_S
