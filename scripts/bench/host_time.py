"""What the CPU does for one sharded unit in a step: time, calls of Python functions, torch operations, device calls.

    PYTHONPATH=.:scripts torchrun --nproc-per-node 2 -m bench.host_time [--functions 30] [--out costs.json]

Small steps are bound by the CPU, and this is what the runtime adds to the model's own share. Method: tiny decoders of
few and of many blocks, sharded and not. The difference between many blocks and few, per block, is what a block costs,
and the difference of that between sharded and not is what its unit costs. Numbers of calls are the same in every run;
times are the least of many, since whatever else the machine does only adds to them.

On a CPU, kernels and collectives would take time of their own. So there streams only count what is asked of them, work
that a GPU repeats by one launch (`Recording`) is counted and left out, ranks do not wait for each other in stream
barriers, and they compare what they do once a backward, as on GPUs. Numbers that the model computes are then of no use.
Backward runs on the thread that calls it, which is the one that is looked at.
"""

import argparse
import cProfile
import dataclasses
import json
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import yafsdp_like
from bench.ranks import say
from launch import world as ranks
from launch.host_cost import FEW, MANY, PHASES, CountedOperations, HostSteps
from launch.world import World
from yafsdp_like.comm.signals import Barrier
from yafsdp_like.memory.streams import Event, Recording
from yafsdp_like.shard.runtime import engine as engines
from yafsdp_like.shard.runtime.unit_state import unit_of

WARMUP, STEPS = 3, 40
PACKAGE = str(Path(yafsdp_like.__file__).parent)


@dataclass(frozen=True)
class HostCosts:
    """Of one phase of a step; those of a unit are differences, and need be no integers."""

    us: float = 0.0
    package_calls: float = 0.0  # of this package's Python functions
    python_calls: float = 0.0  # of all Python functions, those included
    c_calls: float = 0.0  # of functions in C from Python
    torch_ops: float = 0.0
    device_calls: float = 0.0  # events recorded and waited for, streams entered, launches of recorded work; CPUs only

    def __sub__(self, other: "HostCosts") -> "HostCosts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return HostCosts(*(mine - theirs for mine, theirs in pairs))

    def per(self, number: int) -> "HostCosts":
        """Return the costs of one of `number`."""
        return HostCosts(*(value / number for value in dataclasses.astuple(self)))


class CountingStreams:
    """Streams of a CPU, which has none, and how often each call was made."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on(self, stream: str) -> AbstractContextManager[Any]:
        """See `Streams`."""
        self.calls["on"] += 1
        return nullcontext()

    def record(self, stream: str) -> Event:
        """See `Streams`."""
        self.calls["record"] += 1
        return self

    def wait(self, stream: str, event: Event) -> None:
        """See `Streams`."""
        self.calls["wait"] += 1

    def synchronize(self, event: Event) -> None:
        """See `Streams`."""

    def query(self) -> bool:
        """Answer, as an event, that it is complete."""
        return True


@contextmanager
def host_only(device: torch.device, counter: Counter[str]) -> Iterator[None]:
    """Leave out, on a CPU, what a GPU and other ranks would do; count in `counter` what they are asked for.

    Engines that are made inside are counted, and compare what ranks do once a backward.
    """
    if device.type != "cpu":
        yield
        return
    streams = CountingStreams()
    streams.calls = counter
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(engines, "streams_of", lambda device: streams))
        patches.enter_context(mock.patch.object(Barrier, "stream_barrier", lambda *_: counter.update(["barrier"])))
        patches.enter_context(mock.patch.object(Recording, "__call__", lambda _: counter.update(["replay"])))
        yield


@contextmanager
def comparing_once(steps: Sequence[HostSteps]) -> Iterator[None]:
    """Let ranks compare what they do once a backward, on CPUs too."""
    engines_of = [engines.engine_of(unit) for s in steps if (unit := unit_of(s.model)) is not None]
    with ExitStack() as patches:
        for journal in {journal for engine in engines_of if engine for journal in engine.collective_log.journals}:
            patches.enter_context(mock.patch.object(journal, "_at_once", False))
        yield


def counted(phase: Callable[[], None], device_calls: Counter[str]) -> HostCosts:
    """Call `phase` and return all costs but its time."""
    calls: Counter[str] = Counter()
    is_ours: dict[CodeType, bool] = {}

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            code = frame.f_code
            ours = is_ours.get(code)
            if ours is None:
                ours = is_ours[code] = code.co_filename.startswith(PACKAGE)
            calls["package"] += ours
        calls[event] += 1

    before = device_calls.total()
    sys.setprofile(note)
    try:
        phase()
    finally:
        sys.setprofile(None)
    num_device_calls = device_calls.total() - before
    return HostCosts(0.0, calls["package"], calls["call"], calls["c_call"], 0.0, num_device_calls)


def costs_of(
    steps: HostSteps, device: torch.device, device_calls: Counter[str], num_timed: int
) -> dict[str, HostCosts]:
    """Return each phase's costs: counts of one step, and the least time of `num_timed`."""
    costs = {phase: counted(getattr(steps, phase), device_calls) for phase in PHASES}
    for phase in PHASES:
        with CountedOperations() as ops:
            getattr(steps, phase)()
        costs[phase] = dataclasses.replace(costs[phase], torch_ops=ops.num_calls)
    least = dict.fromkeys(PHASES, float("inf"))
    for _ in range(num_timed):
        for phase in PHASES:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            getattr(steps, phase)()
            least[phase] = min(least[phase], (time.perf_counter() - begin) * 1e6)
    return {phase: dataclasses.replace(costs[phase], us=least[phase] if num_timed else 0.0) for phase in PHASES}


