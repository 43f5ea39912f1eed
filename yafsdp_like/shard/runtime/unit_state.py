"""One unit at run time: its parameters and shards, what modules see of them, and which slots it has now.

Owns the main shard, and casts the compute shard. It decides neither which bytes slots have (``memory_layout.py``,
``allocated_memory.py``) nor when they are filled and released (``params.py``). Its attributes are written here alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from yafsdp_like.comm.custom import CustomComm, customized
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.plan import Region
from yafsdp_like.shard.runtime.forward_shard import ForwardShard
from yafsdp_like.shard.runtime.freshness import Freshness
from yafsdp_like.shard.runtime.host_shard import HostStaging, shard_arena
from yafsdp_like.shard.runtime.layout_staging import LayoutStaging
from yafsdp_like.shard.runtime.param import NOWHERE, ParamMark, ShardedParam, register
from yafsdp_like.shard.runtime.running import RunningUnit
from yafsdp_like.shard.spec.unit_spec import ParamSpec, UnitPolicy, chunks, debug_needs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from yafsdp_like.comm.transport import Reduction, Transport
    from yafsdp_like.memory.layout import FlatLayout
    from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot


class GradientReceiver(Protocol):
    """Where a unit's modules and parameters hand over their gradients."""

    def check_entered(self, unit: Unit, k: int) -> None:
        """Raise ``RuntimeError`` if the unit is released, though a gradient of parameter ``k`` was computed."""

    def view(self, unit: Unit, k: int) -> tuple[torch.Tensor, bool]:
        """Return where to write parameter ``k``'s full gradient, and whether to add it to what is there."""

    def arrived(self, unit: Unit, k: int, grad: torch.Tensor | None, task: int | None) -> None:
        """Note that parameter ``k``'s full gradient is complete; ``grad`` is what was not written to its view yet."""


class Updater(Protocol):
    """What updates parameters in backward, as an optimizer's step would after it."""

    def begin(self) -> None:
        """Prepare for the updates of a backward that begins, on the stream of compute."""

    def update(self, unit: Unit) -> list[ShardedParam]:
        """Update those of the unit's parameters that have a gradient, on the current stream; return them."""


@dataclass(frozen=True)
class Ownership(ParamMark):
    """The mark on a parameter that says which unit has sharded it."""

    unit_ref: weakref.ref[Unit] | None = None  # weak: see [Note: who owns whom]

    __reduce__ = ParamMark.__reduce__

    @property
    def unit(self) -> Unit:
        """Return the unit, which lives as long as its modules."""
        unit = self.unit_ref() if self.unit_ref is not None else None
        assert unit is not None
        return unit


def ownership_of(param: torch.Tensor) -> Ownership | None:
    """Return which unit has sharded ``param``, or None if none has."""
    found = vars(param).get("_yafsdp_ownership")
    if not isinstance(found, Ownership) or found.unit_ref is None or found.unit_ref() is None:
        return None
    return found if found.param_ref() is not None else None


