"""One run's training on one rank: batches in, optimizer steps and held-out losses out.

Owns what a step is. Knows nothing of files, checkpoints or the console.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from launch.build import build_optimizer
from launch.config import Config
from launch.gradients import Gradients, Measured, NotFiniteError, where_not_finite
from launch.log import Log
from launch.memory_timeline import MemoryTimeline
from launch.stop_signals import Stopping
from launch.world import World
from yafsdp_like import GraphedStep
from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.data import Batches, PackedText
from yafsdp_like.optim.moments import local
from yafsdp_like.optim.schedule import WarmupCosine

MAX_SKIPPED_STEPS = 10  # steps one after the other: then it is not the batch


class Trainer:
    """A sharded model, its optimizer, and how far both have come.

    [Note: judged late]
    Whether a step's gradients were finite, and whether a signal has stopped a rank, is known on the device. On a GPU
    it is read when the next step has been issued, so that the device never waits; or at once, before the update, where
    steps are to be skipped. `settle` reads what is left, before anything is logged or saved: so a bad update may have
    been made, and is never in a checkpoint.
    """

    def __init__(
        self, options: Config, world: World, corpus: PackedText, model: Any, stopping: Stopping | None = None
    ) -> None:
        self.options, self.world, self.corpus, self.model = options, world, corpus, model
        self.stopping = stopping
        self.train_batches = corpus.train_batches(options.seq_len, options.seed)
        self.held_out_batches = corpus.heldout_batches(options.seq_len)
        self.num_accumulated = options.num_accumulated(world.size)
        self.optimizer = build_optimizer(model, options, world)
        rates = options.optimizer
        num_warmup_steps = min(rates.num_warmup_steps, options.num_steps)
        self.rate = WarmupCosine(rates.lr, num_warmup_steps, options.num_steps, rates.final_lr_ratio)
        self.micro_step = GraphedStep(self._micro_step, model) if options.model.graph else self._micro_step
        self.gradients = Gradients(model, self.optimizer, rates.max_grad_norm, world, rates.update_in_backward)
        watches = options.log.memory and world.is_first
        self.memory = MemoryTimeline(model, self.optimizer, world.device) if watches else None
        self.step = 0  # optimizer steps done
        self.position = 0  # sequences of the training text seen by all ranks together
        self.stops = False  # all ranks are to stop after this step
        self._judges_late = world.device.type == "cuda" and options.optimizer.nonfinite == "stop"
        self._unread: Measured | None = None
        self._num_skipped = 0  # one after the other

    def train_step(self, log: Log) -> None:
        """One optimizer step over one global batch. `NotFiniteError`, on all ranks, as the options say."""
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(self.train_batches, self.position)
        log.timeline.end("data")
        loss = self._forward_backward(*batch)
        log.timeline.end("forward_backward")
        if self.memory is not None:
            self.memory.end("backward")
        asked = self.stopping is not None and self.stopping.asked is not None
        measured = self.gradients.finish(self.step + 1, asked)
        before, self._unread = self._unread, measured
        if not self._judges_late:
            self.settle()
        elif before is not None:
            self._judge(before)
        if self._num_skipped == 0:
            self.optimizer.step()
        if self.memory is not None:
            self.memory.end("update")
        self.optimizer.zero_grad()
        log.timeline.end("optimizer")
        self.step += 1
        self.position += self.options.global_batch_size
        log.add(self.step, loss, measured.norm, rate)

    def close(self) -> None:
        """Free what was recorded, for which the end of a process group would wait."""
        if isinstance(self.micro_step, GraphedStep):
            self.micro_step.close()

    def settle(self) -> None:
        """Read what no one has read yet. `NotFiniteError` if a step was not what it should be."""
        unread, self._unread = self._unread, None
        if unread is not None:
            self._judge(unread)

    def _judge(self, measured: Measured) -> None:
        """See [Note: judged late]."""
        norm, stops = measured.read()
        self.stops = self.stops or stops
        if math.isfinite(norm):
            self._num_skipped = 0
            return
        where = where_not_finite(measured.names, measured.norms) or "no single parameter: the sum is too large"
        words = f"step {measured.step}: the gradient is not finite (norm {norm}), the first is that of {where}"
        self._num_skipped += 1
        if self.options.optimizer.nonfinite == "stop":
            raise NotFiniteError(
                f"{words}; this step is in no checkpoint. A lower optimizer.lr may help, or "
                "--optimizer.nonfinite=skip, which leaves such steps out"
            )
        if self._num_skipped > MAX_SKIPPED_STEPS:
            raise NotFiniteError(f"{words}, after {MAX_SKIPPED_STEPS} steps that were skipped for it")
        if self.world.is_first:
            print(f"{words}: skipped", flush=True)

    def check_weights(self) -> None:
        """`NotFiniteError`, on all ranks, if an update has left weights that are not finite."""
        named = [(name, local(param.detach())) for name, param in self.model.named_parameters()]
        largest = [torch.linalg.vector_norm(part, float("inf")) if part.numel() else part.sum() for _, part in named]
        where = where_not_finite([name for name, _ in named], largest)
        if where is not None:
            raise NotFiniteError(
                f"step {self.step}: the weights are not finite, the first are those of {where}; they are not saved"
            )

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """The mean loss over the first `num_batches` global batches of the held-out text; None if stopped."""
        self.model.eval()
        total = torch.zeros((), device=self.world.device)
        num_batches = self.options.evaluation.num_batches
        for batch_index in range(num_batches):
            if self._is_stopped():
                break
            batch = self._batch(self.held_out_batches, batch_index * self.options.global_batch_size)
            for micro in self._micro_batches(*batch):
                total += self.model(*micro) / self.num_accumulated / num_batches
        self.model.train()
        return None if self.stops else self.world.mean(total).item()

    def _is_stopped(self) -> bool:
        """Whether a signal has stopped any rank by now, between two batches of an evaluation."""
        if self.stopping is not None and not self.stops:
            self.stops = any(all_gather_object(self.stopping.asked is not None))
        return self.stops

    def _forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Gradients of this rank's rows (B, T), reduced over ranks; the rows' mean loss."""
        total = torch.zeros((), device=self.world.device)
        for index, micro in enumerate(self._micro_batches(tokens, targets), 1):
            if self.options.optimizer.update_in_backward:
                self.model.set_is_last_backward(index == self.num_accumulated)
            total += self.micro_step(*micro)
        return total

    def _micro_step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(tokens, targets) / self.num_accumulated
        if self.memory is not None and not self.options.model.graph:  # a recording replays nothing of Python's
            self.memory.end("forward")
        loss.backward()
        detached: Tensor = loss.detach()
        return detached

    def _micro_batches(self, tokens: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = len(tokens) // self.num_accumulated
        return list(zip(tokens.split(size), targets.split(size), strict=True))

    def _batch(self, batches: Batches, position: int) -> list[Tensor]:
        """Tokens and targets (B, T): this rank's rows of the global batch at `position`."""
        world = self.world
        pair = batches.batch(position, self.options.global_batch_size, world.rank, world.size)
        if world.device.type == "cuda":
            return [rows.pin_memory().to(world.device, non_blocking=True) for rows in pair]
        return list(pair)
