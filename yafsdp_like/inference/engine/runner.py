"""Steps on the device: tables staged, pages copied, the forward issued, tokens drawn and fetched, in this order.

Owns what the device is given to do. Which sequence is served when is the scheduler's.

Shapes: R rows that draw, D model, L log-probabilities of a row.
"""

from __future__ import annotations

import itertools
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from yafsdp_like.inference.engine.batch_inputs import Staging, host_like
from yafsdp_like.inference.engine.forward import Forward, LayerPages, queries_per_tile_of
from yafsdp_like.inference.engine.image_rows import ImageRows
from yafsdp_like.inference.engine.image_tokens import check_images
from yafsdp_like.inference.engine.limited_drawing import LimitedDrawing
from yafsdp_like.inference.engine.prompt_scores import PromptScorer, ScoredStep, compute_logprobs
from yafsdp_like.inference.engine.request import Token
from yafsdp_like.inference.kv.eviction import Costs
from yafsdp_like.inference.kv.kv_cache import Copy, Tier
from yafsdp_like.inference.plan.recordings import MAX_RECORDED_TOKENS, RecordingBudget
from yafsdp_like.inference.plan.step_sizes import StepBuckets, StepSize
from yafsdp_like.kernels.blocks import launching_on
from yafsdp_like.kernels.sampling import SamplingRows, sample
from yafsdp_like.memory.streams import Event, StepRecorder, StepRecording, Timer, streams_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from yafsdp_like.inference.engine.adapters import Adapters
    from yafsdp_like.inference.engine.batch import ActiveRequest, Batch, Run
    from yafsdp_like.inference.engine.image_rows import ImageRun
    from yafsdp_like.inference.engine.places import EnginePlaces
    from yafsdp_like.inference.engine.request import Request
    from yafsdp_like.inference.weights.store import Weights

_NUM_TIMED = 3  # repetitions of what is measured, of which the fastest counts
_TIMED_NBYTES = 64 << 20
_TIMED_TOKENS_ON_CPU = 16


@dataclass(frozen=True)
class DrawnTokens:
    """What the rows of a step drew, on the device or on the host; log-probabilities only where they are asked for."""

    ids: Tensor  # (R,) int64
    logprobs: Tensor  # (R,) float32
    top_logprobs: Tensor  # (R, L) float32, in falling order
    top_ids: Tensor  # (R, L) int64


@dataclass(frozen=True)
class Launched:
    """A step that was issued, and where its results are being put."""

    size: StepSize
    drawing: tuple[Run, ...]  # in order of rows
    results: DrawnTokens  # on the host, once ``done``
    began: Event  # its first work on the device, of ``Runner.timer`` as ``done`` is
    done: Event
    scored: ScoredStep | None  # prompts
    hidden: Tensor | None  # (R, D) of the weights' dtype: what rows are drawn from, if it is asked for
    late: Collection[ActiveRequest] = ()  # whose rows have drawn nothing

    def hidden_of(self, row: int) -> tuple[float, ...]:
        """Return a row of ``hidden``."""
        return () if self.hidden is None else tuple(self.hidden[row].tolist())


@dataclass(frozen=True)
class Undrawn:
    """A step that was issued, but for the drawing of limited rows."""

    size: StepSize  # padding included
    drawing: tuple[Run, ...]
    began: Event
    scored: ScoredStep | None
    is_all: bool  # whether it has no other rows, which draw nothing


