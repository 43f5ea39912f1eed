"""One simulated device: its memory and link, the turn that is under way, and the calls that a server would make.

Time is a number that the caller passes; steps take what lines say (``StepLines``), copies what the link takes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.inference.fleet.routing import ReplicaView

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.inference.fleet.admission import Refusal
    from yafsdp_like.inference.fleet.queues import Job, ModelQueue
    from yafsdp_like.inference.fleet.reader import Reader
    from yafsdp_like.inference.fleet.schedule import TokenScheduler, Turn
    from yafsdp_like.inference.fleet.times import StepLines


@dataclass(frozen=True)
class SimModel:
    """What a simulated model takes."""

    weights_nbytes: int
    kv_nbytes: int  # for each token
    lines: StepLines
    home: range = range(0)  # bytes of the device where its weights lie whenever they are there; empty: anywhere


@dataclass(frozen=True)
class SimHardware:
    """What a simulated device has."""

    weights_nbytes: int  # memory for weights of models that are awake or on their way
    kv_nbytes: int  # memory for keys and values
    link: float  # bytes a second from the host
    keeps_weights: bool = True  # models that fit beside each other stay, and the next one is prefetched
    switch_s: float = 0.0  # of each switch, beside the copy
    mixed_tokens: int = 0  # of prompts in a step that decodes, too, as in an engine; 0: prompts have steps of their own


class SimWeights:
    """Which weights are on the device: all that fit, those used longest ago give way, one copy at a time."""

    def __init__(self, hardware: SimHardware, models: dict[str, SimModel]) -> None:
        self._hardware, self._models = hardware, models
        self._present: OrderedDict[str, float] = OrderedDict()  # bytes, least recently used first
        self._loading: str | None = None
        self._since = 0.0

    def missing_s(self, name: str) -> float:
        """Return the seconds of copying what a model lacks now; what is on its way counts as there."""
        there = self._models[name].weights_nbytes if name == self._loading else self._present.get(name, 0.0)
        return (self._models[name].weights_nbytes - there) / self._hardware.link

    def is_awake(self, name: str) -> bool:
        """Whether a turn of the model is no switch: never, where its weights may have given way meanwhile."""
        return False

    def wake(self, name: str, now: float) -> float:
        """Make a model ready, and return the seconds that it takes."""
        self._advance(now)
        self._loading = None
        if not self._hardware.keeps_weights:
            self._present.clear()
        self._make_room(name, spare=None)
        missing = self._models[name].weights_nbytes - self._present.get(name, 0.0)
        self._present[name] = self._models[name].weights_nbytes
        self._present.move_to_end(name)
        return missing / self._hardware.link

    def prefetch(self, name: str, current: str, now: float) -> float:
        """Copy what a model lacks, where it has room beside the one that computes; return when it will be there."""
        self._advance(now)
        sizes = [self._models[each].weights_nbytes for each in (name, current)]
        if not self._hardware.keeps_weights or sum(sizes) > self._hardware.weights_nbytes:
            return now
        if self._present.get(name, 0.0) >= sizes[0]:
            self._present.move_to_end(name)
            self._present.move_to_end(current)
            return now
        if name == self._loading:
            return now + (sizes[0] - self._present[name]) / self._hardware.link
        self._make_room(name, spare=current)
        self._present.setdefault(name, 0.0)
        self._present.move_to_end(current)
        self._loading, self._since = name, now
        return now + (sizes[0] - self._present[name]) / self._hardware.link

    def _advance(self, now: float) -> None:
        name = self._loading
        if name is not None:
            arrived = self._present[name] + (now - self._since) * self._hardware.link
            self._present[name] = min(arrived, self._models[name].weights_nbytes)
            self._since = now
            if self._present[name] >= self._models[name].weights_nbytes:
                self._loading = None

    def _make_room(self, name: str, spare: str | None) -> None:
        """Evict until ``name`` fits whole; room is reserved for models on their way, too."""
        kept = [each for each in self._present if each != name]
        total = sum(self._models[each].weights_nbytes for each in (*kept, name))
        for each in kept:
            if total <= self._hardware.weights_nbytes:
                return
            if each != spare:
                total -= self._models[each].weights_nbytes
                del self._present[each]
                if each == self._loading:
                    self._loading = None


class HomeWeights:
    """Which weights are on the device where each model has a home, as in a pool (``inference/pool/plan.py``).

    A model that is woken stays awake until one whose home meets its own is, and nothing is prefetched into the home of
    one that is awake. Homes that meet are taken to be overwritten whole.
    """

    def __init__(self, hardware: SimHardware, models: dict[str, SimModel]) -> None:
        self._link, self._models = hardware.link, models
        self._awake: set[str] = set()
        self._ready: tuple[str, float] | None = None  # what is prefetched, and when it is there

    def missing_s(self, name: str) -> float:
        """Return the seconds of copying what a model lacks now; what is on its way counts as there."""
        is_there = name in self._awake or (self._ready is not None and self._ready[0] == name)
        return 0.0 if is_there else self._models[name].weights_nbytes / self._link

    def is_awake(self, name: str) -> bool:
        """Whether a turn of the model is no switch."""
        return name in self._awake

    def wake(self, name: str, now: float) -> float:
        """Make a model ready, and return the seconds that it takes; those in its way sleep from then on."""
        if name in self._awake:
            return 0.0
        seconds = self.missing_s(name)
        if self._ready is not None and self._ready[0] == name:
            seconds = max(0.0, self._ready[1] - now)
        self._ready = None  # what was prefetched for another turn is let go
        self._awake = {name, *(each for each in self._awake if not self._meet(each, name))}
        return seconds

    def prefetch(self, name: str, current: str, now: float) -> float:
        """Copy what a model lacks, unless another is awake in its home; return when it will be there."""
        if name in self._awake or any(self._meet(each, name) for each in self._awake):
            return now
        if self._ready is None or self._ready[0] != name:
            self._ready = name, now + self.missing_s(name)
        return self._ready[1]

    def _meet(self, one: str, other: str) -> bool:
        homes = self._models[one].home, self._models[other].home
        return max(home.start for home in homes) < min(home.stop for home in homes)


@dataclass
class _Run:
    turn: Turn
    began: float
    step_s: float
    num_steps: int  # 0: prompts
    ends: float
    drawing: tuple[str, ...] = ()  # requests that draw a token with a mixed step
    num_prompt_tokens: int = 0  # of a mixed step


@dataclass
class DeviceCounts:
    """Of one device since the start, in seconds where not said otherwise."""

    num_switches: int = 0
    switching_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_decoded: int = 0  # tokens
    longest_wait_s: float = 0.0  # of a model with work for its turn


class Device:
    """A device that runs what its scheduler says; ``finish`` is told of each request that has drawn all its tokens."""

    def __init__(
        self,
        scheduler: TokenScheduler,
        models: dict[str, SimModel],
        hardware: SimHardware,
        finish: Callable[[Job, Reader], None],
    ) -> None:
        self.scheduler, self.counts = scheduler, DeviceCounts()
        self._models, self._hardware, self._finish = models, hardware, finish
        has_homes = all(model.home for model in models.values())
        self._weights: SimWeights | HomeWeights = (HomeWeights if has_homes else SimWeights)(hardware, models)
        self._last: str | None = None  # the model that computed last
        self._run: _Run | None = None
        self._left: dict[str, int] = {}  # tokens that each request is yet to draw
        self._prompts: dict[str, int] = {}  # tokens of prompts that mixed steps have begun and not ended
        self._waits: dict[str, float] = {}
        self._kv_nbytes = 0.0
        self._load: float | None = None

    # --- events ---

    def arrive(self, job: Job, num_tokens: int, now: float) -> Refusal | None:
        """Take a request that will draw ``num_tokens`` tokens, or say why not; what decodes stops after its step."""
        refusal = self.scheduler.arrived(job, now)
        if refusal is None:
            self._take(job, num_tokens, now)
        return refusal

    def resume(self, job: Job, num_tokens: int, now: float, reader: Reader) -> None:
        """Take a request whose prompt was computed elsewhere, ``reader`` its reader; it decodes from now on."""
        self.scheduler.take(job, now)
        queue = self.scheduler.queues[job.model]
        queue.start(job.id)
        queue.running[job.id].reader = reader
        self._take(job, num_tokens, now)

    def _take(self, job: Job, num_tokens: int, now: float) -> None:
        self._left[job.id] = num_tokens
        self._kv_nbytes += self._models[job.model].kv_nbytes * (job.num_prompt_tokens + num_tokens)
        self._waits.setdefault(job.model, now)
        self._load = None
        run = self._run
        if run is not None and run.num_steps > 1:
            done = max(1, math.ceil((now - run.began) / run.step_s))
            if done < run.num_steps:
                run.num_steps, run.ends = done, run.began + done * run.step_s

    @property
    def next_event(self) -> float:
        """When what is under way ends; inf: nothing is."""
        return math.inf if self._run is None else self._run.ends

    def advance(self, now: float) -> None:
        """Take what has ended by ``now``, and begin what is next."""
        if self._run is not None:
            if self._run.ends > now:
                return
            self._end(self._run)
            self._run = None
        turn = self.scheduler.next(now)
        if turn is not None:
            self._begin(turn, now)

    def _begin(self, turn: Turn, now: float) -> None:
        queue, lines = self.scheduler.queues[turn.model], self._models[turn.model].lines
        if turn.model != self._last:
            was_awake = self._weights.is_awake(turn.model)
            switch_s = self._weights.wake(turn.model, now) + self._swap_s(turn.model)
            if not was_awake:
                switch_s += self._hardware.switch_s
                self.scheduler.switched(turn.model, switch_s)
            self.counts.num_switches += 1
            self.counts.switching_s += switch_s
            now += switch_s
            if self._last in self._waits:
                self._waits[self._last] = now
            self._last = turn.model
        self.counts.longest_wait_s = max(self.counts.longest_wait_s, now - self._waits[turn.model])
        self._waits[turn.model] = now
        if turn.prefetch is not None:
            ready_at = self._weights.prefetch(turn.prefetch, turn.model, now)
            if ready_at > now:
                self.scheduler.copying(turn.prefetch, ready_at)
        if turn.prefill and self._hardware.mixed_tokens:
            self._run = self._mixed(turn, queue, now)
            return
        if turn.prefill:
            tokens = sum(queue.waiting[each].job.num_prompt_tokens for each in turn.prefill)
            self._run = _Run(turn, now, 0.0, 0, now + lines.prefill_s(tokens))
            return
        steps = min(turn.num_steps, min(self._left[each] for each in queue.running))
        keys = sum(request.num_keys for request in queue.running.values()) + len(queue.running) * (steps - 1) // 2
        step_s = lines.decode_s(len(queue.running), keys)
        self._run = _Run(turn, now, step_s, steps, now + steps * step_s)

    def _mixed(self, turn: Turn, queue: ModelQueue, now: float) -> _Run:
        """Return a step that decodes, and computes tokens of the prompts of a turn, the oldest first."""
        room, drawing = self._hardware.mixed_tokens, [*queue.running]
        for each in turn.prefill:
            left = self._prompts.pop(each, queue.waiting[each].job.num_prompt_tokens)
            taken = min(room, left)
            room -= taken
            if taken < left:
                self._prompts[each] = left - taken
                break
            drawing.append(each)
        lines, num_tokens = self._models[turn.model].lines, self._hardware.mixed_tokens - room
        num_keys = sum(request.num_keys for request in queue.running.values())
        rows_s = lines.decode_s(len(queue.running), num_keys) - lines.decode_base_s
        ends = now + lines.prefill_s(num_tokens) + rows_s
        return _Run(turn, now, 0.0, 0, ends, tuple(drawing), num_tokens)

    def _end(self, run: _Run) -> None:
        name, self._load = run.turn.model, None
        queue = self.scheduler.queues[name]
        if run.num_steps:
            served, count = list(queue.running), run.num_steps
            self.scheduler.decoded(name, count, run.began, run.ends)
            self.counts.decode_s += run.ends - run.began
        elif run.num_prompt_tokens:
            served, count = list(run.drawing), 1
            self.scheduler.drew(name, served, run.began, run.ends, run.num_prompt_tokens)
            self.scheduler.spent(name)
            self.counts.prefill_s += run.ends - run.began
        else:
            served, count = list(run.turn.prefill), 1
            self.scheduler.prefilled(name, run.turn.prefill, run.began, run.ends)
            self.counts.prefill_s += run.ends - run.began
        self.counts.num_decoded += count * len(served)
        self._waits[name] = run.ends
        for request_id in served:
            self._left[request_id] -= count
            if not self._left[request_id]:
                del self._left[request_id]
                job = queue.running[request_id].job
                reader = self.scheduler.ended(name, request_id)
                self._kv_nbytes -= self._models[name].kv_nbytes * (job.num_prompt_tokens + reader.num_tokens)
                self._finish(job, reader)
        if not queue.has_work:
            self._waits.pop(name, None)

    def _swap_s(self, name: str) -> float:
        """Return the seconds of bringing pages of a model back that had no room while it slept."""
        if self._kv_nbytes <= self._hardware.kv_nbytes:
            return 0.0
        share = 1 - self._hardware.kv_nbytes / self._kv_nbytes
        keys = sum(request.num_keys for request in self.scheduler.queues[name].running.values())
        return share * keys * self._models[name].kv_nbytes / self._hardware.link

    # --- routing ---

    def view(self, model: str) -> ReplicaView:
        """Return what a router sees for requests of a model."""
        if self._load is None:
            self._load = sum(queue.load for queue in self.scheduler.queues.values() if queue.has_work)
        has_model = self.scheduler.queues[model].has_work
        return ReplicaView(self._load, has_model, self._weights.missing_s(model), num_requests=len(self._left))
