"""From a module's forward and autograd's backward to the engine's owners: what starts, what ends, and what failed.

[Note: the life of a use]
Every forward call of a unit under grad mode is a ``ForwardUse``. Its outputs carry a hook that fires before the first
gradient enters the unit (``_start_backward``: all-gather again), and its inputs pass through a node that runs after the
last one left it (``_end_backward``: release, reduce-scatter). When no input needs a gradient there is no such node, and
the end is the end of the whole backward. A unit's gradients are reduced once all its parameters' have arrived, or no
other use is outstanding, or at the end of that backward, whichever comes first; so a block used twice is reduced
once.

[Note: one backward in another]
Autograd's task number distinguishes backwards, since one may run inside another (reentrant activation
checkpointing), and since one that failed never runs its final callback.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import Variable
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from yafsdp_like.shard.runtime.debug import holds_nan, output_error
from yafsdp_like.shard.runtime.engine import ShardEngine, engine_for, engine_of
from yafsdp_like.shard.runtime.held import replace_held
from yafsdp_like.shard.runtime.nested import cast_floating, map_tensors, needs_cast, tensors_in
from yafsdp_like.shard.runtime.running import Call, ForwardUse, backward_task
from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot, SlotState
from yafsdp_like.shard.runtime.watching import (
    differentiable,
    no_second_gradients,
    outside_transforms,
    watch_held,
    watch_inputs,
    watch_outputs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from yafsdp_like.shard.runtime.unit_state import Unit

_log = logging.getLogger("torch.distributed.fsdp.fully_shard")  # FSDP2's, which TORCH_LOGS="+fsdp" shows


def install(unit: Unit, module: nn.Module) -> None:
    """All-gather and release the unit around ``module``'s forward, also when that raises."""
    vars(module).setdefault("_yafsdp_around", []).append(unit)
    module.register_forward_pre_hook(partial(_before_forward, unit), prepend=True, with_kwargs=True)
    module.register_forward_hook(partial(_after_forward, unit), always_call=True)


# --- forward ---


