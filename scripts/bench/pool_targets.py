"""How many requests a second a pool serves within targets, against one process per model, and what was predicted.

See `bench_pool.py` for the method. Owns how traffic is played, and the measured times that the simulator is given.
"""

from __future__ import annotations

import itertools
import queue
import random
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import pool_popular
from bench.pool_worker import END, TOKENS
from bench.sim_device import SimHardware, SimModel
from bench.sim_run import Outcome, Scenario, Simulation, readers_saw
from bench.sim_traces import TraceRequest, popularity, trace
from yafsdp_like.inference.engine.request import QueueFullError, Request
from yafsdp_like.inference.engine.step_budget import CHUNK
from yafsdp_like.inference.fleet.reader import Reader, Targets
from yafsdp_like.inference.fleet.schedule import ScheduleOptions
from yafsdp_like.inference.fleet.times import StepLines
from yafsdp_like.inference.pool.driver import PoolDriver
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.pool.turns import SlackTurns
from yafsdp_like.inference.weights.loading import random_model
from yafsdp_like.kernels.sampling_params import SamplingParams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.pool_fleet import Fleet
    from bench.pool_popular import Popular
    from bench.report import Row
    from yafsdp_like.inference.options import EngineOptions
    from yafsdp_like.inference.pool.plan import PoolPlan
    from yafsdp_like.models import DecoderConfig

WITHIN = 0.9  # share of the readers' time within targets, for which the rate is looked for
_GREEDY = SamplingParams(temperature=0.0)
_NUM_TIMED = 32  # tokens of a request whose steps are timed


def measure(options: argparse.Namespace, device: torch.device, own: EngineOptions) -> Iterator[Row]:
    """Yield rows: of measured times, of the pool and the simulator at each rate, of overload, of a process per model.

    The last row has the rates at which `WITHIN` of the readers' time was within targets. The device must be free.
    """
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        popular = pool_popular.prepare(options, device, own, Path(directory), writes="apart" in options.ways)
        rows: list[Row] = []
        for way, play in (("pool", _pool_rows), ("apart", partial(_apart_rows, own=own))):
            for row in play(popular) if way in options.ways else ():
                rows.append(row)
                yield row
        yield {"way": "rate within targets", **{way: rate_within(rows, way) for way in ("pool", "apart", "simulated")}}


def rate_within(rows: Sequence[Row], way: str) -> float | None:
    """Return the rate at which a way's share of time falls to `WITHIN`, between rates that were played; else None."""
    found = sorted((row["rate"], row["share_of_time"]) for row in rows if row["way"] == way)
    for (low, above), (high, below) in itertools.pairwise(found):
        if above >= WITHIN > below:
            return float(low + (high - low) * (above - WITHIN) / (above - below))
    return None


# --- traffic ---


def traffic(popular: Popular, rate: float, seconds: float) -> list[TraceRequest]:
    """Return the same requests for a rate each time: Poisson arrivals, models of Zipf popularity, lengths all alike."""
    options, names = popular.options, [*popular.directories]
    shares = popularity(len(names), options.zipf)
    rates = {name: rate * share for name, share in zip(names, shares, strict=True)}
    return trace(rates, seconds, lambda source: (options.prompt_tokens, options.new_tokens), seed=0)


def _requests(popular: Popular, asked: Sequence[TraceRequest], tag: str) -> list[Request]:
    draw = random.Random(tag)
    vocab_sizes = {name: model.serving.config.vocab_size for name, model in popular.plan.models.items()}
    return [
        Request(
            f"{tag} {index}",
            tuple(draw.choices(range(vocab_sizes[each.model]), k=each.num_prompt_tokens)),
            _GREEDY,
            max_tokens=each.num_tokens,
            model=each.model,
        )
        for index, each in enumerate(asked)
    ]


