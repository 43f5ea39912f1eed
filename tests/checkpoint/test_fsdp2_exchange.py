"""Sharded checkpoints go from FSDP2 to this package and back, and training goes on to the same losses, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.ranks import run_ranks
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.optim import AdamW

POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SHARDERS: dict[str, Any] = {"fsdp2": torch.distributed.fsdp.fully_shard, "ours": fully_shard}
OPTIMIZERS: dict[str, Any] = {"fsdp2": torch.optim.AdamW, "ours": AdamW}


def make(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(3)))
    for block in model:
        SHARDERS[kind](block, mp_policy=POLICY)
    SHARDERS[kind](model, mp_policy=POLICY)
    return model, OPTIMIZERS[kind](model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = model(torch.randn(5, 6, generator=generator)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save_and_go_on(directory: Path, kind: str) -> list[float]:
    model, optimizer = make(kind, seed=0)
    train(model, optimizer, range(3))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=directory)
    return train(model, optimizer, range(3, 6))


def resume(directory: Path, kind: str) -> list[float]:
    model, optimizer = make(kind, seed=1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return train(model, optimizer, range(3, 6))


@pytest.mark.parametrize(("writer", "reader"), [("fsdp2", "ours"), ("ours", "fsdp2")])
def test_one_resumes_from_the_checkpoint_of_the_other(writer: str, reader: str, tmp_path: Path) -> None:
    expected = run_ranks(save_and_go_on, tmp_path / "saved", writer)
    assert run_ranks(resume, tmp_path / "saved", reader) == expected
