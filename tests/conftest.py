"""Session-wide hooks: what runs where and when, and the end of the worker processes."""

import fcntl
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import close_pools
from yafsdp_like.kernels.blocks import INTERPRETED

SLOWEST = (
    "test_train",
    "test_smollm2",
    "test_stream_order",
    "test_stream_order_of_updates",
    "test_peer",
    "test_running",
    "test_exceptions",
    "test_state",
    "test_parity",
)


@pytest.hookimpl(tryfirst=True)  # before pytest itself, which selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more GPUs than there are, settle which parameters are `slow`, and put the longest files first.

    So no process is left with one of these at the end.
    """
    items.sort(key=lambda item: item.path.stem not in SLOWEST)
    for item in items:
        _settle_slow(item)
        if (gpu := item.get_closest_marker("gpu")) and torch.cuda.device_count() < (
            needed := gpu.kwargs.get("count", 2)
        ):
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs"))


def _settle_slow(item: pytest.Item) -> None:
    """`@pytest.mark.slow(unless=...)` says of which parameters a test is not slow: a function of some, by name."""
    for mark in [mark for mark in item.own_markers if mark.name == "slow" and "unless" in mark.kwargs]:
        unless = mark.kwargs["unless"]
        assert isinstance(item, pytest.Function)
        if unless(**{name: item.callspec.params[name] for name in inspect.signature(unless).parameters}):
            item.own_markers.remove(mark)


@pytest.fixture(autouse=True)
def loops_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton 3.6's interpreter take an array of one element for a loop's bound, as Triton 3.9 does."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: int(number.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


SMOLLM2 = Path(__file__).parent.parent / "configs" / "smollm2.yaml"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make SmolLM2's directory by the program in the configuration's comment, once for all test processes."""
    directory = tmp_path_factory.getbasetemp()
    directory = directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory
    found = directory / "runs" / "smollm2" / "base"
    with open(directory / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "smollm2.done").exists():
            (program,) = [block for block in SMOLLM2.read_text().split("\n#\n") if "save_pretrained" in block]
            lines = [line.removeprefix("#     ") for line in program.splitlines()]
            command = [sys.executable, "-c", "\n".join(lines)]
            made = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=150, check=False)
            assert made.returncode == 0, made.stderr
            (directory / "smollm2.done").touch()
    return found


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Limit torch to one thread: small models gain nothing from a second, and wait for it where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def pools() -> Iterator[None]:
    """Keep workers as long as the session."""
    yield
    close_pools()
