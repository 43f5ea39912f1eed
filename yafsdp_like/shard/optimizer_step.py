"""The optimizer's step, unit by unit in the order of forward, so that the first units are prefetched meanwhile.

Owns the order of a step of this package's ``AdamW`` over sharded parameters, and the note that other optimizers' steps
leave compute shards to be cast. Knows nothing of the arithmetic.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from yafsdp_like.optim.adamw import AdamW, Passes
from yafsdp_like.shard.runtime.engine import engine_of
from yafsdp_like.shard.runtime.param import ShardedParam
from yafsdp_like.shard.runtime.unit_state import Unit, ownership_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.shard.runtime.engine import ShardEngine

_stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
Owned = dict[Unit, list[ShardedParam]]  # an optimizer's sharded parameters


def watch_optimizers() -> None:
    """Hook every optimizer step of the process from now on. Called once."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Prepare the step of an optimizer that has sharded parameters; others are left alone."""
    owned = _owned(optimizer)
    if not owned:
        return
    for engine in {engine: None for unit in owned if (engine := engine_of(unit)) is not None}:
        engine.collective_log.settle()
    _make_room_for_states(optimizer, owned)
    if isinstance(optimizer, AdamW):
        _pass_by_units(optimizer, owned)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Note which main shards were written: an optimizer's own kernels may not count as writes in place."""
    for unit in _owned(optimizer):
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
                    "replaced, and would train nothing: build the optimizer after fully_shard, from model.parameters()"
                )
            owned.setdefault(ownership.unit, []).append(ownership.param)
    return owned


def _make_room_for_states(optimizer: torch.optim.Optimizer, owned: Owned) -> None:
    """Empty the allocator's cache before the first step, which allocates the optimizer's states.

    Cut from cached blocks of activations, they would fragment those for good, and the next step would need more memory.
    """
    if optimizer not in _stepped:
        _stepped.add(optimizer)
        if any(unit.device.type == "cuda" for unit in owned):
            torch.cuda.empty_cache()


def _pass_by_units(optimizer: AdamW, owned: Owned) -> None:
    """Make one batch per unit, in the order of forward, whose update writes main and compute shards."""
    units = _in_order_of_forward(owned)
    copies = {p.sharded: _compute_copy(p) for unit in units for p in owned[unit]}
    whole = [_is_updated_whole(unit, owned[unit]) for unit in units]
    optimizer.passes = Passes(
        batches=[[p.sharded for p in owned[unit]] for unit in units],
        compute_of=copies.get,
        after_batch=partial(_after_batch, units, whole),
    )
    for engine in {engine_of(unit): None for unit in units}:
        assert engine is not None
        engine.params.before_update()
    for unit in units:
        unit.settle()


def _is_updated_whole(unit: Unit, owned: Sequence[ShardedParam]) -> bool:
    return len(owned) == len(unit.params) and all(p.sharded.grad is not None for p in owned)


def _in_order_of_forward(owned: Owned) -> list[Unit]:
    engines: dict[ShardEngine, None] = {engine: None for unit in owned if (engine := engine_of(unit)) is not None}
    return [
        engine.units[i] for engine in engines for i in engine.tree.schedule.forward_order if engine.units[i] in owned
    ]


def _compute_copy(p: ShardedParam) -> torch.Tensor | None:
    return None if p.compute is p.main or p.is_split else p.compute[: p.local.numel()]


def _after_batch(units: Sequence[Unit], whole: Sequence[bool], index: int) -> None:
    if index < len(units) and (engine := engine_of(units[index])) is not None:
        engine.params.after_update(units[index], whole[index])
