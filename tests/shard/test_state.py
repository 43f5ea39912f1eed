"""State: what is stored where, how it is saved, loaded, moved and initialised, and what is refused."""

import copy
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.ranks import on_ranks, run_ranks
from tests.training import assert_tensors_equal, buffers, full, full_parameters, ours, world_mesh
from tests.twins import Twins
from tests.zoo import FEATURES, SPECIMENS, Block, Chain, Decoder, Specimen, blocks, layers_of, tokens, vectors

every_specimen = pytest.mark.parametrize("name", SPECIMENS)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def sharded(name: str, **options: Any) -> Any:
    """A specimen, wrapped, with the same numbers at every call."""
    specimen = SPECIMENS[name]
    return specimen.wrap(specimen.fresh(), ours.fully_shard, mesh=world_mesh(), **options)


def scrambled(name: str) -> Any:
    """The same, with other numbers."""
    model = sharded(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def train(name: str, model: Any, optimizer: torch.optim.Optimizer, *steps: int) -> list[float]:
    """A few steps; their losses."""
    losses = []
    for step in steps:
        loss = SPECIMENS[name].loss_of(model, step, dist.get_rank())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adam(model: Any) -> torch.optim.Optimizer:
    """AdamW over the parameters as they are now."""
    return torch.optim.AdamW(model.parameters(), lr=0.02)


# --- parameters ---


@every_specimen
@on_ranks(3)
def test_parameters_become_shards_and_keep_everything_else(name: str) -> None:
    """Prevents: code that reads parameters' names, sizes, strides or flags breaking once they are sharded."""
    plain, model, mesh = SPECIMENS[name].fresh(), sharded(name), world_mesh()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for key, whole in plain.named_parameters():
        shard = model.get_parameter(key)
        assert isinstance(shard, DTensor)
        assert isinstance(shard, nn.Parameter)
        assert (shard.device_mesh, shard.placements) == (mesh, (Shard(0),))
        assert (shard.size(), shard.stride(), shard.dtype) == (whole.size(), whole.stride(), whole.dtype)
        assert (shard.requires_grad, shard.is_leaf, shard.grad) == (whole.requires_grad, True, None)
        chunks = [*whole.chunk(3), *[whole[:0]] * 3]  # the last ranks may get nothing
        assert torch.equal(shard.to_local(), chunks[dist.get_rank()])
        assert shard.to_local().is_contiguous()
        assert torch.equal(full(shard), whole)


@on_ranks()
def test_a_wrapped_module_is_of_a_class_of_its_own_and_is_returned() -> None:
    """Prevents: isinstance checks and container slicing that notice the wrapping."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.GELU())
    layers = [model[0], model[1]]
    assert ours.fully_shard(layers, mesh=world_mesh()) is layers
    assert ours.fully_shard(model, mesh=world_mesh()) is model
    assert isinstance(model, ours.FSDPModule) and isinstance(model, nn.Sequential)
    assert type(model).__name__ == "FSDPSequential" and type(model[0]).__name__ == "FSDPLinear"
    assert type(model[:2]) is nn.Sequential
    assert type(model[2]) is nn.GELU
    assert ours.fully_shard.__name__ == "fully_shard"


@on_ranks()
def test_units_made_one_by_one_with_garbage_collected_between_keep_their_own_parameters() -> None:
    """Prevents: telling parameters apart by id(), which the next one may get again."""
    model, plain = nn.Sequential(), nn.Sequential()
    for index in range(6):
        torch.manual_seed(index)
        block = Block()
        plain.append(copy.deepcopy(block))
        model.append(ours.fully_shard(block, mesh=world_mesh()))
        del block
        gc.collect()
    ours.fully_shard(model, mesh=world_mesh())
    assert_tensors_equal(full_parameters(model), full_parameters(plain))
    x = torch.randn(2, FEATURES)
    torch.testing.assert_close(model(x), plain(x))


@on_ranks()
def test_ignored_parameters_are_left_alone() -> None:
    """Prevents: sharding, or averaging the gradients of, what somebody else looks after."""
    model = Block()
    ignored = model.rise.weight
    ours.fully_shard(model, mesh=world_mesh(), ignored_params={ignored})
    assert model.rise.weight is ignored and not isinstance(ignored, DTensor)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(2, FEATURES)).square().sum().backward()
    assert isinstance(model.fall.weight.grad, DTensor)
    gathered = [torch.empty_like(ignored.grad) for _ in range(2)]
    dist.all_gather(gathered, ignored.grad)
    assert not torch.equal(*gathered)


@on_ranks(1)
def test_one_rank_needs_no_mesh_of_more() -> None:
    """Prevents: a special case for one rank in the caller's code."""
    twins = Twins(SPECIMENS["tied"])
    twins.train(0, 1)
    assert all(isinstance(parameter, DTensor) for parameter in twins.sharded.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="would shard over GPUs")
@on_ranks()
def test_without_a_mesh_parameters_are_sharded_over_all_ranks() -> None:
    """Prevents: the shortest call, fully_shard(model), needing more."""
    model = ours.fully_shard(nn.Linear(4, 2))
    assert model.weight.device_mesh == world_mesh()


def compare_over(mesh: DeviceMesh) -> None:
    """One backward of a model sharded over `mesh`, against one on all of its ranks' data."""
    specimen = SPECIMENS["decoder"]
    model, plain = specimen.wrap(specimen.fresh(), ours.fully_shard, mesh=mesh), specimen.fresh()
    specimen.loss_of(model, 0, mesh.get_local_rank()).backward()
    for rank in range(mesh.size()):
        (specimen.loss_of(plain, 0, rank) / mesh.size()).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(full(model.get_parameter(name).grad), parameter.grad)


@on_ranks()
def test_a_mesh_may_come_from_a_process_group() -> None:
    """Prevents: needing the mesh to know how it was made."""
    compare_over(DeviceMesh.from_group(dist.group.WORLD, "cpu"))


@on_ranks(4)
def test_a_mesh_may_be_one_dimension_of_a_larger_one() -> None:
    """Prevents: taking world ranks for ranks of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    compare_over(mesh["dp"])
    compare_over(mesh["tp"])


# --- tied parameters across units ---


class Tied(Decoder):
    """Embedding and head are one parameter, and units of their own."""

    def __init__(self) -> None:
        super().__init__(tied=True)


@pytest.mark.slow(
    unless=lambda parts, world_size, reshard_after_forward: reshard_after_forward and world_size > len(parts)
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("reshard_after_forward", [True, False, None])
@pytest.mark.parametrize("parts", [("embedding", "head"), ("embedding",), ("head",)])
def test_parameters_tied_across_units_follow_the_unsharded_model(
    parts: tuple[str, ...], world_size: int, reshard_after_forward: bool | None
) -> None:
    """Prevents: two copies of one parameter drifting apart, or half of its gradient. What is no unit, the root has."""
    run_ranks(follow_tied, parts, reshard_after_forward, world_size=world_size)


def follow_tied(parts: tuple[str, ...], reshard_after_forward: bool | None) -> None:
    specimen = Specimen(Tied, tokens, lambda model: [*model.layers, *(getattr(model, part) for part in parts)])
    twins = Twins(specimen, reshard_after_forward=reshard_after_forward)
    assert twins.sharded.head.weight is twins.sharded.embedding.weight
    assert list(twins.sharded.state_dict()) == list(twins.plain.state_dict())
    twins.train(0, 1, 2, 3)
    assert twins.sharded.head.weight is twins.sharded.embedding.weight
    twins.compare_parameters()


# --- state dicts ---


@every_specimen
@on_ranks(3)
def test_state_dicts_have_the_unsharded_keys_in_order_and_load_back(name: str) -> None:
    """Prevents: checkpoints that only the runtime that wrote them can read."""
    plain, model, other = SPECIMENS[name].fresh(), sharded(name), scrambled(name)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    for key, value in state.items():
        assert isinstance(value, DTensor) == (key not in dict(plain.named_buffers())), key
    other.load_state_dict(state)
    assert_tensors_equal(full_parameters(other), full_parameters(plain))
    plain.load_state_dict({key: full(value) * 2 for key, value in state.items()})  # full, into a plain model
    torch.testing.assert_close(full_parameters(plain), {key: full(p) * 2 for key, p in model.named_parameters()})


@on_ranks()
def test_a_state_dict_taken_between_forward_and_backward_is_sharded_and_harmless() -> None:
    """Prevents: whole tensors in the state dict of a model whose root is gathered, or a root that stays sharded."""
    twins = Twins(SPECIMENS["nested"])
    for step in range(3):
        losses = twins.losses(step)
        assert all(isinstance(value, DTensor) for value in twins.sharded.state_dict().values())
        for loss in losses:
            loss.backward()
        twins.step()


@on_ranks()
def test_a_loaded_state_dict_is_seen_by_the_next_forward() -> None:
    """Prevents: a compute copy that loading does not refresh."""
    twins = Twins(SPECIMENS["decoder"])
    saved = {key: full(value) for key, value in twins.plain.state_dict().items()}
    state = {key: value.clone() for key, value in twins.sharded.state_dict().items()}
    twins.train(0, 1)
    twins.plain.load_state_dict(saved)
    twins.sharded.load_state_dict(state)
    twins.train(2)
    twins.compare_parameters()


@every_specimen
@on_ranks()
def test_full_state_dicts_go_through_torchs_own_functions(name: str) -> None:
    """Prevents: a layout that torch.distributed.checkpoint.state_dict cannot gather or scatter."""
    model, other = sharded(name), scrambled(name)
    expected = SPECIMENS[name].fresh().state_dict()
    state = get_model_state_dict(model, options=FULL)
    assert_tensors_equal(state, expected if dist.get_rank() == 0 else {})
    set_model_state_dict(other, state, options=BROADCAST)
    assert_tensors_equal(full_parameters(other), full_parameters(model))


@pytest.mark.parametrize("name", ["decoder", "odd", "tied", "frozen", "group"])
@on_ranks()
def test_training_goes_on_bit_for_bit_from_full_model_and_optimizer_states(name: str) -> None:
    """Prevents: moments that come back to the wrong rows."""
    model = sharded(name)
    optimizer = adam(model)
    train(name, model, optimizer, 0, 1)
    model_state = get_model_state_dict(model, options=FULL)
    optimizer_state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))  # it shares `step`
    other = scrambled(name)
    other_optimizer = adam(other)
    set_model_state_dict(other, model_state, options=BROADCAST)
    set_optimizer_state_dict(other, other_optimizer, optimizer_state, options=BROADCAST)
    assert train(name, other, other_optimizer, 2, 3) == train(name, model, optimizer, 2, 3)
    assert_tensors_equal(full_parameters(other), full_parameters(model))


def save(name: str, directory: Path) -> dict[str, torch.Tensor]:
    model = sharded(name)
    optimizer = adam(model)
    train(name, model, optimizer, 0, 1)
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=directory,
    )
    return full_parameters(model)


def load(name: str, directory: Path) -> tuple[dict[str, torch.Tensor], float]:
    model = scrambled(name)
    optimizer = adam(model)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=directory)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    parameters = full_parameters(model)
    train(name, model, optimizer, 2)
    return parameters, sum(full(moment).sum().item() for moment in moments(optimizer))


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Adam's first moments."""
    return [state["exp_avg"] for state in optimizer.state.values()]


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint's own calls
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("name", ["odd", "tied"])
def test_sharded_checkpoints_load_on_another_number_of_ranks(
    name: str, before: int, after: int, tmp_path: Path
) -> None:
    """Prevents: checkpoints bound to the world size that wrote them."""
    saved = run_ranks(save, name, tmp_path, world_size=before)[0]
    for parameters, _ in run_ranks(load, name, tmp_path, world_size=after):
        assert_tensors_equal(parameters, saved)


# --- initialisation and movement ---


def on_meta(specimen: Specimen, **options: Any) -> Any:
    with torch.device("meta"):
        model = specimen.build()
    return specimen.wrap(model, ours.fully_shard, mesh=world_mesh(), **options)


simple = Specimen(lambda: Chain(blocks(3)), vectors(FEATURES), layers_of)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
@on_ranks(3)
def test_a_model_from_meta_is_materialised_and_initialised_shard_by_shard() -> None:
    """Prevents: meta tensors left in shards, views or slots after to_empty()."""
    model = on_meta(simple)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    plain = simple.fresh()
    plain.load_state_dict(full_parameters(model))
    x = torch.randn(2, FEATURES)
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    assert all(parameter.grad.to_local().isfinite().all() for parameter in model.parameters())


@on_ranks(3)
def test_a_sharded_state_dict_may_be_assigned_to_a_model_on_meta() -> None:
    """Prevents: shards that keep pointing at the storage they were made on."""
    twins = Twins(simple)
    model = on_meta(simple)
    state = {
        key: distribute_tensor(value, world_mesh(), [Shard(0)]) for key, value in simple.fresh().state_dict().items()
    }
    model.load_state_dict(state, assign=True, strict=False)
    twins.sharded = model
    twins.parameters[0] = dict(model.named_parameters())
    twins.optimizers[0] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    twins.train(0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@on_ranks()
def test_a_cast_of_the_module_between_sharding_and_the_first_forward_holds(dtype: torch.dtype) -> None:
    """Prevents: slots, gradients or metadata of the dtype that parameters had when they were sharded."""
    model, plain = sharded("odd").to(dtype), SPECIMENS["odd"].fresh().to(dtype)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64).to(dtype)
    for parameter in model.parameters():
        assert (parameter.dtype, parameter._spec.tensor_meta.dtype) == (dtype, dtype)
    output = model(x)
    assert output.dtype == dtype
    assert torch.equal(output, plain(x))
    output.sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}


