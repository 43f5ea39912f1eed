"""The mesh of a whole program (``dp_mesh_dims``), of which some dimensions are data parallel ones.

Owns which of them ``fully_shard`` shards and replicates over, and what parameters must be on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from yafsdp_like.shard.requirements import check_mesh

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class FullMesh:
    """A mesh on which all parameters are, and the names of its data parallel dimensions."""

    mesh: DeviceMesh
    data_dims: tuple[str, ...]

    def check(self, param: torch.Tensor, name: str) -> None:
        """Raise ``ValueError`` unless ``param`` is on the mesh, and the same on its data parallel dimensions."""
        if not isinstance(param, DTensor):
            raise ValueError(
                "When dp_mesh_dims is provided, all parameters must be DTensors on the full SPMD mesh, found "
                f"{name} as a plain tensor: call torch.distributed.tensor.distribute_module(module, mesh) first"
            )
        if param.device_mesh != self.mesh:
            raise ValueError(
                f"expected {name} on the mesh that is given to fully_shard together with dp_mesh_dims, {self.mesh}, "
                f"found it on {param.device_mesh}"
            )
        for dim, placement in zip(self.mesh.mesh_dim_names or (), param.placements, strict=True):
            if dim in self.data_dims and not placement.is_replicate():
                raise ValueError(
                    f"Expected Replicate() on DP shard dim {dim!r} of {name}, found {placement}: redistribute it first"
                )


def data_mesh(mesh: DeviceMesh, dims: Any) -> tuple[DeviceMesh, FullMesh | None]:
    """Return the mesh to shard and replicate over: ``mesh``, or ``dims`` (``DataParallelMeshDims``) of it.

    Several names that shard, or replicate, are flattened to one dimension. Raises as ``check_mesh`` does,
    ``ValueError`` for dimensions that there are not, and ``NotImplementedError`` where none shards.
    """
    if dims is None:
        return check_mesh(mesh), None
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(f"mesh must have mesh_dim_names when dp_mesh_dims is provided, found {mesh}")
    shard, replicate = _names(dims.shard), _names(dims.replicate)
    if not shard and not replicate:
        raise ValueError("At least one of shard or replicate must be set in DataParallelMeshDims")
    asked = (*replicate, *shard)
    for name in asked:
        if name not in names:
            raise ValueError(f"Mesh dim name {name!r} not found in mesh.mesh_dim_names {names}")
    if len(set(asked)) < len(asked):
        raise ValueError(f"expected dimensions to shard or to replicate, found one that does both, or twice: {dims}")
    if not shard:
        raise NotImplementedError(
            f"{dims} shards over no dimension: name one in shard, or use torch.nn.parallel.DistributedDataParallel"
        )
    parts = [_flat(mesh, part) for part in (replicate, shard) if part]
    return parts[0] if len(parts) == 1 else DeviceMesh._concatenate(parts), FullMesh(mesh, asked)


def _names(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def _flat(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh:
    return mesh[names[0]] if len(names) == 1 else mesh[names]._flatten("_".join(names))
