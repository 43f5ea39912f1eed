"""Serves one model on one device: requests come in, outputs come out, a step at a time.

Owns what a step is made of and in which order its parts happen; integers are the scheduler's, tensors the runner's.

    engine = Engine.load(model, options)
    engine.add(Request("a", prompt=(1, 2, 3)))
    while engine.has_work:
        for output in engine.step():
            ...

[Note: one step ahead]
With ``lookahead`` a step is launched before the tokens of the step before it are read, so the device does not wait for
the CPU. ``step`` then returns what the step before drew. A sequence that ended with it has been computed once too
often; that token is dropped. Before it calls ``step``, the caller may wait ``rest_s`` seconds for requests.

Tensor parallel ranks (``store.py``, [Note: tensor parallel]) have an engine each, with the same options, and make the
same calls in the same order. The first rank's clock holds for all: its costs, its deadlines, and its time.

Not safe for threads: one thread calls everything.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from yafsdp_like.inference.engine.adapters import Adapters, with_adapters
from yafsdp_like.inference.engine.batch import ActiveRequest, Batch, RequestStatus
from yafsdp_like.inference.engine.collector import collector_paused
from yafsdp_like.inference.engine.debug import StepDebugger
from yafsdp_like.inference.engine.draft_model import DraftModel
from yafsdp_like.inference.engine.launch_clock import LaunchClock
from yafsdp_like.inference.engine.limits import check_length, check_limits
from yafsdp_like.inference.engine.metrics import Metrics, metrics_of
from yafsdp_like.inference.engine.places import EnginePlaces, nobody_else
from yafsdp_like.inference.engine.prompt_lookup import PromptLookup
from yafsdp_like.inference.engine.request import Completion, FinishReason, Request, RequestOutput, joined
from yafsdp_like.inference.engine.runner import Launched, Runner, Undrawn
from yafsdp_like.inference.engine.scheduler import Scheduler
from yafsdp_like.inference.engine.speculator import Drafter, Speculator
from yafsdp_like.inference.engine.step_log import StepLog
from yafsdp_like.inference.engine.step_times import StepTimes
from yafsdp_like.inference.kv.eviction import Costs
from yafsdp_like.inference.kv.kv_cache import KVCache, Tier, check_integrity
from yafsdp_like.inference.kv.occupancy import Stretch, occupancy
from yafsdp_like.inference.kv.prefix import PrefixTree
from yafsdp_like.inference.plan.serving_plan import KV_SLABS
from yafsdp_like.inference.weights.adapter_files import open_adapter
from yafsdp_like.inference.weights.loading import draft_of, load, load_draft, open_model, with_memory_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    import torch

    from yafsdp_like.comm.transport import Transport
    from yafsdp_like.inference.engine.request import Token
    from yafsdp_like.inference.options import AnyMode, EngineOptions
    from yafsdp_like.inference.plan.serving_plan import ServingPlan
    from yafsdp_like.inference.weights.loading import Model
    from yafsdp_like.inference.weights.store import Weights
    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.models.decoder import DecoderConfig

_Measured = TypeVar("_Measured")
_LONGEST_REST_S = 5e-3  # for which the device may have nothing to do, where a step ends sooner than expected
_NO_LINK = Costs(link_nbytes_per_s=1.0, prefill_tokens_per_s=1e4)  # without a host tier nothing is weighed


class Engine:
    """One model, its pages, and the requests that it serves.

    All but what encodes an image is allocated when it is made, on the arenas of ``weights``, which were planned within
    its options, or on the ``places`` that it shares with others. As a context manager it is closed in the end, but not
    after an error that left other ranks in the middle of a step.
    """

    def __init__(self, weights: Weights, places: EnginePlaces | None = None, drafter: Drafter | None = None) -> None:
        self.config: DecoderConfig = weights.config
        self.plan: MemoryPlan = weights.plan.memory
        self.options = options = weights.plan.options
        self.device, self.max_seq_len = weights.device, weights.plan.max_seq_len
        self.lockstep, self.tp_group = weights.lockstep, weights.tp_group  # see `Weights`
        self._weights = weights
        if self.tp_group is not None:
            self.tp_group.check_same("the options of engines", options)
        self._places = places = places or EnginePlaces.of(weights)
        self.adapters = Adapters.of(weights, places.adapter_slots, places.adapter_images)
        self._runner = Runner(weights, places, self.adapters)
        self.cache = self._kv_cache()
        self._runner.warm_up(options.graphs)
        self._times = None if options.tpot_ms is None else StepTimes(self._of_first_rank(self._runner.measure_steps()))
        make_room = nobody_else if places.make_room is nobody_else else self._make_room
        self._speculator = None if options.speculation is None else self._make_speculator(drafter or PromptLookup())
        self._scheduler = Scheduler(self.cache, options, self._times, make_room, self.adapters, self._speculator)
        self._sequences: dict[str, ActiveRequest] = {}
        self._cancelled: list[ActiveRequest] = []
        self._unread: tuple[Batch, Launched] | None = None
        self._read_early: list[RequestOutput] = []  # while a step was launched
        self.step_log, self._launch_clock = StepLog(self._runner.timer), LaunchClock()
        self._num_steps, self._called_at, self._waited_s = 0, 0.0, 0.0  # the times are of the last `step`
        self._may_rest = options.lookahead and weights.plan.mode == "resident" and self._speculator is None
        check = self.check_integrity if make_room is nobody_else else self.check_sequences
        self._debug = StepDebugger(weights, places, self._sequences, check) if options.is_debugged else None

    @classmethod
    def load(
        cls,
        model: Model | str,
        options: EngineOptions,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        mode: AnyMode = "auto",
        transport: Transport | None = None,
        on_plan: Callable[[ServingPlan], object] | None = None,
        adapters: Mapping[str, Path | str] | None = None,
        draft: Model | None = None,
    ) -> Engine:
        """Plan memory for ``model`` within ``options``, load its weights, and make the engine that serves it.

        ``model`` is a directory, ``preset:NAME``, or what ``open_model`` returns; weights are bf16 on a GPU and float32
        on a CPU unless ``dtype`` is given. Where ``options`` have no memory limit it is a GPU's free memory less 1 GiB,
        and where they say nothing of memory a CPU has 1 GiB of KV cache. ``on_plan`` is called with the plan before
        anything is allocated. Ranks that share weights pass their ``transport`` and call this together. ``adapters``
        are directories of LoRA adapters by the names that requests call them; ``engine.adapters`` loads more.
        ``draft`` is the model that drafts tokens, where it is another than ``options.speculate`` names. Raises
        ValueError for a model or an adapter that is not found, cannot be served, or does not fit.
        """
        model = open_model(model) if isinstance(model, str) else model
        opened = {name: open_adapter(directory, model.config) for name, directory in (adapters or {}).items()}
        options = with_adapters(with_memory_limit(options, device, transport), opened)
        draft = draft_of(options, draft)
        weights = load(
            model, options, device=device, dtype=dtype, mode=mode, transport=transport, on_plan=on_plan, draft=draft
        )
        try:
            engine = cls(weights, drafter=None if draft is None else DraftModel(cls(load_draft(weights, draft))))
            for name, adapter in opened.items():
                engine.adapters.load(name, adapter)
            return engine
        except BaseException:
            if not weights.lockstep:
                weights.close()
            raise

    def close(self) -> None:
        """Close the engine: no step follows. Ranks that read each other's weights wait here for all of them."""
        self._runner.drop_recordings()
        self._weights.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._runner.drop_recordings()
        if kind is None or not self.lockstep:
            self.close()

    def _kv_cache(self) -> KVCache:
        costs, pools = self.options.costs, self._places.pools
        if costs is None:
            costs = self._of_first_rank(self._runner.measure()) if Tier.HOST in pools else _NO_LINK
        return KVCache(self._weights.plan.groups, costs, pools[Tier.DEVICE], pools.get(Tier.HOST))

    def _make_speculator(self, drafter: Drafter) -> Speculator:
        times = StepTimes(self._of_first_rank(self._runner.measure_decoding()))
        return Speculator(drafter, self.options, times, learns=self.tp_group is None)

    def _of_first_rank(self, measured: _Measured) -> _Measured:
        """Return what was measured; of tensor parallel ranks, which must all decide alike, what the first one has."""
        return measured if self.tp_group is None else self.tp_group.broadcast(measured)

    def set_budget(self, max_batch_tokens: int, tpot_ms: float | None = None) -> None:
        """Have steps from now on as many tokens as these options say; see ``EngineOptions``.

        Tensor parallel ranks must all be told before the same step. Raises ValueError for more tokens than the engine
        was made for, less than one for each sequence of a step, and for a target where it was made without one.
        """
        self._scheduler.options = self.options.with_budget(max_batch_tokens, tpot_ms)

    # --- requests ---

    def add(self, request: Request) -> None:
        """Take a request; its outputs come from ``step``.

        Raises ValueError for one that can never be served, or whose id is in use, and QueueFullError where too many
        wait. Tensor parallel ranks must all be given it before the same step.
        """
        self.check(request)
        self.take(request)

    def take(self, request: Request) -> None:
        """Take a request that ``check`` has let pass, of an id that none has begun to use since; else as ``add``."""
        if self.tp_group is not None and request.deadline is not None:
            request = replace(request, deadline=self.tp_group.broadcast(request.deadline))
        is_shared = self.options.prefix_cache and request.num_prompt_logprobs is None
        salt = self.adapters.salt_of(request.adapter, request.salt) if is_shared else object()
        self._sequences[request.id] = self._scheduler.add(request, salt)

    def cancel(self, request_id: str) -> None:
        """Cancel a request; the next ``step`` returns its last output. Does nothing if it has ended."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._cancelled.append(sequence)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that can never be served, or whose id is in use."""
        self.adapters.salt_of(request.adapter, None)
        if request.id in self._sequences:
            raise ValueError(f"request {request.id!r}: the id is in use")
        check_length(request, self._weights.plan)
        check_limits(request, self.config.vocab_size, may_follow=self.tp_group is None)
        self._runner.check_images(request)

    # --- steps ---

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._sequences)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do, or to return."""
        return bool(self._sequences) or self._unread is not None

    @property
    def rest_s(self) -> float:
        """Seconds for which the caller may wait for more requests, and then ask again; 0.0: call ``step`` now.

        That is so where the next step has no room, the device is idle, a launch brings weights, or tokens are drafted.
        """
        if not self._may_rest or self._unread is None or not self._scheduler.has_room:
            return 0.0
        if self._runner.timer.is_complete(self._unread[1].done):
            return 0.0
        rest_s = self._launch_clock.rest_s(time.perf_counter(), not self._scheduler.only_decodes)
        return min(rest_s, _LONGEST_REST_S)

    def step(self) -> list[RequestOutput]:
        """Launch one batch, and return what the one before (``lookahead=False``: this one) drew.

        The list may be empty while there is work. Where ranks step together (``Weights.lockstep``) each call makes
        exactly one forward, and all ranks must call it equally often, whether they have work or not.
        """
        self._called_at, self._waited_s = time.perf_counter(), 0.0
        outputs = self.end_requests()
        if self._speculator is not None:
            outputs += self._draft(self._speculator)
        batch = self._scheduler.schedule()
        if batch is None:
            outputs += self._read()
            batch = self._scheduler.schedule()
            assert batch is not None, "nothing is pending once it has been read"
        launched = self._issue(batch) if self._debug is None else self._debug.around(self._issue, batch)
        outputs += self._read_early or self._read()
        self._read_early = []
        self._unread = None if launched is None else (batch, launched)
        if not self.options.lookahead:
            outputs += self._read()
        if launched is not None:
            cpu_s = time.perf_counter() - self._called_at - self._waited_s
            self.step_log.add_cpu(cpu_s, mixed=batch.runs[-1].num_tokens > 1)
        if not self.has_work:
            self.step_log.pause()
        return outputs

    def _draft(self, speculator: Speculator) -> list[RequestOutput]:
        """Draft tokens for the next step where that pays, and return what had to be read for it."""
        scheduler, unread, outputs = self._scheduler, self._unread, list[RequestOutput]()
        if unread is not None and (
            unread[0].has_drafts or (scheduler.only_decodes and speculator.is_promising(scheduler.running))
        ):
            outputs = self._read()
        if self._unread is None and scheduler.only_decodes:
            speculator.draft(scheduler.running)
        return outputs

    def _issue(self, batch: Batch) -> Launched | None:
        if not batch.runs:
            self._runner.copy_pages(batch.copies)
            if self.lockstep:
                self._runner.skip()
            return None
        launched = self._runner.launch(batch)
        self._launch_clock.launched(launched.size, self._called_at)
        self._scheduler.launched(batch)
        self._num_steps += 1
        if isinstance(launched, Undrawn):  # what may be drawn depends on what was
            self._read_early, begin = self._read(), time.perf_counter()
            late = self._runner.find_late(launched, self.step_log.spare_s)
            self._waited_s += time.perf_counter() - begin
            self._scheduler.put_off(late)
            launched = self._runner.draw_limited(launched, late)
        return launched

    def suspend(self, slabs: Collection[int] | None = None) -> list[RequestOutput]:
        """Preempt all sequences, or those with pages in ``slabs`` of the device, and return what was drawn before.

        They wait, and go on when ``step`` finds pages for them: their own, if these are still there, or on the host.
        """
        outputs = self._read()
        self._scheduler.suspend(slabs)
        self._copy_pages()
        self.step_log.pause()
        return outputs

    def forget_prefixes(self) -> None:
        """Free all pages that were computed so far, since other weights may take the place of these."""
        assert not self.cache.sequences, "sequences go on with pages of the same weights"
        prefixes = self.cache.tree.nodes()
        for pool in self.cache.pools.values():
            pool.clear(prefixes)
        self.cache.tree = PrefixTree()

    def _make_room(self, by_force: bool) -> bool:
        """Have other engines lose memory, behind the copies of this one; see `places.py`."""
        self._copy_pages()
        return self._places.make_room(by_force)

    def _copy_pages(self) -> None:
        if self._debug is not None:
            self._debug.before_copies()
        self._runner.copy_pages(self._scheduler.take_copies())

    def generate(self, requests: Iterable[Request]) -> dict[str, Completion]:
        """Serve all of ``requests`` to the end, and return their completions by id.

        Raises what ``add`` does before any of them is served, and RuntimeError where ranks must step together without
        having the same requests, since they need not end together. Tensor parallel ranks all call this with the same
        requests (RuntimeError if they differ) but for deadlines, which are the first rank's.
        """
        requests = list(requests)
        if self.tp_group is not None:
            self.tp_group.check_same("requests", [replace(request, deadline=None) for request in requests])
        elif self.lockstep:
            raise RuntimeError("generate() cannot know when other ranks have ended: call step() equally often on all")
        told: dict[str, list[RequestOutput]] = {}
        left = requests[::-1]
        for request in left:
            self.check(request)
        if len({request.id for request in left}) < len(left):
            raise ValueError("expected requests of different ids, found one twice")
        with collector_paused():
            while left or self.has_work:
                while left and len(self._scheduler.waiting) < self.options.max_waiting:
                    self.take(left.pop())
                for output in self.step():
                    told.setdefault(output.request_id, []).append(output)
        return {name: Completion.of(outputs) for name, outputs in told.items()}

    def end_requests(self) -> list[RequestOutput]:
        """End requests that were cancelled or are late, as every ``step`` does, and return their last outputs."""
        return [self._finish(sequence, reason) for sequence, reason in self._over()]

    def end_all(self, reason: FinishReason) -> list[RequestOutput]:
        """End all requests, none of which has a token under way, and return their last outputs."""
        return [self._finish(sequence, reason) for sequence in list(self._sequences.values())]

    def _over(self) -> list[tuple[ActiveRequest, FinishReason]]:
        """Return the requests that end now, whatever they have drawn, each once, and why."""
        over = dict.fromkeys(self._cancelled, FinishReason.CANCELLED)
        self._cancelled = []
        for sequence in self._scheduler.deadlines.expired(self._now()):
            over.setdefault(sequence, FinishReason.DEADLINE)
        return [(sequence, reason) for sequence, reason in over.items() if sequence.status is not RequestStatus.ENDED]

    def _now(self) -> float:
        """Return ``time.monotonic()``, on tensor parallel ranks the first one's where a deadline needs it."""
        now = time.monotonic()
        return now if self.tp_group is None or not self._scheduler.deadlines else self.tp_group.broadcast(now)

    def _finish(self, sequence: ActiveRequest, reason: FinishReason) -> RequestOutput:
        self._scheduler.end(sequence)
        return self._output(sequence, (), reason)

    def _output(self, sequence: ActiveRequest, tokens: tuple[Token, ...], finish: FinishReason | None) -> RequestOutput:
        if finish is not None:
            del self._sequences[sequence.request.id]
        prompt = sequence.take_prompt() if tokens and not sequence.is_plain else ()
        return RequestOutput(sequence.request.id, tokens, finish, sequence.num_cached or 0, sequence.failure, prompt)

    def _read(self) -> list[RequestOutput]:
        """Return what the step that is not read yet has drawn."""
        unread, self._unread = self._unread, None
        if unread is None:
            return []
        batch, launched = unread
        begin = time.perf_counter()
        self._runner.wait(launched)
        now = time.perf_counter()
        self._waited_s += now - begin
        device_s = self.step_log.add_device(launched.began, launched.done, batch.num_prompt_tokens)
        self._launch_clock.read(now, now - begin, device_s)
        if self._times is not None and self.tp_group is None:  # clocks of several ranks differ
            self._times.learn(batch.num_tokens, batch.num_single, sum(device_s))
        if self._speculator is not None:
            self._speculator.learn(batch.runs, *device_s)
        if launched.scored is not None:
            launched.scored.store()
        tokens = self._runner.read(launched)
        rows = range(len(tokens))
        if not batch.has_drafts:
            return self._read_rows(launched, tokens, rows)
        # Whether what a row verifies was drawn is known once all rows of its sequence before it are read.
        return joined(output for row in rows for output in self._read_rows(launched, tokens, [row]))

    def _read_rows(self, launched: Launched, tokens: Sequence[Token], rows: Iterable[int]) -> list[RequestOutput]:
        """Return what rows of different sequences have drawn."""
        scheduler, drawing = self._scheduler, launched.drawing
        rows = [row for row in rows if drawing[row].sequence not in launched.late]
        ended = [row for row in rows if drawing[row].sequence.status is RequestStatus.ENDED]
        scheduler.counts.num_tokens_dropped += len(ended)
        rows = [row for row in rows if row not in ended]
        rows = [row for row in rows if not drawing[row].drafted or scheduler.accept(drawing[row])]
        drawn = [tokens[row] for row in rows]
        finishes = scheduler.read([drawing[row] for row in rows], [token.id for token in drawn])
        outputs = list[RequestOutput]()
        for row, token, finish in zip(rows, drawn, finishes, strict=True):
            sequence = drawing[row].sequence
            output = self._output(sequence, () if finish is FinishReason.GRAMMAR else (token,), finish)
            wants_hidden = sequence.request.wants_hidden
            outputs.append(replace(output, hidden=launched.hidden_of(row)) if wants_hidden else output)
        return outputs

    # --- how things stand ---

    def metrics(self) -> Metrics:
        """Return how things stand now, and the counts since the start."""
        counts = {"num_steps": self._num_steps, "num_adapters_woken": self.adapters.num_woken}
        return metrics_of(self._scheduler, {**counts, **self._runner.figures(), **vars(self.step_log.figures())})

    def occupancy(self) -> list[Stretch]:
        """Return who has which of the planned bytes on the device now, in the order of addresses."""
        return occupancy(self.plan.regions, KV_SLABS, self.cache.pools[Tier.DEVICE])

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is free, cached or referred to, and only one of them.

        O(everything): for when the engine is idle. Of one that shares its pages, see ``check_sequences``.
        """
        self.check_sequences()
        check_integrity([self.cache])

    def check_sequences(self) -> None:
        """Raise RuntimeError unless just the sequences of this engine's requests are open in its cache."""
        self._scheduler.check_integrity()
