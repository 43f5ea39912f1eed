"""Session-wide hooks: what runs where, and the end of the worker processes."""

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import close_pools


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there are fewer than two of them."""
    if torch.cuda.device_count() >= 2:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs 2 GPUs"))


@pytest.fixture(scope="session", autouse=True)
def pools() -> Iterator[None]:
    """Workers live as long as the session."""
    yield
    close_pools()
