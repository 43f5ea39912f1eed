"""One sharded parameter: the DTensor that the user sees, and this rank's flat chunks of it.

This file owns what is a single parameter's: dtypes, rows, shards and ``.grad``, and which modules register it. It knows
nothing of the unit that it is gathered with (``unit.py``), nor of where its full values lie (``slots.py``).
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from yafsdp_like.memory.arena import Place
from yafsdp_like.memory.layout import RowShards

NOWHERE = torch.empty(0, device="meta")  # stands for a shard that has no place yet


class ShardedParam:
    """One parameter: its ``Shard(0)`` DTensor, who registers it, and this rank's flat chunks of it.

    The last dimension of the mesh shards, one before it replicates.

    ``main``, ``compute`` and ``grad`` are ``(chunk_numel,)``, padding included, in ``main_dtype``, ``compute_dtype``
    and ``main_dtype``; the DTensor and its gradient are views of their first ``local_shape`` elements.
    """

    def __init__(self, param: nn.Parameter, owners: list[tuple[nn.Module, str]], mesh: DeviceMesh) -> None:
        self.name = owners[0][1]  # the full name from the root, once the root is known
        self.owners = owners
        self.mesh = mesh
        self.rank = mesh.get_local_rank(mesh.ndim - 1)
        self.shards = RowShards(tuple(param.shape), mesh.size(mesh.ndim - 1))
        self.attributes = dict(vars(param))  # the user's own, which a cast or move of the module would lose
        self.sharded = self._shard(param)
        self.compute_dtype = self.gradient_dtype = self.reduce_dtype = param.dtype
        self.placed: torch.Tensor | None = None  # ``local`` as Unit.materialize left it; None: not in the arena
        self._address = 0  # and its address
        self.main = self.compute = self.grad = NOWHERE  # filled by Unit.materialize, and the others by the build
        self.grad_dtensor: DTensor | None = None

    def _shard(self, param: torch.Tensor) -> nn.Parameter:
        """The parameter's DTensor on this rank's rows, which do not keep the others alive. See [Note: a storage of its
        own].
        """
        start, stop = self.shards.row_range(self.rank)
        rows = param.detach()[start:stop]
        if rows.storage_offset() or rows.numel() < param.numel():
            rows = rows.clone()
        return nn.Parameter(self._dtensor(rows), requires_grad=param.requires_grad)

    def _dtensor(self, local: torch.Tensor) -> DTensor:
        full = torch.empty(self.shards.shape, device="meta")
        placements: list[Placement] = [*[Replicate()] * (self.mesh.ndim - 1), Shard(0)]
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=full.shape, stride=full.stride())

    @property
    def local(self) -> torch.Tensor:
        """This rank's rows as the DTensor holds them, ``local_shape``."""
        return self.sharded._local_tensor  # type: ignore[attr-defined]

    @property
    def is_placed(self) -> bool:
        """Whether ``local`` is what Unit.materialize left, and where: ``share_memory_`` moves it."""
        local = self.local
        return local is self.placed and local.data_ptr() == self._address

    @property
    def main_dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def trainable(self) -> bool:
        return self.sharded.requires_grad

    def set_dtypes(self, policy: MixedPrecisionPolicy, as_computed: bool) -> None:
        """Compute and reduce dtypes by the policy; integers, which only frozen parameters are, keep their own.

        Gradients wait for their reduction in ``reduce_dtype``, or ``as_computed``.
        """
        dtype = self.main_dtype
        self.compute_dtype = (policy.param_dtype or dtype) if dtype.is_floating_point else dtype
        self.reduce_dtype = policy.reduce_dtype or self.compute_dtype
        self.gradient_dtype = self.compute_dtype if as_computed else self.reduce_dtype

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shards.local_shape(self.rank)

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of this rank's chunk of what is gathered."""
        return self.shards.chunk_numel * self.compute_dtype.itemsize

    def adopt_registered(self) -> None:
        """Takes over a parameter that the user put in this one's place (``load_state_dict(assign=True)``, say).

        Raises ``ValueError`` when its global shape differs.
        """
        module, attribute = self.owners[0]
        found = module._parameters[attribute]
        if found is self.sharded:
            return
        if found is None or tuple(found.shape) != self.shards.shape:
            shape = None if found is None else tuple(found.shape)
            raise ValueError(
                f"{self.name}: expected a parameter of shape {self.shards.shape} in its place, found {shape}"
            )
        self.sharded = found if isinstance(found, DTensor) else self._shard(found)
        self.placed = None

    def restore_attributes(self) -> None:
        """Gives the DTensor those that the user set on the parameter."""
        for name, value in self.attributes.items():
            vars(self.sharded).setdefault(name, value)

    def place_main(self, place: Place) -> None:
        """Moves this rank's rows to ``place``, where the DTensor holds them from now on."""
        local = place.tensor(self.main_dtype, self.local_shape)
        with torch.no_grad():
            local.copy_(self.local)
        self.sharded._local_tensor = self.placed = local  # type: ignore[attr-defined]
        self._address = local.data_ptr()
        self.main = place.tensor(self.main_dtype, (self.shards.chunk_numel,))

    def place_grad(self, place: Place) -> None:
        self.grad = place.tensor(self.main_dtype, (self.shards.chunk_numel,))
        self.grad_dtensor = self._dtensor(place.tensor(self.main_dtype, self.local_shape))

    @property
    def has_own_grad(self) -> bool:
        """Whether ``.grad`` is set, and to the gradient shard: what is reduced next is added to it."""
        return self.grad_dtensor is not None and self.sharded.grad is self.grad_dtensor

    def spare_kept_grad(self) -> None:
        """A gradient that the user still holds, but no longer as ``.grad``, keeps its values: it moves to memory of
        its own.
        """
        assert self.grad_dtensor is not None
        if sys.getrefcount(self.grad_dtensor) > 2:  # by more than this object and the call
            kept, local = self.grad_dtensor, self.grad_dtensor._local_tensor
            kept._local_tensor = local.clone()
            self.grad_dtensor = self._dtensor(local)

    def deliver_grad(self, was_added: bool) -> None:
        """Sets ``.grad`` to the gradient shard, where a reduction has just ended, or adds that to another ``.grad`` of
        the user's; then runs the user's hooks: autograd never accumulates into the sharded parameter, so they are run
        here.
        """
        if not was_added:
            grad = self.sharded.grad
            if grad is None:
                self.sharded.grad = self.grad_dtensor
            else:
                local = grad.to_local()  # type: ignore[attr-defined]  # a DTensor
                local.add_(self.grad[: local.numel()].view(local.shape))
        for hook in (getattr(self.sharded, "_post_accumulate_grad_hooks", None) or {}).values():
            hook(self.sharded)

    def register(self, value: nn.Parameter) -> None:
        """Makes ``value`` what every owning module sees under this parameter's name."""
        for module, attribute in self.owners:
            if type(module).__setattr__ is nn.Module.__setattr__:
                module._parameters[attribute] = value
            else:  # e.g. nn.LSTM, which keeps a list of its weights beside the dict
                setattr(module, attribute, value)
