"""A unit: the parameters gathered together, their shards on this rank, and the slots they are gathered into.

This file owns the tensors: it knows which bytes of the arena a parameter's shard, full value and gradients are, and
which modules register the parameter. It does not decide when anything is gathered or released (``engine.py`` does).

[Note: one address per unit]
Autograd saves views of a unit's full parameters in forward and reads them in backward. They must find the same values
at the same address, so a slot belongs to one unit for good: slots share bytes with other units' slots
(``neighbours``), never addresses with "any free slot". When execution asks for two slots at once that share bytes,
one unit moves to a slot of its own for its later forwards, while what was saved earlier keeps the old slot
(``Use.slot``).
"""

from __future__ import annotations

import enum
import sys
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from yafsdp_like.comm.transport import Averaged, Gather, Reduce, Reduction, Transport
from yafsdp_like.memory.arena import Arena, Place
from yafsdp_like.memory.layout import FlatLayout, RowShards
from yafsdp_like.memory.plan import Region
from yafsdp_like.memory.streams import Event

if TYPE_CHECKING:
    from yafsdp_like.shard.engine import Engine
    from yafsdp_like.shard.hooks import Call


class SlotState(enum.Enum):
    """What a slot's bytes are to the compute stream. The transitions are in ``engine.py``; no others happen."""

    EMPTY = "nobody's: any neighbour may take the bytes"
    FILLED = "gathered ahead, not yet read: a neighbour in need may still take the bytes"
    IDLE = "read and released, the values still there: any neighbour may take the bytes"
    HELD = "being read or written by running work: nobody may touch the bytes"
    KEPT = "idle but left unsharded on purpose: given up when a neighbour needs the bytes"


Generation = tuple[int, ...]  # what main shards are by now; equal generations are equal values
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
        self.main = self.compute = self.grad = NOWHERE  # filled by Unit.materialize, and the others by the build
        self.grad_dtensor: DTensor | None = None

    def _shard(self, param: torch.Tensor) -> nn.Parameter:
        """The parameter's DTensor on this rank's rows; the rows are not copied yet."""
        start, stop = self.shards.row_range(self.rank)
        return nn.Parameter(self._dtensor(param.detach()[start:stop]), requires_grad=param.requires_grad)

    def _dtensor(self, local: torch.Tensor) -> DTensor:
        full = torch.empty(self.shards.shape, device="meta")
        placements: list[Placement] = [*[Replicate()] * (self.mesh.ndim - 1), Shard(0)]
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=full.shape, stride=full.stride())

    @property
    def local(self) -> torch.Tensor:
        """This rank's rows as the DTensor holds them, ``local_shape``."""
        return self.sharded._local_tensor  # type: ignore[attr-defined]

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

    def mark(self, unit: Unit) -> None:
        """Gives the DTensor the parameter's attributes, and a note of whose it is."""
        for name, value in self.attributes.items():
            vars(self.sharded).setdefault(name, value)
        self.sharded._yafsdp_ownership = Ownership(unit, self)  # type: ignore[attr-defined]

    def place_main(self, place: Place) -> None:
        """Moves this rank's rows to ``place``, where the DTensor holds them from now on."""
        local = place.tensor(self.main_dtype, self.local_shape)
        with torch.no_grad():
            local.copy_(self.local)
        self.sharded._local_tensor = self.placed = local  # type: ignore[attr-defined]
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

    def register(self, value: nn.Parameter) -> None:
        """Makes ``value`` what every owning module sees under this parameter's name."""
        for module, attribute in self.owners:
            if type(module).__setattr__ is nn.Module.__setattr__:
                module._parameters[attribute] = value
            else:  # e.g. nn.LSTM, which keeps a list of its weights beside the dict
                setattr(module, attribute, value)


@dataclass(frozen=True)
class UnitLayout:
    """The flat layouts of a unit; a parameter that a layout does not hold has an empty segment in it."""

    main_shard: FlatLayout
    compute_shard: FlatLayout  # only parameters that peers do not gather from the main shard itself
    shown_shard: FlatLayout  # the rest of the compute shard: whole pages that the gather slot shows
    grad_shard: FlatLayout  # only trainable parameters, as in the gradient slot
    gather_slot: FlatLayout
    gradient_slot: FlatLayout

    @classmethod
    def of(cls, params: Sequence[ShardedParam], maps_memory: bool, page_nbytes: int) -> UnitLayout:
        """Where peers read the compute shard in place (``maps_memory``), every parameter has one; slots are windows
        where ``page_nbytes`` is not 0.
        """
        shown = {
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
                [p.compute_dtype if has_shard[k] and k not in shown else None for k, p in enumerate(params)]
            ),
            shown_shard=chunks([p.compute_dtype if k in shown else None for k, p in enumerate(params)]),
            grad_shard=chunks([p.main_dtype if p.trainable else None for p in params]),
            gather_slot=full([p.compute_dtype if p.shards.world_size > 1 else None for p in params], shown),
            gradient_slot=full([p.gradient_dtype if p.trainable else None for p in params]),
        )

    @property
    def gathered_nbytes(self) -> int:
        """What a gather slot takes beside the shard that it shows."""
        return self.gather_slot.nbytes - self.shown_shard.nbytes


