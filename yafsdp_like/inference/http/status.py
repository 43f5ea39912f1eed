"""The status page: how the device, the models, the queues and the planned memory stand, live in a browser.

Owns what ``/status.json`` says. ``/status`` is one HTML file that loads nothing but that, once a second.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from yafsdp_like.inference.http.model_routes import ask

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from yafsdp_like.inference.http.catalog import Catalog
    from yafsdp_like.inference.http.metrics import ServerMetrics
    from yafsdp_like.inference.http.service import Service
    from yafsdp_like.inference.pool.driver import ModelStatus

STATUS_S = 5.0  # that the engine has to say how things stand
PAGE = Path(__file__).with_name("status.html")


def add_status_routes(app: FastAPI, service: Service[Any], catalog: Catalog, metrics: ServerMetrics) -> None:
    """Add the page and its data, which need no key, as ``/metrics`` does not.

    They hold figures and models' names; why a model has failed is said by ``/v1/models``, which needs one.
    """

    @app.get("/status", response_model=None)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"cache-control": "no-cache"})

    @app.get("/status.json")
    async def status() -> dict[str, Any]:
        asked = await ask(service, lambda engine: (engine.metrics(), engine.occupancy(), _device()), STATUS_S)
        figures, stretches, device = asked
        numbers = _numbers(figures)
        models = getattr(figures, "models", None)
        return {
            "state": service.state.value,
            "problem": service.unhealthy_reason,
            "device": device,
            "figures": numbers,
            "models": _alone(catalog, numbers) if models is None else [_model(*item) for item in models.items()],
            "failed": list(catalog.errors),
            "memory": [stretch._asdict() for stretch in stretches],
            "seconds": {
                "to the first token": _buckets(metrics.first_token),
                "between tokens": _buckets(metrics.between_tokens),
                "of a request": _buckets(metrics.whole),
            },
        }


def _numbers(figures: Any) -> dict[str, float]:
    found = {item.name: getattr(figures, item.name) for item in dataclasses.fields(figures)}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def _device() -> dict[str, Any]:
    """The current device of the thread that asks, the engine's."""
    if not torch.cuda.is_available():
        return {"name": "CPU"}
    free, total = torch.cuda.mem_get_info()
    return {"name": torch.cuda.get_device_name(), "nbytes": total, "free_nbytes": free}


def _alone(catalog: Catalog, numbers: dict[str, float]) -> list[dict[str, Any]]:
    """A server's only model, of which the engine's figures are."""
    kept = {name: numbers[name] for name in ("num_running", "num_waiting", "num_tokens_drawn")}
    return [
        {"name": name, "state": "awake", **kept}
        for name, parser in catalog.parsers.items()
        if not parser.options.adapter_of
    ]


def _model(name: str, status: ModelStatus) -> dict[str, Any]:
    return {
        "name": name,
        "state": status.state,
        "num_running": status.engine.num_running,
        "num_waiting": status.engine.num_waiting,
        "num_tokens_drawn": status.engine.num_tokens_drawn,
        **dataclasses.asdict(status.figures),
    }


def _buckets(histogram: Collector) -> list[tuple[float | None, float]]:
    """Return upper bounds in seconds, and how many were below each since the start; the last bound is None."""
    buckets = [s for s in next(iter(histogram.collect())).samples if s.name.endswith("_bucket")]
    return [(None if (bound := bucket.labels["le"]) == "+Inf" else float(bound), bucket.value) for bucket in buckets]
