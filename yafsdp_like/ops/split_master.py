"""A float32 tensor kept as its bfloat16 rounding and 16 bits of remainder: four bytes a value, two of them shared.

[Note: split master]
Mixed precision keeps an fp32 master value and its bf16 rounding, six bytes. The rounding is the upper half of the
master (``kernels/split.py``), so the two need four: a ``SplitTensor`` reads as the fp32 value that its halves
make, bit for bit, and ``high`` alone is what peers gather and compute on. Every operation works on it: one that
reads gets the fp32 value, made for it and freed after it; one that writes in place has its result split again; a view
is a view of both halves. What touches every value each step, the optimizer's kernel, reads and writes the halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from yafsdp_like.kernels.split import join, split

if TYPE_CHECKING:
    from collections.abc import Callable

_aten = torch.ops.aten


class SplitTensor(torch.Tensor):
    """A float32 tensor on two others: ``high``, bfloat16, and ``low``, int16, of its shape and strides.

    Copies, pickles and casts of it are plain tensors.
    """

    high: torch.Tensor
    low: torch.Tensor

    @staticmethod
    def __new__(cls, high: torch.Tensor, low: torch.Tensor) -> SplitTensor:
        """Make the tensor of the values that ``high`` and ``low`` hold, without copying them."""
        assert high.dtype == torch.bfloat16 and low.dtype == torch.int16, f"{high.dtype} and {low.dtype}"
        assert high.shape == low.shape and high.stride() == low.stride(), f"{high.shape} and {low.shape}"
        made = torch.Tensor._make_wrapper_subclass(
            cls, high.shape, strides=high.stride(), dtype=torch.float32, device=high.device
        )
        made.high, made.low = high, low
        return made

    def joined(self) -> torch.Tensor:
        """Return a plain float32 tensor of the values."""
        return join(self.high, self.low)

    def move_high(self, to: torch.Tensor) -> None:
        """Keep the rounding in ``to`` from now on, bfloat16 of the same shape, where it is copied."""
        to.copy_(self.high)
        self.high = to

    def _write(self, values: torch.Tensor) -> None:
        high, low = split(values)
        self.high.copy_(high)
        self.low.copy_(low)

    def __repr__(self) -> str:  # type: ignore[override]
        """Print the values."""
        return f"SplitTensor({self.joined()!r})"

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.joined().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return a copy of the values as an array."""
        return self.joined().numpy(force=force)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values, plain."""
        return self.joined().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy the values, plain."""
        return memo.setdefault(id(self), self.joined())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the halves, if it makes a view, or on the values, split again if they were written."""
        kwargs = kwargs or {}
        if _is_view(func) and isinstance(args[0], cls):
            return _view(func, args, kwargs)
        joined: dict[int, tuple[SplitTensor, torch.Tensor]] = {}

        def plain(tensor: SplitTensor) -> torch.Tensor:
            return joined.setdefault(id(tensor), (tensor, tensor.joined()))[1]

        result = func(*tree_map_only(SplitTensor, plain, args), **tree_map_only(SplitTensor, plain, kwargs))
        if written := _written(func, args, kwargs):
            for tensor in written:
                tensor._write(joined[id(tensor)][1])
            originals = {id(values): tensor for tensor, values in joined.values()}
            result = tree_map_only(torch.Tensor, lambda t: originals.get(id(t), t), result)
        return result


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _view(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what ``func`` shows of both halves."""
    if func is _aten.view.dtype and args[1] != torch.float32:
        raise NotImplementedError(f"the values of a split tensor lie in two halves: copy it to view it as {args[1]}")
    source = args[0]
    halves = [
        half if func is _aten.view.dtype else func(half, *args[1:], **kwargs) for half in (source.high, source.low)
    ]
    if isinstance(halves[0], torch.Tensor):
        return SplitTensor(*halves)
    return type(halves[0])(SplitTensor(high, low) for high, low in zip(*halves, strict=True))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[SplitTensor]:
    """Return those of the arguments that ``func`` writes to."""
    found: list[SplitTensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [v for v in values if isinstance(v, SplitTensor)]
    return found
