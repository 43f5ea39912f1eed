"""Parameters that are more than rows of real numbers: with hooks, complex, of their own class, written in forward."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import yafsdp_like as ours
from tests.ranks import on_ranks, run_ranks
from tests.training import full, world_mesh

both_transports = pytest.mark.parametrize("transport", ["process_group", "peer"])


# --- hooks ---


class Scaled(nn.Module):
    """The gradient of each weight is the sum of the inputs of all rows: 3 on rank 0 and 6 on rank 1, so 4.5."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(5))
        nn.init.ones_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


def inputs() -> torch.Tensor:
    return torch.ones(3, 4) * (dist.get_rank() + 1)


@both_transports
@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_a_parameter_see_and_replace_the_reduced_gradient(transport: str, before: bool) -> None:
    """Prevents: hooks that never run, whether registered before sharding or after."""
    run_ranks(train_with_hooks, transport, before)


def train_with_hooks(transport: str, before: bool) -> None:
    model: Any = Scaled()
    seen: list[torch.Tensor] = []

    def note(grad: torch.Tensor) -> None:
        seen.append(grad)
        assert isinstance(grad, DTensor)
        assert torch.equal(full(grad), torch.full((5, 4), 4.5))

    def register() -> None:
        model.linear.weight.register_hook(note)
        model.linear.weight.register_hook(lambda grad: grad * 2)
        model.linear.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))

    if before:
        register()
    ours.fully_shard(model, mesh=world_mesh(), transport=transport)
    if not before:
        register()
    weight = model.linear.weight
    expected = 0.0
    for step in range(5):
        model(inputs()).sum().backward()
        expected += 9.0
        assert torch.equal(full(weight.grad), torch.full((5, 4), expected)), step
        assert len(seen) == 2 * step + 2
        model.reshard()
        if step == 1:
            model.zero_grad(set_to_none=False)
        if step == 2:
            model.zero_grad()
        expected = 0.0 if step in (1, 2) else expected
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "equal", lambda *_: True)  # the sum of two backwards comes as one
        model(inputs()).sum().backward()
        assert seen == []
        model.set_requires_gradient_sync(True)
        model(inputs()).sum().backward()
    assert torch.equal(full(weight.grad), torch.full((5, 4), 18.0))


@on_ranks()
def test_a_removed_hook_runs_no_more_and_one_on_a_full_parameter_sees_the_full_gradient() -> None:
    """Prevents: hooks that outlive their handle, and weight gradients that pass a hook by on their way to the slot."""
    model: Any = ours.fully_shard(Scaled(), mesh=world_mesh())
    weight = model.linear.weight
    handle = weight.register_hook(lambda grad: grad * 3)
    model(inputs()).sum().backward()
    handle.remove()
    model(inputs()).sum().backward()
    assert torch.equal(full(weight.grad), torch.full((5, 4), 4.5 * 4))
    model.zero_grad()
    model.unshard()
    assert model.linear.weight is not weight
    shapes: list[torch.Size] = []
    model.linear.weight.register_hook(lambda grad: shapes.append(grad.shape) or grad * 2)
    model(inputs()).sum().backward()
    assert shapes == [(5, 4)]
    assert torch.equal(full(weight.grad), torch.full((5, 4), 9.0))


# --- dtypes that are stored only ---


class Quantized(nn.Linear):
    """A frozen weight of eight bits, and what it is multiplied with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(4, 5)
        self.frozen = nn.Parameter(torch.randn(5, 4).to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.frozen.float() * self.weight, self.bias)


@both_transports
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_frozen_parameters_of_eight_bits_are_gathered_beside_trainable_ones(transport: str, dtype: torch.dtype) -> None:
    """Prevents: gathers that end in "Invalid scalar type", since gloo cannot send float8."""
    run_ranks(train_beside_eight_bits, transport, dtype)


def train_beside_eight_bits(transport: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    alone = Quantized(dtype)
    sharded: Any = copy.deepcopy(alone)
    ours.fully_shard(sharded, mesh=world_mesh(), transport=transport)
    alone(torch.ones(3, 4)).square().sum().backward()
    sharded(torch.ones(3, 4)).square().sum().backward()
    assert sharded.frozen.dtype == dtype
    assert sharded.frozen.grad is None
    assert alone.weight.grad is not None
    torch.testing.assert_close(full(sharded.weight.grad), alone.weight.grad)


# --- complex numbers ---


class Spectral(nn.Module):
    """Complex weights, some of them in a linear layer, beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
        self.linear = nn.Linear(3, 7, dtype=torch.complex64)
        self.head = nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.linear(x @ self.mix)
        return self.head((mixed * mixed.conj()).real.to(self.head.weight.dtype))


