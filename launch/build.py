"""From a recipe to a sharded model and its optimizer.

Owns how a model is cut into units, and which parameters decay. Knows nothing of data or steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed._composable.checkpoint_activation import checkpoint

from launch.config import Config, ModelOptions, OptimizerOptions
from launch.recipe import Recipe
from launch.world import World
from yafsdp_like import (
    MixedPrecisionPolicy,
    OffloadPolicy,
    RemainderOffloadPolicy,
    fully_shard,
    offload_activations,
    update_in_backward,
)
from yafsdp_like.hardware import Hardware
from yafsdp_like.memory.plan import readable
from yafsdp_like.models import DecoderConfig
from yafsdp_like.optim import AdamW
from yafsdp_like.optim import moments as optim_moments
from yafsdp_like.optim.moments import MomentsFormat
from yafsdp_like.optim.offload import NUM_BUFFERS, buffer_nbytes
from yafsdp_like.shard.runtime.activation_offload import activations_of


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
        offload_policy=RemainderOffloadPolicy() if _offloads_remainder(config.optimizer) else OffloadPolicy(),
        grad_dtype=None if config.precision.grad_dtype == "float32" else torch.bfloat16,
    )
    model, blocks = recipe.make()
    checkpoint_blocks(blocks, config.model)
    for block in blocks:
        if config.model.compile:
            block.compile(dynamic=False)
        shard(block)
    if config.model.offload_activations:
        offload_activations(blocks)
    return shard(model)


def _offloads_remainder(options: OptimizerOptions) -> bool:
    return options.offload_moments == "and_remainder"


def checkpoint_blocks(blocks: Sequence[torch.nn.Module], options: ModelOptions) -> None:
    """Let blocks keep only their inputs for backward, where the options say so; our decoders draw no random numbers."""
    for block in blocks if options.checkpoint_activations else ():
        checkpoint(block, preserve_rng_state=options.factory is not None)


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
    own = options.offload_moments or options.update_in_backward
    if world.device.type != "cuda" and as_torch and not own:
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    optimizer = AdamW(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        moments=options.moments,
        seed=config.seed,
        offload_moments=bool(options.offload_moments),
    )
    if options.update_in_backward:
        update_in_backward(optimizer)
    return optimizer


def moments_nbytes(model: torch.nn.Module, world: World, moments: MomentsFormat, saved: bool = False) -> int:
    """Of AdamW on the rank that has most: two values per trainable element, as kept or as a checkpoint has them."""
    return sum(optim_moments.moments_nbytes(*rows, moments, saved) for rows in _trained_rows(model, world))


def values_nbytes(model: torch.nn.Module, world: World) -> int:
    """Of all parameters on the rank that has most, as a checkpoint has them: values, also of split masters."""
    return sum(rows.numel() * dtype.itemsize for rows, dtype in _rows(model.parameters(), world))


def buffers_nbytes(model: Any, world: World, options: OptimizerOptions) -> int:
    """Of AdamW on the device, on the rank that has most: what offloaded states go through; 0 for others."""
    if not options.offload_moments:
        return 0
    remainders = model.memory_plan().nbytes_of("remainder")
    return NUM_BUFFERS * buffer_nbytes(_trained_rows(model, world), options.moments, remainders)


def _trained_rows(model: torch.nn.Module, world: World) -> list[tuple[torch.Size, torch.dtype]]:
    return _rows((p for p in model.parameters() if p.requires_grad), world)


def _rows(params: Iterable[torch.nn.Parameter], world: World) -> list[tuple[torch.Size, torch.dtype]]:
    """The shapes of the rows of the rank that has most of them, and their dtypes."""
    return [(torch.Size((-(-p.shape[0] // world.size), *p.shape[1:])), p.dtype) for p in params]


def describe_plan(model: Any, world: World, options: OptimizerOptions) -> str:
    """The memory plan, AdamW's moments beside it, and what every update pays for them if they are offloaded."""
    nbytes, regions = moments_nbytes(model, world, options.moments), model.memory_plan()
    plan, remainders = str(regions), regions.nbytes_of("remainder")
    if options.update_in_backward:
        plan += "\n  updates in backward: gradients of one unit or two have memory at a time"
    if not options.offload_moments:
        return f"{plan}\n  AdamW's moments, {readable(nbytes)}, and activations come on top"
    return (
        f"{plan}\n  AdamW's moments, {readable(nbytes)}, are in host memory; each update copies them in and back, "
        f"{'with the remainders, ' if remainders else ''}{_cost(nbytes + remainders, world)}\n"
        f"  buffers for them, {readable(buffers_nbytes(model, world, options))}, and activations come on top"
    )


def describe_activations(model: Any, num_done: int, world: World) -> str:
    """After the second step of a run, what offloaded activations cost in it; "" at other times, or without any."""
    found = activations_of(model) if num_done <= 2 else None
    if found is None:
        return ""
    if num_done < 2:
        found.measure()
        return ""
    nbytes = found.copied_nbytes // num_done
    return (
        f"activations take {readable(found.host_nbytes)} of host memory; each step copies {readable(nbytes)} there in "
        f"forward and back in backward, {_cost(nbytes, world)} each way; compute has waited "
        f"{found.exposed_seconds() * 1e3:.1f} ms for that in the last one"
    )


def _cost(nbytes: int, world: World) -> str:
    """Return how long the link to the host takes for ``nbytes`` in one direction."""
    hardware = Hardware.of(world.device)
    if hardware is None or hardware.rates is None:
        return "as long as the link takes"
    rate = hardware.rates.host_nbytes
    return f"at least {nbytes / rate * 1e3:.0f} ms at {rate / 1e9:.1f} GB/s"


def flops_per_step(model: Any, config: Config) -> int | None:
    """Floating-point operations of one optimizer step over all ranks, by the model's formula; None without one."""
    formula = getattr(model, "config", None)
    if not isinstance(formula, DecoderConfig):
        return None
    return formula.train_flops(config.global_batch_size, config.seq_len)
