"""How far a text has come on its way to tokens: said by the process that works on it, and to those that wait for it.

Ranks race for the lock of a cache directory, so that the one that speaks to the user may be one that waits. Whoever
builds therefore leaves its words in the lock's own file, where the others read them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

BETWEEN_WORDS_S = 0.1


@dataclass(frozen=True)
class Progress:
    """What is being done, and how much of the text's files (bytes as they lie on the disk) has been read for it."""

    what: str
    done_nbytes: int
    total_nbytes: int


Say = Callable[[Progress], None]


def say_nothing(progress: Progress) -> None:
    """For whoever does not want to know."""


class Teller:
    """Of one build: tells `say`, and the file that others read, but no more often than anyone can read."""

    def __init__(self, path: Path, total_nbytes: int, say: Say) -> None:
        self._path, self._total_nbytes, self._say = path, total_nbytes, say
        self._what = ""
        self._next = 0.0

    def begin(self, what: str) -> None:
        """Start to report `what` from 0 bytes on."""
        self._what, self._next = what, 0.0
        self.read(0)

    def read(self, num_nbytes: int) -> None:
        """So many bytes of the files, from the first on, have been read."""
        if time.monotonic() >= self._next or num_nbytes == self._total_nbytes:
            self._next = time.monotonic() + BETWEEN_WORDS_S
            progress = Progress(self._what, num_nbytes, self._total_nbytes)
            self._path.write_text(json.dumps(asdict(progress)))
            self._say(progress)


def heard(path: Path) -> Progress | None:
    """What the process that holds the lock has left there last; None where that cannot be read, or is not yet."""
    try:
        return Progress(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
