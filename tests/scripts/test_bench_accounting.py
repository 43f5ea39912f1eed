"""What memory holds at a step's peak, by category, and how the benchmark counts it."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bench import accounting, allocator, turns
from bench.accounting import account, category_of, events_of, replay, update_nbytes, with_rest
from bench.implementations import IMPLEMENTATIONS, implementation
from bench.measure import make_batch
from bench.options import Shape, parse_options
from launch.world import World
from tests.ranks import run_ranks
from tests.training import world_mesh
from yafsdp_like.memory.allocator import use_expandable_segments
from yafsdp_like.models import PRESETS

FSDP = "torch/distributed/fsdp/_fully_shard/"
NUM_PARAMS = PRESETS["tiny"].num_params
ON_GPU = World(0, torch.device("cuda", 0), mock.Mock())


def accounted(name: str) -> dict[str, Any]:
    """The account of an implementation's third step on this worker's CPU."""
    world = World(dist.get_rank(), torch.device("cpu"), world_mesh())
    return third_step(name, "tiny", Shape(1, 16), world)


def third_step(name: str, model: str, shape: Shape, world: World) -> dict[str, Any]:
    arguments = ["--device", world.device.type, "--model", model, "--num-layers", "2", "--impl", name]
    options = parse_options(arguments, IMPLEMENTATIONS)
    trainee = implementation(name).build(options, world)
    batch = make_batch(options, world, shape)
    for _ in range(2):
        trainee.forward_backward(*batch)
        trainee.update()
    return account(trainee, batch, options.clip, world)


def test_fsdp2_holds_its_main_shards_and_moments_between_steps() -> None:
    here = run_ranks(accounted, "fsdp2")[0]
    (peak,) = here["peaks"]
    main = peak["main shards"] * 2**30
    assert main == NUM_PARAMS * 4 / 2  # every dimension of the tiny model is even
    assert peak["moments"] * 2**30 == pytest.approx(2 * main, rel=1e-3)  # and the steps' counters
    assert peak["gradients"] == peak["slots"] == peak["staging"] == 0
    assert here["update_nbytes"] == pytest.approx(main + 2 * main + 4 * main, rel=1e-3)  # gradients: read once


def test_this_packages_bytes_are_those_of_its_plan() -> None:
    here = run_ranks(accounted, "ours")[0]
    (peak,) = here["peaks"]
    least = NUM_PARAMS / 2 / 2**30
    assert 4 * least <= peak["main shards"] < 5 * least
    assert 2 * least <= peak["compute shards"] < 3 * least
    assert peak["gradients"] == 0  # between steps
    assert peak["slots"] > 0
    moved = {name: peak[name] * 2**30 for name in accounting.CATEGORIES}
    moved["gradients"] = moved["main shards"]  # but for what aligns these
    assert here["update_nbytes"] == pytest.approx(update_nbytes(moved), rel=0.02)


def test_an_update_reads_the_compute_shard_where_it_is_half_of_the_master() -> None:
    held = dict.fromkeys(accounting.CATEGORIES, 0) | {"moments": 8, "gradients": 4, "compute shards": 2}
    assert update_nbytes(held | {"main shards": 4}) == 8 + 16 + 4 + 2
    assert update_nbytes(held | {"main shards": 2}) == 4 + 16 + 4 + 4


@pytest.mark.parametrize(("setting", "num_reads"), [("", 2), ("+clip_in_update=False", 1)])
def test_an_update_that_clips_reads_gradients_twice(setting: str, num_reads: int) -> None:
    """In the account and in the trainee: what is timed as clipping is then nothing but a setting."""
    here = run_ranks(accounted, f"ours:seed=0{setting}")[0]
    held = {name: here["peaks"][0][name] * 2**30 for name in accounting.CATEGORIES} | {"gradients": 0}
    gradients = here["update_nbytes"] - update_nbytes(held)
    assert gradients == pytest.approx(num_reads * held["main shards"], rel=0.02)


def test_a_block_is_told_by_the_frames_that_asked_for_it() -> None:
    assert category_of([]) == "activations"
    assert category_of([{"filename": "decoder.py", "name": "forward"}]) == "activations"
    assert category_of([{"filename": f"{FSDP}_fsdp_collectives.py", "name": "foreach_all_gather"}]) == "slots"
    frames = [{"filename": "_tensor.py", "name": "to"}, {"filename": f"{FSDP}a.py", "name": "foreach_reduce"}]
    assert category_of(frames) == "staging"


def event(time_us: float, action: str, addr: int, size: int, *filenames: str) -> dict[str, Any]:
    frames = [{"filename": name, "name": "foreach_reduce"} for name in filenames]
    return {"time_us": time_us, "action": action, "addr": addr, "size": size, "frames": frames}


def test_a_replayed_step_tells_gradients_from_what_had_their_address_before() -> None:
    trace = [
        event(1, "alloc", 100, 7),
        event(2, "alloc", 200, 5),
        event(3, "free_requested", 100, 7),
        event(3.5, "free_completed", 100, 7),
        event(11, "alloc", 100, 4, FSDP),  # becomes a gradient
        event(12, "alloc", 300, 2, FSDP),  # input of its reduction
        event(13, "free_requested", 200, 5),
        event(14, "free_requested", 300, 2),
        event(21, "free_requested", 100, 4),
        event(22, "free_requested", 999, 1),  # was there before the step
        event(31, "alloc", 400, 50),  # after the step
    ]
    before = dict.fromkeys(accounting.CATEGORIES, 0) | {"main shards": 10}
    events = events_of(trace, [("forward", 10), ("backward", 20), ("update", 30)])
    peaks = replay(events, {"backward": {100}}, before)
    found = {phase: {name: n for name, n in peak.items() if n} for phase, peak in peaks.items()}
    assert found == {
        "forward": {"main shards": 10, "activations": 12},
        "backward": {"main shards": 10, "activations": 5, "gradients": 4, "staging": 2},
        "update": {"main shards": 10},
    }


def test_what_no_tensor_has_is_the_caches_or_somebody_elses() -> None:
    peak = dict.fromkeys(accounting.CATEGORIES, 0) | {"main shards": 4 << 30}
    with (
        mock.patch("torch.cuda.max_memory_allocated", return_value=6 << 30),
        mock.patch("torch.cuda.memory_reserved", return_value=8 << 30),
        mock.patch("torch.cuda.mem_get_info", return_value=(1 << 30, 10 << 30)),
    ):
        found = with_rest(peak, 2 << 30, ON_GPU)
    assert found["unused cache"] == 4 and found["other"] == 1  # 6 - 2 allocated of 8 reserved; 9 used


def test_each_implementation_says_how_the_allocator_grows() -> None:
    for name, known in IMPLEMENTATIONS.items():
        with mock.patch("torch._C._accelerator_setAllocatorSettings", create=True) as settings:
            allocator.set_expandable_segments(known.expandable, ON_GPU)
        expected = name in ("ours", "ours-graph", "ours-nccl", "fsdp2-expandable")
        settings.assert_called_once_with(f"expandable_segments:{expected}")


# --- on GPUs ---


@dataclass(frozen=True)
class Counted:
    """What one implementation's accounted step showed on a GPU."""

    account: dict[str, Any]
    peak_gib: float  # that the allocator counted
    beside_gib: float  # of it, what earlier tests have left in this process, and cuBLAS's workspaces
    grew: bool  # whether expandable segments did, while it ran
    grew_behind: bool  # and afterwards, when they were switched off


