"""Where the bytes are at the peak of a step, by category, and how many of them an update moves.

[Note: how bytes are counted]
What is held between steps is read from its owner: this package's regions from the memory plan, everyone else's main
shards from the parameters, moments from the optimizer's state. What comes and goes inside a step is read from PyTorch's
own record of one step's allocations, replayed to the highest sum of each phase: a block whose address a gradient has
after backward is a gradient; one that FSDP2's own code asked for is a slot (full parameters) or staging (input and
output of reduce-scatter); everything else counts as activations, full gradients of a block among them.
What the allocator has reserved and nobody uses is "unused cache"; what the device counts beyond all that is "other":
the context, cuBLAS's workspaces, NCCL's buffers, other processes.
Under a CUDA graph nothing is asked for in a step: its memory stands under "unused cache".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from bench.allocator import used_nbytes
from bench.trainee import Trainee
from launch.metrics import GIB
from launch.world import World
from yafsdp_like import FSDPModule
from yafsdp_like.optim import AdamW

MAIN, COMPUTE, MOMENTS, GRADIENTS = "main shards", "compute shards", "moments", "gradients"
SLOTS, STAGING, ACTIVATIONS, CACHE, OTHER = "slots", "staging", "activations", "unused cache", "other"
CATEGORIES = (MAIN, COMPUTE, MOMENTS, GRADIENTS, SLOTS, STAGING, ACTIVATIONS, CACHE, OTHER)
OF_KIND = {"main_shard": MAIN, "compute_shard": COMPUTE, "grad_shard": GRADIENTS, "staging": STAGING}  # else: SLOTS
RECORDED_EVENTS = 1 << 20

Nbytes = dict[str, int]  # by category
Record = dict[str, Any]


# --- what is held between steps ---


@torch.no_grad()
def held(trainee: Trainee, world: World) -> Nbytes:
    """Return this rank's bytes by category that live from step to step, and gradients where they exist now."""
    nbytes = dict.fromkeys(CATEGORIES, 0)
    params = list(trainee.model.parameters())
    if isinstance(trainee.model, FSDPModule):  # this package's, not FSDP2's
        regions = trainee.model.memory_plan().regions
        for region in (r for r in regions if not (r.transient or r.on_host)):  # the former are in a step's record
            nbytes[OF_KIND.get(region.kind, SLOTS)] += region.nbytes
    else:
        nbytes[MAIN] = storages_nbytes(params, world)
    nbytes[GRADIENTS] = nbytes[GRADIENTS] or storages_nbytes([p.grad for p in params if p.grad is not None], world)
    if trainee.optimizer is not None:
        states = pytree.tree_leaves(list(trainee.optimizer.state.values()))
        buffers = trainee.optimizer.moment_buffers if isinstance(trainee.optimizer, AdamW) else []
        nbytes[MOMENTS] = storages_nbytes([*states, *buffers], world)  # offloaded ones are not on the device
    return nbytes


def storages_nbytes(values: Iterable[Any], world: World) -> int:
    """Return the bytes of the storages on this rank's device that tensors among `values` have, each counted once."""
    return sum(storages(values, world).values())


@torch.no_grad()
def storages(values: Iterable[Any], world: World) -> dict[int, int]:
    """Return address and bytes of the same storages."""
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    here = [t.untyped_storage() for t in tensors if isinstance(t, Tensor) and t.device == world.device]
    return {storage.data_ptr(): storage.nbytes() for storage in here}


def update_nbytes(nbytes: Nbytes, clips: bool = False) -> int:
    """Return the bytes that an update must read and write, of what is held right before it.

    Gradients are read once, and once more for their norm if it `clips`; main shards and moments read and written,
    compute shards written; read too where they are the upper half of the main value, of which the main shard then is
    no more than the other half.
    """
    is_split = 0 < nbytes[MAIN] <= nbytes[COMPUTE]
    moved = (2 if clips else 1) * nbytes[GRADIENTS] + 2 * nbytes[MAIN] + 2 * nbytes[MOMENTS]
    return moved + (2 if is_split else 1) * nbytes[COMPUTE]


# --- what comes and goes inside a step ---


@dataclass(frozen=True)
class AllocatorEvent:
    """One event of the allocator's record: bytes asked for, or given back."""

    address: int
    nbytes: int  # negative where given back
    phase: str
    category: str


