"""The public surface: ``fully_shard``, the methods of a sharded module, and what the user's mistakes are told.

Names, arguments and behaviour are those of ``torch.distributed.fsdp``, so that code written for FSDP2 runs unchanged;
the policies are FSDP2's own classes.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, NoReturn, Self, cast

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed._composable.contract import contract
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from yafsdp_like.comm.choice import transport_over
from yafsdp_like.memory.streams import GATHER, Event
from yafsdp_like.shard import clipping
from yafsdp_like.shard.drop_in import ShardState, refuse_others, show_state_to_torch
from yafsdp_like.shard.engine import Engine, Report, engine_for
from yafsdp_like.shard.hooks import abandon, install
from yafsdp_like.shard.optimizer_step import watch_optimizers
from yafsdp_like.shard.param import ShardedParam, ownership_of, refuse_subclass
from yafsdp_like.shard.pretrained import overrides_of
from yafsdp_like.shard.unit import Unit, UnitPolicy, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from yafsdp_like.comm import TransportName
    from yafsdp_like.memory.plan import MemoryPlan

Owners = dict[nn.Parameter, list[tuple[nn.Module, str]]]  # which modules register a parameter, and under what name


def fully_shard(
    module: Any,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    mp_policy: MixedPrecisionPolicy = MixedPrecisionPolicy(),  # noqa: B008 (frozen)
    offload_policy: OffloadPolicy = OffloadPolicy(),  # noqa: B008 (frozen)
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: Any = None,
    transport: TransportName = "auto",
) -> Any:
    """Shards the parameters of ``module`` (or of a list of modules, as one unit) over the ranks of ``mesh``, in place.

    A call takes every parameter below ``module`` that no earlier call took, so shard bottom-up: blocks first, the
    root last. Each becomes a ``DTensor`` with ``Shard(0)``; modules compute on full parameters, which are gathered
    before forward and backward into the slots of a memory plan (``print(module.memory_plan())``) that is made at the
    first forward.

    ``.grad`` of a sharded parameter is a view of planned memory too. Once it is set to None the next backward writes
    there again. A gradient that is still held then keeps its values: it is copied if only the DTensor is held; for
    anything made of it that shares its bytes (``detach()``, ``view``, ``to_local()``) the shard moves to memory beyond
    the plan.

    Args:
        module: a module with a ``forward``, or a list of such modules, gathered and released together.
        mesh: a 1-D mesh, or a 2-D one with ``mesh_dim_names`` (HSDP): its first dimension replicates and its second
            shards, parameters are placed ``(Replicate(), Shard(0))``, and replicas must start from the same values. All
            ranks by default; without a process group, torchrun's is joined, or one of this process alone started.
        reshard_after_forward: whether full parameters are released after forward and gathered again for backward. None:
            for all but the root, and for the root too after a forward without grad mode, which has no backward.
        mp_policy: ``param_dtype`` to gather and compute in, ``reduce_dtype`` to reduce gradients in,
            ``output_dtype``, and ``cast_forward_inputs``. Sharded parameters, their ``.grad`` and the optimizer keep
            the original dtype.
        ignored_params: parameters that are left alone.
        transport: what moves bytes between ranks; not FSDP2's. "auto" takes "peer" (ranks of one host read each other's
            memory) between GPUs that can, "hierarchical" (the same inside each host, and one column of shards between
            hosts) on several hosts, and "process_group" (NCCL, gloo) otherwise.
        shard_placement_fn, offload_policy, dp_mesh_dims: FSDP2's; only their defaults are supported yet.

    Returns:
        its first argument; each module's class becomes ``FSDP<Class>``, a subclass of ``FSDPModule`` and of
        ``<Class>``.

    Raises:
        ValueError, AssertionError, NotImplementedError: for meshes, containers and parameters that cannot be sharded.
    """
    modules: list[nn.Module] = [module] if isinstance(module, nn.Module) else list(module)
    _check_modules(modules)
    _check_supported(reshard_after_forward, shard_placement_fn, offload_policy, dp_mesh_dims)
    mesh = mesh if mesh is not None else _default_mesh()
    _check_mesh(mesh)
    owners = _params_below(modules, ignored_params or set())
    _check_params(owners)
    new: Owners = {}
    for param, places in owners.items():
        if ownership_of(param) is None:
            new[param] = places
        else:
            _tie(param, places, modules)
    policy = UnitPolicy(mp_policy, cast("bool | None", reshard_after_forward))
    return _shard(module, modules, new, mesh, policy, transport)


def _make_unit(
    module: Any,
    modules: Sequence[nn.Module],
    owners: Owners,
    mesh: DeviceMesh,
    policy: UnitPolicy,
    transport: TransportName,
) -> Any:
    _prepare_process()
    device = _device_of(mesh)
    params = [ShardedParam(param, places, mesh) for param, places in owners.items()]
    unit = Unit(modules, params, policy, mesh, transport_over(mesh, device, transport), device)
    for p, param in zip(params, owners, strict=True):
        unit.mark(param, p)
        p.register(p.sharded)
        for owner, name in p.owners:
            _note_assignments(unit, p, owner, name)
    _move_buffers(modules, device)
    for m in modules:
        vars(m)["_yafsdp_unit"] = unit
        install(unit, m)
        _become_fsdp_module(m)
    for m in {owner: None for p in params for owner, _ in p.owners}:
        _keep_state_dict_sharded(unit, m)
    state = _shard.state(modules[0])
    state.unit = unit
    for m in modules:
        show_state_to_torch(m, state)
    return module


# Torch's other composable APIs (replicate, checkpoint) recognize a sharded module by this contract and this name.
_make_unit.__name__ = fully_shard.__name__
_shard = contract(state_cls=ShardState)(_make_unit)
fully_shard.state = _shard.state  # type: ignore[attr-defined]


def _params_below(modules: Sequence[nn.Module], ignored: set[nn.Parameter]) -> Owners:
    """Parameters of ``modules`` and of what is below them, except below modules that were sharded earlier."""
    owners: Owners = {}
    seen: set[nn.Module] = set()
    for module in modules:
        _note_params(module, modules, ignored, owners, seen)
    return owners


def _note_params(
    module: nn.Module,
    modules: Sequence[nn.Module],
    ignored: set[nn.Parameter],
    owners: Owners,
    seen: set[nn.Module],
) -> None:
    if module in seen or (unit_of(module) is not None and module not in modules):
        return
    seen.add(module)
    for name, param in module._parameters.items():
        if param is not None and param not in ignored:
            owners.setdefault(param, []).append((module, name))
    for child in module.children():
        _note_params(child, modules, ignored, owners, seen)


def _tie(param: nn.Parameter, places: Sequence[tuple[nn.Module, str]], modules: Sequence[nn.Module]) -> None:
    """``param`` is sharded in another unit already: that unit is gathered for these places' modules too, and for
    ``modules`` where they share the very module that registers it.
    """
    ownership = ownership_of(param)
    assert ownership is not None
    unit, p = ownership.unit, ownership.param
    for module, name in places:
        if (module, name) not in p.owners:
            p.add_owner(module, name)
            _gather_for(unit, [module])
            _note_assignments(unit, p, module, name)
        elif all(unit_of(m) is None for m in modules):  # else the call is repeated, and refused further on
            _gather_for(unit, modules)


def _gather_for(unit: Unit, modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if module not in unit.modules:
            unit.add_module(module)
            install(unit, module)
            _keep_state_dict_sharded(unit, module)


def _keep_state_dict_sharded(unit: Unit, module: nn.Module) -> None:
    """State dicts hold and load the sharded parameters, whatever is registered at the time."""

    def reshard(*_: Any) -> None:
        if unit.engine is not None:
            unit.engine.reshard(unit)

    def begin(*_: Any) -> None:
        reshard()
        unit.is_loading = True

    def end(*_: Any) -> None:
        unit.is_loading = False
        unit.materialize()

    module.register_state_dict_pre_hook(reshard)
    module.register_load_state_dict_pre_hook(begin)
    module.register_load_state_dict_post_hook(end)


def _note_assignments(unit: Unit, p: ShardedParam, module: nn.Module, name: str) -> None:
    """A parameter that the user assigns to ``module.name`` from now on takes the place of ``p``."""
    vars(module).setdefault("_yafsdp_params", {})[name] = (unit, p)
    if not _watches_assignments:
        adopt: Any = _adopt_assigned  # torch takes what it returns, though its types do not say so
        _watches_assignments.append(register_module_parameter_registration_hook(adopt))


_watches_assignments: list[Any] = []  # torch's hook, from the first sharded parameter of the process on


def _adopt_assigned(module: nn.Module, name: str, given: nn.Parameter) -> nn.Parameter | None:
    """Torch registers ``given`` as ``module.name``: shards it, if what was there was sharded."""
    unit, p = vars(module).get("_yafsdp_params", {}).get(name, (None, None))
    if unit is None or unit.calls or p.is_mine(given):  # while the unit computes, what is given is for this call
        return None
    owner = ownership_of(given)
    if (owner is not None and not owner.is_replaced) or (len(p.owners) > 1 and not unit.is_loading):
        raise NotImplementedError(
            f"{p.name} is sharded, and cannot be tied to another parameter or untied any more (rank {p.rank}): assign "
            "before fully_shard, or copy values into it"
        )
    if unit.engine is not None:
        unit.engine.reshard(unit)
    return cast("nn.Parameter", unit.adopt(p, given))


def _move_buffers(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        for buffer in module.buffers():
            if buffer.device != device and not buffer.is_meta:
                buffer.data = buffer.to(device)


# --- what cannot be sharded ---


def _check_modules(modules: Sequence[nn.Module]) -> None:
    if not modules:
        raise ValueError("fully_shard expects a module or a list of at least one module but got an empty list")
    for module in modules:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
            raise ValueError(f"fully_shard does not support containers that do not implement forward: {module}")


def _check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim not in (1, 2):
        raise ValueError(f"fully_shard expects a 1D or 2D DeviceMesh but got {mesh}")
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise AssertionError("Please init the 2D mesh for HSDP with mesh_dim_names specified")


def _check_params(owners: Owners) -> None:
    for param, places in owners.items():
        name = places[0][1]
        if ownership_of(param) is not None:
            continue
        if isinstance(param, DTensor):
            raise NotImplementedError(
                f"{name} is a DTensor on {param.device_mesh}; composing with it is not supported yet"
            )
        refuse_subclass(param, name)
        for module, _ in places:
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                raise NotImplementedError(
                    f"{type(module).__name__} with max_norm={module.max_norm} writes its weight in forward, which is "
                    "lost where that is gathered: shard it without (max_norm=None) and renormalize its rows after "
                    "optimizer.step(), or name its weight in ignored_params"
                )
        if param.dim() == 0:
            raise ValueError(f"fully_shard cannot shard a scalar. Change {name} to a 1D tensor with numel equal to 1.")
        if not param.is_contiguous():
            raise NotImplementedError(
                f"FSDP does not support non-contiguous parameters: {name} has shape {tuple(param.shape)} and strides "
                f"{param.stride()}; make it contiguous first"
            )


def _check_supported(
    reshard_after_forward: Any, shard_placement_fn: Any, offload_policy: Any, dp_mesh_dims: Any
) -> None:
    if reshard_after_forward is not None and not isinstance(reshard_after_forward, bool):
        raise NotImplementedError(
            f"reshard_after_forward as a number of ranks is not supported yet, got {reshard_after_forward!r}; "
            "use True, False or None"
        )
    if shard_placement_fn is not None or dp_mesh_dims is not None:
        raise NotImplementedError(
            "shard_placement_fn and dp_mesh_dims are not supported yet; parameters are sharded by rows"
        )
    if type(offload_policy) is not OffloadPolicy:
        raise NotImplementedError(f"offloading is not supported yet, got {offload_policy!r}")


def _default_mesh() -> DeviceMesh:
    if not dist.is_initialized():
        if "RANK" in os.environ:  # torchrun's
            dist.init_process_group()
        else:
            dist.init_process_group(store=HashStore(), rank=0, world_size=1)
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))


def _device_of(mesh: DeviceMesh) -> torch.device:
    return (
        torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu")
    )


@functools.cache
def _prepare_process() -> None:
    """What is asked of torch for the whole process, at its first sharded module."""
    watch_optimizers()
    clipping.install()


# --- the sharded module ---

_sharded_classes: dict[type[nn.Module], type[nn.Module]] = {}  # a module's class -> the class it gets


def _become_fsdp_module(module: nn.Module) -> None:
    cls = type(module)
    if cls not in _sharded_classes:
        members = {"__deepcopy__": _refuse_deepcopy, "__module__": cls.__module__, "__doc__": cls.__doc__}
        # Torch's FSDPModule comes last: what it has is ours, but isinstance, which libraries ask, is true.
        bases = (FSDPModule, cls, torch.distributed.fsdp.FSDPModule)
        _sharded_classes[cls] = type(f"FSDP{cls.__name__}", bases, members | overrides_of(cls))
    module.__class__ = _sharded_classes[cls]


def _refuse_deepcopy(*_: Any) -> NoReturn:
    raise AssertionError("FSDP does not support deepcopy. Use a state dict to copy a sharded module.")


class UnshardHandle(torch.distributed.fsdp.UnshardHandle):
    """What ``unshard(async_op=True)`` returns."""

    def __init__(self, engine: Engine, unit: Unit) -> None:
        self._engine, self._unit = engine, unit

    def wait(self) -> None:
        """Makes the full parameters readable and registers them. Does not block the CPU on CUDA."""
        self._engine.unshard(self._unit.gather_slot, refresh=True)


@refuse_others
class FSDPModule:
    """The methods that a module has after ``fully_shard``, beside its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Slicing a sharded container makes a container of its class again: a plain one."""
        plain: Any = cls.__mro__[2]
        return plain(*args, **kwargs)

    # --- the memory plan

    def memory_plan(self) -> MemoryPlan:
        """Every region of the runtime on this rank, in bytes; with this module as the root until a forward said
        otherwise.

        Before the first forward nothing is allocated for it, and parameters may still be on the meta device.
        """
        return self._engine().plan()

    def memory_report(self) -> Report:
        """The bytes held now, and what did not go by the plan: spills, evictions, gathers that nobody read."""
        return self._engine().report()

    # --- running

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:
        """Gathers this module's own parameters, which stay gathered until ``reshard`` or the end of its next backward.

        With ``async_op`` the parameters are registered only by the returned handle's ``wait()``.
        """
        engine, unit = self._engine(), self._unit()
        engine.build_if_changed()
        engine.publish()
        if blockers := engine.blockers(unit.gather_slot):
            engine.isolate(unit, f"unshard() was called while {[b.unit.name for b in blockers]} is unsharded")
        handle = UnshardHandle(engine, unit)
        if async_op:
            engine.prefetch(unit, refresh=True)
            return handle
        handle.wait()
        return None

    def reshard(self) -> None:
        """Releases this module's own full parameters and registers the sharded ones."""
        unit = self._unit()
        if unit.engine is not None:
            unit.engine.reshard(unit)

    def mark_weights_changed(self) -> None:
        """Says that sharded parameters were written in a way that PyTorch does not count (through ``.data``, or many in
        one ``torch._foreach`` call) between a step of this package's ``AdamW`` and the next forward, which would
        compute on what the step has written otherwise. Never needed with other optimizers.
        """
        for unit in self._units(recurse=True):
            unit.updates += 1

    def follow_measured_times(self) -> None:
        """Lets the number of units gathered ahead, and of gradient slots, follow what the next iterations take.

        On GPUs the fourth iteration from here on is timed by events, without waiting for any; ranks then choose once,
        together, the smallest depth whose step is within 1 % of the best, of those that free memory has room for, and
        the plan is remade if it is another (its first lines say which, and why). Prefetch lists of the user's win. On
        CPUs, and on one rank, nothing is measured. To be called on the root.
        """
        self._engine().follow_times()

    def set_debug_mode(self, debug: bool) -> None:
        """Whether parameters that a unit has released read as NaN, and every forward whose output holds NaN without a
        cause in its inputs and parameters raises an error that names it.

        Finds views of gathered parameters that are kept outside of their unit's forward, whose values are undefined
        then. Slow, since it waits for the GPU after every forward, and large, since each unit has a gather slot of its
        own from then on. To be called on the root, between steps.
        """
        self._engine().set_debug(debug)

    def reset_iter_state(self) -> None:
        """Forgets a forward or backward that raised. Not needed: the next forward does it. Drops unsynced gradients."""
        abandon(self._engine())

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Whether backward reduces gradients, or adds them up unsharded until a backward that does.

        The first False gives each unit a gradient slot of its own, as large as its full gradients, at the next forward.
        """
        for unit in self._units(recurse):
            unit.policy.requires_gradient_sync = requires_gradient_sync
            if not requires_gradient_sync:
                unit.own_gradient_slot = unit.unsynced_gradients = True
        if requires_gradient_sync:
            self.set_requires_all_reduce(True, recurse=recurse)

    def set_reduce_scatter_unused_params(self, reduce_scatter_unused_params: bool, *, recurse: bool = True) -> None:
        """Whether a synchronized backward reduces all trainable parameters, those without a gradient as zeros: for
        ranks that use different parameters of a unit, or units that others do not, in one step. ``.grad`` is then never
        None after it. To be set to the same on all ranks. Over a process group all ranks must gather the same units.
        """
        for unit in self._units(recurse):
            unit.policy.reduces_unused = reduce_scatter_unused_params

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """Whether reductions average gradients over replicas, or only inside each, until one that does.

        ``.grad`` holds those of this replica meanwhile, where FSDP2 keeps them apart from it: do not drop it. Without
        replicas (a 1-D mesh) there is nothing to average.
        """
        for unit in self._units(recurse):
            if not requires_all_reduce:
                unit.policy.averaged = "nothing"
            elif unit.policy.averaged == "nothing":
                unit.policy.averaged = "all"

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Whether the end of the next backward waits for its reductions; gradients are complete only after one that
        does.
        """
        self._engine().is_last_backward = is_last_backward

    def set_reshard_after_forward(self, reshard_after_forward: bool, recurse: bool = True) -> None:
        """Overrides the argument of ``fully_shard``. After the first forward it only a hint, if the plan has room."""
        if not isinstance(reshard_after_forward, bool):
            raise ValueError(f"reshard_after_forward should be a bool, got {type(reshard_after_forward)}")
        for unit in self._units(recurse):
            unit.policy.reshard_after_forward = reshard_after_forward

    def set_reshard_after_backward(self, reshard_after_backward: bool, *, recurse: bool = True) -> None:
        """Whether parameters are released after backward. After the first forward it is a hint: the plan may have no
        room.
        """
        for unit in self._units(recurse):
            unit.policy.reshard_after_backward = reshard_after_backward

    def set_unshard_in_backward(self, unshard_in_backward: bool) -> None:
        """False: this module's parameters are not needed in backward, like an embedding's."""
        self._unit().policy.unshard_in_backward = unshard_in_backward

    def set_modules_to_forward_prefetch(self, modules: list[FSDPModule]) -> None:
        """The modules to gather when this one's forward starts, instead of the next one. Widens the plan if set
        before it.
        """
        self._unit().policy.forward_prefetch = _units_to_prefetch(modules)

    def set_modules_to_backward_prefetch(self, modules: list[FSDPModule]) -> None:
        """The modules to gather when this one's backward starts, instead of the next one. Widens the plan if set
        before it.
        """
        self._unit().policy.backward_prefetch = _units_to_prefetch(modules)

    def set_gradient_divide_factor(self, factor: float) -> None:
        """What this module's own gradients are divided by, instead of the number of ranks."""
        self._unit().policy.gradient_divisor = factor

    def set_reduce_scatter_divide_factor(self, factor: float) -> None:
        """FSDP2's former name of ``set_gradient_divide_factor``."""
        self.set_gradient_divide_factor(factor)

    def set_separate_reduce_scatter_group(self, enable: bool = True, *, recurse: bool = True) -> None:
        """Reductions have a communicator of their own in any case."""
        if not enable:
            raise NotImplementedError(
                "set_separate_reduce_scatter_group(False) is not supported: reductions always have a communicator of "
                "their own; leave it out"
            )

    def set_reduce_scatter_max_input_buffers(self, max_input_buffers: int, *, recurse: bool = True) -> None:
        """How many reductions may wait while backward goes on: one, that of the unit before."""
        if isinstance(max_input_buffers, bool) or not isinstance(max_input_buffers, int):
            raise TypeError(f"max_input_buffers must be an int, got {type(max_input_buffers).__name__}")
        if max_input_buffers < 1:
            raise ValueError(f"max_input_buffers must be a positive int, got {max_input_buffers}")
        if max_input_buffers > 1:
            raise NotImplementedError(
                f"set_reduce_scatter_max_input_buffers({max_input_buffers}) is not supported: the number of gradient "
                "slots is the plan's; leave it out, or call follow_measured_times()"
            )

    def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
        """Reduces with sums and divides separately, for backends or transports without a mean."""
        self._unit().policy.sum_only = enable

    def set_post_optim_event(self, event: Event) -> None:
        """Gathers of the next forward wait for ``event`` too (they wait for the current stream in any case)."""
        self._engine().streams.wait(GATHER, event)

    # --- nn.Module

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """``.to()``, ``.to_empty()`` and their like act on the sharded parameters, which then move back into the
        arena.
        """
        self.reshard()
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        self._unit().materialize()
        return result

    def _get_fsdp_state(self) -> ShardState:
        """What torch's own functions ask for."""
        state = ShardState()
        state.unit = self._unit()
        return state

    def _unit(self) -> Unit:
        unit = unit_of(cast("nn.Module", self))
        assert unit is not None, "an FSDPModule without a unit"
        return unit

    def _units(self, recurse: bool) -> Iterator[Unit]:
        modules = list(self.modules()) if recurse else [self]  # type: ignore[attr-defined]
        return iter({unit: None for m in modules if (unit := unit_of(cast("nn.Module", m))) is not None})

    def _engine(self) -> Engine:
        return engine_for(self._unit(), self)  # type: ignore[arg-type]


def _units_to_prefetch(modules: Sequence[Any]) -> list[Unit]:
    for module in modules:
        if not isinstance(module, FSDPModule):
            raise ValueError(f"Expects FSDPModule but got {type(module)}: {module}")
    return [module._unit() for module in modules]