@torch.compiler.disable
def _before_forward(unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    engine = engine_for(unit, module)
    iteration = engine.running.iteration
    if iteration is not None and iteration in unit.running.calls and not _still_runs(iteration):
        abandon(engine)  # the last forward was ended by what is no Exception, as Ctrl-C is
    task = backward_task()
    if task is None and engine.running.iteration is None:
        for one in (engine, *engine.beside):
            if one.running.backwards and one.running.iteration is None:
                abandon(one)  # its last backward raised; done before this call is noted, since it forgets calls
    call = Call(module, sys.exc_info()[1], recomputes=_in_own_backward(unit, task))
    unit.running.calls.append(call)
    if task is None and engine.running.iteration is None:
        outside_transforms(_begin_iteration, engine, call)
        args, kwargs = map_tensors(lambda t: t.to(unit.device, non_blocking=True), (args, kwargs))
    inputs: Any = (args, kwargs)
    tensors, policy = tensors_in(inputs), unit.policy.mp
    if policy.cast_forward_inputs and needs_cast(tensors, policy.param_dtype):
        inputs = cast_floating(inputs, policy.param_dtype)
        tensors = tensors_in(inputs)
    call.has_nan_inputs = engine.params.debug is not None and holds_nan(inputs)
    return inputs if call.recomputes else _enter(engine, unit, call, inputs, tensors)


def _in_own_backward(unit: Unit, task: int | None) -> bool:
    return task is not None and unit.registered is not None and unit.registered.is_in_backward


def _begin_iteration(engine: ShardEngine, call: Call) -> None:
    _log.debug("FSDP::root_pre_forward")
    if get_proxy_mode() is not None:
        raise RuntimeError(
            f"a forward of {type(call.module).__name__} is traced (torch.func.linearize, make_fx, torch.export), and "
            "the graph would read its parameters where others lie by the time that it runs "
            f"(rank {engine.units[0].transport.rank}): trace the model before fully_shard, or use torch.func.jvp"
        )
    engine.rebuild.if_changed()
    engine.params.begin()
    engine.gradients.release_unused()
    call.starts_iteration, engine.running.iteration = True, call


def _enter(engine: ShardEngine, unit: Unit, call: Call, inputs: Any, tensors: list[torch.Tensor]) -> Any:
    """All-gather the unit for its forward, and prefetch the next; return the inputs, watched for backward's end.

    ``tensors`` are those in ``inputs``.
    """
    _log.debug("FSDP::pre_forward (%s)", unit.name)
    unit.running.begin_pass(unit.modules)
    builds_graph = torch.is_grad_enabled()
    tensors = differentiable(tensors) if builds_graph else []
    outside_transforms(_gather, engine, unit, builds_graph and not tensors)
    for p in unit.given:
        p.use_given()
    if not builds_graph:
        return inputs
    call.use = ForwardUse(unit.gather_slot)
    unit.running.pending.add(call.use)
    if not tensors:
        return inputs
    end = partial(_end_backward, engine, unit, call.use)
    inputs, call.watched = watch_inputs(unit.name, end, inputs, tensors)
    return inputs


def _gather(engine: ShardEngine, unit: Unit, open_ended: bool) -> None:
    _choose_slot(engine, unit, open_ended)
    refresh = backward_task() is None
    engine.params.unshard(unit.gather_slot, refresh)
    if refresh:
        for target in unit.forward_prefetch or engine.tree.next_in_forward[unit]:
            engine.params.prefetch(target, refresh)


def _choose_slot(engine: ShardEngine, unit: Unit, open_ended: bool) -> None:
    """Move the unit to a slot of its own where the bytes of its planned one are, or will be, in use.

    See [Note: spills].

    A unit none of whose inputs needs a gradient is in backward until the very end (``open_ended``): units that ran
    before it, and so run backward after it, must not share its bytes.
    """
    if blockers := engine.params.blockers(unit.gather_slot):
        engine.params.isolate(unit, f"its forward began inside that of {[b.unit.name for b in blockers]}")
    if open_ended and unit.trainable:
        if waiting := _pending_neighbours(unit.gather_slot):
            engine.params.isolate(
                unit, f"no input of it needs a gradient, so its backward ends after that of {waiting} begins"
            )
        if waiting := _pending_neighbours(unit.gradient_slot):
            engine.gradients.isolate(unit, f"its gradients are complete only after those of {waiting} arrive")


def _pending_neighbours(slot: GatherSlot | GradientSlot) -> list[str]:
    free = slot.state in (SlotState.EMPTY, SlotState.FILLED, SlotState.STALE)
    return [other.unit.name for other in slot.neighbours if other.unit.awaits_backward] if free else []


@torch.compiler.disable
def _after_forward(unit: Unit, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    calls = unit.running.calls
    if not calls or calls[-1].module is not module:
        return output  # the forward failed before this unit knew of it
    call, engine = calls.pop(), engine_of(unit)
    failed = sys.exc_info()[1] is not call.outer_error
    assert engine is not None
    error: RuntimeError | None = None
    others: list[Any] = []  # in the output, that are neither tensors nor containers of such
    if not failed and unit.registered is not None:
        output = _own_values(unit.registered, output, others)
        if engine.params.debug is not None and not call.has_nan_inputs:
            error = output_error(unit.registered, output)
            failed = error is not None
    if not call.recomputes:
        if not failed and call.use is not None:
            start = partial(_start_backward, engine, unit, call.use)
            call.watched.adopt_writes(unit.name, start)
            output = watch_outputs(start, output, call.watched)
            if others and call.starts_iteration:  # only of the root no other unit's tensors can be among them
                watch_held(start, others, call.watched)
        if unit.running.end_module(module) or failed:
            _leave(engine, unit)
        if call.starts_iteration:
            _end_iteration(engine, failed)
    if error is not None:
        raise error
    return output if failed else cast_floating(output, unit.policy.mp.output_dtype)


def _own_values(slot: GatherSlot, output: Any, others: list[Any]) -> Any:
    """Return ``output`` with copies of tensors on the slot's bytes, which other units will have (DETR's queries, say).

    Also inside of objects, which are added to ``others``.
    """

    def own(t: torch.Tensor) -> torch.Tensor:
        return t.clone() if slot.aliases(t) else t

    output = map_tensors(own, output, others)
    if others:
        replace_held(own, others)
    return output


def _leave(engine: ShardEngine, unit: Unit) -> None:
    """End the unit's forward: release or keep its slot, unless another call of the unit still runs."""
    unit.running.to_run.clear()
    if unit.running.calls or unit.registered is None:
        return
    _log.debug("FSDP::post_forward (%s)", unit.name)
    for p in unit.given:
        p.put_given_back()
    # By default the root stays unsharded for its backward. Where none will come, modules must show the sharded
    # parameters again, or zero_grad() and clipping over model.parameters() would miss the gradients.
    idle = unit.policy.reshard_after_forward is None and not torch.is_grad_enabled()
    if backward_task() is None and (idle or engine.tree.reshards_after_forward(unit)):
        engine.params.release_but_keep(unit.registered)
    else:
        unit.registered.keep()


def _end_iteration(engine: ShardEngine, failed: bool) -> None:
    for unit in engine.units:
        if unit.running.to_run:  # some of the unit's modules did not run in this pass
            _leave(engine, unit)
        if failed:
            engine.params.reshard(unit)
        unit.freshness.forward_ended()
    engine.params.settle_prefetches()
    engine.running.iteration = None


# --- methods that are run as forwards ---


def before_method(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> Any:
    """Begin a method that ``frame`` runs as a sharded module's forward; return what to call it with."""
    for unit in reversed(vars(module)["_yafsdp_around"]):
        args, kwargs = _before_forward(unit, module, args, kwargs)
        unit.running.calls[-1].frame = frame
    return args, kwargs


def after_method(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """End a method that has returned ``output``, or raises; return what the caller gets."""
    for unit in vars(module)["_yafsdp_around"]:
        output = _after_forward(unit, module, args, output)
    return output


def _still_runs(call: Call) -> bool:
    """Return whether a method runs the module's own forward, which is part of the iteration that the method began."""
    frame: FrameType | None = sys._getframe() if call.frame is not None else None
    while frame is not None and frame is not call.frame:
        frame = frame.f_back
    return frame is not None


# --- backward ---


def _start_backward(engine: ShardEngine, unit: Unit, use: ForwardUse, refuses_second: bool) -> None:
    """Unshard the unit, before a gradient enters it, in the slot that its forward has used."""
    task = backward_task()
    assert task is not None
    if use.task == task:
        return  # another output's gradient came before
    if torch.is_grad_enabled() and not refuses_second:
        raise RuntimeError(
            f"backward of {unit.name!r} runs with create_graph=True (rank {unit.transport.rank}): "
            + no_second_gradients(unit.name)
        )
    backwards = engine.running.backwards
    if task not in backwards:
        if not backwards:
            engine.gradients.begin_backward()
        backwards[task] = []
        Variable._execution_engine.queue_callback(partial(outside_transforms, _end_task, engine, task))
    backwards[task].append((unit, use))
    unit.running.begin_backward(use, task)
    outside_transforms(_gather_for_backward, engine, unit, use)


def _gather_for_backward(engine: ShardEngine, unit: Unit, use: ForwardUse) -> None:
    _log.debug("FSDP::pre_backward (%s)", unit.name)
    if engine.gradients.filled:
        engine.gradients.reduce_unused(engine.tree.backward_ticks[unit][0])
    if unit.policy.unshard_in_backward:
        if blockers := engine.params.blockers(use.slot):
            raise RuntimeError(
                f"backward of {unit.name!r} needs its gather slot while {[b.unit.name for b in blockers]} still "
                f"computes on the same bytes (rank {unit.transport.rank}); their backwards were expected one "
                "after the other. Set reshard_after_forward=False on one of these units"
            )
        engine.params.unshard(use.slot, refresh=False)
    use.slot.begin_backward(use)
    _prefetch_in_backward(engine, unit)


def _prefetch_in_backward(engine: ShardEngine, unit: Unit) -> None:
    """Prefetch the next units whose backward is still to come, which leaves out those that forward has skipped."""
    following = unit.backward_prefetch or engine.tree.after_in_backward[unit]
    expected = (u for u in following if u.running.pending and u.policy.unshard_in_backward)
    for target in islice(expected, None if unit.backward_prefetch else 1):
        engine.params.prefetch(target, refresh=False)


def _end_backward(engine: ShardEngine, unit: Unit, use: ForwardUse) -> None:
    """End a use that has computed all its gradients: the slot is free, and the unit's gradients may be complete."""
    if not use.slot.is_read_by(use):
        return
    unit.running.pending.discard(use)
    _finish_use(engine, unit, use)
    early = not unit.policy.reduces_unused and engine.gradients.all_arrived(unit)
    if unit.policy.requires_gradient_sync and (early or not unit.running.pending):
        outside_transforms(engine.gradients.reduce_scatter, unit)


def _finish_use(engine: ShardEngine, unit: Unit, use: ForwardUse) -> None:
    _log.debug("FSDP::post_backward (%s)", unit.name)
    use.task = None
    use.slot.end_backward(use)
    if not use.slot.is_in_backward and use.slot.state is SlotState.HELD:
        if unit.policy.reshard_after_backward:
            engine.params.release(use.slot)
        else:
            use.slot.keep()


def _end_task(engine: ShardEngine, task: int) -> None:
    """End a backward: end the uses that no node ended, and reduce what has arrived and waits for nothing more."""
    backwards = engine.running.backwards
    for unit, use in backwards.get(task, []):
        unit.running.reached.discard(task)
        if use.task == task:
            unit.running.pending.discard(use)
            _finish_use(engine, unit, use)
    is_outermost = backwards.keys() <= {task}
    for unit in engine.tree.backward_ticks if engine.gradients.filled and is_outermost else engine.units:
        if unit.gather_slot.is_in_backward or (unit.registered and unit.registered.is_in_backward):
            continue  # in an outer backward
        if unit.policy.requires_gradient_sync and (is_outermost or not unit.policy.reduces_unused):
            engine.gradients.reduce_scatter(unit)
        if unit.policy.reshard_after_backward and unit.registered and not unit.running.calls:
            engine.params.reshard(unit)
    backwards.pop(task, None)  # not before: where a hook raises, the next forward finds a backward to abandon
    engine.params.settle_prefetches()
    if engine.gradients.is_last_backward and not engine.gradients.is_finalized_by_user:
        engine.gradients.wait_for_reductions()
    if is_outermost:
        _log.debug("FSDP::root_post_backward")
        engine.collective_log.ends_backward()


def finish_accumulating(engine: ShardEngine, units: Sequence[Unit]) -> None:
    """Reduce what backwards without synchronisation have left of ``units``, without another backward.

    What follows on compute may read gradients only after ``wait_for_reductions``.
    """
    for unit in units:
        engine.gradients.reduce_scatter(unit)
        if unit.policy.reshard_after_backward:
            engine.params.reshard(unit)
    engine.collective_log.ends_backward()


def abandon(engine: ShardEngine) -> None:
    """Free every slot after an exception, and drop gradients that had arrived in part."""
    engine.running.backwards.clear()
    engine.running.iteration = None
    for unit in engine.units:
        unit.running.abandon()
        engine.params.reshard(unit)
    engine.gradients.discard()
    engine.gradients.wait_for_reductions()
