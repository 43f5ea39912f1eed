"""Draws once more for rows whose tokens are limited or biased, behind the step that has drawn for all.

Owns the tables of that. Steps are the same with and without such rows: their recordings know nothing of it, and what
they draw for these rows is replaced, with no trace in the history of any.

[Note: drawn twice]
What may be drawn depends on the token before, which the CPU reads while the step's forward already runs. So the step
is launched as always, limits are written meanwhile, and scores are copied, biased and masked when they are there. Rows
without limits draw greedily from their copy, which nobody reads.

Shapes: B sequences, V vocabulary, W words of bits, E biases.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.engine.batch import RequestStatus
from yafsdp_like.inference.engine.batch_inputs import host_like
from yafsdp_like.inference.engine.grammar_masks import AskedMasks, MaskLanes
from yafsdp_like.inference.engine.limits import LimitedSequence
from yafsdp_like.inference.engine.request import GrammarError
from yafsdp_like.kernels.sampling import SamplingRows, sample
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.kernels.token_bits import forbid

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from yafsdp_like.inference.engine.batch import ActiveRequest, Run
    from yafsdp_like.inference.plan.buffers import StepBuffers

_GREEDY = SamplingParams(temperature=0.0)  # of rows whose draw nobody reads
_NEVER = _GREEDY.ints(0)


class LimitedDrawing:
    """[Note: drawn twice] For one engine."""

    def __init__(self, buffers: StepBuffers, pinned: bool) -> None:
        self._on_device, self._logits = buffers.limits, buffers.logits
        self._history, self._ids = buffers.tables.history, buffers.inputs.token_pool
        self._on_host = self._on_device.map(lambda tensor: host_like(tensor, pinned))
        self._lanes = MaskLanes()
        self._known: weakref.WeakKeyDictionary[ActiveRequest, LimitedSequence] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        drawing: Sequence[Run],
        late: Collection[ActiveRequest],
        history_row: Callable[[Run], int],
    ) -> None:
        """Replace what limited rows have drawn, but for those of ``late`` sequences, which ``find_late`` has found."""
        num_biases = self._write(drawing, late, history_row)
        host, device, rows = self._on_host, self._on_device, slice(0, len(drawing))
        for name in ("bits", "floats", "ints", "is_limited"):
            getattr(device, name)[rows].copy_(getattr(host, name)[rows], non_blocking=True)
        if num_biases:
            for name in ("bias_index", "biases"):
                getattr(device, name)[:num_biases].copy_(getattr(host, name)[:num_biases], non_blocking=True)
        self._draw(rows, num_biases)

    def find_late(self, drawing: Sequence[Run], spare_s: float, *, alone: bool) -> set[ActiveRequest]:
        """Return whose masks are late; see ``MaskLanes.find_late``. Tokens of the step before must have been read."""
        asked: dict[ActiveRequest, AskedMasks] = {}
        for run in drawing:
            limited = self._limited(run.sequence)
            if limited is not None and limited.text is not None:
                asked.setdefault(run.sequence, AskedMasks(run.sequence, limited.text)).drafts.append(run.drafted)
            else:
                alone = alone and run.sequence.status is RequestStatus.ENDED
        return self._lanes.find_late(asked.values(), spare_s, alone=alone) if asked else set()

    def warm_up(self) -> None:
        """Compile what drawing needs."""
        self._on_device.is_limited.zero_()
        self._on_device.floats.zero_()
        self._on_device.ints.copy_(self._on_host.ints.fill_(-1))
        self._draw(slice(0, 1), 0)

    def _draw(self, rows: slice, num_biases: int) -> None:
        device, scores = self._on_device, self._logits.logprobs[rows]
        scores.copy_(self._logits.logits[rows])
        if num_biases:
            flat = self._logits.logprobs.view(-1)
            flat.index_add_(0, device.bias_index[:num_biases], device.biases[:num_biases])
        forbid(scores, device.bits[rows])
        drawn, ids = device.drawn[rows], self._ids[rows]
        sample(scores, SamplingRows(device.floats[rows], device.ints[rows], self._history), drawn)
        torch.where(device.is_limited[rows], drawn, ids, out=ids)

    def _limited(self, sequence: ActiveRequest) -> LimitedSequence | None:
        """Return what a sequence may draw; None where nothing limits it, or it has ended."""
        limits = sequence.request.limits
        if limits is None or sequence.status is RequestStatus.ENDED:
            return None
        if sequence not in self._known:
            self._known[sequence] = LimitedSequence(sequence, limits, self._logits.logits.shape[1])
        return self._known[sequence]

    def _write(
        self,
        drawing: Sequence[Run],
        late: Collection[ActiveRequest],
        history_row: Callable[[Run], int],
    ) -> int:
        """Write the rows of all tables, and return how many biases there are."""
        host, vocab_size = self._on_host, self._logits.logits.shape[1]
        bits, num_biases = host.bits.numpy(), 0
        is_limited, floats, ints = [False] * len(drawing), [_GREEDY.floats] * len(drawing), [_NEVER] * len(drawing)
        for row, run in enumerate(drawing):
            sequence = run.sequence
            limits, sampling, limited = sequence.request.limits, sequence.request.sampling, self._limited(sequence)
            if limits is None or limited is None or sequence in late:
                bits[row] = -1
                continue
            try:
                limited.write(sequence.tokens, bits[row], run.drafted)
            except GrammarError as error:  # what is drawn then is not said
                sequence.failure, bits[row] = str(error), -1
            is_limited[row], floats[row] = True, sampling.floats
            ints[row] = sampling.ints(run.end, history_row(run))
            end = num_biases + len(limits.biases)
            for index, (token, bias) in enumerate(limits.biases, num_biases):
                host.bias_index[index], host.biases[index] = row * vocab_size + token, bias
            num_biases = end
        rows = slice(0, len(drawing))
        host.is_limited.numpy()[rows], host.floats.numpy()[rows], host.ints.numpy()[rows] = is_limited, floats, ints
        return num_biases
