"""One profiled step: what the compute stream did, and what it waited for when it did nothing.

A trace holds kernels, copies and fills of all streams, and the calls that launched them. It is of the GPU's activity
alone: recording PyTorch's operations too would slow the CPU down, which is one of the things to be found out.
"""

import gzip
import json
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from bench.trainee import Trainee
from launch.world import World

NUM_GAPS, NUM_KERNELS = 8, 12  # listed one by one
PHASES = ("forward", "backward", "update")


# --- from a step to a trace ---


def profile_steps(trainee: Trainee, batch: tuple[Tensor, Tensor], trace: Path, world: World) -> str:
    """Run three steps; on rank 0 write the trace of the last, and return what the GPU's streams did in it."""
    if not world.is_first:
        run_steps(trainee, batch, world, after_each=lambda: None)
        return ""
    trace.parent.mkdir(parents=True, exist_ok=True)
    with profile(
        activities=[ProfilerActivity.CUDA if world.device.type == "cuda" else ProfilerActivity.CPU],
        schedule=schedule(wait=1, warmup=1, active=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        acc_events=True,
    ) as profiler:
        run_steps(trainee, batch, world, after_each=profiler.step)
    with gzip.open(trace, "rt") as file:
        return f"profile {trace.name}: {describe(works_of(json.load(file)))}"


def run_steps(trainee: Trainee, batch: tuple[Tensor, Tensor], world: World, after_each: Callable[[], None]) -> None:
    """Run three steps, and call `after_each` behind each of them."""
    for _ in range(3):
        trainee.forward_backward(*batch)
        trainee.update()
        world.synchronize()
        after_each()


# --- what a trace holds ---


@dataclass(frozen=True)
class Work:
    """A kernel, a copy or a fill on a GPU stream, and the call on the CPU that launched it."""

    name: str
    stream: int
    begin_ms: float
    end_ms: float
    launched_ms: float  # when the call began
    thread: int  # that called

    @property
    def ms(self) -> float:
        """Its duration."""
        return self.end_ms - self.begin_ms

    @property
    def computes(self) -> bool:
        """Collectives' kernels may spin for a peer; copies are the copy engines'."""
        return "nccl" not in self.name and not self.name.startswith("Mem")


def works_of(trace: dict[str, Any]) -> list[Work]:
    """The GPU's work in a Chrome trace (times in microseconds), by its beginning."""
    events = trace["traceEvents"]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    works = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launch = launches.get(
                event["args"].get("correlation"), event
            )  # one from before the trace began is not in it
            begin, end, launched = event["ts"], event["ts"] + event["dur"], launch["ts"]
            name, stream, thread = event["name"], event["args"]["stream"], launch["tid"]
            works.append(Work(name, stream, begin / 1e3, end / 1e3, launched / 1e3, thread))
    return sorted(works, key=lambda work: work.begin_ms)


# --- what the compute stream waited for ---


@dataclass(frozen=True)
class Gap:
    """A time in which the compute stream did nothing."""

    before: Work
    after: Work
    beside: dict[str, float]  # other streams' work meanwhile: stream and name -> ms
    alone_ms: float  # nothing ran on any stream

    @property
    def ms(self) -> float:
        """Its duration."""
        return self.after.begin_ms - self.before.end_ms

    @property
    def late_ms(self) -> float:
        """The part of it in which the CPU had not yet launched what comes next."""
        return min(max(self.after.launched_ms - self.before.end_ms, 0.0), self.ms)

    def causes(self) -> dict[str, float]:
        """What went on meanwhile, in ms; several things may at once."""
        return {"CPU late": self.late_ms, **self.beside, "nothing ran": self.alone_ms}


def compute_stream(works: Iterable[Work]) -> int:
    """The stream that computes longest."""
    ms: dict[int, float] = defaultdict(float)
    for work in works:
        ms[work.stream] += work.ms if work.computes else 0.0
    return max(ms, key=lambda stream: ms[stream])


def gaps_of(works: list[Work], stream: int) -> list[Gap]:
    """Where a stream was idle between its first work and its last."""
    others: dict[int, list[Work]] = defaultdict(list)
    for work in works:
        if work.stream != stream:
            others[work.stream].append(work)
    gaps = []
    mine = [work for work in works if work.stream == stream]
    before = mine[0]
    for after in mine[1:]:
        if after.begin_ms > before.end_ms:
            gaps.append(make_gap(before, after, others))
        before = max(before, after, key=lambda work: work.end_ms)
    return gaps


def make_gap(before: Work, after: Work, others: dict[int, list[Work]]) -> Gap:
    """Return the gap between two works of one stream, with the time that other streams were busy in it."""
    beside: dict[str, float] = defaultdict(float)
    covered: list[tuple[float, float]] = []
    for stream, works in others.items():
        index = max(bisect_right(works, before.end_ms, key=lambda work: work.begin_ms) - 1, 0)
        while index < len(works) and works[index].begin_ms < after.begin_ms:
            begin = max(works[index].begin_ms, before.end_ms)
            end = min(works[index].end_ms, after.begin_ms)
            if begin < end:
                beside[f"stream {stream} {works[index].name}"] += end - begin
                covered.append((begin, end))
            index += 1
    return Gap(before, after, dict(beside), after.begin_ms - before.end_ms - union_ms(covered))


def union_ms(spans: list[tuple[float, float]]) -> float:
    """Time that at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def phase_of(works: list[Work]) -> Callable[[Work], str]:
    """Tells forward, backward and update apart by who launched: autograd launches from a thread of its own."""
    main = min(works, key=lambda work: work.launched_ms).thread
    backward = [work.launched_ms for work in works if work.thread != main]
    if not backward:
        return lambda work: PHASES[0]
    first, last = min(backward), max(backward)
    return lambda work: PHASES[(work.launched_ms >= first) + (work.launched_ms > last)]


# --- in words ---


def describe(works: list[Work]) -> str:
    """The compute stream's time by phase, what it waited for, its longest gaps, and the busiest kernels of all."""
    if not works:
        return "no work on a GPU"
    stream = compute_stream(works)
    mine = [work for work in works if work.stream == stream]
    gaps = gaps_of(works, stream)
    phase = phase_of(works)
    span_ms, idle_ms = max(work.end_ms for work in mine) - mine[0].begin_ms, sum(gap.ms for gap in gaps)
    return "\n".join(
        [
            f"stream {stream} busy {span_ms - idle_ms:.2f} ms, idle {idle_ms:.2f} ms of {span_ms:.2f} ms",
            *describe_phases(mine, gaps, phase),
            f"  idle while: {describe_causes(sum_of_causes(gaps))}",
            *describe_gaps(gaps, mine[0].begin_ms, phase),
            *describe_busiest(works),
        ]
    )


def describe_phases(mine: list[Work], gaps: list[Gap], phase: Callable[[Work], str]) -> list[str]:
    """Busy and idle time, and how long before its start a work was launched: near 0, the GPU waits for the CPU."""
    lines = []
    for name in PHASES:
        works = [work for work in mine if phase(work) == name]
        if works:
            idle_ms = sum(gap.ms for gap in gaps if phase(gap.after) == name)
            ahead = [work.begin_ms - work.launched_ms for work in works]
            lines.append(
                f"  {name:8} busy {sum(work.ms for work in works):9.3f} ms, idle {idle_ms:8.3f} ms; "
                f"CPU ahead by {statistics.median(ahead):.3f} ms (median), {min(ahead):.3f} (least)"
            )
    return lines


def sum_of_causes(gaps: list[Gap]) -> dict[str, float]:
    """Add up, by cause, the ms of all gaps."""
    total: dict[str, float] = defaultdict(float)
    for gap in gaps:
        for cause, ms in gap.causes().items():
            total[cause] += ms
    return total


def describe_causes(causes: dict[str, float], whole_ms: float | None = None) -> str:
    """The six largest, in ms, or as a part of `whole_ms`."""
    largest = sorted(causes.items(), key=lambda item: -item[1])[:6]
    shares = (f"{ms:.3f} ms" if whole_ms is None else f"{ms / whole_ms:.0%}" for _, ms in largest)
    return ", ".join(f"{name[:60]} {share}" for (name, ms), share in zip(largest, shares, strict=True) if ms > 0)


def describe_gaps(gaps: list[Gap], origin_ms: float, phase: Callable[[Work], str]) -> list[str]:
    """Format the longest gaps, one line each."""
    return [
        f"  idle {gap.ms:8.3f} ms at {gap.before.end_ms - origin_ms:9.3f} ms ({phase(gap.after)}): "
        f"{gap.before.name[:40]} -> {gap.after.name[:40]}; {describe_causes(gap.causes(), gap.ms)}"
        for gap in sorted(gaps, key=lambda gap: -gap.ms)[:NUM_GAPS]
    ]


def describe_busiest(works: list[Work]) -> list[str]:
    """Format the kernels that take longest in all, by stream and name."""
    by_name: dict[tuple[int, str], list[float]] = defaultdict(list)
    for work in works:
        by_name[work.stream, work.name].append(work.ms)
    busiest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]
    return [
        f"  {sum(times):9.3f} ms {len(times):5d} x  stream {stream:3d}  {name[:80]}"
        for (stream, name), times in busiest
    ]
