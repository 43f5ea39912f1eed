"""One unit at run time: its parameters and shards, its slots at fixed addresses, and the calls that use them.

Owns the main shard, when compute shards follow main ones, and the tensors on a slot's bytes. It decides neither which
bytes those are (``memory_layout.py``, ``allocated_memory.py``) nor when they are gathered and released (``engine.py``).

[Note: one address per unit]
Autograd saves views of a unit's full parameters in forward and reads them in backward. They must find the same values
at the same address, so a slot belongs to one unit for good: slots share bytes with other units' slots
(``neighbours``), never addresses with "any free slot". When execution asks for two slots at once that share bytes,
one unit moves to a slot of its own for its later forwards, while what was saved earlier keeps the old slot
(``ForwardUse.slot``).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.plan import Region
from yafsdp_like.shard.runtime.freshness import Freshness
from yafsdp_like.shard.runtime.nested import addresses_in
from yafsdp_like.shard.runtime.param import NOWHERE, ParamMark, ShardedParam
from yafsdp_like.shard.runtime.unit_spec import SlotState, UnitLayout, UnitPolicy
from yafsdp_like.shard.runtime.watching import NOTHING, Watched

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import FrameType

    from torch.distributed.device_mesh import DeviceMesh

    from yafsdp_like.comm.transport import AllGather, ReduceScatter, Reduction, Transport
    from yafsdp_like.memory.arena import Place
    from yafsdp_like.memory.layout import FlatLayout
    from yafsdp_like.memory.streams import Event
    from yafsdp_like.shard.runtime.freshness import Version


class GatherSlot:
    """A unit's full parameters at a fixed address.

    ``params[k]`` is the ``nn.Parameter`` that modules compute on; ``outputs[k]``, ``(padded_numel,)``, is the same
    bytes for the collective to write. They are different tensors: see [Note: version counters]. ``places`` has one
    place per parameter; ``extent`` is what is gathered, or None when the slot is the shard (one rank). Of the
    parameters in ``aliased`` the places alias this rank's shard: see [Note: aliased granules].
    """

    def __init__(
        self, unit: Unit, places: Sequence[Place], extent: Place | None, aliased: Collection[int] = ()
    ) -> None:
        self.unit = unit
        self.extent = extent
        self.aliased = frozenset(aliased)
        self.neighbours: list[GatherSlot] = []  # slots that share bytes with this one
        self.state = SlotState.EMPTY
        self.ready: Event = None  # the gather has arrived
        self.released: Event = None  # the last reader is done; None once a gather has waited for it
        self.version: Version = ()  # of the main shards whose values are in it
        self.active: dict[ForwardUse, None] = {}  # uses whose backward is running
        self.params = [_full_param(p, place) for p, place in zip(unit.params, places, strict=True)]
        self.outputs = [
            place.flat(p.compute_dtype, p.shards.padded_numel) for p, place in zip(unit.params, places, strict=True)
        ]

    @cached_property
    def _addresses(self) -> range:
        """What the slot occupies; nothing where it is the shard, which stays."""
        if self.extent is None or not self.outputs:
            return range(0)
        start = min(output.data_ptr() for output in self.outputs)
        return range(start, max(output.data_ptr() + output.nbytes for output in self.outputs))

    def aliases(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a full parameter of this slot or a view of one: its values go when the slot is
        released.
        """
        return any(address in self._addresses for address in addresses_in(tensor))

    @cached_property
    def all_gather(self) -> AllGather:
        """Brings every rank's compute shard here. First asked for once transports are connected."""
        inputs = [p.compute for p in self.unit.params]
        return self.unit.transport.all_gather(self.outputs, inputs, self.aliased, self.unit.column)


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
        self.homes: tuple[int, ...] = ()  # of gradients that are still held, where the unit's go meanwhile
        self._reduces: dict[tuple[tuple[int, ...], tuple[int, ...]], ReduceScatter] = {}
        for k in unit.trainable:
            assert extent is not None
            p, place = unit.params[k], extent.part(layout.segments[k])
            self.views[k] = place.tensor(p.gradient_dtype, p.shards.shape)
            self.inputs[k] = place.flat(p.gradient_dtype, p.shards.padded_numel)

    def reduce_scatter(self, which: Sequence[int]) -> ReduceScatter:
        """Reduces the gradients of these parameters into their gradient shards."""
        key = tuple(which), self.homes
        if key not in self._reduces:
            params = [self.unit.params[k] for k in which]
            self._reduces[key] = self.unit.transport.reduce_scatter(
                [p.grad for p in params],
                [self.inputs[k] for k in which],
                [p.reduce_dtype.to_real() for p in params],
                self.unit.staging,
            )
        return self._reduces[key]

    def spare_kept_grads(self, which: Sequence[int]) -> None:
        """The gradients of these parameters are written next: those of before that are still held keep their values."""
        moved = [self.unit.params[k].spare_kept_grad() for k in which]
        if any(moved):
            self.homes = tuple(p.homes.index if p.homes else 0 for p in self.unit.params)


@dataclass(eq=False)
class ForwardUse:
    """One forward call of a unit whose backward may come: which slot its saved tensors point to.

    Held by the autograd graph only, so that it dies with a graph that is never run backward.
    """

    slot: GatherSlot
    task: int | None = None  # the running backward that has reached it, by autograd's number


