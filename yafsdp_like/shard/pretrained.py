"""`save_pretrained` of a sharded model of transformers: with full weights, or an error that says how to get them.

The method writes the weights that a state dict holds, on the ranks that call it; those of a sharded model are DTensors,
of which each rank has a part. Transformers itself is never imported.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

METHOD, STATE = "save_pretrained", "state_dict"
HOW = (
    "expected whole weights: on all ranks\n"
    "    options = StateDictOptions(full_state_dict=True, cpu_offload=True)\n"
    "    state = get_model_state_dict(model, options=options)  # of torch.distributed.checkpoint.state_dict\n"
    "and then on rank 0\n"
    "    model.save_pretrained(directory, state_dict=state)"
)


def overrides_of(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the methods that a sharded class has in place of its own: ``save_pretrained``, where there is one."""
    own: Any = getattr(cls, METHOD, None)
    if own is None:
        return {}

    signature = inspect.signature(own)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    others = next((name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD), "")

    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the unsharded class, whatever its arguments are: peft's are not those of transformers.

        Raises ``RuntimeError`` unless its `state_dict` holds full weights; on one rank it may be left out.
        """
        if STATE not in kinds and not others:
            words = "takes no state_dict: write what get_model_state_dict with full_state_dict=True gives"
            raise RuntimeError(f"save_pretrained() of a sharded {cls.__name__} {words}")
        bound = signature.bind(self, *args, **kwargs)
        place = bound.arguments if STATE in kinds else bound.arguments.setdefault(others, {})
        state_dict = place.get(STATE)
        if state_dict is None and dist.get_world_size() == 1:
            state_dict = place[STATE] = {name: _full(value) for name, value in self.state_dict().items()}
        if state_dict is None:
            raise RuntimeError(f"save_pretrained() of a sharded {cls.__name__} got no state_dict; {HOW}")
        if parts := [name for name, value in state_dict.items() if isinstance(value, DTensor)]:
            raise RuntimeError(f"save_pretrained() got a part of {parts[0]!r} ({len(parts)} such); {HOW}")
        return own(*bound.args, **bound.kwargs)

    return {METHOD: save_pretrained}


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
