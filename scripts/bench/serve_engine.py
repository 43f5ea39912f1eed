"""The engine that is measured, what it is asked, and how much memory it took."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from bench.allocator import allocator_counts, release_cached_memory
from bench.dtypes import DTYPES
from bench.serve_quantized import quantized_model
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request, RequestOutput
from yafsdp_like.inference.kv.layer_groups import LayerGroup
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.capacity import Capacity
from yafsdp_like.inference.weights.loading import Model, load, open_model, random_model, world_transport
from yafsdp_like.kernels.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from bench.measure import Metrics
    from bench.serve_options import ServeBenchOptions
    from launch.world import World
    from yafsdp_like.inference.plan.serving_plan import ServingPlan
    from yafsdp_like.inference.weights.store import Weights
    from yafsdp_like.models.decoder import DecoderConfig

Result = TypeVar("Result")
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Served:
    """An engine, and what the device said before it was there and when it was ready."""

    engine: Engine
    weights: Weights
    before: Metrics
    ready: Metrics

    @property
    def plan(self) -> ServingPlan:
        """The plan of the weights' engine."""
        return self.weights.plan

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return self.weights.device

    def drain(self) -> None:
        """Step until no request is left."""
        while self.engine.has_work:
            self.engine.step()


@dataclass
class Requests:
    """Random ones, other ones each time, the same in every run. Raises what `Request` does."""

    vocab_size: int
    random: random.Random = field(default_factory=lambda: random.Random(0))
    num_made: int = 0
    adapters: Sequence[str] = ()  # that they name in turn

    def one(self, num_prompt: int, num_new: int, sampling: SamplingParams = GREEDY) -> Request:
        """Return a request of `num_prompt` random tokens that draws `num_new`."""
        self.num_made += 1
        prompt = tuple(self.random.choices(range(self.vocab_size), k=num_prompt))
        adapter = self.adapters[self.num_made % len(self.adapters)] if self.adapters else None
        return Request(str(self.num_made), prompt, sampling, max_tokens=num_new, adapter=adapter)

    def many(self, count: int, num_prompt: int, num_new: int) -> list[Request]:
        """Return `count` such requests."""
        return [self.one(num_prompt, num_new) for _ in range(count)]


@dataclass(frozen=True)
class Bench:
    """What every measurement is given."""

    options: ServeBenchOptions
    world: World
    served: Served
    requests: Requests


def serve(options: ServeBenchOptions, world: World) -> Served:
    """The engine that the options ask for; random weights are drawn on the device."""
    release_cached_memory(world)
    before = memory_reading(world)
    model = model_of(options)
    weights = load(  # without a memory limit, so that a mode that moves units moves all layers
        model,
        engine_options(options, model.config),
        device=world.device,
        dtype=DTYPES[options.dtype],
        mode=options.mode,
        transport=world_transport(world.device),
    )
    engine = Engine(weights)
    gc.collect()
    gc.freeze()  # as the server does: a collection would take 0.15 s between two steps
    world.synchronize()
    return Served(engine, weights, before, memory_reading(world))


def use_further_engine(
    bench: Bench,
    model: Model,
    use: Callable[[Engine], Result],
    *,
    adapters: Mapping[str, Path] | None = None,
    draft: Model | None = None,
    speculate: str | None = None,
) -> Result:
    """Return what `use` does with another engine beside the one that is measured, of the same options but these.

    Its memory is taken beside the other's, and given back behind it, so that `use` must not keep it.
    """
    options, device = bench.options, bench.world.device
    wanted = replace(engine_options(options, model.config), speculate=speculate)
    dtype, mode = DTYPES[options.dtype], options.mode
    engine = Engine.load(model, wanted, device=device, dtype=dtype, mode=mode, adapters=adapters, draft=draft)
    gc.collect()
    gc.freeze()  # as `serve` does
    try:
        return use(engine)
    finally:
        engine.close()
        del engine
        gc.unfreeze()
        release_cached_memory(bench.world)
        gc.freeze()


def model_of(options: ServeBenchOptions) -> Model:
    """Random values instead where it is to have another number of layers, or to be quantized."""
    model = open_model(options.model)
    name, config = model.name, model.config
    if options.num_layers is not None:
        name, config = f"{name}, {options.num_layers} layers", replace(config, num_layers=options.num_layers)
    if options.quantize is not None:
        return quantized_model(name, config, options.quantize)
    return model if config == model.config else random_model(name, config)


def engine_options(options: ServeBenchOptions, config: DecoderConfig) -> EngineOptions:
    """Room for what the measurements need, and no more."""
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    dtype = str(DTYPES[options.dtype]).removeprefix("torch.")
    groups = LayerGroup.of_windows(windows, config.num_kv_heads, config.head_dim, EngineOptions.page_size, dtype)
    spare = (options.max_batch_size + 1) * EngineOptions.page_size  # a page for everybody who goes on
    capacity = Capacity(groups, options.max_batch_tokens)
    return EngineOptions(
        kv_nbytes=capacity.nbytes_for(options.num_context_tokens + spare, options.max_seq_len),
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        tpot_ms=min(options.tpots_ms, default=None),
        max_seq_len=options.max_seq_len,
        graphs=options.graphs,
    )


def memory_reading(world: World) -> Metrics:
    """Of the device now; empty where it cannot tell. In bytes, and in calls of PyTorch's allocator."""
    if world.device.type != "cuda":
        return {}
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(world.device)
    return {
        **allocator_counts(world),
        "allocated_nbytes": torch.cuda.memory_allocated(world.device),
        "reserved_nbytes": torch.cuda.memory_reserved(world.device),
        "device_nbytes": total_nbytes - free_nbytes,
    }


class Decoding:
    """A batch of requests of which all draw in every step, from ``fill`` on."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._num_drawn = {request.id: 0 for request in requests}
        self._num_prompt = sum(len(request.prompt) for request in requests)
        for request in requests:
            engine.add(request)

    @property
    def context(self) -> float:
        """Tokens of a sequence, the mean over the batch."""
        return (self._num_prompt + sum(self._num_drawn.values())) / len(self._num_drawn)

    def fill(self) -> None:
        """Until everybody has drawn, and all draw at once."""
        while not all(self._num_drawn.values()):
            self.step()

    def step(self) -> list[RequestOutput]:
        """One of the engine's. Raises RuntimeError where a request ends, for which it was to have no reason."""
        outputs = self._engine.step()
        for output in outputs:
            if output.finish is not None:
                raise RuntimeError(f"request {output.request_id} ended while it was measured: {output.finish}")
            self._num_drawn[output.request_id] += len(output.tokens)
        return outputs

    def stop(self) -> None:
        """Cancel all requests, and step until they are gone."""
        for request_id in self._num_drawn:
            self._engine.cancel(request_id)
        while self._engine.has_work:
            self._engine.step()
