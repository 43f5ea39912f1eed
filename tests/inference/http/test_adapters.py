"""LoRA adapters over HTTP: asked by name, listed, loaded and unloaded, by whom, and what is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch

from tests.inference.engine.test_adapters import KINDS, write_adapter
from tests.inference.http.servers import (
    COMPLETIONS,
    MAX_SEQ_LEN,
    MODEL,
    PROMPT,
    SECONDS,
    make_decoder,
    run,
    serving_app,
)
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.http import adapter_routes
from yafsdp_like.inference.http.catalog import Catalog
from yafsdp_like.inference.http.protocol import RequestParser, ServerOptions
from yafsdp_like.inference.http.server import create_catalog_app
from yafsdp_like.inference.http.service import Service
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.weights.loading import model_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.inference.http.servers import Running
    from yafsdp_like.inference.text.codec import Codec

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
KEY, ADMIN_KEY = {"authorization": "Bearer users"}, {"authorization": "Bearer admins"}
OPTIONS = EngineOptions(kv_nbytes=1 << 20, max_batch_size=4, max_batch_tokens=64, max_seq_len=MAX_SEQ_LEN)


@pytest.fixture(scope="module")
def directories(codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory, config = tmp_path_factory.mktemp("adapters"), make_decoder(codec).config
    return {name: write_adapter(directory, config, name) for name in KINDS}


def make_adapted(codec: Codec, directories: dict[str, Path]) -> tuple[Engine, Catalog]:
    """One adapter from the start, and room for another."""
    options = EngineOptions(**{**vars(OPTIONS), "adapter_slots": 2, "host_adapters": 2})
    engine = Engine.load(
        model_of(make_decoder(codec)), options, dtype=torch.float32, adapters={"wide": directories["wide"]}
    )
    told = ServerOptions(
        model_name=MODEL,
        aliases=("other",),
        vocab_size=engine.config.vocab_size,
        max_seq_len=MAX_SEQ_LEN,
        api_key="users",
        admin_key="admins",
    )
    catalog = Catalog([RequestParser(codec, told)])
    catalog.add_adapter("wide", MODEL)
    return engine, catalog


@pytest.fixture
def running(codec: Codec, directories: dict[str, Path]) -> Iterator[Running]:
    engine, catalog = make_adapted(codec, directories)
    service = Service(engine)
    with serving_app(service, engine, create_catalog_app(service, catalog)) as running:
        yield running
        running.check_idle()


def text_of(running: Running, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    answer = running.post(COMPLETIONS, body, headers=KEY)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model.replace("other", MODEL)
    text: str = answer.json()["choices"][0]["text"]
    return text


def error_of(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_adapters_are_models_that_are_listed_loaded_and_unloaded(
    running: Running, directories: dict[str, Path]
) -> None:
    plain, wide = text_of(running, MODEL), text_of(running, "wide")
    assert wide != plain == text_of(running, "other")
    sent = {"lora_name": "narrow", "lora_path": str(directories["stabilized"])}
    loaded = running.post(LOAD, sent, headers=ADMIN_KEY)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'narrow' added successfully.")
    narrow = text_of(running, "narrow")
    assert len({plain, wide, narrow}) == 3
    client = running.client(api_key="users")
    parents = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert parents == {MODEL: None, "wide": MODEL, "narrow": MODEL}
    assert client.models.retrieve("narrow").id == "narrow"
    said = client.chat.completions.create(model="narrow", messages=[{"role": "user", "content": "x"}], max_tokens=2)
    assert said.model == "narrow"
    unloaded = running.post(UNLOAD, {"lora_name": "wide"}, headers=ADMIN_KEY)
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'wide' removed successfully.")
    with pytest.raises(openai.NotFoundError, match="there is no 'wide' here, only 'tiny', 'narrow'"):
        client.completions.create(model="wide", prompt=PROMPT)
    again = {"lora_name": "wide", "lora_path": str(directories["wide"]), "base_model_name": MODEL}
    assert running.post(LOAD, again, headers=ADMIN_KEY).status_code == 200
    assert (text_of(running, "wide"), text_of(running, "narrow")) == (wide, narrow)


def test_only_an_admin_loads_and_unloads(running: Running, directories: dict[str, Path]) -> None:
    sent = {"lora_name": "narrow", "lora_path": str(directories["stabilized"])}
    for path in (LOAD, UNLOAD):
        assert "this server's admin key" in error_of(running.post(path, sent, headers=KEY), 401)
        assert "this server's admin key" in error_of(running.post(path, sent), 401)
    assert running.call(lambda engine: engine.adapters.names) == ("wide",)


def test_what_cannot_be_loaded_or_unloaded_is_one_clear_error(running: Running, directories: dict[str, Path]) -> None:
    def load(name: str, path: object, **more: Any) -> Any:
        return running.post(LOAD, {"lora_name": name, "lora_path": str(path), **more}, headers=ADMIN_KEY)

    assert "the name 'wide' is taken" in error_of(load("wide", directories["down"]), 400)
    assert "the name 'other' is taken" in error_of(load("other", directories["down"]), 400)
    assert "expected a directory of a LoRA adapter" in error_of(load("x", "/nowhere"), 400)
    assert "there is no 'y' here" in error_of(load("x", directories["down"], base_model_name="y"), 404)
    assert "is an adapter itself" in error_of(load("x", directories["down"], base_model_name="wide"), 400)
    assert "no such field" in error_of(load("x", directories["down"], more=1), 400)
    assert "JSON object" in error_of(running.post(LOAD, content=b"[", headers=ADMIN_KEY), 400)
    assert "lora_path: " in error_of(running.post(LOAD, {"lora_name": "x"}, headers=ADMIN_KEY), 400)
    assert load("x", directories["down"]).status_code == 200
    assert "host memory holds 2 adapters" in error_of(load("y", directories["attention"]), 400)
    assert "there is no 'y' here" in error_of(running.post(UNLOAD, {"lora_name": "y"}, headers=ADMIN_KEY), 404)
    assert "not an adapter" in error_of(running.post(UNLOAD, {"lora_name": MODEL}, headers=ADMIN_KEY), 400)


def test_an_adapter_with_requests_is_not_unloaded(running: Running) -> None:
    adapter = running.call(lambda engine: engine.adapters.find("wide"))
    adapter.num_requests += 1
    assert "has 1 requests" in error_of(running.post(UNLOAD, {"lora_name": "wide"}, headers=ADMIN_KEY), 409)
    adapter.num_requests -= 1
    assert text_of(running, "wide")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("the file is no longer whole"), 400), (OSError(5, "Input/output error"), 503)],
    ids=["a damaged file", "a disk that is gone"],
)
def test_what_goes_wrong_while_values_are_read_is_said_and_leaves_no_trace(
    running: Running, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """Prevents: an image that stays reserved for an adapter that nobody finds; an error without words."""

    def fail(*_: object) -> None:
        raise error

    sent = {"lora_name": "x", "lora_path": str(directories["down"])}
    with monkeypatch.context() as context:
        context.setattr("yafsdp_like.inference.weights.adapter_files.stored_in", fail)  # the header
        assert str(error) in error_of(running.post(LOAD, sent, headers=ADMIN_KEY), 400)
    with monkeypatch.context() as context:
        context.setattr("yafsdp_like.inference.engine.adapters.fill", fail)
        refused = running.post(LOAD, sent, headers=ADMIN_KEY)
        assert str(error) in error_of(refused, status) and refused.json()["error"]["code"] == "adapter_not_loaded"
        assert ("retry-after" in refused.headers) == (status == 503)
    assert running.post(LOAD, sent, headers=ADMIN_KEY).status_code == 200
    assert text_of(running, "x")


# --- loads that take long ---


def wait_until(is_so: Any) -> None:
    until = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.005)


def test_a_load_that_nobody_waits_for_any_longer_is_known_once_it_is_done(
    running: Running, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: names and images that an engine keeps for an adapter which no request finds, and no admin unloads."""
    goes_on = threading.Event()
    asyncio.run_coroutine_threadsafe(running.service.call(lambda _: goes_on.wait(SECONDS)), running.loop)
    sent = {"lora_name": "x", "lora_path": str(directories["down"])}
    with monkeypatch.context() as context:
        context.setattr(adapter_routes, "ADMIN_S", 0.02)
        assert "it goes on" in error_of(running.post(LOAD, sent, headers=ADMIN_KEY), 503)
    assert "the name 'x' is taken" in error_of(running.post(LOAD, sent, headers=ADMIN_KEY), 400)
    goes_on.set()
    wait_until(lambda: "x" in {model.id for model in running.client(api_key="users").models.list()})
    assert text_of(running, "x") != text_of(running, MODEL)
    assert running.post(UNLOAD, {"lora_name": "x"}, headers=ADMIN_KEY).status_code == 200
    assert running.call(lambda engine: engine.adapters.names) == ("wide",)