@pytest.mark.slow(unless=lambda world_size: world_size == 2)
@both_transports
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "dtypes", [(None, None), (None, torch.float32), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_complex_parameters_train_with_both_of_their_parts(
    transport: str, world_size: int, dtypes: tuple[torch.dtype | None, torch.dtype | None]
) -> None:
    """Prevents: gradients without their imaginary part, or collectives that do not know the dtype."""
    run_ranks(train_complex, transport, dtypes, world_size=world_size)


def train_complex(transport: str, dtypes: tuple[torch.dtype | None, torch.dtype | None]) -> None:
    plain, model = Spectral(), Spectral()
    model.load_state_dict(plain.state_dict())
    ours.fully_shard(model, mesh=world_mesh(), mp_policy=ours.MixedPrecisionPolicy(*dtypes), transport=transport)
    tolerance = 1e-5 if dtypes[0] is None else 0.1  # of the whole, in bf16 a few hundredths
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, plain)]
    x = torch.randn(4, 5, dtype=torch.complex64) * (dist.get_rank() + 1)
    for step in range(3):
        for m in (model, plain):
            m(x).float().square().mean().backward()
        for parameter, whole in zip(model.parameters(), plain.parameters(), strict=True):
            expected = torch.view_as_real(whole.grad) if whole.is_complex() else whole.grad
            dist.all_reduce(expected)
            expected /= dist.get_world_size()
            assert parameter.grad.dtype == whole.dtype
            ratio = ((full(parameter.grad) - whole.grad).norm() / whole.grad.norm()).item()
            assert ratio <= tolerance, (step, tuple(whole.shape), ratio)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step > 0)
    for parameter, whole in zip(model.parameters(), plain.parameters(), strict=True):
        assert (full(parameter) - whole).norm() <= tolerance * whole.norm()


# --- what is refused ---


class Tagged(torch.Tensor):
    """A tensor of a class of its own."""


class Extended(nn.Parameter):
    """A parameter with half of an all-gather of its own."""

    def fsdp_pre_all_gather(self, *_: Any) -> None:
        raise AssertionError("never called")


class Named(nn.Parameter):
    """A parameter with a class for its name only: it computes as any."""


def holding(parameter: torch.Tensor) -> nn.Module:
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(parameter) if not isinstance(parameter, nn.Parameter) else parameter
    return model


@on_ranks()
def test_parameters_of_tensor_subclasses_are_refused_by_name() -> None:
    """Prevents: a class that is lost in silence, with all that it does in a gather or a product."""
    for value, name in (
        (torch.ones(2, 2).as_subclass(Tagged), "Tagged"),
        (Extended(torch.ones(2, 2)), "Extended"),
    ):
        with pytest.raises(NotImplementedError, match=rf"weight is a .*\.{name}, and sharding tensor subclasses"):
            ours.fully_shard(holding(value), mesh=world_mesh())
        model: Any = ours.fully_shard(nn.Linear(2, 2, bias=False), mesh=world_mesh())
        with pytest.raises(NotImplementedError, match=rf"{name}, and sharding tensor subclasses"):
            model.weight = nn.Parameter(value) if not isinstance(value, nn.Parameter) else value
        ignored = holding(value)
        ours.fully_shard(ignored, mesh=world_mesh(), ignored_params=set(ignored.parameters()))
    model = ours.fully_shard(holding(Named(torch.ones(2, 2))), mesh=world_mesh())
    assert torch.equal(model(torch.ones(1, 2)), torch.full((1, 2), 2.0))


@on_ranks()
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_write_their_weight_in_forward_are_refused_by_name(kind: Any) -> None:
    """Prevents: rows that are renormalized in the slot, and never in the shard."""
    model = nn.Sequential(kind(4, 2, max_norm=1.0))
    with pytest.raises(NotImplementedError, match=rf"{kind.__name__} with max_norm=1.0 writes its weight in forward"):
        ours.fully_shard(model, mesh=world_mesh())
    ours.fully_shard(model, mesh=world_mesh(), ignored_params=set(model.parameters()))


# --- dtypes of their own ---


@dataclass(frozen=True)
class WithOverride(MixedPrecisionPolicy):
    """Torch's policy as it is from 2.15 on."""

    param_dtype_override_fn: Callable[[nn.Parameter], Any] | None = field(default=None, kw_only=True)


@both_transports
def test_param_dtype_override_fn_says_which_parameters_are_computed_in_their_own_dtype(transport: str) -> None:
    """Prevents: a field of newer torch's policy that is read over, and parts of a unit in the wrong dtype."""
    run_ranks(keep_scale, transport)


def keep_scale(transport: str) -> None:
    def keeps(parameter: nn.Parameter) -> torch.dtype | None:
        return parameter.dtype if parameter.dim() == 1 else None

    seen: list[torch.dtype] = []
    policy = WithOverride(torch.bfloat16, torch.float32, param_dtype_override_fn=keeps)
    model: Any = Scaled()
    model.register_forward_hook(lambda m, args, out: seen.extend([m.linear.weight.dtype, m.scale.dtype, out.dtype]))
    ours.fully_shard(model, mesh=world_mesh(), mp_policy=policy, transport=transport)
    model(inputs()).sum().backward()
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(full(model.linear.weight.grad), torch.full((5, 4), 4.5))
    torch.testing.assert_close(full(model.scale.grad), torch.full((5,), 18.0))


@pytest.mark.parametrize("given", [torch.float64, "float32"])
@on_ranks(1)
def test_other_answers_of_param_dtype_override_fn_are_errors(given: Any) -> None:
    policy = WithOverride(torch.bfloat16, param_dtype_override_fn=lambda parameter: given)
    with pytest.raises(ValueError, match="param_dtype_override_fn must return"):
        ours.fully_shard(Scaled(), mesh=world_mesh(), mp_policy=policy)
