"""The README's programs run as printed, on one process and on two."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVE = "dist.destroy_process_group()\n"


def programs() -> list[str]:
    """What the README shows as Python: a whole program, and a piece that goes on training its model."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def output_of(program: str, num_ranks: int, directory: Path) -> str:
    """What the ranks print (0: of one process without torchrun); `AssertionError` with what they complain of."""
    script = directory / "train.py"
    script.write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    launcher = launcher if num_ranks else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, script], capture_output=True, text=True, env=environment, timeout=150, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow(unless=lambda num_ranks: num_ranks == 2)
@pytest.mark.parametrize("num_ranks", [0, 1, 2])
def test_the_first_program_of_the_readme_trains(num_ranks: int, tmp_path: Path) -> None:
    output = output_of(programs()[0], num_ranks, tmp_path)
    assert f"memory plan of one rank of {num_ranks or 1}:" in output
    losses = [float(loss) for loss in re.findall(r"^\d+ ([\d.]+)$", output, re.MULTILINE)]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transport", "said"),
    [("process_group", "process group: "), ("peer", "peer: ")],
)
def test_the_second_program_goes_on_where_the_first_one_ended(transport: str, said: str, tmp_path: Path) -> None:
    first, second = programs()[:2]
    assert first.endswith(LEAVE)
    first = first.removesuffix(LEAVE).replace("mp_policy=policy)", f"mp_policy=policy, transport='{transport}')")
    printing = "if dist.get_rank() == 0:\n    print('graphed', loss.item())\n"
    output = output_of(first + second + printing + LEAVE, 2, tmp_path)
    assert f"  over {said}asked for" in output
    (before,) = re.findall(r"^19 ([\d.]+)$", output, re.MULTILINE)
    (after,) = re.findall(r"^graphed ([\d.]+)$", output, re.MULTILINE)
    assert float(after) < float(before)


def test_the_third_program_serves(tmp_path: Path) -> None:
    output = output_of(programs()[2], 1, tmp_path)
    assert "kv slabs" in output
    assert re.search(r"^\[\d+(, \d+){7}\] FinishReason.LENGTH$", output, re.MULTILINE)


def test_the_fourth_program_serves_two_models_on_one_device(tmp_path: Path) -> None:
    output = output_of(programs()[3], 0, tmp_path)
    assert re.search(r"^tiny: .* of weights, .*$", output, re.MULTILINE)
    assert re.search(r"^\[\d+(, \d+){7}\] \{'tiny': <ModelState\.", output, re.MULTILINE)
