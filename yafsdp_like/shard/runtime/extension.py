"""Parameters of tensor classes that say themselves what is all-gathered of them, and what modules then compute on.

Owns the calls of such a class's ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``, which are FSDP2's.

[Note: all-gather extensions]
``local.fsdp_pre_all_gather(mesh, outer_size, outer_stride, module, mp_policy)``, or with the mesh alone, returns the
tensors to all-gather in the place of this rank's ``local`` tensor, and metadata. They may be smaller, or of another
dtype: what a quantized weight is made of, say. They are copied to the parameter's part of the compute shard, which is
all-gathered as any, so that the wire and the slot have these bytes. ``local.fsdp_post_all_gather(outputs, metadata,
param_dtype, out=None)`` then returns the full parameter and the tensors that it is made of. Once it has, it is called
with ``out``, the same parameter, whose outputs are where they were, and writes what is not among them.

Both ranks' and slots' bytes are planned, so the shapes and dtypes of what is all-gathered must not change: they are
those of a first call, when the parameter is sharded. Rows that a rank lacks are padded here. The class's own tensors,
the main shard and what ``fsdp_post_all_gather`` makes beside the outputs, are PyTorch's allocator's, and not in the
plan; the latter have memory only while the unit is unsharded.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.tensor import DTensor

from yafsdp_like.memory.layout import contiguous_stride
from yafsdp_like.shard.spec.unit_spec import GatheredPiece

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.fsdp import MixedPrecisionPolicy

    from yafsdp_like.memory.arena import Place
    from yafsdp_like.shard.runtime.param_placement import ParamPlacement
    from yafsdp_like.shard.spec.unit_spec import UnitPolicy


def is_extended(local: torch.Tensor) -> bool:
    """Return whether the tensor's class says what is all-gathered."""
    return hasattr(local, "fsdp_pre_all_gather") and hasattr(local, "fsdp_post_all_gather")


def attributes_of(param: torch.Tensor) -> dict[str, Any]:
    """Return what the user has set on a parameter; of such a class no tensors, which are the values before sharding."""
    return {k: v for k, v in vars(param).items() if not (is_extended(param) and isinstance(v, torch.Tensor))}


def refuse_subclass(param: torch.Tensor, name: str) -> None:
    """Raise ``NotImplementedError`` for a parameter whose class computes otherwise, which its shards would lose."""
    cls = type(param)
    plain = issubclass(cls, nn.Parameter) and cls.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    if plain and cls.__torch_function__ is nn.Parameter.__torch_function__ and not hasattr(cls, "fsdp_pre_all_gather"):
        return
    if not isinstance(param, (DTensor, FakeTensor)) and not is_extended(param):
        raise NotImplementedError(
            f"{name} is a {cls.__module__}.{cls.__qualname__}, and sharding tensor subclasses takes both their "
            "fsdp_pre_all_gather and fsdp_post_all_gather: define them, name the parameter in ignored_params, or make "
            "it a plain one first"
        )


def refuse_with(param: torch.Tensor, name: str, policy: UnitPolicy) -> None:
    """Raise ``NotImplementedError`` for such a parameter where the ``policy`` goes beyond what the class says."""
    local = param._local_tensor if isinstance(param, DTensor) else param
    if not is_extended(local) or not (policy.offload or policy.forward_ranks):
        return
    why = (
        "which runs on the device, and CPUOffloadPolicy keeps it in host memory"
        if policy.offload
        else "and reshard_after_forward as a number of ranks keeps plain parts of the full parameter"
    )
    raise NotImplementedError(
        f"{name} is a {type(local).__name__}, of a class with an all-gather of its own (fsdp_pre_all_gather), {why}: "
        "leave one of them out, or name the parameter in ignored_params"
    )


