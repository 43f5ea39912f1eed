"""The README's first program runs as printed, on one process and on two."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_first_program_of_the_readme_trains(num_ranks: int, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(program)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_ranks),
        script,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, check=False)
    assert run.returncode == 0, run.stderr
    assert f"memory plan of one rank of {num_ranks}:" in run.stdout
    losses = [float(loss) for loss in re.findall(r"^\d+ ([\d.]+)$", run.stdout, re.MULTILINE)]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
