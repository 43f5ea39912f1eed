"""The list of implementations by the name that `--impl` takes; to add one, write a function that builds a `Trainee`."""

from functools import partial
from typing import Any

import torch
import torch.distributed.fsdp

import yafsdp_like
from bench import zero3
from bench.options import DTYPES, Options
from bench.trainee import Graphed, Implementation, PlainGraph, Trainee, materialized, meta_model
from launch.world import World
from yafsdp_like.models import Decoder
from yafsdp_like.optim import AdamW


def build_unsharded(options: Options, world: World) -> Trainee:
    """The floor: no communication, no optimizer."""
    model = meta_model(options).to(torch.bfloat16)
    return Trainee(materialized(model, world), optimizer=None)


def build_ours(options: Options, world: World, **transport: str) -> Trainee:
    """Shard by this package; its AdamW with `--optimizer fused`, torch's fused AdamW otherwise."""
    model = fully_sharded(yafsdp_like, options, world, **transport)
    if options.optimizer == "torch":
        return Trainee(model, torch_adamw(model, options))
    return Trainee(model, AdamW(model.parameters(), lr=options.lr))


def build_ours_graphed(options: Options, world: World) -> Trainee:
    """Forward and backward as one CUDA graph."""
    plain = build_ours(options, world)
    return Graphed(plain.model, plain.optimizer, yafsdp_like.GraphedStep(plain.forward_backward, plain.model))


def build_unsharded_graphed(options: Options, world: World) -> Trainee:
    """What is left of the floor when the CPU costs nothing."""
    plain = build_unsharded(options, world)
    return Graphed(plain.model, None, PlainGraph(plain.forward_backward))


def build_fsdp2(options: Options, world: World) -> Trainee:
    """Shard by PyTorch's `fully_shard`, updated by torch's fused AdamW."""
    model = fully_sharded(torch.distributed.fsdp, options, world)
    return Trainee(model, torch_adamw(model, options))


def fully_sharded(runtime: Any, options: Options, world: World, **keywords: str) -> Decoder:
    """Shard each block, then the root, with the `fully_shard` of a module that has FSDP2's names."""
    policy = runtime.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=DTYPES[options.reduce_dtype])
    model = meta_model(options)
    for module in (*model.layers, model):
        runtime.fully_shard(module, mesh=world.mesh, mp_policy=policy, **keywords)
    return materialized(model, world)


def torch_adamw(model: torch.nn.Module, options: Options) -> torch.optim.Optimizer:
    """Return torch's fused AdamW over all parameters of a model."""
    return torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)


IMPLEMENTATIONS = {
    "unsharded": Implementation(build_unsharded),
    "unsharded-graph": Implementation(build_unsharded_graphed),
    "ours": Implementation(build_ours),
    "ours-graph": Implementation(build_ours_graphed),
    "ours-nccl": Implementation(partial(build_ours, transport="process_group")),
    "ours-expandable": Implementation(build_ours, expandable=True),
    "fsdp2": Implementation(build_fsdp2),
    "fsdp2-expandable": Implementation(build_fsdp2, expandable=True),
    "deepspeed": Implementation(zero3.build, zero3.obstacle),
    "deepspeed-blocks": Implementation(partial(zero3.build, whole_blocks=True), zero3.obstacle),
}
