"""Programs of other libraries train to the losses of stock FSDP2, digit by digit: each file of `examples/ecosystem`.

An example runs twice on two ranks, the second time with torch's FSDP2 in the place of this package (`with_stock.py`).
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {
    "accelerate_loop.py": ["accelerate", "transformers"],
    "hf_trainer.py": ["accelerate", "transformers"],
    "lightning_fabric.py": ["lightning"],
    "peft_lora.py": ["peft", "transformers"],
    "torchtitan_loop.py": [],
    "trl_sft.py": ["trl", "datasets", "accelerate", "transformers"],
}
SECONDS = 600  # each run imports these libraries on two ranks


def run(*words: str) -> tuple[str, list[float]]:
    """Who wrapped the model, and the losses that an example prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    wrapped, losses = re.search(r"wrapped by (\S+)", done.stdout), re.search(r"losses: (.+)", done.stdout)
    assert wrapped is not None and losses is not None, done.stdout
    return wrapped[1], [float(loss) for loss in losses[1].split()]


def test_every_example_of_the_ecosystem_is_compared() -> None:
    assert {path.name for path in (ROOT / "examples" / "ecosystem").glob("*.py")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS + 60)
@pytest.mark.parametrize("name", sorted(NEEDS))
def test_an_example_of_the_ecosystem_has_the_losses_of_stock(name: str) -> None:
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'yafsdp_like[ecosystem]'")
    example = f"examples/ecosystem/{name}"
    ours, found = run(example)
    theirs, expected = run("tests/examples/with_stock.py", example)
    assert ours.startswith("yafsdp_like.") and theirs.startswith("torch.distributed.fsdp")
    assert len(found) >= 12 and found[-1] < found[0]
    assert found == expected
