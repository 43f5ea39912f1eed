"""Moments in host memory: the bits of moments on the device, states and checkpoints as ever, copies in order of events.

Runs natively where there is a GPU; on a CPU the host's memory and the device's are the same, and all else is as there.
"""

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from tests.clocks import RaceDetector, VectorClocks
from tests.kernels.test_kernels import DEVICE
from tests.optim.test_moments import groups, model, same, saved_moments, sharded, train
from tests.optim.test_optim import on_two_ranks, pickled
from tests.ranks import on_ranks, run_ranks
from tests.shard.test_gpu import batch, sharded_decoder
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.streams import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE
from yafsdp_like.ops.split_master import SplitTensor
from yafsdp_like.optim import AdamW, Passes, offload
from yafsdp_like.optim.moments import FORMATS, MOMENTS, local, moments_nbytes

CPU = torch.device("cpu")
on_one_rank = on_ranks(world_size=1)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; one is enough")


@pytest.fixture(params=[1024, 1 << 20], ids=["cut", "whole"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are smaller than most parameters, and some that hold all of them."""
    monkeypatch.setattr(offload, "CHUNK_NBYTES", request.param)


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "CHUNK_NBYTES", 1024)


def adamw(module: nn.Module, moments: str = "fp32", offload_moments: bool = True) -> AdamW:
    optimizer = AdamW(groups(module), lr=1e-2, moments=moments, seed=3, offload_moments=offload_moments)
    optimizer.passes = Passes(batches=[list(layer.parameters()) for layer in list(module)[:2]])
    return optimizer


# --- the same bits ---


@pytest.mark.parametrize("moments", FORMATS)
@pytest.mark.usefixtures("_chunks")
def test_updates_have_the_bits_of_moments_on_the_device(moments: str) -> None:
    ours, theirs = model(), model()
    optimizers = adamw(ours, moments), adamw(theirs, moments, offload_moments=False)
    for module, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(module, optimizer)
    assert same(ours, optimizers[0], theirs, optimizers[1])
    for state in optimizers[0].state.values():
        assert {state[name].device for name in MOMENTS} == {CPU}


@pytest.mark.usefixtures("_chunks")
def test_parameters_that_get_their_first_gradients_later_or_none_for_a_while_are_updated_alike() -> None:
    modules = model(), model()
    optimizers = [adamw(module, "bf16", offloaded) for module, offloaded in zip(modules, (True, False), strict=True)]
    for module, optimizer in zip(modules, optimizers, strict=True):
        for step, idle in enumerate(([0, 1], [2], [1, 2], [])):
            for index, layer in enumerate(module):
                layer.requires_grad_(not (step == 0 and index in idle))
            train_some(module, optimizer, step, idle)
    assert same(modules[0], optimizers[0], modules[1], optimizers[1])


def train_some(module: nn.Module, optimizer: AdamW, step: int, idle: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(step)
    for index, layer in enumerate(module):
        for param in layer.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.device)
            param.grad = None if index in idle else grad
    optimizer.step()


def test_states_that_are_emptied_begin_with_zeros() -> None:
    """Prevents: moments of an earlier training, which are still in host memory."""
    module, other = model(), model()
    optimizer, fresh = adamw(module), adamw(other)
    train(module, optimizer)
    optimizer.state.clear()
    other.load_state_dict(module.state_dict())
    train(module, optimizer)
    train(other, fresh)
    assert same(module, optimizer, other, fresh)


# --- memory ---


@pytest.mark.parametrize("moments", FORMATS)
@pytest.mark.usefixtures("_chunks")
def test_host_and_device_have_the_bytes_that_are_planned(moments: str) -> None:
    module = model()
    optimizer = adamw(module, moments)
    train(module, optimizer, range(1))
    shapes = [(p.shape, p.dtype) for p in module.parameters()]
    offloaded = optimizer._offloaded
    assert offloaded is not None
    assert [b.numel() for b in offloaded.buffers] == [offload.buffer_nbytes(shapes, moments)] * offload.NUM_BUFFERS
    assert sum(b.bytes.numel() for b in offloaded._blocks) == sum(
        2 * aligned(moments_nbytes(shape, dtype, moments) // 2) for shape, dtype in shapes
    )
    places = offloaded._blocks, offloaded.buffers
    train(module, optimizer, range(1, 3))
    assert places == (offloaded._blocks, offloaded.buffers)


def test_other_batches_than_the_last_step_s_take_the_states_along() -> None:
    modules = model(), model()
    optimizers = [adamw(module, "bf16", offloaded) for module, offloaded in zip(modules, (True, False), strict=True)]
    for module, optimizer in zip(modules, optimizers, strict=True):
        train(module, optimizer, range(2))
        optimizer.passes = Passes()
        train(module, optimizer, range(2, 4))
    assert same(modules[0], optimizers[0], modules[1], optimizers[1])


def test_parameters_on_several_devices_are_refused() -> None:
    params = [nn.Parameter(torch.ones(4, device=device)) for device in ("cpu", "meta")]
    with pytest.raises(ValueError, match=r"on one device, found \['cpu', 'meta'\]: make an optimizer for each"):
        AdamW(params, offload_moments=True).step()


@pytest.mark.usefixtures("_small_chunks")
def test_buffers_do_not_grow_with_the_model() -> None:
    shape = torch.Size((1000, 64))
    for moments in FORMATS:
        assert offload.buffer_nbytes([(shape, torch.float32)] * 9, moments) == 1024


# --- checkpoints and copies ---


def reloaded(optimizer: AdamW, module: nn.Module) -> AdamW:
    fresh = adamw(module, optimizer.moments)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


def reloaded_in_place(optimizer: AdamW, module: nn.Module) -> AdamW:
    state = copy.deepcopy(optimizer.state_dict())
    train(module, optimizer, range(9, 10))  # writes what is loaded over
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("moments", FORMATS)
@pytest.mark.parametrize("save_and_load", [reloaded, reloaded_in_place, pickled])
@pytest.mark.usefixtures("_small_chunks")
def test_training_goes_on_bit_for_bit(save_and_load: Callable[[AdamW, nn.Module], AdamW], moments: str) -> None:
    ours, theirs = model(), model()
    optimizers = adamw(ours, moments, offload_moments=False), adamw(theirs, moments)
    train(ours, optimizers[0], range(6))
    train(theirs, optimizers[1], range(3))
    values = copy.deepcopy(theirs.state_dict())
    again = save_and_load(optimizers[1], theirs)
    theirs.load_state_dict(values)
    assert again.offload_moments and again.moments == moments
    train(theirs, again, range(3, 6))
    assert same(ours, optimizers[0], theirs, again)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(FORMATS, FORMATS)))
@pytest.mark.parametrize("to_host", [True, False])
def test_states_go_to_the_host_and_back_in_any_format(before: str, after: str, to_host: bool) -> None:
    """As they go from one format to another on the device."""
    module, others = model(), (model(), model())
    optimizer = adamw(module, before, offload_moments=not to_host)
    train(module, optimizer)
    optimizers = adamw(others[0], after, to_host), adamw(others[1], after, offload_moments=False)
    for other, loaded in zip(others, optimizers, strict=True):
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, loaded)
    assert same(others[0], optimizers[0], others[1], optimizers[1])
    places = {state[name].device for state in optimizers[0].state.values() for name in MOMENTS}
    assert {place.type for place in places} == {CPU.type if to_host else DEVICE.type}


def test_torchs_optimizer_loads_what_was_on_the_host() -> None:
    module = model()
    optimizer, other = adamw(module), torch.optim.AdamW(groups(module))
    train(module, optimizer)
    other.load_state_dict(optimizer.state_dict())
    for found, expected in zip(saved_moments(other), saved_moments(optimizer), strict=True):
        assert torch.equal(found.cpu(), expected.cpu())


def test_a_state_of_another_size_is_refused_by_the_step() -> None:
    module, other = model(), nn.Sequential(nn.Linear(64, 7), nn.Linear(64, 1), nn.Linear(33, 5)).to(DEVICE)
    optimizer, theirs = adamw(module), adamw(other)
    train(other, theirs)
    optimizer.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of a parameter of shape \(7, 96\): expected 672 elements .* 448"):
        train(module, optimizer)


@on_two_ranks
def test_sharded_parameters_are_updated_unit_by_unit_and_saved() -> None:
    """Also by torch's calls for distributed checkpoints, and with masters in two halves."""
    for moments, small in itertools.product(FORMATS, (True, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload, "CHUNK_NBYTES", 1024 if small else 1 << 20)
            split = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16), "split_master": True}
            modules = [sharded(partial(fully_shard, **split if moments == "bf16" else {})) for _ in range(3)]
            is_split = [isinstance(local(p), SplitTensor) for p in modules[0].parameters()]
            assert all(is_split) if moments == "bf16" else not any(is_split)
            optimizers = [
                AdamW(groups(m), moments=moments, seed=3, offload_moments=offloaded)
                for m, offloaded in zip(modules, (True, False, True), strict=True)
            ]
            for module, optimizer in zip(modules[:2], optimizers[:2], strict=True):
                train(module, optimizer)
            assert same(modules[0], optimizers[0], modules[1], optimizers[1])
            modules[2].load_state_dict(modules[0].state_dict())
            state = copy.deepcopy(get_optimizer_state_dict(modules[0], optimizers[0]))
            set_optimizer_state_dict(modules[2], optimizers[2], state)
            for module, optimizer in zip(modules, optimizers, strict=True):
                train(module, optimizer, range(4, 6))
            assert same(modules[2], optimizers[2], modules[1], optimizers[1])


@on_one_rank
def test_states_on_a_mesh_of_gpus_are_tensors_of_the_host_that_checkpoints_fill(tmp_path: Path) -> None:
    """The mesh is one of GPUs in name alone, so that a CPU shows what torch does with such DTensors."""
    mesh = DeviceMesh("cuda", torch.tensor([0]), _init_backend=False, _rank=0)
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(torch.Size((4, 64)), (64, 1), torch.float32))

    def trained(num_steps: int) -> tuple[nn.Module, AdamW]:
        module = nn.Module()
        module.w = nn.Parameter(DTensor(torch.ones(4, 64), spec, requires_grad=False))
        optimizer = AdamW(module.parameters(), offload_moments=True)
        module.w.grad = DTensor(torch.ones(4, 64), spec, requires_grad=False)
        for _ in range(num_steps):
            optimizer.step()
        return module, optimizer

    module, optimizer = trained(3)
    saved = get_optimizer_state_dict(module, optimizer)
    dcp.save(saved, checkpoint_id=tmp_path)
    again, other = trained(1)
    filled = get_optimizer_state_dict(again, other)
    dcp.load(filled, checkpoint_id=tmp_path)
    set_optimizer_state_dict(again, other, filled)
    moments = [[opt.state_dict()["state"][0][name] for name in MOMENTS] for opt in (optimizer, other)]
    for ours, theirs in zip(*moments, strict=True):
        assert isinstance(ours, DTensor) and ours.device_mesh is mesh and local(ours).device == CPU
        assert torch.equal(local(ours), local(theirs)) and local(ours).abs().sum() > 0
    assert all(type(t) is DTensor for t in copy.deepcopy(moments[0]))


