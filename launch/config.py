"""Options of a training run: names, defaults and limits of every option. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.command_line import Command
from yafsdp_like.comm import TransportName
from yafsdp_like.data import DataConfig

USAGE = "usage: [torchrun --nproc-per-node N] -m launch.train [CONFIG.yaml] [--section.key=value ...]"
NOTES = """
Keys are written in the YAML file in sections, or after it with dots: --optimizer.lr=1e-3 (the last one counts). A list
is written [a, b], nothing is null, and --data.paths=FILE may be repeated. --print_config shows what would be run.
"""
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
    checkpoint_activations: bool = False  # keep only blocks' inputs, and compute the rest again in backward
    offload_activations: bool = False  # keep what blocks save for backward in host memory, copied beside compute
    graph: bool = False  # replay forward and backward as one CUDA graph: for steps that the CPU cannot keep up with
    transport: TransportName = "auto"  # "peer": ranks of one host read each other's memory; "process_group": NCCL, gloo

    def __post_init__(self) -> None:
        if self.graph and self.offload_activations:
            raise ValueError(
                "model.graph records steps, and model.offload_activations cannot be recorded: set one of them to false"
            )
        for key in ("offload_activations", "checkpoint_activations"):
            if getattr(self, key) and self.factory is not None and not self.blocks:
                raise ValueError(f"model.{key} goes block by block: name the factory's by model.blocks")
        if self.checkpoint_activations:
            self._check_checkpointing()

    def _check_checkpointing(self) -> None:
        if self.compile or self.offload_activations:
            other = "compile" if self.compile else "offload_activations"
            raise ValueError(f"model.checkpoint_activations and model.{other} exclude each other: set one to false")
        if self.graph and self.factory is not None:
            raise ValueError(
                "model.checkpoint_activations computes a factory's blocks again with the random numbers of before, "
                "which model.graph cannot record: set one of them to false"
            )


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
    moments: Literal["fp32", "bf16", "int8"] = "fp32"  # what they are kept in; int8: by blocks that share an exponent
    offload_moments: bool | Literal["and_remainder"] = False  # in host memory; the latter: split_master's halves, too
    update_in_backward: bool = False  # update each unit in backward and drop its gradients; needs max_grad_norm null
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
        if self.update_in_backward and (norm is not None or self.offload_moments or self.nonfinite == "skip"):
            raise ValueError(
                "optimizer.update_in_backward updates before the gradients of all units are known: set "
                "optimizer.max_grad_norm to null, nonfinite to stop and offload_moments to false, or leave it out; got "
                f"{'null' if norm is None else norm}, {self.nonfinite} and {str(self.offload_moments).lower()}"
            )


@dataclass(frozen=True)
class PrecisionOptions:
    """What modules compute in and what gradients are summed in; parameters are fp32."""

    split_master: bool = False  # keep these as bfloat16, which is computed on, and 16 bits of remainder: 4 bytes, not 6
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of forward and backward
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients between ranks
    grad_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients kept; bfloat16 where they are reduced in it

    def __post_init__(self) -> None:
        if self.grad_dtype == "bfloat16" and self.reduce_dtype != "bfloat16":
            raise ValueError(
                f"precision.grad_dtype bfloat16 keeps what is reduced in bfloat16, and precision.reduce_dtype is "
                f"{self.reduce_dtype}; change one of them"
            )


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

    every: int = 10  # steps; ranks exchange losses and the device is synchronised then
    tensorboard: bool = True  # under the run directory, beside metrics.jsonl
    peak_tflops: float | None = None  # of one device, for MFU; none: known by the device's name
    memory: bool = False  # what holds the first rank's device memory after forward, backward and update, by category
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
    """The whole configuration of a run."""

    output_dir: str = "runs/default"  # checkpoints, metrics, the report, and the run's configuration
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
        if self.optimizer.offload_moments == "and_remainder" and not self.precision.split_master:
            raise ValueError(
                "optimizer.offload_moments and_remainder keeps the lower halves in host memory that "
                "precision.split_master makes: set that to true, or offload_moments to true for moments alone"
            )
        if self.model.graph and self.optimizer.update_in_backward:
            raise ValueError(
                "model.graph replays forward and backward only, and optimizer.update_in_backward updates in it: "
                "set one of them to false"
            )
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


def _implied(keys: Set[str]) -> dict[str, Any]:
    """The default preset gives way to another kind of model that is asked for."""
    is_other = {"model.hf_dir", "model.factory"} & keys and not {"model", "model.preset"} & keys
    return {"model.preset": None} if is_other else {}


COMMAND = Command(USAGE, Config, NOTES, implied=_implied, mistake_status=1)


def load(arguments: Sequence[str]) -> Config:
    """The configuration of a command line: a YAML file, then ``--section.key=value`` (or ``--section.key value``).

    Raises ValueError, in one line, for what cannot be read or run.
    """
    return COMMAND.load(arguments)
