"""What a plan needs to know of one unit: its parameters' sizes and dtypes, what was asked of it, and its flat layouts.

Frozen values without tensors, made of units as they are at one moment (``Unit.param_specs``, ``UnitTree.plan``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import OffloadPolicy

from yafsdp_like.comm.transport import Reduction
from yafsdp_like.memory.layout import GUARD_NBYTES, FlatLayout

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    from yafsdp_like.comm.transport import Averaged
    from yafsdp_like.memory.layout import RowShards
    from yafsdp_like.shard.spec.schedule import Residency


@dataclass(frozen=True)
class GatheredPiece:
    """A tensor that is all-gathered in a parameter's place: elements of one rank, padding included, and dtype."""

    numel: int
    dtype: torch.dtype

    @staticmethod
    def layout(pieces: Sequence[GatheredPiece], num_ranks: int) -> FlatLayout:
        """Lay out what so many ranks have of each piece, one piece after the other."""
        return FlatLayout.pack([num_ranks * piece.numel * piece.dtype.itemsize for piece in pieces])

    @staticmethod
    def cut(chunk: torch.Tensor, pieces: Sequence[GatheredPiece]) -> list[torch.Tensor]:
        """Return one rank's pieces, flat, in ``chunk``, ``(nbytes,)`` uint8."""
        segments = GatheredPiece.layout(pieces, 1).segments
        parts = zip(segments, pieces, strict=True)
        return [chunk[part.offset_nbytes : part.end_nbytes].view(piece.dtype) for part, piece in parts]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: how its rows are sharded, and in which dtypes its shards and slots are."""

    name: str
    shards: RowShards
    main_dtype: torch.dtype
    compute_dtype: torch.dtype
    gradient_dtype: torch.dtype  # in which full gradients wait for their reduction
    reduce_dtype: torch.dtype  # to which reduced gradients are rounded
    grad_dtype: torch.dtype  # in which they are kept, as `.grad`
    has_gradient: bool  # it is trainable, and forwards may lead to a backward
    is_split: bool = False  # the compute shard is the upper half of the main shard's values, which has the lower one
    offloads_remainder: bool = False  # and the lower one is in host memory, and no main shard on the device
    pieces: tuple[GatheredPiece, ...] = ()  # all-gathered in its place; see [Note: all-gather extensions]

    @property
    def main_shard_dtype(self) -> torch.dtype | None:
        """What the main shard holds; None where the parameter's class does, or the remainder all that it would."""
        if self.pieces or self.offloads_remainder:
            return None
        return torch.int16 if self.is_split else self.main_dtype

    @property
    def remainder_dtype(self) -> torch.dtype | None:
        """What host memory holds of a split master; None where that is on the device."""
        return torch.int16 if self.offloads_remainder else None

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of what one rank has all-gathered."""
        if self.pieces:
            return GatheredPiece.layout(self.pieces, 1).nbytes
        return self.shards.chunk_numel * self.compute_dtype.itemsize

    def kept_nbytes(self, num_ranks: int) -> int:
        """Bytes of the parameter that one of ``num_ranks`` keeps from forward to backward."""
        return self.shards.padded_numel // num_ranks * self.compute_dtype.itemsize

    @property
    def pieces_nbytes(self) -> list[int]:
        """Bytes of each tensor of one rank that is all-gathered."""
        return [p.numel * p.dtype.itemsize for p in self.pieces] or [self.chunk_nbytes]

    @property
    def full_nbytes(self) -> int:
        """Bytes of what all ranks have all-gathered, in a slot."""
        if self.pieces:
            return GatheredPiece.layout(self.pieces, self.shards.world_size).nbytes
        return self.shards.padded_numel * self.compute_dtype.itemsize

    @property
    def aliasable_nbytes(self) -> int:
        """Bytes of a chunk that a slot can alias; none where the chunk's bytes are not together in the slot."""
        return 0 if self.shards.is_permuted or self.pieces else self.chunk_nbytes


