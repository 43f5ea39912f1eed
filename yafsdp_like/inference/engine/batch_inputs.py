"""What a step is about, as the device reads it: tokens, positions, page tables, and how each row is drawn from.

[Note: two sides]
Tables are written to host memory, and uploaded from there. There are two of each such place, used in turn by steps:
the CPU writes one while the device may still read the other. What a step fetched is read before the next but one is
staged, so what is written is no longer read.

[Note: token pool]
``token_pool`` holds the tokens that the last step drew, then tokens that the host gives. A step finds its tokens by
index there, so it can be launched before the CPU knows what the last one drew.

Shapes: T tokens of a step, B sequences, V vocabulary, G groups of layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from yafsdp_like.inference.engine.batch import ActiveRequest, RequestStatus, Run
from yafsdp_like.kernels.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from yafsdp_like.inference.engine.forward import StepSize

_UPLOADED = (
    "token_pool",  # (B + T,)
    "token_index",  # (T,)
    "positions",  # (T,)
    "slot_mapping",  # (G, T)
    "page_tables",  # (G, B + 4, max_pages)
    "seq_lens",  # (B + 4,)
    "cu_seqlens_q",  # (B + 1,)
    "last_rows",  # (B,)
    "sampling_floats",  # (B, 7)
    "sampling_ints",  # (B, 4)
)
_GREEDY = SamplingParams(temperature=0.0)  # of rows that only fill up a recording's batch
_NOWHERE = -1

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Filled:
    """Whose pages a row of page tables holds, since which admission, and how many."""

    sequence: ActiveRequest
    num_admitted: int
    num_pages: int


class _Side:
    """Host memory for what one step uploads, pinned where there is a GPU."""

    def __init__(self, places: Mapping[str, Tensor], pinned: bool) -> None:
        self.tensors = {
            name: torch.zeros(places[name].shape, dtype=places[name].dtype, pin_memory=pinned) for name in _UPLOADED
        }
        self.arrays: dict[str, Array] = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self.filled: list[_Filled | None] = [None] * len(places["seq_lens"])  # rows of page_tables


class Staging:
    """Writes the tables of steps. See [Note: two sides] and [Note: token pool]."""

    def __init__(self, places: Mapping[str, Tensor], page_size: int, pinned: bool) -> None:
        self._places, self._page_size = places, page_size
        self._max_batch_size = len(places["last_rows"])
        self._sides = [_Side(places, pinned) for _ in range(2)]
        self._turn = 0
        self._filled: list[_Filled | None] = [None] * len(places["seq_lens"])  # rows of page_tables on the device
        self._drawn: dict[
            ActiveRequest, int
        ] = {}  # rows of the last step that drew, which is where ``token_pool`` has its tokens
        self._histories = torch.zeros(places["history"].shape, dtype=torch.int32, pin_memory=pinned)
        self._history_rows: dict[ActiveRequest, tuple[int, int]] = {}  # row, and the admission that it was made for

    @property
    def _side(self) -> _Side:
        return self._sides[self._turn]

    def stage(self, runs: Sequence[Run], drawing: Sequence[Run], size: StepSize) -> None:
        """Writes and uploads all that a step of ``size`` reads; ``drawing`` are those of ``runs`` that draw.

        ``size`` may have more single rows than there are runs; the others read and write nothing.
        """
        self._turn ^= 1
        singles, chunks = runs[: len(runs) - size.num_chunks], runs[len(runs) - size.num_chunks :]
        rows = {run.sequence: row for row, run in enumerate(singles)}
        rows |= {run.sequence: size.first_chunk + number for number, run in enumerate(chunks)}
        self._write_pages(runs, rows)
        self._write_seq_lens(runs, rows, size)
        self._write_singles(singles, size)
        first = size.num_single
        for run in chunks:
            self._write_chunk(run, rows[run.sequence], first)
            first += run.num_tokens
        self._write_cu_seqlens_q(chunks)
        self._upload_tokens(size)
        self._stage_drawing(runs, drawing, size)

    def stage_idle(self, size: StepSize) -> None:
        """A step of ``size`` whose rows read and write nothing."""
        self._turn ^= 1
        arrays = self._side.arrays
        for name in ("token_index", "positions"):
            arrays[name][: size.num_tokens] = 0
        arrays["slot_mapping"][:, : size.num_tokens] = _NOWHERE
        arrays["seq_lens"][: size.num_rows] = 0
        arrays["cu_seqlens_q"][: size.num_chunks + 1] = [0] * size.num_chunks + [size.num_chunk_tokens]
        arrays["last_rows"][:] = 0
        self._upload("last_rows", 0, size.num_drawing)
        self._upload_tokens(size)
        self._stage_drawing((), (), replace(size, num_single=size.num_drawing, num_chunks=0))

    # --- tokens ---

    def _write_singles(self, runs: Sequence[Run], size: StepSize) -> None:
        """Rows of one token each, in lists: a step of the largest batch costs as many elements, not calls."""
        count, arrays, page_size = len(runs), self._side.arrays, self._page_size
        starts = [run.start for run in runs]
        arrays["positions"][:count] = starts
        arrays["token_pool"][self._max_batch_size :][:count] = [
            0 if run.is_pending else run.sequence.tokens[run.start] for run in runs
        ]
        arrays["token_index"][:count] = [
            self._drawn[run.sequence] if run.is_pending else self._max_batch_size + row for row, run in enumerate(runs)
        ]
        for group, slot_mapping in enumerate(arrays["slot_mapping"]):
            tables = [run.sequence.tables[group] for run in runs]
            slot_mapping[:count] = [
                table[start // page_size] * page_size + start % page_size
                for table, start in zip(tables, starts, strict=True)
            ]
            slot_mapping[count : size.num_single] = _NOWHERE
        for name in ("positions", "token_index"):
            arrays[name][count : size.num_single] = 0

    def _write_chunk(self, run: Run, row: int, first: int) -> None:
        """Rows from ``first`` on: one run of several tokens, all of them known."""
        arrays, page_size = self._side.arrays, self._page_size
        rows, first_token = slice(first, first + run.num_tokens), self._max_batch_size + first
        arrays["positions"][rows] = np.arange(run.start, run.end)
        arrays["token_pool"][first_token : first_token + run.num_tokens] = run.sequence.tokens[run.start : run.end]
        arrays["token_index"][rows] = np.arange(first_token, first_token + run.num_tokens)
        first_page, offset = divmod(run.start, page_size)
        for group, slot_mapping in enumerate(arrays["slot_mapping"]):
            pages = arrays["page_tables"][group, row, first_page : -(-run.end // page_size)]
            places = pages[:, None] * page_size + np.arange(page_size, dtype=np.int32)
            slot_mapping[rows] = places.reshape(-1)[offset : offset + run.num_tokens]

    def _upload_tokens(self, size: StepSize) -> None:
        self._upload("token_pool", self._max_batch_size, self._max_batch_size + size.num_tokens)
        for name in ("token_index", "positions"):
            self._upload(name, 0, size.num_tokens)
        for group in range(len(self._places["slot_mapping"])):
            self._upload("slot_mapping", 0, size.num_tokens, group)
        self._upload("seq_lens", 0, size.num_rows)
        if size.num_chunks:
            self._upload("cu_seqlens_q", 0, size.num_chunks + 1)

    def _upload(self, name: str, first: int, last: int, *index: int) -> None:
        """Elements (or rows) ``[first, last)`` of a table, or of its part at ``index``."""
        source, destination = self._side.tensors[name][index], self._places[name][index]
        destination[first:last].copy_(source[first:last], non_blocking=True)

    # --- sequences ---

    def _write_pages(self, runs: Sequence[Run], rows: Mapping[ActiveRequest, int]) -> None:
        """Page tables, of which only what is new is written, and only rows with news are uploaded."""
        changed = [rows[run.sequence] for run in runs if self._write_row(run.sequence, rows[run.sequence])]
        if changed:
            for group in range(len(self._places["page_tables"])):
                self._upload("page_tables", min(changed), max(changed) + 1, group)
            for row in range(min(changed), max(changed) + 1):
                self._filled[row] = self._side.filled[row]

    def _write_row(self, sequence: ActiveRequest, row: int) -> bool:
        """Brings a row up to date on this side; whether the device's is out of date.

        Pages that have left a window stay in it, and are not read.
        """
        side, tables = self._side, sequence.tables
        filled, num_pages = side.filled[row], len(tables[0])
        now = _Filled(sequence, sequence.num_admitted, num_pages)
        if filled != now:
            is_known = filled is not None and (filled.sequence, filled.num_admitted) == (sequence, now.num_admitted)
            first = filled.num_pages if filled is not None and is_known else 0
            for group, table in enumerate(tables):
                side.arrays["page_tables"][group, row, first:num_pages] = table[first:]
            side.filled[row] = now
        return self._filled[row] != now

    def _write_seq_lens(self, runs: Iterable[Run], rows: Mapping[ActiveRequest, int], size: StepSize) -> None:
        seq_lens = self._side.arrays["seq_lens"]
        seq_lens[: size.num_rows] = 0
        for run in runs:
            seq_lens[rows[run.sequence]] = run.end

    def _write_cu_seqlens_q(self, chunks: Sequence[Run]) -> None:
        """Of chunks, counted from the first one's first row."""
        cu_seqlens_q = self._side.arrays["cu_seqlens_q"]
        cu_seqlens_q[0] = 0
        cu_seqlens_q[1 : len(chunks) + 1] = np.cumsum([run.num_tokens for run in chunks])

    # --- drawing ---

    def _stage_drawing(self, runs: Sequence[Run], drawing: Sequence[Run], size: StepSize) -> None:
        arrays, count = self._side.arrays, len(drawing)
        sequences = [run.sequence for run in drawing]
        self._drawn = {sequence: row for row, sequence in enumerate(sequences)}
        if not size.num_drawing:
            return
        floats = [sequence.request.sampling.floats() for sequence in sequences]
        ints = [run.sequence.request.sampling.ints(run.end, self._history_row(run.sequence)) for run in drawing]
        padding = size.num_drawing - count
        arrays["sampling_floats"][: size.num_drawing] = floats + [_GREEDY.floats()] * padding
        arrays["sampling_ints"][: size.num_drawing] = ints + [_GREEDY.ints(0)] * padding
        for name in ("sampling_floats", "sampling_ints"):
            self._upload(name, 0, size.num_drawing)
        if not size.draws_in_order:
            ends = np.cumsum([run.num_tokens for run in runs])
            arrays["last_rows"][:count] = [end - 1 for end, run in zip(ends, runs, strict=True) if run.draws]
            self._upload("last_rows", 0, count)

    def _history_row(self, sequence: ActiveRequest) -> int:
        """The row that counts what the sequence has said, if that matters to it; -1 if not."""
        if not sequence.request.sampling.needs_history:
            return _NOWHERE
        row, num_admitted = self._history_rows.get(sequence, (_NOWHERE, 0))
        if num_admitted != sequence.num_admitted:
            row = self._free_history_row() if row == _NOWHERE else row
            self._history_rows[sequence] = row, sequence.num_admitted
            self._write_history(sequence, row)
        return row

    def _free_history_row(self) -> int:
        gone = [sequence for sequence in self._history_rows if sequence.status is not RequestStatus.RUNNING]
        for sequence in gone:
            del self._history_rows[sequence]
        taken = {row for row, _ in self._history_rows.values()}
        return next(row for row in range(self._max_batch_size) if row not in taken)

    def _write_history(self, sequence: ActiveRequest, row: int) -> None:
        """As `kernels.sampling.remember` would make it; drawing keeps it up on the device from then on."""
        history, num_prompt = self._histories[row].numpy(), len(sequence.request.prompt)
        history[:] = 0
        history[sequence.tokens[:num_prompt]] = 1
        np.add.at(history, sequence.tokens[num_prompt:], 2)
        self._places["history"][row].copy_(self._histories[row], non_blocking=True)
