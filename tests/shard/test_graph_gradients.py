"""Gradients of recorded steps: where they lie, who may still have them, and parameters that are not sharded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from tests.ranks import on_ranks, run_ranks
from tests.shard.test_graph import LARGE, Recorder, batch, forward_backward_of, sharded, train_in_order
from tests.training import ours, world_mesh
from yafsdp_like import GraphedStep
from yafsdp_like.shard import graph
from yafsdp_like.shard.runtime.unit_state import unit_of

pytestmark = pytest.mark.slow

LENGTHS = (16, 32)


def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, dict[int, Callable[[], None]], dict[int, Any]]:
    """A model, a step of which two lengths are recorded, calls of it, and the gradients that are to come out."""
    monkeypatch.setattr(graph, "StepRecorder", Recorder)
    model = sharded("cpu")
    function = forward_backward_of(model)
    step = GraphedStep(function, model)
    calls = {t: lambda t=t: step(*batch(0, t, "cpu")) for t in LENGTHS}  # type: ignore[misc]
    expected = {}
    for t in LENGTHS:
        function(*batch(0, t, "cpu"))
        expected[t] = gradients(model)
        model.zero_grad()
    for t in LENGTHS:
        for _ in range(3):
            calls[t]()
            assert_equal(gradients(model), expected[t])
            model.zero_grad()
    assert step.num_recordings == 2
    return model, step, calls, expected


def gradients(model: Any, factor: int = 1) -> list[torch.Tensor]:
    return [p.grad.to_local() * factor for p in model.parameters()]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], factor: int = 1) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, factor * other)


@on_ranks()
def test_each_recording_shows_its_gradients_in_the_pool_and_the_allocator_has_none() -> None:
    """Prevents: bytes for gradients beside those of the activations that are dead by then."""
    with pytest.MonkeyPatch.context() as patch:
        model, step, calls, expected = recorded(patch)
        for t in (*LENGTHS, *reversed(LENGTHS)):
            calls[t]()
            assert_equal(gradients(model), expected[t])
            shards = [p.grad_shard for layer in model.layers for p in unit_of(layer).params]  # type: ignore[union-attr]
            assert all(s is not None and not s._own.storage.nbytes() and not s.is_pinned for s in shards)
            model.zero_grad()
        assert step._recorder.log[-4:] == ["replay"] * 4
        assert not step.keeps_gradients
        assert "from backward to zero_grad\n" in str(model.memory_plan())
        forward_backward_of(model)(*batch(0, 16, "cpu"))  # in memory of the allocator again
        assert_equal(gradients(model), expected[16])


@on_ranks()
def test_a_gradient_of_a_replay_that_is_held_keeps_its_values_and_a_view_keeps_steps_from_being_replayed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        model, step, calls, expected = recorded(patch)
        calls[16]()
        held = [p.grad for p in model.parameters()]
        model.zero_grad()
        calls[32]()
        assert step._recorder.log[-2:] == ["replay", "replay"]
        assert_equal([grad.to_local() for grad in held], expected[16])
        view = next(model.parameters()).grad.to_local()
        model.zero_grad()
        num_calls = len(step._recorder.log)
        for t in (16, 32, 16):
            calls[t]()
            assert_equal(gradients(model), expected[t])
            model.zero_grad()
        assert len(step._recorder.log) == num_calls, "run as they are, outside the pool"
        assert torch.equal(view, expected[32][0])
        del view
        calls[16]()
        assert step._recorder.log[num_calls:] == ["replay"]
        assert_equal(gradients(model), expected[16])


@on_ranks()
def test_gradients_that_a_step_adds_to_move_out_of_the_pool_and_stay_where_they_are() -> None:
    with pytest.MonkeyPatch.context() as patch:
        model, step, calls, expected = recorded(patch)
        calls[32]()
        before = [p.grad for p in model.parameters()]
        calls[16]()
        assert step.keeps_gradients
        assert "for good, since recorded steps add to gradients" in str(model.memory_plan())
        assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))
        step._recorder.overwrite()
        summed = [one + other for one, other in zip(expected[16], expected[32], strict=True)]
        assert_equal(gradients(model), summed)
        model.zero_grad()
        for number in range(4):
            calls[16]()
            assert step.num_recordings == (number >= 2)
            assert_equal(gradients(model), expected[16])
            model.zero_grad()


@on_ranks()
def test_a_gradient_with_a_view_is_added_to_where_it_is() -> None:
    with pytest.MonkeyPatch.context() as patch:
        model, step, calls, expected = recorded(patch)
        calls[16]()
        view = next(model.parameters()).grad.to_local()
        calls[16]()
        assert not step.keeps_gradients
        assert torch.equal(view, 2 * expected[16][0])
        assert_equal(gradients(model), expected[16], 2)


@on_ranks()
def test_replays_set_and_add_to_gradients_of_parameters_that_are_not_sharded() -> None:
    """Prevents: parameters that train until a step is recorded, and never again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "StepRecorder", Recorder)
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.unused, used, bias = nn.Parameter(torch.ones(3)), model[1].weight, model[1].bias
        ours.fully_shard(model[0], mesh=world_mesh())
        ours.fully_shard(model, mesh=world_mesh(), ignored_params={used, bias, model.unused})

        def function(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = model(x).sum()
            y.backward()
            return y.detach()

        step = GraphedStep(function, model)
        x = torch.ones(2, 4)
        step(x)
        expected = used.grad.clone()
        for _ in range(5):
            model.zero_grad()
            step(x)
            assert torch.equal(used.grad, expected)
            assert model.unused.grad is None
        assert step.num_recordings == 1
        kept = used.grad
        for p in model[0].parameters():
            p.grad = None
        step(x)
        assert used.grad is kept and torch.equal(kept, 2 * expected)


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len", [64, 512])
def test_a_recorded_step_does_not_hold_gradients_beside_activations(seq_len: int) -> None:
    """It may hold what the eager steps before it have left in segments of the default pool, which it cannot use."""
    options: dict[str, Any] = {"world_size": 1, "device": "cuda", "timeout": 120}
    [(eager, _)] = run_ranks(train_in_order, [seq_len], False, **options)
    [(recorded, _)] = run_ranks(train_in_order, [seq_len], True, **options)
    assert recorded < eager + 0.8 * 4 * LARGE.num_params