def reduces_as_grad(version: str) -> bool:
    """Return what ``reduce_dtype=None`` means to a version of torch: the dtype of `.grad`, or ``param_dtype``.

    Nightlies and builds of 2.15 are 2.15, though they are sorted before its release.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) >= (2, 15)


REDUCES_AS_GRAD = reduces_as_grad(torch.__version__)


def param_spec(
    name: str,
    shards: RowShards,
    dtype: torch.dtype,
    policy: UnitPolicy,
    *,
    computed_in: torch.dtype | None = None,
    as_computed: bool = False,
    has_gradient: bool = True,
    pieces: tuple[GatheredPiece, ...] = (),
) -> ParamSpec:
    """Return what a plan needs to know of a parameter of ``dtype``, by the policy of its unit.

    Integers (frozen, all of them) and complex numbers keep their dtype; norms with running statistics are
    ``computed_in`` theirs, whatever the policy says. Gradients wait for their reduction in ``reduce_dtype``, or
    ``as_computed``.
    """
    asked = computed_in or policy.mp.param_dtype or dtype
    compute = asked if dtype.is_floating_point else dtype
    by_default = policy.grad_dtype or dtype if REDUCES_AS_GRAD else compute
    reduce = policy.mp.reduce_dtype or by_default if dtype.is_floating_point else compute
    is_split = policy.split_master and not pieces and (dtype, compute) == (torch.float32, torch.bfloat16)
    is_split = is_split and shards.chunk_numel > 0
    return ParamSpec(
        name,
        shards,
        dtype,
        compute,
        compute if as_computed else reduce,
        reduce,
        reduce if reduce == policy.grad_dtype else dtype,
        has_gradient=has_gradient,
        is_split=is_split,
        offloads_remainder=is_split and policy.offload_remainder,
        pieces=pieces,
    )


@dataclass(frozen=True)
class UnitLayout:
    """The flat layouts of a unit; a parameter that a layout does not hold has an empty segment in it."""

    main_shard: FlatLayout
    remainder: FlatLayout  # lower halves of main shards that are in host memory
    compute_shard: FlatLayout  # parameters whose main shard is not what is all-gathered
    aliased_shard: FlatLayout  # the rest of the compute shard: whole granules that the gather slot aliases
    grad_shard: FlatLayout  # only parameters with gradients, as in the gradient slot
    gather_slot: FlatLayout
    gradient_slot: FlatLayout
    forward_shard: FlatLayout  # what stays of the gather slot from forward to backward; see [Note: forward shards]

    @classmethod
    def of(
        cls,
        params: Sequence[ParamSpec],
        mapped: bool = False,
        granule_nbytes: int = 0,
        on_host: bool = False,
        guard_nbytes: int = 0,
        forward_ranks: int = 0,
    ) -> UnitLayout:
        """Lay out ``params``, with ``guard_nbytes`` around each.

        ``forward_ranks`` keep them together from forward to backward, if any do.
        Where peers read the compute shard in place (``mapped``), every parameter has one; slots alias shards where
        ``granule_nbytes`` is not 0. Main shards ``on_host`` are copied into the slot, on one rank too.
        """
        aliased = {
            k
            for k, p in enumerate(params)
            if granule_nbytes and p.aliasable_nbytes and p.aliasable_nbytes % granule_nbytes == 0
        }

        def shard(dtypes: Sequence[torch.dtype | None]) -> FlatLayout:
            return chunks(params, dtypes, guard_nbytes)

        def packed(sizes: Sequence[int], in_granules: Collection[int] = ()) -> FlatLayout:
            return FlatLayout.pack(sizes, in_granules, granule_nbytes, guard_nbytes)

        has_shard = [(mapped or p.compute_dtype != p.main_dtype or p.pieces) and not on_host for p in params]
        full = [(p.shards.padded_numel * p.gradient_dtype.itemsize if p.has_gradient else 0) for p in params]
        return cls(
            main_shard=shard([p.main_shard_dtype for p in params]),
            remainder=shard([p.remainder_dtype for p in params]),
            compute_shard=packed(
                [p.chunk_nbytes if has_shard[k] and k not in aliased else 0 for k, p in enumerate(params)]
            ),
            aliased_shard=shard([p.compute_dtype if k in aliased else None for k, p in enumerate(params)]),
            grad_shard=shard([p.grad_dtype if p.has_gradient else None for p in params]),
            gather_slot=packed([p.full_nbytes if p.shards.world_size > 1 or on_host else 0 for p in params], aliased),
            gradient_slot=packed(full),
            forward_shard=FlatLayout.pack([p.kept_nbytes(forward_ranks) for p in params] if forward_ranks else []),
        )

    @property
    def gathered_nbytes(self) -> int:
        """What a gather slot takes beside the shard that it aliases."""
        return self.gather_slot.nbytes - self.aliased_shard.nbytes


def chunks(params: Sequence[ParamSpec], dtypes: Sequence[torch.dtype | None], guard_nbytes: int = 0) -> FlatLayout:
    """Lay out one rank's chunks of the parameters that have a dtype, with ``guard_nbytes`` around each."""
    pairs = zip(params, dtypes, strict=True)
    sizes = [p.shards.chunk_numel * dtype.itemsize if dtype else 0 for p, dtype in pairs]
    return FlatLayout.pack(sizes, guard_nbytes=guard_nbytes)


@dataclass(frozen=True)
class UnitNeeds:
    """What a build has to make for one unit beside what its policy says."""

    trains: bool = True  # False: as far as is known there are only forwards without grad mode
    own_gather_slot: bool = False  # after a spill, or in debug mode; later plans keep to it
    own_gradient_slot: bool = False  # after a spill, or because unsynced gradients stay in it between backwards
    unsynced_gradients: bool = False  # set_requires_gradient_sync(False) was called
    guards: bool = False  # debug mode: bytes around every parameter that nobody may write

    @property
    def guard_nbytes(self) -> int:
        """Bytes before and behind each parameter's."""
        return GUARD_NBYTES if self.guards else 0


