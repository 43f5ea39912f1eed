"""What a run is told: dataclasses filled from one YAML file and dotted overrides, and checked before anything starts.

Owns the names, defaults and limits of every option. Knows nothing of models, ranks or files but the one it reads, and
imports no torch, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from yafsdp_like.comm import TransportName
from yafsdp_like.data import DataConfig

USAGE = "usage: [torchrun --nproc-per-node N] -m launch.train [CONFIG.yaml] [--section.key=value ...]"
FREE_KEYS = ("model.overrides.", "model.factory_args.")  # what follows is the model's own
MAX_SEQUENCES = 8  # of one forward, where nothing is said


@dataclass(frozen=True)
class ModelOptions:
    """Which model: a preset by name, a Hugging Face directory, or a function that returns any module (set one)."""

    preset: str | None = "tiny"  # tiny, small, 135m, 0.6b, 1b, 3b, 8b, 30b-a3b or 70b
    hf_dir: str | None = None  # configuration, weights in safetensors and, if it has one, the tokenizer
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of the preset's or the directory's configuration
    factory: str | None = None  # "package.module:function" that returns an nn.Module
    factory_args: dict[str, Any] = field(default_factory=dict)  # what the function is called with, by name
    blocks: str = ""  # of the factory's module: the container of the blocks to shard one by one, such as "model.layers"
    compile: bool = False  # torch.compile each block
    graph: bool = False  # replay forward and backward as one CUDA graph: for steps that the CPU cannot keep up with
    transport: TransportName = "auto"  # "peer": ranks of one host read each other's memory; "process_group": NCCL, gloo


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW, its warm-up and cosine."""

    lr: float = 3e-4  # at its highest, after the warm-up
    final_lr_ratio: float = 0.1  # of lr, at the last step
    num_warmup_steps: int = 100  # at most all
    betas: tuple[float, float] = (0.9, 0.95)  # of the moments
    eps: float = 1e-8  # beside the root of the second moment
    weight_decay: float = 0.1  # of matrices; norms and biases have none
    max_grad_norm: float | None = 1.0  # gradients are scaled down to this norm; null: never
    nonfinite: Literal["stop", "skip"] = "stop"  # at gradients that are not finite; "skip" waits for each step's norm

    def __post_init__(self) -> None:
        def check(key: str, value: float | None, holds: bool, expected: str) -> None:
            if value is not None and not (math.isfinite(value) and holds):
                raise ValueError(f"optimizer.{key} must be {expected}, got {value}")

        norm = self.max_grad_norm
        check("max_grad_norm", norm, norm is None or norm > 0, "above 0, or null for no clipping")
        check("lr", self.lr, self.lr >= 0, "at least 0")
        check("final_lr_ratio", self.final_lr_ratio, 0 <= self.final_lr_ratio <= 1, "between 0 and 1")
        check("num_warmup_steps", self.num_warmup_steps, self.num_warmup_steps >= 0, "at least 0")
        for beta in self.betas:
            check("betas", beta, 0 <= beta < 1, "at least 0 and below 1")
        check("eps", self.eps, self.eps >= 0, "at least 0")
        check("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")


@dataclass(frozen=True)
class PrecisionOptions:
    """What modules compute in and what gradients are summed in; parameters and moments are fp32."""

    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of forward and backward
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients between ranks


@dataclass(frozen=True)
class CheckpointOptions:
    """Step-N directories under the run's directory."""

    every: int = 100  # steps, all of which a crash may lose; 0: at the end only
    keep: int = 3  # of the last ones
    grace_seconds: float = 25.0  # after SIGTERM, to save a checkpoint before the end; torchrun waits for 30 s
    asynchronous: bool = True  # write behind the next steps, from a copy in host memory that is kept to the end
    export: bool | None = None  # also a Hugging Face directory, `hf`, from the first host's memory; none: if it can be
    export_dtype: Literal["float32", "bfloat16"] = "float32"  # of what is exported

    def __post_init__(self) -> None:
        if not 0 <= self.grace_seconds < math.inf:
            raise ValueError(f"checkpoint.grace_seconds must be a number of seconds, got {self.grace_seconds}")


@dataclass(frozen=True)
class EvaluationOptions:
    """Loss on held-out text."""

    every: int = 0  # steps; 0: at the end only
    num_batches: int = 8  # global batches


@dataclass(frozen=True)
class LogOptions:
    """What is said, and how often."""

    every: int = 10  # steps; ranks meet and the device is synchronised then
    tensorboard: bool = True  # under the run directory, beside metrics.jsonl
    peak_tflops: float | None = None  # of one device, for MFU; none: known by the device's name
    profile_step: int | None = None  # trace this step and the next
    memory_snapshot: bool = False  # the allocator's history to the end of the run; needs GPUs


