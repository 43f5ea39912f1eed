"""From modules to a unit: which parameters a ``fully_shard`` call takes, and what is installed on their modules.

Owns the walk over modules, parameters tied across units, and the hooks for state dicts and for parameters that the user
assigns later. Does not change a module's class (``api.py`` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from yafsdp_like.comm.choice import transport_over, transport_within
from yafsdp_like.memory.allocator import use_expandable_segments
from yafsdp_like.shard.hooks import install
from yafsdp_like.shard.requirements import dtype_override
from yafsdp_like.shard.runtime.engine import engine_of
from yafsdp_like.shard.runtime.extension import refuse_with
from yafsdp_like.shard.runtime.param import ShardedParam, register
from yafsdp_like.shard.runtime.param_placement import ParamPlacement, PlacementFn, placement_of
from yafsdp_like.shard.runtime.unit_state import Unit, ownership_of, unit_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from yafsdp_like.comm import TransportName
    from yafsdp_like.shard.full_mesh import FullMesh
    from yafsdp_like.shard.spec.unit_spec import UnitPolicy

Owners = dict[nn.Parameter, list[tuple[nn.Module, str]]]  # which modules register a parameter, and under what name


Placements = dict[nn.Parameter, ParamPlacement]


Policies = Mapping["DeviceMesh", "UnitPolicy"]  # of each mesh that parameters are sharded over, the call's own first


def make_units(
    modules: Sequence[nn.Module],
    owners: Owners,
    placements: Placements,
    policies: Policies,
    transport: TransportName,
) -> list[Unit]:
    """Shard the parameters ``owners`` as units, one for each mesh, run by the forward of each of ``modules``.

    Registers the sharded parameters on their modules, moves buffers to the mesh's device and installs the units'
    forward and state-dict hooks.
    """
    params: dict[DeviceMesh, Owners] = {mesh: {} for mesh in policies}
    for param, places in owners.items():
        params[placements[param].data_mesh][param] = places
    units = [_make_unit(modules, params[mesh], placements, mesh, policies[mesh], transport) for mesh in policies]
    for module in modules:
        vars(module)["_yafsdp_units"] = units
        for unit in reversed(units):  # whose hooks run before those that were installed earlier
            install(unit, module)
    _move_buffers(modules, units[0].device)
    for unit in units:
        for owner in {owner: None for p in unit.params for owner, _ in p.owners}:
            _keep_state_dict_sharded(unit, owner)
    return units


def _make_unit(
    modules: Sequence[nn.Module],
    owners: Owners,
    placements: Placements,
    mesh: DeviceMesh,
    policy: UnitPolicy,
    transport: TransportName,
) -> Unit:
    device = device_of(mesh)
    on_host = policy.offload is not None
    params = [
        ShardedParam(param, places, placements[param], on_host, dtype_override(policy.mp, param))
        for param, places in owners.items()
    ]
    transport = transport if policy.offload is None else "process_group"
    if device.type == "cuda":
        use_expandable_segments()
    unit = Unit(modules, params, policy, mesh, transport_over(mesh, device, transport), device)
    if policy.forward_ranks:
        unit.keep_within(transport_within(mesh.get_group(mesh.ndim - 1), policy.forward_ranks))
    for p, param in zip(params, owners, strict=True):
        unit.mark(param, p)
        register([p], [p.sharded])
        for owner, name in p.owners:
            _follow_assignments(unit, p, owner, name)
    return unit


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return the device of this rank's shards: the current GPU for a CUDA mesh, else the CPU."""
    is_cuda = mesh.device_type == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


def params_below(modules: Sequence[nn.Module], ignored: set[nn.Parameter]) -> Owners:
    """Find the parameters of ``modules`` and of their submodules, except below modules that were sharded earlier."""
    owners: Owners = {}
    seen: set[nn.Module] = set()
    for module in modules:
        _add_params(module, modules, ignored, owners, seen)
    return owners


