"""The command line of the benchmark."""

import argparse
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.help import Help
from yafsdp_like.models import PRESETS, DecoderConfig

FIRST_COUNTED_STEP = 2  # from here on an allocator that has settled asks the device for nothing
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
REFERENCE = "fsdp2"  # whose losses the others' are compared with
DESCRIPTION = "Compare sharding runtimes on one training step; the method is told at the top of bench_train.py."


@dataclass(frozen=True)
class Options:
    """The command line, parsed."""

    model: str
    num_layers: int | None
    impls: tuple[str, ...]
    seq_lens: tuple[int, ...]  # ascending
    batch_size: int
    reduce_dtype: str
    optimizer: str
    lr: float
    compile: bool
    zero3: tuple[str, ...]
    device: str
    rounds: int
    warmup: int
    steps: int
    free_running: bool
    losses: int
    profile: Path | None
    out: Path | None

    @property
    def config(self) -> DecoderConfig:
        """The preset's shape, with `num_layers` blocks where that is given."""
        config = PRESETS[self.model]
        return config if self.num_layers is None else dataclasses.replace(config, num_layers=self.num_layers)


def parse_options(arguments: Sequence[str], implementations: Collection[str]) -> Options:
    """Exits with a message, as argparse does, where the command line cannot be run."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=Help)
    add_subject(parser, implementations)
    add_effort(parser)
    values = vars(parser.parse_args(arguments))
    values["impls"] = tuple(values["impls"].split(","))
    values["zero3"] = tuple(values["zero3"])
    values["seq_lens"] = tuple(sorted(int(seq_len) for seq_len in values["seq_lens"].split(",")))
    options = Options(**values)
    if complaint := complaint_about(options, implementations):
        parser.error(complaint)
    return options


def add_subject(parser: argparse.ArgumentParser, implementations: Collection[str]) -> None:
    """What is compared."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=PRESETS, default="8b", help="its shape; weights are random")
    parser.add_argument("--num-layers", type=int, help="fewer blocks than the model has")
    parser.add_argument(
        "--impl", dest="impls", default="unsharded,ours,fsdp2", help="some of " + ", ".join(implementations)
    )
    parser.add_argument("--seq-len", dest="seq_lens", default="1024,2048,4096,8192", help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per rank")
    parser.add_argument("--reduce-dtype", choices=DTYPES, default="fp32", help="of gradients between ranks")
    parser.add_argument(
        "--optimizer", choices=("torch", "fused"), default="torch", help="of ours; the others run torch's fused AdamW"
    )
    parser.add_argument("--lr", type=float, default=1e-5, help="of the optimizer's steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block, for each length anew")
    parser.add_argument(
        "--zero3",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of DeepSpeed's zero_optimization, to tune it",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="what is measured"
    )


def add_effort(parser: argparse.ArgumentParser) -> None:
    """How much is measured, and what is written."""
    parser.add_argument("--rounds", type=int, default=2, help="times the list of implementations is gone through")
    parser.add_argument("--warmup", type=int, default=3, help="steps at each length that are not timed, at least 2")
    parser.add_argument("--steps", type=int, default=8, help="timed steps at each length")
    parser.add_argument("--free-running", action="store_true", help="do not synchronise after each step")
    parser.add_argument(
        "--losses", type=int, default=0, metavar="N", help="instead of timing, train N steps on text; compare losses"
    )
    parser.add_argument("--profile", type=Path, metavar="DIR", help="one profiled step of each; rank 0's traces")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the final JSON object here too")


def complaint_about(options: Options, implementations: Collection[str]) -> str | None:
    """What is wrong with the options, or None."""
    if unknown := set(options.impls) - set(implementations):
        return f"--impl: unknown {sorted(unknown)}, expected some of {sorted(implementations)}"
    if options.warmup < FIRST_COUNTED_STEP or options.steps < 1 or options.rounds < 1:
        return f"--warmup must be at least {FIRST_COUNTED_STEP}, --steps and --rounds at least 1"
    if options.optimizer == "fused" and not any(name.startswith("ours") for name in options.impls):
        return f"--optimizer fused is ours alone, and --impl names {', '.join(options.impls)}"
    if any("=" not in setting for setting in options.zero3):
        return f"--zero3 takes KEY=VALUE, got {' '.join(options.zero3)}"
    if options.losses and REFERENCE not in options.impls:
        return f"--losses compares with {REFERENCE}: name it in --impl"
    if options.losses and options.batch_size < 2:
        return "--losses needs --batch-size of at least 2: with one sequence a rank there is one order of summation"
    return None
