"""Law 6, order is a hint: whatever a program does with its model, the numbers are the unsharded model's.

Nearly every test drives a sharded model and its unsharded twin through the same unusual thing; each says
which bug it prevents.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tests.ranks import on_ranks
from tests.zoo import (
    FEATURES,
    SPECIMENS,
    Batch,
    Block,
    Chain,
    Reuser,
    Specimen,
    Tailed,
    Twins,
    blocks,
    full,
    layers_of,
    ours,
    square_loss,
    vectors,
    world_mesh,
)

Mode = Callable[[], AbstractContextManager[Any]]
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
spilling = pytest.mark.filterwarnings("ignore::yafsdp_like.SpillWarning")  # two slots at once were not planned
keeping = pytest.mark.parametrize(  # None reshards what True does, but for the root
    "reshard_after_forward", [pytest.param(True, marks=pytest.mark.slow), False, None]
)
chain = Specimen(lambda: Chain(blocks(3)), vectors(FEATURES), layers_of)


def rows(seed: int = 0) -> torch.Tensor:
    """A batch of this rank."""
    return torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(10 * seed + dist.get_rank()))


def registered(model: nn.Module) -> dict[str, bool]:
    """For each parameter, whether what the module holds now is the sharded one."""
    return {name: isinstance(parameter, DTensor) for name, parameter in model.named_parameters()}


# --- evaluation ---


@pytest.mark.slow(unless=lambda mode, reshard_after_forward: mode is torch.no_grad or reshard_after_forward is None)
@modes
@keeping
@on_ranks()
def test_evaluation_before_and_between_steps_disturbs_no_gradient(
    mode: Mode, reshard_after_forward: bool | None
) -> None:
    """Prevents: state made in inference mode, or an order of units learned from a pass without backward."""
    twins = Twins(SPECIMENS["decoder"], reshard_after_forward=reshard_after_forward)
    for step in range(3):
        with mode():
            twins.losses(100 + step)
        twins.train(step)


@pytest.mark.slow(unless=lambda mode, reshard_after_forward: mode is torch.no_grad or reshard_after_forward is None)
@modes
@keeping
@on_ranks()
def test_evaluation_between_forward_and_backward_leaves_saved_weights_alone(
    mode: Mode, reshard_after_forward: bool | None
) -> None:
    """Prevents: an evaluation's gather or release taking the slot that autograd saved views of."""
    twins = Twins(SPECIMENS["decoder"], reshard_after_forward=reshard_after_forward)
    for step in range(3):
        losses = twins.losses(step)
        with mode():
            twins.losses(100 + step)
        for loss in losses:
            loss.backward()
        twins.step()


@keeping
@on_ranks()
def test_evaluation_between_backward_and_the_optimizer_does_not_keep_old_weights(
    reshard_after_forward: bool | None,
) -> None:
    """Prevents: a unit that evaluation left gathered being used again after the shards have changed."""
    twins = Twins(chain, reshard_after_forward=reshard_after_forward)
    for step in range(3):
        twins.backward(step)
        with torch.no_grad():
            twins.losses(100 + step)
        twins.step()


@pytest.mark.parametrize("name", ["decoder", "encoder", "convnet"])
@on_ranks()
def test_training_after_eval_mode_is_as_before(name: str) -> None:
    """Prevents: eval() and train() confusing which forward is followed by a backward."""
    twins = Twins(SPECIMENS[name])
    for step in range(3):
        for model in twins:
            model.eval()
        twins.losses(100 + step)  # with gradients, but no backward
        with torch.no_grad():
            twins.losses(200 + step)
        for model in twins:
            model.train()
        twins.train(step)


