"""Every file of `examples/` runs as its docstring says, and prints what it is for."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRINTS = {  # a pattern that the output must have
    "train.py": r"step 30: loss 0\.",
    "evaluate_and_generate.py": r"continued: \[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13\]",
    "plan_without_gpu.py": r"memory plan of one rank of 64: ",
    "checkpoint_and_resume.py": r"resumed at step 5: ",
    "share_slots.py": r"step 40: reward 0\.9",
    "serve_from_python.py": r"request c, step by step: \[\d+(, \d+){3}\]",
}


def commands(path: Path) -> list[str]:
    """The commands that an example's docstring shows."""
    return re.findall(rf"^    ((?:torchrun|python) .*examples/{path.name})$", path.read_text(), re.MULTILINE)


def output_of(command: str) -> str:
    """The output of a command, which must succeed."""
    launcher = {"torchrun": ["-m", "torch.distributed.run", "--standalone"], "python": []}
    name, *words = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *launcher[name], *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(PRINTS)


@pytest.mark.slow(unless=lambda name: name in ("plan_without_gpu.py", "serve_from_python.py"))
@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs_as_it_says(name: str) -> None:
    shown = commands(ROOT / "examples" / name)
    assert shown
    assert re.search(PRINTS[name], output_of(shown[0]))
