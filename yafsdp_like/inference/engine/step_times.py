"""How long a step of so many rows takes on this device, and so how many rows a step may have within a given time.

Plain numbers: where times come from is the caller's.
"""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MIN_CHUNK = 64  # tokens of prompts that a step has room for, whatever the target, so that every prompt moves
_WEIGHT = 0.1  # of the last step in what is learned
_RATIOS = 0.25, 4.0  # the least and most that one step may say of the table


class StepTimes:
    """Seconds of a step by its rows: measured ones, corrected by those of the steps that are made.

    A step takes ``scale * table[rows] + num_decoding * decoding_s``. The table holds what was measured with rows that
    read no keys, but visit experts; a step of other sizes takes as long as the next larger one, to which it is padded.
    What the keys of decoding rows add is learned from steps that only decode, and the scale, which chunks behind long
    contexts raise, from the others.
    """

    def __init__(self, table: Mapping[int, float]) -> None:
        """``table`` has the seconds of steps by their rows; more rows never count as faster."""
        if not table or min(table.values()) <= 0 or min(table) < 1:
            raise ValueError(f"expected at least one number of rows with its seconds, all above 0, found {dict(table)}")
        self._sizes = sorted(table)
        self._seconds = list(itertools.accumulate((table[size] for size in self._sizes), max))
        self._scale, self._decoding_s = 1.0, 0.0

    def seconds(self, num_rows: int, num_decoding: int = 0) -> float:
        """Return the seconds of a step of ``num_rows``, ``num_decoding`` of which decode."""
        return self._scale * self._table_s(num_rows) + num_decoding * self._decoding_s

    def ends(self, least: int, most: int) -> Iterator[int]:
        """Yield the numbers of rows above ``least``, up to ``most``, behind which a step has more padding."""
        yield from (size for size in self._sizes if least < size < most)
        if most > least:
            yield most

    def max_rows(self, target_s: float, num_decoding: int) -> int:
        """Return the most rows of a step within ``target_s``, but at least ``num_decoding + MIN_CHUNK``."""
        table_s = (target_s - num_decoding * self._decoding_s) / self._scale
        num_fitting = bisect.bisect_right(self._seconds, table_s)
        rows = 0
        if num_fitting == len(self._sizes):
            rows = int(self._sizes[-1] * table_s / self._seconds[-1])
        elif num_fitting:
            rows = self._sizes[num_fitting - 1]
        return max(rows, num_decoding + MIN_CHUNK)

    def learn(self, num_rows: int, num_decoding: int, seconds: float) -> None:
        """Correct what is predicted by the seconds that a step took."""
        low, high = _RATIOS
        table_s = self._table_s(num_rows)
        if num_rows == num_decoding:
            seconds = min(seconds, high * (table_s + num_rows * self._decoding_s))
            keys_s = max(0.0, seconds - table_s) / num_rows
            self._decoding_s += _WEIGHT * (keys_s - self._decoding_s)
        else:
            if num_decoding:
                self._decoding_s = min(self._decoding_s, seconds / num_decoding)  # where no step only decodes
            ratio = (seconds - num_decoding * self._decoding_s) / table_s
            self._scale += _WEIGHT * (min(max(ratio, low), high) - self._scale)

    def _table_s(self, num_rows: int) -> float:
        index = bisect.bisect_left(self._sizes, num_rows)
        if index < len(self._sizes):
            return self._seconds[index]
        return self._seconds[-1] * num_rows / self._sizes[-1]
