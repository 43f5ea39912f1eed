"""Parameters sharded on the dimension that ``shard_placement_fn`` says: as stock FSDP2 has them, in planned bytes."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as stock
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import yafsdp_like as ours
from tests.ranks import on_ranks, run_ranks
from tests.training import full, world_mesh

both_transports = pytest.mark.parametrize("transport", ["process_group", "peer"])
POLICIES = [(None, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None)]
FULL = StateDictOptions(full_state_dict=True)


class Mixer(nn.Module):
    """Parameters of one to four dimensions, sizes of which are multiples of two, beside a bias of an odd one."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 4)
        self.kernel = nn.Conv2d(2, 4, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(3, 4, 2))
        self.lookup = nn.Embedding(5, 6)
        self.head = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x[:, 0].abs().mul(10).long() % 5
        hidden = torch.relu(self.project(self.lookup(tokens) + x))
        image = hidden[:, None, None, :].expand(-1, 2, 3, -1).to(self.kernel.weight.dtype)
        mixed = torch.einsum("bchw,hwk->bk", self.kernel(image), self.mix)
        return self.head(mixed)


class MeshInfo(NamedTuple):
    """What says over which mesh, as FSDP2's ``FSDPMeshInfo`` does."""

    mesh: Any
    shard_mesh_dim: int = 0
    replicate_mesh_dim: int | None = None


class Answer(NamedTuple):
    """What newer versions of torch take from the function: FSDP2's ``ShardPlacementResult``."""

    placement: Shard | None
    mesh_info: MeshInfo


def last_even(parameter: nn.Parameter) -> Shard | None:
    """The last dimension that two ranks have equal parts of, counted from the end; None where it is the first."""
    even = [dim for dim in range(1, parameter.dim()) if parameter.shape[dim] % 2 == 0]
    return Shard(even[-1] - parameter.dim()) if even else None


def build(names: Any, dtypes: tuple[Any, Any] = (None, None), mesh: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(Mixer(), nn.Linear(3, 6), Mixer())
    policy = names.MixedPrecisionPolicy(*dtypes)
    shared: Any = {"mesh": mesh or world_mesh(), "shard_placement_fn": last_even, "mp_policy": policy, **options}
    for module in (model[0], model[2], model):
        names.fully_shard(module, **shared)
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def train(model: Any, steps: int = 3, accumulates: bool = False, foreach: bool | None = None) -> list[Any]:
    """Losses, norms, and gradients of the first step, with its local parts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=foreach)
    found: list[Any] = []
    for step in range(steps):
        for micro in range(2 if accumulates else 1):
            model.set_requires_gradient_sync(not accumulates or micro == 1 or step == 2)
            loss = model(batch(2 * step + micro)).square().mean()
            loss.backward()
            found.append(loss.detach())
        if step == 0:
            found += [p.grad.to_local().clone() for p in model.parameters()]
        found.append(full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a, b)


@pytest.mark.slow(unless=lambda dtypes, accumulates: accumulates == (dtypes[0] is not None) and dtypes != POLICIES[2])
@pytest.mark.parametrize("dtypes", POLICIES, ids=["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_training_has_the_bits_of_stock_and_its_placements(dtypes: Any, accumulates: bool) -> None:
    run_ranks(train_twins, dtypes, accumulates)


def train_twins(dtypes: Any, accumulates: bool) -> None:
    mine, theirs = build(ours, dtypes), build(stock, dtypes)
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.placements, a.shape, a.stride()) == (b.placements, b.shape, b.stride()), name
        assert_same([a.to_local()], [b.to_local()])
    assert mine[0].project.weight.placements == (Shard(1),)
    assert mine[0].kernel.weight.placements == (Shard(1),)
    assert mine[0].mix.placements == (Shard(2),)
    assert mine[0].project.bias.placements == (Shard(0),)
    assert_same(train(mine, accumulates=accumulates), train(theirs, accumulates=accumulates))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(full(a), full(b))
    for a, b in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert a[1].placements == b[1].placements


@both_transports
@pytest.mark.parametrize("options", [{}, {"split_master": True}, {"offload_policy": ours.CPUOffloadPolicy(False)}])
def test_the_numbers_are_those_of_parameters_sharded_by_rows(transport: str, options: Any) -> None:
    """Prevents: a path that knows rows only, and chunks that are copied to another parameter's place."""
    if "offload_policy" in options and transport == "peer":
        options = {"reshard_after_forward": False, "debug": True}
    run_ranks(train_by_rows_and_not, transport, options)


def train_by_rows_and_not(transport: str, options: Any) -> None:
    dtypes = (torch.bfloat16, torch.float32)
    by_dim = build(ours, dtypes, transport=transport, **options)
    by_rows = build(ours, dtypes, transport=transport, **options, shard_placement_fn=None)
    outputs = [train(model, 1, foreach=False) for model in (by_dim, by_rows)]
    assert torch.equal(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][-1], outputs[1][-1])
    for a, b in zip(by_dim.parameters(), by_rows.parameters(), strict=True):
        torch.testing.assert_close(full(a), full(b))