def _add_params(
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
        _add_params(child, modules, ignored, owners, seen)


def placements_over(
    mesh: DeviceMesh, owners: Owners, asked: PlacementFn | None, policy: UnitPolicy, full: FullMesh | None
) -> Placements:
    """Return how each parameter that no unit has yet is sharded. Raises as ``placement_of`` does."""
    found: Placements = {}
    for param, places in owners.items():
        if ownership_of(param) is None:
            module, attribute = places[0]
            name = f"{attribute} of {type(module).__name__}"
            refuse_with(param, name, policy)
            if full is not None:
                full.check(param, name)
            found[param] = placement_of(param, name, mesh, asked, full.data_dims if full is not None else ())
    return found


def split_tied(owners: Owners, modules: Sequence[nn.Module]) -> Owners:
    """Return the parameters that no unit has yet; tie the others into the units that have them."""
    new: Owners = {}
    for param, places in owners.items():
        if ownership_of(param) is None:
            new[param] = places
        else:
            _tie(param, places, modules)
    return new


def _tie(param: nn.Parameter, places: Sequence[tuple[nn.Module, str]], modules: Sequence[nn.Module]) -> None:
    """Let the unit that has sharded ``param`` be all-gathered for the modules of ``places`` too.

    And for ``modules``, where they share the very module that registers it.
    """
    ownership = ownership_of(param)
    assert ownership is not None
    unit, p = ownership.unit, ownership.param
    for module, name in places:
        if (module, name) not in p.owners:
            p.add_owner(module, name)
            _add_modules(unit, [module])
            _follow_assignments(unit, p, module, name)
        elif all(unit_of(m) is None for m in modules):  # else the call is a repetition, which torch's contract refuses
            _add_modules(unit, modules)


def _add_modules(unit: Unit, modules: Sequence[nn.Module]) -> None:
    for module in modules:
        if module not in unit.modules:
            unit.add_module(module)
            install(unit, module)
            _keep_state_dict_sharded(unit, module)


def _keep_state_dict_sharded(unit: Unit, module: nn.Module) -> None:
    """Make state dicts hold and load the sharded parameters, whichever are registered at the time."""

    def reshard(*_: Any) -> None:
        if (engine := engine_of(unit)) is not None:
            engine.params.reshard(unit)

    def begin(*_: Any) -> None:
        reshard()
        unit.begin_loading()

    def end(*_: Any) -> None:
        unit.end_loading()

    module.register_state_dict_pre_hook(reshard)
    module.register_load_state_dict_pre_hook(begin)
    module.register_load_state_dict_post_hook(end)


class _ShardedParams(dict[str, tuple[Unit, ShardedParam]]):
    """The sharded parameters of a module by name. A copy of the module has none: its parameters are of no unit."""

    def __reduce__(self) -> tuple[type[_ShardedParams], tuple[()]]:
        return _ShardedParams, ()


def _follow_assignments(unit: Unit, p: ShardedParam, module: nn.Module, name: str) -> None:
    """Shard parameters that the user assigns to ``module.name`` from now on, in the place of ``p``."""
    vars(module).setdefault("_yafsdp_params", _ShardedParams())[name] = (unit, p)
    if not _registration_hook:
        adopt: Any = _adopt_assigned  # torch takes what it returns, though its types do not say so
        _registration_hook.append(register_module_parameter_registration_hook(adopt))


_registration_hook: list[Any] = []  # torch's, for all modules, from the first sharded parameter of the process on


def _adopt_assigned(module: nn.Module, name: str, given: nn.Parameter) -> nn.Parameter | None:
    """Shard ``given``, which torch registers as ``module.name``, if the parameter that was there was sharded."""
    unit, p = vars(module).get("_yafsdp_params", {}).get(name, (None, None))
    if unit is None or unit.running.calls or p.is_mine(given):
        return None  # while the unit computes, what is given is for this call
    owner = ownership_of(given)
    if (owner is not None and not owner.is_replaced) or (len(p.owners) > 1 and not unit.is_loading):
        raise NotImplementedError(
            f"{p.name} is sharded, and cannot be tied to another parameter or untied any more (rank {p.rank}): assign "
            "before fully_shard, or copy values into it"
        )
    if (engine := engine_of(unit)) is not None:
        engine.params.reshard(unit)
    return cast("nn.Parameter", unit.adopt(p, given))


def _move_buffers(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        for buffer in module.buffers():
            if buffer.device != device and not buffer.is_meta:
                buffer.data = buffer.to(device)