# --- order ---

WAITS = [(HOST_TO_DEVICE, DEVICE_TO_HOST), (COMPUTE, HOST_TO_DEVICE), (DEVICE_TO_HOST, COMPUTE)]


def races_of(forgets: Sequence[tuple[str, str]]) -> tuple[list[str], dict[tuple[str, str], int]]:
    """Those of some steps on a CPU whose streams are vector clocks."""
    streams = VectorClocks(forgets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "streams_of", lambda device: streams)
        patch.setattr(offload, "CHUNK_NBYTES", 1024)
        module = model(CPU)
        optimizer = adamw(module)
        train(module, optimizer, range(1))
        offloaded = optimizer._offloaded
        assert offloaded is not None
        detector = RaceDetector(streams)
        for memory in (*offloaded.buffers, *(block.bytes for block in offloaded._blocks)):
            detector.watch(memory)
        with detector:
            for step, idle in enumerate(([], [0], [2], [0, 2], [1])):  # chunks change buffers
                train_some(module, optimizer, step, idle)
        assert len(detector.accesses) > 20, "the detector saw nothing"
    return detector.races, streams.waits


def test_every_access_to_host_blocks_and_buffers_is_ordered_by_an_event() -> None:
    races, waits = races_of([])
    assert races == []
    assert set(waits) == set(WAITS)