class FrozenBackbone(Chain):
    """Runs all but its last layer without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for layer in self.layers[:-1]:
                x = layer(x)
        return self.layers[-1](x)


@on_ranks()
def test_units_run_under_no_grad_inside_a_training_forward_take_no_part_in_backward() -> None:
    """Prevents: backward waiting for units that never enter it."""
    twins = Twins(Specimen(lambda: FrozenBackbone(blocks(3)), vectors(FEATURES), layers_of))
    twins.train(0, 1, 2)


# --- which forwards meet which backwards ---


@keeping
@on_ranks()
def test_a_block_used_again_gets_the_gradients_of_all_its_uses(reshard_after_forward: bool | None) -> None:
    """Prevents: reduction after the first use's gradient, or a release while a later use still reads."""
    Twins(SPECIMENS["reused"], reshard_after_forward=reshard_after_forward).train(0, 1, 2, 3)


@pytest.mark.slow(unless=lambda name, reshard_after_forward: name == "nested" or reshard_after_forward is None)
@spilling
@keeping
@pytest.mark.parametrize("name", ["decoder", "nested", "reused"])
@on_ranks()
def test_two_forwards_before_one_backward(name: str, reshard_after_forward: bool | None) -> None:
    """Prevents (DPO): the second forward counting as the backward of the first."""
    twins = Twins(SPECIMENS[name], reshard_after_forward=reshard_after_forward)
    for step in range(3):
        for chosen, rejected in zip(twins.losses(step), twins.losses(50 + step), strict=True):
            torch.sigmoid(chosen - rejected).backward()
        twins.step()


@spilling
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@keeping
@on_ranks()
def test_two_forwards_before_two_backwards(order: tuple[int, int], reshard_after_forward: bool | None) -> None:
    """Prevents: the end of the first backward taking away what the second one needs."""
    twins = Twins(chain, reshard_after_forward=reshard_after_forward)
    for step in range(3):
        forwards = [twins.losses(step), twins.losses(50 + step)]
        for index in order:
            for loss in forwards[index]:
                loss.backward()
        twins.step()


@keeping
@on_ranks()
def test_backward_twice_with_retain_graph_adds_up(reshard_after_forward: bool | None) -> None:
    """Prevents: hooks that work once per forward."""
    twins = Twins(chain, reshard_after_forward=reshard_after_forward)
    for step in range(3):
        sharded, plain = twins.losses(step)
        for last in (False, True):
            twins.sharded.set_is_last_backward(last)
            sharded.backward(retain_graph=not last)
            plain.backward(retain_graph=not last)
        twins.step()


@keeping
@on_ranks()
def test_a_block_skipped_on_some_steps_costs_no_correctness(reshard_after_forward: bool | None) -> None:
    """Prevents: a prefetched unit that nobody runs staying acquired, or lending its slot to the next unit."""
    Twins(SPECIMENS["skipped"], reshard_after_forward=reshard_after_forward).train(*range(6))


class Shuffler(Chain):
    """Runs its layers in an order that changes with every call."""

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        for index in range(len(self.layers)):
            x = self.layers[(index * (1 + step % 2) + step) % len(self.layers)](x)
        return x


def shuffled_batch(generator: torch.Generator, step: int) -> Batch:
    return Batch((torch.randn(3, FEATURES, generator=generator), step))


@keeping
@on_ranks()
def test_layers_may_run_in_another_order_at_every_step(reshard_after_forward: bool | None) -> None:
    """Prevents: trusting the module order, or the last step's, for more than prefetching."""
    specimen = Specimen(lambda: Shuffler(blocks(5)), shuffled_batch, layers_of)
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(*range(6))


