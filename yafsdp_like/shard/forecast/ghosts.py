"""Tensors that have a shape, a dtype and no memory: what a traced model's parameters, inputs and gradients are.

Owns how they are made. What is counted of them, ``storages.py`` says.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._subclasses.fake_tensor import FakeTensorMode

    from yafsdp_like.shard.forecast.storages import StorageMode

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ghosts:
    """Makes tensors that have a shape, a dtype and no memory: on the meta device, or fake ones that say "cpu"."""

    fake: FakeTensorMode | None = None

    def factories(self) -> Any:
        """Return a context in which tensors that the model makes are such ones too."""
        return self.fake or torch.device("meta")

    def make(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a contiguous one of the shape of ``like``, which may be a parameter or a DTensor."""
        if self.fake is None:
            return torch.empty(like.shape, dtype=dtype, device="meta")
        with self.fake:
            return torch.ops.aten.empty.memory_format(like.shape, dtype=dtype, device=CPU)

    def bytes(self, nbytes: int) -> Tensor:
        """Return so many bytes."""
        return self.make(torch.empty(nbytes, device="meta"), torch.uint8)

    def like(self, tensor: Tensor, counted_by: StorageMode) -> Tensor:
        """Return one like an input of the forward, whose memory counts."""
        ghost = self.make(tensor, tensor.dtype)
        counted_by.notice(ghost)
        if not tensor.is_meta:
            counted_by.values.know(ghost, tensor)
        return ghost.requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else ghost


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Leave out what a module of torch logs: of an operation that fails, its whole stack, which the error has too."""
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled
