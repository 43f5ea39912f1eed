"""Whole steps as CUDA graphs: forward and backward of a sharded model at the cost of one launch.

A small step is bound by the CPU, which issues kernels more slowly than the GPU runs them. Since every slot and shard
has one address for good, a step can be recorded once and replayed. Owns what differs between the two: the state that
slots, events and ``.grad`` must be in before a replay, and what they are after it. The owners of that state know
nothing of it.

[Note: what a recording depends on]
Python runs while recording and never again, so all that it decided must hold for every replay: shapes and dtypes of
the inputs, which units are all-gathered already (by the last update), which compute shards must be cast, whether
gradients are set or added to. All of that is the recording's key; another key is another recording.

[Note: gradients in the pool]
A recorded step takes memory for gradients from the recordings' pool where activations have died, as an eager one takes
it from the allocator. So what a step leaves in ``.grad`` is overwritten by the next replay or call in the pool, of
whatever recording. That is right for gradients which nobody has any more then. While anybody has a view of one, steps
run as they are, outside the pool; who has the DTensor gets a copy. Once a step adds to gradients, they move out of the
pool and stay where they are, each in memory of its own: ``keeps_gradients``.

[Note: parameters that are not sharded]
Autograd makes their ``.grad`` or adds to it, neither of which a replay can do to what is ``.grad`` by then. So a
recording computes them into tensors of its own, which are copied to ``.grad``, or added, after each replay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE, StepRecorder, StepRecording
from yafsdp_like.shard.fsdp_module import FSDPModule
from yafsdp_like.shard.runtime.engine import ShardEngine, engine_for
from yafsdp_like.shard.runtime.nested import map_tensors
from yafsdp_like.shard.runtime.slots import SlotState
from yafsdp_like.shard.runtime.unit_state import Unit, ownership_of, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from yafsdp_like.comm.transport import Reduction
    from yafsdp_like.shard.runtime.collective_log import Recorded
    from yafsdp_like.shard.runtime.gradient_shard import GradientMemory, GradientShard
    from yafsdp_like.shard.runtime.param import ShardedParam

NUM_EAGER = 2  # steps before one is recorded: kernels are compiled and chosen, and tables made, in these

Key = tuple[Any, ...]


@dataclass(frozen=True)
class UnitState:
    """What a step would decide by, of one unit."""

    is_filled: bool  # all-gathered already, by the last update
    is_current: bool  # its compute shard need not be cast
    adds: tuple[bool, ...]  # for each parameter, whether its gradient is added to ``.grad``
    grad_addresses: tuple[int, ...]  # where its gradients go, if their memory is kept for recordings; else 0


@dataclass(frozen=True)
class StepKey:
    """What a step that starts now would decide by, of all units."""

    num_layouts: int  # which addresses
    reductions: tuple[Reduction, ...]
    fills: tuple[bool, ...]  # whether unused parameters are reduced
    units: tuple[UnitState, ...]


@dataclass(frozen=True)
class _Step:
    inputs: tuple[torch.Tensor, ...]  # where the recording reads
    recording: StepRecording
    reduced: list[tuple[ShardedParam, GradientMemory]]  # that have a gradient after it and had none before, and where
    unsharded: list[tuple[nn.Parameter, torch.Tensor]]  # parameters, and the gradients that it computes for them
    collective_log: Recorded  # with other ranks


class GraphedStep:
    """``function(*inputs)``, which runs forward and backward of ``model``, as CUDA graphs.

        step = GraphedStep(forward_backward, model)
        for tokens, targets in batches:
            loss = step(tokens, targets)
            optimizer.step()
            optimizer.zero_grad()

    The first two calls for each kind of inputs run as they are, the third is recorded, and later ones replay it; the
    numbers are the same. ``function`` takes tensors and returns tensors (nested as you like), of which the caller gets
    copies. It must not read the GPU's results on the CPU or decide by them, and must leave gradients synchronised; its
    Python does not run in a replay. On CPUs the function is simply called. ``destroy_process_group`` waits for as long
    as a recording has collectives of NCCL: ``close`` the step before.

    All recordings, and the calls before them, have activations and gradients in one memory pool, which grows to what
    the largest takes: see [Note: gradients in the pool]. ``keeps_gradients`` says whether a step has added to
    gradients, as where they are accumulated or ``zero_grad(set_to_none=False)`` keeps them: from then on they take
    memory beside the pool, for good.

    Raises ``ValueError`` for a model that is not sharded, and ``RuntimeError`` when called after
    ``update_in_backward``, or with parameters on the host (``CPUOffloadPolicy``), or slots that are shared.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        if not isinstance(model, FSDPModule):
            raise ValueError(f"GraphedStep expects a module that fully_shard returned, found {type(model).__name__}")
        unit = unit_of(model)
        assert unit is not None, "an FSDPModule without a unit"
        self._function, self._model, self._unit = function, model, unit
        self._steps: dict[Key, _Step] = {}
        self._calls: Counter[Key] = Counter()
        self._recorder: StepRecorder | None = None
        self.keeps_gradients = False
        self._left: list[tuple[ShardedParam, GradientMemory]] = []  # gradients in the pool that somebody may have

    @property
    def num_recordings(self) -> int:
        """How many kinds of steps are recorded."""
        return len(self._steps)

    def close(self) -> None:
        """Free all recordings. A call after it begins anew."""
        self._steps.clear()
        self._calls.clear()

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Run the function, or replay it, on ``inputs``; return copies of what it returns."""
        engine = engine_for(self._unit, self._model)
        if any(unit.updater is not None for unit in engine.units):
            raise RuntimeError(
                "GraphedStep cannot record a backward that updates parameters, whose learning rate and step count "
                "change: call update_in_backward(optimizer, False), or run the step as it is"
            )
        if any(unit.is_on_host for unit in engine.units):
            raise RuntimeError(
                "GraphedStep cannot record a step whose gradients the CPU waits for: leave offload_policy out of "
                "fully_shard, or run the step as it is"
            )
        if engine.memory.shared is not None:
            raise RuntimeError(
                "GraphedStep cannot record a step in slots that other models use between its replays (share_slots): "
                "leave this model out of share_slots, or run the step as it is"
            )
        extended = [p.name for unit in engine.units for p in unit.params if p.extension is not None]
        if extended:
            raise RuntimeError(
                f"GraphedStep cannot record what the class of {extended[0]} does in Python around each all-gather "
                "(fsdp_pre_all_gather, fsdp_post_all_gather): run the step as it is"
            )
        if not StepRecorder.works_on(engine.units[0].device) or not engine.memory.is_built:
            return self._function(*inputs)
        if self._recorder is None:
            engine.gradients.release_unused()  # they are the allocator's, and are about to be the pool's
            self._recorder = StepRecorder()
        key = self._key(engine, inputs)
        if key[0] is None:
            return self._function(*inputs)
        if key not in self._steps:
            self._calls[key] += 1
            if self._calls[key] <= NUM_EAGER:
                return self._rehearse(self._recorder, engine, inputs)
            self._steps[key] = self._record(self._recorder, engine, inputs)
        return self._replay(engine, self._steps[key], inputs)

    def _key(self, engine: ShardEngine, inputs: tuple[torch.Tensor, ...]) -> Key:
        """Return what a recording is for; its first element is None where steps cannot be recorded as things are."""
        state = repeatable_state(engine, self.keeps_gradients)
        if state is not None and not self.keeps_gradients:
            adds = any(any(unit.adds) for unit in state.units)
            if not self._take_back(adds):
                state = None
            elif adds:
                self.keeps_gradients = True
                self._steps.clear()
                state = repeatable_state(engine, keeps_gradients=True)
        return (state, self._model.training, *((t.shape, t.stride(), t.dtype) for t in inputs))

    def _take_back(self, adds: bool) -> bool:
        """Have nobody refer to gradients in the pool; return False where somebody has a view of one.

        Those that a step ``adds`` to move out of it. See [Note: gradients in the pool].
        """
        if adds and any(memory.is_shared for _, memory in self._left):
            return False
        for p, memory in self._left if adds else ():
            if p.has_own_grad and _shard(p).memory is memory:
                _shard(p).move()
        self._left = [(p, memory) for p, memory in self._left if not _shard(p).let_go(memory)]
        return not self._left

    def _rehearse(self, recorder: StepRecorder, engine: ShardEngine, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Call the function in the memory of recordings; see [Note: one pool].

        Recordings that were made before may write where it has left something (a table, the gradient of a parameter
        that is not sharded): they are dropped, and made again when they are needed. Later ones spare what is there.
        """
        engine.gradients.release_unused()
        before, result = recorder.live(), None
        try:
            with recorder.in_pool():
                result = self._function(*inputs)
            return map_tensors(lambda t: t.detach().clone(), result)
        finally:
            del result
            if not self.keeps_gradients:
                taken = [p for unit in engine.units for p in unit.params if p.sharded.grad is not None]
                self._left = [(p, _shard(p).memory) for p in taken if p.has_own_grad]
            gradients = {memory.storage.data_ptr() for _, memory in self._left}
            if any(address not in gradients for address, _ in recorder.live() - before):
                self._steps.clear()

    def _record(self, recorder: StepRecorder, engine: ShardEngine, inputs: tuple[torch.Tensor, ...]) -> _Step:
        own = tuple(t.clone() for t in inputs)
        state = repeatable_state(engine, self.keeps_gradients)
        assert state is not None
        engine.gradients.release_unused()
        _join_streams(engine)
        unsharded = _Unsharded(self._model)

        def work() -> Any:
            _fork_streams(engine)
            unsharded.begin()
            result = self._function(*own)
            _join_streams(engine)
            return map_tensors(torch.Tensor.detach, result)

        without = [p for unit in engine.units for p in unit.params if p.trainable and p.sharded.grad is None]
        try:
            engine.collective_log.record()
            recording = recorder.record(work)
        finally:
            collective_log = engine.collective_log.recorded()
            computed = unsharded.end()
        reduced = [p for p in without if p.sharded.grad is not None]
        _return_to(state, engine, reduced)
        self._forget_other_layouts(engine)
        where = [(p, _shard(p).recorded(recorder.keep)) for p in reduced]
        return _Step(own, recording, where, computed, collective_log)

    def _forget_other_layouts(self, engine: ShardEngine) -> None:
        """Drop recordings of former slots: they would never be replayed, and hold memory."""
        self._steps = {
            key: step for key, step in self._steps.items() if key[0].num_layouts == engine.memory.num_layouts
        }

    def _replay(self, engine: ShardEngine, step: _Step, inputs: tuple[torch.Tensor, ...]) -> Any:
        for own, given in zip(step.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        _join_streams(engine)
        engine.collective_log.repeat(step.collective_log)
        step.recording.replay()
        _settle(engine, step)
        if not self.keeps_gradients:
            self._left = step.reduced
        return map_tensors(torch.clone, step.recording.result)


def _shard(p: ShardedParam) -> GradientShard:
    assert p.grad_shard is not None
    return p.grad_shard


class _Unsharded:
    """Trainable parameters of a model that are not sharded, while a step is recorded that computes their gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._params = [p for p in model.parameters() if p.requires_grad and ownership_of(p) is None]
        self._before = [p.grad for p in self._params]
        self._computed = [p.detach().clone() for p in self._params]
        self._versions: list[int] = []

    def begin(self) -> None:
        """Let autograd add gradients to zeros."""
        for p, computed in zip(self._params, self._computed, strict=True):
            p.grad = computed.zero_()
        self._versions = [computed._version for computed in self._computed]

    def end(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Put back what was ``.grad``; return parameters that have got gradients, with those."""
        for p, before in zip(self._params, self._before, strict=True):
            p.grad = before
        found = zip(self._params, self._computed, self._versions, strict=True)
        return [(p, computed) for p, computed, version in found if computed._version > version]


def repeatable_state(engine: ShardEngine, keeps_gradients: bool = True) -> StepKey | None:
    """Return what a step that starts now would decide by, or None when it cannot be repeated as it is.

    It cannot while something is running or held between steps, where the user has set a ``.grad`` or has just written
    to a split master, and where outputs are to be checked (debug mode). With ``keeps_gradients`` each gradient gets
    memory that it keeps, if nobody has a view of what is overwritten then.
    """
    if not engine.memory.is_built or engine.params.debug is not None:
        return None
    busy = engine.running.iteration is not None or engine.running.backwards or not engine.gradients.is_last_backward
    if busy or not all(unit.policy.requires_gradient_sync for unit in engine.units):
        return None
    units: list[UnitState] = []
    for unit in engine.units:
        state = _repeatable_unit(engine, unit, keeps_gradients)
        if state is None:
            return None
        units.append(state)
    return StepKey(
        engine.memory.num_layouts,
        tuple(unit.reduction() for unit in engine.units),
        tuple(unit.policy.reduces_unused for unit in engine.units),
        tuple(units),
    )


def _repeatable_unit(engine: ShardEngine, unit: Unit, keeps_gradients: bool) -> UnitState | None:
    """Return what a step would decide by, of one unit; values in its slot that no step would read are dropped."""
    slot, is_current = unit.gather_slot, unit.freshness.is_current()
    if slot.state is SlotState.STALE:
        slot.drop()
    elif slot.state is SlotState.FILLED and slot.version != unit.freshness.main_version():
        engine.params.release(slot)
    if slot.state not in (SlotState.EMPTY, SlotState.FILLED) or unit.gradient_slot.state is not SlotState.EMPTY:
        return None
    if any(p.sharded.grad is not None and not p.has_own_grad for p in unit.params):
        return None
    if any(p.is_written for p in unit.split):  # a replay would settle that again
        return None
    adds = tuple(p.has_own_grad for p in unit.params)
    if keeps_gradients and not all(p.pin_grad() for p in unit.params):
        return None
    addresses = tuple(p.grad_shard.pinned_address for p in unit.params if p.grad_shard is not None)
    return UnitState(slot.state is SlotState.FILLED, is_current, adds, addresses)


def _fork_streams(engine: ShardEngine) -> None:
    """Start side streams here."""
    for stream in (GATHER, REDUCE):
        engine.streams.wait(stream, engine.streams.record(COMPUTE))


def _join_streams(engine: ShardEngine) -> None:
    """Let compute wait for all that side streams were given, so that no event is left to wait for."""
    engine.context.wait_for_side_streams()
    engine.gradients.forget_events()
    for unit in engine.units:
        unit.gather_slot.forget_events()
        unit.gradient_slot.forget_events()


def _return_to(state: StepKey, engine: ShardEngine, reduced: Sequence[ShardedParam]) -> None:
    """Return to what a step was recorded from: nothing of it has run yet."""
    for unit, before in zip(engine.units, state.units, strict=True):
        unit.gather_slot.rewind(before.is_filled)
    for p in reduced:
        p.sharded.grad = None


def _settle(engine: ShardEngine, step: _Step) -> None:
    """Note what Python would have noted of a step that was replayed."""
    engine.context.arm_watchdog(engine.streams.record(COMPUTE))
    for unit in engine.units:
        unit.gather_slot.drop()
        unit.freshness.compute_shard_written()
    for p, memory in step.reduced:
        _shard(p).show(memory)
        p.sharded.grad = memory.dtensor
    for param, computed in step.unsharded:
        if param.grad is None:
            param.grad = computed.clone()
        else:
            param.grad.add_(computed)
