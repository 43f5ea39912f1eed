"""Tensors that a module returns inside objects of other classes than containers: a distribution, a cache of keys.

Owns the walk through such objects. Containers are ``nested.py``'s.
"""

from __future__ import annotations

import enum
import types
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from yafsdp_like.shard.runtime.nested import map_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# What a module merely refers to. A module's attributes are the very parameters that it computes on.
_CLOSED = (
    *(nn.Module, type, enum.Enum, torch.dtype, torch.device),
    *(types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType),
)


def replace_held(function: Callable[[torch.Tensor], torch.Tensor], objects: Sequence[Any]) -> None:
    """Replace, in place, every tensor that ``objects`` hold, at any depth, by ``function`` of it."""
    seen: dict[int, Any] = {}
    found = list(objects)
    while found:
        value = found.pop()
        if id(value) in seen or isinstance(value, _CLOSED):
            continue
        seen[id(value)] = value
        for key, item in list(_items(value)):
            try:
                mapped = map_tensors(function, item, found)
            except RecursionError:  # containers inside of themselves
                continue
            if mapped is not item:
                _set(value, key, mapped)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, deque):
        yield from enumerate(value)
        return
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__dict__" and hasattr(value, name):
                yield name, getattr(value, name)


def _set(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, deque):
        value[key] = item
    else:
        object.__setattr__(value, key, item)