class Runner:
    """Runs the batches of one engine. Once it is warmed up, only encoding an image allocates on the device."""

    def __init__(self, weights: Weights, places: EnginePlaces, adapters: Adapters) -> None:
        buffers, groups, regions = places.buffers, weights.plan.groups, places.regions
        self._weights, self._buffers, self._regions = weights, buffers, regions
        self._adapters, self._images = adapters, ImageRows.of(weights, places)
        self._on_gpu = weights.device.type == "cuda"
        self._max_batch_tokens = len(buffers.inputs.positions)
        self._forward = Forward(
            weights,
            buffers,
            LayerPages.of(groups, regions[Tier.DEVICE], weights.config.kv_scales),
            _num_multiprocessors(weights.device),
            adapters.by_layer(),
        )
        page_size, per_tile = groups[0].shape.page_size, queries_per_tile_of(weights)
        self._staging = Staging(buffers, page_size, per_tile, self._on_gpu, len(adapters.slots))
        self._limited, self._scorer = LimitedDrawing(buffers, self._on_gpu), PromptScorer(buffers, self._on_gpu)
        self._streams, self.timer = streams_of(weights.device), Timer(weights.device)
        scores, ids = buffers.logits, buffers.inputs.token_pool[: len(buffers.inputs.last_rows)]
        self._drawn = DrawnTokens(ids, scores.drawn_logprobs, scores.top_logits, scores.top_ids)
        self._results = [self._host_results() for _ in range(2)]  # see batch_inputs.py, [Note: two sides]
        self._hidden = [host_like(buffers.activations.last, self._on_gpu) for _ in range(2)]
        self._buckets = StepBuckets.of(weights.plan.options)
        self._recordings: dict[StepSize, StepRecording] = {}
        self._logprobs: dict[int, StepRecording] = {}  # by the number of rows that draw
        self.recordings_nbytes = 0  # of the device's memory, beside the arena
        self._fill_rotary()

    def _host_results(self) -> DrawnTokens:
        return DrawnTokens(*(host_like(tensor, self._on_gpu) for tensor in vars(self._drawn).values()))

    def _fill_rotary(self) -> None:
        tables = self._buffers.tables
        positions = torch.arange(len(tables.cos), device=self._weights.device)
        cos, sin = self._weights.config.rope.tables(positions, tables.cos.dtype)
        tables.cos.copy_(cos)
        tables.sin.copy_(sin)

    # --- before the first step ---

    @torch.inference_mode()
    def warm_up(self, graphs: bool) -> None:
        """Compile all that steps need on a GPU, and record steps of all sizes up to ``MAX_RECORDED_TOKENS``."""
        if not self._on_gpu:
            return
        with launching_on(self._weights.device):
            self._staging.stage_idle(self._buckets.mixed[-1])
            self._forward.warm_up(self._sizes)
            for num_rows in sorted({size.num_drawing for size in self._sizes}):
                self._sample(self._buffers.logits.logits[:num_rows])
                self._compute_logprobs(num_rows)
            self._limited.warm_up()
            if self._images is not None:
                self._images.warm_up()
            torch.cuda.synchronize(self._weights.device)
            if graphs:
                plan = self._weights.plan
                budget = RecordingBudget(
                    plan.recordings_nbytes, lambda: torch.cuda.mem_get_info(self._weights.device)[0]
                )
                self._record(budget)
                self.recordings_nbytes = budget.taken_nbytes

    @property
    def _sizes(self) -> list[StepSize]:
        """Sizes of all steps, those of many tokens last."""
        return [*self._with_adapters(self._buckets.decode), *self._with_adapters(self._buckets.mixed)]

    def _with_adapters(self, sizes: Sequence[StepSize]) -> list[StepSize]:
        """Return sizes of steps without adapters, and the same with them where there are any."""
        adapted = sizes if self._adapters.slots else ()
        return [*sizes, *(replace(size, adapted=True) for size in adapted)]

    def _record(self, budget: RecordingBudget) -> None:
        """Record what fits the plan: steps that only decode, then the others, those of few tokens first."""
        recorder = StepRecorder()

        def record_logprobs(num_rows: int) -> None:
            self._logprobs[num_rows] = recorder.record(partial(self._compute_logprobs, num_rows))

        def record_step(size: StepSize) -> None:
            self._weights.reset_residency()
            self._recordings[size] = recorder.record(partial(self._step, size))

        mixed = [size for size in self._buckets.mixed if size.num_tokens <= MAX_RECORDED_TOKENS]
        decode = self._with_adapters(self._buckets.decode[::-1])
        sizes = [*decode, *self._with_adapters(mixed)] if self._weights.graphable else []
        work = [partial(record_logprobs, size.num_drawing) for size in reversed(self._buckets.decode)]
        work += [partial(record_step, size) for size in sizes]
        left = list(itertools.dropwhile(budget.record, work))
        if left:
            warnings.warn(
                f"{len(left)} of {len(work)} CUDA graphs do not fit the {self._weights.plan.recordings_nbytes:,} bytes "
                f"planned for them, of which {budget.taken_nbytes:,} are taken: those are issued kernel by kernel",
                stacklevel=2,
            )

    def drop_recordings(self) -> None:
        """Free what was recorded. A process group ends only when no CUDA graph holds a sum over it."""
        self._recordings.clear()
        self._logprobs.clear()

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Measure how fast this machine copies pages to the host and back, and computes prompts."""
        device, host = self._regions[Tier.DEVICE], self._regions[Tier.HOST]
        nbytes = min(len(device), len(host), _TIMED_NBYTES)

        def copy() -> None:
            host[:nbytes].copy_(device[:nbytes], non_blocking=True)
            device[:nbytes].copy_(host[:nbytes], non_blocking=True)

        num_tokens = self._max_batch_tokens
        if not self._on_gpu:
            num_tokens = min(num_tokens, _TIMED_TOKENS_ON_CPU)
        chunk = StepSize(num_tokens, num_single=0, num_chunks=1)
        with launching_on(self._weights.device):
            return Costs(2 * nbytes / self._seconds(copy), num_tokens / self._seconds(lambda: self._idle(chunk)))

    @torch.inference_mode()
    def measure_steps(self) -> dict[int, float]:
        """Measure the seconds of steps that mix, by number of tokens, less attention to earlier tokens.

        Of recorded steps, or else of a few as they are issued, on a CPU small ones.
        """
        sizes = [size for size in self._recordings if size.num_chunks and size == self._buckets.least(size.num_tokens)]
        if not sizes:
            most = self._max_batch_tokens if self._on_gpu else min(self._max_batch_tokens, 8 * _TIMED_TOKENS_ON_CPU)
            sizes = [self._buckets.least(most >> halvings) for halvings in range(most.bit_length())]
        with launching_on(self._weights.device):
            sizes.sort(key=lambda size: size.num_tokens)
            return {size.num_tokens: self._seconds(partial(self._replay_idle, size)) for size in sizes}

    @torch.inference_mode()
    def measure_decoding(self) -> dict[int, float]:
        """Measure the seconds of steps that only decode, by number of rows, less attention to earlier tokens."""
        sizes = self._buckets.decode if self._on_gpu else [StepSize.decode(1 << power) for power in range(5)]
        with launching_on(self._weights.device):
            most = self._buckets.decode[-1].num_tokens
            return {
                size.num_tokens: self._seconds(partial(self._replay_idle, size))
                for size in sizes
                if size.num_tokens <= most
            }

    def _replay_idle(self, size: StepSize) -> None:
        if size not in self._recordings:
            return self._idle(size)
        self._staging.stage_measured(size)
        self._weights.reset_residency()
        self._recordings[size].replay()

    def _seconds(self, work: Callable[[], None]) -> float:
        return min(self._seconds_once(work) for _ in range(_NUM_TIMED))

    def _seconds_once(self, work: Callable[[], None]) -> float:
        if self._on_gpu:
            torch.cuda.synchronize(self._weights.device)
        start = time.perf_counter()
        work()
        if self._on_gpu:
            torch.cuda.synchronize(self._weights.device)
        return max(time.perf_counter() - start, 1e-9)

    def _idle(self, size: StepSize) -> None:
        """Run a step whose rows read and write no pages."""
        self._staging.stage_measured(size)
        self._sample(self._forward(size))

    # --- a step ---

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched | Undrawn:
        """Issue a step, which may read tokens that the step before it draws. At most one other may be unread.

        Where rows are limited, ``draw_limited`` ends it.
        """
        size, drawing = _size_of(batch.runs), tuple([run for run in batch.runs if run.draws])
        if self._on_gpu:
            size = self._buckets.fit(size)
        slots = batch.adapter_slots if self._adapters.slots else None
        size = replace(size, adapted=True) if slots else size
        others = [run for run in batch.runs if not run.sequence.is_plain]  # without them nothing is looked for
        scored = None if size.draws_in_order or not others else self._scorer.find(batch.runs)
        seen = self._images.find(batch.runs) if others and self._images is not None else ()
        # A recording cannot wait for one unit after the other, score, or see images; whether there is one changes no
        # bits.
        is_issued = scored is not None or seen or self._weights.is_arriving()
        recording = None if is_issued else self._recordings.get(size)
        with launching_on(self._weights.device):
            self._staging.stage(batch.runs, drawing, size)
            began = self.timer.mark()
            self._copy_pages(batch.copies)
            if slots:
                self._adapters.await_copies()
            if scored is not None:
                self._scorer.stage(scored)
                self._sample(self._forward(size, self._scorer.pieces(scored), self._rows_of(seen)))
            elif recording is None:
                self._sample(self._forward(size, (), self._rows_of(seen)))
            else:
                self._weights.reset_residency()
                recording.replay()
            if slots:
                self._adapters.launched(slots)
            step = Undrawn(size, drawing, began, scored, len(drawing) == len(batch.runs))
            is_limited = any(run.draws and run.sequence.request.limits is not None for run in others)
            return step if is_limited else self._fetch(step)

    def _rows_of(self, seen: Sequence[ImageRun]) -> Iterable[tuple[slice, Tensor]]:
        return self._images.compute(seen) if self._images is not None and seen else ()

    def check_images(self, request: Request) -> None:
        """Raise ValueError for images that steps cannot show the model."""
        if request.images:
            vision = None if self._weights.tp_group is not None else self._weights.config.vision
            check_images(f"request {request.id!r}", request.prompt, request.images, vision)

    def figures(self) -> dict[str, int]:
        """Return what steps took and did beside the arena and the scheduler, by the names of ``Metrics``."""
        images = self._images
        encoded, found = (0, 0) if images is None else (images.num_encoded, images.num_found)
        return {
            "recordings_nbytes": self.recordings_nbytes,
            "num_images_encoded": encoded,
            "num_images_found": found,
        }

    @torch.inference_mode()
    def draw_limited(self, step: Undrawn, late: Collection[ActiveRequest]) -> Launched:
        """Draw again for limited rows but those of ``late`` sequences, which ``find_late`` has found; end the step."""
        with launching_on(self._weights.device):
            self._limited(step.drawing, late, self._staging.histories.row_of)
            return replace(self._fetch(step), late=late)

    def find_late(self, step: Undrawn, spare_s: float) -> set[ActiveRequest]:
        """Return whose masks are late; see ``MaskLanes.find_late``. Tokens of the step before must have been read."""
        return self._limited.find_late(step.drawing, spare_s, alone=step.is_all)

    @torch.inference_mode()
    def copy_pages(self, copies: Sequence[Copy]) -> None:
        """Issue copies of pages without a step."""
        if copies:
            with launching_on(self._weights.device):
                self._copy_pages(copies)

    def wait(self, launched: Launched) -> None:
        """Block the CPU until a step is done."""
        self._streams.synchronize(launched.done)

    def read(self, launched: Launched) -> list[Token]:
        """Return what each of ``launched.drawing`` drew in a step that is done."""
        tokens = launched.results.ids[: len(launched.drawing)].tolist()
        drawn = zip(launched.drawing, tokens, strict=True)
        return [
            Token(token) if run.sequence.is_plain else _token(run, token, launched.results, row)
            for row, (run, token) in enumerate(drawn)
        ]

    def skip(self) -> None:
        """Run a step of no tokens, for ranks that must step together."""
        self._forward.skip()

    def _step(self, size: StepSize) -> None:
        """Run what is recorded: a step that ends with the residency that it began with."""
        self._sample(self._forward(size))
        self._weights.reset_residency()

    def _sample(self, logits: Tensor) -> None:
        if len(logits):
            inputs, tables, rows = self._buffers.inputs, self._buffers.tables, slice(0, len(logits))
            drawn_from = SamplingRows(inputs.sampling_floats[rows], inputs.sampling_ints[rows], tables.history)
            sample(logits, drawn_from, self._drawn.ids[rows])

    def _compute_logprobs(self, num_rows: int) -> None:
        """Compute log-probabilities of the tokens drawn, and of the most probable."""
        compute_logprobs(self._buffers.logits, self._drawn.ids[:num_rows])

    def _fetch(self, step: Undrawn) -> Launched:
        drawing, num_rows = step.drawing, step.size.num_drawing
        others = [run.sequence.request for run in drawing if not run.sequence.is_plain]
        with_logprobs = any(request.num_logprobs is not None for request in others)
        if with_logprobs:
            recorded = min((found for found in self._logprobs if found >= num_rows), default=None)
            if recorded is None:
                self._compute_logprobs(num_rows)
            else:
                self._logprobs[recorded].replay()
        self._results.reverse()
        results, rows = self._results[0], slice(0, len(drawing))
        pairs = zip(vars(results).values(), vars(self._drawn).values(), strict=True)
        for result, drawn in islice(pairs, None if with_logprobs else 1):
            result[rows].copy_(drawn[rows], non_blocking=True)
        hidden = None
        if any(request.wants_hidden for request in others):
            self._hidden.reverse()
            hidden = self._hidden[0]
            hidden[rows].copy_(self._buffers.activations.last[rows], non_blocking=True)
        return Launched(step.size, drawing, results, step.began, self.timer.mark(), step.scored, hidden)

    def _copy_pages(self, copies: Iterable[Copy]) -> None:
        for first, num_pages in _merged(copies):
            page_nbytes = first.shape.nbytes
            source = self._regions[first.source_tier][first.source * page_nbytes :]
            destination = self._regions[first.destination_tier][first.destination * page_nbytes :]
            nbytes = num_pages * page_nbytes
            destination[:nbytes].copy_(source[:nbytes], non_blocking=True)


def _size_of(runs: Sequence[Run]) -> StepSize:
    """Count the rows of ``runs``, of which those of one token come first."""
    num_chunks = num_tokens = num_drawing = 0
    for run in runs:
        num_tokens += run.num_tokens
        num_chunks += run.num_tokens > 1
        num_drawing += run.draws
    return StepSize(num_tokens, len(runs) - num_chunks, num_chunks, num_drawing)


def _token(run: Run, token: int, results: DrawnTokens, row: int) -> Token:
    num_logprobs = run.sequence.request.num_logprobs
    if num_logprobs is None:
        return Token(token)
    ids, logprobs = (top[row, :num_logprobs].tolist() for top in (results.top_ids, results.top_logprobs))
    return Token(token, results.logprobs[row].item(), tuple(zip(ids, logprobs, strict=True)))


def _merged(copies: Iterable[Copy]) -> list[tuple[Copy, int]]:
    """Merge copies of neighbouring pages, in order: the first of each group, and how many."""
    merged: list[tuple[Copy, int]] = []
    for copy in copies:
        first, count = merged[-1] if merged else (copy, 0)
        follows = replace(first, source=first.source + count, destination=first.destination + count) == copy
        if merged and follows:
            merged[-1] = first, count + 1
        else:
            merged.append((copy, 1))
    return merged


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
