"""Scripts answer `--help`, and say what is wrong with their options, without torch; they know the names there are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import implementations, options, serve_options, serve_quantized, serve_run, subjects
from yafsdp_like.models import PRESETS

SCRIPTS = Path(__file__).parents[2] / "scripts"
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("bench_train", ["--model", "tiny", "--impl", "fsdp3"], "--impl: unknown ['fsdp3']"),
        ("bench_serve", ["--measure", "all"], "--measure: ['all'] cannot be measured on 1 ranks"),
        ("bench_pool", ["--limit-gib", "1", "--measure", "swich"], "found swich"),
        ("estimate_scale", ["--report"], "--reports: expected at least one argument"),
    ],
)
def test_help_and_errors_need_no_torch(script: str, arguments: list[str], message: str) -> None:
    helped, refused = (without_torch(script, *given) for given in (["--help"], arguments))
    assert (helped.returncode, helped.stderr) == (0, "") and "--out" in helped.stdout
    assert refused.returncode == 2 and message in refused.stderr


def without_torch(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), str(SCRIPTS)]), "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", WITHOUT_TORCH, str(SCRIPTS / f"{script}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_names_that_options_know_are_those_that_are_there() -> None:
    assert tuple(PRESETS) == options.DECODERS and tuple(subjects.OF_TRANSFORMERS) == options.OF_TRANSFORMERS
    assert tuple(name for name, it in subjects.OF_TRANSFORMERS.items() if it.sees_pictures) == options.OF_PICTURES
    assert tuple(implementations.IMPLEMENTATIONS) == options.IMPLEMENTATIONS
    assert tuple(serve_options.MEASURES) == tuple(serve_run.RUNS)
    assert tuple(serve_quantized.LAYOUTS) == serve_options.LAYOUTS
