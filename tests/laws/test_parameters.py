"""Law 6, order is a hint: which parameters modules hold, and what may be done with them between steps."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from tests.ranks import on_ranks
from tests.training import full, ours, world_mesh
from tests.twins import Twins, chain, registered, rows, spilling
from tests.zoo import FEATURES, SPECIMENS, Block, Chain
from yafsdp_like.optim import AdamW

# --- what is registered, and moving it by hand ---


class Watcher(Chain):
    """Notes in each forward which of its layers' parameters are sharded."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.seen: list[dict[str, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(registered(self))
        return super().forward(x)


class WatchedBlock(Block):
    """Asserts that it computes on plain, whole parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not any(registered(self).values())
        assert self.rise.weight.shape == (10, FEATURES)
        assert isinstance(self.rise.weight, nn.Parameter)
        return super().forward(x)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
@on_ranks()
def test_modules_hold_whole_parameters_while_they_compute_and_sharded_ones_after(
    reshard_after_forward: bool,
) -> None:
    """Prevents: optimizers, hooks or forwards that see the wrong one of the two."""
    model = Chain([WatchedBlock(), WatchedBlock()])
    fully_sharded = [ours.fully_shard(layer, mesh=world_mesh()) for layer in model.layers]
    ours.fully_shard(model, mesh=world_mesh())
    for layer in fully_sharded:
        layer.set_reshard_after_forward(reshard_after_forward)
    sharded = dict(model.named_parameters())
    assert all(registered(model).values())
    loss = model(rows()).sum()
    assert set(registered(model).values()) == {reshard_after_forward}
    loss.backward()
    assert all(model.get_parameter(name) is parameter for name, parameter in sharded.items())
    assert all(isinstance(parameter.grad, DTensor) for parameter in sharded.values())


@on_ranks()
def test_the_root_keeps_its_own_parameters_whole_until_its_backward() -> None:
    """Prevents: gathering the root twice in a row, the default that reshard_after_forward=None promises."""
    model = Twins(SPECIMENS["nested"]).sharded
    loss = model(rows()).sum()
    assert [name for name, is_sharded in registered(model).items() if not is_sharded] == ["scale", "bias"]
    loss.backward()
    assert all(registered(model).values())


@pytest.mark.parametrize("async_op", [False, True])
@on_ranks()
def test_unsharding_by_hand_works_before_any_forward_and_after(async_op: bool) -> None:
    """Prevents: lazy set-up that only forward triggers, and a handle that waits for nothing."""
    twins = Twins(chain)
    for step in range(2):
        layer = twins.sharded.layers[1]
        handle = layer.unshard(async_op=async_op)
        assert (handle is not None) == async_op
        if handle is not None:
            handle.wait()
        assert [name for name, is_sharded in registered(twins.sharded).items() if not is_sharded] == [
            f"layers.1.{name}" for name, _ in layer.named_parameters()
        ]
        torch.testing.assert_close(dict(layer.named_parameters()), dict(twins.plain.layers[1].named_parameters()))
        if step == 0:
            layer.reshard()
            assert all(registered(twins.sharded).values())
        twins.train(step)


@on_ranks()
def test_a_handle_never_waited_for_is_no_trouble() -> None:
    """Prevents: an asynchronous gather that nobody finishes blocking its slot."""
    twins = Twins(chain)
    for step in range(3):
        twins.sharded.layers[2].unshard(async_op=True)
        twins.train(step)
        twins.sharded.layers[0].unshard(async_op=True)
        twins.sharded.reshard()
        twins.sharded.layers[0].reshard()


@on_ranks()
def test_a_module_that_owns_nothing_can_be_unsharded() -> None:
    """Prevents: an error for a call that torch's own code makes on every module."""
    model = ours.fully_shard(nn.Sequential(nn.GELU()), mesh=world_mesh())
    model.unshard()
    handle = model.unshard(async_op=True)
    if handle is not None:
        handle.wait()
    model.reshard()
    assert torch.equal(model(torch.zeros(2)), torch.zeros(2))


@on_ranks()
def test_resharding_can_be_switched_between_steps() -> None:
    """Prevents: a plan that only knows the setting it was made with."""
    twins = Twins(chain)
    for step, reshard in enumerate([True, False, True, False]):
        twins.sharded.set_reshard_after_forward(reshard)
        twins.sharded.set_reshard_after_backward(True)
        twins.train(step)


@on_ranks()
def test_a_unit_kept_after_backward_still_sees_the_optimizers_update() -> None:
    """Prevents: weights of the step before in a unit that was never released."""
    twins = Twins(chain)
    twins.sharded.set_reshard_after_backward(False)
    for step in range(3):
        twins.backward(step)
        twins.sharded.reshard()
        for layer in twins.sharded.layers:
            layer.reshard()
        twins.step()


# --- parameters between steps ---


@on_ranks()
def test_a_hook_after_accumulation_may_step_an_optimizer() -> None:
    """Prevents: hooks that fire before the reduced gradient is there, twice, or never."""
    twins = Twins(chain)
    fired: list[nn.Parameter] = []

    def update(parameter: nn.Parameter) -> None:
        fired.append(parameter)
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    sharded, plain = twins.parameters
    for parameter in sharded.values():
        parameter.register_post_accumulate_grad_hook(update)
    for step in range(3):
        twins.backward(step)
        assert len(fired) == len(sharded)
        fired.clear()
        for parameter in plain.values():
            dist.all_reduce(parameter.grad)
            with torch.no_grad():
                parameter.sub_(parameter.grad / dist.get_world_size(), alpha=0.1)
            parameter.grad = None
        twins.compare_parameters()


