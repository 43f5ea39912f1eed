"""The command line of the benchmark."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.help import DTYPE_NAMES, Help, device_here

if TYPE_CHECKING:
    from bench.subjects import Subject

FIRST_COUNTED_STEP = 2  # from here on an allocator that has settled asks the device for nothing
DECODERS = ("tiny", "small", "135m", "0.6b", "30b-a3b", "1b", "3b", "8b", "70b")  # of this package
OF_TRANSFORMERS = ("qwen2.5-3b", "moe-7b", "vit-l")
OF_PICTURES = ("vit-l",)
NUM_PATCHES = 197  # of a picture of 224 x 224 by 16 x 16, and the class token: the `--seq-len` of a vision transformer
IMPLEMENTATIONS = (
    *("unsharded", "unsharded-graph", "ours", "ours-graph", "ours-nccl", "ours-segments"),
    *("fsdp2", "fsdp2-expandable", "deepspeed", "deepspeed-blocks"),
)
REFERENCE = "fsdp2"  # whose losses the others' are compared with
DESCRIPTION = "Compare sharding runtimes on one training step; the method is described at the top of bench_train.py."
CHECKPOINTING = ("none", "block")


@dataclass(frozen=True)
class Shape:
    """What one step is given: (B, T) tokens on each rank."""

    batch_size: int
    seq_len: int

    def __str__(self) -> str:
        return f"B {self.batch_size} T {self.seq_len}"


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    model: str
    num_layers: int | None
    impls: tuple[str, ...]
    checkpointing: tuple[str, ...]  # of CHECKPOINTING; builders are given options that name one
    batch_sizes: tuple[int, ...]  # ascending
    seq_lens: tuple[int, ...]  # ascending
    reduce_dtype: str
    optimizer: str
    lr: float
    clip: float
    compile: bool
    zero3: tuple[str, ...]
    device: str
    rounds: int
    warmup: int
    steps: int
    free_running: bool
    peak_tflops: float | None
    losses: int
    varying: int
    cycle: int
    limit_gib: float | None
    profile: Path | None
    out: Path | None

    @property
    def subject(self) -> "Subject":
        """What is trained, with `num_layers` blocks where that is given."""
        from bench.subjects import new_subject  # takes seconds

        subject = new_subject(self.model)
        return subject if self.num_layers is None else subject.with_num_layers(self.num_layers)

    @property
    def shapes(self) -> list[Shape]:
        """Every batch size at every sequence length, the fewest tokens first."""
        shapes = [Shape(batch_size, seq_len) for batch_size in self.batch_sizes for seq_len in self.seq_lens]
        return sorted(shapes, key=lambda shape: (shape.batch_size * shape.seq_len, shape.seq_len))

    @property
    def recomputes(self) -> bool:
        """Return whether backward computes each block's activations again, in options that name one way."""
        (way,) = self.checkpointing
        return way == "block"


