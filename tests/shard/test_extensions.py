"""Tensor classes that say what is all-gathered of them: fewer bytes travel, and numbers are those of stock FSDP2."""

import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as stock
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

import yafsdp_like as ours
from tests.ranks import on_ranks, run_ranks
from tests.training import full, world_mesh
from yafsdp_like.comm.process_group import ProcessGroupTransport

aten = torch.ops.aten
KEPT = {
    aten.clone.default,
    aten.copy_.default,
    aten.detach.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.view.default,
    aten.as_strided.default,
    aten._to_copy.default,
}


class Wrapped(torch.Tensor):
    """Values in fp32, which operations see; those that only move values keep the class."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> "Wrapped":
        return cls(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda t: t.values, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, cls, found) if func in KEPT else found


class Rounded(Wrapped):
    """All-gathered in bfloat16; what arrives is the full parameter."""

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        assert mesh.ndim == 1
        return (self.values.to(torch.bfloat16),), None

    def fsdp_post_all_gather(self, outputs: Any, metadata: Any, param_dtype: torch.dtype, *, out: Any = None) -> Any:
        (data,) = outputs
        if out is None:
            return data, (data,)
        assert out.data_ptr() == data.data_ptr()
        return None


class Shown(Rounded):
    """The same, where what arrives is of the class again, with its attributes."""

    def fsdp_post_all_gather(self, outputs: Any, metadata: Any, param_dtype: torch.dtype, *, out: Any = None) -> Any:
        (data,) = outputs
        if out is None:
            return Shown(data), (data,)
        assert out.values.data_ptr() == data.data_ptr()
        return None


class Padded(Rounded):
    """The same for ranks that have unequal parts, as stock wants it."""

    def fsdp_pre_all_gather(  # type: ignore[override]
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> Any:
        padded = torch.zeros(-(-outer_size[0] // mesh.size()), *self.shape[1:], dtype=torch.bfloat16)
        padded[: self.shape[0]] = self.values
        return (padded,), None


class Quantized(Wrapped):
    """All-gathered as bytes and a scale per row, of which the full parameter is computed."""

    def fsdp_pre_all_gather(self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
        assert len(outer_size) == len(outer_stride) == self.dim()
        assert isinstance(module, nn.Module)
        values = self.values
        scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-6) / 127
        return ((values / scale).round().to(torch.int8), scale), tuple(outer_size)

    def fsdp_post_all_gather(self, outputs: Any, metadata: Any, param_dtype: torch.dtype, *, out: Any = None) -> Any:
        data, scale = outputs
        value = (data.float() * scale).to(param_dtype)
        if out is None:
            return value, (value,)
        with torch.no_grad(), _unsafe_preserve_version_counter(out):
            out.copy_(value)
        return None


class Tower(nn.Module):
    """Three linear layers; the first two have weights of the class, and an odd number of hidden features, or not."""

    def __init__(self, cls: Any, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, hidden), nn.Linear(hidden, 8), nn.Linear(8, 6)])
        for layer in self.layers[:2]:
            layer.weight = nn.Parameter(cls(layer.weight.detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)))
        return x


def build(names: Any, cls: Any, mesh: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    hidden = 5 if cls is Padded else 4
    model = nn.Sequential(*(Tower(cls, hidden) for _ in range(3)))
    policy = names.MixedPrecisionPolicy(None if cls is Quantized else torch.bfloat16)
    for module in (*model, model):
        names.fully_shard(module, mesh=mesh or world_mesh(), mp_policy=policy, **options)
    return model


def train(model: Any, steps: int = 3) -> list[torch.Tensor]:
    """Losses, gradients, norms, and values at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    found = []
    for step in range(steps):
        for micro in range(2):
            generator = torch.Generator().manual_seed(20 * step + 10 * micro + dist.get_rank())
            loss = model(torch.randn(4, 6, generator=generator)).square().mean()
            loss.backward()
            found.append(loss.detach())
        found += [p.grad.to_local().clone() for p in model.parameters()]
        found.append(full(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    return found + [values_of(p) for p in model.parameters()]


def values_of(param: torch.Tensor) -> torch.Tensor:
    local = param.detach()._local_tensor if isinstance(param, DTensor) else param.detach()
    return local.values.clone() if isinstance(local, Wrapped) else local.clone()


def assert_same(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a, b)


@pytest.mark.slow(unless=lambda transport, options: transport == "process_group" and not options)
@pytest.mark.parametrize("cls", [Rounded, Shown, Padded, Quantized])
@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
def test_training_has_the_bits_of_stock(cls: Any, transport: str, options: Any) -> None:
    run_ranks(train_twins, cls, transport, options)


def train_twins(cls: Any, transport: str, options: Any) -> None:
    mine = build(ours, cls, transport=transport, **options)
    theirs = build(stock, cls, **options)
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.placements, a.shape, a.stride(), a.dtype) == (b.placements, b.shape, b.stride(), b.dtype), name
        assert type(a.to_local()) is type(b.to_local())
    assert_same(train(mine), train(theirs))


@pytest.mark.parametrize("cls", [Rounded, Quantized])
def test_the_wire_and_the_slots_have_the_bytes_that_the_class_returned(cls: Any) -> None:
    run_ranks(count_bytes, cls)


def count_bytes(cls: Any) -> None:
    model = build(ours, cls)
    sent: list[int] = []
    before = ProcessGroupTransport._all_gather

    def count(self: Any, pieces: Any) -> None:
        sent.extend([sum(t.nbytes for _, inputs in pieces for t in inputs)] if pieces else [])
        before(self, pieces)

    with mock.patch.object(ProcessGroupTransport, "_all_gather", count):
        model(torch.randn(4, 6)).sum().backward()
    weights = [layer.weight for layer in model[0].layers[:2]]
    rows = [-(-w.shape[0] // 2) for w in weights]
    if cls is Rounded:
        extended = [[2 * r * w.shape[1]] for r, w in zip(rows, weights, strict=True)]
    else:
        extended = [[r * w.shape[1], 4 * r] for r, w in zip(rows, weights, strict=True)]
    others = [p for p in model[0].parameters() if all(p is not w for w in weights)]
    itemsize = 4 if cls is Quantized else 2
    numel = [-(-p.shape[0] // 2) * p.shape[1:].numel() for p in others]
    plain = [itemsize * n for n in numel]
    assert set(sent) == {sum(map(sum, extended)) + sum(plain)}  # of each unit, forward and backward

    def padded(*sizes: int) -> int:
        return sum(-(-size // 256) * 256 for size in sizes)

    plan = model.memory_plan()
    slot = sum(padded(*(2 * size for size in sizes)) for sizes in extended) + padded(*(2 * size for size in plain))
    assert plan.nbytes_of("gather slots") == 2 * slot
    cast = 0 if cls is Quantized else padded(*plain)
    assert plan.nbytes_of("compute_shard") == 3 * (sum(padded(*sizes) for sizes in extended) + cast)
    assert plan.nbytes_of("main_shard") == 3 * padded(*(4 * n for n in numel))
    assert model.memory_report().arena_nbytes == plan.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Rounded, Quantized])
def test_one_rank_and_replicas_train_as_under_stock(cls: Any) -> None:
    if cls is not Quantized:  # at world size 1 stock takes a single tensor to be all-gathered
        run_ranks(train_alone, cls, world_size=1)
    run_ranks(train_replicas, cls, world_size=4)


def train_alone(cls: Any) -> None:
    assert_same(train(build(ours, cls)), train(build(stock, cls)))


def train_replicas(cls: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert_same(train(build(ours, cls, mesh=mesh)), train(build(stock, cls, mesh=mesh)))


@on_ranks()
def test_what_the_class_makes_has_memory_only_while_the_unit_is_unsharded() -> None:
    """Prevents: full parameters that stay beside the slots, and views that autograd saved with bytes of others."""
    model = build(ours, Quantized)
    loss = model(torch.randn(4, 6)).sum()
    made = [x for unit in model[1:] for x in unit._unit().gather_slot.extended.values()]
    assert len(made) == 4
    assert all(x.inner and x.inner[0].untyped_storage().nbytes() == 0 for x in made)
    loss.backward()
    assert all(x.inner[0].untyped_storage().nbytes() == 0 for x in made)
    model[1].unshard()
    weight = model[1].layers[0].weight
    assert weight.untyped_storage().nbytes() > 0
    assert weight is made[0].full
    model[1].reshard()
    assert isinstance(model[1].layers[0].weight, DTensor)


class Growing(Rounded):
    """All-gathers another dtype after some calls."""

    num_calls = 0

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        Growing.num_calls += 1
        return (self.values.to(torch.bfloat16 if Growing.num_calls < 8 else torch.float32),), None


class Strange(Rounded):
    """Wants what nobody gives it."""

    def fsdp_pre_all_gather(self, mesh: Any, more: Any) -> Any:  # type: ignore[override]
        raise AssertionError("never called")


@on_ranks()
def test_what_cannot_be_planned_or_run_is_refused_by_name() -> None:
    Growing.num_calls = 0
    model = build(ours, Growing)  # of six weights, and forwards call it again
    with pytest.raises(
        RuntimeError, match=r"fsdp_pre_all_gather of .*layers.*weight returned .*float32.*, expected .*bfloat16"
    ):
        for _ in range(3):
            model(torch.randn(4, 6))
    with pytest.raises(TypeError, match=r"expected fsdp_pre_all_gather.* of Strange, the class of weight"):
        build(ours, Strange)
    with pytest.raises(NotImplementedError, match=r"weight of Linear is a Rounded, .* is sharded by rows only"):
        build(ours, Rounded, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)
    with pytest.raises(NotImplementedError, match=r"weight of Linear is a Rounded, .* keeps it in host memory"):
        build(ours, Rounded, offload_policy=ours.CPUOffloadPolicy(pin_memory=False))
    model = build(ours, Rounded)
    optimizer = ours.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    with pytest.raises(NotImplementedError, match=r"0.layers.0.weight is of a class .*Rounded, which AdamW's kernels"):
        optimizer.step()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
def test_float8_all_gather_of_torchao_trains_as_under_stock_with_a_byte_per_weight() -> None:
    run_ranks(train_float8)


def train_float8() -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    found, sent = [], list[int]()
    before = ProcessGroupTransport._all_gather

    def count(self: Any, pieces: Any) -> None:
        sent.extend(t.nbytes for _, inputs in pieces for t in inputs if t.numel() > 32)
        before(self, pieces)

    for names in (ours, stock):
        torch.manual_seed(0)
        model: Any = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))).to(torch.bfloat16)
        config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
        convert_to_float8_training(model, config=config)
        for module in (*model, model):
            names.fully_shard(module, mesh=world_mesh())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        results = []
        with mock.patch.object(ProcessGroupTransport, "_all_gather", count):
            for step in range(3):
                generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
                loss = model(torch.randn(16, 32, generator=generator).to(torch.bfloat16)).square().mean()
                loss.backward()
                results += [loss.detach(), *(p.grad.to_local().clone() for p in model.parameters())]
                optimizer.step()
                optimizer.zero_grad()
        found.append(results)
    assert_same(*found)
    assert set(sent) == {32 * 32 // 2}  # a byte for each of this rank's values