class EarlyExit(Chain):
    """Returns what every layer computes."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return states


@pytest.mark.parametrize("exit_index", [0, 1])
@on_ranks()
def test_a_loss_on_an_early_exit_leaves_later_units_without_gradients(exit_index: int) -> None:
    """Prevents: units gathered for a backward that never reaches them staying acquired."""
    specimen = Specimen(
        lambda: EarlyExit(blocks(3)),
        vectors(FEATURES),
        layers_of,
        lambda states: states[exit_index].square().mean(),
    )
    twins = Twins(specimen)
    for step in range(3):
        twins.backward(step)
        last = [parameter.grad for parameter in twins.sharded.layers[2].parameters()]
        assert all(gradient is None or not full(gradient).any() for gradient in last)
        twins.step()


@on_ranks()
def test_the_gradient_of_the_input_alone_can_be_asked_for() -> None:
    """Prevents: a backward without parameter gradients leaving units gathered or gradients stale."""
    twins = Twins(chain)
    for step in range(3):
        gradients = []
        for model in twins:
            x = rows().requires_grad_()
            gradients += torch.autograd.grad(model(x).square().sum(), x)
        torch.testing.assert_close(*gradients)
        twins.train(step)


@on_ranks()
def test_a_child_runs_alone_after_the_root_has_run() -> None:
    """Prevents: a unit that only works when the root's forward came before it."""
    twins = Twins(chain)
    for step in range(3):
        twins.train(step)
        for model in twins:
            model.layers[1](rows(step)).square().mean().backward()
        twins.step()


@spilling
@keeping
@on_ranks()
def test_many_forwards_in_flight_with_and_without_synchronisation(reshard_after_forward: bool | None) -> None:
    """Prevents (pipelines): a forward between two backwards, unreduced gradients between, mixing their slots up."""
    twins = Twins(SPECIMENS["decoder"], reshard_after_forward=reshard_after_forward)
    for step in range(4):
        waiting = [twins.losses(10 * step), twins.losses(10 * step + 1)]
        for index in range(4):
            twins.sharded.set_requires_gradient_sync(step % 2 == 0 or index == 3)
            for loss in waiting.pop(0):
                loss.backward()
            if index < 2:
                waiting.append(twins.losses(10 * step + 2 + index))
        twins.step()


@on_ranks()
def test_some_units_may_synchronise_while_others_do_not() -> None:
    """Prevents: one switch for a whole model that units are entitled to have of their own."""
    twins = Twins(SPECIMENS["decoder"])
    for step in range(3):
        twins.sharded.set_requires_gradient_sync(False, recurse=False)
        twins.sharded.layers[1].set_requires_gradient_sync(False)
        twins.backward(2 * step)
        with torch.no_grad():
            twins.losses(100 + step)
        twins.sharded.set_requires_gradient_sync(True)
        twins.backward(2 * step + 1)
        twins.step()


class SplitHeads(Chain):
    """Two outputs, of which one is cut off from the layer below."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second, third = self.layers
        x = first(x)
        return second(x.detach()), third(x)


@on_ranks()
def test_each_output_may_have_a_backward_of_its_own() -> None:
    """Prevents: the first backward's end being taken for the end of the step."""
    twins = Twins(Specimen(lambda: SplitHeads(blocks(3)), vectors(FEATURES), layers_of))
    for step in range(3):
        for model in twins:
            for output in model(rows(step)):
                output.square().mean().backward()
        twins.step()


class Spiral(Chain):
    """Calls itself, as a whole, on its own output."""

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = super().forward(x)
        return self(x, depth - 1) if depth else x


@spilling
@keeping
@on_ranks()
def test_a_root_may_call_itself(reshard_after_forward: bool | None) -> None:
    """Prevents: entering a unit while it is entered, counted as the end of the outer call or of the iteration."""
    specimen = Specimen(lambda: Spiral(blocks(2)), vectors(FEATURES), layers_of)
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