def replay(events: Sequence[AllocatorEvent], gradients: Mapping[str, set[int]], before: Nbytes) -> dict[str, Nbytes]:
    """Return, for each phase, the bytes by category at its highest sum.

    Args:
        events: in the order of the step.
        gradients: for a phase, the addresses that gradients have at its end.
        before: what is held when the step begins.
    """
    owners = gradient_events(events, gradients)
    now, live = dict(before), dict[int, tuple[str, int]]()
    peaks: dict[str, Nbytes] = {}
    for index, event in enumerate(events):
        if event.nbytes > 0:
            live[event.address] = GRADIENTS if index in owners else event.category, event.nbytes
            now[live[event.address][0]] += event.nbytes
        elif event.address in live:
            category, nbytes = live.pop(event.address)
            now[category] -= nbytes
        if event.phase not in peaks or sum(now.values()) > sum(peaks[event.phase].values()):
            peaks[event.phase] = dict(now)
    return peaks


def gradient_events(events: Sequence[AllocatorEvent], gradients: Mapping[str, set[int]]) -> set[int]:
    """Return the indices of the events whose blocks are gradients at the end of a phase: the last at each address."""
    found: set[int] = set()
    for phase, addresses in gradients.items():
        last: dict[int, int] = {}
        behind = [index for index, event in enumerate(events) if event.phase == phase]
        for index, event in enumerate(events[: max(behind, default=-1) + 1]):
            if event.nbytes > 0 and event.address in addresses:
                last[event.address] = index
        found.update(last.values())
    return found


def category_of(frames: Sequence[Record]) -> str:
    """Return what a block is for by the Python frames that asked for it, innermost first; autograd's have none."""
    own = [frame for frame in frames if "_fully_shard" in frame["filename"]]
    if not own:
        return ACTIVATIONS
    return STAGING if any("reduce" in frame["name"] for frame in own) else SLOTS


def events_of(trace: Iterable[Record], phases: Sequence[tuple[str, float]]) -> list[AllocatorEvent]:
    """Return the blocks asked for and given back in a trace; `phases` have the times, in us, at which they end."""
    events = []
    for event in trace:
        phase = next((name for name, end_us in phases if event["time_us"] <= end_us), None)
        if phase is None or event["action"] not in ("alloc", "free_requested"):
            continue
        given_back = event["action"] == "free_requested"
        category = "" if given_back else category_of(event.get("frames", ()))
        events.append(AllocatorEvent(event["addr"], -event["size"] if given_back else event["size"], phase, category))
    return events


# --- one step with its record ---


def account(trainee: Trainee, batch: tuple[Tensor, Tensor], clip: float, world: World) -> Record:
    """Run one step; return its update's bytes, and GiB by category at the highest sum of each of its phases."""
    on_gpu = world.device.type == "cuda"
    before = held(trainee, world)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=RECORDED_EVENTS)
    phases = []
    loss = trainee.forward(*batch)
    phases.append(("forward", time() * 1e6))
    trainee.backward(loss)
    del loss
    phases.append(("backward", time() * 1e6))
    gradients = storages([param.grad for param in trainee.model.parameters()], world)
    held_then = held(trainee, world)
    trainee.clip(clip)
    moved = update_nbytes(held_then, trainee.clips_in_update)
    trainee.update()
    phases.append(("update", time() * 1e6))
    trace: list[Record] = []
    if on_gpu:
        world.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][world.device.index]
        torch.cuda.memory._record_memory_history(None)
    peaks = replay(events_of(trace, phases), {"backward": set(gradients)}, before) or {"between steps": before}
    most = max(sum(peak.values()) for peak in peaks.values())
    rows = [{"phase": name, **with_rest(peak, most - sum(peak.values()), world)} for name, peak in peaks.items()]
    return {"update_nbytes": moved, "peaks": rows}


def with_rest(peak: Nbytes, below_most: int, world: World) -> dict[str, float]:
    """Return GiB by category, with what no tensor has: the allocator's unused cache, and the rest of the device.

    `below_most` is by how many bytes this peak is lower than the step's, which the allocator knows.
    """
    nbytes = dict(peak)
    if world.device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(world.device) - below_most
        nbytes[CACHE] = torch.cuda.memory_reserved(world.device) - allocated
        nbytes[OTHER] = used_nbytes(world) - sum(nbytes.values())
    return {category: count / GIB for category, count in nbytes.items()}
