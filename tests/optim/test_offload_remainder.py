"""Remainders of split masters in host memory: the bits of those on the device, and of fp32, whoever reads or writes.

On a CPU the host's memory and the device's are the same, and all else is as on a GPU.
"""

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from tests.clocks import RaceDetector, VectorClocks
from tests.optim.test_moments import groups, same, sharded, train
from tests.optim.test_offload import WAITS, assert_equal_values, on_a_gpu, step_alike
from tests.optim.test_optim import on_two_ranks, whole
from tests.ranks import on_ranks, run_ranks
from tests.shard.test_gpu import sharded_decoder
from tests.training import world_mesh
from yafsdp_like import MixedPrecisionPolicy, RemainderOffloadPolicy, fully_shard, update_in_backward
from yafsdp_like.kernels.adamw import AdamWTable
from yafsdp_like.kernels.split import split
from yafsdp_like.ops import split_master
from yafsdp_like.ops.split_master import SplitTensor, SplitValues
from yafsdp_like.optim import AdamW, offload
from yafsdp_like.optim.moments import FORMATS, MOMENTS, local
from yafsdp_like.shard.runtime.unit_state import unit_of

SPLIT: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32), "split_master": True}
OFFLOADED = SPLIT | {"offload_policy": RemainderOffloadPolicy()}
on_one_rank = on_ranks(world_size=1)


def made(options: dict[str, Any]) -> Any:
    """Sharded by rows of which ranks have different numbers, one none."""
    return sharded(partial(fully_shard, **options))


def adamw(module: nn.Module, moments: str = "fp32", **options: Any) -> AdamW:
    return AdamW(groups(module), lr=1e-2, moments=moments, seed=3, **options)


def bits(module: nn.Module) -> list[torch.Tensor]:
    return [whole(p).view(torch.int32) for p in module.parameters()]


def trained(options: dict[str, Any], num_steps: int = 2) -> tuple[Any, AdamW]:
    module = made(options)
    optimizer = adamw(module, offload_moments="offload_policy" in options)
    train(module, optimizer, range(num_steps))
    return module, optimizer


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(bits(ours), bits(theirs), strict=True))


# --- the same bits ---


@on_two_ranks
def test_updates_have_the_bits_of_remainders_on_the_device_in_any_format_of_moments_and_clipped() -> None:
    for moments, chunk_nbytes in (*zip(FORMATS, itertools.repeat(1024)), ("fp32", 1 << 20)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload, "CHUNK_NBYTES", chunk_nbytes)
            modules = made(OFFLOADED), made(SPLIT)
            optimizers = [
                adamw(module, moments, offload_moments=offloads, max_norm=0.5)
                for module, offloads in zip(modules, (True, False), strict=True)
            ]
            for module, optimizer in zip(modules, optimizers, strict=True):
                train(module, optimizer, range(3))
            assert same(modules[0], optimizers[0], modules[1], optimizers[1])
            buffers = optimizers[0].moment_buffers
            train(modules[0], optimizers[0], range(3, 4))
            assert buffers is optimizers[0].moment_buffers, "something was laid out again"


@on_two_ranks
def test_many_updates_have_the_bits_of_masters_in_fp32() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "CHUNK_NBYTES", 1024)
        ours, theirs = trained(OFFLOADED, 40), trained({}, 40)
        assert all(isinstance(local(p), SplitTensor) for p in ours[0].parameters())
        assert any(local(p).numel() == 0 for p in ours[0].parameters()) == (dist.get_rank() == 1)
        assert_equal(ours[0], theirs[0])


@on_two_ranks
def test_forwards_compute_on_what_updates_and_users_have_written() -> None:
    """Over peers, too, who read upper halves while a user writes."""
    for transport in ("process_group", "peer"):
        losses = []
        for options in (OFFLOADED, SPLIT):
            module, optimizer = network(options | {"transport": transport})
            losses.append([])
            for step in range(4):
                losses[-1].append(update(module, optimizer, step))
                with torch.no_grad():
                    for p in module.parameters():
                        p.mul_(1.01)
        assert losses[0] == losses[1] and len(set(losses[0])) == 4


