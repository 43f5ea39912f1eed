"""Where one parameter's values are: which slices of it this rank has, and the DTensor that users see on them.

Made once from the parameter as it was before sharding, the mesh and what the user's ``shard_placement_fn`` says.

[Note: parameters that are DTensors]
A parameter may be distributed already, over the ranks of tensor parallelism, say, or of experts. What is sharded and
all-gathered is then this rank's local tensor. In a slot it is shown as the DTensor that the parameter was, and outside
of one as a DTensor on both meshes together, whose first dimensions are those that ``fully_shard`` was given. Where both
shard the same dimension, this rank has a part of a part: the rows of the whole are not in the order of the mesh, which
torch calls ``_StridedShard``. Ranks of one mesh coordinate in the other dimensions share a local tensor, its plan and
its collectives; the others need not agree with them.

With ``dp_mesh_dims`` the parameter is on data parallel dimensions too, the same everywhere. It is then shown on all of
them in a slot, and where a gradient is a part of a sum there (``Partial``), these parts are what is reduce-scattered.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from yafsdp_like.memory.layout import RowShards

PlacementFn = Callable[[nn.Parameter], Any]  # the user's: returns Shard(dim) or None


@dataclass(frozen=True, eq=False)
class ParamPlacement:
    """How one parameter, of ``shape`` and ``stride``, is distributed, and how its local tensor is sharded.

    ``inner_mesh`` and ``inner_placements`` are those of a parameter that was a DTensor already; on the dimensions
    ``summed`` of that mesh, by number, gradients are summed when they are reduced.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shards: RowShards
    rank: int  # among those that shard
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    data_mesh: DeviceMesh  # the dimensions of ``mesh`` that replicate, if any do, and the one that shards
    inner_mesh: DeviceMesh | None = None
    inner_placements: tuple[Placement, ...] = ()
    summed: tuple[int, ...] = ()

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The dimension that shards."""
        return self.data_mesh if self.data_mesh.ndim == 1 else self.data_mesh[(self.data_mesh.mesh_dim_names or ())[-1]]

    @property
    def words(self) -> str:
        """What is special of it, for comparisons between ranks; nothing where it is sharded by rows."""
        on_dim = "" if self.shards.dim == 0 else f" sharded on dim {self.shards.dim}"
        return on_dim + (f" of {self.inner_placements}" if self.inner_mesh is not None else "")

    def own_part(self, param: torch.Tensor) -> torch.Tensor:
        """Return this rank's slices of the whole ``param``, contiguous.

        They do not keep the others alive: see [Note: a storage of its own].
        """
        start, stop = self.shards.row_range(self.rank)
        whole = param._local_tensor if isinstance(param, DTensor) else param
        rows = whole.detach().narrow(self.shards.dim, start, stop - start)
        if rows.storage_offset() or rows.numel() < whole.numel() or rows.is_inference():
            rows = rows.clone(memory_format=torch.contiguous_format)
        return rows

    def dtensor(self, local: torch.Tensor) -> DTensor:
        """Return the DTensor of which this rank has ``local``, which may be in host memory."""
        moves = local.device.type not in ("meta", self.mesh.device_type)  # as from_local would
        moves |= type(local) is not torch.Tensor and hasattr(local, "fsdp_pre_all_gather")  # do not ask it for views
        found = DTensor.from_local(
            torch.empty(local.shape, dtype=local.dtype, device="meta") if moves else local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=self.stride,
        )
        return DTensor(local, found._spec, requires_grad=False) if moves else found

    def full(self, whole: torch.Tensor) -> torch.Tensor:
        """Return what modules compute on, where ``whole`` is all that was all-gathered: see the note above."""
        if self.inner_mesh is None:
            return whole
        return DTensor.from_local(
            whole,
            self.inner_mesh,
            self.inner_placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=self.stride,
        )

    def is_as_before(self, given: torch.Tensor) -> bool:
        """Return whether ``given`` is distributed as the parameter was before it was sharded."""
        if self.inner_mesh is None:
            return not isinstance(given, DTensor)
        found = (given.device_mesh, given.placements) if isinstance(given, DTensor) else None
        return found == (self.inner_mesh, self.inner_placements)

    def gradient_of_whole(self, grad: torch.Tensor) -> torch.Tensor:
        """Return a gradient of ``full`` as one of what was all-gathered; a collective if it is placed otherwise."""
        if not isinstance(grad, DTensor):
            return grad
        wanted = list(self.inner_placements)
        for dim in self.summed:
            wanted[dim] = grad.placements[dim] if grad.placements[dim].is_partial() else Replicate()
        return grad.redistribute(placements=wanted).to_local()


def placement_of(
    param: nn.Parameter, name: str, mesh: DeviceMesh, asked: PlacementFn | None, data_dims: Sequence[str] = ()
) -> ParamPlacement:
    """Return how ``param`` is sharded over ``mesh``: by rows, or on the dimension that ``asked`` returns for it.

    With ``data_dims`` it is a DTensor on a mesh of which these are the dimensions that ``mesh`` has too.
    Raises ``TypeError`` for an answer that is no ``Shard``, ``AssertionError`` for a dimension that there is not, and
    ``NotImplementedError`` for one, other than the first, that ranks cannot have equal parts of, and for a mesh that
    ``asked`` names with its answer (FSDP2's ``ShardPlacementResult``) whose dimensions come in another order.
    """
    answer: Any = None if asked is None else asked(param)
    if hasattr(answer, "placement") and hasattr(answer, "mesh_info"):  # FSDP2's ShardPlacementResult
        answer, mesh = answer.placement, _mesh_of(answer.mesh_info, name, mesh, data_dims)
    dim = _dim_of(param, name, answer)
    num_shards, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    whole = param._local_tensor if isinstance(param, DTensor) else param
    if dim and hasattr(whole, "fsdp_pre_all_gather"):
        raise NotImplementedError(
            f"{name} is a {type(whole).__name__}, which says itself what is all-gathered (fsdp_pre_all_gather), and is "
            f"sharded by rows only; shard_placement_fn returned Shard({dim}) for it: return None"
        )
    if dim and whole.shape[dim] % num_shards:
        raise NotImplementedError(
            f"FSDP does not support uneven sharding on dim {dim}: {name} has shape {tuple(whole.shape)}, and "
            f"{num_shards} ranks shard; let shard_placement_fn return Shard(0) or None for it, or a dimension whose "
            "size is a multiple of the ranks"
        )
    outer: tuple[Placement, ...] = (*[Replicate()] * (mesh.ndim - 1), Shard(dim))
    shards = RowShards(tuple(whole.shape), num_shards, dim)
    shape, stride = tuple(param.shape), param.stride()
    if not isinstance(param, DTensor):
        return ParamPlacement(mesh, outer, shards, rank, shape, stride, mesh)
    shown_mesh, shown = param.device_mesh, tuple(param.placements)
    names = shown_mesh.mesh_dim_names or ()
    summed = tuple(i for i, one in enumerate(names) if one in data_dims)
    left = [i for i in range(shown_mesh.ndim) if i not in summed]
    num_parts = math.prod(shown_mesh.size(i) for i in left if shown[i].is_shard(dim))
    if num_parts > 1:
        outer = (*outer[:-1], _StridedShard(dim, split_factor=num_parts))
    both = mesh
    if left:
        both = _both_meshes(mesh, shown_mesh if not summed else shown_mesh[tuple(names[i] for i in left)], name)
    placements = (*outer, *(shown[i] for i in left))
    return ParamPlacement(both, placements, shards, rank, shape, stride, mesh, shown_mesh, shown, summed)


def _both_meshes(outer: DeviceMesh, inner: DeviceMesh, name: str) -> DeviceMesh:
    """Return the mesh of which the two are dimensions. Raises ``ValueError`` where there is none."""
    outer_names, inner_names, root = outer.mesh_dim_names or (), inner.mesh_dim_names or (), outer._get_root_mesh()
    both: DeviceMesh | None = None
    if set(outer_names) & set(inner_names):
        raise ValueError(
            f"expected {name}, which is a DTensor on {inner}, not to be distributed over the dimensions that "
            f"fully_shard shards or replicates, found {outer}: distribute it over the other dimensions alone"
        )
    if len(outer_names) == outer.ndim:
        # By the outer mesh's root if possible: torch takes meshes that are equal for one, whatever they are slices of.
        with contextlib.suppress(KeyError, RuntimeError):
            found = root[inner_names]
            inner = found if found == inner else inner
        with contextlib.suppress(RuntimeError):  # they are parts of no one mesh
            both = DeviceMesh._concatenate([outer, inner])
    if both is None:
        raise ValueError(
            f"expected the mesh of fully_shard and that of {name}, which is a DTensor already, to be slices of one "
            f"mesh with mesh_dim_names, found {outer} and {inner}: make one by init_device_mesh(..., mesh_dim_names="
            '("dp", "tp")), pass mesh["tp"] to parallelize_module and mesh["dp"] to fully_shard'
        )
    return both


def words_of(given: torch.Tensor) -> str:
    """Say how a tensor is distributed."""
    return f"{given.placements} on {given.device_mesh}" if isinstance(given, DTensor) else "a whole tensor"


def _mesh_of(info: Any, name: str, mesh: DeviceMesh, data_dims: Sequence[str]) -> DeviceMesh:
    """Return the mesh to shard one parameter over, which FSDP2's ``FSDPMeshInfo`` or ``HSDPMeshInfo`` names."""
    found: DeviceMesh = info.mesh
    dims = (info.replicate_mesh_dim, info.shard_mesh_dim)
    if dims != ((None, 0) if found.ndim == 1 else (0, 1)) or found.ndim > 2:
        raise NotImplementedError(
            f"shard_placement_fn returned {info} for {name}, whose mesh is to be 1-D, or 2-D with the dimension that "
            "replicates first and the one that shards second: slice or reshape it"
        )
    if data_dims and found != mesh:
        raise NotImplementedError(
            f"shard_placement_fn returned {found} for {name}, and with dp_mesh_dims all parameters are sharded over "
            f"the same dimensions, {mesh}: leave one of them out"
        )
    return found


def _dim_of(param: nn.Parameter, name: str, answer: Any) -> int:
    if answer is None:
        return 0
    if not isinstance(answer, Shard):
        raise TypeError(f"expected shard_placement_fn to return Shard(dim) or None, found {answer!r} for {name}")
    dim: int = answer.dim + param.dim() if answer.dim < 0 else answer.dim
    if not 0 <= dim < param.dim():
        raise AssertionError(
            f"Shard dim {answer.dim} is invalid for {param.dim()}D tensor: shard_placement_fn returned it for {name}, "
            f"which has shape {tuple(param.shape)}"
        )
    return dim
