"""Parameters that are DTensors already, of tensor parallelism or of experts: sharded as stock FSDP2 shards them.

Four gloo ranks are two by two, unless a test says otherwise. A module's inputs depend on its data parallel rank alone.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as stock
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import yafsdp_like as ours
from tests.ranks import on_ranks, run_ranks
from tests.training import full

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
SLOW = pytest.mark.slow
BF16 = (torch.bfloat16, torch.float32)
FULL = StateDictOptions(full_state_dict=True)
both = pytest.mark.parametrize("kind", ["plain", "sequence"])
KNOWS_MESHES = hasattr(_fsdp_common, "ShardPlacementResult")  # of parameters, as torch 2.11 does not


def over(mesh: DeviceMesh, placement: Shard | None = None) -> Any:
    """Return FSDP2's answer for a parameter that is sharded over ``mesh``, or what looks like it."""
    make: Any = getattr(_fsdp_common, "ShardPlacementResult", SimpleNamespace)
    return make(placement=placement, mesh_info=_fsdp_common.FSDPMeshInfo(mesh, shard_mesh_dim=0))


class Block(nn.Module):
    """A residual block of two linear layers behind a norm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, hidden)
        self.down = nn.Linear(hidden, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


# With "sequence" whatever passes between blocks is a DTensor, and gradients of norms are sums that ranks have parts of.
PLANS: dict[str, Any] = {
    "plain": lambda: {"up": ColwiseParallel(), "down": RowwiseParallel()},
    "sequence": lambda: {
        "norm": SequenceParallel(use_local_output=False),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    },
}


def mesh_of(*shape: int) -> DeviceMesh:
    names = ("replicate", "dp", "tp")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def build(names: Any, mesh: DeviceMesh, kind: str, dtypes: Any = (None, None), hidden: int = 10) -> Any:
    """With 10 hidden features ranks that shard have unequal parts of the parts of tensor parallel ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(hidden) for _ in range(3)))
    for block in model:
        parallelize_module(block, mesh["tp"], PLANS[kind]())
    if kind == "sequence":
        scatter = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
        parallelize_module(model, mesh["tp"], {"0": scatter})
    data = mesh["replicate", "dp"] if mesh.ndim == 3 else mesh["dp"]
    for module in (*model, model):
        names.fully_shard(module, mesh=data, mp_policy=names.MixedPrecisionPolicy(*dtypes))
    return model


def batch(step: int, mesh: DeviceMesh) -> torch.Tensor:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    number = sum(index * 2**position for position, index in enumerate(coordinate[:-1]))
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(10 * step + number))


def loss_of(model: Any, step: int, mesh: DeviceMesh) -> torch.Tensor:
    output = model(batch(step, mesh))
    return (output.full_tensor() if isinstance(output, DTensor) else output).float().square().mean()


