"""Checkpoints of a run: one directory per step, complete or not there at all.

Owns the directories' names, what makes one complete, and what is in it: `shards/` (torch's distributed checkpoint:
each rank writes and reads its own rows), `metadata.json` (plain values that the caller saves with the shards) and what
the caller exports beside them. Knows nothing of training.

[Note: complete or not there]
A checkpoint is written to `.step-N.partial`, which no reader looks at. Only when every rank has written and every file
is on the disk does the first rank rename it to `step-N`; renaming is atomic. What is to go is renamed first, too. So a
process killed at any moment leaves complete `step-N` directories, and leftovers that the next run removes. A save that
fails removes its own, since a full disk is why most do.

All ranks must see one directory (a shared file system, where there are several hosts).

A checkpoint may come from anybody: what is read here is never run (`reading.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from yafsdp_like.checkpoint import reading
from yafsdp_like.comm.consistency import host_group, raise_on_all_ranks
from yafsdp_like.memory.pinned import pin
from yafsdp_like.memory.plan import readable
from yafsdp_like.ops.split_master import values_of

SHARDS, METADATA = "shards", "metadata.json"
SHARDS_METADATA = f"{SHARDS}/{reading.METADATA}"
HF_EXPORT = "hf"  # a Hugging Face directory with the same model, if the run exports one
STEP_NAME = re.compile(r"step-(\d+)")

RunMetadata = dict[str, Any]
Export = Callable[[Path], None]  # adds to a checkpoint what it makes of the shards there, on the first rank alone


class UnreadableError(ValueError):
    """A checkpoint whose files are damaged, or do not hold what is asked for."""


def find_latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step below `directory`, or None."""
    return max(complete_checkpoints(directory), key=step_of, default=None)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Every complete checkpoint below `directory`, in order of steps."""
    found = [path for path in directory.glob("step-*") if STEP_NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def all_checkpoints(directory: Path) -> list[Path]:
    """Everything below `directory` that is named as a checkpoint, complete or not, in order of steps."""
    return sorted((path for path in directory.glob("step-*") if STEP_NAME.fullmatch(path.name)), key=step_of)


def damage(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be read, as far as names and sizes of files tell; None if they do not."""
    missing = [name for name in (METADATA, SHARDS_METADATA) if not (path / name).is_file()]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    try:
        read_run_metadata(path)
        metadata = reading.read_metadata(path / SHARDS)
    except ValueError as error:
        return " ".join(str(error).split())
    needed: dict[str, int] = {}
    for place in metadata.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, nbytes in sorted(needed.items()):
        file = path / SHARDS / name
        if not file.is_file():
            return f"{SHARDS}/{name} is missing"
        if file.stat().st_size < nbytes:
            return f"{SHARDS}/{name} has {file.stat().st_size:,} bytes of {nbytes:,}"
    return None


def put_aside_later(directory: Path, step: int) -> None:
    """Checkpoints after `step`, which could not be read, get another name, so that they are in nobody's place."""
    for path in all_checkpoints(directory):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.broken")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)


def is_complete(path: Path) -> bool:
    """Whether `path` holds all that `StepCheckpoints.save` writes (a copy that broke off does not)."""
    return (path / METADATA).is_file() and (path / SHARDS_METADATA).is_file()


def step_of(path: Path) -> int:
    """Return the step of a directory that is named as a checkpoint."""
    match = STEP_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def read_run_metadata(path: Path) -> RunMetadata:
    """The plain values saved with the checkpoint at `path`; ValueError if it is not a complete one."""
    if not is_complete(path):
        raise ValueError(f"{path} is not a complete checkpoint: it must hold {METADATA} and {SHARDS_METADATA}")
    try:
        metadata = json.loads((path / METADATA).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / METADATA}: expected an object in JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path / METADATA}: expected an object in JSON, found {type(metadata).__name__}")
    return metadata


def load_into(path: Path, state: dict[str, Any], may_lack: Sequence[str] = ()) -> None:
    """Fill the tensors of `state` (nested dicts) from the checkpoint, in place.

    Every key must have been saved, except in the dict that the keys `may_lack` lead to: an entry of it of which nothing
    was saved is taken out. Called by all ranks together. Raises UnreadableError for a checkpoint that cannot be read,
    or lacks something.
    """
    with raise_on_all_ranks():
        metadata = reading.read_metadata(path / SHARDS)
    if may_lack:
        _take_out_unsaved(state, may_lack, metadata.state_dict_metadata)
    try:
        load(
            state,
            storage_reader=reading.CheckedReader(path / SHARDS, metadata),
            planner=reading.CheckedPlanner(),
        )
    except CheckpointException as error:
        raise UnreadableError(f"{path} cannot be read: {reading.why(error)}") from None


def _take_out_unsaved(state: dict[str, Any], keys: Sequence[str], saved: Iterable[str]) -> None:
    prefix, entries = ".".join((*keys, "")), state
    for key in keys:
        entries = entries[key]
    known = {key.removeprefix(prefix).rpartition(".")[0] for key in saved if key.startswith(prefix)}
    for name in [name for name in entries if name not in known]:
        del entries[name]


def load_whole(path: Path, state: dict[str, Any]) -> None:
    """As `load_into`, on this rank alone: plain tensors, whole and in their own dtype, of what the ranks have saved."""
    reader = reading.CheckedReader(path / SHARDS, reading.read_metadata(path / SHARDS))
    try:
        _load_state_dict(state, reader, no_dist=True, planner=reading.CheckedPlanner())  # `load` does so, and warns
    except CheckpointException as error:
        raise ValueError(f"{path} cannot be read: {reading.why(error)}") from None


