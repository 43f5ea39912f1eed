"""Serves requests that are all there to their ends: adds them as queues take them, steps, and gathers outputs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from yafsdp_like.inference.engine.request import Completion, QueueFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from yafsdp_like.inference.engine.request import Request, RequestOutput


def complete(
    requests: Mapping[str, Iterable[Request]],
    add: Callable[[str, Request], None],
    step: Callable[[], list[tuple[str, RequestOutput]]],
    has_work: Callable[[], bool],
) -> dict[str, dict[str, Completion]]:
    """Return completions by model and id; ``add``, ``step`` and ``has_work`` are a pool's that serves nobody else."""
    left = {name: deque(found) for name, found in requests.items()}
    told: dict[tuple[str, str], list[RequestOutput]] = {}
    done: dict[str, dict[str, Completion]] = {name: {} for name in left}
    while any(left.values()) or has_work():
        for name, queue in left.items():
            _add_some(name, queue, add)
        for name, output in step():
            key = (name, output.request_id)
            told.setdefault(key, []).append(output)
            if output.finish is not None:
                done[name][output.request_id] = Completion.of(told.pop(key))
    return done


def _add_some(name: str, queue: deque[Request], add: Callable[[str, Request], None]) -> None:
    while queue:
        try:
            add(name, queue[0])
        except QueueFullError:
            return
        queue.popleft()
