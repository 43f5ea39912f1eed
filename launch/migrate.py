"""A configuration of DeepSpeed or Accelerate as one of ``launch.train``: what became of each key, and the rest as YAML.

    python -m launch.migrate ds_config.json --world-size 8 > run.yaml
    python -m launch.migrate accelerate.yaml
    torchrun --nproc-per-node 8 -m launch.train run.yaml

Comments at the head of the output say of each key what it became, or why it is ignored. Exit status 1 with one line for
unknown keys, contradictions, and what ``launch.train`` does not do. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.config import COMMAND
from yafsdp_like.migrate.accelerate import read_accelerate
from yafsdp_like.migrate.deepspeed import read_deepspeed
from yafsdp_like.migrate.settings import ForeignSettings, load_mapping

RESHARDS = (
    "launch.train reshards blocks after forward, which the file does not ask for: the same numbers in less memory, "
    "with one more all-gather of each block"
)
OF_ACCELERATE = {"distributed_type", "fsdp_config", "compute_environment"}  # keys that only its files have


def read_settings(path: str | Path, world_size: int | None = None) -> ForeignSettings:
    """Read a file of DeepSpeed's or of Accelerate's, whichever it is. Raises ValueError as their readers do."""
    _, values = load_mapping(path)
    return read_accelerate(path) if OF_ACCELERATE & set(values) else read_deepspeed(path, world_size)


def as_run(settings: ForeignSettings) -> str:
    """Return the YAML file of a run. Raises ValueError for what ``launch.train`` does not do."""
    _check_sharding(settings)
    COMMAND.load(
        [
            f"--{key}={yaml.safe_dump(value, default_flow_style=True)[:-1].removesuffix(chr(10) + '...')}"
            for key, value in settings.run.items()
        ]
        or ["--seed=0"]
    )
    nested: dict[str, Any] = {}
    for key, value in settings.run.items():
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    start = ["torchrun", *(settings.torchrun or ("--nproc-per-node", "N")), "-m launch.train run.yaml"]
    comments = [*str(settings).splitlines(), "", " ".join(start)]
    if settings.reshard_after_forward is False:
        comments.insert(-2, RESHARDS)
    head = "\n".join(f"# {line}".rstrip() for line in comments)
    return f"{head}\n{yaml.safe_dump(nested, sort_keys=False)}"


def _check_sharding(settings: ForeignSettings) -> None:
    asked = {
        "parameters in host memory (CPUOffloadPolicy)": settings.cpu_offload,
        f"a mesh of {settings.mesh_shape}": settings.mesh_shape is not None,
        f"reshard_after_forward={settings.reshard_after_forward}": type(settings.reshard_after_forward) is int,
    }
    if wanted := [words for words, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"{settings.source} asks for {' and '.join(wanted)}, which launch.train does not do: call fully_shard "
            "yourself with the fully_shard_options() of launch.migrate.read_settings, or leave it out of the file"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser("python -m launch.migrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="a DeepSpeed configuration (JSON), or Accelerate's (YAML)")
    parser.add_argument("--world-size", type=int, help="ranks, for batch sizes of a DeepSpeed configuration")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:  # after --help, or a mistake
        return int(end.code or 0)
    try:
        print(as_run(read_settings(given.file, given.world_size)), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
