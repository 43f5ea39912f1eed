# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)
"""A run that updates in backward: the same losses and weights, no norm, and no option that needs one."""

import re
from pathlib import Path
from typing import Any

import pytest

from launch import build, config, memory_check
from launch.recipe import recipe_of
from tests.launch.test_going_on import EXPLODING, said
from tests.launch.test_moments import STEADY, forget_after, kept_in
from tests.launch.test_train import file, losses, refusal, text, train, world_here
from tests.ranks import run_ranks
from yafsdp_like.checkpoint import steps

pytestmark = pytest.mark.slow

WITHOUT_NORM = "--optimizer.max_grad_norm=null"
IN_BACKWARD = ("--optimizer.update_in_backward=true", WITHOUT_NORM)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_losses_are_those_of_steps_after_the_backward_also_with_micro_batches(
    file: Path, micro_batch_size: int
) -> None:
    options = [*STEADY, kept_in("bf16"), "--global_batch_size=4", f"--micro_batch_size={micro_batch_size}"]
    whole = train(file, *options, WITHOUT_NORM)
    found = train(file, *options, *IN_BACKWARD, output="other")
    assert losses(found) == losses(whole)
    assert all(record["grad_norm"] is None for record in found)
    assert all(record["grad_norm"] > 0 for record in whole)


@pytest.mark.slow
def test_a_run_goes_on_with_updates_in_backward_and_without(file: Path) -> None:
    options = [*STEADY, kept_in("bf16")]
    whole = losses(train(file, *options, WITHOUT_NORM))
    for last_step, in_backward in ((4, IN_BACKWARD), (2, (WITHOUT_NORM,))):
        forget_after(file.parent / "run", last_step)
        assert losses(train(file, *options, *in_backward, "--resume=auto")) == whole


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], r"max_grad_norm to null, .*; got 1\.0, stop and false$"),
        ([WITHOUT_NORM, "--optimizer.nonfinite=skip"], r"nonfinite to stop .*; got null, skip and false$"),
        ([WITHOUT_NORM, "--optimizer.offload_moments=true"], r"offload_moments to false.*; got null, stop and true$"),
        ([WITHOUT_NORM, "--model.graph=true"], r"^model\.graph replays forward and backward only"),
    ],
)
def test_what_needs_all_gradients_is_refused_in_one_line(others: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load([IN_BACKWARD[0], *others])


def test_the_first_words_say_how_many_gradients_have_memory(file: Path) -> None:
    words = said(file, *IN_BACKWARD, "--num_steps=1", world_size=1)
    assert "updates in backward: gradients of one unit or two have memory at a time\n" in words


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (1, r"^step 4: the weights are not finite, .* not saved"),
        (2, r"^step 4: "),
        (5, r"^step 5: the loss is not finite;"),
    ],
)
def test_a_gradient_that_is_not_finite_is_noticed_by_weights_or_loss(file: Path, every: int, message: str) -> None:
    exploding = [*EXPLODING, "--model.factory=tests.launch.test_going_on:Exploding", f"--checkpoint.every={every}"]
    assert re.search(message, refusal(file, *exploding, *IN_BACKWARD))
    saved = [steps.step_of(path) for path in steps.complete_checkpoints(file.parent / "run")]
    assert saved == [step for step in (1, 2, 3) if step % every == 0]


def gradients_nbytes(arguments: list[str]) -> int:
    options, world = config.load(arguments), world_here()
    model: Any = build.build_model(recipe_of(options.model, options.seed), options, world)
    [demand] = memory_check._demands(model, options, world)
    return next(part.nbytes for part in demand.parts if part.name == "gradients")


def test_memory_for_gradients_of_two_units_is_counted(tmp_path: Path) -> None:
    arguments = ["--model.preset=0.6b", f"--output_dir={tmp_path / 'run'}"]
    [whole] = run_ranks(gradients_nbytes, arguments, world_size=1)
    [at_once] = run_ranks(gradients_nbytes, [*arguments, *IN_BACKWARD], world_size=1)
    assert 0 < at_once < whole / 2
