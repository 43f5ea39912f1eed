"""Checkpoints of a run: one directory per step, complete or not there at all.

Owns the directories' names, what makes one complete, and what is in it: `shards/` (torch's distributed checkpoint:
each rank writes and reads its own rows), `facts.json` (plain values that the caller saves with them) and whatever the
caller exports beside them. Knows nothing of training.

[Note: complete or not there]
A checkpoint is written to `.step-N.partial`, which no reader looks at. Only when every rank has written and every file
is on the disk does the first rank rename it to `step-N`; renaming is atomic. What is to go is renamed first, too. So a
process killed at any moment leaves complete `step-N` directories, and leftovers that the next run removes.

All ranks must see one directory (a shared file system, where there are several hosts).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from yafsdp_like.comm.agreement import host_group, together

SHARDS, FACTS = "shards", "facts.json"
STEP_NAME = re.compile(r"step-(\d+)")

Facts = dict[str, Any]
Export = Callable[[Path], None]  # writes below a directory; called on every rank, fails after its last collective


def find_latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step below `directory`, or None."""
    return max(complete_checkpoints(directory), key=step_of, default=None)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Every complete checkpoint below `directory`, in order of steps."""
    found = [path for path in directory.glob("step-*") if STEP_NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def is_complete(path: Path) -> bool:
    """Whether `path` holds all that `StepCheckpoints.save` writes (a copy that broke off does not)."""
    return (path / FACTS).is_file() and (path / SHARDS / ".metadata").is_file()


def step_of(path: Path) -> int:
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def read_facts(path: Path) -> Facts:
    """The plain values saved with the checkpoint at `path`; ValueError if it is not a complete one."""
    if not is_complete(path):
        raise ValueError(f"{path} is not a complete checkpoint: it must hold {FACTS} and {SHARDS}/.metadata")
    facts: Facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    return facts


def load_into(path: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state` (nested dicts; every key must have been saved) from the checkpoint, in place."""
    load(state, storage_reader=FileSystemReader(path / SHARDS))


class StepCheckpoints:
    """The checkpoints of one run, written one at a time, behind the following steps if so wished.

    Every method is called by all ranks together, and raises on all if it fails on one.
    """

    def __init__(self, directory: Path, keep: int, asynchronous: bool) -> None:
        self._directory, self._keep, self._asynchronous = directory, keep, asynchronous
        self._group = host_group()
        self._is_first = dist.get_rank() == 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        with together(self._group):
            if self._is_first:
                _remove_leftovers(directory)

    def save(self, step: int, state: dict[str, Any], facts: Facts, export: Export | None = None) -> None:
        """Write `step-<step>`. When this returns, `state` may change; asynchronously, the files are not there yet.

        Raises what an earlier asynchronous save failed with.
        """
        self.wait()
        partial = self._directory / f".step-{step}.partial"
        with together(self._group):
            if self._is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with together(self._group):
            if export is not None:
                export(partial)
        if self._asynchronous:
            self._pending = self._thread.submit(self._write, partial, snapshot(state), facts)
        else:
            with together(self._group):
                self._write(partial, state, facts)

    def wait(self) -> None:
        """Wait for the save under way, if any; raise what it failed with."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.exception()  # first of all wait: its thread communicates over the same group
            with together(self._group):
                pending.result()

    def check(self) -> None:
        """Raise what the save under way failed with, as far as it has come; do not wait for it."""
        with together():  # not over the group of the thread, which may be communicating
            if self._pending is not None and self._pending.done():
                self._pending.result()

    def close(self) -> None:
        """End the thread; a save under way is finished first."""
        self._thread.shutdown(wait=True)

    def _write(self, partial: Path, state: dict[str, Any], facts: Facts) -> None:
        try:
            save(state, storage_writer=FileSystemWriter(partial / SHARDS), process_group=self._group)
        except CheckpointException as error:  # the same on all ranks, with every rank's traceback in it
            rank, failure = next(iter(error.failures.items()))
            free_mib = shutil.disk_usage(self._directory).free / 2**20
            raise OSError(
                f"the checkpoint {partial} could not be written, with {free_mib:,.0f} MiB free there: "
                f"{failure[0]} (rank {rank})"
            ) from None
        self._publish(partial, facts)

    def _publish(self, partial: Path, facts: Facts) -> None:
        """See [Note: complete or not there]. The first rank learns last that all have written."""
        if not self._is_first:
            return
        (partial / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        _sync_tree(partial)
        final = self._directory / partial.name.removeprefix(".").removesuffix(".partial")
        _remove(final)  # of a longer run that was continued from an earlier step
        os.rename(partial, final)
        _sync(self._directory)
        for path in complete_checkpoints(self._directory)[: -self._keep]:
            _remove(path)


def snapshot(state: Any) -> Any:
    """A copy in host memory of the tensors in nested containers: training goes on while it is written."""
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    if isinstance(state, DTensor):  # built by hand: `from_local` would move the copy back to the mesh's device
        return DTensor(state.to_local().detach().to("cpu", copy=True), state._spec, requires_grad=False)
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else state


def _remove(path: Path) -> None:
    if path.exists():
        aside = path.with_name(f".{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside)


def _remove_leftovers(directory: Path) -> None:
    for path in [*directory.glob(".step-*.partial"), *directory.glob(".step-*.old")]:
        shutil.rmtree(path)


def _sync_tree(directory: Path) -> None:
    """Files and folders below and including `directory` reach the disk."""
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_difference(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """The first key on which two mappings differ, in words; None if they are equal."""
    for key in [*present, *(key for key in saved if key not in present)]:
        if saved.get(key) != present.get(key):
            return f"{key} is {saved.get(key, 'absent')} there and {present.get(key, 'absent')} here"
    return None


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this process's generators, as tensors of bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