class Caller(Chain):
    """Its first layer runs the second one inside its own forward, though that is not its submodule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.layers
        return third(first(x, then=second))


class Host(Block):
    """Runs the layer it is given in the middle of its own forward."""

    def forward(self, x: torch.Tensor, then: nn.Module) -> torch.Tensor:  # type: ignore[override]
        return self.fall(self.rise(then(super().forward(x))))


@spilling
@keeping
@on_ranks()
def test_a_unit_may_run_another_inside_its_forward(reshard_after_forward: bool | None) -> None:
    """Prevents: units that the module order puts one after the other sharing bytes while both compute."""
    specimen = Specimen(lambda: Caller([Host(), Block(), Block()]), vectors(FEATURES), layers_of)
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


@spilling
@on_ranks()
def test_two_models_in_one_process_do_not_disturb_each_other() -> None:
    """Prevents: state per process instead of per model."""
    first, second = Twins(SPECIMENS["decoder"]), Twins(SPECIMENS["odd"])
    for step in range(3):
        losses = [*first.losses(step), *second.losses(step)]
        second_step = second.losses(20 + step)
        for loss in [*losses, *second_step]:
            loss.backward()
        first.step()
        with torch.no_grad():
            first.losses(100 + step)
        second.step()


@on_ranks()
def test_one_backward_may_cross_two_models() -> None:
    """Prevents: the end of one root's backward being taken for the end of the other's."""
    lower, upper = Twins(chain), Twins(SPECIMENS["nested"])
    for step in range(3):
        for generator, critic in zip(lower, upper, strict=True):
            critic(generator(rows(step))).square().mean().backward()
        lower.step()
        upper.step()


@on_ranks()
def test_gradients_pass_through_a_model_that_is_frozen_as_a_whole() -> None:
    """Prevents: units without a trainable parameter not being gathered for backward."""
    lower, upper = Twins(chain), Twins(SPECIMENS["nested"])
    for critic in upper:
        critic.requires_grad_(False)
    for step in range(3):
        for generator, critic in zip(lower, upper, strict=True):
            critic(generator(rows(step))).square().mean().backward()
        lower.step()
    assert all(parameter.grad is None for parameter in upper.sharded.parameters())


@on_ranks(3)
def test_nested_units_hold_on_three_ranks() -> None:
    """Prevents: a parent's own parameters being gathered, released or reduced with its children's."""
    for reshard_after_forward in (True, False, None):
        Twins(SPECIMENS["nested"], reshard_after_forward=reshard_after_forward).train(0, 1, 2)


@on_ranks()
def test_a_deleted_model_leaves_nothing_behind() -> None:
    """Prevents: memory that lives on because the runtime remembers its models."""
    model = Twins(chain).sharded
    model(rows()).sum().backward()
    remains = [
        weakref.ref(model),
        weakref.ref(model.layers[0].rise),
        weakref.ref(model.layers[0].rise.weight),
    ]
    del model
    gc.collect()
    assert [reference() for reference in remains] == [None, None, None]


@on_ranks(8)
def test_eight_ranks_share_layers_of_seven_rows_and_fewer() -> None:
    """Prevents: ranks that own nothing of a parameter, or of a whole unit, falling out of step."""
    Twins(SPECIMENS["odd"]).train(0, 1)


# --- recomputation ---


class Segments(Chain):
    """Recomputes several layers at a time."""

    def __init__(self, layers: list[nn.Module], use_reentrant: bool) -> None:
        super().__init__(layers)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        for segment in (self.layers[1:4], self.layers[4:]):
            x = checkpoint(nn.Sequential(*segment), x, use_reentrant=self.use_reentrant)
        return x


@spilling
@pytest.mark.parametrize("use_reentrant", [False, True])
@keeping
@on_ranks()
def test_segments_of_several_units_may_be_recomputed(use_reentrant: bool, reshard_after_forward: bool | None) -> None:
    """Prevents: a forward inside backward being taken for a new iteration, or taking the slot in use there."""
    specimen = Specimen(lambda: Segments(blocks(7), use_reentrant), vectors(FEATURES), layers_of)
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


class Recomputer(Chain):
    """Recomputes inside what is recomputed, and each use of a layer used again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.layers

        def inner(x: torch.Tensor) -> torch.Tensor:
            return second(checkpoint(first, x, use_reentrant=False))

        x = checkpoint(inner, x, use_reentrant=False)
        return checkpoint(first, third(x), use_reentrant=False)


