"""Values of small integer tensors in a trace, whose tensors have none: masks, positions, counts, experts of tokens.

Owns which values are known, and what stands for those that are not.

[Note: values in a trace]
Models read few values: whether a mask hides anything, how many rows each expert has. They come of integers that the
model makes itself, so integer operations whose operands are known are done for real too, up to ``MAX_NUMEL``
elements, beside the tensor without memory. What comes of floating-point numbers is not known. Where indices do
(``topk``, ``sort``, ``argmax``), they are taken to be spread evenly, which is the balance that routers of experts are
trained for. Any other value that is read is an error that says where.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_NUMEL = 1 << 20
_ATEN = torch.ops.aten
_READS = {_ATEN._local_scalar_dense.default, _ATEN.item.default, _ATEN.is_nonzero.default}
_SHAPES = {_ATEN.nonzero, _ATEN.bincount, _ATEN.masked_select, _ATEN._unique2, _ATEN.unique_consecutive}  # by values
_INDICES = {_ATEN.topk, _ATEN.sort, _ATEN.argsort, _ATEN.argmax, _ATEN.argmin}


class KnownValues:
    """Runs operations on tensors without memory, and on their values where these are known."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def know(self, ghost: Tensor, values: Tensor) -> None:
        """Note what a tensor would hold."""
        if not ghost.is_floating_point() and not ghost.is_complex() and ghost.numel() <= MAX_NUMEL:
            self._known[ghost] = values

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the operation's result without values, and keep those of it that are known."""
        packet = func._overloadpacket
        if func in _READS:
            return func(self._value_of(args[0], func))
        if packet in _SHAPES:
            real = func(*tree_map_only(Tensor, lambda t: self._value_of(t, func), args), **kwargs)
            return tree_map_only(Tensor, self._ghost_of, real)
        if packet is _ATEN._to_copy and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            if args[0] in self._known:
                return func(self._known[args[0]], **kwargs)
            kwargs = {**kwargs, "device": torch.device("meta")}
        if packet is _ATEN.index or packet is _ATEN.index_put or packet is _ATEN.index_put_:
            args = (args[0], self._as_indices(args[1], func), *args[2:])
        out = func(*args, **kwargs)
        results = [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ()
        if any(isinstance(r, Tensor) and not r.is_floating_point() and r.numel() <= MAX_NUMEL for r in results):
            self._follow(func, args, kwargs, results)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, results: Sequence[Any]) -> None:
        operands: list[Tensor] = []
        tree_map_only(Tensor, operands.append, (args, kwargs))
        if all(operand in self._known for operand in operands) and torch.Tag.nondeterministic_seeded not in func.tags:
            known = tree_map_only(Tensor, lambda t: self._known[t], (args, kwargs))
            if "device" in known[1]:
                known[1]["device"] = torch.device("cpu")
            real = func(*known[0], **known[1])
            for result, value in zip(results, [real] if isinstance(real, Tensor) else real, strict=True):
                if isinstance(result, Tensor):
                    self.know(result, value)
        elif func._overloadpacket in _INDICES:
            dim = args[2] if func._overloadpacket is _ATEN.topk and len(args) > 2 else -1
            for result in results:
                if result.dtype == torch.int64:
                    self.know(result, _spread(result.shape, args[0].shape[dim]))

    def _value_of(self, tensor: Tensor, func: Any) -> Tensor:
        if tensor in self._known:
            value: Tensor = self._known[tensor]
            return value
        if not tensor.is_meta:
            return tensor
        raise ValueError(
            f"the forward reads values of a tensor of shape {tuple(tensor.shape)} ({func.__name__}), which a forecast "
            f"does not know{_where()}: its control flow depends on what it computes"
        )

    def _ghost_of(self, real: Tensor) -> Tensor:
        ghost = torch.empty(real.shape, dtype=real.dtype, device="meta")
        self.know(ghost, real)
        return ghost

    def _as_indices(self, indices: Sequence[Tensor | None], func: Any) -> list[Tensor | None]:
        """Return masks among ``indices`` as the positions that they leave, of which the number is known."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.is_meta and index.dtype in (torch.bool, torch.uint8):
                found += [self._ghost_of(part) for part in self._value_of(index, func).nonzero(as_tuple=True)]
            else:
                found.append(index)
        return found


def _spread(shape: torch.Size, size: int) -> Tensor:
    """Return indices below ``size``, each as often as any other."""
    return (_ATEN.arange.default(shape.numel(), device=torch.device("cpu")) % max(1, size)).view(shape)


def _where() -> str:
    ours = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "shard/forecast" not in f.filename]
    return f" ({ours[-1].filename}:{ours[-1].lineno})" if ours else ""