@on_ranks()
def test_moving_to_where_it_already_is_changes_nothing() -> None:
    """Prevents: .to() replacing shards that the runtime or an optimizer holds."""
    twins = Twins(simple)
    for step in range(3):
        twins.sharded.to("cpu")
        twins.sharded.float()
        twins.train(step)


@on_ranks()
def test_a_parameter_of_the_root_may_be_replaced_before_the_first_forward() -> None:
    """Prevents: training the parameter that was there when the model was sharded."""
    model = sharded("group")
    plain = SPECIMENS["group"].fresh()
    weight = torch.linspace(-1, 1, FEATURES * 10).view(10, FEATURES)
    model.layers[0].rise.weight = nn.Parameter(distribute_tensor(weight, world_mesh(), [Shard(0)]))
    plain.layers[0].rise.weight = nn.Parameter(weight.clone())
    x = torch.randn(2, FEATURES)
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(full(model.layers[0].rise.weight.grad), plain.layers[0].rise.weight.grad)


@on_ranks()
def test_buffers_stay_whole_and_keep_counting() -> None:
    """Prevents: buffers sharded, left behind or reset."""
    twins = Twins(SPECIMENS["convnet"])
    twins.train(0, 1, 2)
    assert_tensors_equal(buffers(twins.sharded), buffers(twins.plain))
    assert buffers(twins.sharded)["layers.0.1.num_batches_tracked"] == 3


