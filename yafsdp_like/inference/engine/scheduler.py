"""Who runs next, and how many tokens of whom: continuous batching in integers.

A step takes one token of every sequence that draws, and chunks of prompts while its budget of tokens lasts. What is
missing in pages is taken from whoever comes last in the order of priority, then arrival. No tensor is touched here;
pages are those of ``KVCache``, and copies of pages are handed on in the order in which it hands them out.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from yafsdp_like.inference.engine.adapters import Adapters
from yafsdp_like.inference.engine.batch import (
    ActiveRequest,
    Batch,
    Counts,
    NextStep,
    RequestStatus,
    Run,
    in_rows,
    nums_left_of,
)
from yafsdp_like.inference.engine.deadlines import Deadlines
from yafsdp_like.inference.engine.order import insert_in_order, remove_in_order
from yafsdp_like.inference.engine.places import nobody_else
from yafsdp_like.inference.engine.request import FinishReason, QueueFullError
from yafsdp_like.inference.engine.step_budget import step_budget
from yafsdp_like.inference.kv.kv_cache import KVCache, Shortage, Tier
from yafsdp_like.inference.kv.kv_sequence import NO_PAGE, KVSequenceState
from yafsdp_like.inference.plan.step_sizes import StepBuckets

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Sequence

    from yafsdp_like.inference.engine.request import Request
    from yafsdp_like.inference.engine.speculator import Speculator
    from yafsdp_like.inference.engine.step_times import StepTimes
    from yafsdp_like.inference.kv.kv_cache import Copy
    from yafsdp_like.inference.kv.kv_sequence import KVSequence
    from yafsdp_like.inference.options import EngineOptions


class _UnreadError(Exception):
    """A sequence that must make room has pending tokens, which must be known if it is to be computed again."""


class Scheduler:
    """The sequences of one engine. Work of a step is O(sequences running + pages touched)."""

    def __init__(
        self,
        cache: KVCache,
        options: EngineOptions,
        times: StepTimes | None = None,
        make_room: Callable[[bool], bool] = nobody_else,
        adapters: Adapters | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """``times`` are needed where the options have a ``tpot_ms``; ``make_room`` see ``EnginePlaces``."""
        assert (times is None) == (options.tpot_ms is None)
        self._make_room = make_room
        self._adapters, self._speculator = adapters or Adapters(), speculator
        self.cache = cache
        self.options = options
        self._times = times
        self._buckets = StepBuckets(options.max_batch_size, options.max_batch_tokens)
        self.counts = Counts()
        self.running: list[ActiveRequest] = []  # in order, as the next
        self.waiting: list[ActiveRequest] = []
        self._copies: list[Copy] = []  # of the next step
        self._rows: list[ActiveRequest] = []  # who had runs of one token in the last step, in order
        self.deadlines = Deadlines()
        self._num_added = 0
        self._known_to_wait: tuple[ActiveRequest, list[int]] | None = None  # and how many pages of each group it needs

    # --- who is there ---

    def add(self, request: Request, salt: Hashable) -> ActiveRequest:
        """Add a sequence, which waits. Raises QueueFullError."""
        if len(self.waiting) >= self.options.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests wait, of {self.options.max_waiting} that may; try again later"
            )
        sequence = ActiveRequest(request, self._num_added, salt, list(request.prompt))
        self._num_added += 1
        if request.adapter is not None:
            sequence.adapter = self._adapters.find(request.adapter)
            sequence.adapter.num_requests += 1
        insert_in_order(self.waiting, sequence)
        self.deadlines.add(sequence, num_open=len(self.running) + len(self.waiting))
        return sequence

    def end(self, sequence: ActiveRequest) -> None:
        """End a sequence; its full pages stay cached."""
        if sequence.adapter is not None:
            self._leave_slot(sequence)
            sequence.adapter.num_requests -= 1
        remove_in_order(self.running if sequence.status is RequestStatus.RUNNING else self.waiting, sequence)
        if sequence.kv is not None:
            self.cache.close(sequence.kv)
        sequence.kv, sequence.status = None, RequestStatus.ENDED

    @property
    def only_decodes(self) -> bool:
        """Whether the next step has no part of a prompt, unless somebody must make room."""
        may_admit = self.waiting and len(self.running) < self.options.max_batch_size
        return not may_admit and all(num_left == 1 for num_left in nums_left_of(self.running))

    @property
    def has_room(self) -> bool:
        """Whether one more request may wait, and the next step has a row and a token for it, as far as is known."""
        num_waiting, options = len(self.waiting), self.options
        if num_waiting >= options.max_waiting or len(self.running) + num_waiting >= options.max_batch_size:
            return False
        nums_left = nums_left_of(self.running)
        budget = step_budget(nums_left, self.waiting, options, self._buckets, self._times)
        return sum(nums_left) + sum(nums_left_of(self.waiting)) < budget

    # --- a step ---

    def schedule(self) -> Batch | None:
        """Return the next step; None where pending tokens must be read first.

        The caller launches it and then calls ``launched``.
        """
        nums_left = nums_left_of(self.running)
        step = NextStep(step_budget(nums_left, self.waiting, self.options, self._buckets, self._times))
        try:
            self._go_on(step, nums_left)
            self._admit(step)
        except _UnreadError:
            return None
        runs = self._runs(step)
        singles, chunks = ([run for run in runs if (run.num_tokens > 1) == is_chunk] for is_chunk in (False, True))
        singles = in_rows(singles, self._rows)
        self._rows = [run.sequence for run in singles]
        drafted = self._drafted_runs(() if chunks else singles, step.num_tokens_left)
        return Batch((*singles, *drafted, *chunks), self.take_copies())

    def take_copies(self) -> tuple[Copy, ...]:
        """Return the copies that were handed out since the last call, to be issued now."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def suspend(self, slabs: Collection[int] | None = None) -> None:
        """Preempt all running sequences, or those with pages in ``slabs``; their tokens must have been read."""
        for sequence in self.running[::-1]:
            if slabs is None or self._has_pages_in(sequence, slabs):
                self._preempt(sequence, NextStep(0))

    def _has_pages_in(self, sequence: ActiveRequest, slabs: Collection[int]) -> bool:
        grid = self.cache.pools[Tier.DEVICE].grid
        return any(
            page != NO_PAGE and grid.slab_of(page, group.shape) in slabs
            for group, table in zip(self.cache.groups, sequence.tables, strict=True)
            for page in table
        )

    def launched(self, batch: Batch) -> None:
        """Commit the tokens of a step that was issued, so that pages they leave behind may be given away."""
        # Of a run that is pending all that is known was committed before.
        self._commit(dict.fromkeys([run.sequence for run in batch.runs if not run.is_pending]))

    def accept(self, run: Run) -> bool:
        """Return whether what a run verifies was drawn, as its own token is then to be read."""
        is_accepted = run.is_accepted
        self.counts.num_tokens_accepted += is_accepted
        run.sequence.num_scheduled += is_accepted
        run.sequence.num_pending += is_accepted
        return is_accepted

    def put_off(self, late: Collection[ActiveRequest]) -> None:
        """Have sequences compute their last token once more, since nothing was drawn behind it in this step."""
        self.counts.num_draws_late += len(late)
        for sequence in late:
            sequence.num_scheduled -= 1
            sequence.num_pending -= 1

    def read(self, runs: Sequence[Run], tokens: Sequence[int]) -> list[FinishReason | None]:
        """Append the tokens that runs of different sequences drew.

        Returns why each sequence has ended, or None where it goes on.
        """
        for run, token in zip(runs, tokens, strict=True):
            run.sequence.num_pending -= 1
            run.sequence.tokens.append(token)
        self.counts.num_tokens_drawn += len(runs)
        self._commit([run.sequence for run in runs])
        finishes = list[FinishReason | None]()
        for run, token in zip(runs, tokens, strict=True):
            sequence, request, finish = run.sequence, run.sequence.request, None
            if sequence.failure is not None:
                finish = FinishReason.GRAMMAR
            elif token in request.stop_tokens:
                finish = FinishReason.STOP
            elif len(sequence.tokens) - len(request.prompt) == request.max_tokens:
                finish = FinishReason.LENGTH
            if finish is not None:
                self.end(sequence)
            finishes.append(finish)
        return finishes

    def _go_on(self, step: NextStep, nums_left: Sequence[int]) -> None:
        """Give tokens to running sequences in order, and at least one to each that draws."""
        num_drawing = nums_left.count(1)
        for sequence, num_left in zip(list(self.running), nums_left, strict=True):
            num_drawing -= num_left == 1
            if (kv := sequence.kv) is None or sequence.status is not RequestStatus.RUNNING:  # it had to make room
                continue
            num_tokens = min(num_left, step.num_tokens_left - num_drawing)
            has_places = sequence.num_scheduled + num_tokens - kv.num_tokens <= kv.num_reserved  # as for most tokens
            if num_tokens > 0 and (has_places or self._secure(sequence, num_tokens, step)):
                step.num_tokens[sequence] = num_tokens
                step.num_tokens_left -= num_tokens

    def _admit(self, step: NextStep) -> None:
        """Give tokens to waiting sequences in order, while there is room."""
        while self.waiting and step.num_tokens_left > 0:
            sequence = self._next_to_admit()
            if sequence is None:
                return
            if len(self.running) == self.options.max_batch_size or not self._make_resident(sequence):
                if not self._goes_before_last(sequence):
                    return
                self._preempt(self.running[-1], step)
                continue
            num_tokens = min(sequence.num_left, step.num_tokens_left)
            if not self._secure(sequence, num_tokens, step):
                return
            step.num_tokens[sequence] = num_tokens
            step.num_tokens_left -= num_tokens

    def _next_to_admit(self) -> ActiveRequest | None:
        """Return who waits and comes first; where running ones use all slots of adapters, of those without adapters."""
        first = self.waiting[0]
        if first.adapter is None or self._adapters.may_run(first.adapter):
            return first
        return next((sequence for sequence in self.waiting if sequence.adapter is None), None)

    def _runs(self, step: NextStep) -> list[Run]:
        """Schedule the tokens of a step, which count as computed from here on."""
        runs = []
        for sequence, num_tokens in step.num_tokens.items():
            start, num_known = sequence.num_scheduled, len(sequence.tokens)
            end = sequence.num_scheduled = start + num_tokens
            draws = end == num_known + sequence.num_pending
            runs.append(Run(sequence, start, num_tokens, draws, end > num_known))
            sequence.num_pending += draws
            self.counts.num_chunks += not draws
        self.counts.num_tokens_computed += sum(step.num_tokens.values())
        return runs

    def _drafted_runs(self, runs: Sequence[Run], most: int) -> list[Run]:
        """Return ``most`` rows at most that verify drafts in a step that only decodes, as far as pages go."""
        found, drafts = list[Run](), {} if self._speculator is None else self._speculator.take()
        for run in runs if drafts else ():
            drafted, kv = drafts.get(run.sequence, ())[: most - len(found)], run.sequence.kv
            if drafted and kv is not None and self.cache.reserve(kv, run.end + len(drafted) - kv.num_tokens) is None:
                found += run.verifying(drafted)
        self.counts.num_tokens_computed += len(found)
        self.counts.num_tokens_drafted += len(found)
        return found

    # --- pages ---

    def _commit(self, sequences: Iterable[ActiveRequest]) -> None:
        """Commit to the cache the tokens that are both known and scheduled, and will not be computed once more."""
        written = []
        for sequence in sequences:
            kv, tokens = sequence.kv, sequence.tokens
            assert kv is not None
            settled = sequence.num_scheduled - (sequence.has_grammar and sequence.num_pending > 0)
            known = min(settled, len(tokens))
            if known > kv.num_tokens:
                written.append((kv, tokens[kv.num_tokens : known]))
        self.cache.commit_all(written)

    def _make_resident(self, sequence: ActiveRequest) -> bool:
        """Let a waiting sequence run, with its pages from the host or the prefix cache.

        Returns False if the rest of its pages would find no room.
        """
        if self._is_known_to_wait(sequence):
            return False
        if sequence.kv is None:
            sequence.kv, copies = self.cache.open(sequence.tokens, sequence.request.tenant, sequence.salt)
            self._copies += copies
        missing = self._missing_beside_others(sequence, sequence.kv)
        if missing is not None:
            if not sequence.is_swapped:
                self._close(sequence)
            wanted = [n + count for n, count in zip(self._num_available(), missing, strict=True)]
            self._known_to_wait = sequence, wanted
            return False
        if sequence.is_swapped:
            swapped_in = self._swap_in(sequence.kv)
            if isinstance(swapped_in, Shortage):
                return False
            self._copies += swapped_in
        self._start(sequence, sequence.kv)
        return True

    def _missing_beside_others(self, sequence: ActiveRequest, kv: KVSequence) -> list[int] | None:
        """Return how many pages of each group are missing beside sequences that run, once idle models have made room.

        Each running one may take a page more. None: enough are there.
        """
        while True:
            missing = self._num_missing(sequence, kv)
            if not self.running or all(count + len(self.running) <= 0 for count in missing):
                return None
            if not self._make_room(False):
                return missing

    def _is_known_to_wait(self, sequence: ActiveRequest) -> bool:
        """Whether there was no room for the sequence, and there is not more since.

        Opening its pages again would only take time. Alone a sequence always fits.
        """
        if not self.running or self._known_to_wait is None or self._known_to_wait[0] is not sequence:
            return False
        wanted = self._known_to_wait[1]
        return any(n < count + len(self.running) for n, count in zip(self._num_available(), wanted, strict=True))

    def _num_available(self) -> list[int]:
        """Return the pages of each group that are free or can be evicted."""
        pool = self.cache.pools[Tier.DEVICE]
        return [pool.num_available(group.shape) for group in self.cache.groups]

    def _num_missing(self, sequence: ActiveRequest, kv: KVSequence) -> list[int]:
        """Return, for each group, how many pages more than are available the sequence's tokens need.

        The next token is counted. Running sequences may each take one page more, which callers add.
        """
        return [
            group.max_live_pages(sequence.length + 1, self.options.max_batch_tokens) - held - available
            for group, held, available in zip(
                self.cache.groups, self._num_held(sequence, kv), self._num_available(), strict=True
            )
        ]

    def _num_held(self, sequence: ActiveRequest, kv: KVSequence) -> list[int]:
        if sequence.is_swapped:
            return [0] * len(kv.tables)
        return [len(table) - first for table, first in zip(kv.tables, kv.firsts, strict=True)]

    def _swap_in(self, kv: KVSequence) -> tuple[Copy, ...] | Shortage:
        copies = self.cache.swap_in(kv)
        while isinstance(copies, Shortage) and not self.running and self._make_more_room():
            copies = self.cache.swap_in(kv)
        return copies

    def _start(self, sequence: ActiveRequest, kv: KVSequence) -> None:
        self.waiting.remove(sequence)
        insert_in_order(self.running, sequence)
        sequence.status = RequestStatus.RUNNING
        sequence.num_scheduled = kv.num_tokens
        sequence.num_admitted += 1
        if sequence.adapter is not None:
            sequence.adapter_slot = self._adapters.pin(sequence.adapter)
        if sequence.num_cached is None:
            sequence.num_cached = kv.num_tokens
            self.counts.num_tokens_cached += kv.num_tokens

    def _secure(self, sequence: ActiveRequest, num_tokens: int, step: NextStep) -> bool:
        """Reserve pages for the next tokens of a running sequence, preempting those that come last.

        Returns False if it was preempted itself.
        """
        assert sequence.kv is not None
        wanted = sequence.num_scheduled + num_tokens - sequence.kv.num_tokens
        while self.cache.reserve(sequence.kv, wanted) is not None:
            if len(self.running) == 1:
                self._reserve_alone(sequence.kv, wanted)
                return True
            if self._make_room(False):
                continue
            last = self.running[-1]
            self._preempt(last, step)
            if last is sequence:
                return False
        return True

    def _reserve_alone(self, kv: KVSequence, num_tokens: int) -> None:
        shortage = self.cache.reserve(kv, num_tokens)
        while shortage is not None and self._make_more_room():
            shortage = self.cache.reserve(kv, num_tokens)
        if shortage is not None:
            raise RuntimeError(
                f"expected pages for {num_tokens} tokens of the only sequence that runs, as planned; found {shortage}"
            )

    def _make_more_room(self) -> bool:
        """Evict all that nobody refers to, and then have other engines lose pages; for when only one sequence runs.

        Of this engine only floors of other tenants can keep pages back then, which hold while there is room. Returns
        False if nothing was done.
        """
        pool = self.cache.pools[Tier.DEVICE]
        num_evicted = pool.num_evicted
        pool.clear()
        return pool.num_evicted > num_evicted or self._make_room(True)

    def _goes_before_last(self, sequence: ActiveRequest) -> bool:
        """Whether its priority is higher; an earlier arrival alone preempts nobody."""
        return bool(self.running) and self.running[-1].request.priority < sequence.request.priority

    def _preempt(self, sequence: ActiveRequest, step: NextStep) -> None:
        """Take a sequence's pages, by swapping or by dropping them, whichever is cheaper to undo."""
        if sequence.num_pending:
            raise _UnreadError
        assert sequence.kv is not None
        step.drop(sequence)
        self._leave_slot(sequence)
        copies = self.cache.swap_out(sequence.kv) if self.cache.prefers_swap(sequence.kv) else None
        if copies is None or isinstance(copies, Shortage):
            self._close(sequence)
            self.counts.num_recomputed += 1
        else:
            self._copies += copies
            self.counts.num_swapped_out += 1
        remove_in_order(self.running, sequence)
        sequence.status = RequestStatus.WAITING
        insert_in_order(self.waiting, sequence)

    def _close(self, sequence: ActiveRequest) -> None:
        assert sequence.kv is not None
        self.cache.close(sequence.kv)
        sequence.kv, sequence.num_scheduled = None, 0

    def _leave_slot(self, sequence: ActiveRequest) -> None:
        """Let a sequence that runs, if it does, no longer keep its adapter in a slot."""
        if sequence.adapter is not None and sequence.adapter_slot:
            self._adapters.unpin(sequence.adapter)
            sequence.adapter_slot = 0

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the cache's sequences are just those of the requests. O(everything)."""
        sequences = self.running + self.waiting
        kv_sequences = {sequence.kv for sequence in sequences if sequence.kv is not None}
        if kv_sequences != self.cache.sequences:
            raise RuntimeError(f"{len(self.cache.sequences)} kv_sequences are open, sequences have {len(kv_sequences)}")
        for sequence in self.running:
            if sequence.kv is None or sequence.kv.state is not KVSequenceState.RESIDENT:
                raise RuntimeError(f"request {sequence.request.id!r} runs without pages on the device")
        self._adapters.check_integrity(Counter(run.adapter for run in self.running if run.adapter is not None))
