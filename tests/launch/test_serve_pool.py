"""launch.serve --pool: its file, its mistakes, and a process that serves what can be opened."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from launch import pool as pool_module
from launch import serve, server
from launch.options import SERVE_POOL, PoolModelOptions
from launch.pool import load_pool, targets_of
from tests.inference.engine.test_adapters import write_adapter
from tests.inference.http.servers import SECONDS, make_decoder, serving_app
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.http.server import create_catalog_app
from yafsdp_like.inference.http.service import Service
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.weights.adapter_files import open_adapter
from yafsdp_like.models.hf import load_hf_config, save_hf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.inference.weights.adapter_files import Adapter
    from yafsdp_like.models.decoder import DecoderConfig

ROOT = Path(__file__).parents[2]
FILE = """
port: 0
device: cpu
models:
  one: {path: %(directory)s, ttl_s: 60, engine: {max_batch_size: 4, max_batch_tokens: 64}}
  two: {path: %(directory)s, engine: {max_batch_size: 2, max_batch_tokens: 32, max_seq_len: 128}}
  lost: {path: /nowhere/base}
pool: {memory_limit_nbytes: 8MiB}
http: {api_key: users}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    save_hf(make_decoder(Codec.load(write_tokenizer(directory))), directory)
    (tmp_path / "pool.yaml").write_text(FILE % {"directory": directory})
    return tmp_path / "pool.yaml"


