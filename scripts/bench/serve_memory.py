"""Bytes planned beside bytes taken, and what the allocator does while random requests are served."""

import time
from random import Random

from bench.measure import Metrics
from bench.report import Row
from bench.serve_engine import GREEDY, Bench, memory_reading
from bench.serve_options import RANDOM_NEW, RANDOM_PROMPT
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.memory.arena import Arena

COUNTERS = ("allocator_requests", "device_allocs", "alloc_retries", "allocated_nbytes", "reserved_nbytes")
CANCELLED_SHARE = 0.02
SAMPLINGS = (
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, seed=2),
    SamplingParams(min_p=0.05, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, seed=3),
)


def measure(bench: Bench) -> Row:
    """Compare the plan with what the arena, PyTorch's allocator and the device say."""
    served = bench.served
    return {
        "planned_nbytes": served.plan.memory.nbytes,
        "planned_kinds": {
            kind: served.plan.memory.nbytes_of(kind) for kind in sorted({r.kind for r in served.plan.memory.regions})
        },
        "arena_nbytes": held_nbytes(served.weights.arena),
        **taken(served.before, served.ready, served.plan.memory.nbytes),
        "random": serve_random(bench),
    }


def held_nbytes(arena: Arena) -> int:
    """Of all storages that the arena has allocated."""
    storages = {storage.data_ptr(): storage for storage, _ in map(arena.storage, arena.regions)}
    return sum(storage.nbytes() for storage in storages.values())


def taken(before: Metrics, ready: Metrics, planned_nbytes: int) -> Row:
    """By making the engine: what PyTorch's allocator handed out, and what the device lost. None where nobody tells."""
    if not ready:
        return {"allocated_nbytes": None, "device_nbytes": None, "beside_the_plan_nbytes": None}
    allocated, device = (ready[name] - before[name] for name in ("allocated_nbytes", "device_nbytes"))
    return {
        "allocated_nbytes": allocated,
        "device_nbytes": device,
        "beside_the_plan_nbytes": device - planned_nbytes,
    }


def serve_random(bench: Bench) -> Row:
    """The engine is whole afterwards, or RuntimeError is raised; ``changed`` is by how much counters did."""
    engine, before, begin = bench.served.engine, memory_reading(bench.world), time.perf_counter()
    num_tokens, num_cancelled = play(bench)
    after = memory_reading(bench.world)
    engine.check_integrity()
    if engine.metrics().kv_nbytes_used:
        raise RuntimeError(f"all requests have ended, and {engine.metrics().kv_nbytes_used} bytes of pages are held")
    changed = {name: after[name] - before[name] for name in COUNTERS if name in after}
    return {
        "num_requests": bench.options.random_requests,
        "num_cancelled": num_cancelled,
        "num_tokens": num_tokens,
        "seconds": time.perf_counter() - begin,
        "changed": changed or None,
        "unchanged": not any(changed.values()) if changed else None,
        "device_nbytes_changed": after["device_nbytes"] - before["device_nbytes"] if after else None,
    }


def play(bench: Bench) -> tuple[int, int]:
    """Serves short requests of random lengths, twice as many at a time as run: tokens drawn, requests cancelled."""
    random, engine, num_left = Random(1), bench.served.engine, bench.options.random_requests
    num_tokens = num_cancelled = 0
    there: dict[str, None] = {}  # in order of arrival
    while num_left or engine.has_work:
        while num_left and len(there) < 2 * bench.options.max_batch_size:
            request = short(bench, random)
            engine.add(request)
            num_left, there[request.id] = num_left - 1, None
            if random.random() < CANCELLED_SHARE:
                engine.cancel(random.choice(list(there)))
        for output in engine.step():
            num_tokens += len(output.tokens)
            num_cancelled += output.finish is FinishReason.CANCELLED
            if output.finish is not None:
                del there[output.request_id]
    return num_tokens, num_cancelled


def short(bench: Bench, random: Random) -> Request:
    """Return a short request of random length and sampling."""
    num_prompt, num_new = random.randint(1, RANDOM_PROMPT), random.randint(1, RANDOM_NEW)
    return bench.requests.one(num_prompt, num_new, random.choice(SAMPLINGS))