class StepCheckpoints:
    """Write the checkpoints of one run, one at a time, asynchronously if asked.

    An asynchronous save copies the state to host memory and writes from there while training continues. The copy's
    memory is kept for the next save: on GPUs it is pinned, and pinning takes longer than copying. Every method is
    collective (all ranks call it) and raises on all ranks if it fails on one.
    """

    def __init__(self, directory: Path, keep: int, asynchronous: bool) -> None:
        self._directory, self._keep, self._asynchronous = directory, keep, asynchronous
        self._group = host_group()
        self._is_first = dist.get_rank() == 0
        self._host_copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        with raise_on_all_ranks(self._group):
            if self._is_first:
                _remove_leftovers(directory)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        metadata: RunMetadata,
        export: Export | None = None,
        asynchronous: bool = True,
    ) -> None:
        """Write `step-<step>`; when this returns, `state` may change.

        Asynchronously (if this and the constructor's flag say so), the files are written later, from a copy. Otherwise
        they are written from `state` itself before this returns. Raises the error of an earlier asynchronous save.
        """
        partial = self._begin(step)
        if self._asynchronous and asynchronous:
            copy = self._host_copy.take(state)
            self._pending = self._thread.submit(self._write, partial, copy, metadata, export)
        else:
            with raise_on_all_ranks(self._group):
                self._write(partial, state, metadata, export)

    def _begin(self, step: int) -> Path:
        """An empty directory to write `step` to, once the save under way is done."""
        self.wait()
        partial = self._directory / f".step-{step}.partial"
        with raise_on_all_ranks(self._group):
            if self._is_first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        return partial

    def wait(self) -> None:
        """Wait for the save under way, if any; raise what it failed with."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.exception()  # first of all wait: its thread communicates over the same group
            with raise_on_all_ranks(self._group):
                pending.result()

    def check(self) -> None:
        """Raise what the save under way failed with, as far as it has come; do not wait for it."""
        with raise_on_all_ranks():  # not over the group of the thread, which may be communicating
            if self._pending is not None and self._pending.done():
                self._pending.result()

    def close(self) -> None:
        """End the thread; a save under way is finished first."""
        self._thread.shutdown(wait=True)
        self._host_copy.close()

    def _write(self, partial: Path, state: dict[str, Any], metadata: RunMetadata, export: Export | None) -> None:
        """Everything between a state that does not change and `step-N`; OSError where the disk does not take it."""
        try:
            save(state, storage_writer=FileSystemWriter(partial / SHARDS), process_group=self._group)
            if self._is_first:  # which has learned last that all ranks have written
                if export is not None:
                    export(partial)
                self._publish(partial, metadata)
        except CheckpointException as error:  # the same on all ranks, with every rank's traceback in it
            rank, failure = next(iter(error.failures.items()))
            raise self._unwritten(partial, f"{failure[0]} (rank {rank})") from None
        except OSError as error:
            raise self._unwritten(partial, str(error)) from error
        finally:
            if self._is_first:  # and all ranks have ended writing; nothing is there once it is published
                shutil.rmtree(partial, ignore_errors=True)

    def _unwritten(self, partial: Path, why: str) -> OSError:
        free = readable(shutil.disk_usage(self._directory).free)
        return OSError(f"the checkpoint {partial} could not be written, with {free} free there: {why}")

    def _publish(self, partial: Path, metadata: RunMetadata) -> None:
        """See [Note: complete or not there]."""
        (partial / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        _sync_tree(partial)
        final = self._directory / partial.name.removeprefix(".").removesuffix(".partial")
        _remove(final)  # of a longer run that was continued from an earlier step
        os.rename(partial, final)
        _sync(self._directory)
        for path in complete_checkpoints(self._directory)[: -self._keep]:
            _remove(path)


class HostCopy:
    """A copy in host memory of the tensors in nested containers; the next copy of as many overwrites it.

    Memory for a tensor on a GPU is pinned, and exactly as large as the tensor: pinning takes longer than copying, and
    PyTorch's own pinned memory is of powers of two.
    """

    def __init__(self) -> None:
        self._copies: list[torch.Tensor] = []

    def take(self, state: Any) -> Any:
        """The same containers with copies, when they hold what `state` does now.

        One tensor after the other, so that what is made of one to be copied (`SplitTensor`) is not there at once.
        """
        leaves, structure = pytree.tree_flatten(state)
        if len(self._copies) != len(leaves):
            self._copies = [torch.empty(0)] * len(leaves)
        copies = [self._copy(index, leaf) for index, leaf in enumerate(leaves)]
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        placed = [_placed_as(leaf, copy) for leaf, copy in zip(leaves, copies, strict=True)]
        return pytree.tree_unflatten(placed, structure)

    def _copy(self, index: int, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return deepcopy(leaf)
        local = values_of((leaf.to_local() if isinstance(leaf, DTensor) else leaf).detach())
        copy = self._copies[index]
        if (copy.shape, copy.dtype) != (local.shape, local.dtype):
            copy = self._copies[index] = torch.empty(local.shape, dtype=local.dtype)
            if local.is_cuda:
                pin(copy.untyped_storage(), copy, local.device)
        return copy.copy_(local, non_blocking=True)

    def close(self) -> None:
        """Let go of the memory."""
        self._copies.clear()


def _placed_as(leaf: Any, local: Any) -> Any:
    if isinstance(leaf, DTensor):  # built by hand: `from_local` would move the copy back to the mesh's device
        return DTensor(local, leaf._spec, requires_grad=False)
    return local


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
