"""What ``fully_shard`` requires of its arguments: each check raises, naming what it found and what to do instead."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from yafsdp_like.shard.runtime.extension import refuse_subclass
from yafsdp_like.shard.runtime.unit_state import ownership_of
from yafsdp_like.shard.spec.unit_spec import REDUCES_AS_GRAD, RemainderOffloadPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy


def check_modules(given: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """Return a list of what was given; ``ValueError`` for an empty one and for containers without a ``forward``."""
    modules: list[nn.Module] = [given] if isinstance(given, nn.Module) else list(given)
    if not modules:
        raise ValueError("fully_shard expects a module or a list of at least one module but got an empty list")
    for module in modules:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
            raise ValueError(f"fully_shard does not support containers that do not implement forward: {module}")
    return modules


def check_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return it; ``ValueError`` if it is neither 1-D nor 2-D, ``AssertionError`` if it is 2-D without names."""
    if mesh.ndim not in (1, 2):
        raise ValueError(f"fully_shard expects a 1D or 2D DeviceMesh but got {mesh}")
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise AssertionError("Please init the 2D mesh for HSDP with mesh_dim_names specified")
    return mesh


def check_params(
    owners: Mapping[nn.Parameter, Sequence[tuple[nn.Module, str]]], grad_dtype: torch.dtype | None = None
) -> None:
    """Raise for the first parameter that cannot be sharded; those of earlier calls have been checked already.

    ``ValueError`` for scalars; ``NotImplementedError`` for DTensors that are partial sums, subclasses without an
    all-gather of their own, strided parameters, embeddings that write their own weight, and, where the installed torch
    follows it, for a ``grad_dtype`` of a parameter alone.
    """
    for param, places in owners.items():
        if ownership_of(param) is None:
            _check_param(param, places)
            _check_own_grad_dtype(param, places[0][1], grad_dtype)


def _check_own_grad_dtype(param: nn.Parameter, name: str, grad_dtype: torch.dtype | None) -> None:
    own = getattr(param, "grad_dtype", param.dtype)
    if REDUCES_AS_GRAD and own not in (param.dtype, grad_dtype):
        raise NotImplementedError(
            f"expected gradients of {name} to have its own dtype, {param.dtype}, or fully_shard's grad_dtype, found "
            f"{name}.grad_dtype = {own}: use fully_shard(..., grad_dtype={own}), for all parameters of the call, or "
            "leave it unset"
        )


def _check_param(param: nn.Parameter, places: Sequence[tuple[nn.Module, str]]) -> None:
    name = places[0][1]
    if isinstance(param, DTensor) and any(placement.is_partial() for placement in param.placements):
        raise NotImplementedError(
            f"{name} is a DTensor with {param.placements}, sums of which ranks have parts, and these cannot be "
            "sharded: redistribute it to Shard or Replicate first"
        )
    refuse_subclass(param, name)
    for module, _ in places:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise NotImplementedError(
                f"{type(module).__name__} with max_norm={module.max_norm} writes its weight in forward, which is lost "
                "where that is gathered: shard it without (max_norm=None) and renormalize its rows after "
                "optimizer.step(), or name its weight in ignored_params"
            )
    if param.dim() == 0:
        raise ValueError(f"fully_shard cannot shard a scalar. Change {name} to a 1D tensor with numel equal to 1.")
    if not param.is_contiguous() or (isinstance(param, DTensor) and not param._local_tensor.is_contiguous()):
        raise NotImplementedError(
            f"FSDP does not support non-contiguous parameters: {name} has shape {tuple(param.shape)} and strides "
            f"{param.stride()}; make it contiguous first"
        )


def dtype_override(policy: MixedPrecisionPolicy, param: nn.Parameter) -> torch.dtype | None:
    """Return in which dtype to compute on ``param``, if the policy's ``param_dtype_override_fn`` says so.

    Torch 2.15 has that first. Raises ``ValueError`` for what is neither ``param_dtype`` nor the parameter's own dtype.
    """
    override = getattr(policy, "param_dtype_override_fn", None)
    dtype = None if override is None else override(param)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"param_dtype_override_fn must return a torch.dtype or None but got {type(dtype)}")
    if dtype not in (None, policy.param_dtype, param.dtype):
        raise ValueError(
            "param_dtype_override_fn must return None, param_dtype, or the parameter's original dtype but got "
            f"{dtype} for a parameter with dtype {param.dtype} and param_dtype {policy.param_dtype}"
        )
    return dtype