class GatherSlot:
    """A unit's full parameters at a fixed address.

    ``params[k]`` is the ``nn.Parameter`` that modules compute on; ``outputs[k]``, ``(padded_numel,)``, is the same
    bytes for the collective to write. They are different tensors: see [Note: version counters]. ``places`` has one
    place per parameter; ``extent`` is what is gathered, or None when the slot is the shard (one rank). Of the
    parameters in ``shown`` the places show this rank's shard itself: see [Note: windows].
    """

    def __init__(self, unit: Unit, places: Sequence[Place], extent: Place | None, shown: Collection[int] = ()) -> None:
        self.unit = unit
        self.extent = extent
        self.shown = frozenset(shown)
        self.neighbours: list[GatherSlot] = []  # slots that share bytes with this one
        self.state = SlotState.EMPTY
        self.ready: Event = None  # the gather has arrived
        self.released: Event = None  # the last reader is done; None once a gather has waited for it
        self.generation: Generation = ()  # of the main shards when they were gathered
        self.active: dict[Use, None] = {}  # uses whose backward is running
        self.params = [_full_param(p, place) for p, place in zip(unit.params, places, strict=True)]
        self.outputs = [
            place.tensor(p.compute_dtype, (p.shards.padded_numel,))
            for p, place in zip(unit.params, places, strict=True)
        ]

    @cached_property
    def gather(self) -> Gather:
        """Brings every rank's compute shard here. First asked for once transports are connected."""
        inputs = [p.compute for p in self.unit.params]
        return self.unit.transport.gather(self.outputs, inputs, self.shown, self.unit.column)


def _full_param(p: ShardedParam, place: Place) -> nn.Parameter:
    full = nn.Parameter(place.tensor(p.compute_dtype, p.shards.shape), requires_grad=p.trainable)
    vars(full).update(vars(p.sharded))
    return full


