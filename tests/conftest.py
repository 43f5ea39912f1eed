"""Session-wide hooks: what runs where and when, and the end of the worker processes."""

import inspect
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import close_pools


@pytest.hookimpl(tryfirst=True)  # before pytest itself, which selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there are fewer than two of them, and find out which parameters are `slow`."""
    for item in items:
        _settle_slow(item)
        if torch.cuda.device_count() < 2 and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs 2 GPUs"))


def _settle_slow(item: pytest.Item) -> None:
    """`@pytest.mark.slow(unless=...)` says of which parameters a test is not slow: a function of some, by name."""
    for mark in [mark for mark in item.own_markers if mark.name == "slow" and "unless" in mark.kwargs]:
        unless = mark.kwargs["unless"]
        assert isinstance(item, pytest.Function)
        if unless(**{name: item.callspec.params[name] for name in inspect.signature(unless).parameters}):
            item.own_markers.remove(mark)


@pytest.fixture(scope="session", autouse=True)
def pools() -> Iterator[None]:
    """Workers live as long as the session."""
    yield
    close_pools()