@on_ranks(4)
def test_between_steps_a_rank_stores_its_shards_only() -> None:
    """Prevents: whole parameters, gradients or moments that stay alive."""
    model = sharded("decoder")
    optimizer = adam(model)
    SPECIMENS["decoder"].loss_of(model, 0, dist.get_rank()).backward()
    optimizer.step()
    for parameter in model.parameters():
        rows = -(-parameter.shape[0] // 4)
        share = rows * parameter[0].numel()
        for held in (parameter, parameter.grad, *(optimizer.state[parameter][key] for key in ("exp_avg",))):
            assert held.to_local().numel() <= share


# --- what is refused, on every rank ---


class Scalar(nn.Module):
    """Has a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))


class Transposed(nn.Module):
    """Has a parameter that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2).t())


def shard_scalar() -> None:
    ours.fully_shard(Scalar(), mesh=world_mesh())


def shard_transposed() -> None:
    ours.fully_shard(Transposed(), mesh=world_mesh())


def shard_module_list() -> None:
    ours.fully_shard(nn.ModuleList([nn.Linear(2, 2)]), mesh=world_mesh())


def shard_module_dict() -> None:
    ours.fully_shard(nn.ModuleDict({"a": nn.Linear(2, 2)}), mesh=world_mesh())


def shard_over_three_dimensions() -> None:
    ours.fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1, 1, 2)))


