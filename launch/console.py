"""What a person sees: a progress bar on a terminal, one line per record elsewhere, nothing on other ranks."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from launch.metrics import Record
from yafsdp_like.memory.plan import readable

if TYPE_CHECKING:
    from types import TracebackType

COLUMNS = (
    ("loss", "loss {:.4f}"),
    ("held_out_loss", "held out {:.4f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "norm {:.2f}"),
    ("tokens_per_s_per_device", "{:,.0f} tokens/s per device"),
    ("tflops_per_device", "{:.3g} TFLOP/s"),
    ("mfu", "MFU {:.1%}"),
    ("reserved_gib", "{:.1f} GiB reserved"),
)


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()


class Console:
    """Lines and progress of one run; `num_steps` is where the bar ends, `step` where it starts."""

    def __init__(self, speaks: bool, num_steps: int, step: int = 0) -> None:
        self._speaks, self._num_steps = speaks, num_steps
        self._progress: Any = None
        if speaks and is_terminal():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns)
            self._task = self._progress.add_task("", total=num_steps, completed=step)
            self._progress.start()

    def say(self, text: str) -> None:
        """A line of its own, on the first rank."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self._speaks:
            print(text, flush=True)

    def show(self, record: Record) -> None:
        """The state after a step."""
        parts = [form.format(record[name]) for name, form in COLUMNS if record.get(name) is not None]
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=" · ".join(parts[:4]))
        if self._progress is None or "held_out_loss" in record:
            self.say(f"step {record['step']}/{self._num_steps}  " + "  ".join(parts))

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class LoadingBars:
    """A bar for each model that is read, on a terminal; elsewhere a line for each that is there."""

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}
        self._begun: dict[str, float] = {}
        self._said: set[str] = set()  # models that are there; a load may report its last bytes twice
        self._progress: Any = None
        if is_terminal():
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._progress = Progress(*columns)

    def __enter__(self) -> LoadingBars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, name: str, loaded_nbytes: int, nbytes: int) -> None:
        """Say how much of a model is there."""
        begun = self._begun.setdefault(name, time.monotonic())
        if self._progress is not None:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=nbytes)
            self._progress.update(self._tasks[name], completed=loaded_nbytes)
        elif loaded_nbytes == nbytes and name not in self._said:
            self._said.add(name)
            seconds = time.monotonic() - begun
            print(f"loaded {name!r}: {readable(nbytes)} in {seconds:.1f} s", flush=True)
