"""Log-probabilities: of drawn tokens, and of the tokens of prompts, a few rows at a time.

Owns which rows of a step are scored, and what was found out. Logits of a prompt are never all there: as many rows as
draw in a step are projected and scored at a time, in the buffer that drawing uses afterwards.

Shapes: T tokens of a step, B sequences, V vocabulary, L most probable tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from yafsdp_like.inference.engine.batch_inputs import host_like
from yafsdp_like.inference.engine.request import Token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from yafsdp_like.inference.engine.batch import ActiveRequest, Run
    from yafsdp_like.inference.plan.buffers import Logits, StepBuffers


def compute_logprobs(to: Logits, ids: Tensor) -> None:
    """Compute log-probabilities of tokens ``ids`` (rows,), and of the most probable, from the first rows of logits.

    They are logits less the log of the sum of all exponentials, which is taken relative to the highest logit.
    """
    rows = slice(0, len(ids))
    scores, sums, drawn, top = to.logprobs[rows], to.log_sums[rows], to.drawn_logprobs[rows], to.top_logits[rows]
    scores.copy_(to.logits[rows])
    torch.topk(scores, top.shape[1], dim=1, out=(top, to.top_ids[rows]))
    torch.gather(scores, 1, ids[:, None], out=drawn[:, None])
    torch.sum(scores.sub_(top[:, :1]).exp_(), 1, out=sums)
    sums.log_().add_(top[:, 0])
    drawn.sub_(sums)
    top.sub_(sums[:, None])


@dataclass(frozen=True)
class PromptResults:
    """What rows of a step say of the tokens that follow theirs, on the host."""

    targets: Tensor  # (T,) int64: those tokens
    logprobs: Tensor  # (T,) float32
    top_logprobs: Tensor  # (T, L) float32, in falling order
    top_ids: Tensor  # (T, L) int64


@dataclass(frozen=True)
class ScoredRun:
    """Rows of one prompt, from ``row`` on, that say how probable the tokens behind position ``first`` are."""

    sequence: ActiveRequest
    first: int
    row: int
    num_rows: int


@dataclass(frozen=True)
class ScoredStep:
    """Rows of one step that are scored, and where results are put."""

    runs: tuple[ScoredRun, ...]
    results: PromptResults

    def store(self) -> None:
        """Give sequences that have not ended what was found out, once the step is done."""
        for run in self.runs:
            scores, request, to = run.sequence.prompt_scores, run.sequence.request, self.results
            if scores is None:
                continue
            rows = slice(run.row, run.row + run.num_rows)
            count = request.num_prompt_logprobs or 0
            found = zip(
                to.targets[rows].tolist(),
                to.logprobs[rows].tolist(),
                to.top_ids[rows, :count].tolist(),
                to.top_logprobs[rows, :count].tolist(),
                strict=True,
            )
            for position, (token, logprob, ids, logprobs) in enumerate(found, run.first + 1):
                scores[position] = Token(token, logprob, tuple(zip(ids, logprobs, strict=True)))


class PromptScorer:
    """Scores rows of prompts where requests ask for it."""

    def __init__(self, buffers: StepBuffers, pinned: bool) -> None:
        self._to, self._targets = buffers.logits, buffers.tables.targets

        def results() -> PromptResults:
            count, top = len(self._targets), self._to.top_ids
            of_tops = [tensor.new_empty((count, top.shape[1]), device="meta") for tensor in (self._to.top_logits, top)]
            logprobs = self._to.drawn_logprobs.new_empty(count, device="meta")
            return PromptResults(*(host_like(each, pinned) for each in (self._targets, logprobs, *of_tops)))

        self._sides = [results() for _ in range(2)]  # see batch_inputs.py, [Note: two sides]

    def find(self, runs: Sequence[Run]) -> ScoredStep | None:
        """Return which rows of a step with these runs are to be scored, if any are."""
        if all(run.sequence.prompt_scores is None for run in runs):
            return None
        found, row = [], 0
        for run in runs:
            num_rows = min(run.end, len(run.sequence.request.prompt) - 1) - run.start
            if run.sequence.prompt_scores is not None and num_rows > 0:
                found.append(ScoredRun(run.sequence, run.start, row, num_rows))
            row += run.num_tokens
        self._sides.reverse()
        return ScoredStep(tuple(found), self._sides[0]) if found else None

    def stage(self, step: ScoredStep) -> None:
        """Upload the tokens that follow those of the rows."""
        for run in step.runs:
            rows = slice(run.row, run.row + run.num_rows)
            following = run.sequence.request.prompt[run.first + 1 : run.first + 1 + run.num_rows]
            step.results.targets.numpy()[rows] = np.asarray(following)
            self._targets[rows].copy_(step.results.targets[rows], non_blocking=True)

    def pieces(self, step: ScoredStep) -> Iterator[slice]:
        """Yield rows, as many at a time as logits have room for; each is scored when the next is asked for."""
        most, to, results = len(self._to.logits), self._to, step.results
        for run in step.runs:
            for start in range(run.row, run.row + run.num_rows, most):
                rows = slice(start, min(start + most, run.row + run.num_rows))
                yield rows
                compute_logprobs(to, self._targets[rows])
                part = slice(0, rows.stop - rows.start)
                results.logprobs[rows].copy_(to.drawn_logprobs[part], non_blocking=True)
                results.top_logprobs[rows].copy_(to.top_logits[part], non_blocking=True)
                results.top_ids[rows].copy_(to.top_ids[part], non_blocking=True)
