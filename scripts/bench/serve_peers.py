"""transformers at the same work: a model of the same shape with random weights, beside ours in the same process.

It is imported only when it is measured.
"""

import gc
import importlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.dtypes import DTYPES
from bench.report import Row
from bench.serve_engine import Bench
from bench.serve_offline import check_count, row_of
from yafsdp_like.models import DecoderConfig
from yafsdp_like.models.hf_config import config_to_hf

GENERATE, GENERATE_BATCH = "transformers generate", "transformers generate_batch"
WARM_UP_TOKENS = 8  # that each request of generate_batch draws before it is timed


def obstacle() -> str | None:
    """Why it cannot be measured here, or None."""
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        return f"package transformers cannot be imported ({error})"
    return None


def measure(bench: Bench, ours: Sequence[Row]) -> Iterator[Row]:
    """A row per number of requests of ``ours``: the most by ``generate_batch``, the others by ``generate``."""
    model = build(bench.served.engine.config, bench)
    most = max(row["num_requests"] for row in ours)
    for row in ours:
        count = row["num_requests"]
        theirs = batched_row(model, count, bench) if count == most else static_row(model, count, bench)
        yield {**theirs, **ratios(row, theirs)}
    del model
    gc.collect()
    torch.compiler.reset()


def build(config: DecoderConfig, bench: Bench) -> Any:
    """The model that transformers has for this shape, on the device, with the values that it draws itself."""
    transformers = importlib.import_module("transformers")
    described = transformers.AutoConfig.for_model(**config_to_hf(config))
    torch.manual_seed(0)
    with bench.world.device:
        model = transformers.AutoModelForCausalLM.from_config(described, dtype=DTYPES[bench.options.dtype])
    return model.to(bench.world.device).eval()


def static_row(model: Any, count: int, bench: Bench) -> Row:
    """Measure `generate` with a cache of fixed size on `count` requests."""
    return attempt(GENERATE, count, lambda: row_of(GENERATE, count, bench, partial(static_s, model, count, bench)))


def static_s(model: Any, count: int, bench: Bench) -> float:
    """Of one call, in a cache of fixed size, for which transformers compiles the model on a GPU."""
    prompts = torch.tensor(prompts_of(count, bench), device=bench.world.device)
    settings = generation_settings(bench.options.new_tokens)
    begin = time.perf_counter()
    tokens = model.generate(prompts, **settings, cache_implementation="static")
    bench.world.synchronize()
    seconds = time.perf_counter() - begin
    check_count(tokens.numel() - prompts.numel(), count, bench)
    return seconds


def batched_row(model: Any, count: int, bench: Bench) -> Row:
    """One round, since it takes long. ``serving_seconds`` leaves out what a call does before and after requests.

    Not on a CPU: it sizes its cache by the memory that is free, and fills it, which takes minutes there.
    """
    if bench.world.device.type != "cuda":
        return {"impl": GENERATE_BATCH, "num_requests": count, "status": "left out: it is for GPUs"}

    def timed() -> Row:
        batched(model, count, WARM_UP_TOKENS, bench)
        begin = time.perf_counter()
        outputs = batched(model, count, bench.options.new_tokens, bench)
        seconds = time.perf_counter() - begin
        check_count(sum(len(output.generated_tokens) for output in outputs), count, bench)
        num_tokens = count * bench.options.new_tokens
        return {
            "impl": GENERATE_BATCH,
            "num_requests": count,
            "status": "ok",
            "num_tokens": num_tokens,
            "seconds": {"median": seconds, "min": seconds, "max": seconds},
            "tokens_per_second": num_tokens / seconds,
            "serving_seconds": serving_s(outputs),
        }

    return attempt(GENERATE_BATCH, count, timed)


def batched(model: Any, count: int, num_new: int, bench: Bench) -> list[Any]:
    """Run `generate_batch` on `count` requests, and return its outputs."""
    transformers = importlib.import_module("transformers")
    settings = transformers.GenerationConfig(**generation_settings(num_new), eos_token_id=-1)
    outputs = model.generate_batch(prompts_of(count, bench), generation_config=settings)
    bench.world.synchronize()
    return list(outputs.values())


def serving_s(outputs: Sequence[Any]) -> float | None:
    """From the first request's start to the last one's end, by its own clock; None where it does not say."""
    spans = [getattr(output, "lifespan", (-1.0, -1.0)) for output in outputs]
    if min(min(span) for span in spans) < 0:
        return None
    return max(end for _, end in spans) - min(start for start, _ in spans)


def generation_settings(num_new: int) -> dict[str, Any]:
    """Greedy, and nothing ends early."""
    return {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}


def prompts_of(count: int, bench: Bench) -> list[list[int]]:
    """Return `count` random prompts, as lists of tokens."""
    made = bench.requests.many(count, bench.options.prompt_tokens, bench.options.new_tokens)
    return [list(request.prompt) for request in made]


def attempt(impl: str, count: int, measured: Any) -> Row:
    """The row, or one that says what went wrong: others' failures must not cost the report of ours."""
    try:
        row: Row = measured()
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"impl": impl, "num_requests": count, "status": f"failed: {words[:200]}"}
    return row


def ratios(ours: Row, theirs: Row) -> Row:
    """Our tokens a second over theirs; nothing where theirs did not run."""
    if theirs["status"] != "ok":
        return {}
    found = {"ours_over_it": ours["tokens_per_second"] / theirs["tokens_per_second"]}
    if theirs.get("serving_seconds"):
        found["ours_over_its_serving"] = theirs["serving_seconds"] / ours["seconds"]["median"]
    return found