def shard_over_two_nameless_dimensions() -> None:
    ours.fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1, 2)))


def shard_twice() -> None:
    ours.fully_shard(ours.fully_shard(nn.Linear(2, 2), mesh=world_mesh()), mesh=world_mesh())


def copy_deeply() -> None:
    copy.deepcopy(ours.fully_shard(nn.Linear(2, 2), mesh=world_mesh()))


@on_ranks()
def test_a_module_of_a_sharded_one_may_be_copied_and_its_copy_is_nobodys() -> None:
    """Prevents: a copy of the unit, which fails at its process group, and copies that write to what they were of."""
    model: Any = ours.fully_shard(simple.fresh(), mesh=world_mesh())
    linear = model.layers[0].rise
    copied = copy.deepcopy(linear)
    assert isinstance(copied.weight, DTensor) and torch.equal(full(copied.weight), full(linear.weight))
    with torch.no_grad():
        copied.weight.zero_()
    copied.bias = nn.Parameter(torch.zeros_like(full(copied.bias)))
    assert not isinstance(copied.bias, DTensor)
    assert full(linear.weight).any() and full(linear.bias).any()
    assert all(isinstance(p, DTensor) for p in model.parameters())


def run_on_meta() -> None:
    on_meta(simple)(torch.ones(2, FEATURES))


