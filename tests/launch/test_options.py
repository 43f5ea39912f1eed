"""Options of generating and serving: every one can be set, on the command line and in a file."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from launch.command_line import Command, known_keys
from launch.config import load
from launch.options import CHAT, GENERATE, SERVE, SERVE_POOL, GenerateOptions, SamplingOverrides, ServeOptions
from launch.run_state import describe_changes
from yafsdp_like.inference.engine.places import POLICIES
from yafsdp_like.inference.kv.eviction import Costs, Tenant
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.kernels.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
COMMANDS = pytest.mark.parametrize("command", [GENERATE, SERVE], ids=["generate", "serve"])
SCRIPTS = dict(re.findall(r'"(yafsdp-[a-z]+) = (launch\.[a-z]+:[a-z]+)"', (ROOT / "setup.py").read_text()))


@COMMANDS
def test_every_option_has_a_flag_of_its_own_and_an_explanation(command: Command[GenerateOptions]) -> None:
    leaves = [key for key, hint in known_keys(command.options) if not dataclasses.is_dataclass(hint)]
    assert sorted(command.flags.values()) == sorted([*leaves, "config"])
    assert {f"engine.{field.name}" for field in dataclasses.fields(EngineOptions)} <= set(leaves)
    flags = r"^  --([\w-]+)(?:\.KEY)?=.*?\((default: .*?|required)\)\s+(?=[^\s-])"
    told = dict(re.findall(flags, command.help_text(), re.MULTILINE))
    assert {*told, "config"} == set(command.flags)


def test_flags_are_options_of_the_sections() -> None:
    flags = ["--kv-memory=1.5 GB", "--memory-limit", "4096", "--no-graphs", "--policy=gdsf", "--timeout=3"]
    options = SERVE.load(["MODEL", *flags, "--api-key=null"])
    assert options.engine == EngineOptions(4096, 1_500_000_000, graphs=False, policy="gdsf")
    assert (options.http.timeout_s, options.http.api_key) == (3.0, None)


def test_the_names_of_keys_in_a_file_are_flags_too() -> None:
    """Errors say them: "max_body_nbytes must be at least 1"."""
    flags = ["--kv_nbytes=1MiB", "--memory-limit-nbytes", "2MiB", "--max_image_nbytes=7", "--grace-s=3"]
    options = SERVE.load(["MODEL", *flags])
    assert options.engine == EngineOptions(2 << 20, 1 << 20)
    assert (options.http.max_image_nbytes, options.grace_s) == (7, 3.0)


def test_help_says_nothing_of_exceptions() -> None:
    assert not any("Raises" in command.help_text() for command in (GENERATE, CHAT, SERVE, SERVE_POOL))


def test_a_key_of_a_dictionary_is_a_flag_too() -> None:
    options = SERVE.load(["MODEL", "--adapters.first_one=runs/a", "--adapters.b", "runs/b"])
    assert options.adapters == {"first_one": "runs/a", "b": "runs/b"}
    with pytest.raises(ValueError, match=r"unknown option --adaptors\.b"):
        SERVE.load(["MODEL", "--adaptors.b=runs/b"])


def test_text_is_taken_as_it_is() -> None:
    options = GENERATE.load(["MODEL", "null", "--chat", "--stop", "[", "--stop=- 1", "--system=true"])
    assert (options.prompt, options.stop, options.system) == ("null", ("[", "- 1"), "true")
    assert GENERATE.load(["MODEL", "-5 degrees"]).prompt == "-5 degrees"


def test_a_file_sets_what_the_command_line_does_not(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(
        "model: preset:tiny\nport: 1\nengine:\n  memory_limit_nbytes: 40GiB\n  max_batch_size: 4\n"
        "  tenants: [{name: a, floor_nbytes: 10}]\n  costs: {link_nbytes_per_s: 1e9, prefill_tokens_per_s: 1e4}\n"
        "http: {max_choices: 5}\n"
    )
    options = SERVE.load([f"--config={tmp_path / 'serve.yaml'}", "--port=2"])
    assert (options.model, options.port, options.http.max_choices) == ("preset:tiny", 2, 5)
    assert options.engine == EngineOptions(
        40 << 30, max_batch_size=4, tenants=(Tenant("a", 10),), costs=Costs(1e9, 1e4)
    )
    assert SERVE.load(["--config", str(tmp_path / "serve.yaml"), "other"]).model == "other"
    (tmp_path / "serve.yaml").write_text("model: m\nmax_batch_size: 4\n")
    with pytest.raises(ValueError, match=r"unknown key 'max_batch_size' in .*; did you mean 'engine.max_batch_size'"):
        SERVE.load([f"--config={tmp_path / 'serve.yaml'}"])


@COMMANDS
def test_what_would_be_run_is_printed_and_runs(
    command: Command[ServeOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["preset:tiny", "--kv-memory=1MiB", "--max-batch-size=1", "--no-lookahead"]
    assert command.answer([*words, "--print-config"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert command.load([f"--config={tmp_path / 'again.yaml'}"]) == command.load(words)


def test_names_that_stand_twice_are_the_same() -> None:
    assert [f.name for f in dataclasses.fields(SamplingOverrides)] == [
        f.name for f in dataclasses.fields(SamplingParams)
    ]
    for policy in POLICIES:
        assert EngineOptions(policy=policy).policy == policy  # type: ignore[arg-type]


def test_installed_commands_are_those_that_python_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"yafsdp-generate", "yafsdp-migrate", "yafsdp-plan", "yafsdp-serve", "yafsdp-train"} <= set(SCRIPTS)
    for name, target in SCRIPTS.items():
        module, function = target.split(":")
        monkeypatch.setattr("sys.argv", [name, "--help"])
        assert not getattr(importlib.import_module(module), function)()
        assert f"-m {module} " in capsys.readouterr().out


def test_changes_since_a_checkpoint_are_written_as_options_are() -> None:
    saved = {"optimizer": {"max_grad_norm": 1.0}, "model": {"graph": False, "preset": "tiny"}}
    present = load(["--optimizer.max_grad_norm=null", "--model.graph=true"])
    lines = ["model.graph  false -> true", "optimizer.max_grad_norm  1.0 -> null"]
    assert describe_changes(saved, present) == lines
