"""Weights in the place of sharded ones, for one call (``functional_call``) or for good; edits of unsharded weights."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from tests.ranks import on_ranks
from tests.shard.test_optimizer_step import TRANSPORTS
from tests.training import full, ours, world_mesh
from tests.zoo import SPECIMENS
from yafsdp_like import MixedPrecisionPolicy

transports = pytest.mark.parametrize("transport", TRANSPORTS)


def twos(**options: Any) -> Any:
    """A linear layer of 3 inputs and 4 outputs whose weights are 2."""
    model = nn.Linear(3, 4, bias=False)
    nn.init.constant_(model.weight, 2.0)
    return ours.fully_shard(model, mesh=world_mesh(), **options)


def fives(kind: str, model: Any) -> torch.Tensor:
    if kind == "sharded":
        return model.weight.detach() * 2.5
    full = torch.full((4, 3), 5.0)
    return nn.Parameter(full) if kind == "parameter" else full


@pytest.mark.slow(
    unless=lambda kind, grad, transport: (grad or kind == "plain") and (transport == "peer" or kind == "sharded")
)
@transports
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["plain", "parameter", "sharded"])
@pytest.mark.parametrize("when", ["first", "later"])
@on_ranks()
def test_functional_call_computes_on_what_it_is_given_and_leaves_the_weights(
    when: str, kind: str, grad: bool, transport: Any
) -> None:
    """Prevents: given weights that are copied over the trained ones, or ignored."""
    model, x = twos(transport=transport), torch.ones(1, 3)
    with torch.set_grad_enabled(grad):
        if when == "later":
            assert model(x)[0, 0] == 6.0
        given = fives(kind, model)
        assert functional_call(model, {"weight": given}, (x,)).tolist() == [[15.0] * 4]
        assert functional_call(model, {"weight": given}, (x,)).tolist() == [[15.0] * 4]
        assert torch.equal(full(model.weight), torch.full((4, 3), 2.0))
        assert model(x)[0, 0] == 6.0
    model(x).sum().backward()
    assert torch.equal(full(model.weight.grad), torch.ones(4, 3))


@on_ranks()
def test_gradients_flow_to_given_weights() -> None:
    """A given plain tensor's gradient is this rank's; a given DTensor's is averaged, as that of a sharded parameter."""
    model, x = twos(), torch.full((1, 3), 1.0 + dist.get_rank())
    plain = torch.full((4, 3), 5.0, requires_grad=True)
    functional_call(model, {"weight": plain}, (x,)).sum().backward()
    assert torch.equal(plain.grad, x.expand(4, 3))
    step = model.weight * 2.5
    functional_call(model, {"weight": step}, (x,)).sum().backward()
    assert torch.equal(full(model.weight.grad), torch.full((4, 3), 1.5 * 2.5))


@on_ranks()
def test_given_weights_are_computed_in_the_policys_dtype() -> None:
    model = twos(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    output = functional_call(model, {"weight": torch.full((4, 3), 5.0)}, (torch.ones(1, 3),))
    assert output.dtype == torch.bfloat16
    assert output.tolist() == [[15.0] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "sharded"])