@dataclass
class RemainderOffloadPolicy(OffloadPolicy):
    """For ``fully_shard(..., split_master=True, offload_policy=...)``: keep lower halves of masters in host memory.

    ``AdamW(offload_moments=True)`` copies them to the device and back in every update, beside the moments. See
    [Note: remainders on the host] in ``ops/split_master.py``.
    """


DEBUG = "YAFSDP_DEBUG"  # an environment variable: 1 for debug mode, "planned" for one that leaves slots shared


def debug_needs(asked: bool | None) -> UnitNeeds:
    """Return what a new unit needs: nothing, or guards and a slot of its own in debug mode.

    ``asked`` is what the user said, None where that is left to the environment variable ``YAFSDP_DEBUG``.
    """
    setting = os.environ.get(DEBUG, "").lower()
    if asked is False or (asked is None and setting in ("", "0", "false")):
        return UnitNeeds()
    return UnitNeeds(guards=True, own_gather_slot=setting != "planned")


@dataclass(frozen=True)
class RankSpec:
    """The ranks of one unit, and what of their memory they map of each other."""

    world_size: int  # that shard a parameter
    num_ranks: int  # of all replicas
    transport: str  # what moves the bytes, and why it was chosen
    is_mapped: bool = False  # peers read compute shards and full gradients in place
    reads_shards: bool = False  # each rank all-gathers by reading peers' shards, without their taking part
    gather_column_nbytes: int = 0  # scratch of an all-gather over several hosts
    reduce_column_nbytes: int = 0  # and of a reduce-scatter


@dataclass(frozen=True)
class UnitSpec:
    """One unit as a plan sees it; other units are known by their number in the schedule."""

    name: str
    params: tuple[ParamSpec, ...]
    ranks: RankSpec
    needs: UnitNeeds
    residency: Residency
    forward_prefetch: tuple[int, ...] = ()  # what the user names instead of the next unit
    backward_prefetch: tuple[int, ...] = ()
    on_host: bool = False  # main shards and gradients are in host memory: see [Note: shards on the host]
    forward_ranks: int = 0  # that keep the parameters from forward to backward, if fewer than all
    reductions_in_flight: int = 1

    def layout(self, granule_nbytes: int) -> UnitLayout:
        """Lay out shards and slots, which alias granules of this size where ranks read each other's shards."""
        # Forward shards are all-gathered by collectives, which would write this rank's shard by way of its granules.
        granule_nbytes = granule_nbytes if self.ranks.reads_shards and not self.forward_ranks else 0
        guard_nbytes, mapped = self.needs.guard_nbytes, self.ranks.is_mapped
        return UnitLayout.of(
            self.params, mapped, granule_nbytes, self.on_host, guard_nbytes, forward_ranks=self.forward_ranks
        )


@dataclass(frozen=True)
class UnitPolicy:
    """What the user asked of one unit, by ``fully_shard`` and the setters of ``FSDPModule``."""

    mp: MixedPrecisionPolicy
    reshard_after_forward: bool | None  # None: the root keeps its parameters, others reshard
    split_master: bool = False  # see [Note: split master]
    grad_dtype: torch.dtype | None = None  # of `.grad`, where gradients are reduced in it; None: the parameter's own
    debug: bool | None = None  # None: as the environment says, see ``shard/runtime/debug.py``
    offload: CPUOffloadPolicy | None = None  # see [Note: shards on the host]
    offload_remainder: bool = False  # see [Note: remainders on the host]
    forward_ranks: int = 0  # that share the parameters from forward to backward; 0: all, as at other times
    reshard_after_backward: bool = True
    requires_gradient_sync: bool = True
    reduces_unused: bool = False  # as zeros, parameters without a gradient too
    unshard_in_backward: bool = True
    gradient_divisor: float | None = None  # None: the number of ranks
    sum_only: bool = False
    averaged: Averaged = "new"  # over replicas
    reductions_in_flight: int = 1  # while backward goes on

    def division(self, num_ranks: int, in_fp16: bool) -> Reduction:
        """Return how gradients are divided: by ``num_ranks``, those of all replicas, or by the user's own factor.

        In fp16, whose range is small, the division is split evenly before and after the sum, as FSDP2 does.
        """
        divisor = self.gradient_divisor or float(num_ranks)
        if in_fp16:
            pre = 1.0
            while divisor % pre == 0 and divisor / pre > pre:
                pre *= 2
            return Reduction(mean=False, pre_divisor=pre, post_divisor=divisor / pre)
        if self.sum_only or divisor != num_ranks:
            return Reduction(mean=False, post_divisor=divisor)
        return Reduction()