def check_grad_dtype(grad_dtype: torch.dtype | None, policy: MixedPrecisionPolicy) -> torch.dtype | None:
    """Return it, or the field of that name that the policy has on torch's main branch.

    Raises ``ValueError`` for gradients in another dtype than they are reduced in, ``NotImplementedError`` where torch
    allows only the parameter's.
    """
    grad_dtype = grad_dtype or getattr(policy, "grad_dtype", None)
    if grad_dtype is None:
        return None
    reduced = policy.reduce_dtype or (grad_dtype if REDUCES_AS_GRAD else policy.param_dtype)
    if grad_dtype != reduced:
        raise ValueError(
            f"expected grad_dtype to be what gradients are reduced in, {reduced} by mp_policy, found {grad_dtype}: "
            f"use MixedPrecisionPolicy(reduce_dtype={grad_dtype}), or leave it out"
        )
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise NotImplementedError(
            f"grad_dtype={grad_dtype} needs Tensor.grad_dtype, which torch {torch.__version__} does not have: "
            "use a later torch, or leave it out"
        )
    return grad_dtype


def check_offload(
    policy: OffloadPolicy | None, transport: str, split_master: bool
) -> tuple[CPUOffloadPolicy | None, bool]:
    """Return the policy if main shards and gradients go to host memory, else None; and whether remainders do.

    Raises ``TypeError`` for what is no policy, ``ValueError`` for remainders of masters that are not split, and
    ``NotImplementedError`` for options that need main shards on the device.
    """
    if policy is not None and not isinstance(policy, OffloadPolicy):
        raise TypeError(f"expected offload_policy to be CPUOffloadPolicy(...) or OffloadPolicy(), found {policy!r}")
    if isinstance(policy, RemainderOffloadPolicy) and not split_master:
        raise ValueError(
            "RemainderOffloadPolicy keeps lower halves of split masters in host memory, and split_master is False: use "
            "fully_shard(..., split_master=True), or CPUOffloadPolicy() for whole parameters"
        )
    if not isinstance(policy, CPUOffloadPolicy):
        return None, isinstance(policy, RemainderOffloadPolicy)
    if transport not in ("auto", "process_group"):
        raise NotImplementedError(
            f"transport={transport!r} reads other ranks' shards on the device, and CPUOffloadPolicy keeps them in host "
            "memory: leave one of them out"
        )
    if split_master:
        raise NotImplementedError(
            "split_master keeps half of each value on the device for all-gathers, and CPUOffloadPolicy keeps values in "
            "host memory: leave one of them out"
        )
    return policy, False


def check_reshard(reshard_after_forward: Any, mesh: DeviceMesh) -> tuple[bool | None, int]:
    """Return whether to reshard after forward, and over how many ranks; 0 stands for all that shard.

    Raises ``ValueError`` for what is no bool, no None, and no number that divides that of all.
    """
    num_ranks = mesh.size(mesh.ndim - 1)
    if reshard_after_forward is None or isinstance(reshard_after_forward, bool):
        return reshard_after_forward, 0
    if not isinstance(reshard_after_forward, int):
        raise ValueError(
            "reshard_after_forward should be a bool or an int representing the group size to reshard to, not "
            f"{reshard_after_forward!r}"
        )
    if reshard_after_forward < 1 or num_ranks % reshard_after_forward != 0:
        raise ValueError(
            f"If passing reshard_after_forward as an int, it should be a factor of {num_ranks}, not "
            f"{reshard_after_forward}"
        )
    if reshard_after_forward == 1:
        warnings.warn(
            "reshard_after_forward=1 keeps full parameters, as False does; True reshards them over all ranks",
            stacklevel=3,
        )
        return False, 0
    return True, reshard_after_forward % num_ranks
