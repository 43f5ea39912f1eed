"""Prompt lookup: what followed a sequence's last tokens before is drafted to follow them again. No model is needed.

Of the places where the last two tokens stood before, the latest counts with which most tokens before them agree, too,
up to ``LONGEST`` (Saxena, "Prompt lookup decoding", 2023). A draft that comes to the end of the text goes on with
itself, so a text that repeats itself with any period is drafted on.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from yafsdp_like.inference.engine.speculator import Prospect

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from yafsdp_like.inference.engine.batch import ActiveRequest

SHORTEST, LONGEST = 2, 4  # last tokens that must agree, and that are compared

Tokens = npt.NDArray[np.int64]


class PromptLookup:
    """A `speculator.Drafter` that reads the sequence's own tokens; one vectorized pass over them for each draft."""

    def __init__(self) -> None:
        self._texts: weakref.WeakKeyDictionary[ActiveRequest, _Text] = weakref.WeakKeyDictionary()

    def prospect_of(self, sequence: ActiveRequest, most: int) -> Prospect | None:
        """Return what stands behind the last place that looks like the end; None where there is none."""
        text = self._texts.setdefault(sequence, _Text())
        text.drafted, num_alike = look_up(text.grown_to(sequence.tokens), most)
        if not text.drafted:
            return None
        return Prospect(most, num_alike, prior=num_alike / (num_alike + 2), tokens=text.drafted)

    def draft(self, wanted: Mapping[ActiveRequest, int]) -> dict[ActiveRequest, tuple[int, ...]]:
        """Return what was found last for these sequences."""
        return {sequence: self._texts[sequence].drafted[:count] for sequence, count in wanted.items()}


class _Text:
    """The tokens of a sequence as an array that grows with it, and the last draft."""

    def __init__(self) -> None:
        self._array: Tokens = np.empty(0, dtype=np.int64)
        self._length = 0
        self.drafted: tuple[int, ...] = ()

    def grown_to(self, tokens: Sequence[int]) -> Tokens:
        """Return ``tokens``, (n,) int64; those that were given before are there already."""
        if len(tokens) > len(self._array):
            self._array = np.concatenate((self._array[: self._length], np.empty(len(tokens), dtype=np.int64)))
        self._array[self._length : len(tokens)] = tokens[self._length :]
        self._length = len(tokens)
        return self._array[: self._length]


def look_up(tokens: Tokens, most: int) -> tuple[tuple[int, ...], int]:
    """Return ``most`` tokens drafted behind ``tokens``, (n,), and how many last ones agree with those before the place.

    No tokens where fewer than ``SHORTEST`` agree.
    """
    last, num_alike = len(tokens) - 1, 1
    ends = np.flatnonzero(tokens[:last] == tokens[last])  # where the last of the tokens that agree stands
    while len(ends) and num_alike < min(LONGEST, last):
        inside = ends[ends >= num_alike]
        longer = inside[tokens[inside - num_alike] == tokens[last - num_alike]]
        if not len(longer):
            break
        ends, num_alike = longer, num_alike + 1
    if not len(ends) or num_alike < SHORTEST:
        return (), 0
    tail = tokens[ends[-1] + 1 :][:most].tolist()
    return tuple((tail * -(-most // len(tail)))[:most]), num_alike
