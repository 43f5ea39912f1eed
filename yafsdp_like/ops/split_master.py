"""Float32 values kept as their bfloat16 roundings and 16 bits of remainder each: the fp32 master, without its copy.

[Note: split master]
Mixed precision keeps an fp32 master value and its bf16 rounding, six bytes. The rounding is the upper half of the
master (``kernels/split.py``), so the two need four. A ``SplitTensor`` reads as the fp32 values that the halves make,
bit for bit, whatever the operation: it gets them as a plain tensor, made for it and freed after it. What touches every
value in every step, the optimizer's kernel, reads and writes the halves themselves.

Other ranks may be reading the upper half, the compute shard, while the user writes to a parameter. So a write in place
goes to fp32 values beside the halves, which all views see from then on, until ``settle`` splits them: when the
compute shard may be written, so that what is written during a forward is computed on in the next.

[Note: remainders on the host]
Nothing computes on the lower half but the update, which an optimizer that streams its states can bring to the device
with them. So it may be in host memory, pinned for a GPU, whose owner is who owns the half on the device otherwise; the
upper half never is. Whoever else reads or writes values is rare, and the CPU waits for it: for all copies that
``DEVICE_TO_HOST`` has been given, an update's among them, and for its own copy between host and device. So a read is
complete when it returns, a write too, and copies of a later update need no event to be behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from yafsdp_like.kernels.split import join, split
from yafsdp_like.memory.streams import DEVICE_TO_HOST, streams_of

CHUNK = 1 << 24  # elements that are split at a time: of temporary memory, which may be a side stream's for good


class SplitValues:
    """The values of one or more ``SplitTensor``: ``high`` and ``low``, flat, or ``written``, flat fp32.

    Args:
        high: ``(numel,)`` bfloat16, contiguous.
        low: ``(numel,)`` int16, contiguous.
        is_offloaded: whether ``low`` is in host memory. See [Note: remainders on the host].
    """

    def __init__(self, high: torch.Tensor, low: torch.Tensor, is_offloaded: bool = False) -> None:
        assert high.dtype == torch.bfloat16 and low.dtype == torch.int16, f"{high.dtype} and {low.dtype}"
        assert high.shape == low.shape == (high.numel(),), f"{high.shape} and {low.shape}"
        self.high, self.low, self.is_offloaded = high, low, is_offloaded
        self.written: torch.Tensor | None = None  # (numel,) fp32, instead of the halves, from a write until settled

    @classmethod
    def of(cls, values: torch.Tensor, low: torch.Tensor, is_offloaded: bool) -> SplitValues:
        """Return ``values``, ``(numel,)`` float32, with their lower half in ``low``, behind all copies to it."""
        made = cls(torch.empty_like(values, dtype=torch.bfloat16), low, is_offloaded)
        made.written = values
        made.settle()
        return made

    def settle(self) -> bool:
        """Split what was written, on the current stream; return whether anything was."""
        if self.written is None:
            return False
        self._wait()
        for written, *halves in zip(*(t.split(CHUNK) for t in (self.written, self.high, self.low)), strict=True):
            for half, values in zip(halves, split(written), strict=True):
                half.copy_(values)
        self.written = None
        return True

    def move_high(self, to: torch.Tensor) -> None:
        """Copy the upper half to ``to``, ``(numel,)`` bfloat16, and keep it there from now on."""
        to.copy_(self.high)
        self.high = to

    def to_write(self) -> torch.Tensor:
        """Return the fp32 values that a write is to change."""
        if self.written is None:
            self.written = join(self.high, self.beside_high(self.low))
        return self.written

    def beside_high(self, low: torch.Tensor) -> torch.Tensor:
        """Return ``low``, some of the lower half, where the upper one is: a copy, made when this returns, if offloaded.

        Raises ``RuntimeError`` while a CUDA graph is recorded, which could not wait for the host.
        """
        if not self.is_offloaded:
            return low
        if self.high.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step that is recorded reads fp32 values whose remainders are in host memory: read them outside of "
                "GraphedStep, or leave RemainderOffloadPolicy out"
            )
        self._wait()
        return low.to(self.high.device)

    def _wait(self) -> None:
        """Have the CPU wait for copies to an offloaded lower half."""
        if self.is_offloaded:
            streams = streams_of(self.high.device)
            streams.synchronize(streams.record(DEVICE_TO_HOST))

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied, by asynchronous checkpoints say: nothing is under way."""
        self._wait()
        return vars(self).copy()