class GradientSlot:
    """A unit's full gradients from their arrival in backward until they are reduced.

    For each trainable parameter ``k``: ``views[k]`` has its shape and ``inputs[k]`` is ``(padded_numel,)``, in its
    ``gradient_dtype``. ``holds`` are those with some gradient in the slot, ``arrived`` those for which it is all that
    the backwards so far have computed.
    Padding holds anything.
    """

    def __init__(self, unit: Unit, extent: Place | None, layout: FlatLayout) -> None:
        self.unit = unit
        self.extent = extent  # None: nothing is trainable
        self.neighbours: list[GradientSlot] = []
        self.state = SlotState.EMPTY
        self.released: Event = None  # the reduction is done; None once compute has waited for it
        self.holds: set[int] = set()
        self.early: dict[int, Event] = {}  # reduced before the rest, and when that was done
        self.arrived: dict[int, int | None] = {}  # parameter -> the backward in which it arrived last
        self.views: dict[int, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self._reduces: dict[tuple[int, ...], Reduce] = {}
        for k in unit.trainable:
            assert extent is not None
            p, place = unit.params[k], extent.part(layout.segments[k])
            self.views[k] = place.tensor(p.gradient_dtype, p.shards.shape)
            self.inputs[k] = place.tensor(p.gradient_dtype, (p.shards.padded_numel,))

    def reduce(self, which: Sequence[int]) -> Reduce:
        """Reduces the gradients of these parameters into their gradient shards."""
        key = tuple(which)
        if key not in self._reduces:
            params = [self.unit.params[k] for k in key]
            self._reduces[key] = self.unit.transport.reduce(
                [p.grad for p in params],
                [self.inputs[k] for k in key],
                [p.reduce_dtype for p in params],
                self.unit.staging,
            )
        return self._reduces[key]


@dataclass(eq=False)
class Use:
    """One forward call of a unit whose backward may come: which slot its saved tensors point to.

    Held by the autograd graph only, so that it dies with a graph that is never run backward.
    """

    slot: GatherSlot
    task: int | None = None  # the running backward that has reached it, by autograd's number


@dataclass(eq=False)
class UnitPolicy:
    """What the user asked of one unit; the setters of ``FSDPModule`` write here."""

    mp: MixedPrecisionPolicy
    reshard_after_forward: bool | None  # None: the root keeps its parameters, others reshard
    reshard_after_backward: bool = True
    requires_gradient_sync: bool = True
    unshard_in_backward: bool = True
    gradient_divisor: float | None = None  # None: the number of ranks
    sum_only: bool = False
    averaged: Averaged = "new"  # over replicas
    forward_prefetch: list[Unit] = field(default_factory=list)
    backward_prefetch: list[Unit] = field(default_factory=list)


class Unit:
    """Parameters that one ``fully_shard`` call took, in order of registration, and all that is known of them.

    ``modules`` are those whose forward needs the parameters: the call's own, and any that a parameter is tied into.
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
        self.modules = list(modules)
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
        self.engine: Engine | None = None  # of the root module, once that is known
        self.registered: GatherSlot | None = None  # whose parameters the modules see; None: the sharded ones
        self._gather_slot: GatherSlot | None = None  # see the property
        self._gradient_slot: GradientSlot | None = None
        self.staging = self.column = NOWHERE  # scratch of reductions and gathers, shared by units; made by the build
        self.own_gather_slot = False  # by a spill; later plans keep to it
        self.own_gradient_slot = False  # by a spill, or because unsynced gradients stay in it between backwards
        self.unsynced_gradients = False  # set_requires_gradient_sync(False) was called
        self.pending: weakref.WeakSet[Use] = weakref.WeakSet()  # uses whose backward has not ended
        self.to_run: list[nn.Module] = []  # of several modules: those that have not run in this forward pass
        self.calls: list[Call] = []  # forwards that are running, the innermost last
        self.materialize()

    def __repr__(self) -> str:
        return f"Unit({self.name!r}, {len(self.params)} parameters)"

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
    def slots(self) -> list[GatherSlot]:
        """Slots that may hold the unit's parameters now: that of forwards to come, and the one that modules see."""
        return [slot for slot in dict.fromkeys((self._gather_slot, self.registered)) if slot is not None]

    @property
    def trainable(self) -> list[int]:
        return [k for k, p in enumerate(self.params) if p.trainable]

    @property
    def signature(self) -> tuple[object, ...]:
        """What the plan was made for; a change of it asks for a new plan."""
        return (self.unsynced_gradients, self.moves, *((p.trainable, p.local is p.placed) for p in self.params))

    def generation(self) -> Generation:
        """What changes when main shards are written: by an optimizer (whose kernels may count nothing), or in place
        through a DTensor or its local tensor."""
        return (self.moves, self.updates, *(v for p in self.params for v in (p.sharded._version, p.local._version)))

    def meta_params(self) -> list[str]:
        return [p.name for p in self.params if p.local.is_meta]

    def plan_layout(self, page_nbytes: int = 0) -> UnitLayout:
        """The layout for the dtypes and ``requires_grad`` of now, without touching memory; with gather slots that are
        windows of such pages, or are none.
        """
        self.plan_dtypes()
        spares_own_chunks = self.transport.spares_own_chunks and self.transport.world_size > 1
        return UnitLayout.of(self.params, self.transport.maps_memory, page_nbytes if spares_own_chunks else 0)

    def plan_dtypes(self) -> None:
        """What each parameter is computed and its gradient reduced in, by the policy of now."""
        for p in self.params:
            # A kernel that sums in fp32 reads gradients as they were computed; sums over backwards need reduce_dtype.
            p.set_dtypes(self.policy.mp, as_computed=self.transport.maps_memory and not self.unsynced_gradients)

    def materialize(self) -> None:
        """Puts the main shard into the arena, or back into it after the user moved, cast or replaced parameters.

        Does nothing while a parameter is on the meta device. Parameters must be registered sharded.
        """
        for p in self.params:
            p.adopt_registered()
            p.mark(self)
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
            if p.local is not p.placed:
                self.moves += 1
                place = self.arena.place("main_shard").part(segment)
                p.place_main(place)

    def _changed_dtype(self) -> bool:
        return any(p.main is not NOWHERE and p.main.dtype != p.main_dtype for p in self.params)

    def register(self, slot: GatherSlot | None) -> None:
        """Makes the modules see ``slot``'s full parameters, or the sharded ones for None."""
        if slot is not self.registered:
            values = [p.sharded for p in self.params] if slot is None else slot.params
            for p, value in zip(self.params, values, strict=True):
                p.register(value)
            self.registered = slot

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


@dataclass(frozen=True)
class Ownership:
    """Marks a parameter, as it was before sharding and after, with where it lives now. Not pickled with the
    parameter.
    """

    unit: Unit | None
    param: ShardedParam | None

    def __reduce__(self) -> tuple[type[Ownership], tuple[None, None]]:
        return Ownership, (None, None)


def ownership_of(param: torch.Tensor) -> Ownership | None:
    """Which unit has sharded ``param``, or None if none has."""
    found = vars(param).get("_yafsdp_ownership")
    return found if found is not None and found.unit is not None else None
