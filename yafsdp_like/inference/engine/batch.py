"""What a step does and for whom: the scheduler's answer, as tables are written from it and steps are run by it.

Plain values; ``scheduler.py`` alone changes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from yafsdp_like.inference.engine.request import Token
from yafsdp_like.inference.kv.kv_sequence import KVSequenceState

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

    from yafsdp_like.inference.engine.adapters import LoadedAdapter
    from yafsdp_like.inference.engine.request import Request
    from yafsdp_like.inference.kv.kv_cache import Copy
    from yafsdp_like.inference.kv.kv_sequence import KVSequence


class RequestStatus(Enum):
    """Where a request is in its life."""

    WAITING = auto()  # for its first turn, or after a preemption
    RUNNING = auto()  # in the batch, with pages on the device
    ENDED = auto()


@dataclass(eq=False)
class ActiveRequest:
    """A request's tokens and how far they are. Changed by ``Scheduler`` only."""

    request: Request
    number: int  # in order of arrival
    salt: Hashable
    tokens: list[int]  # the prompt, and what was drawn and read
    status: RequestStatus = RequestStatus.WAITING
    kv: KVSequence | None = None
    num_scheduled: int = 0  # tokens whose keys and values the steps so far write
    num_pending: int = 0  # tokens that steps so far draw, not read yet
    num_cached: int | None = None  # of the prompt, when it was first admitted
    num_admitted: int = 0  # how often it was given pages anew, other ones perhaps
    adapter: LoadedAdapter | None = None
    adapter_slot: int = 0  # while it runs, the number of its adapter's slot; 0: it has none
    failure: str | None = None  # why its last token means nothing, and is its end: by who draws
    prompt_scores: dict[int, Token] | None = None  # by position, of a prompt that is scored, until they are told
    is_plain: bool = field(init=False)  # whether its steps give nothing but tokens, any of which may be drawn
    needs_history: bool = field(init=False)  # whether what it draws depends on how often it has drawn it
    has_grammar: bool = field(init=False)  # as its request has

    def __post_init__(self) -> None:
        request = self.request
        has_logprobs = request.num_logprobs is not None or request.num_prompt_logprobs is not None
        self.is_plain = not (request.limits or has_logprobs or request.wants_hidden or request.images)
        self.needs_history = request.sampling.needs_history
        self.has_grammar = request.has_grammar
        if self.request.num_prompt_logprobs is not None:
            self.prompt_scores = {0: Token(self.request.prompt[0])}

    def take_prompt(self) -> tuple[Token, ...]:
        """Return the tokens of a prompt that was scored, once; () for any other."""
        scores, self.prompt_scores = self.prompt_scores, None
        return () if scores is None else tuple(scores[position] for position in range(len(self.request.prompt)))

    @property
    def order(self) -> tuple[int, int]:
        """Lower goes first: by priority, then by arrival."""
        return -self.request.priority, self.number

    @property
    def length(self) -> int:
        """Tokens, pending ones included."""
        return len(self.tokens) + self.num_pending

    @property
    def num_left(self) -> int:
        """Tokens to compute until the next is drawn; 0 while the last one is pending."""
        (num_left,) = nums_left_of([self])
        return num_left

    @property
    def tables(self) -> tuple[list[int], ...]:
        """Per group of layers, the pages of a sequence that runs."""
        assert self.kv is not None
        return self.kv.tables

    @property
    def is_swapped(self) -> bool:
        """Whether its pages are on the host."""
        return self.kv is not None and self.kv.state is KVSequenceState.SWAPPED


def nums_left_of(sequences: Iterable[ActiveRequest]) -> list[int]:
    """Return each one's ``num_left``."""
    nums_left = []
    for sequence in sequences:
        length, request = len(sequence.tokens) + sequence.num_pending, sequence.request
        is_last = length - len(request.prompt) >= request.max_tokens
        nums_left.append(0 if is_last else length - sequence.num_scheduled)
    return nums_left


@dataclass
class Counts:
    """Of everything since the start."""

    num_swapped_out: int = 0
    num_recomputed: int = 0  # preempted, pages dropped
    num_tokens_computed: int = 0
    num_tokens_cached: int = 0
    num_tokens_drawn: int = 0
    num_tokens_dropped: int = 0  # drawn past an end
    num_tokens_drafted: int = 0  # and verified
    num_tokens_accepted: int = 0  # of those
    num_draws_late: int = 0  # put off by a step, since what a grammar allows was not known yet
    num_chunks: int = 0  # parts of prompts that did not end with a token drawn


@dataclass
class NextStep:
    """A step in the making: nothing is changed yet but reservations of pages."""

    num_tokens_left: int
    num_tokens: dict[ActiveRequest, int] = field(default_factory=dict)

    def drop(self, sequence: ActiveRequest) -> None:
        """Take back what a sequence was given, if it was."""
        self.num_tokens_left += self.num_tokens.pop(sequence, 0)


class Run(NamedTuple):
    """What a step does for one sequence: ``num_tokens`` tokens from position ``start`` on."""

    sequence: ActiveRequest
    start: int
    num_tokens: int
    draws: bool  # whether the next token is drawn after them
    is_pending: bool  # whether the last of them is pending, so that only the device knows it
    drafted: tuple[int, ...] = ()  # of a row that verifies: the tokens drafted up to its own, which is the last

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + self.num_tokens

    @property
    def token(self) -> int:
        """The token of a run of one, which is not pending."""
        return self.drafted[-1] if self.drafted else self.sequence.tokens[self.start]

    def verifying(self, drafted: tuple[int, ...]) -> Iterator[Run]:
        """Yield the rows that verify what was drafted behind this run, one token each."""
        for number in range(len(drafted)):
            yield Run(self.sequence, self.end + number, 1, draws=True, is_pending=False, drafted=drafted[: number + 1])

    @property
    def is_accepted(self) -> bool:
        """Whether the sequence has become what was drafted; to be asked when all rows before this one were read."""
        tokens = self.sequence.tokens
        return len(tokens) == self.end and tokens[-1] == self.drafted[-1]


def in_rows(runs: Sequence[Run], rows: Sequence[ActiveRequest]) -> list[Run]:
    """Order runs of one token so that sequences keep the rows that they had in the step before.

    What is staged of a row is still true then. Rows of sequences that are gone are given to new ones, then to those in
    the last rows.
    """
    new = {run.sequence: run for run in runs}
    kept = [new.pop(sequence, None) for sequence in rows]
    left = iter(new.values())
    found = [next(left, None) if run is None else run for run in kept] + list(left)
    while None in found:
        last = found.pop()
        if last is not None:
            found[found.index(None)] = last
    return [run for run in found if run is not None]


@dataclass(frozen=True)
class Batch:
    """What a step does; copies come before it."""

    runs: tuple[Run, ...]
    copies: tuple[Copy, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all runs."""
        return sum([run.num_tokens for run in self.runs])

    @property
    def has_drafts(self) -> bool:
        """Whether some rows verify what was drafted; they come last."""
        return bool(self.runs) and bool(self.runs[-1].drafted)

    @property
    def num_single(self) -> int:
        """Runs of one token."""
        return sum([run.num_tokens == 1 for run in self.runs])

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of runs of more than one, which come last: parts of prompts, and of what is computed again."""
        is_mixed = self.runs and self.runs[-1].num_tokens > 1
        return sum([run.num_tokens for run in self.runs if run.num_tokens > 1]) if is_mixed else 0

    @property
    def adapter_slots(self) -> set[int]:
        """Numbers of the slots of adapters that the step reads; without any it is the model's as it is."""
        return {run.sequence.adapter_slot for run in self.runs} - {0}
