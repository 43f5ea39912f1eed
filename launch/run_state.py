"""What a run saves and how it goes on: from where, what must fit, and what a checkpoint of it holds.

Owns the contents of a checkpoint and the run directory's own files. How a checkpoint is written is
`yafsdp_like.checkpoint.steps`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from launch.command_line import as_dict
from launch.config import Config, OptimizerOptions
from launch.factory import Exporter
from launch.metrics import ENVIRONMENT_FILE, environment
from launch.recipe import Recipe
from launch.trainer import Trainer
from launch.world import World
from yafsdp_like.checkpoint import steps
from yafsdp_like.checkpoint.safetensors import TensorSpec
from yafsdp_like.comm.consistency import AgreedError, all_gather_object, raise_on_all_ranks

CONFIG_FILE = "config.yaml"
REQUIRED_METADATA = ("step", "position", "world_size", "order", "shapes")  # that a run cannot go on without


@dataclass(frozen=True)
class Start:
    """Where a run starts: from nothing, or from a checkpoint and the metadata saved with it."""

    path: Path | None = None
    metadata: steps.RunMetadata | None = None
    broken: tuple[str, ...] = ()  # what is wrong with later ones

    @property
    def step(self) -> int:
        """Return the number of steps that were done before."""
        return 0 if self.metadata is None else int(self.metadata["step"])


def find_starts(options: Config, world: World) -> list[Start]:
    """What `resume` stands for, and what to take if that cannot be read: with "auto", the checkpoints before it.

    The first rank looks, and all do the same. Fails on all if there is no such checkpoint, or the run directory is
    another run's.
    """
    found: list[Start] = []
    with raise_on_all_ranks():
        if world.is_first:
            found = _starts(options)
    return all_gather_object(found)[0]


def _starts(options: Config) -> list[Start]:
    output = Path(options.output_dir)
    latest = steps.find_latest(output)
    if options.resume == "auto":
        return _sound_starts(output) or [Start()]
    if options.resume == "no":
        if latest is not None:
            raise ValueError(
                f"{output} holds {latest.name} of an earlier run; say --resume=auto, or another --output_dir"
            )
        return [Start()]
    path = Path(options.resume)
    if (damage := steps.damage(path)) is not None:
        raise ValueError(f"{path} is not a complete checkpoint: {damage}")
    start = Start(path, steps.read_run_metadata(path))
    if latest is not None and steps.step_of(latest) > start.step:
        raise ValueError(
            f"{output} holds {latest.name}, later than {options.resume}; say --resume=auto, or another --output_dir"
        )
    return [start]


def _sound_starts(output: Path) -> list[Start]:
    """The checkpoints of a run that can be read as far as their files' sizes tell, the latest one first."""
    found, broken = [], []
    for path in reversed(steps.all_checkpoints(output)):
        damage = steps.damage(path)
        metadata = {} if damage else steps.read_run_metadata(path)
        if not damage and (missing := [key for key in REQUIRED_METADATA if key not in metadata]):
            damage = f"{steps.METADATA} does not say {', '.join(missing)}"
        if damage:
            broken.append(f"{path} is broken: {damage}")
        else:
            found.append(Start(path, metadata, tuple(broken)))
    if broken and not found:
        raise ValueError(f"no checkpoint can be read: {'; '.join(broken)}; to start anew, move them away")
    return found


