"""Standing in for FSDP2 inside libraries that call it themselves: Accelerate, transformers' Trainer, TRL.

Owns which names of other modules are replaced, and that they are put back. What is called is ``api.fully_shard``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any, Unpack

import torch.distributed.fsdp

from yafsdp_like.shard.api import ShardOptions, fully_shard

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = "fully_shard"


@contextlib.contextmanager
def in_place_of_fsdp2(**options: Unpack[ShardOptions]) -> Iterator[None]:
    """Have everybody who calls FSDP2's ``fully_shard`` inside this context call this package's.

    For libraries that wrap models themselves; in code of your own, import ``fully_shard`` from here instead. Models
    that are wrapped inside stay so. Enter it before the library wraps, as around ``Trainer.train``; it holds for the
    whole process, threads included.

    Args:
        options: for every call, over what the caller says: ``split_master=True``, ``transport="process_group"``.

    Raises:
        RuntimeError: it is entered already, or another library has replaced FSDP2's function.
    """
    stock: Any = torch.distributed.fsdp.fully_shard
    ours: Any = fully_shard
    if stock.__module__ != torch.distributed.fsdp.__name__:
        raise RuntimeError(
            f"torch.distributed.fsdp.{_NAME} is of {stock.__module__}, not torch's own: enter "
            "in_place_of_fsdp2 once, around everything, and before other libraries replace it"
        )

    def stand_in(module: Any, **asked: Any) -> Any:
        return ours(module, **(asked | options))

    functools.update_wrapper(stand_in, fully_shard)
    vars(stand_in).update(vars(stock))  # `state` and the contract's key, under which torch finds modules of either
    _replace(stock, stand_in)
    try:
        yield
    finally:
        _replace(stand_in, stock)  # also where it was imported meanwhile


def _replace(old: Any, new: Any) -> None:
    """In every module that has ``old`` under its name: ``from torch.distributed.fsdp import fully_shard`` binds it."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get(_NAME) is old:
            names[_NAME] = new
