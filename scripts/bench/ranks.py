"""What the ranks of a benchmark decide and say together. Knows nothing of what is compared."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.world import World

Result = TypeVar("Result")


def say(world: World, text: str) -> None:
    """Print on rank 0."""
    if world.is_first:
        print(text, flush=True)


def gathered(value: Result, world: World) -> list[Result]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def unless_out_of_memory(action: Callable[[], Result], world: World) -> Result | None:
    """The action's result, or None on every rank if one of them ran out of memory."""
    try:
        result = action()
    except torch.OutOfMemoryError:
        result = None  # the error, and the tensors that its traceback holds, end with this block
    succeeded = gathered(result is not None, world)
    return result if all(succeeded) else None
