"""Hang letters: where each rank is when some have waited for the others too long, and what they first did differently.

A rank that waits cannot ask the others by a collective, which is what it waits in. So a thread of each process posts,
now and then, what its rank did last and where its code is, to the key-value store that the process group was made
with; and reads what others have posted once somebody has waited for half of the time limit, or has failed. No
collective is involved, and a rank that is well spends some microseconds a second on it.

Owns the posts and the words of the letter, which every rank prints to stderr and adds to its error. It ends nothing:
that is done by whoever waits (``journal.py``), by the watchdog (``signals.py``), and by NCCL.

[Note: the limit]
It is the timeout of the ranks' process group, or ``YAFSDP_HANG_SECONDS``, if that is shorter. A letter is written when
``_WRITES`` of it are over, so that it is there before the process group ends the process.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from yafsdp_like.comm.consistency import first_difference
from yafsdp_like.comm.stacks import Spot, own_spot, spot_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.memory.streams import Event

LIMIT_SECONDS = "YAFSDP_HANG_SECONDS"  # an environment variable: the limit, where it is to be shorter than the timeout
FOLDER = "YAFSDP_HANG_FOLDER"  # an environment variable: where a letter is kept as a file, too
_ASKS, _WRITES = 0.5, 0.9  # of the limit
_NUM_POSTED = 8  # entries that are posted when nobody asks
_NUM_KEPT = 2000  # and when somebody does
_ANSWER_SECONDS = 3.0  # at most, for others to post where they are once they are asked

Entries = tuple[int, list[str]]  # the number of the first one, and what was done, in words


@dataclass
class Whereabouts:
    """Where one rank is: what it has done with the others, and which line of whose code it is at."""

    count: int = 0  # things done together
    first: int = 0  # the number of the first of these
    entries: list[str] = field(default_factory=list)  # the last things, in words
    line: str = ""  # of the user's code
    phase: str = ""  # forward, backward, update
    waits: str = ""  # the function that waits for other ranks; nothing if it does something else
    since_s: float = 0.0  # how long it has been there
    posted: float = 0.0  # time of day
    gave_up: bool = False  # the wait has failed
    ended: str = ""  # how the process has ended, if it has
    answers: int = 0  # the question that this answers

    @property
    def last(self) -> str:
        """The last thing done with the others, or about to be done."""
        return self.entries[-1] if self.entries else "nothing with the others yet"


class HangLetter:
    """The places of the ranks of ``group``; ``entries(most)`` are the last things that this one did with them."""

    def __init__(
        self, group: dist.ProcessGroup, timeout: datetime.timedelta, entries: Callable[[int], Entries]
    ) -> None:
        self._rank, self._size = group.rank(), group.size()
        self._global = dist.get_process_group_ranks(group)
        self.limit_s = limit_of(timeout)
        self._entries, self._thread_id = entries, threading.get_ident()
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()  # a connection of its own, since another thread's call may block the first
        self._store = PrefixStore(f"yafsdp_hang/{group.group_name}", store)
        self._store.set_timeout(datetime.timedelta(seconds=_ANSWER_SECONDS))
        self._poll_s = min(1.0, self.limit_s / 20)
        self._lock = threading.Lock()  # of everything below
        self._stands: tuple[tuple[object, ...], float] = ((None,), time.monotonic())  # at which instruction, since when
        self._done, self._done_at = -1, time.monotonic()  # by this process, with ranks of any group; and since when
        self._spot: Spot | None = None  # what the thread did since then, where it was looked at
        self._asked = self._answered = 0  # how many questions are known of, and were answered
        self._armed: tuple[Event, float] | None = None
        self._places: dict[int, Whereabouts] = {}  # the last that were read
        self._gave_up: Whereabouts | None = None  # where it was when its wait failed
        self._letter = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="yafsdp_hang_letter", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    # --- from other threads

    @property
    def count(self) -> int:
        """How many things this rank has done with the others."""
        first, entries = self._entries(1)
        return first + len(entries)

    def place(self) -> str:
        """Say where this rank is now: the line of the user's code, and the phase."""
        spot = own_spot()
        return f"at {spot.line or 'an unknown line'}" + (f" in {spot.phase}" if spot.phase else "")

    def write(self, error: str = "") -> str:
        """Return a letter of the ranks as they are now, and print the first one.

        Asks other ranks where they are, and waits for their answers for some seconds at most. ``error`` is what ended
        the wait.
        """
        with self._lock:
            (stood, *_), since = self._stands  # until the wait failed
            self._ask()
            place = self._places[self._rank]
            waited_s = time.monotonic() - since if stood == place.count else 0.0
            self._gave_up = self._places[self._rank] = replace(place, gave_up=True, since_s=waited_s)
            words = self._words(error)
            if not self._letter:
                self._letter = words
                self._publish()
            return words

    def watch(self, event: Event) -> None:
        """Write the letter if ``event`` is not complete when most of the limit is over; ignored while one is watched.

        The device waits for other ranks then, and the process group is about to end this process.
        """
        armed = self._armed
        if armed is None or armed[0].query():
            self._armed = event, time.monotonic()

    # --- the thread

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_s):
            with self._lock:
                try:
                    self._look()
                except Exception as error:  # the store is gone, with the process that had it
                    waited = self._waited()
                    if waited < self._poll_s or self._letter:
                        return
                    if waited > _WRITES * self.limit_s:
                        self._letter = self._words(f"the store of the process group cannot be reached ({error})")
                        self._publish(0.0)

    def _look(self) -> None:
        place = self._here()
        question = self._store.add("asked", 0)
        if question > self._asked:  # by somebody else
            self._asked = question
        self._post(place)
        waited = self._waited(place)
        if waited > _ASKS * self.limit_s and not self._asked:
            self._ask(0.0)
        if self._asked:
            self._read()
        is_written = self._store.add("written", 0) > 0
        if not self._letter and (waited > _WRITES * self.limit_s or is_written):
            self._letter = self._words("")
            self._publish(0.0)

    def _waited(self, place: Whereabouts | None = None) -> float:
        """Return how long this rank, or its device, has waited for others, in seconds."""
        if self._armed is not None and not self._armed[0].query():
            return time.monotonic() - self._armed[1]
        self._armed = None
        place = place or self._here()
        return place.since_s if place.waits else 0.0

    def _end(self) -> None:
        """Leave word, when the interpreter ends, that and how it has; and the letter, where others have asked."""
        self._stop.set()
        self._thread.join(_ANSWER_SECONDS)
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        ended = "has ended" if error is None else f"has ended with {type(error).__name__}: {str(error).splitlines()[0]}"
        try:
            with self._lock:
                self._asked = self._store.add("asked", 0)
                first, entries = self._entries(_NUM_KEPT)
                here = Whereabouts(first + len(entries), first, entries, posted=time.time(), ended=ended)
                self._post(self._gave_up or here)
                if self._asked and not self._letter:
                    self._read()
                    self._letter = self._words("")
                    self._publish()
        except Exception:
            pass  # nobody is left to read it

    # --- posts

    def _here(self, closely: bool = False) -> Whereabouts:
        """Return where this rank is; which line it is at, where that is wanted ``closely`` or it may be stuck."""
        first, entries = self._entries(_NUM_KEPT if self._asked else _NUM_POSTED)
        place = Whereabouts(first + len(entries), first, entries, posted=time.time(), answers=self._asked)
        done, now = sum(letter.count for letter in list(_letters.values())), time.monotonic()
        if done != self._done:
            self._done, self._done_at, self._spot = done, now, None
        if closely or self._answered < self._asked or now - self._done_at >= _ASKS * self.limit_s:
            self._answered, self._spot = self._asked, spot_of(self._thread_id)
        at: tuple[object, ...] = (place.count,)
        if self._spot is not None:
            place.line, place.phase, place.waits, innermost = self._spot
            at = (place.count, place.line, innermost)
        if at != self._stands[0]:
            only_looked_closer = self._stands[0] == (place.count,)
            self._stands = at, self._stands[1] if only_looked_closer else now
        place.since_s = now - self._stands[1]
        return place

    def _post(self, place: Whereabouts) -> None:
        self._places[self._rank] = place
        self._store.set(f"place {self._rank}", json.dumps(asdict(place)))

    def _ask(self, patience_s: float = _ANSWER_SECONDS) -> None:
        """Ask all ranks for what they have done, and read the answers that come in time."""
        deadline = time.monotonic() + min(patience_s, 3 * self._poll_s + 0.5)
        try:
            self._asked = self._store.add("asked", 1)
            self._post(self._here(closely=True))
            self._read()
            while time.monotonic() < deadline and not all(map(self._has_answered, range(self._size))):
                time.sleep(min(0.02, self._poll_s))
                self._read()
        except Exception:  # what was read before has to do
            self._places[self._rank] = self._here(closely=True)

    def _has_answered(self, rank: int) -> bool:
        place = self._places.get(rank)
        return place is not None and (place.answers >= self._asked or place.gave_up or bool(place.ended))

    def _read(self) -> None:
        for rank in range(self._size):
            key = f"place {rank}"
            if rank != self._rank and self._store.check([key]):
                self._places[rank] = Whereabouts(**json.loads(self._store.get(key)))

    # --- the letter

    def _publish(self, patience_s: float = _ANSWER_SECONDS) -> None:
        """Print the letter, tell the others, and leave them time to write theirs: this process may have the store."""
        print(self._letter, file=sys.stderr, flush=True)
        if folder := os.environ.get(FOLDER):
            path = Path(folder, f"hang-rank{self._global[self._rank]}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._letter + "\n")
        deadline = time.monotonic() + min(patience_s, 3 * self._poll_s + 0.5)
        alive = sum(self._is_alive(rank) for rank in range(self._size))
        try:
            written = self._store.add("written", 1)
            while written < alive and time.monotonic() < deadline:
                time.sleep(min(0.02, self._poll_s))
                written = self._store.add("written", 0)
        except Exception:
            pass

    def _is_alive(self, rank: int) -> bool:
        """Whether the process was heard of: it posts all the time, and answers where it is asked."""
        place = self._places.get(rank)
        if place is None or place.ended:
            return False
        if rank == self._rank or place.gave_up or place.answers >= max(self._asked, 1):
            return True
        return place.answers > 0 and time.time() - place.posted < 2 * self._poll_s + 0.3

    def _words(self, error: str) -> str:
        lines = [f"hang letter of rank {self._name(self._rank)}, one of {self._size} (limit {self.limit_s:g} s):"]
        lines += [f"  rank {self._name(rank)} {self._status(rank)}" for rank in range(self._size)]
        lines.append(f"  the first difference: {self._difference()}")
        if error:
            lines.append(f"  what ended the wait: {error}")
        lines.append(
            "  All ranks must run the same units in the same order, forward and backward, and make the same calls of "
            "torch.distributed in between. Where one rank only needs longer (a checkpoint, a first batch), raise "
            "init_process_group(timeout=...)"
        )
        return "\n".join(lines)

    def _name(self, rank: int) -> str:
        return str(rank) if self._global[rank] == rank else f"{rank} (of all: {self._global[rank]})"

    def _status(self, rank: int) -> str:
        place = self._places.get(rank)
        if place is None:
            return "has left no word: it has done nothing with the others yet, or the store cannot be reached"
        number = f"number {place.count}"
        if place.ended:
            return f"{place.ended}; the last thing it did with the others: {place.last} ({number})"
        at = f" at {place.line}" if place.line else ""
        phase = f", in {place.phase}" if place.phase else ""
        age = time.time() - place.posted
        if not self._is_alive(rank):
            return (
                f"does not answer, and has probably stopped: {age:.1f} s ago it was{at or ' there'}{phase}; the last "
                f"thing it did with the others: {place.last} ({number})"
            )
        since = f"for {place.since_s + (0.0 if place.gave_up else max(0.0, age)):.1f} s"
        if place.waits == "its entry":
            return f"{'waited' if place.gave_up else 'waits'} {since}{at}{phase}, where it {place.last} ({number})"
        doing = f"waits in {place.waits}" if place.waits else "does something else"
        return f"{doing} {since}{at}{phase}; the last thing it did with the others: {place.last} ({number})"

    def _difference(self) -> str:
        places = {rank: place for rank, place in self._places.items() if place.count}
        if not places:
            return "unknown, since no rank has done anything with the others"
        first, last = max(p.first for p in places.values()), max(p.count for p in places.values())
        if any(first >= place.count for place in places.values()):
            return "longer ago than what was kept: " + "; ".join(
                f"rank {rank}: {place.last} (number {place.count})" for rank, place in sorted(places.items())
            )
        lines = [places[r].entries[first - places[r].first :] if r in places else [] for r in range(self._size)]
        if all(one == lines[0] for one in lines):
            return f"none: all ranks have done the same {last} things"
        position, difference = first_difference(lines)
        return f"number {first + position + 1}: {difference}"


def limit_of(timeout: datetime.timedelta) -> float:
    """Return how long ranks may wait for each other, in seconds: see [Note: the limit]."""
    return min(timeout.total_seconds(), float(os.environ.get(LIMIT_SECONDS) or "inf"))


_letters: dict[dist.ProcessGroup, HangLetter] = {}


def letter_of(group: dist.ProcessGroup) -> HangLetter | None:
    """Return what posts the places of ``group``'s ranks, if anything does."""
    return _letters.get(group)


def post_places(group: dist.ProcessGroup, timeout: datetime.timedelta, entries: Callable[[int], Entries]) -> HangLetter:
    """Post from now on where this rank is, and what it does with the others of ``group``; made once for each group."""
    _letters[group] = HangLetter(group, timeout, entries)
    return _letters[group]
