"""Routes by which an admin loads and unloads LoRA adapters while models are served, in the words of vLLM's.

Owns the order of a load: its name is claimed first, and requests find the adapter last. A load or an unload that has
begun goes on to its end, even if who asked has gone or does not wait any longer, so that the engine and the catalog
always agree. The routes exist only with an admin key, which middleware.py checks: who may load may read directories of
this machine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI
from pydantic import Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse

from yafsdp_like.inference.engine.adapters import Adapters
from yafsdp_like.inference.http.bodies import Body
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.errors import ApiError, invalid, invalid_body, no_object, shorten, unavailable
from yafsdp_like.inference.http.middleware import LOAD_ADAPTER, UNLOAD_ADAPTER
from yafsdp_like.inference.http.model_routes import ADMIN_S, ask
from yafsdp_like.inference.http.service import Service


class AdapterName(Body):
    """Which adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: Any = None  # harmless: adapters have no numbers here


class NewAdapter(AdapterName):
    """Where an adapter is, and of which model."""

    lora_path: str = Field(min_length=1)
    base_model_name: str | None = None  # null: the only model


def add_adapter_routes(app: FastAPI, service: Service[Any], catalog: Catalog) -> None:
    """Add the two routes, if there is an admin key."""
    if catalog.options.admin_key is None:
        return
    running = set[asyncio.Task[None]]()  # the event loop itself would forget them

    async def finish(doing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(doing)
        running.add(task)
        task.add_done_callback(running.discard)
        await asyncio.wait({task}, timeout=ADMIN_S)
        if not task.done():
            raise unavailable(f"it goes on, but takes more than {ADMIN_S:.0f} s; see what is listed later")
        task.result()

    @app.post(LOAD_ADAPTER)
    async def load(http: HttpRequest) -> PlainTextResponse:
        asked = await _body(NewAdapter, http)
        parent = _parent(catalog, asked.base_model_name)
        try:
            catalog.claim(asked.lora_name)
            await finish(_load(service, catalog, parent, asked))
        except ValueError as error:
            raise ApiError(400, str(error), code="adapter_not_loaded") from error
        except OSError as error:  # of the disk, or the network behind it: who asks may try again
            message = f"adapter {shorten(asked.lora_name)} cannot be read: {type(error).__name__}: {error}"
            raise unavailable(message, code="adapter_not_loaded") from error
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post(UNLOAD_ADAPTER)
    async def unload(http: HttpRequest) -> PlainTextResponse:
        asked = await _body(AdapterName, http)
        parent = catalog.find(asked.lora_name).options.adapter_of
        if parent is None:
            raise invalid("lora_name", "is a model, not an adapter")
        try:
            await finish(_unload(service, catalog, parent, asked.lora_name))
        except ValueError as error:
            raise ApiError(409, str(error), code="adapter_busy") from error
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


async def _load(service: Service[Any], catalog: Catalog, model: str, asked: NewAdapter) -> None:
    """Read an adapter beside steps, of which only the beginning and the end are between two. Raises ValueError.

    Its name is claimed.
    """
    try:
        adapters = await ask(service, lambda engine: _adapters_of(catalog, model, engine), None)
        opened = await asyncio.to_thread(adapters.open, asked.lora_path)
        reserved = await ask(service, lambda _: adapters.reserve(asked.lora_name, opened), None)
        try:
            await asyncio.to_thread(adapters.fill, reserved, opened)
        except Exception:
            await ask(service, lambda _: adapters.abandon(reserved), None)
            raise
        await ask(service, lambda _: adapters.publish(reserved), None)
        catalog.add_adapter(asked.lora_name, model)
    finally:
        catalog.give_up(asked.lora_name)


async def _unload(service: Service[Any], catalog: Catalog, model: str, name: str) -> None:
    """Have the engine forget an adapter, and then the catalog. Raises ValueError."""
    await ask(service, lambda engine: _adapters_of(catalog, model, engine).unload(name), None)
    catalog.remove_adapter(name)


def _adapters_of(catalog: Catalog, model: str, engine: Any) -> Adapters:
    """Return the adapters of a model, in the engine's thread."""
    found: Adapters = engine.adapters_of(model) if catalog.is_pool else engine.adapters
    return found


def _parent(catalog: Catalog, name: str | None) -> str:
    """Return the name of the model that an adapter is to be of. Raises ApiError."""
    models = [known for known, parser in catalog.parsers.items() if parser.options.adapter_of is None]
    if name is None and len(models) > 1:
        raise invalid("base_model_name", f"say which model the adapter is of: {', '.join(map(repr, models))}")
    options = catalog.find(models[0] if name is None else name).options
    if options.adapter_of is not None:
        raise invalid("base_model_name", "is an adapter itself")
    return options.model_name


async def _body(kind: Any, http: HttpRequest) -> Any:
    """Return what was sent, as a ``kind``. Raises ApiError."""
    try:
        sent = json.loads(await http.body())
    except (ValueError, RecursionError):
        raise no_object() from None
    try:
        return kind.model_validate(sent)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False, include_context=False)[0]) from None