class _Play:
    """Requests that are asked at their times, and what becomes of them; seconds since the first could be asked."""

    def __init__(self, popular: Popular, asked: Sequence[TraceRequest], tag: str) -> None:
        self.targets = targets_of(popular.options)
        self.outcomes = [Outcome(each) for each in asked]
        self.num_tokens = self.num_left = 0
        self._left = list(zip(_requests(popular, asked, tag), self.outcomes, strict=True))[::-1]
        self._by_id: dict[str, Outcome] = {}
        self.begin = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    @property
    def is_over(self) -> bool:
        """Whether all were asked and have ended."""
        return not self._left and not self.num_left

    @property
    def wait_s(self) -> float:
        """Return the seconds until the next request; an hour after the last."""
        return max(0.0, self._left[-1][1].asked.at - self.now) if self._left else 3600.0

    def ask(self, add: Callable[[Request], object]) -> None:
        """Ask all whose time has come."""
        while self._left and self._left[-1][1].asked.at <= self.now:
            request, outcome = self._left.pop()
            try:
                add(request)
            except QueueFullError as refusal:
                outcome.num_refused, outcome.told_s = 1, refusal.retry_after_s
                continue
            outcome.reader = Reader(self.targets, outcome.asked.at)
            self._by_id[request.id] = outcome
            self.num_left += 1

    def deliver(self, request_id: str, num_tokens: int, ends: bool, at: float) -> None:
        """Take tokens of a request, which came ``at`` seconds."""
        outcome = self._by_id[request_id]
        assert outcome.reader is not None
        if num_tokens:
            outcome.reader.deliver(at, num_tokens)
            self.num_tokens += num_tokens
        if ends:
            del self._by_id[request_id]
            self.num_left -= 1

    def give_up(self) -> list[str]:
        """Count what is left as served now, so late; return the requests' ids."""
        for outcome in self._by_id.values():
            assert outcome.reader is not None
            outcome.reader.deliver(max(self.now, outcome.reader.due + 1e-9))
        return [*self._by_id]

    def row(self, way: str, rate: float) -> Row:
        """Return what readers saw."""
        num_refused = sum(outcome.num_refused for outcome in self.outcomes)
        ended = len(self.outcomes) - self.num_left - num_refused
        row = {"way": way, "rate": rate, "requests": len(self.outcomes), "ended": ended}
        row |= {"num_refused_in_all": num_refused, **readers_saw(self.outcomes)}
        return row | {"seconds": self.now, "tokens_per_s": self.num_tokens / self.now}


def targets_of(options: argparse.Namespace) -> Targets:
    """Return what readers are promised."""
    return Targets(options.ttft_s, options.tpot_s)


# --- the pool ---


def _pool_rows(popular: Popular) -> Iterator[Row]:
    options, plan = popular.options, popular.plan
    models = {name: random_model(name, each.serving.config) for name, each in plan.models.items()}
    pool = ModelPool(plan, models, popular.device, dict.fromkeys(models, targets_of(options)))
    driver = PoolDriver(pool)
    try:
        failed = driver.load_all()
        assert not failed, failed
        simulated = _calibrated(popular, pool, driver)
        yield {"way": "times", "link": simulated[1].link} | {n: vars(m.lines) for n, m in simulated[0].items()}
        found: list[Row] = []
        for rate in options.rates:
            found.append(_play_pool(popular, driver, rate, options.seconds))
            yield found[-1]
            found.append({"way": "simulated", "rate": rate, **_simulate(popular, simulated, rate, options.seconds)})
            yield found[-1]
            if found[-2]["share_of_time"] < WITHIN:
                break
        most = rate_within(found, "pool") or options.rates[-1]
        if options.overload:
            yield _play_pool(popular, driver, options.overload * most, options.overload_s) | {"way": "overload"}
            driver.check_integrity()
    finally:
        driver.close()


def _play_pool(popular: Popular, driver: PoolDriver, rate: float, seconds: float) -> Row:
    play = _Play(popular, traffic(popular, rate, seconds), f"pool {rate}")
    while not play.is_over and play.now < seconds + popular.options.most_s:
        play.ask(driver.add)
        if not driver.has_work:
            time.sleep(min(0.002, play.wait_s))
            continue
        outputs = driver.step()
        at = play.now
        for output in outputs:
            play.deliver(output.request_id, len(output.tokens), output.finish is not None, at)
    for request_id in play.give_up():
        driver.cancel(request_id)
    while driver.has_work:
        driver.step()
    used = driver.metrics().kv_nbytes_used
    assert used == 0, f"{used} bytes of pages are in use after the last request"
    return play.row("pool", rate)


# --- the simulator, with the pool's own times ---


def _calibrated(popular: Popular, pool: ModelPool, driver: PoolDriver) -> tuple[dict[str, SimModel], SimHardware]:
    """Measure, for one model of each shape, steps of few and of many rows, prompts, and a switch."""
    turns = pool.turns
    assert isinstance(turns, SlackTurns)
    scheduler = turns.scheduler
    kept, scheduler.options = scheduler.options, replace(scheduler.options, admission_load=None)
    lines: dict[Any, StepLines] = {}
    copies = list[tuple[int, float]]()
    for name, model in popular.plan.models.items():
        config = model.serving.config
        if config in lines:
            continue
        pool.sleep(name, keep=False)
        _synchronize(popular.device)
        begin = time.perf_counter()
        nbytes = pool.wake_up(name).nbytes
        _synchronize(popular.device)
        copies.append((nbytes, time.perf_counter() - begin))
        few, many = (_timed(popular, driver, name, count) for count in (1, popular.options.batch))
        lines[config] = _lines(few, many, popular.options.prompt_tokens)
    scheduler.options = kept
    link = statistics.median(nbytes / seconds for nbytes, seconds in copies)
    return simulated_pool(popular.plan, lines, link, min(CHUNK, popular.options.max_batch_tokens))


