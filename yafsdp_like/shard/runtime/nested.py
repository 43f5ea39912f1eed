"""Tensors inside whatever a module takes or returns: tuples, dicts, dataclasses and named tuples, to any depth."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_LEAVES = frozenset((type(None), bool, int, float, str))  # that hold nothing


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any, others: list[Any] | None = None) -> Any:
    """Return ``value`` with every tensor replaced by ``function`` of it, in a fixed order.

    Containers are copied only where something in them changes, so that what is left alone keeps its identity. Objects
    that are neither containers nor tensors are left alone, and added to ``others``.
    """
    kind = type(value)
    if kind in _LEAVES:
        return value
    if isinstance(value, torch.Tensor):
        return function(value)
    if kind is tuple or kind is list:  # most of what modules are given: said before the slower questions
        items = [
            v
            if type(v) in _LEAVES
            else function(v)
            if isinstance(v, torch.Tensor)
            else map_tensors(function, v, others)
            for v in value
        ]
        return value if all(map(operator.is_, items, value)) else kind(items)
    if kind is dict and not value:
        return value
    if isinstance(value, Mapping):
        return _copied_where_changed(function, value, dict(value), _set_item, others)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _copied_where_changed(function, value, fields, object.__setattr__, others)
    if isinstance(value, (list, tuple)):
        items = [map_tensors(function, v, others) for v in value]
        if all(map(operator.is_, items, value)):
            return value
        return kind(*items) if hasattr(value, "_fields") else kind(items)  # a named tuple takes them apart
    if others is not None:
        others.append(value)
    return value


def _set_item(mapping: Any, key: Any, value: Any) -> None:
    mapping[key] = value


def _copied_where_changed(
    function: Callable[[torch.Tensor], torch.Tensor],
    value: Any,
    items: dict[Any, Any],
    assign: Callable[[Any, Any, Any], None],
    others: list[Any] | None,
) -> Any:
    mapped = {key: map_tensors(function, item, others) for key, item in items.items()}
    changed = {key: item for key, item in mapped.items() if item is not items[key]}
    if not changed:
        return value
    result = copy.copy(value)
    for key, item in changed.items():
        assign(result, key, item)
    return result


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return every tensor in ``value``, in the order of ``map_tensors``."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def layers_of(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return ``t`` as each ``torch.func`` transform sees it, the innermost first, and as it is without any."""
    while _functorch.is_functorch_wrapped_tensor(t):
        yield t
        t = _functorch.get_unwrapped(t)
    yield t


def addresses_in(tensor: torch.Tensor) -> list[int]:
    """Return where the values of ``tensor``, or of each tensor that it is made of, begin in memory.

    None for one that has no values (a fake one) or no strides (a sparse one).
    """
    if type(tensor) is not torch.Tensor:
        if is_traceable_wrapper_subclass(tensor):
            parts, _ = tensor.__tensor_flatten__()
            values = [getattr(tensor, part) for part in parts]  # of a DTensor, the mesh is one too
            return [at for value in values if isinstance(value, torch.Tensor) for at in addresses_in(value)]
        if isinstance(tensor, FakeTensor):
            return []
    try:
        return [tensor.data_ptr()]
    except RuntimeError:
        wraps = _functorch.is_functorch_wrapped_tensor(tensor)
        return addresses_in(_functorch.get_unwrapped(tensor)) if wraps else []


def cast_floating(value: Any, dtype: torch.dtype | None) -> Any:
    """Return ``value`` with every floating-point tensor in ``dtype``; unchanged when ``dtype`` is None."""
    if dtype is None:
        return value
    return map_tensors(lambda t: t if t.dtype is dtype or not t.is_floating_point() else t.to(dtype), value)


def needs_cast(tensors: Iterable[torch.Tensor], dtype: torch.dtype | None) -> bool:
    """Return whether ``cast_floating`` would change any of ``tensors``."""
    return dtype is not None and any(t.dtype is not dtype and t.is_floating_point() for t in tensors)
