"""The optimizer's step, unit by unit in the order of forward, so that the first units are prefetched meanwhile.

Owns the order of a step of this package's ``AdamW`` over sharded parameters, in or after backward, and the note that
other optimizers' steps leave compute shards to be cast. Knows nothing of the arithmetic.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from yafsdp_like.optim.adamw import AdamW, Passes
from yafsdp_like.shard.runtime.engine import engine_of
from yafsdp_like.shard.runtime.param import ShardedParam
from yafsdp_like.shard.runtime.running import backward_task
from yafsdp_like.shard.runtime.unit_state import Unit, ownership_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from yafsdp_like.shard.runtime.engine import ShardEngine

_stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_updated: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # in backward, since their last step
Owned = dict[Unit, list[ShardedParam]]  # an optimizer's sharded parameters


def watch_optimizers() -> None:
    """Hook every optimizer step of the process from now on. Called once."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


class _InBackward:
    """Updates a unit's parameters as soon as a backward has reduced their gradients."""

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._task: int | None = None  # the backward, by autograd's number, in which the groups were looked up
        self._group_of: dict[nn.Parameter, int] = {}

    def begin(self) -> None:
        """Make the optimizer's states when the first backward begins.

        All activations are live then, so that states are cut from no memory that a later step needs for them.
        """
        optimizer = self._optimizer()
        if optimizer is not None and not optimizer.state:
            owned = _owned(optimizer)
            _make_room_for_states(owned)
            optimizer.make_states(p.sharded for params in owned.values() for p in params if p.sharded.requires_grad)

    def update(self, unit: Unit) -> list[ShardedParam]:
        """See ``Updater``."""
        optimizer, task = self._optimizer(), backward_task()
        if optimizer is None:
            return []
        if task is None or task != self._task:
            self._task, self._group_of = task, optimizer.group_indices()
        group_of = self._group_of
        params = [p for p in unit.params if p.sharded.grad is not None and p.sharded in group_of]
        if params:
            optimizer.update(id(unit), [(p.sharded, group_of[p.sharded]) for p in params])
            unit.freshness.updated(params)
            _updated.add(optimizer)
        return params


_in_backward: weakref.WeakKeyDictionary[AdamW, _InBackward] = weakref.WeakKeyDictionary()


def update_in_backward(optimizer: AdamW, enabled: bool = True) -> None:
    """Let each backward update every unit's parameters as soon as their gradients are reduced, and drop those.

    Then gradients of one unit or two have memory at a time, not all of the model's. ``optimizer.step()`` is called
    after backward as ever: it updates what no backward has updated, and what is not sharded. The numbers are those of
    ``step`` without clipping: between backward and ``step``, ``clip_grad_norm_`` raises ``RuntimeError``. A factor that
    is known before the backward may be set as ``optimizer.gradient_scale``, or ``clip_factor``.

    States of all parameters that are trained are made when the first backward begins, also where no gradient comes.

    Where gradients are accumulated over several backwards, call ``model.set_is_last_backward(False)`` before all but
    the last; ``RuntimeError`` is raised otherwise. A gradient that somebody holds keeps its values. Hooks of optimizer
    steps run in ``step`` only. What ``FSDPModule.mark_weights_changed`` says of writes after a step holds for those
    after the backward.

    Raises ``ValueError`` for other optimizers than this package's ``AdamW`` with moments on the device and without
    ``max_norm``, for one without sharded parameters, and for such on the host, or with their remainders there.
    """
    if not isinstance(optimizer, AdamW) or optimizer.offload_moments or optimizer.max_norm is not None:
        has = ""
        if isinstance(optimizer, AdamW):
            has = " with offload_moments" if optimizer.offload_moments else f" with max_norm={optimizer.max_norm}"
        raise ValueError(
            f"update_in_backward expects yafsdp_like.optim.AdamW with moments on the device and without max_norm, "
            f"found {type(optimizer).__module__}.{type(optimizer).__name__}{has}"
        )
    owned = _owned(optimizer)
    if not owned:
        raise ValueError("update_in_backward expects sharded parameters, found none: call it after fully_shard")
    if any(unit.is_on_host for unit in owned):
        raise ValueError(
            "update_in_backward expects parameters on the device, found such in host memory (CPUOffloadPolicy), whose "
            "gradients take no memory of the device after their reduction: leave one of them out"
        )
    if any(_has_remainder_on_host(unit, params) for unit, params in owned.items()):
        raise ValueError(
            "update_in_backward expects split masters on the device, found their remainders in host memory "
            "(RemainderOffloadPolicy), which step() copies with the moments: leave one of them out"
        )
    optimizer.passes = Passes(compute_of=_compute_of)
    updater = _in_backward.setdefault(optimizer, _InBackward(optimizer))
    for unit in owned:
        unit.update_by(updater if enabled else None)


