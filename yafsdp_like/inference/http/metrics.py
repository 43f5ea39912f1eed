"""What /metrics says of answers and of the engine, and when the tokens of an answer came.

Owns names of metrics. Needs prometheus_client.
"""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from yafsdp_like.inference.engine.request import FinishReason
from yafsdp_like.inference.pool.driver import ModelStatus
from yafsdp_like.inference.pool.member import ModelState

BUCKETS_S = 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120
STEP_BUCKETS_S = 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1, 5  # of a step or two


ENGINE_HELP = {  # of the engine's figures by name, and so of the gauges ``yafsdp_like_engine_NAME``
    "num_running": "Sequences whose pages are on the device, of which each step computes tokens",
    "num_waiting": "Sequences that wait to run, swapped ones included",
    "num_swapped": "Waiting sequences whose pages are in host memory",
    "num_steps": "Steps since the start",
    "num_swapped_out": "Sequences that made room by a copy of their pages to host memory",
    "num_recomputed": "Sequences that made room by dropping pages, which are computed again",
    "num_tokens_computed": "Tokens that steps have computed, of prompts and drawn ones",
    "num_tokens_cached": "Tokens of prompts whose pages were found and not computed",
    "num_tokens_drawn": "Tokens drawn",
    "num_tokens_dropped": "Tokens drawn behind the end of their sequence, before the end was known",
    "num_tokens_drafted": "Tokens drafted and verified (speculative decoding)",
    "num_tokens_accepted": "Drafted tokens that were what the model drew",
    "num_draws_late": "Draws put off by a step, since what a grammar allows was not known yet",
    "num_chunks": "Parts of prompts computed without drawing a token",
    "num_pages_evicted": "Cached pages on the device that were given up for others",
    "num_images_encoded": "Images that a vision tower has encoded",
    "num_images_found": "Images whose features were found in pages, encoded before for this model or another",
    "kv_nbytes_used": "Bytes of pages on the device that sequences hold",
    "kv_nbytes_cached": "Bytes of pages on the device that no sequence holds, kept for prompts that begin alike",
    "kv_nbytes": "Bytes of all pages on the device",
    "host_kv_nbytes_used": "Bytes of pages in host memory that sequences hold",
    "host_kv_nbytes_cached": "Bytes of pages in host memory that no sequence holds",
    "host_kv_nbytes": "Bytes of all pages in host memory",
    "num_adapters_woken": "Copies of LoRA adapters into slots on the device",
    "recordings_nbytes": "Bytes of device memory that CUDA graphs took beside the plan",
    "device_busy_seconds": "Seconds that the device has worked on steps",
    "device_waiting_seconds": "Seconds that the device has waited for the CPU while there were requests",
    "device_waiting_share": "Share of the last steps' time that the device has waited for the CPU",
    "decode_step_cpu_p50_seconds": "CPU time of the last steps that only decode, median",
    "decode_step_cpu_p99_seconds": "CPU time of the last steps that only decode, 99th percentile",
    "mixed_step_cpu_p50_seconds": "CPU time of the last steps with parts of prompts, median",
    "mixed_step_cpu_p99_seconds": "CPU time of the last steps with parts of prompts, 99th percentile",
}


MODEL_HELP = {  # of figures of each model of a pool, and so of the gauges ``yafsdp_like_model_NAME``
    "state": "1 for the state that the model is in",
    "weights_nbytes": "Bytes of the model's weights",
    "loaded_nbytes": "Bytes of the model's weights that are in host memory: how far a load has got",
    "num_wakes": "Times that the model woke",
    "nbytes_copied": "Bytes of weights copied from host memory, prefetched ones included",
    "wake_seconds": "Seconds from a wake to all weights being there: what requests waited for them, or more",
    "num_running": "Sequences of the model whose pages are on the device",
    "num_waiting": "Sequences of the model that wait to run",
    "num_tokens_drawn": "Tokens that the model has drawn",
}


class LoopCounter(Collector):
    """A counter of the event loop's alone, which needs no lock: of what happens with every token."""

    def __init__(self, name: str, help: str, registry: CollectorRegistry) -> None:
        self._name, self._help, self._value = name, help, 0
        registry.register(self)

    def inc(self, count: int) -> None:
        """Add a number."""
        self._value += count

    def collect(self) -> Iterable[Metric]:
        """Yield what Prometheus reads."""
        yield CounterMetricFamily(self._name, self._help, self._value)


