"""Models of unequal popularity under one limit of memory: a pool against one process per model, on the same traffic.

See `bench_pool.py` for the method. Owns the traffic, who has which share of the memory, and what becomes of the times.
"""

import argparse
import multiprocessing
import multiprocessing.dummy
import queue
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.dtypes import DTYPES
from bench.pool_fleet import Fleet
from bench.pool_worker import END, TOKENS, ProcessSpec
from bench.report import Row
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.plan.serving_plan import Site, plan_serving
from yafsdp_like.inference.pool.plan import PooledModel, PoolPlan, plan_pool
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.models.hf import save_hf

_GREEDY = SamplingParams(temperature=0.0)


@dataclass
class TimedRequest:
    """A request of the traffic, and what became of it; seconds since the traffic began."""

    model: str
    at: float
    request: Request
    first_at: float | None = None
    end_at: float | None = None
    num_tokens: int = 0


@dataclass(frozen=True)
class Popular:
    """What all ways are given."""

    options: argparse.Namespace
    device: torch.device
    plan: PoolPlan
    directories: Mapping[str, str]  # by model

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights."""
        return DTYPES[self.options.dtype]

    def traffic(self) -> list[TimedRequest]:
        """Return the same requests each time: Poisson arrivals, the k-th model 1/k^s times as often as the first."""
        draw, at, found = random.Random(0), 0.0, []
        names = [*self.plan.models]
        weights = [rank**-self.options.zipf for rank in range(1, len(names) + 1)]
        for number in range(self.options.requests):
            at += draw.expovariate(self.options.rate)
            (name,) = draw.choices(names, weights)
            vocab_size = self.plan.models[name].serving.config.vocab_size
            prompt = tuple(draw.choices(range(vocab_size), k=self.options.prompt_tokens))
            request = Request(str(number), prompt, _GREEDY, max_tokens=self.options.new_tokens, model=name)
            found.append(TimedRequest(name, at, request))
        return found


def measure(options: argparse.Namespace, device: torch.device, own: EngineOptions) -> Iterator[Row]:
    """Yield the rows of each way; the device must be free."""
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        popular = prepare(options, device, own, Path(directory))
        for way in options.ways:
            yield from _rows(way, popular, own)


def prepare(
    options: argparse.Namespace, device: torch.device, own: EngineOptions, directory: Path, writes: bool = True
) -> Popular:
    """Plan the pool, and write the models' files, which processes of their own read."""
    presets = options.models.split(",")
    for preset in dict.fromkeys(presets) if writes else ():
        with torch.device(device):
            decoder = Decoder(PRESETS[preset])
        save_hf(decoder, directory / preset, dtype=DTYPES[options.dtype])
        del decoder
        if device.type == "cuda":
            torch.cuda.empty_cache()
    names = names_of(presets)
    pooled = {
        name: PooledModel(PRESETS[preset], DTYPES[options.dtype], own)
        for name, preset in zip(names, presets, strict=True)
    }
    plan = plan_pool(pooled, pool_options(options), Hardware.of(device))
    return Popular(options, device, plan, {n: str(directory / p) for n, p in zip(names, presets, strict=True)})


def pool_options(options: argparse.Namespace) -> PoolOptions:
    """Return what the command line says of a pool."""
    return PoolOptions(
        int(options.limit_gib * 2**30),
        kv_nbytes=None if options.kv_gib is None else int(options.kv_gib * 2**30),
        max_turn_steps=options.max_turn_steps,
    )


def names_of(presets: Sequence[str]) -> list[str]:
    """Return names of models, numbered where a preset comes several times."""
    return [f"{name}.{i}" if presets.count(name) > 1 else name for i, name in enumerate(presets)]


def fleet_of(way: str, popular: Popular, own: EngineOptions, context: Any) -> Fleet:
    """Start the processes of a way, and return once those that are there from the beginning are ready."""
    device = str(popular.device)
    if way == "pool":
        pool = ProcessSpec("pool", popular.directories, own, popular.plan.options, device, popular.dtype)
        return Fleet(context, dict.fromkeys(popular.directories, pool), {})
    limits = shares(popular, own, may_stay=way == "apart")
    served = {
        name: ProcessSpec(
            name, {name: popular.directories[name]}, replace(own, memory_limit_nbytes=nbytes), None, device,
            popular.dtype,
        )
        for name, (nbytes, _) in limits.items()
    }  # fmt: skip
    stay = {name for name, (_, stays) in limits.items() if stays}
    return Fleet(
        context,
        {name: served[name] for name in served if name in stay},
        {name: served[name] for name in served if name not in stay},
    )


