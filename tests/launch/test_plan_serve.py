"""Planning a server without a GPU: the engine's own plan, what stands beside it, and every way to name a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import plan
from launch.options import SERVE
from launch.plan_serve import COMMAND, config_of, forecast_serving, main
from tests.inference.http.servers import make_decoder
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.hardware import H200_MACHINE, MACHINE_VARIABLE
from yafsdp_like.inference import Engine
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.weights.loading import LIBRARIES_NBYTES, open_model
from yafsdp_like.models import PRESETS
from yafsdp_like.models.hf import CONFIG_NAME, save_hf

GIB = 1 << 30
SMALL = ["--device=cpu", "--kv-memory=1MiB", "--max-batch-size=4", "--max-batch-tokens=64", "--host-kv=1MiB"]


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H200's published figures, whatever was measured on this machine."""
    monkeypatch.delenv(MACHINE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def forecast(*arguments: str) -> Any:
    return forecast_serving(COMMAND.load(arguments))


def test_every_option_of_the_server_is_accepted_under_its_name() -> None:
    assert set(SERVE.flags.items()) <= set(COMMAND.flags.items())


def test_the_plan_is_the_one_that_the_engine_allocates() -> None:
    """The same options to both: regions, slots, and pages in host memory, byte for byte."""
    options = COMMAND.load(["preset:tiny", *SMALL])
    planned = forecast_serving(options)
    made: list[Any] = []
    with Engine.load(open_model("preset:tiny"), options.engine, on_plan=made.append) as engine:
        assert engine.plan == planned.plan.memory and made[0].host == planned.plan.host
        assert sum(planned.engine.values()) == engine.plan.nbytes
        assert planned.host == {"host kv slabs": made[0].host.nbytes}


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (["preset:8b"], "resident"),
        (["preset:70b"], "streamed"),
        (["preset:70b", "--world-size=4"], "gathered"),
        (["preset:70b", "--world-size=4", "--mode=tensor_parallel"], "tensor_parallel"),
    ],
)
def test_a_gpu_is_filled_with_the_plan_its_context_and_what_is_left_to_libraries(
    arguments: list[str], mode: str
) -> None:
    """In every phase: plan + context + libraries <= memory, short of it by less than a slab of pages."""
    found = forecast(*arguments, "--gpu-memory=80GiB")
    assert found.plan.mode == mode
    for nbytes in found.phases.values():
        total = found.plan.memory.nbytes + found.plan.recordings_nbytes + H200_MACHINE.context_nbytes + LIBRARIES_NBYTES
        assert sum(nbytes.values()) == total
        assert 80 * GIB - found.plan.grid.slab_nbytes - (64 << 20) < total <= 80 * GIB
    assert found.num_contexts == found.plan.num_context_tokens // found.plan.max_seq_len >= 1
    assert found.phases["load"].get("a parameter, whole", 0) == (2 * 28_672 * 8192 if mode == "tensor_parallel" else 0)


def test_a_decoding_step_uses_a_part_of_the_workspace_and_a_prompt_all_of_it() -> None:
    found = forecast("preset:8b")
    used = found.workspace_in_use
    assert used["decode"] < used["prefill"] == found.engine["workspace"]
    assert forecast("preset:8b", "--no-graphs").plan.recordings_nbytes == 0 < found.plan.recordings_nbytes


def test_a_model_is_named_as_a_preset_a_directory_a_file_or_a_run(tmp_path: Path) -> None:
    """Of a directory only the configuration is read: weights need not be there."""
    decoder = make_decoder(Codec.load(write_tokenizer(tmp_path)))
    save_hf(decoder, tmp_path / "hf")
    for weights in (tmp_path / "hf").glob("*.safetensors"):
        weights.unlink()
    run = tmp_path / "run.yaml"
    run.write_text("model: {preset: tiny, overrides: {num_layers: 3}}\n")
    assert config_of("preset:8b") == PRESETS["8b"]
    assert config_of(str(tmp_path / "hf")) == config_of(str(tmp_path / "hf" / CONFIG_NAME)) == decoder.config
    assert config_of(str(run)) == replace(PRESETS["tiny"], num_layers=3)


@pytest.mark.parametrize(
    ("name", "words"),
    [("preset:8bb", "did you mean '8b'"), ("nowhere", "no such directory"), ("no/config.json", "does not exist")],
)
def test_a_name_of_no_model_is_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(name)


def test_json_says_what_the_tables_say_and_the_map_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "map.html"
    assert main(["preset:70b", "--json=-", f"--slot-map={drawing}"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    found = forecast("preset:70b")
    assert numbers["mode"] == "streamed" and numbers["why"] == list(found.plan.reasons)
    assert [phase["phase"] for phase in numbers["phases"]] == ["load", "prefill", "decode"]
    assert all(phase["total_nbytes"] == sum(phase["nbytes"].values()) for phase in numbers["phases"])
    assert numbers["host_nbytes"] == {"host weights": found.plan.host.nbytes}
    assert "bytes are missing" in numbers["modes"]["resident"]["refused"]
    text = drawing.read_text()
    assert "weight slots" in text and "host memory" in text and f"{found.plan.host.nbytes:,}" in text
    assert main(["preset:70b", f"--json={tmp_path / 'plan.json'}"]) == 0
    assert json.loads((tmp_path / "plan.json").read_text()) == numbers
    said = capsys.readouterr().out
    assert "streamed: 50 of 82 units" in said and "as resident: the model does not fit" in said


def test_one_command_plans_training_and_serving_and_draws_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawings = [tmp_path / "training.html", tmp_path / "serving.html"]
    tiny = "preset:tiny"
    assert plan.main([tiny, "--world-size=2", f"--slot-map={drawings[0]}", "--seq-len=8"]) == 0
    assert plan.main([tiny, "--serve", "--gpu-memory", "40GiB", "--slot-map", str(drawings[1])]) == 0
    assert "resident: all" in capsys.readouterr().out
    training, serving = (drawing.read_text() for drawing in drawings)
    assert "gradient slots" in training and "kv slabs" not in training
    assert "kv slabs" in serving and "gradient slots" not in serving
    assert plan.main([tiny, f"--slot-map={tmp_path / 'map.txt'}"]) == 2
    assert "drawn as .html or .png" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset:70b", "--gpu-memory=2GiB"]) == 1
    found = capsys.readouterr()
    assert found.out == "" and "bytes are missing" in found.err and "It fits with memory_limit_nbytes=" in found.err
    assert main(["preset:70b", "--gpu-memory=1GiB"]) == 1
    assert "take all of gpu_memory_nbytes" in capsys.readouterr().err
    assert main(["preset:70b", "--slot-map=map.svg"]) == main(["preset:71b"]) == main(["nowhere"]) == 2


def test_only_a_model_that_does_not_fit_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["preset:tiny", f"--json={tmp_path / 'nowhere' / 'plan.json'}"]) == 2
    monkeypatch.setenv("YAFSDP_MACHINE", str(tmp_path / "missing.json"))
    assert main(["preset:tiny"]) == 2
    assert "there is no directory" in (err := capsys.readouterr().err) and "launch.doctor" in err
