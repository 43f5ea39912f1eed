"""Turns of a pool's models by the slack of their readers: tells `fleet/schedule.py` what a pool does, with its clock.

Owns which times are those of a step, and which say what a switch took. Decides nothing.

[Note: first guesses]
Until steps are measured, one that decodes is taken to last as long as reading the weights at the rate of the device's
memory, a row of a prompt 1/200 of that (from 150 to 300 rows on, GPUs are bound by compute), and a switch as copying
them at the rate of the link; where the device is not known, at ``_MEMORY`` and ``_LINK``. The first real step of each
kind replaces its guess (``fleet/times.py``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from yafsdp_like.inference.engine.request import FinishReason, QueueFullError
from yafsdp_like.inference.fleet.queues import Job, ModelSpec
from yafsdp_like.inference.fleet.schedule import ScheduleOptions, TokenScheduler
from yafsdp_like.inference.fleet.times import StepLines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from yafsdp_like.inference.engine.request import Request, RequestOutput
    from yafsdp_like.inference.fleet.reader import Targets
    from yafsdp_like.inference.pool.member import Member

_MEMORY, _LINK = 2e12, 5e10  # bytes a second, see [Note: first guesses]
_ROWS = 200


class CountedTurns:
    """Of a pool without targets: it counts steps itself, and is told nothing."""

    def check(self, name: str, request: Request) -> None:
        """Refuse no request."""

    def take(self, name: str, request: Request) -> None:
        """Count no request."""

    def next(self, wake_up: Callable[[str], object], prefetch: Callable[[str], int]) -> Member | None:
        """Leave turns to the pool."""
        return None

    def stepped(self, name: str | None, outputs: Iterable[tuple[str, RequestOutput]]) -> None:
        """Learn nothing."""


def turns_of(
    members: Mapping[str, Member], targets: Mapping[str, Targets] | None, admission_load: float | None
) -> CountedTurns:
    """Return the turns of a pool: by slack where its models have targets."""
    return CountedTurns() if targets is None else SlackTurns(members, targets, admission_load)


class SlackTurns(CountedTurns):
    """The scheduler of one pool, told of its arrivals, steps, wakes and outputs."""

    def __init__(
        self,
        members: Mapping[str, Member],
        targets: Mapping[str, Targets],
        admission_load: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``targets`` of every model. Raises ValueError where a model has none."""
        if members.keys() != targets.keys():
            raise ValueError(f"expected targets of the models {[*members]}, found those of {[*targets]}")
        specs = {name: _spec(member, targets[name]) for name, member in members.items()}
        self.scheduler = TokenScheduler(specs, ScheduleOptions(admission_load=admission_load))
        self._members, self._clock = members, clock
        self._open: dict[str, dict[str, None]] = {name: {} for name in members}  # ids of requests that have not ended
        self._began = clock()  # the step that is under way
        self._woken: dict[str, float] = {}  # when the models were woken that have drawn nothing since

    def check(self, name: str, request: Request) -> None:
        """Raise QueueFullError, which says when to come again, where a request would miss targets."""
        refusal = self.scheduler.refusal(_job(name, request))
        if refusal is not None:
            words = f"the targets of model {name!r} or others would be missed: {refusal.reason}"
            raise QueueFullError(f"{words}; come again in {refusal.retry_after_s:.0f} s", refusal.retry_after_s)

    def take(self, name: str, request: Request) -> None:
        """Take a request that the model's engine has taken."""
        self.scheduler.take(_job(name, request), self._clock())
        self._open[name][request.id] = None

    def next(self, wake_up: Callable[[str], object], prefetch: Callable[[str], int]) -> Member | None:
        """Wake and return the model whose turn it is, of those that are on the host, and prefetch the one after it."""
        able = {name for name, member in self._members.items() if member.image is not None}
        turn = self.scheduler.next(self._clock(), able)
        if turn is None:
            return None
        member = self._members[turn.model]
        if not member.is_awake:
            self._woken[member.name] = self._clock()
            wake_up(member.name)
        if turn.prefetch is not None and prefetch(turn.prefetch):
            left = self._members[turn.prefetch].residence.missing_nbytes()
            self.scheduler.copying(turn.prefetch, self._clock() + left / _rates(member)[1])
        self._began = self._clock()
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
        for model, request_ids in drawn.items():
            ends = any(output.finish is not None for owner, output in found if owner == model)
            is_timed = not self._note_switch(model, now) and model == name and not ends
            self.scheduler.drew(model, request_ids, self._began if is_timed else now, now)
        if name is not None:
            self.scheduler.spent(name)
        for model, output in found:
            if output.finish is not None:
                del self._open[model][output.request_id]
                drew_all = output.finish in (FinishReason.STOP, FinishReason.LENGTH)
                self.scheduler.ended(model, output.request_id, was_cancelled=not drew_all)

    def _note_switch(self, name: str, now: float) -> bool:
        """Count as a switch what passed from a wake to the first tokens beyond what their step is expected to take.

        Returns whether there was one.
        """
        woken_at = self._woken.pop(name, None)
        if woken_at is None:
            return False
        self.scheduler.switched(name, max(0.0, now - woken_at - self.scheduler.queues[name].step_s))
        return True


def _job(name: str, request: Request) -> Job:
    return Job(request.id, name, len(request.prompt), request.max_tokens, request.tenant)


def _rates(member: Member) -> tuple[float, float]:
    """Return bytes a second of the device's memory and of its link to the host."""
    hardware = member.plan.serving.site.hardware
    rates = None if hardware is None else hardware.rates
    return (_MEMORY, _LINK) if rates is None else (rates.memory_nbytes, rates.host_nbytes)


def _spec(member: Member, targets: Targets) -> ModelSpec:
    memory, link = _rates(member)
    step_s = member.plan.image_nbytes / memory
    key_s = sum(group.shape.nbytes / group.shape.page_size for group in member.plan.serving.groups) / memory
    lines = StepLines(step_s, step_s / _ROWS, key_s, 0.0, step_s / _ROWS)
    batch = member.engine.options.max_batch_size
    return ModelSpec(targets, lines, member.plan.image_nbytes / link, batch)
