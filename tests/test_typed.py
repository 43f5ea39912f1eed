"""What type checkers and installers see of the package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type
from yafsdp_like import FSDPModule, MemoryPlan, MixedPrecisionPolicy, UnshardHandle, fully_shard


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]

    def width(self) -> int:
        return 4


def train(net: Net, mesh: DeviceMesh) -> MemoryPlan:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert_type(fully_shard(net.blocks, mesh=mesh, mp_policy=policy), list[FSDPModule])
    model = fully_shard(net, mesh=mesh, reshard_after_forward=True, transport="process_group")
    assert_type(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    torch.optim.AdamW(model.parameters()).zero_grad()
    assert_type(model.unshard(async_op=True), UnshardHandle | None)
    model.train().state_dict()
    assert isinstance(net, FSDPModule)  # for a checker it is both from here on
    net.set_is_last_backward(net.width() == 4)
    net.set_modules_to_forward_prefetch([net, model])
    return net.memory_plan()
"""

WRONG = """
from torch import nn
from yafsdp_like import fully_shard

fully_shard(nn.Linear(2, 2), transport="carrier pigeon")
fully_shard(nn.Linear(2, 2), reshard=True)
fully_shard(3)
fully_shard(nn.Linear(2, 2)).set_is_last_backward("yes")
"""


def mypy(path: Path, text: str) -> str:
    """What mypy says of a program that imports the package as an installed one."""
    path.write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file=", str(path)]
    command += [f"--cache-dir={path.parent / 'cache'}", "--follow-imports=silent"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False).stdout


@pytest.mark.slow
def test_a_users_program_type_checks_and_its_mistakes_are_found(tmp_path: Path) -> None:
    """Prevents: `fully_shard` returning Any, and FSDPModule without the methods of a module."""
    assert mypy(tmp_path / "program.py", PROGRAM) == ""
    found = mypy(tmp_path / "wrong.py", WRONG).splitlines()
    assert {line.split(":")[1] for line in found if ": error:" in line} == {"5", "6", "7", "8"}, found


def test_the_wheel_carries_every_module_the_status_page_and_the_marker_of_types(tmp_path: Path) -> None:
    """Prevents: a `py.typed` that is promised and not there, or a folder that is left out of what is installed."""
    program = (
        "import setuptools, sys; sys.argv = ['setup.py', '-q', 'build_py', '-d', sys.argv[1], 'egg_info', '-e',"
        " sys.argv[2]]; exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py',"
        " '__name__': '__main__'})"
    )
    built, info = tmp_path / "lib", tmp_path / "info"
    info.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", program, str(built), str(info)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("yafsdp_like", "launch")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == expected | {"yafsdp_like/py.typed", "yafsdp_like/inference/http/status.html"}
