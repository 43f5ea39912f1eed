"""Whole steps as CUDA graphs: forward and backward of a sharded model at the cost of one launch.

A small step is bound by the CPU, which issues kernels more slowly than the GPU runs them. Since every slot and shard
has one address for good, a step can be recorded once and replayed. Owns what differs between the two: the state that
slots, events and ``.grad`` must be in before a replay, and what they are after it.

[Note: what a recording depends on]
Python runs while recording and never again, so all that it decided must hold for every replay: shapes and dtypes of
the inputs, which units are gathered already (by the last update), which compute shards must be cast, whether gradients
are set or added to. All of that is the recording's key; another key is another recording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from yafsdp_like.memory.streams import StepRecorder, StepRecording
from yafsdp_like.shard.api import FSDPModule
from yafsdp_like.shard.engine import Engine
from yafsdp_like.shard.nested import map_tensors
from yafsdp_like.shard.unit import ShardedParam

NUM_EAGER = 2  # steps before one is recorded: kernels are compiled and chosen, and tables made, in these

Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Step:
    inputs: tuple[torch.Tensor, ...]  # where the recording reads
    recording: StepRecording
    reduced: list[ShardedParam]  # parameters whose gradient it brings


class GraphedStep:
    """``function(*inputs)``, which runs forward and backward of ``model``, as CUDA graphs.

        step = GraphedStep(forward_backward, model)
        for tokens, targets in batches:
            loss = step(tokens, targets)
            optimizer.step()
            optimizer.zero_grad()

    The first two calls for each kind of inputs run as they are, the third is recorded, and later ones replay it; the
    numbers are the same. ``function`` takes tensors and returns tensors (nested as you like), of which the caller gets
    copies. It must not read the GPU's results on the CPU or decide by them, must leave gradients synchronised, and
    sees no Python of its own run again. After ``follow_measured_times`` nothing is recorded until the plan has settled.
    On CPUs the function is simply called.

    Recordings hold their activations in a memory pool of their own, which all of them share. Raises ``ValueError`` for
    a model that is not sharded.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        if not isinstance(model, FSDPModule):
            raise ValueError(f"GraphedStep expects a module that fully_shard returned, found {type(model).__name__}")
        self._function, self._model = function, model
        self._steps: dict[Key, _Step] = {}
        self._calls: Counter[Key] = Counter()
        self._recorder: StepRecorder | None = None

    @property
    def num_recordings(self) -> int:
        return len(self._steps)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        engine = self._model._engine()
        if engine.units[0].device.type != "cuda":
            return self._function(*inputs)
        key = self._key(engine, inputs)
        if key not in self._steps:
            self._calls[key] += 1
            if key[0] is None or self._calls[key] <= NUM_EAGER:
                return self._function(*inputs)
            self._steps[key] = self._record(engine, inputs)
        return self._replay(engine, self._steps[key], inputs)

    def _key(self, engine: Engine, inputs: tuple[torch.Tensor, ...]) -> Key:
        """Its first element is None where steps cannot be recorded as things are."""
        return (engine.repeatable_state(), self._model.training, *((t.shape, t.stride(), t.dtype) for t in inputs))

    def _record(self, engine: Engine, inputs: tuple[torch.Tensor, ...]) -> _Step:
        self._recorder = self._recorder or StepRecorder()
        own = tuple(t.clone() for t in inputs)
        state = engine.repeatable_state()
        engine.join_streams()

        def work() -> Any:
            engine.fork_streams()
            result = self._function(*own)
            engine.join_streams()
            return map_tensors(torch.Tensor.detach, result)

        without = [p for unit in engine.units for p in unit.params if p.trainable and p.sharded.grad is None]
        recording = self._recorder.record(work)
        reduced = [p for p in without if p.sharded.grad is not None]
        engine.after_recording(state, reduced)
        self._forget_other_layouts(engine)
        return _Step(own, recording, reduced)

    def _forget_other_layouts(self, engine: Engine) -> None:
        """Recordings of slots that are no more would never be replayed, and hold memory."""
        self._steps = {key: step for key, step in self._steps.items() if key[0][0] == engine.num_layouts}

    def _replay(self, engine: Engine, step: _Step, inputs: tuple[torch.Tensor, ...]) -> Any:
        for own, given in zip(step.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        engine.join_streams()
        for p in step.reduced:
            p.spare_kept_grad()
        step.recording.replay()
        engine.after_replay(step.reduced)
        return map_tensors(torch.clone, step.recording.result)
