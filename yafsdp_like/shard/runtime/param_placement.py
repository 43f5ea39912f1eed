"""Where one parameter's values are: which slices of it this rank has, and the DTensor that users see on them.

Made once from the parameter as it was before sharding, the mesh and what the user's ``shard_placement_fn`` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from yafsdp_like.memory.layout import RowShards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PlacementFn = Callable[[nn.Parameter], Any]  # the user's: returns Shard(dim) or None


@dataclass(frozen=True, eq=False)
class ParamPlacement:
    """How one parameter is distributed: the last dimension of the ``mesh`` shards, one before it replicates."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shards: RowShards
    rank: int  # among those that shard

    @property
    def words(self) -> str:
        """What is special of it, for comparisons between ranks; nothing where it is sharded by rows."""
        return "" if self.shards.dim == 0 else f" sharded on dim {self.shards.dim}"

    def own_part(self, param: torch.Tensor) -> torch.Tensor:
        """Return this rank's slices of the whole ``param``, contiguous.

        They do not keep the others alive: see [Note: a storage of its own].
        """
        start, stop = self.shards.row_range(self.rank)
        rows = param.detach().narrow(self.shards.dim, start, stop - start)
        if rows.storage_offset() or rows.numel() < param.numel():
            rows = rows.clone(memory_format=torch.contiguous_format)
        return rows

    def dtensor(self, local: torch.Tensor) -> DTensor:
        """Return the DTensor of which this rank has ``local``, which may be in host memory."""
        full = torch.empty(self.shards.shape, device="meta")
        moves = local.device.type not in ("meta", self.mesh.device_type)  # as from_local would
        found = DTensor.from_local(
            torch.empty_like(local, device="meta") if moves else local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=full.shape,
            stride=full.stride(),
        )
        return DTensor(local, found._spec, requires_grad=False) if moves else found


def placement_of(param: nn.Parameter, name: str, mesh: DeviceMesh, asked: PlacementFn | None) -> ParamPlacement:
    """Return how ``param`` is sharded over ``mesh``: by rows, or on the dimension that ``asked`` returns for it.

    Raises ``TypeError`` for an answer that is no ``Shard``, ``AssertionError`` for a dimension that there is not, and
    ``NotImplementedError`` for one, other than the first, that ranks cannot have equal parts of.
    """
    dim = _dim_of(param, name, None if asked is None else asked(param))
    num_shards = mesh.size(mesh.ndim - 1)
    if dim and param.shape[dim] % num_shards:
        raise NotImplementedError(
            f"FSDP does not support uneven sharding on dim {dim}: {name} has shape {tuple(param.shape)}, and "
            f"{num_shards} ranks shard; let shard_placement_fn return Shard(0) or None for it, or a dimension whose "
            "size is a multiple of the ranks"
        )
    placements: tuple[Placement, ...] = (*[Replicate()] * (mesh.ndim - 1), Shard(dim))
    shards = RowShards(tuple(param.shape), num_shards, dim)
    return ParamPlacement(mesh, placements, shards, mesh.get_local_rank(mesh.ndim - 1))


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
