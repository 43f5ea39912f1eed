"""What a step is about, as the device reads it: tokens, positions, page tables, and how each row is drawn from.

[Note: two sides]
Tables are written to host memory, and uploaded from there. There are two of each such place, used in turn by steps:
the CPU writes one while the device may still read the other. What a step fetched is read before the next but one is
staged, so what is written is no longer read.

[Note: token pool]
``token_pool`` holds the tokens that the last step drew, then tokens that the host gives. A step finds its tokens by
index there, so it can be launched before the CPU knows what the last one drew.

Shapes: T tokens of a step, B sequences, R rows that draw, V vocabulary, G groups of layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from yafsdp_like.inference.engine.histories import Histories
from yafsdp_like.kernels.lora import tiles_of
from yafsdp_like.kernels.query_tiles import write_tiles
from yafsdp_like.kernels.sampling_params import SamplingInts, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.inference.engine.batch import ActiveRequest, Run
    from yafsdp_like.inference.plan.buffers import BatchInputs, StepBuffers
    from yafsdp_like.inference.plan.step_sizes import StepSize

_GREEDY = SamplingParams(temperature=0.0)  # of rows that only fill up a recording's batch
_UNSTORED = -2  # the slot of a token that is no padding, and whose keys and values are not stored
_STRIDE = 7919  # of the tokens of measured steps: a prime, so that these are spread over the vocabulary
_NOWHERE = -1
_POSITION, _HISTORY_ROW = map(SamplingInts._fields.index, ("position", "history_row"))
_MAX_PARTS = 256  # of a table that are kept; sizes of steps are few

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Filled:
    """Whose pages a row of page tables holds, since which admission, and how many."""

    sequence: ActiveRequest
    num_admitted: int
    num_pages: int


@dataclass(frozen=True)
class _HostTable:
    """A table in host memory, as the CPU writes it, and the one on the device that it is uploaded to."""

    array: Array
    source: Tensor  # the same elements
    destination: Tensor
    parts: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)  # by what was uploaded before

    def upload(self, first: int, last: int, *index: int) -> None:
        """Upload elements (or rows) ``[first, last)`` of the table, or of its part at ``index``."""
        part = self.parts.get((first, last, *index))
        if part is None:
            part = self.destination[index][first:last], self.source[index][first:last]
            if len(self.parts) < _MAX_PARTS:
                self.parts[first, last, *index] = part
        part[0].copy_(part[1], non_blocking=True)


class _Side:
    """Host memory for what one step uploads, pinned where there is a GPU."""

    def __init__(self, inputs: BatchInputs[Tensor], pinned: bool) -> None:
        def host_table(device: Tensor) -> _HostTable:
            host = host_like(device, pinned)
            return _HostTable(host.numpy(), host, device)

        self.inputs = inputs.map(host_table)
        self.filled: list[_Filled | None] = [None] * len(inputs.seq_lens)  # rows of page_tables
        self.drawn: list[ActiveRequest | None] = []  # whose parameters of sampling are written; None: padding


class Staging:
    """Writes the inputs of steps. See [Note: two sides] and [Note: token pool]."""

    def __init__(
        self, buffers: StepBuffers, page_size: int, queries_per_tile: int, pinned: bool, num_adapter_slots: int
    ) -> None:
        self._num_adapter_slots = num_adapter_slots
        self.histories, self._page_size = Histories(buffers.tables.history, pinned), page_size
        self._vocab_size = buffers.tables.history.shape[1]
        self._queries_per_tile = queries_per_tile
        self._num_drawn = len(buffers.inputs.last_rows)  # tokens of the last step, at the start of ``token_pool``
        self._sides = [_Side(buffers.inputs, pinned) for _ in range(2)]
        self._side = self._sides[0]
        self._drawing: list[ActiveRequest | None] = []  # whose floats the device has, as ``_Side.drawn``
        self._filled: list[_Filled | None] = [None] * len(buffers.inputs.seq_lens)  # page_tables on the device
        # Rows of the last step that drew, which is where ``token_pool`` has its tokens.
        self._drawn: dict[ActiveRequest, int] = {}

    def stage(self, runs: Sequence[Run], drawing: Sequence[Run], size: StepSize) -> None:
        """Write and upload all that a step of ``size`` reads; ``drawing`` are those of ``runs`` that draw.

        ``runs`` are sorted: those of one token come first. ``size`` may have more rows of everything than they need.
        """
        self._sides.reverse()
        self._side = self._sides[0]
        num_single = len(runs) - sum([run.num_tokens > 1 for run in runs])
        singles, chunks = runs[:num_single], runs[num_single:]
        rows = [*range(num_single), *range(size.first_chunk, size.first_chunk + len(chunks))]
        self._write_pages(runs, rows)
        self._write_seq_lens(runs, rows, size)
        self._write_singles(singles)
        first = num_single
        for run, row in zip(chunks, rows[num_single:], strict=True):
            self._write_chunk(run, row, first)
            first += run.num_tokens
        self._write_padding(slice(first, size.num_tokens))
        if size.adapted:
            self._write_adapters(runs, size)
        num_tiles = self._write_tiles(chunks, num_single, size)
        self._upload_tokens(size, num_tiles)
        self._stage_drawing(runs, drawing, size)

    def stage_idle(self, size: StepSize) -> None:
        """Write and upload a step of ``size`` that is all padding."""
        self.stage((), (), size)

    def stage_measured(self, size: StepSize) -> None:
        """Write and upload a step of ``size`` that reads and writes no pages, but whose rows visit experts.

        Rows have tokens of their own, since equal ones would all visit the same experts. ``Staging.stage`` of any other
        step overwrites these tables.
        """
        self.stage_idle(size)
        inputs, rows, vocab_size = self._side.inputs, slice(0, size.num_tokens), self._vocab_size
        tokens = np.arange(self._num_drawn, self._num_drawn + size.num_tokens)
        inputs.token_index.array[rows] = tokens
        inputs.token_pool.array[tokens] = np.arange(size.num_tokens) * _STRIDE % vocab_size
        inputs.slot_mapping.array[:, rows] = _UNSTORED
        self._upload_tokens(size, 0)

    # --- tokens ---

    def _write_singles(self, runs: Sequence[Run]) -> None:
        """Write rows of one token each, as lists: a large batch costs more elements, not more calls."""
        count, inputs, page_size = len(runs), self._side.inputs, self._page_size
        starts, kvs = [run.start for run in runs], [run.sequence.kv for run in runs]
        inputs.positions.array[:count] = starts
        inputs.token_pool.array[self._num_drawn :][:count] = [0 if run.is_pending else run.token for run in runs]
        inputs.token_index.array[:count] = [
            self._drawn[run.sequence] if run.is_pending else self._num_drawn + row for row, run in enumerate(runs)
        ]
        for group, slot_mapping in enumerate(inputs.slot_mapping.array):
            tables = [kv.tables[group] for kv in kvs if kv is not None]
            slot_mapping[:count] = [
                table[start // page_size] * page_size + start % page_size
                for table, start in zip(tables, starts, strict=True)
            ]

    def _write_chunk(self, run: Run, row: int, first: int) -> None:
        """Write one run of several known tokens to the rows from ``first`` on."""
        inputs, page_size = self._side.inputs, self._page_size
        rows, first_token = slice(first, first + run.num_tokens), self._num_drawn + first
        inputs.positions.array[rows] = np.arange(run.start, run.end)
        inputs.token_pool.array[first_token : first_token + run.num_tokens] = run.sequence.tokens[run.start : run.end]
        inputs.token_index.array[rows] = np.arange(first_token, first_token + run.num_tokens)
        first_page, offset = divmod(run.start, page_size)
        for group, slot_mapping in enumerate(inputs.slot_mapping.array):
            pages = inputs.page_tables.array[group, row, first_page : -(-run.end // page_size)]
            slots = pages[:, None] * page_size + np.arange(page_size, dtype=np.int32)
            slot_mapping[rows] = slots.reshape(-1)[offset : offset + run.num_tokens]

    def _write_padding(self, rows: slice) -> None:
        inputs = self._side.inputs
        inputs.token_index.array[rows] = 0
        inputs.positions.array[rows] = 0
        inputs.slot_mapping.array[:, rows] = _NOWHERE

    def _write_adapters(self, runs: Sequence[Run], size: StepSize) -> None:
        """Write and upload which rows have which adapter, those of ``runs`` coming in their order."""
        inputs, slots = self._side.inputs, np.zeros(size.num_tokens, np.int32)
        found = np.repeat([run.sequence.adapter_slot for run in runs], [run.num_tokens for run in runs])
        slots[: len(found)] = found
        order, tiles = tiles_of(slots, self._num_adapter_slots)
        inputs.adapter_rows.array[: len(order)], inputs.adapter_tiles.array[: len(tiles)] = order, tiles
        inputs.adapter_rows.upload(0, len(order))
        inputs.adapter_tiles.upload(0, len(tiles))

    def _upload_tokens(self, size: StepSize, num_tiles: int) -> None:
        inputs = self._side.inputs
        inputs.token_pool.upload(self._num_drawn, self._num_drawn + size.num_tokens)
        inputs.token_index.upload(0, size.num_tokens)
        inputs.positions.upload(0, size.num_tokens)
        for group in range(len(inputs.slot_mapping.array)):
            inputs.slot_mapping.upload(0, size.num_tokens, group)
        inputs.seq_lens.upload(0, size.num_table_rows)
        if size.num_chunks:
            inputs.tiles.upload(0, 1 + num_tiles)

    # --- sequences ---

    def _write_pages(self, runs: Sequence[Run], rows: Sequence[int]) -> None:
        """Write the new entries of page tables, and upload the rows that changed."""
        first_rows: dict[ActiveRequest, int] = {}
        side_filled, changed = self._side.filled, []
        for run, row in zip(runs, rows, strict=True):
            sequence, filled = run.sequence, side_filled[row]
            first_row = first_rows.setdefault(sequence, row)
            # Most rows have not changed since, on either side.
            if (
                filled is None
                or filled is not self._filled[row]
                or filled.sequence is not sequence
                or filled.num_admitted != sequence.num_admitted
                or sequence.kv is None
                or filled.num_pages != len(sequence.kv.tables[0])
            ) and self._write_row(sequence, row, first_row):
                changed.append(row)
        if changed:
            page_tables = self._side.inputs.page_tables
            for group in range(len(page_tables.array)):
                page_tables.upload(min(changed), max(changed) + 1, group)
            for row in range(min(changed), max(changed) + 1):
                self._filled[row] = self._side.filled[row]

    def _write_row(self, sequence: ActiveRequest, row: int, first_row: int) -> bool:
        """Update a row on this side, and return whether the device's is out of date.

        Pages that have left a window stay in the row, and are not read. Rows of the same sequence behind ``first_row``
        are copies of it.
        """
        side, tables = self._side, sequence.tables
        filled, num_pages = side.filled[row], len(tables[0])
        holds = filled is not None and filled.sequence is sequence and filled.num_admitted == sequence.num_admitted
        first = filled.num_pages if filled is not None and holds else 0
        if filled is None or not holds or first != num_pages:
            for group, table in enumerate(tables):
                rows, new = side.inputs.page_tables.array[group], slice(first, num_pages)
                rows[row, new] = table[first:] if row == first_row else rows[first_row, new]
            side.filled[row] = filled = _Filled(sequence, sequence.num_admitted, num_pages)
        if self._filled[row] != filled:
            return True
        side.filled[row] = self._filled[row]
        return False

    def _write_seq_lens(self, runs: Sequence[Run], rows: Sequence[int], size: StepSize) -> None:
        seq_lens = self._side.inputs.seq_lens.array
        seq_lens[: size.num_table_rows] = 0
        seq_lens[rows] = [run.start + run.num_tokens for run in runs]

    def _write_tiles(self, chunks: Sequence[Run], first: int, size: StepSize) -> int:
        """Write which queries programs attend with, the chunks' rows being those from ``first`` on; return how many."""
        if not size.num_chunks:
            return 0
        nums = np.array([run.num_tokens for run in chunks], dtype=np.int64)
        starts = np.array([run.start for run in chunks], dtype=np.int64)
        found = np.stack((first + np.cumsum(nums) - nums, nums, starts, np.arange(len(chunks))), axis=1)
        return write_tiles(self._side.inputs.tiles.array, found, self._queries_per_tile)

    # --- drawing ---

    def _stage_drawing(self, runs: Sequence[Run], drawing: Sequence[Run], size: StepSize) -> None:
        side, count = self._side, len(drawing)
        inputs, sequences = side.inputs, [run.sequence for run in drawing]
        self._drawn = {sequence: row for row, sequence in enumerate(sequences)}
        if not size.num_drawing:
            return
        owners: list[ActiveRequest | None] = [*sequences, *[None] * (size.num_drawing - count)]
        if side.drawn[: len(owners)] != owners:
            self._write_sampling(owners)
        ints = inputs.sampling_ints.array
        ints[:count, _POSITION] = [run.start + run.num_tokens for run in drawing]
        for row, run in enumerate(drawing):
            # What limited rows draw here is replaced, and leaves no trace: see limited_drawing.py, [Note: drawn twice].
            if run.sequence.needs_history and not run.sequence.request.limits:
                ints[row, _HISTORY_ROW] = self.histories.row_of(run)
        if self._drawing != owners:
            self._drawing = owners
            inputs.sampling_floats.upload(0, size.num_drawing)
        inputs.sampling_ints.upload(0, size.num_drawing)
        if not size.draws_in_order:
            ends = np.cumsum([run.num_tokens for run in runs])
            inputs.last_rows.array[:count] = [end - 1 for end, run in zip(ends, runs, strict=True) if run.draws]
            inputs.last_rows.array[count : size.num_drawing] = 0
            inputs.last_rows.upload(0, size.num_drawing)

    def _write_sampling(self, owners: list[ActiveRequest | None]) -> None:
        """Write the parameters of rows that have other owners than before; of integers, those that stay the same."""
        side, before = self._side, self._side.drawn
        changed = [row for row, owner in enumerate(owners) if row >= len(before) or owner is not before[row]]
        all_params = [_GREEDY if (owner := owners[row]) is None else owner.request.sampling for row in changed]
        side.inputs.sampling_floats.array[changed] = [params.floats for params in all_params]
        side.inputs.sampling_ints.array[changed] = [params.ints(0) for params in all_params]
        side.drawn[: len(owners)] = owners


def host_like(tensor: Tensor, pinned: bool) -> Tensor:
    """Return zeros in host memory, of the same shape and dtype."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