@dataclass(eq=False)
class Call:
    """One running forward of one module of a unit."""

    module: nn.Module
    outer_error: BaseException | None  # what the caller was handling already when the forward began
    recomputes: bool = False  # a checkpointed forward runs again inside the unit's own backward
    starts_iteration: bool = False
    has_nan_inputs: bool = False  # known in debug mode only
    use: ForwardUse | None = None  # None without grad mode, and when it recomputes
    frame: FrameType | None = None  # that runs a method as a forward, which may run the module's own forward
    watched: Watched = NOTHING


class UnitRuntime(Protocol):
    """What a unit's own gradients and modules ask of the engine that runs it."""

    def reshard(self, unit: Unit) -> None:
        """Release the unit's full parameters, and register the sharded ones."""

    def check_entered(self, unit: Unit, k: int) -> None:
        """Raise ``RuntimeError`` if the unit is released, though a gradient of parameter ``k`` was computed."""

    def accumulate(self, unit: Unit, k: int, grad: torch.Tensor | None) -> None:
        """Take parameter ``k``'s full gradient, ``(rows, ...)``, of the running backward."""

    def open_gradient(self, unit: Unit, k: int) -> tuple[torch.Tensor, bool]:
        """Return where to write parameter ``k``'s full gradient, and whether to add it to what is there."""


@dataclass(frozen=True)
class Ownership(ParamMark):
    """The mark on a parameter that says which unit has sharded it."""

    unit_ref: weakref.ref[Unit] | None = None  # weak: see [Note: who owns whom]

    __reduce__ = ParamMark.__reduce__

    @property
    def unit(self) -> Unit:
        """The unit, which lives as long as its modules."""
        unit = self.unit_ref() if self.unit_ref is not None else None
        assert unit is not None
        return unit


def ownership_of(param: torch.Tensor) -> Ownership | None:
    """Which unit has sharded ``param``, or None if none has."""
    found = vars(param).get("_yafsdp_ownership")
    if not isinstance(found, Ownership) or found.unit_ref is None or found.unit_ref() is None:
        return None
    return found if found.param_ref() is not None else None


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
        self.forward_prefetch: list[Unit] = []  # what the user names instead of the next unit
        self.backward_prefetch: list[Unit] = []
        self.mesh = mesh
        self.transport = transport
        self.device = device
        self.name = type(modules[0]).__name__  # the modules' full names, once the root is known
        self.arena = Arena(device)  # of the main shard, which is needed before the root is known
        self.layout: UnitLayout | None = None  # None until materialized
        self.freshness = Freshness(self.params)
        self._engine: weakref.ref[UnitRuntime] | None = None  # see the property
        self.given: list[ShardedParam] = []  # for which modules hold tensors of the user's, while full ones are seen
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
    def engine(self) -> UnitRuntime | None:
        """Of the root module, once that is known; None again when that module is gone."""
        return None if self._engine is None else self._engine()

    @engine.setter
    def engine(self, engine: UnitRuntime) -> None:
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
        self.freshness.compute_shard_lost()

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
        return (self.unsynced_gradients, self.freshness.num_moves, *((p.trainable, p.is_placed) for p in self.params))

    def meta_params(self) -> list[str]:
        return [p.name for p in self.params if p.local.is_meta]

    @property
    def aliases_shards(self) -> bool:
        """Whether gather slots may alias this rank's shard: see [Note: mapped memory]."""
        return self.transport.mapped is not None and self.transport.mapped.reads_shards

    def plan_layout(self, granule_nbytes: int = 0) -> UnitLayout:
        """The layout for the dtypes and ``requires_grad`` of now, without touching memory; with gather slots that
        alias whole granules of the shard, unless ``granule_nbytes`` is 0.
        """
        self.plan_dtypes()
        granule_nbytes = granule_nbytes if self.aliases_shards else 0
        return UnitLayout.of(self.params, self.trainable, self.transport.mapped is not None, granule_nbytes)

    def plan_dtypes(self) -> None:
        """What each parameter is computed and its gradient reduced in, by the policy of now."""
        # A kernel that sums in fp32 reads gradients as they were computed; sums over backwards need reduce_dtype.
        as_computed = self.transport.mapped is not None and not self.unsynced_gradients
        for p in self.params:
            p.set_dtypes(self.policy.mp, as_computed)

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
                self.freshness.main_shard_moved()
                place = self.arena.place("main_shard").part(segment)
                p.place_main(place)

    def mark(self, param: torch.Tensor, p: ShardedParam) -> None:
        """Notes on ``param`` that it is ``p`` of this unit, or what ``p`` was made of, for ``ownership_of``."""
        param._yafsdp_ownership = Ownership(  # type: ignore[attr-defined]
            weakref.ref(p), param is not p.sharded, weakref.ref(self)
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

    def refresh_compute_shard(self) -> bool:
        """Cast main shards into what is all-gathered, unless that is current; return whether there was any to cast."""
        if self.freshness.is_current():
            return False
        pairs = [(p.compute, p.main) for p in self.params if p.compute is not p.main]
        if pairs:
            torch._foreach_copy_([compute for compute, _ in pairs], [main for _, main in pairs])
        self.freshness.compute_shard_written()
        return bool(pairs)

    def reduction(self) -> Reduction:
        """How this unit's gradients are divided, and what replicas average."""
        in_fp16 = any(p.reduce_dtype == torch.float16 for p in self.params)
        return replace(self.policy.division(self.mesh.size(), in_fp16), averaged=self.policy.averaged)


def unit_of(module: nn.Module) -> Unit | None:
    """The unit that ``fully_shard`` made of ``module``, alone or in a list."""
    return vars(module).get("_yafsdp_unit")
