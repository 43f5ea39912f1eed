"""Norms for ``clip_grad_norm_``: on several meshes, with fewer rows than ranks, and none after an update in backward.

Torch takes the norm of each rank's rows and then of all ranks'. The maximum of an empty tensor is an error, which only
the rank without rows would raise, while the others wait for it. Here such a rank contributes a neutral element.

Torch puts all norms into one tensor, which DTensors of different meshes (of which some are tensor parallel, say) cannot
be parts of. Here each mesh has its norm, of which the norm is taken. Tensors that are not DTensors are taken to be the
same on all ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

from yafsdp_like.shard.optimizer_step import refuse_incomplete_gradients

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NormOf = Callable[..., torch.Tensor]
_total_norm: NormOf = clip_grad._get_total_norm
_clip: Callable[..., None] = clip_grad._clip_grads_with_norm_
Tensors = list[torch.Tensor]


@functools.wraps(_total_norm)
def _total_norm_of_any_rows(
    tensors: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2.0, *args: Any, **kwargs: Any
) -> torch.Tensor:
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    if not tensors or any(isinstance(t, DTensor) for t in tensors):
        refuse_incomplete_gradients()
    for gradient in [t for t in tensors if isinstance(t, DTensor)][:1]:
        _refuse_unreachable(gradient)
    if math.isinf(norm_type):
        neutral = 0.0 if norm_type > 0 else math.inf  # of a maximum of absolute values, and of a minimum
        tensors = [_never_empty(t, neutral) for t in tensors]
    kinds = _by_mesh(tensors, tensors)
    if len(kinds) < 2:
        return _total_norm(tensors, norm_type, *args, **kwargs)
    norms = [_whole(_total_norm(alike, norm_type, *args, **kwargs)) for alike in kinds]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)


@functools.wraps(_clip)
def _clip_each_mesh(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    total_norm: torch.Tensor,
    foreach: bool | None = None,
) -> None:
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    with_grad = [p for p in parameters if p.grad is not None]
    kinds = _by_mesh(with_grad, [p.grad for p in with_grad if p.grad is not None])
    if len(kinds) > 1:
        total_norm = _whole(total_norm)
    for alike in kinds:
        _clip(alike, max_norm, total_norm, foreach)


def _by_mesh(tensors: Tensors, grads: Tensors) -> list[Tensors]:
    """Part ``tensors`` by the meshes that their gradients, ``grads``, are on."""
    kinds: dict[DeviceMesh | None, Tensors] = {}
    for tensor, grad in zip(tensors, grads, strict=True):
        kinds.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(tensor)
    return list(kinds.values())


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _refuse_unreachable(gradient: DTensor) -> None:
    """Raise ``RuntimeError`` for one in host memory whose ranks can communicate on their devices alone."""
    device = gradient._local_tensor.device
    if device.type == gradient.device_mesh.device_type:
        return
    group = gradient.device_mesh.get_group(gradient.device_mesh.ndim - 1)
    if device not in group._device_types:
        raise RuntimeError(
            "a norm of gradients in host memory (CPUOffloadPolicy) takes a process group with a backend for CPUs, "
            f"found one for {[str(found) for found in group._device_types]} alone: start it by "
            'torch.distributed.init_process_group("cpu:gloo,cuda:nccl")'
        )


def _never_empty(tensor: torch.Tensor, neutral: float) -> torch.Tensor:
    """Return ``tensor``; on a rank without elements, one ``neutral`` element with the same placements."""
    if not isinstance(tensor, DTensor) or tensor._local_tensor.numel() > 0:
        return tensor
    local = tensor._local_tensor.sum().add(neutral).reshape([1] * tensor.dim())
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def install() -> None:
    """Make torch compute gradient norms this way from now on."""
    clip_grad._get_total_norm = _total_norm_of_any_rows
    clip_grad._clip_grads_with_norm_ = _clip_each_mesh