def train(model: Any, mesh: DeviceMesh, clips: bool, accumulates: bool) -> list[torch.Tensor]:
    """Losses, norms, this rank's gradients and parameters of three steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    found = []
    for step in range(3):
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1 or step == 0 or not accumulates)
            loss = loss_of(model, 2 * step + micro, mesh)
            loss.backward()
            found.append(loss.detach())
        found += [p.grad.to_local().clone() for p in model.parameters()]
        if clips:
            found.append(full(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        optimizer.zero_grad()
    return found + [p.to_local().detach().clone() for p in model.parameters()]


def assert_same(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a, b)


def assert_placed_alike(mine: Any, theirs: Any) -> None:
    for (name, a), (other, b) in zip(mine, theirs, strict=True):
        assert name == other
        assert (a.placements, a.device_mesh, a.shape, a.stride(), a.dtype) == (
            *(b.placements, b.device_mesh),
            *(b.shape, b.stride(), b.dtype),
        ), name


@pytest.mark.parametrize(
    ("kind", "shape", "dtypes"),
    [
        ("plain", (2, 2), (None, None)),
        ("sequence", (2, 2), (None, None)),
        pytest.param("sequence", (2, 2), BF16, marks=SLOW),
        pytest.param("plain", (2, 2), BF16, marks=SLOW),
        pytest.param("plain", (1, 2), (None, None), marks=SLOW),
        pytest.param("sequence", (2, 1), (None, None), marks=SLOW),
        pytest.param("plain", (2, 1, 2), (None, None), marks=SLOW),
        pytest.param("sequence", (2, 2, 1), BF16, marks=SLOW),
    ],
)
def test_training_has_the_bits_of_stock_and_its_placements(kind: str, shape: tuple[int, ...], dtypes: Any) -> None:
    world_size = torch.Size(shape).numel()
    run_ranks(train_twins, kind, shape, dtypes, world_size=world_size)


def train_twins(kind: str, shape: tuple[int, ...], dtypes: Any) -> None:
    mesh = mesh_of(*shape)
    mine, theirs = (build(names, mesh, kind, dtypes) for names in (ours, stock))
    assert_placed_alike(mine.named_parameters(), theirs.named_parameters())
    # Stock clips on one mesh only, and adds up what ranks have parts of before it adds the parts.
    one_mesh = kind == "sequence"
    assert_same(*(train(model, mesh, clips=one_mesh, accumulates=not one_mesh) for model in (mine, theirs)))
    loss_of(mine, 9, mesh).backward()
    loss_of(theirs, 9, mesh).backward()
    assert_placed_alike(
        [(name, p.grad) for name, p in mine.named_parameters()],
        [(name, p.grad) for name, p in theirs.named_parameters()],
    )
    assert_placed_alike(mine.state_dict().items(), theirs.state_dict().items())
    for module in (mine[0], theirs[0]):
        module.unshard()
    for (name, a), (_, b) in zip(mine[0].named_parameters(), theirs[0].named_parameters(), strict=True):
        assert isinstance(a, DTensor) == isinstance(b, DTensor), name
        if isinstance(b, DTensor):
            assert_placed_alike([(name, a)], [(name, b)])
        assert torch.equal(full(a), full(b)), name


@both
def test_a_full_state_dict_goes_from_stock_to_here_and_back(kind: str) -> None:
    run_ranks(exchange_states, kind, world_size=4)


def exchange_states(kind: str) -> None:
    mesh = mesh_of(2, 2)
    mine, theirs = (build(names, mesh, kind, hidden=12) for names in (ours, stock))  # torch loads equal parts only
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(1.5)
    state = get_model_state_dict(theirs, options=FULL)
    set_model_state_dict(mine, dict(state), options=FULL)
    assert_same([p.to_local() for p in mine.parameters()], [p.to_local() for p in theirs.parameters()])
    for name, value in get_model_state_dict(mine, options=FULL).items():
        assert torch.equal(value, state[name]), name
    assert_same([loss_of(mine, 0, mesh)], [loss_of(theirs, 0, mesh)])


@pytest.mark.parametrize("norm_type", [pytest.param(1.0, marks=SLOW), 2.0, float("inf")])
def test_clipping_is_exact_where_parameters_are_on_several_meshes(norm_type: float) -> None:
    """Prevents: an error of torch's, a norm that counts ranks that hold the same twice, or one mesh's norm alone."""
    run_ranks(clip_mixed, norm_type, world_size=4)


def clip_mixed(norm_type: float) -> None:
    mesh = mesh_of(2, 2)
    model = build(ours, mesh, "plain")
    loss_of(model, 0, mesh).backward()
    before = [full(p.grad) for p in model.parameters()]
    expected = torch.stack([torch.linalg.vector_norm(grad, norm_type) for grad in before]).norm(norm_type)
    for foreach in (None, False):
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9, norm_type, foreach=foreach)
        torch.testing.assert_close(full(norm), expected)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type)
    for p, grad in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(full(p.grad), grad * 0.01 / (expected + 1e-6))


# --- experts ---


class Experts(nn.Module):
    """Each rank of a mesh has some of the experts, and adds up what all of them make of the same tokens."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(torch.randn(4, 6, 6), mesh, [Shard(0)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = torch.einsum("...d,edk->...k", x, self.weight.to_local())
        return DTensor.from_local(own, self.weight.device_mesh, [Partial()], run_check=False).full_tensor()


