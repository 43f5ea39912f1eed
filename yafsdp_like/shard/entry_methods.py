"""Methods of a sharded module that users call themselves: an error that says how, where parameters are sharded then.

Owns which methods these are, and the words of the error. ``register_fsdp_forward_method`` (``drop_in.py``) is the way.
"""

from __future__ import annotations

import functools
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MIXED = "mixed torch.Tensor and DTensor"  # in what PyTorch says of an operation on both


def guarded_methods(cls: type[nn.Module], but_not: type) -> dict[str, Callable[..., Any]]:
    """Return the public methods of ``cls`` that its forward does not call, with a guard around each.

    Those that forward calls, at any depth and as far as names tell, are left as they are, and so as fast; and
    those that ``but_not`` has, or any module.
    """
    methods = dict(_methods(cls))
    called = {"forward"}
    waiting = ["forward"]
    while waiting:
        function = methods.get(waiting.pop())
        names = _names_in(function.__code__) if function is not None else set()
        waiting += names - called
        called |= names
    entries = [name for name in methods if name not in called and not name.startswith("_")]
    return {name: _guard(methods[name]) for name in entries if not any(hasattr(c, name) for c in (nn.Module, but_not))}


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """Yield the functions of ``cls`` and its bases, the nearest last, without those of PyTorch and libraries' bases."""
    for base in reversed(cls.__mro__):
        package, _, rest = base.__module__.partition(".")
        if package in ("builtins", "torch") or (package == "transformers" and not rest.startswith("models.")):
            continue
        yield from ((name, value) for name, value in vars(base).items() if isinstance(value, FunctionType))


def _names_in(code: CodeType) -> set[str]:
    nested = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names_in, nested))


def _guard(function: FunctionType) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(self, *args, **kwargs)
        except RuntimeError as error:
            if _MIXED not in str(error):
                raise
            name, cls = function.__name__, type(self).__name__
            raise RuntimeError(
                f"{cls}.{name}() computes on parameters, which are sharded outside of forward: call "
                f"register_fsdp_forward_method(module, {name!r}) once after fully_shard, which all-gathers them around "
                f"this method too ({error})"
            ) from error

    return guarded
