"""A unit: the parameters gathered together, what the user asked of them, and what is known of their shards and slots.

This file owns the main shard and says how a unit's bytes are laid out, and when the compute shards follow the main
ones. It does not decide when anything is gathered or released (``engine.py`` does).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from yafsdp_like.comm.transport import Averaged, Reduction, Transport
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import FlatLayout
from yafsdp_like.memory.plan import Region
from yafsdp_like.shard.param import NOWHERE, Ownership, ShardedParam
from yafsdp_like.shard.slots import ForwardUse, GatherSlot, Generation, GradientSlot, SlotState

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from yafsdp_like.shard.engine import Engine
    from yafsdp_like.shard.hooks import Call


@dataclass(frozen=True)
class UnitLayout:
    """The flat layouts of a unit; a parameter that a layout does not hold has an empty segment in it."""

    main_shard: FlatLayout
    compute_shard: FlatLayout  # only parameters that peers do not gather from the main shard itself
    aliased_shard: FlatLayout  # the rest of the compute shard: whole pages that the gather slot shows
    grad_shard: FlatLayout  # only trainable parameters, as in the gradient slot
    gather_slot: FlatLayout
    gradient_slot: FlatLayout

    @classmethod
    def of(
        cls, params: Sequence[ShardedParam], trainable: Collection[int], maps_memory: bool, page_nbytes: int
    ) -> UnitLayout:
        """With gradients of the ``trainable`` ones. Where peers read the compute shard in place (``maps_memory``),
        every parameter has one; slots are windows where ``page_nbytes`` is not 0.
        """
        aliased = {
            k for k, p in enumerate(params) if page_nbytes and p.chunk_nbytes and p.chunk_nbytes % page_nbytes == 0
        }

        def chunks(dtypes: Sequence[torch.dtype | None]) -> FlatLayout:
            return FlatLayout.pack(
                [p.shards.chunk_numel * d.itemsize if d else 0 for p, d in zip(params, dtypes, strict=True)]
            )

        def full(dtypes: Sequence[torch.dtype | None], in_pages: Collection[int] = ()) -> FlatLayout:
            sizes = [p.shards.padded_numel * d.itemsize if d else 0 for p, d in zip(params, dtypes, strict=True)]
            return FlatLayout.pack(sizes, in_pages, page_nbytes)

        has_shard = [maps_memory or p.compute_dtype != p.main_dtype for p in params]

        return cls(
            main_shard=chunks([p.main_dtype for p in params]),
            compute_shard=chunks(
                [p.compute_dtype if has_shard[k] and k not in aliased else None for k, p in enumerate(params)]
            ),
            aliased_shard=chunks([p.compute_dtype if k in aliased else None for k, p in enumerate(params)]),
            grad_shard=chunks([p.main_dtype if k in trainable else None for k, p in enumerate(params)]),
            gather_slot=full([p.compute_dtype if p.shards.world_size > 1 else None for p in params], aliased),
            gradient_slot=full([p.gradient_dtype if k in trainable else None for k, p in enumerate(params)]),
        )

    @property
    def gathered_nbytes(self) -> int:
        """What a gather slot takes beside the shard that it shows."""
        return self.gather_slot.nbytes - self.aliased_shard.nbytes


@dataclass(eq=False)
class UnitPolicy:
    """What the user asked of one unit; the setters of ``FSDPModule`` write here."""

    mp: MixedPrecisionPolicy
    reshard_after_forward: bool | None  # None: the root keeps its parameters, others reshard
    reshard_after_backward: bool = True
    requires_gradient_sync: bool = True
    reduces_unused: bool = False  # as zeros, parameters without a gradient too
    unshard_in_backward: bool = True
    gradient_divisor: float | None = None  # None: the number of ranks
    sum_only: bool = False
    averaged: Averaged = "new"  # over replicas
    forward_prefetch: list[Unit] = field(default_factory=list)
    backward_prefetch: list[Unit] = field(default_factory=list)


class Unit:
    """Parameters that one ``fully_shard`` call took, in order of registration, and all that is known of them.

    ``modules`` are those whose forward needs the parameters: the call's own, and any that a parameter is tied into.

    [Note: who owns whom]
    Modules own their units, and units their parameters and slots; the root module owns the engine, and so does every
    graph that may still run backward. What leads back, from a unit to its engine and modules and from a parameter to
    its unit, is weak, and an engine that goes breaks what circles are left: so a model that is deleted frees its memory
    at once, and not when garbage is collected.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        params: Sequence[ShardedParam],
        policy: UnitPolicy,
        mesh: DeviceMesh,
        transport: Transport,
        device: torch.device,
    ) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self.params = list(params)
        self.policy = policy
        self.mesh = mesh
        self.transport = transport
        self.device = device
        self.name = type(modules[0]).__name__  # the modules' full names, once the root is known
        self.arena = Arena(device)  # of the main shard, which is needed before the root is known
        self.layout: UnitLayout | None = None  # None until materialized
        self.moves = 0  # how often main shards were put somewhere else
        self.updates = 0  # how often an optimizer stepped over them
        self.cast: Generation = ()  # of the main shards when the compute shards were last made from them
        self.written_by_update = False  # an update has made both since the last forward
        self._engine: weakref.ref[Engine] | None = None  # see the property
        self.given: list[
            ShardedParam
        ] = []  # in whose place modules hold tensors of the user's, while that is registered
        self.registered: GatherSlot | None = None  # whose parameters the modules see; None: the sharded ones
        self._gather_slot: GatherSlot | None = None  # see the property
        self._gradient_slot: GradientSlot | None = None
        self.staging = self.column = NOWHERE  # scratch of reductions and gathers, shared by units; made by the build
        self.trains = True  # False: as far as is known there are only forwards without grad mode
        self.own_gather_slot = False  # by a spill; later plans keep to it
        self.own_gradient_slot = False  # by a spill, or because unsynced gradients stay in it between backwards
        self.unsynced_gradients = False  # set_requires_gradient_sync(False) was called
        self.pending: weakref.WeakSet[ForwardUse] = weakref.WeakSet()  # uses whose backward has not ended
        self.reached: set[int] = set()  # running backwards, by autograd's number, that have entered it by an output
        self.is_loading = False  # a state dict, whose entries may be assigned
        self.to_run: list[nn.Module] = []  # of several modules: those that have not run in this forward pass
        self.calls: list[Call] = []  # forwards that are running, the innermost last
        self.materialize()

    def __repr__(self) -> str:
        return f"Unit({self.name!r}, {len(self.params)} parameters)"

    @property
    def engine(self) -> Engine | None:
        """Of the root module, once that is known; None again when that module is gone."""
        return None if self._engine is None else self._engine()

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)

    @property
    def has_slots(self) -> bool:
        return self._gather_slot is not None and self._gradient_slot is not None

    @property
    def gather_slot(self) -> GatherSlot:
        """Where forwards to come find the full parameters; made by the engine's build."""
        assert self._gather_slot is not None, f"{self.name!r} has no slot before its engine is built"
        return self._gather_slot

    @gather_slot.setter
    def gather_slot(self, slot: GatherSlot) -> None:
        self._gather_slot = slot

    @property
    def gradient_slot(self) -> GradientSlot:
        """Where the next backward's gradients go; made by the engine's build."""
        assert self._gradient_slot is not None, f"{self.name!r} has no slot before its engine is built"
        return self._gradient_slot

    @gradient_slot.setter
    def gradient_slot(self, slot: GradientSlot) -> None:
        self._gradient_slot = slot

    def unsynced(self) -> GradientSlot | None:
        """The gradient slot, if gradients that no backward has reduced yet are in it."""
        return self._gradient_slot if self._gradient_slot is not None and self._gradient_slot.arrived else None

    def forget_slots(self) -> None:
        """Before the engine makes new ones. What autograd saved keeps the old ones alive as long as it needs them."""
        self._gather_slot = self._gradient_slot = None
        self.cast = ()

    @property
    def holds_something(self) -> bool:
        """Whether memory of the plan is referred to beyond the arena, by a graph or as gradients, and would not be free
        with it; or there is no plan yet.
        """
        slot = self._gradient_slot
        if slot is None or self.pending or slot.state is not SlotState.EMPTY:
            return True
        return any(p.sharded.grad is not None for p in self.params)

    @property
    def modules(self) -> list[nn.Module]:
        """Those that are still there."""
        return [module for ref in self._modules if (module := ref()) is not None]

    def add_module(self, module: nn.Module) -> None:
        self._modules.append(weakref.ref(module))

    @property
    def slots(self) -> list[GatherSlot]:
        """Slots that may hold the unit's parameters now: that of forwards to come, and the one that modules see."""
        return [slot for slot in dict.fromkeys((self._gather_slot, self.registered)) if slot is not None]

    @property
    def trainable(self) -> list[int]:
        """Parameters for whose gradients there is, or will be, room."""
        return [k for k, p in enumerate(self.params) if p.trainable] if self.trains else []

    @property
    def signature(self) -> tuple[object, ...]:
        """What the plan was made for; a change of it asks for a new plan."""
        return (self.unsynced_gradients, self.moves, *((p.trainable, p.is_placed) for p in self.params))

    def generation(self) -> Generation:
        """What changes when main shards are written: by an optimizer (whose kernels may count nothing), or in place
        through a DTensor or its local tensor.
        """
        return (self.moves, self.updates, *(v for p in self.params for v in (p.sharded._version, p.local._version)))

    def meta_params(self) -> list[str]:
        return [p.name for p in self.params if p.local.is_meta]

    def plan_layout(self, page_nbytes: int = 0) -> UnitLayout:
        """The layout for the dtypes and ``requires_grad`` of now, without touching memory; with gather slots that are
        windows of such pages, or are none.
        """
        self.plan_dtypes()
        aliases_local_shard = self.transport.aliases_local_shard and self.transport.world_size > 1
        page_nbytes = page_nbytes if aliases_local_shard else 0
        return UnitLayout.of(self.params, self.trainable, self.transport.maps_memory, page_nbytes)

    def plan_dtypes(self) -> None:
        """What each parameter is computed and its gradient reduced in, by the policy of now."""
        for p in self.params:
            # A kernel that sums in fp32 reads gradients as they were computed; sums over backwards need reduce_dtype.
            p.set_dtypes(self.policy.mp, as_computed=self.transport.maps_memory and not self.unsynced_gradients)

    def materialize(self) -> None:
        """Puts the main shard into the arena, or back into it after the user moved, cast or replaced parameters.

        Does nothing while a parameter is on the meta device.
        """
        for p in self.params:
            p.restore_attributes()
            self.mark(p.sharded, p)
        if self.meta_params():
            return
        layout = self.plan_layout()
        if self.layout is None or layout.main_shard != self.layout.main_shard or self._changed_dtype():
            self.arena = Arena(self.device)
            self.arena.reserve([Region("main_shard", "main_shard", layout.main_shard.nbytes)])
            for p in self.params:
                p.placed = None
        self.layout = layout
        for p, segment in zip(self.params, layout.main_shard.segments, strict=True):
            if not p.is_placed:
                self.moves += 1
                place = self.arena.place("main_shard").part(segment)
                p.place_main(place)

    def mark(self, param: torch.Tensor, p: ShardedParam) -> None:
        """Notes on ``param`` that it is ``p`` of this unit, or what ``p`` was made of, for ``ownership_of``."""
        param._yafsdp_ownership = Ownership(  # type: ignore[attr-defined]
            weakref.ref(self), weakref.ref(p), is_replaced=param is not p.sharded
        )

    def adopt(self, p: ShardedParam, given: nn.Parameter) -> nn.Parameter:
        """Takes ``given``, which the user assigns to a module, in the place of ``p``; returns what the module gets."""
        before, sharded = p.sharded, p.adopt(given)
        for param in (before, given, sharded):
            self.mark(param, p)
        p.register(sharded)
        self.materialize()
        return sharded

    def _changed_dtype(self) -> bool:
        return any(p.main is not NOWHERE and p.main.dtype != p.main_dtype for p in self.params)

    def register(self, slot: GatherSlot | None) -> None:
        """Makes the modules see ``slot``'s full parameters, or the sharded ones for None.

        Also where they should see them already: ``functional_call`` ends by putting back what it found when it began.
        """
        self.given = []
        for k, p in enumerate(self.params):
            if p.register(p.sharded if slot is None else slot.params[k]):
                self.given.append(p)
        self.registered = slot

    def copy_unsharded(self) -> list[torch.Tensor]:
        """Copies of the full parameters that modules see now."""
        assert self.registered is not None
        return [param.detach().clone() for param in self.registered.params]

    @property
    def is_current(self) -> bool:
        """Whether the compute shard need not be cast for the next forward.

        Counters miss writes through ``.data`` and of whole lists (``torch._foreach_mul_``), so they are believed only
        where an update has just written both shards: everything else is cast again in every forward.
        """
        return self.written_by_update and self.cast == self.generation()

    def refresh_compute_shard(self) -> bool:
        """Casts main shards into what peers gather, where the two are not the same memory and not ``is_current``;
        returns whether there was anything to cast.
        """
        if self.is_current:
            return False
        pairs = [(p.compute, p.main) for p in self.params if p.compute is not p.main]
        if pairs:
            torch._foreach_copy_([compute for compute, _ in pairs], [main for _, main in pairs])
        self.cast = self.generation()
        return bool(pairs)

    def reduction(self) -> Reduction:
        """How this unit's gradients are divided, and what replicas average."""
        return replace(self._division(), averaged=self.policy.averaged)

    def _division(self) -> Reduction:
        """By the number of ranks, those of all replicas, or by the user's own factor.

        In fp16, whose range is small, the division is split evenly before and after the sum, as FSDP2 does.
        """
        divisor = self.policy.gradient_divisor or float(self.mesh.size())
        if any(p.reduce_dtype == torch.float16 for p in self.params):
            pre = 1.0
            while divisor % pre == 0 and divisor / pre > pre:
                pre *= 2
            return Reduction(mean=False, pre_divisor=pre, post_divisor=divisor / pre)
        if self.policy.sum_only or divisor != self.mesh.size():
            return Reduction(mean=False, post_divisor=divisor)
        return Reduction()


def unit_of(module: nn.Module) -> Unit | None:
    """The unit that ``fully_shard`` made of ``module``, alone or in a list."""
    return vars(module).get("_yafsdp_unit")
