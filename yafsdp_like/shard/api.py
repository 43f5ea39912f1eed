"""The public surface: ``fully_shard``; ``fsdp_module.py`` has the methods of a sharded module.

Names, arguments and behaviour are those of ``torch.distributed.fsdp``, so that code written for FSDP2 runs unchanged;
the policies are FSDP2's own classes. Nothing of torch is hooked before the first call of ``fully_shard``.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar, Unpack, overload

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed._composable.contract import contract
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from yafsdp_like.shard import clipping
from yafsdp_like.shard.drop_in import ShardState, show_state_to_torch
from yafsdp_like.shard.entry_methods import guarded_methods
from yafsdp_like.shard.fsdp_module import FSDPModule
from yafsdp_like.shard.full_mesh import data_mesh
from yafsdp_like.shard.optimizer_step import watch_optimizers
from yafsdp_like.shard.pretrained import overrides_of
from yafsdp_like.shard.requirements import (
    check_grad_dtype,
    check_modules,
    check_offload,
    check_params,
    check_reshard,
)
from yafsdp_like.shard.spec.unit_spec import UnitPolicy
from yafsdp_like.shard.wrapping import (
    Owners,
    Placements,
    Policies,
    make_units,
    params_below,
    placements_over,
    split_tied,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from yafsdp_like.comm import TransportName

    M = TypeVar("M", bound=nn.Module)


class ShardOptions(TypedDict, total=False):
    """The options of ``fully_shard``."""

    mesh: DeviceMesh | None
    reshard_after_forward: bool | int | None
    shard_placement_fn: Callable[[nn.Parameter], Any] | None
    mp_policy: MixedPrecisionPolicy
    offload_policy: OffloadPolicy | None
    ignored_params: set[nn.Parameter] | None
    dp_mesh_dims: Any
    transport: TransportName
    split_master: bool
    grad_dtype: torch.dtype | None
    debug: bool | None


@overload
def fully_shard(module: nn.Module, **options: Unpack[ShardOptions]) -> FSDPModule: ...
@overload
def fully_shard(module: list[M], **options: Unpack[ShardOptions]) -> list[FSDPModule]: ...
def fully_shard(
    module: Any,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    mp_policy: MixedPrecisionPolicy = MixedPrecisionPolicy(),  # noqa: B008 (frozen)
    offload_policy: OffloadPolicy | None = OffloadPolicy(),  # noqa: B008 (frozen)
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
    transport: TransportName = "auto",
    split_master: bool = False,
    grad_dtype: torch.dtype | None = None,
    debug: bool | None = None,
) -> Any:
    """Shard the parameters of ``module`` (or of a list of modules, as one unit) over the ranks of ``mesh``, in place.

    A call takes every parameter below ``module`` that no earlier call took, so shard bottom-up: blocks first, the
    root last. Each parameter becomes a ``DTensor`` with ``Shard(0)``, in its own dtype and on the mesh's device.

    Args:
        module: a module with a ``forward``, or a list of such modules, all-gathered and released together.
        mesh: a 1-D mesh, or a 2-D one with ``mesh_dim_names`` (HSDP): its first dimension replicates and its second
            shards, and replicas must start from the same values. All ranks by default: torchrun's, or one alone.
        reshard_after_forward: whether to release full parameters after forward and all-gather them again for backward.
            None: for all but the root, and without grad mode for the root too. A number that divides that of the ranks:
            groups of so many keep them, and all-gather alone for backward.
        mp_policy: ``param_dtype`` to all-gather and compute in, ``reduce_dtype`` to reduce-scatter gradients in,
            ``output_dtype``, and ``cast_forward_inputs``; the optimizer sees the original dtype. Without the second
            one it is as in the installed torch: ``param_dtype`` up to 2.14, the dtype of ``.grad`` from 2.15 on.
        ignored_params: parameters that are left alone.
        transport: what moves bytes between ranks, which is not FSDP2's; ``comm/choice.py`` says what "auto" takes.
        split_master: keep fp32 parameters that are computed on in bfloat16 as that rounding, which is what is
            all-gathered, and 16 bits of remainder: two bytes a value less, the same fp32 values for everybody.
            Not FSDP2's; see [Note: split master] in ``ops/split_master.py``.
        grad_dtype: of ``.grad``, to which sums over several backwards are rounded; None: the policy's, or parameter's.
        debug: see ``FSDPModule.set_debug_mode``; None: as ``YAFSDP_DEBUG`` says.
        shard_placement_fn: returns ``Shard(dim)``, or None for ``Shard(0)``, for each parameter; but for the first
            dimension, ranks must have equal parts. FSDP2's ``ShardPlacementResult`` names another mesh, over which
            alone these parameters are then all-gathered, reduce-scattered and averaged.
        offload_policy: ``CPUOffloadPolicy()`` keeps parameters, gradients and the optimizer's states in host memory
            (``runtime/host_shard.py``); ``RemainderOffloadPolicy()``, not FSDP2's, the remainders of split masters.
        dp_mesh_dims: which dimensions of ``mesh``, on which parameters are DTensors then, shard and replicate.

    Returns:
        its first argument; each module's class becomes a subclass of ``FSDPModule`` and of its own.

    Raises:
        ValueError, AssertionError, NotImplementedError: for meshes, containers and parameters that cannot be sharded.
    """
    modules = check_modules(module)
    offloads = check_offload(offload_policy, transport, split_master)
    grad_dtype = check_grad_dtype(grad_dtype, mp_policy)
    mesh, full = data_mesh(mesh if mesh is not None else _default_mesh(), dp_mesh_dims)
    policy = UnitPolicy(mp_policy, True, split_master, grad_dtype, debug, *offloads)
    policies = {mesh: _over(mesh, policy, reshard_after_forward)}
    check_params(owners := params_below(modules, ignored_params or set()), grad_dtype)
    placed = placements_over(mesh, owners, shard_placement_fn, policies[mesh], full)
    policies |= {p.data_mesh: _over(p.data_mesh, policy, reshard_after_forward) for p in placed.values()}
    return _shard(module, modules, split_tied(owners, modules), placed, policies, transport)


def _over(mesh: DeviceMesh, policy: UnitPolicy, reshard_after_forward: bool | int | None) -> UnitPolicy:
    """Return ``policy`` for the parameters over one mesh, which says what a number of ranks means."""
    reshards, ranks = check_reshard(reshard_after_forward, mesh)
    return replace(policy, reshard_after_forward=reshards, forward_ranks=ranks)


def _make_sharded(
    module: Any,
    modules: Sequence[nn.Module],
    owners: Owners,
    placements: Placements,
    policies: Policies,
    transport: TransportName,
) -> Any:
    _prepare_process()
    state = _shard.state(modules[0])
    with torch.inference_mode(False):  # whose tensors count no writes, and could not be trained
        state.unit = make_units(modules, owners, placements, policies, transport)[0]
    for m in modules:
        _become_fsdp_module(m)
        show_state_to_torch(m, state)
    return module


# Torch's other composable APIs (replicate, checkpoint) recognize a sharded module by this contract and this name.
_make_sharded.__name__ = fully_shard.__name__
_shard = contract(state_cls=ShardState)(_make_sharded)
fully_shard.state = _shard.state  # type: ignore[attr-defined]


def _default_mesh() -> DeviceMesh:
    if not dist.is_initialized():
        if "RANK" in os.environ:  # torchrun's
            dist.init_process_group()
        else:
            dist.init_process_group(store=HashStore(), rank=0, world_size=1)
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))


@functools.cache
def _prepare_process() -> None:
    """Hook torch's optimizers and gradient norms, for the whole process, at its first sharded module."""
    watch_optimizers()
    clipping.install()


# --- the sharded module ---

_sharded_classes: dict[type[nn.Module], type[nn.Module]] = {}  # a module's class -> the class it gets


def _become_fsdp_module(module: nn.Module) -> None:
    cls = type(module)
    if cls not in _sharded_classes:
        members = {"__deepcopy__": _refuse_deepcopy, "__module__": cls.__module__, "__doc__": cls.__doc__}
        # Torch's FSDPModule comes last: every method is ours, but isinstance, which libraries ask, is true.
        bases = (FSDPModule, cls, torch.distributed.fsdp.FSDPModule)
        methods = guarded_methods(cls, FSDPModule) | members | overrides_of(cls)
        _sharded_classes[cls] = type(f"FSDP{cls.__name__}", bases, methods)
    module.__class__ = _sharded_classes[cls]


def _refuse_deepcopy(*_: Any) -> NoReturn:
    raise AssertionError("FSDP does not support deepcopy. Copy a sharded module by its state dict.")
