"""Routes that list models, and those of a pool's admin: load, unload, sleep, wake_up.

Owns what is said of a model's state. Admin routes exist only for a pool with an admin key, which middleware.py checks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI

from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.errors import ApiError, unavailable
from yafsdp_like.inference.http.service import Service, UnavailableError
from yafsdp_like.inference.pool.driver import ModelStatus, PoolDriver
from yafsdp_like.inference.pool.host_weights import ModelUnavailableError
from yafsdp_like.inference.pool.member import ModelState

T = TypeVar("T")
ACTIONS = "load", "unload", "sleep", "wake_up"

STATES_S = 5.0  # that the engine has to say how its models stand
ADMIN_S = 600.0  # that it has to do what an admin wants, between two steps
LOOK_S = 0.1  # between two looks at a load


async def ask(service: Service[Any], function: Callable[[Any], T], within_s: float | None) -> T:
    """What ``function(engine)`` gives. Raises ApiError, 503, if the engine has failed, or does not say it in time.

    It is still called then, later: what must be known of, or undone, is asked for with None, however long it takes.
    """
    try:
        async with asyncio.timeout(within_s):
            return await service.call(function)
    except UnavailableError as error:
        raise unavailable(str(error)) from error
    except TimeoutError:
        raise unavailable(f"the engine is busy: {service.busy_s:.0f} s in one step") from None


def add_model_routes(app: FastAPI, service: Service[Any], catalog: Catalog) -> None:
    """Add /v1/models, and for a pool with an admin key /admin/models."""
    created = int(time.time())

    def listed(name: str, status: ModelStatus | None = None) -> dict[str, Any]:
        model: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "yafsdp_like"}
        if name in catalog.errors:
            return {**model, "state": ModelState.FAILED.value, "error": catalog.errors[name]}
        options = catalog.parsers[name].options
        model["max_model_len"] = options.max_seq_len
        if options.adapter_of is not None:
            model["parent"] = options.adapter_of
        if status is not None:
            model["state"] = status.state.value
            model["weights_nbytes"] = status.figures.weights_nbytes
            model["loaded_nbytes"] = status.figures.loaded_nbytes
            if status.error is not None:
                model["error"] = status.error
        return model

    async def statuses() -> dict[str, ModelStatus]:
        return await ask(service, lambda pool: pool.models(), STATES_S) if catalog.is_pool else {}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        found = await statuses()
        return {
            "object": "list",
            "data": [listed(name, found.get(name)) for name in (*catalog.parsers, *catalog.errors)],
        }

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        known = name if name in catalog.errors else catalog.find(name).options.model_name
        return listed(known, (await statuses()).get(known))

    if catalog.is_pool and catalog.options.admin_key is not None:

        @app.post("/admin/models/{name:path}/{action}")
        async def administer(name: str, action: str) -> dict[str, Any]:
            if action not in ACTIONS:
                raise ApiError(404, f"action: expected one of {', '.join(ACTIONS)}, found {action!r}")
            options = catalog.find(name).options
            known = options.adapter_of or options.model_name
            if action in ("load", "wake_up"):
                await _load(service, known)
            return listed(known, await ask(service, lambda pool: _administer(pool, known, action), ADMIN_S))


async def _load(service: Service[Any], name: str) -> None:
    """Have a model loaded beside the steps of others, and return once it is. Raises ApiError."""
    status = await ask(service, lambda pool: _administer(pool, name, "load"), STATES_S)
    state, error = status.state, status.error
    while state is ModelState.LOADING:
        await asyncio.sleep(LOOK_S)
        state, error = await ask(service, lambda pool: pool.state_of(name), STATES_S)
    if error is not None:
        raise unavailable(error, code="model_unavailable")
    if state is ModelState.ABSENT:
        raise ApiError(409, f"model {name!r} was unloaded while it was being loaded", code="model_busy")


def _administer(pool: PoolDriver, name: str, action: str) -> ModelStatus:
    """Do it in the engine's thread, and return how the model stands then. Raises ApiError."""
    try:
        getattr(pool, action)(name)
    except ModelUnavailableError as error:
        raise unavailable(str(error), code="model_unavailable") from error
    except ValueError as error:
        raise ApiError(409, str(error), code="model_busy") from error
    return pool.models()[name]
