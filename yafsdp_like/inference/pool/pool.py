"""Serves many models on one device: each sleeps in host memory, and wakes when it has requests.

    plan = plan_pool({"large": PooledModel(config), ...}, PoolOptions(memory_limit_nbytes=...))
    pool = ModelPool(plan, {"large": open_model("directory"), ...}, "cuda")
    pool.start_loading("large")  # beside the steps of others; requests of a model that is not loaded wait for it
    pool.generate({"large": [Request("a", prompt=(1, 2, 3))]})

All memory is allocated, all kernels are compiled and all steps recorded when the pool is made. Switching then moves
ownership of slabs, and copies weights one way.

[Note: turns]
Models whose homes do not meet are awake together, and step in turn. One that must take memory of models with work, the
bytes of their weights or of pages in its home, waits for ``max_turn_steps`` of their steps, and is prefetched
meanwhile, into slabs that hold no page in use. Idle models lose their memory as soon as another needs it, those that
have been idle for longest first. Models with targets have turns by the slack of their readers instead (`fleet/`).

Of a pool over several ranks each rank has one, and all make the same calls, but for those that only look
(``ranks.py``, [Note: ranks of a pool]).

Not safe for threads: one thread calls everything. After ``close`` every call raises RuntimeError.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from yafsdp_like.inference.engine.collector import collector_paused
from yafsdp_like.inference.engine.request import FinishReason
from yafsdp_like.inference.kv.kv_cache import Tier, check_integrity
from yafsdp_like.inference.kv.occupancy import Stretch, occupancy
from yafsdp_like.inference.kv.slabs import check
from yafsdp_like.inference.pool.completions import complete
from yafsdp_like.inference.pool.host_weights import HostWeights, ModelUnavailableError
from yafsdp_like.inference.pool.loads import Loads
from yafsdp_like.inference.pool.member import Member, ModelFigures, ModelState, Switch
from yafsdp_like.inference.pool.memory import PoolMemory
from yafsdp_like.inference.pool.plan import HOST_WEIGHTS, SLABS, PoolPlan
from yafsdp_like.inference.pool.ranks import PoolRanks
from yafsdp_like.inference.pool.turns import turns_of
from yafsdp_like.inference.weights.loading import indexed
from yafsdp_like.memory.streams import streams_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from yafsdp_like.comm.transport import Transport
    from yafsdp_like.inference.engine.engine import Engine
    from yafsdp_like.inference.engine.request import Completion, Request, RequestOutput
    from yafsdp_like.inference.fleet.reader import Targets
    from yafsdp_like.inference.weights.loading import Model

_PREFETCHED_AT_ONCE = 3  # units on their way, for which steps must wait if their slabs are taken back


class ModelPool:
    """Many models, their memory and their requests, on one device; see [Note: turns]."""

    def __init__(
        self,
        plan: PoolPlan,
        models: Mapping[str, Model],
        device: torch.device | str = "cpu",
        targets: Mapping[str, Targets] | None = None,
        transport: Transport | None = None,
    ) -> None:
        """Allocate all that ``plan`` says; ``models`` are where values come from, by the names of the plan.

        ``targets`` of all models, or none: turns are then counted in steps. ``transport`` is that of ranks which the
        plan says map each other's memory. No value is read before ``load``. Raises ValueError where the plan has other
        models or ranks, and what ``Arena.reserve`` does where there is no room.
        """
        if models.keys() != plan.models.keys():
            raise ValueError(f"expected the plan's models, {[*plan.models]}, found {[*models]}")
        for name, model in models.items():
            if model.config != (planned := plan.models[name].serving.config):
                raise ValueError(f"{name}: expected the model that was planned, {planned}, found {model.config}")
        self.ranks = PoolRanks.of(plan.num_ranks)
        self.ranks.check_same("the plans of pools", (str(plan), plan.options, targets))
        self.plan, self.device, self.tp_group = plan, indexed(device), self.ranks.tp_group
        memory = PoolMemory.reserve(plan, self.device, self.ranks, transport)
        self.arena, self.host, self._regions, self._pools = memory.arena, memory.host, memory.regions, memory.pools
        self.switches: deque[Switch] = deque(maxlen=1024)
        self.num_steps = 0
        self._loads = Loads(HostWeights(self.host.place(HOST_WEIGHTS)), self.device, self.ranks)
        streams = streams_of(self.device)
        self._members = {
            name: memory.member(each, models[name], streams, partial(self._make_room, name))
            for name, each in plan.models.items()
        }
        self._outputs: list[tuple[str, RequestOutput]] = []  # of models that were suspended, or could not be loaded
        self._may_prefetch, self._is_closed = True, False
        self.turns = turns_of(self._members, targets, plan.options, self.ranks)

    # --- where weights are ---

    def states(self) -> dict[str, ModelState]:
        """Return where the weights of each model are."""
        self._look()
        return {name: member.state for name, member in self._members.items()}

    def is_awake(self, name: str) -> bool:
        """Return whether a model is awake, or waking."""
        return self._find(name).is_awake

    def is_loaded(self, name: str) -> bool:
        """Return whether a model is in host memory, whole, as the last ``step`` or ``states`` has found it."""
        return self._find(name).image is not None

    def failures(self) -> dict[str, str]:
        """Return why models have failed to load, by name."""
        self._look()
        return {name: words for name, member in self._members.items() if (words := member.failure_words)}

    def figures(self) -> dict[str, ModelFigures]:
        """Return how much of each model is loaded, and what its switches took."""
        self._look()
        for member in self._members.values():
            member.note_arrival()
        return {name: member.figures for name, member in self._members.items()}

    def occupancy(self) -> list[Stretch]:
        """Return who has which of the planned bytes on the device now, in the order of addresses."""
        self._check_open()
        owners = {slab: name for name, member in self._members.items() for slab in member.residence.owned}
        return occupancy(self.plan.memory.regions, SLABS, self._pools[Tier.DEVICE], owners)

    def engine(self, name: str) -> Engine:
        """Return the engine of a model, whose options and metrics may be read; its calls are the pool's to make."""
        return self._find(name).engine

    def start_loading(self, name: str) -> None:
        """Begin to read a model's weights into host memory, unless they are there or on their way.

        Steps of other models go on meanwhile; what becomes of it is in ``states``. A model that has failed is tried
        again. Raises HostFullError, with the numbers, where there is no room.
        """
        member = self._find(name)
        self._settle()
        self._loads.start(member, self._members.values(), on_demand=False)

    def load(self, name: str, watch: Callable[[ModelFigures], object] = lambda figures: None) -> None:
        """Read a model's weights into host memory, unless they are there, and return once they are.

        ``watch`` is called meanwhile, and at the end. Raises HostFullError where there is no room, and what reading
        raises; nothing is changed then.
        """
        member = self._find(name)
        self._settle()
        self._loads.start(member, self._members.values(), on_demand=False, waits=True)
        self._loads.wait(member, lambda: watch(member.figures))
        self._settle()
        watch(member.figures)
        if member.failure is not None:
            raise member.failure

    def load_all(
        self, watch: Callable[[str, ModelFigures], object] = lambda name, figures: None
    ) -> dict[str, Exception]:
        """Load all models, one after the other, and return why those that are not there could not be."""
        self._check_open()
        failed: dict[str, Exception] = {}
        for name in self._members:
            try:
                self.load(name, partial(watch, name))
            except Exception as error:
                failed[name] = error
        return failed

    def unload(self, name: str) -> None:
        """Take a model from device and host, prefixes too: what is loaded next under its name may have other values.

        One that is loading is loaded no further; its bytes are free once the parameter that is being read is there.
        Raises ValueError while it has requests.
        """
        member = self._find(name)
        if member.engine.has_requests:
            raise ValueError(f"model {name!r} has requests: cancel them, or wait for their end, before it is unloaded")
        self._loads.cancel(member)
        member.failure = None
        if member.image is not None:
            self._sleep(member)
            member.residence.forget()
            member.engine.forget_prefixes()
            self._loads.drop(member)
        self._settle()

    def _settle(self) -> None:
        """Take in which copies and loads have ended; requests of models that have failed end, too."""
        self._check_open()
        self.ranks.note_arrivals(member.weights for member in self._members.values())
        for failed in self._loads.settle(self._members.values()):
            for output in failed.engine.end_all(FinishReason.FAILED):
                self._outputs.append((failed.name, replace(output, error=failed.failure_words)))

    def _look(self) -> None:
        """Take in what has ended where no other rank is to be asked, for calls that ranks make on their own."""
        self._settle() if self.ranks.is_alone else self._check_open()

    @property
    def has_news(self) -> bool:
        """Whether a load is over that the next ``step`` may take in, with all ranks."""
        self._check_open()
        return self._loads.has_ended(self._members.values())

    def wake_up(self, name: str) -> Switch:
        """Wake a model, which is loaded first if it is not; those that are in its way sleep from then on.

        Returns once all copies are issued: steps that follow wait for them on the device.
        """
        member = self._find(name)
        self.load(name)
        if member.is_awake:
            return Switch(name, 0, 0)
        woken_at = time.monotonic()
        in_the_way = [other for other in self._awake() if other.plan.meets(member.plan)]
        for other in self._members.values():
            if not other.is_awake and other is not member:
                other.residence.let_go()  # what was prefetched
        others = [other for other in self._by_idleness() if other not in in_the_way]
        while others and not self._leaves_pages([*others, member]):
            in_the_way.append(others.pop(0))
        for other in in_the_way:
            self._sleep(other)
        nbytes = self._copy_in(member)
        member.is_awake, self._may_prefetch = True, True
        member.num_wakes, member.woken_at = member.num_wakes + 1, woken_at
        self.switches.append(Switch(name, nbytes, len(in_the_way)))
        return self.switches[-1]

    def sleep(self, name: str, keep: bool = True) -> None:
        """Let a model sleep: its weights stay on the host, its sequences wait, its pages stay while nobody needs them.

        Nothing is copied but pages that are swapped out. A model with requests wakes again in its turn. With ``keep``
        it then finds those weights again that nobody has overwritten; else all are copied.
        """
        member = self._find(name)
        self._sleep(member)
        if not keep:
            member.residence.forget()

    def prefetch(self, name: str) -> int:
        """Bring what has room of a loaded model that sleeps, beside those that are awake; return the bytes issued.

        Some units at a time: every ``step`` copies more of the model that was prefetched last.
        """
        member = self._find(name)
        self._settle()
        return self._prefetch(member)

    def _prefetch(self, member: Member) -> int:
        if member.image is None or member.is_awake or any(o.plan.meets(member.plan) for o in self._awake()):
            return 0
        return member.residence.copy_in(_PREFETCHED_AT_ONCE)

    def _find(self, name: str) -> Member:
        self._check_open()
        if name not in self._members:
            raise ValueError(f"expected one of the models {[*self._members]}, found {name!r}")
        return self._members[name]

    def _awake(self) -> list[Member]:
        return [member for member in self._members.values() if member.is_awake]

    def _by_idleness(self) -> list[Member]:
        """Return models that are awake: those without work first, and those that stepped longest ago."""
        return sorted(self._awake(), key=lambda member: (member.engine.has_work, member.last_step))

    def _leaves_pages(self, awake: Iterable[Member]) -> bool:
        """Whether beside such models the longest sequence of any of them fits."""
        awake = list(awake)
        slabs = {slab for member in awake for slab in member.plan.home}
        return len(slabs) + max(self.plan.least_slabs(member.name) for member in awake) <= self.plan.grid.num_slabs

    def _copy_in(self, member: Member) -> int:
        """Copy all that a model lacks, and return the bytes; sequences with pages in its home are preempted."""
        blocked = member.residence.blocked()
        if blocked:
            for other in self._awake():
                self._suspend(other, blocked)
            blocked = member.residence.blocked()
        assert not blocked, f"slabs {blocked} of {member.name!r} are held, and no model that is awake holds them"
        return member.residence.copy_in()

    def _suspend(self, member: Member, slabs: Iterable[int] | None = None) -> None:
        found = member.engine.suspend(None if slabs is None else set(slabs))
        self._outputs += [(member.name, output) for output in found]

    def _sleep(self, member: Member) -> None:
        if member.is_awake:
            self._suspend(member)
            member.is_awake, member.waits_since = False, self.num_steps
            member.note_arrival()
        member.residence.let_go()

    def _make_room(self, name: str, by_force: bool) -> bool:
        """Free slabs for pages of ``name``: see ``EnginePlaces``."""
        for member in self._members.values():
            if not member.is_awake and member.residence.owned:
                self._may_prefetch = False
                member.residence.let_go()
                return True
        for other in self._by_idleness():
            if other.name != name and (by_force or not other.engine.has_work):
                self._sleep(other)
                return True
        return False

    # --- requests ---

    def add(self, name: str, request: Request) -> None:
        """Take a request of a model; its outputs come from ``step``, once the model is loaded where it is not.

        Where that fails the request's last output says why, with ``FinishReason.FAILED``. Pages of a request without a
        tenant are the model's: a floor or a priority for a model is that of a tenant of its name. Raises HostFullError
        where there is no room to load the model, ModelUnavailableError where that has failed before, QueueFullError
        where targets would be missed, and what ``Engine.add`` does.
        """
        member = self._find(name)
        self._settle()
        if member.failure is not None:
            raise ModelUnavailableError(member.failure_words) from member.failure
        member.engine.check(request)
        self.turns.check(name, request)
        begins = self._loads.start(member, self._members.values(), on_demand=True)
        had_work = member.engine.has_work
        try:
            member.engine.take(request if request.tenant else replace(request, tenant=name))
        except Exception:
            if begins:
                self._loads.cancel(member)
            raise
        self.turns.take(name, request)
        if not had_work:
            member.waits_since = self.num_steps

    def cancel(self, name: str, request_id: str) -> None:
        """Cancel a request of a model, wherever it is; its last output comes from ``step``."""
        self._find(name).engine.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do, or to return."""
        self._look()
        return bool(self._outputs) or any(member.engine.has_work for member in self._members.values())

    def step(self) -> list[tuple[str, RequestOutput]]:
        """Make one step of one model, waking it in its turn, and return outputs with their models' names.

        Where there are only models that are being loaded, for requests or on other ranks, wait for them a little.
        """
        self._settle()
        for each in self._members.values():
            each.note_arrival()
            if each.engine.has_work:
                self._outputs += [(each.name, output) for output in each.engine.end_requests()]
                if not each.engine.has_requests:
                    self._suspend(each)  # reads, and drops, what its last step drew beyond the ends of requests
        member = self._next()
        if member is not None:
            self.num_steps += 1
            member.last_step = self.num_steps
            self._outputs += [(member.name, output) for output in member.engine.step()]
        elif not self._outputs:
            self._loads.wait_a_little(self._members.values())
        outputs, self._outputs = self._outputs, []
        self.turns.stepped(None if member is None else member.name, outputs)
        return outputs

    def _next(self) -> Member | None:
        """Return the model that steps now; see [Note: turns]."""
        found = self.turns.next(
            self.wake_up, lambda name: self._prefetch(self._members[name]) if self._may_prefetch else 0
        )
        if found is not None:
            return found
        waiting = [m for m in self._members.values() if m.engine.has_work and m.image is not None and not m.is_awake]
        if waiting:
            self._advance(min(waiting, key=lambda member: member.waits_since))
        working = [member for member in self._awake() if member.engine.has_work]
        return min(working, key=lambda member: (member.weights.is_arriving(), member.last_step), default=None)

    def _advance(self, member: Member) -> None:
        """Wake the model that has waited for longest, or prefetch it until it is its turn."""
        working = [other for other in self._awake() if other.engine.has_work]
        pages = self._pools[Tier.DEVICE]
        is_beside = not (
            any(other.plan.meets(member.plan) for other in working)
            or any(pages.is_held(slab) for slab in member.plan.home)
            or not self._leaves_pages([*working, member])
        )
        has_waited = self.num_steps - member.waits_since >= self.plan.options.max_turn_steps
        if not working or has_waited or is_beside:
            self.wake_up(member.name)
        elif self._may_prefetch:
            self._prefetch(member)

    def generate(self, requests: Mapping[str, Iterable[Request]]) -> dict[str, dict[str, Completion]]:
        """Serve all ``requests`` of each model to the end, and return their completions by model and id.

        Models are loaded first. Raises what ``load`` and ``Engine.add`` do, and RuntimeError while other requests are
        under way, or where ranks have other requests.
        """
        requests = {name: list(found) for name, found in requests.items()}
        timeless = {name: [replace(request, deadline=None) for request in found] for name, found in requests.items()}
        self.ranks.check_same("requests", timeless)  # but for deadlines, which are the first rank's
        if self.has_work:
            raise RuntimeError("generate() returns all outputs, and requests of others are under way: call step()")
        for name in requests:
            self.load(name)
        with collector_paused():
            return complete(requests, self.add, self.step, lambda: self.has_work)

    # --- faults, and the end ---

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every slab is one model's, or its pages are free, cached or referred to.

        O(everything): for when nothing is under way.
        """
        self._check_open()
        owned = sorted(slab for member in self._members.values() for slab in member.residence.owned)
        claimed = sorted(self._pools[Tier.DEVICE].slabs.claimed)
        check(owned == claimed, f"models have slabs {owned}, claimed are {claimed}")
        for member in self._members.values():
            member.engine.check_sequences()
        check_integrity([member.engine.cache for member in self._members.values()])

    def close(self) -> None:
        """Give up loads and wait for all that is under way; harmless twice. Every other call raises from then on."""
        if not self._is_closed:
            self._loads.close(self._members.values())
            for member in self._members.values():
                member.engine.close()
            self._is_closed = True

    def __enter__(self) -> ModelPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this pool of models is closed, and serves nothing any more: make another ModelPool")
