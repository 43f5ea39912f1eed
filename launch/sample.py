"""Text from the model in training, with its shards where they are.

Every rank runs the same forwards; the first rank's choice of token counts. The whole text is computed anew for each
token: simple, and fast enough for a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from launch.config import SampleOptions
from launch.factory import WithLoss
from launch.world import World


def is_possible(model: Any) -> bool:
    """Whether the model gives logits of tokens alone: one of the user's may give nothing but a loss."""
    return not isinstance(model, WithLoss) or model.gives_logits


@torch.no_grad()
def generate(model: Any, prompt: Sequence[int], options: SampleOptions, context: int, world: World) -> list[int]:
    """`prompt` and `options.num_tokens` more tokens, each drawn from the `top_k` likeliest (1: the likeliest).

    The model sees at most the last `context` tokens.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([list(prompt)], device=world.device)  # (1, T)
    was_training = model.training
    model.eval()
    for _ in range(options.num_tokens):
        logits = model(tokens[:, -context:])[0, -1].float().cpu()  # (V,)
        choice = draw(logits, options, generator).to(world.device)
        if world.size > 1:
            dist.broadcast(choice, 0)
        tokens = torch.cat((tokens, choice.view(1, 1)), dim=1)
    model.train(was_training)
    return [int(token) for token in tokens[0].tolist()]


def draw(logits: torch.Tensor, options: SampleOptions, generator: torch.Generator) -> torch.Tensor:
    """One token (1,) from logits (V,)."""
    values, tokens = logits.topk(min(options.top_k, logits.numel()))  # (k,)
    if options.top_k == 1 or options.temperature == 0:
        return tokens[:1]
    weights = torch.softmax(values / options.temperature, dim=0)
    return tokens[torch.multinomial(weights, 1, generator=generator)]
