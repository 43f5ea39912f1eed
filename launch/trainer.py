"""One run's training on one rank: batches in, optimizer steps and held-out losses out.

Owns what a step is. Knows nothing of files, checkpoints or the console.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launch.build import build_optimizer
from launch.config import Config
from launch.log import Log
from launch.world import World
from yafsdp_like import GraphedStep
from yafsdp_like.data import Batches, PackedText
from yafsdp_like.optim.schedule import WarmupCosine


class Trainer:
    """A sharded model, its optimizer, and how far both have come."""

    def __init__(self, options: Config, world: World, corpus: PackedText, model: Any) -> None:
        self.options, self.world, self.corpus, self.model = options, world, corpus, model
        self.train_batches = corpus.train_batches(options.seq_len, options.seed)
        self.held_out_batches = corpus.heldout_batches(options.seq_len)
        self.num_accumulated = options.num_accumulated(world.size)
        self.optimizer = build_optimizer(model, options, world)
        rates = options.optimizer
        num_warmup_steps = min(rates.num_warmup_steps, options.num_steps)
        self.rate = WarmupCosine(rates.lr, num_warmup_steps, options.num_steps, rates.final_lr_ratio)
        self.micro_step = GraphedStep(self._micro_step, model) if options.model.graph else self._micro_step
        self.step = 0  # optimizer steps done
        self.position = 0  # sequences of the training text seen by all ranks together

    def train_step(self, log: Log) -> None:
        """One optimizer step over one global batch."""
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(self.train_batches, self.position)
        log.timeline.end("data")
        loss = self._forward_backward(*batch)
        log.timeline.end("forward_backward")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        log.timeline.end("optimizer")
        self.step += 1
        self.position += self.options.global_batch_size
        log.add(self.step, loss, norm, rate)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the first `num_batches` global batches of the held-out text."""
        self.model.eval()
        total = torch.zeros((), device=self.world.device)
        num_batches = self.options.evaluation.num_batches
        for batch_index in range(num_batches):
            batch = self._batch(self.held_out_batches, batch_index * self.options.global_batch_size)
            for micro in self._micro_batches(*batch):
                total += self.model(*micro) / self.num_accumulated / num_batches
        self.model.train()
        return self.world.mean(total).item()

    def _forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Gradients of this rank's rows (B, T), reduced over ranks; the rows' mean loss."""
        total = torch.zeros((), device=self.world.device)
        for micro in self._micro_batches(tokens, targets):
            total += self.micro_step(*micro)
        return total

    def _micro_step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(tokens, targets) / self.num_accumulated
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