def simulated_pool(
    plan: PoolPlan, lines: Mapping[DecoderConfig, StepLines], link: float, mixed_tokens: int
) -> tuple[dict[str, SimModel], SimHardware]:
    """Return a pool's models, each in its home, and what the device has: all slabs, of which homes leave pages some."""
    slab_nbytes, models = plan.grid.slab_nbytes, dict[str, SimModel]()
    for name, each in plan.models.items():
        home = range(each.home.start * slab_nbytes, each.home.stop * slab_nbytes)
        models[name] = SimModel(each.image_nbytes, int(each.token_nbytes), lines[each.serving.config], home)
    room = max(model.home.stop for model in models.values())
    return models, SimHardware(room, max(plan.grid.region_nbytes - room, 1), link, mixed_tokens=mixed_tokens)


def _timed(popular: Popular, driver: PoolDriver, name: str, count: int) -> tuple[int, float, float]:
    """Return a number of requests, the seconds until all have their first token, and of a step that decodes them.

    They are served twice, and timed the second time.
    """
    length = popular.options.prompt_tokens
    num_new = min(_NUM_TIMED, popular.options.max_seq_len - length)
    steps, first_s = list[float](), 0.0
    for time_ in range(2):
        asked = [TraceRequest(0.0, name, length, num_new)] * count
        waiting, steps, first_s, begin = set[str](), [], 0.0, time.perf_counter()
        for request in _requests(popular, asked, f"timed {name} {count} {time_}"):
            driver.add(request)
            waiting.add(request.id)
        while driver.has_work:
            before = time.perf_counter()
            outputs = driver.step()
            now = time.perf_counter()
            if not waiting and sum(bool(output.tokens) for output in outputs) == count:
                steps.append(now - before)
            waiting -= {output.request_id for output in outputs if output.tokens}
            if not waiting and not first_s:
                first_s = now - begin
    return count, first_s, statistics.median(steps)


def _lines(few: tuple[int, float, float], many: tuple[int, float, float], num_prompt_tokens: int) -> StepLines:
    """Return lines through both; a row's time has that of its keys, since all contexts are as long."""
    (low, low_first_s, low_step_s), (high, high_first_s, high_step_s) = few, many
    row_s = max(0.0, (high_step_s - low_step_s) / max(high - low, 1))
    token_s = max(0.0, (high_first_s - low_first_s) / max((high - low) * num_prompt_tokens, 1))
    return StepLines(
        max(low_step_s - low * row_s, 1e-6),
        row_s,
        prefill_base_s=max(low_first_s - low * num_prompt_tokens * token_s, 0.0),
        prefill_row_s=token_s,
    )


def _simulate(popular: Popular, simulated: tuple[dict[str, SimModel], SimHardware], rate: float, seconds: float) -> Row:
    models, hardware = simulated
    options = popular.options
    scenario = Scenario(
        models,
        hardware,
        targets_of(options),
        options=ScheduleOptions(memory_nbytes=hardware.weights_nbytes + hardware.kv_nbytes),
        max_batch=options.batch,
        max_tokens=options.new_tokens,
    )
    return Simulation(scenario, traffic(popular, rate, seconds)).run().figures()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- one process per model ---


def _apart_rows(popular: Popular, own: EngineOptions) -> Iterator[Row]:
    options = popular.options
    fleet = pool_popular.fleet_of("apart", popular, own, pool_popular.processes(options.workers))
    try:
        for rate in options.apart_rates:
            row = _play_apart(popular, fleet, rate)
            yield row
            if row["share_of_time"] < WITHIN:
                break
    finally:
        fleet.close()


def _play_apart(popular: Popular, fleet: Fleet, rate: float) -> Row:
    seconds, starts = popular.options.seconds, fleet.num_starts
    play = _Play(popular, traffic(popular, rate, seconds), f"apart {rate}")
    until_s, row = seconds + popular.options.most_s, None
    while not play.is_over:
        if row is None and play.now > until_s:
            play.give_up()
            row = play.row("apart", rate)  # what is left is served, for no process can be told to forget it
        play.ask(lambda request: fleet.ask(request.model, request))
        try:
            news = fleet.outbox.get(timeout=max(1e-3, min(play.wait_s, until_s - play.now if row is None else 1.0)))
        except queue.Empty:
            continue
        fleet.take(news)
        if news.kind in (TOKENS, END):
            play.deliver(news.request_id, news.num_tokens, news.kind == END, news.at - play.begin)
    return (row or play.row("apart", rate)) | {"starts": fleet.num_starts - starts}
