"""Programs whose ranks do different things, in processes of their own that may end as they like, with short timeouts.

Owns how such a program is started and what each rank ended with. What the ranks do is in ``test_hanging.py``.
"""

import atexit
import datetime
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.ranks import PRELOADED


@dataclass(frozen=True)
class Ending:
    """How one rank ended: its exception, after how many seconds, with which exit code, and what it printed."""

    error: str = ""
    message: str = ""
    seconds: float = 0.0
    exitcode: int | None = None
    stderr: str = ""


def endings(
    program: Callable[..., None], *args: Any, folder: Path, world_size: int = 2, timeout_s: float = 2.0
) -> list[Ending]:
    """Run ``program`` on each rank of a gloo group with this timeout; a rank that never ends is killed, code -9."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks: list[tuple[Any, Connection, Path]] = []
    for rank in range(world_size):
        here, there = context.Pipe()
        log = folder / f"rank{rank}.log"
        job = (program, args, rank, world_size, store.port, timeout_s, str(log), there)
        process = context.Process(target=_run, args=job, daemon=True)
        process.start()
        there.close()
        ranks.append((process, here, log))
    deadline = time.monotonic() + 10 * timeout_s + 20
    found = []
    for process, here, log in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
        try:
            error, message, seconds = here.recv() if here.poll() else ("", "", 0.0)
        except EOFError:
            error, message, seconds = "", "", 0.0
        found.append(Ending(error, message, seconds, process.exitcode, log.read_text() if log.exists() else ""))
    return found


def _run(
    program: Callable[..., None],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    timeout_s: float,
    log: str,
    answer: Connection,
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("cpu:gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    begin = time.monotonic()
    try:
        program(*args)
        answer.send(("", "", time.monotonic() - begin))
    except Exception as error:
        answer.send((type(error).__name__, str(error), time.monotonic() - begin))
        traceback.print_exc()
        sys.last_value = error  # as the interpreter does with what nobody catches
    atexit._run_exitfuncs()  # which forked workers leave out
    sys.stderr.flush()
    os._exit(0)