def unit_costs(world: World, num_timed: int = STEPS, num_functions: int = 0) -> dict[str, dict[str, HostCosts]]:
    """Return the costs by phase of a plain "block", and of the "unit" that sharding makes of it.

    With `num_functions`, rank 0 prints a profile of forwards and backwards.
    """
    calls: Counter[str] = Counter()
    transport = "peer" if world.size > 1 else "auto"
    with host_only(world.device, calls), torch.autograd.set_multithreading_enabled(False):
        made = {(n, sharded): HostSteps(n, world, sharded, transport) for sharded in (False, True) for n in (FEW, MANY)}
        for steps in made.values():
            steps.run(1)
        with comparing_once([steps for (_, sharded), steps in made.items() if sharded]):
            for steps in made.values():
                steps.run(WARMUP)
            costs = {key: costs_of(steps, world.device, calls, num_timed) for key, steps in made.items()}
            if num_functions:
                print_functions(made[MANY, True], num_functions, world)
    blocks = {
        sharded: {phase: (costs[MANY, sharded][phase] - costs[FEW, sharded][phase]).per(MANY - FEW) for phase in PHASES}
        for sharded in (False, True)
    }
    return {"block": blocks[False], "unit": {phase: blocks[True][phase] - blocks[False][phase] for phase in PHASES}}


def print_functions(steps: HostSteps, number: int, world: World) -> None:
    """Print which functions take longest in forwards and backwards; all ranks run them."""
    profile = cProfile.Profile()
    for _ in range(STEPS):
        profile.enable()
        steps.forward()
        steps.backward()
        profile.disable()
        steps.update()
    if world.is_first:
        pstats.Stats(profile).sort_stats("tottime").print_stats(number)


def main() -> None:
    """Print the costs of a unit, and write them as JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--functions", type=int, default=0, help="print so many lines of a profile too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = ranks.join(options.device)
    costs = unit_costs(world, num_functions=options.functions)
    fields = [field.name for field in dataclasses.fields(HostCosts)]
    say(world, f"{world.size} ranks, {world.device.type}; by phase: {', '.join(fields)}")
    for subject, by_phase in costs.items():
        for phase, cost in by_phase.items():
            values = " ".join(f"{value:9.1f}" for value in dataclasses.astuple(cost))
            say(world, f"{subject:6} {phase:9} {values}")
    if world.is_first and options.out is not None:
        report = {s: {phase: dataclasses.asdict(c) for phase, c in by.items()} for s, by in costs.items()}
        options.out.write_text(json.dumps(report, indent=1))
    dist.barrier()
    ranks.leave()


if __name__ == "__main__":
    main()
