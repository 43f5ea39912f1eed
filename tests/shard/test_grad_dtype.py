"""Gradients kept in the dtype that they are reduced in: half the bytes in bf16, and the same numbers."""

import io
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tests.ranks import on_ranks, run_ranks
from tests.training import full_parameters, world_mesh
from tests.zoo import SPECIMENS
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.memory.layout import aligned
from yafsdp_like.optim import AdamW
from yafsdp_like.shard import requirements

TRANSPORTS = ("process_group", "peer")
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)


def sharded(name: str, grad_dtype: torch.dtype | None, transport: str = "process_group", **options: Any) -> Any:
    specimen = SPECIMENS[name]
    options = {"mp_policy": BF16} | options
    return specimen.wrap(
        specimen.fresh(), fully_shard, mesh=world_mesh(), transport=transport, grad_dtype=grad_dtype, **options
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["decoder", "tied"])
def test_training_with_gradients_in_bf16_has_the_bits_of_gradients_in_fp32(name: str, transport: str) -> None:
    """Where a backward makes all of a gradient, and it is reduced in bf16, fp32 holds the same value."""
    for narrow, wide in run_ranks(train_both, name, transport):
        for parameter, expected in wide.items():
            assert torch.equal(narrow[parameter], expected), parameter


def train_both(name: str, transport: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return train(name, torch.bfloat16, transport), train(name, None, transport)


def train(name: str, grad_dtype: torch.dtype | None, transport: str) -> dict[str, torch.Tensor]:
    model = sharded(name, grad_dtype, transport)
    optimizer = AdamW(model.parameters(), lr=0.02)
    for step in range(4):
        SPECIMENS[name].loss_of(model, step, torch.distributed.get_rank()).backward()
        assert {p.grad.dtype for p in model.parameters()} == {grad_dtype or torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    return full_parameters(model)


@on_ranks()
def test_gradient_shards_in_bf16_are_half_as_large_in_the_plan_and_in_memory() -> None:
    wide, narrow = (sharded("decoder", dtype) for dtype in (None, torch.bfloat16))
    numels = [-(-p.shape[0] // 2) * p[0].numel() for p in wide.parameters()]
    for model, itemsize in ((wide, 4), (narrow, 2)):
        assert model.memory_plan().transient_nbytes == sum(aligned(itemsize * numel) for numel in numels)
    SPECIMENS["decoder"].loss_of(narrow, 0, 0).backward()
    for p in narrow.parameters():
        local = p.grad.to_local()
        assert local.untyped_storage().nbytes() <= local.nbytes + 2 * p[0].numel(), "padding of less than a row"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_second_backward_adds_to_a_gradient_in_bf16_and_rounds(transport: str) -> None:
    run_ranks(add_twice, transport)


def add_twice(transport: str) -> None:
    model = sharded("decoder", torch.bfloat16, transport)
    gradients = []
    for _ in range(2):
        SPECIMENS["decoder"].loss_of(model, 0, 0).backward()
        gradients.append([p.grad.to_local().clone() for p in model.parameters()])
    for once, twice in zip(*gradients, strict=True):
        assert torch.equal(twice, once + once)


@on_ranks()
def test_torch_clips_and_saves_beside_gradients_in_bf16() -> None:
    """Torch's own code makes an optimizer's states from gradients of zeros in the parameter's dtype."""
    model = sharded("decoder", torch.bfloat16)
    optimizer = AdamW(model.parameters())
    torch.save(get_optimizer_state_dict(model, optimizer), io.BytesIO())
    for step in range(2):
        SPECIMENS["decoder"].loss_of(model, step, 0).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).full_tensor()
        assert norm > 1e-3
        assert all(p.grad.to_local().norm() < 2e-3 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    model.layers[0].requires_grad_(False)  # makes another plan
    SPECIMENS["decoder"].loss_of(model, 3, 0).backward()


def test_other_dtypes_than_that_of_the_reduction_are_refused() -> None:
    layer = torch.nn.Linear(2, 2)
    for policy in (MixedPrecisionPolicy(torch.bfloat16, torch.float32), MixedPrecisionPolicy()):
        with pytest.raises(ValueError, match=r"MixedPrecisionPolicy\(reduce_dtype=torch.bfloat16\)"):
            fully_shard(layer, mp_policy=policy, grad_dtype=torch.bfloat16)


def test_a_torch_that_has_gradients_in_the_parameters_dtype_only_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "torch", SimpleNamespace(Tensor=object, __version__="2.9.1"))
    with pytest.raises(NotImplementedError, match=r"torch 2\.9\.1 does not have"):
        fully_shard(torch.nn.Linear(2, 2), mp_policy=BF16, grad_dtype=torch.bfloat16)


@dataclass(frozen=True)
class WithGradDtype(MixedPrecisionPolicy):
    """As on torch's main branch."""

    grad_dtype: torch.dtype | None = field(default=None, kw_only=True)


@on_ranks(1)
def test_a_policy_may_say_the_dtype_of_gradients() -> None:
    """Prevents: a field of the policy that is not read."""
    policy = WithGradDtype(torch.bfloat16, torch.bfloat16, grad_dtype=torch.bfloat16)
    model = fully_shard(torch.nn.Linear(2, 2), mesh=world_mesh(), mp_policy=policy)
    model(torch.ones(1, 2)).sum().backward()  # type: ignore[operator]
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


@on_ranks(1)
def test_a_dtype_of_one_parameters_gradient_is_refused_where_torch_follows_it() -> None:
    """Prevents: gradients summed in bf16 that FSDP2 would sum in fp32."""
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    layer.bias.grad_dtype = torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requirements, "REDUCES_AS_GRAD", True)
        with pytest.raises(NotImplementedError, match=r"bias.grad_dtype = torch.float32: use .*=torch.float32"):
            fully_shard(layer, mesh=world_mesh())