def on_gpus(name: str) -> Counted:
    world = World(dist.get_rank(), torch.device("cuda", dist.get_rank()), world_mesh("cuda"))
    were_set = use_expandable_segments()
    turns.forget(world)
    left, expandable = torch.cuda.memory_allocated(), expandable_nbytes()
    allocator.set_expandable_segments(IMPLEMENTATIONS[name].expandable, world)
    found = third_step(name, "1b", Shape(1, 1024), world)
    peaks = allocator.memory_since(allocator.allocator_counts(world), 0, world)
    grew = expandable_nbytes() > expandable
    allocator.release_cached_memory(world)  # the trainee is gone, workspaces are not
    with_workspaces = torch.cuda.memory_allocated()
    turns.forget(world)
    beside = left + with_workspaces - torch.cuda.memory_allocated()
    expandable = expandable_nbytes()
    allocator.set_expandable_segments(False, world)
    kept = torch.zeros(1 << 28, device=world.device)
    grew_behind = expandable_nbytes() > expandable
    del kept
    turns.forget(world)
    allocator.set_expandable_segments(were_set, world)  # as later tests of this process expect
    return Counted(found, peaks["peak_allocated_gib"], beside / 2**30, grew, grew_behind)


def expandable_nbytes() -> int:
    """The bytes of all expandable segments, in which earlier tests may have left something too."""
    return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot() if segment["is_expandable"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-expandable"])
def test_categories_add_up_to_what_the_allocator_counts(name: str) -> None:
    counted = run_ranks(on_gpus, name, device="cuda", timeout=120)[0]
    assert counted.grew == name.endswith("-expandable") and not counted.grew_behind
    phases = {peak["phase"]: peak for peak in counted.account["peaks"]}
    assert list(phases) == ["forward", "backward", "update"]
    tensors = {phase: sum(peak[name] for name in accounting.CATEGORIES[:-2]) for phase, peak in phases.items()}
    assert max(tensors.values()) + counted.beside_gib == pytest.approx(counted.peak_gib, rel=0.01), counted
    assert phases["forward"]["gradients"] == 0 < phases["forward"]["slots"]
    assert phases["update"]["gradients"] == pytest.approx(phases["update"]["main shards"], rel=0.01)
    assert all(peak["other"] > 0 for peak in phases.values())
