"""Law 6, order is a hint: whatever a program does with its model, the numbers are the unsharded model's.

Nearly every test drives a sharded model and its unsharded twin through the same unusual thing; each says
which bug it prevents.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.ranks import on_ranks
from tests.training import full
from tests.twins import Mode, Twins, chain, keeping, modes, rows, spilling
from tests.zoo import FEATURES, SPECIMENS, Batch, Block, Chain, Reuser, Specimen, Tailed, blocks, layers_of, vectors

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


# --- the order of forwards and backwards ---


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
@pytest.mark.slow(unless=lambda reshard_after_forward: reshard_after_forward is None)
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


@pytest.mark.slow
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


@pytest.mark.slow
@on_ranks(8)
def test_eight_ranks_share_layers_of_seven_rows_and_fewer() -> None:
    """Prevents: ranks that own nothing of a parameter, or of a whole unit, falling out of step."""
    Twins(SPECIMENS["odd"]).train(0, 1)


@on_ranks()
def test_a_block_that_calls_itself_again_through_its_parent_is_one_unit() -> None:
    """Prevents: entering a unit while it is entered, counted as a second unit."""
    specimen = Specimen(lambda: Reuser(blocks(3)), vectors(FEATURES), lambda model: [model.layers[1]])
    Twins(specimen).train(0, 1, 2)


@on_ranks()
def test_gradients_of_gradients_are_refused() -> None:
    """Prevents: wrong numbers without a word; the next step is right again."""
    twins = Twins(SPECIMENS["nested"])
    loss = twins.specimen.loss_of(twins.sharded, 0, 0)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        loss.backward(create_graph=True)
    twins.train(1, 2)


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