@on_ranks()
def test_the_plan_counts_what_is_copied_and_nothing_where_all_is_sharded_by_rows() -> None:
    """Staging has what the largest unit needs: full parameters in bf16, and this rank's part of fp32 sums."""
    model = build(ours, (torch.bfloat16, torch.float32))
    permuted = [p for p in model[0].parameters() if p.placements != (Shard(0),)]
    assert len(permuted) == 5

    def padded(*sizes: int) -> int:
        return sum(-(-size // 256) * 256 for size in sizes)

    copied = padded(*(2 * p.numel() for p in permuted)) + padded(*(4 * p.to_local().numel() for p in permuted))
    assert model.memory_plan().nbytes_of("layout staging") == copied
    model(batch(0)).sum().backward()
    plan = model.memory_plan()
    assert plan.nbytes_of("layout staging") == copied
    assert model.memory_report().arena_nbytes == plan.nbytes
    by_rows = build(ours, (torch.bfloat16, torch.float32), shard_placement_fn=lambda _: Shard(0))
    assert by_rows.memory_plan().nbytes_of("layout staging") == 0
    assert by_rows.memory_plan().nbytes < plan.nbytes


@pytest.mark.slow
def test_one_rank_needs_no_staging() -> None:
    run_ranks(train_alone, world_size=1)


def train_alone() -> None:
    mine, theirs = build(ours), build(stock)
    assert mine.memory_plan().nbytes_of("layout staging") == 0
    assert [p.placements for p in mine.parameters()] == [p.placements for p in theirs.parameters()]
    assert_same(train(mine), train(theirs))


@pytest.mark.slow
def test_replicas_train_alike() -> None:
    run_ranks(train_replicas, world_size=4)


def train_replicas() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    mine, theirs = build(ours, mesh=mesh), build(stock, mesh=mesh)
    assert mine[0].project.weight.placements == (Replicate(), Shard(1))
    assert_same(train(mine), train(theirs))


@on_ranks()
def test_full_parameters_are_contiguous_and_state_dicts_go_both_ways() -> None:
    mine, theirs = build(ours), build(stock)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(1.0)
    state = get_model_state_dict(theirs, options=FULL)
    set_model_state_dict(mine, dict(state), options=FULL)  # which it changes
    for name, value in get_model_state_dict(mine, options=FULL).items():
        assert torch.equal(value, state[name]), name
    mine[0].unshard()
    for name, p in mine[0].named_parameters():
        assert not isinstance(p, DTensor)
        assert p.is_contiguous()
        assert torch.equal(p, state[f"0.{name}"]), name
    mine[0].reshard()
    assert mine[0].mix.placements == (Shard(2),)


@on_ranks()
def test_dimensions_that_cannot_be_sharded_are_refused_as_stock_refuses_them() -> None:
    for shape, answer, kind, message in [
        ((4, 3), Shard(1), NotImplementedError, "FSDP does not support uneven sharding on dim 1"),
        ((4, 3), Shard(-1), NotImplementedError, "FSDP does not support uneven sharding on dim 1"),
        ((4,), Shard(1), AssertionError, "Shard dim 1 is invalid for 1D tensor"),
    ]:
        for names in (ours, stock):
            module = nn.Module()
            module.weight = nn.Parameter(torch.ones(shape))
            with pytest.raises(kind, match=message):
                names.fully_shard(module, mesh=world_mesh(), shard_placement_fn=lambda _, a=answer: a)
    other = Answer(Shard(1), MeshInfo(init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "replicate")), 0, 1))
    with pytest.raises(NotImplementedError, match=r"for weight of Linear, whose mesh is to be 1-D, or 2-D with the"):
        ours.fully_shard(nn.Linear(2, 2), mesh=world_mesh(), shard_placement_fn=lambda _: other)
    same = [Answer(Shard(1), MeshInfo(world_mesh())), Answer(None, MeshInfo(world_mesh()))]
    model: Any = ours.fully_shard(nn.Linear(2, 2), mesh=world_mesh(), shard_placement_fn=lambda p: same[2 - p.dim()])
    assert (model.weight.placements, model.bias.placements) == ((Shard(1),), (Shard(0),))
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"return Shard\(dim\) or None, found 1 for weight of Linear"):
        ours.fully_shard(model, mesh=world_mesh(), shard_placement_fn=lambda _: 1)
    assert type(model) is nn.Linear  # nothing of it was sharded
    assert not isinstance(model.weight, DTensor)
