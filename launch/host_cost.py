"""What the CPU takes for eager steps: tiny decoders, sharded and plain, whose kernels take the device next to no time.

The difference between many blocks and few, per block, is what a block costs the CPU; and the difference of that between
sharded and plain is what its unit costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from launch.world import World
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.optim import AdamW

FEW, MANY = 4, 12  # blocks
WARMUP, STEPS = 1, 10
PHASES = ("forward", "backward", "update")


class HostSteps:
    """One decoder and what a training step calls of it."""

    def __init__(self, num_layers: int, world: World, is_sharded: bool, transport: Any = "auto") -> None:
        config = DecoderConfig(16, num_layers, 2, 1, 32, vocab_size=64)
        self.model = Decoder(config) if is_sharded else Decoder(config).to(world.device, torch.bfloat16)
        self.optimizer = None
        if is_sharded:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for module in (*self.model.layers, self.model):
                fully_shard(module, mesh=world.mesh, mp_policy=policy, transport=transport)
            self.model.to_empty(device=world.device)
            self.model.init_weights()
            self.optimizer = AdamW(self.model.parameters())
        self._batch = torch.zeros(2, 1, 4, dtype=torch.int64, device=world.device)
        self._loss = torch.zeros(())

    def forward(self) -> None:
        """Compute the loss."""
        self._loss = self.model(*self._batch)

    def backward(self) -> None:
        """Compute gradients."""
        self._loss.backward()
        self._loss = self._loss.detach()

    def update(self) -> None:
        """Apply and clear them."""
        apply_and_clear(self.model, self.optimizer)

    def run(self, number: int) -> None:
        """Run whole steps."""
        for _ in range(number):
            for phase in PHASES:
                getattr(self, phase)()


def apply_and_clear(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Apply and clear the gradients; without an optimizer, zero them in place."""
    if optimizer is None:
        model.zero_grad(set_to_none=False)
    else:
        optimizer.step()
        optimizer.zero_grad()


class CountedOperations(TorchDispatchMode):
    """Counts torch's operations while it is entered, and those among them that are no views."""

    num_calls = 0
    num_kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Count one, and run it."""
        self.num_calls += 1
        self.num_kernels += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class EagerCost:
    """Seconds of the CPU, in forward and backward together."""

    operation: float  # one torch operation that is no view, and its share of views, autograd and the module's Python
    unit: float  # the sharding of one unit


def eager_cost(world: World) -> EagerCost:
    """Measure what forwards and backwards take of the CPU; called by all ranks together."""
    seconds = {}
    num_operations = 0
    for is_sharded in (False, True):
        found = {number: HostSteps(number, world, is_sharded) for number in (FEW, MANY)}
        times = {number: _median_seconds(steps, world) for number, steps in found.items()}
        seconds[is_sharded] = max(0.0, times[MANY] - times[FEW]) / (MANY - FEW)
        if not is_sharded:
            counts = {number: _num_operations(steps) for number, steps in found.items()}
            num_operations = (counts[MANY] - counts[FEW]) // (MANY - FEW)
    return EagerCost(seconds[False] / max(1, num_operations), max(0.0, seconds[True] - seconds[False]))


def _median_seconds(steps: HostSteps, world: World) -> float:
    times = []
    for number in range(WARMUP + STEPS):
        if steps.optimizer is not None:
            steps.optimizer.zero_grad()
        world.synchronize()
        begin = time.perf_counter()
        steps.forward()
        steps.backward()
        if number >= WARMUP:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _num_operations(steps: HostSteps) -> int:
    with CountedOperations() as counted, torch.autograd.set_multithreading_enabled(False):
        steps.forward()
        steps.backward()
    return counted.num_kernels
