"""A master in two halves trains as one in fp32, to the bit, in two bytes a value less."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from tests.ranks import on_ranks, run_ranks
from tests.shard.test_optimizer_step import TRANSPORTS
from tests.training import full, world_mesh
from tests.zoo import SPECIMENS
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.kernels.split import split
from yafsdp_like.ops.split_master import SplitTensor
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.runtime.unit_state import unit_of

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SPECIMEN = SPECIMENS["decoder"]
transports = pytest.mark.parametrize("transport", TRANSPORTS)


def sharded(transport: str, policy: MixedPrecisionPolicy = BF16, split_master: bool = True) -> Any:
    options = {"mesh": world_mesh(), "mp_policy": policy, "transport": transport, "split_master": split_master}
    return SPECIMEN.wrap(SPECIMEN.fresh(), fully_shard, **options)


def train_step(model: Any, optimizer: Any, number: int) -> float:
    loss = SPECIMEN.loss_of(model, number, 0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def params_of(model: Any) -> list[Any]:
    units = {unit: None for module in model.modules() if (unit := unit_of(module)) is not None}
    return [p for unit in units for p in unit.params]


def assert_halves_agree(model: Any) -> None:
    """The compute shard is the upper half of the values."""
    for p in params_of(model):
        if p.is_split:
            values = p.local.joined().flatten()
            assert torch.equal(p.compute[: values.numel()], split(values)[0])


@pytest.mark.slow(unless=lambda transport: transport == "peer")
@transports
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_split_master_has_the_bits_of_one_in_fp32(world_size: int, transport: str) -> None:
    """Over 100 steps, on the same gradients."""
    run_ranks(follow_fp32, transport, world_size=world_size)


def follow_fp32(transport: str) -> None:
    models = [sharded(transport, split_master=split_master) for split_master in (False, True)]
    parameters = [list(model.parameters()) for model in models]
    optimizers = [AdamW(params, lr=1e-2, weight_decay=0.1) for params in parameters]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_step(model, optimizer, 0)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(100):
        for one, other in zip(*parameters, strict=True):
            gradient = torch.randn(one._local_tensor.shape, generator=generator)
            one.grad, other.grad = (torch.zeros_like(p) for p in (one, other))
            one.grad._local_tensor.copy_(gradient)
            other.grad._local_tensor.copy_(gradient)
        for optimizer in optimizers:
            optimizer.step()
    assert sum(p.is_split for p in params_of(models[1])) > 4
    for one, other in zip(*parameters, strict=True):
        assert torch.equal(full(one).view(torch.int32), full(other).view(torch.int32))
    assert_halves_agree(models[1])


@pytest.mark.slow
@transports
@on_ranks()
def test_training_with_a_split_master_follows_fp32(transport: str) -> None:
    models = [sharded(transport, split_master=split_master) for split_master in (False, True)]
    optimizers = [AdamW(model.parameters(), lr=1e-3) for model in models]
    for number in range(12):
        losses = [train_step(*pair, number) for pair in zip(models, optimizers, strict=True)]
        assert losses[0] == pytest.approx(
            losses[1], rel=2e-2
        )  # a tie rounds away from zero in one, to even in the other
        with torch.no_grad():
            evaluated = [SPECIMEN.loss_of(model, number, 0).item() for model in models]
        assert evaluated[0] == pytest.approx(
            evaluated[1], rel=2e-2
        )  # a tie rounds away from zero in one, to even in the other
    assert_halves_agree(models[1])


@transports
@on_ranks()
def test_the_plan_has_two_bytes_a_value_less_and_the_arenas_hold_it(transport: str) -> None:
    model, whole = sharded(transport), sharded(transport, split_master=False).memory_plan()
    optimizer = AdamW(model.parameters())
    for number in range(3):
        plan = model.memory_plan()
        if number:
            assert model.memory_report().arena_nbytes == plan.nbytes
        assert plan.nbytes_of("main_shard") < 0.75 * whole.nbytes_of("main_shard")  # half, and what aligns biases
        assert plan.nbytes_of("compute_shard") == whole.nbytes_of("compute_shard")
        train_step(model, optimizer, number)


WRITES: dict[str, Any] = {
    "in place": lambda params: [p.mul_(0.5) for p in params],
    "a list": lambda params: torch._foreach_mul_(params, 0.5),
    "local": lambda params: [p.to_local().mul_(0.5) for p in params],
    "data": lambda params: [p.data.mul_(0.5) for p in params],
    "rows": lambda params: [
        p._local_tensor[:1].mul_(0.25) for p in params if p._local_tensor.dim() and len(p._local_tensor)
    ],
    "init": lambda params: [nn.init.constant_(p, 0.01) for p in params],
    "torch's optimizer": lambda params: _step_of_torch(params),
}


def _step_of_torch(params: list[Any]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.slow(unless=lambda write, transport: transport == "peer" or write in ("in place", "a list"))
@transports
@pytest.mark.parametrize("write", WRITES)
@on_ranks()
def test_what_the_user_writes_is_computed_on_in_the_next_forward(write: str, transport: str) -> None:
    model, plain = sharded(transport), SPECIMEN.fresh().bfloat16()
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, lr=1e-3)
    for number in range(3):
        train_step(model, optimizer, number)
        before = [full(p).clone() for p in parameters]
        with torch.no_grad():
            WRITES[write](parameters)
            assert not all(torch.equal(full(p), old) for p, old in zip(parameters, before, strict=True))
            for p, whole in zip(plain.parameters(), parameters, strict=True):
                p.copy_(full(whole))
            expected, found = (SPECIMEN.loss_of(m, number, 0).item() for m in (plain, model))
        assert found == pytest.approx(expected, rel=1e-2)  # but for ties of roundings
        assert_halves_agree(model)
        assert not any(p.is_written for p in params_of(model))


@transports
@on_ranks()
def test_what_is_written_during_a_forward_is_computed_on_in_the_next(transport: str) -> None:
    model = sharded(transport)
    last = list(model.layers[-1].parameters())
    with torch.no_grad():
        before = SPECIMEN.loss_of(model, 0, 0).item()
        hook = model.layers[0].register_forward_hook(lambda *_: [p.mul_(2) for p in last] and None)
        during = SPECIMEN.loss_of(model, 0, 0).item()
        hook.remove()
        after = SPECIMEN.loss_of(model, 0, 0).item()
    assert before == during != after
    assert_halves_agree(model)


@transports
@on_ranks()
def test_state_dicts_are_in_fp32_and_load_into_either(transport: str) -> None:
    models = [sharded(transport, split_master=split_master) for split_master in (False, True)]
    optimizers = [AdamW(model.parameters(), lr=1e-3) for model in models]
    for number in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            train_step(model, optimizer, number)
    model, optimizer = models[1], optimizers[1]
    model.reshard()
    expected = {name: full(p).clone() for name, p in model.named_parameters()}
    for state in (
        copy.deepcopy(model.state_dict()),
        torch.load(_saved(model.state_dict()), weights_only=False),
        get_model_state_dict(model),
    ):
        for other in models:
            with torch.no_grad():
                for p in other.parameters():
                    p.fill_(0.5) if other is not model or (state is not None and _is_copy(state)) else None
            set_model_state_dict(other, state)
            other.reshard()
            for name, p in other.named_parameters():
                assert p.dtype == torch.float32
                assert torch.equal(full(p), expected[name]), name
    train_step(model, optimizer, 3)
    assert_halves_agree(model)


def _is_copy(state: dict[str, Any]) -> bool:
    return not any(isinstance(value._local_tensor, SplitTensor) for value in state.values())


def _saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_checkpoints_go_through_files_between_split_and_fp32(tmp_path: Path) -> None:
    run_ranks(through_files, tmp_path)


def through_files(folder: Path) -> None:
    model = sharded("process_group")
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for number in range(2):
        train_step(model, optimizer, number)
    model.reshard()
    expected = {name: full(p).clone() for name, p in model.named_parameters()}
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "split")
    for split_master in (False, True):
        other = sharded("process_group", split_master=split_master)
        other_optimizer = AdamW(other.parameters(), lr=1e-3)
        train_step(other, other_optimizer, 5)
        other.reshard()
        state = {"model": other.state_dict()}
        dcp.load(state, checkpoint_id=folder / "split")
        other.load_state_dict(state["model"])
        for name, p in other.named_parameters():
            assert torch.equal(full(p), expected[name]), name
        train_step(other, other_optimizer, 6)


@transports
@on_ranks()
def test_parameters_that_are_not_computed_on_in_bfloat16_stay_whole(transport: str) -> None:
    model = sharded(transport, MixedPrecisionPolicy())
    optimizer = AdamW(model.parameters())
    train_step(model, optimizer, 0)
    assert not any(p.is_split for p in params_of(model))


@transports
@on_ranks()
def test_a_model_that_changes_is_built_again_with_its_values(transport: str) -> None:
    """Prevents: upper halves lost with the arena that held the compute shards."""
    model = sharded(transport)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    train_step(model, optimizer, 0)
    model.reshard()
    expected = {name: full(p).clone() for name, p in model.named_parameters()}
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    with torch.no_grad():
        SPECIMEN.loss_of(model, 1, 0)
    model.reshard()
    for name, p in model.named_parameters():
        assert torch.equal(full(p), expected[name]), name
    train_step(model, optimizer, 2)
    assert_halves_agree(model)


@pytest.mark.slow
@pytest.mark.parametrize("reuses", [False, True])
def test_an_asynchronous_checkpoint_has_the_values_of_when_it_began(tmp_path: Path, reuses: bool) -> None:
    """Prevents: memory that nobody has written, saved for weights."""
    run_ranks(save_while_training, tmp_path, reuses)


def save_while_training(folder: Path, reuses: bool) -> None:
    model = sharded("process_group")
    optimizer = AdamW(model.parameters(), lr=1e-3)
    group = dist.new_group(backend="gloo")
    options = StagingOptions(False, False, False, False)  # others need a GPU
    stager = DefaultStager(options) if reuses else BlockingAsyncStager()
    for number in range(2):  # if the stager reuses memory, the second time
        train_step(model, optimizer, number)
        model.reshard()
        expected = {name: full(p).clone() for name, p in model.named_parameters()}
        state = {"model": model.state_dict()}
        saved = dcp.async_save(state, checkpoint_id=folder / str(number), async_stager=stager, process_group=group)
        train_step(model, optimizer, 7)
        saved.result()
        dist.barrier()
        other = sharded("process_group")
        state = {"model": other.state_dict()}
        dcp.load(state, checkpoint_id=folder / str(number))
        other.load_state_dict(state["model"])
        for name, p in other.named_parameters():
            assert torch.equal(full(p), expected[name]), name