def test_a_load_whose_admin_has_gone_does_not_give_up_the_image_that_it_fills(
    codec: Codec, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: another adapter given an image that a thread still writes."""
    engine, catalog = make_adapted(codec, directories)
    begun, goes_on, fill = threading.Event(), threading.Event(), engine.adapters.fill

    def slow_fill(*arguments: Any) -> None:
        begun.set()
        assert goes_on.wait(SECONDS)
        fill(*arguments)

    monkeypatch.setattr(engine.adapters, "fill", slow_fill)

    async def main(service: Service[Any]) -> None:
        transport = httpx.ASGITransport(create_catalog_app(service, catalog))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=ADMIN_KEY) as client:

            async def load(name: str) -> httpx.Response:
                return await client.post(LOAD, json={"lora_name": name, "lora_path": str(directories["down"])})

            first = asyncio.create_task(load("x"))
            assert await asyncio.to_thread(begun.wait, SECONDS)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert "the name 'x' is taken" in error_of(await load("x"), 400)
            assert "host memory holds 2 adapters" in error_of(await load("y"), 400)
            goes_on.set()
            while "x" not in catalog.parsers:
                await asyncio.sleep(0.005)
            assert engine.adapters.names == ("wide", "x")
            assert "host memory holds 2 adapters" in error_of(await load("y"), 400)

    run(engine, main)


def test_a_name_is_claimed_once_for_all_models_of_a_pool(codec: Codec, directories: dict[str, Path]) -> None:
    _, catalog = make_adapted(codec, directories)
    catalog.claim("x")
    for name in ("x", "wide", "other"):
        with pytest.raises(ValueError, match=f"the name '{name}' is taken"):
            catalog.claim(name)
    catalog.give_up("x")
    catalog.add_adapter("x", MODEL)
    with pytest.raises(ValueError, match="the name 'x' is taken"):
        catalog.add_adapter("x", MODEL)