@on_ranks()
def test_gradients_add_up_over_backwards_until_they_are_zeroed() -> None:
    """Prevents: a reduction that overwrites what an earlier backward left."""
    twins = Twins(SPECIMENS["nested"])
    for step in range(3):
        sharded, plain = twins.losses(step)
        (2 * plain).backward()
        sharded.backward()
        twins.specimen.loss_of(twins.sharded, step, dist.get_rank()).backward()
        twins.step()


@on_ranks()
def test_gradients_may_be_kept_by_the_user_across_steps() -> None:
    """Prevents: the next backward writing into a gradient that somebody still holds."""
    twins = Twins(chain)
    twins.backward(0)
    kept = [parameter.grad for parameter in twins.sharded.parameters()]
    before = [full(gradient) for gradient in kept]
    twins.step()
    twins.train(1)
    assert all(torch.equal(full(now), then) for now, then in zip(kept, before, strict=True))


@pytest.mark.parametrize("whole_layer", [True, False])
@on_ranks()
def test_freezing_and_thawing_between_steps(whole_layer: bool) -> None:
    """Prevents: deciding once what is trained; a frozen parameter's gradient stays None."""
    twins = Twins(SPECIMENS["decoder"])
    for step in range(6):
        for model in twins:
            layer = model.layers[1] if whole_layer else model.layers[1].qkv
            layer.requires_grad_(step % 3 != 1)
        twins.backward(step)
        frozen = [parameter for parameter in twins.sharded.parameters() if not parameter.requires_grad]
        assert bool(frozen) == (step % 3 == 1)
        assert all(parameter.grad is None for parameter in frozen)
        twins.step()


@on_ranks()
def test_a_frozen_model_may_be_thawed_layer_by_layer() -> None:
    """Prevents: gradient memory planned only for what was trainable at first."""
    twins = Twins(chain)
    for model in twins:
        model.requires_grad_(False)
    twins.losses(100)
    for step in range(3):
        for model in twins:
            model.layers[2 - step].requires_grad_(True)
        twins.train(step)


@on_ranks(3)
def test_a_write_to_the_sharded_parameter_is_seen_by_the_next_forward() -> None:
    """Prevents: computing on a copy that only the runtime's own optimizer refreshes."""
    twins = Twins(SPECIMENS["odd"])
    for step in range(3):
        with torch.no_grad():
            for sharded, plain in zip(*(parameters.values() for parameters in twins.parameters), strict=True):
                sharded.mul_(1.25)
                plain.mul_(1.25)
                sharded.to_local().add_(0.125)
                plain.add_(0.125)
        twins.losses(10 + step)  # a forward alone, so that some units may stay whole
        twins.sharded.reshard()
        with torch.no_grad():
            for sharded, plain in zip(*(parameters.values() for parameters in twins.parameters), strict=True):
                sharded.data.sub_(0.25)
                plain.data.sub_(0.25)
        twins.train(step)


@on_ranks()
def test_a_write_between_forwards_is_seen_even_by_a_unit_that_stayed_whole() -> None:
    """Prevents: an evaluation that leaves units whole hiding the update that follows it."""
    twins = Twins(chain, reshard_after_forward=False)
    for step in range(3):
        with torch.no_grad():
            twins.losses(10 + step)
            for sharded, plain in zip(*(parameters.values() for parameters in twins.parameters), strict=True):
                sharded.mul_(1.25)
                plain.mul_(1.25)
            twins.losses(20 + step)
        twins.train(step)


# --- updates between a forward and its backward ---


def backward_after_an_update(which: str, make: Any = torch.optim.SGD, **options: Any) -> None:
    """An optimizer of the sharded parameters called so steps before a backward; the unsharded twin does not."""
    twins = Twins(chain, **options)
    twins.train(0)
    twins.backward(1)
    sharded, plain = twins.losses(2)
    make([p for name, p in twins.parameters[0].items() if which in name], lr=0.1).step()
    for loss in (sharded, plain):
        loss.backward()
    twins.compare_gradients()


@pytest.mark.parametrize(
    ("which", "make", "transport"),
    [("weight", torch.optim.SGD, "process_group"), ("weight", AdamW, "peer"), ("", AdamW, "peer")],
)
@on_ranks()
def test_a_backward_that_would_read_updated_weights_is_an_error(which: str, make: Any, transport: Any) -> None:
    """Prevents: gradients that are neither of the weights before the update nor of those after it.

    Our AdamW writes what peers read, also of some of a unit's parameters alone.
    """
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        backward_after_an_update(which, make, transport=transport)


@spilling
@pytest.mark.parametrize("make", [torch.optim.AdamW, AdamW])
@on_ranks()
def test_a_backward_may_come_after_two_forwards_behind_an_update(make: Any) -> None:
    """Prevents: an update that counts again where a second forward casts what it has written."""
    twins = Twins(chain, transport="peer")
    twins.optimizers = [make(parameters.values(), lr=0.1) for parameters in twins.parameters]
    twins.train(0)
    losses = twins.losses(1)
    twins.losses(2)
    for loss in losses:
        loss.backward()
    twins.step()


@pytest.mark.parametrize(
    ("which", "transport", "reshard_after_forward"),
    [("weight", "process_group", False), ("weight", "peer", None), ("rise.bias", "process_group", None)],
)
@on_ranks()
def test_a_backward_after_an_update_has_the_gradients_of_what_forward_has_read(
    which: str, transport: Any, reshard_after_forward: Any
) -> None:
    """Prevents: an error where weights were kept, were copied, or are not read again."""
    backward_after_an_update(which, transport=transport, reshard_after_forward=reshard_after_forward)
