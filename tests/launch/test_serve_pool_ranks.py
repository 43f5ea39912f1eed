"""launch.serve --pool on two ranks: one server, models cut in two, and the end of all where one is killed."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.inference.engine.test_tp_driver import data_of, rank_commands
from tests.inference.http.servers import COMPLETIONS, make_decoder, make_engine
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models.hf import save_hf

if TYPE_CHECKING:
    from pathlib import Path

FILE = """
port: 0
device: cpu
grace_s: 30
models:
  one: {path: %(directory)s, ttl_s: 60, engine: {max_batch_size: 4, max_batch_tokens: 64}}
  two: {path: %(directory)s, engine: {max_batch_size: 2, max_batch_tokens: 32, max_seq_len: 256}}
  lost: {path: /nowhere/base}
pool: {memory_limit_nbytes: 4MiB, max_turn_steps: 4}
"""
PROMPT = (5, 6, 7, 8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    save_hf(make_decoder(Codec.load(write_tokenizer(directory))), directory)
    (tmp_path / "pool.yaml").write_text(FILE % {"directory": directory})
    return tmp_path / "pool.yaml"


def asked(name: str, num_tokens: int) -> dict[str, Any]:
    return {"model": name, "prompt": [*PROMPT], "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


def said_alone(file: Path, num_tokens: int) -> str:
    """What one rank alone says, without a pool."""
    codec = Codec.load(file.parent / "base")
    request = Request("a", PROMPT, SamplingParams(temperature=0), num_tokens)
    ids = make_engine(codec).generate([request])["a"].ids
    return codec.decode([*PROMPT, *ids])[len(codec.decode(PROMPT)) :]


@pytest.mark.slow
def test_two_ranks_serve_a_pool_and_a_signal_to_all_ends_them_after_what_runs(file: Path, tmp_path: Path) -> None:
    with rank_commands(["--pool", str(file), "--admin-key=admins"], tmp_path) as running:
        listed = {model["id"]: model["state"] for model in running.http.get("/v1/models").json()["data"]}
        assert listed == {"one": "asleep", "two": "asleep", "lost": "failed"}
        for name in ("one", "two", "one"):
            answer = running.http.post(COMPLETIONS, json=asked(name, 12)).json()
            assert answer["choices"][0]["text"] == said_alone(file, 12)
        admin = {"authorization": "Bearer admins"}
        states = [
            running.http.post(f"/admin/models/two/{action}", headers=admin).json()["state"]
            for action in ("sleep", "unload", "load", "wake_up")
        ]
        assert states[:3] == ["asleep", "absent", "asleep"] and states[3] in ("waking", "awake")
        assert running.http.post("/admin/models/none/load", headers=admin).status_code == 404
        assert running.http.post(COMPLETIONS, json={**asked("one", 5), "guided_regex": "a"}).status_code == 400
        with running.http.stream("POST", COMPLETIONS, json={**asked("two", 60), "stream": True}) as answer:
            lines = data_of(answer)
            first = next(lines)
            for process in running.processes:
                os.kill(process.pid, signal.SIGTERM)
            *rest, end = lines
        assert "".join(json.loads(line)["choices"][0]["text"] for line in [first, *rest]) == said_alone(file, 60)
        assert end == "[DONE]"
        assert running.end() == [0, 0], running.said()
        assert running.said().count("2 ranks compute every step together") == 1
        assert running.said().count("serving on ") == running.said().count("warning: model 'lost' could not") == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_every_open_stream_with_an_error(file: Path, tmp_path: Path) -> None:
    """Prevents: a first rank that waits for ever for one that is gone."""
    with rank_commands(["--pool", str(file)], tmp_path) as running:
        with running.http.stream("POST", COMPLETIONS, json={**asked("one", 240), "stream": True}) as answer:
            lines = data_of(answer)
            next(lines)
            running.processes[1].kill()
            *_, error, last = lines
        assert "the engine has failed" in json.loads(error)["error"]["message"]
        assert last == "[DONE]"
        assert running.end() == [1, -signal.SIGKILL]