@spilling
@keeping
@on_ranks()
def test_recomputation_may_be_nested_and_repeated(reshard_after_forward: bool | None) -> None:
    """Prevents: matching recomputations to forwards by their number."""
    specimen = Specimen(lambda: Recomputer(blocks(3)), vectors(FEATURES), layers_of)
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


@on_ranks()
def test_gradients_can_be_cleared_on_the_model_after_an_evaluation() -> None:
    """Prevents: an evaluation that leaves whole parameters registered, whose gradients are nobody's."""
    twins = Twins(SPECIMENS["nested"])
    twins.backward(0)
    with torch.no_grad():
        twins.losses(50)
    for model in twins:
        model.zero_grad()
    assert all(parameter.grad is None for parameter in twins.sharded.parameters())
    twins.train(1, 2)


@on_ranks()
def test_gradients_of_gradients_are_refused() -> None:
    """Prevents: wrong numbers without a word; the next step is right again."""
    twins = Twins(SPECIMENS["nested"])
    loss = twins.specimen.loss_of(twins.sharded, 0, 0)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        loss.backward(create_graph=True)
    twins.train(1, 2)


# --- exceptions ---


class Fault(Exception):
    """Raised on purpose, on every rank."""


class FailingBackward(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise Fault("backward")


class Fragile(Chain):
    """Raises where `fault` says: before, inside or after a layer, or in the backward there."""

    fault: tuple[str, int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if self.fault == ("before", index):
                raise Fault("forward")
            layer.fault = self.fault == ("inside", index)
            x = layer(x)
            if self.fault == ("backward", index):
                x = FailingBackward.apply(x)
        if self.fault == ("after", index):
            raise Fault("forward")
        return x


class FragileBlock(Block):
    """Raises when told to."""

    fault = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fault:
            raise Fault("inside")
        return super().forward(x)


fragile = Specimen(lambda: Fragile([FragileBlock() for _ in range(4)]), vectors(FEATURES), layers_of)
faults = pytest.mark.parametrize(
    "fault",
    [
        ("before", 0),
        ("inside", 0),
        ("before", 2),
        ("inside", 3),
        ("after", 3),
        ("backward", 0),
        ("backward", 2),
    ],
    ids=lambda fault: f"{fault[0]}-{fault[1]}",
)


def fail(twins: Twins, fault: tuple[str, int]) -> None:
    """One step of the sharded model that raises."""
    twins.sharded.fault = fault
    twins.sharded.fault = fault
    with pytest.raises(Fault):
        twins.specimen.loss_of(twins.sharded, 77, dist.get_rank()).backward()
    twins.sharded.fault = None
    for parameter in twins.sharded.parameters():
        parameter.grad = None  # what the failed backward had reduced before it failed


@pytest.mark.slow(
    unless=lambda fault, asked, reshard_after_forward: (
        (reshard_after_forward is None and not asked) or fault in (("inside", 3), ("backward", 2))
    )
)
@faults
@pytest.mark.parametrize("asked", [False, True], ids=["unasked", "reset_iter_state"])
@keeping
@on_ranks()
def test_after_an_exception_the_next_step_is_right(
    fault: tuple[str, int], asked: bool, reshard_after_forward: bool | None
) -> None:
    """Prevents: slots that stay acquired, or a half-finished backward's gradients, after an exception."""
    twins = Twins(fragile, reshard_after_forward=reshard_after_forward)
    for step in range(2):
        fail(twins, fault)  # first before anything has run, then between steps
        if asked:
            twins.sharded.reset_iter_state()
        twins.train(2 * step, 2 * step + 1)


@pytest.mark.slow(unless=lambda fault: fault in (("inside", 3), ("backward", 0), ("backward", 2)))
@faults
@on_ranks()
def test_an_exception_while_accumulating_drops_what_was_not_reduced(fault: tuple[str, int]) -> None:
    """Prevents: half a micro-batch in the next step's sum. FSDP2's `reset_iter_state` asks for it."""
    twins = Twins(fragile)
    for step in range(2):
        twins.sharded.set_requires_gradient_sync(False)
        fail(twins, fault)
        twins.sharded.reset_iter_state()
        twins.backward(2 * step)
        twins.sharded.set_requires_gradient_sync(True)
        twins.backward(2 * step + 1)
        twins.step()


@on_ranks()
def test_after_an_exception_in_evaluation_the_next_step_is_right() -> None:
    """Prevents: relying on backward to clean up."""
    twins = Twins(fragile)
    for step in range(3):
        with torch.no_grad():
            fail(twins, ("inside", 2))
        twins.train(step)


@on_ranks()
def test_an_exception_between_a_forward_and_its_backward_spoils_neither() -> None:
    """Prevents: cleaning up after a failed forward also dropping what a waiting backward needs."""
    twins = Twins(fragile)
    for step in range(3):
        losses = twins.losses(step)
        with torch.no_grad():
            fail(twins, ("inside", 2))
        for loss in losses:
            loss.backward()
        twins.step()


# --- a list group whose modules run one by one ---


class Headless(Tailed):
    """Ends with its norm; the head of the same group is called by the training loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(Chain.forward(self, x))


headless = Specimen(
    lambda: Headless(blocks(2), FEATURES, 5),
    vectors(FEATURES),
    lambda model: [*model.layers, [model.norm, model.head]],
)


def chunked_backward(model: Any, x: torch.Tensor) -> None:
    """The head's loss chunk by chunk, each with its own backward, then the rest's."""
    hidden = model(x)
    leaf = hidden.detach().requires_grad_()
    for chunk in leaf.chunk(2):
        model.head(chunk).square().sum().backward()
    hidden.backward(leaf.grad)


@keeping
@on_ranks()
def test_a_list_group_called_in_parts_and_chunks_adds_its_gradients_up(
    reshard_after_forward: bool | None,
) -> None:
    """Prevents: a group that waits for all of its modules, or drops all but the last chunk's gradient."""
    twins = Twins(headless, reshard_after_forward=reshard_after_forward)
    for step in range(3):
        for model in twins:
            chunked_backward(model, rows(step))
        twins.step()


@spilling
@on_ranks()
def test_two_partial_forwards_of_a_list_group_before_backward() -> None:
    """Prevents: the second forward of a part being taken for the rest of the first."""
    twins = Twins(headless)
    for step in range(3):
        for model in twins:
            first, second = model(rows(step)), model(rows(50 + step))
            (model.head(first) * model.head(second)).sum().backward()
        twins.step()


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


# --- what goes in and comes out ---


@dataclass
class Record:
    """A dataclass of a tensor and something else."""

    x: torch.Tensor
    name: str = "record"


class Pair(NamedTuple):
    """A named tuple of tensors."""

    left: torch.Tensor
    right: torch.Tensor


class RecordBlock(Block):
    """Takes and returns a dataclass."""

    def forward(self, record: Record) -> Record:  # type: ignore[override]
        return Record(super().forward(record.x), record.name)


class PairBlock(Block):
    """Takes and returns a named tuple."""

    def forward(self, pair: Pair) -> Pair:  # type: ignore[override]
        return Pair(super().forward(pair.left), pair.right)


class StatesBlock(Block):
    """Takes and returns a dict of lists."""

    def forward(self, states: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:  # type: ignore[override]
        return {key: [super(StatesBlock, self).forward(x) for x in values] for key, values in states.items()}


def record_of(x: torch.Tensor) -> Record:
    return Record(x)


def pair_of(x: torch.Tensor) -> Pair:
    return Pair(x, x + 1)


def states_of(x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    return {"states": [x, 2 * x]}


class Bare(nn.Sequential):
    """Layers one after the other; a class of its own because it is wrapped as a whole."""


def packed_loss(output: Any) -> torch.Tensor:
    """A loss for what the blocks above return."""
    return square_loss(list(vars(output).values()) if isinstance(output, Record) else output)


@pytest.mark.parametrize(("block", "pack"), [(RecordBlock, record_of), (PairBlock, pair_of), (StatesBlock, states_of)])
@keeping
@on_ranks()
def test_tensors_inside_containers_take_part_in_backward(
    block: type[Block], pack: Callable[[torch.Tensor], Any], reshard_after_forward: bool | None
) -> None:
    """Prevents: hooks that miss tensors inside containers, so that units are not gathered for backward."""
    specimen = Specimen(
        lambda: Bare(block(), block()),
        lambda generator, step: Batch((pack(torch.randn(3, FEATURES, generator=generator)),)),
        list,
        packed_loss,
    )
    Twins(specimen, reshard_after_forward=reshard_after_forward).train(0, 1, 2)


class Table(nn.Module):
    """Takes nothing and returns a function of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3))

    def forward(self) -> torch.Tensor:
        return self.weight.tanh()


class Lookup(nn.Module):
    """A unit with no inputs, one with integer inputs and one called by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.embedding = nn.Embedding(7, 3)
        self.layers = nn.ModuleList([self.table, self.embedding])

    def forward(self, *, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input=ids) @ self.table().t()


def ids_batch(generator: torch.Generator, step: int) -> Batch:
    return Batch((), {"ids": torch.randint(0, 7, (4,), generator=generator)})


@keeping
@on_ranks()
def test_units_without_inputs_that_need_gradients_are_reduced_all_the_same(
    reshard_after_forward: bool | None,
) -> None:
    """Prevents: relying on the gradient of an input to know that a unit's backward is over."""
    Twins(Specimen(Lookup, ids_batch, layers_of), reshard_after_forward=reshard_after_forward).train(0, 1, 2)


class Caster(Block):
    """Notes the dtypes it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.dtypes = [x.dtype, scale.dtype, self.rise.weight.dtype]
        return super().forward(x.to(self.rise.weight.dtype)) * scale


@pytest.mark.parametrize("cast_forward_inputs", [True, False])
@on_ranks()
def test_mixed_precision_casts_what_its_policy_says(cast_forward_inputs: bool) -> None:
    """Prevents: casts at the wrong border, and optimizers that meet low-precision parameters."""
    policy = ours.MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, output_dtype=torch.float64, cast_forward_inputs=cast_forward_inputs
    )
    model = ours.fully_shard(Caster(), mesh=world_mesh(), mp_policy=policy)
    output = model(rows(), scale=torch.ones(1))
    met = torch.bfloat16 if cast_forward_inputs else torch.float32
    assert model.dtypes == [met, met, torch.bfloat16]
    assert output.dtype == torch.float64
    output.sum().backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


class Adapted(nn.Module):
    """A frozen layer in bf16 with a trainable fp32 correction."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(FEATURES, FEATURES, dtype=torch.bfloat16).requires_grad_(False)
        self.down = nn.Linear(FEATURES, 2)
        self.up = nn.Linear(2, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x.bfloat16()).float() + self.up(self.down(x))


@on_ranks(3)
def test_frozen_parameters_of_another_dtype_may_share_a_unit() -> None:
    """Prevents: a unit that is one flat tensor of one dtype."""
    Twins(Specimen(lambda: Bare(Adapted(), Adapted()), vectors(FEATURES), list)).train(0, 1, 2)


class Mixed(nn.Module):
    """Trainable parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(FEATURES, 5, dtype=torch.float64)
        self.coarse = nn.Linear(5, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coarse(self.fine(x.double()).float())


@on_ranks()
def test_trainable_parameters_of_two_dtypes_may_share_a_unit() -> None:
    """Prevents: an error that a user can only answer by regrouping the model."""
    Twins(Specimen(lambda: Bare(Mixed(), Mixed()), vectors(FEATURES), list)).train(0, 1, 2)


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


# --- prefetching and other hints ---


def losses_with_hints(give: Callable[[Any], None]) -> list[float]:
    model = Twins(SPECIMENS["decoder"]).sharded
    give(model)
    losses = []
    for step in range(3):
        loss = SPECIMENS["decoder"].loss_of(model, step, dist.get_rank())
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
    return losses


def no_hints(model: Any) -> None:
    pass


def two_ahead(model: Any) -> None:
    layers = list(model.layers)
    model.set_modules_to_forward_prefetch(layers[:2])
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 3])
        layer.set_modules_to_backward_prefetch(layers[max(0, index - 2) : index][::-1])


def empty_lists(model: Any) -> None:
    for layer in model.layers:
        layer.set_modules_to_forward_prefetch([])
        layer.set_modules_to_backward_prefetch([])


def useless_lists(model: Any) -> None:
    layers = list(model.layers)
    for layer in layers:
        layer.set_modules_to_forward_prefetch([layer, *layers[::-1]])
        layer.set_modules_to_backward_prefetch([layers[-1], model, layer])


def not_in_backward(model: Any) -> None:
    for layer in model.layers:
        layer.set_modules_to_backward_prefetch([])
    model.set_unshard_in_backward(True)


@pytest.mark.parametrize("hints", [two_ahead, empty_lists, useless_lists, not_in_backward])
@on_ranks()
def test_prefetch_lists_change_no_bit(hints: Callable[[Any], None]) -> None:
    """Prevents: a unit gathered too early, or for nothing, taking the slot of one in use."""
    assert losses_with_hints(hints) == losses_with_hints(no_hints)


class Hooked(Chain):
    """Carries hooks of its own from before it was sharded; they read parameters."""

    def __init__(self) -> None:
        super().__init__(blocks(3))
        layer = self.layers[1]
        layer.register_forward_pre_hook(lambda module, args: (args[0] * module.rise.weight.mean(),))
        layer.register_forward_hook(lambda module, args, output: output * 2 + module.rise.bias.sum())
        layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)


@on_ranks()
def test_hooks_of_the_user_run_where_parameters_are_whole() -> None:
    """Prevents: gathering after the user's hooks, or releasing before them."""
    twins = Twins(Specimen(Hooked, vectors(FEATURES), layers_of))
    twins.train(0)
    for model in twins:
        model.layers[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    twins.train(1, 2)


class Normed(nn.Module):
    """A linear layer whose weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = weight_norm(nn.Linear(FEATURES, 7))
        self.fall = nn.Linear(7, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fall(self.rise(x).tanh())


@on_ranks()
def test_parametrized_layers_may_be_sharded() -> None:
    """Prevents: assuming that a module's class is the one it was written as."""
    Twins(Specimen(lambda: Chain([Normed(), Normed()]), vectors(FEATURES), layers_of)).train(0, 1, 2)


@on_ranks()
def test_autocast_may_cast_what_units_compute_on() -> None:
    """Prevents: a copy that autocast caches outliving the slot it was made from."""
    twins = Twins(chain)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = twins.losses(step)
        for loss in losses:
            loss.backward()
        twins.step()


@on_ranks()
def test_an_embedding_that_backward_does_not_read_need_not_be_gathered_for_it() -> None:
    """Prevents: `set_unshard_in_backward(False)` losing the gradient together with the gather."""
    specimen = Specimen(Lookup, ids_batch, layers_of)
    twins = Twins(specimen)
    twins.sharded.embedding.set_unshard_in_backward(False)
    twins.train(0, 1, 2)


@on_ranks()
def test_a_block_that_calls_itself_again_through_its_parent_is_one_unit() -> None:
    """Prevents: entering a unit while it is entered, counted as a second unit."""
    specimen = Specimen(lambda: Reuser(blocks(3)), vectors(FEATURES), lambda model: [model.layers[1]])
    Twins(specimen).train(0, 1, 2)