@pytest.mark.parametrize(
    ("dim", "calls"),
    [(0, 2), (1, 2), pytest.param(0, 1, marks=pytest.mark.skipif(not KNOWS_MESHES, reason="stock shards over one"))],
)
def test_experts_train_as_under_stock(dim: int, calls: int) -> None:
    """Prevents, where one call shards all of it: experts that are sharded over, or averaged with, the wrong ranks."""
    run_ranks(train_experts, dim, calls, world_size=4)


def train_experts(dim: int, calls: int) -> None:
    found = []
    for names in (ours, stock):
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        everyone = mesh["dp", "ep"]._flatten("all")
        model: Any = nn.Sequential(nn.Linear(6, 6), Experts(mesh["ep"]), nn.Linear(6, 6))
        answer = over(mesh["dp"], Shard(dim))
        if calls == 2:
            names.fully_shard(model[1], mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(dim))
            names.fully_shard(model, mesh=everyone)
        else:  # one group of parameters a mesh
            names.fully_shard(model, mesh=everyone, shard_placement_fn=lambda p, a=answer: a if p.dim() == 3 else None)
        for module in (model, model[1])[:calls]:
            module.set_gradient_divide_factor(4.0)
            module.set_force_sum_reduction_for_comms(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        results: list[Any] = [p.placements for p in model.parameters()]
        for step in range(3):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank() // 2))
            loss = model(x).square().mean()
            loss.backward()
            results += [loss.detach(), *(p.grad.to_local().clone() for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
        found.append(results)
    assert found[0][:5] == found[1][:5]
    assert_same(found[0][5:], found[1][5:])


def test_one_call_may_shard_over_several_meshes() -> None:
    run_ranks(shard_over_several, world_size=4)


def shard_over_several() -> None:
    """Blocks with a replicated bias and a weight over all ranks, as the methods of a module and its plan see them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    over_all = over(mesh["replicate", "shard"]._flatten("all"))
    torch.manual_seed(0)
    plain, model = (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    for module in (*model, model):
        ours.fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: over_all if p.dim() == 2 else None)
    first: Any = model[0]
    assert [first.weight.placements, first.bias.placements] == [(Shard(0),), (Replicate(), Shard(0))]
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    for m in (model, plain):
        m(x).square().sum().backward()
    for p, whole in zip(model.parameters(), plain.parameters(), strict=True):
        dist.all_reduce(whole.grad, dist.ReduceOp.AVG)
        torch.testing.assert_close(full(p.grad), whole.grad)
    assert {slot.name for slot in first.memory_plan().slots} == {"0", "0 (mesh 2)", "1", "1 (mesh 2)"}
    first.unshard()
    assert not any(isinstance(p, DTensor) for p in first.parameters())
    first.reshard()
    assert all(isinstance(p, DTensor) for p in first.parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()


# --- what is refused ---


@on_ranks()
def test_meshes_that_do_not_go_together_are_refused_by_name() -> None:
    linear = nn.Linear(4, 4)
    alone = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(linear, alone, ColwiseParallel())
    with pytest.raises(ValueError, match=r"expected the mesh of fully_shard and that of weight of Linear, .* slices"):
        ours.fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"expected weight of Linear, which is a DTensor on .* not to be distributed"):
        ours.fully_shard(linear, mesh=alone)
    module = nn.Module()
    module.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 2), alone, [Partial()], run_check=False))
    with pytest.raises(NotImplementedError, match=r"weight is a DTensor with .*Partial.*, sums of which ranks"):
        ours.fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    mesh = mesh_of(2, 1)
    model = build(ours, mesh, "plain")
    with pytest.raises(ValueError, match=r"weight: expected a parameter with .* in its place, found a whole tensor"):
        model[0].up.weight = nn.Parameter(torch.ones(10, 6))
    with pytest.raises(NotImplementedError, match=r"0.up.weight is a DTensor on .*such a step cannot be traced yet"):
        model.memory_plan((batch(0, mesh), batch(0, mesh)))


# --- full SPMD meshes ---

HAS_MESH_DIMS = pytest.mark.skipif(not hasattr(stock, "DataParallelMeshDims"), reason="this torch has no dp_mesh_dims")


def on_full_mesh(names: Any, mesh: DeviceMesh, dims: Any, **options: Any) -> Any:
    """Two layers, the first of which is cut by columns over "tp", with DTensors on all of ``mesh``."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    assert mesh.mesh_dim_names is not None
    for module, dim in ((model[0], 0), (model[2], 1)):
        for name, param in list(module.named_parameters()):
            cut = Shard(dim) if dim < param.dim() else Replicate()
            placements = [cut if one == "tp" else Replicate() for one in mesh.mesh_dim_names]
            setattr(module, name, nn.Parameter(distribute_tensor(param.detach(), mesh, placements)))
    for module in (model[0], model):
        names.fully_shard(module, mesh=mesh, dp_mesh_dims=stock.DataParallelMeshDims(**dims), **options)
    return model


@HAS_MESH_DIMS
@pytest.mark.parametrize(
    ("names", "shape", "dims"),
    [
        (("dp", "tp"), (2, 2), {"shard": "dp"}),
        (("rep", "dp", "tp"), (2, 1, 2), {"shard": "dp", "replicate": "rep"}),
        pytest.param(("dp",), (2,), {"shard": "dp"}, marks=SLOW),
        pytest.param(("a", "b", "tp"), (1, 2, 2), {"shard": ("a", "b")}, marks=SLOW),
    ],
)
def test_parameters_on_the_mesh_of_the_whole_program_train_as_under_stock(names: Any, shape: Any, dims: Any) -> None:
    run_ranks(train_on_full_mesh, names, shape, dims, world_size=torch.Size(shape).numel())


def train_on_full_mesh(dim_names: Any, shape: Any, dims: Any) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=dim_names)
    mine, theirs = (on_full_mesh(names, mesh, dims) for names in (ours, stock))
    assert_placed_alike(mine.named_parameters(), theirs.named_parameters())
    cut = [Replicate() if name == "tp" else Shard(0) for name in dim_names]
    found = []
    for model in (mine, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        results = []
        for step in range(3):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            loss = model(distribute_tensor(x, mesh, cut)).square().mean()
            loss.backward()
            results += [full(loss), *(p.grad.to_local().clone() for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
        model[0].unshard()
        found.append((results, list(model[0].named_parameters())))
    assert_same(found[0][0], found[1][0])
    assert_placed_alike(found[0][1], found[1][1])
    assert_same([p.to_local() for p in mine.parameters()], [p.to_local() for p in theirs.parameters()])


@HAS_MESH_DIMS
@on_ranks()
def test_dimensions_that_are_not_those_of_the_parameters_are_refused_by_name() -> None:
    mesh, dims = mesh_of(2, 1), stock.DataParallelMeshDims
    for given, on, asked, message in [
        (nn.Linear(2, 2), mesh, {"shard": "dp"}, "must be DTensors on the full SPMD mesh, found weight of Linear"),
        (None, mesh, {"shard": "other"}, "Mesh dim name 'other' not found in mesh.mesh_dim_names"),
        (None, mesh, {}, "At least one of shard or replicate must be set"),
        (None, mesh, {"shard": "dp", "replicate": "dp"}, "found one that does both, or twice"),
        (None, mesh["tp"], {"shard": "tp"}, "expected weight of Linear on the mesh that is given"),
        (None, mesh, {"shard": "tp"}, r"Expected Replicate\(\) on DP shard dim 'tp' of weight of Linear"),
        (None, init_device_mesh("cpu", (2, 1)), {"shard": "dp"}, "mesh must have mesh_dim_names when dp_mesh_dims"),
    ]:
        module = given
        if module is None:
            module = nn.Linear(2, 2, bias=False)
            module.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Replicate(), Shard(0)]))
        with pytest.raises(ValueError, match=message):
            ours.fully_shard(module, mesh=on, dp_mesh_dims=dims(**asked))
        assert type(module) is nn.Linear
    with pytest.raises(NotImplementedError, match="shards over no dimension: name one in shard"):
        ours.fully_shard(nn.Linear(2, 2), mesh=mesh, dp_mesh_dims=dims(replicate="dp"))
