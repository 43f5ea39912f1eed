"""Turns of a pool's models by the slack of their readers: tells `fleet/schedule.py` what a pool does, with its clock.

Owns which times are those of a step, and which say what a switch took. Decides nothing.

[Note: first guesses]
Until steps are measured, one that decodes is taken to last as long as reading the weights at the rate of the device's
memory, a row of a prompt 1/200 of that (from 150 to 300 rows on, GPUs are bound by compute), and a switch as copying
them at the rate of the link; where the device is not known, at ``_MEMORY`` and ``_LINK``. The first real step of each
kind replaces its guess (``fleet/times.py``).
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Protocol

from yafsdp_like.inference.engine.request import FinishReason, QueueFullError
from yafsdp_like.inference.fleet.queues import Job, ModelSpec
from yafsdp_like.inference.fleet.schedule import ScheduleOptions, TokenScheduler
from yafsdp_like.inference.fleet.standing import ModelStanding, Standing
from yafsdp_like.inference.fleet.times import StepLines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from yafsdp_like.inference.engine.request import Request, RequestOutput
    from yafsdp_like.inference.fleet.reader import Targets
    from yafsdp_like.inference.options import PoolOptions
    from yafsdp_like.inference.pool.member import Member
    from yafsdp_like.inference.pool.ranks import PoolRanks

_MEMORY, _LINK = 2e12, 5e10  # bytes a second, see [Note: first guesses]
_ROWS = 200
_DISK = 2e9  # bytes a second that a model is taken to be read at into host memory


class Turns(Protocol):
    """What a pool tells of its requests and steps, and asks."""

    def check(self, name: str, request: Request) -> None:
        """Raise QueueFullError where a request should come again later."""

    def take(self, name: str, request: Request) -> None:
        """Take a request that the model's engine has taken."""

    def next(self, wake_up: Callable[[str], object], prefetch: Callable[[str], int]) -> Member | None:
        """Return the model whose turn it is, woken; None: the pool chooses."""

    def stepped(self, name: str | None, outputs: Iterable[tuple[str, RequestOutput]]) -> None:
        """Take a step of a model, or none, and all outputs since the step before."""

    def standing(self) -> Standing:
        """Return how the pool stands, for those who route requests to one of many."""


