"""Speculative decoding: tokens are drafted, and one step verifies several of a sequence. Owns whose, and how many.

[Note: rows of drafted tokens]
A drafted token is one more row of a step that only decodes: of the same sequence, a position further, with a length of
its own, so attention, recordings and drawing know nothing of it. Keys and values of all rows are written before any row
reads them. Each row draws what the target draws behind the tokens drafted so far, with the noise of its own position
(``kernels/sampling.py``), and what rows draw counts up to the first that differs from what was drafted there. So
requests get the tokens that they get without drafts, whatever is drafted and however they are drawn: a draft decides
only how many of them one step gives. (A GPU's products round otherwise for another number of rows, which may decide
between tokens whose scores are nearly equal.) Where a draft does not depend on that noise, this is rejection sampling:
token x is accepted with its probability p(x), and what replaces it has the distribution of p without x. Keys and values
of rejected tokens lie in places that are reserved, and are overwritten.

[Note: what pays]
Rows are added, the most promising first, as long as that raises the tokens a second that are expected. A draft counts
by the chance that it and those before it are accepted, learned from what became of the sequence's drafts; a step by the
seconds that steps of so many rows take, measured when the engine starts and corrected by real ones, and by what the
device waits before it: a draft needs the last token, so such a step is not launched ahead. Where nothing pays, steps
are. Tensor parallel ranks decide by the first one's table, uncorrected, so that all decide alike.

Steps with parts of prompts have no drafts: there a row costs as much as a prompt's. Requests that want hidden states
have none. Penalties of a row count what was drafted before it, too (``histories.py``, [Note: history of drafts]).
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from yafsdp_like.inference.engine.batch import ActiveRequest, Run
    from yafsdp_like.inference.engine.step_times import StepTimes
    from yafsdp_like.inference.options import EngineOptions

_WEIGHT = 0.1  # of the last token, or step, in what is learned
_FORGET = 0.01  # of what was learned, in a step that tries nothing
_LONGEST_WAIT = 4.0  # times the step, which one step may say of waits


@dataclass(frozen=True)
class Prospect:
    """Tokens that can be drafted for a sequence."""

    num_tokens: int
    kind: int  # how they are found; chances are learned for each kind
    prior: float  # the chance that the first one is accepted, before any was tried
    tokens: tuple[int, ...] = ()  # where they are known already


class Drafter(Protocol):
    """Where drafts come from."""

    def prospect_of(self, sequence: ActiveRequest, most: int) -> Prospect | None:
        """Return what can be drafted behind the known tokens of a sequence, at most so many; None: nothing."""

    def draft(self, wanted: Mapping[ActiveRequest, int]) -> dict[ActiveRequest, tuple[int, ...]]:
        """Return so many tokens for each sequence, none of which has a token under way, or fewer."""


@dataclass
class _Record:
    """What became of the drafts of one sequence, verified or not."""

    chances: dict[int, float] = field(default_factory=dict)  # by kind: that a token is accepted behind accepted ones
    kind: int = 0
    position: int = 0
    drafted: Sequence[int] = ()

    def learn(self, tokens: Sequence[int]) -> None:
        """Compare the last draft with what the sequence has become."""
        for drafted, token in zip(self.drafted, islice(tokens, self.position, None), strict=False):
            self.chances[self.kind] += _WEIGHT * ((drafted == token) - self.chances[self.kind])
            if drafted != token:
                break
        self.drafted = ()

    def chances_of(self, prospect: Prospect, position: int) -> Iterator[float]:
        """Note what can be drafted, and yield the chance of each token that it is accepted."""
        self.kind, self.position, self.drafted = prospect.kind, position, prospect.tokens
        chance = self.chances.setdefault(prospect.kind, prospect.prior)
        if not prospect.tokens:  # it can be tried only at its cost, so what is known of it grows old
            self.chances[prospect.kind] += _FORGET * (prospect.prior - chance)
        for number in range(1, prospect.num_tokens + 1):
            yield chance**number


class Speculator:
    """Drafts for the requests of one engine, where that pays; see [Note: what pays]."""

    def __init__(self, drafter: Drafter, options: EngineOptions, times: StepTimes, learns: bool = True) -> None:
        """``times`` are of steps that only decode; ``learns`` says whether real steps correct them."""
        assert options.speculation is not None
        self._drafter, self._times, self._learns = drafter, times, learns
        self._num_tokens, self._max_rows = options.speculation.num_tokens, options.max_decode_rows
        self._waits = {False: 0.0, True: 0.0}  # seconds of the device before steps, without drafts and with
        self._records: weakref.WeakKeyDictionary[ActiveRequest, _Record] = weakref.WeakKeyDictionary()
        self._drafts: dict[ActiveRequest, tuple[int, ...]] = {}

    def is_promising(self, sequences: Sequence[ActiveRequest]) -> bool:
        """Whether drafts for these sequences, which all decode, are worth waiting for their last tokens."""
        return bool(self._choose(sequences))

    def draft(self, sequences: Sequence[ActiveRequest]) -> None:
        """Draft tokens for the next step, in which these sequences decode; their last tokens have been read."""
        wanted = self._choose(sequences)
        self._drafts = self._drafter.draft(wanted) if wanted else {}
        for sequence, tokens in self._drafts.items():
            self._records[sequence].drafted = tokens

    def take(self) -> dict[ActiveRequest, tuple[int, ...]]:
        """Return what was drafted for this step, once."""
        drafts, self._drafts = self._drafts, {}
        return drafts

    def learn(self, runs: Sequence[Run], busy_s: float, waited_s: float) -> None:
        """Learn from a step that is done: the device's seconds of it, and those before it without work."""
        if not self._learns or not runs or runs[-1].num_tokens > 1:
            return
        is_drafted = bool(runs[-1].drafted)
        self._times.learn(len(runs), len(runs), busy_s)
        self._waits[is_drafted] += _WEIGHT * (min(waited_s, _LONGEST_WAIT * busy_s) - self._waits[is_drafted])
        if not is_drafted:
            self._waits[True] += _FORGET * (self._waits[False] - self._waits[True])

    def _choose(self, sequences: Sequence[ActiveRequest]) -> dict[ActiveRequest, int]:
        """Return how many tokens to draft for whom."""
        num_rows, gained = len(sequences), 0.0
        if not 0 < num_rows < self._max_rows or not self._may_pay(num_rows):
            return {}
        chances = [(-chance, index) for index, it in enumerate(sequences) for chance in self._chances(it)]
        chances.sort()
        best, count = num_rows / self._seconds(num_rows, False), 0
        for number, (chance, _) in enumerate(chances[: self._max_rows - num_rows], 1):
            gained -= chance
            rate = (num_rows + gained) / self._seconds(num_rows + number, True)
            if rate > best:
                best, count = rate, number
        return {sequences[index]: n for index, n in Counter(index for _, index in chances[:count]).items()}

    def _may_pay(self, num_rows: int) -> bool:
        """Whether drafts would pay if all were accepted; where not, no text needs to be looked through."""
        most = min(self._max_rows, num_rows * (1 + self._num_tokens))
        undrafted = num_rows / self._seconds(num_rows, False)
        return any(rows / self._seconds(rows, True) > undrafted for rows in self._times.ends(num_rows, most))

    def _seconds(self, num_rows: int, is_drafted: bool) -> float:
        return self._times.seconds(num_rows, num_rows) + self._waits[is_drafted]

    def _chances(self, sequence: ActiveRequest) -> Iterator[float]:
        request, record = sequence.request, self._records.get(sequence)
        if record is None:
            record = self._records[sequence] = _Record()
        record.learn(sequence.tokens)
        num_left = len(request.prompt) + request.max_tokens - sequence.length  # of which the step draws one itself
        most = min(self._num_tokens, num_left - 1)
        if most < 1 or request.wants_hidden:
            return iter(())
        prospect = self._drafter.prospect_of(sequence, most)
        return iter(()) if prospect is None else record.chances_of(prospect, len(sequence.tokens))
