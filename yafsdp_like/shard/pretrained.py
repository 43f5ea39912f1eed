"""`save_pretrained` of a model of transformers that is sharded: with whole weights, or an error that says how.

Owns what is done with that one method; transformers itself is never imported. It writes the weights that a state dict
holds, on the ranks that call it; those of a sharded model are DTensors, of which each rank has a part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Mapping

METHOD = "save_pretrained"
HOW = (
    "expected whole weights: on all ranks\n"
    "    options = StateDictOptions(full_state_dict=True, cpu_offload=True)\n"
    "    state = get_model_state_dict(model, options=options)  # of torch.distributed.checkpoint.state_dict\n"
    "and then on rank 0\n"
    "    model.save_pretrained(directory, state_dict=state)"
)


def overrides_of(cls: type[nn.Module]) -> dict[str, Any]:
    """What the class of a sharded module has in place of its own, where it has the method."""
    own: Any = getattr(cls, METHOD, None)
    if own is None:
        return {}

    def save_pretrained(
        self: nn.Module,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The method of the unsharded class. Raises RuntimeError unless `state_dict` holds whole weights, which a world
        of one rank need not give.
        """
        if state_dict is None and dist.get_world_size() == 1:
            state_dict = {name: _whole(value) for name, value in self.state_dict().items()}
        if state_dict is None:
            raise RuntimeError(f"save_pretrained() of a sharded {cls.__name__} got no state_dict; {HOW}")
        if parts := [name for name, value in state_dict.items() if isinstance(value, DTensor)]:
            raise RuntimeError(f"save_pretrained() got a part of {parts[0]!r} ({len(parts)} such); {HOW}")
        return own(self, save_directory, is_main_process, state_dict, *args, **kwargs)

    return {METHOD: save_pretrained}


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
