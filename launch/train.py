"""Train a decoder on text, sharded over the ranks that are there.

    torchrun --nproc-per-node 2 -m launch.train configs/tiny.yaml
    python -m launch.train configs/tiny.yaml --num_steps=50 --resume=auto

Errors are one line of one rank, with exit status 1; bugs keep their traceback. SIGINT, SIGTERM and SIGUSR1 save a
checkpoint and end the run with status 75: ``--resume=auto`` continues from it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from launch.config import COMMAND, Config
from yafsdp_like.data import TextSource


def check(options: Config) -> None:
    """Raise ValueError for a batch that the ranks cannot divide, or text that is not there."""
    options.num_accumulated(int(os.environ.get("WORLD_SIZE", "1")))
    TextSource(options.data.paths).files()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = COMMAND.answer(sys.argv[1:] if arguments is None else arguments, check)
    if isinstance(options, int):
        return options
    from launch import errors, training  # now: they import torch, which takes seconds
    from launch.stop_signals import Stopping
    from launch.world import deterministic, join, leave, rank_from_environment

    rank = rank_from_environment()
    try:
        with Stopping(options.checkpoint.grace_seconds, rank) as stopping, deterministic(options.deterministic):
            status = training.run(options, join(options.device), stopping)
    except Exception as error:
        errors.report(error, rank)
        return 1
    leave()
    return status


def command() -> None:
    """Run as a process of its own, and end it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run listens, Ctrl-C ends it without a traceback
    status = main()
    sys.stdout.flush()
    if status:
        os._exit(status)  # a checkpoint's thread may be waiting for ranks that are gone


if __name__ == "__main__":
    command()