class Extension:
    """What one parameter's class has said last. See [Note: all-gather extensions]."""

    def __init__(self, name: str, placement: ParamPlacement) -> None:
        self.name, self._placement = name, placement
        self._shapes: tuple[tuple[int, ...], ...] = ()  # of one rank's inputs, padded
        self.pieces: tuple[GatheredPiece, ...] = ()  # until the parameter has values
        self.metadata: Any = None

    def known_pieces(self, name: str) -> tuple[GatheredPiece, ...]:
        """Return what is all-gathered of the parameter of this name; an error where only its values can tell."""
        if not self.pieces:
            raise NotImplementedError(
                f"what is all-gathered of {name} is what fsdp_pre_all_gather returns for its values, and it has none "
                'yet: materialize it first, by model.to_empty(device="cuda") say'
            )
        return self.pieces

    def look(self, local: torch.Tensor, module: nn.Module | None, policy: MixedPrecisionPolicy) -> None:
        """Find out what is all-gathered, unless that is known."""
        if not self.pieces:
            inputs = self._inputs(local, module, policy)
            self._shapes = tuple(self._padded(local, tuple(one.shape)) for one in inputs)
            self.pieces = tuple(
                GatheredPiece(math.prod(s), one.dtype) for s, one in zip(self._shapes, inputs, strict=True)
            )

    def write(
        self, local: torch.Tensor, module: nn.Module | None, policy: MixedPrecisionPolicy, compute: torch.Tensor
    ) -> None:
        """Write what is all-gathered of ``local`` to ``compute``, ``(nbytes,)`` uint8.

        Raises ``RuntimeError`` for shapes or dtypes that the plan does not have.
        """
        inputs = self._inputs(local, module, policy)
        found = [(self._padded(local, tuple(one.shape)), one.dtype) for one in inputs]
        expected = [(shape, piece.dtype) for shape, piece in zip(self._shapes, self.pieces, strict=True)]
        if found != expected:
            raise RuntimeError(
                f"fsdp_pre_all_gather of {self.name} returned {found}, expected {expected} as when it was sharded "
                f"(rank {self._placement.rank}): what is all-gathered must keep its shapes and dtypes"
            )
        for one, to in zip(inputs, GatheredPiece.cut(compute, self.pieces), strict=True):
            to[: one.numel()].copy_(one.reshape(-1))

    def _inputs(
        self, local: torch.Tensor, module: nn.Module | None, policy: MixedPrecisionPolicy
    ) -> tuple[torch.Tensor, ...]:
        pre: Any = local.fsdp_pre_all_gather  # type: ignore[attr-defined]
        num_arguments = len(inspect.signature(pre).parameters)
        if num_arguments not in (1, 5):
            raise TypeError(
                f"expected fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy), or with the "
                f"mesh alone, of {type(local).__name__}, the class of {self.name}; found {inspect.signature(pre)}"
            )
        shape = self._placement.shards.shape
        others = (torch.Size(shape), contiguous_stride(shape), module, policy)
        inputs, self.metadata = pre(self._placement.shard_mesh, *(others if num_arguments == 5 else ()))
        return tuple(inputs)

    def _padded(self, local: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim, shards = self._placement.shards.dim, self._placement.shards
        if dim == 0 and shape and local.dim() and shape[0] == local.shape[0]:
            return (shards.rows_per_rank, *shape[1:])
        return shape

    @property
    def num_ranks(self) -> int:
        """How many ranks all-gather."""
        return self._placement.shards.world_size

    def output_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of what was all-gathered: inputs of all ranks, one after the other."""
        return [(self.num_ranks * shape[0], *shape[1:]) if shape else (self.num_ranks,) for shape in self._shapes]


class Extended(Protocol):
    """What is used of a sharded parameter."""

    extension: Extension | None
    placement: ParamPlacement
    compute_dtype: torch.dtype
    sharded: nn.Parameter

    @property
    def local(self) -> torch.Tensor:
        """This rank's rows."""

    @property
    def trainable(self) -> bool:
        """Whether the user wants gradients."""


@dataclass(eq=False)
class ExtendedParam:
    """One such parameter in one slot: what is all-gathered, ``(nbytes,)`` uint8 each, and what modules compute on."""

    chunks: list[torch.Tensor]  # for the collective to write
    outputs: list[torch.Tensor]  # the same bytes, other tensors: see [Note: version counters]
    full: nn.Parameter | None = None
    inner: tuple[torch.Tensor, ...] = ()  # that the class has made beside the outputs
    is_current: bool = False  # it shows what was all-gathered last
    on_made: Callable[[nn.Parameter], None] | None = None

    @classmethod
    def at(cls, place: Place, extension: Extension) -> ExtendedParam:
        """Return the parameter at ``place``."""
        shapes, pieces = extension.output_shapes(), extension.pieces
        parts = [place.part(segment) for segment in GatheredPiece.layout(pieces, extension.num_ranks).segments]
        pairs = list(zip(parts, shapes, pieces, strict=True))
        return cls(
            [part.flat(torch.uint8, part.segment.nbytes) for part in parts],  # of a dtype that all transports know
            [part.tensor(piece.dtype, shape) for part, shape, piece in pairs],
        )

    def arrive(self, p: Extended) -> nn.Parameter:
        """Make the full parameter of what was all-gathered, or write what of it is not."""
        extension, placement, dtype = p.extension, p.placement, p.compute_dtype
        assert extension is not None
        post: Any = p.local.fsdp_post_all_gather  # type: ignore[attr-defined]
        self.is_current = True
        outputs = tuple(self.outputs)
        with torch.no_grad():
            if self.full is not None:
                for tensor in self.inner:
                    _resize(tensor, tensor.numel() * tensor.itemsize)
                with _unsafe_preserve_version_counter((self.full, *self.inner)):
                    post(outputs, extension.metadata, dtype, out=self.full)
                return self.full
            made, inner = post(outputs, extension.metadata, dtype)
            own = {tensor.untyped_storage().data_ptr() for tensor in outputs}
            self.inner = tuple(tensor for tensor in inner if tensor.untyped_storage().data_ptr() not in own)
            shape = placement.shards.shape
            if tuple(made.shape) != shape:
                made = made.as_strided(shape, contiguous_stride(shape), 0)
        self.full = nn.Parameter(placement.full(made), requires_grad=p.trainable)
        for name, value in vars(p.sharded).items():
            vars(self.full).setdefault(name, value)  # what the class keeps under a name of its own is of what was made
        if self.on_made is not None:
            self.on_made(self.full)
        return self.full

    def leave(self) -> None:
        """Give back the memory of what is not in the slot, as soon as work that was issued on compute has read it."""
        self.is_current = False
        for tensor in self.inner:
            _resize(tensor, 0)


def _resize(tensor: torch.Tensor, nbytes: int) -> None:
    storage = tensor.untyped_storage()
    if storage.nbytes() != nbytes:
        storage.resize_(nbytes)
