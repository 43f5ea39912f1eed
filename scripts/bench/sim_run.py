"""Replays a trace on simulated devices, event by event, and sums up what readers saw."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.sim_baselines import POLICIES
from bench.sim_device import Device, SimHardware, SimModel
from bench.sim_routing import ROUTERS
from yafsdp_like.inference.fleet.queues import Job, ModelSpec
from yafsdp_like.inference.fleet.schedule import ScheduleOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.sim_traces import TraceRequest
    from yafsdp_like.inference.fleet.reader import Reader, Targets

MARGIN = 0.15  # of the trace at either end: what arrives there is served and not counted
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """Models on devices, and how turns are made."""

    models: dict[str, SimModel]  # by the names of the trace
    hardware: SimHardware
    targets: Targets
    policy: str = "ours"  # of POLICIES
    options: ScheduleOptions = field(default_factory=ScheduleOptions)
    num_devices: int = 1
    num_retries: int = 0  # of a refused request, after the time that it was told
    max_batch: int = 64
    routing: str = "ours"  # of ROUTERS
    num_prefill: int = 0  # of the devices, that only compute prompts; the others only decode. 0: all do both
    max_tokens: int = 2048  # that requests ask for; what they draw is known to nobody before
    kv_link: float = 25e9  # bytes a second of keys and values between two devices, where these differ

    def __post_init__(self) -> None:
        if not 0 <= self.num_prefill < self.num_devices:
            raise ValueError(
                f"expected fewer devices for prompts than there are, {self.num_devices}, found {self.num_prefill}"
            )


@dataclass
class Outcome:
    """What became of one request."""

    asked: TraceRequest
    reader: Reader | None = None  # of one that was admitted and has ended
    num_refused: int = 0
    told_s: float = 0.0  # to wait, the last time
    prompt: Reader | None = None  # of one that has its first token, and waits for a device that decodes

    @property
    def share_in_time(self) -> float:
        """The share of the reader's time within targets; 0 of a request that was refused."""
        return 0.0 if self.reader is None else self.reader.share_in_time


