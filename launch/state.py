"""What a run saves and how it goes on: from where, what must fit, and what a checkpoint of it holds.

Owns the contents of a checkpoint and the run directory's own files. How a checkpoint is written is
`yafsdp_like.checkpoint.steps`'s.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from launch.config import Config, as_dict
from launch.metrics import environment
from launch.recipe import Exporter
from launch.trainer import Trainer
from launch.world import World
from yafsdp_like.checkpoint import steps
from yafsdp_like.checkpoint.safetensors import TensorSpec
from yafsdp_like.comm.agreement import together

HF_DIR = "hf"  # inside a checkpoint


@dataclass(frozen=True)
class Start:
    """Where a run starts: from nothing, or from a checkpoint and the facts saved with it."""

    path: Path | None = None
    facts: steps.Facts | None = None

    @property
    def step(self) -> int:
        return 0 if self.facts is None else int(self.facts["step"])


def find_start(options: Config) -> Start:
    """What `resume` stands for; ValueError if there is no such checkpoint, or the run directory is another run's."""
    output = Path(options.output_dir)
    latest = steps.find_latest(output)
    if options.resume == "auto":
        return Start() if latest is None else Start(latest, steps.read_facts(latest))
    if options.resume == "no":
        if latest is not None:
            raise ValueError(
                f"{output} holds {latest.name} of an earlier run; say --resume=auto, or another --output_dir"
            )
        return Start()
    start = Start(Path(options.resume), steps.read_facts(Path(options.resume)))
    if latest is not None and steps.step_of(latest) > start.step:
        raise ValueError(
            f"{output} holds {latest.name}, later than {options.resume}; say --resume=auto, or another --output_dir"
        )
    return start


def prepare_directory(options: Config, world: World) -> None:
    """Make the run's directory and write what the run was told and where it runs; called on the first rank."""
    output = Path(options.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _replace(output / "config.yaml", yaml.safe_dump(as_dict(options), sort_keys=False))
        _replace(output / "environment.json", json.dumps(environment(world), indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {output}: {error.strerror or error}") from None


def _replace(path: Path, content: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


class RunState:
    """A trainer's way to and from its checkpoints."""

    def __init__(self, trainer: Trainer, exporter: Exporter | None) -> None:
        options = trainer.options.checkpoint
        self._trainer, self._exporter = trainer, exporter
        self._directory = Path(trainer.options.output_dir)
        self._checkpoints = steps.StepCheckpoints(self._directory, options.keep, options.asynchronous)

    def restore(self, start: Start) -> None:
        """Put the trainer where `start` is. Raises on every rank if the checkpoint is of another model or order."""
        if start.path is None or start.facts is None:
            return
        trainer, facts = self._trainer, start.facts
        with together():
            self._check(start.path, facts)
        state = self._state(with_random=facts["world_size"] == trainer.world.size)
        with together():
            steps.load_into(start.path, state)
        set_model_state_dict(trainer.model, state["model"])
        set_optimizer_state_dict(trainer.model, trainer.optimizer, state["optimizer"])
        if "random" in state:
            steps.set_random_state(state["random"][str(trainer.world.rank)], trainer.world.device)
        trainer.step, trainer.position = start.step, int(facts["position"])

    def save(self, behind: bool) -> None:
        """Write a checkpoint of the trainer as it is now, `behind` the following steps if the options allow it."""
        state = self._state(with_random=True)
        export = None
        if self._exporter is not None:
            export = partial(self._export, self._exporter, self._exported(state["model"]))
        self._checkpoints.save(self._trainer.step, state, self._facts(), export, behind)

    def check(self) -> None:
        """Raise what a save under way has failed with."""
        self._checkpoints.check()

    def close(self) -> None:
        """Finish the save under way, if any."""
        self._checkpoints.wait()
        self._checkpoints.close()

    def latest(self) -> Path | None:
        return steps.find_latest(self._directory)

    def _state(self, with_random: bool) -> dict[str, Any]:
        """Tensors, as torch's distributed checkpoint stores and fills them."""
        trainer = self._trainer
        state: dict[str, Any] = {
            "model": get_model_state_dict(trainer.model),
            "optimizer": get_optimizer_state_dict(trainer.model, trainer.optimizer),
        }
        if with_random:
            state["random"] = {str(trainer.world.rank): steps.random_state(trainer.world.device)}
        return state

    def _exported(self, weights: dict[str, Any]) -> dict[str, TensorSpec]:
        """What is to be written for others: the same names, whole, floating-point values in the dtype asked for."""
        dtype = getattr(torch, self._trainer.options.checkpoint.export_dtype)
        return {
            name: TensorSpec(dtype if value.is_floating_point() else value.dtype, tuple(value.shape))
            for name, value in weights.items()
        }

    def _export(self, exporter: Exporter, specs: dict[str, TensorSpec], checkpoint: Path) -> None:
        """Write what transformers loads as a model and as its tokenizer.

        Weights come from the checkpoint's shards: nothing is gathered, and the model may be training. The first rank's
        host holds all of them meanwhile.
        """
        weights = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        steps.load_whole(checkpoint, {"model": weights})
        tokenizer = self._trainer.corpus.tokenizer
        ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        exporter(weights, checkpoint / HF_DIR, ids)
        tokenizer.save(checkpoint / HF_DIR)

    def _facts(self) -> steps.Facts:
        trainer = self._trainer
        return {
            "step": trainer.step,
            "position": trainer.position,
            "world_size": trainer.world.size,
            "order": {
                "data": trainer.corpus.header.tokens_hash,
                "seed": trainer.options.seed,
                "seq_len": trainer.options.seq_len,
            },
            "shapes": {name: list(param.shape) for name, param in trainer.model.named_parameters()},
        }

    def _check(self, path: Path, saved: steps.Facts) -> None:
        present = self._facts()
        if difference := steps.first_difference(saved["shapes"], present["shapes"]):
            raise ValueError(f"{path} is a checkpoint of another model: {difference}")
        if difference := steps.first_difference(saved["order"], present["order"]):
            raise ValueError(f"{path} was trained on other data or in another order: {difference}")