@pytest.mark.parametrize("forgotten", WAITS)
def test_each_wait_is_needed(forgotten: tuple[str, str]) -> None:
    assert races_of([forgotten])[0]


def test_the_next_chunk_is_copied_in_before_an_update_and_no_earlier_than_its_buffer_is_free() -> None:
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "CHUNK_NBYTES", 1024)
        for name in ("_copy_in", "_copy_back"):
            patch.setattr(offload.OffloadedMoments, name, noted(events, getattr(offload.OffloadedMoments, name)))
        module = nn.Linear(64, 10, bias=False).to(DEVICE)
        optimizer = AdamW(module.parameters(), offload_moments=True)
        train(module, optimizer, range(1))
    ins = [f"_copy_in {k}" for k in range(5)]
    backs = [f"_copy_back {k}" for k in range(5)]
    assert events == [ins[0], *itertools.chain.from_iterable(zip(ins[1:], backs, strict=False)), backs[4]]


def noted(events: list[str], work: Any) -> Any:
    def perform(self: Any, k: int) -> None:
        events.append(f"{work.__name__} {k}")
        work(self, k)

    return perform


# --- on a GPU ---


def large(offload_moments: bool, num_layers: int = 16) -> tuple[nn.Module, AdamW]:
    """Layers of 16 Mi elements each, 128 MiB of moments in fp32, and their optimizer."""
    module = nn.Sequential(*(nn.Linear(4096, 4096, bias=False, device="cuda") for _ in range(num_layers)))
    optimizer = AdamW(module.parameters(), offload_moments=offload_moments)
    optimizer.passes = Passes(batches=[list(layer.parameters()) for layer in module])
    for param in module.parameters():
        param.grad = torch.randn_like(param)
    return module, optimizer