def parse_options(arguments: Sequence[str], implementations: Collection[str]) -> Options:
    """Exits with a message, as argparse does, where the command line cannot be run."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=Help)
    add_subject(parser, implementations)
    add_effort(parser)
    add_modes(parser)
    values = vars(parser.parse_args(arguments))
    options = Options(**{**values, "zero3": tuple(values["zero3"])})
    if complaint := complaint_about(options, implementations):
        parser.error(complaint)
    return replace(options, device=options.device or device_here())


def names(text: str) -> tuple[str, ...]:
    """Split at commas."""
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """Split at commas, in ascending order."""
    return tuple(sorted(int(part) for part in text.split(",")))


def add_subject(parser: argparse.ArgumentParser, implementations: Collection[str]) -> None:
    """Add what is compared."""
    models = (*DECODERS, *OF_TRANSFORMERS)
    parser.add_argument("--model", choices=models, default="8b", help="its shape; weights are random")
    parser.add_argument("--num-layers", type=int, help="fewer blocks than the model has")
    parser.add_argument(
        "--impl",
        dest="impls",
        type=names,
        default="unsharded,ours,fsdp2",
        help=f"some of {', '.join(implementations)}; ours:KEY=VALUE+KEY=VALUE gives keywords to AdamW and fully_shard",
    )
    parser.add_argument(
        "--checkpointing", type=names, default="none", help="of activations, in all: none, block, or none,block"
    )
    parser.add_argument("--batch-size", dest="batch_sizes", type=numbers, default="1", help="sequences per rank")
    parser.add_argument("--seq-len", dest="seq_lens", type=numbers, default="1024,2048,4096,8192", help="tokens")
    parser.add_argument("--reduce-dtype", choices=DTYPE_NAMES, default="fp32", help="of gradients between ranks")
    parser.add_argument(
        "--optimizer", choices=("torch", "fused"), default="torch", help="of ours; the others run torch's fused AdamW"
    )
    parser.add_argument("--lr", type=float, default=1e-5, help="of the optimizer's steps")
    parser.add_argument("--clip", type=float, default=1.0, help="the gradients' norm at most; 0 does not clip")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block, for each length anew")
    parser.add_argument(
        "--zero3",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of DeepSpeed's zero_optimization, to tune it",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what is measured; default: a GPU, if there is one")


def add_effort(parser: argparse.ArgumentParser) -> None:
    """Add how much is measured, and what is written."""
    parser.add_argument("--rounds", type=int, default=2, help="times the list of implementations is gone through")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each shape that are not timed, at least 2")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each shape")
    parser.add_argument("--free-running", action="store_true", help="do not synchronise after each step")
    parser.add_argument("--peak-tflops", type=float, help="what MFU is a share of; by default the device's by its name")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="one profiled step of each; rank 0's traces")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the full report as JSON")


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Add what may be measured instead of the times of steps."""
    parser.add_argument(
        "--losses", type=int, default=0, metavar="N", help="instead of timing, train N steps on text; compare losses"
    )
    parser.add_argument(
        "--varying",
        type=int,
        default=0,
        metavar="N",
        help="instead, train N steps of lengths between the least and the most of --seq-len; memory by cycle",
    )
    parser.add_argument(
        "--cycle", type=int, default=50, help="steps of --varying before an evaluation and a checkpoint"
    )
    parser.add_argument(
        "--limit-gib",
        type=float,
        help="instead, find the longest sequence that trains in so much device memory, up to the most of --seq-len",
    )


def complaint_about(options: Options, implementations: Collection[str]) -> str | None:
    """Return what is wrong with the options, or None."""
    if unknown := {name.partition(":")[0] for name in options.impls} - set(implementations):
        return f"--impl: unknown {sorted(unknown)}, expected some of {sorted(implementations)}"
    for name in options.impls:
        _, colon, settings = name.partition(":")
        if colon and not (name.startswith("ours") and all("=" in setting for setting in settings.split("+"))):
            return f"--impl: {name} is not NAME:KEY=VALUE, several joined by +, with a NAME of ours"
    if unknown := set(options.checkpointing) - set(CHECKPOINTING):
        return f"--checkpointing: unknown {sorted(unknown)}, expected some of {sorted(CHECKPOINTING)}"
    if options.warmup < FIRST_COUNTED_STEP or options.steps < 1 or options.rounds < 1 or options.cycle < 1:
        return f"--warmup must be at least {FIRST_COUNTED_STEP}, --steps, --rounds and --cycle at least 1"
    if options.optimizer == "fused" and not any(name.startswith("ours") for name in options.impls):
        return f"--optimizer fused is ours alone, and --impl names {', '.join(options.impls)}"
    if complaint := complaint_about_model(options):
        return complaint
    if any("=" not in setting for setting in options.zero3):
        return f"--zero3 takes KEY=VALUE, got {' '.join(options.zero3)}"
    if sum([options.losses > 0, options.varying > 0, options.limit_gib is not None]) > 1:
        return "--losses, --varying and --limit-gib are runs of their own: name one"
    if options.losses and REFERENCE not in options.impls:
        return f"--losses compares with {REFERENCE}: name it in --impl"
    if options.losses and options.batch_sizes[0] < 2:
        return "--losses needs --batch-size of at least 2: with one sequence a rank there is one order of summation"
    return None


def complaint_about_model(options: Options) -> str | None:
    """Return what is wrong with the options for a model of `transformers`, or None."""
    if options.model not in OF_TRANSFORMERS:
        return None
    if others := [name for name in options.impls if name.startswith("deepspeed")]:
        return f"--impl: {', '.join(others)} trains this package's decoders alone, --model is {options.model}"
    if options.losses:
        return f"--losses are those of a decoder on text, --model is {options.model}"
    if options.model in OF_PICTURES and options.seq_lens != (NUM_PATCHES,):
        return f"--seq-len: a picture is a sequence of {NUM_PATCHES}, got {options.seq_lens}"
    return None
