"""Persistent worker processes: run one function on several ranks, in milliseconds.

Owns the pools (one per world size and device type, started at their first use, kept for the whole session of
pytest), how a job reaches its workers, and how failures and hangs come back. Knows nothing of what is tested.

Workers are forked from multiprocessing's fork server, which imports torch once: a pool starts, or starts anew
after a failure, in a fraction of a second. Their rendezvous is a store of the parent, so no port has to be
guessed free.
"""

import contextlib
import faulthandler
import functools
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ParamSpec

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from yafsdp_like.memory import vmm

START_SECONDS = 180.0  # the first pool waits for the fork server to import torch
GRACE_SECONDS = 5.0  # what other ranks get to answer once one has failed
LOG_TAIL = 6000  # characters of a worker's log that a failure shows
PRELOADED = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
]

P = ParamSpec("P")
DIED, CRASHED = "ProcessDied", "ProcessCrashed"  # by its own exit, or by SIGABRT or SIGSEGV
BACKENDS = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl"}


class CrashWarning(UserWarning):
    """A rank crashed, and its test was run again."""


class RankError(Exception):
    """Some ranks failed: `errors` maps each of them to (exception type's name, message)."""

    def __init__(self, report: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__(report)
        self.errors = errors


@dataclass(frozen=True)
class Seat:
    """A worker's rank, its pool's size and device, and where it writes its log."""

    rank: int
    world_size: int
    device: str
    store_port: int
    log_path: str


@dataclass(frozen=True)
class Failure:
    """What a worker, or the pool on its behalf, returns instead of a result."""

    type_name: str
    message: str
    details: str  # traceback, or the log of a rank that is stuck or gone


def run_ranks(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    device: str = "cpu",
    timeout: float = 60.0,
    **kwargs: Any,
) -> list[Any]:
    """Run `fn(*args, **kwargs)` on `world_size` ranks and return their results, rank by rank.

    `fn` is a function of an importable module; arguments and results travel pickled. The warning filters in
    force here hold in the workers too. Every job starts from `torch.manual_seed(0)`.

    Raises:
        RankError: a rank raised, died, or did not answer within `timeout` seconds. The next call then starts
            a new pool. The first crash of a session (not an exit) is a `CrashWarning`, and `fn` runs again: gloo
            corrupts the heap now and then, after which any test's rank may die. A fault of ours would come again.
    """
    job = pickle.dumps((fn, args, kwargs, list(warnings.filters)))
    answers = _run_once(device, world_size, job, timeout)
    failures = _failures(answers)
    if not _crashes and any(failure.type_name == CRASHED for failure in failures.values()):
        report = _report(_name(fn), failures, world_size)
        _crashes.append(report)
        warnings.warn(f"run again, since a rank crashed, as gloo makes it now and then: {report}", CrashWarning, 2)
        answers = _run_once(device, world_size, job, timeout)
        failures = _failures(answers)
    if failures:
        raise RankError(
            _report(_name(fn), failures, world_size),
            {rank: (failure.type_name, failure.message) for rank, failure in failures.items()},
        )
    return answers


def _run_once(device: str, world_size: int, job: bytes, timeout: float) -> list[Any]:
    """Each rank's result, or its `Failure`, after which the pool is gone."""
    pool = _pool(device, world_size)
    try:
        answers = pool.run(job, timeout)
    except BaseException:  # interrupted: the workers are in the middle of something
        _discard(pool)
        raise
    if _failures(answers):
        _discard(pool)
    return answers


@contextlib.contextmanager
def alone_among(world_size: int) -> Iterator[None]:
    """A process group of this process and others that do not exist. It has no other group meanwhile."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_ranks(world_size: int = 2, **options: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a test whose body runs on every rank; `options` are those of `run_ranks`."""

    def decorate(body: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(body)
        def test(*args: P.args, **kwargs: P.kwargs) -> None:
            if dist.is_initialized():  # in a worker, which found this very function by its name
                body(*args, **kwargs)
            else:
                run_ranks(functools.partial(test, *args, **kwargs), world_size=world_size, **options)

        return test

    return decorate


def close_pools() -> None:
    """End every worker; called once, when the pytest session ends."""
    for pool in list(_POOLS.values()):
        pool.close()
    _POOLS.clear()


# --- the parent's side ---

_POOLS: dict[tuple[str, int], "Pool"] = {}
_crashes: list[str] = []  # reports of those after which a function was run again, at most one


def _pool(device: str, world_size: int) -> "Pool":
    key = (device, world_size)
    if key not in _POOLS:
        _POOLS[key] = Pool(device, world_size)
    return _POOLS[key]


def _discard(pool: "Pool") -> None:
    del _POOLS[pool.device, pool.world_size]
    pool.kill()


class Pool:
    """`world_size` worker processes that share one default process group."""

    def __init__(self, device: str, world_size: int) -> None:
        self.device = device
        self.world_size = world_size
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._logs = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(world_size):
            here, there = context.Pipe()
            log_path = Path(self._logs.name, f"rank{rank}.log")
            log_path.touch()
            seat = Seat(rank, world_size, device, self._store.port, str(log_path))
            process = context.Process(target=_serve, args=(there, seat), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)
        failures = _failures(self._collect(START_SECONDS))
        if failures:
            self.kill()
            raise RuntimeError(_report("start", failures, world_size))

    def run(self, job: bytes, timeout: float) -> list[Any]:
        """Each rank's result, or its `Failure`."""
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # a dead worker is reported by _collect
                connection.send_bytes(job)
        return self._collect(timeout)

    def close(self) -> None:
        """Let idle workers leave by themselves, then make sure of it."""
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(b"")
        for process in self._processes:
            process.join(timeout=GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the workers, whatever they are doing."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.kill()
            process.join()
            connection.close()
        self._logs.cleanup()

    def _collect(self, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world_size:
            waiting = {it: rank for rank, it in enumerate(self._connections) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                answers.update(self._stuck(sorted(waiting.values()), timeout))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                answers[rank] = self._receive(rank)
                if isinstance(answers[rank], Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return [answers[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> Any:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(timeout=GRACE_SECONDS)
            code = self._processes[rank].exitcode
            kind = CRASHED if code in (-signal.SIGABRT, -signal.SIGSEGV) else DIED
            return Failure(kind, f"the process ended with exit code {code}", self._log(rank))

    def _stuck(self, ranks: list[int], timeout: float) -> dict[int, Failure]:
        """Kill nothing yet, but have each rank's faulthandler write its threads' stacks to its log."""
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        message = f"no answer within {timeout:g} s, or {GRACE_SECONDS:g} s after another rank failed; killed"
        return {rank: Failure("TimeoutError", message, self._log(rank)) for rank in ranks}

    def _log(self, rank: int) -> str:
        return Path(self._logs.name, f"rank{rank}.log").read_text(errors="replace")[-LOG_TAIL:]


def _failures(answers: list[Any]) -> dict[int, Failure]:
    return {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Failure)}


def _name(fn: Callable[..., Any]) -> str:
    return _name(fn.func) if isinstance(fn, functools.partial) else fn.__qualname__


def _report(job_name: str, failures: dict[int, Failure], world_size: int) -> str:
    """One paragraph per distinct failure, naming its ranks."""
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank, failure in failures.items():
        ranks_of.setdefault((failure.type_name, failure.message), []).append(rank)
    lines = [f"{job_name} failed on {len(failures)} of {world_size} ranks"]
    for (type_name, message), ranks in ranks_of.items():
        lines.append(f"\n--- rank {', '.join(map(str, ranks))}: {type_name}: {message}")
        stuck = type_name in ("TimeoutError", DIED, CRASHED)  # then each rank's own stacks matter
        lines.extend(failures[rank].details for rank in (ranks if stuck else ranks[:1]))
    return "\n".join(lines)


# --- the workers' side ---


def _serve(connection: Connection, seat: Seat) -> None:
    """A worker's life: join the group, answer jobs until an empty one ends it."""
    try:
        _join(seat)
        connection.send_bytes(pickle.dumps(None))
    except Exception as error:
        connection.send_bytes(pickle.dumps(_failure(error)))
        return
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:  # the parent is gone
            break
        if not job:
            break
        connection.send_bytes(_answer(job))
    os._exit(0)  # no teardown: process groups that tests left behind must not delay or fail the session's end


def _join(seat: Seat) -> None:
    log = os.open(seat.log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    torch.set_num_threads(1)
    if seat.device == "cpu":
        vmm.GRANULE_NBYTES = mmap.PAGESIZE  # so that slots of small models alias shards too
    if seat.device == "cuda":
        torch.cuda.set_device(seat.rank)
        torch.backends.cudnn.deterministic = True  # tests compare bits
    _spare_gloo_threads()
    store = dist.TCPStore("127.0.0.1", seat.store_port, is_master=False)
    dist.init_process_group(BACKENDS[seat.device], store=store, rank=seat.rank, world_size=seat.world_size)
    gc.freeze()  # what was imported so far is left out of the collection after each job


def _spare_gloo_threads() -> None:
    """Have all gloo groups share the thread that polls sockets, and each work with one thread instead of two.

    Groups that tests leave behind would each go on polling, a third of a worker's time in the end. Two threads of one
    group corrupt the heap now and then (one way: [Note: gloo gathers piece by piece]), and a later test's rank dies.
    """
    made, device = dist.ProcessGroupGloo.__init__, dist.ProcessGroupGloo.create_default_device()

    def init(self: dist.ProcessGroupGloo, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 1, timeout
        made(self, store, rank, size, options)

    dist.ProcessGroupGloo.__init__ = init  # type: ignore[method-assign]


def _answer(job: bytes) -> bytes:
    try:
        fn, args, kwargs, filters = pickle.loads(job)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filters = filters
            result = fn(*args, **kwargs)
        answer = pickle.dumps(result)
    except BaseException as error:
        answer = pickle.dumps(_failure(error))
    gc.collect()  # models hold cycles; the next job starts without them
    return answer


def _failure(error: BaseException) -> Failure:
    return Failure(type(error).__name__, str(error), "".join(traceback.format_exception(error)))
