"""The benchmark of a pool of models, from its command line to its last line of output; see `bench_pool.py`."""

import argparse
import itertools
import json
import random
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench import pool_popular, pool_targets
from bench.allocator import allocator_counts, used_nbytes
from bench.dtypes import DTYPES
from bench.pool_options import ALONE
from bench.ranks import gathered, say
from bench.report import Row, hardware, versions, write
from launch import world as ranks
from launch.world import World
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.options import AnyMode, EngineOptions
from yafsdp_like.inference.plan.quantized_fields import stored_units
from yafsdp_like.inference.pool.memory import maps_slabs
from yafsdp_like.inference.pool.plan import HOST_WEIGHTS, SLABS, PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import random_model, world_transport
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models import PRESETS

_LINK_NBYTES = 1 << 30
_NUM_DECODED = 128  # tokens of a request whose steps are timed
_GREEDY = SamplingParams(temperature=0.0)


@dataclass
class PoolBench:
    """A pool, and what it is asked."""

    options: argparse.Namespace
    world: World
    pool: ModelPool
    link: float = 0.0  # bytes a second from host memory to this rank's device
    num_made: int = 0

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return [*self.pool.plan.models]

    def nbytes(self, name: str) -> int:
        """Return the bytes of a model's weights on this rank."""
        return self.pool.plan.models[name].image_nbytes

    def whole_nbytes(self, name: str) -> int:
        """Return the bytes of a model's weights, which ranks have parts of, all counted once."""
        serving = self.pool.plan.models[name].serving
        return sum(unit.nbytes for unit in stored_units(serving.config, serving.site.dtype))

    def pairs(self, meeting: bool) -> list[tuple[str, str]]:
        """Return ordered pairs of models that cannot, or can, be awake together."""
        models = self.pool.plan.models
        return [(a, b) for a, b in itertools.permutations(models, 2) if models[a].meets(models[b]) is meeting]

    def request(self, name: str, num_new: int, seed: int | None = None) -> Request:
        """Make a request of random tokens, other ones each time unless a seed is given."""
        self.num_made += 1
        draw = random.Random(self.num_made if seed is None else seed)
        vocab_size = self.pool.plan.models[name].serving.config.vocab_size
        prompt = tuple(draw.choices(range(vocab_size), k=self.options.prompt_tokens))
        return Request(str(self.num_made), prompt, _GREEDY, max_tokens=num_new)

    def drain(self) -> None:
        """Step until no request is left."""
        while self.pool.has_work:
            self.pool.step()

    def seconds(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return the seconds after which ``work`` returned, and after which all devices had done it, from rest."""
        self.world.synchronize()
        gathered(None, self.world)
        begin = time.perf_counter()
        work()
        returned = time.perf_counter() - begin
        self.world.synchronize()
        found = gathered((returned, time.perf_counter() - begin), self.world)
        return max(first for first, _ in found), max(last for _, last in found)

    def first_token_s(self, name: str) -> float:
        """Return the seconds from a request's arrival to its first token."""
        request = self.request(name, 1)

        def serve() -> None:
            self.pool.add(name, request)
            while not any(output.tokens for _, output in self.pool.step()):
                pass

        seconds, _ = self.seconds(serve)
        self.drain()
        return seconds


def run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Run what the command line asks for; the last line of output is the report as one JSON object."""
    world = ranks.join(options.device)
    alone = next((name for name in ALONE if name in options.measure), None)
    assert world.size == 1 or alone is None, f"{alone} starts its own processes: leave out torchrun"
    report: Row = {"command": f"python scripts/bench_pool.py {shlex.join(arguments)}"}
    try:
        report |= {"hardware": hardware(world), "versions": versions(world)}
        if alone is not None:
            report[alone] = _rows_of(alone, options, world)
        else:
            bench = _pool(options, world)
            report["plan"] = str(bench.pool.plan).splitlines()
            with bench.pool:
                for name, result in _measured(bench):
                    report[name] = result
                    say(world, _described(name, result))
                bench.pool.check_integrity()
        if options.out is not None and world.is_first:
            write(report, options.out)
    finally:
        ranks.leave()
    say(world, json.dumps(report))


def _rows_of(name: str, options: argparse.Namespace, world: World) -> list[Row]:
    rows, measure = [], {"popular": pool_popular.measure, "targets": pool_targets.measure}[name]
    for row in measure(options, world.device, _engine_options(options)):
        rows.append(row)
        say(world, _described(name, {name: value for name, value in row.items() if name != "first_tokens_s"}))
    return rows


def _engine_options(options: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        max_batch_size=options.batch,
        max_batch_tokens=options.max_batch_tokens,
        max_seq_len=options.max_seq_len,
        prefix_cache="many" not in options.measure,
    )


def _pool(options: argparse.Namespace, world: World) -> PoolBench:
    presets = options.models.split(",")
    names = pool_popular.names_of(presets)
    own, dtype = _engine_options(options), DTYPES[options.dtype]
    pooled = {name: PooledModel(PRESETS[preset], dtype, own) for name, preset in zip(names, presets, strict=True)}
    limits = pool_popular.pool_options(options)
    transport = world_transport(world.device)
    plan = plan_pool(pooled, limits, Hardware.of(world.device), world.size, maps_slabs(transport))
    say(world, str(plan))
    homes = plan.models.values()
    if "many" in options.measure and not any(one.meets(other) for one, other in itertools.combinations(homes, 2)):
        raise SystemExit(f"error: many: in --limit-gib {options.limit_gib:g} all models are awake at once; give less")
    models = {name: random_model(name, model.config) for name, model in pooled.items()}
    begin = time.perf_counter()
    pool = ModelPool(plan, models, world.device, transport=transport)
    made = time.perf_counter()
    bench = PoolBench(options, world, pool)
    bench.link = _link(bench)
    failed = pool.load_all()
    assert not failed, failed
    say(world, f"made in {made - begin:.1f} s, loaded in {time.perf_counter() - made:.1f} s")
    assert (pool.arena.nbytes, pool.host.nbytes) == (plan.memory.nbytes, plan.host.nbytes)
    return bench


def _link(bench: PoolBench) -> float:
    """Return bytes a second from host memory to a device; to be called before anything lies there.

    Of several ranks the mean, each alone on its link and on the host's memory.
    """
    pool = bench.pool
    device, host = pool.arena.place(SLABS), pool.host.place(HOST_WEIGHTS)
    nbytes = min(_LINK_NBYTES, device.segment.nbytes, host.segment.nbytes)
    to, source = (place.tensor(torch.uint8, (nbytes,)) for place in (device, host))
    found = []
    for rank in range(bench.world.size):
        copies = nbytes if rank == bench.world.rank else 0
        copy = partial(to[:copies].copy_, source[:copies], non_blocking=True)
        found.append(nbytes / min(bench.seconds(copy)[1] for _ in range(5)))
    return statistics.mean(found)


def _measured(bench: PoolBench) -> Iterator[tuple[str, Row | list[Row]]]:
    yield "link", {"gb_per_s": bench.link / 1e9}
    measures: dict[str, Callable[[PoolBench], Row | list[Row]]] = {
        "switch": _switches,
        "cold": _cold,
        "prefetch": _prefetched,
        "awake": _awake,
        "many": _many,
    }
    for name in bench.options.measure:
        begin = time.perf_counter()
        yield name, measures[name](bench)
        say(bench.world, f"({name}: {time.perf_counter() - begin:.1f} s)")


def _switches(bench: PoolBench) -> list[Row]:
    rows = []
    for left, woken in bench.pairs(meeting=True):
        found = []
        for _ in range(bench.options.rounds):
            bench.pool.wake_up(left)
            found.append((*bench.seconds(partial(bench.pool.wake_up, woken)), bench.pool.switches[-1].nbytes))
        returned, done, nbytes = statistics.median_low(found)
        row = {"from": left, "to": woken, "gib": nbytes / 2**30, "ms": 1e3 * done, "cpu_ms": 1e3 * returned}
        row |= {"gb_per_s": nbytes / done / 1e9, "share_of_link": nbytes / done / bench.link}
        if bench.world.size > 1:
            whole = bench.whole_nbytes(woken) * nbytes / bench.nbytes(woken)
            row["share_of_links"] = whole / done / (bench.world.size * bench.link)
        rows.append(row)
    return rows


def _cold(bench: PoolBench) -> list[Row]:
    rows = []
    for name in bench.names:
        awake, cold = [], []
        for _ in range(bench.options.rounds):
            bench.pool.sleep(name, keep=False)
            cold.append(bench.first_token_s(name))
            awake.append(bench.first_token_s(name))
        floor, moved = bench.nbytes(name) / bench.link, bench.pool.switches[-1].nbytes
        row = {"model": name, "gib_moved": moved / 2**30, "cold_ms": 1e3 * statistics.median(cold)}
        row |= {"awake_ms": 1e3 * statistics.median(awake), "link_ms": 1e3 * floor}
        rows.append(row | {"x_link": statistics.median(cold) / floor})
    return rows


def _prefetched(bench: PoolBench) -> list[Row]:
    """Of the two largest that can be prefetched beside another."""
    rows = []
    for serving, wanted in sorted(bench.pairs(meeting=False), key=lambda pair: -bench.nbytes(pair[1]))[:2]:
        found = [
            _beside(bench, serving, wanted, asleep) for _ in range(bench.options.rounds) for asleep in (True, False)
        ]
        first, wake_s, moved, steps = statistics.median_low(found[::2])
        awake = statistics.median(seconds for seconds, *_ in found[1::2])
        row = {"serving": serving, "prefetched": wanted, "gib": moved / 2**30, "steps_meanwhile": steps}
        row |= {"wake_up_ms": 1e3 * wake_s, "first_token_ms": 1e3 * first, "awake_ms": 1e3 * awake}
        rows.append(row | {"visible_wait_ms": 1e3 * (first - awake)})
    return rows


def _beside(bench: PoolBench, serving: str, wanted: str, asleep: bool) -> tuple[float, float, int, int]:
    """Have ``serving`` serve a request, and return seconds to the first token of ``wanted`` behind it.

    Waking it is part of these, if it was asleep and prefetched meanwhile, and is returned, too; then the bytes that
    were prefetched, and steps meanwhile.
    """
    pool, moved, before = bench.pool, 0, bench.pool.num_steps
    pool.wake_up(wanted)
    if asleep:
        pool.sleep(wanted, keep=False)
    pool.add(serving, bench.request(serving, bench.options.max_seq_len - bench.options.prompt_tokens))
    while pool.has_work:
        pool.step()
        moved += pool.prefetch(wanted)
    assert moved == (bench.nbytes(wanted) if asleep else 0), f"{moved} bytes of {wanted} were prefetched in time"
    steps = pool.num_steps - before
    bench.world.synchronize()
    begin = time.perf_counter()
    assert pool.wake_up(wanted).nbytes == 0
    wake_s = time.perf_counter() - begin
    return wake_s + bench.first_token_s(wanted), wake_s, moved, steps


def _awake(bench: PoolBench) -> list[Row]:
    rows = []
    for name in bench.names:
        bench.pool.wake_up(name)
        num_new = min(_NUM_DECODED, bench.options.max_seq_len - bench.options.prompt_tokens)
        requests = [bench.request(name, num_new) for _ in range(bench.options.batch)]
        for request in requests:
            bench.pool.add(name, request)
        pooled = _step_s(bench.pool)
        bench.pool.sleep(name)
        serving = bench.pool.plan.models[name].serving
        model = random_model(name, serving.config)
        own = replace(_engine_options(bench.options), kv_nbytes=serving.grid.region_nbytes)
        transport = world_transport(bench.world.device)
        mode: AnyMode = "auto" if transport is None else "tensor_parallel"
        with Engine.load(
            model,
            own,
            device=bench.world.device,
            dtype=DTYPES[bench.options.dtype],
            mode=mode,
            transport=transport,
        ) as engine:
            for request in requests:
                engine.add(request)
            alone = _step_s(engine)
        row = {"model": name, "batch": bench.options.batch, "pool_step_ms": 1e3 * pooled, "alone_step_ms": 1e3 * alone}
        rows.append(row | {"ratio": pooled / alone})
    return rows


def _step_s(served: ModelPool | Engine) -> float:
    """Return the median seconds of the second half of steps."""
    found = []
    while served.has_work:
        begin = time.perf_counter()
        served.step()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[len(found) // 2 : -2])


def _many(bench: PoolBench) -> Row:
    pool, draw, moved, num_switches = bench.pool, random.Random(0), 0, 0
    wanted = _tokens(bench)
    before, used = allocator_counts(bench.world), used_nbytes(bench.world)
    num_compared, num_equal = 0, 0
    begin = time.perf_counter()
    while num_switches < bench.options.switches:
        for name in draw.choices(bench.names, k=10):
            nbytes = pool.wake_up(name).nbytes
            moved, num_switches = moved + nbytes, num_switches + (nbytes > 0)
        found = _tokens(bench)
        num_compared += len(wanted)
        num_equal += sum(found[key] == tokens for key, tokens in wanted.items())
    bench.world.synchronize()
    seconds = time.perf_counter() - begin
    pool.check_integrity()
    moved_counters = {key: count - before[key] for key, count in allocator_counts(bench.world).items()}
    row: Row = {"switches": num_switches, "seconds": seconds, "gib_moved": moved / 2**30}
    row |= {"requests_compared": num_compared, "requests_equal": num_equal, **moved_counters}
    return row | {"device_used_nbytes": used_nbytes(bench.world) - used}


def _tokens(bench: PoolBench) -> dict[tuple[str, int], list[int]]:
    """Return what each model draws for the same prompts."""
    seeds, num_new = range(bench.options.batch), bench.options.new_tokens
    asked = {name: [bench.request(name, num_new, seed) for seed in seeds] for name in bench.names}
    done = bench.pool.generate(asked)
    return {(name, i): done[name][request.id].ids for name, found in asked.items() for i, request in enumerate(found)}


def _described(name: str, result: Row | list[Row]) -> str:
    """One line a row, numbers with four digits; of no rows a line that says so."""
    if not result:
        return f"{name}\n  of none: it takes models that meet on the device, or for prefetch such that do not"
    rows = result if isinstance(result, list) else [result]
    lines = ["  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()) for row in rows]
    return "\n".join([name, *(f"  {line}" for line in lines)])