refusals = [
    (shard_scalar, ValueError, "Change factor to a 1D tensor with numel equal to 1."),
    (shard_transposed, NotImplementedError, "FSDP does not support non-contiguous parameters"),
    (shard_module_list, ValueError, "fully_shard does not support containers that do not implement forward"),
    (shard_module_dict, ValueError, "fully_shard does not support containers that do not implement forward"),
    (
        shard_over_three_dimensions,
        ValueError,
        "fully_shard expects a 1D or 2D DeviceMesh but got DeviceMesh",
    ),
    (
        shard_over_two_nameless_dimensions,
        AssertionError,
        "Please init the 2D mesh for HSDP with mesh_dim_names specified",
    ),
    (
        shard_twice,
        AssertionError,
        "Each distinct composable distributed API can only be applied to a module once.",
    ),
    (copy_deeply, AssertionError, "FSDP does not support deepcopy. Copy a sharded module by its state dict"),
    (
        run_on_meta,
        RuntimeError,
        "FSDP parameters should be materialized from meta device before training, but the following were "
        "still on meta device: ['layers.0.norm.weight', 'layers.0.norm.bias', 'layers.0.rise.weight', "
        "'layers.0.rise.bias', 'layers.0.fall.weight'], and 10 of other units",
    ),
]


@pytest.mark.parametrize(("attempt", "error", "words"), refusals, ids=[case[0].__name__ for case in refusals])
@on_ranks()
def test_what_cannot_work_is_refused_with_fsdp2s_words(
    attempt: Callable[[], None], error: type[Exception], words: str
) -> None:
    """Prevents: code that catches or greps FSDP2's errors missing ours, and ranks that hang instead."""
    with pytest.raises(error, match=re.escape(words)):
        attempt()
    dist.barrier()  # nobody is left behind in a collective


@on_ranks(3)
def test_ranks_that_shard_different_models_raise_the_first_difference() -> None:
    """Prevents: a hang, or gradients added to other parameters' gradients."""
    hidden = 10 if dist.get_rank() < 2 else 12
    model = ours.fully_shard(Block(hidden=hidden), mesh=world_mesh())
    with pytest.raises(RuntimeError, match=r"rise\.weight \[10, 6\][\s\S]*rank 2: rise\.weight \[12, 6\]"):
        model(torch.ones(2, FEATURES))
    dist.barrier()


@on_ranks()
def test_containers_with_a_forward_are_welcome() -> None:
    """Prevents: refusing by class what works by behaviour."""

    class Stack(nn.ModuleList):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[0](x)

    assert ours.fully_shard(Stack([nn.Linear(2, 3)]), mesh=world_mesh())(torch.ones(2)).shape == (3,)


@pytest.mark.parametrize("foreach", [True, False])
@on_ranks()
def test_an_optimizer_built_before_sharding_is_an_error_at_its_first_step(foreach: bool) -> None:
    """Prevents: training nothing, silently."""
    model = SPECIMENS["decoder"].fresh()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    SPECIMENS["decoder"].wrap(model, ours.fully_shard, mesh=world_mesh())
    SPECIMENS["decoder"].loss_of(model, 0, dist.get_rank()).backward()
    with pytest.raises(RuntimeError, match=r"embedding\.weight[\s\S]*after fully_shard"):
        optimizer.step()
