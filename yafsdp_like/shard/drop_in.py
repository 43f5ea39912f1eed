"""Compatibility with FSDP2 beyond the methods of ``FSDPModule``: what torch's own code expects of a sharded module.

Owns the state object that torch finds on a sharded module, forward methods under other names, and the errors of FSDP2's
methods that are not supported.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed.fsdp
from torch import nn
from torch.distributed._composable.contract import STATE_KEY
from torch.distributed._composable_state import _State
from torch.distributed.tensor import DTensor

from yafsdp_like.shard.hooks import after_method, before_method, finish_accumulating
from yafsdp_like.shard.runtime.engine import engine_of
from yafsdp_like.shard.runtime.unit_state import Unit, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class ShardState(_State):
    """What ``fully_shard.state(module)`` returns; ``unit`` is what the call made.

    It has what torch's own functions use of FSDP2's: ``register_fsdp_forward_method`` calls hooks before and after such
    a method, ``share_comm_ctx`` shares its streams (as all models of a device do here anyway), and
    ``torch.distributed.pipelining`` reduces the gradients that a step's microbatches have accumulated.
    """

    unit: Unit
    _comm_ctx = None

    def _pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return before_method(module, args, kwargs, sys._getframe(1))

    def _post_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return after_method(module, args, output)

    @property
    def _state_ctx(self) -> ShardState:
        return self

    all_states = _fsdp_param_groups = ()
    _fsdp_param_group = None  # its name in torch 2.11

    def _root_post_backward_final_callback(self) -> None:
        engine = engine_of(self.unit)
        assert engine is not None, "a backward without a forward"
        finish_accumulating(engine, engine.units)
        engine.gradients.wait_for_reductions()


def show_state_to_torch(module: nn.Module, state: ShardState) -> None:
    """Make torch's own ``fully_shard.state(module)`` return ``state`` too."""
    key: Any = torch.distributed.fsdp.fully_shard
    vars(module)[STATE_KEY][key.__wrapped__] = state


def register_fsdp_forward_method(module: nn.Module, method_name: str) -> None:
    """Run ``module.method_name`` as a forward.

    Parameters are all-gathered before it and released after it, also when it raises, and inputs and outputs are cast as
    those of ``forward``. It may call the module itself, any number of times.

    Does nothing for a module that is not sharded. Raises ``ValueError`` where there is no such method.
    """
    if unit_of(module) is None:
        torch.distributed.fsdp.register_fsdp_forward_method(module, method_name)
        return
    method = getattr(module, method_name, None)
    if not callable(method):
        raise ValueError(f"{type(module)} does not have a method {method_name}")
    owner = weakref.ref(module)  # a reference from the module to itself would keep it until garbage is collected
    bound = getattr(method, "__self__", None) is module
    function = method.__func__ if bound else method

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        this = owner()
        assert this is not None
        args, kwargs = before_method(this, args, kwargs, sys._getframe())
        try:
            output = function(this, *args, **kwargs) if bound else function(*args, **kwargs)
        except BaseException:
            after_method(this, args, None)
            raise
        return after_method(this, args, output)

    setattr(module, method_name, run)


def share_comm_ctx(modules: Sequence[nn.Module]) -> None:
    """Accept models that are to share their streams, as all models of one device do in any case.

    Raises ``ValueError`` for a module that is not sharded.
    """
    for module in modules:
        if unit_of(module) is None:
            raise ValueError(f"share_comm_ctx expects modules that fully_shard returned, found {type(module).__name__}")


def loading_advice(module: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Say what is wrong with a state dict that a sharded module could not load; nothing where that is not known."""
    expected = module.state_dict()
    missing = next((key for key in expected if key not in state_dict), None)
    unexpected = next((key for key in state_dict if key not in expected), None)
    if missing is not None or unexpected is not None:
        return (
            f"The first key that differs: the model has {missing!r}, the state dict {unexpected!r}. It may be of a "
            "model that was wrapped otherwise, as by DistributedDataParallel or torch.compile: rename its keys"
        )
    if any(not isinstance(state_dict[key], DTensor) and isinstance(value, DTensor) for key, value in expected.items()):
        return (
            "It holds whole tensors, and the model's are sharded: load it by torch.distributed.checkpoint.state_dict."
            "set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True))"
        )
    return ""


def accept(call: str, reason: str) -> None:
    """Warn that ``call``, which tunes what this runtime does not have, does nothing."""
    warnings.warn(f"{call} does nothing here: {reason}", stacklevel=3)


# Methods of torch's main branch, also where the installed torch has none of them, and what to do instead.
_INSTEAD = {
    "get_pending_gradients": "gradients of backwards without synchronization lie in slots of the plan, and are not "
    "shown; reduce them by set_requires_gradient_sync(True) and finalize_backward(), and read .grad",
    "synchronize_gradients": "call set_requires_gradient_sync(True) and finalize_backward()",
}


def refuse_others(cls: type) -> type:
    """Add to ``cls`` every public method of torch's ``FSDPModule`` that it does not have, as one that raises."""
    for name in [*dir(torch.distributed.fsdp.FSDPModule), *_INSTEAD]:
        if not name.startswith("_") and name not in vars(cls):
            setattr(cls, name, _refusal(name))
    return cls


def _refusal(name: str) -> Callable[..., NoReturn]:
    instead = _INSTEAD.get(name, "leave it out, or use torch.distributed.fsdp.fully_shard for this model")

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} of {type(self).__name__} is not supported: {instead}")

    refuse.__name__ = name
    refuse.__doc__ = "Not supported; see the error that it raises."
    return refuse
