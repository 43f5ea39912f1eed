"""Serve one model, or a pool of them: load it into an engine, add requests, read what each step generates.

Names are imported when they are first used, so that importing the package, or its options, loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yafsdp_like.inference.engine.engine import Engine
    from yafsdp_like.inference.engine.image_tokens import Image, place_images
    from yafsdp_like.inference.engine.metrics import Metrics
    from yafsdp_like.inference.engine.request import (
        Completion,
        FinishReason,
        QueueFullError,
        Request,
        RequestOutput,
        Token,
        TokenLimits,
    )
    from yafsdp_like.inference.options import EngineOptions, PoolOptions
    from yafsdp_like.inference.pool.host_weights import HostFullError, ModelUnavailableError
    from yafsdp_like.inference.pool.member import ModelState
    from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
    from yafsdp_like.inference.pool.pool import ModelPool
    from yafsdp_like.inference.weights.loading import open_model, world_transport
    from yafsdp_like.kernels.sampling_params import SamplingParams

__all__ = [
    "Completion",
    "Engine",
    "EngineOptions",
    "FinishReason",
    "HostFullError",
    "Image",
    "Metrics",
    "ModelPool",
    "ModelState",
    "ModelUnavailableError",
    "PoolOptions",
    "PooledModel",
    "QueueFullError",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "Token",
    "TokenLimits",
    "open_model",
    "place_images",
    "plan_pool",
    "world_transport",
]

_MODULES = {
    "Engine": "inference.engine.engine",
    "Metrics": "inference.engine.metrics",
    **dict.fromkeys(("Image", "place_images"), "inference.engine.image_tokens"),
    **dict.fromkeys(
        ("Completion", "RequestOutput", "FinishReason", "QueueFullError", "Request", "Token", "TokenLimits"),
        "inference.engine.request",
    ),
    **dict.fromkeys(("open_model", "world_transport"), "inference.weights.loading"),
    **dict.fromkeys(("EngineOptions", "PoolOptions"), "inference.options"),
    "ModelPool": "inference.pool.pool",
    "ModelState": "inference.pool.member",
    **dict.fromkeys(("PooledModel", "plan_pool"), "inference.pool.plan"),
    **dict.fromkeys(("HostFullError", "ModelUnavailableError"), "inference.pool.host_weights"),
    "SamplingParams": "kernels.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"yafsdp_like.{_MODULES[name]}"), name)