def network(options: dict[str, Any]) -> tuple[Any, AdamW]:
    """A model with a forward, and its optimizer."""
    torch.manual_seed(0)
    module = fully_shard(nn.Sequential(nn.Linear(96, 7), nn.Linear(7, 3)), mesh=world_mesh(), **options)
    return module, adamw(module, offload_moments="offload_policy" in options)


def update(module: Any, optimizer: AdamW, step: int) -> float:
    loss = module(torch.ones(2, 96) * (step + 1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@on_two_ranks
def test_an_update_that_raises_leaves_each_value_and_its_moments_as_before_it_or_as_behind_it() -> None:
    """Prevents: new upper halves beside the remainders, and moments, of the step before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "CHUNK_NBYTES", 1024)
        module, optimizer = trained(OFFLOADED)
        whole_module, whole_optimizer = trained(OFFLOADED, 3)
        before, behind = numbers(module, optimizer), numbers(whole_module, whole_optimizer)
        patch.setattr(AdamWTable, "update", raising_behind(AdamWTable.update, num_updates=2))
        with pytest.raises(KeyboardInterrupt):
            train(module, optimizer, range(2, 3))
    found = numbers(module, optimizer)
    is_new = [a != b for a, b in zip(found, before, strict=True)]
    assert any(is_new) and not all(is_new)
    assert [b if new else a for new, a, b in zip(is_new, before, behind, strict=True)] == found
    train(module, optimizer, range(3, 4))
    assert all(a != b for a, b in zip(numbers(module, optimizer), found, strict=True))


def numbers(module: nn.Module, optimizer: AdamW) -> list[tuple[float, ...]]:
    """Each value with both of its moments."""
    found: list[tuple[float, ...]] = []
    for p in module.parameters():
        tensors = p, *(optimizer.state[p][name] for name in MOMENTS)
        found += zip(*(whole(t).flatten().tolist() for t in tensors), strict=True)
    return found


def raising_behind(update: Any, num_updates: int) -> Any:
    """The same, which raises once it has done its work for the last time."""
    left = [num_updates]

    def perform(*arguments: Any) -> None:
        update(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return perform


# --- memory ---


@on_two_ranks
def test_the_device_has_two_bytes_a_parameter_less_and_the_host_as_many_more() -> None:
    plans: list[Any] = []
    for options in (OFFLOADED, SPLIT):
        torch.manual_seed(0)
        module: Any = fully_shard(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256)), mesh=world_mesh(), **options)
        assert module.memory_report().host_nbytes == module.memory_plan().host_nbytes, "before a forward"
        module(torch.ones(1, 256)).sum().backward()
        plan, report = module.memory_plan(), module.memory_report()
        assert (plan.nbytes, plan.host_nbytes) == (report.arena_nbytes, report.host_nbytes)
        plans.append(plan)
    numel = 2 * 64 * 256 + 64 + 256
    less = plans[1].nbytes - plans[0].nbytes
    assert (less, plans[1].host_nbytes) == (plans[0].host_nbytes, 0)
    assert less == plans[0].nbytes_of("remainder") == plans[1].nbytes_of("main_shard")
    assert numel <= less < numel + 4 * 256, "of one of two ranks"
    words = next(line for line in str(plans[0]).splitlines() if "remainder" in line)
    assert "in host memory: lower halves" in words


@on_one_rank
def test_parameters_that_are_not_split_stay_where_they_were() -> None:
    """Norms with running statistics, which compute in fp32."""
    module: Any = fully_shard(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)), mesh=world_mesh(), **OFFLOADED)
    plan = module.memory_plan()
    assert (plan.nbytes_of("remainder"), plan.nbytes_of("main_shard")) == (2 * (32 * 32) + 256, 2 * 256)
    optimizer = adamw(module, offload_moments=True)
    module(torch.randn(4, 32)).sum().backward()
    optimizer.step()


# --- reads and writes on demand ---


WRITES: dict[str, Any] = {
    "in place": lambda params: [p.mul_(0.5) for p in params],
    "rows": lambda params: [p._local_tensor[:1].mul_(0.25) for p in params if len(p._local_tensor)],
    "torch's optimizer": lambda params: torch.optim.AdamW(params, lr=0.1).step(),
}


@pytest.mark.slow
@on_two_ranks
def test_what_users_write_between_updates_is_what_they_have_written() -> None:
    for write in WRITES.values():
        pairs = [trained(options) for options in (OFFLOADED, {})]
        for module, optimizer in pairs:
            with torch.no_grad():
                write(list(module.parameters()))
            train(module, optimizer, range(2, 4))
        assert_equal(pairs[0][0], pairs[1][0])


@on_two_ranks
def test_state_dicts_are_in_fp32_and_load_into_any_choice() -> None:
    ours, _ = trained(OFFLOADED)
    expected = [b.clone() for b in bits(ours)]
    for state in (copy.deepcopy(ours.state_dict()), get_model_state_dict(ours)):
        assert {value.dtype for value in state.values()} == {torch.float32}
        for options in ({}, SPLIT, OFFLOADED):
            other, optimizer = trained(options, 1)
            set_model_state_dict(other, state)
            assert all(torch.equal(a, b) for a, b in zip(bits(other), expected, strict=True))
            train(other, optimizer, range(1))


@pytest.mark.slow
def test_checkpoints_go_from_any_choice_to_any_other(tmp_path: Path) -> None:
    run_ranks(through_files, tmp_path)


def through_files(folder: Path) -> None:
    choices: tuple[dict[str, Any], ...] = (OFFLOADED, SPLIT, {})
    for number, (before, after) in enumerate((a, b) for a in choices for b in choices if OFFLOADED in (a, b)):
        module, optimizer = trained(before)
        state = {"model": module.state_dict()}
        dcp.save(state, checkpoint_id=folder / str(number))
        train(module, optimizer, range(2, 4))
        other, own = trained(after)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        state = {"model": other.state_dict()}
        dcp.load(state, checkpoint_id=folder / str(number))
        other.load_state_dict(state["model"])
        train(other, own, range(2, 4))
        assert_equal(module, other)


@on_two_ranks
def test_a_model_that_changes_is_built_again_with_its_values() -> None:
    """Prevents: chunks that are copied from and to where a remainder was."""
    losses = [changing(options) for options in (OFFLOADED, SPLIT)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 6


def changing(options: dict[str, Any]) -> list[float]:
    """Losses of a model that gets guard bytes around its shards, of which some become frozen, and are trained again."""
    module, optimizer = network(options)
    found = []
    for step in range(6):
        if step in (2, 4):
            module.set_debug_mode(step == 2)
        module[1].weight.requires_grad_(step != 3)
        found.append(update(module, optimizer, step))
    return found


# --- what is refused ---


def test_the_policy_needs_split_masters() -> None:
    with pytest.raises(ValueError, match=r"RemainderOffloadPolicy .*, and split_master is False: use fully_shard"):
        fully_shard(nn.Linear(4, 4), offload_policy=RemainderOffloadPolicy())


@on_two_ranks
def test_an_optimizer_that_copies_no_states_is_refused_before_it_updates_anything() -> None:
    module = made(OFFLOADED)
    before = [b.clone() for b in bits(module)]
    with pytest.raises(ValueError, match=r"moments on the device cannot update .* use AdamW\(offload_moments=True\)"):
        train(module, adamw(module), range(1))
    assert all(torch.equal(a, b) for a, b in zip(bits(module), before, strict=True))
    with pytest.raises(ValueError, match=r"update_in_backward expects split masters on the device"):
        update_in_backward(adamw(module))


# --- order ---


def with_streams(patch: pytest.MonkeyPatch, streams: VectorClocks) -> None:
    for module in (offload, split_master):
        patch.setattr(module, "streams_of", lambda device: streams)


def races_of(
    patch: pytest.MonkeyPatch, forgets: list[tuple[str, str]], num_optimizers: int = 1
) -> tuple[list[str], set[tuple[str, str]]]:
    """Those of some steps on a CPU whose streams are vector clocks, with a read and a write of values between."""
    streams = VectorClocks(forgets)
    with_streams(patch, streams)
    # Of many chunks, an optimizer's own waits order most behind another's.
    patch.setattr(offload, "CHUNK_NBYTES", 1024 if num_optimizers == 1 else 4096)
    values = [SplitValues(*split(torch.randn(numel)), is_offloaded=True) for numel in (96, 640, 32)]
    params = [nn.Parameter(SplitTensor(v, v.low.shape, (1,))) for v in values]
    optimizers = [AdamW(params, offload_moments=True) for _ in range(num_optimizers)]
    detector = RaceDetector(streams)
    for step in range(6):
        for k, p in enumerate(params):
            p.grad = None if step == 3 and k == 0 else torch.ones(p.shape) * (step + 1)
        if step == 1:  # by when it has its memory
            for offloaded in (optimizer._offloaded for optimizer in optimizers):
                assert offloaded is not None
                for memory in (*offloaded.buffers, *(block.bytes for block in offloaded._blocks)):
                    detector.watch(memory)
            for v in values:
                detector.watch(v.low, on_host=True)
        with detector:
            for optimizer in optimizers:
                optimizer.step()
            if step == 2:
                values[1].beside_high(values[1].low).sum()
            if step == 4:
                values[2].to_write().mul_(2)
    assert len(detector.accesses) > 20, "the detector saw nothing"
    return detector.races, set(streams.waits)


@pytest.mark.parametrize("num_optimizers", [1, 2])
def test_every_access_to_remainders_is_ordered(num_optimizers: int) -> None:
    """Prevents: a remainder that an optimizer reads before what another has made of it is there."""
    with pytest.MonkeyPatch.context() as patch:
        races, waits = races_of(patch, [], num_optimizers)
    assert races == [] and waits == set(WAITS)


@on_one_rank
def test_a_parameter_that_is_replaced_behind_an_update_is_put_where_it_lay_once_copies_have_ended() -> None:
    """Prevents: the remainder of the update in the place of the new one."""
    streams = VectorClocks()
    detector = RaceDetector(streams)
    with pytest.MonkeyPatch.context() as patch:
        with_streams(patch, streams)
        module, optimizer = network(OFFLOADED)
        update(module, optimizer, 0)
        values = {name: torch.full_like(p, 0.1) for name, p in module.named_parameters()}
        unit = unit_of(module)
        assert unit is not None
        for p in unit.params:
            detector.watch(p.main, on_host=True)
        with detector:
            update(module, optimizer, 1)
            module.load_state_dict(values, assign=True)
            module(torch.ones(2, 96)).sum().backward()
        assert all(torch.equal(whole(p), whole(values[name])) for name, p in module.named_parameters())
    assert detector.accesses and detector.races == []


@pytest.mark.slow(unless=lambda forgotten: forgotten is None)
@pytest.mark.parametrize("forgotten", [*WAITS, None])
def test_each_wait_is_needed_that_of_the_cpu_too(forgotten: tuple[str, str] | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if forgotten is None:
            patch.setattr(SplitValues, "_wait", lambda self: None)
        assert races_of(patch, [] if forgotten is None else [forgotten])[0]


# --- on a GPU ---


@on_a_gpu
def test_values_are_read_and_written_right_behind_updates_on_a_gpu() -> None:
    """Prevents: halves of different steps."""
    run_ranks(read_and_write, world_size=1, device="cuda", timeout=300)


def read_and_write() -> None:
    options: tuple[dict[str, Any], ...] = ({"offload_policy": RemainderOffloadPolicy()}, {})
    models = []
    for more in options:
        torch.manual_seed(0)
        models.append(sharded_decoder(split_master=True, **more))
        models[-1].optimizer = AdamW(models[-1].parameters(), lr=1e-3, offload_moments=bool(more))
    units = {unit_of(module) for module in models[0].modules()} - {None}
    lows = [p.main for unit in units for p in unit.params if p.offloads_remainder]
    assert lows and all(low.device.type == "cpu" and low.is_pinned() for low in lows)
    for step in range(8):
        step_alike(*models)
        assert_equal_values(*models)
        if step % 3 == 1:
            with torch.no_grad():
                for param in itertools.chain(*(m.parameters() for m in models)):
                    param.mul_(1.01)