def shares(popular: Popular, own: EngineOptions, may_stay: bool) -> dict[str, tuple[int, bool]]:
    """Return the bytes of each model's process, and whether it is there all the time.

    Those stay that fit, the most popular first, beside the largest of the rest, whose bytes the rest shares; what is
    left is divided equally.
    """
    limit, needs = popular.plan.options.memory_limit_nbytes, {n: _need(popular, n, own) for n in popular.directories}
    stay: list[str] = []
    for name in needs if may_stay else ():
        rest = [needs[other] for other in needs if other not in (*stay, name)]
        if sum(needs[other] for other in (*stay, name)) + max(rest, default=0) <= limit:
            stay.append(name)
    late = max((needs[name] for name in needs if name not in stay), default=0)
    spare = (limit - sum(needs[name] for name in stay) - late) // (len(stay) + (late > 0))
    return {name: ((needs[name] if name in stay else late) + spare, name in stay) for name in needs}


def _need(popular: Popular, name: str, own: EngineOptions) -> int:
    """Return the bytes of an engine of one model with pages for one longest sequence."""
    plan = popular.plan
    kv_nbytes = plan.least_slabs(name) * plan.grid.slab_nbytes
    site = Site(popular.dtype, hardware=Hardware.of(popular.device))
    alone = plan_serving(plan.models[name].serving.config, replace(own, kv_nbytes=kv_nbytes), site, "resident")
    return alone.memory.nbytes + alone.recordings_nbytes


def play(fleet: Fleet, traffic: Sequence[TimedRequest], most_s: float) -> float:
    """Ask all at their times, note when tokens come, and return the seconds until the last, at most ``most_s``."""
    by_id = {asked.request.id: asked for asked in traffic}
    begin, index, num_left = time.monotonic(), 0, len(traffic)
    while num_left and (now := time.monotonic() - begin) < most_s:
        while index < len(traffic) and traffic[index].at <= now:
            fleet.ask(traffic[index].model, traffic[index].request)
            index += 1
        until = min(most_s, traffic[index].at if index < len(traffic) else most_s)
        try:
            news = fleet.outbox.get(timeout=max(until - now, 1e-3))
        except queue.Empty:
            continue
        fleet.take(news)
        if news.kind in (TOKENS, END):
            asked = by_id[news.request_id]
            asked.num_tokens += news.num_tokens
            asked.first_at = news.at - begin if asked.first_at is None else asked.first_at
            if news.kind == END:
                asked.end_at = news.at - begin
                num_left -= 1
    return time.monotonic() - begin


def _rows(way: str, popular: Popular, own: EngineOptions) -> Iterator[Row]:
    """Yield a row for all requests of a way, and one for those of each model."""
    begin, traffic = time.monotonic(), popular.traffic()
    fleet = fleet_of(way, popular, own, processes(popular.options.workers))
    ready_s = time.monotonic() - begin
    try:
        seconds = play(fleet, traffic, popular.options.most_s)
    finally:
        fleet.close()
    row = {"way": way, "model": "all", **_times(traffic, seconds), "seconds": seconds, "ready_s": ready_s}
    row |= {"tokens_per_second": sum(asked.num_tokens for asked in traffic) / seconds, "starts": fleet.num_starts}
    yield row | {"first_tokens_s": [round(wait_s, 4) for wait_s in _waits(traffic, seconds)]}
    for name in popular.directories:
        yield {"way": way, "model": name, **_times([asked for asked in traffic if asked.model == name], seconds)}


def _times(traffic: Sequence[TimedRequest], seconds: float) -> Row:
    row: Row = {"requests": len(traffic), "ended": sum(asked.end_at is not None for asked in traffic)}
    if not traffic:
        return row
    waits = _waits(traffic, seconds)
    row |= {"first_token_p50_s": statistics.median(waits), "first_token_p95_s": waits[int(0.95 * (len(waits) - 1))]}
    return row | {"first_token_max_s": waits[-1]}


def _waits(traffic: Sequence[TimedRequest], seconds: float) -> list[float]:
    """Return the seconds to each first token, in rising order; where there is none, those waited so far."""
    ends = [max(seconds, asked.at) if asked.first_at is None else asked.first_at for asked in traffic]
    return sorted(end - asked.at for end, asked in zip(ends, traffic, strict=True))


def processes(workers: str) -> Any:
    """Return what makes processes: forked from one that has imported everything and used no GPU, or threads."""
    if workers == "threads":
        return multiprocessing.dummy
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.pool_worker"])
    return context
