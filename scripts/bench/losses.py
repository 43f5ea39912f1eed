"""Losses of every implementation on the same text, and how far they may be apart.

Sums of floating-point numbers depend on their order, so that two correct runtimes need not agree to the bit. How much
that is worth is measured, not assumed: the reference is trained again and again, each time with the sequences of every
global batch dealt to the ranks and their rows in another order. The mean over the batch is the same number, and so
are the gradients, but the products inside a rank and the sums between ranks add in another order. (Seeds of a
collective's own order would show nothing here: two ranks have one sum, and a + b is b + a.) The spread is the most by
which any two of these runs differ at a step.
"""

import itertools
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.options import REFERENCE, Options
from bench.ranks import gathered
from bench.report import Row
from bench.trainee import Trainee
from launch.world import World
from yafsdp_like.data import Batches, TextSource

Deal = Callable[[int], Tensor]  # a step's index to the order of its global batch's rows, (W * B,)


def text_batches(options: Options, world: World, seq_len: int) -> Batches:
    """The carried text as bytes, as much as the steps need: every model's vocabulary holds 256 tokens."""
    num_tokens = options.losses * options.batch_sizes[0] * world.size * seq_len + 1
    characters = itertools.chain.from_iterable(TextSource().documents())
    text = "".join(itertools.islice(characters, num_tokens)).encode()  # a character is at least a byte
    return Batches(np.frombuffer(text[:num_tokens], np.uint8), seq_len, name="the carried text")


def dealt(seed: int, num_rows: int) -> Deal:
    """Rows in another order at every step; seed 0 leaves them as they are."""

    def deal(step_index: int) -> Tensor:
        if seed == 0:
            return torch.arange(num_rows)
        return torch.randperm(num_rows, generator=torch.Generator().manual_seed(1_000_003 * seed + step_index))

    return deal


def train(trainee: Trainee, options: Options, world: World, batches: Batches, seed: int) -> list[float]:
    """The loss at each step, over the global batch, while `trainee` trains on it."""
    num_rows = options.batch_sizes[0] * world.size
    deal = dealt(seed, num_rows)
    mine = slice(world.rank * options.batch_sizes[0], (world.rank + 1) * options.batch_sizes[0])
    losses = []
    for step_index in range(options.losses):
        rows = deal(step_index)[mine]
        tokens, targets = batches.batch(step_index * num_rows, num_rows)
        loss = trainee.forward_backward(tokens[rows].to(world.device), targets[rows].to(world.device))
        trainee.update()
        losses.append(loss.to(torch.float64, copy=True))
    ranks = gathered(torch.stack(losses).tolist(), world)
    return [statistics.fmean(step) for step in zip(*ranks, strict=True)]


def compare(per_step: dict[str, list[float]]) -> Row:
    """What goes into the report."""
    differences = {label: largest_difference(label, per_step) for label in per_step}
    return {"per_step": per_step, "largest_difference": differences, "spread": spread(per_step)}


def reordered(seed: int) -> str:
    """The label of the reference with its sums in another order."""
    return f"{REFERENCE} reordered {seed}"


def largest_difference(label: str, per_step: dict[str, list[float]]) -> float | None:
    """Over steps, from the reference; None where that ran out of memory."""
    if REFERENCE not in per_step:
        return None
    return _difference(per_step[label], per_step[REFERENCE])


def spread(per_step: dict[str, list[float]]) -> float | None:
    """The largest difference between any two orders of the reference's sums; None where fewer than two ran."""
    orders = [losses for label, losses in per_step.items() if label.startswith(REFERENCE)]
    return max((_difference(a, b) for a, b in itertools.combinations(orders, 2)), default=None)


def _difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def describe(label: str, per_step: dict[str, list[float]]) -> str:
    """One implementation's losses, and how far they are from the reference's if that came before."""
    if label not in per_step:
        return f"losses {label}: OOM"
    values = ", ".join(f"{loss:.6f}" for loss in per_step[label])
    difference = largest_difference(label, per_step)
    return f"losses {label}: {values}" + ("" if difference is None else f"; up to {difference:.3e} from {REFERENCE}")
