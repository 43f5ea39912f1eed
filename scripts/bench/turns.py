"""One implementation at a time: built when its turn comes, and freed before the next."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from bench.allocator import release_cached_memory, set_expandable_segments
from bench.implementations import implementation
from bench.options import Options
from bench.ranks import gathered, say, unless_out_of_memory
from bench.trainee import Trainee
from launch.world import World

Turn = tuple[str, Options]  # an implementation's name, and options that name one way of checkpointing


def possible(options: Options, world: World) -> list[str]:
    """Return the implementations that every rank can build; of each other one a line says why it is left out."""
    names = []
    for name in options.impls:
        obstacles = [obstacle for obstacle in gathered(implementation(name).obstacle(world), world) if obstacle]
        if obstacles:
            say(world, f"{name} is left out: {obstacles[0]}")
        else:
            names.append(name)
    return names


def turns(names: Sequence[str], options: Options) -> list[Turn]:
    """Return each implementation with each way of checkpointing."""
    ways = [dataclasses.replace(options, checkpointing=(way,)) for way in options.checkpointing]
    return [(name, one) for one in ways for name in names]


@contextmanager
def built(name: str, options: Options, world: World) -> Iterator[Trainee | None]:
    """Yield a trainee, on an allocator that grows as it wants; None on every rank if it does not fit on one."""
    chosen = implementation(name)
    set_expandable_segments(chosen.expandable, world)
    trainee = unless_out_of_memory(partial(chosen.build, options, world), world)
    try:
        yield trainee
    finally:
        if trainee is not None:
            trainee.close()


def forget(world: World) -> None:
    """Free what the last implementation left, compiled code and cuBLAS's workspaces included.

    Not before it is gone: its CUDA graphs have these workspaces' addresses.
    """
    torch.compiler.reset()
    if world.device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    release_cached_memory(world)