class LoopHistogram(Collector):
    """A histogram of the event loop's alone, as ``LoopCounter``."""

    def __init__(self, name: str, help: str, registry: CollectorRegistry, buckets: Sequence[float]) -> None:
        self._name, self._help, self._bounds = name, help, tuple(buckets)
        self._counts, self._sum = [0] * (len(buckets) + 1), 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        """Add so many equal values."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += count * value

    def collect(self) -> Iterable[Metric]:
        """Yield what Prometheus reads."""
        names = (*(str(float(bound)) for bound in self._bounds), "+Inf")
        pairs = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets=pairs, sum_value=self._sum)


class ServerMetrics:
    """What /metrics says, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        seconds = partial(Histogram, registry=self.registry, buckets=BUCKETS_S)
        self.responses = counter("yafsdp_like_http_responses", "Answers by route and status", ["route", "status"])
        self.finished = counter("yafsdp_like_finished", "Choices that ended, by reason", ["reason"])
        self.prompt_tokens = counter("yafsdp_like_prompt_tokens", "Tokens of accepted prompts")
        self.generated_tokens = LoopCounter("yafsdp_like_generated_tokens", "Tokens generated", self.registry)
        self.first_token = seconds(
            "yafsdp_like_time_to_first_token_seconds", "From a body's arrival to a choice's first token"
        )
        self.between_tokens = LoopHistogram(
            "yafsdp_like_time_between_tokens_seconds",
            "Between tokens of a choice, by when its outputs arrive",
            self.registry,
            STEP_BUCKETS_S,
        )
        self.whole = seconds("yafsdp_like_request_seconds", "From a body's arrival to a choice's end")
        self._gauges: dict[str, Gauge] = {}
        self._gauges_of_models: dict[str, Gauge] = {}

    def text(self, engine_metrics: Any) -> bytes:
        """The registry as Prometheus reads it, with a gauge for each number of the engine's metrics."""
        for item in dataclasses.fields(engine_metrics):
            value = getattr(engine_metrics, item.name)
            if isinstance(value, (int, float)):
                self._gauge(item.name).set(value)
        for name, status in getattr(engine_metrics, "models", {}).items():
            self._set_model(name, status)
        return prometheus_client.generate_latest(self.registry)

    def _set_model(self, name: str, status: ModelStatus) -> None:
        """Gauges of one model of a pool."""
        for state in ModelState:
            self._model_gauge("state").labels(name, state.value).set(state is status.state)
        for figure, value in {
            "weights_nbytes": status.figures.weights_nbytes,
            "loaded_nbytes": status.figures.loaded_nbytes,
            "num_wakes": status.figures.num_wakes,
            "nbytes_copied": status.figures.nbytes_copied,
            "wake_seconds": status.figures.wake_s,
            "num_running": status.engine.num_running,
            "num_waiting": status.engine.num_waiting,
            "num_tokens_drawn": status.engine.num_tokens_drawn,
        }.items():
            self._model_gauge(figure).labels(name).set(value)

    def _model_gauge(self, name: str) -> Gauge:
        if name not in self._gauges_of_models:
            labels = ["model", "state"] if name == "state" else ["model"]
            self._gauges_of_models[name] = Gauge(
                f"yafsdp_like_model_{name}", MODEL_HELP[name], labels, registry=self.registry
            )
        return self._gauges_of_models[name]

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"yafsdp_like_engine_{name}", ENGINE_HELP[name], registry=self.registry)
        return self._gauges[name]


@dataclass
class LatencyTracker:
    """When the tokens of one request came."""

    metrics: ServerMetrics
    arrival: float
    last: dict[int, float] = field(default_factory=dict)  # by choice

    def observe_output(self, index: int, num_tokens: int, finish: FinishReason | None) -> None:
        """An output of a choice has come."""
        now = time.monotonic()
        if num_tokens:
            self.metrics.generated_tokens.inc(num_tokens)
            if index in self.last:
                self.metrics.between_tokens.observe((now - self.last[index]) / num_tokens, num_tokens)
            else:
                self.metrics.first_token.observe(now - self.arrival)
            self.last[index] = now
        if finish is not None:
            self.metrics.finished.labels(finish.name.lower()).inc()
            self.metrics.whole.observe(now - self.arrival)