class _NoSlot:
    """Stands for a unit's slots before its engine is built."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # of copy and pickle, which ask for what may be there
        raise AssertionError(f"expected a slot to ask for {name!r}; a unit has none before its engine is built")


_NO_SLOT: Any = _NoSlot()


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
        self.params, self.policy = list(params), policy
        self._reduction: Reduction | None = None  # of this policy and these dtypes, once it is asked for
        self.forward_prefetch: list[Unit] = []  # what the user names instead of the next unit
        self.backward_prefetch: list[Unit] = []
        self.mesh, self.transport, self.custom = mesh, transport, CustomComm()
        self.device = device
        self.name = type(modules[0]).__name__  # the modules' full names, once the root is known
        self.is_on_host = policy.offload is not None  # main shard and gradients, see [Note: shards on the host]
        self.host_staging: HostStaging | None = None  # then, once built
        self.grad_arena: Arena | None = None  # then, once it trains
        self.arena = Arena(device)  # of the main shard, which is needed before the root is known
        self.remainder_arena = Arena(torch.device("cpu"))  # see [Note: remainders on the host]
        self._main_layouts: tuple[FlatLayout, FlatLayout] | None = None  # of both; None until materialized
        self.split: tuple[ShardedParam, ...] = ()  # the parameters whose masters are split
        self.extended: tuple[ShardedParam, ...] = ()  # those whose class says what is all-gathered
        self.freshness = Freshness(self.params)
        self.needs, self.running = debug_needs(policy.debug), RunningUnit()
        self._engine: weakref.ref[object] | None = None  # see the properties
        self._gradients: weakref.ref[GradientReceiver] | None = None
        self._updater: weakref.ref[Updater] | None = None  # see the property
        self.updated: set[ShardedParam] = set()  # by a backward, since the last step of their optimizer
        self.given: list[ShardedParam] = []  # replaced by tensors of the user's, while it is unsharded
        self.registered: GatherSlot | None = None  # whose parameters the modules see; None: the sharded ones
        self.gather_slot: GatherSlot = _NO_SLOT  # where forwards to come find the full parameters; made by the build
        self.gradient_slot: GradientSlot = _NO_SLOT  # where the next backward's gradients go
        self.staging = self.column = NOWHERE  # scratch that units share; see ``use_scratch``
        self.layout_staging = LayoutStaging(NOWHERE, NOWHERE)
        self._within: Transport | None = None  # of the ranks that share the parameters from forward to backward
        self.forward_shard: ForwardShard | None = None  # where they do so, once built
        self.is_loading = False  # a state dict, whose entries may be assigned
        self.materialize()

    def __repr__(self) -> str:
        return f"Unit({self.name!r}, {len(self.params)} parameters)"

    # --- what the user and execution ask for

    def set_policy(self, **changes: Any) -> None:
        """Change fields of the policy."""
        self.policy, self._reduction = replace(self.policy, **changes), None

    def need(self, **changes: bool) -> None:
        """Change fields of ``needs``, which the next build follows."""
        self.needs = replace(self.needs, **changes)

    def prefetch_in_forward(self, units: list[Unit]) -> None:
        """Prefetch ``units`` when this one's forward starts, instead of the next."""
        self.forward_prefetch = units

    def prefetch_in_backward(self, units: list[Unit]) -> None:
        """Prefetch ``units`` when this one's backward starts, instead of the next that is expected."""
        self.backward_prefetch = units

    def update_by(self, updater: Updater | None) -> None:
        """Let ``updater`` update the parameters in backward from now on; None: nobody."""
        self._updater = None if updater is None else weakref.ref(updater)

    @property
    def updater(self) -> Updater | None:
        """What updates the parameters in backward, as long as it lives."""
        return None if self._updater is None else self._updater()

    def updated_in_backward(self, params: Sequence[ShardedParam]) -> None:
        """Note that a backward has updated ``params``."""
        self.updated.update(params)

    def stepped(self, params: Sequence[ShardedParam]) -> None:
        """Note that the step of these parameters' optimizer is over."""
        self.updated.difference_update(params)

    # --- who runs it

    def run_by(self, engine: object, gradients: GradientReceiver) -> None:
        """Belong to the engine of a root module, which takes gradients by ``gradients``."""
        self._engine, self._gradients = weakref.ref(engine), weakref.ref(gradients)

    @property
    def engine(self) -> Any:
        """The engine of the root module, once that is known; None again when it is gone. See ``engine_of``."""
        return None if self._engine is None else self._engine()

    @property
    def gradients(self) -> GradientReceiver:
        """Where gradients go, which lives as long as a graph that computes some."""
        gradients = None if self._gradients is None else self._gradients()
        assert gradients is not None, f"a gradient of {self.name!r} came after its root module was deleted"
        return gradients

    @property
    def awaits_backward(self) -> bool:
        """Whether a backward of one of the unit's forwards may still come."""
        return bool(self.running.pending)

    def rename(self, name: str, params: Sequence[str]) -> None:
        """Take full names from the root, for the unit and each parameter."""
        self.name = name
        for p, full in zip(self.params, params, strict=True):
            p.rename(full)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that are still there."""
        return [module for ref in self._modules if (module := ref()) is not None]

    def customize(self, **changes: Any) -> None:
        """Change fields of ``custom``, before an engine runs the unit."""
        if self.engine is not None:
            raise RuntimeError(
                f"unit {self.name!r} has run or shares slots already (rank {self.transport.rank}), and how its bytes "
                f"move is fixed: set {', '.join(changes)} between fully_shard and the first forward, or share_slots"
            )
        self.custom = replace(self.custom, **changes)
        self.transport = customized(self.transport, self.mesh.get_group(self.mesh.ndim - 1), self.custom)

    def add_module(self, module: nn.Module) -> None:
        """Let the forward of ``module`` need the parameters too."""
        self._modules.append(weakref.ref(module))

    # --- slots

    @property
    def has_slots(self) -> bool:
        """Whether a build has given it slots."""
        return self.gather_slot is not _NO_SLOT and self.gradient_slot is not _NO_SLOT

    @property
    def slots(self) -> list[GatherSlot]:
        """Slots that may hold the unit's parameters now: that of forwards to come, and the one that modules see."""
        return [slot for slot in dict.fromkeys((self.gather_slot, self.registered)) if slot and slot is not _NO_SLOT]

    def use_gather_slot(self, slot: GatherSlot) -> None:
        """Find full parameters in ``slot`` from the next forward on."""
        self.gather_slot = slot

    def use_gradient_slot(self, slot: GradientSlot) -> None:
        """Put gradients into ``slot`` from the next one on."""
        self.gradient_slot = slot

    def use_scratch(
        self, staging: torch.Tensor, column: torch.Tensor, host_staging: HostStaging, layout_staging: LayoutStaging
    ) -> None:
        """Use the scratch of reduce-scatters and of all-gathers, ``(nbytes,)`` uint8, which units share."""
        self.staging, self.column, self.layout_staging = staging, column, layout_staging
        self.host_staging = host_staging if self.is_on_host else None

    def keep_within(self, transport: Transport) -> None:
        """Let the ranks of ``transport`` share the parameters from forward to backward."""
        self._within = transport

    def use_forward_shard(self, parts: Sequence[torch.Tensor]) -> None:
        """Keep ``parts`` of the parameters from forward to backward, if there are any."""
        self.forward_shard = ForwardShard(self._within, parts) if self._within is not None and parts else None

    def make_grads(self, layout: FlatLayout) -> None:
        """Make gradient shards, without memory yet, or on the host, where ``layout`` says."""
        if not self.is_on_host:
            for k in self.trainable:
                self.params[k].make_grad(self.device, guard_nbytes=self.needs.guard_nbytes)
            return
        region = Region("grad_shard", "grad_shard", layout.nbytes)
        if self.grad_arena is None or self.grad_arena.regions[region.name] != region:
            self.grad_arena = shard_arena(region, self.device, self.policy.offload)
        for k in self.trainable:
            self.params[k].make_grad(
                self.grad_arena.device, self.grad_arena.place(region.name).part(layout.segments[k])
            )

    @property
    def host_nbytes(self) -> int:
        """Bytes that its arenas hold in host memory."""
        shards = sum(arena.nbytes for arena in (self.arena, self.grad_arena) if arena and self.is_on_host)
        return shards + self.remainder_arena.nbytes

    def unsynced(self) -> GradientSlot | None:
        """Return the gradient slot, if gradients that no backward has reduced yet are in it."""
        return self.gradient_slot if self.gradient_slot is not _NO_SLOT and self.gradient_slot.arrived else None

    def forget_slots(self) -> None:
        """Leave the slots, which live as long as what autograd saved needs them."""
        self.gather_slot = self.gradient_slot = _NO_SLOT
        self.forward_shard = None
        for p in self.params:
            p.leave_compute()
        self.freshness.compute_shard_lost()

    # --- layouts and the main shard

    @property
    def trainable(self) -> list[int]:
        """Parameters for whose gradients there is, or will be, room."""
        return [k for k, p in enumerate(self.params) if p.trainable] if self.needs.trains else []

    @property
    def signature(self) -> tuple[object, ...]:
        """What the plan was made for; a change of it asks for a new plan."""
        moves = self.freshness.num_moves
        return (self.needs.unsynced_gradients, moves, *[(p.sharded.requires_grad, p.is_placed) for p in self.params])

    def meta_params(self) -> list[str]:
        """Return the names of parameters that are on the meta device."""
        return [p.name for p in self.params if p.local.is_meta]

    def misplaced_params(self) -> list[tuple[str, torch.device]]:
        """Return names and devices of parameters that the user has put elsewhere than in host memory, offloaded."""
        return [(p.name, p.local.device) for p in self.params if self.is_on_host and p.local.device.type != "cpu"]

    def param_specs(self, names: Sequence[str] = ()) -> tuple[ParamSpec, ...]:
        """Return what a plan needs to know of the parameters as they are now, under other ``names`` if given."""
        # A kernel that sums in fp32 reads gradients as they were computed, and one rank alone sums none; sums over
        # backwards need reduce_dtype.
        sums_in_fp32 = self.transport.mapped is not None or self.mesh.size() == 1
        as_computed = sums_in_fp32 and not self.needs.unsynced_gradients
        named = zip(self.params, names or [p.name for p in self.params], strict=True)
        return tuple(p.spec(name, self.policy, as_computed, self.needs.trains) for p, name in named)

    def take_dtypes(self, params: Sequence[ParamSpec]) -> None:
        """Compute and reduce in the dtypes of ``params`` from now on."""
        for p, spec in zip(self.params, params, strict=True):
            p.take_dtypes(spec)
        self.split, self._reduction = tuple(p for p in self.params if p.is_split), None
        self.extended = tuple(p for p in self.params if p.extension is not None)

    def materialize(self) -> None:
        """Put the main shard into the arena, or back after the user moved, cast or replaced parameters.

        Does nothing while a parameter is on the meta device, or, where main shards are in host memory, on another.
        """
        for p in self.params:
            p.restore_attributes()
            self.mark(p.sharded, p)
        if self.meta_params() or self.misplaced_params():
            return
        for p in self.params:
            p.look(self.policy.mp)
        specs = self.param_specs()
        self.take_dtypes(specs)
        main, rest = (
            chunks(specs, dtypes, self.needs.guard_nbytes)
            for dtypes in ([spec.main_shard_dtype for spec in specs], [spec.remainder_dtype for spec in specs])
        )
        if (main, rest) != self._main_layouts or self._changed_dtype():
            self.arena = shard_arena(Region("main_shard", "main_shard", main.nbytes), self.device, self.policy.offload)
            region = Region("remainder", "remainder", rest.nbytes)
            self.remainder_arena = shard_arena(region, self.device, CPUOffloadPolicy())
            for p in self.params:
                p.leave_place()
        self._main_layouts = main, rest
        for p, on_device, on_host in zip(self.params, main.segments, rest.segments, strict=True):
            if not p.is_placed:
                self.freshness.main_shard_moved()
                place = self.remainder_arena.place("remainder").part(on_host)
                p.place_main(place if p.offloads_remainder else self.arena.place("main_shard").part(on_device))

    def mark(self, param: torch.Tensor, p: ShardedParam) -> None:
        """Note on ``param`` that it is ``p`` of this unit, or what ``p`` was made of, for ``ownership_of``."""
        param._yafsdp_ownership = Ownership(  # type: ignore[attr-defined]
            weakref.ref(p), param is not p.sharded, weakref.ref(self)
        )

    def adopt(self, p: ShardedParam, given: nn.Parameter) -> nn.Parameter:
        """Take ``given``, which the user assigns to a module, in the place of ``p``; return what the module gets."""
        before, sharded = p.sharded, p.adopt(given)
        for param in (before, given, sharded):
            self.mark(param, p)
        register([p], [sharded])
        self.materialize()
        return sharded

    def _changed_dtype(self) -> bool:
        return any(p.main is not NOWHERE and p.main.dtype != p.main_shard_dtype for p in self.params)

    def register(self, slot: GatherSlot | None) -> None:
        """Make modules see ``slot``'s full parameters, or the sharded ones for None.

        Also where they should see them already: ``functional_call`` ends by putting back what it found when it began.
        """
        self.given = register(self.params, [p.sharded for p in self.params] if slot is None else slot.params)
        self.registered = slot

    def begin_loading(self) -> None:
        """Let entries of a state dict be assigned to modules, tied ones too."""
        self.is_loading = True

    def end_loading(self) -> None:
        """Put what was loaded into the main shard."""
        self.is_loading = False
        self.materialize()

    def copy_unsharded(self) -> list[torch.Tensor]:
        """Copy the full parameters that modules see now."""
        assert self.registered is not None
        return [param.detach().clone() for param in self.registered.params]

    def refresh_compute_shard(self) -> bool:
        """Write what is all-gathered from main shards, unless it is current; return whether there was work to do."""
        if self.freshness.is_current():
            return False
        pairs = [(p.compute, p.main) for p in self.params if p.compute is not p.main and p.is_cast]
        if pairs:
            torch._foreach_copy_([compute for compute, _ in pairs], [main for _, main in pairs])
        for p in self.extended:
            p.write_extension(self.policy.mp)
        self.freshness.compute_shard_written()
        return bool(pairs or self.extended)

    def settle(self) -> bool:
        """Split what was written to split masters into halves (see [Note: split master]); return whether any was."""
        was_written = sum([p.settle() for p in self.split]) > 0
        if was_written:
            self.freshness.main_shards_written()  # PyTorch does not count all writes
        return was_written

    def reduction(self) -> Reduction:
        """Return how this unit's gradients are divided, and what replicas average."""
        if self._reduction is None:
            in_fp16 = any(p.reduce_dtype == torch.float16 for p in self.params)
            division = self.policy.division(self.mesh.size(), in_fp16)
            self._reduction = replace(division, averaged=self.policy.averaged)
        return self._reduction


def units_of(module: nn.Module) -> Sequence[Unit]:
    """Return the units that ``fully_shard`` made of ``module``, alone or in a list: one for each mesh of parameters.

    The first is that of the mesh which the call was given.
    """
    return vars(module).get("_yafsdp_units", ())


def unit_of(module: nn.Module) -> Unit | None:
    """Return the first of ``units_of``; None for a module that is not sharded."""
    return next(iter(units_of(module)), None)
