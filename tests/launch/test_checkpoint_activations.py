"""A run that computes its blocks again in backward: the same losses to the bit, and no combination that cannot be."""

# ruff: noqa: F401, F811 (fixtures of another file, which are arguments here)

from pathlib import Path

import pytest

from launch.config import load
from tests.launch.test_train import FACTORY, file, losses, text, train

CHECKPOINTED = "--model.checkpoint_activations=true"


def test_losses_are_those_of_a_run_that_keeps_everything(file: Path) -> None:
    steps = "--num_steps=3"
    assert losses(train(file, steps, CHECKPOINTED, output="again")) == losses(train(file, steps, output="kept"))


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (["--model.compile=true"], r"checkpoint_activations and model\.compile exclude"),
        (["--model.offload_activations=true"], r"checkpoint_activations and model\.offload_activations exclude"),
        (["--model.factory=a:b"], r"checkpoint_activations goes block by block: name the factory's by model\.blocks"),
        (["--model.factory=a:b", "--model.blocks=c", "--model.graph=true"], "which model.graph cannot record"),
    ],
)
def test_what_cannot_be_combined_is_refused(file: Path, others: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load([str(file), CHECKPOINTED, *(FACTORY if "factory" in others[0] else []), *others])
