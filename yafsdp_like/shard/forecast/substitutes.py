"""Functions that a trace replaces by name while it lasts; models are not changed.

Owns the mode. What is replaced for a GPU's sake is in ``on_gpu.py``; backward, because it may call the model again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yafsdp_like.shard.forecast.storages import StorageMode


class Substitutes(TorchFunctionMode):
    """While it is entered, functions of ``table`` are called as ``table[f](self, f, *args, **kwargs)``.

    ``storages`` counts the operations that are replaced.
    """

    def __init__(self, storages: StorageMode, table: Mapping[Any, Any]) -> None:
        super().__init__()
        self.storages, self._table = storages, table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or what stands for it."""
        kwargs = kwargs or {}
        if func in _BACKWARD:  # a mode is left while it calls a function, and backward may call the model's again
            with self:
                return _run_backward(*args, **kwargs)
        substitute = self._table.get(func)
        return func(*args, **kwargs) if substitute is None else substitute(self, func, *args, **kwargs)


_BACKWARD = {torch.autograd.backward, Tensor.backward}


def _run_backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False, **more: Any
) -> None:
    """Do what ``torch.autograd.backward`` does, without asking modes again."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    grads = (grad_tensors,) if isinstance(grad_tensors, Tensor) else tuple(grad_tensors or [None] * len(tensors))
    grads = torch.autograd._make_grads(tensors, grads, is_grads_batched=False)
    inputs = more.get("inputs")
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    keep = create_graph if retain_graph is None else retain_graph
    _engine_run_backward(tensors, grads, keep, create_graph, inputs, allow_unreachable=True, accumulate_grad=True)