@dataclass(frozen=True)
class SampleOptions:
    """Text generated at the end."""

    prompt: str = "It was"  # what the text begins with
    num_tokens: int = 80  # that follow; 0: no sample
    top_k: int = 40  # drawn from so many likeliest; 1: greedy
    temperature: float = 0.8  # 0: greedy


@dataclass(frozen=True)
class Config:
    """Everything that a run is told."""

    output_dir: str = "runs/default"  # checkpoints, metrics, loss curve, and what the run was told
    resume: str = "no"  # "no", "auto" (the last complete checkpoint, if any), or a step-N directory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where the host has one for each of its ranks
    seed: int = 0  # of the first weights and of the order of the text
    deterministic: bool = False  # the same bits run after run on GPUs too, from slower kernels; CPUs give them anyway
    num_steps: int = 1000  # optimizer steps
    seq_len: int = 256  # tokens of a sequence
    global_batch_size: int = 32  # sequences per optimizer step, over all ranks
    micro_batch_size: int | None = None  # sequences per rank and forward; none: the most up to 8 that divide its part
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    log: LogOptions = field(default_factory=LogOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        at_least = {
            "num_steps": (self.num_steps, 1),
            "seq_len": (self.seq_len, 1),
            "global_batch_size": (self.global_batch_size, 1),
            "micro_batch_size": (1 if self.micro_batch_size is None else self.micro_batch_size, 1),
            "checkpoint.every": (self.checkpoint.every, 0),
            "checkpoint.keep": (self.checkpoint.keep, 1),
            "evaluation.every": (self.evaluation.every, 0),
            "evaluation.num_batches": (self.evaluation.num_batches, 1),
            "log.every": (self.log.every, 1),
            "sample.num_tokens": (self.sample.num_tokens, 0),
            "sample.top_k": (self.sample.top_k, 1),
        }
        for key, (value, low) in at_least.items():
            if value < low:
                raise ValueError(f"{key} must be at least {low}, got {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must have at most 64 bits, got {self.seed}")
        if not 0 <= self.sample.temperature < math.inf:
            raise ValueError(f"sample.temperature must be at least 0, got {self.sample.temperature}")
        for key, text in {"output_dir": self.output_dir, "resume": self.resume}.items():
            if not text or "\0" in text:
                raise ValueError(f"{key} must say a path, got {text!r}")
        if [self.model.preset, self.model.hf_dir, self.model.factory].count(None) != 2:
            raise ValueError("give exactly one of model.preset, model.hf_dir and model.factory; set the others to null")
        if self.model.factory is None and (self.model.factory_args or self.model.blocks):
            raise ValueError("model.factory_args and model.blocks are of a model.factory, and none is given")
        if self.model.factory is not None and self.model.overrides:
            raise ValueError("model.overrides are of a preset or directory; a factory takes model.factory_args")

    def num_accumulated(self, world_size: int) -> int:
        """Forwards per rank and optimizer step; ValueError unless the global batch divides evenly."""
        num_rows, rest = divmod(self.global_batch_size, world_size)
        if self.micro_batch_size is None:
            if rest:
                raise ValueError(
                    f"global_batch_size {self.global_batch_size} does not divide by {world_size} ranks; make it "
                    f"{(num_rows + 1) * world_size}, say"
                )
            return next(count for count in range(1, num_rows + 1) if num_rows % count == 0 and _fits(num_rows // count))
        per_forward = self.micro_batch_size * world_size
        if self.global_batch_size % per_forward:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} × {world_size} ranks = {per_forward}; change one of them"
            )
        return self.global_batch_size // per_forward


def _fits(num_sequences: int) -> bool:
    return num_sequences <= MAX_SEQUENCES


def load(arguments: Sequence[str]) -> Config:
    """The configuration of a command line: a YAML file, then `--section.key=value` (or `--section.key value`).

    Without a file, or where it is empty, what is not said has its default. Raises ValueError, in one line, for an
    unreadable file, an unknown key (with the nearest known one) and a value of the wrong type.
    """
    if not arguments:
        raise ValueError(f"no configuration file given; {USAGE}; --help lists the keys")
    path = None if arguments[0].startswith("-") else Path(arguments[0])
    overrides = list(arguments if path is None else arguments[1:])
    in_file = [] if path is None else list(_keys_of(_read_yaml(path)))
    _check_keys(in_file, str(path))
    pairs = list(_pairs(overrides))
    said = [key for key, _ in pairs]
    _check_keys(said, "the command line")
    if {"model.hf_dir", "model.factory"} & {*said, *in_file} and not {"model", "model.preset"} & {*said, *in_file}:
        pairs.insert(0, ("model.preset", "null"))  # the default gives way to what is asked for
    return _fill(path, _bracketed(pairs))


def as_dict(config: Config) -> dict[str, Any]:
    """Plain lists, numbers and strings, as YAML and JSON hold them."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _fill(path: Path | None, overrides: Sequence[str]) -> Config:
    import jsonargparse  # here: the names above serve without the `train` extra

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)  # type: ignore[attr-defined]
    parser.add_class_arguments(Config)
    file = [] if path is None or not _read_yaml(path) else ["--config", str(path)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of jsonargparse's own future
            told = parser.parse_args([*file, *overrides])
            defaults, plain = parser.get_defaults(), jsonargparse.Namespace
            for name in sections(Config):
                if told[name] is None or isinstance(told[name], plain):  # None: every key of it is a comment
                    told[name] = plain(**{**vars(defaults[name]), **vars(told[name] or plain())})
            _check_present(told.as_dict())
            values = parser.instantiate_classes(told)
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(_wrong_value(str(error), path, overrides)) from None
    except RecursionError:
        raise ValueError(f"{path or 'the command line'} is not YAML: it is nested too deeply, or in itself") from None
    return Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})


def _check_present(told: Mapping[str, Any]) -> None:
    """Jsonargparse takes null for a value of any type, and anything for a section. Raises ValueError."""
    for key, hint in known_keys(Config):
        section, _, name = key.rpartition(".")
        value = told[section][name] if section else told[name]
        if key in sections(Config) and not isinstance(value, Mapping):
            raise ValueError(f"the section {key} must hold keys and values, found {type(value).__name__}")
        if value is None and type(None) not in typing.get_args(hint):
            raise ValueError(f"{key} must not be null; without the key it has its default")


class _Loader(yaml.SafeLoader):
    """Says of a key that stands twice, of which YAML's loaders take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index] and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _wrong_value(words: str, path: Path | None, overrides: Sequence[str]) -> str:
    """Which key has a value of another type, where it was said, and what it takes, from the parser's own words."""
    words = " ".join(words.split())
    found = re.search(r'Parser key "([^"]+)":.* (?:Got|Given) value: (.*)$', words)
    hint = dict(known_keys(Config)).get(found[1]) if found else None
    if found is None or hint is None:
        return f"{path or 'the command line'}: {words}"
    on_the_line = path is None or any(word.startswith(f"--{found[1]}=") for word in overrides)
    where = "the command line" if on_the_line else str(path)
    return f"{found[1]} in {where}: expected {type_text(hint)}, found {found[2]}"


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold keys and values, found {type(content).__name__}")
    return content


def _keys_of(content: Mapping[str, Any], cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested mappings, down to where options end."""
    inner = sections(cls)
    for key, value in content.items():
        if key in inner and isinstance(value, Mapping):
            yield from _keys_of(value, inner[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of `--key=value` and `--key value`."""
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; {USAGE}")
        key, equals, value = word[2:].partition("=")
        if equals:
            yield key, value
        elif (following := next(words, None)) is not None:
            yield key, following
        else:
            raise ValueError(f"--{key} has no value: say --{key}=VALUE; {USAGE}")


def _bracketed(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The arguments again, a list written as one: `--data.paths=a.txt`, as often as there are paths, and
    `--optimizer.betas=0.9,0.95` are lists without their brackets.
    """
    types = dict(known_keys(Config))
    lists: dict[str, list[str]] = {}
    arguments = []
    for key, value in pairs:
        is_list = typing.get_origin(types.get(key)) is tuple or key == "data.paths"
        if not is_list or value.lstrip().startswith("["):
            lists.pop(key, None)  # brackets say all
            arguments.append((key, value))
        elif key == "data.paths":
            lists.setdefault(key, []).append(value)
            arguments.append((key, json.dumps(lists[key])))
        else:
            arguments.append((key, f"[{value}]"))
    return [f"--{key}={value}" for key, value in arguments]


def _check_keys(keys: Sequence[str], where: str) -> None:
    known = [key for key, _ in known_keys(Config)]
    for key in keys:
        if key in known or key.startswith(FREE_KEYS):
            continue
        leaves = {name: name.rpartition(".")[2] for name in known}
        near = difflib.get_close_matches(key, known, 1, 0.6) or [
            name for name, leaf in leaves.items() if difflib.get_close_matches(key.rpartition(".")[2], [leaf], 1, 0.7)
        ]
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"unknown key '{key}' in {where}; {hint}")


def known_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key and its type; a section comes before what is in it."""
    for name, hint in typing.get_type_hints(cls).items():
        yield f"{prefix}{name}", hint
        if name in sections(cls):
            yield from known_keys(hint, f"{prefix}{name}.")


def sections(cls: type) -> dict[str, type]:
    """The fields that hold options of their own."""
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}


def type_text(hint: Any) -> str:
    """A type as it is said on a command line: int, str|null, auto|cpu|cuda."""
    inner = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return "|".join(map(str, inner))
        case typing.Union | types.UnionType:
            return "|".join(type_text(part) for part in inner)
        case origin if origin is tuple:
            return f"[{type_text(inner[0])},...]" if Ellipsis in inner else f"[{','.join(map(type_text, inner))}]"
        case origin if origin is dict:
            return "value"
    return "null" if hint is type(None) else str(hint.__name__)