@on_ranks()
def test_the_callers_own_weights_are_left_in_the_dict_that_was_given(kind: str, dtype: torch.dtype) -> None:
    """Prevents: of a root that stays gathered, gathered or cast copies in their place, which get no ``.grad``."""
    model, x = twos(mp_policy=MixedPrecisionPolicy(param_dtype=dtype)), torch.ones(1, 3)
    weight = fives(kind, model).requires_grad_()
    given = {"weight": weight}
    functional_call(model, given, (x,)).sum().backward()
    assert given["weight"] is weight
    assert torch.equal(full(weight.grad), torch.ones(4, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use
@transports
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["first", "later"])
@on_ranks()
def test_torch_func_differentiates_given_weights(when: str, dtype: torch.dtype, transport: Any) -> None:
    """Prevents: zeros, from weights that were cast outside of the transform.

    Of y = w x summed over 4 rows, dy/dw is x, and along a tangent of ones y moves by 3 x a row.
    """
    model, x = twos(transport=transport, mp_policy=MixedPrecisionPolicy(param_dtype=dtype)), torch.full((1, 3), 2.0)
    if when == "later":
        model(x).sum().backward()
    weight = torch.full((4, 3), 5.0)

    def outputs(w: torch.Tensor, inputs: torch.Tensor = x) -> torch.Tensor:
        return functional_call(model, {"weight": w}, (inputs,)).float()

    grad, loss = torch.func.grad_and_value(lambda w: outputs(w).sum())(weight)
    assert (loss.item(), grad.tolist()) == (120.0, [[2.0] * 3] * 4)
    value, tangent = torch.func.jvp(outputs, (weight,), (torch.ones(4, 3),))
    assert (value.tolist(), tangent.tolist()) == ([[30.0] * 4], [[6.0] * 4])
    each = torch.vmap(torch.func.grad(lambda w, i: outputs(w, i).sum()), in_dims=(None, 0))
    inputs = torch.stack([x, 2 * x])
    assert each(weight, inputs)[:, 0, 0].tolist() == [2.0, 4.0]
    assert torch.equal(full(model.weight), torch.full((4, 3), 2.0))


@on_ranks()
def test_a_sharded_tensor_given_under_a_transform_is_refused() -> None:
    model, x = twos(), torch.ones(1, 3)
    with pytest.raises(NotImplementedError, match=r"weight: a DTensor was given .*full_tensor\(\)"):
        torch.func.grad(lambda w: functional_call(model, {"weight": w}, (x,)).sum())(fives("sharded", model))
    assert model(x)[0, 0] == 6.0


@on_ranks()
def test_some_of_a_blocks_weights_may_be_given() -> None:
    """Prevents: given weights of nested units, or those beside them, that are lost."""
    specimen = SPECIMENS["nested"]
    sharded, plain = specimen.wrap(specimen.fresh(), ours.fully_shard, mesh=world_mesh()), specimen.fresh()
    given = {
        name: torch.full(parameter.shape, 0.1) for i, (name, parameter) in enumerate(plain.named_parameters()) if i % 3
    }
    batch = specimen.batch(torch.Generator().manual_seed(dist.get_rank()), 0)
    for _ in range(2):
        outputs = [functional_call(m, given, batch.args, dict(batch.kwargs)) for m in (sharded, plain)]
        torch.testing.assert_close(*outputs)
        assert all(isinstance(p, DTensor) for p in sharded.state_dict().values())
        torch.testing.assert_close(*[m(*batch.args, **batch.kwargs) for m in (sharded, plain)])


# --- for good ---


@transports
@pytest.mark.parametrize("trains_before", [False, True])
@on_ranks()
def test_a_parameter_that_is_assigned_is_sharded_and_trained(trains_before: bool, transport: Any) -> None:
    """Prevents: an assigned weight that is ignored, or that every rank trains for itself."""
    model, x = twos(transport=transport), torch.full((1, 3), 1.0 + dist.get_rank())
    if trains_before:
        model(x).sum().backward()
        model.zero_grad()
    model.weight = nn.Parameter(torch.full((4, 3), 5.0))
    assert isinstance(model.weight, DTensor)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output = model(x)
    assert output[0, 0] == 15.0 * (1 + dist.get_rank())
    output.sum().backward()
    optimizer.step()
    assert torch.equal(full(model.weight), torch.full((4, 3), 5.0 - 1.5))


@on_ranks()
def test_a_weight_that_was_deleted_before_it_is_assigned_is_sharded_too() -> None:
    model = twos()
    del model.weight
    model.weight = nn.Parameter(torch.full((4, 3), 5.0))
    assert isinstance(model.weight, DTensor)
    assert model(torch.ones(1, 3))[0, 0] == 15.0


@on_ranks()
def test_an_optimizer_of_a_parameter_that_was_replaced_is_an_error() -> None:
    """Prevents: an optimizer that steps over what no module computes on any more."""
    model = twos()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight = nn.Parameter(torch.full((4, 3), 5.0))
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="weight' as it was before it was sharded or replaced"):
        optimizer.step()


@on_ranks()
def test_an_assigned_parameter_must_have_the_shape_and_placement_of_the_old_one() -> None:
    model = twos()
    with pytest.raises(
        ValueError, match=r"weight: expected a parameter of shape \(4, 3\) in its place, found \(3, 4\)"
    ):
        model.weight = nn.Parameter(torch.ones(3, 4))
    replicated = torch.distributed.tensor.distribute_tensor(
        torch.ones(4, 3), world_mesh(), [torch.distributed.tensor.Replicate()]
    )
    with pytest.raises(ValueError, match="redistribute it first"):
        model.weight = nn.Parameter(replicated)
    assert model(torch.ones(1, 3))[0, 0] == 6.0


@on_ranks()
def test_parameters_are_not_tied_or_untied_after_sharding() -> None:
    """Prevents: two modules that seem tied and are not, or the reverse."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    ours.fully_shard(model, mesh=world_mesh())
    for value in (model[0].weight, nn.Parameter(torch.ones(4, 4))):
        with pytest.raises(NotImplementedError, match="before fully_shard"):
            model[1].weight = value
    model.load_state_dict({k: torch.ones_like(full(v)) for k, v in model.state_dict().items()}, assign=True)
    assert model[1].weight is model[2].weight
    assert model(torch.ones(1, 4))[0, 0] == 1 + 4 * (1 + 4 * (1 + 4))


@on_ranks()
def test_a_recurrent_layers_weight_may_be_assigned() -> None:
    """Prevents: the list that recurrent layers keep of their weights going stale."""
    torch.manual_seed(0)
    plain = nn.LSTM(3, 4)
    model = ours.fully_shard(nn.LSTM(3, 4), mesh=world_mesh())
    for name, value in plain.named_parameters():
        setattr(model, name, nn.Parameter(value.detach().clone()))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(model(x)[0], plain(x)[0])


# --- edits of what is unsharded ---


@transports
@pytest.mark.parametrize("which", [(1,), (0, 1, 2, 3)])
@pytest.mark.filterwarnings("ignore::yafsdp_like.SpillWarning")
@on_ranks()
def test_an_edit_between_unshard_and_the_first_forward_of_the_root_is_seen(
    which: tuple[int, ...], transport: Any
) -> None:
    """Prevents: the root's plan taking over a block that was unsharded, and gathering over the edit."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    for layer in model:
        nn.init.eye_(layer.weight)
        ours.fully_shard(layer, mesh=world_mesh(), transport=transport)
    ours.fully_shard(model, mesh=world_mesh(), transport=transport)
    for i in which:
        model[i].unshard()
        with torch.no_grad():
            model[i].weight.mul_(3.0)
    output = model(torch.ones(1, 4))
    assert output.tolist() == [[3.0 ** len(which)] * 4]
    output.sum().backward()
    assert torch.equal(full(model[which[0]].weight.grad), torch.full((4, 4), 3.0 ** (len(which) - 1)))
    assert model(torch.ones(1, 4)).tolist() == [[1.0] * 4]
