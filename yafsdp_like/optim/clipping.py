"""The norm of all gradients on all ranks, and the factor that clips them, both on the device.

The operations are those of ``torch.nn.utils.clip_grad_norm_`` in their order, so that the bits are its own, on local
tensors: DTensor takes over for one small tensor per mesh, whose all-reduce it makes.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._ops._math_ops import _NormPartial
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from yafsdp_like.optim.moments import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

Sharding = tuple["DeviceMesh", tuple["Placement", ...]]


def total_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of all elements of ``grads`` on all ranks, ``()``, without waiting for the device.

    It has the bits of ``torch.nn.utils.get_total_norm(grads)`` where all are sharded alike on one mesh, or none is.
    Otherwise, where torch raises, it is the norm of the norms of each kind; tensors that are not DTensors count as
    they are on this rank. Every rank must call it with gradients of the same parameters: there is one all-reduce for
    each dimension of each mesh on which rows are sharded.
    """
    kinds: dict[Sharding | None, list[torch.Tensor]] = {}
    for grad in grads:
        kind = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        kinds.setdefault(kind, []).append(local(grad))
    norms = [_norm_of_kind(kind, tensors) for kind, tensors in kinds.items()]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _norm_of_kind(kind: Sharding | None, grads: list[torch.Tensor]) -> torch.Tensor:
    by_dtype = _group_tensors_by_device_and_dtype([grads]).values()  # type: ignore[list-item]
    norms = chain.from_iterable(torch._foreach_norm(alike, 2.0) for (alike,), _ in by_dtype)  # type: ignore[arg-type]
    stacked = torch.stack([norm.to(grads[0].device) for norm in norms])
    if kind is None:
        return torch.linalg.vector_norm(stacked)
    mesh, placements = kind
    parts = [Replicate() if placement.is_replicate() else _NormPartial(2.0) for placement in placements]
    whole = torch.linalg.vector_norm(DTensor.from_local(stacked, mesh, parts, run_check=False))
    return local(whole).to(stacked.device)  # from_local has moved it, if gradients are on the host, to their mesh


def clipping_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Return what gradients of this norm are multiplied by, ``()``; not a number if the norm is none."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