def prepare_directory(options: Config, world: World) -> None:
    """Make the run's directory and write where it runs; called on the first rank."""
    output = Path(options.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _replace(output / ENVIRONMENT_FILE, json.dumps(environment(world), indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {output}: {error.strerror or error}") from None


def write_config(options: Config, first_step: int) -> None:
    """config.yaml, the run's configuration; another that is there is kept, named by the step until which it held."""
    output = Path(options.output_dir)
    path, content = output / CONFIG_FILE, yaml.safe_dump(as_dict(options), sort_keys=False)
    if path.exists() and path.read_bytes() != content.encode():
        names = (f"config-until-step-{first_step}{suffix}.yaml" for suffix in ("", *(f"-{i}" for i in range(2, 10000))))
        os.rename(path, output / next(name for name in names if not (output / name).exists()))
    _replace(path, content)


def _replace(path: Path, content: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


class RunState:
    """A trainer's way to and from its checkpoints."""

    def __init__(self, trainer: Trainer, recipe: Recipe, exporter: Exporter | None) -> None:
        options = trainer.options.checkpoint
        self._trainer, self._recipe, self._exporter = trainer, recipe, exporter
        self._directory = Path(trainer.options.output_dir)
        self._checkpoints = steps.StepCheckpoints(self._directory, options.keep, options.asynchronous)

    def restore(self, starts: list[Start], say: Callable[[str], None]) -> None:
        """Put the trainer at the first of `starts` that can be read, and write config.yaml; `say` what has changed.

        Raises on every rank if the checkpoint is of another model or order.
        """
        start = starts[0]
        if start.path is not None:
            start = self._load_first(starts, say)
        with raise_on_all_ranks():
            if self._trainer.world.is_first:
                write_config(self._trainer.options, start.step)

    def _load_first(self, starts: list[Start], say: Callable[[str], None]) -> Start:
        """Ranks read together: what fails for one fails for all."""
        broken: list[str] = []
        for start in starts:
            assert start.path is not None and start.metadata is not None
            with raise_on_all_ranks():
                self._check(start)
            try:
                self._load(start.path, start.metadata)
            except steps.UnreadableError as error:
                broken.append(f"{start.path} is broken: {error}")
                continue
            broken += [words for words in start.broken if words not in broken]
            for words in broken:
                say(f"{words}; going on from {start.path.name}")
            with raise_on_all_ranks():
                if broken and self._trainer.world.is_first:
                    steps.put_aside_later(self._directory, start.step)
            if changes := describe_changes(_config_of(start), self._trainer.options):
                say(f"from step {start.step + 1} on, other than when {start.path.name} was saved:")
                say("\n".join(f"  {line}" for line in changes))
            return start
        raise AgreedError(f"no checkpoint can be read: {'; '.join(broken)}")

    def _load(self, path: Path, metadata: steps.RunMetadata) -> None:
        trainer = self._trainer
        state = self._state(with_random=metadata["world_size"] == trainer.world.size)
        steps.load_into(path, state, may_lack=("optimizer", "state"))  # parameters that had no gradient yet
        set_model_state_dict(trainer.model, state["model"])
        partial_state = StateDictOptions(strict=False)
        set_optimizer_state_dict(trainer.model, trainer.optimizer, state["optimizer"], options=partial_state)
        set_rates(trainer.optimizer, trainer.options.optimizer)
        if "random" in state:
            steps.set_random_state(state["random"][str(trainer.world.rank)], trainer.world.device)
        trainer.step, trainer.position = int(metadata["step"]), int(metadata["position"])

    def save(self, asynchronous: bool) -> None:
        """Write a checkpoint of the trainer, while training goes on if `asynchronous` and the options allow it.

        Raises NotFiniteError rather than write weights that are not finite. Where someone will end this process soon,
        nothing is exported.
        """
        self._trainer.check_weights()
        state = self._state(with_random=True)
        export = None
        stopping = self._trainer.stopping
        if self._exporter is not None and not (stopping is not None and stopping.is_bounded):
            export = partial(self._export, self._exporter, self._export_specs(state["model"]))
        self._checkpoints.save(self._trainer.step, state, self._metadata(), export, asynchronous)

    def check(self) -> None:
        """Raise what a save under way has failed with."""
        self._checkpoints.check()

    def close(self) -> None:
        """Finish the save under way, if any."""
        self._checkpoints.wait()
        self._checkpoints.close()

    def latest(self) -> Path | None:
        """Return the directory of the last complete checkpoint, if there is one."""
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

    def _export_specs(self, weights: dict[str, Any]) -> dict[str, TensorSpec]:
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
        exporter(weights, checkpoint / steps.HF_EXPORT, ids)
        tokenizer.save(checkpoint / steps.HF_EXPORT)

    def _metadata(self) -> steps.RunMetadata:
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
            "model": self._recipe.identity,
            "optimizer": {"kind": "AdamW"},
            "config": as_dict(trainer.options),
        }

    def _check(self, start: Start) -> None:
        """ValueError if `start` cannot be gone on from with this model, order and optimizer."""
        assert start.metadata is not None
        saved, present = start.metadata, self._metadata()
        if difference := steps.first_difference(saved["shapes"], present["shapes"]):
            raise ValueError(f"{start.path} is a checkpoint of another model: {difference}")
        for key, of in (("model", "a checkpoint of another model"), ("optimizer", "of another optimizer")):
            if key in saved and (difference := steps.first_difference(saved[key], present[key])):
                raise ValueError(f"{start.path} is {of}: {difference}")
        if difference := steps.first_difference(saved["order"], present["order"]):
            changes = [
                line for line in describe_changes(_config_of(start), self._trainer.options) if line.startswith("data.")
            ]
            why = f" ({'; '.join(' '.join(line.split()) for line in changes)})" if changes else ""
            raise ValueError(f"{start.path} was trained on other data or in another order: {difference}{why}")


def set_rates(optimizer: torch.optim.Optimizer, options: OptimizerOptions) -> None:
    """What the options say of AdamW, where a loaded state has brought what was said when it was saved."""
    for group in optimizer.param_groups:
        decays = any(param.dim() > 1 for param in group["params"])
        group["weight_decay"] = options.weight_decay if decays else 0.0
        group["betas"], group["eps"] = options.betas, options.eps


def _config_of(start: Start) -> Mapping[str, Any] | None:
    """The configuration of the run that saved it; of checkpoints without one, that of its directory's last run."""
    assert start.path is not None and start.metadata is not None
    found = start.metadata.get("config")
    beside = start.path.parent / CONFIG_FILE
    if found is None and beside.is_file():
        with contextlib.suppress(OSError, yaml.YAMLError):
            found = yaml.safe_load(beside.read_text(encoding="utf-8"))
    return found if isinstance(found, Mapping) else None


def describe_changes(saved: Mapping[str, Any] | None, present: Config) -> list[str]:
    """Where this run's configuration differs from that of the one that saved: `key  then -> now`, a line each."""
    if saved is None:
        return []
    then, now = flat(saved), flat(as_dict(present))
    keys = [key for key in now if key in then and key not in ("output_dir", "resume") and then[key] != now[key]]
    keys += [key for key in (*then, *now) if key.startswith("model.overrides.") and (key in then) != (key in now)]
    return [f"{key}  {_written(then, key)} -> {_written(now, key)}{_effect(key)}" for key in keys]


def _written(values: Mapping[str, Any], key: str) -> str:
    """Return a value as the file of options has it."""
    value = values.get(key, "absent")
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _effect(key: str) -> str:
    if key == "model.hf_dir":
        return " (weights are the checkpoint's)"
    return " (also the length of the rate's schedule)" if key == "num_steps" else ""


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and (value or prefix):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
