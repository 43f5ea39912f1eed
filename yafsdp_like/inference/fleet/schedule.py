"""Which model of a device runs next, for how many steps, what is prefetched, and who is refused.

A pure object: it is told of arrivals, steps, switches and ends with their times, and asked for the next turn. Servers
and simulators ask it alike; a server, whose steps may decode and compute parts of prompts at once, tells it of a step
with ``drew`` and ``spent``, a simulator, which does one thing at a time, with ``prefilled`` and ``decoded``.

[Note: turns of models]
Only one model computes at a time, and changing it costs what copying its weights takes beyond what a prefetch hides. A
turn is: prompts of the model that wait, a bounded group in order of arrival, then a *quota* of steps that decode all of
its requests. Between turns a request lives on slack, the time until its next token is due (``reader.py``): ``q`` steps
buy ``q * tpot`` of it. So if models with loads ``u = step / tpot`` are to be served in rounds of ``R`` seconds with
switches of ``C`` seconds in all, ``R * sum(u) + C <= R``: rounds of ``C / (1 - sum(u))`` are the shortest in which all
can be in time. ``R`` is twice that, so that turns need not be exact, and at most ``max_round`` of the shortest
``ttft``, or all of it where switches are slow. A quota is ``R / tpot`` steps, and the model whose slack ends first is
next: one that has slack left is left out of a round. (Aegaeon, SOSP 2025, ``decode_scheduler.py`` of its artifact,
serves every model once a round, for quotas in seconds with which all miss their targets alike.)

[Note: who is served when not all can be]
A step takes nearly as long for one request as for ten, so under overload time goes where it keeps most readers from
stalling: each model that would run dry within ``R`` has a need in seconds and a worth, the seconds of reading that it
saves; the first token of a request that is in time yet is worth its ``ttft``. Models are taken by worth over need until
their needs fill ``R``; of these, the one whose token is due first runs. Below capacity that is all of them, and the
order is earliest deadline first: the weights adapt to the load by themselves. Worth is divided between tenants by their
weights, each tenant's equally between its requests, so that many requests of one tenant outweigh no other tenant.

[Note: nobody starves]
A model that has waited ``patience`` times its ``ttft`` for a turn comes first, the one that has waited longest before
others. With ``N`` models and turns of at most ``T`` seconds every model has a turn within ``patience * ttft + N * T``,
and the oldest waiting request is in its first group if the batch has room. A turn takes at most a switch, one group,
its quota of at most ``R`` (or one step), one more group, since prompts that come during it are taken off its steps, and
what is left of the copy of the next model's weights, for which the device would be idle otherwise. Where steps decode
and compute prompts at once, each counts as one of the quota, however long it takes: a turn is longer by its prompts.

[Note: one turn ahead]
What is prefetched runs next, unless another model is overdue or the one that runs should go on: a choice made again at
the end of a turn would as often as not be another one, and its copy visible. This costs a new request at most a turn.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yafsdp_like.inference.fleet.admission import refusal
from yafsdp_like.inference.fleet.queues import ModelQueue, OpenRequest
from yafsdp_like.inference.fleet.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from yafsdp_like.inference.fleet.admission import Refusal
    from yafsdp_like.inference.fleet.queues import Job, ModelSpec

_ROUND = 4.0  # times all switches, that the longest round is where these are slow: they then take a fifth of the time
_SPARE = 2.0  # how many times the shortest round one is, so that turns need not be exact
_EARLY = 0.6  # of its ttft, by which a first token is aimed to come before it is due


@dataclass(frozen=True)
class ScheduleOptions:
    """How turns are made. Raises ValueError for values out of range."""

    group_size: int = 8  # requests whose prompts are computed together
    group_tokens: int = 8192  # of these prompts; a longer one is alone
    min_round: float = 0.05  # of the shortest ttft: slack that a turn buys at least
    max_round: float = 0.4  # of the shortest ttft: slack that a turn buys at most, unless switches are slow
    patience: float = 3.0  # times its ttft, after which a model's turn comes first
    admission_load: float | None = 1.0  # of a device, above which requests are refused; None: none is
    memory_nbytes: float = math.inf  # of a device, for weights of models with requests, and their keys and values
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # 1 where none is given

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.group_tokens < 1:
            raise ValueError(f"expected groups of at least one request and token, found {self}")
        if not 0 < self.min_round <= self.max_round <= 1 or self.patience <= 0:
            raise ValueError(f"expected 0 < min_round <= max_round <= 1 and a patience above 0, found {self}")
        if self.admission_load is not None and self.admission_load <= 0:
            raise ValueError(f"admission_load must be above 0, found {self.admission_load}")
        if min(self.tenant_weights.values(), default=1.0) <= 0:
            raise ValueError(f"weights of tenants must be above 0, found {dict(self.tenant_weights)}")


@dataclass(frozen=True)
class Turn:
    """What runs next: prompts of these requests, or up to so many steps that decode; and what to bring meanwhile."""

    model: str
    prefill: tuple[str, ...]  # ids, in order of arrival
    num_steps: int  # that decode; 0 with prompts
    prefetch: str | None  # the model that is next as things stand


@dataclass
class _Current:
    queue: ModelQueue
    num_steps: int  # that are left
    num_groups: int = 0  # of prompts, so far
    prefetch: str | None = None


class TokenScheduler:
    """Turns of the models of one device; see [Note: turns of models]. Work of a call is O(requests under way)."""

    def __init__(self, models: Mapping[str, ModelSpec], options: ScheduleOptions | None = None) -> None:
        self.options = options or ScheduleOptions()
        self.queues = {name: ModelQueue(name, spec) for name, spec in models.items()}
        self._tenants: dict[str, int] = {}  # how many requests of each are under way
        self._current: _Current | None = None
        self._ready: dict[str, float] = {}  # when weights that are on their way will be there

    # --- told ---

    def arrived(self, job: Job, now: float) -> Refusal | None:
        """Take a request, or return why its targets, or those of others, would be missed, and when to come again."""
        found = self.refusal(job)
        if found is None:
            self.take(job, now)
        return found

    def refusal(self, job: Job) -> Refusal | None:
        """Return why a request would be refused now, and when to come again; None if it would not."""
        if self.options.admission_load is None:
            return None
        limit, memory_nbytes = self._limit(job.tenant), self.options.memory_nbytes
        return refusal(job, self._working(), self.queues[job.model], limit, memory_nbytes)

    def take(self, job: Job, now: float) -> None:
        """Take a request, whatever becomes of targets."""
        queue = self.queues[job.model]
        if not queue.has_work:
            queue.waits_since = now
        queue.waiting[job.id] = OpenRequest(job, Reader(queue.targets, now))
        self._tenants[job.tenant] = self._tenants.get(job.tenant, 0) + 1

    def switched(self, model: str, seconds: float) -> None:
        """Learn for how long a turn's first step waited for the model's weights."""
        self.queues[model].note_switch(seconds)

    def copying(self, model: str, ready_at: float) -> None:
        """Note when weights that are prefetched will be there; a turn that ends before goes on until then."""
        self._ready[model] = ready_at

    def prefilled(self, model: str, request_ids: Iterable[str], began: float, ended: float) -> None:
        """Take the first tokens of these requests, which came together at ``ended``."""
        queue = self.queues[model]
        found = [queue.find(request_id) for request_id in request_ids]
        for request in found:
            request.reader.deliver(ended)
            queue.start(request.job.id)
        queue.times.learn_prefill(sum(request.job.num_prompt_tokens for request in found), ended - began)
        if self._current is not None and self._current.queue is queue:
            self._current.num_groups += 1
            if self._current.num_groups > 1:  # see [Note: nobody starves]
                self._current.num_steps -= math.ceil((ended - began) / queue.step_s)

    def decoded(self, model: str, num_steps: int, began: float, ended: float) -> None:
        """Take ``num_steps`` tokens of each of the model's requests that decode, evenly spaced."""
        queue = self.queues[model]
        spacing_s = (ended - began) / num_steps
        num_keys = sum(request.num_keys for request in queue.running.values())
        if spacing_s > 0:
            queue.times.learn_decode(len(queue.running), num_keys, spacing_s)
        for request in queue.running.values():
            request.reader.deliver(began + spacing_s, num_steps, spacing_s)
        self.spent(model, num_steps)

    def drew(
        self, model: str, request_ids: Collection[str], began: float, ended: float, num_prompt_tokens: int = 0
    ) -> None:
        """Take one token of each of these requests, from a step that may have decoded and computed prompts at once.

        ``num_prompt_tokens``: those that the step computed, whether their prompts are complete with it or not. A step
        of no time says nothing of times.
        """
        queue, num_keys = self.queues[model], 0
        for request_id in request_ids:
            request = queue.find(request_id)
            num_keys += request.num_keys
            request.reader.deliver(ended)
            if request_id in queue.waiting:
                queue.start(request_id)
        if num_prompt_tokens and ended > began:
            queue.times.learn_prefill(num_prompt_tokens, ended - began)
        elif request_ids and ended > began:
            queue.times.learn_decode(len(request_ids), num_keys, ended - began)

    def spent(self, model: str, num_steps: int = 1) -> None:
        """Take steps off the turn of a model, whatever they computed."""
        if self._current is not None and self._current.queue.name == model:
            self._current.num_steps -= num_steps

    def ended(self, model: str, request_id: str, was_cancelled: bool = False) -> Reader:
        """Forget a request that has drawn its last token, or that nobody reads any more; return its reader."""
        queue = self.queues[model]
        request = queue.end(request_id)
        if not was_cancelled:
            queue.times.learn_length(request.reader.num_tokens)
        tenant = request.job.tenant
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        if not queue.has_work:
            queue.waits_since = math.inf
        return request.reader

    # --- asked ---

    def next(self, now: float, able: Collection[str] | None = None) -> Turn | None:
        """Return what runs now; None without requests. Changes nothing but whose turn it is.

        ``able``: the models whose weights can be had; None: all.
        """
        working = [queue for queue in self._working() if able is None or queue.name in able]
        if not working:
            self._current = None
            return None
        current = self._current
        if current is not None and current.num_steps <= 0:
            self._extend(current, now)
        if current is None or current.num_steps <= 0 or current.queue not in working:
            current = self._begin(working, now)
        queue = current.queue
        if current.prefetch is None or self.queues[current.prefetch] not in working:
            others = [other for other in working if other is not queue]
            current.prefetch = self._choose(others, now).name if others else None
        group = self.group(queue)
        steps = 0 if group else max(1, current.num_steps)
        return Turn(queue.name, tuple(request.job.id for request in group), steps, current.prefetch)

    def group(self, queue: ModelQueue) -> list[OpenRequest]:
        """Return the requests of a model whose prompts are computed next; none: it decodes.

        The oldest one first, then those of tenants that have the least in relation to their weights.
        """
        room = min(self.options.group_size, queue.spec.max_batch - len(queue.running))
        found: list[OpenRequest] = []
        num_tokens = 0
        for request in self._fairly(queue):
            num_tokens += request.job.num_prompt_tokens
            if len(found) >= room or (found and num_tokens > self.options.group_tokens):
                break
            found.append(request)
        return found

    def _fairly(self, queue: ModelQueue) -> Iterator[OpenRequest]:
        """Yield the waiting requests of a model as tenants' shares of the batch ask for."""
        by_tenant: dict[str, deque[OpenRequest]] = {}
        for request in queue.waiting.values():
            by_tenant.setdefault(request.job.tenant, deque()).append(request)
        if len(by_tenant) < 2:
            yield from queue.waiting.values()
            return
        weights, has = self.options.tenant_weights, Counter(each.job.tenant for each in queue.running.values())
        tenant = next(iter(queue.waiting.values())).job.tenant  # of the oldest
        while by_tenant:
            yield by_tenant[tenant].popleft()
            has[tenant] += 1
            if not by_tenant[tenant]:
                del by_tenant[tenant]
            tenant = min(by_tenant, key=lambda name: has[name] / weights.get(name, 1.0), default="")

    def _working(self) -> list[ModelQueue]:
        return [queue for queue in self.queues.values() if queue.has_work]

    def _begin(self, working: Sequence[ModelQueue], now: float) -> _Current:
        """Begin another turn; the model whose turn it was waits from now on, if it has work."""
        last = self._current
        if last is not None and last.queue.has_work:
            last.queue.waits_since = now
        queue = self._choose(working, now)
        goes_on = last is not None and queue is last.queue
        if last is not None and last.prefetch is not None and not goes_on and not self._is_overdue(queue, now):
            prefetched = self.queues[last.prefetch]
            queue = prefetched if prefetched in working else queue
        queue.waits_since = math.inf
        self._current = _Current(queue, self.quota(queue, working))
        return self._current

    def _is_overdue(self, queue: ModelQueue, now: float) -> bool:
        return now - queue.waits_since > self.options.patience * queue.targets.ttft_s

    def _extend(self, current: _Current, now: float) -> None:
        """Go on while the weights of the next model are on their way, once a turn: the device would be idle."""
        ready_at = self._ready.pop(current.prefetch, now) if current.prefetch is not None else now
        if ready_at > now and current.queue.running:
            current.num_steps = math.floor((ready_at - now) / current.queue.step_s)

    # --- policy ---

    def quota(self, queue: ModelQueue, working: Sequence[ModelQueue]) -> int:
        """Return the steps of a turn, which buy a round of slack; see [Note: turns of models]."""
        return math.ceil(self._round_s(working) / queue.targets.tpot_s)

    def _round_s(self, working: Sequence[ModelQueue]) -> float:
        """Return the slack that each model should have after its turn."""
        shortest_s = min(queue.targets.ttft_s for queue in working)
        load = sum(queue.load for queue in working)
        switches_s = sum(queue.switch_s for queue in working) if len(working) > 1 else 0.0
        high = max(self.options.max_round * shortest_s, min(_ROUND * switches_s, shortest_s))
        return (
            high if load >= 1 else min(max(_SPARE * switches_s / (1 - load), self.options.min_round * shortest_s), high)
        )

    def _choose(self, working: Sequence[ModelQueue], now: float) -> ModelQueue:
        """Return the model whose turn is next; see [Note: who is served when not all can be]."""
        overdue = [queue for queue in working if self._is_overdue(queue, now)]
        if overdue:
            return min(overdue, key=lambda queue: queue.waits_since)
        round_s = self._round_s(working)
        needy = [(queue, *self._need(queue, now, round_s)) for queue in working]
        needy = [entry for entry in needy if entry[2] > 0]
        needy.sort(key=lambda entry: -entry[2] / entry[1])
        taken: list[ModelQueue] = []
        left_s = round_s
        for queue, need_s, _ in needy:
            if need_s <= left_s or not taken:
                taken.append(queue)
                left_s -= need_s
        return min(taken or working, key=lambda queue: self._urgency(queue, now))

    def _urgency(self, queue: ModelQueue, now: float) -> float:
        """Return when a turn should begin: a first token is aimed to come well before it is due."""
        early_s = _EARLY * queue.targets.ttft_s
        dues = [request.reader.due for request in queue.running.values()]
        dues += [request.reader.due - early_s * (request.reader.due >= now) for request in queue.waiting.values()]
        return min(dues)

    def _need(self, queue: ModelQueue, now: float, round_s: float) -> tuple[float, float]:
        """Return the seconds that a turn of a model takes, and the seconds of reading that it saves within a round."""
        end, ttft_s = now + round_s, queue.targets.ttft_s
        worth_s = 0.0
        for request in queue.running.values():
            if request.reader.due < end:
                worth_s += self._weight(request) * min(round_s, end - request.reader.due)
        for request in queue.waiting.values():
            if request.reader.due - _EARLY * ttft_s < end:
                worth_s += self._weight(request) * (round_s if request.reader.due < now else ttft_s)
        lacks_s = min(round_s, max(0.0, end - queue.due))
        steps = math.ceil(lacks_s / queue.targets.tpot_s)
        return queue.switch_s + queue.prefill_s(self.group(queue)) + steps * queue.step_s, worth_s

    def _weight(self, request: OpenRequest) -> float:
        """Return what a request counts: its tenant's weight, divided by the tenant's requests."""
        tenant = request.job.tenant
        return self.options.tenant_weights.get(tenant, 1.0) / self._tenants[tenant]

    def _limit(self, tenant: str) -> float:
        """Return the load above which a tenant's request is refused: less for one that has more than its share."""
        limit = self.options.admission_load
        assert limit is not None
        others = self._tenants.keys() - {tenant}
        if not others:
            return limit
        weights = self.options.tenant_weights
        share = weights.get(tenant, 1.0) / sum(weights.get(name, 1.0) for name in (*others, tenant))
        has = self._tenants.get(tenant, 0) / sum(self._tenants.values())
        return limit if has <= share else limit * min(1.0, share / has) ** 0.25