class CountedTurns:
    """Of a pool without targets: it counts steps itself, and is told nothing.

    Its load is the share of rows that requests would fill, of each model's batch: at 1 some wait.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._members = members

    def check(self, name: str, request: Request) -> None:
        """Refuse no request."""

    def take(self, name: str, request: Request) -> None:
        """Count no request."""

    def next(self, wake_up: Callable[[str], object], prefetch: Callable[[str], int]) -> Member | None:
        """Leave turns to the pool."""
        return None

    def stepped(self, name: str | None, outputs: Iterable[tuple[str, RequestOutput]]) -> None:
        """Learn nothing."""

    def standing(self) -> Standing:
        """Return how the pool stands, by first guesses."""
        models = {}
        for name, member in self._members.items():
            token_s = _lines(member).prefill_row_s
            num_requests, row = _num_requests(member), 1 / member.engine.options.max_batch_size
            models[name] = ModelStanding(num_requests, _wake_s(member), token_s, row)
        return Standing(sum(each.num_requests * each.request_load for each in models.values()), models)


def turns_of(
    members: Mapping[str, Member],
    targets: Mapping[str, Targets] | None,
    limits: PoolOptions,
    ranks: PoolRanks,
) -> Turns:
    """Return the turns of a pool: by slack where its models have targets, and by the time of its ``ranks``."""
    if targets is None:
        return CountedTurns(members)
    return SlackTurns(members, targets, limits, ranks.clock, ranks.called_at)


class SlackTurns:
    """The scheduler of one pool, told of its arrivals, steps, wakes and outputs."""

    def __init__(
        self,
        members: Mapping[str, Member],
        targets: Mapping[str, Targets],
        limits: PoolOptions,
        clock: Callable[[], float] = time.monotonic,
        called_at: Callable[[], float] | None = None,
    ) -> None:
        """``targets`` of every model. Raises ValueError where a model has none.

        ``called_at``: when the call that is being made was made; it may cost less than ``clock``, which it is if None.
        """
        if members.keys() != targets.keys():
            raise ValueError(f"expected targets of the models {[*members]}, found those of {[*targets]}")
        specs = {name: _spec(member, targets[name]) for name, member in members.items()}
        plan = next(iter(members.values())).plan  # each has a home in the same slabs, and the others for pages
        slabs_nbytes = plan.serving.grid.region_nbytes + len(plan.home) * plan.serving.grid.slab_nbytes
        memory_nbytes = slabs_nbytes + limits.host_kv_nbytes  # of sequences that wait, pages may lie on the host
        options = ScheduleOptions(admission_load=limits.admission_load, memory_nbytes=memory_nbytes)
        self.scheduler = TokenScheduler(specs, options)
        self._members, self._clock, self._called_at = members, clock, called_at or clock
        self._open: dict[str, dict[str, None]] = {name: {} for name in members}  # ids of requests that have not ended
        self._began = clock()  # the step that is under way
        # When models that have drawn nothing since were woken, and their steps' time.
        self._woken: dict[str, float] = {}
        self._seen = dict.fromkeys(members, (0, 0))  # steps of each, and tokens of prompts in them

    def check(self, name: str, request: Request) -> None:
        """Raise QueueFullError, which says when to come again, where a request would miss targets."""
        refusal = self.scheduler.refusal(_job(name, request))
        if refusal is not None:
            words = f"the targets of model {name!r} or others would be missed: {refusal.reason}"
            raise QueueFullError(f"{words}; come again in {math.ceil(refusal.retry_after_s)} s", refusal.retry_after_s)

    def take(self, name: str, request: Request) -> None:
        """Take a request that the model's engine has taken."""
        self.scheduler.take(_job(name, request), self._called_at())
        self._open[name][request.id] = None

    def next(self, wake_up: Callable[[str], object], prefetch: Callable[[str], int]) -> Member | None:
        """Wake and return the model whose turn it is, of those that are on the host, and prefetch the one after it."""
        members, now = self._members.items(), self._called_at()
        able = {name for name, member in members if member.image is not None and member.engine.has_requests}
        turn = self.scheduler.next(now, able)
        if turn is None:
            return None
        member = self._members[turn.model]
        if not member.is_awake:
            self._woken[member.name] = now
            self._new_steps(member.name)
            wake_up(member.name)
        if turn.prefetch is not None and prefetch(turn.prefetch):
            left = self._members[turn.prefetch].residence.missing_nbytes()
            self.scheduler.copying(turn.prefetch, now + left / _rates(member)[1])
        self._began = now
        return member

    def stepped(self, name: str | None, outputs: Iterable[tuple[str, RequestOutput]]) -> None:
        """Take a step of model ``name``, or none, and all outputs since the step before, whoever's they are.

        Where an engine looks ahead its tokens are those of the step before; as long as it steps, one launch and one
        reading follow each other, so that a call lasts as long as a step. Calls that waited for weights, or that may
        have launched nothing, since a request has ended, say nothing of times.
        """
        now, drawn = self._clock(), dict[str, list[str]]()
        found = [(model, output) for model, output in outputs if output.request_id in self._open[model]]
        for model, output in found:
            if output.tokens:
                drawn.setdefault(model, []).extend([output.request_id] * len(output.tokens))
        num_steps, num_prompt_tokens = (0, 0) if name is None else self._new_steps(name)
        if name in self._woken and num_steps:
            self._woken[name] += self.scheduler.queues[name].mixed_step_s(num_prompt_tokens)
        for model, request_ids in drawn.items():
            ends = any(output.finish is not None for owner, output in found if owner == model)
            is_timed = model not in self._woken and model == name and num_steps == 1 and not ends
            self._note_switch(model, now, is_own=model == name)
            self.scheduler.drew(model, request_ids, self._began if is_timed else now, now, num_prompt_tokens)
        if name is not None:
            self.scheduler.spent(name)
        for model, output in found:
            if output.finish is not None:
                del self._open[model][output.request_id]
                if not self._open[model]:
                    self._woken.pop(model, None)
                drew_all = output.finish in (FinishReason.STOP, FinishReason.LENGTH)
                self.scheduler.ended(model, output.request_id, was_cancelled=not drew_all)

    def standing(self) -> Standing:
        """Return how the pool stands, by the scheduler's numbers."""
        models, load = {}, 0.0
        for name, queue in self.scheduler.queues.items():
            num_rows, tpot_s = len(queue.running) + len(queue.waiting), queue.targets.tpot_s
            more_s = queue.times.decode_s(num_rows + 1) - (queue.times.decode_s(num_rows) if num_rows else 0.0)
            token_s = queue.times.prefill_s(1024) / 1024
            models[name] = ModelStanding(num_rows, _wake_s(self._members[name]), token_s, more_s / tpot_s)
            load += queue.load
        return Standing(load, models)

    def _new_steps(self, name: str) -> tuple[int, int]:
        """Return how many steps of a model were read since the last call, and tokens of prompts in them."""
        log = self._members[name].engine.step_log
        before, self._seen[name] = self._seen[name], (log.num_steps, log.num_prompt_tokens)
        return log.num_steps - before[0], log.num_prompt_tokens - before[1]

    def _note_switch(self, name: str, now: float, is_own: bool) -> None:
        """Count as a switch what passed from a wake to the first tokens beyond what steps until then should take.

        Tokens that came with a step of another model (not ``is_own``) had waited for it, and say nothing.
        """
        woken_at = self._woken.pop(name, None)
        if woken_at is not None and is_own:
            self.scheduler.switched(name, max(0.0, now - woken_at))


