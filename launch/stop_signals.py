"""Signals that stop a run: it saves a checkpoint and ends, or is ended after a time.

SIGINT (Ctrl-C), SIGTERM (SLURM's preemption, torchrun) and SIGUSR1 (SLURM, some time before the end) ask a run to save
a checkpoint and to end. Owns the signals and the time that they leave. Knows nothing of steps: ranks agree on the step
by what `Gradients` carries.

[Note: who hears a signal]
Python runs a handler between two of its own instructions, which a thread inside a collective may not reach for
minutes. So signals are heard by a thread of their own, by the bytes that the interpreter writes to a socket at once
(`signal.set_wakeup_fd`). It also ends the process when its time is over, at a second signal, or when a rank of this
host is gone, whom the others would wait for in vain.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

STOPPED = 75  # the exit status of a run that a signal stopped and that can be resumed; sysexits.h calls it EX_TEMPFAIL
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TORCHRUN_SECONDS = 2.0  # a signal to a whole job reaches a rank twice: from its sender, and from torchrun
LOOKS_SECONDS = 0.2  # between two looks at the clock and at the other ranks, once a signal has come

Phase = Literal["starting", "training", "ending"]


class Stopping:
    """From entering to leaving it, signals are wishes. `grace_seconds` is what SIGTERM leaves for a checkpoint."""

    def __init__(self, grace_seconds: float, rank: int = 0, end: Callable[[int], None] = os._exit) -> None:
        self.phase: Phase = "starting"
        self.peers: Sequence[int] = ()  # processes of the other ranks of this host
        self._grace_seconds, self._rank, self._end = grace_seconds, rank, end
        self._under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> signal.Signals | None:
        """The signal that has come, if any. Other ranks may not have it yet."""
        return self._asked

    @property
    def is_bounded(self) -> bool:
        """Whether someone will end this process if it does not end itself: torchrun does after 30 s, SLURM too."""
        return self._asked is signal.SIGTERM or (self._asked is signal.SIGINT and self._under_torchrun)

    def __enter__(self) -> Self:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _nothing) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._sender.send(b"\0")
        self._thread.join()
        self._receiver.close()
        self._sender.close()

    def _listen(self) -> None:
        while True:
            self._receiver.settimeout(None if self._asked is None else LOOKS_SECONDS)
            try:
                numbers = self._receiver.recv(64)
            except TimeoutError:
                self._look()
                continue
            if not numbers or 0 in numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._asked is not None:
            if now - self._asked_at >= (TORCHRUN_SECONDS if self._under_torchrun else 0.0):
                self._leave(f"a second signal ({number.name}): nothing more is saved", 128 + number)
            return
        self._asked, self._asked_at = number, now
        if self.phase == "starting":
            self._leave(f"stopped by {number.name} before the first step: there is nothing to save", STOPPED)
        elif self.phase == "ending":
            self._leave(f"stopped by {number.name} after the last step, which is saved", STOPPED)
        elif self._has_lost_a_peer():  # then torchrun ends the others, and a checkpoint needs all of them
            self._end(1)
        else:
            self._say(
                f"{number.name}: a checkpoint is saved after this step; a second signal ends at once, without one"
            )

    def _has_lost_a_peer(self) -> bool:
        return any(_is_gone(peer) for peer in self.peers)

    def _look(self) -> None:
        assert self._asked is not None
        if self.phase == "ending":
            return
        if self._has_lost_a_peer():
            self._leave(f"rank {self._rank} lost another rank of this host, which has ended", 1)
        elif self.is_bounded and time.monotonic() - self._asked_at > self._grace_seconds:
            self._leave(
                f"no checkpoint within {self._grace_seconds:g} s after {self._asked.name} (checkpoint.grace_seconds): "
                "resume goes on from the last one",
                128 + self._asked,
            )

    def _leave(self, words: str, status: int) -> None:
        self._say(words)
        sys.stdout.flush()
        self._end(status)

    def _say(self, words: str) -> None:
        if self._rank == 0:
            print(words, file=sys.stderr, flush=True)


def _nothing(number: int, frame: Any) -> None:
    """The interpreter writes to the socket only for signals that have a handler."""


def _is_gone(process: int) -> bool:
    """Whether it has ended, or is a zombie that nobody has asked after yet."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return state in "ZX"