class Simulation:
    """One replay of a trace: ``run`` once, then ``figures``."""

    def __init__(self, scenario: Scenario, asked: Sequence[TraceRequest]) -> None:
        self._scenario = scenario
        self._outcomes = [Outcome(each) for each in asked]
        link, more_s = scenario.hardware.link, scenario.hardware.switch_s
        found = {
            name: ModelSpec(
                scenario.targets,
                model.lines,
                model.weights_nbytes / link + more_s,
                scenario.max_batch,
                kv_nbytes=model.kv_nbytes,
                home=model.home,
            )
            for name, model in scenario.models.items()
        }
        policy = POLICIES[scenario.policy]
        self.devices = [
            Device(policy(found, scenario.options), scenario.models, scenario.hardware, partial(self._finish, index))
            for index in range(scenario.num_devices)
        ]
        self._numbers = itertools.count()
        self._arrivals: list[tuple[float, int, int]] = []  # when, and of which outcome
        self._ended_at = 0.0

    def _finish(self, device_index: int, job: Job, reader: Reader) -> None:
        outcome = self._outcomes[int(job.id)]
        if device_index >= self._scenario.num_prefill or outcome.asked.num_tokens == 1:
            outcome.reader = reader
            return
        outcome.prompt = reader  # its keys and values now go to a device that decodes
        kv_nbytes = self._scenario.models[job.model].kv_nbytes * job.num_prompt_tokens
        at = reader.last_at + kv_nbytes / self._scenario.kv_link
        heapq.heappush(self._arrivals, (at, next(self._numbers), int(job.id)))

    def run(self) -> Simulation:
        """Serve all requests to the end."""
        arrivals, numbers = self._arrivals, self._numbers
        arrivals += [(outcome.asked.at, next(numbers), index) for index, outcome in enumerate(self._outcomes)]
        ends: list[tuple[float, int, int]] = []  # of what is under way on a device; those that are not true are skipped
        while arrivals or ends:
            if arrivals and (not ends or arrivals[0][0] <= ends[0][0]):
                now, _, index = heapq.heappop(arrivals)
                device_index, retry_s = self._arrive(index, now)
                if retry_s is not None:
                    heapq.heappush(arrivals, (now + retry_s, next(numbers), index))
            else:
                now, _, device_index = heapq.heappop(ends)
                if self.devices[device_index].next_event != now:
                    continue
            device = self.devices[device_index]
            before = device.next_event
            device.advance(now)
            if device.next_event < math.inf and (device.next_event != before or before != now):
                heapq.heappush(ends, (device.next_event, next(numbers), device_index))
            self._ended_at = max(self._ended_at, now)
        return self

    def _arrive(self, index: int, now: float) -> tuple[int, float | None]:
        """Give a request to a device, and return which; and when it comes again, if it does."""
        outcome, asked, split = self._outcomes[index], self._outcomes[index].asked, self._scenario.num_prefill
        job = Job(str(index), asked.model, asked.num_prompt_tokens, self._scenario.max_tokens, asked.tenant)
        first = 0 if outcome.prompt is None else split
        able = self.devices[first:split] if split and not first else self.devices[first:]
        order = [first + place for place in ROUTERS[self._scenario.routing](able, job)] if len(able) > 1 else [first]
        if outcome.prompt is not None:
            self.devices[order[0]].resume(job, asked.num_tokens - 1, now, outcome.prompt)
            return order[0], None
        waits_s = []
        for device_index in order:
            refusal = self.devices[device_index].arrive(job, 1 if split else asked.num_tokens, now)
            if refusal is None:
                return device_index, None
            waits_s.append(refusal.retry_after_s)
        outcome.num_refused += 1
        outcome.told_s = min(waits_s)
        return order[0], outcome.told_s if outcome.num_refused <= self._scenario.num_retries else None

    def figures(self) -> Figures:
        """Return what readers saw, as ``readers_saw`` does, and what the devices did."""
        counts = [device.counts for device in self.devices]
        total_s = self._ended_at * len(self.devices) or 1.0
        return {
            **readers_saw(self._outcomes),
            "switches_per_s": round(sum(count.num_switches for count in counts) / total_s, 4),
            "utilization": {
                name: round(sum(getattr(count, f"{name}_s") for count in counts) / total_s, 4)
                for name in ("prefill", "decode", "switching")
            },
            "tokens_per_s": round(sum(count.num_decoded for count in counts) / self._ended_at, 2),
            "longest_wait_for_a_turn_s": round(max(count.longest_wait_s for count in counts), 3),
            "seconds": round(self._ended_at, 3),
        }


def readers_saw(outcomes: Sequence[Outcome]) -> Figures:
    """Return what the readers of requests saw that arrived in the middle of a trace; refused ones saw nothing.

    Raises ValueError where there are none.
    """
    seconds = max((outcome.asked.at for outcome in outcomes), default=0.0)
    low, high = MARGIN * seconds, (1 - MARGIN) * seconds
    counted = [outcome for outcome in outcomes if low <= outcome.asked.at <= high]
    if not counted:
        raise ValueError(
            f"expected requests in the middle of the trace, from {low:.1f} to {high:.1f} s, found none: give more "
            "seconds, models, or requests a second"
        )
    served = [outcome for outcome in counted if outcome.reader is not None]
    refused = [outcome for outcome in counted if outcome.reader is None]
    readers = [outcome.reader for outcome in served if outcome.reader is not None]
    return {
        "num_requests": len(counted),
        "num_refused": len(refused),
        "share_of_time": _mean([outcome.share_in_time for outcome in counted]),
        "share_of_time_admitted": _mean([outcome.share_in_time for outcome in served]),
        "share_of_requests": _mean([outcome.reader is not None and not outcome.reader.num_late for outcome in counted]),
        "share_of_requests_admitted": _mean([not reader.num_late for reader in readers]),
        "first_token_s": _percentiles([reader.first_at - reader.arrived for reader in readers if reader.first_at]),
        "per_token_s": _percentiles(
            [(r.last_at - r.first_at) / (r.num_tokens - 1) for r in readers if r.first_at and r.num_tokens > 1]
        ),
        "retry_after_s": _percentiles([outcome.told_s for outcome in refused]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(math.fsum(values) / len(values), 5) if values else None


def _percentiles(values: Sequence[float]) -> Mapping[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
