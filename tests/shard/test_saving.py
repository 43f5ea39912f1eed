"""Sharded tensors are ordinary ones: whatever saves, pickles, copies or moves tensors does so with them."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import yafsdp_like as ours
from tests.ranks import run_ranks
from tests.training import full, world_mesh
from yafsdp_like import optim

both_transports = pytest.mark.parametrize("transport", ["process_group", "peer"])
every_policy = pytest.mark.parametrize("param_dtype", [None, torch.bfloat16])


def trained(transport: str, param_dtype: torch.dtype | None = None) -> tuple[Any, torch.optim.Optimizer]:
    """A model whose parameters, gradients and moments are all there; 7 rows do not divide by the ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 7), nn.LayerNorm(7))
    policy = ours.MixedPrecisionPolicy(param_dtype=param_dtype)
    for layer in model:
        ours.fully_shard(layer, mesh=world_mesh(), mp_policy=policy, transport=transport)
    ours.fully_shard(model, mesh=world_mesh(), mp_policy=policy, transport=transport)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).float().square().sum().backward()
    optimizer.step()
    return model, optimizer


def tensors_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that a user may save or copy."""
    found = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"], found[f"grad {name}"] = parameter, parameter.grad
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key} {name}"] = optimizer.state[parameter][key]
    return found


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same values in the same shards, in memory of their own."""
    assert isinstance(actual, DTensor) and isinstance(expected, DTensor)
    assert (actual.placements, actual.shape, actual.stride()) == (
        expected.placements,
        expected.shape,
        expected.stride(),
    )
    assert torch.equal(actual.to_local(), expected.to_local())
    if expected.to_local().numel():
        assert actual.to_local().data_ptr() != expected.to_local().data_ptr()


@both_transports
@every_policy
def test_every_sharded_tensor_is_saved_pickled_and_copied(transport: str, param_dtype: torch.dtype | None) -> None:
    """Prevents: "invalid python storage" for all tensors that do not start the memory that they lie in."""
    run_ranks(save_pickle_copy, transport, param_dtype)


def save_pickle_copy(transport: str, param_dtype: torch.dtype | None) -> None:
    for tensor in tensors_of(*trained(transport, param_dtype)).values():
        assert_same(copy.deepcopy(tensor), tensor)
        assert_same(pickle.loads(pickle.dumps(tensor)), tensor)
        assert_same(torch.load(io.BytesIO(saved(tensor))), tensor)
        assert_same(tensor.detach().clone(), tensor)
        if not tensor.requires_grad:
            assert torch.equal(torch.from_numpy(tensor.to_local().numpy().copy()), tensor.to_local())


@both_transports
def test_what_is_saved_takes_its_own_bytes(transport: str) -> None:
    """Prevents: files, messages and copies in which each tensor comes with its whole storage."""
    run_ranks(measure, transport)


def measure(transport: str) -> None:
    model, optimizer = trained(transport)
    for tensor in tensors_of(model, optimizer).values():
        local = tensor.to_local()
        padding = local.untyped_storage().nbytes() - local.numel() * local.itemsize
        assert 0 <= padding <= -(-tensor.numel() // 2) * 4, "of a gradient's chunk, where rows do not divide evenly"
    nbytes = sum(value.to_local().numel() * 4 for value in model.state_dict().values())
    assert nbytes == (32 * 8 + 32 + (64 + 1 + 1 + 1) * (4 - dist.get_rank())) * 4
    assert len(saved(model.state_dict())) < nbytes + 16_000
    assert len(saved(copy.deepcopy(model.state_dict()))) < nbytes + 16_000


@both_transports
def test_state_dicts_go_through_files_and_back(transport: str) -> None:
    """Prevents: checkpoints by torch.save that other sharded models cannot load."""
    run_ranks(through_files, transport)


def through_files(transport: str) -> None:
    model, optimizer = trained(transport)
    states = torch.load(io.BytesIO(saved((model.state_dict(), optimizer.state_dict()))))
    other, other_optimizer = trained(transport)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    other.load_state_dict(states[0])
    other_optimizer.load_state_dict(states[1])
    for pair in zip(other.parameters(), model.parameters(), strict=True):
        assert_same(*pair)
    x = torch.ones(3, 8)
    for one, its_optimizer in ((model, optimizer), (other, other_optimizer)):
        its_optimizer.zero_grad()
        one(x).sum().backward()
        its_optimizer.step()
    assert torch.equal(other(x), model(x))


@both_transports
@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint's own calls
def test_state_dicts_are_staged_and_offloaded(transport: str, tmp_path: Path) -> None:
    """Prevents: only checkpoints that are written at once."""
    run_ranks(stage, transport, tmp_path)


def stage(transport: str, directory: Path) -> None:
    model, optimizer = trained(transport)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    expected = {key: full(value) for key, value in state["model"].items()}
    writing = dcp.async_save(state, checkpoint_id=directory / "async")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    writing.result()
    dcp.load(state, checkpoint_id=directory / "async")  # in place
    offloaded = get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))
    for key, value in expected.items():
        assert torch.equal(full(model.get_parameter(key)), value), key
        assert torch.equal(full(offloaded[key]), value), key
    assert all(len(saved(value)) < value.to_local().numel() * 4 + 8_000 for value in offloaded.values())


@both_transports
def test_weights_moved_to_shared_memory_are_still_trained(transport: str) -> None:
    """Prevents: a process that is sent its weights (torch.multiprocessing moves them) going on with those of before."""
    run_ranks(share, transport)


def share(transport: str) -> None:
    model, optimizer = trained(transport)
    (twin, twins_optimizer), x = trained(transport), torch.ones(3, 8)
    for parameter in model.parameters():
        parameter.to_local().share_memory_()
    for one, its_optimizer in ((model, optimizer), (twin, twins_optimizer)):
        for _ in range(2):
            its_optimizer.zero_grad()
            one(x).sum().backward()
            its_optimizer.step()
    assert torch.equal(model(x), twin(x))
    assert all(torch.equal(full(a), full(b)) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
