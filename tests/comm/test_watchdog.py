"""The watchdog that ends a process whose GPU waits for other ranks too long, in child processes that it may end."""

import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import sys, time
from yafsdp_like.comm.signals import Watchdog

class Event:
    def __init__(self, complete_after_s):
        self.complete_at = time.monotonic() + complete_after_s
    def query(self):
        return time.monotonic() >= self.complete_at

watchdog = Watchdog(3, float(sys.argv[1]), lambda: print("the letter", file=sys.stderr))
for complete_after_s in map(float, sys.argv[2:]):
    watchdog.arm(Event(complete_after_s))
    time.sleep(min(complete_after_s, 60) + 0.1)
time.sleep(1.5)
print("still here")
"""


def child(timeout_s: float, *complete_after_s: float) -> tuple[subprocess.CompletedProcess[str], float]:
    """A process whose watchdog is armed with events that complete after so many seconds, and how long it ran."""
    begin = time.monotonic()
    arguments = [sys.executable, "-c", CHILD, *map(str, (timeout_s, *complete_after_s))]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    return ended, time.monotonic() - begin


def test_a_wait_for_a_rank_that_never_arrives_ends_the_process_with_a_message() -> None:
    """Prevents: a process that hangs for ever and says nothing."""
    ended, seconds = child(1.0, 1e9)
    assert ended.returncode == -signal.SIGABRT
    assert "rank 3: the GPU has waited for other ranks for 1 s, the timeout of their process group" in ended.stderr
    assert ended.stderr.rstrip().endswith("the letter")
    assert "still here" not in ended.stdout
    assert seconds < 45, "it was to end a second after it was armed, and not when the child's own sleep ends"


@pytest.mark.parametrize(
    "waits_s",
    [pytest.param((0.2,), marks=pytest.mark.slow), (0.7, 0.7)],
    ids=["one wait", "two that take longer together"],
)
def test_waits_that_end_in_time_do_not_end_the_process(waits_s: tuple[float, ...]) -> None:
    """Prevents: a deadline that outlives its event, or is that of an earlier one."""
    ended, _ = child(1.0, *waits_s)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "still here\n", "")