def _job(name: str, request: Request) -> Job:
    return Job(request.id, name, len(request.prompt), request.max_tokens, request.tenant)


def _num_requests(member: Member) -> int:
    metrics = member.engine.metrics()
    return metrics.num_running + metrics.num_waiting


def _wake_s(member: Member) -> float:
    """Return the seconds until a model's weights are on the device, if it were asked for now."""
    if member.failure is not None:
        return math.inf
    if member.is_awake:
        return 0.0
    figures = member.figures
    return (figures.weights_nbytes - figures.loaded_nbytes) / _DISK + member.residence.missing_nbytes() / _rates(
        member
    )[1]


def _rates(member: Member) -> tuple[float, float]:
    """Return bytes a second of the device's memory and of its link to the host."""
    hardware = member.plan.serving.site.hardware
    rates = None if hardware is None else hardware.rates
    return (_MEMORY, _LINK) if rates is None else (rates.memory_nbytes, rates.host_nbytes)


def _lines(member: Member) -> StepLines:
    """Return first guesses, see [Note: first guesses]."""
    memory = _rates(member)[0]
    step_s = member.plan.home_nbytes / memory
    key_s = member.plan.token_nbytes / memory
    return StepLines(step_s, step_s / _ROWS, key_s, 0.0, step_s / _ROWS)


def _spec(member: Member, targets: Targets) -> ModelSpec:
    batch = member.engine.options.max_batch_size
    home, slab_nbytes = member.plan.home, member.plan.serving.grid.slab_nbytes
    return ModelSpec(
        targets,
        _lines(member),
        switch_s=member.plan.image_nbytes / _rates(member)[1],
        max_batch=batch,
        kv_nbytes=member.plan.token_nbytes,
        home=range(home.start * slab_nbytes, home.stop * slab_nbytes),
    )
