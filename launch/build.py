"""From a recipe to a sharded model and its optimizer.

Owns how a model is cut into units, and which parameters decay. Knows nothing of data or steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from launch.config import Config
from launch.recipe import Recipe
from launch.world import World
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.memory.plan import readable
from yafsdp_like.models import DecoderConfig
from yafsdp_like.optim import AdamW
from yafsdp_like.optim import moments as optim_moments
from yafsdp_like.optim.moments import MomentsFormat


def build_model(recipe: Recipe, config: Config, world: World) -> Any:
    """The model, sharded block by block; its memory plan can be read, and nothing is allocated for it yet."""
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.precision.param_dtype),
        reduce_dtype=getattr(torch, config.precision.reduce_dtype),
    )
    shard = partial(
        fully_shard,
        mesh=world.mesh,
        mp_policy=policy,
        transport=config.model.transport,
        split_master=config.precision.split_master,
        grad_dtype=None if config.precision.grad_dtype == "float32" else torch.bfloat16,
    )
    model, blocks = recipe.make()
    for block in blocks:
        if config.model.compile:
            block.compile(dynamic=False)
        shard(block)
    return shard(model)


def build_optimizer(model: torch.nn.Module, config: Config, world: World) -> torch.optim.Optimizer:
    """AdamW over the sharded parameters, unit by unit on GPUs; only matrices decay.

    On CPUs torch's own is faster, where it can keep the moments and read the gradients as asked.
    """
    options = config.optimizer
    matrices = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    as_torch = options.moments == "fp32" and config.precision.grad_dtype == "float32"
    if world.device.type != "cuda" and as_torch:
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    moments, seed = options.moments, config.seed
    return AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, moments=moments, seed=seed)


def moments_nbytes(model: torch.nn.Module, world: World, moments: MomentsFormat, saved: bool = False) -> int:
    """Of AdamW on the rank that has most: two values per trainable element, as kept or as a checkpoint has them."""
    rows = (
        (torch.Size((-(-p.shape[0] // world.size), *p.shape[1:])), p) for p in model.parameters() if p.requires_grad
    )
    return sum(optim_moments.moments_nbytes(shape, p.dtype, moments, saved) for shape, p in rows)


def describe_plan(model: Any, world: World, moments_format: MomentsFormat) -> str:
    """The memory plan, and AdamW's moments beside it."""
    moments = readable(moments_nbytes(model, world, moments_format))
    return f"{model.memory_plan()}\n  AdamW's moments, {moments}, and activations come on top"


def flops_per_step(model: Any, config: Config) -> int | None:
    """Floating-point operations of one optimizer step over all ranks, by the model's formula; None without one."""
    formula = getattr(model, "config", None)
    if not isinstance(formula, DecoderConfig):
        return None
    return formula.train_flops(config.global_batch_size, config.seq_len)