def refuse_incomplete_gradients() -> None:
    """Raise ``RuntimeError``, before a norm is taken, if a backward has updated with gradients and dropped them."""
    if _updated:
        raise RuntimeError(
            "a norm of gradients was asked for after update_in_backward(optimizer): the backward has updated with them "
            "and dropped them, so that nothing is left to clip. Leave clipping out, or update_in_backward; for another "
            "model's gradients, call optimizer.step() first"
        )


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Prepare the step of an optimizer that has sharded parameters; others are left alone."""
    owned = _owned(optimizer)
    if not owned:
        return
    for engine in {engine: None for unit in owned if (engine := engine_of(unit)) is not None}:
        engine.collective_log.settle()
        engine.collective_log.updates()
    if optimizer not in _stepped:
        _stepped.add(optimizer)
        _make_room_for_states(owned)
    if isinstance(optimizer, AdamW):
        if optimizer.max_norm is not None and optimizer in _updated:
            refuse_incomplete_gradients()
        _pass_by_units(optimizer, owned)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Note which main shards were written: an optimizer's own kernels may not count as writes in place."""
    _updated.discard(optimizer)
    owned = _owned(optimizer)
    for engine in {engine: None for unit in owned if (engine := engine_of(unit)) is not None}:
        if engine.params.debug is not None:
            engine.params.debug.check("an optimizer's step ends")
    for unit, params in owned.items():
        unit.stepped(params)
        if not isinstance(optimizer, AdamW):
            unit.freshness.stepped([p for p in params if p.sharded.grad is not None])
        if not isinstance(optimizer, AdamW) or not unit.freshness.is_current():
            unit.freshness.main_shards_written()


def _owned(optimizer: torch.optim.Optimizer) -> Owned:
    """Return the optimizer's sharded parameters by unit.

    Raises ``RuntimeError`` for an optimizer that was built before ``fully_shard``, whose parameters get no gradients
    any more (FSDP2 does not notice).
    """
    owned: Owned = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            ownership = ownership_of(param)
            if ownership is None:
                continue
            if param is not ownership.param.sharded:
                raise RuntimeError(
                    f"{type(optimizer).__name__} holds {ownership.param.name!r} as it was before it was sharded or "
                    "replaced, or while it was whole (after a forward without a backward), and would train nothing: "
                    "build the optimizer after fully_shard and before the first forward, from model.parameters()"
                )
            owned.setdefault(ownership.unit, []).append(ownership.param)
    return owned


def _make_room_for_states(units: Iterable[Unit]) -> None:
    """Empty the allocator's cache before the first update, which allocates the optimizer's states.

    Cut from cached blocks of activations, they would fragment those for good, and the next step would need more memory.
    The first step after updates in backward does the same, for what those were computed with.
    """
    if any(unit.device.type == "cuda" for unit in units):
        torch.cuda.empty_cache()


def _pass_by_units(optimizer: AdamW, owned: Owned) -> None:
    """Make one batch per unit, in the order of forward, whose update writes main and compute shards."""
    for p in (p for params in owned.values() for p in params if p.extension is not None):
        raise NotImplementedError(
            f"{p.name} is of a class with an all-gather of its own, {type(p.local).__name__}, which AdamW's kernels "
            "cannot update: use torch.optim.AdamW, or give it the other parameters only"
        )
    units = _in_order_of_forward(owned)
    _refuse_late_gradients(owned)
    on_host = [] if optimizer.offload_moments else [u for u in owned if _has_remainder_on_host(u, owned[u])]
    if on_host:
        raise ValueError(
            f"AdamW with moments on the device cannot update {on_host[0].name!r}, whose remainders are in host memory "
            f"(RemainderOffloadPolicy, rank {on_host[0].transport.rank}): use AdamW(offload_moments=True), which "
            "copies both, or leave the policy out of fully_shard"
        )
    updated = [[p for p in owned[unit] if p.sharded.grad is not None] for unit in units]
    optimizer.passes = Passes(
        batches=[[p.sharded for p in owned[unit]] for unit in units],
        compute_of=_compute_of,
        after_batch=partial(_after_batch, units, updated),
    )
    for engine in {engine_of(unit): None for unit in units}:
        assert engine is not None
        engine.params.before_update()
    for unit in units:
        unit.settle()


def _has_remainder_on_host(unit: Unit, owned: Sequence[ShardedParam]) -> bool:
    return unit.policy.offload_remainder and any(p.offloads_remainder for p in owned)


def _refuse_late_gradients(owned: Owned) -> None:
    """Raise ``RuntimeError`` where a gradient has come past the reductions, after an update with what they had."""
    for unit, params in owned.items():
        late = [p.name for p in params if p in unit.updated and p.sharded.grad is not None] if unit.updated else []
        if late:
            raise RuntimeError(
                f"{late[0]!r} has another gradient than the backward has updated it with (rank "
                f"{unit.transport.rank}): of the sharded parameter itself, or set by hand. Compute with it inside the "
                "module's forward, or leave update_in_backward out"
            )


def _in_order_of_forward(owned: Owned) -> list[Unit]:
    engines: dict[ShardEngine, None] = {engine: None for unit in owned if (engine := engine_of(unit)) is not None}
    return [
        engine.units[i] for engine in engines for i in engine.tree.schedule.forward_order if engine.units[i] in owned
    ]


def _compute_of(param: nn.Parameter) -> torch.Tensor | None:
    """Return this rank's rows in the compute shard, for an update to write; None where the main shard is all."""
    ownership = ownership_of(param)
    if ownership is None or engine_of(ownership.unit) is None:  # shards of the latter are still to be placed
        return None
    p = ownership.param
    return None if p.compute is p.main or p.is_split else p.compute[: p.local.numel()]


def _after_batch(units: Sequence[Unit], updated: Sequence[list[ShardedParam]], index: int) -> None:
    if index < len(units) and (engine := engine_of(units[index])) is not None:
        unit = units[index]
        if unit.updated and unit.freshness.is_current():  # all of it in backward
            engine.params.gather_ahead(unit)
        else:
            engine.params.after_update(unit, updated[index])