class SplitTensor(torch.Tensor):
    """A float32 tensor of some or all of ``split_values``; its copies, pickles and casts are plain tensors."""

    split_values: SplitValues

    @staticmethod
    def __new__(
        cls, values: SplitValues, shape: torch.Size | tuple[int, ...], stride: tuple[int, ...], offset: int = 0
    ) -> SplitTensor:
        """Make a view of ``values`` with this shape, and with stride and offset in elements."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            torch.Size(shape),
            strides=stride,
            storage_offset=offset,
            dtype=torch.float32,
            device=values.high.device,
        )
        made.split_values = values
        return made

    def _of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.as_strided(self.shape, self.stride(), flat.storage_offset() + self.storage_offset())

    def joined(self) -> torch.Tensor:
        """Return a plain float32 tensor of the values, which is not to be written."""
        values = self.split_values
        if values.written is not None:
            return self._of(values.written)
        return join(self._of(values.high), values.beside_high(self._of(values.low)))

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return upper and lower half, bfloat16 and int16, to read and write; what was written is settled first.

        An offloaded lower half is where it is, and copies of the last update to it may be under way.
        """
        self.split_values.settle()
        return self._of(self.split_values.high), self._of(self.split_values.low)

    def __repr__(self) -> str:  # type: ignore[override]
        """Print the values."""
        return f"SplitTensor({self.joined()!r})"

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.joined().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return a copy of the values as an array. Raises ``TypeError`` without ``force``: it shares no memory."""
        if not force:
            raise TypeError("the values of a split tensor lie in two halves: use .numpy(force=True), which copies them")
        return self.joined().clone().numpy()

    def share_memory_(self) -> Any:
        """Raise ``TypeError``: no storage has the values' bytes."""
        raise TypeError("the values of a split tensor lie in two halves: .clone() it to share its memory")

    def __dlpack__(self, **options: Any) -> Any:
        """Raise ``TypeError``: no memory has the values' bytes."""
        raise TypeError("the values of a split tensor lie in two halves: .clone() it to exchange it by DLPack")

    def new_empty(self, *size: Any, **options: Any) -> torch.Tensor:
        """Return an empty plain tensor; of this tensor's own size, one in halves like it.

        ``torch.distributed.checkpoint.async_save`` makes such a one and then gives it a copy of ``split_values``.
        """
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        if tuple(shape) != self.shape or options.keys() - {"device"}:
            return super().new_empty(*size, **options)
        values = self.split_values
        high, low = (torch.empty_like(half, **options) for half in (values.high, values.low))
        halves = SplitValues(high, low, values.is_offloaded)
        return SplitTensor(halves, self.shape, self.stride(), int(self.storage_offset()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values, plain."""
        return self.joined().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy the values, plain."""
        return memo.setdefault(id(self), self.joined().clone())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the values, or, if it makes a view, on the tensor's geometry alone."""
        kwargs = kwargs or {}
        if _is_view(func) and isinstance(args[0], cls):
            return _view(func, args, kwargs)
        if func in _LIKE and isinstance(args[0], cls):
            like = args[0]._of(args[0].split_values.high)
            return func(like, *args[1:], **kwargs | {"dtype": kwargs.get("dtype") or args[0].dtype})
        written = {id(tensor): tensor for tensor in _written(func, args, kwargs)}
        if written and torch.Tag.inplace_view in func.tags and func is not torch.ops.aten.detach_.default:
            raise NotImplementedError(f"a split tensor's shape and storage are fixed, and {func} changes them: copy it")
        plain: dict[int, torch.Tensor] = {}

        def plain_of(tensor: SplitTensor) -> torch.Tensor:
            if id(tensor) not in plain:
                values = tensor.split_values.to_write() if id(tensor) in written else None
                plain[id(tensor)] = tensor.joined() if values is None else tensor._of(values)
            return plain[id(tensor)]

        for tensor in written.values():
            plain_of(tensor)  # before what only reads: it may be a view of the same values
        result = func(*tree_map_only(SplitTensor, plain_of, args), **tree_map_only(SplitTensor, plain_of, kwargs))
        originals = {id(plain[key]): tensor for key, tensor in written.items()}
        return tree_map_only(torch.Tensor, lambda t: originals.get(id(t), t), result) if written else result


_LIKE = {  # operations that take a tensor's geometry and no value
    getattr(torch.ops.aten, name).default for name in ("empty_like", "zeros_like", "ones_like", "full_like")
}


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values as a plain tensor, which is itself unless it is split."""
    return tensor.joined() if isinstance(tensor, SplitTensor) else tensor


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what ``func`` makes of a tensor with the same geometry, on the same values."""
    source = args[0]
    if func is torch.ops.aten.view.dtype:
        raise NotImplementedError(f"a split tensor's values lie in two halves: copy it to view it as {args[1]}")
    geometry = func(source._of(source.split_values.high), *args[1:], **kwargs)

    def split_view(view: torch.Tensor) -> SplitTensor:
        offset = view.storage_offset() - source.split_values.high.storage_offset()
        return SplitTensor(source.split_values, view.shape, view.stride(), offset)

    return tree_map_only(torch.Tensor, split_view, geometry)


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
