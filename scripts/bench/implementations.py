"""The list of implementations by the name that `--impl` takes; to add one, write a function that builds a `Trainee`.

A name of ours may be followed by keywords of this package's `AdamW` and `fully_shard`: `ours:moments=bf16`, several
joined by `+`. What AdamW does not know goes to `fully_shard`, but for `in_backward=True`, which updates in backward
(with `--clip 0`), and `clip_in_update=False`, which clips before the update and not in it.
"""

import ast
import dataclasses
import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed.fsdp

import yafsdp_like
from bench import zero3
from bench.dtypes import DTYPES
from bench.options import Options
from bench.subjects import Model
from bench.trainee import Graphed, Implementation, PlainGraph, Trainee, materialized, new_model
from launch.world import World
from yafsdp_like.optim import AdamW


def build_unsharded(options: Options, world: World) -> Trainee:
    """The floor: no communication, no optimizer."""
    model = new_model(options, world).to(torch.bfloat16)
    return Trainee(materialized(model, world), optimizer=None)


def build_ours(
    options: Options, world: World, in_backward: bool = False, clip_in_update: bool = True, **keywords: Any
) -> Trainee:
    """Shard by this package; its AdamW with `--optimizer fused` or keywords for it, torch's fused AdamW otherwise."""
    known = inspect.signature(AdamW).parameters
    of_adamw = {key: value for key, value in keywords.items() if key in known}
    of_shard = {key: value for key, value in keywords.items() if key not in known}
    if "grad_dtype" in of_shard:
        of_shard["grad_dtype"] = DTYPES[of_shard["grad_dtype"]]
    model = fully_sharded(yafsdp_like, options, world, **of_shard)
    if options.optimizer == "torch" and not of_adamw and not in_backward and "grad_dtype" not in of_shard:
        return Trainee(model, torch_adamw(model, options))
    optimizer = AdamW(model.parameters(), lr=options.lr, **of_adamw)
    if in_backward:
        yafsdp_like.update_in_backward(optimizer)
    return Trainee(model, optimizer, may_clip_in_update=clip_in_update)


def build_ours_graphed(options: Options, world: World, **keywords: Any) -> Trainee:
    """Forward and backward as one CUDA graph."""
    plain = build_ours(options, world, **keywords)
    step = yafsdp_like.GraphedStep(plain.forward_backward, plain.model)
    return Graphed(plain.model, plain.optimizer, step, may_clip_in_update=plain.may_clip_in_update)


def build_unsharded_graphed(options: Options, world: World) -> Trainee:
    """What is left of the floor when the CPU costs nothing."""
    plain = build_unsharded(options, world)
    return Graphed(plain.model, None, PlainGraph(plain.forward_backward))


def build_fsdp2(options: Options, world: World) -> Trainee:
    """Shard by PyTorch's `fully_shard`, updated by torch's fused AdamW."""
    model = fully_sharded(torch.distributed.fsdp, options, world)
    return Trainee(model, torch_adamw(model, options))


def fully_sharded(runtime: Any, options: Options, world: World, **keywords: Any) -> Model:
    """Shard each block, then the root, with the `fully_shard` of a module that has FSDP2's names."""
    policy = runtime.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=DTYPES[options.reduce_dtype])
    model = new_model(options, world)
    for module in (*model.layers, model):
        runtime.fully_shard(module, mesh=world.mesh, mp_policy=policy, **keywords)
    return materialized(model, world)


def torch_adamw(model: torch.nn.Module, options: Options) -> torch.optim.Optimizer:
    """Return torch's fused AdamW over all parameters of a model."""
    return torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)


IMPLEMENTATIONS = {
    "unsharded": Implementation(build_unsharded),
    "unsharded-graph": Implementation(build_unsharded_graphed),
    "ours": Implementation(build_ours, expandable=True),  # as `fully_shard` has it by itself
    "ours-graph": Implementation(build_ours_graphed, expandable=True),
    "ours-nccl": Implementation(partial(build_ours, transport="process_group"), expandable=True),
    "ours-segments": Implementation(build_ours),
    "fsdp2": Implementation(build_fsdp2),
    "fsdp2-expandable": Implementation(build_fsdp2, expandable=True),
    "deepspeed": Implementation(zero3.build, zero3.obstacle),
    "deepspeed-blocks": Implementation(partial(zero3.build, whole_blocks=True), zero3.obstacle),
}


def implementation(name: str) -> Implementation:
    """Return what a name stands for, with the keywords behind it: Python literals, or words."""
    known, _, settings = name.partition(":")
    found = IMPLEMENTATIONS[known]
    pairs = [setting.split("=", 1) for setting in settings.split("+") if setting]
    keywords = {key: literal(value) for key, value in pairs}
    return dataclasses.replace(found, build=partial(found.build, **keywords)) if keywords else found


def literal(text: str) -> Any:
    """Return a Python literal's value; any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