@pytest.fixture
def served(file: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that listens, and what it has said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.serve", "--pool", str(file), "--admin-key=admins"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line.strip())
            if line.startswith("serving on "):
                break
        yield process, said
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_pool_from_a_file_serves_what_can_be_opened_and_says_what_cannot(
    served: tuple[subprocess.Popen[str], list[str]],
) -> None:
    process, said = served
    assert said[-1].startswith("serving on "), said
    assert any(line.startswith("one: ") and "of weights" in line for line in said)
    assert any(line.startswith("warning: model 'lost' could not be opened") for line in said)
    with httpx.Client(
        base_url=said[-1].removeprefix("serving on "), headers={"authorization": "Bearer users"}, timeout=SECONDS
    ) as http:
        listed = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        assert {name: model["state"] for name, model in listed.items()} == {
            "one": "asleep",
            "two": "asleep",
            "lost": "failed",
        }
        assert listed["two"]["max_model_len"] == 128
        statuses = [
            http.post("/v1/completions", json={"model": name, "prompt": "The"}).status_code
            for name in ("one", "two", "lost", "none")
        ]
        assert statuses == [200, 200, 503, 404]
        admin = {"authorization": "Bearer admins"}
        assert http.post("/admin/models/one/sleep", headers=admin).json()["state"] == "asleep"
    process.send_signal(signal.SIGTERM)
    assert process.wait(2 * SECONDS) == 0


def test_adapters_belong_to_a_model_of_the_pool(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the file, where one that cannot be opened is left out, and loaded over HTTP, where their model is said."""
    config = load_hf_config(file.parent / "base")
    first, later = (write_adapter(file.parent, config, name) for name in ("wide", "attention"))
    own = f"adapters: {{sql: {first}, lost: /nowhere}}, engine: {{host_adapters: 2, "
    file.write_text(file.read_text().replace("ttl_s: 60, engine: {", own))
    pool = load_pool(SERVE_POOL.load([f"--config={file}", "--admin-key=admins"]))
    assert "warning: adapter 'lost' could not be opened" in (said := capsys.readouterr().out)
    assert "requests call the models 'one', 'two', 'sql'" in said
    assert pool.driver is not None
    service = Service(pool.driver)
    users, admins = ({"authorization": f"Bearer {key}"} for key in ("users", "admins"))
    with serving_app(service, pool.driver, create_catalog_app(service, pool.catalog)) as running:

        def text_of(model: str) -> str:
            body = {"model": model, "prompt": "x y", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = running.post("/v1/completions", body, headers=users)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])

        def load(**sent: str) -> httpx.Response:
            sent = {"lora_name": "chat", "lora_path": str(later), **sent}
            return running.post("/v1/load_lora_adapter", sent, headers=admins)

        assert "say which model the adapter is of: 'one', 'two'" in load().text
        assert "make it with adapter_slots" in load(base_model_name="two").text
        assert load(base_model_name="one").status_code == 200
        assert len({text_of("one"), text_of("sql"), text_of("chat")}) == 3
        listed = running.get("/v1/models", headers=users).json()["data"]
        parents = {model["id"]: model.get("parent") for model in listed}
        assert parents == {"one": None, "two": None, "sql": "one", "chat": "one", "lost": None}
        moved = running.post("/admin/models/sql/sleep", headers=admins)
        assert (moved.status_code, moved.json()["id"], moved.json()["state"]) == (200, "one", "asleep")
        running.check_idle()


def test_adapters_that_cannot_be_loaded_are_left_out(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose file is cut short once it was opened, and one with the name of a model."""
    config = load_hf_config(file.parent / "base")
    first, later = (write_adapter(file.parent, config, name) for name in ("wide", "attention"))

    def open_and_cut(directory: Path, config: DecoderConfig) -> Adapter:
        opened = open_adapter(directory, config)
        if opened.directory == later:
            os.truncate(later / "adapter_model.safetensors", 2000)
        return opened

    monkeypatch.setattr(pool_module, "open_adapter", open_and_cut)
    own = f"adapters: {{cut: {later}, two: {first}, sql: {first}}}, engine: {{"
    file.write_text(file.read_text().replace("ttl_s: 60, engine: {", own))
    pool = load_pool(SERVE_POOL.load([f"--config={file}"]))
    said = capsys.readouterr().out
    assert "warning: adapter 'cut' could not be loaded" in said
    assert "warning: adapter 'two' could not be loaded: the name 'two' is taken" in said
    assert "requests call the models 'one', 'two', 'sql'" in said
    assert pool.driver is not None and [*pool.driver.adapters_of("one").names] == ["sql"]
    pool.driver.close()


def test_a_pool_is_not_closed_beside_a_service_that_may_be_in_a_step(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SERVE_POOL.load([f"--config={file}"])
    pool = load_pool(options)
    monkeypatch.setattr(server, "run_server", lambda *_, **__: None)
    with socket.socket() as address, pytest.raises(AssertionError, match="the service is new, and may still use"):
        server.serve_pool(pool, options, address)
    assert pool.pool.is_loaded("one")
    pool.pool.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {a: {path: b}}\n", "no pool.memory_limit_nbytes given"),
        ("models: {}\npool: {memory_limit_nbytes: 1GiB}\n", "expected at least one model, found none"),
        ("pool: {memory_limit_nbytes: 1GiB}\n", "no models given"),
        ("models: {a: {path: b, tll_s: 5}}\npool: {memory_limit_nbytes: 1GiB}\n", "models in"),
        ("models: {a: {path: b, engine: {max_batch: 5}}}\npool: {memory_limit_nbytes: 1GiB}\n", "models in"),
        ("models: {a: {path: b, ttl_s: -5}}\npool: {memory_limit_nbytes: 1GiB}\n", "models in"),
        ("models: {a: {path: b, tpot_ms: 0}}\npool: {memory_limit_nbytes: 1GiB}\n", "models in"),
        ("modles: {}\n", "did you mean 'models'?"),
    ],
)
def test_mistakes_in_the_file_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "pool.yaml").write_text(text)
    assert serve.main([f"--pool={tmp_path / 'pool.yaml'}"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1


def test_the_example_is_a_pool_that_can_be_served() -> None:
    options = SERVE_POOL.load([str(ROOT / "configs" / "serve_pool.yaml"), "--port=1"])
    assert [*options.models] == ["smollm2", "tuned"] and options.port == 1
    assert options.models["tuned"].engine.max_batch_size == 8
    assert targets_of(options.models) is None and options.pool.admission_load == 1.0


def test_a_model_without_targets_beside_one_with_some_has_loose_ones() -> None:
    models = {
        "a": PoolModelOptions("a", ttft_ms=500.0),
        "b": PoolModelOptions("b", tpot_ms=20.0),
        "c": PoolModelOptions("c"),
    }
    assert targets_of(models) == {"a": Targets(0.5, 0.1), "b": Targets(10.0, 0.02), "c": Targets(10.0, 0.1)}
