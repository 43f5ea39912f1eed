"""Whose tokens each row of the device's ``history`` counts (kernels/sampling.py), for requests with penalties.

Owns which rows are whose. Drawing itself counts what is drawn, on the device.

[Note: history of drafts]
A row that verifies drafts is penalized for the tokens drafted before it, so it has a row of the history of its own: a
copy of that of the row before it, with one token more. When what the step drew is read, the row of the last token that
counts has seen just the tokens of the sequence, and becomes its row; the others are free again. So nothing is taken
back, and the CPU need not know what was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from yafsdp_like.inference.engine.batch import ActiveRequest, RequestStatus

if TYPE_CHECKING:
    from torch import Tensor

    from yafsdp_like.inference.engine.batch import Run

NO_ROW = -1


@dataclass(frozen=True)
class _Held:
    """Rows of one sequence, since one admission."""

    num_admitted: int
    # By how many tokens the sequence has when the row is the one that has seen them all. Several only after drafts.
    rows: dict[int, int]


class Histories:
    """The rows of one engine's history."""

    def __init__(self, history: Tensor, pinned: bool) -> None:
        """``history``: (R, V) int32, as many rows as a step has that draw, or sequences that run, if these are more."""
        self._history = history
        self._on_host = torch.zeros(history.shape, dtype=history.dtype, pin_memory=pinned)
        self._free = [*range(len(history))]
        self._held: dict[ActiveRequest, _Held] = {}

    def row_of(self, run: Run) -> int:
        """Return the row that ``run`` draws with, which will count what it draws; ``NO_ROW`` if it needs none.

        To be asked once for each run that draws, in order, when a sequence with drafts in the step before was read.
        """
        sequence = run.sequence
        if not sequence.needs_history:
            return NO_ROW
        if run.drafted:
            rows, row = self._held[sequence].rows, self._take()
            self._history[row].copy_(self._history[rows[run.end]])
            self._history[row, run.drafted[-1]] += 2
            rows[run.end + 1] = row
            return row
        held = self._held.get(sequence)
        if held is None or held.num_admitted != sequence.num_admitted:
            self._release(sequence)
            row = self._take()
            self._write(sequence, row)
        else:
            self._settle(sequence, held)
            (row,) = held.rows.values()
        self._held[sequence] = _Held(sequence.num_admitted, {run.end + 1: row})
        return row

    def _settle(self, sequence: ActiveRequest, held: _Held) -> None:
        """Keep only the row that has seen the sequence's tokens, if the last step that drew for it was read."""
        length = len(sequence.tokens)
        if length in held.rows:
            row = held.rows.pop(length)
            self._free += held.rows.values()
            held.rows.clear()
            held.rows[length] = row

    def _take(self) -> int:
        if not self._free:
            for sequence, held in list(self._held.items()):
                if sequence.status is RequestStatus.RUNNING:
                    self._settle(sequence, held)
                else:
                    self._release(sequence)
        return self._free.pop()

    def _release(self, sequence: ActiveRequest) -> None:
        held = self._held.pop(sequence, None)
        self._free += () if held is None else held.rows.values()

    def _write(self, sequence: ActiveRequest, row: int) -> None:
        """Fill a row as `kernels.sampling.remember` does; drawing then keeps it up to date on the device."""
        history, num_prompt = self._on_host[row].numpy(), len(sequence.request.prompt)
        history[:] = 0
        history[sequence.tokens[:num_prompt]] = 1
        np.add.at(history, sequence.tokens[num_prompt:], 2)
        self._history[row].copy_(self._on_host[row], non_blocking=True)
