"""The command line of the benchmark of a pool."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.help import DTYPE_NAMES, device_here
from yafsdp_like.inference.options import PoolOptions

ALONE = ("popular", "targets")  # each has the device to itself
MEASURES = ("switch", "cold", "prefetch", "awake", "many", *ALONE)
WAYS = ("pool", "apart", "disk")  # of serving models


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Exits with a message, as argparse does, where the command line cannot be run."""
    parser = argparse.ArgumentParser(description="Measure a pool of models; the method is at the top of bench_pool.py.")
    parser.add_argument("--models", default="8b,3b,1b", help="names of presets; one may come several times")
    parser.add_argument("--limit-gib", type=float, required=True, help="of device memory, for all that is planned")
    parser.add_argument("--measure", default="switch,cold,prefetch,awake", help=f"of {','.join(MEASURES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="sequences of one step")
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--kv-gib", type=float, help="of pages that no weights displace")
    parser.add_argument("--max-turn-steps", type=int, default=PoolOptions.max_turn_steps)
    parser.add_argument("--device", help="default: a GPU, if there is one")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16")
    parser.add_argument("--out", type=Path)
    add_popular(parser)
    add_targets(parser)
    options = parser.parse_args(arguments)
    if unknown := set(options.measure.split(",")) - set(MEASURES):
        parser.error(f"--measure: expected some of {','.join(MEASURES)}, found {', '.join(sorted(unknown))}")
    options.measure = [name for name in MEASURES if name in options.measure.split(",")]
    options.ways = [way for way in WAYS if way in options.ways.split(",")]
    if len(options.measure) > 1 and (alone := [name for name in ALONE if name in options.measure]):
        parser.error(f"{alone[0]} has the device to itself: measure it alone")
    options.device = options.device or device_here()
    return options


def add_popular(parser: argparse.ArgumentParser) -> None:
    """Add what only `popular` takes, or `targets` too."""
    group = parser.add_argument_group("popular")
    group.add_argument("--ways", default=",".join(WAYS), help="of the default")
    group.add_argument("--requests", type=int, default=64)
    group.add_argument("--rate", type=float, default=2.0, help="requests a second")
    group.add_argument("--zipf", type=float, default=1.0, help="the k-th model is asked 1/k^this times as often")
    group.add_argument("--most-s", type=float, default=60.0, help="seconds of a way, after which it is given up")
    group.add_argument("--directory", type=Path, help="for the models' files; default: the system's for temporary ones")
    group.add_argument("--workers", choices=("processes", "threads"), default="processes", help="threads are for tests")


def numbers(text: str) -> list[float]:
    """Split at commas."""
    return [float(part) for part in text.split(",")]


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Add what only `targets` takes."""
    group = parser.add_argument_group("targets, with --ways, --zipf, --most-s, --directory and --workers of popular")
    group.add_argument("--rates", type=numbers, default="4,16,32,64", help="requests a second of the pool, ascending")
    group.add_argument("--apart-rates", type=numbers, default="0.25,1,4", help="of one process per model")
    group.add_argument("--seconds", type=float, default=15.0, help="of arrivals for a rate")
    group.add_argument("--ttft-s", type=float, default=4.0, help="seconds to a first token that readers are promised")
    group.add_argument("--tpot-s", type=float, default=0.05, help="and from one token to the next")
    group.add_argument("--overload", type=float, default=0.0, help="times the pool's rate within targets; 0: none")
    group.add_argument("--overload-s", type=float, default=60.0, help="seconds of overload")