@on_a_gpu
def test_nothing_is_allocated_on_the_device_after_the_first_step() -> None:
    module, optimizer = large(offload_moments=True)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for key in ("num_device_alloc", "allocated_bytes.all.current", "allocation.all.allocated"):
        assert after[key] == before[key], key
    kept = sum(local(state[name]).nbytes for state in optimizer.state.values() for name in MOMENTS)
    assert kept == 8 * sum(p.numel() for p in module.parameters())
    assert all(state[name].is_pinned() for state in optimizer.state.values() for name in MOMENTS)


@on_a_gpu
def test_the_cpu_does_not_wait_and_a_step_takes_the_time_of_its_bytes_over_the_link() -> None:
    """Of as many copied in and, on another stream, back at once, with nothing between."""
    module, optimizer = large(offload_moments=True)
    optimizer.step()
    optimizer.step()
    blocks, buffers = optimizer._offloaded._blocks, optimizer.moment_buffers
    chunks = [chunk for block in blocks for chunk in block.bytes.split(offload.CHUNK_NBYTES)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copy_in() -> None:
        with torch.cuda.stream(streams[0]):
            for chunk in chunks:
                buffers[0].copy_(chunk, non_blocking=True)

    def copy_both_ways() -> None:
        copy_in()
        with torch.cuda.stream(streams[1]):
            for chunk in chunks:
                chunk.copy_(buffers[1], non_blocking=True)

    nbytes = 8 * sum(p.numel() for p in module.parameters())
    issued, done = min((issue_and_end(optimizer.step) for _ in range(5)), key=lambda times: times[1])
    one_way, both_ways = (min(issue_and_end(copy)[1] for _ in range(5)) for copy in (copy_in, copy_both_ways))
    print(
        f"{nbytes / 2**30:.1f} GiB: in alone {nbytes / one_way / 1e9:.1f} GB/s, both ways at once "
        f"{nbytes / both_ways / 1e9:.1f} GB/s each; a step {done * 1e3:.1f} ms, {done / both_ways:.2f} of both ways, "
        f"issued in {issued * 1e3:.1f} ms"
    )
    assert issued < 0.5 * done, "the CPU waits"
    assert done < 1.25 * both_ways


@on_a_gpu
def test_many_steps_in_flight_have_the_bits_of_moments_on_the_device() -> None:
    found = []
    for offloaded in (True, False):
        torch.manual_seed(0)
        module, optimizer = large(offloaded, num_layers=6)
        for _ in range(20):
            optimizer.step()
        found.append([*module.parameters(), *saved_moments(optimizer)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


@on_a_gpu
def test_a_sharded_model_trains_with_the_bits_of_moments_on_the_device_and_goes_on_from_a_checkpoint(
    tmp_path: Path,
) -> None:
    """Prevents: early all-gathers, gradients' places or checkpoints that take part in what copies wait for."""
    run_ranks(train_sharded, tmp_path, world_size=1, device="cuda", timeout=300)


def train_sharded(directory: Path) -> None:
    models = []
    for offloaded in (True, False):
        torch.manual_seed(0)
        models.append(sharded_decoder())
        models[-1].optimizer = AdamW(models[-1].parameters(), lr=1e-3, offload_moments=offloaded)

    for _ in range(4):
        step_alike(*models)
    assert_equal_values(*models)
    state = get_optimizer_state_dict(models[0], models[0].optimizer)
    dcp.save({"state": state}, checkpoint_id=directory)
    models[0].optimizer = AdamW(models[0].parameters(), lr=1e-3, offload_moments=True)
    state = get_optimizer_state_dict(models[0], models[0].optimizer)
    dcp.load({"state": state}, checkpoint_id=directory)
    set_optimizer_state_dict(models[0], models[0].optimizer, state)
    for _ in range(2):
        step_alike(*models)
    assert_equal_values(*models)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = [get_optimizer_state_dict(m, m.optimizer, options=whole)["state"] for m in models]
    for name in found[1]:
        for moment in MOMENTS:
            assert torch.equal(found[0][name][moment].cpu(), found[1][name][moment].cpu())


def step_alike(ours: Any, theirs: Any) -> None:
    """A step of two models with the same gradients, for which the CPU does not wait."""
    for module in (ours, theirs):
        module(*batch()).backward()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        local(other.grad).copy_(local(own.grad))  # attention's backward adds up in any order
    for module in (ours, theirs):
        module.optimizer.step()
        module.optimizer.zero_grad()


def assert_equal_values(ours: nn.Module, theirs: nn.Module) -> None:
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(local(own).clone(), local(other).clone())


def issue_and_end(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until `work` returned, and until the device was done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    issued = time.perf_counter() - start
    torch.cuda.synchronize()
    return issued, time.perf_counter() - start
