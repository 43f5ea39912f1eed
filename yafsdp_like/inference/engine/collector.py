"""Python's collector of reference cycles, which steps need not wait for."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's collector of reference cycles.

    It goes through all objects again and again, every token that was drawn among them, which takes 0.1 s and more
    while the device waits. Steps leave no cycles behind.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
